"""`linear_token_logprobs(..., details=True)`: more statistics from the same sweep."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import fastpo
from fastpo.testing.budget import assert_within_budget
from fastpo.testing.linear import LinearCase


def eager(case, dtype):
    logits = case.hidden.to(dtype) @ case.weight.to(dtype).t() + case.bias.to(dtype)
    u = case.softcap * torch.tanh(case.logit_scale * logits / case.softcap) / case.temperature
    logp = u.log_softmax(-1)
    return (2 * logp).logsumexp(-1), u.mean(-1), u.argmax(-1) == case.tokens


@pytest.mark.parametrize("backend", ["torch", "cpp"])
def test_details_equal_eager_and_change_nothing_else(backend):
    """Against fp64; log-probs and gradients keep their bits; masked rows give 0 and False."""
    if backend == "cpp":
        pytest.importorskip("fastpo._C")
    case = LinearCase.random(bias=True, softcap=3.0, logit_scale=1.2, temperature=0.7)
    case = replace(case, hidden=case.hidden.flatten(0, 1), tokens=case.tokens.flatten())
    head = {"bias": case.bias, "softcap": 3.0, "logit_scale": 1.2, "temperature": 0.7}
    logits = case.hidden @ case.weight.t() + case.bias
    case.tokens[:3] = logits[:3].argmax(-1)
    mask = torch.arange(case.tokens.numel()) != 1
    results, grads = [], []
    for details in (True, False):
        hidden = case.hidden.detach().clone().requires_grad_()
        result = fastpo.linear_token_logprobs(
            hidden,
            case.weight,
            case.tokens,
            mask=mask,
            backend=backend,
            chunk_tokens=16,
            details=details,
            **head,
        )
        (result.logprobs.sum() + 0.1 * result.entropy.sum()).backward()
        results.append(result)
        grads.append(hidden.grad)
    got, plain = results
    assert torch.equal(*grads) and len(plain) == 2
    assert all(torch.equal(x, y) for x, y in zip(got[:2], plain, strict=True))
    truth, low = eager(case, torch.float64), eager(case, torch.float32)
    for mine, exact, other in zip(got[2:4], truth[:2], low[:2], strict=True):
        assert not mine.requires_grad and mine[1] == 0
        assert_within_budget(mine[mask], exact[mask], other[mask])
    assert torch.equal(got.is_top1, truth[2] & mask)
    assert got.is_top1[0] and not got.is_top1[1] and 2 <= got.is_top1.sum() < mask.sum()


def test_what_has_no_details_is_refused():
    case = LinearCase.random()
    kept = {
        "kept_tokens": case.tokens.flatten(),
        "kept_offsets": torch.arange(case.tokens.numel() + 1),
    }
    with pytest.raises(ValueError, match="details=True with kept_tokens"):
        fastpo.linear_token_logprobs(case.hidden, case.weight, case.tokens, details=True, **kept)
