"""Tokens over the whole vocabulary beside those with kept sets; where the head's gradient goes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import fastpo
from fastpo import backends
from fastpo.ops import checks, linear_kept
from fastpo.ops.linear_chunks import LinearCall
from fastpo.testing.budget import assert_within_budget
from fastpo.testing.rows import LEAST_ERROR

BACKENDS = [name for name in ("torch", "cpp") if backends.unavailable(name) is None]
N, D, V = 120, 16, 300
DENSE = 40  # of them over the whole vocabulary, 8 masked rows among these
LIVE = DENSE - 8
PPO = fastpo.Objective(entropy_coef=0.1, kl_coef=0.2)
GSPO = fastpo.gspo(clip_low=0.9, clip_high=9.0)


def a_rule(logprobs: Tensor, entropy: Tensor, tokens: fastpo.TokenInputs) -> Tensor:
    return -(logprobs - tokens.old_logprobs).exp() * tokens.advantages - 0.1 * entropy


@fastpo.loss_rule(couples_sequences=True)
def a_rule_of_sequences(logprobs: Tensor, entropy: Tensor, tokens: fastpo.TokenInputs) -> Tensor:
    total = torch.zeros(2).index_add(0, tokens.sequence_ids, logprobs - tokens.old_logprobs)
    return -(total / 50).exp()[tokens.sequence_ids] * tokens.advantages - 0.1 * entropy


OBJECTIVES = {
    "ppo": PPO,
    "rule": a_rule,
    "aspo": fastpo.aspo(),
    "gspo": GSPO,
    "gmpo": fastpo.gmpo(entropy_coef=0.1),
    "vespo": fastpo.vespo(),
    "rule of sequences": a_rule_of_sequences,
}


class Mixed:
    """[N] tokens: every third over the whole vocabulary, the others over one to five ids."""

    def __init__(self, dtype=torch.float32, *, dense: bool = True, seed: int = 0, count: int = N):
        gen = torch.Generator().manual_seed(seed)
        rows = torch.arange(count)
        sizes = torch.where((rows % 3 == 0) & torch.tensor(dense), 0, 1 + rows % 5)
        chosen = [torch.randperm(V, generator=gen)[:size] for size in sizes.tolist()]
        self.hidden = torch.randn(count, D, generator=gen).to(dtype)
        self.weight = torch.randn(V, D, generator=gen).to(dtype).requires_grad_()
        self.tokens = torch.tensor([int(ids[0]) if len(ids) else 7 for ids in chosen])
        self.kept = {
            "kept_tokens": torch.cat(chosen),
            "kept_offsets": torch.cat([torch.zeros(1).long(), sizes.cumsum(0)]),
        }
        self.mask = rows % 15 != 0
        self.advantages = torch.randn(count, generator=gen)
        self.old = self.logprobs().detach() + 0.2 * torch.randn(count, generator=gen)
        self.ref = self.old + 0.1

    def logprobs(self) -> Tensor:
        given = (self.hidden, self.weight, self.tokens)
        return fastpo.linear_token_logprobs(*given, **self.kept).logprobs

    def options(self, objective) -> dict[str, object]:
        return {
            "objective": objective,
            "mask": self.mask,
            "old_logprobs": self.old,
            "ref_logprobs": self.ref if objective is PPO else None,
            "cu_seqlens": torch.tensor([0, len(self.mask) // 3, len(self.mask)], dtype=torch.int32),
        }

    def loss(self, objective=PPO, **options) -> fastpo.PolicyLoss:
        given = (self.hidden, self.weight, self.tokens, self.advantages)
        return fastpo.linear_policy_loss(*given, **self.options(objective) | self.kept | options)


def gemms(function) -> float:
    """Products of one token with the whole head that a call takes."""
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops() / (2 * D * V)


def as_on_gpu(monkeypatch):
    """Nobody looks at values: what the host does not know beforehand it does not know."""
    monkeypatch.setattr(checks, "inspects_values", lambda tensor: False)
    monkeypatch.setattr(LinearCall, "reads_values", False)


@pytest.mark.parametrize(
    ("objective", "chunk_tokens", "products"),
    [
        (PPO, None, 3),
        (PPO, 16, 3),
        (a_rule, 16, 3),
        (GSPO, None, 3),
        (GSPO, 16, 4),
    ],
)
def test_operations_of_dense_rows(objective, chunk_tokens, products):
    """6 N D V for the rows without ids, as without any kept set: 8 if a sequence fits no chunk."""
    batch = Mixed()
    batch.hidden.requires_grad_()

    def step():
        batch.loss(objective, chunk_tokens=chunk_tokens).loss.backward()

    assert gemms(step) == products * LIVE


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", OBJECTIVES)
def test_fused_equals_two_steps(name, backend):
    """REGRESSIONS 3: with an upstream factor, a bias and a softcap; sequences of both kinds."""
    batch, found = Mixed(), []
    head = {"bias": torch.randn(V), "softcap": 5.0, "backend": backend}
    options = batch.options(OBJECTIVES[name])
    for fused in (True, False):
        leaves = [x.clone().detach().requires_grad_() for x in (batch.hidden, batch.weight)]
        leaves.append(head["bias"].clone().requires_grad_())
        given = (*leaves[:2], batch.tokens)
        shared = batch.kept | head | {"bias": leaves[2]}
        if fused:
            result = fastpo.linear_policy_loss(*given, batch.advantages, **options | shared)
            assert "FusedLinearLoss" in str(result.loss.grad_fn)
        else:
            scored = fastpo.linear_token_logprobs(*given, mask=batch.mask, **shared)
            result = fastpo.policy_loss_from_logprobs(
                scored.logprobs, batch.advantages, entropy=scored.entropy, **options
            )
        grads = torch.autograd.grad(-3.5 * result.loss, leaves)
        metrics = [result.metrics[name] for name in sorted(result.metrics)]
        found.append((result.loss, result.logprobs, result.entropy, *grads, *metrics))
    for x, y in zip(*found, strict=True):
        assert (x - y).norm() <= 2e-6 * y.norm()


@pytest.mark.parametrize("name", OBJECTIVES)
def test_rows_that_all_enter_change_nothing(name, monkeypatch):
    """As on a GPU whose host knows nothing: the rows with ids stand among the others, masked."""
    batch, found = Mixed(), []
    batch.hidden.requires_grad_()
    for _ in range(2):
        loss = batch.loss(OBJECTIVES[name]).loss
        found.append((loss, *torch.autograd.grad(loss, [batch.hidden, batch.weight])))
        monkeypatch.setattr(linear_kept, "unmasked_rows", lambda *_: (None, None))
        monkeypatch.setattr(LinearCall, "reads_values", False)
    for x, y in zip(*found, strict=True):
        assert (x - y).norm() <= 2e-6 * y.norm()


def test_the_host_may_know_how_many_rows_are_dense(monkeypatch):
    """REGRESSIONS 51: on a GPU every row enters the GEMMs unless `dense_rows` says how many are."""
    batch, none = Mixed(), Mixed(dense=False)
    options = {"live_rows": int(batch.mask.sum()), "mask": batch.mask}
    as_on_gpu(monkeypatch)

    def step(batch, **extra):
        return lambda: batch.loss(**options | extra).loss.backward()

    assert gemms(step(batch, dense_rows=LIVE)) == 2 * LIVE  # the hidden states are no leaf
    assert gemms(step(none, dense_rows=0)) == 0
    exact, known = batch.loss(**options, dense_rows=LIVE), none.loss(**options, dense_rows=0)
    way = [str(each.loss.grad_fn.next_functions) for each in (exact, known)]
    assert ["FusedLinearLoss" in each for each in way] == [True, False]
    monkeypatch.setattr(linear_kept, "unmasked_rows", lambda *_: (None, None))
    assert gemms(step(batch)) == 2 * (N + 8)  # padded to 16
    torch.testing.assert_close(batch.loss(**options).loss, exact.loss)
    torch.testing.assert_close(none.loss(**options).loss, known.loss)


def test_a_wrong_number_of_dense_rows(monkeypatch):
    batch = Mixed()
    as_on_gpu(monkeypatch)
    live = int(batch.mask.sum())
    for count in (0, 1, LIVE - 1, LIVE + 1, 10**6):
        assert batch.loss(live_rows=live, dense_rows=count).loss.isnan()
        assert batch.loss(fastpo.gspo(), live_rows=live, dense_rows=count).loss.isnan()
    assert batch.loss(live_rows=live, dense_rows=LIVE).loss.isfinite()
    assert batch.loss(live_rows=live - 1, dense_rows=LIVE).loss.isnan()


@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize(
    ("dtype", "place"),
    [
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.bfloat16),
        (torch.bfloat16, torch.float32),
    ],
)
def test_the_gradient_is_added_where_the_user_says(dtype, place, dense, backend):
    """As autograd accumulates over three batches, from the sums of the head's gradient."""
    exact, plain = torch.zeros(V, D, dtype=torch.float64), torch.zeros(V, D, dtype=place)
    total = torch.zeros(V, D, dtype=place)
    for seed in range(3):
        batch = Mixed(dtype, dense=dense, seed=seed)
        bias = torch.randn(V).to(dtype).requires_grad_()
        leaves = [batch.hidden.requires_grad_(), batch.weight, bias]
        options = {"backend": backend, "bias": bias}
        hidden, weight, of_bias = torch.autograd.grad(batch.loss(**options).loss, leaves)
        plain += weight.to(place)
        batch.loss(**options, add_weight_grad_to=total).loss.backward()
        assert batch.weight.grad is None
        assert torch.equal(batch.hidden.grad, hidden) and torch.equal(bias.grad, of_bias)
        batch.hidden, batch.weight = (
            x.detach().double().requires_grad_() for x in (batch.hidden, batch.weight)
        )
        loss = batch.loss(backend="torch", bias=bias.detach().double()).loss
        exact += torch.autograd.grad(loss, batch.weight)[0]
    if dtype == place == torch.float32 and not dense:
        assert torch.equal(total, plain)
    if (total.double() - exact).norm() > LEAST_ERROR * exact.norm():
        assert_within_budget(total, exact, plain, name="dW")


