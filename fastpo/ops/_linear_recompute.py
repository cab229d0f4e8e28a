"""Log-probs and entropies for any loss: statistics forward, logits again backward, 8 N D V in all."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastpo.backends.base import RowStats
from fastpo.ops import _chunks
from fastpo.ops._linear_call import LinearCall, LinearGrads, Workspace, take_hidden


class LinearTokenLogprobs(torch.autograd.Function):
    """logprobs, entropy of (hidden, weight, bias). Saves four numbers per token."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, call: LinearCall):
        stats = _forward(hidden.detach(), call, call.head(weight, bias))
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(hidden, weight, bias, *stats)
        ctx.call = call
        return stats.logprobs, stats.entropy

    @staticmethod
    @once_differentiable
    def backward(ctx, logprob_grad, entropy_grad):
        if logprob_grad is None and entropy_grad is None:
            return None, None, None, None
        hidden, weight, bias, *stats = ctx.saved_tensors
        call, head = ctx.call, ctx.call.head(weight, bias)
        grads = LinearGrads(head, hidden.detach(), ctx.needs_input_grad[:3])
        _backward(hidden.detach(), call, head, RowStats(*stats), logprob_grad, entropy_grad, grads)
        return *grads.scaled(None, hidden.dtype, call.backend), None


def _forward(hidden: Tensor, call: LinearCall, head) -> RowStats:
    dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    rows_total = call.tokens.numel()
    stats = RowStats(
        *(torch.zeros(rows_total, dtype=dtype, device=hidden.device) for _ in RowStats._fields)
    )
    chunks = call.chunks(call.live, head)
    workspace = Workspace(call, head, chunks, gradient=False)
    blank = None if call.compacts else call.live
    for rows in chunks:
        logits = workspace.logits(take_hidden(hidden, rows, blank))
        live = None if blank is None else blank[rows]
        part = call.backend.row_stats(
            logits, call.tokens[rows], call.row_temperature(rows, head), live
        )
        for full, values in zip(stats, part, strict=True):
            _chunks.put(full, rows, values)
    return stats


def _backward(
    hidden, call: LinearCall, head, stats, logprob_grad, entropy_grad, grads: LinearGrads
) -> None:
    logprob_grad = _row_grads(logprob_grad, stats.logprobs, call.live)
    entropy_grad = (
        None if entropy_grad is None else _row_grads(entropy_grad, stats.logprobs, call.live)
    )
    pays = call.live
    if call.compacts and call.live_count is None:
        pays = logprob_grad != 0
        if entropy_grad is not None:
            pays |= entropy_grad != 0
    chunks = call.chunks(pays, head)
    workspace = Workspace(call, head, chunks, gradient=True)
    blank = None if call.compacts else call.live
    for rows in chunks:
        chunk = take_hidden(hidden, rows, blank)
        logits = workspace.logits(chunk)
        grad = workspace.grad_buffer(logits)
        call.backend.row_grad(
            logits,
            call.tokens[rows],
            RowStats(*(x[rows] for x in stats)),
            logprob_grad[rows],
            None if entropy_grad is None else entropy_grad[rows],
            call.row_temperature(rows, head),
            grad,
        )
        grads.add(rows, chunk, workspace.linear_grad(logits, grad))


def _row_grads(grad: Tensor | None, like: Tensor, live: Tensor | None) -> Tensor:
    """An incoming gradient as contiguous rows, exactly 0 on dead ones."""
    if grad is None:
        return torch.zeros_like(like)
    grad = grad.to(like.dtype).contiguous()
    return grad if live is None else torch.where(live, grad, 0.0)
