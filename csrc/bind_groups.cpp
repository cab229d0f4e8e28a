// Group advantages as a torch operator on CPU and, where compiled in, CUDA tensors.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>

#ifdef FASTPO_WITH_CUDA
#include "bind_cuda.h"
#endif
#include "group_advantages.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;

fastpo::RewardType reward_type(ScalarType type) {
  switch (type) {
    case ScalarType::Double:
      return fastpo::RewardType::kFloat64;
    case ScalarType::Float:
      return fastpo::RewardType::kFloat32;
    case ScalarType::Half:
      return fastpo::RewardType::kFloat16;
    case ScalarType::BFloat16:
      return fastpo::RewardType::kBFloat16;
    case ScalarType::Long:
      return fastpo::RewardType::kInt64;
    case ScalarType::Int:
      return fastpo::RewardType::kInt32;
    case ScalarType::Short:
      return fastpo::RewardType::kInt16;
    case ScalarType::Char:
      return fastpo::RewardType::kInt8;
    case ScalarType::Byte:
    case ScalarType::Bool:
      return fastpo::RewardType::kUInt8;
    default:
      STD_TORCH_CHECK(false, "rewards must be bool, integers, float16, bfloat16, float32 or float64");
  }
}

template <class T>
const T* values(const MaybeTensor& x, ScalarType type, int64_t count, const char* name) {
  if (!x) return nullptr;
  STD_TORCH_CHECK(x->scalar_type() == type && x->numel() == count && x->is_contiguous(), name,
                  " must be contiguous, of the operator's dtype, with ", count, " elements");
  return static_cast<const T*>(x->data_ptr());
}

using Result = std::tuple<Tensor, Tensor, Tensor>;

template <class Launch>
Result group_advantages(const Tensor& rewards, int64_t group_size, const MaybeTensor& group_ids,
                        int64_t estimator, double eps, const MaybeTensor& lengths, const MaybeTensor& weights,
                        bool whiten, Launch&& launch) {
  STD_TORCH_CHECK((rewards.dim() == 1 || rewards.dim() == 2) && rewards.is_contiguous(),
                  "rewards must be contiguous (B,) or (B, R)");
  STD_TORCH_CHECK(estimator >= 0 && estimator <= 6, "estimator must be 0 ... 6, got ", estimator);
  const int64_t count = rewards.size(0), columns = rewards.dim() == 2 ? rewards.size(1) : 1;
  STD_TORCH_CHECK(group_ids || (group_size > 0 && count % group_size == 0),
                  "group_size must divide the number of rewards, got ", group_size, " for ", count);
  Tensor advantages = torch::stable::new_empty(rewards, {count}, ScalarType::Float);
  Tensor informative = torch::stable::new_empty(rewards, {count}, ScalarType::Bool);
  Tensor num_informative = torch::stable::new_empty(rewards, {}, ScalarType::Long);
  Tensor scratch = torch::stable::new_empty(rewards, {(columns + 2) * count}, ScalarType::Double);
  fastpo::GroupParams p;
  p.count = count;
  p.columns = columns;
  p.rewards = rewards.data_ptr();
  p.reward_type = reward_type(rewards.scalar_type());
  p.group_ids = values<int64_t>(group_ids, ScalarType::Long, count, "group_ids");
  p.group_size = group_size;
  p.lengths = values<double>(lengths, ScalarType::Double, count, "lengths");
  p.column_weights = values<double>(weights, ScalarType::Double, columns, "weights");
  p.estimator = fastpo::Estimator(int(estimator));
  p.eps = eps;
  p.whiten = whiten;
  p.advantages = static_cast<float*>(advantages.data_ptr());
  p.informative = static_cast<bool*>(informative.data_ptr());
  p.num_informative = static_cast<int64_t*>(num_informative.data_ptr());
  p.scratch = static_cast<double*>(scratch.data_ptr());
  launch(p);
  return {advantages, informative, num_informative};
}

Result group_advantages_cpu(const Tensor& rewards, int64_t group_size, const MaybeTensor& group_ids,
                            int64_t estimator, double eps, const MaybeTensor& lengths,
                            const MaybeTensor& weights, bool whiten) {
  return group_advantages(rewards, group_size, group_ids, estimator, eps, lengths, weights, whiten,
                          [](const fastpo::GroupParams& p) { fastpo::group_advantages_cpu(p); });
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(fastpo, m) {
  m.def(
      "group_advantages(Tensor rewards, int group_size, Tensor? group_ids, int estimator, float eps, "
      "Tensor? lengths, Tensor? weights=None, bool whiten=False) -> (Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(fastpo, CPU, m) { m.impl("group_advantages", TORCH_BOX(&group_advantages_cpu)); }

#ifdef FASTPO_WITH_CUDA

namespace {

Result group_advantages_cuda(const Tensor& rewards, int64_t group_size, const MaybeTensor& group_ids,
                             int64_t estimator, double eps, const MaybeTensor& lengths,
                             const MaybeTensor& weights, bool whiten) {
  const fastpo::bind::CurrentStream stream(rewards);
  return group_advantages(rewards, group_size, group_ids, estimator, eps, lengths, weights, whiten,
                          [&](const fastpo::GroupParams& p) {
                            const int error = fastpo_group_advantages_cuda(&p, stream.get());
                            STD_TORCH_CHECK(error == 0, "group_advantages: CUDA error ", error);
                          });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastpo, CUDA, m) { m.impl("group_advantages", TORCH_BOX(&group_advantages_cuda)); }

#endif
