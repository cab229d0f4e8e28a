"""Advantages of completions from the rewards of their group: the critic of GRPO and its kin."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral, Real
from typing import NamedTuple

import torch
from torch import Tensor

from fastpo import _extension
from fastpo.objective import is_finite, shown

_REWARD_DTYPES = (
    *(torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64),
    *(torch.float16, torch.bfloat16, torch.float32, torch.float64),
)
ESTIMATORS = ("grpo", "dr_grpo", "rloo", "opo", "passk", "reinforce_pp", "maxrl")


class GroupAdvantages(NamedTuple):
    """What `group_advantages` returns, on the rewards' device."""

    advantages: Tensor  # (B,) fp32
    informative: Tensor  # (B,) bool: the sample counts, and its group holds two distinct rewards
    num_informative: Tensor  # 0-d int64: informative *groups*


def group_advantages(
    rewards: Tensor,
    *,
    group_size: int | None = None,
    group_ids: Tensor | None = None,
    estimator: str = "grpo",
    eps: float = 1e-6,
    lengths: Tensor | None = None,
    weights: Sequence[float] | Tensor | None = None,
    whiten: bool = False,
) -> GroupAdvantages:
    """The advantage of each completion over its group: the completions of one prompt.

    With r the reward, and mean and std (unbiased) those of the group:

        grpo          (r - mean) / (std + eps)                         arXiv 2402.03300
        dr_grpo       r - mean                                         arXiv 2503.20783
        rloo          r - mean of the others                           arXiv 2402.14740
        opo           r - sum(length * r) / sum(length)                arXiv 2505.23585
        passk         (r - second best) / (std + eps) for the best, else 0     arXiv 2503.19595
        reinforce_pp  (r - mean) / (std of r - mean over the batch + eps)      arXiv 2501.03262
        maxrl         (r - mean) / (mean + eps), rewards >= 0                  arXiv 2602.02710

    maxrl's mean is the estimated success rate of the prompt, which a negative reward is no part of:
    below 0 it would turn every sign. Negative rewards are refused on CPU; on a GPU, where looking
    would wait for it, a group whose mean is below 0 gets 0.

    With `lengths`, reinforce_pp is over tokens: every completion counts with its length, and the
    token mean of r - mean is subtracted too (whitening), as verl's reinforce_plus_plus_baseline.

    Rewards [B, R] are R rewards of each completion: each is normalized in its group on its own,
    and the advantages are summed with `weights` (GDPO, arXiv 2601.05242). `whiten` then takes
    (A - mean) / (std + eps) over the batch, the paper's last step, as TRL's "normalize_then_sum"
    does over completions; verl's "gdpo" over tokens.

    A group of one, or of equal rewards, gets exactly 0. A reward that is NaN or infinite is left
    out: its own advantage is 0, it is not informative, and its group's numbers come from the rest.
    `num_excluded(rewards)` counts such rewards. Where finite rewards are so large (beyond 1e154)
    that a square or the advantage overflows, the advantage is 0.

    Differences from verl 0.9: a group of one gets 0 (verl: the raw reward; an error for passk), opo
    without `lengths` weighs all completions alike, and reinforce_pp is over completions unless it
    has `lengths`. Nothing here waits for the device.

    Args:
        rewards: (B,), or (B, R) with `weights`; bool, integer (uint8 or signed) or floating. The
            arithmetic is fp64, whatever the dtype.
        group_size: groups are consecutive runs of this many completions. Or else:
        group_ids: (B,) any integers; equal ids are one group, in any order and of any size.
        estimator: one of the above.
        eps: added to the standard deviation.
        lengths: (B,) completion lengths in tokens, integer or floating; opo, reinforce_pp.
        weights: R numbers, one per reward; given exactly with rewards (B, R).
        whiten: normalize the advantages over the batch as well.

    Raises:
        ValueError: not exactly one of `group_size` and `group_ids`, wrong shapes or devices, a
            group size that does not divide B, an unknown estimator, an `eps` that is negative or
            not finite, `lengths` where they have no meaning; on CPU, `lengths` below 0 or not
            finite, and negative rewards for maxrl.
        TypeError: no tensor where one is expected, complex rewards, ids that are not integers, a
            mask as lengths, a `group_size` or an `eps` that is no number.
    """
    _check_numbers(rewards, weights, estimator, eps)
    _check_signs(rewards, estimator)
    one = rewards if rewards.dim() == 1 else rewards[:, 0]
    _check_groups(one, group_size, group_ids)
    _check_lengths(one, estimator, lengths)
    weights = _checked_weights(rewards, weights)
    if rewards.device.type not in _extension.devices():
        if group_ids is None:
            group_ids = torch.arange(one.numel(), device=one.device) // group_size
        return _specified(rewards, group_ids, estimator, eps, lengths, weights, whiten)
    return GroupAdvantages(  # on a GPU one launch, for any layout of the groups
        *torch.ops.fastpo.group_advantages(
            rewards.detach().contiguous(),
            group_size or 1,
            None if group_ids is None else group_ids.long().contiguous(),
            ESTIMATORS.index(estimator),
            eps,
            None if lengths is None else lengths.double().contiguous(),
            None if weights is None else weights.double().contiguous(),
            whiten,
        )
    )


