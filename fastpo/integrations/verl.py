"""verl 0.9: fastpo's losses, advantages and LM head, chosen by name in verl's own configuration.

With fastpo installed nothing has to be called: verl loads the entry point `verl.plugins` in every
process, Ray's workers included, and that installs

    actor.policy_loss.loss_mode=fastpo_dapo                        # fastpo_<any preset>
    algorithm.adv_estimator=fastpo_rloo                            # fastpo_<any estimator>
    model.use_fused_kernels=True model.fused_kernel_options.impl_backend=fastpo      # FSDP

Every number comes from verl's configuration: `clip_ratio_low`, `clip_ratio_high`, `clip_ratio_c`,
`tau_pos`, `tau_neg`, `dro_beta`, `loss_agg_mode` and `loss_scale_factor` mean what they mean for
verl's own losses. Presets that differ only in these (ppo, grpo, dapo, ...) are one loss there, and
IcePop's gate [0.5, 5] is clip_ratio_low=0.5 with clip_ratio_high=4.
An objective with numbers of its own: `register("my_loss", fastpo.dapo(clip_high=0.3))`, in a module
named by VERL_USE_EXTERNAL_MODULES, so that the workers import it too.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastpo import presets
from fastpo.advantages import ESTIMATORS, group_advantages
from fastpo.integrations._tokens import is_clipped, token_terms
from fastpo.objective import MAX_LOG_RATIO, Objective
from fastpo.ops.from_logprobs import policy_loss_from_logprobs
from fastpo.ops.results import PolicyLoss

PREFIX = "fastpo_"

AGGREGATIONS = {
    "token-mean": "token_mean",
    "token-sum": "token_mean",  # over a denominator of 1
    "seq-mean-token-sum": "sequence_sum",
    "seq-mean-token-sum-norm": "constant",
    "seq-mean-token-mean": "sequence_mean",
}
# Where verl's own function reads no loss_agg_mode: sapo, and geo_mean, whose loss is a sequence's.
FIXED_AGGREGATION = {"sapo": "seq-mean-token-mean", "gmpo": "seq-mean-token-mean"}

# verl hands over one advantage and one weight per token: the sequence's ratio, each token's own.
VARIANTS = {
    "gspo": presets.gspo_token,
    "luspo": functools.partial(presets.luspo, ratio_level="sequence_token"),
}


def install() -> None:
    """Put every preset, every advantage estimator and the fused head into verl's registries.

    The entry point calls it in every process of verl; calling it twice changes nothing.
    """
    from verl.trainer.ppo.core_algos import ADV_ESTIMATOR_REGISTRY, register_adv_est

    from fastpo.integrations import verl_head

    for name in presets.__all__:
        register(PREFIX + name, VARIANTS.get(name) or getattr(presets, name))
    register(PREFIX + "dppo_kl", functools.partial(presets.dppo, gate="kl"))
    for estimator in ESTIMATORS:
        if PREFIX + estimator not in ADV_ESTIMATOR_REGISTRY:
            register_adv_est(PREFIX + estimator)(functools.partial(_advantages, estimator))
    verl_head.install()


def register(name: str, objective: Objective | Callable[..., Objective]) -> None:
    """Register a policy loss under `name` in verl's registry.

    Args:
        name: what `actor.policy_loss.loss_mode` says.
        objective: a preset, as in `fastpo.dapo`: its numbers are those of the actor's config at
            each call. Or an `Objective`: its numbers are its own, and an actor's config that says
            otherwise raises, since one of the two would be ignored.

    verl adds KL and entropy terms itself and averages gradients over data-parallel ranks; so an
    objective must have neither term, and the global counts in the actor's `global_batch_info` are
    the normalizer, divided by the number of ranks. Metrics are those of verl's own function.

    Raises:
        ValueError: the objective has a KL or an entropy term, or one ratio per sequence.
    """
    from verl.trainer.ppo.core_algos import register_policy_loss

    if isinstance(objective, Objective) and (objective.kl_coef or objective.entropy_coef):
        raise ValueError(
            f"objective {objective.name!r} has kl_coef={objective.kl_coef} and "
            f"entropy_coef={objective.entropy_coef}, expected 0: verl adds these terms itself"
        )
    if isinstance(objective, Objective) and objective.ratio_level == "sequence":
        raise ValueError(
            f"objective {objective.name!r} has ratio_level='sequence', but verl hands over one "
            "advantage and weight per token: set ratio_level='sequence_token' (fastpo.gspo_token)"
        )

    def policy_loss(
        old_log_prob: Tensor,
        log_prob: Tensor,
        advantages: Tensor,
        response_mask: Tensor,
        loss_agg_mode: str | None = None,
        config: Any = None,
        rollout_is_weights: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Any]]:
        mask = response_mask.bool()
        surrogate = (objective if isinstance(objective, Objective) else objective()).surrogate
        loss_agg_mode = FIXED_AGGREGATION.get(surrogate, loss_agg_mode)
        chosen = _objective(objective, config, loss_agg_mode, mask.shape[1])
        if rollout_is_weights is not None and chosen.old_kl_coef:
            raise ValueError(
                f"rollout_is_weights with objective {chosen.name!r}, which has a penalty on d: "
                "here they weigh the advantage alone, in verl the penalty too; use verl's own dro, "
                "or rollout correction by mask"
            )
        result = policy_loss_from_logprobs(
            log_prob,
            advantages,
            objective=chosen,
            mask=mask,
            old_logprobs=old_log_prob,
            importance_weights=rollout_is_weights,
            normalizer=_normalizer(chosen, loss_agg_mode, config, mask),
        )
        return result.loss, _metrics(chosen, result, old_log_prob.detach(), advantages, mask)

    register_policy_loss(name)(policy_loss)


def _objective(
    source: Objective | Callable[..., Objective], config: Any, mode: str | None, length: int
) -> Objective:
    """The objective of one call: a preset with the config's numbers, or the user's own, checked."""
    wanted = _settings(source if isinstance(source, Objective) else source(), config, mode, length)
    if not isinstance(source, Objective):
        return source(**wanted)
    for field, value in wanted.items():
        own = getattr(source, field)
        if own != value:
            raise ValueError(
                f"the actor's config gives {field}={value}, but the registered objective "
                f"{source.name!r} has {field}={own}: set both alike, or register the preset "
                "itself, which takes the config's"
            )
    return source


def _settings(objective: Objective, config: Any, mode: str | None, length: int) -> dict[str, Any]:
    """Fields of `Objective` as verl's config has them, for those that this surrogate reads."""
    settings: dict[str, Any] = {}
    if mode is not None:
        if mode not in AGGREGATIONS:
            raise ValueError(f"loss_agg_mode is {mode!r}, expected one of {list(AGGREGATIONS)}")
        settings["aggregation"] = AGGREGATIONS[mode]
        if mode == "seq-mean-token-sum-norm":
            batch = getattr(config, "global_batch_info", None) or {}
            settings["max_length"] = int(batch.get("loss_scale_factor") or length)
    if config is not None:
        settings |= _clips(objective, config)
    return settings


