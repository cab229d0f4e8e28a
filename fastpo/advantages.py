"""Advantages of completions from the rewards of their group: the critic of GRPO and its kin."""

from __future__ import annotations

import math
from numbers import Integral, Real
from typing import NamedTuple

import torch
from torch import Tensor

from fastpo import _extension

_REWARD_DTYPES = (
    *(torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64),
    *(torch.float16, torch.bfloat16, torch.float32, torch.float64),
)
ESTIMATORS = ("grpo", "dr_grpo", "rloo", "opo", "passk", "reinforce_pp")


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
) -> GroupAdvantages:
    """The advantage of each completion over its group: the completions of one prompt.

    With r the reward, and mean and std (unbiased) those of the group:

        grpo          (r - mean) / (std + eps)                         arXiv 2402.03300
        dr_grpo       r - mean                                         arXiv 2503.20783
        rloo          r - mean of the others                           arXiv 2402.14740
        opo           r - sum(length * r) / sum(length)                arXiv 2505.23585
        passk         (r - second best) / (std + eps) for the best, else 0     arXiv 2503.19595
        reinforce_pp  (r - mean) / (std of r - mean over the batch + eps)      arXiv 2501.03262

    A group of one, or of equal rewards, gets exactly 0. A reward that is NaN or infinite is left
    out: its own advantage is 0, it is not informative, and its group's numbers come from the rest.
    `num_excluded(rewards)` counts such rewards.

    Differences from verl 0.9: a group of one gets 0 (verl: the raw reward; an error for passk), opo
    without `lengths` weighs all completions alike, and reinforce_pp takes the std over completions,
    not over tokens. Nothing here waits for the device.

    Args:
        rewards: (B,) bool, integer (uint8 or signed) or floating. The arithmetic is fp64, whatever
            the dtype.
        group_size: groups are consecutive runs of this many completions. Or else:
        group_ids: (B,) any integers; equal ids are one group, in any order and of any size.
        estimator: one of the above.
        eps: added to the standard deviation.
        lengths: (B,) completion lengths in tokens, integer or floating; `opo` only.

    Raises:
        ValueError: not exactly one of `group_size` and `group_ids`, wrong shapes or devices, a
            group size that does not divide B, an unknown estimator, an `eps` that is negative or
            not finite, or `lengths` where they have no meaning or, on CPU, below 0 or not finite.
        TypeError: no tensor where one is expected, complex rewards, ids that are not integers, a
            mask as lengths, a `group_size` or an `eps` that is no number.
    """
    _check_numbers(rewards, estimator, eps)
    _check_groups(rewards, group_size, group_ids)
    _check_lengths(rewards, estimator, lengths)
    if rewards.device.type in _extension.devices():
        return _compiled(rewards, group_size, group_ids, estimator, eps, lengths)
    if group_ids is None:
        group_ids = torch.arange(rewards.numel(), device=rewards.device) // group_size
    return _specified(rewards, group_ids, estimator, eps, lengths)


def num_excluded(rewards: Tensor) -> Tensor:
    """How many rewards are NaN or infinite, and so left out by `group_advantages`. 0-d int64."""
    return (~rewards.isfinite()).sum()


def _compiled(
    rewards: Tensor,
    group_size: int | None,
    group_ids: Tensor | None,
    estimator: str,
    eps: float,
    lengths: Tensor | None,
) -> GroupAdvantages:
    """The extension's operator: on a GPU one launch, for any layout of the groups."""
    return GroupAdvantages(
        *torch.ops.fastpo.group_advantages(
            rewards.detach().contiguous(),
            group_size or 1,
            None if group_ids is None else group_ids.long().contiguous(),
            ESTIMATORS.index(estimator),
            eps,
            None if lengths is None else lengths.double().contiguous(),
        )
    )


