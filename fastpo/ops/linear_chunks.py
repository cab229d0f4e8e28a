"""Cutting a linear call: which token rows enter the GEMMs, and in chunks of how many."""

from __future__ import annotations

import math
from dataclasses import dataclass
from types import ModuleType
from typing import TypeVar

import torch
from torch import Tensor

from fastpo.ops import checks
from fastpo.ops.batch import of_rows
from fastpo.ops.head import COLUMNS_MULTIPLE, Head, wide_gemm
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
ChunkRows = slice | Tensor
"""The rows of a chunk: consecutive ones, or their (n,) int64 indices."""
_Columns = TypeVar("_Columns", bound=tuple)


def free_bytes(device: torch.device) -> int:
    """What a GPU can still allocate."""
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def budget_bytes(device: torch.device) -> int:
    """Bytes that the (n, V) buffers of a chunk may take: on GPU at most 1/8 of what is free."""
    return CPU_BUDGET if device.type != "cuda" else min(GPU_BUDGET, free_bytes(device) // 8)


def chunk_rows(rows: int, row_bytes: int, budget: int) -> int:
    """Rows of one chunk: even multiples of 256 within `budget` bytes, but at least 256.

    rows: how many there are in all; row_bytes: V-wide bytes that one row occupies.
    """
    most = max(budget // row_bytes // ROWS_MULTIPLE, 1) * ROWS_MULTIPLE
    if rows <= most:
        return max(rows, 1)
    even = math.ceil(rows / math.ceil(rows / most))
    return math.ceil(even / ROWS_MULTIPLE) * ROWS_MULTIPLE


def gathered_rows(hidden: int) -> int:
    """Rows of low-precision gradient that wait for one product, so that the fp32 sum of dW is read
    and written once for them: twice the width D, which is the memory of that sum."""
    return math.ceil(2 * hidden / ROWS_MULTIPLE) * ROWS_MULTIPLE


def grouped(sizes: list[int], most: int) -> list[list[int]]:
    """Numbers of consecutive chunks, of `sizes` rows, in groups of at most `most` rows: those whose
    gradients wait for one product. A larger chunk is alone; each is for 0."""
    groups, filled = [], most
    for number, size in enumerate(sizes):
        if filled + size > most:
            groups.append([])
            filled = 0
        groups[-1].append(number)
        filled += size
    return groups


def chunk_beside_waiting(rows: int, whole: int, half: int, hidden: int) -> int:
    """Rows of a chunk where gradients may wait for one product in a buffer of their own.

    They take the memory that `half`, a chunk of half the budget, leaves. Where that makes no fewer
    products than there are chunks of the `whole` budget, whose gradients can take their logits'
    place, say for narrow hidden states: `whole`.
    """
    sizes = padded_sizes(rows, half, COLUMNS_MULTIPLE)
    return half if len(grouped(sizes, gathered_rows(hidden))) < math.ceil(rows / whole) else whole


def padded_sizes(rows: int, size: int, multiple: int) -> list[int]:
    """Of the chunks of `size` that `rows` rows are cut into."""
    return [padded(min(size, rows - start), multiple) for start in range(0, rows, size)]


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


def take_each(columns: _Columns, rows: ChunkRows) -> _Columns:
    """Some rows of a named tuple of (N,) tensors of one dtype, or None; an index gathers once."""
    if isinstance(rows, slice):
        taken = [None if x is None else x[rows] for x in columns]
    else:
        given = torch.stack([x for x in columns if x is not None])
        gathered = iter(given.index_select(1, rows))
        taken = [None if x is None else next(gathered) for x in columns]
    return type(columns)(*taken)


def put_each(table: Tensor, rows: ChunkRows, columns: tuple[Tensor, ...]) -> None:
    """table[:, rows] = the columns (n,), as many as the table (k, N) has rows."""
    values = torch.stack(columns).to(table.dtype)  # flags become 0.0 and 1.0
    if isinstance(rows, slice):
        table[:, rows] = values
    else:
        table.index_copy_(1, rows, values)


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
        bad = {torch.bool: False}
        return tuple(x.masked_fill(self.wrong_count, bad.get(x.dtype, torch.nan)) for x in outputs)

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
        return cut(index, self.tokens.numel(), self.gradient_chunk_rows(rows, head.weight))

    def gradient_chunk_rows(self, rows: int, weight: Tensor) -> int:
        """Tokens per chunk where gradients narrower than the logits may wait beside them."""
        size = self.chunk_rows(rows, weight)
        if self.grad_dtype(weight).itemsize == self.logits_dtype.itemsize or rows <= size:
            return size
        half = self.chunk_rows(rows, weight, share=2)
        return chunk_beside_waiting(rows, size, half, weight.shape[1])

    def chunk_rows(self, rows: int, weight: Tensor, share: int = 1) -> int:
        """Tokens per chunk for `rows` tokens in all, of a `share`-th of the budget."""
        if self.chunk_tokens is not None:
            return self.chunk_tokens
        if self.exponentials:
            return chunk_rows(rows, 1, gathered_rows(weight.shape[1]))
        if isinstance(self.backend, VocabularyShard):
            # Ranks with ragged shards and other free memory must cut at the same tokens.
            return chunk_rows(rows, 1, SHARDED_ROWS)
        buffers = 1 if self.softcap is None else 2
        row_bytes = weight.shape[0] * self.logits_dtype.itemsize * buffers
        return chunk_rows(rows, row_bytes, budget_bytes(weight.device) // share)

    def grad_dtype(self, weight: Tensor) -> torch.dtype:
        """Of the logits: bf16 or fp16 where the GEMM accumulates such operands wide; else no
        rounding. In fp16 they are scaled (gradient_scale.py): about p / N, they would underflow.
        """
        narrow = weight.dtype.itemsize == 2 and wide_gemm(weight.device, weight.dtype)
        return weight.dtype if narrow else self.logits_dtype

    def row_temperature(self, rows: ChunkRows, head: Head) -> float | Tensor:
        """The temperature of a chunk's rows, as the row primitives take it."""
        return head.temperature(of_rows(self.temperature, rows))


def unmasked_rows(
    mask: Tensor | None, live_rows: int | None
) -> tuple[Tensor | None, Tensor | None]:
    """(n,) rows under the mask, or None for all, and whether `live_rows` is wrong (0-d bool).

    On GPU, counting them would wait for the device: there it takes the caller's count, and whether
    that is right is left on the device.
    """
    if mask is None or (live_rows is None and mask.device.type != "cpu"):
        return None, None
    if mask.device.type == "cpu" and checks.inspects_values(mask):
        index, wrong_count = mask.nonzero()[:, 0], None
    else:
        size = min(live_rows, mask.numel())
        index = torch.nonzero_static(mask, size=size, fill_value=0)[:, 0]
        wrong_count = mask.sum() != live_rows
    return None if index.numel() == mask.numel() else index, wrong_count
