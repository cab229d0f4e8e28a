"""The policy: its tokenizer, its head as real architectures have it, and what it saves."""

import dataclasses

import pytest
import torch
import transformers

import fastpo
from fastpo.trainer.config import ModelConfig
from fastpo.trainer.data.tasks import Problem
from fastpo.trainer.experience import Sample
from fastpo.trainer.microbatch import MicroBatch
from fastpo.trainer.model.loading import character_tokenizer, load_policy, make_policy, stop_ids
from fastpo.trainer.rollout import Completion
from fastpo.trainer.run.errors import RecipeError, TrainerError
from fastpo.trainer.warmup import reference_sample

CPU = torch.device("cpu")
ALPHABET = "0123456789= \n"
SIZES = {
    "vocab_size": 16,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
}


def build(**options):
    torch.manual_seed(0)
    config = ModelConfig(hidden_size=32, layers=1, heads=2)
    return make_policy(config, CPU, alphabet=ALPHABET, **{"stop": None, **options})


def save_model(tmp_path, config):
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    character_tokenizer(ALPHABET).save_pretrained(tmp_path)
    return tmp_path


def test_characters_survive_a_round_trip_with_spaces_and_newlines():
    policy = build()
    ids = policy.encode("3 1=\n 4")
    assert len(ids) == 7 and policy.decode(ids) == "3 1=\n 4"
    answer = policy.encode_answer("14")
    assert answer[-1] == policy.tokenizer.eos_token_id and policy.decode(answer) == "14"


@pytest.mark.parametrize("prompt", ["", "12+3="])
def test_a_prompt_the_vocabulary_lacks_is_an_error(prompt):
    with pytest.raises(TrainerError, match="alphabet"):
        build().encode(prompt)


def test_a_stop_string_ends_the_text_and_its_tokens_end_the_completion():
    policy = build(stop="\n")
    newline = policy.tokenizer.convert_tokens_to_ids("\n")
    assert set(policy.stop_ids.tolist()) == {newline, policy.tokenizer.eos_token_id}
    assert policy.decode(policy.encode("12\n34")) == "12"


def test_every_end_token_of_the_generation_config_stops():
    """REGRESSIONS 20: secondary EOS ids."""
    policy = build()
    policy.model.generation_config.eos_token_id = [1, 5, 7]
    assert stop_ids(policy.model, policy.tokenizer, None) == [1, 5, 7]


def test_a_saved_policy_is_a_hugging_face_model(tmp_path):
    policy = build()
    policy.save(tmp_path)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    ids = tokenizer("31=", return_tensors="pt")["input_ids"]
    assert ids[0].tolist() == policy.encode("31=")
    assert torch.equal(model(ids).logits, policy.model(ids).logits)
    again = load_policy(tmp_path, ModelConfig(), CPU, stop=None)
    assert again.stop_ids.tolist() == policy.stop_ids.tolist()


@pytest.mark.parametrize(
    "config",
    [
        transformers.CohereConfig(**SIZES, logit_scale=0.25),
        transformers.GraniteConfig(**SIZES, logits_scaling=3.0),
        transformers.Gemma2Config(**SIZES, final_logit_softcapping=2.0),
        transformers.PhiConfig(**{k: v for k, v in SIZES.items() if k != "head_dim"}),
        transformers.Qwen2Config(**SIZES, tie_word_embeddings=False),
    ],
    ids=lambda config: config.model_type,
)
def test_heads_with_bias_scale_and_softcap_reach_the_op(tmp_path, config):
    """REGRESSIONS 24: log-probs by the linear op are those of the model's own logits."""
    config.eos_token_id, config.pad_token_id, config.bos_token_id = 1, 0, None
    policy = load_policy(save_model(tmp_path, config), ModelConfig(), CPU, stop=None)
    with torch.no_grad():
        head = policy.model.get_output_embeddings()
        head.weight.mul_(20)
        if head.bias is not None:
            head.bias.normal_()
        ids = torch.randint(2, 16, (2, 9))
        expected = policy.model(input_ids=ids).logits.log_softmax(-1)[:, :-1]
        expected = expected.gather(2, ids[:, 1:, None]).squeeze(2)
        hidden = policy.hidden_states(ids)[:, :-1].reshape(-1, 32)
        got = fastpo.linear_token_logprobs(hidden, tokens=ids[:, 1:].flatten(), **policy.head())
    torch.testing.assert_close(got.logprobs.view(2, 8), expected, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "config",
    [
        transformers.Gemma2Config(**SIZES, sliding_window=4),
        transformers.GPT2Config(vocab_size=16, n_embd=32, n_layer=2, n_head=2),
    ],
    ids=lambda config: config.model_type,
)
def test_shared_prompts_give_the_hidden_states_and_gradients_of_whole_rows(tmp_path, config):
    """Through the caches of architectures: sliding windows shorter than a prompt, left padding."""
    config.eos_token_id, config.pad_token_id, config.bos_token_id = 1, 0, None
    policy = load_policy(save_model(tmp_path, config), ModelConfig(), CPU, stop=None)
    samples = [
        Sample(
            problem=Problem("", ""),
            prompt=prompt,
            completion=Completion(tokens=tokens, logprobs=[0.0] * len(tokens), finished=True),
            text="",
            score=0.0,
            reward=0.0,
        )
        for prompt in ([3, 4, 5, 6, 7, 8], [9, 10])
        for tokens in ([4], [5, 6, 7], [8, 9, 10, 11, 12, 13])
    ]
    found = []
    for share in (False, True):
        policy.model.zero_grad()
        hidden = MicroBatch.of(samples, CPU, share=share).hidden(policy)
        torch.manual_seed(1)
        (hidden * torch.randn_like(hidden)).sum().backward()
        gradients = [p.grad for p in policy.model.parameters() if p.grad is not None]
        found.append([hidden.detach(), *(gradient.clone() for gradient in gradients)])
    for rows, shared in zip(*found, strict=True):
        torch.testing.assert_close(shared, rows, atol=1e-5 * rows.abs().max().item(), rtol=1e-4)


