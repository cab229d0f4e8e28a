"""The row-resident CUDA backend: a row lies in the shared memory of a cluster of thread blocks.

A logit is read from memory once and its gradient is written once, for every vocabulary that fits
(about 900,000 2-byte logits on an H100). It is taken by name alone until it has been measured. A
thin layer over `torch.ops.fastpo.cuda_*` (csrc/row_cluster.cu).

It has no `row_details` and no gathered rows of a head: an op that is asked for them refuses in one
line. Metrics are summed by plain torch, in some sixty launches where backend "triton" has one, and
kept sets of logits are gathered by it, as for every backend.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastpo import _extension
from fastpo.backends.base import (
    ObjectiveParams,
    RowInputs,
    RowLosses,
    RowStats,
    overwrites,
    split_temperature,
    written,
)
from fastpo.objective import Objective

ops = torch.ops.fastpo
LEAST_CAPABILITY = (9, 0)  # the first with clusters of thread blocks


def unavailable(device: torch.device | None = None) -> str | None:
    """None if the kernels can run on `device`, else one line: why not, and what would help."""
    if device is not None and torch.device(device).type != "cuda":
        return f"it runs on CUDA tensors, got {device}; use backend='cpp' or 'torch' there"
    if torch.version.hip is not None:
        return "it is CUDA code and this torch is a ROCm build; use backend='triton'"
    if not torch.cuda.is_available():
        return "torch sees no GPU; it needs one of compute capability 9.0 or more"
    capability = torch.cuda.get_device_capability(device)
    if capability < LEAST_CAPABILITY:
        have = ".".join(map(str, capability))
        return f"it needs compute capability 9.0 or more, got {have}; use backend='triton'"
    if (reason := _extension.load_error()) is not None:
        return reason
    archs = _extension.build_info()["cuda_archs"]
    if not any(int("".join(filter(str.isdigit, arch))) >= 90 for arch in archs):
        have = ", ".join(archs) or "no CUDA code, for want of nvcc or of a CUDA build of torch"
        return f"the extension holds {have}; rebuild it with nvcc and TORCH_CUDA_ARCH_LIST=9.0+PTX"
    return None


def row_stats(
    logits: Tensor, tokens: Tensor, temperature: float | Tensor, mask: Tensor | None = None
) -> RowStats:
    """See `fastpo.backends.base.Backend`."""
    rows = _contiguous(tokens), *split_temperature(temperature), _contiguous(mask)
    return RowStats(*ops.cuda_row_stats(logits, *rows))


def row_grad(
    logits: Tensor,
    tokens: Tensor,
    stats: RowStats,
    logprob_grad: Tensor,
    entropy_grad: Tensor | None,
    temperature: float | Tensor,
    out: Tensor,
) -> None:
    """See `fastpo.backends.base.Backend`."""
    overwrites(logits, out)
    rows = map(_contiguous, (tokens, *stats, logprob_grad, entropy_grad))
    ops.cuda_row_grad(logits, *rows, *split_temperature(temperature), out)
    written(out)


def row_policy_loss(
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
    params = ObjectiveParams.from_objective(objective)
    rows = map(_contiguous, (tokens, *inputs))
    losses = ops.cuda_row_policy_loss(logits, *rows, params, *split_temperature(temperature), out)
    if out is not None:
        written(out)
    return RowLosses(*losses)


def scale_(grad: Tensor, factor: Tensor) -> None:
    """See `fastpo.backends.base.Backend`."""
    ops.cuda_scale_(grad, factor.float())
    written(grad)


def _contiguous(rows: Tensor | None) -> Tensor | None:
    """The kernels read neighbouring elements."""
    return None if rows is None else rows.contiguous()
