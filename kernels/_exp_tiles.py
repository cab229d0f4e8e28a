"""How `exp_logits` cuts E into tiles, per architecture and head, and what its launches share.

Registers under Triton 3.6 / 3.9, without spills (tests/test_exp_aot.py):

    sm_90     128 x 256 x 64, TMA        178 / 250   229,920 bytes of shared memory of 232,448
    sm_100    the same, 3 stages         172 / 188   4 stages in two parts spill 110
    a bias    128 x 128 x 64, TMA        134 / 134   a bias is 64 more registers: 128 x 256 spills
    others    128 x 128 x 64, pointers   247 / 229   128 x 256 spills 156 on sm_80
    ragged V  64 x 128 x 64, TMA          95 /  91   no multiple of 16 (50,257): a mask for each
              the same, pointers         181         column; 128 rows spill 6 to 53
    ragged D  64 x 64 x 32, pointers     159 / 155   loads of 2 bytes hold an address each: 128 x
                                                     128 spills 117 to 206, its redone rows 434

The larger a tile, the fewer bytes of L2 an operation takes: 48 bytes a clock and SM for 128 x 256,
64, which is all that an SM's port has, for 128 x 128. Which is fastest only a GPU can tell:
benchmarks/exp_logits_gpu.py measures.
"""

from __future__ import annotations

import contextlib
from typing import NamedTuple

import torch
import triton
from torch import Tensor

PAD_COLUMNS = 8
"""Rows of E start every multiple of this many: 16 bytes, as TMA and GEMMs of 2-byte data need."""


class ExpTile(NamedTuple):
    """Constants of a compiled `exp_logits`."""

    M: int  # rows
    N: int  # columns
    K: int  # depth per step
    PARTS: int  # of a tile's columns that leave through one staging buffer, one after the other
    TMA: bool  # operands and E by descriptors
    FLATTEN: bool  # one loop over tiles and depth: the next tile loads during an epilogue
    GROUP: int  # tiles of rows that pass over a tile of the weight while it is in L2
    num_warps: int
    num_stages: int
    PER_SM: int = 1  # persistent programs: two of 128 threads may share an SM

    def tiles(self, V: int) -> int:
        """Tiles along the vocabulary: each leaves one partial sum per row."""
        return -(-V // self.N)


_BY_POINTERS = ExpTile(128, 128, 64, 1, False, False, 16, 8, 3)
_RAGGED = ExpTile(64, 64, 32, 1, False, False, 16, 8, 2)
_NARROW = ExpTile(128, 128, 64, 1, True, True, 16, 8, 4)
_UNEVEN = _BY_POINTERS._replace(M=64)
_UNEVEN_BY_TMA = _NARROW._replace(M=64)
_BY_TMA = {  # by major compute capability
    9: ExpTile(128, 256, 64, 2, True, True, 16, 8, 4),
    10: ExpTile(128, 256, 64, 1, True, True, 16, 8, 3),
}


def exp_tile(hidden: Tensor, weight: Tensor, bias: Tensor | None, softcap: bool) -> ExpTile:
    """The tile for all rows of `hidden` (n, D) and a head of `weight` (V, D) on this device.

    It decides the order of a row's sums: one head has one tile, whatever its rows are for.
    """
    major = _capability() // 10
    if not _reads_wide(hidden, weight):
        return _RAGGED
    uneven = weight.shape[0] % 16 != 0  # masks differ between a thread's columns
    if major not in _BY_TMA:
        return _UNEVEN if uneven else _BY_POINTERS
    spills = bias is not None or (softcap and major == 10)
    return _UNEVEN_BY_TMA if uneven else _NARROW if spills else _BY_TMA[major]


def redo_tile(tile: ExpTile) -> ExpTile:
    """The tile for listed rows. They are gathered, so by pointers; of the width of `tile`, so that
    their sums have the same places; of fewer rows, for there are few, and 128 x 256 spills."""
    if tile == _RAGGED:
        return tile
    if tile in (_UNEVEN, _UNEVEN_BY_TMA):
        return _UNEVEN._replace(K=32)
    return _BY_POINTERS._replace(M=64 if tile.N > 128 else tile.M, N=tile.N)


def _reads_wide(*matrices: Tensor) -> bool:
    """Addresses and row strides of 32 bytes: those of which Triton makes 16-byte loads. TMA takes
    16, but the rows that are done again are read by pointers."""
    return all(x.data_ptr() % 16 == 0 and x.stride(0) % 16 == 0 for x in matrices)


def _capability() -> int:
    """80, 90, 100, ... of the device that kernels run on; the interpreter plays a Hopper."""
    if not isinstance(triton.language.sum, triton.JITFunction):
        return 90
    return triton.runtime.driver.active.get_current_target().arch


def processors(device: torch.device) -> int:
    """SMs of a GPU; a few where there is none."""
    if device.type != "cuda":
        return 4
    return torch.cuda.get_device_properties(device).multi_processor_count


def on_device(x: Tensor) -> contextlib.AbstractContextManager:
    """Triton launches on the current device, whatever its arguments are on."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()
