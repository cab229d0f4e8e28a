"""Sequence-level objectives where every sequence fits a chunk: the logits are computed once."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fastpo.backends.base import RowLosses
from fastpo.backends.two_step import two_step
from fastpo.ops.batch import LossBatch, loss_of_rows, of_rows
from fastpo.ops.head import Head
from fastpo.ops.linear_chunks import ChunkRows, LinearCall
from fastpo.ops.linear_workspace import Chunk
from fastpo.segments import Segments


@dataclass(frozen=True, kw_only=True)
class SequenceLevelLoss:
    """Chunks of whole sequences: `row_stats`, the specification on (n,) numbers, `row_grad`."""

    batch: LossBatch
    offsets: list[int]  # B + 1, of the sequences among all rows
    unmasked_offsets: list[int]  # B + 1, among the rows that enter the GEMMs
    others: tuple[Tensor | None, Tensor | None] = (None, None)
    """Log-probs and entropies (N,) of rows that enter none and count all the same."""

    @property
    def has_entropy_gradient(self) -> bool:
        """See `fastpo.ops.linear_autograd.ChunkLoss`."""
        return self.batch.rule is not None or self.batch.entropy_weight is not None

    @classmethod
    def from_batch(
        cls, batch: LossBatch, call: LinearCall, weight: Tensor
    ) -> SequenceLevelLoss | None:
        """None where a sequence is longer than a chunk, goes on elsewhere, or only the device knows
        the lengths."""
        offsets = _host_offsets(batch.segments)
        elsewhere = batch.segments.group is not None
        if elsewhere or offsets is None or (call.index is not None and not call.reads_values):
            return None
        unmasked = offsets
        if call.index is not None:
            # call.index rises: rows before a sequence's first row stand before it there, too.
            unmasked = torch.searchsorted(call.index, torch.tensor(offsets)).tolist()
        longest = max((b - a for a, b in itertools.pairwise(unmasked)), default=0)
        if longest > call.chunk_rows(unmasked[-1], weight):
            return None
        return cls(batch=batch, offsets=offsets, unmasked_offsets=unmasked)

    def chunks(
        self, call: LinearCall, head: Head, *, gradient: bool
    ) -> tuple[list[ChunkRows], list[ChunkRows]]:
        """Consecutive sequences, as many as fit. See `fastpo.ops.linear_autograd.ChunkLoss`."""
        offsets = self.unmasked_offsets
        longest = max((b - a for a, b in itertools.pairwise(offsets)), default=0)
        size = max(call.gradient_chunk_rows(offsets[-1], head.weight), longest)
        cuts = [0]
        for number, (_, end) in enumerate(itertools.pairwise(offsets)):
            if end - offsets[cuts[-1]] > size:
                cuts.append(number)
        cuts.append(len(offsets) - 1)
        rows = [slice(offsets[a], offsets[b]) for a, b in itertools.pairwise(cuts)]
        rows = [each for each in rows if each.start < each.stop]
        if call.index is not None:
            rows = [call.index[each] for each in rows]
        return (rows, []) if gradient else ([], rows)

    def losses(self, call: LinearCall, chunk: Chunk, temperature: float | Tensor) -> RowLosses:
        """See `fastpo.ops.linear_autograd.ChunkLoss`."""
        rows = chunk.rows
        part, span, inside = self._sequences_of(rows)
        mask = call.row_mask(rows)

        def of_all(values: Tensor, known: Tensor | None) -> Tensor:
            """With the sequences' rows that are in no chunk: masked (0), or known beforehand."""
            full = torch.zeros_like(part.weight) if known is None else known[span].clone()
            full[inside] = values if mask is None else torch.where(mask, values, full[inside])
            return full

        def loss_of(logprobs: Tensor, entropy: Tensor) -> tuple[Tensor, Tensor]:
            full = [of_all(*x) for x in zip((logprobs, entropy), self.others, strict=True)]
            return loss_of_rows(part)(*full)

        losses = two_step(
            call.backend,
            chunk.logits,
            call.tokens[rows],
            temperature,
            chunk.grad,
            mask=mask,
            loss_of=loss_of,
            rule=part.rule,
        )
        return losses._replace(loss=losses.loss[inside], clipped=losses.clipped[inside])

    def _sequences_of(self, rows: ChunkRows) -> tuple[LossBatch, slice, ChunkRows]:
        """The batch of the sequences that `rows` belong to, its rows, and where in it they are."""
        if isinstance(rows, slice):
            first, last = rows.start, rows.stop - 1
        else:
            first, last = int(rows[0]), int(rows[-1])
        # The sequence of a row is the last one that begins at or before it: empty ones, which begin
        # there too, come earlier.
        offsets, ends = torch.tensor(self.offsets), torch.tensor([first, last])
        begin, end = torch.searchsorted(offsets, ends, right=True).tolist()
        span = slice(self.offsets[begin - 1], self.offsets[end])
        if isinstance(rows, slice):
            inside = slice(first - span.start, last + 1 - span.start)
        else:
            inside = rows - span.start
        return _cut(self.batch, begin - 1, end, span), span, inside


def _host_offsets(segments: Segments) -> list[int] | None:
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
    weights = of_rows(batch.sequence_weights, slice(begin, end))
    return replace(batch.rows(span), segments=segments, sequence_weights=weights)
