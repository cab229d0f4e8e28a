"""How the linear ops behave as autograd nodes: which gradients, whose, how often, of what."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import fastpo
from fastpo.testing.linear import LinearCase

OBJECTIVES = {"token": fastpo.dapo(), "sequence": fastpo.gspo()}


@pytest.mark.parametrize("level", OBJECTIVES)
@pytest.mark.parametrize("needs", list(itertools.product([True, False], repeat=3)))
def test_every_combination_of_frozen_inputs(needs, level):
    """REGRESSIONS 6: each gradient depends on its own input's requires_grad alone."""
    case = LinearCase.random(bias=True)
    expected = case.fused(OBJECTIVES[level])[1]
    hidden, weight, bias = (
        x.requires_grad_(need) for x, need in zip(case.leaves(), needs, strict=True)
    )
    result = fastpo.linear_policy_loss(
        hidden, weight, case.tokens, case.advantages, bias=bias, **case.options(OBJECTIVES[level])
    )
    assert result.loss.requires_grad == any(needs)
    if any(needs):
        result.loss.backward()
    for leaf, need, grad in zip((hidden, weight, bias), needs, expected, strict=True):
        assert torch.equal(leaf.grad, grad) if need else leaf.grad is None


@pytest.mark.parametrize("which", ["logprobs", "entropy", "both"])
def test_gradient_through_logprobs_and_entropy(which):
    """REGRESSIONS 7: either output alone, and both, against all logits in fp64."""
    case = LinearCase.random(dtype=torch.float64, bias=True)
    case = replace(case, mask=None)

    def objective(logprobs, entropy):
        terms = {"logprobs": logprobs.square(), "entropy": entropy.sin()}
        return sum(x.sum() for name, x in terms.items() if which in (name, "both"))

    leaves = case.leaves()
    exact = torch.autograd.grad(objective(*case.eager_logprobs(torch.float64, leaves)), leaves)
    leaves = case.leaves()
    scored = fastpo.linear_token_logprobs(*leaves[:2], case.tokens, bias=leaves[2], chunk_tokens=16)
    grads = torch.autograd.grad(objective(*scored), leaves)
    for grad, expected in zip(grads, exact, strict=True):
        assert (grad - expected).norm() < 1e-12 * expected.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("level", OBJECTIVES)
def test_upstream_gradient_scales_the_result(level, dtype):
    """Loss / accumulation steps, a GradScaler: all three gradients carry the factor."""
    case = LinearCase.random(bias=True, dtype=dtype)
    leaves = case.leaves()
    result = fastpo.linear_policy_loss(
        *leaves[:2],
        case.tokens,
        case.advantages,
        bias=leaves[2],
        **case.options(OBJECTIVES[level]),
    )
    (result.loss * -4.0).backward()  # a power of two: exact in every dtype
    for leaf, grad in zip(leaves, case.fused(OBJECTIVES[level])[1], strict=True):
        assert leaf.grad.dtype == dtype and grad.any()
        torch.testing.assert_close(leaf.grad, -4.0 * grad, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("op", ["policy_loss", "token_logprobs"])
def test_a_frozen_head_costs_no_gemm(op):
    """REGRESSIONS 6: neither way computes dW of a weight that does not ask for it."""
    case = LinearCase.random(shape=(2, 32), width=16, vocabulary=300)
    counts = {}
    for name in ("hidden", "weight"):
        leaves = dict(zip(("hidden", "weight"), case.leaves(), strict=True))
        leaves["weight" if name == "hidden" else "hidden"].requires_grad_(False)
        with FlopCounterMode(display=False) as counter:
            if op == "policy_loss":
                loss = fastpo.linear_policy_loss(
                    *leaves.values(),
                    case.tokens,
                    torch.ones(2),
                    objective=fastpo.reinforce(),
                ).loss
            else:
                loss = fastpo.linear_token_logprobs(*leaves.values(), case.tokens).logprobs.sum()
            loss.backward()
        counts[name] = counter.get_total_flops()
    gemms = 2 if op == "policy_loss" else 3
    assert set(counts.values()) == {gemms * 2 * 64 * 16 * 300}


def test_fp16_gradient_survives_a_loss_scale():
    """A gradient below fp16's smallest number must not be rounded before the scale is applied."""
    case = LinearCase.random(dtype=torch.float16)
    hidden, weight = case.leaves()
    options = case.options(fastpo.dapo()) | {"normalizer": 1e7}
    loss = fastpo.linear_policy_loss(hidden, weight, case.tokens, case.advantages, **options).loss
    (loss * 2.0**24).backward()
    wide = replace(case, hidden=case.hidden.double(), weight=case.weight.double())
    exact = wide.eager(fastpo.dapo())[1][0] * case.mask.sum() / 1e7 * 2.0**24
    assert (hidden.grad - exact).norm() < 1e-3 * exact.norm()


@pytest.mark.parametrize("level", OBJECTIVES)
def test_second_backward_raises(level):
    """REGRESSIONS 9: the gradient was handed over; a second use would be of a used buffer."""
    case = LinearCase.random()
    hidden, weight = case.leaves()
    loss = fastpo.linear_policy_loss(
        hidden, weight, case.tokens, case.advantages, **case.options(OBJECTIVES[level])
    ).loss
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match=r"second time.*call linear_policy_loss again"):
        loss.backward()


