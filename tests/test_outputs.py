"""What the ops return belongs to the caller: copies, detached where they say so, and means."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import fastpo
from fastpo import backends
from fastpo.testing.linear import LinearCase

BACKENDS = [name for name in ("torch", "cpp") if backends.unavailable(name) is None]
OBJECTIVES = {
    "dapo": fastpo.dapo(kl_coef=0.1, entropy_coef=0.1),
    "gspo": fastpo.gspo(clip_low=1.0, clip_high=9.0),
    "gmpo": fastpo.gmpo(),
    "vespo": fastpo.vespo(),
    "cispo": fastpo.cispo(),
}
EDITS = {
    "setitem": lambda x: x.__setitem__(0, 0.0),
    "mul_": lambda x: x.mul_(2.0),
    "zero_": lambda x: x.zero_(),
}


def scored_edited(score, leaves, edit, which):
    """Gradients of a sum over both outputs, after an in-place edit of one of them."""
    scored = score()
    if edit is not None:
        edit(getattr(scored, which))
    return torch.autograd.grad(scored.logprobs.sum() + 0.5 * scored.entropy.sum(), leaves)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("edit", EDITS)
@pytest.mark.parametrize("which", ["logprobs", "entropy"])
@pytest.mark.parametrize("op", ["token_logprobs", "linear_token_logprobs"])
def test_editing_differentiable_outputs(op, which, edit, backend):
    """REGRESSIONS 44: allowed, as for plain torch's log_softmax, and the gradient is its."""
    case = LinearCase.random()
    leaves = case.leaves()

    def score():
        if op == "linear_token_logprobs":
            return fastpo.linear_token_logprobs(
                *leaves, case.tokens, chunk_tokens=16, backend=backend
            )
        return fastpo.token_logprobs(leaves[0] @ leaves[1].t(), case.tokens, backend=backend)

    def eager():
        return fastpo.TokenLogprobs(*case.eager_logprobs(torch.float32, leaves))

    got = scored_edited(score, leaves, EDITS[edit], which)
    expected = scored_edited(eager, leaves, EDITS[edit], which)
    for grad, other in zip(got, expected, strict=True):
        assert (grad - other).norm() <= 1e-5 * other.norm() + 1e-12


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("chunk_tokens", [None, 1])
@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_editing_what_a_loss_returns(name, masked, chunk_tokens, backend):
    """REGRESSIONS 44: for a chunk that a sequence fits, and for one that it does not."""
    objective, case = OBJECTIVES[name], LinearCase.random()
    case = case if masked else replace(case, mask=None)
    options = case.options(objective) | {"backend": backend}

    def linear(leaves):
        return fastpo.linear_policy_loss(
            *leaves, case.tokens, case.advantages, chunk_tokens=chunk_tokens, **options
        )

    def logits(leaves):
        scores = leaves[0] @ leaves[1].t()
        return fastpo.policy_loss(scores, case.tokens, case.advantages, **options)

    def from_logprobs(leaves):
        scored = fastpo.linear_token_logprobs(*leaves, case.tokens, mask=case.mask)
        return fastpo.policy_loss_from_logprobs(
            scored.logprobs, case.advantages, entropy=scored.entropy, **case.options(objective)
        )

    for op in (linear, logits, from_logprobs):
        leaves = case.leaves()
        expected = torch.autograd.grad(op(leaves).loss, leaves)
        result = op(leaves)
        result.logprobs[:, 0] = 7.0
        result.entropy.mul_(2.0)
        for value in result.metrics.values():
            value.add_(1.0)
        got = torch.autograd.grad(result.loss, leaves)
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_editing_the_result_leaves_the_arguments_alone():
    """`policy_loss_from_logprobs` returned a view of the caller's own log-probs."""
    logprobs, entropy = -torch.rand(2, 3), torch.rand(2, 3)
    kept = logprobs.clone(), entropy.clone()
    result = fastpo.policy_loss_from_logprobs(
        logprobs, torch.ones(2), entropy=entropy, objective=fastpo.dapo()
    )
    result.logprobs.zero_()
    result.entropy.zero_()
    assert torch.equal(logprobs, kept[0]) and torch.equal(entropy, kept[1])


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_second_backward_of_policy_loss_sees_a_changed_argument(name):
    """A token-level one is computed again from what was given: an edit in between must not pass.
    A sequence-level one has kept what it needs."""
    case = LinearCase.random()
    objective = OBJECTIVES[name]
    logits = (case.hidden @ case.weight.t()).requires_grad_()
    options = case.options(objective)
    old = options["old_logprobs"] = case.old_logprobs.clone()
    loss = fastpo.policy_loss(logits, case.tokens, case.advantages, **options).loss
    (first,) = torch.autograd.grad(loss, logits, retain_graph=True)
    old.add_(0.1)
    if not objective.is_token_level:
        return torch.testing.assert_close(torch.autograd.grad(loss, logits)[0], first)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(loss, logits)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_only_the_loss_is_differentiable(name):
    """REGRESSIONS 7: a mean of the returned entropy would otherwise have a gradient of silent
    zeros."""
    case = LinearCase.random()
    leaves = case.leaves()
    options = case.options(OBJECTIVES[name])
    logits = leaves[0] @ leaves[1].t()
    results = [
        fastpo.linear_policy_loss(*leaves, case.tokens, case.advantages, **options),
        fastpo.linear_policy_loss(*leaves, case.tokens, case.advantages, chunk_tokens=1, **options),
        fastpo.policy_loss(logits, case.tokens, case.advantages, **options),
    ]
    for result in results:
        assert result.loss.requires_grad
        assert not result.logprobs.requires_grad and not result.entropy.requires_grad
        assert not any(value.requires_grad for value in result.metrics.values())


def test_means():
    """Sums over tokens divided by them, as floats; of a step's micro-batches once added."""
    case = LinearCase.random()
    options = case.options(OBJECTIVES["dapo"])
    result = fastpo.linear_policy_loss(
        case.hidden, case.weight, case.tokens, case.advantages, **options
    )
    means, count = result.means(), int(case.mask.sum())
    assert means["tokens"] == count
    assert set(means) == set(result.metrics)
    assert means["entropy"] == pytest.approx(float(result.entropy.sum()) / count)
    assert means["ratio"] == pytest.approx(float(result.metrics["ratio"]) / count)
    parts = [replace(case, mask=case.mask & half) for half in (case.mask * 0 == 1, case.mask)]
    metrics = [part.fused(OBJECTIVES["dapo"])[0].metrics for part in parts]
    summed = {name: sum(each[name] for each in metrics) for name in metrics[0]}
    assert result._replace(metrics=summed).means() == pytest.approx(means)
    nothing = parts[0].fused(OBJECTIVES["dapo"])[0].means()
    assert set(nothing.values()) == {0.0}


def test_inplace_has_one_name_and_keeps_the_other():
    logits = torch.randn(4, 11)
    for name in ("inplace", "inplace_backward"):
        leaf = logits.clone().requires_grad_()
        loss = fastpo.token_logprobs(leaf, torch.arange(4), **{name: True}).logprobs.sum()
        loss.backward()
        assert leaf.grad.data_ptr() == leaf.data_ptr()
