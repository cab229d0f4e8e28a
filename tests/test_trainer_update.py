"""Updates: the loss of a mini-batch does not depend on how it is cut, and says what it should."""

import dataclasses

import pytest
import torch
from learner_cases import CPU, gradients, make, samples_of

import fastpo
from fastpo.trainer.algorithm import PRESETS, resolve
from fastpo.trainer.config import AlgorithmConfig, OptimConfig
from fastpo.trainer.data.tasks import Problem
from fastpo.trainer.microbatch import MicroBatch
from fastpo.trainer.run.errors import TrainerError
from fastpo.trainer.update import Learner, Sums, rate_factor
from fastpo.trainer.warmup import reference_sample


def test_the_gradient_is_that_of_the_whole_model_with_materialized_logits():
    learner = make(max_grad_norm=1e9)
    samples = samples_of(learner.policy)
    gradient, _ = gradients(learner, samples)
    model, terms, tokens = learner.policy.model, [], 0
    model.zero_grad()
    for s in samples:
        ids = torch.tensor([s.prompt + s.completion.tokens])
        logits = model(input_ids=ids[:, :-1]).logits[0, len(s.prompt) - 1 :] / 0.8
        logprobs = logits.log_softmax(-1).gather(1, ids[0, len(s.prompt) :, None]).squeeze(1)
        terms.append((-s.advantage * (logprobs - logprobs.detach()).exp()).sum())
        tokens += s.length
    (sum(terms) / tokens).backward()
    expected = torch.cat([p.grad.flatten() for p in learner.parameters])
    torch.testing.assert_close(gradient, expected, atol=1e-6, rtol=1e-4)


def test_no_gradient_outlives_its_update():
    """REGRESSIONS 65: a rollout has their room; those of a critic go before the policy's come."""
    learner, alive = make(updates_per_batch=2), []
    learner.optimizer.register_step_pre_hook(
        lambda *_: alive.append(all(p.grad is not None for p in learner.parameters))
    )
    learner.learn(samples_of(learner.policy), torch.Generator().manual_seed(0))
    assert alive == [True, True] and all(p.grad is None for p in learner.parameters)


def test_on_policy_the_loss_is_about_zero_nothing_is_clipped_and_the_policy_moves():
    learner = make()
    samples = samples_of(learner.policy, advantages=torch.tensor([1.0, -1.0] * 6))
    for s in samples:  # equal lengths, so that the mean advantage is exactly 0
        s.completion = dataclasses.replace(
            s.completion, tokens=s.completion.tokens[:1], logprobs=s.completion.logprobs[:1]
        )
    gradient, sums = gradients(learner, samples)
    assert sums["loss"] == pytest.approx(0, abs=1e-6)
    assert sums["clip_low"] == sums["clip_high"] == 0
    assert gradient.norm() > 1e-3


def test_later_updates_on_one_batch_are_off_policy_and_clip():
    learner = make(updates_per_batch=2, epochs=3, learning_rate=3e-2, max_grad_norm=100.0)
    sums = learner.learn(samples_of(learner.policy), torch.Generator().manual_seed(0)).read()
    assert sums["updates"] == 6
    assert sums["clip_low"] + sums["clip_high"] > 0
    assert sums["old_kl"] > 0


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_makes_an_update(preset):
    learner = make(objective=resolve(AlgorithmConfig(preset=preset), 7).objective)
    gradient, sums = gradients(learner, samples_of(learner.policy), on_policy=False)
    assert gradient.isfinite().all() and gradient.norm() > 1e-4
    assert sums["updates"] == 1


def test_log_probs_of_the_sampler_are_those_of_the_update():
    """REGRESSIONS 13: the temperature of sampling is the temperature of the loss."""
    learner = make()
    _, sums = gradients(learner, samples_of(learner.policy), on_policy=False)
    assert sums["sampled_difference"] / sums["sampled"] < 1e-5
    assert sums["ratio"] / sums["tokens"] == pytest.approx(1, abs=1e-5)


