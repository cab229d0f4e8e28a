"""E with an entropy gradient: one pass in place, 4 bytes an element.

With c = dL/dlogp, b = dL/dH, v_j = u_j - o and mu = M / S:

    dL/du_j = p_j (-c + b (mu - v_j))  for j != y,  and c more for y
    G_j = E_j (c - b (mu - v_j))     G_y = E_y (c - b (mu - v_y)) - c S     f = -1 / S

v_j is the logarithm of the stored E_j: bf16 leaves it 2^-9 off, so b p_j is 0.002 off, no more than
the rounding of G itself. No cheaper exact form exists with plain GEMMs: it would take a second
stored matrix E v and a third of the FLOPs more.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ._exp_rows import LOWEST
from ._exp_tiles import on_device
from .exp_row_stats import NUMBERS

_LN_2: tl.constexpr = tl.constexpr(0.6931471805599453)
_GRADS = ["tokens_ptr", "logprob_grad_ptr", "entropy_grad_ptr", "factors_ptr"]


@triton.jit
def _coefficient(v, mean, c, b):
    """c - b (mu - v), with v and mu to base 2."""
    return c - b * (mean - tl.maximum(v, LOWEST)) * _LN_2


@triton.jit(do_not_specialize_on_alignment=[*NUMBERS, *_GRADS])
def _exp_entropy_grad_kernel(
    e_ptr,  # (n, V)
    tokens_ptr,  # (n,)
    totals_ptr,  # (n,)
    moments_ptr,  # (n,)
    targets_ptr,  # (n,)
    slopes_ptr,  # (n,)
    shifts_ptr,  # (n,)
    logprob_grad_ptr,  # (n,)
    entropy_grad_ptr,  # (n,)
    factors_ptr,  # (n,)
    V,
    e_stride,
    gain,
    HAS_SOFTCAP: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    row = tl.program_id(0)
    shift = tl.load(shifts_ptr + row)
    if shift == float("inf"):  # masked: E is 0
        tl.store(factors_ptr + row, 0.0)
    else:
        total, slope = tl.load(totals_ptr + row), tl.load(slopes_ptr + row)
        target = tl.load(targets_ptr + row)
        mean = tl.load(moments_ptr + row) / total
        c, b = tl.load(logprob_grad_ptr + row), tl.load(entropy_grad_ptr + row)
        tl.store(factors_ptr + row, -(slope * _LN_2) * gain / total)

        above = tl.fma(target, slope, -shift)
        chosen = tl.exp2(above) * _coefficient(above, mean, c, b) - c * total
        if HAS_SOFTCAP:
            chosen *= 1.0 - target * target
        token = tl.load(tokens_ptr + row).to(tl.int64)
        row_ptr = e_ptr + row.to(tl.int64) * e_stride
        for start in range(0, V, BLOCK_V):
            column = start + tl.arange(0, BLOCK_V)
            e = tl.load(row_ptr + column, mask=column < V, other=0.0).to(tl.float32)
            v = tl.log2(e)
            g = tl.where(e == 0, 0.0, e * _coefficient(v, mean, c, b))
            if HAS_SOFTCAP:
                t = (v + shift) / slope
                g *= tl.maximum(1.0 - t * t, 0.0)
            g = tl.where(column == token, chosen, g)
            tl.store(row_ptr + column, g.to(tl.bfloat16), mask=column < V)


def exp_entropy_grad(
    e: Tensor,
    tokens: Tensor,
    totals: Tensor,
    targets: Tensor,
    slopes: Tensor,
    shifts: Tensor,
    logprob_grad: Tensor,
    entropy_grad: Tensor,
    factors: Tensor,
    *,
    gain: float = 1.0,
    softcap: bool = False,
) -> None:
    """`exp_row_grad` with an entropy gradient (n,) too: rewrites all of `e` (n, V) into G.

    With a softcap `e` must not hold the tanh's slope yet (`exp_logits(tanh_gradient=False)`): it is
    taken from the logarithm of E, 0.002 T / softcap off.
    """
    n, V = e.shape
    if n == 0:
        return
    block = min(triton.next_power_of_2(V), 4096)
    with on_device(e):
        _exp_entropy_grad_kernel[(n,)](
            e,
            tokens,
            totals[0],
            totals[1],
            targets,
            slopes,
            shifts,
            logprob_grad,
            entropy_grad,
            factors,
            V,
            e.stride(0),
            gain,
            HAS_SOFTCAP=softcap,
            BLOCK_V=block,
            num_warps=8 if block == 4096 else 4,
        )
