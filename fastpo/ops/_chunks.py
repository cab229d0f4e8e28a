"""Which token rows enter the GEMMs, and in chunks of how many."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

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

Rows = slice | Tensor
"""A chunk: consecutive rows, or (n,) int64 indices of rows."""


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


def padded(rows: int) -> int:
    """`rows` rounded up to what a GEMM is given."""
    return math.ceil(rows / PAD_MULTIPLE) * PAD_MULTIPLE


def cut(index: Tensor | None, rows: int, size: int) -> list[Rows]:
    """Chunks of `size` over the rows named by `index`, or over all `rows` rows for None."""
    if index is None:
        return [slice(start, min(start + size, rows)) for start in range(0, rows, size)]
    return list(index.split(size)) if index.numel() else []


def length(rows: Rows) -> int:
    """How many rows a chunk has."""
    return rows.stop - rows.start if isinstance(rows, slice) else rows.numel()


def take(matrix: Tensor, rows: Rows) -> Tensor:
    """(n, D) rows of a [N, D] or a [B, T, D] tensor whose leading dimensions do not merge."""
    if matrix.ndim == 2:
        return matrix[rows]
    if isinstance(rows, slice):
        rows = torch.arange(rows.start, rows.stop, device=matrix.device)
    width = matrix.shape[1]
    return matrix[rows // width, rows % width]


def pad(matrix: Tensor) -> Tensor:
    """`matrix` (n, D) with rows of zeros up to `padded(n)`; itself where n is."""
    missing = padded(matrix.shape[0]) - matrix.shape[0]
    return F.pad(matrix, (0, 0, 0, missing)) if missing else matrix


def put(target: Tensor, rows: Rows, values: Tensor) -> None:
    """target[rows] = values, cast to the target's dtype."""
    if isinstance(rows, slice):
        target[rows].copy_(values)
    else:
        target.index_copy_(0, rows, values.to(target.dtype))
