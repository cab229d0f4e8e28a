"""`policy_loss` on every backend here, against autograd through the fp64 specification."""

from __future__ import annotations

import pytest
import torch
from policy_batch import BACKENDS, DTYPES, Batch

import fastpo
from fastpo.testing.budget import assert_within_budget, cosine
from fastpo.testing.objectives import PRESETS


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", PRESETS)
def test_matches_the_specification(name, dtype, backend):
    """REGRESSIONS 3, 7, 13, 19: every term, weight and temperature reaches the gradient."""
    batch, objective = Batch(dtype), PRESETS[name]
    loss, grad = batch.spec(objective)
    rough_loss, rough_grad = batch.spec(objective, dtype)
    result, fused_grad = batch.fused(objective, backend=backend)
    assert_within_budget(fused_grad, grad, rough_grad, name="gradient")
    assert_within_budget(result.loss, loss, rough_loss, name="loss")
    assert grad.norm() > 0 and cosine(fused_grad, grad) > 0.999


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", PRESETS)
def test_fused_equals_two_steps(name, backend):
    """REGRESSIONS 3: `token_logprobs` then `policy_loss_from_logprobs` is the same computation."""
    batch, objective = Batch(), PRESETS[name]
    result, grad = batch.fused(objective, backend=backend)
    logits = batch.logits.clone().requires_grad_()
    two = fastpo.token_logprobs(
        logits, batch.tokens, mask=batch.mask, temperature=batch.temperature, backend=backend
    )
    steps = fastpo.policy_loss_from_logprobs(
        two.logprobs, batch.advantages, entropy=two.entropy, **batch.options(objective)
    )
    steps.loss.backward()
    exact = batch.spec(objective)
    assert_within_budget(result.loss, exact[0], steps.loss.detach(), name="loss")
    assert_within_budget(grad, exact[1], logits.grad, name="gradient")
    assert torch.equal(result.logprobs, two.logprobs)
    assert torch.equal(result.entropy, two.entropy)
    assert result.metrics.keys() == steps.metrics.keys()
    for key, value in result.metrics.items():
        torch.testing.assert_close(value, steps.metrics[key], msg=key)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", PRESETS)
def test_masked_rows_may_hold_anything(name, backend):
    """REGRESSIONS 4, 17: NaN and inf in every masked slot of every input change no bit."""
    clean, dirty = Batch(), Batch()
    for garbage, value in zip((torch.nan, torch.inf, -torch.inf), range(3), strict=True):
        slots = ~dirty.mask & (torch.arange(dirty.mask.numel()).view(dirty.mask.shape) % 3 == value)
        for tensor in (dirty.logits, dirty.old, dirty.ref, dirty.weights):
            tensor[slots] = garbage
    dirty.tokens[~dirty.mask] = -100
    result, grad = clean.fused(PRESETS[name], backend=backend)
    other, other_grad = dirty.fused(PRESETS[name], backend=backend)
    assert torch.equal(result.loss, other.loss)
    assert torch.equal(grad, other_grad)
    assert (other_grad[~dirty.mask] == 0).all()
    assert torch.equal(result.logprobs, other.logprobs)
    assert all(torch.equal(result.metrics[key], other.metrics[key]) for key in result.metrics)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", PRESETS)
def test_all_masked_gives_a_differentiable_zero(name, backend):
    """REGRESSIONS 8, 15: data-parallel ranks with nothing to learn still take part in backward."""
    batch = Batch()
    batch.mask[:] = False
    result, grad = batch.fused(PRESETS[name], backend=backend)
    assert result.loss.item() == 0 and result.loss.requires_grad
    assert torch.equal(grad, torch.zeros_like(grad))
    assert result.metrics["tokens"].item() == 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_empty_batch(backend):
    logits = torch.randn(0, 11, requires_grad=True)
    empty = torch.zeros(0)
    result = fastpo.policy_loss(
        logits, empty.long(), empty, objective=fastpo.dapo(), backend=backend
    )
    result.loss.backward()
    assert result.loss.item() == 0 and logits.grad.shape == (0, 11)