def test_old_log_probs_can_be_recomputed_by_the_policy_of_the_update():
    """REGRESSIONS 41: the difference measured is that to the sampler's, which stay as they are."""
    learner = make(updates_per_batch=2, old_logprobs="recompute")
    samples = samples_of(learner.policy)
    sampled = [list(s.completion.logprobs) for s in samples]
    for s in samples:
        s.completion.logprobs = [p - 0.25 for p in s.completion.logprobs]
    sums = learner.learn(samples, torch.Generator().manual_seed(0)).read()
    for s, expected in zip(samples, sampled, strict=True):
        assert s.old_logprobs == pytest.approx(expected, abs=1e-5)
    assert sums["sampled_difference"] / sums["sampled"] == pytest.approx(0.25, abs=1e-4)
    assert sums["ratio"] / sums["tokens"] == pytest.approx(1, abs=0.2)


def test_samples_without_loss_change_nothing_whatever_they_hold():
    """REGRESSIONS 17."""
    learner = make(max_grad_norm=1e9)
    samples = samples_of(learner.policy)
    expected, _ = gradients(learner, samples[:7])
    for s in samples[7:]:
        s.live, s.advantage = False, float("nan")
    gradient, _ = gradients(learner, samples)
    torch.testing.assert_close(gradient, expected, atol=0, rtol=0)
    for s in samples:
        s.live = False
    sums = Sums()
    learner.update(samples, sums, on_policy=True)
    assert learner.updates == 3 and not sums


def test_dead_samples_count_as_sequences():
    """A mean over sequences divides by all of them: filtering must not turn the step up."""
    learner = make(objective=fastpo.grpo(), max_grad_norm=1e9)
    samples = samples_of(learner.policy)
    alone, _ = gradients(learner, samples[:7])
    for s in samples[7:]:
        s.live = False
    gradient, _ = gradients(learner, samples)
    torch.testing.assert_close(gradient, alone * 7 / 12, atol=1e-7, rtol=1e-5)


def test_a_non_finite_gradient_under_a_finite_loss_stops_before_the_parameters_change(monkeypatch):
    learner = make()
    samples = samples_of(learner.policy)
    before = [p.detach().clone() for p in learner.parameters]
    honest = Learner._loss

    def poisoned(self, *arguments):
        result = honest(self, *arguments)
        root = (learner.parameters[0] * 0).sum().sqrt()  # 0, with a gradient of 0 * inf
        return result._replace(loss=result.loss + root)

    monkeypatch.setattr(Learner, "_loss", poisoned)
    with pytest.raises(TrainerError, match="gradient norm nan: not finite"):
        learner.update(samples, Sums(), on_policy=True)
    assert all(torch.equal(p, b) for p, b in zip(learner.parameters, before, strict=True))
    assert not learner.optimizer.state


def test_epochs_take_the_samples_in_another_order_by_the_given_generator(monkeypatch):
    learner, seen = make(epochs=3, updates_per_batch=2), []
    samples = samples_of(learner.policy)
    monkeypatch.setattr(
        Learner, "update", lambda self, part, *_, **__: seen.append([id(s) for s in part])
    )
    orders = []
    for seed in (0, 0, 1):
        torch.manual_seed(len(orders))  # the global generator has no say
        learner.learn(samples, torch.Generator().manual_seed(seed))
        orders.append([a + b for a, b in zip(seen[::2], seen[1::2], strict=True)])
        seen.clear()
    assert orders[0] == orders[1] != orders[2]
    assert len(set(map(tuple, orders[0]))) == 3
    assert all(sorted(order) == sorted(map(id, samples)) for order in orders[0])


def test_the_recipe_reaches_the_optimizer_and_scores_keep_no_graph():
    learner = make(beta1=0.7, beta2=0.8, weight_decay=0.3)
    group = learner.optimizer.param_groups[0]
    assert (group["betas"], group["weight_decay"]) == ((0.7, 0.8), 0.3)
    scored = learner._score(learner.policy, MicroBatch.of(samples_of(learner.policy), CPU))
    assert not scored.requires_grad and scored.isfinite().all()


