"""The Triton backend: the row primitives on CUDA and ROCm, and on CPU under Triton's interpreter.

A thin layer over `torch.ops.fastpo.triton_*`, which launch the kernels in kernels/. A gradient that
shares the logits' storage goes through the operators whose schema says that the logits are
overwritten.
"""

from __future__ import annotations

import importlib

import torch
from torch import Tensor

from fastpo.backends.base import RowDetails, RowInputs, RowLosses, RowStats, Rule, overwrites
from fastpo.objective import Objective

ops = torch.ops.fastpo


def unavailable(device: torch.device | None = None) -> str | None:
    """None if Triton can run on `device`, else one line: why not, and what would help."""
    kind = "cuda" if device is None else torch.device(device).type
    if kind not in ("cpu", "cuda"):
        return f"it runs on CUDA and ROCm tensors, got {device}; use backend='torch' there"
    if kind == "cuda" and not torch.cuda.is_available():
        return "torch sees no GPU; it needs one that CUDA or ROCm serves"
    try:
        triton = importlib.import_module("triton")
    except ImportError as error:
        return f"triton does not import ({error}); on Linux, `pip install triton`"
    # Triton decides at import whether its functions are compiled or interpreted.
    if kind == "cpu" and isinstance(triton.language.sum, triton.JITFunction):
        return "on CPU it only runs under Triton's interpreter: set TRITON_INTERPRET=1 at start"
    importlib.import_module("fastpo.backends._triton_ops")
    return None


def row_stats(
    logits: Tensor, tokens: Tensor, temperature: float | Tensor, live: Tensor | None = None
) -> RowStats:
    """See `fastpo.backends.base.Backend`."""
    tokens, live = _contiguous(tokens, live)
    return RowStats(*ops.triton_row_stats(logits, tokens, *_temperature(temperature), live))


def row_details(
    logits: Tensor, tokens: Tensor, temperature: float | Tensor, live: Tensor | None = None
) -> tuple[RowStats, RowDetails]:
    """See `fastpo.backends.base.Backend`."""
    tokens, live = _contiguous(tokens, live)
    results = ops.triton_row_details(logits, tokens, *_temperature(temperature), live)
    return RowStats(*results[:4]), RowDetails(*results[4:])


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
    rows = (tokens, stats.row_max, stats.log_sum, stats.entropy, logprob_grad, entropy_grad)
    arguments = (logits, *_contiguous(*rows), *_temperature(temperature))
    if overwrites(logits, out):
        ops.triton_row_grad_(*arguments, out.dtype)
    else:
        ops.triton_row_grad_out(*arguments, out)


def row_policy_loss(
    logits: Tensor,
    tokens: Tensor,
    inputs: RowInputs,
    objective: Objective,
    temperature: float | Tensor,
    out: Tensor | None,
) -> RowLosses:
    """See `fastpo.backends.base.Backend`."""
    rule = [float(number) for number in Rule.of(objective)]
    arguments = (logits, *_contiguous(tokens, *inputs), rule, *_temperature(temperature))
    if out is None:
        return RowLosses(*ops.triton_row_policy_loss(*arguments))
    if overwrites(logits, out):
        return RowLosses(*ops.triton_row_policy_loss_(*arguments, out.dtype))
    return RowLosses(*ops.triton_row_policy_loss_out(*arguments, out))


def scale_(grad: Tensor, factor: Tensor) -> None:
    """See `fastpo.backends.base.Backend`."""
    ops.triton_scale_(grad, factor)


def _contiguous(*rows: Tensor | None) -> tuple[Tensor | None, ...]:
    """The kernels read neighbouring elements: another stride would be a silent wild read."""
    return tuple(None if x is None else x.contiguous() for x in rows)


def _temperature(temperature: float | Tensor) -> tuple[float, Tensor | None]:
    if isinstance(temperature, Tensor):
        return 1.0, temperature.contiguous()
    return float(temperature), None
