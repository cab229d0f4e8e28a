"""csrc/gae.h's CUDA block on CPU tensors: its threads are loops (gae_emulation.cpp)."""

from __future__ import annotations

import ctypes
import shutil
from pathlib import Path

import torch
from cluster_emulation import build
from torch import Tensor

SOURCE = Path(__file__).with_name("gae_emulation.cpp")
COMPILER = shutil.which("g++") or shutil.which("clang++")


class EmulatedGae:
    """What `torch.ops.fastpo.gae` does to CUDA tensors."""

    def __init__(self, folder: Path) -> None:
        self.library = build(COMPILER, folder, SOURCE)

    def __call__(
        self,
        rewards: Tensor,
        values: Tensor,
        mask: Tensor | None,
        offsets: Tensor,
        gamma: float,
        lam: float,
    ) -> Tensor:
        """rewards, values (N,) fp64, mask (N,) bool, offsets (B + 1,) int64; (N,) fp64."""
        advantages = torch.zeros_like(rewards)
        tensors = (rewards, values, mask, offsets, advantages)
        pointers = (ctypes.c_void_p * 5)(*(None if x is None else x.data_ptr() for x in tensors))
        sizes = (ctypes.c_int64(rewards.numel()), ctypes.c_int64(offsets.numel() - 1))
        self.library.emulate_gae(*sizes, pointers, ctypes.c_double(gamma), ctypes.c_double(lam))
        return advantages
