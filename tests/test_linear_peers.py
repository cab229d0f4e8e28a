"""`linear_policy_loss` beside TRL's and Liger's ways from hidden states to the loss."""

from __future__ import annotations

import pytest
import torch

import fastpo
from fastpo.testing.linear import LinearCase

pytestmark = pytest.mark.peer

HEADS = {
    "plain": {},
    "bias": {"bias": True},
    "gemma": {"softcap": 3.0},
    "cohere": {"logit_scale": 0.4, "temperature": 0.7},
}
LIGER = {
    "grpo": (fastpo.grpo(), {}),
    "dapo": (fastpo.dapo(clip_low=0.2, clip_high=0.28), {}),
    "bnpo": (fastpo.bnpo(), {}),
    "dr_grpo": (fastpo.dr_grpo(max_length=21), {"max_completion_length": 21}),
    "cispo": (fastpo.cispo(ratio_max=5.0), {"epsilon_high": 5.0}),
    "sapo": (fastpo.sapo(), {}),
}


def close(actual, expected, tolerance=5e-6):
    assert (actual - expected).norm() <= tolerance * expected.norm()


@pytest.mark.parametrize("head", HEADS)
def test_trl_chunked_logprobs(head):
    """Values and gradients through log-probs and entropy of TRL 1.16's `ChunkedLogProbFunction`."""
    function = pytest.importorskip("trl.kernels").ChunkedLogProbFunction
    case = LinearCase.random(**HEADS[head])
    upstream = torch.randn(2, 63)

    leaves = case.leaves()
    hidden, weight, *bias = leaves
    theirs = function.apply(
        hidden.reshape(63, 24),
        weight,
        bias[0] if bias else None,
        case.tokens.reshape(63),
        case.temperature,
        100,
        case.softcap,
        case.logit_scale,
        ("entropy",),
    )
    their_grads = torch.autograd.grad(theirs[:2], leaves, list(upstream))

    leaves = case.leaves()
    hidden, weight, *bias = leaves
    ours = fastpo.linear_token_logprobs(
        hidden, weight, case.tokens, bias=bias[0] if bias else None, **case.head()
    )
    grads = torch.autograd.grad(list(ours), leaves, [x.view(3, 21) for x in upstream])

    for mine, other in zip(ours, theirs[:2], strict=True):
        close(mine.flatten(), other)
    for mine, other in zip(grads, their_grads, strict=True):
        close(mine, other)


@pytest.mark.parametrize("kl", [0.0, 0.04])
@pytest.mark.parametrize("name", LIGER)
def test_liger_chunked_grpo(name, kl):
    """Loss and gradients of Liger 0.8.5's chunked GRPO loss, where its mask holds no NaN."""
    liger = pytest.importorskip("liger_kernel.chunked_loss")
    objective, settings = LIGER[name]
    objective = fastpo.Objective(**{**objective.__dict__, "kl_coef": kl})
    case = LinearCase.random(temperature=0.8)
    advantages = torch.tensor([0.7, -1.2, 0.4])
    bounds = {"epsilon_low": objective.clip_low, "epsilon_high": objective.clip_high}
    loss_function = liger.LigerFusedLinearGRPOLoss(
        beta=kl,
        loss_type=name,
        temperature=0.8,
        compiled=False,
        use_ref_model=kl != 0,
        **(bounds | settings),
    )
    leaves = case.leaves()
    loss, _ = loss_function(
        *leaves,
        case.tokens,
        case.mask.float(),
        advantages,
        ref_per_token_logps=case.ref_logprobs if kl else None,
        old_per_token_logps=case.old_logprobs,
    )
    expected = torch.autograd.grad(loss, leaves)

    leaves = case.leaves()
    result = fastpo.linear_policy_loss(
        *leaves, case.tokens, advantages, temperature=0.8, **case.options(objective)
    )
    torch.testing.assert_close(result.loss, loss, rtol=1e-5, atol=1e-6)
    for mine, other in zip(torch.autograd.grad(result.loss, leaves), expected, strict=True):
        close(mine, other)


def test_liger_gradient_is_nan_for_a_clipped_token_far_off_and_ours_is_zero():
    """The defect that parity must not copy: 0 * inf where the log-ratio passes 88."""
    liger = pytest.importorskip("liger_kernel.chunked_loss")
    case = LinearCase.random()
    old = case.old_logprobs.clone()
    old[0, 0] = -200.0
    case.mask[0, 0] = True
    advantages = torch.tensor([1.0, -1.2, 0.4])
    loss_function = liger.LigerFusedLinearGRPOLoss(
        beta=0.0, loss_type="bnpo", compiled=False, use_ref_model=False
    )
    leaves = case.leaves()
    loss, _ = loss_function(
        *leaves, case.tokens, case.mask.float(), advantages, old_per_token_logps=old
    )
    assert torch.autograd.grad(loss, leaves)[0].isnan().any()
    leaves = case.leaves()
    options = case.options(fastpo.bnpo()) | {"old_logprobs": old}
    result = fastpo.linear_policy_loss(*leaves, case.tokens, advantages, **options)
    hidden_grad = torch.autograd.grad(result.loss, leaves)[0]
    assert hidden_grad.isfinite().all()
    assert (hidden_grad[0, 0] == 0).all()