def test_the_difference_to_the_sampler_is_that_of_the_first_update_alone():
    learner = make(updates_per_batch=2, learning_rate=3e-2, max_grad_norm=100.0)
    samples = samples_of(learner.policy)
    sums = learner.learn(samples, torch.Generator().manual_seed(0)).read()
    assert 0 < sums["sampled"] < sum(s.length for s in samples)
    assert sums["sampled_difference"] / sums["sampled"] < 1e-5


@pytest.mark.parametrize("rate", [1e-5, 1e-6])
def test_bfloat16_moves_the_weights_as_float32_does(rate):
    """REGRESSIONS 34: rounded into bfloat16 weights, most of such steps are lost."""
    moved = []
    for dtype in ("float32", "bfloat16"):
        learner = make(learning_rate=rate, temperature=1.0, objective=fastpo.reinforce())
        learner.policy.config = dataclasses.replace(learner.policy.config, dtype=dtype)
        before = torch.cat([p.detach().flatten() for p in learner.parameters])
        answers = [
            reference_sample(learner.policy, Problem(f"{n}="), str(n)[::-1]) for n in range(40, 60)
        ]
        for _ in range(10):
            learner.update(answers, Sums(), on_policy=True)
        moved.append(torch.cat([p.detach().flatten() for p in learner.parameters]) - before)
    exact, low = moved
    assert (low != 0).float().mean() > 0.95
    assert torch.cosine_similarity(exact, low, dim=0) > 0.98
    assert low.norm() / exact.norm() == pytest.approx(1, abs=0.02)


def test_a_non_finite_loss_stops_before_the_parameters_change():
    learner = make()
    samples = samples_of(learner.policy)
    samples[3].advantage = float("inf")
    before = [p.detach().clone() for p in learner.parameters]
    with pytest.raises(TrainerError, match="not finite"):
        learner.update(samples, Sums(), on_policy=True)
    assert all(torch.equal(p, b) for p, b in zip(learner.parameters, before, strict=True))


def test_the_reference_policy_enters_as_kl():
    learner = make(objective=fastpo.dapo(kl_coef=0.5))
    learner.reference = make(seed=5).policy
    _, sums = gradients(learner, samples_of(learner.policy))
    assert sums["ref_kl"] > 0
    learner.reference = learner.policy
    _, sums = gradients(learner, samples_of(learner.policy))
    assert sums["ref_kl"] == pytest.approx(0, abs=1e-5)