def test_missing_models_and_missing_weights_are_one_line(tmp_path):
    with pytest.raises(RecipeError, match="cannot load a model") as caught:
        load_policy(tmp_path / "absent", ModelConfig(), CPU, stop=None)
    assert "\n" not in str(caught.value)
    build().save(tmp_path)
    from safetensors.torch import load_file, save_file

    weights = load_file(tmp_path / "model.safetensors")
    weights.pop("model.norm.weight")
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(RecipeError, match="incomplete"):
        load_policy(tmp_path, ModelConfig(), CPU, stop=None)


def test_a_bfloat16_policy_is_float32_weights_and_equals_its_own_checkpoint(tmp_path):
    """REGRESSIONS 35: rotary buffers are not rounded, in memory or on disk."""
    torch.manual_seed(0)
    config = ModelConfig(hidden_size=32, layers=1, heads=2, dtype="bfloat16")
    policy = make_policy(config, CPU, alphabet=ALPHABET, stop=None)
    policy.save(tmp_path)
    again = load_policy(tmp_path, config, CPU, stop=None)
    assert {p.dtype for p in again.model.parameters()} == {torch.float32}
    ids = torch.randint(3, 16, (2, 50))
    hidden = policy.hidden_states(ids)
    assert torch.equal(again.hidden_states(ids), hidden)
    exact = make_policy_like(policy, "float32").hidden_states(ids)
    error = ((hidden - exact).norm() / exact.norm()).item()
    assert 1e-4 < error < 2e-2  # products are of bfloat16


def make_policy_like(policy, dtype):
    return dataclasses.replace(policy, config=dataclasses.replace(policy.config, dtype=dtype))


class Habits:
    """A tokenizer with the conventions of a family, around characters."""

    def __init__(self, *, bos=None, eos_added=False, unknown=None):
        self.inner = character_tokenizer(ALPHABET)
        self.bos_token_id, self.eos_added = bos, eos_added
        self.eos_token_id = self.inner.eos_token_id
        self.sep_token_id, self.pad_token_id = None, self.inner.pad_token_id
        self.unk_token_id = self.inner.unk_token_id if unknown is None else unknown

    def __call__(self, text, add_special_tokens=True):
        ids = self.inner(text, add_special_tokens=False)["input_ids"]
        if add_special_tokens:
            ids = [i for i in (self.bos_token_id,) if i is not None] + ids
            ids += [self.eos_token_id] * self.eos_added
        return {"input_ids": ids}


def test_prompts_are_encoded_as_the_tokenizer_does_it_without_an_end_token():
    """REGRESSIONS 46: BOS where the tokenizer has that habit, once; answers go on from there."""
    policy = build()
    plain = policy.encode("31=")
    policy.tokenizer = Habits(bos=9, eos_added=True)
    assert policy.encode("31=") == [9, *plain]
    assert policy.encode_answer("13") == [*plain[:2][::-1], policy.tokenizer.eos_token_id]
    policy.tokenizer = Habits(bos=plain[0], unknown=plain[0])  # GPT-2: one token for all
    assert policy.encode("31=") == [plain[0], *plain]


def test_a_chat_template_takes_the_prompt_or_the_messages():
    policy = build()
    policy.tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'][0] == 's' and '0' or '1' }}{{ m['content'] }}\n"
        "{% endfor %}{% if add_generation_prompt %}2={% endif %}"
    )
    messages = [{"role": "user", "content": "34"}]
    assert policy.decode(policy.encode(messages)) == "134\n2="
    policy.config = ModelConfig(chat=True, system_prompt="99")
    assert policy.decode(policy.encode("34")) == "099\n134\n2="
    assert policy.decode(policy.encode([{"role": "system", "content": "7"}, *messages])) == (
        "07\n134\n2="
    )
    policy.tokenizer.chat_template = None
    with pytest.raises(RecipeError, match="chat template cannot be used") as caught:
        policy.encode("34")
    assert "\n" not in str(caught.value)


def test_special_tokens_are_shown_if_asked_for():
    policy = build()
    ids = [0, *policy.encode("12"), policy.tokenizer.eos_token_id]
    assert policy.decode(ids) == "12"
    policy.config = ModelConfig(special_tokens=True)
    assert policy.decode(ids) == "<pad>12"


def test_prompts_beyond_the_context_are_refused_or_skipped():
    """REGRESSIONS 46."""
    policy = build()
    long, short = Problem("1" * 1000, ""), Problem("12", "")
    assert len(policy.encode_all([long, short], 24)) == 2
    with pytest.raises(RecipeError, match=r"1000 tokens and 25 new ones exceed the 1024 posi"):
        policy.encode_all([short, long], 25)
    with pytest.raises(RecipeError, match=r"1000 tokens and 31 new ones exceed the 1024 posi"):
        reference_sample(policy, long, "3" * 30)  # of the warm-up, with its end token
    assert policy.fits(2)(short) and not policy.fits(999)(long) and policy.fits(None)(long)


def test_what_cannot_be_built_is_said():
    with pytest.raises(RecipeError, match=r"model\.path"):
        make_policy(ModelConfig(), CPU, alphabet=None, stop=None)
    with pytest.raises(RecipeError, match=r"multiple of twice model\.heads = 3"):
        make_policy(ModelConfig(heads=3), CPU, alphabet="ab", stop=None)
