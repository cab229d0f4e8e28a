"""What the adapters share: an objective's terms per token, its choice, and sharded heads.

Trainers that reduce per-token losses themselves (by a reducer, a denominator, a pipeline stage)
need the terms, not their sum: here they are the specification's, `fastpo.objective.token_loss`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastpo import presets
from fastpo.objective import CLIPPED_HIGH, CLIPPED_LOW, Objective, TokenLoss, token_loss
from fastpo.ops.checks import wide_dtype
from fastpo.ops.linear import linear_token_logprobs
from fastpo.ops.logits import token_logprobs
from fastpo.ops.results import TokenLogprobs
from fastpo.segments import Segments


def token_terms(
    objective: Objective,
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> TokenLoss:
    """The terms of every token, before weights: loss (differentiable), ratio, clipped, [...].

    Args:
        logprobs: [B, T], or packed [N] with `cu_seqlens` where the objective couples sequences.
        old_logprobs, advantages: what broadcasts to [...].
        mask: [...], 0 or False where nothing is read.
    """
    shape, dtype = logprobs.shape, wide_dtype(logprobs.dtype)

    def rows(values: Tensor | None, dtype: torch.dtype = dtype) -> Tensor | None:
        return None if values is None else values.expand(shape).reshape(-1).to(dtype)

    terms = token_loss(
        objective,
        rows(logprobs),
        rows(advantages),
        old_logprobs=rows(old_logprobs),
        mask=None if mask is None else rows(mask, torch.bool),
        segments=Segments.from_batch(shape, cu_seqlens, logprobs.device),
    )
    return TokenLoss(*(x if x is None else x.view(shape) for x in terms))


def clipped_by(
    setting: str, value: str, *, token: str = "token", sequence: str = "sequence"
) -> Callable[..., Objective]:
    """`ppo` or `gspo`, by the value of a trainer's `setting`: `token` or `sequence`.

    Raises:
        ValueError: another value.
    """
    known = {token: presets.ppo, sequence: presets.gspo}
    if value not in known:
        raise ValueError(f"{setting} is {value!r}, expected one of {', '.join(known)}")
    return known[value]


def summed_preset(name: str, **fields: Any) -> Objective:
    """A preset by name whose losses are summed over tokens, for trainers that divide themselves.

    Raises:
        ValueError: no such preset.
    """
    if name not in presets.__all__:
        raise ValueError(f"preset is {name!r}, expected one of {', '.join(presets.__all__)}")
    return getattr(presets, name)(**fields, aggregation="token_mean")


def is_clipped(terms: TokenLoss) -> Tensor:
    """[...] bool: a bound on the ratio was at work; the dual clip's counts apart."""
    return terms.clipped & (CLIPPED_LOW | CLIPPED_HIGH) != 0


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """The mean under a mask of 0 and 1, 0 where it is empty; NaN outside it changes nothing."""
    return values.where(mask.bool(), 0).sum() / mask.sum().clamp(min=1)


def refuse(trainer: str, settings: dict[str, object]) -> None:
    """Raise if one of the settings is on (not None, False or 0): they would be ignored.

    Raises:
        ValueError: names what is on.
    """
    on = [f"{name}={value!r}" for name, value in settings.items() if value]
    if on:
        raise ValueError(
            f"{trainer} sets {', '.join(on)}, which fastpo's loss does not have: "
            f"expected it off; use {trainer}'s own loss with it"
        )


def score_head_shard(
    hidden: Tensor,
    weight: Tensor,
    tokens: Tensor,
    vocabulary: tuple[int, int],
    tp_group: Any,
    inference_only: bool,
    chunk_tokens: int | None,
) -> Tensor:
    """Log-probs [B, S] fp32 of hidden [B, S, D] and this rank's rows of the head.

    Raises:
        ValueError: the weight has other rows than those of the ids first <= id < last.
    """
    first, last = vocabulary
    if weight.shape[0] != last - first:
        raise ValueError(
            f"the head has {weight.shape[0]} rows, expected those of the ids from {first} to "
            f"{last}: pass this rank's shard"
        )
    with torch.set_grad_enabled(torch.is_grad_enabled() and not inference_only):
        return linear_token_logprobs(
            hidden, weight, tokens, chunk_tokens=chunk_tokens, tp_group=tp_group
        ).logprobs


def score_shards(logits: Tensor, tokens: Tensor, group: Any) -> TokenLogprobs:
    """`token_logprobs` of logits [N, V / tp], this rank's columns of them under a process group."""
    if group is None or group.size() == 1:
        return token_logprobs(logits, tokens)
    return token_logprobs(logits, tokens, tp_group=group)
