"""The Triton kernels as custom operators: `torch.ops.fastpo.triton_*`, opaque to torch.compile.

Where the gradient takes the logits' place, a variant whose name ends in an underscore declares that
the logits are overwritten; the plain variants declare that of `out`. The launchers' per-row outputs
are fresh tensors.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastpo.backends.base import Rule, alias_rows
from fastpo.kernels import row_grad, row_policy_loss, row_stats, scale

RowTensors = tuple[Tensor, Tensor, Tensor, Tensor]


@torch.library.custom_op("fastpo::triton_row_stats", mutates_args=())
def triton_row_stats(
    logits: Tensor,
    tokens: Tensor,
    temperature: float,
    temperatures: Tensor | None,
    live: Tensor | None,
) -> RowTensors:
    """(logprobs, entropy, row_max, log_sum)."""
    return row_stats.row_stats(logits, tokens, temperature, temperatures, live)


@torch.library.custom_op("fastpo::triton_row_details", mutates_args=())
def triton_row_details(
    logits: Tensor,
    tokens: Tensor,
    temperature: float,
    temperatures: Tensor | None,
    live: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(logprobs, entropy, row_max, log_sum, log_sum_sq_probs, mean_logits, is_top1)."""
    return row_stats.row_stats(logits, tokens, temperature, temperatures, live, details=True)


@torch.library.custom_op("fastpo::triton_row_grad_out", mutates_args=("out",))
def triton_row_grad_out(
    logits: Tensor,
    tokens: Tensor,
    row_max: Tensor,
    log_sum: Tensor,
    entropy: Tensor,
    logprob_grad: Tensor,
    entropy_grad: Tensor | None,
    temperature: float,
    temperatures: Tensor | None,
    out: Tensor,
) -> None:
    """The gradient goes to `out`, which has its own storage."""
    arguments = (logprob_grad, entropy_grad, temperature, temperatures)
    row_grad.row_grad(logits, tokens, row_max, log_sum, entropy, *arguments, out)


@torch.library.custom_op("fastpo::triton_row_grad_", mutates_args=("logits",))
def triton_row_grad_(
    logits: Tensor,
    tokens: Tensor,
    row_max: Tensor,
    log_sum: Tensor,
    entropy: Tensor,
    logprob_grad: Tensor,
    entropy_grad: Tensor | None,
    temperature: float,
    temperatures: Tensor | None,
    dtype: torch.dtype,
) -> None:
    """The gradient, of `dtype`, goes to `alias_rows(logits, dtype)`."""
    arguments = (logprob_grad, entropy_grad, temperature, temperatures)
    out = alias_rows(logits, dtype)
    row_grad.row_grad(logits, tokens, row_max, log_sum, entropy, *arguments, out)


@torch.library.custom_op("fastpo::triton_row_policy_loss", mutates_args=())
def triton_row_policy_loss(
    logits: Tensor,
    tokens: Tensor,
    weight: Tensor,
    advantages: Tensor,
    old_logprobs: Tensor | None,
    ref_logprobs: Tensor | None,
    entropy_weight: Tensor | None,
    rule: list[float],
    temperature: float,
    temperatures: Tensor | None,
) -> RowTensors:
    """(loss, logprobs, entropy, clipped), without a gradient."""
    inputs = (weight, advantages, old_logprobs, ref_logprobs, entropy_weight)
    return _policy_loss(logits, tokens, inputs, rule, temperature, temperatures, None)


@torch.library.custom_op("fastpo::triton_row_policy_loss_out", mutates_args=("out",))
def triton_row_policy_loss_out(
    logits: Tensor,
    tokens: Tensor,
    weight: Tensor,
    advantages: Tensor,
    old_logprobs: Tensor | None,
    ref_logprobs: Tensor | None,
    entropy_weight: Tensor | None,
    rule: list[float],
    temperature: float,
    temperatures: Tensor | None,
    out: Tensor,
) -> RowTensors:
    """The same, with the gradient in `out`, which has its own storage."""
    inputs = (weight, advantages, old_logprobs, ref_logprobs, entropy_weight)
    return _policy_loss(logits, tokens, inputs, rule, temperature, temperatures, out)


@torch.library.custom_op("fastpo::triton_row_policy_loss_", mutates_args=("logits",))
def triton_row_policy_loss_(
    logits: Tensor,
    tokens: Tensor,
    weight: Tensor,
    advantages: Tensor,
    old_logprobs: Tensor | None,
    ref_logprobs: Tensor | None,
    entropy_weight: Tensor | None,
    rule: list[float],
    temperature: float,
    temperatures: Tensor | None,
    dtype: torch.dtype,
) -> RowTensors:
    """The same, with the gradient, of `dtype`, in `alias_rows(logits, dtype)`."""
    inputs = (weight, advantages, old_logprobs, ref_logprobs, entropy_weight)
    out = alias_rows(logits, dtype)
    return _policy_loss(logits, tokens, inputs, rule, temperature, temperatures, out)


def _policy_loss(logits, tokens, inputs, rule, temperature, temperatures, out) -> RowTensors:
    surrogate, kl, kl_ratio_weighted, *numbers = rule
    fields = Rule(int(surrogate), int(kl), bool(kl_ratio_weighted), *numbers)._asdict()
    return row_policy_loss.row_policy_loss(
        logits, tokens, *inputs, temperature, temperatures, out, **fields
    )


@torch.library.custom_op("fastpo::triton_scale_", mutates_args=("grad",))
def triton_scale_(grad: Tensor, factor: Tensor) -> None:
    """grad *= factor (0-d)."""
    scale.scale_(grad, factor)


def _rows_like(logits: Tensor, *dtypes: torch.dtype) -> tuple[Tensor, ...]:
    return tuple(logits.new_empty(logits.shape[0], dtype=dtype) for dtype in dtypes)


@triton_row_stats.register_fake
def _(logits, *arguments):
    return _rows_like(logits, *[torch.float32] * 4)


@triton_row_details.register_fake
def _(logits, *arguments):
    return _rows_like(logits, *[torch.float32] * 6, torch.bool)


@triton_row_policy_loss.register_fake
@triton_row_policy_loss_out.register_fake
@triton_row_policy_loss_.register_fake
def _(logits, *arguments):
    return _rows_like(logits, *[torch.float32] * 3, torch.uint8)
