"""The autograd functions of the ops on logits, and the rows of a [N, V] or [B, T, V] tensor."""

from __future__ import annotations

from types import ModuleType
from typing import TypeVar

import torch
from torch import Tensor

from fastpo import backends
from fastpo.backends.base import RowInputs, RowLosses, RowStats
from fastpo.objective import Objective
from fastpo.ops.autograd import first_order, row_grads, save, saved
from fastpo.ops.batch import of_rows
from fastpo.ops.tensor_parallel import VocabularyShard
from fastpo.rule import LossRule

_Rows = TypeVar("_Rows", bound=tuple)


def primitives(backend: str | VocabularyShard) -> ModuleType | VocabularyShard:
    """The row primitives of a backend: by name, since Dynamo knows no modules as arguments."""
    return backends.load(backend) if isinstance(backend, str) else backend


class FusedPolicyLoss(torch.autograd.Function):
    """Gradient in forward. The first backward hands its buffer over; another recomputes it."""

    @staticmethod
    def forward(
        ctx,
        logits: Tensor,
        tokens: Tensor,
        inputs: RowInputs,
        objective: Objective | LossRule,
        temperature: float | Tensor,
        backend: str | VocabularyShard,
        needs_grad: bool,
        inplace: bool,
    ):
        grad = None
        if needs_grad:
            grad = logits.detach() if inplace else torch.empty_like(logits)
        rows = _row_losses(logits, tokens, inputs, objective, temperature, backend, grad)
        ctx.grad, ctx.backend, ctx.inplace = grad, backend, inplace
        if needs_grad and not inplace:
            per_row = temperature if isinstance(temperature, Tensor) else None
            save(ctx, logits, tokens, per_row, *inputs)
            ctx.objective, ctx.temperature = objective, temperature
        ctx.mark_non_differentiable(rows.logprobs, rows.entropy, rows.clipped)
        ctx.set_materialize_grads(False)
        return rows.loss.sum(), rows.logprobs, rows.entropy, rows.clipped

    @staticmethod
    @first_order
    def backward(ctx, loss_grad: Tensor | None, *_):
        if loss_grad is None:
            return (None,) * 8
        grad, ctx.grad = ctx.grad, None
        if grad is None:
            if ctx.inplace:
                raise RuntimeError(
                    "backward through an inplace policy_loss a second time: its gradient buffer "
                    "was the logits themselves and is gone; pass inplace=False to keep the graph"
                )
            logits, tokens, per_row, *inputs = saved(ctx)
            temperature = ctx.temperature if per_row is None else per_row
            grad = torch.empty_like(logits)
            settings = (ctx.objective, temperature, ctx.backend)
            _row_losses(logits, tokens, RowInputs(*inputs), *settings, grad)
        for view in row_views(grad):
            primitives(ctx.backend).scale_(view, loss_grad)
        return grad, *(None,) * 7


def _row_losses(
    logits: Tensor,
    tokens: Tensor,
    inputs: RowInputs,
    objective: Objective | LossRule,
    temperature: float | Tensor,
    backend: str | VocabularyShard,
    grad: Tensor | None,
) -> RowLosses:
    """`row_policy_loss` over all rows; the gradient goes to `grad`, of the shape of `logits`."""
    views = row_views(logits.detach())
    outs = [None] * len(views) if grad is None else matching_views(grad, views)
    parts = []
    for view, out, cut in zip(views, outs, slices(views), strict=True):
        own = RowInputs(*(of_rows(x, cut) for x in inputs))
        row_policy_loss = primitives(backend).row_policy_loss
        parts.append(
            row_policy_loss(view, tokens[cut], own, objective, of_rows(temperature, cut), out)
        )
    return concatenate(parts)


