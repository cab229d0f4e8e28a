"""Corrections for rollouts sampled by another engine or an older policy than the one trained.

r = pi_old / pi_rollout, d = log r, per token; A advantages. What comes out goes into any policy
loss as `importance_weights` and `mask`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from numbers import Real
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from fastpo.objective import MAX_LOG_RATIO, is_finite, shown
from fastpo.ops import checks
from fastpo.ops.batch import flat_mask
from fastpo.segments import Segments

MODES = ("truncate", "mask", "reject", "none")
LEVELS = ("token", "sequence", "geometric")
REJECTIONS = (
    *("token_k1", "token_k2", "token_k3", "seq_sum_k1", "seq_sum_k2", "seq_sum_k3"),
    *("seq_mean_k1", "seq_mean_k2", "seq_mean_k3", "seq_max_k2", "seq_max_k3"),
)

DEFAULT_HIGH = 2.0


class RolloutCorrection(NamedTuple):
    """What `rollout_correction` returns; [...] is the shape of the tokens. Nothing has a graph."""

    weights: Tensor  # [...] fp32 (fp64 for fp64), 0 under a False mask: `importance_weights`
    mask: Tensor  # [...] bool: the tokens that count and were not rejected
    metrics: dict[str, Tensor]  # 0-d, on the device: means, shares and extrema over unmasked tokens


def rollout_correction(
    old_logprobs: Tensor,
    rollout_logprobs: Tensor,
    *,
    mode: str = "truncate",
    level: str = "token",
    low: float | None = None,
    high: float | None = DEFAULT_HIGH,
    reject: Mapping[str, float | tuple[float, float]] | None = None,
    off_policy_threshold: float | None = None,
    advantages: Tensor | None = None,
    normalize: bool = False,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    cp_group: ProcessGroup | None = None,
) -> RolloutCorrection:
    """Importance weights of the trained over the sampling policy, and what to leave out.

    `level` says what the ratio is: token, r_t; sequence, the product exp(sum_t d_t); geometric,
    exp(mean_t d_t); the last two shared by the sequence. d and its sums are clamped to +-20.
    `mode` says what bounds do:

        truncate  w = clip(ratio, low, high)        TIS (fengyao.notion.site/off-policy-rl)
        mask      w = ratio inside, 0 outside       MIS; IcePop (arXiv 2510.18855) with level token
        reject    w = 1, outside the mask is False  geometric rejection, with level geometric
        none      w = 1

    Further tests, all of which a token must pass to stay in the mask:

        reject={name: bound}    token_k1 ... seq_max_k3, as verl names them: k1 = d, k2 = d^2 / 2,
                                k3 = r - 1 - d, of the token, or its sum, mean or maximum over the
                                sequence. k1 takes (low, high) on exp(k1), which is r for a token;
                                k2 and k3 take a largest value.
        off_policy_threshold    off-policy sequence masking (arXiv 2512.02556): tokens with A < 0
                                of sequences with mean(-d) above it are out. Needs `advantages`.

    A weight of 0 keeps its token in the denominator; a False mask takes it out.

    Agrees with verl 0.9's `rollout_corr_helper` and TRL 1.16's vLLM correction and
    `get_off_policy_mask`, except that: verl bounds 1 / r with its k1 thresholds (give the
    reciprocals), TRL does not clamp d and takes a NaN rollout log-prob for "unknown", r = 1 (put
    the old log-prob there); here a NaN stays visible. Nothing waits for the device.

    Args:
        old_logprobs: [N] or [B, T] of the trained policy before the update, nats.
        rollout_logprobs: [...] as the sampler returned them.
        low, high: bounds on the ratio, > 0; None = none on that side.
        advantages: [...] per token or [B] per sequence; with `off_policy_threshold` only.
        normalize: divide the weights by their mean over unmasked tokens (sequences, for the other
            levels), of this batch.
        mask: [...] bool, the tokens that count; what stands elsewhere is never used.
        cu_seqlens: (B + 1,) int32 offsets of the sequences of a packed [N] batch; required there
            for anything that is not per token.
        cp_group: process group over which the tokens of every sequence are split, as in
            `fastpo.policy_loss`; weights and mask are of this rank's tokens, the metrics of all.

    Returns:
        Weights, mask and metrics: `ratio_min`, `ratio_max`, `ratio_mean` (before bounds),
        `weight_mean`, `ess` (effective sample size, share of the tokens: 1 is none lost), `cut`
        (share of tokens bounded, zeroed or rejected), `kl_k1` and `kl_k3` (estimates of
        KL(rollout || old)), `difference_mean` and `difference_max` (|d|). NaN without unmasked
        tokens.

    Raises:
        ValueError, TypeError: see the message: what was got, what is expected, what to do.
    """
    reject = {} if reject is None else reject
    _check_settings(mode, level, low, high, reject)
    per_token = level == "token" and all(name.startswith("token") for name in reject)
    needs_sequences = not per_token or off_policy_threshold is not None
    _check_off_policy(off_policy_threshold, advantages)
    _check_tensors(old_logprobs, rollout_logprobs, mask, cu_seqlens, needs_sequences)
    if advantages is not None:
        named = ("advantages", advantages, old_logprobs.shape)
        split = cp_group is not None
        checks.check_per_token_or_sequence(*named, cu_seqlens, old_logprobs, split=split)
    checks.check_group("cp_group", cp_group, "the tokens of every sequence are split")
    if cp_group is not None and needs_sequences:
        checks.check_same_sequences(cp_group, old_logprobs.shape, cu_seqlens, old_logprobs)

    leading, dtype = old_logprobs.shape, checks.wide_dtype(old_logprobs.dtype)
    segments = Segments.from_batch(leading, cu_seqlens, old_logprobs.device, cp_group)
    mask = flat_mask(torch.ones_like(old_logprobs) if mask is None else mask)
    log_ratio = (old_logprobs.detach().to(dtype) - rollout_logprobs.detach().to(dtype)).reshape(-1)
    log_ratio = log_ratio.masked_fill(~mask, 0)

    ratio = _clamped(_at_level(log_ratio, level, mask, segments)).exp()
    weights, inside = _bounded(ratio, mode, low, high)
    kept = mask & inside if mode == "reject" else mask
    for name, bound in reject.items():
        kept = kept & _passes(name, bound, log_ratio, mask, segments)
    if off_policy_threshold is not None:
        near = segments.broadcast(segments.mean(-log_ratio, mask)) <= off_policy_threshold
        kept = kept & (near | (_per_token(advantages, leading, segments) >= 0))
    if normalize:
        weights = weights / _mean_weight(weights, level, mask, segments)
    weights = weights.masked_fill(~mask, 0)
    cut = mask & ~(inside & kept) if mode != "none" else mask & ~kept
    metrics = _metrics(log_ratio, ratio, weights, cut, mask, segments)
    return RolloutCorrection(weights.view(leading), kept.view(leading), metrics)


def _clamped(log_ratio: Tensor) -> Tensor:
    return log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)


def _at_level(log_ratio: Tensor, level: str, mask: Tensor, segments: Segments) -> Tensor:
    """The log of the ratio that a level looks at, (N,)."""
    if level == "token":
        return log_ratio
    reduce = segments.sum if level == "sequence" else segments.mean
    return segments.broadcast(reduce(log_ratio, mask))


def _bounded(
    ratio: Tensor, mode: str, low: float | None, high: float | None
) -> tuple[Tensor, Tensor]:
    """The weights, and where the ratio is inside the bounds."""
    least, most = 0.0 if low is None else low, math.inf if high is None else high
    inside = ~((ratio < least) | (ratio > most))  # a NaN is not outside: it stays visible
    if mode == "truncate":
        return ratio.clamp(least, most), inside
    if mode == "mask":
        return ratio.masked_fill(~inside, 0), inside
    return torch.ones_like(ratio), inside


def _passes(
    name: str,
    bound: float | tuple[float, float],
    log_ratio: Tensor,
    mask: Tensor,
    segments: Segments,
) -> Tensor:
    """(N,) bool: tokens that one rejection test keeps."""
    scope, kind = name.rsplit("_", 1)
    d = _clamped(log_ratio)
    statistic = {"k1": d, "k2": 0.5 * d.square(), "k3": d.expm1() - d}[kind]
    if scope != "token":
        reduce = {"seq_sum": segments.sum, "seq_mean": segments.mean, "seq_max": segments.max}[
            scope
        ]
        statistic = segments.broadcast(reduce(statistic, mask))
    if kind != "k1":
        return statistic <= bound
    return (statistic >= math.log(bound[0])) & (statistic <= math.log(bound[1]))


def _mean_weight(weights: Tensor, level: str, mask: Tensor, segments: Segments) -> Tensor:
    """Mean over unmasked tokens, or over sequences with an unmasked token; 1 where it is 0."""
    if level == "token":
        total, count = segments.total(torch.stack([weights.where(mask, 0), mask]))
    else:
        counted = segments.sum(mask.to(weights.dtype)) > 0  # alike on all ranks
        total, count = segments.mean(weights, mask).where(counted, 0).sum(), counted.sum()
    mean = total / count.clamp(min=1)
    return torch.where(mean > 1e-8, mean, 1)


def _per_token(values: Tensor, leading: torch.Size, segments: Segments) -> Tensor:
    """[...] or [B] -> (N,)."""
    values = values.detach()
    return values.reshape(-1) if values.shape == leading else segments.broadcast(values.reshape(-1))


def _metrics(
    log_ratio: Tensor,
    ratio: Tensor,
    weights: Tensor,
    cut: Tensor,
    mask: Tensor,
    segments: Segments,
) -> dict[str, Tensor]:
    """0-d numbers over the unmasked tokens of (N,) rows; NaN without any."""
    d, distance = _clamped(log_ratio), log_ratio.abs()
    numbers = (ratio, weights, weights.square(), cut, -log_ratio, d.expm1() - d, distance, mask)
    *sums, tokens = segments.total(torch.stack(numbers).masked_fill_(~mask, 0))
    ratio_mean, weight_mean, square_mean, cut, kl_k1, kl_k3, difference = (x / tokens for x in sums)
    largest = segments.largest(torch.stack([-ratio, ratio, distance]), mask)
    least, most, farthest = largest.where(tokens > 0, torch.nan)
    return {
        "ratio_mean": ratio_mean,
        "ratio_min": -least,
        "ratio_max": most,
        "weight_mean": weight_mean,
        "ess": weight_mean.square() / square_mean,
        "cut": cut,
        "kl_k1": kl_k1,
        "kl_k3": kl_k3,
        "difference_mean": difference,
        "difference_max": farthest,
    }


def _check_settings(
    mode: object, level: object, low: object, high: object, reject: Mapping
) -> None:
    for name, value, allowed in (("mode", mode, MODES), ("level", level, LEVELS)):
        if value not in allowed:
            raise ValueError(f"{name} is {value!r}, expected one of {', '.join(allowed)}")
    for name, bound in (("low", low), ("high", high)):
        if bound is not None:
            checks.check_positive(name, bound, what="a number > 0")
    if low is not None and high is not None and low > high:
        raise ValueError(f"low is {low} and high {high}, expected low <= high")
    if mode == "none" and (low is not None or high not in (None, DEFAULT_HIGH)):
        raise ValueError(
            f"low is {low} and high {high} but have no meaning for mode='none', which bounds "
            "nothing: leave them out, or take another mode"
        )
    if not isinstance(reject, Mapping):
        raise TypeError(
            f"reject is {type(reject).__name__}, expected a dict such as {{'seq_mean_k3': 0.01}}"
        )
    for name, bound in reject.items():
        if name not in REJECTIONS:
            raise ValueError(f"reject names {name!r}, expected one of {', '.join(REJECTIONS)}")
        pair = isinstance(bound, tuple | list)
        if pair != name.endswith("k1") or (pair and len(bound) != 2):
            wanted = "(low, high), two numbers" if name.endswith("k1") else "one number"
            raise ValueError(f"reject[{name!r}] is {bound!r}, expected {wanted} > 0")
        for number in bound if pair else (bound,):
            checks.check_positive(f"reject[{name!r}]", number, what="a number > 0")
        if pair and bound[0] > bound[1]:
            raise ValueError(f"reject[{name!r}] is {bound!r}, expected low <= high")


def _check_tensors(
    old: object, rollout: object, mask: object, cu_seqlens: object, needs_sequences: bool
) -> None:
    if not isinstance(old, Tensor):
        raise TypeError(f"old_logprobs is {type(old).__name__}, expected a tensor [N] or [B, T]")
    if old.ndim not in (1, 2):
        raise ValueError(f"old_logprobs has shape {list(old.shape)}, expected [N] or [B, T]")
    checks.check_floating("old_logprobs", old)
    checks.check_tensor("rollout_logprobs", rollout, old.shape, old)
    checks.check_floating("rollout_logprobs", rollout)
    checks.check_mask(mask, old.shape, old)
    if needs_sequences or cu_seqlens is not None:
        checks.check_sequences(old.shape, cu_seqlens, old)


def _check_off_policy(threshold: object, advantages: object) -> None:
    if (threshold is None) != (advantages is None):
        given = "advantages" if threshold is None else "off_policy_threshold"
        raise ValueError(
            f"got {given} alone, expected off_policy_threshold and advantages together, or neither"
        )
    number = isinstance(threshold, Real) and not isinstance(threshold, bool)
    if threshold is not None and not (number and is_finite(threshold)):
        got = shown(threshold) if number else repr(threshold)
        raise ValueError(f"off_policy_threshold is {got}, expected a finite number of nats")
