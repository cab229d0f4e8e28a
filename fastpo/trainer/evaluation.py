"""Accuracy of a policy on given problems."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import torch

from fastpo.trainer.config import Config, RolloutConfig
from fastpo.trainer.policy import (
    Policy,
    default_device,
    load_policy,
    make_policy,
    quiet_transformers,
)
from fastpo.trainer.rollout import sample
from fastpo.trainer.run import checkpoint, directory, recipe
from fastpo.trainer.run.errors import TrainerError
from fastpo.trainer.tasks import Problem, held_out, load_task
from fastpo.trainer.verifier import Verifier


class Answer(NamedTuple):
    """One judged completion of an evaluation."""

    problem: Problem
    text: str
    reward: float
    parts: dict[str, float]

    @property
    def correct(self) -> bool:
        """Right by the verifier."""
        return self.reward >= 1.0


class Evaluation(NamedTuple):
    """What an evaluation found; means over all completions, but for rewards that are not finite."""

    accuracy: float  # share with reward 1
    reward: float  # the task's own, without length penalty
    mean_length: float  # tokens
    answers: list[Answer]
    greedy_accuracy: float | None = None  # of greedy decoding, whatever the temperature


def evaluate(
    policy: Policy,
    verifier: Verifier,
    problems: list[Problem],
    rollout: RolloutConfig,
    temperature: float,
    generator: torch.Generator,
    samples: int = 1,
) -> Evaluation:
    """Answer every problem `samples` times; temperature 0 = greedy, which draws nothing random."""
    completions = sample(
        policy,
        [policy.encode(problem.prompt) for problem in problems],
        group_size=samples,
        max_new_tokens=rollout.max_new_tokens,
        temperature=temperature,
        generator=generator,
        batch_size=rollout.batch_size,
    )
    asked = [
        (problems[index // samples], policy.decode(completion.tokens))
        for index, completion in enumerate(completions)
    ]
    verdicts = verifier.judge(asked)
    answers = [Answer(*pair, *verdict) for pair, verdict in zip(asked, verdicts, strict=True)]
    judged = [answer for answer in answers if math.isfinite(answer.reward)]
    if not judged:
        raise TrainerError("no reward of an evaluation is a finite number: check the task's reward")
    return Evaluation(
        accuracy=sum(answer.correct for answer in judged) / len(judged),
        reward=sum(answer.reward for answer in judged) / len(judged),
        mean_length=sum(len(completion.tokens) for completion in completions) / len(completions),
        answers=answers,
    )


def evaluate_held_out(
    policy: Policy, verifier: Verifier, problems: list[Problem], config: Config
) -> Evaluation:
    """`evaluate` as a recipe says, and greedily; its own generator leaves training undisturbed."""
    generator = torch.Generator(policy.device).manual_seed(0)
    greedy = evaluate(policy, verifier, problems, config.rollout, 0.0, generator)
    result = greedy
    if config.eval.temperature or config.eval.samples > 1:
        result = evaluate(
            policy,
            verifier,
            problems,
            config.rollout,
            config.eval.temperature,
            generator,
            config.eval.samples,
        )
    return result._replace(greedy_accuracy=greedy.accuracy)


def evaluate_saved(path: Path, overrides: Sequence[str]) -> Evaluation:
    """Evaluate the checkpoint of a run directory, or the model that a recipe starts from.

    Raises:
        TrainerError: no recipe, no checkpoint, or a damaged one.
    """
    saved = path.is_dir()
    config = recipe.load(path / directory.CONFIG if saved else path, overrides)
    if config.threads:
        torch.set_num_threads(config.threads)
    quiet_transformers()
    task = load_task(config.task, config.task_args)
    with Verifier(task, **asdict(config.verifier)) as verifier:
        device = default_device(config.device)
        if saved:
            policy = load_policy(checkpoint.find(path), config.model, device, stop=task.stop)
        else:
            torch.manual_seed(config.seed)
            policy = make_policy(config.model, device, alphabet=task.alphabet, stop=task.stop)
        problems = held_out(verifier, config.eval.problems)
        return evaluate_held_out(policy, verifier, problems, config)
