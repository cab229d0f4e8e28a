// Advantages of completions over their group, on the CPU and on CUDA. No torch header here.
//
// fastpo.advantages.group_advantages is the specification. This header holds the arithmetic that both
// devices share; group_advantages.cpp and group_advantages.cu bring a group's members together.
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
  const void* rewards = nullptr;  // (B,)
  RewardType reward_type = RewardType::kFloat32;
  const int64_t* group_ids = nullptr;  // (B,), or null: consecutive groups of group_size
  int64_t group_size = 1;
  const double* lengths = nullptr;  // (B,), or null: all alike
  Estimator estimator = Estimator::kGrpo;
  double eps = 0;
  float* advantages = nullptr;         // (B,), out, as all below
  bool* informative = nullptr;         // (B,)
  int64_t* num_informative = nullptr;  // one number
  double* scratch = nullptr;           // (2, B)

  FASTPO_SCALAR_MEMBER int64_t group_of(int64_t i) const { return group_ids ? group_ids[i] : i / group_size; }
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

// (r - mean)^2 summed in a second pass: no cancellation between large squares.
FASTPO_SCALAR double squared_deviation(const GroupSums& group, double reward) {
  const double d = (reward - group.first) - group.mean();
  return d * d;
}

// The advantage of one member; `std` is the group's (grpo, passk) or the batch's (reinforce_pp).
FASTPO_SCALAR double advantage_of(const GroupParams& p, const GroupSums& group, double reward, double std) {
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
      return d == group.best ? (d - group.second) / (std + p.eps) : 0.0;
    case Estimator::kMaxrl:
      return centered / (group.first + group.mean() + p.eps);
    default:  // kGrpo, kReinforcePp
      return centered / (std + p.eps);
  }
}

// As it is stored: 0 where rewards are so large that it overflows.
FASTPO_SCALAR float stored(double advantage) {
  const float narrow = float(advantage);
  return narrow - narrow == 0 ? narrow : 0.0f;
}

FASTPO_SCALAR double unbiased_std(double sum_of_squares, int64_t count) {
  return sqrt(sum_of_squares / double(count > 1 ? count - 1 : 1));
}

void group_advantages_cpu(const GroupParams& p);

}  // namespace fastpo

// One launch on `stream`; returns a cudaError_t. Plain C, so that nothing here depends on a torch ABI.
extern "C" int fastpo_group_advantages_cuda(const fastpo::GroupParams* p, void* stream);
