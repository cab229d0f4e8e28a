"""The C++ row primitives against the float64 specification, at every SIMD level of this machine."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from cpp_cases import CLIP, EVERYTHING, SURROGATES, assert_same_bits, run

from fastpo.backends import cpp as cpp_rows
from fastpo.backends.base import alias_rows
from fastpo.objective import KL_ESTIMATORS, TOKEN_SURROGATES, Objective
from fastpo.testing.budget import relative_error
from fastpo.testing.objectives import GATES
from fastpo.testing.rows import (
    RowCase,
    check_confident_tokens,
    check_details,
    check_details_of_hostile_rows,
    check_no_subnormal_leaves,
    check_policy_loss,
    check_stats_and_grad,
    run_policy_loss,
)

if (reason := cpp_rows.unavailable()) is not None:
    pytest.skip(reason, allow_module_level=True)

pytestmark = pytest.mark.usefixtures("poisoned_empty")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def test_every_token_surrogate_is_covered():
    tested = (*SURROGATES.values(), *GATES.values())
    assert {objective.surrogate for objective in tested} == set(TOKEN_SURROGATES)


@pytest.mark.parametrize("extras", [False, True])
@pytest.mark.parametrize("name", GATES)
def test_gates(name, extras):
    """Three tokens to choose from; with and without bounds and NLL weights of each row."""
    objective = GATES[name]
    extras = extras and objective.takes_clip_bounds
    case = RowCase.random(64, 3, objective, extras=extras)
    check_policy_loss(cpp_rows, case, objective)
    assert cpp_rows.row_policy_loss(
        case.logits, case.tokens, case.inputs, objective, case.temperature, None
    ).clipped.any()


@pytest.mark.parametrize("name", SURROGATES)
def test_rows_with_bounds_and_nll_weights_of_their_own(name):
    objective = SURROGATES[name]
    case = RowCase.random(16, 307, objective, extras=True)
    if not objective.takes_clip_bounds:
        case = dataclasses.replace(case, inputs=case.inputs._replace(clip_low=None, clip_high=None))
    check_policy_loss(cpp_rows, case, objective)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", SURROGATES)
def test_surrogates(name, dtype):
    check_policy_loss(
        cpp_rows, RowCase.random(32, 307, SURROGATES[name], dtype=dtype), SURROGATES[name]
    )


@pytest.mark.parametrize("on_policy", [False, True])
@pytest.mark.parametrize("ratio_weighted", [False, True])
@pytest.mark.parametrize("estimator", KL_ESTIMATORS)
@pytest.mark.parametrize("name", SURROGATES)
def test_kl_estimators(name, estimator, ratio_weighted, on_policy):
    objective = dataclasses.replace(
        SURROGATES[name], kl_coef=0.3, kl_estimator=estimator, kl_ratio_weighted=ratio_weighted
    )
    check_policy_loss(cpp_rows, RowCase.random(24, 307, objective, on_policy=on_policy), objective)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab", [1, 2, 7, 15, 16, 17, 63, 64, 65, 1000, 1152])
def test_awkward_vocabularies(vocab, dtype):
    """Tail columns must not enter the sums (verl counted them as logit 0)."""
    temperature = torch.linspace(0.5, 2, 9)
    case = RowCase.random(9, vocab, EVERYTHING, dtype=dtype, temperature=temperature)
    check_policy_loss(cpp_rows, case, EVERYTHING)
    check_stats_and_grad(cpp_rows, case)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab", [50257, 151936])
def test_real_vocabularies(vocab, dtype):
    case = RowCase.random(3, vocab, EVERYTHING, dtype=dtype)
    check_policy_loss(cpp_rows, case, EVERYTHING)
    check_stats_and_grad(cpp_rows, case)
    check_policy_loss(cpp_rows, RowCase.random(3, vocab, CLIP, dtype=dtype), CLIP, inplace=True)


def test_a_vocabulary_of_one():
    """log p = H = 0 and no gradient, exactly, at any temperature."""
    case = RowCase.random(5, 1, EVERYTHING, temperature=torch.linspace(0.3, 2, 5))
    _, logprobs, entropy, _, grad = run(case)
    stats = cpp_rows.row_stats(case.logits, case.tokens, case.temperature)
    for zero in (logprobs, entropy, grad, stats.logprobs, stats.entropy):
        assert not zero.any()


def test_a_backend_without_gradient_fails():
    """The mutation that some suites let pass: losses right, gradient zero."""

    class Mutant:
        @staticmethod
        def row_policy_loss(logits, tokens, inputs, objective, temperature, out):
            rows = cpp_rows.row_policy_loss(logits, tokens, inputs, objective, temperature, out)
            out.zero_()
            return rows

    with pytest.raises(AssertionError, match="gradient"):
        check_policy_loss(Mutant, RowCase.random(8, 100, CLIP), CLIP)


@pytest.mark.parametrize("shift", [-110.0, 80.0, 1e4])
def test_shifted_logits(shift):
    """A maximum far from 0 neither overflows nor underflows (verl: inf near -110)."""
    case = RowCase.random(9, 300, EVERYTHING, temperature=1.0)
    check_policy_loss(cpp_rows, case.with_logits(case.logits + shift), EVERYTHING)


def test_a_temperature_costs_no_accuracy_far_from_zero():
    """x = (z - max z) / T: log-probs of logits around 1e4 are as good as around 0."""
    case = RowCase.random(9, 300, CLIP, temperature=0.7)
    far = case.with_logits((case.logits + 1e4).double().float())
    near = far.with_logits(far.logits - 1e4)
    for got, want in zip(
        cpp_rows.row_stats(far.logits, far.tokens, 0.7)[:2],
        cpp_rows.row_stats(near.logits, near.tokens, 0.7)[:2],
        strict=True,
    ):
        torch.testing.assert_close(got, want, rtol=1e-6, atol=2e-6)


def test_what_rounding_the_maximum_took_stands_in_the_log_of_the_sum():
    """m / T of logits around 1e4 is rounded by up to 5e-4 in fp32; m / T + log s is not."""
    case = RowCase.random(9, 300, CLIP)
    logits = case.logits + 1e4
    stats = cpp_rows.row_stats(logits, case.tokens, 0.7)
    largest = logits.double().amax(1)
    whole = ((logits.double() - largest[:, None]) / 0.7).logsumexp(1)
    rounded = stats.row_max.double() - largest * torch.tensor(1 / 0.7).double()
    assert rounded.abs().max() > 1e-5
    torch.testing.assert_close(rounded + stats.log_sum.double(), whole, rtol=1e-6, atol=2e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("where", ["first half", "last half", "all but the token"])
def test_minus_infinity(where, dtype):
    """-inf - -inf and 0 * -inf must not make NaN (REGRESSIONS row 10)."""
    case = RowCase.random(6, 200, EVERYTHING, dtype=dtype, temperature=0.7)
    hidden = torch.zeros_like(case.logits, dtype=torch.bool)
    if where == "all but the token":
        hidden[:] = True
    else:
        hidden[:, slice(0, 100) if where == "first half" else slice(100, None)] = True
    hidden.scatter_(1, case.tokens[:, None], False)
    case = case.with_logits(case.logits.masked_fill(hidden, -math.inf))
    check_policy_loss(cpp_rows, case, EVERYTHING)
    assert (run(case)[-1][hidden] == 0).all()


def test_a_token_with_minus_infinite_logit():
    case = RowCase.random(4, 50, CLIP)
    logits = case.logits.scatter(1, case.tokens[:, None], -math.inf)
    loss, logprobs, entropy, _, grad = run(case.with_logits(logits), CLIP)
    assert (logprobs == -math.inf).all()
    assert loss.isfinite().all() and entropy.isfinite().all() and grad.isfinite().all()


def test_a_token_with_minus_infinite_logit_under_an_entropy_bonus():
    """p = 0 of the token: its part of the entropy's gradient is 0, not 0 * -inf."""
    objective = Objective(entropy_coef=0.1)
    case = RowCase.random(4, 50, objective)
    case = case.with_logits(case.logits.scatter(1, case.tokens[:, None], -math.inf))
    without = torch.ones(4, 50, dtype=torch.bool).scatter(1, case.tokens[:, None], False)
    loss, _, entropy, _, grad = run(case, objective)
    assert loss.isfinite().all() and (grad[~without] == 0).all()
    rest = case.logits[without].view(4, 49).double().requires_grad_()
    table = (rest / case.temperature).log_softmax(1)
    exact = -(table.exp() * table).sum(1)
    torch.testing.assert_close(entropy.double(), exact.detach(), rtol=1e-6, atol=0)
    (want,) = torch.autograd.grad(-(case.inputs.entropy_weight * exact).sum(), rest)
    assert relative_error(grad[without].view(4, 49), want) < 1e-5  # the ratio has no gradient there


