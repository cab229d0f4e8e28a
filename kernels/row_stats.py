"""Log-prob of the sampled token and entropy of every row: one read of the logits."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._layout import launch_rows, row_layout, row_stride
from ._rows import (
    load_inverse_temperature,
    load_token_logit,
    row_offset,
    sweep_row,
    token_logprob,
    wave_columns,
)

_PER_ROW = ["tokens_ptr", "mask_ptr", "temperatures_ptr"]
_OUTPUTS = ["logprobs_ptr", "entropy_ptr", "row_max_ptr", "log_sum_ptr"]
_DETAILS = ["log_sum_sq_probs_ptr", "mean_logits_ptr", "is_top1_ptr"]


@triton.jit
def _row_details(
    row_ptr,
    token,
    token_logit,
    V,
    inverse_temperature,
    row_max,
    log_sum,
    LAYOUT: tl.constexpr,
):
    """log sum p^2, mean of u, and whether the token is the first maximum, in a sweep of their own.

    The statistics are known by then, so nothing is rescaled, and sweep_row stays what every other
    kernel compiles. The row comes from L2.
    """
    LANES: tl.constexpr = LAYOUT.LANES
    squares = tl.zeros((LANES,), tl.float32)
    total = tl.zeros((LANES,), tl.float32)
    before = tl.full((LANES,), float("-inf"), tl.float32)  # the largest logit left of the token
    after = tl.full((LANES,), float("-inf"), tl.float32)
    for start in range(0, V, LANES * LAYOUT.WIDTH):
        columns = wave_columns(start, LAYOUT)
        z = tl.load(row_ptr + columns, mask=columns < V, other=float("-inf")).to(tl.float32)
        exps = tl.exp(tl.fma(z, inverse_temperature, -row_max))
        squares += tl.sum(exps * exps, 1)
        total += tl.sum(tl.where(columns < V, z, 0.0), 1)
        left = tl.where(columns < token, z, float("-inf"))
        right = tl.where(columns > token, z, float("-inf"))
        before = tl.maximum(before, tl.max(left, 1))
        after = tl.maximum(after, tl.max(right, 1))
    is_top1 = (token_logit > tl.max(before, 0)) & (token_logit >= tl.max(after, 0))
    mean = tl.sum(total, 0) * inverse_temperature / V
    return tl.log(tl.sum(squares, 0)) - 2.0 * log_sum, mean, is_top1


@triton.jit(do_not_specialize_on_alignment=[*_PER_ROW, *_OUTPUTS, *_DETAILS])
def _row_stats_kernel(
    logits_ptr,  # (N, V)
    tokens_ptr,  # (N,)
    mask_ptr,  # (N,) or None
    temperatures_ptr,  # (N,) or None
    logprobs_ptr,  # (N,)
    entropy_ptr,  # (N,)
    row_max_ptr,  # (N,)
    log_sum_ptr,  # (N,)
    log_sum_sq_probs_ptr,  # (N,) or None, as the next two
    mean_logits_ptr,  # (N,)
    is_top1_ptr,  # (N,)
    logits_stride,
    V,
    body,
    temperature,
    LAYOUT: tl.constexpr,
):
    row = tl.program_id(0)
    logprob = 0.0
    entropy = 0.0
    row_max = 0.0
    log_sum = 0.0
    log_sum_sq_probs = 0.0
    mean_logit = 0.0
    is_top1 = False
    mask = True if mask_ptr is None else tl.load(mask_ptr + row) != 0
    if mask:
        row_ptr = logits_ptr + row_offset(logits_stride)
        inverse_temperature = load_inverse_temperature(temperature, temperatures_ptr)
        token = tl.load(tokens_ptr + row)
        token_logit = load_token_logit(row_ptr, token, V)
        row_max, log_sum, entropy, _ = sweep_row(row_ptr, V, body, inverse_temperature, LAYOUT)
        logprob = token_logprob(token_logit, inverse_temperature, row_max, log_sum)
        if is_top1_ptr is not None:
            log_sum_sq_probs, mean_logit, is_top1 = _row_details(
                row_ptr,
                token,
                token_logit,
                V,
                inverse_temperature,
                row_max,
                log_sum,
                LAYOUT,
            )
            is_top1 = is_top1 & (logprob == logprob)
    tl.store(logprobs_ptr + row, logprob)
    tl.store(entropy_ptr + row, entropy)
    tl.store(row_max_ptr + row, row_max)
    tl.store(log_sum_ptr + row, log_sum)
    if is_top1_ptr is not None:
        tl.store(log_sum_sq_probs_ptr + row, log_sum_sq_probs)
        tl.store(mean_logits_ptr + row, mean_logit)
        tl.store(is_top1_ptr + row, is_top1)


def row_stats(
    logits: Tensor,
    tokens: Tensor,
    temperature: float,
    temperatures: Tensor | None,
    mask: Tensor | None,
    details: bool = False,
) -> tuple[Tensor, ...]:
    """(logprobs, entropy, row_max, log_sum), each (N,) fp32, of (N, V) logits of unit stride in V.

    With `details` also log_sum_sq_probs and mean_logits, (N,) fp32, and is_top1, (N,) bool, from a
    second sweep of the same launch, over a row that L2 holds.
    `tokens` (N,) int32 or int64; `temperatures` (N,) fp32 takes the place of `temperature`; rows
    where `mask` (N,) bool is False are not read and give 0.
    """
    dtypes = [torch.float32] * 4 + ([torch.float32] * 2 + [torch.bool]) * details
    outputs = tuple(torch.empty(logits.shape[0], dtype=d, device=logits.device) for d in dtypes)
    layout, V = row_layout(logits), logits.shape[1]
    launch_rows(
        _row_stats_kernel,
        logits,
        layout,
        logits,
        tokens,
        mask,
        temperatures,
        *outputs,
        *([] if details else [None] * 3),
        row_stride(logits),
        V,
        layout.body(V),
        temperature,
        LAYOUT=layout,
    )
    return outputs
