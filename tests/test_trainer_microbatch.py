"""Micro-batches: any cut gives the same update; prompts are shared, positions the right ones."""

import dataclasses

import pytest
import torch
from learner_cases import CPU, PROMPTS, gradients, make, samples_of

import fastpo
from fastpo.trainer.microbatch import MicroBatch, by_token_budget
from fastpo.trainer.rollout import Completion
from fastpo.trainer.update import Sums


@pytest.mark.parametrize(
    "objective", [fastpo.dapo(), fastpo.grpo(), fastpo.gspo()], ids=lambda o: o.name
)
def test_any_cut_into_micro_batches_gives_the_same_update(objective):
    """REGRESSIONS 3, 16, 30: one global normalizer, metrics summed over the step; any layout."""
    learner = make(objective=objective, max_grad_norm=1e9)
    samples = samples_of(learner.policy)
    whole, sums = gradients(learner, samples, on_policy=False)
    for budget, packing, share in (
        *((1, False, False), (30, False, False), (60, False, False)),
        *((60, True, False), (10_000, True, True)),
        *((1, False, True), (60, False, True), (10_000, False, True)),
    ):
        learner.config.token_budget, learner.config.packing = budget, packing
        learner.config.share_prompts = share
        cut, cut_sums = gradients(learner, samples, on_policy=False)
        torch.testing.assert_close(cut, whole, atol=1e-6, rtol=1e-4)
        for name in ("loss", "tokens", "entropy"):
            assert cut_sums[name] == pytest.approx(sums[name], rel=1e-5, abs=1e-6)
    assert whole.norm() > 1e-3


def test_micro_batches_keep_to_the_budget_and_lose_nothing():
    samples = [
        dataclasses.replace(
            s, completion=Completion(tokens=[3] * n, logprobs=[0.0] * n, finished=True)
        )
        for n, s in enumerate(samples_of(make().policy), start=1)
    ]
    samples = [samples[(5 * n) % len(samples)] for n in range(len(samples))]  # not by length
    for packed in (False, True):
        parts = list(by_token_budget(samples, 40, packed=packed))
        assert sum(len(part) for part in parts) == len(samples) and len(parts) > 2
        for part in parts:
            widths = [len(s.prompt) + s.length for s in part]
            assert len(part) == 1 or (sum(widths) if packed else max(widths) * len(part)) <= 40


def test_shared_prompts_meet_the_model_once(monkeypatch):
    learner = make(share_prompts=True)
    samples, seen = samples_of(learner.policy), []
    forward = learner.policy.model.base_model.forward

    def counted(input_ids, **rest):
        seen.append(input_ids.shape)
        return forward(input_ids=input_ids, **rest)

    learner.policy.head()  # which runs the model once to compare
    monkeypatch.setattr(learner.policy.model.base_model, "forward", counted)
    learner.update(samples, Sums(), on_policy=True)
    longest = max(s.length for s in samples)
    assert seen == [(len(PROMPTS), max(map(len, PROMPTS))), (len(samples), longest - 1)]
    for s in samples:  # a completion of one token is predicted by its prompt alone
        del s.completion.tokens[1:], s.completion.logprobs[1:]
    seen.clear()
    learner.update(samples, Sums(), on_policy=True)
    assert len(seen) == 1


def test_micro_batch_picks_the_positions_that_predict_completion_tokens():
    learner = make()
    batch = MicroBatch.of(samples_of(learner.policy), CPU, packed=False)
    assert batch.cu_seqlens[-1] == len(batch.tokens)
    layout = batch.layout
    first = layout.columns[batch.cu_seqlens[:-1].long()]
    assert first.tolist() == [len(PROMPTS[index // 4]) - 1 for index in range(12)]
    inside = layout.ids[layout.rows, (layout.columns + 1).clamp(max=layout.ids.shape[1] - 1)]
    ends = torch.zeros(len(batch.tokens), dtype=torch.bool)
    ends[batch.cu_seqlens[1:].long() - 1] = True
    assert torch.equal(inside[~ends], batch.tokens[~ends])