def test_warm_up_is_maximum_likelihood_end_token_included():
    """REGRESSIONS 20: the end token is learned."""
    learner = make(temperature=1.0, objective=fastpo.reinforce(), max_grad_norm=1e9)
    policy = learner.policy
    answers = [
        reference_sample(policy, Problem(*pair), pair[1]) for pair in (("31=", "13"), ("5=", "5"))
    ]
    gradient, _ = gradients(learner, answers)
    policy.model.zero_grad()
    losses = []
    for s in answers:
        assert s.completion.tokens[-1] == policy.tokenizer.eos_token_id
        ids = torch.tensor([s.prompt + s.completion.tokens])
        logits = policy.model(input_ids=ids).logits[0, len(s.prompt) - 1 : -1]
        target = ids[0, len(s.prompt) :]
        losses.append(torch.nn.functional.cross_entropy(logits, target, reduction="sum"))
    (sum(losses) / sum(s.length for s in answers)).backward()
    expected = torch.cat([p.grad.flatten() for p in learner.parameters])
    torch.testing.assert_close(gradient, expected, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize(
    ("decay", "expected"),
    [
        ("constant", [0.25, 0.5, 0.75, 1.0, 1.0, 1.0, 1.0, 1.0]),
        ("linear", [0.25, 0.5, 0.75, 1.0, 1.0, 0.75, 0.5, 0.25]),
        ("cosine", [0.25, 0.5, 0.75, 1.0, 1.0, (1 + 0.5**0.5) / 2, 0.5, (1 - 0.5**0.5) / 2]),
    ],
)
def test_learning_rate_rises_linearly_then_stays_or_falls(decay, expected):
    config = OptimConfig(warmup_steps=4, decay=decay)
    assert [rate_factor(config, 8, n) for n in range(8)] == pytest.approx(expected)
    assert rate_factor(config, 8, 8) == pytest.approx(float(decay == "constant"))


def test_the_optimizer_follows_the_schedule_also_after_a_checkpoint():
    """A loaded learner has the moments and the count, but its own recipe's rate, decay, betas."""
    learner = make(learning_rate=1e-2, decay="linear", total_updates=4)
    samples = samples_of(learner.policy)
    used = []
    for _ in range(2):
        learner.update(samples, Sums(), on_policy=True)
        used.append(learner.optimizer.param_groups[0]["lr"])
    assert used == pytest.approx([1e-2, 0.75e-2])
    longer = make(learning_rate=4e-2, decay="linear", weight_decay=0.1, total_updates=8)
    longer.load_state_dict(learner.state_dict())
    group = longer.optimizer.param_groups[0]
    assert longer.updates == 2 and group["weight_decay"] == 0.1
    assert longer.learning_rate == pytest.approx(3e-2)
    moments = longer.optimizer.state[longer.parameters[0]]["exp_avg"]
    expected = learner.optimizer.state[learner.parameters[0]]["exp_avg"]
    assert torch.equal(moments, expected) and moments.any()


@pytest.mark.parametrize("old", ["sampler", "recompute"])
def test_the_ratio_starts_at_one_under_top_p(old):
    """REGRESSIONS 45: all log-probs are over what was drawn from, or all of the vocabulary."""
    learner = make(old_logprobs=old)
    for parameter in learner.policy.model.parameters():  # far from uniform
        parameter.data.mul_(2)
    for kept_sets in (True, False):
        samples = samples_of(learner.policy, top_p=0.7, kept_sets=kept_sets)
        if old == "recompute":
            learner.recompute_old_logprobs(samples)
        _, sums = gradients(learner, samples, on_policy=False)
        assert sums["ratio"] / sums["tokens"] == pytest.approx(1, abs=1e-5)
        assert sums["sampled_difference"] / sums["sampled"] < 1e-5
        assert bool(MicroBatch.of(samples, CPU).kept) == kept_sets
    kept = samples_of(learner.policy, top_p=0.7)
    over_kept, over_all = (
        torch.tensor([p for s in x for p in s.completion.logprobs]) for x in (kept, samples)
    )
    assert (over_kept - over_all).mean() > 0.1  # they do differ


def test_samples_with_and_without_kept_sets_in_one_batch():
    learner = make()
    kept, free = samples_of(learner.policy, top_p=0.7)[:3], samples_of(learner.policy)[:2]
    batch = MicroBatch.of([*kept, *free], CPU)
    scored = learner._score(learner.policy, batch)
    torch.testing.assert_close(scored, batch.sampled_logprobs, atol=2e-5, rtol=0)
    whole = sum(s.length for s in free)
    assert batch.kept["dense_rows"] == whole  # what the host tells a GPU
    for each in (*kept, *free):  # a correction masks every other token
        each.weights, each.mask = [1.0] * each.length, [i % 2 == 0 for i in range(each.length)]
        each.old_logprobs = each.completion.logprobs
    batch = MicroBatch.of([*kept, *free], CPU)
    options = batch.loss_options()
    assert options["dense_rows"] == sum(sum(s.mask) for s in free) < whole
    assert learner._loss(batch, 1, on_policy=False).loss.isfinite()
    assert learner._loss(batch.idle(), 1, on_policy=False).loss == 0