@pytest.mark.parametrize("backend", BACKENDS)
def test_on_policy_ratio_is_one_and_keeps_its_gradient(backend):
    """REGRESSIONS 13, 19: at T != 1 the ratio is exactly 1, and the loss still has a gradient."""
    batch = Batch()
    batch.weights = torch.ones_like(batch.weights)
    result, grad = batch.fused(fastpo.dapo(), backend=backend, old_logprobs=None)
    assert torch.equal(result.metrics["ratio"], result.metrics["tokens"])
    _, reinforce = batch.fused(fastpo.reinforce(), backend=backend, old_logprobs=None)
    torch.testing.assert_close(grad, reinforce)
    old = result.logprobs
    again, same = batch.fused(fastpo.dapo(), backend=backend, old_logprobs=old)
    assert torch.equal(again.metrics["ratio"], result.metrics["ratio"])
    assert torch.equal(same, grad)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("aggregation", ["token_mean", "sequence_mean", "sequence_sum", "constant"])
def test_gradient_accumulation_is_exact(aggregation, backend):
    """REGRESSIONS 16: with a normalizer, the sum over micro-batches is the batch."""
    batch = Batch(batch=5)
    length = 64 if aggregation == "constant" else None
    objective = fastpo.grpo(aggregation=aggregation, max_length=length, kl_coef=0.1)
    _, whole = batch.fused(objective, backend=backend)
    count = batch.mask.sum() if aggregation == "token_mean" else torch.tensor(5.0)
    parts = []
    for cut in (slice(0, 1), slice(1, 2), slice(2, 5)):
        logits = batch.logits[cut].clone().requires_grad_()
        options = batch.options(objective, normalizer=count)
        per_token = ("mask", "old_logprobs", "ref_logprobs", "importance_weights")
        options |= {key: options[key][cut] for key in per_token}
        fastpo.policy_loss(
            logits,
            batch.tokens[cut],
            batch.advantages[cut],
            temperature=batch.temperature,
            backend=backend,
            **options,
        ).loss.backward()
        parts.append(logits.grad)
    exact = batch.spec(objective)[1]
    assert_within_budget(torch.cat(parts), exact, whole, name="accumulated gradient")


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_do_not_depend_on_their_neighbours(backend):
    """Batch invariance: each row's numbers are the same bits alone and in any batch."""
    batch = Batch(vocab=1000)
    whole = fastpo.token_logprobs(batch.logits, batch.tokens, backend=backend)
    for row in ((0, 0), (2, 3), (3, 5)):
        alone = fastpo.token_logprobs(
            batch.logits[row][None], batch.tokens[row][None], backend=backend
        )
        assert torch.equal(alone.logprobs[0], whole.logprobs[row])
        assert torch.equal(alone.entropy[0], whole.entropy[row])


@pytest.mark.parametrize("backend", BACKENDS)
def test_packed_equals_padded(backend):
    batch = Batch()
    for name in ("grpo", "gspo", "luspo", "gmpo", "vespo", "dapo"):
        padded, grad = batch.fused(PRESETS[name], backend=backend)
        logits = batch.logits.flatten(0, 1).clone().requires_grad_()
        flat = {
            key: value.flatten() if isinstance(value, torch.Tensor) else value
            for key, value in batch.options(PRESETS[name]).items()
        }
        packed = fastpo.policy_loss(
            logits,
            batch.tokens.flatten(),
            batch.advantages,
            temperature=batch.temperature,
            cu_seqlens=torch.arange(5, dtype=torch.int32) * 6,
            backend=backend,
            **flat,
        )
        packed.loss.backward()
        torch.testing.assert_close(packed.loss, padded.loss)
        torch.testing.assert_close(logits.grad.view_as(grad), grad)


@pytest.mark.parametrize("backend", BACKENDS)
def test_temperature_per_token(backend):
    batch = Batch()
    temperatures = torch.full(batch.tokens.shape, 0.8)
    same, grad = batch.fused(PRESETS["dapo_all"], backend=backend, temperature=temperatures)
    scalar, scalar_grad = batch.fused(PRESETS["dapo_all"], backend=backend)
    torch.testing.assert_close(same.loss, scalar.loss)
    torch.testing.assert_close(grad, scalar_grad)
    temperatures[2] = 1.7
    other, _ = batch.fused(PRESETS["dapo_all"], backend=backend, temperature=temperatures)
    assert torch.equal(other.logprobs[0], same.logprobs[0])
    assert not torch.equal(other.logprobs[2], same.logprobs[2])


