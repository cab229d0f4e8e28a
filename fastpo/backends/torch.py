"""The reference backend: the row primitives in plain torch, on any device, in fp64 for fp64 logits.

Clarity over speed: it makes a few temporaries of the size of its logits. The policy gradient comes
from autograd through the specification, `fastpo.objective.token_loss`, not from a closed form.
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor

from fastpo.backends.base import (
    KeptGrads,
    KeptRows,
    KeptSets,
    RowDetails,
    RowInputs,
    RowLosses,
    RowStats,
)
from fastpo.backends.two_step import two_step_policy_loss
from fastpo.objective import Objective


def unavailable(device: torch.device | None = None) -> str | None:
    """None: this backend runs everywhere."""
    return None


def row_stats(
    logits: Tensor, tokens: Tensor, temperature: float | Tensor, mask: Tensor | None = None
) -> RowStats:
    """See `fastpo.backends.base.Backend`."""
    scaled = _scaled(logits, temperature, mask)  # (N, V)
    row_max = scaled.amax(1)
    shifted = scaled - row_max[:, None]
    weights = shifted.exp()
    log_sum = weights.sum(1).log()
    # A column with logit -inf has p = 0; 0 * -inf must not reach the sum.
    mean_shift = (weights * shifted.masked_fill(shifted == -torch.inf, 0)).sum(1) / weights.sum(1)
    inside = (tokens >= 0) & (tokens < logits.shape[1])
    target = shifted.gather(1, tokens.where(inside, 0)[:, None])[:, 0].where(inside, torch.nan)
    stats = RowStats(target - log_sum, log_sum - mean_shift, row_max, log_sum)
    return stats if mask is None else RowStats(*(x.where(mask, 0) for x in stats))


def row_details(
    logits: Tensor, tokens: Tensor, temperature: float | Tensor, mask: Tensor | None = None
) -> tuple[RowStats, RowDetails]:
    """See `fastpo.backends.base.Backend`."""
    stats = row_stats(logits, tokens, temperature, mask)
    scaled = _scaled(logits, temperature, mask)
    weights = (scaled - stats.row_max[:, None]).exp()
    rows = logits if mask is None else logits.where(mask[:, None], 0)
    details = RowDetails(
        weights.square().sum(1).log() - 2 * stats.log_sum,
        scaled.mean(1),
        (rows.argmax(1) == tokens) & ~stats.logprobs.isnan(),  # argmax takes the first of several
    )
    return stats, (details if mask is None else RowDetails(*(x.where(mask, 0) for x in details)))


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
    mask = logprob_grad != 0
    if entropy_grad is not None:
        mask = mask | (entropy_grad != 0)
    scaled = _scaled(logits, temperature, mask)
    shifted = scaled - stats.row_max.where(mask, 0)[:, None]
    probs = (shifted - stats.log_sum.where(mask, 0)[:, None]).exp()
    is_token = torch.arange(logits.shape[1], device=logits.device) == tokens[:, None]
    rest = -torch.expm1(stats.logprobs)[:, None]  # 1 - p of the token, all rounding if subtracted
    grad = logprob_grad[:, None] * torch.where(is_token, rest, -probs)
    if entropy_grad is not None:
        mean_shift = (stats.log_sum - stats.entropy).where(mask, 0)[:, None]
        deviation = mean_shift - shifted.masked_fill(shifted == -torch.inf, 0)
        grad = grad + entropy_grad[:, None] * probs * deviation
    out.copy_(_normal((grad / _column(temperature)).where(mask[:, None], 0)))


def row_policy_loss(
    logits: Tensor,
    tokens: Tensor,
    inputs: RowInputs,
    objective: Objective,
    temperature: float | Tensor,
    out: Tensor | None,
) -> RowLosses:
    """See `fastpo.backends.base.Backend`."""
    this = sys.modules[__name__]
    return two_step_policy_loss(this, logits, tokens, inputs, objective, temperature, out)


def kept_stats(rows: KeptRows, mask: Tensor | None = None) -> tuple[RowStats, Tensor]:
    """See `fastpo.backends.base.Backend`."""
    hidden, head, tokens, kept, temperature = rows
    sizes = kept.offsets.diff()
    several = sizes > 1 if mask is None else (sizes > 1) & mask
    pairs, at, ids = _pairs(kept, several)
    wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    z = (hidden[at].to(wide) * head.weight[ids].to(wide)).sum(1)  # (pairs,)
    z = head.gain * (z if head.bias is None else z + head.bias[ids].to(wide))
    logits = hidden.new_zeros(kept.ids.numel(), dtype=wide)
    logits[pairs] = z.tanh() if head.capped else z
    return kept_stats_of(logits, tokens, kept, temperature, mask), logits


def kept_stats_of(
    logits: Tensor,
    tokens: Tensor,
    kept: KeptSets,
    temperature: float | Tensor,
    mask: Tensor | None,
) -> RowStats:
    """The statistics of `kept_stats` from z of every id, (M,); differentiable, and without waiting
    for the device."""
    sizes = kept.offsets.diff()
    several = sizes > 1 if mask is None else (sizes > 1) & mask
    every = torch.arange(sizes.numel(), device=tokens.device)
    rows = every.repeat_interleave(sizes, output_size=kept.ids.numel())
    z = torch.where(several[rows], logits, 0.0)  # NaN where nothing depends on it harms nobody
    is_token = kept.ids == tokens[rows]
    stats = _statistics(z / _of_rows(temperature, rows), rows, is_token, sizes.numel())
    stats = RowStats(*(torch.where(several, x, 0.0) for x in stats))
    missing = (sizes > 0).index_fill(0, rows[is_token], False)
    missing = missing if mask is None else missing & mask
    return stats._replace(logprobs=stats.logprobs.masked_fill(missing, torch.nan))


def _statistics(scaled: Tensor, rows: Tensor, is_token: Tensor, count: int) -> RowStats:
    """Statistics (count,) of rows that have only u (m,), which are of `rows` (m,); differentiable.

    `is_token` (m,) says which are the tokens'.
    """
    row_max = scaled.detach().new_full((count,), -torch.inf)
    row_max = row_max.scatter_reduce(0, rows, scaled.detach(), "amax")

    def sum_of(values: Tensor) -> Tensor:
        return torch.zeros_like(row_max).index_add(0, rows, values)

    shifted = scaled - row_max[rows]
    weights = shifted.exp()
    sums = sum_of(weights)
    log_sum = sums.log()
    # A logit of -inf has p = 0; 0 * -inf must not reach the sum.
    mean_shift = sum_of(weights * shifted.masked_fill(shifted == -torch.inf, 0)) / sums
    target = sum_of(torch.where(is_token, shifted, 0.0))
    return RowStats(target - log_sum, log_sum - mean_shift, row_max, log_sum)


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
    hidden, head, tokens, kept, temperature = rows
    sizes = kept.offsets.diff()
    mask = logprob_grad != 0 if entropy_grad is None else (logprob_grad != 0) | (entropy_grad != 0)
    pairs, at, ids = _pairs(kept, (sizes > 1) & mask)
    z, divisor = logits[pairs], _of_rows(temperature, at)
    log_probs = z / divisor - stats.row_max[at] - stats.log_sum[at]
    probs, is_token = log_probs.exp(), ids == tokens[at]
    rest = -torch.expm1(stats.logprobs)[at]
    slopes = logprob_grad[at] * torch.where(is_token, rest, -probs)
    if entropy_grad is not None:
        deviation = log_probs.masked_fill(probs == 0, 0) + stats.entropy[at]
        slopes = slopes - entropy_grad[at] * probs * deviation
    slopes = slopes / divisor * head.gain
    slopes = _normal(slopes * (1 - z.square()) if head.capped else slopes)
    if grads.hidden is not None:
        total = torch.zeros(hidden.shape, dtype=slopes.dtype, device=hidden.device)
        total.index_add_(0, at, slopes[:, None] * head.weight[ids].to(slopes.dtype))
        written = sizes > 0
        grads.hidden[written] = _normal(total[written]).to(grads.hidden.dtype)
    order = ids.argsort(stable=True)  # sums by segments, not index_add: in this order on any device
    touched, counts = ids[order].unique_consecutive(return_counts=True)
    for grad, parts in (
        (grads.weight, lambda: slopes[:, None] * hidden[at].to(slopes.dtype)),
        (grads.bias, lambda: slopes),
    ):
        if grad is not None:
            before = grad[touched].to(slopes.dtype) if add else 0
            if not add:
                grad.zero_()
            if touched.numel():
                sums = torch.segment_reduce(parts()[order], "sum", lengths=counts)
                grad[touched] = _normal(before + sums).to(grad.dtype)


def _pairs(kept: KeptSets, of_rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The kept ids of some of the rows: where they stand in `kept.ids`, their rows, themselves."""
    every = torch.arange(of_rows.numel(), device=of_rows.device)
    rows = every.repeat_interleave(kept.offsets.diff())
    pairs = of_rows[rows].nonzero()[:, 0]
    return pairs, rows[pairs], kept.ids[pairs]


def _of_rows(temperature: float | Tensor, rows: Tensor) -> float | Tensor:
    return temperature[rows] if isinstance(temperature, Tensor) else temperature


def scale_(grad: Tensor, factor: Tensor) -> None:
    """See `fastpo.backends.base.Backend`."""
    if grad.device.type != "cpu" or factor.item() != 1:
        grad.mul_(factor.to(grad.dtype) if factor.dtype == torch.float64 else factor)
        if grad.dtype != torch.float16:
            grad.copy_(_normal(grad))


def _scaled(logits: Tensor, temperature: float | Tensor, mask: Tensor | None) -> Tensor:
    """u = z / T in the accumulation dtype, with 0 in masked rows whatever stands there."""
    wide = logits if logits.dtype == torch.float64 else logits.float()
    scaled = wide / _column(temperature)
    return scaled if mask is None else scaled.where(mask[:, None], 0)


def _normal(grad: Tensor) -> Tensor:
    """The same with 0 for subnormal numbers: later products would be slow over them."""
    return grad.masked_fill(grad.abs() < torch.finfo(grad.dtype).tiny, 0)


def _column(temperature: float | Tensor) -> float | Tensor:
    return temperature[:, None] if isinstance(temperature, Tensor) else temperature
