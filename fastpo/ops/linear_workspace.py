"""The buffers that the chunks of a linear call go through, and the sums of their gradients."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

from fastpo.backends.base import alias_rows
from fastpo.ops.checks import wide_dtype
from fastpo.ops.head import COLUMNS_MULTIPLE, Head, zero_padded
from fastpo.ops.linear_chunks import (
    PAD_MULTIPLE,
    ChunkRows,
    LinearCall,
    free_bytes,
    gathered_rows,
    grouped,
    length,
    padded,
    put,
    take,
)
from fastpo.ops.tensor_parallel import VocabularyShard

DOWNCAST_ELEMENTS = 2**24
"""torch's CPU multiplication into a narrower dtype makes a wide temporary: of at most this many."""


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """Rows on their way through the head. The padded tensors have rows of zeros at the end."""

    rows: ChunkRows
    hidden: Tensor  # (padded n, D)
    padded_logits: Tensor  # (padded n, V)
    padded_grad: Tensor | None  # (padded n, V), may share storage with the logits

    @property
    def logits(self) -> Tensor:
        """(n, V)"""
        return self.padded_logits[: length(self.rows)]

    @property
    def grad(self) -> Tensor | None:
        """(n, V): where the row primitive leaves the gradient of the logits."""
        return None if self.padded_grad is None else self.padded_grad[: length(self.rows)]