@pytest.mark.parametrize("backend", BACKENDS)
def test_extreme_log_ratios_stay_finite(backend):
    """REGRESSIONS 18: log-ratios of +-1e3 are clamped; a clipped token has gradient 0, not NaN."""
    batch = Batch()
    batch.mask[:] = True
    batch.old[0], batch.old[1] = batch.old[0] - 1000, batch.old[1] + 1000
    for advantage in (1.0, -1.0, 0.0):
        batch.advantages[:] = advantage
        result, grad = batch.fused(fastpo.dapo(), backend=backend)
        assert result.loss.isfinite() and grad.isfinite().all()
    batch.advantages[:] = 1.0
    _, grad = batch.fused(fastpo.dapo(), backend=backend)
    assert (grad[0] == 0).all() and grad[2].norm() > 0


def test_kl_metrics_of_a_small_step():
    """1e-4 away, the KL is 5e-9: exp(x) - 1 - x in float32 would be rounding error alone."""
    logprobs = torch.full((8,), -1.0)
    result = fastpo.policy_loss_from_logprobs(
        logprobs, torch.ones(8), objective=fastpo.dapo(), old_logprobs=logprobs - 1e-4
    )
    torch.testing.assert_close(result.metrics["old_kl"], torch.tensor(8 * 5e-9), rtol=0.01, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_of_an_unmasked_token_stays_visible(backend):
    """REGRESSIONS 18: the loss shows it, and no other row is touched."""
    batch = Batch()
    batch.mask[:] = True
    batch.old[0, 0] = torch.nan
    result, grad = batch.fused(fastpo.dapo(), backend=backend)
    assert result.loss.isnan()
    assert grad[0, 1:].isfinite().all() and grad[1:].isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", PRESETS)
def test_importance_weights_per_sequence(name, backend):
    """[B] weights count once per sequence: as spread ones do, except in vespo's sequence weight."""
    batch = Batch()
    per_sequence = torch.tensor([0.5, 2.0, 1.5, 0.8])
    result, grad = batch.fused(PRESETS[name], backend=backend, importance_weights=per_sequence)
    spread = per_sequence[:, None].expand_as(batch.weights)
    other, other_grad = batch.fused(PRESETS[name], backend=backend, importance_weights=spread)
    if name == "vespo":
        assert not torch.allclose(result.loss, other.loss)
        one = batch.spec(PRESETS[name], importance_weights=per_sequence)
        torch.testing.assert_close(result.loss.double(), one[0].double(), rtol=1e-5, atol=1e-6)
    else:
        torch.testing.assert_close(result.loss, other.loss)
        torch.testing.assert_close(grad, other_grad)


@pytest.mark.parametrize("name", ["dapo_all", "gspo", "gmpo", "sapo"])
def test_gradcheck(name):
    """REGRESSIONS 19: the gradient is that of the loss, by finite differences in fp64."""
    batch = Batch(torch.float64, batch=2, width=3, vocab=5)
    batch.mask[:] = True

    def loss(logits):
        options = batch.options(
            PRESETS[name].__class__(**_fields(PRESETS[name], kl_estimator="k3"))
        )
        return fastpo.policy_loss(logits, batch.tokens, batch.advantages, **options).loss

    torch.autograd.gradcheck(loss, batch.logits.clone().requires_grad_())


def _fields(objective, **changes):
    from dataclasses import asdict

    return asdict(objective) | changes


def test_zeroed_policy_gradient_fails_the_check(monkeypatch):
    """The suite has teeth: a backend that returns no policy gradient does not pass."""
    from fastpo.backends import torch as torch_rows

    def no_gradient(*args):
        args[-1].zero_()

    monkeypatch.setattr(torch_rows, "row_grad", no_gradient)
    batch = Batch()
    _, grad = batch.spec(fastpo.dapo())
    _, fused_grad = batch.fused(fastpo.dapo(), backend="torch")
    with pytest.raises(AssertionError, match="exceeds the budget"):
        assert_within_budget(fused_grad, grad, grad.float())