def test_confident_tokens():
    check_confident_tokens(cpp_rows)


@pytest.mark.parametrize("estimator", KL_ESTIMATORS)
def test_a_reference_far_above(estimator):
    """ref - logp > 20: the exponent of k3 is clamped, and there its slope is 0, not e^20."""
    objective = Objective(kl_coef=0.1, kl_estimator=estimator)
    case = RowCase.random(6, 90, objective)
    far = case.inputs.ref_logprobs + torch.tensor([25.0, 19.0, 21.0, -25.0, 0.0, 60.0])
    case = dataclasses.replace(case, inputs=case.inputs._replace(ref_logprobs=far))
    check_policy_loss(cpp_rows, case, objective)
    for row in range(6):  # a large row would hide a small one
        check_policy_loss(cpp_rows, case.take(slice(row, row + 1)), objective)


@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_in_place_is_out_of_place_bit_by_bit(dtype, entropy):
    objective = EVERYTHING if entropy else CLIP
    case = RowCase.random(7, 1003, objective, dtype=dtype)
    inside, grad = run_policy_loss(cpp_rows, case, objective, inplace=True)
    assert_same_bits([*inside, grad], run(case, objective))


@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize("vocab", [1, 7, 16, 50, 1003])
@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_a_two_byte_gradient_in_the_rows_of_fp32_logits(dtype, vocab, entropy):
    """No logit is overwritten before it is read, in both primitives that write a gradient."""
    objective = EVERYTHING if entropy else CLIP
    case = RowCase.random(5, vocab, objective)
    apart, logits = torch.empty(5, vocab, dtype=dtype), case.logits.clone()
    inside = alias_rows(logits, dtype)
    arguments = (case.tokens, case.inputs, objective, case.temperature)
    want = cpp_rows.row_policy_loss(case.logits, *arguments, apart)
    got = cpp_rows.row_policy_loss(logits, *arguments, inside)
    assert_same_bits([*got, inside], [*want, apart])
    check = cpp_rows.row_policy_loss(case.logits, *arguments, exact := torch.empty(5, vocab))
    assert_same_bits([*check, exact.to(dtype)], [*want, apart])

    stats, slope = cpp_rows.row_stats(case.logits, case.tokens, case.temperature), torch.ones(5)
    arguments = (case.tokens, stats, slope, slope if entropy else None, case.temperature)
    logits = case.logits.clone()
    inside = alias_rows(logits, dtype)
    cpp_rows.row_grad(case.logits, *arguments, apart)
    cpp_rows.row_grad(logits, *arguments, inside)
    assert torch.equal(inside, apart)


