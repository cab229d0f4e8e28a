"""Which token rows enter the GEMMs, and in chunks of how many."""

from __future__ import annotations

import math

import torch
from torch import Tensor

ROWS_MULTIPLE = 256
CPU_BUDGET = 200 * 2**20
GPU_BUDGET = 1280 * 2**20

Rows = slice | Tensor
"""A chunk: consecutive rows, or (n,) int64 indices of rows."""


def budget_bytes(device: torch.device) -> int:
    """Bytes that the chunk's (n, V) buffers may take."""
    if device.type != "cuda":
        return CPU_BUDGET
    free, _ = torch.cuda.mem_get_info(device)
    reusable = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return max(min(GPU_BUDGET, (free + reusable) // 8), 2**26)


def chunk_rows(rows: int, row_bytes: int, budget: int) -> int:
    """Rows of one chunk: as even as multiples of 256 allow, within `budget` if 256 rows are.

    rows: how many there are in all; row_bytes: V-wide bytes that one row occupies.
    """
    most = max(budget // row_bytes // ROWS_MULTIPLE, 1) * ROWS_MULTIPLE
    if rows <= most:
        return max(rows, 1)
    even = math.ceil(rows / math.ceil(rows / most))
    return math.ceil(even / ROWS_MULTIPLE) * ROWS_MULTIPLE


def cut(index: Tensor | None, rows: int, size: int) -> list[Rows]:
    """Chunks of `size` over the rows named by `index`, or over all of them for None."""
    if index is None:
        return [slice(start, min(start + size, rows)) for start in range(0, rows, size)]
    return list(index.split(size)) if index.numel() else []


def indices(live: Tensor, count: int | None = None) -> Tensor | None:
    """(n,) where `live` (N,) is True; None if everywhere. A known count spares GPUs the synchronization."""
    if count is None:
        index = live.nonzero()[:, 0]
    else:
        index = torch.nonzero_static(live, size=count)[:, 0]
    return None if index.numel() == live.numel() else index


def put(target: Tensor, rows: Rows, values: Tensor) -> None:
    """target[rows] = values, cast to the target's dtype."""
    if isinstance(rows, slice):
        target[rows].copy_(values)
    else:
        target.index_copy_(0, rows, values.to(target.dtype))
