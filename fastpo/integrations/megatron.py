"""Megatron-LM's RL: `calculate_grpo_loss` by fastpo, per token, as its training step reduces it.

    from fastpo.integrations import megatron as fastpo_megatron
    fastpo_megatron.install()          # before megatron.rl makes its loss function

All of its arguments are honoured, in its way: the "entropy" is -p log p of the sampled token, the
KL is k3 to the reference, the importance weights multiply the surrogate alone. Packed advantages
are spread over their tokens on the device, where Megatron waits for it once per sequence. A
log-ratio is bounded by 20 before its exponential.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastpo import presets
from fastpo.integrations._tokens import token_terms


def install() -> None:
    """Put the function where Megatron's training step takes it from."""
    from megatron.rl import rl_utils

    rl_utils.calculate_grpo_loss = calculate_grpo_loss


def calculate_grpo_loss(
    current_logprobs: Tensor,
    old_logprobs: Tensor,
    ref_logprobs: Tensor,
    advantages: Tensor,
    clamp_eps_lower: float,
    clamp_eps_upper: float,
    kl_beta: float,
    entropy_weight: float,
    inference_logprobs: Tensor | None = None,
    is_truncation_coef: float | None = None,
    seq_starts: list[int] | None = None,
    seq_lengths: list[int] | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Per token [B, T], or [1, N] packed: loss, k3, ratio, p log p, and both clip masks.

    Args:
        advantages: [B], or one per sequence of the bin with `seq_starts` and `seq_lengths`.
    """
    if seq_starts is not None and seq_lengths is not None:
        advantages = _packed(advantages, seq_starts, seq_lengths, current_logprobs)
    else:
        advantages = advantages.view(-1, 1)
    objective = presets.grpo(clip_low=clamp_eps_lower, clip_high=clamp_eps_upper)
    terms = token_terms(objective, current_logprobs, old_logprobs, advantages)
    loss = terms.loss
    if inference_logprobs is not None:
        weights = (old_logprobs - inference_logprobs).detach().exp()
        if is_truncation_coef is not None:
            weights = weights.clamp(max=is_truncation_coef)
        loss = loss * weights
    to_ref = ref_logprobs - current_logprobs
    kl = to_ref.exp() - to_ref - 1
    entropy = current_logprobs.exp() * current_logprobs
    above, below = terms.ratio > 1 + clamp_eps_upper, terms.ratio < 1 - clamp_eps_lower
    return loss + kl_beta * kl + entropy_weight * entropy, kl, terms.ratio, entropy, above, below


def _packed(advantages: Tensor, starts: list[int], lengths: list[int], like: Tensor) -> Tensor:
    """One advantage per sequence -> [1, N], 0 between them; a sequence scores length - 1 tokens."""
    width = like.shape[1]
    owner = torch.full((width,), len(starts))
    for index, (start, length) in enumerate(zip(starts, lengths, strict=False)):
        owner[start : min(start + length - 1, width)] = index
    padded = torch.cat([advantages.to(like), like.new_zeros(1)])
    return padded[owner.to(like.device, non_blocking=True)][None]
