"""The critic's side of PPO: advantages and returns from values, and the loss of the values."""

from __future__ import annotations

from numbers import Real
from typing import NamedTuple

import torch
from torch import Tensor

from fastpo import _extension
from fastpo.objective import clamp, count_or_one
from fastpo.ops import checks
from fastpo.ops.batch import flat_mask
from fastpo.segments import Segments

WHITEN_EPS = 1e-8  # under the root, as in verl


class Gae(NamedTuple):
    """What `gae` returns. [...] fp32 (fp64 for fp64 values), 0 under a False mask."""

    advantages: Tensor
    returns: Tensor  # advantages (before any whitening) + values: what the critic learns


class ValueLoss(NamedTuple):
    """What `value_loss` returns; the metrics are sums over unmasked tokens."""

    loss: Tensor  # 0-d, differentiable in `values`
    metrics: dict[str, Tensor]  # 0-d sums over unmasked tokens on the device; divide by "tokens"


def gae(
    rewards: Tensor,
    values: Tensor,
    *,
    gamma: float,
    lam: float,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    whiten: bool = False,
) -> Gae:
    """Generalized advantage estimation (Schulman et al. 2015, arXiv 1506.02438), token by token.

        delta_t = reward_t + gamma * value_{t+1} - value_t
        A_t     = delta_t + gamma * lam * A_{t+1},        return_t = A_t + value_t

    where t + 1 is the next unmasked token of the sequence: tokens under a False mask (padding, the
    text of a tool) are stepped over. Past a sequence's last unmasked token value and advantage are
    0: to bootstrap a truncated sequence, add gamma * V of what follows to its last reward.

    With `values` 0 and lam 1 the advantages are the discounted returns; whitened, REINFORCE++'s
    (arXiv 2501.03262). As verl 0.9 `compute_gae_advantage_return`, which whitens always
    (`whiten=True`) and leaves numbers in masked slots, where 0 stands here. TRL 1.16 has no critic.

    The recurrence is evaluated in fp64. No gradient flows; nothing here waits for the device. On a
    GPU it is one launch, a block per sequence: 8,000 tokens are 32 steps of a parallel scan.

    Args:
        rewards: [N] or [B, T] per token, floating.
        values: [...] of the critic, the state's value before the token.
        gamma: discount per token, in [0, 1].
        lam: the trade of bias (0) for variance (1), in [0, 1].
        mask: [...] bool or 0/1 integers; what stands in masked slots is never used.
        cu_seqlens: (B + 1,) int32 offsets of the sequences of a packed [N] batch; required there.
        whiten: advantages become (A - mean) / sqrt(var + 1e-8) over the unmasked tokens of the
            batch, with the unbiased variance; the returns stay.

    Raises:
        ValueError, TypeError: see the message: what was got, what is expected, what to do.
    """
    for name, number in (("gamma", gamma), ("lam", lam)):
        if isinstance(number, bool) or not isinstance(number, Real):
            raise TypeError(f"{name} is {type(number).__name__}, expected a number in [0, 1]")
        if not 0 <= number <= 1:
            raise ValueError(f"{name} is {number}, expected a number in [0, 1]")
    _check_pair("rewards", rewards, "values", values)
    checks.check_mask(mask, rewards.shape, rewards)
    checks.check_sequences(rewards.shape, cu_seqlens, rewards)
    segments = Segments.from_batch(rewards.shape, cu_seqlens, rewards.device)
    dtype = torch.float64 if values.dtype == torch.float64 else torch.float32
    mask = flat_mask(mask)
    flat_values = _wide(values, mask)
    advantages = _advantages(_wide(rewards, mask), flat_values, mask, segments, gamma, lam)
    returns = advantages + flat_values
    if whiten:
        advantages = _whitened(advantages, mask)
    if mask is not None:
        advantages, returns = (x.masked_fill(~mask, 0) for x in (advantages, returns))
    return Gae(*(x.to(dtype).view(rewards.shape) for x in (advantages, returns)))


def value_loss(
    values: Tensor,
    returns: Tensor,
    *,
    old_values: Tensor | None = None,
    clip: float | None = None,
    mask: Tensor | None = None,
    normalizer: Tensor | float | None = None,
) -> ValueLoss:
    """PPO's loss of the critic: half the squared error, pessimistically clipped; a token mean.

        0.5 * max((V - R)^2, (clamp(V, V_old - clip, V_old + clip) - R)^2)

    without the maximum where `clip` is None. Source: the code of Schulman et al. 2017 (OpenAI
    baselines, ppo2). As verl 0.9 `compute_value_loss` with token-mean.

    Args:
        values: [N] or [B, T] floating, differentiable. bf16 and fp16 are computed in fp32.
        returns: [...], without gradient; see `gae`.
        old_values: [...] the critic's values when the batch was sampled; required with `clip`.
        clip: how far V may move from V_old, > 0; None = no clipping.
        mask: [...] bool or 0/1 integers, the tokens that count.
        normalizer: global count of unmasked tokens, as in `policy_loss`; None = this batch's own.

    Returns:
        The loss, and detached sums over unmasked tokens: `tokens`, `clipped` (the clipped error is
        the larger one), `value`, `return`, `squared_error` ((V - R)^2) and `squared_return`.

    Raises:
        ValueError, TypeError: see the message: what was got, what is expected, what to do.
    """
    _check_pair("values", values, "returns", returns)
    checks.check_mask(mask, values.shape, values)
    mask = None if mask is None else mask.bool()
    checks.check_normalizer(normalizer)
    _check_clip(clip, old_values, values)
    dtype = torch.promote_types(values.dtype, torch.float32)
    counted = torch.ones_like(values, dtype=dtype) if mask is None else mask.to(dtype)

    def numbers(x: Tensor) -> Tensor:
        return x.to(dtype) if mask is None else x.to(dtype).masked_fill(~mask, 0)

    values, returns = numbers(values), numbers(returns.detach())
    error = (values - returns).square()
    loss, clipped = error, torch.zeros_like(error)
    if clip is not None:
        old = numbers(old_values.detach())
        near = clamp(values, old - clip, old + clip)
        clipped_error = (near - returns).square()
        loss = torch.maximum(error, clipped_error)
        clipped = clipped_error > error
    total = counted.sum()
    weight = counted / count_or_one(total if normalizer is None else normalizer, counted)
    sums = {
        "tokens": total,
        "clipped": clipped.to(dtype).sum(),
        "value": values.detach().sum(),
        "return": returns.sum(),
        "squared_error": error.detach().sum(),
        "squared_return": returns.square().sum(),
    }
    return ValueLoss(0.5 * (weight * loss).sum(), sums)


