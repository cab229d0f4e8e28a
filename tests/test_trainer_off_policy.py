"""Samples of another policy: importance weights, carried groups, a reference that moves."""

import dataclasses

import pytest
import torch
from learner_cases import gradients

import fastpo
from fastpo.trainer.algorithm import resolve
from fastpo.trainer.config import AlgorithmConfig, ModelConfig, OptimConfig
from fastpo.trainer.data.tasks import Problem
from fastpo.trainer.experience import Sample
from fastpo.trainer.metrics import update_metrics
from fastpo.trainer.model.loading import make_policy
from fastpo.trainer.rollout import Sampling, sample
from fastpo.trainer.run.errors import RecipeError
from fastpo.trainer.update import Learner

SHIFTS = [0.4, -0.3, 1.2, 0.0]  # policy over sampler, in nats, token after token


def make(seed=0, objective=None, correction=None, **optim):
    torch.manual_seed(seed)
    model = ModelConfig(hidden_size=32, layers=1, heads=2)
    policy = make_policy(model, torch.device("cpu"), alphabet="0123456789=", stop=None)
    config = OptimConfig(max_grad_norm=1e9, **optim)
    return Learner(policy, config, objective or fastpo.dapo(), 0.8, correction=correction)


def samples_of(policy):
    """Two groups of three, with advantages of either sign."""
    prompts = [[3, 4, 5], [6]]
    sampling = Sampling(group_size=3, max_new_tokens=7, temperature=0.8)
    found = sample(policy, prompts, sampling, torch.Generator().manual_seed(0))
    return [
        Sample(
            problem=Problem(""),
            prompt=prompts[index // 3],
            completion=completion,
            text="",
            score=0.0,
            reward=0.0,
            advantage=(-1.0) ** index * (1 + index),
        )
        for index, completion in enumerate(found)
    ]


def foreign_samples(learner):
    """Samples whose sampler gave every token another log-prob than the policy does."""
    samples = samples_of(learner.policy)
    learner.recompute_old_logprobs(samples)
    position = 0
    for s in samples:
        shifts = [SHIFTS[(position + i) % 4] for i in range(s.length)]
        position += s.length
        logprobs = [p - d for p, d in zip(s.old_logprobs, shifts, strict=True)]
        s.completion = dataclasses.replace(s.completion, logprobs=logprobs)
        s.old_logprobs = logprobs  # as the sampler gave them: the learner finds its own
    return samples


@pytest.mark.parametrize(
    ("correction", "weight", "counts"),
    [
        ({"mode": "truncate", "high": 2.0}, lambda r: r.clamp(max=2.0), lambda r: r > 0),
        ({"mode": "mask", "low": 0.8, "high": 2.0}, lambda r: r * ((r >= 0.8) & (r <= 2)), None),
        (
            {"mode": "none", "reject": {"token_k1": [0.8, 2.0]}},
            torch.ones_like,
            lambda r: (r >= 0.8) & (r <= 2),
        ),
    ],
    ids=["tis", "mis", "rejected"],
)
def test_every_token_weighs_what_the_policy_gives_it_over_the_sampler(correction, weight, counts):
    """The gradient is that of advantages times weights, over the tokens that were not rejected."""
    learner = make(correction=correction)
    samples = foreign_samples(learner)
    learner.recompute_old_logprobs(samples)
    metrics = learner.correct(samples)
    gradient, sums = gradients(learner, samples, on_policy=False)
    total = sum(s.length for s in samples)
    ratio = torch.tensor([SHIFTS[i % 4] for i in range(total)], dtype=torch.float64).exp()
    kept = torch.ones_like(ratio, dtype=torch.bool) if counts is None else counts(ratio)
    weights = (weight(ratio) * kept).split([s.length for s in samples])
    plain = samples_of(learner.policy)
    for s, w in zip(plain, weights, strict=True):
        s.advantage = (s.advantage * w).tolist()
    expected, _ = gradients(learner, plain, on_policy=False)
    expected = expected * total / int(kept.sum())
    torch.testing.assert_close(gradient, expected, atol=1e-6, rtol=1e-4)
    assert sums["tokens"] == int(kept.sum())
    assert metrics["sampling/ratio_max"] == pytest.approx(ratio.max().item(), rel=1e-4)
    shown = update_metrics({**sums, **metrics})
    assert shown["sampling/importance_sampling_ratio/mean"] == metrics["sampling/ratio_mean"]
    assert 0 < shown["sampling/cut"] < 1


def test_the_difference_to_the_sampler_is_over_tokens_that_were_not_rejected():
    """REGRESSIONS 57: rejected ones have no log-prob, and their 0 is not one."""
    learner = make(correction={"mode": "none", "reject": {"token_k1": [0.8, 2.0]}})
    samples = foreign_samples(learner)
    sums = learner.learn(samples, torch.Generator().manual_seed(0)).read()
    shifts = [SHIFTS[i % 4] for i in range(sum(s.length for s in samples))]
    kept = [shift for shift in shifts if shift in (0.4, 0.0)]  # 0.8 <= ratio <= 2
    assert sums["sampled"] == len(kept)
    assert sums["sampled_difference"] == pytest.approx(sum(kept), rel=1e-4)


def test_a_step_corrects_by_itself_and_a_batch_without_tokens_changes_nothing():
    learner = make(correction={"mode": "reject", "level": "geometric", "high": 1e-3})
    before = [p.detach().clone() for p in learner.parameters]
    sums = learner.learn(foreign_samples(learner), torch.Generator().manual_seed(0))
    assert learner.updates == 1 and sums["sampling/cut"] == 1.0
    assert all(map(torch.equal, before, learner.parameters))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"mode": "tis"}, "algorithm.correction: mode is 'tis', expected one of truncate"),
        ({"hihg": 2.0}, "algorithm.correction: .*hihg"),
        ({"mask": 1}, "algorithm.correction: mask"),
        ({"reject": {"token_k1": 2.0}}, "algorithm.correction: reject"),
    ],
)
def test_a_correction_that_is_none_is_refused(config, message):
    with pytest.raises(RecipeError, match=message):
        resolve(AlgorithmConfig(correction=config), 10)


