"""From prompts to samples: rollouts, rewards, overlong punishment, advantages."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch

import fastpo
from fastpo.trainer.data.tasks import Problem
from fastpo.trainer.data.verifier import Verifier
from fastpo.trainer.model import distributed
from fastpo.trainer.model.policy import Policy
from fastpo.trainer.rollout import Completion, Sampling, sample
from fastpo.trainer.run.errors import TrainerError


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
    advantage: float | list[float] = 0.0  # of every token alike, or of each (a critic's)
    live: bool = True  # False: carries no loss
    old_logprobs: list[float] = field(default_factory=list)  # of the policy before the updates
    weights: list[float] = field(default_factory=list)  # of every token; none = 1
    mask: list[bool] = field(default_factory=list)  # tokens that carry a loss; none = all
    values: list[float] = field(default_factory=list)  # of every token, by the critic before it
    returns: list[float] = field(default_factory=list)  # what they should have been

    def __post_init__(self) -> None:
        self.old_logprobs = self.old_logprobs or self.completion.logprobs

    @property
    def judged(self) -> bool:
        """Whether the task gave a number: NaN or inf take a sample out of everything."""
        return math.isfinite(self.score)

    @property
    def correct(self) -> bool:
        """Right by the verifier, whatever the length penalty."""
        return self.judged and self.score >= 1.0

    @property
    def length(self) -> int:
        """Tokens of the completion, end token included."""
        return len(self.completion.tokens)

    @property
    def tokens_learned(self) -> int:
        """Tokens that carry a loss."""
        return self.live * (sum(self.mask) if self.mask else self.length)


def roll_out(
    policy: Policy,
    verifier: Verifier,
    problems: list[Problem],
    sampling: Sampling,
    generator: torch.Generator,
) -> list[list[Sample]]:
    """One group of judged completions per problem: for training and for evaluation.

    Raises:
        TrainerError: a prompt leaves no room for a completion; or the task's verifier raised.
    """
    prompts = policy.encode_all(problems, sampling.max_new_tokens)
    share = distributed.share()

    def of_this_rank() -> list[list[Sample]]:
        completions = sample(policy, prompts, sampling, generator, share)
        texts = [policy.decode(completion.tokens) for completion in completions]
        size = sampling.group_size
        owners = [index for index in range(len(problems))[share] for _ in range(size)]
        asked = [(problems[owner], text) for owner, text in zip(owners, texts, strict=True)]
        samples = [
            Sample(
                problem=problems[owner],
                prompt=prompts[owner],
                completion=completion,
                text=text,
                score=verdict.reward,
                reward=verdict.reward,
                parts=verdict.parts,
            )
            for owner, completion, text, verdict in zip(
                owners, completions, texts, verifier.judge(asked), strict=True
            )
        ]
        return [samples[start : start + size] for start in range(0, len(samples), size)]

    return distributed.gather(of_this_rank)


def to_plain(groups: list[list[Sample]]) -> list[list[dict[str, Any]]]:
    """Judged groups for a checkpoint: plain values, without what only the verifier reads."""
    return [
        [
            vars(member)
            | {
                "problem": [member.problem.prompt, member.problem.answer],
                "completion": vars(member.completion),
            }
            for member in group
        ]
        for group in groups
    ]


def from_plain(groups: list[list[dict[str, Any]]], group_size: int) -> list[list[Sample]]:
    """What `to_plain` was given, but for groups of another size, in a changed recipe."""
    found = [
        [
            Sample(
                **member
                | {
                    "problem": Problem(*member["problem"]),
                    "completion": Completion(**member["completion"]),
                }
            )
            for member in group
        ]
        for group in groups
    ]
    return [group for group in found if len(group) == group_size]


def punish_overlong(groups: list[list[Sample]], max_length: int, cache_length: int) -> None:
    """DAPO's soft punishment, 0 to -1, over the last `cache_length` tokens; 0 = none."""
    if not cache_length:
        return
    samples = [member for group in groups for member in group]
    lengths = torch.tensor([member.length for member in samples])
    penalties = fastpo.overlong_penalty(lengths, max_length=max_length, cache_length=cache_length)
    for member, penalty in zip(samples, penalties.tolist(), strict=True):
        member.reward = member.score + penalty


def is_informative(group: list[Sample], by: str = "correct") -> bool:
    """Whether a group's advantages are not all 0.

    By "correct": 0 < correct < G, some answers right and some wrong (DAPO, arXiv 2503.14476,
    eq. 11). By "reward": its rewards differ, for rewards that are no verdicts.
    """
    judged = [member for member in group if member.judged]
    if by == "reward":
        return len({member.reward for member in judged}) > 1
    return 0 < sum(member.correct for member in judged) < len(judged)


def assign_advantages(groups: list[list[Sample]], estimator: str) -> None:
    """Group-relative advantages; a sample whose reward is NaN leaves its group, without a loss."""
    members = [member for group in groups for member in group]
    rewards = torch.tensor([member.reward for member in members], dtype=torch.float64)
    live = rewards.isfinite()
    if not live.any():
        raise TrainerError("no reward of this batch is a finite number: check the task's reward")
    lengths = torch.tensor([member.length for member in members]) if estimator == "opo" else None
    try:
        advantages = fastpo.group_advantages(
            rewards, group_size=len(groups[0]), estimator=estimator, lengths=lengths
        ).advantages
    except ValueError as error:  # rewards that this estimator is not made for
        raise TrainerError(f"algorithm.estimator={estimator}: {error}") from error
    for member, advantage, kept in zip(members, advantages.tolist(), live.tolist(), strict=True):
        member.advantage, member.live = advantage, kept


def mute_truncated(groups: list[list[Sample]]) -> None:
    """Overlong filtering: completions cut off carry no loss."""
    for group in groups:
        for member in group:
            member.live = member.live and member.completion.finished
