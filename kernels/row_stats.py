"""Log-prob of the sampled token and entropy of every row: one read of the logits."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._layout import launch_rows, row_layout, row_stride
from ._rows import load_inverse_temperature, load_token_logit, row_offset, sweep_row, token_logprob

_PER_ROW = ["tokens_ptr", "live_ptr", "temperatures_ptr"]
_OUTPUTS = ["logprobs_ptr", "entropy_ptr", "row_max_ptr", "log_sum_ptr"]


@triton.jit(do_not_specialize_on_alignment=[*_PER_ROW, *_OUTPUTS])
def _row_stats_kernel(
    logits_ptr,  # (N, V)
    tokens_ptr,  # (N,)
    live_ptr,  # (N,) or None
    temperatures_ptr,  # (N,) or None
    logprobs_ptr,  # (N,)
    entropy_ptr,  # (N,)
    row_max_ptr,  # (N,)
    log_sum_ptr,  # (N,)
    logits_stride,
    V,
    body,
    temperature,
    STEP: tl.constexpr,
    KEPT: tl.constexpr,
    LANES: tl.constexpr,
    WIDTH: tl.constexpr,
    ADJACENT: tl.constexpr,
):
    row = tl.program_id(0)
    logprob = 0.0
    entropy = 0.0
    row_max = 0.0
    log_sum = 0.0
    live = True if live_ptr is None else tl.load(live_ptr + row) != 0
    if live:
        row_ptr = logits_ptr + row_offset(logits_stride)
        inverse_temperature = load_inverse_temperature(temperature, temperatures_ptr)
        token_logit = load_token_logit(row_ptr, tl.load(tokens_ptr + row), V)
        row_max, log_sum, entropy, _ = sweep_row(
            row_ptr, V, body, inverse_temperature, STEP, KEPT, LANES, WIDTH, ADJACENT
        )
        logprob = token_logprob(token_logit, inverse_temperature, row_max, log_sum)
    tl.store(logprobs_ptr + row, logprob)
    tl.store(entropy_ptr + row, entropy)
    tl.store(row_max_ptr + row, row_max)
    tl.store(log_sum_ptr + row, log_sum)


def row_stats(
    logits: Tensor,
    tokens: Tensor,
    temperature: float,
    temperatures: Tensor | None,
    live: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(logprobs, entropy, row_max, log_sum), each (N,) fp32, of (N, V) logits of unit stride in V.

    `tokens` (N,) int32 or int64; `temperatures` (N,) fp32 takes the place of `temperature`; rows
    where `live` (N,) bool is False are not read and give 0.
    """
    outputs = tuple(
        torch.empty(logits.shape[0], dtype=torch.float32, device=logits.device) for _ in range(4)
    )
    layout, V = row_layout(logits), logits.shape[1]
    launch_rows(
        _row_stats_kernel,
        logits,
        layout,
        logits,
        tokens,
        live,
        temperatures,
        *outputs,
        row_stride(logits),
        V,
        layout.body(V),
        temperature,
        **layout._asdict(),
    )
    return outputs
