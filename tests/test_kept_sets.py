"""Kept sets through the public ops: as dense rows with -inf elsewhere, for every loss."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import fastpo
from fastpo import backends
from fastpo.ops import checks
from fastpo.testing.budget import assert_within_budget
from fastpo.testing.objectives import PRESETS
from fastpo.testing.rows import LEAST_ERROR

BACKENDS = [name for name in ("torch", "cpp") if backends.unavailable(name) is None]
B, T, D, V = 4, 9, 24, 307
FACTOR = 4.0


class KeptBatch:
    """[B, T] tokens off-policy: one id, a few, or the whole vocabulary; one sequence masked."""

    def __init__(self, dtype=torch.float32, *, dense=True, **head):
        self.head = {"temperature": 0.8, "logit_scale": 0.5, "softcap": 4.0, "bias": None} | head
        self.hidden = torch.randn(B, T, D).to(dtype)
        self.weight = (3 * torch.randn(V, D) * D**-0.5).to(dtype)
        self.sizes = torch.tensor([1, 2, 5, 0 if dense else 3, 30, 1, 8, 2, 17])[
            torch.arange(B * T) % T
        ]
        chosen = [torch.randperm(V)[:size] for size in self.sizes.tolist()]
        self.tokens = torch.tensor([int(ids[0]) if len(ids) else 3 for ids in chosen]).view(B, T)
        self.ids = torch.cat([ids.sort().values for ids in chosen])
        self.offsets = torch.cat([torch.zeros(1, dtype=torch.int64), self.sizes.cumsum(0)])
        self.mask = torch.rand(B, T) > 0.25
        self.mask[1] = False
        self.advantages = torch.randn(B)
        logprobs = self.exact_logprobs(self.logits(torch.float64))[0].detach()
        self.old, self.ref = ((logprobs + 0.2 * torch.randn(B, T)).float() for _ in range(2))

    @property
    def kept(self) -> dict[str, Tensor]:
        return {"kept_tokens": self.ids, "kept_offsets": self.offsets}

    def logits(self, dtype: torch.dtype, hidden=None, weight=None) -> Tensor:
        """[B, T, V] before the temperature."""
        hidden = self.hidden.to(dtype) if hidden is None else hidden
        weight = self.weight.to(dtype) if weight is None else weight
        bias = self.head["bias"]
        z = self.head["logit_scale"] * (
            hidden @ weight.t() + (0 if bias is None else bias.to(dtype))
        )
        softcap = self.head["softcap"]
        return z if softcap is None else softcap * (z / softcap).tanh()

    def exact_logprobs(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Eager log-probs and entropies [B, T] over what each row kept."""
        hidden = torch.ones(B * T, V, dtype=torch.bool)
        hidden[torch.arange(B * T).repeat_interleave(self.sizes), self.ids] = False
        hidden = hidden.view(B, T, V) & (self.sizes > 0).view(B, T, 1)
        temperature = torch.as_tensor(self.head["temperature"]).to(logits.dtype)
        temperature = temperature[..., None] if temperature.ndim else temperature
        table = (logits / temperature).masked_fill(hidden, -math.inf).log_softmax(-1)
        entropy = -(table.exp() * table.masked_fill(hidden, 0)).sum(-1)
        return table.gather(-1, self.tokens[..., None])[..., 0], entropy

    def options(self, objective) -> dict[str, object]:
        return {
            "objective": objective,
            "mask": self.mask,
            "old_logprobs": self.old,
            "ref_logprobs": self.ref if objective.kl_coef else None,
        }

    def eager(self, objective, dtype: torch.dtype):
        """loss, dH, dW."""
        hidden, weight = (x.detach().to(dtype).requires_grad_() for x in (self.hidden, self.weight))
        logits = self.logits(dtype, hidden, weight)
        logprobs, entropy = self.exact_logprobs(logits)
        loss = fastpo.policy_loss_from_logprobs(
            logprobs, self.advantages, entropy=entropy, **self.options(objective)
        ).loss
        return loss.detach(), *torch.autograd.grad(loss, [hidden, weight])

    def eager_of_logits(self, objective, logits: Tensor):
        """loss and the gradient of given logits."""
        leaf = logits.detach().requires_grad_()
        logprobs, entropy = self.exact_logprobs(leaf)
        loss = fastpo.policy_loss_from_logprobs(
            logprobs, self.advantages, entropy=entropy, **self.options(objective)
        ).loss
        return loss.detach(), *torch.autograd.grad(loss, leaf)

    def linear(self, objective, backend, **extra):
        hidden, weight = (x.clone().requires_grad_() for x in (self.hidden, self.weight))
        options = self.options(objective) | self.head | self.kept | {"backend": backend} | extra
        result = fastpo.linear_policy_loss(hidden, weight, self.tokens, self.advantages, **options)
        result.loss.backward()
        return result, hidden.grad, weight.grad


