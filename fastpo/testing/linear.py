"""A random batch for the linear ops, with its logits materialized in any dtype: the oracle."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

import fastpo
from fastpo.objective import Objective


@dataclass(frozen=True, kw_only=True)
class LinearCase:
    """Hidden states, a head and what a policy loss takes beside them. B sequences of T tokens."""

    hidden: Tensor  # [B, T, D]
    weight: Tensor  # (V, D)
    bias: Tensor | None  # (V,)
    tokens: Tensor  # [B, T]
    advantages: Tensor  # [B, T]
    mask: Tensor | None  # [B, T]
    old_logprobs: Tensor  # [B, T]: of the policy itself plus noise, as off-policy batches have
    ref_logprobs: Tensor  # [B, T]
    temperature: float | Tensor = 1.0
    logit_scale: float = 1.0
    softcap: float | None = None

    @classmethod
    def random(
        cls,
        *,
        shape: tuple[int, int] = (3, 21),
        width: int = 24,
        vocabulary: int = 307,
        dtype: torch.dtype = torch.float32,
        bias: bool = False,
        seed: int = 0,
        **head: object,
    ) -> LinearCase:
        """A random mask, advantages of both signs and some zeros, noisy old log-probs."""
        gen = torch.Generator().manual_seed(seed)

        def normal(*size: int) -> Tensor:
            return torch.randn(size, generator=gen)

        hidden, weight = normal(*shape, width), 2 * normal(vocabulary, width) / width**0.5
        case = cls(
            hidden=hidden.to(dtype),
            weight=weight.to(dtype),
            bias=normal(vocabulary).to(dtype) if bias else None,
            tokens=torch.randint(vocabulary, shape, generator=gen),
            advantages=normal(*shape) * (torch.rand(shape, generator=gen) > 0.2),
            mask=torch.rand(shape, generator=gen) > 0.3,
            old_logprobs=normal(*shape),
            ref_logprobs=normal(*shape),
            **head,
        )
        own, _ = case.eager_logprobs(torch.float64)
        return replace(
            case,
            old_logprobs=(own + 0.2 * case.old_logprobs).float(),
            ref_logprobs=(own + 0.2 * case.ref_logprobs).float(),
        )

    def leaves(self) -> list[Tensor]:
        """hidden, weight and, if there is one, bias: fresh copies that require gradients."""
        tensors = (self.hidden, self.weight, self.bias)
        return [x.detach().clone().requires_grad_() for x in tensors if x is not None]

    def head(self) -> dict[str, object]:
        """The keywords that describe the head and the temperature, but for the bias."""
        return {
            "temperature": self.temperature,
            "logit_scale": self.logit_scale,
            "softcap": self.softcap,
        }

    def options(self, objective: Objective) -> dict[str, object]:
        """The keywords that every policy loss takes."""
        return {
            "objective": objective,
            "mask": self.mask,
            "old_logprobs": self.old_logprobs,
            "ref_logprobs": self.ref_logprobs if objective.kl_coef else None,
        }

    def eager_logits(self, dtype: torch.dtype, leaves: list[Tensor] | None = None) -> Tensor:
        """All [B, T, V] logits by the textbook, in `dtype`, differentiable in `leaves`."""
        hidden, weight, *bias = (x.to(dtype) for x in (leaves or self.leaves()))
        logits = hidden @ weight.t()
        logits = (logits + bias[0] if bias else logits) * self.logit_scale
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)

    def eager_logprobs(
        self, dtype: torch.dtype, leaves: list[Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Log-probs and entropies [B, T] by log_softmax over all logits, differentiable."""
        temperature = self.temperature
        if isinstance(temperature, Tensor):
            temperature = temperature[..., None].to(dtype)
        scores = (self.eager_logits(dtype, leaves) / temperature).log_softmax(-1)
        logprobs = scores.gather(-1, self.tokens[..., None])[..., 0]
        return logprobs, -(scores.exp() * scores).sum(-1)

    def eager(self, objective: Objective, dtype: torch.dtype = torch.float64):
        """The specification's result, and gradients of the leaves, with all logits in `dtype`."""
        leaves = self.leaves()
        logprobs, entropy = self.eager_logprobs(dtype, leaves)
        result = fastpo.policy_loss_from_logprobs(
            logprobs, self.advantages, entropy=entropy, **self.options(objective)
        )
        return result, torch.autograd.grad(result.loss, leaves)

    def fused(self, objective: Objective, **extra: object):
        """`fastpo.linear_policy_loss` and the gradients of the leaves."""
        leaves = self.leaves()
        hidden, weight, *bias = leaves
        result = fastpo.linear_policy_loss(
            hidden,
            weight,
            self.tokens,
            self.advantages,
            bias=bias[0] if bias else None,
            **(self.options(objective) | self.head() | extra),
        )
        return result, torch.autograd.grad(result.loss, leaves)

    def two_step(self, objective: Objective, **extra: object):
        """`linear_token_logprobs`, then `policy_loss_from_logprobs`, and the leaves' gradients."""
        leaves = self.leaves()
        hidden, weight, *bias = leaves
        scored = fastpo.linear_token_logprobs(
            hidden,
            weight,
            self.tokens,
            bias=bias[0] if bias else None,
            mask=self.mask,
            **(self.head() | extra),
        )
        result = fastpo.policy_loss_from_logprobs(
            scored.logprobs, self.advantages, entropy=scored.entropy, **self.options(objective)
        )
        return result, torch.autograd.grad(result.loss, leaves)
