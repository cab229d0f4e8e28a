"""The sampler: log-probs of the right tokens, ends by position, padding that changes nothing."""

import collections
import math
from dataclasses import replace

import pytest
import torch

import fastpo
from fastpo.trainer import rollout
from fastpo.trainer.config import ModelConfig
from fastpo.trainer.model.loading import _wrap, character_tokenizer, make_policy
from fastpo.trainer.rollout import Sampling, sample
from fastpo.trainer.run.errors import TrainerError

CPU = torch.device("cpu")
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


def test_how_many_are_decoded_side_by_side_changes_no_completion(policy):
    """One random number per token, by row and position: no draw depends on its neighbours."""
    whole = [c.tokens for c in draw(policy)]
    for batch_size in (6, 13, 18):
        assert [c.tokens for c in draw(policy, batch_size=batch_size)] == whole


def test_looking_seldom_at_which_rows_have_ended_changes_nothing(policy, monkeypatch):
    """As on a GPU, where a look waits for it."""
    often = draw(policy, max_new_tokens=20)
    monkeypatch.setattr(rollout._Decoding, "_is_time_to_look", lambda self, step: step % 8 == 7)
    assert [c.tokens for c in draw(policy, max_new_tokens=20)] == [c.tokens for c in often]


def test_the_cache_is_appended_to_not_concatenated(policy, monkeypatch):
    """A token copies itself, and the whole cache only when its room doubles."""
    copied, rooms, grown = [], [], rollout._Buffer.update

    def update(self, keys, values, *rest):
        before = self.room
        out = grown(self, keys, values, *rest)
        copied.append(self.room is not before)
        rooms.append(self.room[0].shape[-2])
        return out

    monkeypatch.setattr(rollout._Buffer, "update", update)
    monkeypatch.setattr(policy, "stop_ids", torch.tensor([], dtype=torch.long))
    longest = draw(policy, group_size=1, max_new_tokens=64)
    assert {len(c.tokens) for c in longest} == {64}
    layers = 2
    assert len(copied) == 63 * layers and sum(copied) <= 4 * layers
    assert max(rooms) <= max(map(len, PROMPTS)) + 64
    for prompt, completion in zip(PROMPTS, longest, strict=True):
        expected = rescored(policy, prompt, completion.tokens, 0.7)
        found = torch.tensor(completion.logprobs, dtype=torch.float64)
        torch.testing.assert_close(found, expected, atol=5e-5, rtol=0)


def test_keys_are_kept_as_attention_takes_them(policy, monkeypatch):
    """In bfloat16, of half the size, with the same completions and log-probs bit for bit."""
    low = replace(policy, config=replace(policy.config, dtype="bfloat16"))
    found, kinds, grow = [], [], rollout.growing

    def growing(cache, dtype, longest):
        kinds.append((cache.layers[0].keys.dtype, dtype))
        return grow(cache, dtype if len(kinds) == 1 else torch.float32, longest)

    monkeypatch.setattr(rollout, "growing", growing)
    for _ in range(2):
        found.append(draw(low, max_new_tokens=20))
    assert found[0] == found[1] and kinds == [(torch.float32, torch.bfloat16)] * 2


def test_a_greedy_group_is_decoded_once(policy, monkeypatch):
    rows, honest = [], rollout.choose
    monkeypatch.setattr(
        rollout, "choose", lambda logits, *rest: rows.append(len(logits)) or honest(logits, *rest)
    )
    group = draw(policy, [[3, 4]], group_size=5, temperature=0.0)
    assert set(rows) == {1} and len(group) == 5 and len({tuple(c.tokens) for c in group}) == 1


@pytest.mark.parametrize("every", [1, 8])
def test_a_stop_string_that_no_token_holds_ends_a_completion(policy, monkeypatch, every):
    """REGRESSIONS 46: matched on text, and nothing behind it counts."""
    free = draw(policy, group_size=50, max_new_tokens=20)
    stop = collections.Counter(
        text[i : i + 2] for c in free if len(text := policy.decode(c.tokens)) > 4 for i in (2,)
    ).most_common(1)[0][0]
    monkeypatch.setattr(policy, "stop", stop)
    monkeypatch.setattr(
        rollout._Decoding, "_is_time_to_look", lambda self, step: step % every == every - 1
    )
    stopped = draw(policy, group_size=50, max_new_tokens=20)
    assert sum(stop in policy._text(c.tokens) for c in stopped) > 3
    for whole, completion in zip(free, stopped, strict=True):
        text = policy._text(whole.tokens)
        if stop in text:
            assert policy._text(completion.tokens) == text[: text.index(stop) + 2]
            assert completion.finished and policy.decode(completion.tokens) == text.split(stop)[0]
            assert len(completion.logprobs) == len(completion.tokens)
        else:
            assert completion.tokens == whole.tokens


