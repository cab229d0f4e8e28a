"""fastpo in Miles, which is on no package index: against the names and arguments of its source."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest
import torch

from fastpo.integrations import miles

pytestmark = pytest.mark.peer

N, V = 13, 31
HUB = "miles.backends.training_utils.loss_hub"
HUBS = ("losses", "logit_processors", "math_utils")


@pytest.fixture
def hub(monkeypatch):
    """Miles' `losses`, `logit_processors` and `math_utils`, fastpo in the first two."""
    modules = {name: ModuleType(f"{HUB}.{name}") for name in HUBS}
    package = ModuleType(HUB)
    vars(package).update(modules)
    parents = ["miles", "miles.backends", "miles.backends.training_utils"]
    for name, module in {**{p: ModuleType(p) for p in parents}, HUB: package}.items():
        monkeypatch.setitem(sys.modules, name, module)
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, f"{HUB}.{name}", module)
    miles.install(None)
    return modules


def test_its_surrogate(hub):
    """REGRESSIONS 38: clips and dual clip, as Miles' `compute_policy_loss` has them."""
    gen = torch.Generator().manual_seed(1)
    ppo_kl, advantages = torch.randn(2, N, generator=gen, dtype=torch.float64)
    for bound in (None, 1.5):
        kl = ppo_kl.clone().requires_grad_()
        loss, clipped = hub["losses"].compute_policy_loss(kl, advantages, 0.2, 0.3, bound)
        ratio = (-kl).exp()
        plain, cut = -ratio * advantages, -ratio.clamp(0.8, 1.3) * advantages
        expected = torch.maximum(plain, cut)
        if bound is not None:
            dual = torch.min(-bound * advantages, expected)
            expected = torch.where(advantages < 0, dual, expected)
        torch.testing.assert_close(loss, expected)
        assert torch.equal(clipped.bool(), cut > plain) and clipped.any()
        grads = [torch.autograd.grad(x.sum(), kl, retain_graph=True) for x in (loss, expected)]
        torch.testing.assert_close(*grads)


def test_its_log_probs_and_entropies(hub):
    """As its `logit_processors` calls them; SGLang's bits stay Miles' own."""
    logits = torch.randn(N, V, requires_grad=True)
    tokens = torch.randint(0, V, (N,))
    call = hub["logit_processors"].calculate_log_probs_and_entropy
    common = {"chunk_size": 4, "true_on_policy": False, "vocab_size": V}
    for learns in (True, False):
        logprobs, entropy = call(
            logits, tokens, None, with_entropy=True, entropy_requires_grad=learns, **common
        )
        truth = torch.distributions.Categorical(logits=logits)
        torch.testing.assert_close(logprobs.squeeze(-1), truth.log_prob(tokens))
        torch.testing.assert_close(entropy, truth.entropy(), rtol=1e-5, atol=1e-5)
        assert entropy.requires_grad is learns
    assert call(logits, tokens, None, **common)[1] is None
    assert call(logits[:0], tokens[:0], None, with_entropy=True)[0].squeeze(-1).shape == (0,)

    own = []
    hub["math_utils"].calculate_log_probs_and_entropy = lambda *args: own.append(args) or (1, 2)
    assert call(logits, tokens, None, true_on_policy=True, vocab_size=V) == (1, 2)
    assert own[0][2:] == (None, False, True, -1, True, V)
