// A token-level objective: loss of one token and its derivative with respect to the log-prob.
//
// The scalar twin of fastpo.objective.token_loss, shared by every compiled backend. Functions are
// `static` on purpose: files compiled for different instruction sets must not share one copy.
#pragma once

#include <math.h>
#include <stdint.h>

#ifdef __CUDACC__
#define FASTPO_SCALAR __host__ __device__ static inline
#define FASTPO_SCALAR_MEMBER __host__ __device__
#else
#define FASTPO_SCALAR static inline
#define FASTPO_SCALAR_MEMBER
#endif

namespace fastpo {

enum class Surrogate : int { kClip, kCispo, kSapo, kReinforce };
enum class Kl : int { kNone, kK1, kK2, kK3, kAbs, kK1Plus, kK3Plus };

constexpr uint8_t kClippedLow = 1, kClippedHigh = 2, kClippedMax = 4;
constexpr float kMaxLogRatio = 20.0f;

struct Rule {
  Surrogate surrogate = Surrogate::kClip;
  Kl kl = Kl::kNone;
  bool kl_ratio_weighted = false;
  float ratio_low = 0;   // 1 - clip_low
  float ratio_high = 0;  // 1 + clip_high
  float ratio_max = 0;   // inf = none
  float kl_coef = 0;
  float tau_pos = 1;
  float tau_neg = 1;
};

// A value and its derivative with respect to the token's log-prob.
struct Dual {
  float value;
  float slope;
};

struct TokenLoss {
  Dual loss;
  uint8_t clipped;
};

// Comparisons below are written so that NaN comes out wherever NaN goes in.
FASTPO_SCALAR float min_or_nan(float a, float b) { return a < b || a != a ? a : b; }
FASTPO_SCALAR float max_or_nan(float a, float b) { return a > b || a != a ? a : b; }

// r = exp(clamp(d, -20, 20)); its slope is r, or 0 where the clamp holds.
FASTPO_SCALAR Dual importance_ratio(float log_ratio) {
  float clamped = max_or_nan(min_or_nan(log_ratio, kMaxLogRatio), -kMaxLogRatio);
  float ratio = expf(clamped);
  bool saturated = log_ratio > kMaxLogRatio || log_ratio < -kMaxLogRatio;
  return {ratio, saturated ? 0.0f : ratio};
}

// -min(min(r, ratio_max) A, clip(r, low, high) A), slope -A r' unless a bound holds.
FASTPO_SCALAR TokenLoss clip_loss(const Rule& rule, Dual ratio, float advantage) {
  float r = ratio.value;
  float bounded = min_or_nan(r, rule.ratio_max);
  float clipped_ratio = min_or_nan(max_or_nan(r, rule.ratio_low), rule.ratio_high);
  uint8_t flags = 0;
  if (advantage < 0 && r < rule.ratio_low) flags |= kClippedLow;
  if (advantage > 0 && r > rule.ratio_high) flags |= kClippedHigh;
  if (advantage < 0 && r > rule.ratio_max) flags |= kClippedMax;
  float loss = -min_or_nan(bounded * advantage, clipped_ratio * advantage);
  return {{loss, flags ? 0.0f : -advantage * ratio.slope}, flags};
}

// -sg(min(r, ratio_max)) A logp.
FASTPO_SCALAR TokenLoss cispo_loss(const Rule& rule, Dual ratio, float advantage, float logprob) {
  float slope = -min_or_nan(ratio.value, rule.ratio_max) * advantage;
  uint8_t flags = ratio.value > rule.ratio_max ? kClippedMax : 0;
  return {{slope * logprob, slope}, flags};
}

// -A (4 / tau) g with g = sigmoid(tau (r - 1)), slope -4 A g (1 - g) r'.
FASTPO_SCALAR TokenLoss sapo_loss(const Rule& rule, Dual ratio, float advantage) {
  float tau = advantage > 0 ? rule.tau_pos : rule.tau_neg;
  float gate = 1.0f / (1.0f + expf(-tau * (ratio.value - 1.0f)));
  float slope = -4.0f * advantage * gate * (1.0f - gate) * ratio.slope;
  return {{-advantage * (4.0f / tau) * gate, slope}, 0};
}

FASTPO_SCALAR TokenLoss surrogate_loss(const Rule& rule, Dual ratio, float advantage, float logprob) {
  switch (rule.surrogate) {
    case Surrogate::kClip:
      return clip_loss(rule, ratio, advantage);
    case Surrogate::kCispo:
      return cispo_loss(rule, ratio, advantage, logprob);
    case Surrogate::kSapo:
      return sapo_loss(rule, ratio, advantage);
    default:  // kReinforce: -A logp
      return {{-advantage * logprob, -advantage}, 0};
  }
}

// KL estimate from k = logp - ref, with q = exp(min(-k, 20)).
FASTPO_SCALAR Dual kl_estimate(Kl kl, float k) {
  float inverse = min_or_nan(-k, kMaxLogRatio);
  float q = expf(inverse);
  float k3 = q - inverse - 1.0f;
  switch (kl) {
    case Kl::kK1:
      return {k, 1.0f};
    case Kl::kK2:
      return {0.5f * k * k, k};
    case Kl::kK3:
      return {k3, -k > kMaxLogRatio ? 0.0f : 1.0f - q};
    case Kl::kAbs:
      return {fabsf(k), k > 0 ? 1.0f : (k < 0 ? -1.0f : k)};
    case Kl::kK1Plus:  // value of k1, gradient of k2
      return {k, k};
    default:  // kK3Plus: value of k3, gradient of k2
      return {k3, k};
  }
}

// Surrogate + kl_coef * KL [* r]. `old_logprob` and `ref_logprob` may be null: on-policy, no reference.
FASTPO_SCALAR TokenLoss token_loss(const Rule& rule, float logprob, float advantage,
                                   const float* old_logprob, const float* ref_logprob) {
  Dual ratio = importance_ratio(logprob - (old_logprob ? *old_logprob : logprob));
  TokenLoss token = surrogate_loss(rule, ratio, advantage, logprob);
  if (rule.kl == Kl::kNone || !ref_logprob) return token;
  Dual kl = kl_estimate(rule.kl, logprob - *ref_logprob);
  if (rule.kl_ratio_weighted)
    kl = {kl.value * ratio.value, kl.slope * ratio.value + kl.value * ratio.slope};
  token.loss.value += rule.kl_coef * kl.value;
  token.loss.slope += rule.kl_coef * kl.slope;
  return token;
}

}  // namespace fastpo
