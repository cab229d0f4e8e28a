"""fastpo inside transformers: the LM head as read and checked, and the loss in the forward."""

from __future__ import annotations

import copy
import types

import pytest
import torch

import fastpo
from fastpo.integrations._lm_head import read_head
from fastpo.integrations.transformers import (
    attach,
    causal_lm_policy_loss,
    detach,
    hidden_states,
    lm_head,
)

transformers = pytest.importorskip("transformers")

B, T = 3, 9
SIZES = {
    "vocab_size": 61,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}


def tiny(name="Llama", model="ForCausalLM", **options):
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**SIZES, pad_token_id=0, **options)
    made = getattr(transformers, name + model)(config).eval()
    head = made.get_output_embeddings()
    torch.nn.init.normal_(head.weight, std=0.5)
    if head.bias is not None:
        torch.nn.init.normal_(head.bias)
    return made


def batch():
    gen = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 61, (B, T), generator=gen)
    mask = torch.arange(T).expand(B, T) >= 4
    return ids, mask, torch.tensor([1.0, -0.5, 0.3])


def own_loss(model, ids, mask, advantages, **options):
    """The loss from the model's own logits, and its gradients by name."""
    model.zero_grad()
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
    loss = fastpo.policy_loss(logits, ids[:, 1:], advantages, mask=mask[:, 1:], **options)
    loss.loss.backward()
    return loss, gradients(model)


