"""Partial results of `exp_logits` over tiles -> numbers of rows, and the rows to redo."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ._exp_tiles import on_device

LARGEST_SUM = 1.1420073898156842e26  # e^60: c h / S is still a normal number in bf16
_ROWS, _TILES = 64, 32


@triton.jit(do_not_specialize=["n", "tiles"], do_not_specialize_on_alignment=["totals_ptr"])
def _exp_sums_kernel(
    partials_ptr,  # (2, tiles, n)
    totals_ptr,  # (2, n)
    n,
    tiles,
    MAXIMA: tl.constexpr,
    ROWS: tl.constexpr,
    TILES: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    which = tl.program_id(1).to(tl.int64)
    empty = float("-inf") if MAXIMA else 0.0
    result = tl.full((ROWS,), empty, tl.float32)
    for start in range(0, tiles, TILES):
        tile = start + tl.arange(0, TILES)[:, None]
        at = partials_ptr + (which * tiles + tile) * n + row[None, :]
        block = tl.load(at, mask=(tile < tiles) & (row < n)[None, :], other=empty)
        if MAXIMA:
            result = tl.maximum(result, tl.max(block, 0))
        else:
            result += tl.sum(block, 0)
    tl.store(totals_ptr + which * n + row, result, mask=row < n)


def exp_sums(partials: Tensor, totals: Tensor, *, maxima: bool = False) -> None:
    """partials (2, tiles, n) -> totals (2, n), added up over tiles in a fixed order.

    If `maxima`: the largest of partials[0], into totals (1, n).
    """
    kinds, tiles, n = partials.shape
    if n == 0:
        return
    grid = (triton.cdiv(n, _ROWS), 1 if maxima else kinds)
    with on_device(partials):
        _exp_sums_kernel[grid](
            partials, totals, n, tiles, MAXIMA=maxima, ROWS=_ROWS, TILES=_TILES, num_warps=4
        )


@triton.jit(
    do_not_specialize=["n"],
    do_not_specialize_on_alignment=["totals_ptr", "shifts_ptr", "wild_ptr", "rows_ptr"],
)
def _wild_rows_kernel(
    totals_ptr,  # (2, n)
    shifts_ptr,  # (n,)
    wild_ptr,  # (n,) bool
    rows_ptr,  # (n,) int32
    count_ptr,  # (1,) int32, 0 before
    n,
    largest,
    ROWS: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    total = tl.load(totals_ptr + row, mask=row < n, other=0.0)
    shift = tl.load(shifts_ptr + row, mask=row < n, other=float("inf"))
    tame = total <= largest  # False for NaN
    wild = (tame == 0) & (shift != float("inf"))
    tl.store(wild_ptr + row, wild, mask=row < n)
    # Programs append in any order: a redone row's numbers do not depend on its place in the list.
    number = wild.to(tl.int32)
    first = tl.atomic_add(count_ptr, tl.sum(number, 0))
    tl.store(rows_ptr + first + tl.cumsum(number, 0) - 1, row, mask=wild)


def wild_rows(totals: Tensor, shifts: Tensor, wild: Tensor, rows: Tensor, count: Tensor) -> None:
    """List the unmasked rows whose S is beyond e^60, or NaN, without a host sync.

    Where S is not, M is finite: |E (u - o)| is at most 60 e^60.

    totals (2, n) and shifts (n,) fp32; fills wild (n,) bool, the first count[0] of rows (n,) int32,
    and count (1,) int32, which must be 0.
    """
    n = shifts.shape[0]
    if n == 0:
        return
    with on_device(shifts):
        _wild_rows_kernel[(triton.cdiv(n, 128),)](
            totals, shifts, wild, rows, count, n, LARGEST_SUM, ROWS=128, num_warps=4
        )
