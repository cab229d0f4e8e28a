"""Device code of the token-level objectives: loss, its slope in the log-prob, and clip bits.

The formulas are those of `fastpo.objective.token_loss`, in closed form. Each helper returns a value
and its derivative with respect to the token's log-prob. NaN passes through every bound.
"""

import triton
import triton.language as tl

# The numbers of the surrogates and KL estimators, and the clip bits, as the caller passes them.
CLIP: tl.constexpr = tl.constexpr(0)
CISPO: tl.constexpr = tl.constexpr(1)
SAPO: tl.constexpr = tl.constexpr(2)
REINFORCE: tl.constexpr = tl.constexpr(3)
K1: tl.constexpr = tl.constexpr(1)
K2: tl.constexpr = tl.constexpr(2)
K3: tl.constexpr = tl.constexpr(3)
ABS: tl.constexpr = tl.constexpr(4)
K1_PLUS: tl.constexpr = tl.constexpr(5)
K3_PLUS: tl.constexpr = tl.constexpr(6)
CLIPPED_LOW: tl.constexpr = tl.constexpr(1)
CLIPPED_HIGH: tl.constexpr = tl.constexpr(2)
CLIPPED_MAX: tl.constexpr = tl.constexpr(4)
MAX_LOG_RATIO: tl.constexpr = tl.constexpr(20.0)


@triton.jit
def _min(a, b):
    return tl.minimum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _max(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def importance_ratio(logprob, old_logprob):
    """r = exp(clamp(d, -20, 20)), d = logprob - old_logprob; slope 0 where the clamp holds."""
    log_ratio = logprob - old_logprob
    ratio = tl.exp(_max(_min(log_ratio, MAX_LOG_RATIO), -MAX_LOG_RATIO))
    return ratio, tl.where(tl.abs(log_ratio) > MAX_LOG_RATIO, 0.0, ratio)


@triton.jit
def _clip(ratio, slope, advantage, low, high, ratio_max):
    """PPO: -min(min(r, ratio_max) A, clip(r, low, high) A)."""
    loss = -_min(_min(ratio, ratio_max) * advantage, _max(_min(ratio, high), low) * advantage)
    negative = advantage < 0
    below = negative & (ratio < low)
    above = (advantage > 0) & (ratio > high)
    beyond = negative & (ratio > ratio_max)
    clipped = tl.where(below, CLIPPED_LOW, 0) | tl.where(above, CLIPPED_HIGH, 0)
    clipped |= tl.where(beyond, CLIPPED_MAX, 0)
    return loss, tl.where(below | above | beyond, 0.0, -advantage * slope), clipped


@triton.jit
def _cispo(logprob, ratio, advantage, ratio_max):
    """CISPO: -sg(min(r, ratio_max)) A logp."""
    slope = -_min(ratio, ratio_max) * advantage
    return slope * logprob, slope, tl.where(ratio > ratio_max, CLIPPED_MAX, 0)


@triton.jit
def _sapo(ratio, slope, advantage, tau_pos, tau_neg):
    """SAPO: -(4 / tau) A g, g = sigmoid(tau (r - 1))."""
    tau = tl.where(advantage > 0, tau_pos, tau_neg)
    gate = 1.0 / (1.0 + tl.exp(-tau * (ratio - 1.0)))
    return -4.0 / tau * advantage * gate, -4.0 * advantage * gate * (1.0 - gate) * slope


@triton.jit
def _k3(log_ratio):
    """exp(-k) + k - 1, with -k at most 20: beyond, value and slope stay put."""
    inverse = _min(-log_ratio, MAX_LOG_RATIO)
    q = tl.exp(inverse)
    return q - inverse - 1.0, tl.where(-log_ratio > MAX_LOG_RATIO, 0.0, 1.0 - q)


@triton.jit
def kl_penalty(log_ratio, KL: tl.constexpr):
    """The estimate of KL(policy || reference) from k = logp - ref, and its slope."""
    if KL == K1:
        return log_ratio, log_ratio * 0.0 + 1.0
    elif KL == K2:
        return 0.5 * log_ratio * log_ratio, log_ratio
    elif KL == K3:
        return _k3(log_ratio)
    elif KL == ABS:
        sign = tl.where(log_ratio > 0, 1.0, tl.where(log_ratio < 0, -1.0, log_ratio))
        return tl.abs(log_ratio), sign
    elif KL == K1_PLUS:
        return log_ratio, log_ratio
    else:
        value, _ = _k3(log_ratio)
        return value, log_ratio


@triton.jit
def surrogate_loss(
    logprob,
    ratio,
    slope,
    advantage,
    low,
    high,
    ratio_max,
    tau_pos,
    tau_neg,
    SURROGATE: tl.constexpr,
):
    """(loss, slope, clip bits) of the surrogate, before weight and KL."""
    if SURROGATE == CLIP:
        return _clip(ratio, slope, advantage, low, high, ratio_max)
    elif SURROGATE == CISPO:
        return _cispo(logprob, ratio, advantage, ratio_max)
    elif SURROGATE == SAPO:
        loss, slope = _sapo(ratio, slope, advantage, tau_pos, tau_neg)
        return loss, slope, tl.full((), 0, tl.int32)
    else:
        return -advantage * logprob, -advantage, tl.full((), 0, tl.int32)


@triton.jit
def token_loss(
    logprob,
    old_logprob,
    advantage,
    ref_logprob,
    rule,
    SURROGATE: tl.constexpr,
    KL: tl.constexpr,
    KL_RATIO_WEIGHTED: tl.constexpr,
):
    """(loss, slope, clip bits) of one token before its weight: surrogate + kl_coef * kl [* r].

    `rule` is (ratio_low, ratio_high, ratio_max, kl_coef, tau_pos, tau_neg), all fp32.
    """
    low, high, ratio_max, kl_coef, tau_pos, tau_neg = rule
    ratio, ratio_slope = importance_ratio(logprob, old_logprob)
    loss, slope, clipped = surrogate_loss(
        logprob, ratio, ratio_slope, advantage, low, high, ratio_max, tau_pos, tau_neg, SURROGATE
    )
    if KL != 0:
        kl, kl_slope = kl_penalty(logprob - ref_logprob, KL)
        if KL_RATIO_WEIGHTED:
            kl_slope = kl_slope * ratio + kl * ratio_slope
            kl = kl * ratio
        loss += kl_coef * kl
        slope += kl_coef * kl_slope
    return loss, slope, clipped
