"""The sampled tokens' own head outputs, before the GEMM that needs them as offsets.

Taken from the diagonal of a 64 x 64 product, so that tensor cores sum over D as they do in
`exp_logits`: they truncate, and a z_y by FMAs among such z_j would bias log-probs by some 1e-4 at
D = 4096. It costs 64 / V of that GEMM.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ._exp_rows import head_output
from ._exp_tiles import on_device

ROWS = 64
WIDTH = 64
"""Columns of the product, of which 64 are used. With 256 its MMA is the one of `exp_logits`."""


@triton.jit(do_not_specialize=["n"], do_not_specialize_on_alignment=["tokens_ptr", "targets_ptr"])
def _exp_targets_kernel(
    hidden_ptr,  # (n, D)
    weight_ptr,  # (V, D)
    tokens_ptr,  # (n,)
    bias_ptr,  # (V,) or None
    targets_ptr,  # (n,)
    n,
    V,
    D,
    hidden_stride,
    weight_stride,
    inner,
    HAS_SOFTCAP: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    K: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(0) * ROWS + tl.arange(0, WIDTH)
    used = (column < n) & (tl.arange(0, WIDTH) < ROWS)
    token = tl.load(tokens_ptr + column, mask=used, other=-1).to(tl.int64)
    used = used & (token >= 0) & (token < V)
    product = tl.zeros((ROWS, WIDTH), tl.float32)
    for k in range(0, tl.cdiv(D, K)):
        depth = k * K + tl.arange(0, K)[None, :]
        h_at = hidden_ptr + row.to(tl.int64)[:, None] * hidden_stride + depth
        w_at = weight_ptr + token[:, None] * weight_stride + depth
        h = tl.load(h_at, mask=(row < n)[:, None] & (depth < D), other=0.0)
        w = tl.load(w_at, mask=used[:, None] & (depth < D), other=0.0)
        product = tl.dot(h, w.T, product)
    token = tl.where(used, token, V)
    output = head_output(product, token[None, :], bias_ptr, V, inner, HAS_SOFTCAP)
    chosen = (tl.arange(0, ROWS)[:, None] == tl.arange(0, WIDTH)[None, :]) & used[None, :]
    tl.store(targets_ptr + row, tl.sum(tl.where(chosen, output, 0.0), 1), mask=row < n)


def exp_targets(
    hidden: Tensor,
    weight: Tensor,
    tokens: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    *,
    inner: float = 0.0,
    softcap: bool = False,
    depth: int = 64,
    width: int = WIDTH,
) -> None:
    """targets[i] = the head's output of row i at column tokens[i]; 0 for an id outside [0, V).

    hidden (n, D) and weight (V, D) bf16, tokens (n,) int64, targets (n,) fp32; see `exp_logits`.
    `depth`, a step along D, is that of `exp_logits`; `width` the columns of the product.
    """
    (n, D), V = hidden.shape, weight.shape[0]
    if n == 0:
        return
    with on_device(hidden):
        _exp_targets_kernel[(triton.cdiv(n, ROWS),)](
            hidden,
            weight,
            tokens,
            bias,
            targets,
            n,
            V,
            D,
            hidden.stride(0),
            weight.stride(0),
            inner,
            HAS_SOFTCAP=softcap,
            ROWS=ROWS,
            WIDTH=width,
            K=depth,
            num_warps=4,
            enable_fp_fusion=False,
        )
