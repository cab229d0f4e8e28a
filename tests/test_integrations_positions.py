"""`positions` and `tokens` of an attached model: packed rows, positions scored several times."""

from __future__ import annotations

import pytest
import torch

import fastpo
from fastpo.integrations.transformers import attach

transformers = pytest.importorskip("transformers")

B, T, V = 2, 7, 31


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    config = transformers.LlamaConfig(vocab_size=V, num_attention_heads=2, **sizes)
    return attach(transformers.LlamaForCausalLM(config).double())


@pytest.fixture(scope="module")
def ids():
    return torch.randint(0, V, (B, T), generator=torch.Generator().manual_seed(1))


def grads(model, loss):
    return torch.autograd.grad(loss, list(model.parameters()))


def test_positions_are_the_completion_mask_written_out(model, ids):
    completion = torch.zeros(B, T, dtype=torch.bool)
    completion[0, 3:] = completion[1, 5:] = True
    advantages = torch.linspace(-1, 1, B * (T - 1), dtype=torch.float64).view(B, T - 1)
    common = {"objective": fastpo.dapo(), "temperature": 0.8}
    asked = {"advantages": advantages, "completion_mask": completion, **common}
    padded = model(input_ids=ids, policy_loss=asked)
    rows, columns = completion[:, 1:].nonzero(as_tuple=True)
    asked = {"positions": rows * T + columns, "tokens": ids[rows, columns + 1], **common}
    packed = model(input_ids=ids, policy_loss={"advantages": advantages[rows, columns], **asked})
    torch.testing.assert_close(packed.loss, padded.loss)
    torch.testing.assert_close(packed.logprobs, padded.logprobs[rows, columns])
    torch.testing.assert_close(grads(model, packed.loss), grads(model, padded.loss))
    scored = model(
        input_ids=ids,
        token_logprobs={name: asked[name] for name in ("positions", "tokens", "temperature")},
    )
    torch.testing.assert_close(scored.logprobs.detach(), packed.logprobs)


def test_a_position_scored_twice_counts_twice(model, ids):
    """As a tree of samples has it: each of two samples has its own advantage and old log-prob."""
    positions = torch.tensor([3, 4, 4, T + 2])
    tokens = ids.flatten()[positions + 1]
    each = {
        "advantages": torch.tensor([0.5, -1.0, 2.0, 0.3], dtype=torch.float64),
        "old_logprobs": torch.tensor([-3.0, -3.5, -4.5, -3.2], dtype=torch.float64),
    }
    common = {"objective": fastpo.ppo(), "normalizer": 1}

    def loss_of(which):
        chosen = {name: value[which] for name, value in each.items()}
        place = {"positions": positions[which], "tokens": tokens[which]}
        return model(input_ids=ids, policy_loss={**chosen, **place, **common}).loss

    whole, parts = loss_of([0, 1, 2, 3]), loss_of([0, 1]) + loss_of([2, 3])
    torch.testing.assert_close(whole, parts)
    torch.testing.assert_close(grads(model, whole), grads(model, parts))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokens": None}, r"expected tokens \[M\] beside them"),
        ({"completion_mask": torch.ones(B, T)}, "and no completion_mask"),
        ({"positions": torch.arange(4)}, r"int64 \[4\], expected int64 \[3\] as tokens"),
        ({"positions": torch.arange(3).int()}, "positions are torch.int32"),
        ({"old_logprobs": torch.zeros(3).bfloat16()}, "old_logprobs arrived as torch.bfloat16"),
    ],
)
def test_what_does_not_fit_is_refused(model, ids, change, message):
    asked = {"positions": torch.arange(3), "tokens": ids[0, 1:4], "advantages": torch.ones(3)}
    asked |= {"objective": fastpo.ppo()} | change
    with pytest.raises((TypeError, ValueError), match=message):
        model(input_ids=ids, policy_loss=asked)
