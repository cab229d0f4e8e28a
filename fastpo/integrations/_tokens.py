"""Per-token terms of an objective in the shape a trainer keeps its log-probs in.

Trainers that reduce per-token losses themselves (by a reducer, a denominator, a pipeline stage)
need the terms, not their sum: here they are the specification's, `fastpo.objective.token_loss`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastpo.objective import CLIPPED_HIGH, CLIPPED_LOW, Objective, TokenLoss, token_loss
from fastpo.ops.checks import wide_dtype
from fastpo.ops.logits import token_logprobs
from fastpo.ops.results import TokenLogprobs
from fastpo.segments import Segments


def token_terms(
    objective: Objective,
    logprobs: Tensor,
    advantages: Tensor,
    *,
    old_logprobs: Tensor,
    mask: Tensor | None = None,
    ref_logprobs: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> TokenLoss:
    """The terms of every token, before weights: loss (differentiable), ratio, kl, clipped, [...].

    Args:
        logprobs: [B, T], or packed [N] with `cu_seqlens` where the objective couples sequences.
        advantages, old_logprobs, ref_logprobs: what broadcasts to [...].
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
        ref_logprobs=rows(ref_logprobs),
        mask=None if mask is None else rows(mask, torch.bool),
        segments=Segments.from_batch(shape, cu_seqlens, logprobs.device),
    )
    return TokenLoss(*(x if x is None else x.view(shape) for x in terms))


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


def score_shards(logits: Tensor, tokens: Tensor, group: Any) -> TokenLogprobs:
    """`token_logprobs` of logits [N, V / tp], this rank's columns of them under a process group."""
    if group is None or group.size() == 1:
        return token_logprobs(logits, tokens)
    return token_logprobs(logits, tokens, tp_group=group)
