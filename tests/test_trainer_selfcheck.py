"""What a run checks of a model before it starts: every layout gives the numbers of one sequence."""

import pytest
import torch
import transformers

from fastpo.trainer.config import ModelConfig, OptimConfig
from fastpo.trainer.model import selfcheck
from fastpo.trainer.model.loading import character_tokenizer, load_policy
from fastpo.trainer.run.errors import RecipeError

SIZES = {
    "vocab_size": 16,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}
PACKED, SHARED, ROWS = {"packing": True}, {"share_prompts": True}, {}


def opt():
    return transformers.OPTConfig(
        **{k: v for k, v in SIZES.items() if k not in ("intermediate_size", "num_key_value_heads")},
        ffn_dim=32,
        word_embed_proj_dim=32,
    )


def gpt_oss():
    return transformers.GptOssConfig(
        **SIZES, head_dim=16, num_local_experts=2, num_experts_per_tok=1, sliding_window=4
    )


def lfm2():
    return transformers.Lfm2Config(**SIZES, layer_types=["conv", "full_attention"])


def qwen3_next():
    return transformers.Qwen3NextConfig(
        **SIZES,
        head_dim=16,
        layer_types=["linear_attention", "full_attention"],
        linear_num_key_heads=2,
        linear_num_value_heads=2,
        linear_key_head_dim=16,
        linear_value_head_dim=16,
        num_experts=2,
        num_experts_per_tok=1,
        moe_intermediate_size=16,
        shared_expert_intermediate_size=16,
    )


def rwkv():
    return transformers.RwkvConfig(
        vocab_size=16, hidden_size=32, num_hidden_layers=2, attention_hidden_size=32
    )


def bert():
    return transformers.BertConfig(**{k: v for k, v in SIZES.items() if k != "num_key_value_heads"})


def policy_of(tmp_path, config):
    config.eos_token_id, config.pad_token_id, config.bos_token_id = 1, 0, None
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    character_tokenizer("0123456789= \n").save_pretrained(tmp_path)
    return load_policy(tmp_path, ModelConfig(), torch.device("cpu"), stop=None)


@pytest.mark.parametrize(
    ("config", "optim"),
    [
        (lambda: transformers.LlamaConfig(**SIZES), PACKED),
        (lambda: transformers.Gemma2Config(**SIZES, head_dim=16, sliding_window=4), SHARED),
        (opt, SHARED),
        (opt, PACKED),
        (lfm2, SHARED),
        (qwen3_next, ROWS),
    ],
)
def test_what_works_is_let_through(tmp_path, config, optim):
    policy = policy_of(tmp_path, config())
    selfcheck.check(policy, OptimConfig(**optim))
    assert not policy.model.get_input_embeddings()._forward_hooks  # nothing stays rounded


@pytest.mark.parametrize(
    ("config", "optim", "message"),
    [
        (gpt_oss, PACKED, "GptOssForCausalLM with optim.packing = true: hidden states"),
        (lfm2, PACKED, "Lfm2ForCausalLM with optim.packing = true: hidden states"),
        (qwen3_next, SHARED, "Qwen3NextForCausalLM with optim.share_prompts = true: RuntimeError"),
        (rwkv, ROWS, "the sampler cannot decode RwkvForCausalLM: AttributeError"),
        (bert, ROWS, "the sampler cannot decode BertLMHeadModel"),
    ],
)
def test_what_would_be_silently_wrong_is_one_line(tmp_path, config, optim, message):
    """REGRESSIONS 33: sequences that see each other; caches that cannot be shared or copied."""
    with pytest.raises(RecipeError, match=message) as caught:
        selfcheck.check(policy_of(tmp_path, config()), OptimConfig(**optim))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("damage", ["head", "cache"])
def test_a_head_or_a_cache_of_its_own_is_refused(tmp_path, monkeypatch, damage):
    policy = policy_of(tmp_path, transformers.LlamaConfig(**SIZES))
    if damage == "head":
        forward = policy.model.lm_head.forward
        monkeypatch.setattr(policy.model.lm_head, "forward", lambda x: 1.001 * forward(x))
    else:
        from transformers.cache_utils import DynamicLayer

        reorder = DynamicLayer.reorder_cache
        monkeypatch.setattr(DynamicLayer, "reorder_cache", lambda s, i: reorder(s, i.flip(0)))
    with pytest.raises(RecipeError, match="LM head" if damage == "head" else "sampler"):
        selfcheck.check(policy, OptimConfig())
