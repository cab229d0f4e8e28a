"""Supervised warm-up: a few steps on reference answers, in place of a pretrained checkpoint.

Reinforcement learning improves a policy that is right sometimes; from random weights every group
is all wrong and teaches nothing. Maximum likelihood on reference answers is REINFORCE with an
advantage of 1 on every token, so the learner of the main loop does it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

import fastpo
from fastpo.trainer.config import OptimConfig, RolloutConfig, WarmupConfig
from fastpo.trainer.evaluation import evaluate
from fastpo.trainer.experience import Sample
from fastpo.trainer.policy import Policy
from fastpo.trainer.rollout import Completion
from fastpo.trainer.tasks import Problem, ProblemStream, Task
from fastpo.trainer.update import Learner, Sums

CHECK_PROBLEMS = 256


def warm_up(
    policy: Policy,
    task: Task,
    problems: ProblemStream,
    config: WarmupConfig,
    rollout: RolloutConfig,
    generator: torch.Generator,
    report: Callable[[int, float], None],
) -> None:
    """Train on reference answers until `until_accuracy` on fresh problems, or for `max_steps`."""
    optim = OptimConfig(learning_rate=config.learning_rate)
    learner = Learner(policy, optim, fastpo.reinforce(), temperature=1.0)
    for step in range(1, config.max_steps + 1):
        answers = [
            reference_sample(policy, problem) for problem in problems.take(config.batch_size)
        ]
        learner.update(answers, Sums(), on_policy=True)
        if step % config.check_every == 0 or step == config.max_steps:
            fresh = problems.take(CHECK_PROBLEMS)
            accuracy = evaluate(
                policy, task, fresh, rollout, rollout.temperature, generator
            ).accuracy
            report(step, accuracy)
            if accuracy >= config.until_accuracy:
                return


def reference_sample(policy: Policy, problem: Problem) -> Sample:
    """The reference answer as a completion to imitate."""
    tokens = policy.encode_answer(problem.answer)
    return Sample(
        problem=problem,
        prompt=policy.encode(problem.prompt),
        completion=Completion(tokens=tokens, logprobs=[0.0] * len(tokens), finished=True),
        text=problem.answer,
        score=1.0,
        reward=1.0,
        advantage=1.0,
    )
