// The row-resident primitives on GPUs with thread-block clusters (compute capability 9.0 and up).
//
// The traffic floor by construction: a row is read by one bulk copy per block and written once, 2 N V items;
// what the blocks tell each other goes through distributed shared memory.
#include <cooperative_groups.h>
#include <cuda_runtime.h>
#include <limits.h>

#include <type_traits>

#include "row_cluster.h"

namespace fastpo::cluster {
namespace {

namespace cg = cooperative_groups;

constexpr int64_t kStaticBytes = 1024;  // more than reductions, slopes and barrier take of shared memory

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900

__device__ float shuffled(float x, int lanes) { return __shfl_xor_sync(~0u, x, lanes); }
__device__ Sums shuffled(Sums x, int lanes) { return {shuffled(x.exps, lanes), shuffled(x.moment, lanes)}; }

extern __shared__ Vector shared_slice[];

// A thread of a cluster, as row_cluster.h wants it.
class Thread {
 public:
  __device__ Thread(Cut cut, int64_t columns)
      : cluster_(cg::this_cluster()),
        cut_(cut),
        slice_(slice_of(cut, int(cluster_.block_rank()), columns, shared_slice)) {}

  __device__ bool first() const { return cluster_.block_rank() == 0 && threadIdx.x == 0; }
  __device__ void block_barrier() const { __syncthreads(); }

  // Every block has its slice. By then it also runs, as others' shared memory needs.
  __device__ void wait_until_loaded() {
    if (!loaded_) cluster_.barrier_wait();
    loaded_ = true;
  }

  template <class F>
  __device__ void each(F&& work) const {
    work(slice_, int(threadIdx.x));
  }

  // By a bulk copy where the row is aligned to 16 bytes, else element by element.
  template <class T>
  __device__ void load(const T* row, int64_t) {
    const T* source = row + slice_.begin;
    T* target = reinterpret_cast<T*>(slice_.vectors);
    const int bulk = is_aligned_for<kPerVector<T>>(source) ? slice_.columns / kPerVector<T> * 16 : 0;
    if (bulk > 0) start_bulk_copy(source, bulk);
    for (int j = bulk / int(sizeof(T)) + int(threadIdx.x); j < slice_.columns; j += kThreads)
      target[j] = source[j];
    for (int j = slice_.columns + int(threadIdx.x); j < slice_.count<T>() * kPerVector<T>; j += kThreads)
      assign(target[j], -INFINITY);
    __syncthreads();
    if (bulk > 0) wait_for_bulk_copy();
    cluster_.barrier_arrive();
  }

  template <class F, class Op>
  __device__ auto reduce(F&& value_of, Op op) {
    using Value = decltype(value_of(slice_, 0));
    __shared__ Value of_warps[kWarps], of_blocks[kMaxBlocks];
    Value value = value_of(slice_, int(threadIdx.x));
    for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) value = op(value, shuffled(value, lanes));
    if (threadIdx.x % kWarp == 0) of_warps[threadIdx.x / kWarp] = value;
    __syncthreads();
    wait_until_loaded();
    if (threadIdx.x < unsigned(cut_.blocks)) {
      value = of_warps[0];
      for (int warp = 1; warp < kWarps; ++warp) value = op(value, of_warps[warp]);
      *cluster_.map_shared_rank(&of_blocks[cluster_.block_rank()], threadIdx.x) = value;
    }
    cluster_.sync();
    value = of_blocks[0];
    for (int block = 1; block < cut_.blocks; ++block) value = op(value, of_blocks[block]);
    return value;
  }

  // By the first warp alone: the scalars of a row would cost every thread as much as 20 of its logits.
  template <class F>
  __device__ Slopes once(F&& make) const {
    __shared__ Slopes made;
    if (threadIdx.x < kWarp) {
      const Slopes slopes = make();
      if (threadIdx.x == 0) made = slopes;
    }
    __syncthreads();
    return made;
  }

 private:
  __device__ static uint32_t shared_address(const void* place) {
    return uint32_t(__cvta_generic_to_shared(place));
  }

  // The mbarrier of the copy, which lives in shared memory once for the block.
  __device__ static uint32_t copy_barrier() {
    __shared__ alignas(8) uint64_t barrier;
    return shared_address(&barrier);
  }

  __device__ void start_bulk_copy(const void* source, int bytes) const {
    if (threadIdx.x != 0) return;
    const uint32_t barrier = copy_barrier(), target = shared_address(slice_.vectors);
    asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(barrier) : "memory");
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)
                 : "memory");
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
            target),
        "l"(source), "r"(bytes), "r"(barrier)
        : "memory");
  }

  __device__ void wait_for_bulk_copy() const {
    asm volatile(
        "{\n.reg .pred done;\nwait:\n"
        "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], 0;\n@!done bra wait;\n}" ::"r"(copy_barrier())
        : "memory");
  }

  cg::cluster_group cluster_;
  Cut cut_;
  Slice slice_;
  bool loaded_ = false;
};

template <class T, class O>
__device__ void run(const StatsParams& p, Cut cut) {
  Thread thread(cut, p.in.columns);
  stats_row<T>(thread, p, blockIdx.x / cut.blocks);
}

