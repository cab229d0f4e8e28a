"""From prompts to a batch worth learning from: rollouts, rewards, dynamic sampling, advantages."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch

import fastpo
from fastpo.trainer.algorithm import Algorithm
from fastpo.trainer.config import RolloutConfig
from fastpo.trainer.policy import Policy
from fastpo.trainer.rollout import Completion, sample
from fastpo.trainer.run.errors import TrainerError
from fastpo.trainer.tasks import Problem, ProblemStream
from fastpo.trainer.verifier import Verifier


@dataclass(kw_only=True)
class Sample:
    """One completion with everything the loss needs to know about it."""

    problem: Problem
    prompt: list[int]
    completion: Completion
    text: str
    score: float  # what the task said; 1.0 = right
    reward: float  # score + overlong penalty
    parts: dict[str, float] = field(default_factory=dict)  # of the score, by name
    advantage: float = 0.0
    live: bool = True  # False: carries no loss

    @property
    def correct(self) -> bool:
        """Right by the verifier, whatever the length penalty."""
        return self.score >= 1.0

    @property
    def length(self) -> int:
        """Tokens of the completion, end token included."""
        return len(self.completion.tokens)


@dataclass(kw_only=True)
class Batch:
    """The groups of one step."""

    groups: list[list[Sample]]  # to learn from
    sampled: list[list[Sample]] = field(repr=False)  # all of them, with those that were discarded
    rounds: int

    @property
    def samples(self) -> list[Sample]:
        """The samples to learn from, groups side by side."""
        return [sample for group in self.groups for sample in group]


def collect(
    policy: Policy,
    verifier: Verifier,
    problems: ProblemStream,
    config: RolloutConfig,
    algorithm: Algorithm,
    generator: torch.Generator,
) -> Batch:
    """Sample groups until `config.prompts` of them can teach something (dynamic sampling).

    A group where all answers are right, or all wrong, has advantages of 0: with dynamic sampling on
    it is replaced by fresh problems, for at most `max_gen_batches` rounds.

    Raises:
        TrainerError: not a single informative group in all rounds; or the task's verifier raised.
    """
    sampled: list[list[Sample]] = []
    kept: list[list[Sample]] = []
    rounds = 0
    while len(kept) < config.prompts and rounds < algorithm.max_gen_batches:
        count = _groups_to_sample(
            config.prompts - len(kept), len(kept), len(sampled), config.prompts
        )
        groups = roll_out(policy, verifier, problems.take(count), config, algorithm, generator)
        sampled += groups
        kept += [g for g in groups if not algorithm.dynamic_sampling or is_informative(g)]
        rounds += 1
    if not kept:
        raise TrainerError(_nothing_to_learn(sampled, rounds))
    kept = kept[: config.prompts]
    assign_advantages(kept, algorithm.estimator)
    if algorithm.overlong_filter:
        for group in kept:
            for member in group:
                member.live = member.live and member.completion.finished
    return Batch(groups=kept, sampled=sampled, rounds=rounds)


def roll_out(
    policy: Policy,
    verifier: Verifier,
    problems: list[Problem],
    config: RolloutConfig,
    algorithm: Algorithm,
    generator: torch.Generator,
) -> list[list[Sample]]:
    """One group of judged completions per problem."""
    prompts = [policy.encode(problem.prompt) for problem in problems]
    completions = sample(
        policy,
        prompts,
        group_size=config.group_size,
        max_new_tokens=config.max_new_tokens,
        temperature=config.temperature,
        generator=generator,
        batch_size=config.batch_size,
    )
    penalties = _overlong_penalties(completions, config.max_new_tokens, algorithm.overlong_cache)
    groups: list[list[Sample]] = [[] for _ in problems]
    texts = [policy.decode(completion.tokens) for completion in completions]
    verdicts = verifier.judge([(problems[i // config.group_size], t) for i, t in enumerate(texts)])
    for index, (completion, penalty) in enumerate(zip(completions, penalties, strict=True)):
        which, (score, parts) = index // config.group_size, verdicts[index]
        groups[which].append(
            Sample(
                problem=problems[which],
                prompt=prompts[which],
                completion=completion,
                text=texts[index],
                score=score,
                reward=score + penalty,
                parts=parts,
            )
        )
    return groups


def is_informative(group: list[Sample]) -> bool:
    """0 < correct < G: some answers right, some wrong (DAPO, arXiv 2503.14476, eq. 11)."""
    judged = [member.correct for member in group if math.isfinite(member.score)]
    return 0 < sum(judged) < len(judged)


def assign_advantages(groups: list[list[Sample]], estimator: str) -> None:
    """Group-relative advantages; a sample whose reward is NaN leaves its group, without a loss."""
    members = [member for group in groups for member in group]
    rewards = torch.tensor([member.reward for member in members], dtype=torch.float64)
    live = rewards.isfinite()
    if not live.any():
        raise TrainerError("no reward of this batch is a finite number: check the task's reward")
    lengths = torch.tensor([member.length for member in members]) if estimator == "opo" else None
    advantages = fastpo.group_advantages(
        rewards, group_size=len(groups[0]), estimator=estimator, lengths=lengths
    ).advantages
    for member, advantage, kept in zip(members, advantages.tolist(), live.tolist(), strict=True):
        member.advantage, member.live = advantage, kept


def _overlong_penalties(
    completions: list[Completion], max_length: int, cache_length: int
) -> list[float]:
    """DAPO's soft punishment, 0 to -1; none without a cache."""
    if not cache_length:
        return [0.0] * len(completions)
    lengths = torch.tensor([len(completion.tokens) for completion in completions])
    return fastpo.overlong_penalty(
        lengths, max_length=max_length, cache_length=cache_length
    ).tolist()


def _groups_to_sample(missing: int, kept: int, sampled: int, most: int) -> int:
    """As many as should fill the batch at the rate kept so far, a tenth more, at most one batch."""
    return min(most, math.ceil(1.1 * missing * sampled / kept)) if kept else most


def _nothing_to_learn(sampled: list[list[Sample]], rounds: int) -> str:
    scores = [member.correct for group in sampled for member in group]
    accuracy = sum(scores) / len(scores)
    hint = (
        "the task is solved for this policy: make it harder or stop here"
        if accuracy > 0.5
        else "the task is too hard for this policy: make it easier, or start from a better one "
        "(warmup.max_steps, model.path)"
    )
    return (
        f"no group had right and wrong answers in {rounds} rounds of sampling ({len(scores)} "
        f"completions, accuracy {accuracy:.2f}): {hint}; or raise rollout.group_size or "
        "algorithm.max_gen_batches"
    )
