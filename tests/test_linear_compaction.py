"""Rows that do not count never enter a GEMM, and nothing but the time shows it."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import fastpo
from fastpo import backends
from fastpo.ops import checks, linear
from fastpo.ops.linear_chunks import LinearCall
from fastpo.testing.linear import LinearCase

PRESETS = {
    "dapo": fastpo.dapo(),
    "dapo_kl": fastpo.dapo(kl_coef=0.1, entropy_coef=0.01),
    "sapo": fastpo.sapo(),
    "gspo": fastpo.gspo(),
}


def flops(function) -> int:
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


def step(case, objective, *, train=("hidden", "weight"), **extra):
    """A call of forward + backward with gradients for the tensors named in `train`."""
    tensors = {name: getattr(case, name).clone() for name in ("hidden", "weight")}
    for name in train:
        tensors[name].requires_grad_()
    options = case.options(objective) | extra

    def run():
        loss = fastpo.linear_policy_loss(
            tensors["hidden"], tensors["weight"], case.tokens, case.advantages, **options
        ).loss
        if train:
            loss.backward()

    return run


@pytest.mark.parametrize("chunk_tokens", [None, 32, 64])
@pytest.mark.parametrize(
    ("train", "gemms"),
    [(("hidden", "weight"), 3), (("hidden",), 2), (("weight",), 2), ((), 1)],
)
def test_operations_of_a_token_level_step(train, gemms, chunk_tokens):
    """6 N D V with both gradients, 4 with one, 2 with none: every product exactly once."""
    case = LinearCase.random(shape=(2, 64), width=16, vocabulary=300)
    case = replace(case, mask=None, advantages=torch.ones(2, 64))
    run = step(case, fastpo.dapo(), train=train, chunk_tokens=chunk_tokens)
    assert flops(run) == 2 * gemms * 128 * 16 * 300


@pytest.mark.parametrize(("chunk_tokens", "gemms"), [(32, 4), (64, 3), (None, 3)])
def test_operations_of_a_sequence_level_step(chunk_tokens, gemms):
    """6 N D V where the two sequences of 64 fit a chunk, else the logits are computed again."""
    case = LinearCase.random(shape=(2, 64), width=16, vocabulary=300)
    case = replace(case, mask=None, advantages=torch.ones(2, 64))
    run = step(case, fastpo.gspo(clip_low=1.0, clip_high=9.0), chunk_tokens=chunk_tokens)
    assert flops(run) == 2 * gemms * 128 * 16 * 300


def test_no_gradient_work_under_no_grad():
    case = LinearCase.random(shape=(2, 64), width=16, vocabulary=300)
    with torch.no_grad():
        count = flops(step(replace(case, mask=None), fastpo.dapo(), train=()))
    assert count == 2 * 128 * 16 * 300


def test_masked_rows_and_zero_advantages_save_their_gemms():
    """48 of 128 rows are masked; 32 of the others have A = 0 and need only their statistics."""
    case = LinearCase.random(shape=(1, 128), width=16, vocabulary=300)
    mask, advantages = torch.arange(128)[None] >= 48, torch.ones(1, 128)
    advantages[:, 96:] = 0
    case = replace(case, mask=mask, advantages=advantages)
    assert flops(step(case, fastpo.dapo())) == (2 * 80 + 4 * 48) * 16 * 300
    with_kl = fastpo.dapo(kl_coef=0.1)
    assert flops(step(case, with_kl)) == 6 * 80 * 16 * 300


@pytest.mark.parametrize("preset", PRESETS)
def test_compacted_equals_uncompacted(preset, monkeypatch):
    """The other way, taken on GPU without live_rows: dead rows enter, blanked.

    To the bit, except on the torch backend: the last bit of torch's sigmoid and log depends on
    where a number stands in its vector.
    """
    exact = backends.resolve(None, torch.device("cpu"), torch.float32) == "cpp"
    same = torch.equal if exact else partial(torch.allclose, rtol=1e-6, atol=1e-7)
    case = LinearCase.random(bias=True, softcap=3.0)
    case = replace(case, temperature=0.5 + torch.rand(case.tokens.shape))
    compact, grads = case.fused(PRESETS[preset])
    monkeypatch.setattr(linear, "unmasked_rows", lambda *_: (None, None))
    monkeypatch.setattr(LinearCall, "reads_values", False)
    case.hidden[~case.mask] = torch.nan
    full, full_grads = case.fused(PRESETS[preset])
    assert same(compact.loss, full.loss)
    assert same(compact.logprobs, full.logprobs)
    assert same(compact.entropy, full.entropy)
    assert all(same(value, full.metrics[name]) for name, value in compact.metrics.items())
    assert same(grads[0], full_grads[0])
    for grad, other in zip(grads[1:], full_grads[1:], strict=True):
        assert (grad - other).norm() < 1e-6 * grad.norm()


@pytest.mark.parametrize("preset", PRESETS)
def test_live_rows_counts_what_the_mask_says(preset):
    case = LinearCase.random()
    expected, grads = case.fused(PRESETS[preset])
    result, others = case.fused(PRESETS[preset], live_rows=int(case.mask.sum()))
    assert torch.equal(result.loss, expected.loss)
    assert all(torch.equal(a, b) for a, b in zip(grads, others, strict=True))


def test_wrong_live_rows_show_without_a_synchronization(monkeypatch):
    """On GPU values may not be looked at: a contradiction gives NaN, whichever way it is wrong."""
    case = LinearCase.random()
    monkeypatch.setattr(checks, "inspects_values", lambda tensor: False)
    monkeypatch.setattr(LinearCall, "reads_values", False)
    count = int(case.mask.sum())
    for live_rows in (0, count - 1, count + 1, case.mask.numel(), 10**6):
        for objective in (fastpo.dapo(), fastpo.gspo()):
            assert case.fused(objective, live_rows=live_rows)[0].loss.isnan()
    assert case.fused(fastpo.dapo(), live_rows=count)[0].loss.isfinite()


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("field", ["hidden", "old_logprobs", "ref_logprobs", "advantages"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -300.0])
def test_what_stands_in_masked_rows_changes_nothing(preset, field, value):
    """REGRESSIONS 17"""
    case = LinearCase.random()
    poisoned = replace(case, **{field: getattr(case, field).clone()})
    getattr(poisoned, field)[~case.mask] = value
    (result, grads), (clean, clean_grads) = (x.fused(PRESETS[preset]) for x in (poisoned, case))
    assert torch.equal(result.loss, clean.loss)
    assert all(torch.equal(a, b) for a, b in zip(grads, clean_grads, strict=True))


def test_nan_in_an_unmasked_row_shows():
    """REGRESSIONS 18: compaction by A = 0 must not hide it either."""
    case = LinearCase.random()
    advantages = torch.zeros_like(case.advantages)
    where = tuple(case.mask.nonzero()[0])
    case.hidden[where] = torch.nan
    for objective in (fastpo.dapo(), fastpo.gspo()):
        assert replace(case, advantages=advantages).fused(objective)[0].loss.isnan()


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("shape", [(3, 21), (0, 21), (3, 0)])
def test_nothing_unmasked_is_a_differentiable_zero(preset, shape):
    """REGRESSIONS 8, 15: a rank whose micro-batch is empty still takes part in the backward."""
    case = LinearCase.random(shape=shape)
    case = replace(case, mask=torch.zeros(shape, dtype=torch.bool))
    result, grads = case.fused(PRESETS[preset])
    assert result.loss == 0
    assert result.loss.requires_grad
    assert all(bool((grad == 0).all()) for grad in grads)
    assert result.metrics["tokens"] == 0