template <class T, class O>
__device__ void run(const GradParams& p, Cut cut) {
  Thread thread(cut, p.in.columns);
  grad_row<T, O>(thread, p, blockIdx.x / cut.blocks);
}

template <class T, class O>
__device__ void run(const LossParams& p, Cut cut) {
  Thread thread(cut, p.in.columns);
  policy_loss_row<T, O>(thread, p, blockIdx.x / cut.blocks);
}

#endif

// At most 64 registers, so that four blocks of 256 threads share a processor.
template <class T, class O, class Params>
__global__ void __launch_bounds__(kThreads, 4) row_kernel(const __grid_constant__ Params p, Cut cut) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  run<T, O>(p, cut);
#endif
}

// The most shared memory that a slice can have on the current device.
int most_bytes(int* bytes) {
  int device = 0, major = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  if (error == cudaSuccess)
    error = cudaDeviceGetAttribute(bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  if (error != cudaSuccess) return error;
  return major < 9 ? kNeedsClusters : 0;
}

template <class T, class O, class Params>
int launch(const Params& p, int64_t rows, void* stream) {
  int bytes = 0;
  if (const int error = most_bytes(&bytes)) return error;
  const Cut cut = cut_of(p.in.columns, sizeof(T), bytes - kStaticBytes);
  if (cut.blocks == 0) return kRowTooLong;
  if (rows > INT_MAX / cut.blocks) return cudaErrorInvalidConfiguration;
  const auto kernel = row_kernel<T, O, Params>;
  // A binary of an older architecture, compiled for this one by the driver, would have an empty kernel.
  cudaFuncAttributes compiled;
  cudaError_t error = cudaFuncGetAttributes(&compiled, kernel);
  if (error == cudaSuccess && compiled.ptxVersion < 90) error = cudaErrorNoKernelImageForDevice;
  const int slice_bytes = cut.share * int(sizeof(T));
  if (error == cudaSuccess)
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, slice_bytes);
  if (error != cudaSuccess) return error;
  cudaLaunchAttribute cluster;
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim = {unsigned(cut.blocks), 1, 1};
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(unsigned(rows * cut.blocks));
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = slice_bytes;
  config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = &cluster;
  config.numAttrs = 1;
  return cudaLaunchKernelEx(&config, kernel, p, cut);
}

// The pairs that occur: a gradient has the logits' type, or a 2-byte type under fp32 logits.
template <class Params>
int launch_for(const Params& p, DType out, int64_t rows, void* stream) {
  if (rows == 0 || p.in.columns == 0) return 0;
  const DType dtype = p.in.logits.dtype;
  if (dtype == DType::kBFloat16) return launch<BFloat16, BFloat16>(p, rows, stream);
  if (dtype == DType::kFloat16) return launch<Half, Half>(p, rows, stream);
  if constexpr (!std::is_same_v<Params, StatsParams>) {
    if (out == DType::kBFloat16) return launch<float, BFloat16>(p, rows, stream);
    if (out == DType::kFloat16) return launch<float, Half>(p, rows, stream);
  }
  return launch<float, float>(p, rows, stream);
}

// A block takes every gridDim.x-th row, so that a factor of 1 costs next to nothing.
template <class T>
__global__ void __launch_bounds__(kThreads)
    scale_kernel(const __grid_constant__ ScaleParams p, const float* factor, int64_t rows) {
  if (*factor == 1.0f) return;
  for (int64_t i = blockIdx.x; i < rows; i += gridDim.x)
    scale_row(static_cast<T*>(p.grad.row(i)), p.columns, *factor, int(threadIdx.x), kThreads);
}

template <class T>
int launch_scale(const ScaleParams& p, const float* factor, int64_t rows, void* stream) {
  constexpr int64_t kMostBlocks = 1024;
  if (rows == 0 || p.columns == 0) return 0;
  const unsigned blocks = unsigned(rows < kMostBlocks ? rows : kMostBlocks);
  scale_kernel<T><<<blocks, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(p, factor, rows);
  return cudaGetLastError();
}

}  // namespace
}  // namespace fastpo::cluster

extern "C" int fastpo_row_stats_cuda(const fastpo::StatsParams* p, int64_t rows, void* stream) {
  return fastpo::cluster::launch_for(*p, p->in.logits.dtype, rows, stream);
}

extern "C" int fastpo_row_grad_cuda(const fastpo::GradParams* p, int64_t rows, void* stream) {
  return fastpo::cluster::launch_for(*p, p->out.dtype, rows, stream);
}

extern "C" int fastpo_row_policy_loss_cuda(const fastpo::LossParams* p, int64_t rows, void* stream) {
  const auto out = p->out.data ? p->out.dtype : p->in.logits.dtype;
  return fastpo::cluster::launch_for(*p, out, rows, stream);
}

extern "C" int fastpo_scale_cuda(const fastpo::ScaleParams* p, const float* factor, int64_t rows,
                                 void* stream) {
  using namespace fastpo;
  if (p->grad.dtype == DType::kBFloat16) return cluster::launch_scale<BFloat16>(*p, factor, rows, stream);
  if (p->grad.dtype == DType::kFloat16) return cluster::launch_scale<Half>(*p, factor, rows, stream);
  return cluster::launch_scale<float>(*p, factor, rows, stream);
}
