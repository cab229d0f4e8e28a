// The row primitives as torch operators, through libtorch's stable ABI: one build serves torch >= 2.10.
//
// One operator per primitive. Its `out` may share the rows of the logits, in the ways that
// fastpo.backends.base.overwrites allows; a compiler, which must know what is mutated, is only ever shown
// the primitives with an `out` of its own.
#include <torch/csrc/stable/library.h>

#include <memory>
#include <new>
#include <tuple>
#include <vector>

#include "bind.h"
#ifdef FASTPO_WITH_CUDA
#include "bind_cuda.h"
#endif
#include "row_scalars.h"

namespace {

using namespace fastpo::bind;
using Four = std::tuple<Tensor, Tensor, Tensor, Tensor>;
using Seven = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

template <class F>
void over_rows(int64_t rows, int64_t columns, const F& body) {
  const int64_t grain = kElementsPerTask / (columns > 0 ? columns : 1) + 1;
  torch::stable::parallel_for(0, rows, grain, body);
}

// Every thread keeps the scratch of one row, aligned to a cache line, as long as the longest it has seen.
float* scratch_row(int64_t columns) {
  struct Free {
    void operator()(float* p) const { ::operator delete[](p, std::align_val_t(64)); }
  };
  thread_local std::unique_ptr<float[], Free> row;
  thread_local int64_t capacity = 0;
  if (const int64_t floats = fastpo::scratch_floats(columns); floats > capacity) {
    row.reset(static_cast<float*>(::operator new[](floats * sizeof(float), std::align_val_t(64))));
    capacity = floats;
  }
  return row.get();
}

// Runs a primitive over rows, on threads of the CPU.
struct OnCpu {
  const fastpo::RowKernelTable& kernels = fastpo::row_kernels();
  Place place = {};

  explicit OnCpu(const Tensor&) {}

