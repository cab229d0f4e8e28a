"""The ops under autograd's other modes: double backward, inference mode, a loss scale."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import fastpo
from fastpo import backends
from fastpo.testing.linear import LinearCase

BACKENDS = [name for name in ("torch", "cpp") if backends.unavailable(name) is None]
OBJECTIVES = {"token": fastpo.dapo(entropy_coef=0.1), "sequence": fastpo.gspo(clip_low=0.1)}
OPS = ("policy_loss", "linear_policy_loss", "token_logprobs", "linear_token_logprobs")


def run(op, case, objective, hidden, backend=None):
    """The first output of an op: the loss, or the log-probs."""
    inputs = (hidden, case.weight) if "linear" in op else (hidden @ case.weight.t(),)
    options = {"mask": case.mask}
    if "policy_loss" in op:
        options = {"advantages": case.advantages} | case.options(objective)
    return getattr(fastpo, op)(*inputs, case.tokens, backend=backend, **options)[0]


@pytest.mark.parametrize("level", OBJECTIVES)
@pytest.mark.parametrize("op", OPS)
def test_double_backward_is_refused(op, level):
    """A penalty on the gradient, added to the loss, must not silently train nothing."""
    case = LinearCase.random()
    hidden = case.hidden.clone().requires_grad_()
    loss = run(op, case, OBJECTIVES[level], hidden).sum()
    with pytest.raises(RuntimeError, match=r"create_graph=True.*policy_loss_from_logprobs"):
        torch.autograd.grad(loss, hidden, create_graph=True)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("level", OBJECTIVES)
@pytest.mark.parametrize("op", OPS)
def test_inference_mode(op, level, backend):
    """An evaluation needs no graph, and the specification must not ask for one."""
    case = LinearCase.random()
    expected = run(op, case, OBJECTIVES[level], case.hidden, backend)
    with torch.inference_mode():
        got = run(op, case, OBJECTIVES[level], case.hidden.clone(), backend)
    assert got.is_inference()
    assert torch.equal(got, expected)


@pytest.mark.parametrize("inplace", [False, True])
def test_fp16_gradient_of_logits_survives_a_loss_scale(inplace):
    """It is about p / N, below fp16's smallest number unless scaled before it is rounded."""
    case = LinearCase.random(dtype=torch.float16)
    options = case.options(fastpo.dapo()) | {"normalizer": 1e7}
    logits = (case.hidden @ case.weight.t()).requires_grad_()
    exact = logits.detach().double().requires_grad_()
    scale = 2.0**24
    for leaf, changes in ((logits, {"inplace": inplace}), (exact, {"backend": "torch"})):
        rows = leaf * 1  # an inplace gradient may not overwrite a leaf
        loss = fastpo.policy_loss(rows, case.tokens, case.advantages, **options, **changes).loss
        (loss * scale).backward()
    assert (logits.grad - exact.grad).norm() < 1e-3 * exact.grad.norm()


@pytest.mark.parametrize("frozen", ["hidden", "weight", None])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("level", OBJECTIVES)
@pytest.mark.parametrize("op", OPS)
def test_inputs_made_under_inference_mode(op, level, backend, frozen):
    """A rollout's tensors, and a frozen head or trunk that was loaded there, train as any other."""
    case, objective = LinearCase.random(), OBJECTIVES[level]
    names = ("tokens", "mask", "advantages", "old_logprobs", "ref_logprobs")
    with torch.inference_mode():
        made = replace(case, **{name: getattr(case, name).clone() for name in names})
        temperature = torch.full(case.tokens.shape, 0.7)
        heads = {name: getattr(case, name).clone() for name in ("hidden", "weight")}
    assert made.tokens.is_inference()
    normal = replace(case, temperature=temperature.clone())
    grads = []
    for each, frozen_ones in ((normal, {}), (replace(made, temperature=temperature), heads)):
        leaves = {name: getattr(case, name).clone() for name in ("hidden", "weight")}
        if frozen is not None and "linear" in op:
            leaves[frozen] = frozen_ones.get(frozen, leaves[frozen])
        needs = [x.requires_grad_() for name, x in leaves.items() if name != frozen]
        if "linear" in op:
            inputs = (leaves["hidden"], leaves["weight"])
        else:
            inputs = (torch.einsum("btd,vd->btv", *leaves.values()),)
        options = {"mask": each.mask, "temperature": each.temperature, "backend": backend}
        if "policy_loss" in op:
            options |= {"advantages": each.advantages} | each.options(objective)
        loss = getattr(fastpo, op)(*inputs, each.tokens, **options)[0].sum()
        grads.append(torch.autograd.grad(loss, needs, allow_unused=True))
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))
