// Group advantages on the CPU: samples sorted by group, each group summed in the order of the batch.
#include "group_advantages.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <vector>

#include "small_floats.h"

namespace fastpo {
namespace {

template <class T>
void widen(const void* from, int64_t count, double* to) {
  const T* values = static_cast<const T*>(from);
  for (int64_t i = 0; i < count; ++i) {
    if constexpr (std::is_same_v<T, Half> || std::is_same_v<T, BFloat16>)
      to[i] = to_float(values[i]);
    else
      to[i] = double(values[i]);
  }
}

void widen_rewards(const GroupParams& p, double* to) {
  switch (p.reward_type) {
    case RewardType::kFloat64:
      return widen<double>(p.rewards, p.count, to);
    case RewardType::kFloat32:
      return widen<float>(p.rewards, p.count, to);
    case RewardType::kFloat16:
      return widen<Half>(p.rewards, p.count, to);
    case RewardType::kBFloat16:
      return widen<BFloat16>(p.rewards, p.count, to);
    case RewardType::kInt64:
      return widen<int64_t>(p.rewards, p.count, to);
    case RewardType::kInt32:
      return widen<int32_t>(p.rewards, p.count, to);
    case RewardType::kInt16:
      return widen<int16_t>(p.rewards, p.count, to);
    case RewardType::kInt8:
      return widen<int8_t>(p.rewards, p.count, to);
    case RewardType::kUInt8:
      return widen<uint8_t>(p.rewards, p.count, to);
  }
}

// The members of one group, in the order of the batch.
struct Members {
  const int64_t* begin;
  const int64_t* end;
};

// Calls f(members) for every group.
template <class F>
void for_each_group(const GroupParams& p, F&& f) {
  std::vector<int64_t> order(p.count);
  std::iota(order.begin(), order.end(), int64_t(0));
  auto before = [&](int64_t a, int64_t b) { return p.group_of(a) < p.group_of(b); };
  if (p.group_ids) std::stable_sort(order.begin(), order.end(), before);
  const int64_t *begin = order.data(), *stop = begin + p.count;
  while (begin != stop) {
    const int64_t* end = begin + 1;
    while (end != stop && p.group_of(*end) == p.group_of(*begin)) ++end;
    f(Members{begin, end});
    begin = end;
  }
}

GroupSums sums_of(const GroupParams& p, const double* rewards, Members members) {
  GroupSums group;
  for (const int64_t* i = members.begin; i != members.end; ++i)
    if (std::isfinite(rewards[*i])) group.add(*i, rewards[*i], p.lengths ? p.lengths[*i] : 1.0);
  return group;
}

double squares_of(const GroupSums& group, const double* rewards, Members members) {
  double squares = 0;
  for (const int64_t* i = members.begin; i != members.end; ++i)
    if (std::isfinite(rewards[*i])) squares += squared_deviation(group, rewards[*i]);
  return squares;
}

// Standard deviation over the batch of the rewards less their group's mean.
double batch_std(const GroupParams& p, const double* rewards, double* deviations) {
  int64_t counted = 0;
  for_each_group(p, [&](Members members) {
    const GroupSums group = sums_of(p, rewards, members);
    counted += group.members;
    for (const int64_t* i = members.begin; i != members.end; ++i)
      deviations[*i] = std::isfinite(rewards[*i]) ? squared_deviation(group, rewards[*i]) : 0.0;
  });
  return unbiased_std(std::accumulate(deviations, deviations + p.count, 0.0), counted);
}

}  // namespace

void group_advantages_cpu(const GroupParams& p) {
  double* rewards = p.scratch;
  widen_rewards(p, rewards);
  const bool batch_wide = p.estimator == Estimator::kReinforcePp;
  const double shared_std = batch_wide ? batch_std(p, rewards, p.scratch + p.count) : 0.0;
  *p.num_informative = 0;
  for_each_group(p, [&](Members members) {
    const GroupSums group = sums_of(p, rewards, members);
    const bool informative = group.informative();
    const double std =
        batch_wide ? shared_std : unbiased_std(squares_of(group, rewards, members), group.members);
    *p.num_informative += informative;
    for (const int64_t* i = members.begin; i != members.end; ++i) {
      const bool counts = informative && std::isfinite(rewards[*i]);
      p.informative[*i] = counts;
      p.advantages[*i] = counts ? stored(advantage_of(p, group, rewards[*i], std)) : 0.0f;
    }
  });
}

}  // namespace fastpo
