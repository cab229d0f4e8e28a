"""A token-level policy loss from logits, with its gradient, in one launch.

First sweep: the row's statistics. Then a handful of scalars turn the token's log-prob into its
loss and c = dL/dlogp. Second sweep, from the last column to the first, beginning with the tail of
the row that is still in registers:

    dz_j = (1 / T) * (c * (1[j = y] - p_j) + e * p_j * (E_p[u] - u_j)),    e = -entropy weight
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._layout import launch_rows, row_layout, row_stride, shares_rows
from ._rows import (
    fill_row_with_zero,
    load_inverse_temperature,
    load_token_logit,
    row_offset,
    sweep_row,
    token_logprob,
    write_gradient,
)
from ._token_loss import split_params, token_loss

if TYPE_CHECKING:
    from fastpo.backends.base import ObjectiveParams

_PER_ROW = ["tokens_ptr", "weight_ptr", "advantages_ptr", "old_logprobs_ptr", "ref_logprobs_ptr"]
_OPTIONAL = ["entropy_weight_ptr", "clip_low_ptr", "clip_high_ptr", "nll_weight_ptr"]
_TEMPERATURES = ["temperatures_ptr"]
_OUTPUTS = ["loss_ptr", "logprobs_ptr", "entropy_ptr", "clipped_ptr"]


@triton.jit
def _load_inputs(advantages_ptr, optional, objective):
    """(advantage, old log-prob, reference's, bounds on r, NLL weight) of this row, or defaults."""
    row = tl.program_id(0)
    old_logprobs_ptr, ref_logprobs_ptr, clip_low_ptr, clip_high_ptr, nll_weight_ptr = optional
    advantage = tl.load(advantages_ptr + row)
    old_logprob = 0.0 if old_logprobs_ptr is None else tl.load(old_logprobs_ptr + row)
    ref_logprob = 0.0 if ref_logprobs_ptr is None else tl.load(ref_logprobs_ptr + row)
    low = objective.ratio_low if clip_low_ptr is None else tl.load(clip_low_ptr + row)
    high = objective.ratio_high if clip_high_ptr is None else tl.load(clip_high_ptr + row)
    nll_weight = 0.0 if nll_weight_ptr is None else tl.load(nll_weight_ptr + row)
    return advantage, old_logprob, ref_logprob, low, high, nll_weight


@triton.jit
def _loss_of_inputs(
    logprob,
    inputs,
    objective,
    KIND: tl.constexpr,
    ON_POLICY: tl.constexpr,
    HAS_NLL: tl.constexpr,
):
    """`token_loss` of what `_load_inputs` gave."""
    advantage, old_logprob, ref_logprob, low, high, nll_weight = inputs
    old = logprob if ON_POLICY else old_logprob
    return token_loss(
        logprob, old, advantage, ref_logprob, low, high, nll_weight, objective, KIND, HAS_NLL
    )


@triton.jit
def _store_results(outputs, loss, logprob, entropy, clipped):
    row = tl.program_id(0)
    loss_ptr, logprobs_ptr, entropy_ptr, clipped_ptr = outputs
    tl.store(loss_ptr + row, loss)
    tl.store(logprobs_ptr + row, logprob)
    tl.store(entropy_ptr + row, entropy)
    tl.store(clipped_ptr + row, clipped)


@triton.jit
def _write_row(
    kept,
    rows,
    sample,
    V,
    body,
    stats,
    slopes,
    inverse_temperature,
    HAS_ENTROPY_GRAD: tl.constexpr,
    SHARED_ROWS: tl.constexpr,
    LAYOUT: tl.constexpr,
):
    """The gradient from dL/dlogp and dL/dH; exactly 0, and no read, where both are.

    rows: addresses of logits and gradient; sample: token and its logit; slopes: those two.
    """
    row_ptr, out_row_ptr = rows
    token, token_logit = sample
    c = slopes[0] * inverse_temperature
    e = slopes[1] * inverse_temperature
    if (c == 0) & (e == 0):
        fill_row_with_zero(out_row_ptr, V, LAYOUT)
    else:
        write_gradient(
            kept,
            row_ptr,
            out_row_ptr,
            token,
            token_logit,
            V,
            body,
            stats,
            inverse_temperature,
            c,
            e,
            HAS_ENTROPY_GRAD,
            SHARED_ROWS,
            LAYOUT,
        )


@triton.jit(do_not_specialize_on_alignment=[*_PER_ROW, *_OPTIONAL, *_TEMPERATURES, *_OUTPUTS])
def _row_policy_loss_kernel(
    logits_ptr,  # (N, V)
    out_ptr,  # (N, V), may share rows with the logits; None = no gradient
    tokens_ptr,  # (N,)
    weight_ptr,  # (N,)
    advantages_ptr,  # (N,)
    old_logprobs_ptr,  # (N,) or None
    ref_logprobs_ptr,  # (N,) or None
    entropy_weight_ptr,  # (N,) or None
    clip_low_ptr,  # (N,) or None
    clip_high_ptr,  # (N,) or None
    nll_weight_ptr,  # (N,) or None
    temperatures_ptr,  # (N,) or None
    loss_ptr,  # (N,)
    logprobs_ptr,  # (N,)
    entropy_ptr,  # (N,)
    clipped_ptr,  # (N,)
    logits_stride,
    out_stride,
    V,
    body,
    temperature,
    objective,  # not `params`: a name that Triton's own launcher uses
    KIND: tl.constexpr,
    SHARED_ROWS: tl.constexpr,
    LAYOUT: tl.constexpr,
):
    HAS_ENTROPY_GRAD: tl.constexpr = entropy_weight_ptr is not None
    row = tl.program_id(0)
    outputs = (loss_ptr, logprobs_ptr, entropy_ptr, clipped_ptr)
    weight = tl.load(weight_ptr + row)
    entropy_weight = tl.load(entropy_weight_ptr + row) if HAS_ENTROPY_GRAD else 0.0
    if (weight == 0) & (entropy_weight == 0):
        _store_results(outputs, 0.0, 0.0, 0.0, 0)
        if out_ptr is not None:
            fill_row_with_zero(out_ptr + row_offset(out_stride), V, LAYOUT)
    else:
        row_ptr = logits_ptr + row_offset(logits_stride)
        inverse_temperature = load_inverse_temperature(temperature, temperatures_ptr)
        token = tl.load(tokens_ptr + row)
        token_logit = load_token_logit(row_ptr, token, V)
        # Before the sweep: after it, the only program of the SM would wait for them idle.
        optional = (old_logprobs_ptr, ref_logprobs_ptr, clip_low_ptr, clip_high_ptr, nll_weight_ptr)
        inputs = _load_inputs(advantages_ptr, optional, objective)
        row_max, log_sum, entropy, kept = sweep_row(row_ptr, V, body, inverse_temperature, LAYOUT)
        logprob = token_logprob(token_logit, inverse_temperature, row_max, log_sum)
        ON_POLICY: tl.constexpr = old_logprobs_ptr is None
        HAS_NLL: tl.constexpr = nll_weight_ptr is not None
        loss, slope, clipped = _loss_of_inputs(logprob, inputs, objective, KIND, ON_POLICY, HAS_NLL)
        loss = weight * loss
        if HAS_ENTROPY_GRAD:
            loss -= entropy_weight * entropy
        _store_results(outputs, loss, logprob, entropy, clipped.to(tl.uint8))
        if out_ptr is not None:
            stats = (row_max, log_sum, log_sum - entropy)
            slopes = (weight * slope, -entropy_weight)
            _write_row(
                kept,
                (row_ptr, out_ptr + row_offset(out_stride)),
                (token, token_logit),
                V,
                body,
                stats,
                slopes,
                inverse_temperature,
                HAS_ENTROPY_GRAD,
                SHARED_ROWS,
                LAYOUT,
            )


def row_policy_loss(
    logits: Tensor,
    tokens: Tensor,
    inputs: tuple[Tensor | None, ...],
    temperature: float,
    temperatures: Tensor | None,
    out: Tensor | None,
    params: ObjectiveParams,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(loss, logprobs, entropy) fp32 and clip bits uint8, each (N,); the gradient goes to `out`.

    The loss stays per row: summing it is a second stage in a fixed order (`Tensor.sum`), so that no
    float atomics are needed. `inputs` are `fastpo.backends.base.RowInputs`. Rows whose weight and
    entropy weight are 0 are not read: their outputs and gradients are 0. `out` is None, (N, V) of
    its own, `logits`, or narrower and in the upper half of each logits row.
    """
    device, N = logits.device, logits.shape[0]
    loss, logprobs, entropy = (torch.empty(N, dtype=torch.float32, device=device) for _ in range(3))
    clipped = torch.empty(N, dtype=torch.uint8, device=device)
    layout, V = row_layout(logits), logits.shape[1]
    kind, numbers = split_params(params)
    launch_rows(
        _row_policy_loss_kernel,
        logits,
        layout,
        logits,
        out,
        tokens,
        *inputs,
        temperatures,
        loss,
        logprobs,
        entropy,
        clipped,
        row_stride(logits),
        0 if out is None else row_stride(out),
        V,
        layout.body(V),
        temperature,
        numbers,
        KIND=kind,
        SHARED_ROWS=out is not None and shares_rows(logits, out),
        LAYOUT=layout,
    )
    return loss, logprobs, entropy, clipped
