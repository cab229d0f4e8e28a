"""What a run optimizes: a preset's objective and techniques, the recipe's own choices on top."""

from __future__ import annotations

from dataclasses import dataclass

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
    chosen = {name: value for name, value in config.objective.items() if value is not None}
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
    if critic and not objective.is_token_level:
        raise RecipeError(
            f"algorithm.critic gives advantages to tokens, but the loss of {config.preset} is of "
            "whole sequences: set algorithm.critic=false, or take another preset"
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
    )