def test_triton_adds_too(triton_backend):
    batch, total = Mixed(torch.bfloat16, dense=False, count=6), torch.ones(V, D)
    batch.loss(backend="triton", add_weight_grad_to=total).loss.backward()
    batch.loss(backend="triton").loss.backward()
    torch.testing.assert_close(total - 1, batch.weight.grad.float(), rtol=1e-2, atol=1e-6)


def test_adding_is_not_seen_by_autograd():
    """What the docstring warns of: hooks get None, and every backward adds."""
    batch, seen = Mixed(dense=False), []
    batch.hidden.requires_grad_()
    batch.weight.grad = torch.zeros(V, D)
    batch.weight.register_hook(seen.append)
    into = {"add_weight_grad_to": batch.weight.grad}
    batch.loss(**into).loss.backward()
    first = batch.weight.grad.clone()
    assert first.any() and seen == [None]
    torch.autograd.grad(batch.loss(**into).loss, batch.hidden)
    assert torch.equal(batch.weight.grad, 2 * first)
    batch.weight.grad.zero_()
    given = (batch.hidden, batch.weight, batch.tokens)
    scored = fastpo.linear_token_logprobs(*given, **batch.kept, **into)
    scored.logprobs.sum().backward(retain_graph=True)
    once = batch.weight.grad.clone()
    scored.logprobs.sum().backward()
    assert once.any() and torch.equal(batch.weight.grad, 2 * once)


