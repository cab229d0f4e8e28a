"""PPO's critic: values by token, advantages by GAE, a value loss that learns."""

import math

import pytest
import torch

import fastpo
from fastpo.trainer.algorithm import resolve
from fastpo.trainer.config import AlgorithmConfig, Config, ModelConfig, OptimConfig
from fastpo.trainer.critic import Critic, beside
from fastpo.trainer.data.tasks import Problem
from fastpo.trainer.experience import Sample
from fastpo.trainer.microbatch import MicroBatch
from fastpo.trainer.model.loading import make_policy
from fastpo.trainer.rollout import Completion
from fastpo.trainer.run.errors import RecipeError, TrainerError
from fastpo.trainer.update import Learner

CPU = torch.device("cpu")
TOKENS = [[3, 4, 5], [6], [7, 8, 9, 10], [5, 4]]


def make_a_policy():
    torch.manual_seed(0)
    model = ModelConfig(hidden_size=32, layers=1, heads=2)
    return make_policy(model, CPU, alphabet="0123456789=", stop=None)


def make(optim=None, **config):
    policy, config = make_a_policy(), Config(critic=config, optim=optim or OptimConfig())
    return Critic(beside(policy, config), policy, config)


def groups_of(*rewards):
    """One group; the reward of every completion in TOKENS."""
    return [
        [
            Sample(
                problem=Problem(""),
                prompt=[11, 12],
                completion=Completion(tokens=tokens, logprobs=[-1.0] * len(tokens), finished=True),
                text="",
                score=reward,
                reward=reward,
            )
            for tokens, reward in zip(TOKENS, rewards, strict=True)
        ]
    ]


def estimated(values, reward, gamma, lam):
    """GAE by its definition: a double sum of discounted one-step errors."""
    steps = len(values)
    errors = [
        (reward if t == steps - 1 else gamma * values[t + 1]) - values[t] for t in range(steps)
    ]
    return [
        sum((gamma * lam) ** (k - t) * errors[k] for k in range(t, steps)) for t in range(steps)
    ]


@pytest.mark.parametrize("budget", [4, 10_000])
def test_advantages_are_those_of_gae_whitened_over_the_batch(budget):
    critic = make(OptimConfig(token_budget=budget), gamma=0.9, lam=0.8)
    torch.nn.init.normal_(critic.head.weight)
    groups = groups_of(1.0, 0.0, 0.5, -1.0)
    critic.assign_advantages(groups)
    plain = []
    for s in groups[0]:
        with torch.no_grad():
            values = critic.values(MicroBatch.of([s], CPU)).tolist()
        assert s.values == pytest.approx(values, abs=1e-5)
        advantages = estimated(values, s.reward, 0.9, 0.8)
        assert s.returns == pytest.approx(
            [a + v for a, v in zip(advantages, values, strict=True)], abs=1e-5
        )
        plain += advantages
    plain = torch.tensor(plain)
    whitened = (plain - plain.mean()) / (plain.var() + 1e-8).sqrt()
    found = torch.tensor([a for s in groups[0] for a in s.advantage])
    torch.testing.assert_close(found, whitened, atol=1e-4, rtol=1e-4)


def test_a_new_critic_knows_nothing_and_a_nan_reward_takes_part_in_nothing():
    critic = make()
    groups = groups_of(1.0, math.nan, 0.0, math.inf)
    critic.assign_advantages(groups)
    assert [s.live for s in groups[0]] == [True, False, True, False]
    first, _, third, _ = groups[0]
    assert first.values == [0.0] * 3 and first.returns[-1] == 1.0
    assert third.returns == [0.0] * 4 and groups[0][1].returns == []
    with pytest.raises(TrainerError, match="no reward of this batch"):
        critic.assign_advantages(groups_of(*[math.nan] * 4))


