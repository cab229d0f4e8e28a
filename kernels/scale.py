"""Scaling a gradient by an upstream gradient that lives on the device, free where that is 1."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ._layout import launch_rows, row_layout, row_stride
from ._rows import block_columns, row_offset, store_block, without_subnormals


@triton.jit(do_not_specialize_on_alignment=["factor_ptr"])
def _scale_kernel(
    grad_ptr,  # (N, V)
    factor_ptr,  # ()
    grad_stride,
    V,
    BLOCK_V: tl.constexpr,
    LANES: tl.constexpr,
    VECTOR: tl.constexpr,
):
    factor = tl.load(factor_ptr).to(tl.float32)
    if factor != 1.0:
        row_ptr = grad_ptr + row_offset(grad_stride)
        for start in range(0, V, BLOCK_V):
            columns = block_columns(start, BLOCK_V, LANES, VECTOR)
            block = tl.load(row_ptr + columns, mask=columns < V, other=0.0)
            scaled = without_subnormals(block.to(tl.float32) * factor)
            store_block(row_ptr, columns, scaled, V)


def scale_(grad: Tensor, factor: Tensor) -> None:
    """grad (N, V) *= factor (0-d, same device); nothing is read or written where that is 1."""
    layout = row_layout(grad)
    launch_rows(
        _scale_kernel,
        grad,
        layout,
        grad,
        factor,
        row_stride(grad),
        grad.shape[1],
        BLOCK_V=layout.BLOCK_V,
        LANES=layout.LANES,
        VECTOR=layout.VECTOR,
    )
