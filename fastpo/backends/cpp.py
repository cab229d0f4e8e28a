"""The CPU backend: the row primitives in C++ (csrc/), vectorised and threaded over rows.

A thin layer over `torch.ops.fastpo.cpp_*`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastpo import _extension
from fastpo.backends.base import (
    KeptGrads,
    KeptRows,
    ObjectiveParams,
    RowDetails,
    RowInputs,
    RowLosses,
    RowStats,
    overwrites,
    split_temperature,
    written,
)
from fastpo.objective import Objective

ops = torch.ops.fastpo


def unavailable(device: torch.device | None = None) -> str | None:
    """None if the extension is built and `device` is a CPU, else one line: why, and what helps."""
    if device is not None and torch.device(device).type != "cpu":
        return f"it runs on CPU tensors, got {device}; use backend='triton' or 'torch' there"
    return _extension.load_error()


def row_stats(
    logits: Tensor, tokens: Tensor, temperature: float | Tensor, mask: Tensor | None = None
) -> RowStats:
    """See `fastpo.backends.base.Backend`."""
    return RowStats(*ops.cpp_row_stats(logits, tokens, *split_temperature(temperature), mask))


def row_details(
    logits: Tensor, tokens: Tensor, temperature: float | Tensor, mask: Tensor | None = None
) -> tuple[RowStats, RowDetails]:
    """See `fastpo.backends.base.Backend`."""
    results = ops.cpp_row_details(logits, tokens, *split_temperature(temperature), mask)
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
    overwrites(logits, out)
    rows = (*stats, logprob_grad, entropy_grad)
    ops.cpp_row_grad(logits, tokens, *rows, *split_temperature(temperature), out)
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
    arguments = (logits, tokens, *inputs, params, *split_temperature(temperature), out)
    losses = RowLosses(*ops.cpp_row_policy_loss(*arguments))
    if out is not None:
        written(out)
    return losses


def kept_stats(rows: KeptRows, mask: Tensor | None = None) -> tuple[RowStats, Tensor]:
    """See `fastpo.backends.base.Backend`."""
    head = rows.head
    numbers = (rows.tokens, *rows.kept, *split_temperature(rows.temperature))
    *stats, logits = ops.cpp_kept_stats(
        rows.hidden, head.weight, head.bias, *numbers, head.gain, head.capped, mask
    )
    return RowStats(*stats), logits


def kept_grad(
    rows: KeptRows,
    stats: RowStats,
    logits: Tensor,
    logprob_grad: Tensor,
    entropy_grad: Tensor | None,
    grads: KeptGrads,
    add: bool = False,
) -> None:
    """See `fastpo.backends.base.Backend`."""
    head = rows.head
    numbers = (rows.tokens, *rows.kept, *split_temperature(rows.temperature))
    incoming = (logits, *stats, logprob_grad, entropy_grad)
    bias_grad = None if grads.bias is None else grads.bias[:, None]
    outs = (grads.hidden, grads.weight, bias_grad)
    ops.cpp_kept_grad(
        rows.hidden, head.weight, *numbers, head.gain, head.capped, *incoming, *outs, add
    )
    for grad in grads:
        if grad is not None:
            written(grad)


def scale_(grad: Tensor, factor: Tensor) -> None:
    """See `fastpo.backends.base.Backend`."""
    ops.cpp_scale_(grad, factor.float())
    written(grad)
