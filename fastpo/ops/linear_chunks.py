"""Cutting a linear call: which token rows enter the GEMMs, in chunks of how many, through which
buffers, and the sums of their gradients."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

from fastpo.backends.base import alias_rows
from fastpo.ops.checks import wide_dtype
from fastpo.ops.head import COLUMNS_MULTIPLE, Head, wide_gemm, zero_padded
from fastpo.ops.tensor_parallel import VocabularyShard

ROWS_MULTIPLE = 256
"""Chunks are even multiples of this many rows: whole GEMM tiles."""
PAD_MULTIPLE = 16
"""A ragged chunk is padded to this: below 4 rows a thread, CPU GEMMs switch kernels, and bits."""
CPU_BUDGET = 128 * 2**20
"""Bytes of a chunk's (n, V) buffers on CPU: twice as many gain nothing, half as many cost 2 %."""
GPU_BUDGET = 1280 * 2**20
"""The same on GPUs with memory to spare."""
SHARDED_ROWS = 2048
"""Rows of a chunk over a vocabulary shard: no rank may decide by its own width or memory."""
DOWNCAST_ELEMENTS = 2**24
"""torch's CPU multiplication into a narrower dtype makes a wide temporary: of at most this many."""

ChunkRows = slice | Tensor
"""The rows of a chunk: consecutive ones, or their (n,) int64 indices."""


