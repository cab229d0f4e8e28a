"""How a row of V logits is cut into waves, and the launch of one program per row.

A *wave* is one load by every lane: LANES x WIDTH columns. A row is a *body*, walked
STEP waves at a time, and a *kept* tail of KEPT waves. The tail, read last by the first sweep, stays
in registers until the second sweep, which runs from the last column to the first: it is read once.

Registers decide how much is kept: 512 threads leave 128 each, so one row's program fills an SM
(figures from ahead-of-time compilation for five targets under two Tritons, `make aot-all`):

    logits                  kept per thread     why
    2 bytes, 16-byte loads  96, two a register  128 registers with every option; V <= 49,152 whole
      on AMD                64                  215 of 256 with Triton 3.6, which spills 12 at 80
    4 bytes, 16-byte loads  64                  128 registers; V <= 32,768 whole
      on AMD                48                  64 leave 9 of 256
    not aligned             24                  one register and one address each; 64 registers

The first sweep adds a tail up in pieces of 16 columns a thread. In pieces of 32, as the body's
blocks are, the exponentials beside the tail made these layouts spill 8 to 16 bytes: 48 of 4 bytes,
8 waves (V = 16,384, sm_80 and sm_90); 64 of 2 bytes with a gate and every option (V = 32,000,
sm_100); 24 not aligned, likewise (sm_90). Shorter rows take fewer threads, several rows to an SM;
they may use 255 registers, so 64 columns of either width are kept.

What one row touches between a first and a second read (fastpo/testing/traffic.py counts it), times
132 SMs, must fit the 50 MB of L2 of an H100 for the second read to cost no DRAM traffic: in place
in bf16 it is 39 MB at V = 151,936 and 68 MB at V = 262,144.
"""

from __future__ import annotations

import contextlib
import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

MAX_LANES = 512


class RowLayout(NamedTuple):
    """Constants of a compiled row kernel; they depend on V's size class and on alignment only."""

    LANES: int  # threads, each with running statistics of its own columns
    WIDTH: int  # columns of a lane in a wave
    ADJACENT: bool  # whether they are neighbours, one 16-byte load, or LANES apart
    STEP: int  # waves per step in the body
    KEPT: int  # waves in the kept tail

    def body(self, V: int) -> int:
        """Columns before the kept tail, whose last wave alone may reach beyond V."""
        wave = self.LANES * self.WIDTH
        return (-(-V // wave) - self.KEPT) * wave

    def with_tail(self, V: int, most: int) -> RowLayout:
        """The same with as many waves kept, up to `most`, as leave whole steps before them.

        A tail of a fixed size would leave whole waves beyond V, 8 % of the row's slots at
        V = 151,936 and more at 50,257, to be masked and computed for nothing.
        """
        waves = -(-V // (self.LANES * self.WIDTH))
        return self._replace(KEPT=min(waves, most - (most - waves) % self.STEP))


@functools.cache
def _layout(V: int, itemsize: int, aligned: bool, amd: bool) -> RowLayout:
    packed = aligned and itemsize == 2
    whole = 64 if aligned else 24
    lanes = 128
    while lanes < MAX_LANES and lanes * whole < V:
        lanes *= 2
    most = whole
    if aligned and lanes == MAX_LANES:
        most = (64 if amd else 96) if packed else (48 if amd else 64)
    width = 16 // itemsize if aligned else 4
    step = (32 if packed else 16) // width
    layout = RowLayout(LANES=lanes, WIDTH=width, ADJACENT=aligned, STEP=step, KEPT=1)
    return layout.with_tail(V, most // width)


def row_stride(matrix: Tensor) -> int:
    """Elements from one row to the next; a lone row's stride is arbitrary and not used."""
    return matrix.stride(0) if matrix.shape[0] > 1 else matrix.shape[1]


def row_layout(logits: Tensor) -> RowLayout:
    """The layout for (N, V) logits.

    16-byte loads need V, the row stride and the address to be multiples of 16. Rows that are not
    aligned take narrow loads; shifting each row to its next 16-byte boundary would tie the order of
    its sums, and so its bits, to its place in memory.
    """
    V = logits.shape[1]
    aligned = V % 16 == 0 and row_stride(logits) % 16 == 0 and logits.data_ptr() % 16 == 0
    target = _target()
    return _layout(
        V, logits.element_size(), aligned, target is not None and target.backend == "hip"
    )


def _target():
    """What Triton compiles for: `backend`, `warp_size`; None under its interpreter."""
    if not isinstance(tl.sum, triton.JITFunction):
        return None
    return triton.runtime.driver.active.get_current_target()


def _warp_size() -> int:
    """Threads of a warp: 64 on AMD's CDNA, 32 elsewhere; the interpreter has none."""
    target = _target()
    return 32 if target is None else target.warp_size


def launch_rows(
    kernel,
    logits: Tensor,
    layout: RowLayout,
    *arguments,
    programs: int | None = None,
    **constants,
) -> None:
    """Run `kernel` on the device of `logits`, by default one program per row; none for no rows.

    Fused multiply-adds that the source does not ask for stay off: which ones a compiler forms may
    differ between kernels, and with them the last bit of a log-prob.
    """
    programs = logits.shape[0] if programs is None else programs
    if programs == 0:
        return
    device = torch.cuda.device(logits.device) if logits.is_cuda else contextlib.nullcontext()
    with device:
        kernel[(programs,)](
            *arguments,
            **constants,
            num_warps=layout.LANES // _warp_size(),
            enable_fp_fusion=False,
        )


def shares_rows(logits: Tensor, out: Tensor) -> bool:
    """Whether a narrower `out` lies in the rows of `logits`: its stores must wait for loads."""
    return (
        out.element_size() < logits.element_size()
        and out.untyped_storage().data_ptr() == logits.untyped_storage().data_ptr()
    )
