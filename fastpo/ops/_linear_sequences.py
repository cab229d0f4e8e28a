"""Sequence-level objectives where every sequence fits a chunk: the logits are computed once."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fastpo.backends.base import RowLosses
from fastpo.ops._batch import LossBatch
from fastpo.ops._chunks import Rows
from fastpo.ops._head import Head
from fastpo.ops._linear_call import Chunk, LinearCall
from fastpo.segments import Segments

_PER_TOKEN = (
    "mask",
    "advantages",
    "old_logprobs",
    "ref_logprobs",
    "importance_weights",
    "weight",
    "entropy_weight",
)


@dataclass(frozen=True, kw_only=True)
class SequenceLevelLoss:
    """Chunks of whole sequences: `row_stats`, the specification on (n,) numbers, `row_grad`."""

    batch: LossBatch
    starts: list[int]  # B + 1 offsets of the sequences among all rows
    entering: list[int]  # B + 1 offsets among the rows that enter the GEMMs

    @classmethod
    def of(cls, batch: LossBatch, call: LinearCall, weight: Tensor) -> SequenceLevelLoss | None:
        """None where a sequence is longer than a chunk, or only the device knows the lengths."""
        starts = _starts(batch.segments)
        if starts is None or (call.index is not None and not call.may_look):
            return None
        entering = starts
        if call.index is not None:
            entering = torch.searchsorted(call.index, torch.tensor(starts)).tolist()
        longest = max((b - a for a, b in _pairs(entering)), default=0)
        if longest > call.chunk_rows(entering[-1], weight):
            return None
        return cls(batch=batch, starts=starts, entering=entering)

    def chunks(
        self, call: LinearCall, head: Head, *, gradient: bool
    ) -> tuple[list[Rows], list[Rows]]:
        """Consecutive sequences, as many as fit. See `fastpo.ops._linear_fused.ChunkLoss`."""
        size = call.chunk_rows(self.entering[-1], head.weight)
        cuts = [0]
        for number, (_, end) in enumerate(_pairs(self.entering)):
            if end - self.entering[cuts[-1]] > size:
                cuts.append(number)
        cuts.append(len(self.entering) - 1)
        rows = [slice(self.entering[a], self.entering[b]) for a, b in _pairs(cuts)]
        rows = [each for each in rows if each.start < each.stop]
        if call.index is not None:
            rows = [call.index[each] for each in rows]
        return (rows, []) if gradient else ([], rows)

    def losses(self, call: LinearCall, chunk: Chunk, temperature: float | Tensor) -> RowLosses:
        """See `fastpo.ops._linear_fused.ChunkLoss`."""
        rows, tokens = chunk.rows, call.tokens[chunk.rows]
        live = None if call.blank is None else call.blank[rows]
        stats = call.backend.row_stats(chunk.logits, tokens, temperature, live)
        part, inside = self._part(rows)
        gradient = chunk.grad is not None
        with torch.set_grad_enabled(gradient):  # inference mode knows no requires_grad_
            logprobs = _spread(stats.logprobs, part, inside).requires_grad_(gradient)
            terms = part.token_loss(logprobs)
            loss = part.weight * terms.loss
            if gradient:
                (logprob_grad,) = torch.autograd.grad(loss.sum(), logprobs)
        loss, entropy_grad = loss.detach()[inside], None
        if part.entropy_weight is not None:
            entropy_grad = -part.entropy_weight[inside]
            loss = loss + entropy_grad * stats.entropy
        if gradient:
            call.backend.row_grad(
                chunk.logits,
                tokens,
                stats,
                logprob_grad[inside].contiguous(),  # it may be an expanded view
                entropy_grad,
                temperature,
                chunk.grad,
            )
        return RowLosses(loss, stats.logprobs, stats.entropy, terms.clipped[inside])

    def _part(self, rows: Rows) -> tuple[LossBatch, Rows]:
        """The batch of the sequences that `rows` belong to, and where in it they are."""
        whole = isinstance(rows, slice)
        first, last = (rows.start, rows.stop - 1) if whole else (int(rows[0]), int(rows[-1]))
        starts = torch.tensor(self.starts)
        begin, end = torch.searchsorted(starts, torch.tensor([first, last]), right=True).tolist()
        begin, span = begin - 1, slice(self.starts[begin - 1], self.starts[end])
        inside = slice(first - span.start, last + 1 - span.start) if whole else rows - span.start
        return _cut(self.batch, begin, end, span), inside


def _starts(segments: Segments) -> list[int] | None:
    """Offsets of the sequences on the host, where knowing them synchronizes nothing."""
    if segments.offsets is None:
        return [number * segments.width for number in range(segments.count + 1)]
    return segments.offsets.tolist() if segments.offsets.device.type == "cpu" else None


def _cut(batch: LossBatch, begin: int, end: int, span: slice) -> LossBatch:
    """Sequences begin ... end - 1 of a batch, which are the rows `span`."""
    if batch.segments.offsets is None:
        segments = Segments.padded(end - begin, batch.segments.width, batch.segments.device)
    else:
        offsets = batch.segments.offsets[begin : end + 1] - span.start
        segments = Segments.packed(offsets, span.stop - span.start)
    sequence_weights = batch.sequence_weights
    return replace(
        batch,
        segments=segments,
        leading=torch.Size([span.stop - span.start]),
        sequence_weights=None if sequence_weights is None else sequence_weights[begin:end],
        **{
            name: None if value is None else value[span]
            for name, value in ((name, getattr(batch, name)) for name in _PER_TOKEN)
        },
    )


def _spread(values: Tensor, part: LossBatch, inside: Rows) -> Tensor:
    """(n,) numbers of the rows `inside` among all rows of `part`, 0 elsewhere."""
    full = torch.zeros_like(part.weight)
    full[inside] = values
    return full


def _pairs(offsets: list[int]) -> list[tuple[int, int]]:
    return list(itertools.pairwise(offsets))
