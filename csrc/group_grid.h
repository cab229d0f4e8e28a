// Group advantages by threads that each take some samples: the code of the CUDA kernel (group_advantages.cu).
//
// grid.each(f) calls f(i) for every sample, and all threads wait for it; grid.sum(f) adds f(i) over the batch,
// in a fixed order, for every thread; grid.reward(k) is the k-th reward; grid.increment(x) is atomic.
// A latency kernel: with ids, every sample looks at all B, which for a few thousand is cheaper than a sort.
#pragma once

#include "group_advantages.h"

namespace fastpo {

// Calls f(j) for the members of sample i's group, in the order of the batch, until it returns false.
template <class F>
FASTPO_SCALAR_MEMBER void for_each_member(const GroupParams& p, int64_t i, F&& f) {
  const int64_t id = p.group_of(i);
  const int64_t begin = p.group_ids ? 0 : id * p.group_size;
  const int64_t end = p.group_ids ? p.count : begin + p.group_size;
  for (int64_t j = begin; j < end; ++j)
    if (p.group_of(j) == id && !f(j)) return;
}

FASTPO_SCALAR GroupSums sums_of_group(const GroupParams& p, const double* rewards, int64_t i) {
  GroupSums group;
  for_each_member(p, i, [&](int64_t j) {
    if (GroupParams::is_number(rewards[j])) group.add(j, rewards[j], p.length(j));
    return true;
  });
  return group;
}

FASTPO_SCALAR Spread spread_in_group(const GroupParams& p, const GroupSums& group, const double* rewards,
                                     int64_t i) {
  double squares = 0;
  for_each_member(p, i, [&](int64_t j) {
    const double d = GroupParams::is_number(rewards[j]) ? deviation(group, rewards[j]) : 0.0;
    squares += d * d;
    return true;
  });
  return {0, unbiased_std(squares, double(group.members))};
}

// Adds sample i's advantage in column r to p.sums(), and marks an informative sample.
FASTPO_SCALAR void add_advantage(const GroupParams& p, int64_t r, int64_t i, Spread of_batch) {
  const double* rewards = p.column(r);
  const GroupSums group = sums_of_group(p, rewards, i);
  if (!group.informative() || !GroupParams::is_number(rewards[i])) return;
  Spread spread = of_batch;
  if (p.estimator == Estimator::kGrpo || p.estimator == Estimator::kPassk)
    spread = spread_in_group(p, group, rewards, i);
  p.informative[i] = true;
  p.sums()[i] += p.column_weight(r) * double(stored(advantage_of(p, group, rewards[i], spread)));
}

// The first informative sample of a group counts it.
FASTPO_SCALAR bool counts_its_group(const GroupParams& p, int64_t i) {
  if (!p.informative[i]) return false;
  bool is_first = false;
  for_each_member(p, i, [&](int64_t j) {
    is_first = i == j;
    return !p.informative[j];
  });
  return is_first;
}

// Of the rewards of a column less their group's mean.
template <class Grid>
FASTPO_SCALAR_MEMBER Spread spread_of_deviations(Grid& grid, const GroupParams& p, const double* rewards) {
  double* deviations = p.deviations();
  grid.each([&](int64_t i) {
    const bool counts = GroupParams::is_number(rewards[i]);
    deviations[i] = counts ? deviation(sums_of_group(p, rewards, i), rewards[i]) : 0.0;
  });
  return spread_of([&](auto&& f) { return grid.sum(f); }, [&](int64_t i) { return deviations[i]; },
                   [&](int64_t i) { return GroupParams::is_number(rewards[i]) ? p.length(i) : 0.0; },
                   !p.lengths);
}

// p.num_informative holds 0 before.
template <class Grid>
FASTPO_SCALAR_MEMBER void group_advantages_of(Grid& grid, const GroupParams& p) {
  grid.each([&](int64_t i) {
    for (int64_t r = 0; r < p.columns; ++r) p.column(r)[i] = grid.reward(i * p.columns + r);
    p.sums()[i] = 0;
    p.informative[i] = false;
  });
  for (int64_t r = 0; r < p.columns; ++r) {
    Spread of_batch;
    if (p.estimator == Estimator::kReinforcePp) of_batch = spread_of_deviations(grid, p, p.column(r));
    grid.each([&](int64_t i) { add_advantage(p, r, i, of_batch); });
  }
  Spread spread;
  if (p.whiten)
    spread = spread_of([&](auto&& f) { return grid.sum(f); },
                       [&](int64_t i) { return double(stored(p.sums()[i])); },
                       [&](int64_t i) { return p.counts(i) ? 1.0 : 0.0; }, false);
  grid.each([&](int64_t i) {
    p.advantages[i] = final_advantage(p, i, spread);
    if (counts_its_group(p, i)) grid.increment(p.num_informative);
  });
}

}  // namespace fastpo