def test_an_overlapping_gradient_is_refused():
    case = RowCase.random(4, 32, CLIP)
    with pytest.raises(ValueError, match="shares the storage of logits"):
        out = case.logits.view(torch.bfloat16)[:, :32]
        cpp_rows.row_policy_loss(case.logits, case.tokens, case.inputs, CLIP, 1.0, out)


def test_bits_do_not_depend_on_the_batch_or_on_threads():
    case = RowCase.random(64, 2049, EVERYTHING)
    whole = run(case)
    assert_same_bits(
        whole,
        [
            torch.cat(parts)
            for parts in zip(
                *(run(case.take(slice(i, i + 7))) for i in range(0, 64, 7)), strict=True
            )
        ],
    )
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert_same_bits(whole, run(case))
    finally:
        torch.set_num_threads(threads)


def test_statistics_agree_bit_by_bit_and_in_their_bounds():
    """log p <= 0 and 0 <= H <= log V (REGRESSIONS row 25)."""
    case = RowCase.random(200, 37, CLIP, temperature=torch.linspace(0.05, 3, 200))
    rows, _ = run_policy_loss(cpp_rows, case, CLIP)
    stats = cpp_rows.row_stats(case.logits, case.tokens, case.temperature)
    assert torch.equal(stats.logprobs, rows.logprobs) and torch.equal(stats.entropy, rows.entropy)
    assert (stats.logprobs <= 0).all()
    assert (stats.entropy >= 0).all() and (stats.entropy <= math.log(37) + 1e-6).all()