def num_excluded(rewards: Tensor) -> Tensor:
    """How many rewards are NaN or infinite, and so left out by `group_advantages`. 0-d int64."""
    return (~rewards.isfinite()).sum()


def _specified(
    rewards: Tensor,
    group_ids: Tensor,
    estimator: str,
    eps: float,
    lengths: Tensor | None = None,
    weights: Tensor | None = None,
    whiten: bool = False,
) -> GroupAdvantages:
    """The specification, in plain torch on any device: each column on its own, then their sum."""
    columns = (rewards if rewards.dim() == 2 else rewards[:, None]).unbind(1)
    parts = [_of_one_reward(column, group_ids, estimator, eps, lengths) for column in columns]
    result = parts[0]
    if weights is not None:
        advantages = torch.stack([part.advantages for part in parts], 1).to(_wide(rewards))
        advantages = (advantages * weights).sum(1).float()
        advantages = advantages.where(advantages.isfinite(), 0)
        informative = torch.stack([part.informative for part in parts], 1).any(1)
        groups = _Groups(group_ids, torch.ones_like(informative))
        result = GroupAdvantages(advantages, informative, groups.number_of(informative))
    if whiten:
        counted = torch.stack([column.isfinite() for column in columns], 1).any(1)
        result = result._replace(advantages=_whitened(result.advantages, counted, eps))
    return result


def _wide(values: Tensor) -> torch.dtype:
    return torch.float32 if values.device.type == "mps" else torch.float64  # MPS has no float64


def _whitened(advantages: Tensor, counted: Tensor, eps: float) -> Tensor:
    """(A - mean) / (unbiased std + eps) over the counted samples; 0 for the others."""
    wide = advantages.to(_wide(advantages))
    count = counted.sum()
    centered = wide - wide.where(counted, 0).sum() / count.clamp(min=1)
    variance = centered.where(counted, 0).square().sum() / (count - 1).clamp(min=1)
    whitened = (centered / (variance.sqrt() + eps)).float()
    return whitened.where(counted & whitened.isfinite(), 0)  # equal ones, and eps = 0: 0


def _of_one_reward(
    rewards: Tensor, group_ids: Tensor, estimator: str, eps: float, lengths: Tensor | None
) -> GroupAdvantages:
    """Of rewards (B,), before any whitening."""
    wide = _wide(rewards)
    groups = _Groups(group_ids, rewards.isfinite())
    rewards = rewards.detach().to(wide)
    # Sums are of the differences to the group's first reward: exactly 0 for equal rewards.
    offsets = groups.from_first(rewards)
    best, worst = groups.reduce(offsets, "max"), groups.reduce(offsets, "min")
    centered = offsets - groups.broadcast(groups.mean(offsets))
    informative = groups.counted & (groups.broadcast(best) > groups.broadcast(worst))
    if estimator in ("grpo", "passk"):
        std = groups.broadcast(
            (groups.sum(centered.square()) / (groups.count - 1).clamp(min=1)).sqrt()
        )
    if estimator == "grpo":
        advantages = centered / (std + eps)
    elif estimator == "dr_grpo":
        advantages = centered
    elif estimator == "rloo":
        count = groups.broadcast(groups.count).to(wide)
        advantages = centered * count / (count - 1).clamp(min=1)
    elif estimator == "opo":
        weights = torch.ones_like(offsets) if lengths is None else lengths.to(wide)
        weights = weights.where(groups.broadcast(groups.sum(weights)) > 0, 1)  # all empty: alike
        baseline = groups.sum(weights * offsets) / groups.sum(weights)
        advantages = offsets - groups.broadcast(baseline)
    elif estimator == "passk":
        is_best = groups.counted & (offsets == groups.broadcast(best))
        alone = groups.broadcast(groups.sum(is_best.to(wide))) == 1  # two best ones are 0 apart
        others = groups.counted & ~is_best
        second = groups.reduce(offsets.masked_fill(~others, -torch.inf), "max")
        advantages = ((offsets - groups.broadcast(second)) / (std + eps)).where(is_best & alone, 0)
    elif estimator == "maxrl":
        mean = groups.broadcast(rewards[groups.first] + groups.mean(offsets))
        advantages = (centered / (mean + eps)).where(mean >= 0, 0)
    else:
        deviation, std = _over_the_batch(centered, groups.counted, lengths)
        advantages = deviation / (std + eps)
    advantages = advantages.where(informative, 0).float()
    advantages = advantages.where(advantages.isfinite(), 0)
    return GroupAdvantages(advantages, informative, groups.number_of(informative))


