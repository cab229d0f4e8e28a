"""Device code that the kernels on E = exp(u - o) share: logits of a tile, and numbers of rows.

With z the head's product plus bias, u = z * gain / T (or softcap * tanh(z * gain / softcap) / T)
and an offset o per row, GEMM1 leaves E and, in fp32,

    S = sum_j exp(u_j - o)     M = sum_j exp(u_j - o) (u_j - o)
    log p_y = u_y - o - log S     H = log S - M / S     dL/du_j = -(c / S) (E_j - [j = y] S)

Logarithms are to base 2 throughout, so that an exponential is one fma and one exp2: a row has
slope = log2(e) gain / T and shift = o log2(e). The fp32 shift *is* the offset: o is chosen, so the
rounding of u_y in it is no error. shift = +inf marks a masked row: its E is 0.
"""

import triton
import triton.language as tl

_LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)
_LN_2: tl.constexpr = tl.constexpr(0.6931471805599453)
# exp2 is 0 in fp32 below -149, so this changes no sum; it keeps 0 * -inf out of E (u - o).
LOWEST: tl.constexpr = tl.constexpr(-1e4)


@triton.jit
def head_output(product, column, bias_ptr, V, inner, HAS_SOFTCAP: tl.constexpr):
    """product + bias, or tanh((product + bias) * gain): what a row's slope turns into u.

    `column` has the shape of `product`, or one that broadcasts to it. inner = 2 log2(e) gain.
    """
    if bias_ptr is not None:
        product += tl.load(bias_ptr + column, mask=column < V, other=0.0).to(tl.float32)
    if HAS_SOFTCAP:  # by exp2: absolute error 1e-7, where tanh.approx has 5e-4
        product = 1.0 - 2.0 / (1.0 + tl.exp2(product * inner))
    return product


@triton.jit
def load_rows(pointers, n, ROWS: tl.constexpr):
    """This program's rows, whether they exist, and (S, M, z_y, slope, shift) of each."""
    totals_ptr, targets_ptr, slopes_ptr, shifts_ptr = pointers
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    present = row < n
    total = tl.load(totals_ptr + row, mask=present, other=1.0)
    moment = tl.load(totals_ptr + n + row, mask=present, other=0.0)
    target = tl.load(targets_ptr + row, mask=present, other=0.0)
    slope = tl.load(slopes_ptr + row, mask=present, other=0.0)
    shift = tl.load(shifts_ptr + row, mask=present, other=0.0)
    return row, present, (total, moment, target, slope, shift)


@triton.jit
def is_masked(numbers):
    """Rows that no gradient and no number may come from."""
    return numbers[4] == float("inf")


@triton.jit
def statistics(numbers):
    """log p_y and H in nats, 0 on masked rows. S, the sampled token's term included, is at least 1
    where o = u_y: log p_y <= 0 but for redone rows, whose rounding is cut off."""
    total, moment, target, slope, shift = numbers
    log_total = tl.log(total)
    # One rounding: the fma sees what the rounded shift left of u_y.
    logprob = tl.fma(target, slope, -shift) * _LN_2 - log_total
    logprob = tl.minimum(logprob, 0.0, propagate_nan=tl.PropagateNan.ALL)
    entropy = log_total - moment / total * _LN_2
    entropy = tl.maximum(entropy, 0.0, propagate_nan=tl.PropagateNan.ALL)
    masked = is_masked(numbers)
    return tl.where(masked, 0.0, logprob), tl.where(masked, 0.0, entropy)


@triton.jit
def store_gradient(
    e_ptr,  # (n, V)
    factors_ptr,  # (n,) f
    tokens_ptr,  # (n,)
    row,
    present,
    numbers,
    c,
    gain,
    V,
    e_stride,
    HAS_SOFTCAP: tl.constexpr,
):
    """Make E and f the two factors of the gradient at the product: diag(f) E.

    f = -(c / S) du/dz without the softcap's slope, which E_j carries; E_y becomes
    (p_y - 1) S = exp(u_y - o) - S, to the same rounding that S itself has.
    """
    total, _, target, slope, shift = numbers
    masked = is_masked(numbers)
    factor = -c * (slope * _LN_2) * gain / total
    tl.store(factors_ptr + row, tl.where(masked, 0.0, factor), mask=present)
    column = tl.exp2(tl.fma(target, slope, -shift)) - total
    if HAS_SOFTCAP:
        column *= 1.0 - target * target
    token = tl.load(tokens_ptr + row, mask=present, other=-1).to(tl.int64)
    inside = present & (token >= 0) & (token < V) & (masked == 0)
    at = e_ptr + row.to(tl.int64) * e_stride + token
    tl.store(at, column.to(tl.bfloat16), mask=inside)
