"""The logits GEMM of a fused head, which stores exponentials: E = bf16(exp(u - o)), and row sums.

A row's offset o is its sampled token's own u, known beforehand (exp_targets.py). bf16 has the
exponents of fp32, so any row whose S = sum_j E_j stays below e^60 keeps full relative precision
without a row maximum; the few others are listed on device (exp_sums.py) and come here again, first
for their maxima, then with o = the maximum. What follows from E and the sums: _exp_rows.py.

Tiles are taken by persistent programs. The sums of a row are one fp32 number per tile of columns,
to be added up in a fixed order: no atomics, and bits that do not depend on n or on the programs.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ._exp_rows import LOWEST, head_output
from ._exp_tiles import ExpTile, on_device, processors

_PER_ROW = ["slopes_ptr", "shifts_ptr", "partials_ptr", "rows_ptr", "count_ptr"]


@triton.jit
def _tile_corner(index, tiles_m, tiles_n, M: tl.constexpr, N: tl.constexpr, GROUP: tl.constexpr):
    """First row and column of a tile: GROUP tiles of rows pass over a tile of columns together."""
    first = index // (GROUP * tiles_n) * GROUP
    inside = index % (GROUP * tiles_n)
    rows = tl.minimum(tiles_m - first, GROUP)
    return (first + inside % rows) * M, inside // rows * N


@triton.jit
def _product(
    hidden, weight, row, present, column, top, left, V, D, strides,
    M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """hidden[row] @ weight[column].T in fp32, (M, N)."""
    hidden_stride, weight_stride = strides
    product = tl.zeros((M, N), tl.float32)
    for k in range(0, tl.cdiv(D, K)):
        if TMA:
            h, w = hidden.load([top, k * K]), weight.load([left, k * K])
        else:
            depth = k * K + tl.arange(0, K)[None, :]
            h_at = hidden + row.to(tl.int64)[:, None] * hidden_stride + depth
            w_at = weight + column.to(tl.int64)[:, None] * weight_stride + depth
            h = tl.load(h_at, mask=present[:, None] & (depth < D), other=0.0)
            w = tl.load(w_at, mask=(column[:, None] < V) & (depth < D), other=0.0)
        product = tl.dot(h, w.T, product)
    return product


@triton.jit(do_not_specialize=["n"], do_not_specialize_on_alignment=_PER_ROW)
def _exp_logits_kernel(
    hidden,  # (n, D), a descriptor if TMA, else a pointer; so are weight and out
    weight,  # (V, D)
    out,  # (n, V) or None
    bias_ptr,  # (V,) or None
    slopes_ptr,  # (n,)
    shifts_ptr,  # (n,)
    partials_ptr,  # (2, tiles of columns, n): sums of E, and of E (u - o); or maxima of u
    rows_ptr,  # (n,) or None: only the first count[0] of these rows
    count_ptr,  # (1,) or None
    n,
    V,
    D,
    hidden_stride,
    weight_stride,
    out_stride,
    inner,
    M: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    PARTS: tl.constexpr,
    TMA: tl.constexpr,
    FLATTEN: tl.constexpr,
    GROUP: tl.constexpr,
    PROGRAMS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    TANH_GRADIENT: tl.constexpr,  # E_j carries 1 - tanh^2
    WHOLE_TILES: tl.constexpr,  # V is a multiple of N
    MAXIMA: tl.constexpr,
):
    LISTED: tl.constexpr = rows_ptr is not None
    height = tl.load(count_ptr) if LISTED else n
    tiles_m, tiles_n = tl.cdiv(height, M), tl.cdiv(V, N)
    for index in tl.range(tl.program_id(0), tiles_m * tiles_n, PROGRAMS, flatten=FLATTEN):
        top, left = _tile_corner(index, tiles_m, tiles_n, M, N, GROUP)
        row, column = top + tl.arange(0, M), left + tl.arange(0, N)
        present = row < height
        if LISTED:
            row = tl.load(rows_ptr + row, mask=present, other=0)
        product = _product(
            hidden, weight, row, present, column, top, left, V, D,
            (hidden_stride, weight_stride), M, N, K, TMA,
        )  # fmt: skip
        slope = tl.load(slopes_ptr + row, mask=present, other=0.0)[:, None]
        shift = tl.load(shifts_ptr + row, mask=present, other=0.0)[:, None]
        total = tl.zeros((M,), tl.float32)
        moment = tl.full((M,), float("-inf") if MAXIMA else 0.0, tl.float32)
        if PARTS == 2:
            parts = tl.split(tl.permute(tl.reshape(product, (M, 2, N // 2)), (0, 2, 1)))
        else:
            parts = (product,)
        for part in tl.static_range(PARTS):
            start = left + part * (N // PARTS)
            column = start + tl.arange(0, N // PARTS)[None, :]
            z = head_output(parts[part], column, bias_ptr, V, inner, HAS_SOFTCAP)
            if MAXIMA:
                u = tl.where(column < V, z * slope, float("-inf"))
                moment = tl.maximum(moment, tl.max(u, 1))
            else:
                y = tl.fma(z, slope, -shift)
                e = tl.exp2(y)
                if not WHOLE_TILES:
                    e = tl.where(column < V, e, 0.0)
                if bias_ptr is not None:  # one of -inf
                    y = tl.maximum(y, LOWEST, propagate_nan=tl.PropagateNan.ALL)
                total += tl.sum(e, 1)
                moment += tl.sum(e * y, 1)
                if TANH_GRADIENT:
                    e *= 1.0 - z * z
                if out is not None:
                    if TMA:
                        out.store([top, start], e.to(tl.bfloat16))
                    else:
                        at = out + row.to(tl.int64)[:, None] * out_stride + column
                        visible = present[:, None] & (column < V)
                        tl.store(at, e.to(tl.bfloat16), mask=visible)
        at = partials_ptr + (left // N).to(tl.int64) * n + row
        if MAXIMA:
            tl.store(at, moment, mask=present)
        else:
            tl.store(at, total, mask=present)
            tl.store(at + tiles_n.to(tl.int64) * n, moment, mask=present)


def exp_logits(
    hidden: Tensor,
    weight: Tensor,
    out: Tensor | None,
    bias: Tensor | None,
    slopes: Tensor,
    shifts: Tensor,
    partials: Tensor,
    tile: ExpTile,
    *,
    rows: Tensor | None = None,
    count: Tensor | None = None,
    inner: float = 0.0,
    softcap: bool = False,
    tanh_gradient: bool = False,
    maxima: bool = False,
) -> None:
    """Fill `out` with E and `partials` (2, tile.tiles(V), n) fp32 with sums, per tile of columns.

    With y = fma(z, slope, -shift) and z the product plus bias (with a softcap its tanh): E =
    exp2(y), times 1 - z^2 if `tanh_gradient`; sums of exp2(y) and of exp2(y) y. If `maxima`: only
    partials[0], the largest z * slope. With `rows` (n,) int32 and `count` (1,) int32: only the rows
    rows[: count[0]], a number that only the device knows.

    hidden (n, D), weight (V, D), bias (V,) and out (n, V) are bf16 with unit stride in rows (out:
    rows of 16 bytes if tile.TMA); slopes and shifts (n,) fp32, shift = +inf on masked rows, whose
    hidden states must be finite. inner = 2 log2(e) gain, used with a softcap alone.
    """
    (n, D), V = hidden.shape, weight.shape[0]
    if n == 0:
        return
    operands = (hidden, weight, out)
    if tile.TMA:
        operands = _descriptors(operands, tile)
    constants = tile._asdict()
    programs = constants.pop("PER_SM") * processors(hidden.device)
    with on_device(hidden):
        _exp_logits_kernel[(programs,)](
            *operands,
            bias,
            slopes,
            shifts,
            partials,
            rows,
            count,
            n,
            V,
            D,
            hidden.stride(0),
            weight.stride(0),
            0 if out is None else out.stride(0),
            inner,
            **constants,
            PROGRAMS=programs,
            HAS_SOFTCAP=softcap,
            TANH_GRADIENT=tanh_gradient,
            WHOLE_TILES=V % tile.N == 0,
            MAXIMA=maxima,
            # Which multiplications and additions fuse must not depend on the flags above: bits.
            enable_fp_fusion=False,
        )


def _descriptors(operands: tuple[Tensor, Tensor, Tensor | None], tile: ExpTile) -> tuple:
    from triton.tools.tensor_descriptor import TensorDescriptor  # Triton 3.4

    blocks = ([tile.M, tile.K], [tile.N, tile.K], [tile.M, tile.N // tile.PARTS])
    return tuple(
        None if x is None else TensorDescriptor.from_tensor(x, block)
        for x, block in zip(operands, blocks, strict=True)
    )
