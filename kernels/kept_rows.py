"""Rows over their kept sets: gathered dot products with rows of the head, and their gradients.

    z_j = gain * (h . w_j + b_j), or its tanh, of ids j; u = z / T, p = softmax(u)
    slope_j = (gain / T) * (c * (1[j = y] - p_j) - e * p_j * (log p_j + H)), * (1 - z_j^2) with tanh
    dh = sum_j slope_j w_j      dw_j = sum over the rows that kept j, in order, of slope_j h

One program per row, and one per row of dW, which it writes whatever stands there: every sum has one
owner and one order. A row with one id, a masked one, and a slope of 0 read neither h nor w.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._layout import RowLayout, launch_rows, row_stride
from ._rows import as_fp32, load_inverse_temperature, row_offset, without_subnormals
from ._token_loss import _one_minus_exp as one_minus_exp

_LAYOUT = RowLayout(LANES=128, WIDTH=4, ADJACENT=True, STEP=1, KEPT=0)  # 4 warps; the rest unused
_IDS = 8  # rows of the head, or of the hidden states, that a program reads at a time
_COLUMNS = 512  # and how much of them
_VECTORS = ["tokens_ptr", "ids_ptr", "offsets_ptr", "temperatures_ptr", "logits_ptr"]


@triton.jit
def _span(offsets_ptr, kept):
    """Where this program's row begins and ends, inside the ids whatever the offsets are."""
    row = tl.program_id(0)
    begin = tl.maximum(tl.load(offsets_ptr + row), 0)
    return begin, tl.minimum(tl.load(offsets_ptr + row + 1), kept)


@triton.jit
def _load_rows(matrix_ptr, stride, rows, valid, columns, D):
    """A tile (rows, columns) in fp32, 0 in rows that are not valid and beyond D."""
    places = matrix_ptr + rows[:, None] * stride + columns[None, :]
    return tl.load(places, mask=valid[:, None] & (columns < D)[None, :], other=0.0).to(tl.float32)


@triton.jit
def _tanh(z):
    rest = one_minus_exp(-2.0 * tl.abs(z))
    size = rest / (2.0 - rest)
    return tl.where(z < 0, -size, size)


