"""The Triton row primitives against the float64 specification, on the GPU or interpreted."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch
import triton
import triton.language as tl
from fastpo.kernels._token_loss import _one_minus_exp as one_minus_exp

from fastpo.backends import triton as triton_rows
from fastpo.objective import KL_ESTIMATORS, TOKEN_SURROGATES, Objective
from fastpo.testing.objectives import GATES
from fastpo.testing.rows import (
    RowCase,
    check_details,
    check_details_of_hostile_rows,
    check_no_subnormal_leaves,
    check_policy_loss,
    check_stats_and_grad,
    run_policy_loss,
)

pytestmark = pytest.mark.usefixtures("poisoned_empty", "triton_backend")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SURROGATES = {
    "clip": Objective(clip_low=0.2, clip_high=0.28),
    "dual_clip": Objective(clip_low=0.1, clip_high=0.1, ratio_max=1.2),
    "cispo": Objective(surrogate="cispo", ratio_max=1.1),
    "sapo": Objective(surrogate="sapo"),
    "reinforce": Objective(surrogate="reinforce"),
}
DAPO = SURROGATES["clip"]
EVERYTHING = Objective(kl_coef=0.1, kl_estimator="k3", kl_ratio_weighted=True, entropy_coef=0.05)


def test_every_token_surrogate_is_covered():
    tested = (*SURROGATES.values(), *GATES.values())
    assert {objective.surrogate for objective in tested} == set(TOKEN_SURROGATES)


@pytest.mark.parametrize("extras", [False, True])
@pytest.mark.parametrize("name", GATES)
def test_gates(name, extras, device):
    """Three tokens to choose from; with and without bounds and NLL weights of each row."""
    objective = GATES[name]
    extras = extras and objective.takes_clip_bounds
    case = RowCase.random(24, 3, objective, extras=extras, device=device)
    check_policy_loss(triton_rows, case, objective)
    assert triton_rows.row_policy_loss(
        case.logits, case.tokens, case.inputs, objective, case.temperature, None
    ).clipped.any()


@pytest.mark.parametrize("name", SURROGATES)
def test_rows_with_bounds_and_nll_weights_of_their_own(name, device):
    objective = SURROGATES[name]
    case = RowCase.random(16, 307, objective, extras=True, device=device)
    if not objective.takes_clip_bounds:
        case = dataclasses.replace(case, inputs=case.inputs._replace(clip_low=None, clip_high=None))
    check_policy_loss(triton_rows, case, objective)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", SURROGATES)
def test_surrogates(name, dtype, device):
    case = RowCase.random(8, 307, SURROGATES[name], dtype=dtype, device=device)
    check_policy_loss(triton_rows, case, SURROGATES[name])


@pytest.mark.parametrize("ratio_weighted", [False, True])
@pytest.mark.parametrize("estimator", KL_ESTIMATORS)
def test_kl_estimators(estimator, ratio_weighted, device):
    objective = Objective(kl_coef=0.3, kl_estimator=estimator, kl_ratio_weighted=ratio_weighted)
    check_policy_loss(triton_rows, RowCase.random(6, 307, objective, device=device), objective)


@pytest.mark.parametrize("dtype", DTYPES[:2])
@pytest.mark.parametrize("vocab", [1, 1025])
def test_details(vocab, dtype, device):
    """Sum of squared probabilities, mean logit and top-1 hit, as TRL's kernel defines them."""
    case = RowCase.random(6, vocab, DAPO, dtype=dtype, temperature=torch.linspace(0.5, 2, 6))
    case.tokens[::2] = case.logits[::2].argmax(1)
    case = case.to(device)
    check_details(triton_rows, case)
    check_details(triton_rows, case.with_logits((case.logits.float() + 80).to(dtype)))


def test_details_of_hostile_rows(device):
    check_details_of_hostile_rows(triton_rows, device)


