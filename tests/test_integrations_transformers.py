"""fastpo inside transformers: the LM head as read and checked, and the loss in the forward."""

from __future__ import annotations

import copy

import pytest
import torch
from tiny_transformers import (
    SIZES,
    B,
    T,
    assert_same,
    batch,
    gradients,
    own_loss,
    tiny,
    transformers,
)

import fastpo
from fastpo.integrations.transformers import (
    attach,
    causal_lm_policy_loss,
    detach,
)

HEADS = {
    "llama": lambda: tiny(num_key_value_heads=1),
    "softcap": lambda: tiny(
        "Gemma2", head_dim=8, num_key_value_heads=2, final_logit_softcapping=2.0
    ),
    "scale": lambda: tiny("Cohere", logit_scale=0.4),
    "divisor": lambda: tiny("Granite", logits_scaling=3.0),
    "bias": lambda: tiny("Phi"),
    "logits_soft_cap": lambda: tiny(
        "RecurrentGemma", lru_width=16, logits_soft_cap=2.0, num_key_value_heads=1
    ),
    "a transform before the decoder": lambda: tiny("Roberta", is_decoder=True),
    "a narrower head": lambda: tiny("Electra", is_decoder=True, embedding_size=8),
    "no base model": lambda: transformers_llama4(),
}


def transformers_llama4():
    torch.manual_seed(0)
    config = transformers.Llama4TextConfig(
        **SIZES, intermediate_size_mlp=32, num_local_experts=2, head_dim=8, num_key_value_heads=2
    )
    return transformers.Llama4ForCausalLM(config).eval()


@pytest.mark.parametrize("kind", HEADS)
def test_causal_lm_policy_loss_equals_the_models_own_logits(kind):
    """REGRESSIONS 24, 31: what real heads do, forward and backward."""
    model = HEADS[kind]()
    ids, mask, advantages = batch()
    options = {"objective": fastpo.dapo(), "temperature": 0.9}
    expected, truth = own_loss(model, ids, mask, advantages, **options)
    model.zero_grad()
    fused = causal_lm_policy_loss(model, ids, advantages, completion_mask=mask, **options)
    fused.loss.backward()
    assert_same(fused, gradients(model), expected, truth)
    assert "forward" not in model.__dict__
    assert "forward" not in model.get_output_embeddings().__dict__


def test_attach_keeps_everything_else():
    """Loss in the forward; generate, logits, a deep copy and detach as before."""
    ids, mask, advantages = batch()
    request = {"advantages": advantages, "completion_mask": mask, "objective": fastpo.dapo()}
    model = tiny()
    before = model(input_ids=ids).logits
    expected, truth = own_loss(model, ids, mask, advantages, objective=fastpo.dapo())
    assert attach(attach(model)) is model
    model.zero_grad()
    result = model(ids, policy_loss=request)
    result.loss.backward()
    assert_same(result, gradients(model), expected, truth)
    assert result.metrics["tokens"] == mask[:, 1:].sum() and result.aux_loss is None
    assert torch.equal(model(input_ids=ids).logits, before)
    told = model.generate(ids, max_new_tokens=3, do_sample=False)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.lm_head.weight.zero_()
    uniform = twin(input_ids=ids, policy_loss=request).logprobs[:, 3:]
    torch.testing.assert_close(uniform, torch.full_like(uniform, -torch.log(torch.tensor(61.0))))
    scored = model(input_ids=ids, token_logprobs={"completion_mask": mask})
    assert torch.equal(scored.logprobs, result.logprobs) and scored.logprobs.requires_grad
    tail = {"advantages": advantages, "completion_mask": mask, "objective": fastpo.dapo()}
    kept = model(input_ids=ids, logits_to_keep=T - 4 + 1, policy_loss=tail)
    torch.testing.assert_close(kept.logprobs, result.logprobs[:, 3:])
    torch.testing.assert_close(kept.loss, result.loss)
    assert detach(model) is model
    assert not {"forward", "_fastpo_forward"} & model.__dict__.keys()
    assert "forward" not in model.lm_head.__dict__ and not model.lm_head._forward_hooks
    assert torch.equal(model.generate(ids, max_new_tokens=3, do_sample=False), told)


