"""The linear ops on every backend here, against autograd over all logits in fp64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import fastpo
from fastpo import backends
from fastpo.ops.linear_chunks import LinearCall
from fastpo.testing.budget import assert_within_budget, cosine
from fastpo.testing.linear import LinearCase
from fastpo.testing.objectives import PRESETS

HEADS = {
    "plain": {},
    "bias": {"bias": True},
    "scale": {"logit_scale": 0.3},
    "softcap": {"softcap": 2.0},
    "all": {"bias": True, "logit_scale": 1.7, "softcap": 3.0, "temperature": 0.6},
}
BACKENDS = [name for name in ("torch", "cpp") if backends.unavailable(name) is None]
TOKEN_LEVEL = [name for name, objective in PRESETS.items() if objective.is_token_level]


def assert_equal_results(actual, expected, tolerance=2e-6):
    """Loss, log-probs, entropies, metrics and gradients of two (result, gradients) pairs."""
    (result, grads), (other, other_grads) = actual, expected
    torch.testing.assert_close(result.loss, other.loss, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(result.logprobs, other.logprobs, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(result.entropy, other.entropy, rtol=tolerance, atol=tolerance)
    assert result.metrics.keys() == other.metrics.keys()
    for name, value in result.metrics.items():
        torch.testing.assert_close(value, other.metrics[name], rtol=1e-4, atol=1e-4, msg=name)
    for grad, other_grad in zip(grads, other_grads, strict=True):
        assert grad.shape == other_grad.shape
        assert (grad - other_grad).norm() <= tolerance * other_grad.norm()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("preset", PRESETS)
def test_matches_all_logits_in_fp64(preset, head, backend):
    objective, case = PRESETS[preset], LinearCase.random(**HEADS[head])
    exact, exact_grads = case.eager(objective, torch.float64)
    plain, plain_grads = case.eager(objective, torch.float32)
    result, grads = case.fused(objective, backend=backend, chunk_tokens=16)
    assert_within_budget(result.logprobs, exact.logprobs, plain.logprobs, factor=3)
    # A sum of terms of either sign: its rounding error is that of terms of order 1.
    assert (result.loss - exact.loss).abs() < 1e-6 + 4 * (plain.loss - exact.loss).abs()
    for name, *pair in zip(
        ("hidden", "weight", "bias"), grads, exact_grads, plain_grads, strict=False
    ):
        assert_within_budget(*pair, factor=3, name=name)
        assert cosine(*pair[:2]) > 1 - 1e-9


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("preset", PRESETS)
def test_fused_equals_two_steps(preset, backend):
    """REGRESSIONS 3: the equality that lets the fused op exist, for every option at once."""
    objective = PRESETS[preset]
    case = LinearCase.random(bias=True, logit_scale=1.3, softcap=4.0)
    case = replace(case, temperature=0.5 + torch.rand(case.tokens.shape))
    fused = case.fused(objective, backend=backend)
    assert_equal_results(fused, case.two_step(objective, backend=backend))


@pytest.mark.parametrize("chunk_tokens", [16, 32, None])
@pytest.mark.parametrize("per_token", [True, False])
@pytest.mark.parametrize("preset", ["dapo", "grpo_kl", "gspo", "luspo", "gmpo", "vespo"])
def test_options_reach_the_loss(preset, per_token, chunk_tokens):
    """importance_weights, normalizer, cu_seqlens: equal to the two steps with the same ones."""
    objective, case = PRESETS[preset], LinearCase.random(shape=(1, 60))
    rows = {"mask": case.mask[0], "old_logprobs": case.old_logprobs[0]}
    rows["ref_logprobs"] = case.ref_logprobs[0] if objective.kl_coef else None
    rows["cu_seqlens"] = torch.tensor([0, 13, 13, 40, 60], dtype=torch.int32)
    rows["importance_weights"] = 0.5 + torch.rand(60 if per_token else 4)
    if not objective.entropy_coef:
        rows["normalizer"] = 17.0
    hidden, weight = case.hidden[0].requires_grad_(), case.weight.requires_grad_()
    advantages, tokens = torch.randn(4), case.tokens[0]
    fused = fastpo.linear_policy_loss(
        hidden, weight, tokens, advantages, objective=objective, chunk_tokens=chunk_tokens, **rows
    )
    scored = fastpo.linear_token_logprobs(hidden, weight, tokens, mask=rows["mask"])
    steps = fastpo.policy_loss_from_logprobs(
        scored.logprobs, advantages, objective=objective, entropy=scored.entropy, **rows
    )
    grads = [torch.autograd.grad(result.loss, [hidden, weight]) for result in (fused, steps)]
    assert_equal_results((fused, grads[0]), (steps, grads[1]))


@pytest.mark.parametrize("preset", ["dapo", "dapo_all", "grpo_kl"])
def test_split_batch_sums_to_the_whole(preset):
    """REGRESSIONS 16: micro-batches with a global normalizer add up to one batch."""
    objective, case = replace(PRESETS[preset], aggregation="token_mean"), LinearCase.random()
    count = int(case.mask.sum())
    whole = case.fused(objective, normalizer=count)[1]
    rows = [
        replace(case, **{name: getattr(case, name)[i : i + 1] for name in ROW_FIELDS})
        for i in range(3)
    ]
    parts = [part.fused(objective, normalizer=count)[1] for part in rows]
    hidden = torch.cat([grads[0] for grads in parts])
    weight = torch.stack([grads[1] for grads in parts]).sum(0)
    assert (hidden - whole[0]).norm() < 1e-6 * whole[0].norm()
    assert (weight - whole[1]).norm() < 1e-6 * whole[1].norm()


ROW_FIELDS = ("hidden", "tokens", "advantages", "mask", "old_logprobs", "ref_logprobs")


def test_temperature_on_policy_has_ratio_one():
    """REGRESSIONS 13: old log-probs scored at the same temperature give r = 1 exactly."""
    case = LinearCase.random(temperature=0.7)
    scored = fastpo.linear_token_logprobs(
        case.hidden, case.weight, case.tokens, mask=case.mask, temperature=0.7
    )
    result, _ = replace(case, old_logprobs=scored.logprobs).fused(fastpo.dapo())
    assert result.metrics["ratio"] == result.metrics["tokens"] == case.mask.sum()
    assert result.metrics["old_kl"] == 0


@pytest.mark.parametrize("preset", ["dapo", "gspo"])
def test_gradient_is_that_of_finite_differences(preset):
    """REGRESSIONS 19: central differences of the fp64 loss along random directions."""
    objective, case = PRESETS[preset], LinearCase.random(dtype=torch.float64, softcap=3.0)
    _, grads = case.fused(objective)
    gen = torch.Generator().manual_seed(1)
    for name, grad in zip(("hidden", "weight"), grads, strict=True):
        value = getattr(case, name)
        step = 1e-6 * torch.randn(value.shape, generator=gen, dtype=torch.float64)
        ahead = replace(case, **{name: value + step}).fused(objective)[0].loss
        behind = replace(case, **{name: value - step}).fused(objective)[0].loss
        torch.testing.assert_close((ahead - behind) / 2, (grad * step).sum(), rtol=1e-5, atol=0)
    assert grads[0].norm() > 1e-3


def test_token_logprobs_pass_gradcheck():
    case = LinearCase.random(shape=(1, 5), width=4, vocabulary=9, dtype=torch.float64, bias=True)

    def scored(hidden, weight, bias):
        return tuple(
            fastpo.linear_token_logprobs(
                hidden, weight, case.tokens, bias=bias, softcap=2.0, logit_scale=0.7, chunk_tokens=2
            )
        )

    assert torch.autograd.gradcheck(scored, tuple(case.leaves()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("preset", ["dapo", "dapo_all", "grpo_kl", "gspo"])
def test_low_precision_is_as_good_as_fp32_logits(preset, dtype):
    """Error against fp64 at most 1.2x that of full fp32 logits from the same operands."""
    objective = PRESETS[preset]
    case = LinearCase.random(shape=(2, 80), width=64, vocabulary=5000, dtype=dtype)
    exact, exact_grads = case.eager(objective, torch.float64)
    plain, plain_grads = case.eager(objective, torch.float32)
    result, grads = case.fused(objective, chunk_tokens=48)
    assert_within_budget(result.logprobs, exact.logprobs, plain.logprobs, factor=1.2)
    for grad, *pair in zip(grads, exact_grads, plain_grads, strict=True):
        assert grad.dtype == dtype
        assert_within_budget(grad, *pair, factor=1.2)


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("preset", ["dapo", "dapo_all", "gspo"])
def test_bfloat16_gradient_over_fp32_logits(preset, head, monkeypatch):
    """The way on GPUs: the gradient of fp32 logits is bf16 and shares their storage."""
    objective = PRESETS[preset]
    case = LinearCase.random(
        shape=(2, 80), width=64, vocabulary=5000, dtype=torch.bfloat16, **HEADS[head]
    )
    exact, exact_grads = case.eager(objective, torch.float64)
    plain, plain_grads = case.eager(objective, torch.float32)
    monkeypatch.setattr(LinearCall, "grad_dtype", lambda *_: torch.bfloat16)
    for backend in BACKENDS:
        result, grads = case.fused(objective, chunk_tokens=100, backend=backend)
        assert_within_budget(result.logprobs, exact.logprobs, plain.logprobs, factor=1.2)
        for grad, *pair in zip(grads, exact_grads, plain_grads, strict=True):
            assert_within_budget(grad, *pair, factor=2.0)


def test_bfloat16_logits_are_a_noisier_choice():
    case = LinearCase.random(dtype=torch.bfloat16)
    exact = case.eager(fastpo.dapo())
    result, grads = case.fused(fastpo.dapo(), logits_dtype=torch.bfloat16)
    error = (result.logprobs - exact[0].logprobs).abs().max()
    assert 1e-4 < error < 0.1
    assert all(cosine(*pair) > 0.99 for pair in zip(grads, exact[1], strict=True))


def test_autocast_casts_as_a_linear_layer_does():
    case = LinearCase.random()
    with torch.autocast("cpu", torch.bfloat16):
        result, grads = case.fused(fastpo.dapo())
    assert result.loss.dtype == torch.float32
    assert all(grad.dtype == torch.float32 for grad in grads)
    low = replace(case, hidden=case.hidden.bfloat16(), weight=case.weight.bfloat16())
    expected, low_grads = low.fused(fastpo.dapo())
    assert torch.equal(result.logprobs, expected.logprobs)
    assert all(torch.equal(a, b.float()) for a, b in zip(grads, low_grads, strict=True))