@pytest.mark.parametrize("dtype", DTYPES[:2])
def test_no_subnormal_leaves(dtype, device):
    """REGRESSIONS 49: products over subnormal gradients take 12 to 15 times as long."""
    check_no_subnormal_leaves(triton_rows, dtype, device)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("estimator", [None, *KL_ESTIMATORS])
@pytest.mark.parametrize("name", SURROGATES)
def test_every_combination(name, estimator, dtype, device):
    """Surrogate x KL x ratio-weighted x entropy x on-policy x per-token temperature."""
    flags = itertools.product((False, True), repeat=4)
    for weighted, entropy, on_policy, per_token in flags:
        if weighted and estimator is None:
            continue
        objective = dataclasses.replace(
            SURROGATES[name],
            kl_coef=0.0 if estimator is None else 0.2,
            kl_estimator=estimator or "k3",
            kl_ratio_weighted=weighted,
            entropy_coef=0.05 if entropy else 0.0,
        )
        temperature = torch.linspace(0.5, 2, 5) if per_token else 0.8
        options = {"temperature": temperature, "on_policy": on_policy, "dtype": dtype}
        case = RowCase.random(5, 130, objective, device=device, **options)
        check_policy_loss(triton_rows, case, objective)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab", [2, 7, 1000, 1024, 1025, 1152])
def test_awkward_vocabularies(vocab, dtype, device):
    """Tail columns must not enter the sums (verl counted them as logit 0)."""
    case = RowCase.random(3, vocab, EVERYTHING, dtype=dtype, device=device)
    check_policy_loss(triton_rows, case, EVERYTHING)
    check_stats_and_grad(triton_rows, case)


def test_a_vocabulary_of_one(device):
    """log p = H = 0 and no gradient, exactly."""
    objective = Objective(entropy_coef=0.1)
    case = RowCase.random(3, 1, objective, temperature=1.0, device=device)
    rows, grad = run_policy_loss(triton_rows, case, objective)
    assert not rows.logprobs.any() and not rows.entropy.any() and not grad.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocab", [50257, 65536])
def test_rows_longer_than_what_is_kept(vocab, dtype, device):
    case = RowCase.random(2, vocab, EVERYTHING, dtype=dtype, device=device)
    check_policy_loss(triton_rows, case, EVERYTHING, inplace=True)
    check_stats_and_grad(triton_rows, case)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab", [32000, 128256, 151936, 262144])
def test_real_vocabularies(vocab, dtype, device):
    case = RowCase.random(2, vocab, EVERYTHING, dtype=dtype, device=device)
    check_policy_loss(triton_rows, case, EVERYTHING)
    check_stats_and_grad(triton_rows, case)


@pytest.mark.parametrize("vocab", [511, 512, 513, 768, 1000, 1024, 1280, 1537])
def test_every_split_into_body_and_tail(vocab, device, small_layout):
    """Body of 0 to 5 blocks, tail full and partial, as long rows have them."""
    case = RowCase.random(2, vocab, EVERYTHING, dtype=torch.bfloat16, device=device)
    check_policy_loss(triton_rows, case, EVERYTHING)
    check_stats_and_grad(triton_rows, case)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("per_token", [False, True])
def test_temperature(per_token, dtype, device):
    """Row 13: the gradient carries 1 / T, and a number equals a tensor of that number."""
    temperature = torch.tensor([0.3, 1.0, 1.7, 5.0]) if per_token else 1.7
    case = RowCase.random(4, 500, EVERYTHING, dtype=dtype, temperature=temperature, device=device)
    check_policy_loss(triton_rows, case, EVERYTHING)
    if not per_token:
        as_tensor = dataclasses.replace(case, temperature=torch.full((4,), 1.7, device=device))
        results = (run_policy_loss(triton_rows, x, EVERYTHING) for x in (case, as_tensor))
        (rows, grad), (tensor_rows, tensor_grad) = results
        assert torch.equal(rows.logprobs, tensor_rows.logprobs) and torch.equal(grad, tensor_grad)