def check(batch: KeptBatch, objective, result, *grads: Tensor) -> None:
    """Loss, dH and dW within the budget of the eager computation in fp32."""
    exact, plain = batch.eager(objective, torch.float64), batch.eager(objective, torch.float32)
    got = (result.loss.detach(), *grads)
    for name, x, want, base in zip(("loss", "dH", "dW"), got, exact, plain, strict=True):
        within(x, want, base, name)


def within(got: Tensor, exact: Tensor, plain: Tensor, name: str) -> None:
    """A log-prob's last bits, and so a ratio's, are allowed: of terms of size 1 in a loss."""
    scale = exact.abs().clamp(min=1).item() if exact.ndim == 0 else exact.norm().item()
    if not (got.double() - exact).norm() <= LEAST_ERROR * scale:
        assert_within_budget(got, exact, plain.to(got.dtype), factor=FACTOR, name=name)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", PRESETS)
def test_linear_policy_loss_of_every_preset(name, backend):
    batch = KeptBatch(softcap=None)
    check(batch, PRESETS[name], *batch.linear(PRESETS[name], backend))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_linear_policy_loss_in_every_dtype(dtype, dense, backend):
    """With a bias, a softcap and a temperature per token; with and without dense rows."""
    temperature, bias = 0.5 + torch.rand(B, T), torch.randn(V).to(dtype)
    batch = KeptBatch(dtype, dense=dense, temperature=temperature, bias=bias)
    objective = PRESETS["dapo_all"]
    check(batch, objective, *batch.linear(objective, backend))


def test_linear_policy_loss_on_triton(triton_backend):
    """Kept rows by its kernels, dense rows by its row kernels."""
    batch = KeptBatch(torch.bfloat16)
    check(batch, PRESETS["dapo_all"], *batch.linear(PRESETS["dapo_all"], "triton"))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["dapo_all", "gspo", "vespo"])
def test_policy_loss_on_logits(name, dtype, backend):
    batch = KeptBatch()
    logits = batch.logits(torch.float32).to(dtype)
    wide = [logits.to(d) for d in (torch.float64, torch.float32)]
    exact, plain = (batch.eager_of_logits(PRESETS[name], x) for x in wide)
    leaf = logits.clone().requires_grad_()
    options = batch.options(PRESETS[name]) | batch.kept | {"backend": backend, "temperature": 0.8}
    result = fastpo.policy_loss(leaf, batch.tokens, batch.advantages, **options)
    result.loss.backward()
    for got, want, base in zip((result.loss.detach(), leaf.grad), exact, plain, strict=True):
        within(got, want, base, "loss or dlogits")


def _assert_equal(x: Tensor, y: Tensor) -> None:
    assert torch.equal(x, y)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("inputs", ["hidden", "shifted hidden", "logits", "shifted logits"])
