// The three row primitives as plain structs and functions: no torch header here. The structs serve CPU
// and CUDA alike, the functions are the CPU's but for the last ones.
//
// A row is one token position's logits z (V). With u = z / temperature, m = max u and s = sum exp(u - m),
// the primitives compute what fastpo/backends/base.py specifies. N and V count rows and columns; strides
// are in elements; a null pointer means "not given".
#pragma once

#include <cstdint>

#include "token_loss.h"

// Functions used in files compiled for different instruction sets are inlined without exception: a
// copy emitted from the AVX-512 file could otherwise be the one that the linker keeps for everyone.
#ifdef __CUDACC__
#define FASTPO_INLINE __host__ __device__ __forceinline__
#else
#define FASTPO_INLINE inline __attribute__((always_inline))
#endif
#define FASTPO_LAMBDA __attribute__((always_inline))

namespace fastpo {

struct BFloat16 {
  uint16_t bits;
};

struct Half {
  uint16_t bits;
};

enum class DType { kFloat32, kBFloat16, kFloat16 };

FASTPO_INLINE int64_t item_size(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

// Rows of a matrix with unit stride along V.
struct Matrix {
  void* data = nullptr;
  DType dtype = DType::kFloat32;
  int64_t row_stride = 0;

  FASTPO_INLINE void* row(int64_t i) const {
    return static_cast<char*>(data) + i * row_stride * item_size(dtype);
  }
};

struct Temperature {
  const float* per_row = nullptr;  // (N,), wins over `value`
  double value = 1;

  FASTPO_INLINE double of(int64_t i) const { return per_row ? per_row[i] : value; }
  FASTPO_INLINE float inverse(int64_t i) const { return float(1.0 / of(i)); }
};

// What every primitive reads.
struct RowsIn {
  Matrix logits;                    // (N, V)
  int64_t columns = 0;              // V
  const int64_t* tokens = nullptr;  // (N,)
  Temperature temperature;
};

struct StatsParams {
  RowsIn in;
  const bool* mask = nullptr;  // (N,)
  float* logprobs = nullptr;   // (N,), out, as all below
  float* entropy = nullptr;
  float* row_max = nullptr;
  float* log_sum = nullptr;
  float* log_sum_sq_probs = nullptr;  // this and the next two: null, or given all three
  float* mean_logits = nullptr;
  bool* is_top1 = nullptr;
};

struct GradParams {
  RowsIn in;
  const float* logprobs = nullptr;  // (N,), of row_stats, as the next three
  const float* entropy = nullptr;
  const float* row_max = nullptr;
  const float* log_sum = nullptr;
  const float* logprob_grad = nullptr;  // (N,), c
  const float* entropy_grad = nullptr;  // (N,), e
  Matrix out;                           // (N, V), may lie in the logits' own rows
};

struct LossParams {
  RowsIn in;
  const float* weight = nullptr;  // (N,), as all below
  const float* advantages = nullptr;
  const float* old_logprobs = nullptr;
  const float* ref_logprobs = nullptr;
  const float* entropy_weight = nullptr;
  const float* clip_low = nullptr;
  const float* clip_high = nullptr;
  const float* nll_weight = nullptr;
  ObjectiveParams objective;
  Matrix out;             // gradient (N, V), may lie in the logits' own rows; data null: not wanted
  float* loss = nullptr;  // (N,), out, as all below
  float* logprobs = nullptr;
  float* entropy = nullptr;
  uint8_t* clipped = nullptr;
};

struct ScaleParams {
  Matrix grad;  // (N, V), in place
  int64_t columns = 0;
  float factor = 1;
};

constexpr int64_t kBlock = 4096;  // columns; as fp32 they take half of a first-level cache

// What a policy loss keeps of a row for its gradient: exp((z_j - reference) / T), each block's reference.
struct Kept {
  float* exps = nullptr;        // (V,)
  float* references = nullptr;  // one for every kBlock columns
};

// The scratch of a row: V exponentials, then the references.
FASTPO_INLINE int64_t scratch_floats(int64_t columns) { return columns + columns / kBlock + 1; }

struct KeptKernelTable;  // kept_rows.h

// The primitives compiled for one instruction set, each over rows [begin, end).
struct RowKernelTable {
  const char* simd;
  void (*row_stats)(const StatsParams&, int64_t begin, int64_t end);
  void (*row_grad)(const GradParams&, int64_t begin, int64_t end);
  // `scratch` holds scratch_floats(V); unused without a gradient.
  void (*row_policy_loss)(const LossParams&, int64_t begin, int64_t end, float* scratch);
  void (*scale)(const ScaleParams&, int64_t begin, int64_t end);
  const KeptKernelTable* kept;
};

extern const RowKernelTable kPortableRows;
#ifdef FASTPO_X86
extern const RowKernelTable kAvx2Rows;
extern const RowKernelTable kAvx512Rows;
#endif

// The widest table this CPU runs, or the one that environment variable FASTPO_SIMD names. Chosen once.
// Throws std::runtime_error when FASTPO_SIMD names a level that is unknown or that this CPU lacks.
const RowKernelTable& row_kernels();

// Tables compiled into this build, widest first, ending in a null pointer.
const RowKernelTable* const* compiled_row_kernels();

// What the CUDA launchers below return beside a cudaError_t.
constexpr int kNeedsClusters = -1;  // the GPU's compute capability is under 9.0
constexpr int kRowTooLong = -2;     // a row does not fit the shared memory of the largest cluster

}  // namespace fastpo

// The primitives on CUDA (row_cluster.cu), one launch on `stream` each. Plain C, so that nothing
// here depends on a torch ABI.
extern "C" int fastpo_row_stats_cuda(const fastpo::StatsParams* p, int64_t rows, void* stream);
extern "C" int fastpo_row_grad_cuda(const fastpo::GradParams* p, int64_t rows, void* stream);
extern "C" int fastpo_row_policy_loss_cuda(const fastpo::LossParams* p, int64_t rows, void* stream);
// `factor`: one fp32 number on the device.
extern "C" int fastpo_scale_cuda(const fastpo::ScaleParams* p, const float* factor, int64_t rows,
                                 void* stream);
