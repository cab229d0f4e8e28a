"""Device code that the row kernels share: addressing, the first sweep, the gradient of a wave.

The first sweep keeps statistics per thread (a *lane*) of its own columns, so that the loop over a
row has no barrier; one merge at the end makes them the row's. `row_stats` and `row_policy_loss`
compile this same code with the same layout (_layout.py), which makes them agree bit by bit.

LAYOUT is a `RowLayout` of _layout.py. A wave is a tensor (LANES, WIDTH), a block of several waves a
tuple of them. One tensor (waves, LANES, WIDTH) would leave it to the compiler which of its axes
become threads: Triton 3.9 makes them the lanes, 3.6 lanes and waves, which costs 24 shuffles and 8
rescales a step.
"""

import triton
import triton.language as tl
from triton.language.target_info import is_cuda

# exp is 0 in fp32 below -104, so a centered logit may be raised to this without changing any sum;
# it keeps 0 * -inf out of p * (u - m). NaN needs no care there: p itself is NaN then.
_LOWEST: tl.constexpr = tl.constexpr(-200.0)
# Two of them in a 32-bit word.
_MINUS_INF_BF16: tl.constexpr = tl.constexpr(-8323200)  # 0xFF80FF80
_MINUS_INF_FP16: tl.constexpr = tl.constexpr(-67044352)  # 0xFC00FC00
_SMALLEST_NORMAL: tl.constexpr = tl.constexpr(2.0**-126)
_TAIL_COLUMNS: tl.constexpr = tl.constexpr(16)  # of a lane, that are summed up at a time
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
def wave_columns(start, LAYOUT: tl.constexpr, PER_WORD: tl.constexpr = 1):
    """Columns start ... start + LANES * WIDTH - 1 as (LANES, WIDTH); `start` and they in words.

    ADJACENT: a lane's are neighbours, one wide load. Else they lie LANES apart, and each is a load
    that neighbouring lanes share a cache line in.
    """
    LANES: tl.constexpr = LAYOUT.LANES  # a field itself is no tl.constexpr in Triton 3.6
    WIDTH: tl.constexpr = LAYOUT.WIDTH // PER_WORD
    lanes = tl.arange(0, LANES)[:, None]
    own = tl.arange(0, WIDTH)[None, :]
    if LAYOUT.ADJACENT:
        return start + lanes * WIDTH + own
    else:
        return start + lanes + own * LANES


@triton.jit
def load_block(row_ptr, start, LAYOUT: tl.constexpr):
    """The STEP waves from column `start` on, all of them within the row."""
    STEP: tl.constexpr = LAYOUT.STEP
    waves = ()
    for i in tl.static_range(STEP):
        columns = wave_columns(start + i * LAYOUT.LANES * LAYOUT.WIDTH, LAYOUT)
        waves = waves + (tl.load(row_ptr + columns),)  # noqa: RUF005 - Triton has no starred tuples
    return waves


