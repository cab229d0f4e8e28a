"""What the ops return."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class PolicyLoss(NamedTuple):
    """A policy loss and what was computed on the way. [...] is the shape of the tokens.

    All but `loss` are copies without gradient: editing them in place harms nothing.
    """

    loss: Tensor
    """0-d, fp32, differentiable."""
    logprobs: Tensor
    """[...] fp32, detached: log-probs of the tokens, 0 under a False mask."""
    entropy: Tensor | None
    """[...] fp32, detached, nats; None from `policy_loss_from_logprobs` without `entropy`."""
    metrics: dict[str, Tensor]
    """Detached 0-d tensors on the device, sums and counts only, so micro-batches and ranks add:
    `tokens` (under the mask), `entropy`, `ratio`, `old_kl` (k3 estimate of KL(old || policy)),
    `clip_low`, `clip_high`, `clip_max` (tokens that each bound clipped), `ref_kl` (with a
    reference). Divide by `tokens` for means; a rule in plain torch counts no clips."""

    def means(self) -> dict[str, float]:
        """The metrics as floats: `tokens` itself, everything else per token (0 without tokens).

        One host synchronization. For a step of several micro-batches or ranks, add their `metrics`
        first: `result._replace(metrics=summed).means()`.
        """
        values = torch.stack([value.float() for value in self.metrics.values()]).tolist()
        sums = dict(zip(self.metrics, values, strict=True))
        tokens = sums.pop("tokens")
        return {"tokens": tokens} | {name: total / max(tokens, 1) for name, total in sums.items()}


class TokenLogprobs(NamedTuple):
    """Log-prob and entropy per token, both differentiable. [...] fp32, 0 under a False mask."""

    logprobs: Tensor
    entropy: Tensor
