"""Kept sets from hidden states: those rows never enter a GEMM.

A call splits in two: the rows with ids, and a `LinearCall` of the dense ones, over the whole
vocabulary. `FusedLinearLoss` finishes the loss of the dense ones chunk by chunk (6 N D V for them),
and `KeptLoss` adds the others' gradient to its sums. Where all rows have ids, or a sequence fits no
chunk, `LinearKeptLogprobs` makes the log-probs of all (8 N D V for the dense ones).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fastpo.backends.base import KeptGrads, KeptHead, KeptRows, KeptSets, RowLosses, RowStats
from fastpo.backends.two_step import differentiate
from fastpo.ops.autograd import first_order, hand_over, row_grads, save, saved
from fastpo.ops.batch import LossBatch, loss_of_rows
from fastpo.ops.checks import wide_dtype
from fastpo.ops.head import Head
from fastpo.ops.kept import Kept
from fastpo.ops.linear_autograd import chunk_grads, statistics
from fastpo.ops.linear_chunks import LinearCall, unmasked_rows
from fastpo.ops.linear_workspace import LinearGrads


@dataclass(frozen=True, kw_only=True)
class KeptCall:
    """A linear call in which rows have kept sets, and the call of those that have none."""

    rows: LinearCall  # all of them
    sets: KeptSets
    dense: LinearCall | None  # its mask (N,) says which; None = the host knows of none
    add_to: Tensor | None  # (V, D), to which the weight's gradient is added

    @classmethod
    def split(
        cls, call: LinearCall, kept: Kept, dense_rows: int | None, add_to: Tensor | None
    ) -> KeptCall:
        """`dense_rows`: how many have no set, which a GPU's host may know beforehand."""
        if kept.dense is None:
            return cls(rows=call, sets=kept.sets, dense=None, add_to=add_to)
        index, wrong_count = unmasked_rows(kept.dense, dense_rows)
        if wrong_count is not None and call.wrong_count is not None:
            wrong_count = wrong_count | call.wrong_count
        call = replace(call, wrong_count=call.wrong_count if wrong_count is None else wrong_count)
        dense = replace(call, mask=kept.dense, index=index) if dense_rows != 0 else None
        return cls(rows=call, sets=kept.sets, dense=dense, add_to=add_to)

    def of_ids(self, hidden: Tensor, head: Head) -> KeptRows:
        """The rows (N, D) as the backends' `kept_stats` and `kept_grad` take them."""
        kept_head = KeptHead(head.weight, head.bias, head.gain, head.softcap is not None)
        temperature = self.rows.row_temperature(slice(None), head)
        return KeptRows(hidden.detach(), kept_head, self.rows.tokens, self.sets, temperature)


@dataclass(frozen=True, kw_only=True)
class KeptLoss:
    """The loss of the rows with kept sets, beside dense ones that are finished chunk by chunk."""

    kept: KeptCall
    batch: LossBatch
    stats: RowStats  # of the rows with sets
    logits: Tensor  # of their ids

    @classmethod
    @torch.no_grad()
    def of(cls, kept: KeptCall, batch: LossBatch, hidden: Tensor, head: Head) -> KeptLoss:
        """hidden (N, D)."""
        stats, logits = kept.rows.backend.kept_stats(kept.of_ids(hidden, head), kept.rows.mask)
        return cls(kept=kept, batch=batch, stats=stats, logits=logits)

    @property
    def add_to(self) -> Tensor | None:
        """See `fastpo.ops.linear_autograd.LossBeside`."""
        return self.kept.add_to

    def finish(
        self, head: Head, hidden: Tensor, dense: RowLosses, grads: LinearGrads | None
    ) -> RowLosses:
        """See `fastpo.ops.linear_autograd.LossBeside`."""
        pairs = ((dense.logprobs, self.stats.logprobs), (dense.entropy, self.stats.entropy))
        numbers = [torch.where(self.kept.dense.mask, x, y) for x, y in pairs]
        loss, clipped, *incoming = differentiate(
            loss_of_rows(self.batch),
            *numbers,
            gradient=grads is not None,
            rule=self.batch.rule,
        )
        if grads is not None:
            rows = self.kept.of_ids(hidden, head)
            places = KeptGrads(grads.hidden, grads.weight, grads.bias)
            numbers_of_ids = (self.stats, self.logits, *incoming)
            self.kept.rows.backend.kept_grad(rows, *numbers_of_ids, places, add=True)
        return RowLosses(loss, *numbers, clipped)


class LinearKeptLogprobs(torch.autograd.Function):
    """logprobs, entropy of (hidden (N, D), weight, bias): dense rows in chunks, as
    `LinearTokenLogprobs` does, the others by the logits of their ids alone."""

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, bias: Tensor | None, kept: KeptCall):
        head = kept.rows.head(weight, bias)
        rows = kept.of_ids(hidden, head)
        stats, logits = kept.rows.backend.kept_stats(rows, kept.rows.mask)
        if kept.dense is not None:
            over_all, _ = statistics(kept.dense, head, hidden.detach())
            pairs = zip(over_all, stats, strict=True)
            stats = RowStats(*(torch.where(kept.dense.mask, x, y) for x, y in pairs))
        ctx.set_materialize_grads(False)
        save(ctx, hidden, weight, bias, logits, *stats)
        ctx.kept = kept
        # Copies: whoever edits a returned log-prob must not edit what the backward pass reads.
        return stats.logprobs.clone(), stats.entropy.clone()

    @staticmethod
    @first_order
    def backward(ctx, logprob_grad: Tensor | None, entropy_grad: Tensor | None):
        if logprob_grad is None and entropy_grad is None:
            return (None,) * 4
        hidden, weight, bias, logits, *stats = saved(ctx)
        kept, stats, needs = ctx.kept, RowStats(*stats), ctx.needs_input_grad
        call, head, rows = kept.rows, kept.rows.head(weight, bias), hidden.detach()
        dtype = stats.logprobs.dtype
        c, e = (row_grads(x, call.mask, dtype) for x in (logprob_grad, entropy_grad))
        c = torch.zeros_like(stats.logprobs) if c is None else c
        of_ids = kept.of_ids(hidden, head)
        if kept.dense is None:
            add_to = kept.add_to if needs[1] else None
            grads = _new_grads(head, rows, needs, add_to)
            call.backend.kept_grad(of_ids, stats, logits, c, e, grads, add=add_to is not None)
            grads = grads if add_to is None else grads._replace(weight=None)
            return *(None if x is None else x.to(hidden.dtype) for x in grads), None
        incoming = [None if x is None else torch.where(kept.dense.mask, x, 0.0) for x in (c, e)]
        dense = chunk_grads(kept.dense, head, rows, stats, *incoming, needs, wide=True)
        places = KeptGrads(dense.hidden, dense.weight, dense.bias)
        call.backend.kept_grad(of_ids, stats, logits, c, e, places, add=True)
        return *hand_over(dense.scaled(None, call.backend), kept.add_to), None


def _new_grads(
    head: Head, hidden: Tensor, needs: tuple[bool, ...], add_to: Tensor | None
) -> KeptGrads:
    """Places in the inputs' own dtype: every sum is rounded once. Rows without ids are masked."""
    new = torch.empty_like if add_to is None else torch.zeros_like
    return KeptGrads(
        torch.zeros_like(hidden) if needs[0] else None,
        (torch.empty_like(head.weight) if add_to is None else add_to) if needs[1] else None,
        new(head.bias, dtype=wide_dtype(hidden.dtype)) if needs[2] else None,
    )
