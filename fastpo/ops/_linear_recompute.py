"""Log-probs and entropies for any loss: statistics forward, the logits once more backward."""

from __future__ import annotations

import torch
from torch import Tensor

from fastpo.backends.base import RowStats
from fastpo.ops import _chunks
from fastpo.ops._autograd import first_order
from fastpo.ops._head import Head
from fastpo.ops._linear_call import LinearCall, LinearGrads, Workspace
from fastpo.ops._tensor_parallel import VocabularyShard


class LinearTokenLogprobs(torch.autograd.Function):
    """logprobs, entropy of (hidden, weight, bias). Saves four numbers per token, 8 N D V in all."""

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, bias: Tensor | None, call: LinearCall):
        stats = _stats(call, call.head(weight, bias), hidden.detach())
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(hidden, weight, bias, *stats)
        ctx.call = call
        return stats.logprobs, stats.entropy

    @staticmethod
    @first_order
    def backward(ctx, logprob_grad: Tensor | None, entropy_grad: Tensor | None):
        if logprob_grad is None and entropy_grad is None:
            return None, None, None, None
        hidden, weight, bias, *stats = ctx.saved_tensors
        call, stats = ctx.call, RowStats(*stats)
        row_grads = [
            None if grad is None else _live_rows(grad, stats.logprobs, call.live)
            for grad in (logprob_grad, entropy_grad)
        ]
        head = call.head(weight, bias)
        grads = LinearGrads(head, hidden, ctx.needs_input_grad[:3])
        _add_grads(call, head, hidden.detach(), stats, *row_grads, grads)
        return *grads.scaled(None, call.backend), None


def _stats(call: LinearCall, head: Head, hidden: Tensor) -> RowStats:
    """Statistics of all rows, 0 on dead ones."""
    dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    count, device = call.tokens.numel(), hidden.device
    stats = RowStats(*(torch.zeros(count, dtype=dtype, device=device) for _ in RowStats._fields))
    chunks = call.chunks(head)
    workspace = Workspace(call, head, chunks, gradient=False)
    for rows in chunks:
        part = call.backend.row_stats(
            workspace.load(hidden, rows, gradient=False).logits,
            call.tokens[rows],
            call.row_temperature(rows, head),
            None if call.blank is None else call.blank[rows],
        )
        for full, values in zip(stats, part, strict=True):
            _chunks.put(full, rows, values)
    return stats


def _add_grads(
    call: LinearCall,
    head: Head,
    hidden: Tensor,
    stats: RowStats,
    logprob_grad: Tensor | None,
    entropy_grad: Tensor | None,
    grads: LinearGrads,
) -> None:
    """Recompute each chunk's logits and push the incoming gradients (N,) through them."""
    if logprob_grad is None:
        logprob_grad = torch.zeros_like(stats.logprobs)
    pays = None
    if call.may_look:  # clipped tokens and A = 0
        pays = (
            logprob_grad != 0 if entropy_grad is None else (logprob_grad != 0) | (entropy_grad != 0)
        )
    chunks = call.chunks(head, only=None if pays is None or bool(pays.all()) else pays)
    workspace = Workspace(call, head, chunks, gradient=True)
    for rows in chunks:
        chunk = workspace.load(hidden, rows, gradient=True)
        call.backend.row_grad(
            chunk.logits,
            call.tokens[rows],
            RowStats(*(x[rows] for x in stats)),
            logprob_grad[rows],
            None if entropy_grad is None else entropy_grad[rows],
            call.row_temperature(rows, head),
            chunk.grad,
        )
        grads.add(chunk, workspace.linear_grad(chunk))
    if grads.hidden is not None and isinstance(call.backend, VocabularyShard):
        call.backend.sum_(grads.hidden)


def _live_rows(grad: Tensor, like: Tensor, live: Tensor | None) -> Tensor:
    """An incoming gradient as contiguous rows, exactly 0 on dead ones."""
    grad = grad.to(like.dtype).contiguous()
    return grad if live is None else torch.where(live, grad, 0.0)