def _clips(objective: Objective, config: Any) -> dict[str, Any]:
    low, high = (
        config.clip_ratio if value is None else value
        for value in (config.clip_ratio_low, config.clip_ratio_high)
    )
    clips = {"clip_low": low, "clip_high": high}
    match objective.surrogate:
        case "sapo":
            return {"sapo_tau_pos": config.tau_pos, "sapo_tau_neg": config.tau_neg}
        case "cispo":
            return {"ratio_min": 1 - low, "ratio_max": 1 + high}
        case "gmpo":
            return clips
        case "clip" if objective.ratio_level != "token":
            return clips
        case "clip":
            return clips | {"ratio_max": config.get("clip_ratio_c", 3.0)}
        case "gate" if objective.name == "dppo":
            return clips | {"ratio_max": config.get("clip_ratio_c", 20.0)}
        case "gate" if objective.gate != "none":
            return clips
    return {"old_kl_coef": _dro_beta(config)} if objective.name == "dro" else {}


def _dro_beta(config: Any) -> float:
    beta = config.policy_loss.dro_beta
    if beta is None or beta <= 0:
        raise ValueError(f"policy_loss.dro_beta is {beta}, expected a number > 0 for DRO")
    return beta


def _normalizer(
    objective: Objective, mode: str | None, config: Any, mask: Tensor
) -> Tensor | float | None:
    """verl's denominator over its factor dp_size: global counts where the config has them.

    A sequence without an unmasked token does not count, as in verl's `agg_loss`; except for gmpo,
    whose mean in verl is over all sequences of the micro-batch.
    """
    batch = getattr(config, "global_batch_info", None) or {}
    ranks = batch.get("dp_size", 1)
    if objective.surrogate == "gmpo":
        return float(mask.shape[0])
    if mode == "token-sum":
        return 1 / ranks
    per_token = objective.aggregation == "token_mean"
    count = batch.get("batch_num_tokens" if per_token else "global_batch_size")
    if count is None and ranks > 1:
        raise ValueError(f"verl's global counts are needed with dp_size={ranks}, got none")
    if count is None:
        count = mask.sum() if per_token else mask.any(1).sum()
    return count / ranks


