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

enum class Surrogate : int { kClip, kCispo, kSapo, kReinforce, kGate };
enum class Gate : int { kNone, kRatio, kTv, kKl };
enum class Kl : int { kNone, kK1, kK2, kK3, kAbs, kK1Plus, kK3Plus };

constexpr uint8_t kClippedLow = 1, kClippedHigh = 2, kClippedMax = 4;
constexpr float kMaxLogRatio = 20.0f;
constexpr float kBinaryKlEps = 1e-8f;

struct ObjectiveParams {
  Surrogate surrogate = Surrogate::kClip;
  Kl kl = Kl::kNone;
  bool kl_ratio_weighted = false;
  Kl old_kl = Kl::kNone;
  Gate gate = Gate::kNone;
  bool two_sided = false;
  float ratio_low = 0;  // what r, or the gate's divergence, is compared with
  float ratio_high = 0;
  float ratio_max = 0;  // inf = none
  float ratio_min = 0;
  float ratio_max_pos = 0;  // inf = none
  float power_pos = 1;
  float power_neg = 1;
  float keep_low = 0;
  float keep_high = 0;
  float kl_coef = 0;
  float old_kl_coef = 0;
  float tau_pos = 1;
  float tau_neg = 1;
};

// The numbers of one token. A null pointer means "not given".
struct TokenInputs {
  float logprob = 0;
  float advantage = 0;
  const float* old_logprob = nullptr;  // null: on-policy
  const float* ref_logprob = nullptr;
  const float* clip_low = nullptr;  // in place of the objective's ratio_low and ratio_high
  const float* clip_high = nullptr;
  const float* nll_weight = nullptr;  // of an SFT term, -nll_weight * logprob
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
FASTPO_SCALAR TokenLoss clip_loss(const ObjectiveParams& objective, Dual ratio, float advantage) {
  float r = ratio.value;
  float bounded = min_or_nan(r, objective.ratio_max);
  float clipped_ratio = min_or_nan(max_or_nan(r, objective.ratio_low), objective.ratio_high);
  uint8_t flags = 0;
  if (advantage < 0 && r < objective.ratio_low) flags |= kClippedLow;
  if (advantage > 0 && r > objective.ratio_high) flags |= kClippedHigh;
  if (advantage < 0 && r > objective.ratio_max) flags |= kClippedMax;
  float loss = -min_or_nan(bounded * advantage, clipped_ratio * advantage);
  return {{loss, flags ? 0.0f : -advantage * ratio.slope}, flags};
}

// -sg(clip(r, low, high)) A logp.
FASTPO_SCALAR TokenLoss cispo_loss(const ObjectiveParams& objective, Dual ratio, float advantage,
                                   float logprob) {
  float r = ratio.value;
  float slope = -min_or_nan(max_or_nan(r, objective.ratio_low), objective.ratio_high) * advantage;
  uint8_t flags = 0;
  if (advantage < 0 && r < objective.ratio_low) flags |= kClippedLow;
  if (advantage > 0 && r > objective.ratio_high) flags |= kClippedMax;
  return {{slope * logprob, slope}, flags};
}

// What a gate compares with its bounds: r, p - q, or the KL of the Bernoulli distributions (q, p), q old,
// with the sign of p - q.
FASTPO_SCALAR float gate_divergence(Gate gate, float ratio, float logprob, float old_logprob) {
  if (gate == Gate::kNone || gate == Gate::kRatio) return ratio;
  float q = expf(old_logprob);
  float difference = expf(logprob) - q;
  if (gate == Gate::kTv) return difference;
  float rest = max_or_nan(-expm1f(logprob), 0.0f) + kBinaryKlEps;
  float old_rest = max_or_nan(-expm1f(old_logprob), 0.0f) + kBinaryKlEps;
  float kl = q * (old_logprob - logprob) + (1.0f - q) * logf(old_rest / rest);
  return difference > 0 ? kl : -kl;
}

// -sg(w) A logp; w = clip(r^k, ratio_min, ratio_max) inside the gate, keep times the bound outside.
FASTPO_SCALAR TokenLoss gate_loss(const ObjectiveParams& objective, Dual ratio, float log_ratio,
                                  const TokenInputs& in, float old_logprob) {
  bool positive = in.advantage > 0, negative = in.advantage < 0;
  float most = positive ? min_or_nan(objective.ratio_max_pos, objective.ratio_max) : objective.ratio_max;
  float clamped = max_or_nan(min_or_nan(log_ratio, kMaxLogRatio), -kMaxLogRatio);
  float powered = expf((positive ? objective.power_pos : objective.power_neg) * clamped);
  float weight = min_or_nan(max_or_nan(powered, objective.ratio_min), most);
  float divergence = gate_divergence(objective.gate, ratio.value, in.logprob, old_logprob);
  bool below = divergence < objective.ratio_low && (negative || objective.two_sided);
  bool above = divergence > objective.ratio_high && (positive || objective.two_sided);
  if (below) weight = objective.keep_low * objective.ratio_low;
  if (above) weight = objective.keep_high * objective.ratio_high;
  uint8_t flags = (below ? kClippedLow : 0) | (above ? kClippedHigh : 0);
  if (powered > most && !flags) flags = kClippedMax;
  float slope = -weight * in.advantage;
  return {{slope * in.logprob, slope}, flags};
}

// -A (4 / tau) g with g = sigmoid(tau (r - 1)), slope -4 A g (1 - g) r'.
FASTPO_SCALAR TokenLoss sapo_loss(const ObjectiveParams& objective, Dual ratio, float advantage) {
  float tau = advantage > 0 ? objective.tau_pos : objective.tau_neg;
  float gate = 1.0f / (1.0f + expf(-tau * (ratio.value - 1.0f)));
  float slope = -4.0f * advantage * gate * (1.0f - gate) * ratio.slope;
  return {{-advantage * (4.0f / tau) * gate, slope}, 0};
}

FASTPO_SCALAR TokenLoss surrogate_loss(const ObjectiveParams& objective, Dual ratio, float log_ratio,
                                       const TokenInputs& in, float old_logprob) {
  switch (objective.surrogate) {
    case Surrogate::kClip:
      return clip_loss(objective, ratio, in.advantage);
    case Surrogate::kCispo:
      return cispo_loss(objective, ratio, in.advantage, in.logprob);
    case Surrogate::kSapo:
      return sapo_loss(objective, ratio, in.advantage);
    case Surrogate::kGate:
      return gate_loss(objective, ratio, log_ratio, in, old_logprob);
    default:  // kReinforce: -A logp
      return {{-in.advantage * in.logprob, -in.advantage}, 0};
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

// Surrogate + kl_coef * KL [* r] + old_kl_coef * KL to the behaviour policy - nll_weight * logprob.
FASTPO_SCALAR TokenLoss token_loss(const ObjectiveParams& shared, const TokenInputs& in) {
  ObjectiveParams objective = shared;
  if (in.clip_low) objective.ratio_low = *in.clip_low;
  if (in.clip_high) objective.ratio_high = *in.clip_high;
  float old_logprob = in.old_logprob ? *in.old_logprob : in.logprob;
  float log_ratio = in.logprob - old_logprob;
  Dual ratio = importance_ratio(log_ratio);
  TokenLoss token = surrogate_loss(objective, ratio, log_ratio, in, old_logprob);
  if (objective.kl != Kl::kNone && in.ref_logprob) {
    Dual kl = kl_estimate(objective.kl, in.logprob - *in.ref_logprob);
    if (objective.kl_ratio_weighted)
      kl = {kl.value * ratio.value, kl.slope * ratio.value + kl.value * ratio.slope};
    token.loss.value += objective.kl_coef * kl.value;
    token.loss.slope += objective.kl_coef * kl.slope;
  }
  if (objective.old_kl != Kl::kNone) {
    Dual kl = kl_estimate(objective.old_kl, log_ratio);
    token.loss.value += objective.old_kl_coef * kl.value;
    token.loss.slope += objective.old_kl_coef * kl.slope;
  }
  if (in.nll_weight) {
    token.loss.value -= *in.nll_weight * in.logprob;
    token.loss.slope -= *in.nll_weight;
  }
  return token;
}

}  // namespace fastpo
