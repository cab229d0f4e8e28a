"""Rewards, dynamic sampling, overlong shaping and filtering, advantages: on a scripted sampler."""

import dataclasses
import itertools
import math

import pytest
import torch

from fastpo.trainer import experience
from fastpo.trainer.algorithm import resolve
from fastpo.trainer.config import AlgorithmConfig, RolloutConfig
from fastpo.trainer.data.tasks import Problem, ProblemStream
from fastpo.trainer.data.verifier import Verifier
from fastpo.trainer.experience import assign_advantages, mute_truncated
from fastpo.trainer.metrics import rollout_metrics, update_metrics
from fastpo.trainer.rollout import Completion
from fastpo.trainer.run.errors import RecipeError, TrainerError
from fastpo.trainer.source import Batch, Source


class Script:
    """A task whose problems carry the rewards of their completions, in order."""

    alphabet, stop = "ab", None

    def __init__(self, *groups):
        self.groups = itertools.cycle(groups)

    def problem(self, rng):
        return Problem("a", "b", data=next(self.groups))

    def reward(self, problem, completion):
        return problem.data[int(completion)]


class Scribe:
    """A policy that decodes a completion's last token into its index within the group."""

    def encode_all(self, problems, new_tokens):
        return [[1] for _ in problems]

    def decode(self, ids):
        return str(ids[-1])


def source_of(policy, verifier, algorithm, prompts, group_size=4):
    config = RolloutConfig(prompts=prompts, group_size=group_size, max_new_tokens=10)
    problems = ProblemStream(verifier, "train")
    return Source(policy, None, verifier, problems, config, algorithm, torch.Generator())


def gather(monkeypatch, task, *, lengths=None, prompts=2, group_size=4, **algorithm):
    def sampler(policy, prompts, sampling, generator, share):
        sizes = lengths or [3] * group_size
        return [
            Completion(tokens=[index] * n, logprobs=[-1.0] * n, finished=n < 10)
            for _ in prompts
            for index, n in enumerate(sizes)
        ]

    monkeypatch.setattr(experience, "sample", sampler)
    resolved = resolve(AlgorithmConfig(**algorithm), 10)
    with Verifier(task, workers=1) as verifier:
        batch = source_of(Scribe(), verifier, resolved, prompts, group_size).take()
    assign_advantages(batch.groups, resolved.estimator)
    if resolved.overlong_filter:
        mute_truncated(batch.groups)
    return batch


RIGHT, WRONG, MIXED = [1.0] * 4, [0.0] * 4, [1.0, 0.0, 0.0, 1.0]


def test_dynamic_sampling_refills_with_informative_groups(monkeypatch):
    batch = gather(monkeypatch, Script(RIGHT, MIXED, WRONG, WRONG), prompts=2)
    assert [[s.score for s in group] for group in batch.groups] == [MIXED, MIXED]
    assert batch.rounds > 1 and len(batch.sampled) >= 6
    assert rollout_metrics(batch)["groups_kept"] == pytest.approx(1 / 4, abs=0.1)


def test_without_dynamic_sampling_every_group_is_kept(monkeypatch):
    task = Script(RIGHT, MIXED)
    batch = gather(monkeypatch, task, dynamic_sampling=False)
    assert [[s.score for s in group] for group in batch.groups] == [RIGHT, MIXED]
    assert batch.rounds == 1
    assert [s.advantage for s in batch.groups[0]] == [0.0] * 4


@pytest.mark.parametrize(("scores", "hint"), [(RIGHT, "solved"), (WRONG, "too hard")])
def test_nothing_to_learn_is_said_after_the_last_round(monkeypatch, scores, hint):
    with pytest.raises(TrainerError, match=hint) as caught:
        gather(monkeypatch, Script(scores), max_gen_batches=3)
    assert "3 rounds" in str(caught.value) and "\n" not in str(caught.value)


def test_a_batch_that_stays_short_is_trained_on_as_it_is(monkeypatch):
    groups = [WRONG] * 5 + [MIXED]
    batch = gather(monkeypatch, Script(*groups), prompts=2, max_gen_batches=3)
    assert len(batch.groups) == 1 and batch.rounds == 3


def test_advantages_are_relative_to_the_group(monkeypatch):
    batch = gather(monkeypatch, Script(MIXED), overlong_cache=0)
    rewards = torch.tensor(MIXED)
    expected = (rewards - rewards.mean()) / (rewards.std() + 1e-6)
    for group in batch.groups:
        torch.testing.assert_close(torch.tensor([s.advantage for s in group]), expected)