def test_the_router_loss_is_returned():
    """A mixture of experts: its load-balancing loss with its gradient, beside the policy's."""
    model = tiny("Mixtral", num_local_experts=4, num_key_value_heads=2, output_router_logits=True)
    ids, mask, advantages = batch()
    attention = torch.ones_like(ids)
    own = model(input_ids=ids, attention_mask=attention).aux_loss
    request = {"advantages": advantages, "completion_mask": mask, "objective": fastpo.dapo()}
    result = attach(model)(input_ids=ids, attention_mask=attention, policy_loss=request)
    torch.testing.assert_close(result.aux_loss, own)
    (grad,) = torch.autograd.grad(result.aux_loss, model.model.layers[0].mlp.gate.weight)
    assert grad.norm() > 0


def test_positions_skip_the_padding_on_the_left():
    """REGRESSIONS 31's neighbour: learned positions count from the first real token."""
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=61, n_embd=16, n_layer=2, n_head=2, n_positions=32)
    ).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    ids, mask, advantages = batch()
    options = {"objective": fastpo.dapo()}
    alone = causal_lm_policy_loss(model, ids, advantages, completion_mask=mask, **options)
    padding = torch.zeros(B, 5, dtype=torch.long)
    padded, kept = torch.cat([padding, ids], 1), torch.cat([padding, torch.ones_like(ids)], 1)
    scored = torch.cat([padding.bool(), mask], 1)
    arguments = {"completion_mask": scored, "attention_mask": kept, **options}
    result = causal_lm_policy_loss(model, padded, advantages, **arguments)
    torch.testing.assert_close(result.logprobs[:, 5:], alone.logprobs, rtol=1e-5, atol=1e-5)
    counted = {"model_inputs": {"position_ids": torch.arange(T + 5).expand(B, -1)}}
    other = causal_lm_policy_loss(model, padded, advantages, **arguments, **counted)
    assert (other.logprobs - result.logprobs).abs().max() > 0.01
    unmasked = causal_lm_policy_loss(
        model, padded, advantages, completion_mask=scored, **counted, **options
    )
    assert (other.logprobs - unmasked.logprobs).abs().max() > 0.01  # attention_mask arrives


WRONG = {
    "old_logprobs": (torch.zeros(B, T - 4), r"old_logprobs has shape \[3, 5\], expected \[3, 8\]"),
    "advantages": (torch.zeros(B, T), r"expected \[3\] or \[3, 8\] = \[B, T - 1\].*prompts incl"),
    "completion_mask": (torch.ones(B, T - 1), r"expected \[3, 9\] as input_ids.*prompts included"),
    "ref_logprobs": (torch.zeros(B, T - 1).bfloat16(), r"ref_logprobs arrived as torch.bfloat16"),
}


@pytest.mark.parametrize("name", WRONG)
def test_shapes_say_that_prompts_are_included(name):
    value, message = WRONG[name]
    ids, mask, advantages = batch()
    arguments = {"advantages": advantages, "completion_mask": mask, "objective": fastpo.dapo()}
    arguments[name] = value
    with pytest.raises((ValueError, TypeError), match=message):
        causal_lm_policy_loss(tiny(), ids, **arguments)


def test_calls_that_cannot_be_meant_are_refused():
    ids, mask, advantages = batch()
    request = {"advantages": advantages, "completion_mask": mask, "objective": fastpo.dapo()}
    model = attach(tiny())
    with pytest.raises(ValueError, match="labels are given beside policy_loss"):
        model(input_ids=ids, labels=ids, policy_loss=request)
    with pytest.raises(ValueError, match=r"input_ids is NoneType, expected \[B, T\]"):
        model(inputs_embeds=torch.zeros(B, T, 16), policy_loss=request)
    with pytest.raises(ValueError, match="both given"):
        model(input_ids=ids, policy_loss=request, token_logprobs={"completion_mask": mask})
    with pytest.raises(TypeError, match="completion_mask is missing"):
        model(input_ids=ids, policy_loss={"advantages": advantages})
    with pytest.raises(TypeError, match="Linear, expected a causal LM of transformers"):
        attach(torch.nn.Linear(2, 2))