def test_strided_rows_and_missing_gradient():
    case = RowCase.random(6, 100, CLIP)
    wide = torch.full((6, 130), math.nan)
    wide[:, 9:109] = case.logits
    assert_same_bits(run(case.with_logits(wide[:, 9:109]), CLIP), run(case, CLIP))
    arguments = (case.tokens, case.inputs, CLIP, case.temperature)
    assert_same_bits(
        [*cpp_rows.row_policy_loss(case.logits, *arguments, None)], run(case, CLIP)[:4]
    )
    empty = run(case.take(slice(0, 0)), CLIP)
    assert [x.shape[0] for x in empty] == [0] * 5


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab", [1, 7, 1000, 4097])
def test_details(vocab, dtype):
    """Sum of squared probabilities, mean logit and top-1 hit, as TRL's kernel defines them."""
    temperature = torch.linspace(0.5, 2, 6)
    case = RowCase.random(6, vocab, Objective(), dtype=dtype, temperature=temperature)
    case.tokens[::2] = case.logits[::2].argmax(1)
    check_details(cpp_rows, case)
    check_details(cpp_rows, case.with_logits((case.logits.float() + 80).to(dtype)))


def test_details_of_hostile_rows():
    check_details_of_hostile_rows(cpp_rows)


@pytest.mark.parametrize("dtype", DTYPES[:2])
def test_no_subnormal_leaves(dtype):
    """REGRESSIONS 49: products over subnormal gradients take 12 to 15 times as long."""
    check_no_subnormal_leaves(cpp_rows, dtype)


def test_half_precision_keeps_its_own_subnormals():
    """2^-24 to 2^-14: most of an unscaled policy gradient, and normal numbers once widened."""
    case = RowCase.random(2, 300, CLIP, dtype=torch.float16)
    grad = run(case, CLIP)[-1]
    assert ((grad != 0) & (grad.abs() < torch.finfo(torch.float16).tiny)).sum() > 100


def test_scale():
    grad = torch.randn(5, 37)
    for dtype in DTYPES:
        for place in (torch.empty(5, 37, dtype=dtype), alias_rows(torch.zeros(5, 37), dtype)):
            place.copy_(grad)
            cpp_rows.scale_(place, torch.tensor(0.3))
            assert torch.equal(place, (grad.to(dtype).float() * torch.tensor(0.3)).to(dtype))
    cpp_rows.scale_(grad, torch.tensor(math.nan))
    assert grad.isnan().all()


@pytest.mark.parametrize("factor", [0.37, 3.0, 1e-3])
@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_every_two_byte_number_is_converted_as_torch_does(dtype, factor):
    """Read, scaled and rounded back: infinities, NaN and ties included; fp16's subnormals too."""
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    numbers = bits.view(dtype)[None]
    scaled = numbers.float() * torch.tensor(factor)
    want = scaled.masked_fill(scaled.abs() < torch.finfo(torch.float32).tiny, 0).to(dtype)
    cpp_rows.scale_(numbers, torch.tensor(factor))
    torch.testing.assert_close(numbers, want, rtol=0, atol=0, equal_nan=True)