def _specified(
    rewards: Tensor, group_ids: Tensor, estimator: str, eps: float, lengths: Tensor | None
) -> GroupAdvantages:
    """The specification, in plain torch on any device."""
    wide = torch.float32 if rewards.device.type == "mps" else torch.float64  # MPS has no float64
    groups = _Groups(group_ids, rewards.isfinite())
    rewards = rewards.detach().to(wide)
    # Sums are of the differences to the group's first reward: exactly 0 for equal rewards.
    offsets = groups.from_first(rewards)
    best, worst = groups.reduce(offsets, "max"), groups.reduce(offsets, "min")
    centered = offsets - groups.spread(groups.mean(offsets))
    informative = groups.counted & (groups.spread(best) > groups.spread(worst))
    if estimator in ("grpo", "passk"):
        std = groups.spread(
            (groups.sum(centered.square()) / (groups.count - 1).clamp(min=1)).sqrt()
        )
    if estimator == "grpo":
        advantages = centered / (std + eps)
    elif estimator == "dr_grpo":
        advantages = centered
    elif estimator == "rloo":
        count = groups.spread(groups.count).to(wide)
        advantages = centered * count / (count - 1).clamp(min=1)
    elif estimator == "opo":
        weights = torch.ones_like(offsets) if lengths is None else lengths.to(wide)
        weights = weights.where(groups.spread(groups.sum(weights)) > 0, 1)  # all empty: alike
        baseline = groups.sum(weights * offsets) / groups.sum(weights)
        advantages = offsets - groups.spread(baseline)
    elif estimator == "passk":
        is_best = groups.counted & (offsets == groups.spread(best))
        alone = groups.spread(groups.sum(is_best.to(wide))) == 1  # two best ones are 0 apart
        others = groups.counted & ~is_best
        second = groups.reduce(offsets.masked_fill(~others, -torch.inf), "max")
        advantages = ((offsets - groups.spread(second)) / (std + eps)).where(is_best & alone, 0)
    else:
        advantages = centered / (_batch_std(centered, groups.counted) + eps)
    advantages = advantages.where(informative, 0)
    return GroupAdvantages(advantages.float(), informative, groups.number_of(informative))


def _batch_std(centered: Tensor, counted: Tensor) -> Tensor:
    """Unbiased standard deviation over the batch; the group means are out, so its own mean is 0."""
    total = centered.where(counted, 0).square().sum()
    return (total / (counted.sum() - 1).clamp(min=1)).sqrt()


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

    def spread(self, values: Tensor) -> Tensor:
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


def _check_numbers(rewards: Tensor, estimator: str, eps: float) -> None:
    _check_tensor("rewards", rewards)
    if rewards.dim() != 1:
        raise ValueError(
            f"rewards have shape {tuple(rewards.shape)}, expected (B,): one reward per completion; "
            "sum token rewards over the tokens, or flatten a [prompts, group] matrix"
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
    if not 0 <= eps < math.inf:
        raise ValueError(f"eps is {eps}, expected a finite number >= 0")


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
    if estimator != "opo":
        raise ValueError(
            f"got lengths for estimator={estimator!r}, expected them for 'opo' only; leave them out"
        )
    _check_tensor("lengths", lengths)
    if lengths.dtype == torch.bool or lengths.is_complex():
        raise TypeError(f"lengths are {lengths.dtype}, expected token counts; sum a mask first")
    _check_like_rewards("lengths", lengths, rewards)
    if torch.compiler.is_compiling() or lengths.device.type != "cpu":
        return
    if not ((lengths >= 0) & lengths.isfinite()).all():
        raise ValueError("lengths hold a number below 0 or not finite, expected token counts")


def _check_like_rewards(name: str, tensor: Tensor, rewards: Tensor) -> None:
    if tensor.shape != rewards.shape or tensor.device != rewards.device:
        raise ValueError(
            f"{name} have shape {tuple(tensor.shape)} on {tensor.device}, expected "
            f"{tuple(rewards.shape)} on {rewards.device}, as the rewards"
        )
