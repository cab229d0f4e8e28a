"""Device code that the row kernels share: addressing, the first sweep, the gradient of a block.

The first sweep keeps statistics per thread (a *lane*) of its own columns, so that the loop over a
row has no barrier; one merge at the end makes them the row's. `row_stats` and `row_policy_loss`
compile this same code with the same layout (_layout.py), which makes them agree bit by bit.

Blocks are (waves, LANES, VECTOR): a lane owns VECTOR neighbouring columns of every wave, one load.
"""

import triton
import triton.language as tl

from ._layout import CHUNK_PER_LANE

_CHUNK_PER_LANE: tl.constexpr = tl.constexpr(CHUNK_PER_LANE)
# exp is 0 in fp32 below -104, so a centered logit may be raised to this without changing any sum;
# it keeps 0 * -inf out of p * (u - m). NaN needs no care there: p itself is NaN then.
_LOWEST: tl.constexpr = tl.constexpr(-200.0)
_SMALLEST_NORMAL: tl.constexpr = tl.constexpr(2.0**-126)
_LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)


@triton.jit
def row_offset(stride):
    """Elements before this program's row, in 64 bits: 2^31 is passed at 14,134 rows of 151,936."""
    return tl.program_id(0).to(tl.int64) * stride


@triton.jit
def as_fp32(number):
    """A runtime number in fp32, be it passed as fp32 or, by older torch.compile, as fp64."""
    return tl.full((), number, tl.float32)


@triton.jit
def load_inverse_temperature(temperature, temperatures_ptr):
    """1 / T of this row: from the per-token temperatures where given, else from the number."""
    if temperatures_ptr is None:
        value = as_fp32(temperature)
    else:
        value = tl.load(temperatures_ptr + tl.program_id(0))
    return 1.0 / value


@triton.jit
def load_token_logit(row_ptr, token, V):
    """The sampled token's logit in fp32; NaN, and no read, where the id is outside [0, V)."""
    inside = (token >= 0) & (token < V)
    return tl.load(row_ptr + token, mask=inside, other=float("nan")).to(tl.float32)


