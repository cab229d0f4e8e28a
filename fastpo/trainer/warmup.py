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
from fastpo.trainer.data.tasks import Problem, ProblemStream
from fastpo.trainer.data.verifier import Verifier
from fastpo.trainer.evaluation import evaluate
from fastpo.trainer.experience import Sample
from fastpo.trainer.model.policy import Policy
from fastpo.trainer.rollout import Completion, Sampling
from fastpo.trainer.run import console
from fastpo.trainer.run.errors import RecipeError
from fastpo.trainer.update import Learner, Sums

CHECK_PROBLEMS = 256


def warm_up(
    policy: Policy,
    verifier: Verifier,
    problems: ProblemStream,
    config: WarmupConfig,
    rollout: RolloutConfig,
    generator: torch.Generator,
    report: Callable[[int, float], None],
) -> None:
    """Train on reference answers until `until_accuracy` on fresh problems, or for `max_steps`."""
    optim = OptimConfig(learning_rate=config.learning_rate)
    learner = Learner(policy, optim, fastpo.reinforce(), temperature=1.0)
    sampling = Sampling.of(rollout, group_size=1)
    for step in range(1, config.max_steps + 1):
        chosen = problems.take(config.batch_size)
        answers = zip(chosen, reference_answers(chosen), strict=True)
        samples = [reference_sample(policy, problem, answer) for problem, answer in answers]
        console.tell(f"update {step} of at most {config.max_steps}")
        learner.update(samples, Sums(), on_policy=True)
        if step % config.check_every == 0 or step == config.max_steps:
            fresh = problems.take(CHECK_PROBLEMS)
            accuracy = evaluate(policy, verifier, fresh, sampling, generator).accuracy
            report(step, accuracy)
            if accuracy >= config.until_accuracy:
                return


def reference_answers(problems: list[Problem]) -> list[str]:
    """What the warm-up imitates.

    Raises:
        RecipeError: a problem has no answer.
    """
    for problem in problems:
        if problem.answer is None:
            raise RecipeError(
                f"warmup.max_steps asks for a warm-up on reference answers, but the problem "
                f"{problem.prompt!r} has none: give Problem.answer, or set it to 0"
            )
    return [problem.answer for problem in problems]


def reference_sample(policy: Policy, problem: Problem, answer: str) -> Sample:
    """The reference answer as a completion to imitate."""
    tokens = policy.encode_answer(answer)
    [prompt] = policy.encode_all([problem], len(tokens))
    return Sample(
        problem=problem,
        prompt=prompt,
        completion=Completion(tokens=tokens, logprobs=[0.0] * len(tokens), finished=True),
        text=answer,
        score=1.0,
        reward=1.0,
        advantage=1.0,
    )
