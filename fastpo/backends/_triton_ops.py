"""The two primitives that a compiler sees, as custom operators: `torch.ops.fastpo.triton_*`.

Under torch.compile every op goes by way of the statistics and the gradient, never in place (see
`fastpo.ops.logits`); nothing else ever stands in a compiled graph. The launchers' per-row outputs
are fresh tensors.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastpo.kernels import kept_rows, metrics, row_grad, row_policy_loss, row_stats, scale

__all__ = ["kept_rows", "metrics", "row_grad", "row_policy_loss", "row_stats", "scale"]

RowTensors = tuple[Tensor, Tensor, Tensor, Tensor]


@torch.library.custom_op("fastpo::triton_row_stats", mutates_args=())
def triton_row_stats(
    logits: Tensor,
    tokens: Tensor,
    temperature: float,
    temperatures: Tensor | None,
    mask: Tensor | None,
) -> RowTensors:
    """(logprobs, entropy, row_max, log_sum)."""
    return row_stats.row_stats(logits, tokens, temperature, temperatures, mask)


@torch.library.custom_op("fastpo::triton_row_details", mutates_args=())
def triton_row_details(
    logits: Tensor,
    tokens: Tensor,
    temperature: float,
    temperatures: Tensor | None,
    mask: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(logprobs, entropy, row_max, log_sum, log_sum_sq_probs, mean_logits, is_top1)."""
    return row_stats.row_stats(logits, tokens, temperature, temperatures, mask, details=True)


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


@triton_row_stats.register_fake
def _(logits, *arguments):
    return tuple(logits.new_empty(logits.shape[0], dtype=torch.float32) for _ in range(4))


@triton_row_details.register_fake
def _(logits, *arguments):
    dtypes = [torch.float32] * 6 + [torch.bool]
    return tuple(logits.new_empty(logits.shape[0], dtype=dtype) for dtype in dtypes)