REFUSED = {
    "no sets": ({"kept_tokens": None, "kept_offsets": None}, "without kept_tokens"),
    "a shape": ({"add_weight_grad_to": torch.zeros(V, D + 1)}, rf"\[{V}, {D + 1}\], expected"),
    "a dtype": ({"add_weight_grad_to": torch.zeros(V, D).half()}, "float16 .*pass weight.grad"),
    "a leaf": ({"add_weight_grad_to": torch.zeros(V, D, requires_grad=True)}, "requires_grad=True"),
    "strides": ({"add_weight_grad_to": torch.zeros(D, V).t()}, "stride 1"),
    "an expanded row": ({"add_weight_grad_to": torch.zeros(1, D).expand(V, D)}, "overlapping"),
    "overlapping rows": (
        {"add_weight_grad_to": torch.zeros(V * D).as_strided((V, D), (D - 1, 1))},
        "expanded or overlapping, .*pass weight.grad",
    ),
    "sparse": ({"add_weight_grad_to": torch.zeros(V, D).to_sparse()}, "layout torch.sparse_coo"),
    "a device": ({"add_weight_grad_to": torch.zeros(V, D, device="meta")}, "on meta, expected cpu"),
    "a wrong count": ({"dense_rows": 3}, f"dense_rows is 3, expected {LIVE}, the number of tokens"),
    "no count": ({"dense_rows": True}, "dense_rows is True"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusals_in_one_line(name):
    change, words = REFUSED[name]
    options = {"add_weight_grad_to": torch.zeros(V, D)} | change
    with pytest.raises(ValueError, match=words) as raised:
        Mixed().loss(**options)
    assert "\n" not in str(raised.value)


def test_where_a_sum_may_not_be():
    """REGRESSIONS 74: what torch would refuse in the backward pass, or nobody would notice."""
    batch = Mixed()
    with torch.inference_mode():
        made = torch.zeros(V, D)
    grown = (batch.weight * 1).detach().requires_grad_() * 1
    for place, words in (
        (batch.weight.detach(), "to is in the weight, "),
        (batch.weight.data.view(-1).view(V, D), "to is in the weight, "),
        (made, "an inference tensor"),
        (grown, "requires_grad=True"),
    ):
        with pytest.raises(ValueError, match=words):
            batch.loss(add_weight_grad_to=place)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dense", [False, True])
def test_the_place_may_be_columns_of_a_wider_one(dense, backend):
    batch, wide = Mixed(dense=dense), torch.zeros(V, 2 * D)
    batch.loss(backend=backend, add_weight_grad_to=wide[:, :D]).loss.backward()
    batch.loss(backend=backend).loss.backward()
    torch.testing.assert_close(wide[:, :D], batch.weight.grad)
    assert not wide[:, D:].any()


def test_a_frozen_weight_has_no_gradient_to_add():
    batch = Mixed()
    batch.weight.requires_grad_(False)
    with pytest.raises(ValueError, match="requires no gradient"):
        batch.loss(add_weight_grad_to=torch.zeros(V, D))
    with torch.no_grad():
        batch.weight.requires_grad_(True)
        batch.loss(add_weight_grad_to=torch.zeros(V, D))
    with pytest.raises(ValueError, match="dense_rows is given without kept_tokens"):
        batch.loss(dense_rows=3, kept_tokens=None, kept_offsets=None)
