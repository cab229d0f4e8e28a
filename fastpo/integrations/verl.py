"""verl: any fastpo objective as a policy loss of its registry.

from fastpo.integrations.verl import register
register("fastpo_dapo", fastpo.dapo())      # then actor.policy_loss.loss_mode=fastpo_dapo
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastpo.objective import MAX_LOG_RATIO, Objective
from fastpo.ops.from_logprobs import policy_loss_from_logprobs


def register(name: str, objective: Objective) -> None:
    """Register `objective` under `name` in verl 0.9's policy-loss registry.

    The clips, `ratio_max` and the aggregation are the objective's: verl's `loss_agg_mode` and
    clip settings are not read. verl adds KL and entropy terms itself and averages gradients over
    data-parallel ranks; so the objective must have neither term, and a global token or sequence
    count in the actor's `global_batch_info` becomes the normalizer, divided by the number of ranks.

    The metrics are those of verl's "vanilla": `actor/ppo_kl` is the mean of old - new log-probs,
    `actor/pg_clipfrac` the share of tokens cut by either clip, `actor/pg_clipfrac_lower` that cut
    by `ratio_max`.

    Raises:
        ValueError: the objective has a KL or an entropy term.
    """
    from verl.trainer.ppo.core_algos import register_policy_loss

    if objective.kl_coef or objective.entropy_coef:
        raise ValueError(
            f"objective {objective.name!r} has kl_coef={objective.kl_coef} and "
            f"entropy_coef={objective.entropy_coef}, expected 0: verl adds these terms itself"
        )

    def policy_loss(
        old_log_prob: Tensor,
        log_prob: Tensor,
        advantages: Tensor,
        response_mask: Tensor,
        loss_agg_mode: str = "token-mean",
        config: Any = None,
        rollout_is_weights: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Any]]:
        mask = response_mask.bool()
        result = policy_loss_from_logprobs(
            log_prob,
            advantages,
            objective=objective,
            mask=mask,
            old_logprobs=old_log_prob,
            importance_weights=rollout_is_weights,
            normalizer=_normalizer(objective, config),
        )
        log_ratio = (result.logprobs - old_log_prob).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
        return result.loss, _metrics(result.metrics, log_ratio.where(mask, 0).sum())

    register_policy_loss(name)(policy_loss)


def _normalizer(objective: Objective, config: Any) -> Tensor | float | None:
    batch = getattr(config, "global_batch_info", None) or {}
    key = "batch_num_tokens" if objective.aggregation == "token_mean" else "global_batch_size"
    count = batch.get(key)
    return None if count is None else count / batch.get("dp_size", 1)


def _metrics(sums: dict[str, Tensor], log_ratio: Tensor) -> dict[str, float]:
    """verl's metrics from sums over live tokens; one host synchronization for all."""
    totals = {
        "actor/ppo_kl": -log_ratio,
        "actor/pg_clipfrac": sums["clip_low"] + sums["clip_high"],
        "actor/pg_clipfrac_lower": sums["clip_max"],
    }
    means = torch.stack(list(totals.values())) / sums["tokens"].clamp(min=1)
    return dict(zip(totals, means.tolist(), strict=True))