@pytest.mark.parametrize("vocab", [300, 1000])
def test_old_logprobs_of_the_same_weights_give_ratio_one(vocab, device):
    """Row 13: `row_stats` and `row_policy_loss` agree bit by bit, so the ratio is exactly 1."""
    case = RowCase.random(6, vocab, DAPO, temperature=0.7, device=device)
    stats = triton_rows.row_stats(case.logits, case.tokens, case.temperature)
    inputs = case.inputs._replace(old_logprobs=stats.logprobs)
    case = dataclasses.replace(case, inputs=inputs)
    rows, _ = run_policy_loss(triton_rows, case, DAPO)
    assert torch.equal(rows.logprobs, stats.logprobs)
    assert torch.equal(rows.entropy, stats.entropy)
    assert torch.equal(rows.loss, -inputs.weight * inputs.advantages)


def test_no_gradient_wanted(device):
    case = RowCase.random(3, 200, EVERYTHING, device=device)
    arguments = (case.logits, case.tokens, case.inputs, EVERYTHING, case.temperature)
    with_gradient, _ = run_policy_loss(triton_rows, case, EVERYTHING)
    without = triton_rows.row_policy_loss(*arguments, None)
    assert all(torch.equal(a, b) for a, b in zip(with_gradient, without, strict=True))


def test_row_grad_equals_the_fused_gradient(device):
    """The two-step path gives the very bits of the fused one."""
    case = RowCase.random(4, 700, DAPO, dtype=torch.bfloat16, device=device)
    _, fused = run_policy_loss(triton_rows, case, DAPO)
    stats = triton_rows.row_stats(case.logits, case.tokens, case.temperature)
    ratio = (stats.logprobs - case.inputs.old_logprobs).exp()
    advantages = case.inputs.advantages
    clipped = ((advantages > 0) & (ratio > 1.28)) | ((advantages < 0) & (ratio < 0.8))
    c = torch.where(clipped, 0.0, case.inputs.weight * (-advantages * ratio))
    out = torch.empty_like(case.logits)
    triton_rows.row_grad(case.logits, case.tokens, stats, c, None, case.temperature, out)
    if device.type == "cpu":  # exp of the ratio differs between torch and a GPU kernel
        assert torch.equal(out, fused)
    else:
        torch.testing.assert_close(out, fused)


@pytest.mark.parametrize("factor", [1.0, 0.25, -3.0])
@pytest.mark.parametrize("dtype", DTYPES)
def test_scale(factor, dtype, device):
    grad = torch.randn(5, 700, device=device).to(dtype)
    expected = (grad.float() * factor).to(dtype)
    triton_rows.scale_(grad, torch.tensor(factor, device=device))
    assert torch.equal(grad, expected)


def test_empty_batch(device):
    case = RowCase.random(3, 50, EVERYTHING, device=device).take(slice(0, 0))
    rows, grad = run_policy_loss(triton_rows, case, EVERYTHING)
    assert grad.shape == (0, 50) and all(x.shape == (0,) for x in rows)
    stats = triton_rows.row_stats(case.logits, case.tokens, 1.0)
    assert all(x.shape == (0,) for x in stats)


@triton.jit
def _one_minus_exp_kernel(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i, mask=i < n, other=0.0)
    tl.store(out_ptr + i, one_minus_exp(x), mask=i < n)


def test_one_minus_p_of_a_likely_token_has_its_digits(device):
    """1 - exp(x) near 0, where a gate and kept sets ask for it: by a series within 4 roundings;
    beyond, within those of exp(x), of size 1."""
    x = -torch.cat([torch.logspace(-7, 1, 500), torch.linspace(0.025, 0.035, 200)]).to(device)
    out = torch.empty_like(x)
    _one_minus_exp_kernel[(1,)](x, out, len(x), BLOCK=1024)
    exact = -torch.expm1(x.double())
    near = x > -0.03
    error = (out - exact).abs() * 2**24
    assert (error[near] <= 4 * exact[near]).all() and (error[~near] <= 4).all()
    assert out[x == 0].sum() == 0
