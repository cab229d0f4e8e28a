"""fastpo inside transformers and TRL."""

from __future__ import annotations

import pytest
import torch

import fastpo
from fastpo.testing.budget import assert_within_budget

B, T = 3, 9


def tiny_model(kind="llama"):
    import transformers

    torch.manual_seed(0)
    sizes = {
        "vocab_size": 61,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
    }
    if kind == "llama":
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes))
    elif kind == "gemma2":
        config = transformers.Gemma2Config(**sizes, head_dim=8, final_logit_softcapping=2.0)
        model = transformers.Gemma2ForCausalLM(config)
    elif kind == "cohere":
        model = transformers.CohereForCausalLM(transformers.CohereConfig(**sizes, logit_scale=0.4))
    else:
        config = transformers.GraniteConfig(**sizes, logits_scaling=3.0)
        model = transformers.GraniteForCausalLM(config)
    return model.eval()


def batch():
    gen = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 61, (B, T), generator=gen)
    mask = torch.arange(T).expand(B, T) >= 4
    return ids, mask, torch.tensor([1.0, -0.5, 0.3])


@pytest.mark.parametrize("kind", ["llama", "gemma2", "cohere", "granite"])
def test_causal_lm_policy_loss_equals_the_models_own_logits(kind):
    """REGRESSIONS 24: softcap and scale of real heads, forward and backward."""
    from fastpo.integrations.transformers import causal_lm_policy_loss

    model = tiny_model(kind)
    ids, mask, advantages = batch()
    options = {"objective": fastpo.dapo(), "temperature": 0.9}
    fused = causal_lm_policy_loss(model, ids, advantages, completion_mask=mask, **options)
    fused.loss.backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    logits = model(input_ids=ids).logits[:, :-1]
    plain = fastpo.policy_loss(logits, ids[:, 1:], advantages, mask=mask[:, 1:], **options)
    plain.loss.backward()
    torch.testing.assert_close(fused.logprobs, plain.logprobs, rtol=1e-5, atol=1e-5)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(grads[name], parameter.grad, rtol=1e-4, atol=1e-6, msg=name)
    assert max(grad.norm() for grad in grads.values()) > 0


@pytest.mark.peer
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_trl_scores_the_same_through_fastpo(softcap):
    """The function TRL's trainers call, before and after install(): same numbers and gradients."""
    utils = pytest.importorskip("trl.trainer.utils")
    from fastpo.integrations import trl as integration

    gen = torch.Generator().manual_seed(2)
    hidden = torch.randn(20, 16, generator=gen)
    weight = torch.randn(61, 16, generator=gen)
    labels = torch.randint(0, 61, (20,), generator=gen)

    def score(dtype=torch.float32):
        h, w = (x.to(dtype, copy=True).requires_grad_() for x in (hidden, weight))
        fields = ("log_probs", "entropy")
        out = utils._ChunkedLogProbFunction.apply(h, w, None, labels, 0.7, 8, softcap, 1.3, fields)
        (out[0].sum() + 0.1 * out[1].sum()).backward()
        return out[0].detach(), out[1].detach(), h.grad, w.grad

    theirs = score()
    try:
        integration.install()
        integration.install()
        ours, exact = score(), score(torch.float64)
        assert utils._ChunkedLogProbFunction.original is not None
    finally:
        integration.uninstall()
    for mine, truth, other in zip(ours, exact, theirs, strict=True):
        assert_within_budget(mine, truth, other)
    assert not isinstance(utils._ChunkedLogProbFunction, integration._FastpoLogProbs)


@pytest.mark.peer
def test_trl_model_forward_through_fastpo():
    """A model patched by TRL itself: model(..., fused_lm_head=True) now runs on fastpo."""
    utils = pytest.importorskip("trl.trainer.utils")
    from fastpo.integrations import trl as integration

    model = tiny_model()
    ids, mask, _ = batch()
    labels = ids.masked_fill(~mask, -100)
    utils.add_fused_lm_head(model, temperature=0.9, outputs=("log_probs", "entropy"))
    theirs = model(input_ids=ids, labels=labels, fused_lm_head=True)
    try:
        integration.install()
        ours = model(input_ids=ids, labels=labels, fused_lm_head=True)
    finally:
        integration.uninstall()
    torch.testing.assert_close(ours.log_probs, theirs.log_probs, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours.entropy, theirs.entropy, rtol=1e-5, atol=1e-5)