def test_a_sample_without_a_reward_has_no_old_log_probs_to_recompute():
    critic = make()
    samples = groups_of(1.0, math.nan, 0.0, math.inf)
    critic.assign_advantages(samples)
    correction = {"mode": "mask"}
    learner = Learner(make_a_policy(), OptimConfig(), fastpo.ppo(), 1.0, correction=correction)
    learner.recompute_old_logprobs(samples[0])
    assert [s.old_logprobs == s.completion.logprobs for s in samples[0]] == [False, True] * 2
    sums = learner.learn(samples[0], torch.Generator().manual_seed(0)).read()
    assert sums["sampled"] == 7


def test_the_critic_learns_what_the_reward_will_be():
    """To the bound: 4 of 10 tokens are drawn in one state, whose return is 1 or 0."""
    critic = make(OptimConfig(epochs=2, updates_per_batch=2), learning_rate=3e-3, clip=None, lam=1)
    generator, explained = torch.Generator().manual_seed(0), []
    for _ in range(25):
        groups = groups_of(1.0, 0.0, 0.0, 1.0)
        critic.assign_advantages(groups)
        metrics = critic.learn(groups[0], generator)
        explained.append(metrics["value/explained_variance"])
    assert explained[0] == pytest.approx(0.0, abs=1e-6)  # a constant explains nothing
    assert explained[-1] == pytest.approx(1 - 4 * 0.25 / (10 * 0.25), abs=0.01)
    assert metrics["value/loss"] == pytest.approx(0.5 * 4 * 0.25 / 10, abs=0.01)
    assert metrics["value/clip_ratio"] == 0.0 and metrics["value/grad_norm"] > 0
    assert all(p.grad is None for p in critic.parameters)  # REGRESSIONS 65


def test_the_critic_leaves_the_policy_alone():
    """Its trunk is a copy: the policy moves by its own loss only."""
    policy = make_a_policy()
    before = [p.detach().clone() for p in policy.model.parameters()]
    config = Config(optim=OptimConfig(epochs=2))
    critic = Critic(beside(policy, config), policy, config)
    groups = groups_of(1.0, 0.0, 0.5, 1.0)
    critic.assign_advantages(groups)
    critic.learn(groups[0], torch.Generator())
    assert all(map(torch.equal, before, policy.model.parameters()))


def test_micro_batches_change_nothing_and_clipping_bounds_a_step():
    steps = []
    for budget in (4, 10_000):
        critic = make(OptimConfig(token_budget=budget), learning_rate=1e-2)
        groups = groups_of(1.0, 0.0, 0.5, -1.0)
        critic.assign_advantages(groups)
        critic.learn(groups[0], torch.Generator())
        steps.append(critic.head.weight.detach().clone())
    torch.testing.assert_close(*steps, atol=1e-6, rtol=1e-3)
    critic = make(OptimConfig(epochs=8), learning_rate=1e-1, clip=0.01)
    groups = groups_of(1.0, 1.0, 1.0, 1.0)
    critic.assign_advantages(groups)
    assert critic.learn(groups[0], torch.Generator())["value/clip_ratio"] > 0.3


def test_non_finite_values_stop_before_the_critic_changes():
    critic = make()
    groups = groups_of(1.0, 0.0, 0.5, -1.0)
    critic.assign_advantages(groups)
    groups[0][0].returns[0] = math.inf
    before = [p.detach().clone() for p in critic.parameters]
    with pytest.raises(TrainerError, match=r"not finite.*critic\.learning_rate"):
        critic.learn(groups[0], torch.Generator())
    assert all(torch.equal(p, b) for p, b in zip(critic.parameters, before, strict=True))


def test_ppo_has_a_critic_and_others_may():
    for config, expected in (
        ({"preset": "ppo"}, True),
        ({"preset": "ppo", "critic": False}, False),
        ({"preset": "dapo"}, False),
        ({"preset": "dapo", "critic": True}, True),
    ):
        assert resolve(AlgorithmConfig(**config), 10).critic is expected
    with pytest.raises(RecipeError, match=r"algorithm\.critic=false"):
        resolve(AlgorithmConfig(preset="gspo", critic=True), 10)
