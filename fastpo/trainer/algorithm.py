"""What a run optimizes: a preset's objective and techniques, the recipe's own choices on top."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import torch

import fastpo
from fastpo import presets
from fastpo.advantages import ESTIMATORS
from fastpo.trainer.config import AlgorithmConfig
from fastpo.trainer.run.errors import RecipeError

PRESETS = presets.__all__


@dataclass(frozen=True, kw_only=True)
class Algorithm:
    """Everything between rewards and the loss, with nothing left open."""

    objective: fastpo.Objective
    critic: bool
    dynamic_sampling: bool
    dynamic_sampling_by: str
    overlong_cache: int  # tokens; 0 = no soft penalty
    overlong_filter: bool
    estimator: str
    max_gen_batches: int
    carry_surplus: bool
    correction: dict[str, Any]  # of fastpo.rollout_correction; {} = none
    sync_reference_every: int  # steps; 0 = never


def resolve(config: AlgorithmConfig, max_new_tokens: int) -> Algorithm:
    """Fill in the preset's choices; the preset `dapo` switches its techniques on, others do not.

    Raises:
        RecipeError: an unknown preset, or numbers its objective refuses.
    """
    if config.preset not in PRESETS:
        raise RecipeError(
            f"algorithm.preset is {config.preset!r}, expected one of {', '.join(PRESETS)}"
        )
    if config.estimator not in ESTIMATORS:
        raise RecipeError(
            f"algorithm.estimator is {config.estimator!r}, expected one of {', '.join(ESTIMATORS)}"
        )
    chosen = {name: _none(name, value) for name, value in config.objective.items()}
    try:
        objective = getattr(fastpo, config.preset)(**chosen)
        if objective.aggregation == "constant" and objective.max_length is None:
            objective = getattr(fastpo, config.preset)(**chosen, max_length=max_new_tokens)
    except (TypeError, ValueError) as error:
        raise RecipeError(f"algorithm.objective: {error}") from None
    if objective.entropy_coef and objective.aggregation != "token_mean":
        raise RecipeError(
            "algorithm.objective.entropy_coef is a token mean: it needs "
            f"algorithm.objective.aggregation=token_mean, got {objective.aggregation}"
        )
    dapo = config.preset == "dapo"
    cache = config.overlong_cache
    if cache is None:
        cache = max_new_tokens // 5 if dapo else 0
    if cache >= max_new_tokens:
        raise RecipeError(
            f"algorithm.overlong_cache is {cache}, expected less than "
            f"rollout.max_new_tokens = {max_new_tokens}"
        )
    critic = config.preset == "ppo" if config.critic is None else config.critic
    if config.estimator == "maxrl" and cache and not critic:
        raise RecipeError(
            "algorithm.estimator=maxrl takes no rewards below 0, and the soft overlong penalty "
            f"over the last {cache} tokens makes such: set algorithm.overlong_cache=0"
        )
    if critic and not objective.is_token_level:
        raise RecipeError(
            f"algorithm.critic gives advantages to tokens, but the loss of {config.preset} is of "
            "whole sequences: set algorithm.critic=false, or take another preset"
        )
    if config.sync_reference_every and not objective.kl_coef:
        raise RecipeError(
            f"algorithm.sync_reference_every is {config.sync_reference_every}, but there is no "
            "reference policy: set algorithm.objective.kl_coef > 0 too"
        )
    return Algorithm(
        objective=objective,
        critic=critic,
        dynamic_sampling_by=config.dynamic_sampling_by,
        dynamic_sampling=dapo if config.dynamic_sampling is None else config.dynamic_sampling,
        overlong_cache=cache,
        overlong_filter=dapo if config.overlong_filter is None else config.overlong_filter,
        estimator=config.estimator,
        max_gen_batches=config.max_gen_batches,
        carry_surplus=config.carry_surplus,
        correction=_correction(config.correction),
        sync_reference_every=config.sync_reference_every,
    )


def _none(name: str, value: Any) -> Any:
    """What a recipe's `none` means for a field of the objective: no bound, or the word itself."""
    types = {field.name: field.type for field in fields(fastpo.Objective)}
    if value not in (None, "none"):
        return value
    return None if types.get(name, "").endswith("None") else "none"


def _correction(config: dict[str, Any]) -> dict[str, Any]:
    """What the recipe says, tried on one token."""
    if not config:
        return {}
    one = torch.zeros(1, 1)
    try:
        fastpo.rollout_correction(one, one, **config, **correction_inputs(config, one))
    except (TypeError, ValueError) as error:
        raise RecipeError(f"algorithm.correction: {error}") from None
    return dict(config)


def correction_inputs(config: dict[str, Any], advantages: torch.Tensor) -> dict[str, torch.Tensor]:
    """The advantages, where a setting of the correction asks for them."""
    return {} if config.get("off_policy_threshold") is None else {"advantages": advantages}
