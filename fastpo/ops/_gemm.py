"""One matrix product: low-precision operands, accumulation and result in the dtype of `out`."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

_BLOCK = 4096  # rows or columns of a low-precision operand that are widened at a time


def add_matmul_(
    out: Tensor, a: Tensor, b: Tensor, *, alpha: float = 1.0, beta: float = 0.0
) -> None:
    """out = beta * out + alpha * a @ b, without rounding the product to the operands' dtype.

    out (m, n), a (m, k), b (k, n). What stood in `out` is not read when beta is 0. Where the
    operands are narrower than `out`, CUDA's GEMM returns its fp32 accumulators (`out_dtype`);
    elsewhere the operands are widened in blocks, so that no wide copy of a weight exists.
    """
    if a.dtype == b.dtype == out.dtype:
        torch.addmm(out, a, b, alpha=alpha, beta=beta, out=out)
    elif a.dtype == b.dtype and has_wide_gemm(a.device, a.dtype):
        torch.addmm(out, a, b, alpha=alpha, beta=beta, out_dtype=out.dtype, out=out)
    else:
        _in_blocks(out, a, b, alpha, beta)


def _in_blocks(out: Tensor, a: Tensor, b: Tensor, alpha: float, beta: float) -> None:
    """Cut the longest of m, n, k, which is the vocabulary; the other operand is widened once."""
    (m, k), n = a.shape, b.shape[1]
    longest = max(m, n, k)
    if longest == n:
        a = a.to(out.dtype)
    elif longest == m:
        b = b.to(out.dtype)
    for start in range(0, longest, _BLOCK):
        cut = slice(start, start + _BLOCK)
        if longest == n:
            part, left, right = out[:, cut], a, b[:, cut]
        elif longest == m:
            part, left, right = out[cut], a[cut], b
        else:
            part, left, right = out, a[:, cut], b[cut]
        left, right = left.to(out.dtype), right.to(out.dtype)
        torch.addmm(part, left, right, alpha=alpha, beta=beta, out=part)
        if longest == k:
            beta = 1.0


@cache
def has_wide_gemm(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether this build multiplies `dtype` matrices on `device` into fp32. Probed once."""
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16):
        return False
    a = torch.zeros(16, 16, device=device, dtype=dtype)
    out = torch.zeros(16, 16, device=device)
    try:
        torch.addmm(out, a, a, out_dtype=torch.float32, out=out)
    except (RuntimeError, TypeError):
        return False
    return True