def test_log_probs_are_the_loss_in_two_steps(inputs, backend):
    """REGRESSIONS 3: `*_token_logprobs`, then `policy_loss_from_logprobs`; views of [B, T + 1]."""
    batch, objective = KeptBatch(softcap=None, logit_scale=1.0), PRESETS["dapo_all"]
    source = batch.hidden if "hidden" in inputs else batch.logits(torch.float32)
    if "shifted" in inputs:
        source = torch.cat([source, torch.full_like(source[:, :1], math.nan)], 1)
    shared = batch.kept | {"backend": backend, "temperature": 0.8, "mask": batch.mask}
    options = batch.options(objective)
    results = []
    for fused in (True, False):
        leaf = source.clone().requires_grad_()
        first = leaf[:, :T]
        given = (first, batch.weight) if "hidden" in inputs else (first,)
        if fused:
            op = fastpo.linear_policy_loss if "hidden" in inputs else fastpo.policy_loss
            result = op(*given, batch.tokens, batch.advantages, **options | shared)
        else:
            op = fastpo.linear_token_logprobs if "hidden" in inputs else fastpo.token_logprobs
            logprobs, entropy = op(*given, batch.tokens, **shared)
            result = fastpo.policy_loss_from_logprobs(
                logprobs, batch.advantages, entropy=entropy, **options
            )
        result.loss.backward()
        results.append([result.loss.detach(), result.logprobs, result.entropy, leaf.grad])
    # Dense rows of hidden states are fused: a kernel's own arithmetic, to the last bits.
    same = torch.testing.assert_close if "hidden" in inputs else _assert_equal
    for x, y in zip(*results, strict=True):
        same(x, y)
    assert (results[0][1][~batch.mask] == 0).all()


