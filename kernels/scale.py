"""Scaling a gradient by an upstream gradient that lives on the device, free where that is 1."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._layout import launch_rows, row_layout, row_stride
from ._rows import flushing_product, store_wave, wave_columns

PROGRAMS_PER_SM = 4  # 512 threads each: as many as an SM of 2,048 holds at once


@triton.jit(do_not_specialize=["rows"], do_not_specialize_on_alignment=["factor_ptr"])
def _scale_kernel(
    grad_ptr,  # (N, V)
    factor_ptr,  # ()
    grad_stride,
    rows,
    V,
    LAYOUT: tl.constexpr,
):
    STEP: tl.constexpr = LAYOUT.STEP
    WAVE: tl.constexpr = LAYOUT.LANES * LAYOUT.WIDTH
    factor = tl.load(factor_ptr).to(tl.float32)
    if factor != 1.0:
        for row in range(tl.program_id(0), rows, tl.num_programs(0)):
            row_ptr = grad_ptr + tl.full((), row, tl.int64) * grad_stride
            for start in range(0, V, STEP * WAVE):
                for i in tl.static_range(STEP):
                    columns = wave_columns(start + i * WAVE, LAYOUT)
                    wave = tl.load(row_ptr + columns, mask=columns < V, other=0.0)
                    scaled = flushing_product(wave.to(tl.float32), factor)
                    store_wave(row_ptr, columns, scaled, V)


def scale_(grad: Tensor, factor: Tensor) -> None:
    """grad (N, V) *= factor (0-d, same device); nothing is read or written where that is 1.

    The factor is 1 in almost every step, so the grid is what the device holds at once: a program
    for each of 8,192 rows would take 15 us to start and end for nothing.
    """
    layout, rows = row_layout(grad), grad.shape[0]
    launch_rows(
        _scale_kernel,
        grad,
        layout,
        grad,
        factor,
        row_stride(grad),
        rows,
        grad.shape[1],
        programs=min(rows, PROGRAMS_PER_SM * _multiprocessors(grad)),
        LAYOUT=layout._replace(KEPT=0),  # one binary whatever V leaves
    )


def _multiprocessors(tensor: Tensor) -> int:
    """SMs (or compute units) of the tensor's GPU; 1 for a tensor on the CPU."""
    if not tensor.is_cuda:
        return 1
    return torch.cuda.get_device_properties(tensor.device).multi_processor_count
