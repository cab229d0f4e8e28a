// Generalized advantage estimation as a torch operator on CPU and, where compiled in, CUDA tensors: see gae.h.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>

#ifdef FASTPO_WITH_CUDA
#include "bind_cuda.h"
#endif
#include "gae.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kSequencesPerTask = 8;

template <class T>
T* data(const Tensor& x, ScalarType type, int64_t count, const char* name) {
  STD_TORCH_CHECK(x.scalar_type() == type && x.numel() == count && x.is_contiguous(), name,
                  " must be a contiguous vector of the operator's dtype with ", count, " elements");
  return static_cast<T*>(x.data_ptr());
}

// rewards, values (N,) fp64, mask (N,) bool, offsets (B + 1,) int64; (N,) fp64. Rows of no sequence hold 0.
template <class Run>
Tensor gae(const Tensor& rewards, const Tensor& values, const std::optional<Tensor>& mask,
           const Tensor& offsets, double gamma, double lam, Run&& run) {
  const int64_t count = rewards.numel();
  Tensor advantages = torch::stable::new_zeros(rewards, {count}, ScalarType::Double);
  fastpo::GaeParams p;
  p.count = count;
  p.rewards = data<const double>(rewards, ScalarType::Double, count, "rewards");
  p.values = data<const double>(values, ScalarType::Double, count, "values");
  p.mask = mask ? data<const bool>(*mask, ScalarType::Bool, count, "mask") : nullptr;
  p.sequences = offsets.numel() - 1;
  STD_TORCH_CHECK(p.sequences >= 0, "offsets must hold one number at least");
  p.offsets = data<const int64_t>(offsets, ScalarType::Long, p.sequences + 1, "offsets");
  p.gamma = gamma;
  p.decay = gamma * lam;
  p.advantages = data<double>(advantages, ScalarType::Double, count, "advantages");
  run(p);
  return advantages;
}

// One sequence, from its last row to its first.
void scan(const fastpo::GaeParams& p, int64_t begin, int64_t end) {
  double next_value = 0, advantage = 0;
  for (int64_t t = end - 1; t >= begin; --t) {
    if (!p.counts(t)) continue;
    const double delta = p.rewards[t] - p.values[t] + fastpo::times(p.gamma, next_value);
    advantage = delta + fastpo::times(p.decay, advantage);
    next_value = p.values[t];
    p.advantages[t] = advantage;
  }
}

Tensor gae_cpu(const Tensor& rewards, const Tensor& values, const std::optional<Tensor>& mask,
               const Tensor& offsets, double gamma, double lam) {
  return gae(rewards, values, mask, offsets, gamma, lam, [](const fastpo::GaeParams& p) {
    STD_TORCH_CHECK(p.offsets[0] == 0 && p.offsets[p.sequences] == p.count,
                    "offsets must rise from 0 to the number of rows, ", p.count);
    for (int64_t b = 0; b < p.sequences; ++b)
      STD_TORCH_CHECK(p.offsets[b] <= p.offsets[b + 1], "offsets must not fall, they do at sequence ", b);
    torch::stable::parallel_for(0, p.sequences, kSequencesPerTask, [&](int64_t begin, int64_t end) {
      for (int64_t b = begin; b < end; ++b) scan(p, p.offsets[b], p.offsets[b + 1]);
    });
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(fastpo, m) {
  m.def("gae(Tensor rewards, Tensor values, Tensor? mask, Tensor offsets, float gamma, float lam) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(fastpo, CPU, m) { m.impl("gae", TORCH_BOX(&gae_cpu)); }

#ifdef FASTPO_WITH_CUDA

namespace {

Tensor gae_cuda(const Tensor& rewards, const Tensor& values, const std::optional<Tensor>& mask,
                const Tensor& offsets, double gamma, double lam) {
  const fastpo::bind::CurrentStream stream(rewards);
  for (const Tensor* x : {&rewards, &values, mask ? &*mask : &rewards, &offsets})
    STD_TORCH_CHECK(x->is_cuda(), "gae: all tensors must be on one GPU");
  return gae(rewards, values, mask, offsets, gamma, lam, [&](const fastpo::GaeParams& p) {
    const int error = fastpo_gae_cuda(&p, stream.get());
    STD_TORCH_CHECK(error == 0, "gae: CUDA error ", error);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastpo, CUDA, m) { m.impl("gae", TORCH_BOX(&gae_cuda)); }

#endif
