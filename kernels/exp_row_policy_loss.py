"""All that lies between the GEMMs of a token-level objective, one launch over n numbers.

Statistics of the rows, the loss and its slope c as in _token_loss.py, and what `diag(f) E`
needs to be the gradient of the logits: E_y and f. With an entropy gradient c goes out instead, to
exp_entropy_grad.py.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import triton
import triton.language as tl
from torch import Tensor

from ._exp_rows import load_rows, statistics, store_gradient
from ._exp_tiles import on_device
from ._token_loss import split_params, token_loss
from .exp_row_stats import NUMBERS, ROWS

if TYPE_CHECKING:
    from fastpo.backends.base import ObjectiveParams

_INPUTS = ["weight_ptr", "advantages_ptr", "old_logprobs_ptr", "ref_logprobs_ptr"]
_OUTPUTS = ["loss_ptr", "logprobs_ptr", "entropy_ptr", "clipped_ptr", "logprob_grad_ptr"]
_OPTIONAL = ["entropy_weight_ptr", "clip_low_ptr", "clip_high_ptr", "nll_weight_ptr"]
_OTHERS = ["tokens_ptr", "factors_ptr"]


@triton.jit
def _load(pointer, row, present, other):
    """Numbers of rows, or `other` for all where there are none."""
    if pointer is None:
        return other
    else:
        return tl.load(pointer + row, mask=present, other=0.0)


@triton.jit(
    do_not_specialize=["n"],
    do_not_specialize_on_alignment=[*NUMBERS, *_INPUTS, *_OPTIONAL, *_OUTPUTS, *_OTHERS],
)
def _exp_row_policy_loss_kernel(
    e_ptr,  # (n, V) or None: no gradient, or one that exp_entropy_grad makes
    tokens_ptr,  # (n,)
    totals_ptr,  # (2, n)
    targets_ptr,  # (n,)
    slopes_ptr,  # (n,)
    shifts_ptr,  # (n,)
    weight_ptr,  # (n,)
    advantages_ptr,  # (n,)
    old_logprobs_ptr,  # (n,) or None
    ref_logprobs_ptr,  # (n,) or None
    entropy_weight_ptr,  # (n,) or None
    clip_low_ptr,  # (n,) or None
    clip_high_ptr,  # (n,) or None
    nll_weight_ptr,  # (n,) or None
    loss_ptr,  # (n,)
    logprobs_ptr,  # (n,)
    entropy_ptr,  # (n,)
    clipped_ptr,  # (n,)
    logprob_grad_ptr,  # (n,)
    factors_ptr,  # (n,)
    n,
    V,
    e_stride,
    gain,
    objective,
    KIND: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    ROWS: tl.constexpr,
):
    pointers = (totals_ptr, targets_ptr, slopes_ptr, shifts_ptr)
    row, present, numbers = load_rows(pointers, n, ROWS)
    logprob, entropy = statistics(numbers)
    zero = tl.zeros((ROWS,), tl.float32)
    weight = tl.load(weight_ptr + row, mask=present, other=0.0)
    entropy_weight = _load(entropy_weight_ptr, row, present, zero)
    loss, slope, clipped = token_loss(
        logprob,
        _load(old_logprobs_ptr, row, present, logprob),
        tl.load(advantages_ptr + row, mask=present, other=0.0),
        _load(ref_logprobs_ptr, row, present, zero),
        _load(clip_low_ptr, row, present, zero + objective.ratio_low),
        _load(clip_high_ptr, row, present, zero + objective.ratio_high),
        _load(nll_weight_ptr, row, present, zero),
        objective,
        KIND,
        nll_weight_ptr is not None,
    )
    # A masked row's advantages, old and reference log-probs may be NaN; 0 * NaN is NaN.
    masked = (weight == 0) & (entropy_weight == 0)
    loss = weight * loss
    if entropy_weight_ptr is not None:  # 0 * NaN is NaN
        loss -= entropy_weight * entropy
    c = tl.where(masked, 0.0, weight * slope)
    tl.store(loss_ptr + row, tl.where(masked, 0.0, loss), mask=present)
    tl.store(logprobs_ptr + row, tl.where(masked, 0.0, logprob), mask=present)
    tl.store(entropy_ptr + row, tl.where(masked, 0.0, entropy), mask=present)
    tl.store(clipped_ptr + row, tl.where(masked, 0, clipped).to(tl.uint8), mask=present)
    tl.store(logprob_grad_ptr + row, c, mask=present)
    if e_ptr is not None:
        store_gradient(
            e_ptr, factors_ptr, tokens_ptr, row, present, numbers, c, gain, V, e_stride, HAS_SOFTCAP
        )


def exp_row_policy_loss(
    e: Tensor | None,
    tokens: Tensor,
    totals: Tensor,
    targets: Tensor,
    slopes: Tensor,
    shifts: Tensor,
    inputs: tuple[Tensor | None, ...],
    outputs: tuple[Tensor, ...],
    logprob_grad: Tensor,
    factors: Tensor,
    params: ObjectiveParams,
    *,
    V: int,
    gain: float = 1.0,
    softcap: bool = False,
) -> None:
    """Fill `outputs`, loss, logprobs, entropy (n,) fp32 and clip bits uint8; c and f, (n,) fp32.

    `inputs` are `fastpo.backends.base.RowInputs` and `params` is its `ObjectiveParams`. With `e`
    (n, V), column tokens[i] is fixed as in `exp_row_grad`, and factors filled. Rows whose weight
    and entropy weight are 0 get zeros.
    """
    n = targets.shape[0]
    if n == 0:
        return
    kind, numbers = split_params(params)
    with on_device(targets):
        _exp_row_policy_loss_kernel[(triton.cdiv(n, ROWS),)](
            e,
            tokens,
            totals,
            targets,
            slopes,
            shifts,
            *inputs,
            *outputs,
            logprob_grad,
            factors,
            n,
            V,
            0 if e is None else e.stride(0),
            gain,
            numbers,
            KIND=kind,
            HAS_SOFTCAP=softcap,
            ROWS=ROWS,
            num_warps=4,
            enable_fp_fusion=False,
        )
