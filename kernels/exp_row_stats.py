"""Log-prob and entropy of rows from the sums that `exp_logits` left."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ._exp_rows import load_rows, statistics
from ._exp_tiles import on_device

ROWS = 128
NUMBERS = ["totals_ptr", "targets_ptr", "slopes_ptr", "shifts_ptr"]


@triton.jit(
    do_not_specialize=["n"],
    do_not_specialize_on_alignment=[*NUMBERS, "logprobs_ptr", "entropy_ptr"],
)
def _exp_row_stats_kernel(
    totals_ptr,  # (2, n)
    targets_ptr,  # (n,)
    slopes_ptr,  # (n,)
    shifts_ptr,  # (n,)
    logprobs_ptr,  # (n,)
    entropy_ptr,  # (n,)
    n,
    ROWS: tl.constexpr,
):
    pointers = (totals_ptr, targets_ptr, slopes_ptr, shifts_ptr)
    row, present, numbers = load_rows(pointers, n, ROWS)
    logprob, entropy = statistics(numbers)
    tl.store(logprobs_ptr + row, logprob, mask=present)
    tl.store(entropy_ptr + row, entropy, mask=present)


def exp_row_stats(
    totals: Tensor,
    targets: Tensor,
    slopes: Tensor,
    shifts: Tensor,
    logprobs: Tensor,
    entropy: Tensor,
) -> None:
    """Fill logprobs and entropy (n,) fp32, 0 on masked rows, from totals (2, n) and (n,) fp32."""
    n = targets.shape[0]
    if n == 0:
        return
    with on_device(targets):
        _exp_row_stats_kernel[(triton.cdiv(n, ROWS),)](
            totals,
            targets,
            slopes,
            shifts,
            logprobs,
            entropy,
            n,
            ROWS=ROWS,
            num_warps=4,
            enable_fp_fusion=False,
        )
