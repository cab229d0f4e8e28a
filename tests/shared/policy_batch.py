"""A batch of logits for the tests of `policy_loss`, and the specification of its loss."""

from __future__ import annotations

import pytest
import torch

import fastpo
from fastpo import backends

BACKENDS = [
    pytest.param(name, marks=pytest.mark.slow if name == "triton" else ())  # interpreted
    for name in ("torch", "cpp", "triton")
    if backends.unavailable(name) is None
]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


class Batch:
    """A realistic off-policy batch [B, T]: old = logp + N(0, 0.2), one fully masked sequence."""

    def __init__(self, dtype=torch.float32, batch=4, width=6, vocab=307, seed=0, temperature=0.8):
        gen = torch.Generator().manual_seed(seed)
        self.logits = (3 * torch.randn(batch, width, vocab, generator=gen)).to(dtype)
        self.tokens = torch.randint(0, vocab, (batch, width), generator=gen)
        self.advantages = torch.randn(batch, generator=gen)
        self.mask = torch.rand(batch, width, generator=gen) > 0.25
        self.mask[1] = False
        self.weights = 0.5 + torch.rand(batch, width, generator=gen)
        self.temperature = temperature
        exact = (self.logits.double() / temperature).log_softmax(-1)
        chosen = exact.gather(-1, self.tokens[..., None])[..., 0]
        self.old = (chosen + 0.2 * torch.randn(batch, width, generator=gen)).float()
        self.ref = (chosen + 0.2 * torch.randn(batch, width, generator=gen)).float()

    def options(self, objective, **extra):
        options = {
            "objective": objective,
            "mask": self.mask,
            "old_logprobs": self.old,
            "ref_logprobs": self.ref if objective.kl_coef else None,
            "importance_weights": self.weights,
        }
        return options | extra

    def spec(self, objective, dtype=torch.float64, **extra):
        """Eager log_softmax in `dtype`, then the specification: loss and gradient."""
        logits = self.logits.to(dtype, copy=True).requires_grad_()
        scaled = (logits / self.temperature).log_softmax(-1)
        logprobs = scaled.gather(-1, self.tokens[..., None])[..., 0]
        entropy = -(scaled.exp() * scaled).sum(-1)
        result = fastpo.policy_loss_from_logprobs(
            logprobs, self.advantages, entropy=entropy, **self.options(objective, **extra)
        )
        (grad,) = torch.autograd.grad(result.loss, logits)
        return result.loss.detach(), grad

    def fused(self, objective, **extra):
        logits = self.logits.clone().requires_grad_()
        result = fastpo.policy_loss(
            logits,
            self.tokens,
            self.advantages,
            temperature=extra.pop("temperature", self.temperature),
            **self.options(objective, **extra),
        )
        result.loss.backward()
        return result, logits.grad
