"""A micro-batch without tokens, or all masked: zeros, and a gradient for every input."""

from __future__ import annotations

import pytest
import torch

import fastpo
from fastpo import backends
from fastpo.ops.linear_chunks import LinearCall

BACKENDS = [
    pytest.param(name, marks=pytest.mark.slow if name == "triton" else ())  # interpreted
    for name in ("torch", "cpp", "triton")
    if backends.unavailable(name) is None
]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
OBJECTIVES = {
    "dapo": fastpo.dapo(),
    "everything": fastpo.dapo(kl_coef=0.1, entropy_coef=0.1, ratio_max=3.0),
    "grpo": fastpo.grpo(kl_coef=0.1),
    "gspo": fastpo.gspo(kl_coef=0.1),
    "gmpo": fastpo.gmpo(),
    "vespo": fastpo.vespo(),
    "cispo": fastpo.cispo(),
}
SHAPES = {"packed": (0,), "no sequences": (0, 4), "no tokens": (3, 0), "all masked": (3, 2)}
D, V = 8, 33


def loss_inputs(objective, shape):
    """Keywords of a policy loss of no token at all; NaN wherever one may stand."""
    dead = torch.full(shape, torch.nan)
    packed = len(shape) == 1
    return {
        "advantages": torch.zeros(1 if packed else shape[0]),
        "objective": objective,
        "mask": torch.zeros(shape, dtype=torch.bool),
        "old_logprobs": dead,
        "ref_logprobs": dead if objective.kl_coef else None,
        "importance_weights": dead,
        "cu_seqlens": torch.tensor([0, 0], dtype=torch.int32) if packed else None,
    }


def check(result, *leaves):
    assert result.loss == 0 and result.loss.requires_grad
    assert result.logprobs.numel() == 0 or not result.logprobs.any()
    assert all(value == 0 for value in result.metrics.values())
    result.loss.backward()
    for leaf in leaves:
        assert leaf.grad.shape == leaf.shape and leaf.grad.dtype == leaf.dtype
        assert not leaf.grad.any()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", OBJECTIVES)
def test_policy_losses(name, shape, dtype, backend):
    """REGRESSIONS 43"""
    objective, shape = OBJECTIVES[name], SHAPES[shape]
    inputs = loss_inputs(objective, shape)
    advantages, tokens = inputs.pop("advantages"), torch.zeros(shape, dtype=torch.long)
    for inplace in (False, True):
        logits = torch.full((*shape, V), torch.nan, dtype=dtype).requires_grad_()
        result = fastpo.policy_loss(
            logits, tokens, advantages, inplace=inplace, backend=backend, **inputs
        )
        check(result, logits)
    for options in ({}, {"softcap": 3.0}, {"chunk_tokens": 1}, {"live_rows": 0}):
        hidden = torch.full((*shape, D), torch.nan, dtype=dtype).requires_grad_()
        weight, bias = (x.to(dtype).requires_grad_() for x in (torch.randn(V, D), torch.randn(V)))
        result = fastpo.linear_policy_loss(
            hidden, weight, tokens, advantages, bias=bias, backend=backend, **options, **inputs
        )
        check(result, hidden, weight, bias)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("shape", [(0,), (0, 4), (3, 0)])
def test_log_probs(shape, masked, dtype, backend):
    """REGRESSIONS 43"""
    tokens = torch.zeros(shape, dtype=torch.long)
    mask = torch.zeros(shape, dtype=torch.bool) if masked else None
    for inplace in (False, True):
        logits = torch.zeros((*shape, V), dtype=dtype, requires_grad=True)
        scored = fastpo.token_logprobs(logits, tokens, mask=mask, inplace=inplace, backend=backend)
        (scored.logprobs.sum() + scored.entropy.sum()).backward()
        assert scored.logprobs.shape == shape and logits.grad.shape == logits.shape
    hidden = torch.zeros((*shape, D), dtype=dtype, requires_grad=True)
    weight = torch.randn(V, D).to(dtype).requires_grad_()
    scored = fastpo.linear_token_logprobs(hidden, weight, tokens, mask=mask, backend=backend)
    (scored.logprobs.sum() + scored.entropy.sum()).backward()
    assert hidden.grad.shape == hidden.shape and not weight.grad.any()


@pytest.mark.parametrize("shape", [(3, 0, 1), (2, 0, V), (0, 4, 1), (0, 1)])
def test_inplace_on_nothing(shape):
    """REGRESSIONS 43: strides of 1 throughout are no overlap where there is no element."""
    tokens = torch.zeros(shape[:-1], dtype=torch.long)
    logits = torch.zeros(shape, requires_grad=True)
    fastpo.token_logprobs(logits * 1, tokens, inplace=True).logprobs.sum().backward()
    assert logits.grad.shape == shape


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_narrow_gradient_of_nothing(name, monkeypatch):
    """REGRESSIONS 43 on the way that GPUs take with bf16 heads."""
    monkeypatch.setattr(LinearCall, "grad_dtype", lambda *_: torch.bfloat16)
    inputs = loss_inputs(OBJECTIVES[name], (3, 2))
    hidden = torch.zeros(3, 2, D, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(V, D).bfloat16().requires_grad_()
    advantages = inputs.pop("advantages")
    result = fastpo.linear_policy_loss(
        hidden, weight, torch.zeros(3, 2, dtype=torch.long), advantages, **inputs
    )
    check(result, hidden, weight)