def _metrics(
    objective: Objective, result: PolicyLoss, old: Tensor, advantages: Tensor, mask: Tensor
) -> dict[str, float]:
    """verl's metrics, under its names; one host synchronization for all."""
    sums, log_ratio = result.metrics, (result.logprobs - old).where(mask, 0)
    clamped = log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    totals = {
        "actor/ppo_kl": -clamped.sum(),
        "actor/pg_clipfrac": sums["clip_low"] + sums["clip_high"],
        "actor/pg_clipfrac_lower": sums["clip_max"],
    }
    if objective.surrogate == "gmpo":  # verl counts what lies outside, not what the minimum cuts
        outside = (log_ratio < -objective.clip_low) | (log_ratio > objective.clip_high)
        totals["actor/pg_clipfrac"] = (outside & (advantages > 0)).sum()
        totals["actor/pg_clipfrac_lower"] = (outside & (advantages < 0)).sum()
    if objective.gate in ("tv", "kl"):  # verl drops a token with A = 0 as it does one with A < 0
        signed = advantages.where(advantages != 0, -1)
        terms = token_terms(objective, result.logprobs, old, signed, mask)
        totals["actor/pg_clipfrac"] = (is_clipped(terms) & mask).sum()
    if objective.surrogate == "cispo":
        ratio = clamped.exp()
        outside = (ratio < objective.ratio_min) | (ratio > objective.ratio_max)
        totals["actor/pg_clipfrac"] = outside.sum()
        totals["actor/pg_clipfrac_lower"] = torch.zeros_like(sums["tokens"])
    means = torch.stack([x.to(clamped.dtype) for x in totals.values()]) / sums["tokens"].clamp(
        min=1
    )
    return dict(zip(totals, means.tolist(), strict=True))


def _advantages(
    estimator: str,
    token_level_rewards: Tensor,
    response_mask: Tensor,
    index: Any = None,
    config: Any = None,
    **_: Any,
) -> tuple[Tensor, Tensor]:
    """verl's estimator interface: outcome rewards, groups by equal `index`, spread over tokens.

    `norm_adv_by_std_in_grpo=False` turns `fastpo_grpo` into Dr. GRPO, as in verl.

    Returns:
        (bs, T) advantages, twice: verl's returns of an outcome estimator are its advantages.
    """
    import numpy as np

    ids = np.unique(np.asarray(index).astype(str), return_inverse=True)[1]
    if (
        estimator == "grpo"
        and config is not None
        and not config.get("norm_adv_by_std_in_grpo", True)
    ):
        estimator = "dr_grpo"
    advantages = group_advantages(
        token_level_rewards.sum(-1),
        group_ids=torch.as_tensor(ids, device=token_level_rewards.device),
        estimator=estimator,
        lengths=response_mask.sum(-1) if estimator == "opo" else None,
    ).advantages
    spread = advantages[:, None] * response_mask
    return spread, spread
