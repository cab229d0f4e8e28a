"""The CPU backend: the row primitives in C++ (csrc/), vectorised and threaded over rows.

A thin layer over `torch.ops.fastpo.cpp_*`. A gradient that shares the logits' storage goes through
the operators whose schema says that the logits are overwritten: torch.compile must know.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastpo import _extension
from fastpo.backends.base import RowDetails, RowInputs, RowLosses, RowStats, Rule, overwrites
from fastpo.objective import Objective

ops = torch.ops.fastpo


def unavailable(device: torch.device | None = None) -> str | None:
    """None if the extension is built and `device` is a CPU, else one line: why, and what helps."""
    if device is not None and torch.device(device).type != "cpu":
        return f"it runs on CPU tensors, got {device}; use backend='triton' or 'torch' there"
    return _extension.load_error()


def row_stats(
    logits: Tensor, tokens: Tensor, temperature: float | Tensor, live: Tensor | None = None
) -> RowStats:
    """See `fastpo.backends.base.Backend`."""
    return RowStats(*ops.cpp_row_stats(logits, tokens, *_temperature(temperature), live))


def row_details(
    logits: Tensor, tokens: Tensor, temperature: float | Tensor, live: Tensor | None = None
) -> tuple[RowStats, RowDetails]:
    """See `fastpo.backends.base.Backend`."""
    results = ops.cpp_row_details(logits, tokens, *_temperature(temperature), live)
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
    arguments = (logits, tokens, *stats, logprob_grad, entropy_grad, *_temperature(temperature))
    if overwrites(logits, out):
        ops.cpp_row_grad_(*arguments, out.dtype)
    else:
        ops.cpp_row_grad_out(*arguments, out)
    _written(out)


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
    arguments = (logits, tokens, *inputs, rule, *_temperature(temperature))
    if out is None:
        return RowLosses(*ops.cpp_row_policy_loss(*arguments))
    if overwrites(logits, out):
        losses = ops.cpp_row_policy_loss_(*arguments, out.dtype)
    else:
        losses = ops.cpp_row_policy_loss_out(*arguments, out)
    _written(out)
    return RowLosses(*losses)


def scale_(grad: Tensor, factor: Tensor) -> None:
    """See `fastpo.backends.base.Backend`."""
    ops.cpp_scale_(grad, factor.float())
    _written(grad)


def _temperature(temperature: float | Tensor) -> tuple[float, Tensor | None]:
    if isinstance(temperature, Tensor):
        return 1.0, temperature
    return float(temperature), None


def _written(tensor: Tensor) -> None:
    """Tell autograd, as torch's own in-place operators do: saved old values are gone."""
    if not (torch.compiler.is_compiling() or tensor.is_inference()):
        torch.autograd.graph.increment_version(tensor)
