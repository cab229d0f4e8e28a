"""Gradient of a loss with respect to the logits, from its gradients c and e with respect to every
row's log-prob and entropy: one read of the logits and one write.

    dz_j = (1 / T) * (c * (1[j = y] - p_j) + e * p_j * (E_p[u] - u_j))
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ._layout import launch_rows, row_layout, row_stride, shares_rows
from ._rows import (
    fill_row_with_zero,
    load_inverse_temperature,
    load_tail,
    load_token_logit,
    row_offset,
    write_gradient,
)

_PER_ROW = ["tokens_ptr", "row_max_ptr", "log_sum_ptr", "entropy_ptr", "temperatures_ptr"]
_GRADS = ["logprob_grad_ptr", "entropy_grad_ptr"]


@triton.jit(do_not_specialize_on_alignment=[*_PER_ROW, *_GRADS])
def _row_grad_kernel(
    logits_ptr,  # (N, V)
    out_ptr,  # (N, V), may share rows with the logits
    tokens_ptr,  # (N,)
    row_max_ptr,  # (N,)
    log_sum_ptr,  # (N,)
    entropy_ptr,  # (N,)
    logprob_grad_ptr,  # (N,)
    entropy_grad_ptr,  # (N,) or None
    temperatures_ptr,  # (N,) or None
    logits_stride,
    out_stride,
    V,
    body,
    temperature,
    SHARED_ROWS: tl.constexpr,
    LAYOUT: tl.constexpr,
):
    HAS_ENTROPY_GRAD: tl.constexpr = entropy_grad_ptr is not None
    row = tl.program_id(0)
    row_ptr = logits_ptr + row_offset(logits_stride)
    out_row_ptr = out_ptr + row_offset(out_stride)
    c = tl.load(logprob_grad_ptr + row)
    e = tl.load(entropy_grad_ptr + row) if HAS_ENTROPY_GRAD else 0.0
    if (c == 0) & (e == 0):
        fill_row_with_zero(out_row_ptr, V, LAYOUT)
    else:
        inverse_temperature = load_inverse_temperature(temperature, temperatures_ptr)
        c = c * inverse_temperature
        e = e * inverse_temperature
        token = tl.load(tokens_ptr + row)
        token_logit = load_token_logit(row_ptr, token, V)
        log_sum = tl.load(log_sum_ptr + row)
        stats = (tl.load(row_max_ptr + row), log_sum, log_sum - tl.load(entropy_ptr + row))
        tail = load_tail(row_ptr, body, V, LAYOUT)
        tl.debug_barrier()  # all threads have read the token's logit, and shared rows this block
        write_gradient(
            tail,
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


def row_grad(
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
    """Fill `out` (N, V) from the statistics of `row_stats` and the row gradients, all (N,) fp32.

    Rows with c = e = 0 are not read and get zeros. `out` may be `logits`, or narrower and in the
    upper half of each logits row.
    """
    V = logits.shape[1]
    layout = row_layout(logits)
    layout = layout.with_tail(V, layout.STEP)
    launch_rows(
        _row_grad_kernel,
        logits,
        layout,
        logits,
        out,
        tokens,
        row_max,
        log_sum,
        entropy,
        logprob_grad,
        entropy_grad,
        temperatures,
        row_stride(logits),
        row_stride(out),
        V,
        layout.body(V),
        temperature,
        SHARED_ROWS=shares_rows(logits, out),
        LAYOUT=layout,
    )