def test_token_logprobs_allow_a_second_backward():
    case = LinearCase.random()
    hidden, weight = case.leaves()
    loss = fastpo.linear_token_logprobs(hidden, weight, case.tokens).logprobs.sum()
    first = torch.autograd.grad(loss, [hidden, weight], retain_graph=True)
    second = torch.autograd.grad(loss, [hidden, weight])
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_tied_embedding_collects_both_gradients():
    case = LinearCase.random()
    table = case.weight.clone().requires_grad_()
    hidden = torch.nn.functional.embedding(case.tokens, table).tanh()
    fastpo.linear_policy_loss(
        hidden, table, case.tokens, case.advantages, **case.options(fastpo.dapo())
    ).loss.backward()
    embedded = torch.nn.functional.embedding(case.tokens, case.weight).tanh()
    _, (hidden_grad, head_grad) = replace(case, hidden=embedded).fused(fastpo.dapo())
    expected = head_grad.clone()
    through = hidden_grad * (1 - embedded.square())
    expected.index_add_(0, case.tokens.flatten(), through.flatten(0, 1))
    torch.testing.assert_close(table.grad, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("level", OBJECTIVES)
def test_lora_on_the_head_learns_through_the_effective_weight(level):
    case = LinearCase.random()
    down, up = torch.randn(4, 24).requires_grad_(), torch.zeros(307, 4).requires_grad_()
    fastpo.linear_policy_loss(
        case.hidden,
        case.weight + 2.0 * up @ down,
        case.tokens,
        case.advantages,
        **case.options(OBJECTIVES[level]),
    ).loss.backward()
    weight_grad = case.fused(OBJECTIVES[level])[1][1]
    torch.testing.assert_close(up.grad, 2.0 * weight_grad @ down.detach().t())
    assert down.grad.abs().max() == 0
    assert up.grad.abs().max() > 0


def test_activation_checkpointing_gives_the_same_gradient():
    case = LinearCase.random()
    hidden, weight = case.leaves()

    def loss_of(hidden, weight):
        return fastpo.linear_policy_loss(
            hidden, weight, case.tokens, case.advantages, **case.options(fastpo.dapo())
        ).loss

    torch.utils.checkpoint.checkpoint(loss_of, hidden, weight, use_reentrant=False).backward()
    expected = case.fused(fastpo.dapo())[1]
    assert torch.equal(hidden.grad, expected[0])
    assert torch.equal(weight.grad, expected[1])


@pytest.mark.parametrize("level", OBJECTIVES)
def test_inside_a_compiled_step(level):
    """One graph break, no tracing of the chunks: a new length compiles nothing new."""
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    @torch.compile(backend=backend, dynamic=True)
    def step(case, hidden, weight):
        options = case.options(OBJECTIVES[level])
        loss = fastpo.linear_policy_loss(
            hidden * 2.0, weight, case.tokens, case.advantages, **options
        ).loss
        return loss * 3.0

    for length in (21, 22, 23):
        case = LinearCase.random(shape=(3, length))
        hidden, weight = case.leaves()
        grads = torch.autograd.grad(step(case, hidden, weight), [hidden, weight])
        doubled = replace(case, hidden=2.0 * case.hidden)
        expected = doubled.fused(OBJECTIVES[level])[1]
        torch.testing.assert_close(grads[0], 6.0 * expected[0])
        torch.testing.assert_close(grads[1], 3.0 * expected[1])
    assert len(graphs) == 2


VIEWS = {
    "shifted": lambda x: torch.cat([x, x[:, :1]], 1)[:, :-1],
    "transposed": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "stepped": lambda x: torch.stack([x, x], 2).flatten(1, 2)[:, ::2],
    "offset": lambda x: torch.cat([x[:1], x])[1:],
}


@pytest.mark.parametrize("chunk_tokens", [None, 16])
@pytest.mark.parametrize("view", VIEWS)
def test_strides_of_any_argument(view, chunk_tokens):
    """REGRESSIONS 5: the usual shift hidden[:, :-1], and worse, of every [B, T] argument."""
    case = LinearCase.random()
    names = ("hidden", "tokens", "advantages", "mask", "old_logprobs", "ref_logprobs")
    viewed = {name: VIEWS[view](getattr(case, name)) for name in names}
    assert view == "offset" or not viewed["hidden"].is_contiguous()
    hidden = viewed.pop("hidden").requires_grad_()
    weight = case.weight.clone().requires_grad_()
    objective = fastpo.dapo(kl_coef=0.1, entropy_coef=0.1)
    loss = fastpo.linear_policy_loss(
        hidden, weight, objective=objective, chunk_tokens=chunk_tokens, **viewed
    ).loss
    grads = torch.autograd.grad(loss, [hidden, weight])
    expected = case.fused(objective, chunk_tokens=chunk_tokens)[1]
    assert all(torch.equal(a, b) for a, b in zip(grads, expected, strict=True))


def test_chunks_of_an_unmasked_view():
    """Consecutive rows of `hidden[:, :-1]`, whose dimensions do not merge."""
    hidden, weight = torch.randn(3, 9, 8), torch.randn(31, 8)
    tokens = torch.randint(31, (3, 8))
    assert not hidden[:, :-1].is_contiguous()
    for chunk_tokens in (None, 5):
        view, copy = (
            fastpo.linear_token_logprobs(x, weight, tokens, chunk_tokens=chunk_tokens)
            for x in (hidden[:, :-1], hidden[:, :-1].contiguous())
        )
        assert all(torch.equal(a, b) for a, b in zip(view, copy, strict=True))


def test_expanded_incoming_gradient():
    """REGRESSIONS 5: sum() sends back a stride-0 gradient, a slice a strided one."""
    case = LinearCase.random()
    weights = torch.randn(3, 42)[:, ::2]
    for upstream in (torch.ones(()).expand(3, 21), weights, weights.contiguous()):
        leaves = case.leaves()
        scored = fastpo.linear_token_logprobs(*leaves, case.tokens)
        got = torch.autograd.grad(scored.logprobs, leaves, upstream)
        leaves = case.leaves()
        logprobs, _ = case.eager_logprobs(torch.float64, leaves)
        exact = torch.autograd.grad(logprobs, leaves, upstream.double())
        for grad, expected in zip(got, exact, strict=True):
            assert (grad - expected).norm() < 2e-6 * expected.norm()
