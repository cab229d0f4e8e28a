"""Logits in, log-probs and entropy out, both differentiable: the statistics, then the gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from fastpo import backends
from fastpo.backends.base import RowStats
from fastpo.ops._autograd import first_order
from fastpo.ops._rows import (
    concatenate,
    matching_views,
    row_views,
    slices,
    temperature_of,
)


class LogitsTokenLogprobs(torch.autograd.Function):
    """`row_stats` forward, `row_grad` backward."""

    @staticmethod
    def forward(ctx, logits, tokens, live, temperature, backend, inplace):
        row_stats = backends.load(backend).row_stats
        views = row_views(logits.detach())
        stats = concatenate(
            [
                row_stats(
                    view,
                    tokens[cut],
                    temperature_of(temperature, cut),
                    None if live is None else live[cut],
                )
                for view, cut in zip(views, slices(views), strict=True)
            ]
        )
        ctx.set_materialize_grads(False)
        per_token = temperature if isinstance(temperature, Tensor) else None
        ctx.save_for_backward(logits, tokens, live, per_token, *stats)
        ctx.temperature, ctx.backend, ctx.inplace = temperature, backend, inplace
        return stats.logprobs, stats.entropy

    @staticmethod
    @first_order
    def backward(ctx, logprob_grad, entropy_grad):
        if logprob_grad is None and entropy_grad is None:
            return (None,) * 6
        if ctx.inplace:
            _refuse_second_backward(ctx)
        logits, tokens, live, per_token, *stats = ctx.saved_tensors
        stats = RowStats(*stats)
        temperature = ctx.temperature if per_token is None else per_token
        logprob_grad = _row_grads(logprob_grad, stats.logprobs, live)
        if entropy_grad is not None:
            entropy_grad = _row_grads(entropy_grad, stats.logprobs, live)
        grad = logits.detach() if ctx.inplace else torch.empty_like(logits)
        views = row_views(logits.detach())
        for view, out, cut in zip(views, matching_views(grad, views), slices(views), strict=True):
            backends.load(ctx.backend).row_grad(
                view,
                tokens[cut],
                RowStats(*(x[cut] for x in stats)),
                logprob_grad[cut],
                None if entropy_grad is None else entropy_grad[cut],
                temperature_of(temperature, cut),
                out,
            )
        if ctx.inplace:
            torch.autograd.graph.increment_version(logits)
        return grad, None, None, None, None, None


def _refuse_second_backward(ctx) -> None:
    if getattr(ctx, "consumed", False):
        raise RuntimeError(
            "backward through an inplace loss a second time: the first one overwrote the logits "
            "with their gradient; pass inplace=False (inplace_backward=False) to keep the graph"
        )
    ctx.consumed = True


def _row_grads(grad: Tensor | None, like: Tensor, live: Tensor | None) -> Tensor:
    """An incoming gradient as contiguous rows, exactly 0 on dead ones."""
    if grad is None:
        return torch.zeros_like(like)
    grad = grad.to(like.dtype).contiguous()
    return grad if live is None else torch.where(live, grad, 0.0)
