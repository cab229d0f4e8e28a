"""Heads of transformers models: scaled, capped, adapted, hooked or quantized, or refused."""

from __future__ import annotations

import types

import pytest
import torch
from tiny_transformers import SIZES, assert_same, batch, gradients, own_loss, tiny, transformers

import fastpo
from fastpo.integrations import _tap
from fastpo.integrations._lm_head import read_head
from fastpo.integrations.transformers import (
    attach,
    causal_lm_policy_loss,
    detach,
    hidden_states,
    lm_head,
)

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


def test_a_head_that_changes_is_compared_again(monkeypatch):
    """REGRESSIONS 31: once for each state of a head, its adapters included."""
    compared = []
    monkeypatch.setattr(_tap, "check_logits", lambda *arguments: compared.append(arguments))
    ids, mask, advantages = batch()
    asked = {"advantages": advantages, "completion_mask": mask, "objective": fastpo.dapo()}
    model = attach(tiny())
    for adapters, count in ((), 1), ((), 1), (("a",), 2), (("a",), 2), (("b",), 3):
        model.lm_head.active_adapters = adapters
        model(input_ids=ids, policy_loss=asked)
        assert len(compared) == count


class Twice(transformers.LlamaForCausalLM):
    def forward(self, input_ids, **inputs):
        states = self.model(input_ids, **inputs).last_hidden_state
        self.lm_head(states)
        return transformers.modeling_outputs.CausalLMOutput(logits=self.lm_head(states))


def test_a_head_that_is_called_twice_is_refused():
    ids, mask, advantages = batch()
    options = {"completion_mask": mask, "objective": fastpo.dapo()}
    with pytest.raises(ValueError, match="Twice's forward calls its LM head more than once"):
        causal_lm_policy_loss(Twice(tiny().config), ids, advantages, **options)


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
    with pytest.raises(ValueError, match=r"LM head has a forward hook that .* .of .*scaling"):
        attach(model)(input_ids=ids, policy_loss=request)


def test_a_quantized_head_is_refused_by_name():
    """Whose `weight` is a method, in torch's own dynamic quantization."""
    model = tiny()
    model.lm_head.weight = None
    model.lm_head.__class__ = type("Packed", (torch.nn.Module,), {"weight": lambda self: None})
    del model.lm_head._parameters["weight"]
    with pytest.raises(ValueError, match="LM head is Packed with a weight of type method"):
        read_head(model)