def test_a_reference_can_only_move_where_there_is_one():
    with pytest.raises(RecipeError, match=r"no reference policy: set .*kl_coef"):
        resolve(AlgorithmConfig(sync_reference_every=3), 10)


def test_a_reference_that_moved_outlives_steps_without_a_penalty():
    """REGRESSIONS 58: a checkpoint of a learner that has no use for it holds it all the same."""
    first = make(objective=fastpo.dapo(kl_coef=0.1))
    first.reference = make(seed=1).policy
    first.sync_reference()
    without = make(seed=2)
    without.load_state_dict(first.state_dict())
    last = make(seed=3, objective=fastpo.dapo(kl_coef=0.1))
    last.reference = make(seed=4).policy
    last.load_state_dict(without.state_dict())
    pairs = zip(last.reference.model.parameters(), first.policy.model.parameters(), strict=True)
    assert all(torch.equal(kept, moved) for kept, moved in pairs)
    assert last.synced and "reference" not in make().state_dict()


def test_the_reference_becomes_the_policy_and_stays_behind_it():
    learner = make(objective=fastpo.dapo(kl_coef=0.1), learning_rate=1e-2)
    learner.reference = make(seed=1).policy
    samples = samples_of(learner.policy)

    def divergence():
        return gradients(learner, samples, on_policy=False)[1]["ref_kl"]

    assert divergence() > 1e-3
    learner.sync_reference()
    assert divergence() == pytest.approx(0, abs=1e-6)
    learner.learn(samples, torch.Generator().manual_seed(0))
    assert divergence() > 1e-6


def test_carried_samples_are_no_on_policy_ones():
    """Their ratio is that to the policy which drew them, even where every batch is one update."""
    learner = make()
    samples = samples_of(learner.policy)
    for s in samples:
        s.old_logprobs = [p - 0.1 for p in s.old_logprobs]
    for fresh, ratio in ((True, 1.0), (False, 1.1052)):
        learner = make()
        sums = learner.learn(samples, torch.Generator().manual_seed(0), fresh=fresh).read()
        assert sums["ratio"] / sums["tokens"] == pytest.approx(ratio, abs=1e-3)
