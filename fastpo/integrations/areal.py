"""AReaL 1.0: its actor's PPO loss (GRPO, GSPO, decoupled PPO) computed by fastpo.

    from fastpo.integrations import areal as fastpo_areal
    fastpo_areal.install()             # in every process that makes an actor

eps_clip, eps_clip_higher, c_clip, importance_sampling_level and rejection_sampling mean what they
mean for AReaL's own `ppo_actor_loss_fn`: rejection is AReaL's own function. The SAPO loss and the
critic's stay AReaL's. One difference: a log-ratio is bounded by 20 before its exponential.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fastpo.integrations._tokens import clipped_by, is_clipped, token_terms
from fastpo.objective import CLIPPED_MAX
from fastpo.ops.checks import wide_dtype
from fastpo.segments import Segments


def install() -> None:
    """Put the loss where AReaL's actor calls it."""
    from areal.trainer.ppo import actor

    actor.ppo_actor_loss_fn = ppo_actor_loss_fn


def ppo_actor_loss_fn(
    logprobs: Tensor,
    proximal_logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    eps_clip: float,
    loss_mask: Tensor,
    eps_clip_higher: float | None = None,
    c_clip: float | None = None,
    rejection_sampling: Any = None,
    importance_sampling_level: str = "token",
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, dict[str, Any]]:
    """AReaL's loss over packed [N] or padded [B, T] tensors, and its statistics per token.

    Raises:
        ValueError: another level than "token" and "sequence".
    """
    preset = clipped_by("importance_sampling_level", importance_sampling_level)
    count = loss_mask.count_nonzero().clamp(min=1)  # of the tokens before any is rejected
    statistics, weights = {}, None
    if rejection_sampling is not None:
        loss_mask, weights, statistics = _rejected(
            proximal_logprobs, old_logprobs, loss_mask, cu_seqlens, rejection_sampling
        )
    if importance_sampling_level == "sequence":
        segments = Segments.from_batch(logprobs.shape, cu_seqlens, logprobs.device)
        mask = loss_mask.bool().reshape(-1)
        flat = advantages.to(wide_dtype(advantages.dtype)).reshape(-1).where(mask, 0)
        mean = segments.mean(flat, mask)
        advantages = segments.broadcast(mean).view(logprobs.shape)
    high = eps_clip if eps_clip_higher is None else eps_clip_higher
    objective = preset(clip_low=eps_clip, clip_high=high, ratio_max=c_clip)
    terms = token_terms(objective, logprobs, proximal_logprobs, advantages, loss_mask, cu_seqlens)
    mask = loss_mask.bool()
    per_token = terms.loss if weights is None else terms.loss * weights
    return per_token.where(mask, 0).sum() / count, {
        "loss": per_token.detach(),
        "importance_weight": terms.ratio.where(mask, 0),
        "approx_kl": (logprobs - proximal_logprobs).detach(),
        "clip_mask": is_clipped(terms) & mask,
        "dual_clip_mask": (terms.clipped & CLIPPED_MAX != 0) & mask,
        **statistics,
    }


def _rejected(
    proximal: Tensor, behaviour: Tensor, mask: Tensor, cu_seqlens: Tensor | None, config: Any
) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """AReaL's own rejection: the mask that is left, the weights, and statistics of both."""
    from areal.utils.functional.functional import apply_rejection_sampling

    result = apply_rejection_sampling(proximal, behaviour, mask, cu_seqlens, config)
    weights = result.behave_imp_weight.detach()
    kept = (weights > 0) & result.loss_mask.bool()
    statistics = {
        "behave_approx_kl": (proximal - behaviour).detach().where(kept, 0),
        "behave_imp_weight": weights,
        "behave_mask": kept,
        "filtered_fraction": result.filtered_fraction,
    }
    return result.loss_mask, weights, statistics