class LogitsTokenLogprobs(torch.autograd.Function):
    """`row_stats` forward, `row_grad` backward."""

    @staticmethod
    def forward(
        ctx,
        logits: Tensor,
        tokens: Tensor,
        mask: Tensor | None,
        temperature: float | Tensor,
        backend: str | VocabularyShard,
        inplace: bool,
        with_details: bool = False,
    ):
        rows = primitives(backend)
        sweep = rows.row_details if with_details else rows.row_stats
        views = row_views(logits.detach())
        parts = [
            sweep(view, tokens[cut], of_rows(temperature, cut), of_rows(mask, cut))
            for view, cut in zip(views, slices(views), strict=True)
        ]
        details = ()
        if with_details:
            parts, more = zip(*parts, strict=True)
            details = concatenate(list(more))
            ctx.mark_non_differentiable(*details)
        stats = concatenate(list(parts))
        ctx.set_materialize_grads(False)
        per_row = temperature if isinstance(temperature, Tensor) else None
        save(ctx, logits, tokens, mask, per_row, *stats)
        ctx.temperature, ctx.backend, ctx.inplace = temperature, backend, inplace
        # Copies: whoever edits a returned log-prob must not edit what the backward pass reads.
        return stats.logprobs.clone(), stats.entropy.clone(), *details

    @staticmethod
    @first_order
    def backward(ctx, logprob_grad: Tensor | None, entropy_grad: Tensor | None, *_):
        if logprob_grad is None and entropy_grad is None:
            return (None,) * 7
        if ctx.inplace:
            _refuse_second_backward(ctx)
        logits, tokens, mask, per_row, *stats = saved(ctx)
        stats = RowStats(*stats)
        temperature = ctx.temperature if per_row is None else per_row
        dtype = stats.logprobs.dtype
        logprob_grad = row_grads(logprob_grad, mask, dtype)
        if logprob_grad is None:
            logprob_grad = torch.zeros_like(stats.logprobs)
        entropy_grad = row_grads(entropy_grad, mask, dtype)
        grad = logits.detach() if ctx.inplace else torch.empty_like(logits)
        views = row_views(logits.detach())
        for view, out, cut in zip(views, matching_views(grad, views), slices(views), strict=True):
            primitives(ctx.backend).row_grad(
                view,
                tokens[cut],
                RowStats(*(x[cut] for x in stats)),
                logprob_grad[cut],
                of_rows(entropy_grad, cut),
                of_rows(temperature, cut),
                out,
            )
        return grad, *(None,) * 6


def _refuse_second_backward(ctx) -> None:
    if getattr(ctx, "consumed", False):
        raise RuntimeError(
            "backward through an inplace loss a second time: the first one overwrote the logits "
            "with their gradient; pass inplace=False to keep the graph"
        )
    ctx.consumed = True


def row_views(matrix: Tensor) -> list[Tensor]:
    """(n, V) views that cover a [N, V] or [B, T, V] tensor in order, one where strides allow.

    `logits[:, :-1]`, the usual shift, cannot merge its batch and time dimensions: it becomes one
    view per sequence instead of a copy of the logits.
    """
    if matrix.ndim == 2:
        return [matrix]
    batch, width, vocabulary = matrix.shape
    if batch <= 1 or width == 1 or matrix.stride(0) == width * matrix.stride(1):
        return [matrix.flatten(0, 1)] if batch else [matrix.reshape(0, vocabulary)]
    return list(matrix.unbind(0))


def matching_views(grad: Tensor, views: list[Tensor]) -> list[Tensor]:
    """Views of `grad`, which is contiguous or the viewed tensor itself, cut as `views` are."""
    own = row_views(grad)
    if len(own) == len(views):
        return own
    return [grad.flatten(0, 1)[cut] for cut in slices(views)]


def slices(views: list[Tensor]) -> list[slice]:
    """Where the rows of each view stand among all rows."""
    cuts, start = [], 0
    for view in views:
        cuts.append(slice(start, start + view.shape[0]))
        start += view.shape[0]
    return cuts


def concatenate(parts: list[_Rows]) -> _Rows:
    """Join named tuples of (n,) tensors along the rows."""
    if len(parts) == 1:
        return parts[0]
    return type(parts[0])(*(torch.cat(columns) for columns in zip(*parts, strict=True)))
