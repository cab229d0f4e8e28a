"""Log-probs over kept sets from hidden states: those rows never enter a GEMM."""

from __future__ import annotations

import torch
from torch import Tensor

from fastpo.backends.base import KeptGrads, KeptHead, RowStats
from fastpo.ops.autograd import first_order, row_grads, save, saved
from fastpo.ops.checks import wide_dtype
from fastpo.ops.head import Head
from fastpo.ops.kept import Kept
from fastpo.ops.linear_autograd import chunk_grads, statistics
from fastpo.ops.linear_chunks import LinearCall


class LinearKeptLogprobs(torch.autograd.Function):
    """logprobs, entropy of (hidden (N, D), weight, bias): dense rows in chunks, as
    `LinearTokenLogprobs` does, the others by the logits of their ids alone."""

    @staticmethod
    def forward(
        ctx, hidden: Tensor, weight: Tensor, bias: Tensor | None, call: LinearCall, kept: Kept
    ):
        head, rows = call.head(weight, bias), hidden.detach()
        arguments = (rows, _kept_head(head), call.tokens, kept.sets, _temperature(call, head))
        stats, logits = call.backend.kept_stats(*arguments, call.mask)
        if kept.dense is not None:
            only = kept.dense if call.reads_values else None
            over_all, _ = statistics(call, head, rows, only)
            pairs = zip(over_all, stats, strict=True)
            stats = RowStats(*(torch.where(kept.dense, x, y) for x, y in pairs))
        ctx.set_materialize_grads(False)
        save(ctx, hidden, weight, bias, logits, *stats)
        ctx.call, ctx.kept = call, kept
        # Copies: whoever edits a returned log-prob must not edit what the backward pass reads.
        return stats.logprobs.clone(), stats.entropy.clone()

    @staticmethod
    @first_order
    def backward(ctx, logprob_grad: Tensor | None, entropy_grad: Tensor | None):
        if logprob_grad is None and entropy_grad is None:
            return (None,) * 5
        hidden, weight, bias, logits, *stats = saved(ctx)
        call, kept, stats = ctx.call, ctx.kept, RowStats(*stats)
        head, rows = call.head(weight, bias), hidden.detach()
        dtype = stats.logprobs.dtype
        c, e = (row_grads(x, call.mask, dtype) for x in (logprob_grad, entropy_grad))
        c = torch.zeros_like(stats.logprobs) if c is None else c
        dense = None
        if kept.dense is None:
            grads = _new_grads(head, rows, ctx.needs_input_grad)
        else:
            incoming = [None if x is None else torch.where(kept.dense, x, 0.0) for x in (c, e)]
            dense = chunk_grads(call, head, rows, stats, *incoming, ctx.needs_input_grad, wide=True)
            grads = KeptGrads(dense.hidden, dense.weight, dense.bias)
        call.backend.kept_grad(
            rows,
            _kept_head(head),
            call.tokens,
            kept.sets,
            _temperature(call, head),
            stats,
            logits,
            c,
            e,
            grads,
            add=dense is not None,
        )
        if dense is not None:
            return *dense.scaled(None, call.backend), None, None
        return *(None if x is None else x.to(hidden.dtype) for x in grads), None, None


def _kept_head(head: Head) -> KeptHead:
    return KeptHead(head.weight, head.bias, head.gain, head.softcap is not None)


def _temperature(call: LinearCall, head: Head) -> float | Tensor:
    return call.row_temperature(slice(None), head)


def _new_grads(head: Head, hidden: Tensor, needs: tuple[bool, ...]) -> KeptGrads:
    """Places in the inputs' own dtype: every sum is rounded once. Rows without ids are masked."""
    return KeptGrads(
        torch.zeros_like(hidden) if needs[0] else None,
        torch.empty_like(head.weight) if needs[1] else None,
        torch.empty_like(head.bias, dtype=wide_dtype(hidden.dtype)) if needs[2] else None,
    )
