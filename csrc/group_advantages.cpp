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
void widen(const GroupParams& p) {
  const T* values = static_cast<const T*>(p.rewards);
  for (int64_t i = 0; i < p.count; ++i)
    for (int64_t r = 0; r < p.columns; ++r) {
      const T value = values[i * p.columns + r];
      if constexpr (std::is_same_v<T, Half> || std::is_same_v<T, BFloat16>)
        p.column(r)[i] = to_float(value);
      else
        p.column(r)[i] = double(value);
    }
}

void widen_rewards(const GroupParams& p) {
  switch (p.reward_type) {
    case RewardType::kFloat64:
      return widen<double>(p);
    case RewardType::kFloat32:
      return widen<float>(p);
    case RewardType::kFloat16:
      return widen<Half>(p);
    case RewardType::kBFloat16:
      return widen<BFloat16>(p);
    case RewardType::kInt64:
      return widen<int64_t>(p);
    case RewardType::kInt32:
      return widen<int32_t>(p);
    case RewardType::kInt16:
      return widen<int16_t>(p);
    case RewardType::kInt8:
      return widen<int8_t>(p);
    case RewardType::kUInt8:
      return widen<uint8_t>(p);
  }
}

// The members of one group, in the order of the batch.
struct Members {
  const int64_t* begin;
  const int64_t* end;
};

// The samples of the batch, group by group.
class Groups {
 public:
  explicit Groups(const GroupParams& p) : p_(p), order_(p.count) {
    std::iota(order_.begin(), order_.end(), int64_t(0));
    const auto before = [&](int64_t a, int64_t b) { return p.group_of(a) < p.group_of(b); };
    if (p.group_ids) std::stable_sort(order_.begin(), order_.end(), before);
  }

  // Calls f(members) for every group.
  template <class F>
  void for_each(F&& f) const {
    const int64_t *begin = order_.data(), *stop = begin + order_.size();
    while (begin != stop) {
      const int64_t* end = begin + 1;
      while (end != stop && p_.group_of(*end) == p_.group_of(*begin)) ++end;
      f(Members{begin, end});
      begin = end;
    }
  }

 private:
  const GroupParams& p_;
  std::vector<int64_t> order_;
};

// Calls f(i, reward) for the members whose reward in a column is a number.
template <class F>
void for_each_number(const double* rewards, Members members, F&& f) {
  for (const int64_t* i = members.begin; i != members.end; ++i)
    if (GroupParams::is_number(rewards[*i])) f(*i, rewards[*i]);
}

GroupSums sums_of(const GroupParams& p, const double* rewards, Members members) {
  GroupSums group;
  for_each_number(rewards, members, [&](int64_t i, double reward) { group.add(i, reward, p.length(i)); });
  return group;
}

Spread spread_of_group(const GroupSums& group, const double* rewards, Members members) {
  double squares = 0;
  for_each_number(rewards, members, [&](int64_t, double reward) {
    const double d = deviation(group, reward);
    squares += d * d;
  });
  return {0, unbiased_std(squares, double(group.members))};
}

// Of values over the batch, in its order.
template <class Value, class Weight>
Spread spread_of_batch(const GroupParams& p, Value&& value, Weight&& weight, bool centered) {
  const auto sum = [&](auto&& f) {
    double total = 0;
    for (int64_t i = 0; i < p.count; ++i) total += f(i);
    return total;
  };
  return spread_of(sum, value, weight, centered);
}

// Of the rewards of a column less their group's mean.
Spread spread_of_deviations(const GroupParams& p, const Groups& groups, const double* rewards) {
  double* deviations = p.deviations();
  std::fill_n(deviations, p.count, 0.0);
  groups.for_each([&](Members members) {
    const GroupSums group = sums_of(p, rewards, members);
    for_each_number(rewards, members, [&](int64_t i, double r) { deviations[i] = deviation(group, r); });
  });
  return spread_of_batch(
      p, [&](int64_t i) { return deviations[i]; },
      [&](int64_t i) { return GroupParams::is_number(rewards[i]) ? p.length(i) : 0.0; }, !p.lengths);
}

// Adds the advantages of column r to p.sums(), and marks who is informative in it.
void add_column(const GroupParams& p, const Groups& groups, int64_t r) {
  const double* rewards = p.column(r);
  const bool batch_wide = p.estimator == Estimator::kReinforcePp;
  const Spread of_batch = batch_wide ? spread_of_deviations(p, groups, rewards) : Spread();
  groups.for_each([&](Members members) {
    const GroupSums group = sums_of(p, rewards, members);
    if (!group.informative()) return;
    const Spread spread = batch_wide ? of_batch : spread_of_group(group, rewards, members);
    for_each_number(rewards, members, [&](int64_t i, double reward) {
      p.informative[i] = true;
      p.sums()[i] += p.column_weight(r) * double(stored(advantage_of(p, group, reward, spread)));
    });
  });
}

}  // namespace

void group_advantages_cpu(const GroupParams& p) {
  const Groups groups(p);
  widen_rewards(p);
  std::fill_n(p.sums(), p.count, 0.0);
  std::fill_n(p.informative, p.count, false);
  for (int64_t r = 0; r < p.columns; ++r) add_column(p, groups, r);
  *p.num_informative = 0;
  groups.for_each([&](Members members) {
    *p.num_informative +=
        std::any_of(members.begin, members.end, [&](int64_t i) { return p.informative[i]; });
  });
  const auto advantage = [&](int64_t i) { return double(stored(p.sums()[i])); };
  const auto weight = [&](int64_t i) { return p.counts(i) ? 1.0 : 0.0; };
  const Spread spread = p.whiten ? spread_of_batch(p, advantage, weight, false) : Spread();
  for (int64_t i = 0; i < p.count; ++i) p.advantages[i] = final_advantage(p, i, spread);
}

}  // namespace fastpo