def _over_the_batch(
    centered: Tensor, counted: Tensor, lengths: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Deviations from the batch's mean and their unbiased std: over completions, whose mean is 0
    since the group means are out, or over tokens where lengths are given."""
    weights = counted.to(centered.dtype)
    if lengths is not None:
        weights = weights * lengths.to(centered.dtype)
        centered = centered - (weights * centered).sum() / weights.sum().clamp(min=1)
    total = (weights * centered.square()).where(counted, 0).sum()
    return centered, (total / (weights.sum() - 1).clamp(min=1)).sqrt()


class _Groups:
    """Sums over the groups of a batch. No float atomics, no host synchronization.

    B samples have at most B groups, so every per-group tensor is (B,); those beyond the last group
    are empty. Samples are sorted by group, counted ones first, and each group is one segment.
    """

    def __init__(self, ids: Tensor, counted: Tensor):
        self.counted = counted
        by_count = torch.argsort(~counted, stable=True)
        self.order = by_count[torch.argsort(ids[by_count], stable=True)]
        ordered = ids[self.order]
        starts = torch.ones_like(ordered, dtype=torch.bool)
        starts[1:] = ordered[1:] != ordered[:-1]
        group = starts.cumsum(0) - 1
        self.of_sample = torch.empty_like(group).scatter_(0, self.order, group)
        self.sizes = torch.zeros_like(group).scatter_add_(0, group, torch.ones_like(group))
        self.count = torch.zeros_like(group).scatter_add_(0, self.of_sample, counted.long())
        self.first = self.order[
            (self.sizes.cumsum(0) - self.sizes).clamp(max=max(ids.numel() - 1, 0))
        ]

    def from_first(self, values: Tensor) -> Tensor:
        """values - that of the group's first counted sample; 0 for samples that do not count."""
        return (values - values[self.first][self.of_sample]).where(self.counted, 0)

    def broadcast(self, values: Tensor) -> Tensor:
        """Give every sample the value of its group."""
        return values[self.of_sample]

    def sum(self, values: Tensor) -> Tensor:
        """Sums over the counted samples of every group."""
        return self.reduce(values.where(self.counted, 0), "sum")

    def mean(self, values: Tensor) -> Tensor:
        """Means over the counted samples of every group; 0 without any."""
        return self.sum(values) / self.count.clamp(min=1)

    def reduce(self, values: Tensor, reduction: str) -> Tensor:
        """`torch.segment_reduce` over all samples of every group, the uncounted included."""
        ordered = values[self.order]
        return torch.segment_reduce(ordered, reduction, lengths=self.sizes, unsafe=True)

    def number_of(self, samples: Tensor) -> Tensor:
        """How many groups hold at least one of the True `samples`. 0-d int64."""
        held = torch.zeros_like(self.sizes).scatter_add_(0, self.of_sample, samples.long())
        return (held > 0).sum()


def _check_tensor(name: str, value: object) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(
            f"{name} are {type(value).__name__}, expected a (B,) tensor; use torch.tensor(...)"
        )


def _check_numbers(rewards: Tensor, weights: object, estimator: str, eps: float) -> None:
    _check_tensor("rewards", rewards)
    if rewards.dim() != 1 and (weights is None or rewards.dim() != 2 or rewards.shape[1] == 0):
        raise ValueError(
            f"rewards have shape {tuple(rewards.shape)}, expected (B,), one reward per completion, "
            "or (B, R) with weights, one per reward; sum token rewards over the tokens, or flatten "
            "a [prompts, group] matrix"
        )
    if rewards.dtype not in _REWARD_DTYPES:
        raise TypeError(
            f"rewards are {rewards.dtype}, expected bool, uint8, signed integers or float16 to "
            "float64; use .float()"
        )
    if estimator not in ESTIMATORS:
        raise ValueError(f"estimator is {estimator!r}, expected one of {', '.join(ESTIMATORS)}")
    if isinstance(eps, bool) or not isinstance(eps, Real):
        raise TypeError(f"eps is {type(eps).__name__}, expected a number >= 0")
    if not (is_finite(eps) and eps >= 0):
        raise ValueError(f"eps is {shown(eps)}, expected a finite number >= 0")


def _check_signs(rewards: Tensor, estimator: str) -> None:
    if estimator != "maxrl" or rewards.device.type != "cpu" or torch.compiler.is_compiling():
        return
    negative = (rewards < 0) & rewards.isfinite()
    if negative.any():
        raise ValueError(
            f"rewards hold {rewards[negative][0].item()}, expected none below 0 for 'maxrl', which "
            "divides by their mean: shift them, or use estimator='grpo'"
        )


def _check_groups(rewards: Tensor, group_size: int | None, group_ids: Tensor | None) -> None:
    if (group_size is None) == (group_ids is None):
        given = "both" if group_size is not None else "neither"
        raise ValueError(
            f"got {given} of group_size and group_ids, expected exactly one; drop or add one"
        )
    if group_ids is None:
        if isinstance(group_size, bool) or not isinstance(group_size, Integral):
            raise TypeError(f"group_size is {type(group_size).__name__}, expected an int")
        if group_size < 1 or rewards.numel() % group_size:
            raise ValueError(
                f"group_size is {group_size}, expected a positive divisor of the {rewards.numel()} "
                "rewards; for groups of different sizes pass group_ids"
            )
        return
    _check_tensor("group_ids", group_ids)
    if group_ids.dtype.is_floating_point or group_ids.is_complex() or group_ids.dtype == torch.bool:
        raise TypeError(f"group_ids are {group_ids.dtype}, expected integers; use .long()")
    _check_like_rewards("group_ids", group_ids, rewards)


def _check_lengths(rewards: Tensor, estimator: str, lengths: Tensor | None) -> None:
    if lengths is None:
        return
    if estimator not in ("opo", "reinforce_pp"):
        raise ValueError(
            f"got lengths for estimator={estimator!r}, expected them for 'opo' and 'reinforce_pp' "
            "only; leave them out"
        )
    _check_tensor("lengths", lengths)
    if lengths.dtype == torch.bool or lengths.is_complex():
        raise TypeError(f"lengths are {lengths.dtype}, expected token counts; sum a mask first")
    _check_like_rewards("lengths", lengths, rewards)
    if torch.compiler.is_compiling() or lengths.device.type != "cpu":
        return
    if not ((lengths >= 0) & lengths.isfinite()).all():
        raise ValueError("lengths hold a number below 0 or not finite, expected token counts")


def _checked_weights(rewards: Tensor, weights: object) -> Tensor | None:
    """(R,) fp32 for rewards [B, R], None for [B]."""
    if rewards.dim() == 1:
        if weights is not None:
            raise ValueError(
                f"got weights for rewards of shape {tuple(rewards.shape)}, expected them for "
                "(B, R) only; leave them out, or stack the rewards"
            )
        return None
    count = rewards.shape[1]
    if not isinstance(weights, Tensor):
        numbers = weights if isinstance(weights, Sequence) else (None,)
        if not all(isinstance(x, Real) for x in numbers):
            raise TypeError(f"weights are {weights!r}, expected {count} numbers, one per reward")
        weights = torch.tensor([float(x) for x in numbers])
    if weights.is_complex():
        raise TypeError(f"weights are {weights.dtype}, expected real numbers, one per reward")
    if weights.shape != (count,):
        raise ValueError(f"weights have shape {tuple(weights.shape)}, expected ({count},)")
    on_host = weights.device.type == "cpu" and not torch.compiler.is_compiling()
    if on_host and not weights.isfinite().all():
        raise ValueError("weights hold a number that is not finite, expected one per reward")
    return weights.detach().to(rewards.device, torch.float32)


def _check_like_rewards(name: str, tensor: Tensor, rewards: Tensor) -> None:
    if tensor.shape != rewards.shape or tensor.device != rewards.device:
        raise ValueError(
            f"{name} have shape {tuple(tensor.shape)} on {tensor.device}, expected "
            f"{tuple(rewards.shape)} on {rewards.device}, as the rewards"
        )
