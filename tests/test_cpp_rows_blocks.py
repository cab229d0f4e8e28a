"""The C++ row primitives across blocks: a row is swept 4096 columns at a time (csrc/row_kernels.h).

`test_cpp_rows.py` runs this file too at every SIMD level.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from fastpo.backends import cpp as cpp_rows
from fastpo.backends.base import RowStats, alias_rows
from fastpo.objective import Objective
from fastpo.testing.rows import (
    RowCase,
    check_details,
    check_policy_loss,
    check_stats_and_grad,
    run_policy_loss,
)

if (reason := cpp_rows.unavailable()) is not None:
    pytest.skip(reason, allow_module_level=True)

pytestmark = pytest.mark.usefixtures("poisoned_empty")

BLOCK = 4096
VOCAB = 3 * BLOCK + 37
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
LOWEST = torch.finfo(torch.float32).min
CLIP = Objective(clip_low=0.2, clip_high=0.28)
EVERYTHING = Objective(kl_coef=0.1, kl_estimator="k3", kl_ratio_weighted=True, entropy_coef=0.05)


def exp_of(x: Tensor) -> Tensor:
    """exp as the kernels compute it: the gradient of rows with maximum 0, log s = 0, c = -1."""
    zero = torch.zeros(1)
    stats = RowStats(logprobs=zero, entropy=zero, row_max=zero, log_sum=zero)
    outside = torch.tensor([-1])  # no column is the token's
    out = torch.empty(1, len(x))
    cpp_rows.row_grad(x[None], outside, stats, torch.tensor([-1.0]), None, 1.0, out)
    return out[0]


def test_exp_is_right_to_the_last_bits():
    """1.2 ulp for a table, a cubic and their rounding, and 3e-9 |x| for ln(2) as fp32."""
    x = torch.linspace(-87.3, 0.5, 4_000_001)
    exact = x.double().exp()
    ulp = torch.finfo(torch.float32).eps * 2.0 ** exact.log2().floor()
    error = (exp_of(x) - exact).abs() - 3e-9 * x.double().abs() * exact
    assert (error / ulp).max() <= 1.25
    assert exp_of(torch.zeros(40)).eq(1).all()


def test_exp_ends_in_an_exact_zero():
    """Of numbers under 2^-126 it is at most that; from 2^-127 on it is 0; NaN stays NaN."""
    x = torch.linspace(-88.1, -87.337, 100_001)
    assert ((exp_of(x) >= 0) & (exp_of(x) <= 2.0**-126)).all()
    below = torch.tensor([-88.04, -100.0, -1e4, LOWEST, -math.inf]).repeat(5)
    assert torch.equal(exp_of(below), torch.zeros(25))
    assert exp_of(torch.full((40,), math.nan)).isnan().all()


@pytest.mark.parametrize("vocab", [BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK, 2 * BLOCK + 1, VOCAB])
def test_scratch_ends_with_the_row(vocab):
    """Where the exponentials of a row do not fit its gradient; the sizes rise, as the scratch does.

    A number too few shows in tools/sanitize.py, which runs this first.
    """
    case = RowCase.random(2, vocab, EVERYTHING, dtype=torch.bfloat16)
    check_policy_loss(cpp_rows, case, EVERYTHING)


def profile(name: str) -> Tensor:
    """What is added to the logits of a row, (VOCAB,): every way in which blocks can differ."""
    block = torch.arange(VOCAB) // BLOCK
    masked = {"first": block == 0, "middle": block == 1, "last": block == 3, "first two": block < 2}
    if name in masked:
        return torch.where(masked[name], -math.inf, 0.0)
    return {
        "rising": 6.0 * block,
        "falling": -6.0 * block,
        "rising beyond fp32's exponents": 150.0 * block,
        "falling beyond fp32's exponents": -150.0 * block,
        "one block far up": torch.where(block == 2, 1000.0, 0.0),
        "far from 0": torch.full((VOCAB,), 1e4),
    }[name]


PROFILES = [
    *("first", "middle", "last", "first two", "rising", "falling", "one block far up"),
    *("rising beyond fp32's exponents", "falling beyond fp32's exponents", "far from 0"),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", PROFILES)
def test_blocks_of_different_height(name, dtype):
    """A token of a high block and one of any block, with and without the entropy's gradient."""
    case = RowCase.random(4, VOCAB, EVERYTHING, dtype=dtype, temperature=torch.linspace(0.7, 1, 4))
    logits = (case.logits.float() + profile(name)).to(dtype)
    case.tokens[::2] = logits[::2].argmax(1)
    masked = logits.gather(1, case.tokens[:, None])[:, 0] == -math.inf
    case.tokens[masked] = logits[masked].argmax(1)
    case = case.with_logits(logits)
    exact = (logits.double() / case.temperature[:, None]).log_softmax(1)
    logprobs = exact.gather(1, case.tokens[:, None])[:, 0].float()
    inputs = case.inputs._replace(old_logprobs=logprobs + 0.1, ref_logprobs=logprobs - 0.1)
    case = RowCase(logits=logits, tokens=case.tokens, temperature=case.temperature, inputs=inputs)
    check_policy_loss(cpp_rows, case, EVERYTHING)
    check_stats_and_grad(cpp_rows, case)
    check_details(cpp_rows, case)
    grad = run_policy_loss(cpp_rows, case, EVERYTHING)[1]
    assert (grad[logits == -math.inf] == 0).all()
    plain = inputs._replace(ref_logprobs=None, entropy_weight=None)
    case = RowCase(logits=logits, tokens=case.tokens, temperature=case.temperature, inputs=plain)
    check_policy_loss(cpp_rows, case, CLIP, inplace=True)