def gradients(model):
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_same(actual, grads, expected, truth):
    torch.testing.assert_close(actual.loss, expected.loss, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(actual.logprobs, expected.logprobs, rtol=1e-5, atol=1e-5)
    assert grads.keys() == truth.keys()
    for name, grad in truth.items():
        assert (grads[name] - grad).norm() <= 1e-5 * grad.norm() + 1e-8, name
    assert max(grad.norm() for grad in truth.values()) > 0


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


CONFIGS = {
    "a factor": ({"lm_head_multiplier": 0.25}, 0.25, None),
    "another name": ({"output_multiplier": 0.5}, 0.5, None),
    "no scale": ({"logit_scale": None}, 1.0, None),
    "a divisor": ({"logits_scaling": 4.0}, 0.25, None),
    "HyperCLOVA X": ({"logits_scaling": 4.0, "model_type": "hyperclovax"}, 4.0, None),
    "MiniCPM3": ({"logits_scaling": 4.0, "model_type": "minicpm3"}, 1.0, None),
    "xLSTM": ({"output_logit_soft_cap": 30.0}, 1.0, 30.0),
}


@pytest.mark.parametrize("kind", CONFIGS)
def test_scale_and_softcap_are_read_from_the_text_config(kind):
    """Each family's own name for the same thing; a multimodal config holds it in its text part."""
    names, scale, softcap = CONFIGS[kind]
    text = types.SimpleNamespace(**{"model_type": "any", **names})
    config = types.SimpleNamespace(get_text_config=lambda: text, logit_scale=7.0)
    head = torch.nn.Linear(4, 6)
    model = types.SimpleNamespace(config=config, get_output_embeddings=lambda: head)
    reading = read_head(model)
    assert (reading["logit_scale"], reading["softcap"]) == (scale, softcap)
    assert reading["weight"] is head.weight and reading["bias"] is head.bias


class Louder(torch.nn.Linear):
    def forward(self, hidden):
        return 1.1 * super().forward(hidden)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_head_that_does_more_is_refused_by_name(dtype):
    """REGRESSIONS 31: a subclass that scales by 10 %, and a forward that shifts one column."""
    ids, mask, advantages = batch()
    options = {"completion_mask": mask, "objective": fastpo.dapo()}
    model = tiny().to(dtype)
    model.lm_head.__class__ = Louder
    for _ in range(2):  # a refusal is not forgotten
        with pytest.raises(ValueError, match="LlamaForCausalLM does more in its LM head"):
            causal_lm_policy_loss(model, ids, advantages, **options)
        with pytest.raises(ValueError, match="LlamaForCausalLM does more in its LM head"):
            lm_head(model)
    attach(model)
    for _ in range(2):
        with pytest.raises(ValueError, match="LlamaForCausalLM does more in its LM head"):
            model(input_ids=ids, policy_loss={"advantages": advantages, **options})
    detach(model)
    model.lm_head.__class__ = torch.nn.Linear
    causal_lm_policy_loss(model, ids, advantages, **options)
    shift = torch.zeros(61, dtype=dtype).index_fill_(0, torch.tensor([5]), 1e4)
    model.lm_head.forward = lambda hidden: torch.nn.Linear.forward(model.lm_head, hidden) + shift
    with pytest.raises(ValueError, match="LlamaForCausalLM does more"):
        causal_lm_policy_loss(model, ids, advantages, **options)


def test_lm_head_goes_with_the_trunk_or_is_refused():
    """`lm_head` is for the trunk's last hidden states; `trunk=False` for `hidden_states`."""
    ids = batch()[0]
    plain, transformed = tiny(), tiny("Roberta", is_decoder=True)
    lm_head(plain)
    with pytest.raises(ValueError, match="RobertaForCausalLM changes its trunk's hidden states"):
        lm_head(transformed)
    head = lm_head(transformed, trunk=False)
    hidden = hidden_states(transformed, input_ids=ids)
    logits = hidden @ head["weight"].t() + head["bias"]
    torch.testing.assert_close(logits, transformed(input_ids=ids).logits, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="BertModel names no LM head"):
        lm_head(transformers.BertModel(transformers.BertConfig(**SIZES)))


ADAPTERS = {
    "lora": {"target_modules": ["q_proj", "lm_head"]},
    "dora": {"target_modules": ["q_proj", "lm_head"], "use_dora": True},
    "biased lora": {"target_modules": ["lm_head"], "lora_bias": True},
    "saved": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
}


def adapted(base=None, **options):
    peft = pytest.importorskip("peft")
    model = tiny() if base is None else base
    options = {"r": 4, "lora_alpha": 6, "init_lora_weights": False, **options}
    torch.manual_seed(5)
    return peft.get_peft_model(model, peft.LoraConfig(**options))


@pytest.mark.peer
@pytest.mark.parametrize("kind", ADAPTERS)
def test_adapters_on_the_head_are_merged_in_the_graph(kind):
    """REGRESSIONS 31: log-probs and the gradient of every adapter parameter, on and off."""
    wrapped = adapted(**ADAPTERS[kind])
    model = wrapped.get_base_model()
    if kind == "saved":
        torch.nn.init.normal_(model.lm_head.modules_to_save["default"].weight)
    ids, mask, advantages = batch()
    expected, truth = own_loss(model, ids, mask, advantages, objective=fastpo.dapo())
    assert any("lm_head" in name for name in truth)
    model.zero_grad()
    options = {"completion_mask": mask, "objective": fastpo.dapo()}
    fused = causal_lm_policy_loss(model, ids, advantages, **options)
    fused.loss.backward()
    assert_same(fused, gradients(model), expected, truth)
    with wrapped.disable_adapter(), torch.no_grad():
        off = causal_lm_policy_loss(model, ids, advantages, **options)
        logits = model(input_ids=ids).logits[:, :-1].log_softmax(-1)
    own = logits.gather(-1, ids[:, 1:, None])[..., 0].masked_fill(~mask[:, 1:], 0)
    torch.testing.assert_close(off.logprobs, own, rtol=1e-5, atol=1e-5)
    assert (off.logprobs - fused.logprobs).abs().max() > 0.1


@pytest.mark.peer
def test_adapters_that_are_no_fixed_matrix_are_refused():
    """Dropout in the adapter, and kinds of adapter that are not read."""
    peft = pytest.importorskip("peft")
    ids, mask, advantages = batch()
    options = {"completion_mask": mask, "objective": fastpo.dapo()}
    model = adapted(target_modules=["lm_head"], lora_dropout=0.1).get_base_model().train()
    with pytest.raises(ValueError, match=r"drops out 0.1 of its inputs"):
        causal_lm_policy_loss(model, ids, advantages, **options)
    causal_lm_policy_loss(model.eval(), ids, advantages, **options)
    config = peft.IA3Config(target_modules=["lm_head"], feedforward_modules=[])
    other = peft.get_peft_model(tiny(), config).get_base_model()
    with pytest.raises(ValueError, match=r"peft.tuners.ia3.* expected a LoRA or DoRA adapter"):
        causal_lm_policy_loss(other, ids, advantages, **options)
    with pytest.raises(TypeError, match=r"PeftModel, expected a bare causal LM .*attach"):
        causal_lm_policy_loss(adapted(target_modules=["q_proj"]), ids, advantages, **options)


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


def scaling(module, args, output):
    return output * 2


def scaling_in_place(module, args, output):
    output.mul_(2)


@pytest.mark.parametrize("hook", [scaling, scaling_in_place])
@pytest.mark.parametrize("when", ["before", "after"])
def test_hooks_that_change_the_head_are_refused(when, hook):
    """REGRESSIONS 31: they would scale the loss, or nothing, in place of the logits; one that only
    looks changes nothing."""
    ids, mask, advantages = batch()
    request = {"advantages": advantages, "completion_mask": mask, "objective": fastpo.dapo()}
    model, seen = tiny(), []
    model.lm_head.register_forward_hook(lambda module, args, output: seen.append(output))
    if when == "after":
        attach(model)(input_ids=ids, policy_loss=request).loss.backward()
        with torch.inference_mode():
            model(input_ids=ids, token_logprobs={"completion_mask": mask})
        assert len(seen) == 2
    model.lm_head.register_forward_hook(hook)
    match = {"before": r"LM head has a forward hook that changes its output .of .*scaling"}
    with pytest.raises(ValueError, match=match.get(when, "does more in its LM head than fastpo")):
        attach(model)(input_ids=ids, policy_loss=request)


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


def test_a_quantized_head_is_refused_by_name():
    """Whose `weight` is a method, in torch's own dynamic quantization."""
    model = tiny()
    model.lm_head.weight = None
    model.lm_head.__class__ = type("Packed", (torch.nn.Module,), {"weight": lambda self: None})
    del model.lm_head._parameters["weight"]
    with pytest.raises(ValueError, match="LM head is Packed with a weight of type method"):
        read_head(model)


def test_logits_dtype_is_the_users_choice():
    """bf16 logits on request; fp32 sums else."""
    model = tiny().bfloat16()
    ids, mask, advantages = batch()
    options = {"completion_mask": mask, "objective": fastpo.dapo()}
    wide = causal_lm_policy_loss(model, ids, advantages, **options)
    narrow = causal_lm_policy_loss(model, ids, advantages, logits_dtype=torch.bfloat16, **options)
    assert 0 < (wide.logprobs - narrow.logprobs).abs().max() < 0.1
