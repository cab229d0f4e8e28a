"""What the ops return."""

from __future__ import annotations

from collections.abc import Sequence
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
    reference), `redone` (backend "triton-exp": tokens of a log-prob below -60, whose rows cost
    twice). Divide by `tokens` for means; a rule in plain torch counts no clips."""

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


class TokenStatistics(NamedTuple):
    """What `token_logprobs` and `linear_token_logprobs` return with `statistics`. [...], each 0 or
    False under a False mask; None where not asked for."""

    logprobs: Tensor
    """fp32, differentiable."""
    entropy: Tensor
    """fp32, differentiable."""
    log_sum_sq_probs: Tensor | None
    """log sum_v p_v^2, fp32, without gradient (the weights of WPO, arXiv 2406.11827)."""
    mean_logits: Tensor | None
    """Mean of the temperature-scaled logits over the vocabulary, fp32, without gradient."""
    is_top1: Tensor | None
    """bool: the token is the row's argmax; of several largest logits the first is it."""

    @classmethod
    def from_rows(cls, rows: tuple[Tensor, ...], names: Sequence[str], leading: torch.Size):
        """From logprobs, entropy and, if there are `names`, all three others, each (N,)."""
        logprobs, entropy, *others = (x.view(leading) for x in rows)
        if not others:
            return TokenLogprobs(logprobs, entropy)
        wanted = (x if n in names else None for n, x in zip(cls._fields[2:], others, strict=True))
        return cls(logprobs, entropy, *wanted)
