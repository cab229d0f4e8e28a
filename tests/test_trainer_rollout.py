"""The sampler: log-probs of the right tokens, ends by position, padding that changes nothing."""

import pytest
import torch

from fastpo.trainer.config import ModelConfig
from fastpo.trainer.policy import make_policy
from fastpo.trainer.rollout import Sampling, sample
from fastpo.trainer.run.errors import TrainerError

PROMPTS = [[3, 4, 5], [6], [7, 8, 9, 10, 11], [12, 3]]


@pytest.fixture(scope="module")
def policy():
    torch.manual_seed(0)
    config = ModelConfig(hidden_size=32, layers=2, heads=2)
    made = make_policy(config, torch.device("cpu"), alphabet="0123456789=", stop=None)
    for parameter in made.model.parameters():  # far from uniform, so that mistakes show
        parameter.data.mul_(2)
    return made


def draw(policy, prompts=PROMPTS, *, seed=0, temperature=0.7, max_new_tokens=12, **options):
    options = {"group_size": 6, "max_new_tokens": max_new_tokens, **options}
    sampling = Sampling(temperature=temperature, **options)
    return sample(policy, prompts, sampling, torch.Generator().manual_seed(seed))


@torch.no_grad()
def rescored(policy, prompt, tokens, temperature):
    logits = policy.model(input_ids=torch.tensor([prompt + tokens[:-1]])).logits[0].double()
    logprobs = (logits[len(prompt) - 1 :] / temperature).log_softmax(-1)
    return logprobs.gather(1, torch.tensor(tokens)[:, None]).squeeze(1)


def test_logprobs_are_those_of_the_full_model_under_the_temperature(policy):
    """REGRESSIONS 13, and left padding, cache copies and dropped rows change nothing."""
    completions = draw(policy)
    lengths = {len(completion.tokens) for completion in completions}
    assert len(lengths) > 3  # rows really end at different times
    for index, completion in enumerate(completions):
        expected = rescored(policy, PROMPTS[index // 6], completion.tokens, 0.7)
        torch.testing.assert_close(
            torch.tensor(completion.logprobs, dtype=torch.float64), expected, atol=2e-5, rtol=0
        )


def test_greedy_equals_generate(policy):
    completions = draw(policy, temperature=0.0, group_size=1)
    for prompt, completion in zip(PROMPTS, completions, strict=True):
        output = policy.model.generate(
            torch.tensor([prompt]), do_sample=False, max_new_tokens=12, pad_token_id=0
        )
        assert output[0, len(prompt) :].tolist() == completion.tokens


def test_a_completion_ends_with_its_first_stop_token(policy):
    stop = set(policy.stop_ids.tolist())
    for completion in draw(policy):
        assert not stop & set(completion.tokens[:-1])
        assert completion.finished == (completion.tokens[-1] in stop)
        assert completion.finished or len(completion.tokens) == 12


def test_every_end_token_counts_even_one_that_doubles_as_padding(policy, monkeypatch):
    """REGRESSIONS 20: several end tokens, one of them the id that fills the unused slots."""
    monkeypatch.setattr(policy, "stop_ids", torch.tensor([0, policy.tokenizer.eos_token_id]))
    ended = [c for c in draw(policy) if c.finished]
    assert {c.tokens[-1] for c in ended} == {0, policy.tokenizer.eos_token_id}
    assert all(len(c.tokens) == len(c.logprobs) for c in ended)


def test_samples_follow_the_models_distribution(policy):
    completions = draw(policy, [[3, 4]], group_size=4000, max_new_tokens=1, batch_size=4000)
    counts = torch.bincount(torch.tensor([c.tokens[0] for c in completions]), minlength=14)
    with torch.no_grad():
        logits = policy.model(input_ids=torch.tensor([[3, 4]])).logits[0, -1]
    expected = (logits / 0.7).softmax(-1) * 4000
    chi_square = ((counts - expected).square() / expected.clamp(min=1)).sum()
    assert chi_square < 50  # 13 degrees of freedom: p < 1e-5


def test_the_seed_decides_and_batches_do_not_change_which_prompt_is_answered(policy):
    assert draw(policy, seed=1) == draw(policy, seed=1)
    assert draw(policy, seed=1) != draw(policy, seed=2)
    whole = draw(policy, temperature=0.0, group_size=2)
    cut = draw(policy, temperature=0.0, group_size=2, batch_size=2)
    assert [c.tokens for c in whole] == [c.tokens for c in cut]


def test_non_finite_logits_are_one_clear_line(policy, monkeypatch):
    weight = policy.model.get_output_embeddings().weight
    kept = weight.data.clone()
    weight.data.fill_(float("nan"))
    try:
        with pytest.raises(TrainerError, match="not finite"):
            draw(policy)
    finally:
        weight.data.copy_(kept)