class Workspace:
    """The buffers of one pass, allocated once, and the steps of a chunk through them.

    The gradient of a chunk takes its logits' place and is multiplied at once. Where it is narrower
    than they are (bf16 under fp32: on GPUs), and there are several chunks, and the head's gradient
    is wanted, the gradients of a group of chunks wait in a buffer of their own for one product:
    each product reads and writes the whole fp32 sum of dW, and with a single one there is none.
    """

    def __init__(
        self,
        call: LinearCall,
        head: Head,
        chunks: list[ChunkRows],
        others: list[ChunkRows] = (),
        *,
        weight_grad: bool = False,
    ):
        """chunks: those that get a gradient; others: those that do not."""
        self.call, self.head = call, head
        self.grad_dtype = call.grad_dtype(head.weight)
        self.rows_multiple = PAD_MULTIPLE if self.grad_dtype.itemsize > 2 else COLUMNS_MULTIPLE
        sizes = [padded(length(chunk), self.rows_multiple) for chunk in [*chunks, *others]]
        rows, most = max(sizes, default=0), 0
        self._vocabulary, self._device = head.weight.shape[0], head.weight.device
        self._logits = self._buffer(rows, call.logits_dtype)
        # tanh must survive the row primitive: the gradient goes on through it.
        self._apart = self._buffer(rows, call.logits_dtype) if chunks and head.softcap else None
        narrow = self.grad_dtype.itemsize < call.logits_dtype.itemsize
        if narrow and weight_grad and len(chunks) > 1:
            most = gathered_rows(head.weight.shape[1])
            size = min(most, sum(sizes)) * self._vocabulary * self.grad_dtype.itemsize
            if self._device.type == "cuda" and size > free_bytes(self._device) // 2:
                most = 0
        groups = grouped(sizes[: len(chunks)], most)
        self.groups = [[chunks[number] for number in group] for group in groups]
        room = max((sum(sizes[number] for number in group) for group in groups), default=0)
        waits = len(groups) < len(chunks)
        self._gathered = self._buffer(room, self.grad_dtype) if waits else None
        self._waiting: list[Chunk] = []

    def _buffer(self, rows: int, dtype: torch.dtype) -> Tensor:
        return zero_padded(rows, self._vocabulary, dtype, self._device)

    def load(self, hidden: Tensor, rows: ChunkRows, *, gradient: bool) -> Chunk:
        """The logits of a chunk, and room for their gradient."""
        part = self._operand(take(hidden, rows), self.call.row_mask(rows))
        logits = self._logits[: part.shape[0]]
        self.head.logits_(logits, part)
        grad = None
        if gradient:
            grad = self._narrow(logits) if self._apart is None else self._apart[: len(logits)]
        return Chunk(rows=rows, hidden=part, padded_logits=logits, padded_grad=grad)

    def _operand(self, part: Tensor, mask: Tensor | None) -> Tensor:
        """(padded n, D) of (n, D): zeros in masked rows and below, whole tiles behind its rows."""
        if mask is not None:
            part = part.masked_fill(~mask[:, None], 0)
        count, width = part.shape
        missing = padded(count, self.rows_multiple) - count
        narrow = self.call.logits_dtype.itemsize == 2 and part.device.type == "cpu"
        if narrow and width % COLUMNS_MULTIPLE:
            tiles = zero_padded(count + missing, width, part.dtype, part.device)
            tiles[:count].copy_(part)
            tiles[count:].zero_()
            return tiles
        return F.pad(part, (0, 0, 0, missing)) if missing else part

    def _narrow(self, logits: Tensor) -> Tensor:
        """Room for a gradient of `grad_dtype`: behind those that wait, or in the logits' rows."""
        count, columns = logits.shape
        if self._gathered is not None:
            start = sum(len(chunk.hidden) for chunk in self._waiting)
            return self._gathered[start : start + count]
        width = logits.stride(0) if count > 1 else padded(columns, COLUMNS_MULTIPLE)
        rows = logits.as_strided((count, width), (width, 1))
        return alias_rows(rows, self.grad_dtype)[:, :columns]

    def keep(self, chunk: Chunk) -> None:
        """Turn what the row primitive left in `chunk.grad` into the gradient at the GEMM's output,
        and keep it for `waiting`."""
        grad = chunk.padded_grad
        grad[length(chunk.rows) :].zero_()
        if self._apart is not None:
            self.head.through_tanh_(grad, chunk.padded_logits)
        if grad.dtype != self.grad_dtype or (
            self._apart is not None and self._gathered is not None
        ):
            grad = self._narrow(chunk.padded_logits).copy_(grad)
        self._waiting.append(replace(chunk, padded_logits=grad, padded_grad=grad))

    def rescale(self, factor: Tensor, backend: ModuleType | VocabularyShard) -> None:
        """Multiply the gradients that wait by `factor` (0-d, on device)."""
        for chunk in self._waiting:
            backend.scale_(chunk.padded_grad, factor)

    def waiting(self) -> tuple[list[ChunkRows], Tensor, Tensor]:
        """The rows of the group that is complete, its hidden states (n, D) and gradient (n, V);
        every chunk of them padded."""
        chunks, self._waiting = self._waiting, []
        hidden, grad = chunks[0].hidden, chunks[0].padded_grad
        if self._gathered is not None:
            hidden = torch.cat([chunk.hidden for chunk in chunks])
            grad = self._gathered[: len(hidden)]
        return [chunk.rows for chunk in chunks], hidden, grad

    def free_logits(self) -> None:
        """After the last chunk: its place may hold dW, unless the gradient stands there."""
        self._logits = self._apart = None


