"""E and the rows' factors from c = dL/dlogp: what makes diag(f) E the gradient of the logits."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ._exp_rows import load_rows, store_gradient
from ._exp_tiles import on_device
from .exp_row_stats import NUMBERS, ROWS


@triton.jit(
    do_not_specialize=["n"],
    do_not_specialize_on_alignment=[*NUMBERS, "tokens_ptr", "logprob_grad_ptr", "factors_ptr"],
)
def _exp_row_grad_kernel(
    e_ptr,  # (n, V)
    tokens_ptr,  # (n,)
    totals_ptr,  # (2, n)
    targets_ptr,  # (n,)
    slopes_ptr,  # (n,)
    shifts_ptr,  # (n,)
    logprob_grad_ptr,  # (n,)
    factors_ptr,  # (n,)
    n,
    V,
    e_stride,
    gain,
    HAS_SOFTCAP: tl.constexpr,
    ROWS: tl.constexpr,
):
    pointers = (totals_ptr, targets_ptr, slopes_ptr, shifts_ptr)
    row, present, numbers = load_rows(pointers, n, ROWS)
    c = tl.load(logprob_grad_ptr + row, mask=present, other=0.0)
    store_gradient(
        e_ptr, factors_ptr, tokens_ptr, row, present, numbers, c, gain, V, e_stride, HAS_SOFTCAP
    )


def exp_row_grad(
    e: Tensor,
    tokens: Tensor,
    totals: Tensor,
    targets: Tensor,
    slopes: Tensor,
    shifts: Tensor,
    logprob_grad: Tensor,
    factors: Tensor,
    *,
    gain: float = 1.0,
    softcap: bool = False,
) -> None:
    """Fix column tokens[i] of every unmasked row of `e` (n, V), and fill factors (n,) fp32 with f.

    logprob_grad (n,) fp32 is c; totals (2, n) and the other (n,) as `exp_logits` left or had them.
    `gain` is du/dz over slope ln 2: 1, or with a softcap logit_scale / softcap.
    """
    n, V = e.shape
    if n == 0:
        return
    with on_device(e):
        _exp_row_grad_kernel[(triton.cdiv(n, ROWS),)](
            e,
            tokens,
            totals,
            targets,
            slopes,
            shifts,
            logprob_grad,
            factors,
            n,
            V,
            e.stride(0),
            gain,
            HAS_SOFTCAP=softcap,
            ROWS=ROWS,
            num_warps=4,
            enable_fp_fusion=False,
        )
