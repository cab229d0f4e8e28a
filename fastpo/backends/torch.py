"""The reference backend: the row primitives in plain torch, on any device, in fp64 for fp64 logits.

Clarity over speed: it makes a few temporaries of the size of its logits. The policy gradient comes
from autograd through the specification, `fastpo.objective.token_loss`, not from a closed form.
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor

from fastpo.backends.base import RowInputs, RowLosses, RowStats, token_level_loss, two_step
from fastpo.objective import Objective


def unavailable(device: torch.device | None = None) -> str | None:
    """None: this backend runs everywhere."""
    return None


def row_stats(
    logits: Tensor, tokens: Tensor, temperature: float | Tensor, live: Tensor | None = None
) -> RowStats:
    """See `fastpo.backends.base.Backend`."""
    scaled = _scaled(logits, temperature, live)  # (N, V)
    row_max = scaled.amax(1)
    shifted = scaled - row_max[:, None]
    weights = shifted.exp()
    log_sum = weights.sum(1).log()
    # A column with logit -inf has p = 0; 0 * -inf must not reach the sum.
    mean_shift = (weights * shifted.masked_fill(shifted == -torch.inf, 0)).sum(1) / weights.sum(1)
    inside = (tokens >= 0) & (tokens < logits.shape[1])
    target = shifted.gather(1, tokens.where(inside, 0)[:, None])[:, 0].where(inside, torch.nan)
    stats = RowStats(target - log_sum, log_sum - mean_shift, row_max, log_sum)
    return stats if live is None else RowStats(*(x.where(live, 0) for x in stats))


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
    live = logprob_grad != 0
    if entropy_grad is not None:
        live = live | (entropy_grad != 0)
    scaled = _scaled(logits, temperature, live)
    shifted = scaled - stats.row_max.where(live, 0)[:, None]
    probs = (shifted - stats.log_sum.where(live, 0)[:, None]).exp()
    columns = torch.arange(logits.shape[1], device=logits.device)
    grad = logprob_grad[:, None] * ((columns == tokens[:, None]).to(probs.dtype) - probs)
    if entropy_grad is not None:
        mean_shift = (stats.log_sum - stats.entropy).where(live, 0)[:, None]
        spread = mean_shift - shifted.masked_fill(shifted == -torch.inf, 0)
        grad = grad + entropy_grad[:, None] * probs * spread
    out.copy_((grad / _column(temperature)).where(live[:, None], 0))


def row_policy_loss(
    logits: Tensor,
    tokens: Tensor,
    inputs: RowInputs,
    objective: Objective,
    temperature: float | Tensor,
    out: Tensor | None,
) -> RowLosses:
    """See `fastpo.backends.base.Backend`."""
    live = inputs.live
    loss_of = token_level_loss(inputs, objective, live)
    this = sys.modules[__name__]
    return two_step(this, logits, tokens, temperature, out, live=live, loss_of=loss_of)


def scale_(grad: Tensor, factor: Tensor) -> None:
    """See `fastpo.backends.base.Backend`."""
    if grad.device.type != "cpu" or factor.item() != 1:
        grad.mul_(factor.to(grad.dtype) if factor.dtype == torch.float64 else factor)


def _scaled(logits: Tensor, temperature: float | Tensor, live: Tensor | None) -> Tensor:
    """u = z / T in the accumulation dtype, with 0 in dead rows whatever stands there."""
    wide = logits if logits.dtype == torch.float64 else logits.float()
    scaled = wide / _column(temperature)
    return scaled if live is None else scaled.where(live[:, None], 0)


def _column(temperature: float | Tensor) -> float | Tensor:
    return temperature[:, None] if isinstance(temperature, Tensor) else temperature