def _advantages(
    rewards: Tensor,
    values: Tensor,
    mask: Tensor | None,
    segments: Segments,
    gamma: float,
    lam: float,
) -> Tensor:
    """The recurrence on (N,) fp64 numbers, 0 in masked slots: by the extension, or as specified."""
    if rewards.device.type not in _extension.devices():
        return _specified(rewards, values, mask, segments, gamma, lam)
    offsets = segments.offsets
    if offsets is None:
        offsets = torch.arange(segments.count + 1, device=rewards.device) * segments.width
    offsets = offsets.to(rewards.device).contiguous()
    return torch.ops.fastpo.gae(rewards, values, mask, offsets, float(gamma), float(lam))


def _specified(
    rewards: Tensor,
    values: Tensor,
    mask: Tensor | None,
    segments: Segments,
    gamma: float,
    lam: float,
) -> Tensor:
    """The recurrence in plain torch; a masked slot holds what it carries on, not 0."""
    inside = (~segments.is_last).to(values.dtype)  # 0 where a sequence ends
    counted = torch.ones_like(values) if mask is None else mask.to(values.dtype)
    next_value = _times(inside, _shift(_reverse_scan((1 - counted) * inside, values)))
    bootstrap = gamma * next_value if gamma else 0
    delta = (rewards + bootstrap - values).where(counted != 0, 0)
    return _reverse_scan((1 - counted + gamma * lam * counted) * inside, delta)


def _reverse_scan(decay: Tensor, increment: Tensor) -> Tensor:
    """x_t = increment_t + decay_t * x_{t+1}, x beyond the end 0, in log2(N) steps. (N,)

    Doubling: after each step x_t holds the first 2, 4, 8 ... increments and decay_t their product.
    """
    reach = 1
    while reach < increment.numel():
        increment = increment + _times(decay, _shift(increment, reach))
        decay = decay * _shift(decay, reach)
        reach *= 2
    return increment


def _times(decay: Tensor, values: Tensor) -> Tensor:
    """Their product, 0 where the decay is: a NaN must not reach the sequence before its own."""
    return (decay * values).where(decay != 0, 0)


def _shift(values: Tensor, by: int = 1) -> Tensor:
    """values[t + by], 0 beyond the end. (N,)"""
    return torch.nn.functional.pad(values[by:], (0, min(by, values.numel())))


def _whitened(values: Tensor, mask: Tensor | None) -> Tensor:
    """(x - mean) / sqrt(unbiased variance + 1e-8) over the unmasked slots; 0 for fewer than two."""
    weight = torch.ones_like(values) if mask is None else mask.to(values.dtype)
    count = weight.sum()
    centered = values - (values * weight).sum() / count.clamp(min=1)
    variance = (centered.square() * weight).sum() / (count - 1).clamp(min=1)
    return centered * (variance + WHITEN_EPS).rsqrt()


def _wide(values: Tensor, mask: Tensor | None) -> Tensor:
    """(N,) fp64, detached, 0 in masked slots whatever stands there."""
    wide = torch.float32 if values.device.type == "mps" else torch.float64  # MPS has no float64
    flat = values.detach().reshape(-1).to(wide)
    return flat if mask is None else flat.masked_fill(~mask, 0)


def _check_pair(name: str, first: object, other: str, second: object) -> None:
    if not isinstance(first, Tensor):
        raise TypeError(f"{name} is {type(first).__name__}, expected a tensor [N] or [B, T]")
    if first.ndim not in (1, 2):
        raise ValueError(f"{name} has shape {list(first.shape)}, expected [N] or [B, T]")
    checks.check_floating(name, first)
    checks.check_tensor(other, second, first.shape, first)
    checks.check_floating(other, second)


def _check_clip(clip: object, old_values: object, values: Tensor) -> None:
    if (clip is None) != (old_values is None):
        given = "clip" if old_values is None else "old_values"
        raise ValueError(f"got {given} alone, expected clip and old_values together, or neither")
    if clip is None:
        return
    checks.check_positive("clip", clip, what="a number > 0, or None")
    checks.check_tensor("old_values", old_values, values.shape, values)
    checks.check_floating("old_values", old_values)
