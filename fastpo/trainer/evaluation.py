"""Accuracy of a policy on given problems."""

from __future__ import annotations

from typing import NamedTuple

import torch

from fastpo.trainer.config import RolloutConfig
from fastpo.trainer.policy import Policy
from fastpo.trainer.rollout import sample
from fastpo.trainer.tasks import Problem, Task, judge


class Answer(NamedTuple):
    """One judged completion of an evaluation."""

    problem: Problem
    text: str
    reward: float


class Evaluation(NamedTuple):
    """What an evaluation found; means over all completions."""

    accuracy: float  # share with reward 1
    reward: float  # the task's own, without length penalty
    mean_length: float  # tokens
    answers: list[Answer]


def evaluate(
    policy: Policy,
    task: Task,
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
    answers = []
    for index, completion in enumerate(completions):
        problem = problems[index // samples]
        text = policy.decode(completion.tokens)
        answers.append(Answer(problem, text, judge(task, problem, text)))
    count = len(answers)
    return Evaluation(
        accuracy=sum(answer.reward >= 1.0 for answer in answers) / count,
        reward=sum(answer.reward for answer in answers) / count,
        mean_length=sum(len(completion.tokens) for completion in completions) / count,
        answers=answers,
    )
