"""Device code of the token-level objectives: loss, its slope in the log-prob, and clip bits.

The formulas are those of `fastpo.objective.token_loss`, in closed form. Each helper returns a value
and its derivative with respect to the token's log-prob. NaN passes through every bound.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, NamedTuple

import triton
import triton.language as tl

if TYPE_CHECKING:
    from fastpo.backends.base import ObjectiveParams

# The numbers of the surrogates and KL estimators, and the clip bits, as the caller passes them.
CLIP: tl.constexpr = tl.constexpr(0)
CISPO: tl.constexpr = tl.constexpr(1)
SAPO: tl.constexpr = tl.constexpr(2)
REINFORCE: tl.constexpr = tl.constexpr(3)
GATE: tl.constexpr = tl.constexpr(4)
BY_TV: tl.constexpr = tl.constexpr(2)  # what a gate compares; 0: there is none, 1: r
BY_KL: tl.constexpr = tl.constexpr(3)
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
BINARY_KL_EPS: tl.constexpr = tl.constexpr(1e-8)


class ParamKinds(NamedTuple):
    """What a kernel is compiled for: these fields of `fastpo.backends.base.ObjectiveParams`."""

    surrogate: int
    kl: int
    kl_ratio_weighted: bool
    old_kl: int
    gate: int
    two_sided: bool


class ParamNumbers(NamedTuple):
    """What one binary takes any values of: its other fields."""

    ratio_low: float
    ratio_high: float
    ratio_max: float
    ratio_min: float
    ratio_max_pos: float
    power_pos: float
    power_neg: float
    keep_low: float
    keep_high: float
    kl_coef: float
    old_kl_coef: float
    tau_pos: float
    tau_neg: float


@functools.cache
def split_params(params: ObjectiveParams) -> tuple[ParamKinds, ParamNumbers]:
    """An objective as kernels take it."""
    kind = ParamKinds(*(getattr(params, field) for field in ParamKinds._fields))
    # As floats: an int of 1 would be compiled in.
    return kind, ParamNumbers(*(float(getattr(params, field)) for field in ParamNumbers._fields))


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
def _cispo(logprob, ratio, advantage, low, high):
    """CISPO: -sg(clip(r, low, high)) A logp."""
    slope = -_min(_max(ratio, low), high) * advantage
    below = (advantage < 0) & (ratio < low)
    above = (advantage > 0) & (ratio > high)
    return slope * logprob, slope, tl.where(below, CLIPPED_LOW, 0) | tl.where(above, CLIPPED_MAX, 0)


@triton.jit
def _sapo(ratio, slope, advantage, tau_pos, tau_neg):
    """SAPO: -(4 / tau) A g, g = sigmoid(tau (r - 1))."""
    tau = tl.where(advantage > 0, tau_pos, tau_neg)
    gate = 1.0 / (1.0 + tl.exp(-tau * (ratio - 1.0)))
    return -4.0 / tau * advantage * gate, -4.0 * advantage * gate * (1.0 - gate) * slope


@triton.jit
def _one_minus_exp(x):
    """1 - exp(x) for x <= 0, at least 0; near 0 the series has the digits."""
    series = -x * (1.0 + x * (0.5 + x * (0.16666667 + x * 0.041666668)))
    return _max(tl.where(tl.abs(x) < 0.03, series, 1.0 - tl.exp(x)), 0.0)


@triton.jit
def _divergence(logprob, old_logprob, ratio, GATE_BY: tl.constexpr):
    """What a gate compares with its bounds: r, p - q, or the binary KL(q, p) with that sign."""
    if GATE_BY == BY_TV:
        return tl.exp(logprob) - tl.exp(old_logprob)
    elif GATE_BY == BY_KL:
        q = tl.exp(old_logprob)
        rest = _one_minus_exp(logprob) + BINARY_KL_EPS
        old_rest = _one_minus_exp(old_logprob) + BINARY_KL_EPS
        kl = q * (old_logprob - logprob) + (1.0 - q) * tl.log(old_rest / rest)
        return tl.where(tl.exp(logprob) - q > 0, kl, -kl)
    else:
        return ratio


@triton.jit
def _gate(
    logprob,
    old_logprob,
    ratio,
    advantage,
    low,
    high,
    objective,
    KIND: tl.constexpr,
):
    """The gate family: -sg(w) A logp, w = clip(r^k) inside the gate, keep times a bound outside."""
    positive = advantage > 0
    negative = advantage < 0
    most = tl.where(
        positive, _min(objective.ratio_max_pos, objective.ratio_max), objective.ratio_max
    )
    clamped = _max(_min(logprob - old_logprob, MAX_LOG_RATIO), -MAX_LOG_RATIO)
    powered = tl.exp(tl.where(positive, objective.power_pos, objective.power_neg) * clamped)
    weight = _min(_max(powered, objective.ratio_min), most)
    clipped = tl.where(powered > most, CLIPPED_MAX, 0)
    if KIND.gate != 0:
        divergence = _divergence(logprob, old_logprob, ratio, KIND.gate)
        below = divergence < low
        above = divergence > high
        if not KIND.two_sided:
            below &= negative
            above &= positive
        weight = tl.where(above, objective.keep_high * high, weight)
        weight = tl.where(below, objective.keep_low * low, weight)
        clipped = tl.where(below, CLIPPED_LOW, tl.where(above, CLIPPED_HIGH, clipped))
    slope = -weight * advantage
    return slope * logprob, slope, clipped


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
    old_logprob,
    ratio,
    slope,
    advantage,
    low,
    high,
    objective,
    KIND: tl.constexpr,
):
    """(loss, slope, clip bits) of the surrogate, before weight and KL."""
    if KIND.surrogate == CLIP:
        return _clip(ratio, slope, advantage, low, high, objective.ratio_max)
    elif KIND.surrogate == CISPO:
        return _cispo(logprob, ratio, advantage, low, high)
    elif KIND.surrogate == SAPO:
        loss, slope = _sapo(ratio, slope, advantage, objective.tau_pos, objective.tau_neg)
        return loss, slope, tl.full((), 0, tl.int32)
    elif KIND.surrogate == GATE:
        return _gate(logprob, old_logprob, ratio, advantage, low, high, objective, KIND)
    else:
        return -advantage * logprob, -advantage, tl.full((), 0, tl.int32)


@triton.jit
def token_loss(
    logprob,
    old_logprob,
    advantage,
    ref_logprob,
    low,
    high,
    nll_weight,
    objective,
    KIND: tl.constexpr,
    HAS_NLL: tl.constexpr,
):
    """(loss, slope, clip bits) of one token before its weight.

    Surrogate + kl_coef * kl [* r] + old_kl_coef * kl(logp, old) - nll_weight * logp. `low` and
    `high` are the row's own bounds or the objective's; `objective` and KIND are of `split_params`.
    """
    ratio, ratio_slope = importance_ratio(logprob, old_logprob)
    loss, slope, clipped = surrogate_loss(
        logprob, old_logprob, ratio, ratio_slope, advantage, low, high, objective, KIND
    )
    if KIND.kl != 0:
        kl, kl_slope = kl_penalty(logprob - ref_logprob, KIND.kl)
        if KIND.kl_ratio_weighted:
            kl_slope = kl_slope * ratio + kl * ratio_slope
            kl = kl * ratio
        loss += objective.kl_coef * kl
        slope += objective.kl_coef * kl_slope
    if KIND.old_kl != 0:
        kl, kl_slope = kl_penalty(logprob - old_logprob, KIND.old_kl)
        loss += objective.old_kl_coef * kl
        slope += objective.old_kl_coef * kl_slope
    if HAS_NLL:
        loss -= nll_weight * logprob
        slope -= nll_weight
    return loss, slope, clipped