@triton.jit(do_not_specialize=["kept"], do_not_specialize_on_alignment=_VECTORS)
def _kept_stats_kernel(
    hidden_ptr,  # (N, D)
    weight_ptr,  # (V, D)
    bias_ptr,  # (V,) or None
    tokens_ptr,  # (N,)
    ids_ptr,  # (M,)
    offsets_ptr,  # (N + 1,)
    temperatures_ptr,  # (N,) or None
    mask_ptr,  # (N,) or None
    logits_ptr,  # (M,), out
    stats_ptr,  # (4, N), out
    hidden_stride,
    weight_stride,
    kept,
    V,
    D,
    temperature,
    gain,
    CAPPED: tl.constexpr,
    IDS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row, rows = tl.program_id(0), tl.num_programs(0)
    begin, end = _span(offsets_ptr, kept)
    token = tl.load(tokens_ptr + row)
    mask = True if mask_ptr is None else tl.load(mask_ptr + row) != 0
    logprob, entropy, top, log_sum = 0.0, 0.0, 0.0, 0.0
    if mask & (end - begin > 1):
        inverse_t = load_inverse_temperature(temperature, temperatures_ptr)
        hidden_row = hidden_ptr + row_offset(hidden_stride)
        top, total, moment, target, found = -float("inf"), 0.0, 0.0, -float("inf"), 0
        for start in range(begin, end, IDS):
            at = start + tl.arange(0, IDS)
            ids = tl.load(ids_ptr + at, mask=at < end, other=-1)
            valid = (ids >= 0) & (ids < V)
            products = tl.zeros((IDS, COLUMNS), tl.float32)
            for column in range(0, D, COLUMNS):
                columns = column + tl.arange(0, COLUMNS)
                h = tl.load(hidden_row + columns, mask=columns < D, other=0.0).to(tl.float32)
                products += _load_rows(weight_ptr, weight_stride, ids, valid, columns, D) * h
            z = tl.sum(products, 1)
            if bias_ptr is not None:
                z += tl.load(bias_ptr + ids, mask=valid, other=0.0).to(tl.float32)
            z = z * as_fp32(gain)
            z = _tanh(z) if CAPPED else z
            z = tl.where(valid, z, float("nan"))  # an id that is none: this row alone
            tl.store(logits_ptr + at, z, mask=at < end)
            u = tl.where(at < end, z * inverse_t, -float("inf"))
            previous = top
            top = tl.maximum(top, tl.max(u, 0))
            origin = tl.where(top == -float("inf"), 0.0, top)
            shift = tl.where(previous == -float("inf"), 0.0, previous - origin)
            weights = tl.exp(u - origin)
            shifted = tl.where(weights == 0, 0.0, (u - origin) * weights)
            moment = (moment + total * shift) * tl.exp(shift) + tl.sum(shifted, 0)
            total = total * tl.exp(shift) + tl.sum(weights, 0)
            is_token = (at < end) & (ids == token)
            found += tl.sum(is_token.to(tl.int32), 0)
            target = tl.maximum(target, tl.max(tl.where(is_token, u, -float("inf")), 0))
        log_sum = tl.log(total)
        logprob = (target - top) - log_sum
        logprob = tl.where(logprob > 0, 0.0, tl.where(found == 0, float("nan"), logprob))
        entropy = log_sum - moment / total
        entropy = tl.where(entropy < 0, 0.0, entropy)
    else:
        for start in range(begin, end, IDS):
            at = start + tl.arange(0, IDS)
            tl.store(logits_ptr + at, tl.zeros((IDS,), tl.float32), mask=at < end)
        if mask & (end - begin == 1):
            logprob = tl.where(tl.load(ids_ptr + begin) == token, 0.0, float("nan"))
    tl.store(stats_ptr + row, logprob)
    tl.store(stats_ptr + rows + row, entropy)
    tl.store(stats_ptr + 2 * rows + row, top)
    tl.store(stats_ptr + 3 * rows + row, log_sum)


@triton.jit(
    do_not_specialize=["kept"],
    do_not_specialize_on_alignment=[*_VECTORS, "slopes_ptr", "c_ptr", "e_ptr"],
)
def _kept_hidden_grad_kernel(
    weight_ptr,  # (V, D)
    tokens_ptr,  # (N,)
    ids_ptr,  # (M,)
    offsets_ptr,  # (N + 1,)
    temperatures_ptr,  # (N,) or None
    logits_ptr,  # (M,)
    logprobs_ptr,  # (N,)
    entropy_ptr,  # (N,)
    row_max_ptr,  # (N,)
    log_sum_ptr,  # (N,)
    c_ptr,  # (N,)
    e_ptr,  # (N,) or None
    slopes_ptr,  # (M,), out
    grad_ptr,  # (N, D), out, or None
    weight_stride,
    grad_stride,
    kept,
    V,
    D,
    temperature,
    gain,
    CAPPED: tl.constexpr,
    IDS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row = tl.program_id(0)
    begin, end = _span(offsets_ptr, kept)
    c = tl.load(c_ptr + row)
    e = 0.0 if e_ptr is None else tl.load(e_ptr + row)
    flat = (end - begin < 2) | ((c == 0) & (e == 0))
    inverse_t = load_inverse_temperature(temperature, temperatures_ptr)
    row_max, log_sum = tl.load(row_max_ptr + row), tl.load(log_sum_ptr + row)
    rest, entropy = one_minus_exp(tl.load(logprobs_ptr + row)), tl.load(entropy_ptr + row)
    token = tl.load(tokens_ptr + row)
    for start in range(begin, end, IDS):
        at = start + tl.arange(0, IDS)
        ids = tl.load(ids_ptr + at, mask=at < end, other=-1)
        z = tl.load(logits_ptr + at, mask=at < end, other=0.0)
        log_p = (z * inverse_t - row_max) - log_sum
        p = tl.exp(log_p)
        slope = c * tl.where(ids == token, rest, -p)
        if e_ptr is not None:
            slope -= tl.where(p == 0, 0.0, e * p * (log_p + entropy))
        slope = slope * (inverse_t * as_fp32(gain))
        slope = slope * (1.0 - z * z) if CAPPED else slope
        tl.store(slopes_ptr + at, tl.where(flat, 0.0, without_subnormals(slope)), mask=at < end)
    if grad_ptr is not None:
        tl.debug_barrier()  # other threads have stored the slopes
        if end > begin:
            for column in range(0, D, COLUMNS):
                columns = column + tl.arange(0, COLUMNS)
                total = tl.zeros((COLUMNS,), tl.float32)
                for start in range(begin, end, IDS):
                    at = start + tl.arange(0, IDS)
                    ids = tl.load(ids_ptr + at, mask=at < end, other=-1)
                    slope = tl.load(slopes_ptr + at, mask=at < end, other=0.0)
                    valid = (slope != 0) & (ids >= 0) & (ids < V)
                    w = _load_rows(weight_ptr, weight_stride, ids, valid, columns, D)
                    total += tl.sum(slope[:, None] * w, 0)
                total = without_subnormals(total).to(grad_ptr.dtype.element_ty)
                tl.store(grad_ptr + row_offset(grad_stride) + columns, total, mask=columns < D)


@triton.jit(do_not_specialize_on_alignment=["slopes_ptr", "order_ptr", "rows_ptr", "starts_ptr"])
def _kept_weight_grad_kernel(
    hidden_ptr,  # (N, D)
    slopes_ptr,  # (M,)
    order_ptr,  # (M,) where the pairs of an id stand, sorted by id and row
    rows_ptr,  # (M,) whose they are
    starts_ptr,  # (V + 1,) of ids in `order`
    weight_grad_ptr,  # (V, D), out, or None
    bias_grad_ptr,  # (V,), out, or None
    hidden_stride,
    grad_stride,
    D,
    ADD: tl.constexpr,
    IDS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    token = tl.program_id(0)
    begin, end = tl.load(starts_ptr + token), tl.load(starts_ptr + token + 1)
    if (end > begin) | (not ADD):
        if weight_grad_ptr is not None:
            for column in range(0, D, COLUMNS):
                columns = column + tl.arange(0, COLUMNS)
                total = tl.zeros((COLUMNS,), tl.float32)
                for start in range(begin, end, IDS):
                    at = start + tl.arange(0, IDS)
                    pairs = tl.load(order_ptr + at, mask=at < end, other=0)
                    slope = tl.load(slopes_ptr + pairs, mask=at < end, other=0.0)
                    rows = tl.load(rows_ptr + pairs, mask=at < end, other=0)
                    h = _load_rows(hidden_ptr, hidden_stride, rows, slope != 0, columns, D)
                    total += tl.sum(slope[:, None] * h, 0)
                place = weight_grad_ptr + row_offset(grad_stride) + columns
                if ADD:
                    total += tl.load(place, mask=columns < D, other=0.0).to(tl.float32)
                total = without_subnormals(total).to(weight_grad_ptr.dtype.element_ty)
                tl.store(place, total, mask=columns < D)
        if bias_grad_ptr is not None:
            sum_of_slopes = 0.0
            for start in range(begin, end, IDS):
                at = start + tl.arange(0, IDS)
                pairs = tl.load(order_ptr + at, mask=at < end, other=0)
                slope = tl.load(slopes_ptr + pairs, mask=at < end, other=0.0)
                sum_of_slopes += tl.sum(slope, 0)
            if ADD:
                sum_of_slopes += tl.load(bias_grad_ptr + token).to(tl.float32)
            sum_of_slopes = without_subnormals(sum_of_slopes)
            tl.store(bias_grad_ptr + token, sum_of_slopes.to(bias_grad_ptr.dtype.element_ty))


def kept_stats(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    tokens: Tensor,
    ids: Tensor,
    offsets: Tensor,
    temperature: float,
    temperatures: Tensor | None,
    gain: float,
    capped: bool,
    mask: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """(logprobs, entropy, row_max, log_sum) as (4, N) fp32, and z of every id, (M,) fp32."""
    stats = torch.empty(4, len(tokens), dtype=torch.float32, device=hidden.device)
    logits = torch.empty(len(ids), dtype=torch.float32, device=hidden.device)
    vectors = (bias, tokens, ids, offsets, temperatures, mask)
    numbers = (len(ids), *weight.shape, temperature, gain)
    launch_rows(
        _kept_stats_kernel,
        hidden,
        _LAYOUT,
        hidden,
        weight,
        *vectors,
        logits,
        stats,
        row_stride(hidden),
        row_stride(weight),
        *numbers,
        CAPPED=capped,
        **_tile(weight),
    )
    return stats, logits


def kept_grad(
    hidden: Tensor,
    weight: Tensor,
    tokens: Tensor,
    ids: Tensor,
    offsets: Tensor,
    temperature: float,
    temperatures: Tensor | None,
    gain: float,
    capped: bool,
    logits: Tensor,
    stats: tuple[Tensor, ...],
    logprob_grad: Tensor,
    entropy_grad: Tensor | None,
    hidden_grad: Tensor | None,
    weight_grad: Tensor | None,
    bias_grad: Tensor | None,
    add: bool,
) -> None:
    """Fill the gradients that are wanted; `add`: add to the head's, where an id occurs."""
    slopes = torch.zeros_like(logits)
    vectors = (tokens, ids, offsets, temperatures, logits, *stats, logprob_grad, entropy_grad)
    launch_rows(
        _kept_hidden_grad_kernel,
        hidden,
        _LAYOUT,
        weight,
        *vectors,
        slopes,
        hidden_grad,
        row_stride(weight),
        0 if hidden_grad is None else row_stride(hidden_grad),
        len(ids),
        *weight.shape,
        temperature,
        gain,
        CAPPED=capped,
        **_tile(weight),
    )
    if weight_grad is None and bias_grad is None:
        return
    ordered, order = ids.sort(stable=True)
    every = torch.arange(max(len(ids), len(weight) + 1), device=ids.device)
    rows = torch.searchsorted(offsets, every[: len(ids)], right=True) - 1
    launch_rows(
        _kept_weight_grad_kernel,
        hidden,
        _LAYOUT,
        hidden,
        slopes,
        order,
        rows.clamp_(0, max(len(tokens) - 1, 0)),
        torch.searchsorted(ordered, every[: len(weight) + 1]),
        weight_grad,
        bias_grad,
        row_stride(hidden),
        0 if weight_grad is None else row_stride(weight_grad),
        weight.shape[1],
        programs=len(weight),
        ADD=add,
        **_tile(weight),
    )


def _tile(weight: Tensor) -> dict[str, int]:
    columns = min(_COLUMNS, triton.next_power_of_2(weight.shape[1]))
    return {"IDS": _IDS, "COLUMNS": columns}
