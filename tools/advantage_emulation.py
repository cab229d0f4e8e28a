"""What the CUDA kernels of gae and group advantages do, on CPU tensors: their threads are loops."""

from __future__ import annotations

import ctypes
import shutil
from pathlib import Path

import torch
from cluster_emulation import build
from torch import Tensor

SOURCE = Path(__file__).with_name("advantage_emulation.cpp")
COMPILER = shutil.which("g++") or shutil.which("clang++")


class EmulatedAdvantages:
    """`torch.ops.fastpo.gae` and `group_advantages` as of CUDA tensors."""

    def __init__(self, folder: Path) -> None:
        self.library = build(COMPILER, folder, SOURCE)

    def gae(
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
        sizes = (rewards.numel(), offsets.numel() - 1)
        self._run("gae", sizes, (rewards, values, mask, offsets, advantages), gamma, lam)
        return advantages

    def group_advantages(
        self,
        rewards: Tensor,
        group_size: int,
        group_ids: Tensor | None,
        estimator: int,
        eps: float,
        lengths: Tensor | None,
        weights: Tensor | None = None,
        whiten: bool = False,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """rewards (B,) or (B, R); advantages (B,) fp32, informative (B,) bool, and their groups."""
        count, columns = len(rewards), rewards.numel() // max(len(rewards), 1)
        results = (
            torch.empty(count),
            torch.empty(count, dtype=torch.bool),
            torch.zeros((), dtype=torch.int64),
        )
        scratch = torch.empty(columns + 2, count, dtype=torch.float64)
        tensors = (rewards.double(), group_ids, lengths, weights, *results, scratch)
        sizes = (count, columns, group_size, estimator, whiten)
        self._run("group_advantages", sizes, tensors, eps)
        return results

    def _run(self, name: str, sizes: tuple, tensors: tuple, *numbers: float) -> None:
        pointers = [None if x is None else x.data_ptr() for x in tensors]
        call = getattr(self.library, f"emulate_{name}")
        call(
            (ctypes.c_int64 * len(sizes))(*sizes),
            (ctypes.c_void_p * len(pointers))(*pointers),
            *map(ctypes.c_double, numbers),
        )