def test_overlong_shaping_and_filtering_are_switched_on_their_own(monkeypatch):
    lengths = [3, 7, 9, 10]  # the last is cut off; the penalty starts after 10 - 4 tokens
    options = {"lengths": lengths, "overlong_cache": 4}
    both = gather(monkeypatch, Script(MIXED), **options).groups[0]
    penalties = [s.reward - s.score for s in both]
    assert penalties == pytest.approx([0.0, -0.25, -0.75, -1.0])
    assert [s.live for s in both] == [True, True, True, False]
    assert [s.correct for s in both] == [True, False, False, True]
    shaped = gather(monkeypatch, Script(MIXED), overlong_filter=False, **options).groups[0]
    assert all(s.live for s in shaped)
    filtered = gather(monkeypatch, Script(MIXED), lengths=lengths, overlong_cache=0).groups[0]
    assert [s.reward for s in filtered] == MIXED
    assert [s.live for s in filtered] == [True, True, True, False]


def test_a_nan_reward_leaves_its_group_and_is_counted(monkeypatch):
    """REGRESSIONS 23: the others have the advantages of a group without it."""
    batch = gather(monkeypatch, Script([1.0, 0.0, math.nan, 0.0]), overlong_cache=0)
    group = batch.groups[0]
    assert [s.live for s in group] == [True, True, False, True]
    rest = torch.tensor([1.0, 0.0, 0.0])
    expected = (rest - rest.mean()) / (rest.std() + 1e-6)
    got = torch.tensor([s.advantage for s in group if s.live])
    torch.testing.assert_close(got, expected)
    metrics = rollout_metrics(batch)
    assert metrics["invalid_rewards"] == 2
    assert metrics["reward"] == pytest.approx(1 / 3)


def test_rewards_that_an_estimator_refuses_are_one_line():
    with pytest.raises(TrainerError, match=r"^algorithm.estimator=maxrl: rewards hold -1.0, .*$"):
        experience.assign_advantages([scored(1.0, -1.0)], "maxrl")


def scored(*scores, parts=()):
    made = []
    for index, score in enumerate(scores):
        completion = Completion(tokens=[1] * (index + 1), logprobs=[], finished=index > 0)
        made.append(
            experience.Sample(
                problem=Problem("a"),
                prompt=[1],
                completion=completion,
                text="",
                score=score,
                reward=score,
                parts=dict(parts),
            )
        )
    return made


def test_a_group_teaches_by_its_verdicts_or_by_its_rewards():
    """A reward that is no number neither makes a group informative nor counts as right or wrong."""
    for scores, by_correct, by_reward in (
        ([1.0, 0.0], True, True),
        ([1.0, 1.0, math.nan], False, False),
        ([math.inf, 1.0, 1.0], False, False),
        ([0.2, 0.4], False, True),
        ([0.3, 0.3], False, False),
        ([-math.inf, 0.0], False, False),
    ):
        assert experience.is_informative(scored(*scores)) is by_correct
        assert experience.is_informative(scored(*scores), "reward") is by_reward
    verdicts = [sample.correct for sample in scored(1.0, 0.9, math.inf, math.nan)]
    assert verdicts == [True, False, False, False]


def test_continuous_rewards_are_learned_from_when_told_so(monkeypatch):
    partial = [0.1, 0.9, 0.4, 0.4]
    with pytest.raises(TrainerError, match="dynamic_sampling_by=reward"):
        gather(monkeypatch, Script(partial), overlong_cache=0)
    batch = gather(monkeypatch, Script(partial), overlong_cache=0, dynamic_sampling_by="reward")
    assert batch.rounds == 1 and len(batch.groups) == 2
    with pytest.raises(TrainerError, match="no group had different rewards"):
        gather(monkeypatch, Script([0.4] * 4), overlong_cache=0, dynamic_sampling_by="reward")


def test_surplus_groups_are_left_out(monkeypatch):
    """The second round asks for a tenth more than is missing."""
    batch = gather(monkeypatch, Script(MIXED, WRONG, MIXED, MIXED), prompts=3)
    assert len(batch.groups) == 3
    assert sum(experience.is_informative(group) for group in batch.sampled) > 3


class Numbered(Scribe):
    """The log-probs of its samples tell which policy drew them."""

    version = 0