def test_what_is_the_models_own_cannot_be_given():
    """Another mask, head or softcap in the request would have replaced the model's in silence."""
    ids, mask, advantages = batch()
    request = {"advantages": advantages, "completion_mask": mask, "objective": fastpo.dapo()}
    model = attach(tiny())
    for name in ("hidden", "weight", "bias", "tokens", "mask", "logit_scale", "softcap"):
        with pytest.raises(TypeError, match=rf"{name} is given, expected none of .*completion_ma"):
            model(input_ids=ids, policy_loss=request | {name: mask[:, 1:]})
    with pytest.raises(TypeError, match="statistics are given, which no model's forward returns"):
        model(input_ids=ids, token_logprobs={"completion_mask": mask, "statistics": ("is_top1",)})
    with pytest.raises(TypeError, match="policy_loss or token_logprobs is bool, expected a dict"):
        model(input_ids=ids, policy_loss=True)
    with pytest.raises(ValueError, match="completion_mask is list, expected"):
        model(input_ids=ids, policy_loss=request | {"completion_mask": [1]})
    bounds = (torch.zeros(B, T), torch.ones(B, T))
    with pytest.raises(ValueError, match=r"clip_bounds has shape \[3, 9\], .*prompts included"):
        model(input_ids=ids, policy_loss=request | {"clip_bounds": bounds})


def test_a_first_call_without_return_dict():
    ids, mask, advantages = batch()
    request = {"advantages": advantages, "completion_mask": mask, "objective": fastpo.dapo()}
    first = attach(tiny())(input_ids=ids, return_dict=False, policy_loss=request)
    second = attach(tiny())(input_ids=ids, policy_loss=request)
    assert torch.equal(first.logprobs, second.logprobs)


def test_a_changed_forward_is_not_bypassed():
    """REGRESSIONS 32: `causal_lm_policy_loss` runs the class's forward, so it refuses another one;
    `attach` keeps it in the path, and sees what it makes of the logits."""
    ids, mask, advantages = batch()
    options = {"completion_mask": mask, "objective": fastpo.dapo()}
    model = tiny()
    own = model.forward

    def halved(*args, **kwargs):
        outputs = own(*args, **kwargs)
        outputs.logits = outputs.logits / 2
        return outputs

    model.forward = halved
    with pytest.raises(TypeError, match=r"with a forward of its own .*attach\(model\)"):
        causal_lm_policy_loss(model, ids, advantages, **options)
    with pytest.raises(ValueError, match="does more in its LM head than fastpo reads"):
        attach(model)(input_ids=ids, policy_loss=options | {"advantages": advantages})
    hooked = tiny()
    hooked.register_forward_hook(lambda module, args, outputs: outputs.logits.div_(2))
    with pytest.raises(TypeError, match=r"with forward hooks, expected .*attach\(model\)"):
        causal_lm_policy_loss(hooked, ids, advantages, **options)
    causal_lm_policy_loss(attach(tiny()), ids, advantages, **options)


def test_an_encoder_decoder_is_refused():
    """Its head predicts decoder_input_ids: input_ids of the same shape would be scored instead."""
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 8, "num_layers": 1, "num_heads": 2}
    config = transformers.T5Config(vocab_size=61, decoder_start_token_id=0, **sizes)
    model = transformers.T5ForConditionalGeneration(config)
    with pytest.raises(ValueError, match="T5ForConditionalGeneration is an encoder-decoder"):
        attach(model)


def test_logits_dtype_is_the_users_choice():
    """bf16 logits on request; fp32 sums else."""
    model = tiny().bfloat16()
    ids, mask, advantages = batch()
    options = {"completion_mask": mask, "objective": fastpo.dapo()}
    wide = causal_lm_policy_loss(model, ids, advantages, **options)
    narrow = causal_lm_policy_loss(model, ids, advantages, logits_dtype=torch.bfloat16, **options)
    assert 0 < (wide.logprobs - narrow.logprobs).abs().max() < 0.1
