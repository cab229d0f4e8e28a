"""Accuracy of a policy on given problems."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import torch

from fastpo.trainer.config import Config
from fastpo.trainer.data.tasks import Problem, fewer_held_out, held_out, load_task
from fastpo.trainer.data.verifier import Verifier
from fastpo.trainer.experience import Sample, roll_out
from fastpo.trainer.model.loading import (
    default_device,
    load_policy,
    make_policy,
    quiet_transformers,
)
from fastpo.trainer.model.policy import Policy
from fastpo.trainer.rollout import Sampling
from fastpo.trainer.run import checkpoint, directory, recipe
from fastpo.trainer.run.errors import RecipeError, TrainerError


class Evaluation(NamedTuple):
    """What an evaluation found; means over all completions, but for rewards that are not finite."""

    accuracy: float  # share with reward 1
    reward: float  # the task's own, without length penalty
    mean_length: float  # tokens
    answers: list[Sample]  # a problem's side by side
    per_problem: int  # answers
    greedy_accuracy: float | None = None  # of greedy decoding, whatever the temperature


def evaluate(
    policy: Policy,
    verifier: Verifier,
    problems: list[Problem],
    sampling: Sampling,
    generator: torch.Generator,
) -> Evaluation:
    """Answer every problem `sampling.group_size` times."""
    groups = roll_out(policy, verifier, problems, sampling, generator)
    answers = [answer for group in groups for answer in group]
    judged = [answer for answer in answers if answer.judged]
    if not judged:
        raise TrainerError("no reward of an evaluation is a finite number: check the task's reward")
    return Evaluation(
        accuracy=sum(answer.correct for answer in judged) / len(judged),
        reward=sum(answer.score for answer in judged) / len(judged),
        mean_length=sum(answer.length for answer in answers) / len(answers),
        answers=answers,
        per_problem=sampling.group_size,
    )


def evaluate_held_out(
    policy: Policy, verifier: Verifier, problems: list[Problem], config: Config
) -> Evaluation:
    """`evaluate` as a recipe says, and greedily; its own generator leaves training undisturbed."""
    generator = torch.Generator().manual_seed(0)
    samplings = [Sampling.of(config.rollout, group_size=1, temperature=0.0)]
    if config.eval.temperature:
        samples, temperature = config.eval.samples, config.eval.temperature
        samplings += [Sampling.of(config.rollout, group_size=samples, temperature=temperature)]
    found = [evaluate(policy, verifier, problems, s, generator) for s in samplings]
    return found[-1]._replace(greedy_accuracy=found[0].accuracy)


def evaluate_saved(path: Path, overrides: Sequence[str]) -> Evaluation:
    """Evaluate a run, one of its checkpoints, any model directory, or what a recipe starts from.

    Args:
        path: a run directory (its newest checkpoint); a checkpoint or model directory, whose recipe
            is that of the run around it, or the defaults; or a TOML recipe.

    Raises:
        TrainerError: no recipe, no checkpoint, or a damaged one.
    """
    config, saved = _find(path, overrides)
    if config.eval.samples > 1 and not config.eval.temperature:
        raise RecipeError(
            f"eval.samples is {config.eval.samples}, but greedy completions are all alike: set "
            "eval.temperature=1.0, or eval.samples=1"
        )
    if config.threads:
        torch.set_num_threads(config.threads)
    quiet_transformers()
    task = load_task(config.task, config.task_args)
    with Verifier(task, **asdict(config.verifier)) as verifier:
        device = default_device(config.device)
        if saved:
            checkpoint.verify(saved)
            policy = load_policy(saved, config.model, device, stop=task.stop)
        else:
            if config.model.path is None:
                _note(f"{path} builds its model from nothing: what is evaluated is untrained")
            torch.manual_seed(config.seed)
            policy = make_policy(config.model, device, alphabet=task.alphabet, stop=task.stop)
        fits = policy.fits(config.rollout.max_prompt_tokens)
        problems = held_out(verifier, config.eval.problems, fits)
        if note := fewer_held_out(verifier, config.eval.problems, len(problems)):
            _note(note)
        return evaluate_held_out(policy, verifier, problems, config)


def _note(text: str) -> None:
    """Beside the results, which may be JSON."""
    print(f"fastpo: {text}", file=sys.stderr)


def _find(path: Path, overrides: Sequence[str]) -> tuple[Config, Path | None]:
    """The recipe of `path` and the directory of its model, where it has one."""
    if not path.exists():
        raise RecipeError(
            f"{path}: no such file or directory; expected the directory of a run or a model, or a "
            "recipe"
        )
    if not path.is_dir():
        return recipe.load(path, overrides), None
    # Every directory of a model has the one, every directory of adapters the other.
    if not any((path / f"{kind}config.json").exists() for kind in ("", "adapter_")):
        return directory.config_of(path, overrides), checkpoint.find(path)
    if (path.parent / directory.CONFIG).exists():
        return directory.config_of(path.parent, overrides), path
    if not any(override.startswith("task=") for override in overrides):
        raise RecipeError(f"{path} is a model and no run: say what to ask it, e.g. task=sort")
    return recipe.load(None, overrides), path
