"""The Triton backend: the row primitives on CUDA and ROCm, and on CPU under Triton's interpreter.

A thin layer over the launchers in kernels/. Only a compiler is shown operators, those of
`_triton_ops`; an eager call launches.
"""

from __future__ import annotations

import importlib

import torch
from torch import Tensor

from fastpo import kernels  # a package: its modules, which need triton, come with _triton_ops
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
from fastpo.backends.metrics import MetricInputs
from fastpo.objective import KL_ESTIMATORS, Objective
from fastpo.rule import RuleObjective

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
    logits: Tensor, tokens: Tensor, temperature: float | Tensor, mask: Tensor | None = None
) -> RowStats:
    """See `fastpo.backends.base.Backend`."""
    tokens, mask = _contiguous(tokens, mask)
    arguments = (logits, tokens, *split_temperature(temperature), mask)
    if torch.compiler.is_compiling():
        return RowStats(*ops.triton_row_stats(*arguments))
    return RowStats(*kernels.row_stats.row_stats(*arguments))


def row_details(
    logits: Tensor, tokens: Tensor, temperature: float | Tensor, mask: Tensor | None = None
) -> tuple[RowStats, RowDetails]:
    """See `fastpo.backends.base.Backend`."""
    tokens, mask = _contiguous(tokens, mask)
    arguments = (logits, tokens, *split_temperature(temperature), mask)
    if torch.compiler.is_compiling():
        results = ops.triton_row_details(*arguments)
    else:
        results = kernels.row_stats.row_stats(*arguments, details=True)
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
    arguments = (logits, *_contiguous(*rows), *split_temperature(temperature), out)
    overwrites(logits, out)
    if torch.compiler.is_compiling():
        ops.triton_row_grad_out(*arguments)
    else:
        kernels.row_grad.row_grad(*arguments)
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
    tokens, *inputs = _contiguous(tokens, *inputs)
    arguments = (logits, tokens, inputs, *split_temperature(temperature), out)
    params = ObjectiveParams.from_objective(objective)
    losses = RowLosses(*kernels.row_policy_loss.row_policy_loss(*arguments, params))
    if out is not None:
        written(out)
    return losses


def kept_stats(rows: KeptRows, mask: Tensor | None = None) -> tuple[RowStats, Tensor]:
    """See `fastpo.backends.base.Backend`."""
    head = rows.head
    numbers = _contiguous(head.bias, rows.tokens, *rows.kept)
    settings = (*split_temperature(rows.temperature), head.gain, head.capped)
    arguments = (rows.hidden, head.weight, *numbers, *settings, *_contiguous(mask))
    stats, logits = kernels.kept_rows.kept_stats(*arguments)
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
    head, numbers = rows.head, _contiguous(rows.tokens, *rows.kept)
    settings = (*split_temperature(rows.temperature), head.gain, head.capped)
    incoming = (logits, _contiguous(*stats), *_contiguous(logprob_grad, entropy_grad))
    arguments = (rows.hidden, head.weight, *numbers, *settings, *incoming, *grads, add)
    kernels.kept_rows.kept_grad(*arguments)
    for grad in grads:
        if grad is not None:
            written(grad)


def scale_(grad: Tensor, factor: Tensor) -> None:
    """See `fastpo.backends.base.Backend`."""
    kernels.scale.scale_(grad, factor)
    written(grad)


def metric_sums(inputs: MetricInputs, objective: Objective | RuleObjective) -> Tensor:
    """See `fastpo.backends.metrics`."""
    estimator = objective.kl_estimator.rstrip("+")  # which concerns the gradient alone
    return kernels.metrics.metric_sums(
        *_contiguous(*inputs),
        kl=1 + KL_ESTIMATORS.index(estimator),
        kl_ratio_weighted=objective.kl_ratio_weighted,
    )


def _contiguous(*rows: Tensor | None) -> tuple[Tensor | None, ...]:
    """The kernels read neighbouring elements: another stride would be a silent wild read."""
    return tuple(None if x is None else x.contiguous() for x in rows)
