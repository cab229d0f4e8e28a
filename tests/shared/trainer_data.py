"""Log-probs of three policies, hidden states and a head for the trainers' stand-ins."""

from __future__ import annotations

import math

import torch

B, T, D, V = 3, 7, 8, 31


class Data:
    """[B, T] log-probs of three policies, hidden states and a head."""

    def __init__(self):
        gen = torch.Generator().manual_seed(4)

        def normal(*shape, scale=1.0):
            return scale * torch.randn(*shape, generator=gen, dtype=torch.float64)

        self.logprobs = -torch.rand(B, T, generator=gen, dtype=torch.float64) - 0.1
        self.old = self.logprobs + normal(B, T, scale=0.4)
        self.ref = self.logprobs + normal(B, T, scale=0.3)
        self.advantages = normal(B, T)
        self.mask = torch.rand(B, T, generator=gen) > 0.3
        self.hidden = normal(B, T, D).float()
        self.weight = normal(V, D, scale=0.5).float()
        self.labels = torch.randint(0, V, (B, T), generator=gen)

    def leaf(self, rows=slice(None)):
        return self.logprobs[rows].clone().requires_grad_()

    def clipped(self, logprobs, rows=slice(None), low=0.2, high=0.3, dual=math.inf):
        """PPO's surrogate per token, as each of these trainers writes it."""
        ratio, advantages = (logprobs - self.old[rows]).exp(), self.advantages[rows]
        loss = -torch.min(ratio * advantages, ratio.clamp(1 - low, 1 + high) * advantages)
        bounded = torch.min(loss, -dual * advantages) if dual < math.inf else loss
        return torch.where(advantages < 0, bounded, loss)

    def scored(self, temperature=1.0):
        logits = self.hidden @ self.weight.t() / temperature
        logprobs = logits.log_softmax(-1)
        return (
            logprobs.gather(-1, self.labels[..., None])[..., 0],
            torch.distributions.Categorical(logits=logits).entropy(),
        )
