// What a row comes down to, a few numbers, and what they make: its loss and the slopes of its gradient.
//
// Shared by the CPU's and the GPU's row primitives. `static` for the reason that token_loss.h gives.
#pragma once

#include <math.h>

#include <initializer_list>

#include "rows.h"

namespace fastpo {

constexpr int kObjectiveFields = 19;

// From the fields of fastpo.backends.base.ObjectiveParams in order.
static inline ObjectiveParams objective_params(const double* fields) {
  ObjectiveParams params;
  params.surrogate = Surrogate(int(*fields++));
  params.kl = Kl(int(*fields++));
  params.kl_ratio_weighted = *fields++ != 0;
  params.old_kl = Kl(int(*fields++));
  params.gate = Gate(int(*fields++));
  params.two_sided = *fields++ != 0;
  for (float* field :
       {&params.ratio_low, &params.ratio_high, &params.ratio_max, &params.ratio_min, &params.ratio_max_pos,
        &params.power_pos, &params.power_neg, &params.keep_low, &params.keep_high, &params.kl_coef,
        &params.old_kl_coef, &params.tau_pos, &params.tau_neg})
    *field = float(*fields++);
  return params;
}

// What the first sweep leaves. With m = max u, x_j = u_j - m.
struct Summary {
  float row_max;     // max z = m T
  float inverse_t;   // 1 / T
  float exp_sum;     // s = sum exp x_j
  float log_sum;     // log s
  float mean_shift;  // E_p[x]
  float logprob;
  float entropy;
};

// dz_j = exp(x_j) * (scale + entropy_scale * (mean_shift - x_j)) for every column but the token's.
struct Slopes {
  float scale;          // -c / (s T)
  float entropy_scale;  // e / (s T)
  float mean_shift;     // E_p[x]
  float token_grad;     // dz_y
};

// What a token-level objective makes of a row.
struct RowLoss {
  float value;
  float slope;  // c = dloss/dlogprob
  uint8_t clipped;
};

// The two slopes and the token's own gradient from c, e and the statistics of a row; `inverse_s` = 1 / s.
FASTPO_SCALAR Slopes slopes_of(float c, float e, float inverse_s, const Summary& row) {
  const float inverse_t = row.inverse_t;
  const float p = expf(row.logprob);
  const float x = p > 0 ? row.logprob + row.log_sum : row.mean_shift;  // p = 0: the term is 0
  const float entropy_part = e != 0 ? e * p * (row.mean_shift - x) : 0.0f;
  const float token_grad = inverse_t * (entropy_part - c * expm1f(row.logprob));
  return {-c * inverse_t * inverse_s, e * inverse_t * inverse_s, row.mean_shift, token_grad};
}

// Those of `row_grad`, which knows the row's statistics.
FASTPO_SCALAR Slopes grad_slopes(const GradParams& p, int64_t i, float inverse_t) {
  Summary row = {};
  row.inverse_t = inverse_t;
  row.log_sum = p.log_sum[i];
  row.mean_shift = row.log_sum - p.entropy[i];
  row.logprob = p.logprobs[i];
  return slopes_of(p.logprob_grad[i], p.entropy_grad ? p.entropy_grad[i] : 0.0f, expf(-row.log_sum), row);
}

FASTPO_SCALAR bool mask_of(const LossParams& p, int64_t i) {
  return p.weight[i] != 0 || (p.entropy_weight && p.entropy_weight[i] != 0);
}

FASTPO_SCALAR const float* at_row(const float* values, int64_t i) { return values ? values + i : nullptr; }

FASTPO_SCALAR RowLoss row_loss(const LossParams& p, int64_t i, const Summary& row) {
  const float weight = p.weight[i], entropy_weight = p.entropy_weight ? p.entropy_weight[i] : 0.0f;
  TokenInputs in;
  in.logprob = row.logprob;
  in.advantage = p.advantages[i];
  in.old_logprob = at_row(p.old_logprobs, i);
  in.ref_logprob = at_row(p.ref_logprobs, i);
  in.clip_low = at_row(p.clip_low, i);
  in.clip_high = at_row(p.clip_high, i);
  in.nll_weight = at_row(p.nll_weight, i);
  const TokenLoss token = token_loss(p.objective, in);
  float value = weight * token.loss.value;
  if (entropy_weight != 0) value -= entropy_weight * row.entropy;
  return {value, weight * token.loss.slope, token.clipped};
}

FASTPO_SCALAR void store_losses(const LossParams& p, int64_t i, const Summary& row, const RowLoss& loss) {
  p.loss[i] = loss.value;
  p.logprobs[i] = row.logprob;
  p.entropy[i] = row.entropy;
  p.clipped[i] = loss.clipped;
}

// m is rounded to fp32; what the rounding took goes into log s, so that their sum stays right.
FASTPO_SCALAR void store_stats(const StatsParams& p, int64_t i, const Summary& row) {
  p.logprobs[i] = row.logprob;
  p.entropy[i] = row.entropy;
  p.row_max[i] = row.row_max * row.inverse_t;
  p.log_sum[i] = row.log_sum + fmaf(row.row_max, row.inverse_t, -p.row_max[i]);
}

}  // namespace fastpo