@triton.jit
def load_tail(row_ptr, start, V, LAYOUT: tl.constexpr):
    """The KEPT waves from column `start` on, the last ones of the row; -inf beyond column V - 1.

    Neighbouring 2-byte logits come as int32 words of two, which `unpack` takes apart: they stay in
    registers for long. Only the last wave may reach beyond the row: a mask for each costs more
    registers than sm_80 has.
    """
    dtype: tl.constexpr = row_ptr.dtype.element_ty
    if LAYOUT.ADJACENT and dtype.primitive_bitwidth == 16:
        PER_WORD: tl.constexpr = 2
        words_ptr = row_ptr.to(tl.pointer_type(tl.int32), bitcast=True)
        beyond = _MINUS_INF_FP16 if dtype == tl.float16 else _MINUS_INF_BF16
    else:
        PER_WORD: tl.constexpr = 1
        words_ptr = row_ptr
        beyond = float("-inf")
    KEPT: tl.constexpr = LAYOUT.KEPT
    WAVE: tl.constexpr = LAYOUT.LANES * LAYOUT.WIDTH // PER_WORD
    tail = ()
    for i in tl.static_range(KEPT):
        words = wave_columns(start // PER_WORD + i * WAVE, LAYOUT, PER_WORD)
        if i < KEPT - 1:
            wave = tl.load(words_ptr + words)
        else:
            wave = tl.load(words_ptr + words, mask=words < V // PER_WORD, other=beyond)
        tail = tail + (wave,)  # noqa: RUF005
    return tail


@triton.jit
def unpack(wave, dtype: tl.constexpr):
    """A wave of the tail as logits of `dtype`, (LANES, WIDTH)."""
    if wave.dtype == tl.int32:
        low = wave.to(tl.int16).to(dtype, bitcast=True)
        high = (wave >> 16).to(tl.int16).to(dtype, bitcast=True)
        return tl.reshape(tl.join(low, high), (wave.shape[0], 2 * wave.shape[1]))
    else:
        return wave


@triton.jit
def store_wave(row_ptr, columns, values, V):
    """Round values to the row's dtype and write the columns that lie within it."""
    tl.store(row_ptr + columns, values.to(row_ptr.dtype.element_ty), mask=columns < V)


@triton.jit
def fill_row_with_zero(row_ptr, V, LAYOUT: tl.constexpr):
    """Write zeros over a row without reading it."""
    STEP: tl.constexpr = LAYOUT.STEP
    WAVE: tl.constexpr = LAYOUT.LANES * LAYOUT.WIDTH
    for start in range(0, V, STEP * WAVE):
        for i in tl.static_range(STEP):
            columns = wave_columns(start + i * WAVE, LAYOUT)
            store_wave(row_ptr, columns, tl.zeros(columns.shape, tl.float32), V)


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
def _accumulate(top, total, moment, waves, inverse_temperature):
    """Take a block into every lane's largest logit, sum exp and sum (u - m) exp, all (LANES,)."""
    new_top = top
    for i in tl.static_range(len(waves)):
        new_top = tl.maximum(new_top, tl.max(waves[i].to(tl.float32), 1))
    origin = _origin(new_top, inverse_temperature)
    total, moment = _rescale(top, total, moment, origin, inverse_temperature)
    for i in tl.static_range(len(waves)):
        # One rounding, of the difference: u itself, rounded at the size of the logits, would cost
        # 5e-4 at an offset of 1e4.
        centered = tl.fma(waves[i].to(tl.float32), inverse_temperature, -origin[:, None])
        exps = _exp(centered)
        total += tl.sum(exps, 1)
        moment += tl.sum(exps * tl.maximum(centered, _LOWEST), 1)
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
def sweep_row(row_ptr, V, body, inverse_temperature, LAYOUT: tl.constexpr):
    """First sweep: m, log s and entropy of the row, and its tail as loaded."""
    LANES: tl.constexpr = LAYOUT.LANES
    top = tl.full((LANES,), float("-inf"), tl.float32)
    total = tl.zeros((LANES,), tl.float32)
    moment = tl.zeros((LANES,), tl.float32)
    for start in range(0, body, LAYOUT.STEP * LANES * LAYOUT.WIDTH):
        block = load_block(row_ptr, start, LAYOUT)
        top, total, moment = _accumulate(top, total, moment, block, inverse_temperature)
    kept = load_tail(row_ptr, body, V, LAYOUT)
    dtype: tl.constexpr = row_ptr.dtype.element_ty
    # In smaller pieces than the body's: beside the tail itself there is no room for more.
    KEPT: tl.constexpr = LAYOUT.KEPT
    PIECE: tl.constexpr = _TAIL_COLUMNS // LAYOUT.WIDTH
    for i in tl.static_range(0, KEPT, PIECE):
        waves = ()
        for j in tl.static_range(i, min(i + PIECE, KEPT)):
            waves = waves + (unpack(kept[j], dtype),)  # noqa: RUF005
        top, total, moment = _accumulate(top, total, moment, waves, inverse_temperature)
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
def flushing_product(a, b):
    """`without_subnormals(a * b)`; NVIDIA's multiplication can, other GPUs spend two operations."""
    if is_cuda():
        return tl.inline_asm_elementwise(
            "mul.ftz.f32 $0, $1, $2;", "=f,f,f", [a, b], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return without_subnormals(a * b)


@triton.jit
def softmax_gradient(logits, row, inverse_temperature, c, e, HAS_ENTROPY_GRAD: tl.constexpr):
    """-c p_j + e p_j (E_p[u] - u_j), the gradient save for the token's own term c.

    `row` is (m, log s, E_p[u - m]); any shape of logits.
    """
    row_max, log_sum, mean = row
    centered = tl.fma(logits.to(tl.float32), inverse_temperature, -row_max)
    p = tl.exp2(tl.fma(centered, _LOG2_E, -log_sum * _LOG2_E))
    if HAS_ENTROPY_GRAD:
        return flushing_product(p, tl.fma(-e, tl.maximum(centered, _LOWEST), e * mean - c))
    else:
        return flushing_product(p, -c)


@triton.jit
def _still_packed(wave, V):
    """The same words, such that the compiler keeps them two logits to a register until here.

    It would otherwise widen them once for both sweeps, and keep them wide: 264 bytes of stack where
    this needs none (128 logits a thread, sm_90). V >> 31 is 0, which the compiler cannot know.
    """
    return wave ^ (V >> 31) if wave.dtype == tl.int32 else wave


@triton.jit
def write_tail_gradient(
    tail,
    out_row_ptr,
    V,
    body,
    row,
    inverse_temperature,
    c,
    e,
    HAS_ENTROPY_GRAD: tl.constexpr,
    LAYOUT: tl.constexpr,
):
    """Second sweep over columns [body, V), whose logits `load_tail` loaded, last wave first."""
    KEPT: tl.constexpr = LAYOUT.KEPT
    for i in tl.static_range(KEPT - 1, -1, -1):
        columns = wave_columns(body + i * LAYOUT.LANES * LAYOUT.WIDTH, LAYOUT)
        logits = unpack(_still_packed(tail[i], V), out_row_ptr.dtype.element_ty)
        gradient = softmax_gradient(logits, row, inverse_temperature, c, e, HAS_ENTROPY_GRAD)
        if i == KEPT - 1:
            store_wave(out_row_ptr, columns, gradient, V)
        else:
            tl.store(out_row_ptr + columns, gradient.to(out_row_ptr.dtype.element_ty))


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
    LAYOUT: tl.constexpr,
):
    """Second sweep over columns [0, end), whole blocks, from the last to the first.

    With SHARED_ROWS the narrower gradient lies in the upper half of the logits' own row: it covers
    only columns that the sweep has passed, provided that all threads have loaded a block before one
    stores it.
    """
    STEP: tl.constexpr = LAYOUT.STEP
    WAVE: tl.constexpr = LAYOUT.LANES * LAYOUT.WIDTH
    for done in range(0, end, STEP * WAVE):
        start = end - STEP * WAVE - done
        waves = load_block(row_ptr, start, LAYOUT)
        if SHARED_ROWS:
            tl.debug_barrier()
        for i in tl.static_range(STEP):
            gradient = softmax_gradient(waves[i], row, inverse_temperature, c, e, HAS_ENTROPY_GRAD)
            columns = wave_columns(start + i * WAVE, LAYOUT)
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


@triton.jit
def write_gradient(
    tail,
    row_ptr,
    out_row_ptr,
    token,
    token_logit,
    V,
    body,
    row,
    inverse_temperature,
    c,
    e,
    HAS_ENTROPY_GRAD: tl.constexpr,
    SHARED_ROWS: tl.constexpr,
    LAYOUT: tl.constexpr,
):
    """The second sweep: the tail that `load_tail` loaded, the body, and the token's own term."""
    write_tail_gradient(
        tail, out_row_ptr, V, body, row, inverse_temperature, c, e, HAS_ENTROPY_GRAD, LAYOUT
    )
    write_body_gradient(
        row_ptr,
        out_row_ptr,
        body,
        row,
        inverse_temperature,
        c,
        e,
        HAS_ENTROPY_GRAD,
        SHARED_ROWS,
        LAYOUT,
    )
    write_token_gradient(
        out_row_ptr, token, token_logit, V, row, inverse_temperature, c, e, HAS_ENTROPY_GRAD
    )
