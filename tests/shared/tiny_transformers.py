"""Tiny transformers models, a batch for them, and the loss of their own logits."""

from __future__ import annotations

import pytest
import torch

import fastpo

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
