"""OpenRLHF 0.11: its actor's `PolicyLoss` computed by fastpo.

    from fastpo.integrations import openrlhf as fastpo_openrlhf
    fastpo_openrlhf.install()          # in every process that makes a PolicyModelActor

Every setting of the class is honoured: eps_clip_low_high, dual_clip, token or sample means over
the global counts, gspo, and the train/rollout correction (is_correction_*) with all of its levels,
modes and gates. Five numbers come back, OpenRLHF's own. A log-ratio is bounded by 20 for gspo too.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastpo.integrations._tokens import clipped_by, is_clipped, token_terms


def install() -> None:
    """Put the class where OpenRLHF's actor takes it from; twice changes nothing."""
    from openrlhf.models import loss
    from openrlhf.trainer.ray import ppo_actor

    if loss.PolicyLoss.__module__ != __name__:
        ppo_actor.PolicyLoss = loss.PolicyLoss = policy_loss_class(loss)


def policy_loss_class(loss_module: Any) -> type:
    """OpenRLHF's `PolicyLoss`, its settings checked by its own __init__, with another forward."""

    class PolicyLoss(loss_module.PolicyLoss):
        def forward(
            self,
            log_probs: Tensor,
            old_log_probs: Tensor,
            advantages: Tensor,
            action_mask: Tensor | None = None,
            rollout_log_probs: Tensor | None = None,
            dp_size: int = 1,
            batch_num_tokens: float | None = None,
            global_batch_size: float | None = None,
        ) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
            mask = torch.ones_like(log_probs) if action_mask is None else action_mask
            corrected = self.is_correction_level != "off"
            gspo = self.policy_loss_type == "gspo"
            preset = clipped_by(
                "policy_loss_type", self.policy_loss_type, token="ppo", sequence="gspo"
            )
            bounds = {"clip_low": self.clip_eps_low, "clip_high": self.clip_eps_high}
            objective = preset(**bounds, ratio_max=self.dual_clip)
            old = rollout_log_probs if gspo and corrected else old_log_probs
            terms = token_terms(objective, log_probs, old, advantages, mask)
            per_token, vllm_kl, filtered = terms.loss, None, None
            if corrected and not gspo:
                weights, dropped = _correction(self, old_log_probs, rollout_log_probs, mask)
                per_token = per_token * weights
                by_sequence = self.is_correction_level == "seq"
                filtered = dropped.mean() if by_sequence else _mean(dropped, mask)
                vllm_kl = _mean(rollout_log_probs - old_log_probs, mask)
            counts = dp_size, batch_num_tokens, global_batch_size
            total = loss_module.aggregate_loss(per_token, mask, self.token_level_loss, *counts)
            ppo_kl = _mean((old_log_probs - log_probs).detach(), mask)
            return total, _mean(is_clipped(terms), mask), ppo_kl, vllm_kl, filtered

    return PolicyLoss


def _mean(values: Tensor, mask: Tensor, dim: int | None = None) -> Tensor:
    total, count = (x.sum(dim=dim, keepdim=dim is not None) for x in (values * mask, mask))
    return total / count


def _correction(settings: Any, old: Tensor, rollout: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Weights [B, T] of r = pi_old / pi_rollout, and 1 for what a bound met: [B, T], or [B, 1]."""
    log_ratio = (old - rollout).detach()
    p, q = (x.exp().clamp(1e-6, 1 - 1e-6) for x in (rollout, old))
    statistic = {
        "ratio": log_ratio,
        "tv": (p - q).abs(),
        "binary_kl": p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log(),
    }[settings.is_correction_gating]
    if settings.is_correction_level == "seq":
        statistic = _mean(statistic, mask, dim=-1)
    if settings.is_correction_gating == "ratio":
        statistic = statistic.exp()
    low, high = settings.is_correction_threshold
    outside = (statistic < low) | (statistic > high)
    if settings.is_correction_mode == "clip":
        return statistic.clamp(low, high), outside.to(old.dtype)
    # NaN is not inside the bounds either
    inside = (statistic >= low) & (statistic <= high)
    return log_ratio.exp().where(inside, 0), (~inside).to(old.dtype)