def test_surplus_groups_come_first_in_the_next_step_as_they_were_sampled(monkeypatch):
    """In a checkpoint they are plain values, and what comes back is the same."""

    def sampler(policy, prompts, sampling, generator, share):
        return [
            Completion(tokens=[index] * 3, logprobs=[-1.0 - policy.version] * 3, finished=True)
            for _ in prompts
            for index in range(4)
        ]

    monkeypatch.setattr(experience, "sample", sampler)
    policy, algorithm = Numbered(), resolve(AlgorithmConfig(carry_surplus=True), 10)
    with Verifier(Script(MIXED, WRONG, MIXED, MIXED), workers=1) as verifier:
        source = source_of(policy, verifier, algorithm, prompts=3)
        first = source.take()
        assert (first.carried, len(first.groups), len(source.surplus)) == (0, 3, 1)
        policy.version = 1
        saved, surplus = source.state(), source.surplus
        narrow = source_of(policy, verifier, algorithm, prompts=3, group_size=2)
        narrow.load_state(saved)
        assert narrow.surplus == []
        short = source_of(policy, verifier, algorithm, prompts=1)
        short.load_state(saved)
        assert short.take().carried == 0  # no room for any in a changed recipe
        source = source_of(policy, verifier, algorithm, prompts=3)
        source.load_state(saved)
        carried = source.surplus
        assert carried == [
            [dataclasses.replace(s, problem=s.problem._replace(data=None)) for s in group]
            for group in surplus
        ]
        second = source.take()
    assert second.carried == 1 and second.groups[0] is carried[0]
    assert [g[0].old_logprobs[0] for g in second.groups] == [-1.0, -2.0, -2.0]
    assert all(g[0].completion.logprobs[0] == -2.0 for g in second.sampled)


def test_metrics_are_these_numbers():
    """REGRESSIONS 30, 41: of everything sampled; NaN and inf are neither right nor wrong."""
    kept = scored(1.0, 0.0, math.nan, math.inf, parts={"format": 0.5})
    lost = scored(0.0, 0.0, 0.0, 0.0)
    lost[0].parts = {"format": 1.5}
    batch = Batch(groups=[kept], sampled=[kept, lost], rounds=2)
    assert rollout_metrics(batch) == pytest.approx(
        {
            "reward": 1 / 6,
            "reward_std": 0.5**0.5 / 2,
            "frac_reward_zero_std": 0.5,
            "accuracy": 1 / 6,
            "completions/mean_length": 2.5,
            "completions/min_length": 1,
            "completions/max_length": 4,
            "completions/clipped_ratio": 0.25,
            "completions/mean_terminated_length": 3.0,
            "groups_kept": 0.5,
            "groups_trained": 1,
            "groups_carried": 0,
            "gen_batches": 2,
            "invalid_rewards": 2,
            "rewards/format/mean": 0.7,
            "rewards/format/std": 0.2**0.5,
        }
    )
    sums = {"loss": 6.0, "grad_norm": 4.0, "updates": 2.0, "tokens": 10.0, "entropy": 5.0}
    sums |= {"clip_low": 1.0, "clip_high": 2.0, "clip_max": 3.0, "old_kl": 0.5, "ref_kl": 2.5}
    sums |= {"sampled_difference": 0.6, "sampled": 3.0}
    assert update_metrics(sums) == pytest.approx(
        {
            "loss": 3.0,
            "grad_norm": 2.0,
            "entropy": 0.5,
            "clip_ratio/low_mean": 0.1,
            "clip_ratio/high_mean": 0.2,
            "clip_ratio/region_mean": 0.6,
            "old_kl": 0.05,
            "sampling/sampling_logp_difference/mean": 0.2,
            "kl": 0.25,
        }
    )


def test_presets_set_the_techniques_and_each_can_be_switched():
    dapo, grpo = (resolve(AlgorithmConfig(preset=name), 20) for name in ("dapo", "grpo"))
    assert (dapo.objective.clip_high, grpo.objective.clip_high) == (0.28, 0.2)
    assert (dapo.objective.aggregation, grpo.objective.aggregation) == (
        "token_mean",
        "sequence_mean",
    )
    assert (dapo.dynamic_sampling, dapo.overlong_filter, dapo.overlong_cache) == (True, True, 4)
    assert (grpo.dynamic_sampling, grpo.overlong_filter, grpo.overlong_cache) == (False, False, 0)
    switched = {
        "dynamic_sampling": True,
        "overlong_filter": True,
        "overlong_cache": 4,
    }
    for name, value in switched.items():
        algorithm = resolve(AlgorithmConfig(preset="grpo", **{name: value}), 20)
        assert getattr(algorithm, name) == value != getattr(grpo, name)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"preset": "dpo"}, "algorithm.preset is 'dpo', expected one of .*dapo"),
        ({"objective": {"aggregation": "mean"}}, "aggregation is 'mean'"),
        ({"objective": {"clip_hihg": 0.3}}, "did you mean 'clip_high'"),
        (
            {"objective": {"entropy_coef": 0.1}, "preset": "grpo"},
            "needs algorithm.objective.aggregation=token_mean",
        ),
        ({"estimator": "gae"}, "algorithm.estimator is 'gae', expected one of grpo"),
        (
            {"estimator": "maxrl"},
            "maxrl takes no rewards below 0.*: set algorithm.overlong_cache=0",
        ),
        ({"overlong_cache": 20}, "overlong_cache is 20, expected less than"),
    ],
)
def test_contradictions_are_named(options, message):
    with pytest.raises(RecipeError, match=message):
        resolve(AlgorithmConfig(**options), 20)
