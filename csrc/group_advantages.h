// Advantages of completions over their group, on the CPU and on CUDA. No torch header here.
//
// fastpo.advantages.group_advantages is the specification. This header holds the arithmetic that both
// devices share; group_advantages.cpp and group_grid.h bring a group's members together.
#pragma once

#include <math.h>
#include <stdint.h>

#include "token_loss.h"

namespace fastpo {

// In the order of fastpo.advantages.ESTIMATORS.
enum class Estimator : int { kGrpo, kDrGrpo, kRloo, kOpo, kPassk, kReinforcePp, kMaxrl };

enum class RewardType : int {
  kFloat64,
  kFloat32,
  kFloat16,
  kBFloat16,
  kInt64,
  kInt32,
  kInt16,
  kInt8,
  kUInt8
};

struct GroupParams {
  int64_t count = 0;              // B
  int64_t columns = 1;            // R, rewards of each sample
  const void* rewards = nullptr;  // (B, R)
  RewardType reward_type = RewardType::kFloat32;
  const double* column_weights = nullptr;  // (R,), or null: 1
  const int64_t* group_ids = nullptr;      // (B,), or null: consecutive groups of group_size
  int64_t group_size = 1;
  const double* lengths = nullptr;  // (B,), or null: all alike
  Estimator estimator = Estimator::kGrpo;
  double eps = 0;
  bool whiten = false;                 // over the batch, at last
  float* advantages = nullptr;         // (B,), out, as all below
  bool* informative = nullptr;         // (B,)
  int64_t* num_informative = nullptr;  // one number
  double* scratch = nullptr;           // (R + 2, B)

  FASTPO_SCALAR_MEMBER int64_t group_of(int64_t i) const { return group_ids ? group_ids[i] : i / group_size; }
  FASTPO_SCALAR_MEMBER double length(int64_t i) const { return lengths ? lengths[i] : 1.0; }
  FASTPO_SCALAR_MEMBER double column_weight(int64_t r) const {
    return column_weights ? column_weights[r] : 1.0;
  }
  // Of the scratch: the rewards of one column; deviations from the group's mean; sums over the columns.
  FASTPO_SCALAR_MEMBER double* column(int64_t r) const { return scratch + r * count; }
  FASTPO_SCALAR_MEMBER double* deviations() const { return column(columns); }
  FASTPO_SCALAR_MEMBER double* sums() const { return column(columns + 1); }

  // Whether any reward of sample i is a number.
  FASTPO_SCALAR_MEMBER bool counts(int64_t i) const {
    bool any = false;
    for (int64_t r = 0; r < columns; ++r) any |= is_number(column(r)[i]);
    return any;
  }
  FASTPO_SCALAR_MEMBER static bool is_number(double x) { return x - x == 0; }
};

// What one pass over the finite rewards of a group gathers. Sums are taken of the differences to the
// group's first reward: those of equal rewards are exactly 0, and small spreads survive large offsets.
struct GroupSums {
  int64_t members = 0;
  int64_t first_member = -1;
  double first = 0;
  double sum = 0;
  double length = 0;           // sum of lengths
  double length_weighted = 0;  // sum of length * difference
  double best = -INFINITY, second = -INFINITY, worst = INFINITY;

  FASTPO_SCALAR_MEMBER void add(int64_t i, double reward, double weight) {
    if (members++ == 0) first_member = i, first = reward;
    const double d = reward - first;
    sum += d;
    length += weight;
    length_weighted += weight * d;
    second = fmax(second, fmin(best, d));
    best = fmax(best, d);
    worst = fmin(worst, d);
  }

  FASTPO_SCALAR_MEMBER double mean() const { return sum / double(members); }
  FASTPO_SCALAR_MEMBER bool informative() const { return best > worst; }
};

FASTPO_SCALAR double deviation(const GroupSums& group, double reward) {
  return (reward - group.first) - group.mean();
}

// What deviations are normalized by: of the group (grpo, passk), or of the batch (reinforce_pp).
struct Spread {
  double mean = 0;
  double std = 0;
};

FASTPO_SCALAR double unbiased_std(double sum_of_squares, double count) {
  return sqrt(sum_of_squares / fmax(count - 1, 1.0));
}

// Of values with weights over samples 0 ... count - 1, by `sum(f)`, the sum of f(i). Two passes: no cancellation
// between large squares. Weights that are all 1 leave deviations of groups a mean of 0.
template <class Sum, class Value, class Weight>
FASTPO_SCALAR Spread spread_of(Sum&& sum, Value&& value, Weight&& weight, bool centered) {
  Spread spread;
  const double total = sum([&](int64_t i) { return weight(i); });
  if (!centered) {
    spread.mean = sum([&](int64_t i) { return weight(i) * value(i); }) / fmax(total, 1.0);
  }
  const double squares = sum([&](int64_t i) {
    const double d = value(i) - spread.mean;
    return weight(i) * d * d;
  });
  spread.std = unbiased_std(squares, total);
  return spread;
}

// The advantage of one member.
FASTPO_SCALAR double advantage_of(const GroupParams& p, const GroupSums& group, double reward,
                                  Spread spread) {
  const double d = reward - group.first;
  const double centered = d - group.mean();
  switch (p.estimator) {
    case Estimator::kDrGrpo:
      return centered;
    case Estimator::kRloo:
      return centered * double(group.members) / double(group.members - 1);
    case Estimator::kOpo:
      return group.length > 0 ? d - group.length_weighted / group.length : centered;
    case Estimator::kPassk:
      return d == group.best ? (d - group.second) / (spread.std + p.eps) : 0.0;
    case Estimator::kMaxrl:
      // Below 0 the mean is no success rate, and would turn every sign.
      return group.first + group.mean() < 0 ? 0.0 : centered / (group.first + group.mean() + p.eps);
    default:  // kGrpo, kReinforcePp
      return (centered - spread.mean) / (spread.std + p.eps);
  }
}

// As it is stored: 0 where rewards are so large that it overflows.
FASTPO_SCALAR float stored(double advantage) {
  const float narrow = float(advantage);
  return narrow - narrow == 0 ? narrow : 0.0f;
}

// From the sums over the columns: whitened over the batch if that is wanted.
FASTPO_SCALAR float final_advantage(const GroupParams& p, int64_t i, Spread spread) {
  const float advantage = stored(p.sums()[i]);
  if (!p.whiten) return advantage;
  return p.counts(i) ? stored((double(advantage) - spread.mean) / (spread.std + p.eps)) : 0.0f;
}

void group_advantages_cpu(const GroupParams& p);

}  // namespace fastpo

// One launch on `stream`; returns a cudaError_t. Plain C, so that nothing here depends on a torch ABI.
extern "C" int fastpo_group_advantages_cuda(const fastpo::GroupParams* p, void* stream);
