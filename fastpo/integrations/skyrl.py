"""SkyRL 0.3: its policy losses computed by fastpo, chosen by name, and its Megatron head.

    from fastpo.integrations import skyrl as fastpo_skyrl
    fastpo_skyrl.install()             # in the entry point's task, before the trainer is made

    trainer.algorithm.policy_loss_type=fastpo_dual_clip    # fastpo_<one of PRESETS>

Every number is that of SkyRL's own loss of that name: eps_clip_low, eps_clip_high, clip_ratio_c,
cispo.*, sapo.*, dppo.*, off_policy_correction (by SkyRL's own function). The advantages already
carry the reduction, so the loss is a sum over tokens. Differences: dppo's loss is -sg(r) A logp, of
the same gradient as SkyRL's -r A; gspo's log-ratio is bounded by 20, where SkyRL's is by 10.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastpo import presets
from fastpo.integrations._tokens import is_clipped, masked_mean, score_head_shard, token_terms
from fastpo.objective import Objective

PREFIX = "fastpo_"
PRESETS = {
    "regular": presets.ppo,
    "dual_clip": presets.ppo,
    "gspo": presets.gspo_token,
    "cispo": presets.cispo,
    "sapo": presets.sapo,
    "dppo": presets.dppo,
    "rollout_is": presets.icepop,
}


def install() -> None:
    """Register `fastpo_<name>` for every name of `PRESETS`; twice changes nothing."""
    from skyrl.backends.skyrl_train.utils.ppo_utils import PolicyLossRegistry, register_policy_loss

    for name in PRESETS:
        if PREFIX + name not in PolicyLossRegistry.list_available():
            register_policy_loss(PREFIX + name)(policy_loss(name))


def policy_loss(name: str) -> Any:
    """SkyRL's interface of a policy loss: tensors [B, T] -> the sum over tokens, and metrics."""

    def loss(
        log_probs: Tensor,
        old_log_probs: Tensor,
        advantages: Tensor,
        config: Any,
        loss_mask: Tensor | None = None,
        rollout_logprobs: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, float]]:
        from skyrl.backends.skyrl_train.utils import off_policy_correction_utils as off_policy

        if name == "rollout_is" and rollout_logprobs is None:
            raise ValueError("rollout_logprobs is None, but fastpo_rollout_is compares with them")
        by_rollout = name in ("rollout_is", "dppo") and rollout_logprobs is not None
        mask = torch.ones_like(log_probs) if loss_mask is None else loss_mask
        old = rollout_logprobs if by_rollout else old_log_probs
        objective = _objective(name, config)
        terms = token_terms(objective, log_probs, old, advantages, mask)
        weighted, kept, metrics = off_policy.apply_off_policy_correction(
            terms.loss, old_log_probs, rollout_logprobs, mask, config.off_policy_correction
        )
        clipped = is_clipped(terms)
        if name == "cispo":  # SkyRL counts what lies outside, whatever the sign of A
            low, high = objective.bounds
            clipped = (terms.ratio < low) | (terms.ratio > high)
        share = masked_mean(clipped.to(terms.loss.dtype), mask).item()
        return (weighted * kept).sum(), {"clip_ratio": share} | metrics

    return loss


def _objective(name: str, config: Any) -> Objective:
    """The preset with the config's numbers, as SkyRL's own loss of that name reads them."""
    clips = {"clip_low": config.eps_clip_low, "clip_high": config.eps_clip_high}
    match name:
        case "dual_clip":
            clips["ratio_max"] = config.clip_ratio_c
        case "cispo":
            low, high = config.cispo.cispo_eps_clip_low, config.cispo.cispo_eps_clip_high
            clips = {"ratio_min": 1 - low, "ratio_max": 1 + high}
        case "sapo":
            clips = {"sapo_tau_pos": config.sapo.tau_pos, "sapo_tau_neg": config.sapo.tau_neg}
        case "dppo":
            clips = {"clip_low": config.dppo.delta_low, "clip_high": config.dppo.delta_high}
            clips |= {"gate": config.dppo.dppo_type.removeprefix("binary_"), "ratio_max": None}
    return PRESETS[name](**clips)


def install_megatron() -> None:
    """Let SkyRL's fused Megatron head (both of its backends) be `linear_token_logprobs`."""
    from skyrl.backends.skyrl_train.distributed.megatron import model_utils

    model_utils._fused_lm_head_logprob_apply = fused_lm_head


def fused_lm_head(
    backend: str,
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    vocab_start_index: int,
    vocab_end_index: int,
    chunk_size: int,
    tp_group: Any,
    inference_only: bool,
) -> Tensor:
    """Log-probs [B, S] fp32 of hidden [B, S, D] and this rank's rows [V / tp, D] of the head."""
    vocabulary, chunk = (vocab_start_index, vocab_end_index), chunk_size * hidden.shape[0]
    return score_head_shard(hidden, weight, target, vocabulary, tp_group, inference_only, chunk)
