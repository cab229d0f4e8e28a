"""csrc/row_cluster.h as a backend for CPU tensors: emulated, or sent to a GPU and back.

Emulated, the blocks, threads and merges of a cluster are loops (row_cluster_emulation.cpp).
"""

from __future__ import annotations

import ctypes
import subprocess
from pathlib import Path

import torch
from torch import Tensor

from fastpo.backends.base import (
    ObjectiveParams,
    RowInputs,
    RowLosses,
    RowStats,
    alias_rows,
    overwrites,
)
from fastpo.objective import Objective

SOURCE = Path(__file__).with_name("row_cluster_emulation.cpp")
FLAGS = ["-std=c++17", "-O2", "-shared", "-fPIC", "-fno-strict-aliasing", "-ffp-contract=off"]
WARNINGS = ["-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-Wno-unused-parameter"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]  # in the order of DType
H100_BYTES = 227 * 1024 - 1024  # of a slice, at most


def build(compiler: str, folder: Path, source: Path = SOURCE) -> ctypes.CDLL:
    """The compiled emulation."""
    library = folder / f"{source.stem}.so"
    subprocess.run([compiler, *FLAGS, *WARNINGS, str(source), "-o", str(library)], check=True)
    return ctypes.CDLL(str(library))


class EmulatedCluster:
    """The row primitives of `backend="cuda"`, on CPU tensors."""

    def __init__(self, library: ctypes.CDLL, most_bytes: int = H100_BYTES) -> None:
        self.library = library
        self.most_bytes = most_bytes  # of a slice: fewer make short rows span more blocks
        self.blocks = 0  # of the last call's clusters

    def row_stats(self, logits, tokens, temperature, mask=None) -> RowStats:
        """See `fastpo.backends.base.Backend`."""
        stats = RowStats(*(torch.empty(len(logits)) for _ in range(4)))
        value, temperatures = _temperature(temperature)
        tensors = [logits, tokens, temperatures, mask, *stats]
        self._run("emulate_row_stats", logits, logits, tensors, value)
        return stats

    def row_grad(self, logits, tokens, stats, logprob_grad, entropy_grad, temperature, out) -> None:
        """See `fastpo.backends.base.Backend`."""
        overwrites(logits, out)
        value, temperatures = _temperature(temperature)
        tensors = [logits, tokens, temperatures, *stats, logprob_grad, entropy_grad, out]
        self._run("emulate_row_grad", logits, out, tensors, value)

    def row_policy_loss(
        self,
        logits: Tensor,
        tokens: Tensor,
        inputs: RowInputs,
        objective: Objective,
        temperature: float | Tensor,
        out: Tensor | None,
    ) -> RowLosses:
        """See `fastpo.backends.base.Backend`."""
        if out is not None:
            overwrites(logits, out)
        dtypes = [*[torch.float32] * 3, torch.uint8]
        losses = RowLosses(*(torch.empty(len(logits), dtype=dtype) for dtype in dtypes))
        value, temperatures = _temperature(temperature)
        tensors = [logits, tokens, temperatures, *inputs, out, *losses]
        params = (ctypes.c_double * 19)(*ObjectiveParams.from_objective(objective))
        place = logits if out is None else out
        self._run("emulate_row_policy_loss", logits, place, tensors, value, params)
        return losses

    def scale_(self, grad: Tensor, factor: Tensor) -> None:
        """See `fastpo.backends.base.Backend`."""
        pointer = ctypes.c_void_p(grad.data_ptr())
        self.library.emulate_scale(self._shape(grad, grad), pointer, ctypes.c_float(float(factor)))

    def _shape(self, logits: Tensor, out: Tensor) -> ctypes.Array:
        numbers = [*logits.shape, self.most_bytes]
        for rows in (logits, out):
            numbers += [DTYPES.index(rows.dtype), rows.stride(0)]
        return (ctypes.c_int64 * 7)(*numbers)

    def _run(self, name, logits, out, tensors, temperature, *rest) -> None:
        pointers = (ctypes.c_void_p * len(tensors))(
            *(None if x is None else x.data_ptr() for x in tensors)
        )
        call = getattr(self.library, name)
        shape = self._shape(logits, out)
        self.blocks = call(shape, pointers, ctypes.c_double(temperature), *rest)
        if self.blocks == 0:
            raise ValueError(f"no cluster holds rows of {logits.shape[1]} {logits.dtype} logits")


class ClusterOnGpu:
    """`fastpo.backends.cuda` on copies of CPU tensors that lie as they do: strides and offsets."""

    def __init__(self) -> None:
        from fastpo.backends import cuda

        self.backend = cuda

    def row_stats(self, logits, tokens, temperature, mask=None) -> RowStats:
        """See `fastpo.backends.base.Backend`."""
        sent = [_sent(x) for x in (logits, tokens, temperature, mask)]
        return RowStats(*(x.cpu() for x in self.backend.row_stats(*sent)))

    def row_grad(self, logits, tokens, stats, logprob_grad, entropy_grad, temperature, out) -> None:
        """See `fastpo.backends.base.Backend`."""
        logits, place = _sent_with_place(logits, out)
        stats = RowStats(*map(_sent, stats))
        rest = [_sent(x) for x in (logprob_grad, entropy_grad, temperature)]
        self.backend.row_grad(logits, _sent(tokens), stats, *rest, place)
        out.copy_(place)

    def row_policy_loss(self, logits, tokens, inputs, objective, temperature, out) -> RowLosses:
        """See `fastpo.backends.base.Backend`."""
        logits, place = _sent_with_place(logits, out)
        arguments = (_sent(tokens), inputs.map(_sent), objective, _sent(temperature))
        losses = self.backend.row_policy_loss(logits, *arguments, place)
        if out is not None:
            out.copy_(place)
        return RowLosses(*(x.cpu() for x in losses))

    def scale_(self, grad: Tensor, factor: Tensor) -> None:
        """See `fastpo.backends.base.Backend`."""
        place = _sent(grad)
        self.backend.scale_(place, _sent(factor))
        grad.copy_(place)


def _sent(x):
    if not isinstance(x, Tensor):
        return x
    memory = torch.empty(0, dtype=x.dtype).set_(x.untyped_storage())
    return memory.cuda().as_strided(x.shape, x.stride(), x.storage_offset())


def _sent_with_place(logits: Tensor, out: Tensor | None) -> tuple[Tensor, Tensor | None]:
    shares = out is not None and overwrites(logits, out)
    logits = _sent(logits)
    return logits, alias_rows(logits, out.dtype) if shares else _sent(out)


def _temperature(temperature: float | Tensor) -> tuple[float, Tensor | None]:
    return (1.0, temperature) if isinstance(temperature, Tensor) else (temperature, None)
