// Generalized advantage estimation on the CPU: a reverse scan of every sequence, the sequences in parallel.
//
// fastpo.critic._advantages is the specification. Everything is fp64: a recurrence of thousands of steps.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kSequencesPerTask = 8;

struct Rows {
  const double* rewards;
  const double* values;
  const bool* mask;  // null: all
  double* advantages;
};

// A_t = delta_t + gamma * lam * A_next over rows [begin, end), next the next unmasked row. A decay of 0 ends the
// recurrence: what follows, NaN included, is not looked at.
void scan(const Rows& rows, int64_t begin, int64_t end, double gamma, double decay) {
  double next_value = 0, advantage = 0;
  for (int64_t t = end - 1; t >= begin; --t) {
    if (rows.mask && !rows.mask[t]) {
      rows.advantages[t] = 0;
      continue;
    }
    const double delta = rows.rewards[t] + gamma * next_value - rows.values[t];
    advantage = decay == 0 ? delta : delta + decay * advantage;
    next_value = rows.values[t];
    rows.advantages[t] = advantage;
  }
}

template <class T>
T* data(const Tensor& x, ScalarType type, int64_t count, const char* name) {
  STD_TORCH_CHECK(x.is_cpu() && x.scalar_type() == type && x.numel() == count && x.is_contiguous(), name,
                  " must be a contiguous CPU vector of the operator's dtype with ", count, " elements");
  return static_cast<T*>(x.data_ptr());
}

// rewards, values (N,) fp64, mask (N,) bool, offsets (B + 1,) int64; (N,) fp64.
Tensor gae(const Tensor& rewards, const Tensor& values, const std::optional<Tensor>& mask,
           const Tensor& offsets, double gamma, double lam) {
  const int64_t count = rewards.numel(), sequences = offsets.numel() - 1;
  Tensor advantages = torch::stable::new_empty(rewards, {count}, ScalarType::Double);
  const Rows rows = {data<const double>(rewards, ScalarType::Double, count, "rewards"),
                     data<const double>(values, ScalarType::Double, count, "values"),
                     mask ? data<const bool>(*mask, ScalarType::Bool, count, "mask") : nullptr,
                     data<double>(advantages, ScalarType::Double, count, "advantages")};
  const int64_t* starts = data<const int64_t>(offsets, ScalarType::Long, sequences + 1, "offsets");
  STD_TORCH_CHECK(sequences >= 0 && starts[0] == 0 && starts[sequences] == count,
                  "offsets must rise from 0 to the number of rows, ", count);
  for (int64_t b = 0; b < sequences; ++b)
    STD_TORCH_CHECK(starts[b] <= starts[b + 1], "offsets must not fall, they do at sequence ", b);
  torch::stable::parallel_for(0, sequences, kSequencesPerTask, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) scan(rows, starts[b], starts[b + 1], gamma, gamma * lam);
  });
  return advantages;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(fastpo, m) {
  m.def(
      "cpp_gae(Tensor rewards, Tensor values, Tensor? mask, Tensor offsets, float gamma, float lam) -> "
      "Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(fastpo, CPU, m) { m.impl("cpp_gae", TORCH_BOX(&gae)); }