def budget_bytes(device: torch.device) -> int:
    """Bytes that the (n, V) buffers of a chunk may take: on GPU at most 1/8 of what is free."""
    if device.type != "cuda":
        return CPU_BUDGET
    free, _ = torch.cuda.mem_get_info(device)
    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return min(GPU_BUDGET, (free + cached) // 8)


def chunk_rows(rows: int, row_bytes: int, budget: int) -> int:
    """Rows of one chunk: even multiples of 256 within `budget` bytes, but at least 256.

    rows: how many there are in all; row_bytes: V-wide bytes that one row occupies.
    """
    most = max(budget // row_bytes // ROWS_MULTIPLE, 1) * ROWS_MULTIPLE
    if rows <= most:
        return max(rows, 1)
    even = math.ceil(rows / math.ceil(rows / most))
    return math.ceil(even / ROWS_MULTIPLE) * ROWS_MULTIPLE


def padded(rows: int, multiple: int = PAD_MULTIPLE) -> int:
    """`rows` rounded up to what a GEMM is given."""
    return math.ceil(rows / multiple) * multiple


def cut(index: Tensor | None, rows: int, size: int) -> list[ChunkRows]:
    """Chunks of `size` over the rows named by `index`, or over all `rows` rows for None."""
    if index is None:
        return [slice(start, min(start + size, rows)) for start in range(0, rows, size)]
    return list(index.split(size)) if index.numel() else []


def length(rows: ChunkRows) -> int:
    """How many rows a chunk has."""
    return rows.stop - rows.start if isinstance(rows, slice) else rows.numel()


def take(matrix: Tensor, rows: ChunkRows) -> Tensor:
    """(n, D) rows of a [N, D] or a [B, T, D] tensor whose leading dimensions do not merge."""
    if matrix.ndim == 2:
        return matrix[rows]
    if isinstance(rows, slice):
        rows = torch.arange(rows.start, rows.stop, device=matrix.device)
    width = matrix.shape[1]
    return matrix[rows // width, rows % width]


def put(target: Tensor, rows: ChunkRows, values: Tensor) -> None:
    """target[rows] = values, cast to the target's dtype."""
    if isinstance(rows, slice):
        target[rows].copy_(values)
    else:
        target.index_copy_(0, rows, values.to(target.dtype))


@dataclass(frozen=True, kw_only=True)
class LinearCall:
    """Everything about one call but hidden, weight and bias, which autograd must see."""

    tokens: Tensor  # (N,) int64
    temperature: float | Tensor  # or (N,)
    logit_scale: float
    softcap: float | None
    logits_dtype: torch.dtype
    chunk_tokens: int | None
    backend: ModuleType | VocabularyShard
    mask: Tensor | None  # (N,) bool; None = all
    index: Tensor | None  # (n,) the rows under the mask, where the host knows how many; None = all
    wrong_count: Tensor | None  # 0-d bool: `live_rows` is not the mask's count, found on device
    exponentials: bool = False  # the backend makes exponentials instead of logits (linear_exp.py)
    keeps_exponentials: bool = False  # and they are kept from forward to backward

    @property
    def masked_enter(self) -> bool:
        """Masked rows enter the GEMMs, and must hold zeros there, for NaN * 0 is NaN."""
        return self.mask is not None and self.index is None

    def row_mask(self, rows: ChunkRows) -> Tensor | None:
        """(n,) bool where some rows of a chunk may be masked."""
        return self.mask[rows] if self.masked_enter else None

    @property
    def reads_values(self) -> bool:
        """Whether values may steer the host: on CPU, where reading them synchronizes nothing."""
        return self.tokens.device.type == "cpu"

    def checked(self, *outputs: Tensor) -> tuple[Tensor, ...]:
        """The outputs, NaN if the caller's `live_rows` contradicts the mask."""
        if self.wrong_count is None:
            return outputs
        return tuple(x.masked_fill(self.wrong_count, torch.nan) for x in outputs)

    def head(self, weight: Tensor, bias: Tensor | None) -> Head:
        """The head, detached: gradients are written by hand."""
        return Head(
            weight=weight.detach(),
            bias=None if bias is None else bias.detach(),
            logit_scale=self.logit_scale,
            softcap=self.softcap,
        )

    def chunks(self, head: Head, only: Tensor | None = None) -> list[ChunkRows]:
        """Chunks over the rows that enter, or those of them where `only` (N,) is True."""
        index = self.index
        if only is not None:
            index = only.nonzero()[:, 0] if index is None else index[only[index]]
        rows = self.tokens.numel() if index is None else index.numel()
        return cut(index, self.tokens.numel(), self.chunk_rows(rows, head.weight))

    def chunk_rows(self, rows: int, weight: Tensor) -> int:
        """Tokens per chunk for `rows` tokens in all."""
        if self.chunk_tokens is not None:
            return self.chunk_tokens
        if self.exponentials:
            return chunk_rows(rows, 1, 2 * weight.shape[1])
        if isinstance(self.backend, VocabularyShard):
            # Ranks with ragged shards and other free memory must cut at the same tokens.
            return chunk_rows(rows, 1, SHARDED_ROWS)
        buffers = 1 if self.softcap is None else 2
        row_bytes = weight.shape[0] * self.logits_dtype.itemsize * buffers
        return chunk_rows(rows, row_bytes, budget_bytes(weight.device))

    def row_temperature(self, rows: ChunkRows, head: Head) -> float | Tensor:
        """The temperature of a chunk's rows, as the row primitives take it."""
        per_token = isinstance(self.temperature, Tensor)
        return head.temperature(self.temperature[rows] if per_token else self.temperature)


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
    """The chunk-sized buffers of one pass, allocated once, and the steps through them."""

    def __init__(self, call: LinearCall, head: Head, chunks: list[ChunkRows], *, gradient: bool):
        self.call, self.head = call, head
        self._pad = PAD_MULTIPLE if self.grad_dtype.itemsize > 2 else COLUMNS_MULTIPLE
        rows = padded(max((length(chunk) for chunk in chunks), default=0), self._pad)
        shape = (rows, head.weight.shape[0], call.logits_dtype, head.weight.device)
        self._logits = zero_padded(*shape)
        # tanh must survive the row primitive: the gradient goes on through it.
        self._apart = zero_padded(*shape) if gradient and head.softcap else None

    @property
    def grad_dtype(self) -> torch.dtype:
        """bf16 where the GEMM accumulates bf16 operands wide; else no rounding.

        Not fp16: an unscaled policy gradient, about p / N, is below its smallest number.
        """
        weight = self.head.weight
        narrow = weight.dtype == torch.bfloat16 and wide_gemm(weight.device, weight.dtype)
        return torch.bfloat16 if narrow else self.call.logits_dtype

    def load(self, hidden: Tensor, rows: ChunkRows, *, gradient: bool) -> Chunk:
        """The logits of a chunk, and room for their gradient."""
        part = self._operand(take(hidden, rows), self.call.row_mask(rows))
        logits = self._logits[: part.shape[0]]
        self.head.logits_(logits, part)
        grad = self._grad_buffer(logits) if gradient else None
        return Chunk(rows=rows, hidden=part, padded_logits=logits, padded_grad=grad)

    def _operand(self, part: Tensor, mask: Tensor | None) -> Tensor:
        """(padded n, D) of (n, D): zeros in masked rows and below, whole tiles behind its rows."""
        if mask is not None:
            part = part.masked_fill(~mask[:, None], 0)
        count, width = part.shape
        missing = padded(count, self._pad) - count
        narrow = self.call.logits_dtype.itemsize == 2 and part.device.type == "cpu"
        if narrow and width % COLUMNS_MULTIPLE:
            tiles = zero_padded(count + missing, width, part.dtype, part.device)
            tiles[:count].copy_(part)
            tiles[count:].zero_()
            return tiles
        return F.pad(part, (0, 0, 0, missing)) if missing else part

    def _grad_buffer(self, logits: Tensor) -> Tensor:
        if self._apart is not None:
            return self._apart[: logits.shape[0]]
        return self._in_place(logits)

    def _in_place(self, logits: Tensor) -> Tensor:
        """Room for a gradient of `grad_dtype` in the rows of the logits, padding and all."""
        count, columns = logits.shape
        width = logits.stride(0) if count > 1 else padded(columns, COLUMNS_MULTIPLE)
        rows = logits.as_strided((count, width), (width, 1))
        return alias_rows(rows, self.grad_dtype)[:, :columns]

    def linear_grad(self, chunk: Chunk) -> Tensor:
        """(padded n, V) at the GEMM's output, from what the row primitive left in `chunk.grad`."""
        grad = chunk.padded_grad
        grad[length(chunk.rows) :].zero_()
        if self._apart is not None:
            self.head.through_tanh_(grad, chunk.padded_logits)
        if grad.dtype == self.grad_dtype:
            return grad
        narrow = self._in_place(chunk.padded_logits)
        narrow.copy_(grad)
        return narrow


class LinearGrads:
    """Gradients of hidden, weight and bias, summed over chunks; None where not needed."""

    def __init__(
        self, head: Head, hidden: Tensor, needs: tuple[bool, bool, bool], *, all_rows: bool
    ):
        """all_rows: the chunks to come cover every row of `hidden`."""
        self.head, self.dtype = head, hidden.dtype
        wide = wide_dtype(hidden.dtype)
        # fp16 would underflow before an upstream loss scale is multiplied in.
        rows_dtype = wide if hidden.dtype == torch.float16 else hidden.dtype
        shape = (hidden.shape[:-1].numel(), hidden.shape[-1])
        self.shape = hidden.shape
        new = torch.empty if all_rows else torch.zeros
        device = hidden.device
        self.hidden = new(shape, dtype=rows_dtype, device=device) if needs[0] else None
        self.weight = torch.empty_like(head.weight, dtype=wide) if needs[1] else None
        self.bias = torch.zeros_like(head.bias, dtype=wide) if needs[2] else None
        self._empty = True  # nothing has been written into `weight` yet

    def add(self, chunk: Chunk, grad: Tensor) -> None:
        """Add a chunk, given the gradient (padded n, V) at the GEMM's output."""
        if self.hidden is not None:
            self._put_hidden(chunk, grad)
        if self.weight is not None:
            beta = 0.0 if self._empty else 1.0
            self.head.weight_grad_(self.weight, grad, chunk.hidden, beta=beta)
            self._empty = False
        if self.bias is not None:
            self.head.add_bias_grad_(self.bias, grad)

    def _put_hidden(self, chunk: Chunk, grad: Tensor) -> None:
        count, rows = grad.shape[0], chunk.rows
        if isinstance(rows, slice) and count == length(rows):
            target = self.hidden[rows]
            if target.dtype == grad.dtype:
                self.head.hidden_grad_(target, grad)
                return
        part = torch.empty(count, self.shape[-1], dtype=grad.dtype, device=grad.device)
        self.head.hidden_grad_(part, grad)
        put(self.hidden, rows, part[: length(rows)])

    def finish(self, backend: ModuleType | VocabularyShard) -> None:
        """After the last chunk: zeros where there was none, and the sum over shards."""
        if self.weight is not None and self._empty:
            self.weight.zero_()
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
