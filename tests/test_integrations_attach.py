"""Attached models: `positions` and `tokens` in a mask's place, and hooks that come later."""

from __future__ import annotations

import pytest
import torch

import fastpo
from fastpo.integrations.transformers import attach

transformers = pytest.importorskip("transformers")

B, T, V = 2, 7, 31


def llama():
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    config = transformers.LlamaConfig(vocab_size=V, num_attention_heads=2, **sizes)
    return attach(transformers.LlamaForCausalLM(config).double())


@pytest.fixture(scope="module")
def model():
    return llama()


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


def halving(module, args, outputs):
    """A user's hook: the policy samples at twice the temperature."""
    if hasattr(outputs, "logits"):
        outputs.logits = outputs.logits / 2
    return outputs


class Halving:
    def __call__(self, module, args, kwargs, outputs):
        return halving(module, args, outputs)


@pytest.mark.parametrize("hook", [halving, Halving()])
def test_a_hook_that_changes_the_logits_of_an_attached_model_is_seen(model, ids, hook):
    """REGRESSIONS 61: registered after the first scored call, on the model itself."""
    asked = {"completion_mask": torch.ones(B, T)}
    expected = model(input_ids=ids, token_logprobs=asked)
    seen = []
    reading = model.register_forward_hook(lambda module, args, outputs: seen.append(outputs))
    again = model(input_ids=ids, token_logprobs=asked)
    assert torch.equal(again.logprobs, expected.logprobs)
    assert len(seen) == 2 and seen[0].logits.shape[-1] == V and seen[1] is again
    model(input_ids=ids, token_logprobs=asked)
    assert len(seen) == 3  # looked at once
    changing = model.register_forward_hook(hook, with_kwargs=hook is not halving)
    for _ in range(2):
        with pytest.raises(
            ValueError, match=r"LlamaForCausalLM has a forward hook, .*alving, that"
        ):
            model(input_ids=ids, token_logprobs=asked)
    changing.remove()
    again = model(input_ids=ids, token_logprobs=asked)
    assert torch.equal(again.logprobs, expected.logprobs)
    reading.remove()


def in_ddp(model, folder):
    dist = torch.distributed
    dist.init_process_group("gloo", init_method=f"file://{folder}/ddp", rank=0, world_size=1)
    return torch.nn.parallel.DistributedDataParallel(model)


def compiled(model, _):
    return torch.compile(model, backend="eager")


def in_peft(model, _):
    peft = pytest.importorskip("peft")
    return peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"]))


WRAPPERS = {
    "ddp": in_ddp,
    "peft": in_peft,
    "peft in ddp": lambda model, folder: in_ddp(in_peft(model, folder), folder),
    "compiled": compiled,
    "compiled in ddp": lambda model, folder: in_ddp(compiled(model, folder), folder),
}
SLOW = ("compiled", "compiled in ddp")


@pytest.mark.parametrize(
    "wrapper", [pytest.param(x, marks=[pytest.mark.slow] * (x in SLOW)) for x in WRAPPERS]
)
def test_a_hook_on_a_wrapper_is_seen_when_it_comes(wrapper, ids, tmp_path):
    """REGRESSIONS 76: nothing in the model knows of the wrapper; what only looks may stay."""
    asked = {"completion_mask": torch.ones(B, T)}
    model, seen = llama(), []
    try:
        wrapped = WRAPPERS[wrapper](model, tmp_path)
        expected = wrapped(input_ids=ids, token_logprobs=asked)
        wrapped.register_forward_hook(lambda module, args, outputs: seen.append(outputs))
        for _ in range(3):
            again = wrapped(input_ids=ids, token_logprobs=asked)
            model(input_ids=ids, token_logprobs=asked)  # past the wrapper and its hooks
        assert torch.equal(again.logprobs, expected.logprobs)
        assert len(seen) == 4  # three calls, and once on a few rows
        changing = wrapped.register_forward_hook(halving)
        with pytest.raises(ValueError, match=f"{type(wrapped).__name__} has a .* hook, halving, "):
            wrapped(input_ids=ids, token_logprobs=asked)
        model(input_ids=ids, token_logprobs=asked)
        changing.remove()
        again = wrapped(input_ids=ids, token_logprobs=asked)
        assert torch.equal(again.logprobs, expected.logprobs)
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def test_hooks_that_only_look_may_stay_whatever_they_look_at(ids):
    """The inputs of the call, its loss, and what their own pre-hook left: REGRESSIONS 76."""
    model, seen, started = llama(), [], []
    model.register_forward_hook(
        lambda module, args, given, outputs: seen.append(given["input_ids"]), with_kwargs=True
    )
    model.register_forward_hook(lambda module, args, outputs: seen.append(outputs.loss.item()))
    model.register_forward_pre_hook(lambda module, args: started.append(len(seen)))
    model.register_forward_hook(lambda module, args, outputs: seen.append(started.pop()))
    asked = {"advantages": torch.ones(B), "completion_mask": torch.ones(B, T)}
    loss = model(input_ids=ids, policy_loss=asked | {"objective": fastpo.dapo()}).loss.item()
    assert [x is ids for x in seen[::3]] == [True, True] and seen[1::3] == [loss] * 2
    assert len(seen) == 6 and not started


class Gather(torch.autograd.Function):
    """What ZeRO-3's hook makes of a module's output: its backward gathers the weight again."""

    @staticmethod
    def forward(ctx, output, gather):
        ctx.gather = gather
        return output.view_as(output)

    @staticmethod
    def backward(ctx, grad):
        ctx.gather()
        return grad, None


def partition(head):
    """ZeRO-3 of one rank: the weight is empty but for the head's own forward and backward."""
    weight = head.weight
    full = weight.data if weight.numel() else head.full
    head.full, weight.data = full, full.new_empty(0)

    def gather(*_):
        weight.data = full

    def release(module, args, output):
        weight.data = full.new_empty(0)
        return Gather.apply(output, gather)

    release.__module__ = gather.__module__ = "deepspeed.runtime.zero"
    return head.register_forward_pre_hook(gather), head.register_forward_hook(release)


def test_a_frameworks_hooks_that_are_put_back_find_the_loss(ids):
    """REGRESSIONS 77: TRL takes ZeRO-3's hooks off for each generation, and puts them back."""
    asked = {
        "advantages": torch.tensor([1.0, -0.5]).double(),
        "completion_mask": torch.ones(B, T),
        "objective": fastpo.dapo(),
    }
    expected = llama()
    expected(input_ids=ids, policy_loss=asked).loss.backward()
    model = llama()
    for _ in range(3):
        model.zero_grad()
        handles = partition(model.lm_head)
        model(input_ids=ids, policy_loss=asked).loss.backward()
        torch.testing.assert_close(model.lm_head.weight.grad, expected.lm_head.weight.grad)
        for handle in handles:
            handle.remove()