def test_the_ratio_of_a_sampled_token_is_one():
    """REGRESSIONS 45: with top-k sampling the ratio over the whole vocabulary is the kept mass."""
    logits = 3 * torch.randn(200, 50)
    top, ids = logits.topk(5)
    pick = top.softmax(1).multinomial(1)
    tokens = ids.gather(1, pick)[:, 0]
    sampled = top.log_softmax(1).gather(1, pick)[:, 0]  # what the sampler reports
    kept = {"kept_tokens": ids.flatten(), "kept_offsets": torch.arange(0, 1001, 5)}
    options = {"objective": fastpo.dapo(), "old_logprobs": sampled}
    advantages = torch.ones(200)
    ratio = fastpo.policy_loss(logits, tokens, advantages, **options, **kept).means()["ratio"]
    whole = fastpo.policy_loss(logits, tokens, advantages, **options).means()["ratio"]
    assert abs(ratio - 1) < 1e-5 and whole < 0.95


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_id_kept_is_the_dense_loss(backend):
    batch = KeptBatch()
    ids, offsets = torch.arange(V).repeat(B * T), torch.arange(0, B * T * V + 1, V)
    objective = PRESETS["dapo"]
    full = batch.linear(objective, backend, kept_tokens=ids.int(), kept_offsets=offsets.int())
    none = batch.linear(objective, backend, kept_tokens=None, kept_offsets=None)
    torch.testing.assert_close(full[0].loss, none[0].loss, rtol=1e-5, atol=1e-7)
    for x, y in zip(full[1:], none[1:], strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("backend", BACKENDS)
def test_masked_rows_are_never_read(backend):
    """REGRESSIONS 17: NaN, and a token that is not among the row's ids, under a False mask."""
    batch, objective = KeptBatch(), PRESETS["dapo_all"]
    clean = batch.linear(objective, backend)
    batch.hidden[~batch.mask] = math.nan
    batch.tokens[~batch.mask] = -1
    for x, y in zip(clean[1:], batch.linear(objective, backend)[1:], strict=True):
        assert torch.equal(x, y) and x.isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_masked_rows_of_logits_are_never_read(backend):
    """REGRESSIONS 17: those over the whole vocabulary as those over a few ids."""
    batch, objective = KeptBatch(), PRESETS["dapo_all"]
    clean = batch.logits(torch.float32)
    dirty = clean.masked_fill(~batch.mask[..., None], math.nan)
    found = []
    for logits in (clean, dirty):
        leaf = logits.requires_grad_()
        result = fastpo.policy_loss(
            leaf,
            batch.tokens,
            batch.advantages,
            backend=backend,
            **batch.options(objective),
            **batch.kept,
        )
        result.loss.backward()
        found.append((result.loss, leaf.grad, *result.metrics.values()))
    for x, y in zip(*found, strict=True):
        assert torch.equal(x, y) and x.isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_returned_numbers_may_be_edited(backend):
    """REGRESSIONS 44: in place, before the backward, which reads none of them."""
    batch, grads = KeptBatch(), []
    for edit in (False, True):
        leaves = [x.clone().requires_grad_() for x in (batch.hidden, batch.weight)]
        scored = fastpo.linear_token_logprobs(
            *leaves, batch.tokens, backend=backend, **batch.head, **batch.kept
        )
        if edit:
            scored.logprobs.mul_(2)
            scored.entropy.zero_()
        grads.append(torch.autograd.grad(scored.logprobs.sum() * (1 - edit / 2), leaves))
    assert all(torch.equal(a, b) and a.any() for a, b in zip(*grads, strict=True))


def test_a_frozen_head_and_missing_gradients():
    batch = KeptBatch(bias=torch.randn(V))
    arguments = {"tokens": batch.tokens, "temperature": 0.8} | batch.kept
    for needs in ((True, False, False), (False, True, False), (False, False, True)):
        leaves = [batch.hidden, batch.weight, batch.head["bias"]]
        hidden, weight, bias = (
            x.clone().requires_grad_(n) for x, n in zip(leaves, needs, strict=True)
        )
        result = fastpo.linear_token_logprobs(hidden, weight, bias=bias, **arguments)
        (result.logprobs.sum() + result.entropy.sum()).backward()
        assert [x.grad is not None for x in (hidden, weight, bias)] == list(needs)
    with torch.no_grad():
        fastpo.linear_token_logprobs(batch.hidden, batch.weight, **arguments)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_an_empty_batch(dtype):
    """REGRESSIONS 43."""
    hidden = torch.empty(0, 8, dtype=dtype, requires_grad=True)
    weight = torch.randn(11, 8).to(dtype).requires_grad_()
    kept = {"kept_tokens": torch.empty(0).long(), "kept_offsets": torch.zeros(1).long()}
    result = fastpo.linear_policy_loss(
        hidden, weight, torch.empty(0).long(), torch.empty(0), objective=fastpo.dapo(), **kept
    )
    result.loss.backward()
    assert result.loss == 0 and not weight.grad.any() and hidden.grad.shape == (0, 8)


BAD = {
    "no offsets": ({"kept_offsets": None}, ValueError, "without kept_offsets"),
    "no ids": ({"kept_tokens": None}, ValueError, "without kept_tokens"),
    "a list": ({"kept_tokens": [1]}, TypeError, "kept_tokens is list"),
    "floats": ({"kept_tokens": torch.zeros(6)}, TypeError, "expected int64 or int32"),
    "too few": ({"kept_offsets": torch.tensor([0, 3])}, ValueError, r"\[2\], expected \[4\]"),
    "falling": ({"kept_offsets": torch.tensor([0, 4, 3, 6])}, ValueError, "4 to 3 at row 1"),
    "short": ({"kept_offsets": torch.tensor([0, 3, 4, 5])}, ValueError, "0 to 5, expected .* 6"),
    "outside": ({"kept_tokens": torch.tensor([1, 2, 3, 9, 5, 6])}, ValueError, r"9 \(row 1\)"),
    "twice": ({"kept_tokens": torch.tensor([1, 2, 1, 4, 5, 6])}, ValueError, "1 twice in row 0"),
    "absent": ({"tokens": torch.tensor([1, 3, 5])}, ValueError, "row 1 do not hold its token 3"),
    "inplace": ({"inplace": True}, ValueError, "inplace with kept_tokens"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused_in_one_line(name):
    change, error, words = BAD[name]
    given = {
        "tokens": torch.tensor([1, 4, 5]),
        "kept_tokens": torch.tensor([1, 2, 3, 4, 5, 6]),
        "kept_offsets": torch.tensor([0, 3, 4, 6]),
    } | change
    with pytest.raises(error, match=words) as raised:
        fastpo.token_logprobs(torch.randn(3, 9), **given)
    assert "\n" not in str(raised.value)
    if name != "inplace":
        with pytest.raises(error, match=words):
            fastpo.linear_token_logprobs(torch.randn(3, 4), torch.randn(9, 4), **given)


def test_a_token_that_was_not_kept_is_nan_where_nobody_checks(monkeypatch):
    """As on a GPU, where reading values would wait for the device."""
    monkeypatch.setattr(checks, "inspects_values", lambda tensor: False)
    kept = {"kept_tokens": torch.arange(1, 6), "kept_offsets": torch.tensor([0, 2, 4, 5])}
    logprobs = fastpo.token_logprobs(torch.randn(3, 9), torch.tensor([1, 5, 6]), **kept).logprobs
    assert logprobs.isnan().tolist() == [False, True, True]