class LinearGrads:
    """Gradients of hidden, weight and bias, summed over groups of chunks; None where not needed."""

    def __init__(
        self,
        workspace: Workspace,
        hidden: Tensor,
        needs: tuple[bool, bool, bool],
        *,
        all_rows: bool,
        wide: bool = False,
    ):
        """all_rows: the chunks to come cover every row of `hidden`; wide: keep wide sums of dW."""
        self.head, self.dtype = workspace.head, hidden.dtype
        self._pad = workspace.rows_multiple
        weight, sums = self.head.weight, wide_dtype(hidden.dtype)
        # fp16 would underflow before an upstream loss scale is multiplied in.
        rows_dtype = sums if hidden.dtype == torch.float16 else hidden.dtype
        shape = (hidden.shape[:-1].numel(), hidden.shape[-1])
        self.shape = hidden.shape
        new = torch.empty if all_rows else torch.zeros
        device = hidden.device
        self.hidden = new(shape, dtype=rows_dtype, device=device) if needs[0] else None
        # A single product of low-precision operands rounds its own sums: no wide copy of them.
        single = len(workspace.groups) == 1 and workspace.grad_dtype == weight.dtype
        single = single and weight.dtype != torch.float16  # its sums are scaled
        self._weight_dtype = weight.dtype if single and not wide else sums
        self._needs_weight = needs[1]
        self.weight = None  # made when there is something to write into it
        self.bias = torch.zeros_like(self.head.bias, dtype=sums) if needs[2] else None

    def add(self, chunks: list[ChunkRows], hidden: Tensor, grad: Tensor) -> None:
        """Add what `Workspace.waiting` gives: rows, hidden states (n, D), gradient (n, V)."""
        if self.hidden is not None:
            self._put_hidden(chunks, grad)
        if self._needs_weight:
            beta = 0.0 if self.weight is None else 1.0
            if self.weight is None:
                self.weight = torch.empty_like(self.head.weight, dtype=self._weight_dtype)
            self.head.weight_grad_(self.weight, grad, hidden, beta=beta)
        if self.bias is not None:
            self.head.add_bias_grad_(self.bias, grad)

    def _put_hidden(self, chunks: list[ChunkRows], grad: Tensor) -> None:
        count = grad.shape[0]
        if isinstance(chunks[0], slice) and self.hidden.dtype == grad.dtype:
            target = self.hidden[chunks[0].start : chunks[-1].stop]
            if len(target) == count:  # consecutive and without padding
                self.head.hidden_grad_(target, grad)
                return
        # A product in parts, as bf16 ones are on CPU, must not round every part to bf16.
        dtype = torch.promote_types(self.hidden.dtype, grad.dtype)
        part = torch.empty(count, self.shape[-1], dtype=dtype, device=grad.device)
        self.head.hidden_grad_(part, grad)
        start = 0
        for rows in chunks:
            put(self.hidden, rows, part[start : start + length(rows)])
            start += padded(length(rows), self._pad)

    def rescale(self, factor: Tensor, backend: ModuleType | VocabularyShard) -> None:
        """Multiply the sums so far by `factor` (0-d, on device)."""
        for grad in (self.hidden, self.weight, self.bias):
            if grad is not None:
                backend.scale_(grad if grad.ndim == 2 else grad[None], factor)

    def finish(self, backend: ModuleType | VocabularyShard) -> None:
        """After the last group: zeros where there was none, and the sum over shards."""
        if self._needs_weight and self.weight is None:
            self.weight = torch.zeros_like(self.head.weight)
        if self.hidden is not None and isinstance(backend, VocabularyShard):
            backend.sum_(self.hidden)

    def scaled(
        self, factor: Tensor | None, backend: ModuleType | VocabularyShard
    ) -> Iterator[Tensor | None]:
        """hidden, weight, bias gradients in the inputs' dtype, times `factor` (0-d, on device)."""
        for grad in (self.hidden, self.weight, self.bias):
            scaled = None if grad is None else _downcast(grad, factor, self.dtype, backend)
            yield scaled.view(self.shape) if grad is self.hidden and grad is not None else scaled


def _downcast(
    grad: Tensor,
    factor: Tensor | None,
    dtype: torch.dtype,
    backend: ModuleType | VocabularyShard,
) -> Tensor:
    if grad.dtype == dtype:
        if factor is not None:
            backend.scale_(grad if grad.ndim == 2 else grad[None], factor)
        return grad
    if factor is None or grad.numel() == 0:
        return grad.to(dtype)
    out = torch.empty_like(grad, dtype=dtype)
    rows = max(DOWNCAST_ELEMENTS // grad[0].numel(), 1)
    for source, target in zip(grad.split(rows), out.split(rows), strict=True):
        torch.mul(source, factor, out=target)
    return out