  void operator()(const fastpo::StatsParams& p, int64_t rows) const {
    over_rows(rows, p.in.columns, [&](int64_t begin, int64_t end) { kernels.row_stats(p, begin, end); });
  }
  void operator()(const fastpo::GradParams& p, int64_t rows) const {
    over_rows(rows, p.in.columns, [&](int64_t begin, int64_t end) { kernels.row_grad(p, begin, end); });
  }
  void operator()(const fastpo::LossParams& p, int64_t rows) const {
    over_rows(rows, p.in.columns, [&](int64_t begin, int64_t end) {
      kernels.row_policy_loss(p, begin, end, p.out.data ? scratch_row(p.in.columns) : nullptr);
    });
  }
};

fastpo::RowsIn rows_in(const Tensor& logits, const Tensor& tokens, double temperature,
                       const MaybeTensor& temperatures, const Place& place) {
  const int64_t rows = logits.size(0);
  return {matrix(logits, "logits", place),
          logits.size(1),
          vector<const int64_t>(tokens, ScalarType::Long, rows, "tokens", place),
          {floats(temperatures, rows, "temperatures", place), temperature}};
}

fastpo::Matrix gradient(const Tensor& out, const Tensor& logits, const Place& place) {
  STD_TORCH_CHECK(out.dim() == 2 && out.size(0) == logits.size(0) && out.size(1) == logits.size(1),
                  "out must have the shape of logits");
  STD_TORCH_CHECK(out.scalar_type() == logits.scalar_type() || logits.scalar_type() == ScalarType::Float,
                  "out must have the dtype of logits, or a 2-byte dtype under float32 logits");
  return matrix(out, "out", place);
}

template <class Run>
Four fill_stats(const Run& run, fastpo::StatsParams& p, const Tensor& logits, const MaybeTensor& mask) {
  const int64_t rows = logits.size(0);
  p.mask = mask ? vector<const bool>(*mask, ScalarType::Bool, rows, "mask", run.place) : nullptr;
  Tensor logprobs = new_vector(logits, ScalarType::Float), entropy = new_vector(logits, ScalarType::Float);
  Tensor row_max = new_vector(logits, ScalarType::Float), log_sum = new_vector(logits, ScalarType::Float);
  p.logprobs = floats(logprobs, rows, "logprobs", run.place);
  p.entropy = floats(entropy, rows, "entropy", run.place);
  p.row_max = floats(row_max, rows, "row_max", run.place);
  p.log_sum = floats(log_sum, rows, "log_sum", run.place);
  run(p, rows);
  return {logprobs, entropy, row_max, log_sum};
}

template <class Run>
Four row_stats(const Tensor& logits, const Tensor& tokens, double temperature,
               const MaybeTensor& temperatures, const MaybeTensor& mask) {
  const Run run(logits);
  fastpo::StatsParams p;
  p.in = rows_in(logits, tokens, temperature, temperatures, run.place);
  return fill_stats(run, p, logits, mask);
}

Seven row_details(const Tensor& logits, const Tensor& tokens, double temperature,
                  const MaybeTensor& temperatures, const MaybeTensor& mask) {
  const int64_t rows = logits.size(0);
  const OnCpu run(logits);
  fastpo::StatsParams p;
  p.in = rows_in(logits, tokens, temperature, temperatures, run.place);
  Tensor squares = new_vector(logits, ScalarType::Float), mean = new_vector(logits, ScalarType::Float);
  Tensor top1 = new_vector(logits, ScalarType::Bool);
  p.log_sum_sq_probs = floats(squares, rows, "log_sum_sq_probs");
  p.mean_logits = floats(mean, rows, "mean_logits");
  p.is_top1 = vector<bool>(top1, ScalarType::Bool, rows, "is_top1");
  return std::tuple_cat(fill_stats(run, p, logits, mask), std::make_tuple(squares, mean, top1));
}

template <class Run>
void row_grad(const Tensor& logits, const Tensor& tokens, const Tensor& logprobs, const Tensor& entropy,
              const Tensor& row_max, const Tensor& log_sum, const Tensor& logprob_grad,
              const MaybeTensor& entropy_grad, double temperature, const MaybeTensor& temperatures,
              const Tensor& out) {
  const int64_t rows = logits.size(0);
  const Run run(logits);
  fastpo::GradParams p;
  p.in = rows_in(logits, tokens, temperature, temperatures, run.place);
  p.out = gradient(out, logits, run.place);
  p.logprobs = floats(logprobs, rows, "logprobs", run.place);
  p.entropy = floats(entropy, rows, "entropy", run.place);
  p.row_max = floats(row_max, rows, "row_max", run.place);
  p.log_sum = floats(log_sum, rows, "log_sum", run.place);
  p.logprob_grad = floats(logprob_grad, rows, "logprob_grad", run.place);
  p.entropy_grad = floats(entropy_grad, rows, "entropy_grad", run.place);
  run(p, rows);
}

template <class Run>
Four row_policy_loss(const Tensor& logits, const Tensor& tokens, const Tensor& weight,
                     const Tensor& advantages, const MaybeTensor& old_logprobs,
                     const MaybeTensor& ref_logprobs, const MaybeTensor& entropy_weight,
                     const MaybeTensor& clip_low, const MaybeTensor& clip_high, const MaybeTensor& nll_weight,
                     const std::vector<double>& objective, double temperature,
                     const MaybeTensor& temperatures, const MaybeTensor& out) {
  const int64_t rows = logits.size(0);
  const Run run(logits);
  fastpo::LossParams p;
  p.in = rows_in(logits, tokens, temperature, temperatures, run.place);
  if (out) p.out = gradient(*out, logits, run.place);
  p.weight = floats(weight, rows, "weight", run.place);
  p.advantages = floats(advantages, rows, "advantages", run.place);
  p.old_logprobs = floats(old_logprobs, rows, "old_logprobs", run.place);
  p.ref_logprobs = floats(ref_logprobs, rows, "ref_logprobs", run.place);
  p.entropy_weight = floats(entropy_weight, rows, "entropy_weight", run.place);
  p.clip_low = floats(clip_low, rows, "clip_low", run.place);
  p.clip_high = floats(clip_high, rows, "clip_high", run.place);
  p.nll_weight = floats(nll_weight, rows, "nll_weight", run.place);
  STD_TORCH_CHECK(objective.size() == fastpo::kObjectiveFields, "objective must hold the ",
                  fastpo::kObjectiveFields, " fields of ObjectiveParams, got ", objective.size());
  p.objective = fastpo::objective_params(objective.data());
  STD_TORCH_CHECK(p.objective.kl == fastpo::Kl::kNone || ref_logprobs, "a KL penalty needs ref_logprobs");
  Tensor loss = new_vector(logits, ScalarType::Float), logprobs = new_vector(logits, ScalarType::Float);
  Tensor entropy = new_vector(logits, ScalarType::Float), clipped = new_vector(logits, ScalarType::Byte);
  p.loss = floats(loss, rows, "loss", run.place);
  p.logprobs = floats(logprobs, rows, "logprobs", run.place);
  p.entropy = floats(entropy, rows, "entropy", run.place);
  p.clipped = vector<uint8_t>(clipped, ScalarType::Byte, rows, "clipped", run.place);
  run(p, rows);
  return {loss, logprobs, entropy, clipped};
}

void scale_(const Tensor& grad, const Tensor& factor) {
  fastpo::ScaleParams p{matrix(grad, "grad"), grad.size(1), *floats(factor, 1, "factor")};
  if (p.factor == 1) return;
  const auto& kernels = fastpo::row_kernels();
  over_rows(grad.size(0), p.columns, [&](int64_t begin, int64_t end) { kernels.scale(p, begin, end); });
}

#define FASTPO_STATS_ARGS "Tensor logprobs, Tensor entropy, Tensor row_max, Tensor log_sum, "
#define FASTPO_GRAD_ARGS \
  "Tensor tokens, " FASTPO_STATS_ARGS "Tensor logprob_grad, Tensor? entropy_grad, " FASTPO_TEMPERATURE
#define FASTPO_LOSS_ARGS                                                                \
  "Tensor tokens, Tensor weight, Tensor advantages, Tensor? old_logprobs, "             \
  "Tensor? ref_logprobs, Tensor? entropy_weight, Tensor? clip_low, Tensor? clip_high, " \
  "Tensor? nll_weight, float[] objective, " FASTPO_TEMPERATURE
#define FASTPO_TEMPERATURE "float temperature, Tensor? temperatures"
#define FASTPO_FOUR ") -> (Tensor, Tensor, Tensor, Tensor)"

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(fastpo, m) {
  m.def("cpp_row_stats(Tensor logits, Tensor tokens, " FASTPO_TEMPERATURE ", Tensor? mask" FASTPO_FOUR);
  m.def("cpp_row_details(Tensor logits, Tensor tokens, " FASTPO_TEMPERATURE
        ", Tensor? mask) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def("cpp_row_grad(Tensor logits, " FASTPO_GRAD_ARGS ", Tensor(a!) out) -> ()");
  m.def("cpp_row_policy_loss(Tensor logits, " FASTPO_LOSS_ARGS ", Tensor(a!)? out" FASTPO_FOUR);
  m.def("cpp_scale_(Tensor(a!) grad, Tensor factor) -> ()");
  m.def("cuda_row_stats(Tensor logits, Tensor tokens, " FASTPO_TEMPERATURE ", Tensor? mask" FASTPO_FOUR);
  m.def("cuda_row_grad(Tensor logits, " FASTPO_GRAD_ARGS ", Tensor(a!) out) -> ()");
  m.def("cuda_row_policy_loss(Tensor logits, " FASTPO_LOSS_ARGS ", Tensor(a!)? out" FASTPO_FOUR);
  m.def("cuda_scale_(Tensor(a!) grad, Tensor factor) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(fastpo, CPU, m) {
  m.impl("cpp_row_stats", TORCH_BOX(&row_stats<OnCpu>));
  m.impl("cpp_row_details", TORCH_BOX(&row_details));
  m.impl("cpp_row_grad", TORCH_BOX(&row_grad<OnCpu>));
  m.impl("cpp_row_policy_loss", TORCH_BOX(&row_policy_loss<OnCpu>));
  m.impl("cpp_scale_", TORCH_BOX(&scale_));
}

#ifdef FASTPO_WITH_CUDA

namespace {

// Launches a primitive, on the current stream of the logits' device.
class OnCuda {
 public:
  explicit OnCuda(const Tensor& x) : place{true, x.get_device_index()}, stream_(x) {
    STD_TORCH_CHECK(x.is_cuda(), "the cuda backend takes CUDA tensors");
  }

  void operator()(const fastpo::StatsParams& p, int64_t rows) const {
    check(fastpo_row_stats_cuda(&p, rows, stream_.get()), p.in);
  }
  void operator()(const fastpo::GradParams& p, int64_t rows) const {
    check(fastpo_row_grad_cuda(&p, rows, stream_.get()), p.in);
  }
  void operator()(const fastpo::LossParams& p, int64_t rows) const {
    check(fastpo_row_policy_loss_cuda(&p, rows, stream_.get()), p.in);
  }
  void scale(const fastpo::ScaleParams& p, const float* factor, int64_t rows) const {
    const int error = fastpo_scale_cuda(&p, factor, rows, stream_.get());
    STD_TORCH_CHECK(error == 0, "scale_: CUDA error ", error);
  }

  const Place place;

 private:
  static void check(int error, const fastpo::RowsIn& in) {
    STD_TORCH_CHECK(error != fastpo::kNeedsClusters,
                    "the cuda backend needs a GPU of compute capability 9.0 or more: use backend='triton'");
    STD_TORCH_CHECK(error != fastpo::kRowTooLong, "a row of ", in.columns, " logits of ",
                    fastpo::item_size(in.logits.dtype),
                    " bytes does not fit the shared memory of 8 thread blocks: use backend='triton'");
    STD_TORCH_CHECK(error == 0, "row-resident kernel: CUDA error ", error);
  }

  const CurrentStream stream_;
};

void scale_on_cuda(const Tensor& grad, const Tensor& factor) {
  const OnCuda run(grad);
  const fastpo::ScaleParams p{matrix(grad, "grad", run.place), grad.size(1)};
  run.scale(p, floats(factor, 1, "factor", run.place), grad.size(0));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastpo, CUDA, m) {
  m.impl("cuda_row_stats", TORCH_BOX(&row_stats<OnCuda>));
  m.impl("cuda_row_grad", TORCH_BOX(&row_grad<OnCuda>));
  m.impl("cuda_row_policy_loss", TORCH_BOX(&row_policy_loss<OnCuda>));
  m.impl("cuda_scale_", TORCH_BOX(&scale_on_cuda));
}

#endif
