"""What the ops return."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class PolicyLoss(NamedTuple):
    """A policy loss and what was computed on the way. [...] is the shape of the tokens."""

    loss: Tensor
    """0-d, fp32, differentiable."""
    logprobs: Tensor
    """[...] fp32, detached: log-probs of the tokens, 0 under a False mask."""
    entropy: Tensor | None
    """[...] fp32, detached, nats; None from `policy_loss_from_logprobs` without `entropy`."""
    metrics: dict[str, Tensor]
    """Detached 0-d tensors on the device, sums and counts only, so micro-batches and ranks add:
    `tokens` (live), `entropy`, `ratio`, `old_kl` (k3 estimate of KL(old || policy)), `clip_low`,
    `clip_high`, `clip_max` (live tokens whose gradient each bound cut), `ref_kl` (with a
    reference). Divide by `tokens` for means."""


class TokenLogprobs(NamedTuple):
    """Log-prob and entropy per token, both differentiable. [...] fp32, 0 under a False mask."""

    logprobs: Tensor
    entropy: Tensor