@pytest.mark.parametrize("masked", [slice(0, BLOCK), slice(BLOCK, None), slice(5, None)])
def test_the_lowest_number_masks_like_minus_infinity(masked):
    """Many mask with finfo.min: it must not overflow, and its gradient is 0 too."""
    case = RowCase.random(3, VOCAB, EVERYTHING, temperature=0.6)
    case.tokens[:] = BLOCK if masked.start == 0 else 3
    results = []
    for mask in (LOWEST, -math.inf):
        logits = case.logits.clone()
        logits[:, masked] = mask
        rows, grad = run_policy_loss(cpp_rows, case.with_logits(logits), EVERYTHING)
        assert (grad[:, masked] == 0).all()
        results.append([*rows, grad])
    for lowest, infinite in zip(*results, strict=True):
        assert torch.equal(lowest, infinite) and lowest.isfinite().all()


def test_a_row_of_the_lowest_number_is_uniform():
    case = RowCase.random(2, VOCAB, CLIP).with_logits(torch.full((2, VOCAB), LOWEST))
    rows, _ = run_policy_loss(cpp_rows, case, CLIP)
    torch.testing.assert_close(rows.logprobs, torch.full((2,), -math.log(VOCAB)))
    torch.testing.assert_close(rows.entropy, torch.full((2,), math.log(VOCAB)))


@pytest.mark.parametrize("temperature", [1e-30, 1e-15, 1e-6, 1e6, 1e30])
def test_extreme_temperatures(temperature):
    """Towards 0 the largest logit takes all; towards infinity the unmasked ones share alike."""
    logits = torch.randn(2, VOCAB, generator=torch.Generator().manual_seed(0))
    logits[:, BLOCK:] = -math.inf
    stats = cpp_rows.row_stats(logits, logits.argmax(1), temperature)
    log_count = 0.0 if temperature < 1 else math.log(BLOCK)
    torch.testing.assert_close(stats.entropy, torch.full((2,), log_count))
    torch.testing.assert_close(stats.logprobs, torch.full((2,), -log_count), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize("poison", [math.nan, -math.nan, math.inf])
@pytest.mark.parametrize("column", [0, 15, BLOCK - 1, BLOCK, 2 * BLOCK + 100, VOCAB - 1])
def test_one_bad_logit_in_any_block_spoils_its_row_alone(column, poison, entropy):
    """A maximum drops NaN of either sign by the order of its operands; the sums must not."""
    objective = EVERYTHING if entropy else CLIP
    case = RowCase.random(3, VOCAB, objective)
    logits = case.logits.clone()
    logits[1, column] = poison
    for dtype in (torch.float32, torch.bfloat16):
        rows, grad = run_policy_loss(cpp_rows, case.with_logits(logits.to(dtype)), objective)
        for x in (rows.loss, rows.logprobs, rows.entropy):
            assert x.isnan().tolist() == [False, True, False]
        assert grad.isnan().all(1).tolist() == [False, True, False]
        assert grad[::2].isfinite().all()


@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_places_give_the_same_bits(dtype, entropy):
    """In place or not, a 2-byte gradient in the rows of fp32 logits; rows alone or together."""
    objective = EVERYTHING if entropy else CLIP
    case = RowCase.random(3, VOCAB, objective)
    narrow = case.with_logits(case.logits.to(dtype))
    rows, grad = run_policy_loss(cpp_rows, narrow, objective)
    inside, grad_inside = run_policy_loss(cpp_rows, narrow, objective, inplace=True)
    alone = [run_policy_loss(cpp_rows, narrow.take(slice(i, i + 1)), objective) for i in range(3)]
    assert torch.equal(grad, grad_inside) and torch.equal(grad, torch.cat([g for _, g in alone]))
    for x, y, *parts in zip(rows, inside, *(r for r, _ in alone), strict=True):
        assert torch.equal(x, y) and torch.equal(x, torch.cat(parts))

    wide, logits = run_policy_loss(cpp_rows, case, objective), case.logits.clone()
    out = logits if dtype == torch.float32 else alias_rows(logits, dtype)
    arguments = (case.tokens, case.inputs, objective, case.temperature)
    losses = cpp_rows.row_policy_loss(logits, *arguments, out)
    assert torch.equal(losses.loss, wide[0].loss) and torch.equal(out, wide[1].to(dtype))