@triton.jit
def block_columns(start, WIDTH: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr):
    """Columns start ... start + WIDTH - 1 as (waves, LANES, VECTOR)."""
    WAVE: tl.constexpr = LANES * VECTOR
    waves = tl.arange(0, WIDTH // WAVE) * WAVE
    lanes = tl.arange(0, LANES) * VECTOR
    return start + waves[:, None, None] + lanes[None, :, None] + tl.arange(0, VECTOR)[None, None, :]


@triton.jit
def store_block(row_ptr, columns, values, V):
    """Round values to the row's dtype and write the columns that lie within it."""
    tl.store(row_ptr + columns, values.to(row_ptr.dtype.element_ty), mask=columns < V)


@triton.jit
def fill_row_with_zero(
    row_ptr, V, BLOCK_V: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr
):
    """Write zeros over a row without reading it."""
    for start in range(0, V, BLOCK_V):
        columns = block_columns(start, BLOCK_V, LANES, VECTOR)
        store_block(row_ptr, columns, tl.zeros(columns.shape, tl.float32), V)


@triton.jit
def _exp(x):
    """exp by exp2, which flushes results below 1e-38 to 0; tl.exp spends three more operations."""
    return tl.exp2(x * _LOG2_E)


@triton.jit
def _origin(top, inverse_temperature):
    """What is subtracted before exp: the largest u so far, 0 while there is no finite logit."""
    return tl.where(top == float("-inf"), 0.0, top * inverse_temperature)


@triton.jit
def _rescale(top, total, moment, origin, inverse_temperature):
    """Turn sums relative to the origin a of `top` into sums relative to `origin` b.

    sum (u - b) exp(u - b) = exp(a - b) * (sum (u - a) exp(u - a) + (a - b) * sum exp(u - a))
    """
    shift = tl.where(top == float("-inf"), 0.0, _origin(top, inverse_temperature) - origin)
    scale = _exp(shift)
    return total * scale, (moment + shift * total) * scale


@triton.jit
def _accumulate(top, total, moment, logits, inverse_temperature):
    """Take a block into every lane's largest logit, sum exp and sum (u - m) exp, all (LANES,)."""
    z = logits.to(tl.float32)
    new_top = tl.maximum(top, tl.max(tl.max(z, 2), 0))
    origin = _origin(new_top, inverse_temperature)
    total, moment = _rescale(top, total, moment, origin, inverse_temperature)
    # One rounding, of the difference: u itself, rounded at the size of the logits, would cost 5e-4
    # at an offset of 1e4.
    centered = tl.fma(z, inverse_temperature, -origin[None, :, None])
    exps = _exp(centered)
    total += tl.sum(tl.sum(exps, 2), 0)
    moment += tl.sum(tl.sum(exps * tl.maximum(centered, _LOWEST), 2), 0)
    return new_top, total, moment


@triton.jit
def _merge_lanes(top, total, moment, inverse_temperature):
    """Lane statistics (LANES,) -> the row's maximum m, log of the sum, and entropy."""
    row_top = tl.max(top, 0)
    origin = _origin(row_top, inverse_temperature)
    total, moment = _rescale(top, total, moment, origin, inverse_temperature)
    row_total = tl.sum(total, 0)
    log_sum = tl.log(row_total)
    entropy = log_sum - tl.sum(moment, 0) / row_total
    entropy = tl.maximum(entropy, 0.0, propagate_nan=tl.PropagateNan.ALL)
    return row_top * inverse_temperature, log_sum, entropy


@triton.jit
def sweep_row(
    row_ptr,
    V,
    body,
    inverse_temperature,
    BLOCK_V: tl.constexpr,
    KEPT: tl.constexpr,
    LANES: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """First sweep: m, log s and entropy of the row, and its tail as loaded, last chunk first."""
    CHUNK: tl.constexpr = _CHUNK_PER_LANE * LANES
    top = tl.full((LANES,), float("-inf"), tl.float32)
    total = tl.zeros((LANES,), tl.float32)
    moment = tl.zeros((LANES,), tl.float32)
    for start in range(0, body, BLOCK_V):
        block = tl.load(row_ptr + block_columns(start, BLOCK_V, LANES, VECTOR))
        top, total, moment = _accumulate(top, total, moment, block, inverse_temperature)
    kept = ()
    for i in tl.static_range(KEPT):
        columns = block_columns(body + i * CHUNK, CHUNK, LANES, VECTOR)
        chunk = tl.load(row_ptr + columns, mask=columns < V, other=float("-inf"))
        top, total, moment = _accumulate(top, total, moment, chunk, inverse_temperature)
        kept = (chunk,) + kept  # noqa: RUF005 - Triton has no starred tuples
    row_max, log_sum, entropy = _merge_lanes(top, total, moment, inverse_temperature)
    return row_max, log_sum, entropy, kept


@triton.jit
def token_logprob(token_logit, inverse_temperature, row_max, log_sum):
    """(u_y - m) - log s; at most 0, also where rounding would leave one logit of many above."""
    logprob = tl.fma(token_logit, inverse_temperature, -row_max) - log_sum
    return tl.minimum(logprob, 0.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def without_subnormals(gradient):
    """The same with 0 for numbers below 2^-126, as every backend writes them; NaN stays."""
    return tl.where(tl.abs(gradient) < _SMALLEST_NORMAL, 0.0, gradient)


@triton.jit
def softmax_gradient(logits, row, inverse_temperature, c, e, HAS_ENTROPY_GRAD: tl.constexpr):
    """-c p_j + e p_j (E_p[u] - u_j), the gradient save for the token's own term c.

    `row` is (m, log s, E_p[u - m]); any shape of logits.
    """
    row_max, log_sum, mean = row
    centered = tl.fma(logits.to(tl.float32), inverse_temperature, -row_max)
    # Not by exp2, which _exp shows to be cheaper: ptxas then interleaves so many columns that
    # row_policy_loss takes 128 registers in place of 77 and spills 16 bytes on sm_100.
    p = tl.exp(centered - log_sum)
    return without_subnormals(
        p * (e * (mean - tl.maximum(centered, _LOWEST)) - c if HAS_ENTROPY_GRAD else -c)
    )


@triton.jit
def _still_packed(chunk, V):
    """The same 2-byte logits, such that the compiler keeps them two to a register until here.

    It would otherwise widen them once for both sweeps, and keep them wide: 264 bytes of stack where
    this needs none (128 logits a thread, sm_90). V >> 31 is 0, which the compiler cannot know.
    """
    if chunk.dtype.primitive_bitwidth == 16:
        zero = (V >> 31).to(tl.int16)
        return (chunk.to(tl.int16, bitcast=True) ^ zero).to(chunk.dtype, bitcast=True)
    else:
        return chunk


@triton.jit
def write_kept_gradient(
    kept,
    out_row_ptr,
    V,
    body,
    row,
    inverse_temperature,
    c,
    e,
    HAS_ENTROPY_GRAD: tl.constexpr,
    KEPT: tl.constexpr,
    LANES: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """Second sweep over the kept tail, columns [body, V), from the last to the first."""
    CHUNK: tl.constexpr = _CHUNK_PER_LANE * LANES
    for i in tl.static_range(KEPT):
        columns = block_columns(body + (KEPT - 1 - i) * CHUNK, CHUNK, LANES, VECTOR)
        logits = _still_packed(kept[i], V)
        gradient = softmax_gradient(logits, row, inverse_temperature, c, e, HAS_ENTROPY_GRAD)
        store_block(out_row_ptr, columns, gradient, V)


@triton.jit
def write_body_gradient(
    row_ptr,
    out_row_ptr,
    end,
    row,
    inverse_temperature,
    c,
    e,
    HAS_ENTROPY_GRAD: tl.constexpr,
    SHARED_ROWS: tl.constexpr,
    BLOCK_V: tl.constexpr,
    LANES: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """Second sweep over columns [0, end), whole blocks, from the last to the first.

    With SHARED_ROWS the narrower gradient lies in the upper half of the logits' own row: it covers
    only columns that the sweep has passed, provided that all threads have loaded a block before one
    stores it.
    """
    for done in range(0, end, BLOCK_V):
        columns = block_columns(end - BLOCK_V - done, BLOCK_V, LANES, VECTOR)
        logits = tl.load(row_ptr + columns)
        if SHARED_ROWS:
            tl.debug_barrier()
        gradient = softmax_gradient(logits, row, inverse_temperature, c, e, HAS_ENTROPY_GRAD)
        tl.store(out_row_ptr + columns, gradient.to(out_row_ptr.dtype.element_ty))


@triton.jit
def write_token_gradient(
    out_row_ptr,
    token,
    token_logit,
    V,
    row,
    inverse_temperature,
    c,
    e,
    HAS_ENTROPY_GRAD: tl.constexpr,
):
    """Write the token's column again, with its own term c; nothing for an id outside [0, V).

    One store a row instead of a comparison, an addition and a selection a column.
    """
    gradient = c + softmax_gradient(token_logit, row, inverse_temperature, c, e, HAS_ENTROPY_GRAD)
    gradient = without_subnormals(gradient)
    tl.debug_barrier()  # another thread has stored this column without the term
    inside = (token >= 0) & (token < V)
    tl.store(out_row_ptr + token, gradient.to(out_row_ptr.dtype.element_ty), mask=inside)