def test_unequal_prompts_and_learned_positions():
    """Left padding must not shift positions: GPT-2 sees the difference, rotary models do not."""
    import transformers

    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=14, n_embd=32, n_layer=1, n_head=2, eos_token_id=1, bos_token_id=1
    )
    model = transformers.GPT2LMHeadModel(config)
    for parameter in model.parameters():
        parameter.data.mul_(3)
    gpt2 = _wrap(model, character_tokenizer("0123456789="), ModelConfig(), CPU, None)
    for index, completion in enumerate(draw(gpt2)):
        expected = rescored(gpt2, PROMPTS[index // 6], completion.tokens, 0.7)
        found = torch.tensor(completion.logprobs, dtype=torch.float64)
        torch.testing.assert_close(found, expected, atol=5e-5, rtol=0)


def test_choices_follow_the_distribution_to_its_ends():
    logits = torch.tensor([[0.0, -math.inf, 2.0, -math.inf]]).expand(4, 4)
    noise = torch.tensor([0.0, 0.1, 0.2, 1 - 2**-53], dtype=torch.float64)
    sampling = Sampling(group_size=1, max_new_tokens=1)
    tokens, logprobs, keep = rollout.choose(logits, sampling, noise)
    assert keep is None
    assert tokens.tolist() == [0, 0, 2, 2]  # exp(0) / (exp(0) + exp(2)) = 0.12
    expected = logits.log_softmax(-1).gather(1, tokens[:, None]).squeeze(1)
    torch.testing.assert_close(logprobs, expected)


def test_a_draw_of_zero_takes_no_impossible_token():
    logits = torch.tensor([[-math.inf, -math.inf, 0.0, 1.0]])
    sampling, noise = Sampling(group_size=1, max_new_tokens=1), torch.zeros(1, dtype=torch.float64)
    assert rollout.choose(logits, sampling, noise)[0].tolist() == [2]


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({}, [0, 1, 2, 3, 4]),
        ({"top_k": 2}, [0, 1]),
        ({"top_k": 9}, [0, 1, 2, 3, 4]),
        ({"top_p": 0.5}, [0]),
        ({"top_p": 0.51}, [0, 1]),
        ({"top_p": 0.76}, [0, 1, 2, 3]),  # equally likely ones stay together
        ({"min_p": 0.2}, [0, 1, 2, 3]),
        ({"min_p": 0.3}, [0, 1]),
        ({"top_k": 2, "top_p": 0.6}, [0]),  # two thirds of what top-k left
    ],
)
@pytest.mark.parametrize("kept_sets", [True, False])
def test_only_likely_tokens_are_drawn(options, kept, kept_sets):
    """REGRESSIONS 45: with log-probs over them, or, if asked for, of the whole vocabulary."""
    probs = torch.tensor([0.5, 0.25, 0.11, 0.11, 0.03]).flip(0)
    sampling = Sampling(group_size=1, max_new_tokens=1, kept_sets=kept_sets, **options)
    noise = torch.arange(1000, dtype=torch.float64) / 1000
    tokens, logprobs, keep = rollout.choose(probs.log().expand(1000, 5), sampling, noise)
    assert sorted({4 - t for t in tokens.tolist()}) == kept
    mass = probs.flip(0)[kept].sum()
    assert (keep is not None) == (kept_sets and bool(options))
    assert keep is None or keep.sum(1).eq(len(kept)).all()
    torch.testing.assert_close(logprobs, (probs / (1 if keep is None else mass)).log()[tokens])
    share = probs.flip(0)[kept] / mass
    drawn = torch.tensor([(tokens == 4 - t).double().mean() for t in kept])
    torch.testing.assert_close(drawn, share.double(), atol=2e-3, rtol=0)


@pytest.mark.parametrize("stop", [None, "9"])
def test_the_kept_sets_of_every_token_come_with_a_completion(policy, monkeypatch, stop):
    """Rows that end at different times, by token or text, and the sets of a full forward pass."""
    monkeypatch.setattr(policy, "stop", stop)
    options = {"top_k": 6, "top_p": 0.8, "min_p": 0.02}
    completions = draw(policy, **options)
    assert len({len(c.tokens) for c in completions}) > 2
    for index, completion in enumerate(completions):
        prompt, at = PROMPTS[index // 6], completion.kept_offsets
        with torch.no_grad():
            ids = torch.tensor([prompt + completion.tokens[:-1]])
            logits = policy.model(input_ids=ids).logits[0, len(prompt) - 1 :]
        right = fastpo.kept_from_logits(logits, temperature=0.7, **options)
        assert right.kept_offsets.tolist() == at
        assert right.kept_tokens.tolist() == completion.kept_tokens
        scored = fastpo.token_logprobs(
            logits, torch.tensor(completion.tokens), temperature=0.7, **right._asdict()
        ).logprobs
        found = torch.tensor(completion.logprobs)
        torch.testing.assert_close(found, scored, atol=2e-5, rtol=0)
    assert (
        not draw(policy)[0].kept_offsets
        and not draw(policy, **options, kept_sets=False)[0].kept_offsets
    )


def test_non_finite_logits_are_one_clear_line(policy, monkeypatch):
    weight = policy.model.get_output_embeddings().weight
    kept = weight.data.clone()
    weight.data.fill_(float("nan"))
    try:
        for options in ({}, {"top_p": 0.9}):
            with pytest.raises(TrainerError, match="not finite"):
                draw(policy, **options)
    finally:
        weight.data.copy_(kept)
