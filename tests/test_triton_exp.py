"""E = exp(u - o) in the logits GEMM: rows, sums, gradients against fp64, on GPU or interpreted."""

from __future__ import annotations

import math

import pytest
import torch

import fastpo
from fastpo.backends import triton_exp
from fastpo.backends.base import RowInputs
from fastpo.objective import Objective
from fastpo.testing.budget import assert_within_budget

pytestmark = pytest.mark.usefixtures("poisoned_empty", "triton_backend")

N, D, V = 70, 64, 307
HEADS = {
    "plain": {},
    "bias": {"bias": True},
    "scale": {"logit_scale": 0.25},
    "softcap": {"softcap": 5.0},
    "all": {"bias": True, "logit_scale": 1.7, "softcap": 3.0},
}


class Batch:
    """Random rows of a head, their fp64 log-probs and entropies, and c = dL/dlogp, b = dL/dH."""

    def __init__(self, device, n=N, d=D, v=V, *, bias=False, mask=True, seed=0, **head):
        gen = torch.Generator().manual_seed(seed)
        self.hidden = torch.randn(n, d, generator=gen).bfloat16().to(device)
        self.weight = (2 * torch.randn(v, d, generator=gen) / d**0.5).bfloat16().to(device)
        self.bias = torch.randn(v, generator=gen).bfloat16().to(device) if bias else None
        self.tokens = torch.randint(v, (n,), generator=gen).to(device)
        self.mask = ((torch.rand(n, generator=gen) > 0.3) | (not mask)).to(device)
        self.c, self.b = (torch.randn(n, generator=gen).to(device) for _ in range(2))
        self.temperature, self.head = 1.0, head

    def exp_head(self):
        return triton_exp.ExpHead(weight=self.weight, bias=self.bias, **self.head)

    def clean(self):
        return self.hidden.masked_fill(~self.mask[:, None], 0)

    def rows(self, **options):
        e = triton_exp.empty_e(len(self.hidden), self.weight)
        arguments = (self.tokens, self.mask, self.temperature, e)
        return triton_exp.exp_rows(self.clean(), self.exp_head(), *arguments, **options)

    def products(self, dtype):
        product = self.clean().to(dtype) @ self.weight.to(dtype).t()
        product = product if self.bias is None else product + self.bias.to(dtype)
        return product.requires_grad_()

    def scores(self, product):
        """Log-probs and entropies (n,) of `product`, its bias included, in its dtype."""
        z = product * self.head.get("logit_scale", 1.0)
        if "softcap" in self.head:
            z = self.head["softcap"] * torch.tanh(z / self.head["softcap"])
        t = self.temperature
        logp = (z / (t[:, None] if isinstance(t, torch.Tensor) else t)).log_softmax(-1)
        entropy = -(logp.exp() * logp.masked_fill(logp == -math.inf, 0)).sum(-1)
        return logp.gather(1, self.tokens[:, None])[:, 0], entropy


def gradients(batch, g):
    """dH, dW, db in fp32 from a gradient (n, V) of the products."""
    return g @ batch.weight.to(g.dtype), g.t() @ batch.clean().to(g.dtype), g.sum(0)


def exp_gradients(batch, rows):
    """The same, as GEMMs of bf16 operands with fp32 sums make them from E and f."""
    e, f = rows.e.float(), rows.factors
    scaled = (f[:, None] * batch.clean().float()).bfloat16().float()
    return f[:, None] * (e @ batch.weight.float()), e.t() @ scaled, e.t() @ f


def check(batch, *, entropy_grad=False, tanh_slope=False):
    """Numbers within 3x of plain fp32's error; gradients within 2x of a bf16 gradient of logits."""
    rows = batch.rows(tanh_slope=tanh_slope)
    stats = triton_exp.row_stats(rows, batch.tokens, batch.temperature, batch.mask)
    exact_product, product = batch.products(torch.float64), batch.products(torch.float32)
    exact, plain = batch.scores(exact_product), batch.scores(product)
    mask = batch.mask
    assert_within_budget(stats.logprobs[mask], exact[0][mask], plain[0][mask], factor=3)
    assert_within_budget(stats.entropy[mask], exact[1][mask], plain[1][mask], factor=5)
    assert not stats.logprobs[~mask].any() and not stats.entropy[~mask].any()

    loss = (batch.c * exact[0])[mask].sum() + entropy_grad * (batch.b * exact[1])[mask].sum()
    (g,) = torch.autograd.grad(loss, exact_product)
    b = batch.b if entropy_grad else None
    triton_exp.row_grad(rows, batch.tokens, stats, batch.c, b, batch.temperature, rows)
    mine, truth = exp_gradients(batch, rows), gradients(batch, g)
    baseline = gradients(batch, g.bfloat16().float())
    names = ("hidden", "weight", "bias")
    for name, one, exact_one, plain_one in zip(names, mine, truth, baseline, strict=True):
        rounded = (x.bfloat16().float() for x in (one, plain_one))  # as the operands are
        assert_within_budget(next(rounded), exact_one, next(rounded), factor=2, name=name)
    return rows, stats


@pytest.fixture(params=["descriptors", "pointers", "small"])
def tile(request, monkeypatch, device):
    """Each way of cutting E; a GPU may lack descriptors."""
    from fastpo.kernels import _exp_tiles as tiles

    if request.param != "descriptors":
        small = tiles.ExpTile(32, 64, 32, 2, False, False, 2, 4, 2)
        chosen = small if request.param == "small" else tiles._BY_POINTERS
        monkeypatch.setattr(tiles, "_BY_TMA", {})
        monkeypatch.setattr(tiles, "_BY_POINTERS", chosen)
    return request.param


@pytest.mark.parametrize("head", HEADS)
def test_numbers_and_gradients(head, tile, device):
    check(Batch(device, **HEADS[head]), tanh_slope=True)


@pytest.mark.parametrize("head", ["plain", "all"])
def test_gradient_of_the_entropy(head, device):
    """From the logarithm of the stored E, the softcap's slope too."""
    check(Batch(device, **HEADS[head]), entropy_grad=True)


def test_temperatures_per_token(device):
    batch = Batch(device, bias=True, softcap=4.0)
    batch.temperature = torch.linspace(0.5, 2, N, device=device)
    check(batch)


@pytest.mark.parametrize("size", [(1, 8, 1), (3, 72, 40), (130, 40, 513)])
def test_ragged_sizes(size, tile, device):
    """Rows, depth and vocabulary that no tile divides; a depth TMA cannot read."""
    check(Batch(device, *size, mask=size[0] > 1))


def hostile(device, numbers, **head):
    """Rows whose token has a log-prob of about `numbers`, by one other column along the hidden
    state; 0 gives all but e^-60 to the token."""
    batch = Batch(device, **head)
    weight = batch.weight.float()
    for row, number in enumerate(numbers):
        token = int(batch.tokens[row])
        other = weight[token] if number == 0 else weight[(token + 7) % V]
        gap = other @ other if number == 0 else other @ (other - weight[token])
        batch.hidden[row] = (other * (abs(number or 120) / gap)).bfloat16()
        batch.mask[row] = True
    return batch


@pytest.mark.parametrize("entropy_grad", [False, True])
@pytest.mark.parametrize("head", ["plain", "bias"])
def test_improbable_tokens_are_redone(head, entropy_grad, tile, device):
    """log p down to -700: beyond e^60 a row is done again, with its maximum as the offset."""
    batch = hostile(device, (-50, -59, -65, -99, -105, -150, -700, 0), **HEADS[head])
    rows, _ = check(batch, entropy_grad=entropy_grad)
    exact = batch.scores(batch.products(torch.float64))[0]
    assert rows.redone.item() == (exact[batch.mask] < -60).sum() >= 4
    assert rows.e[batch.mask].isfinite().all()


def test_a_token_whose_logit_is_minus_infinity(device):
    """REGRESSIONS 10: log p = -inf, the entropy and the other rows as if nothing were."""
    batch = Batch(device, bias=True, mask=False)
    before = batch.rows()
    blocked = int(batch.tokens[0])
    batch.bias[blocked] = -math.inf
    rows = batch.rows()
    stats = triton_exp.row_stats(rows, batch.tokens, 1.0)
    exact, plain = (batch.scores(batch.products(t)) for t in (torch.float64, torch.float32))
    hit = batch.tokens == blocked
    assert (stats.logprobs[hit] == -math.inf).all() and rows.redone.item() == hit.sum()
    assert_within_budget(stats.logprobs[~hit], exact[0][~hit], plain[0][~hit], factor=3)
    assert_within_budget(stats.entropy, exact[1], plain[1], factor=5)
    triton_exp.row_grad(rows, batch.tokens, stats, batch.c, batch.b, 1.0, rows)
    assert rows.e.isfinite().all() and rows.factors.isfinite().all()
    assert before.redone.item() == 0


def test_minus_infinity_elsewhere(device):
    """Top-k masks and padded vocabulary rows, a whole tile of columns among them."""
    batch = Batch(device, v=700, bias=True)
    batch.bias[256:512] = -math.inf
    batch.bias[::3] = -math.inf
    batch.tokens[:] = 1
    check(batch, entropy_grad=True)


def test_dead_rows_leave_zeros(device):
    """REGRESSIONS 17: E, f and numbers of masked rows are exactly 0; so are they all when all are
    masked."""
    batch = Batch(device)
    for _ in range(2):
        rows = batch.rows()
        stats = triton_exp.row_stats(rows, batch.tokens, 1.0, batch.mask)
        triton_exp.row_grad(rows, batch.tokens, stats, batch.c, None, 1.0, rows)
        dead = ~batch.mask
        numbers = (rows.e, rows.factors, stats.logprobs, stats.entropy)
        assert not any(x[dead].any() for x in numbers)
        batch.mask[:] = False


@pytest.mark.parametrize("entropy_coef", [0.0, 0.1])
def test_rows_without_weight_leave_zeros(entropy_coef, device):
    """REGRESSIONS 17: not masked when E was made, but of weight 0: no number of theirs counts."""
    batch = Batch(device, n=12, mask=False)
    ones = torch.ones(12, device=device)
    weight, nan = ones / 12, ones * math.nan
    weight[3:6] = 0
    entropy_weight = 0.1 * weight if entropy_coef else None
    rows = batch.rows()
    old = torch.where(weight > 0, triton_exp.row_stats(rows, batch.tokens, 1.0).logprobs, nan)
    inputs = RowInputs(weight, torch.where(weight > 0, ones, nan), old, None, entropy_weight)
    objective = Objective(entropy_coef=entropy_coef)
    losses = triton_exp.row_policy_loss(rows, batch.tokens, inputs, objective, 1.0, rows)
    gradient = rows.factors[:, None] * rows.e.float()
    assert not any(x[3:6].any() for x in (*losses, gradient))
    others = weight > 0
    assert gradient.isfinite().all() and gradient[others].any(1).all() and losses.loss[others].all()


def test_nan_stays_in_its_row(device):
    """NaN hidden states, and ids outside the vocabulary (REGRESSIONS 21): seen, not spread."""
    batch = Batch(device, mask=False)
    clean = triton_exp.row_stats(batch.rows(), batch.tokens, 1.0)
    batch.hidden[3, 5] = math.nan
    batch.tokens[9], batch.tokens[11] = V + 5, -1
    rows = batch.rows()
    stats = triton_exp.row_stats(rows, batch.tokens, 1.0)
    triton_exp.row_grad(rows, batch.tokens, stats, batch.c, None, 1.0, rows)
    bad = torch.zeros(N, dtype=torch.bool, device=device)
    bad[[3, 9, 11]] = True
    assert stats.logprobs[bad].isnan().all()
    assert torch.equal(stats.logprobs[~bad], clean.logprobs[~bad])
    assert rows.e[~bad].isfinite().all()


def test_bits_depend_on_the_row_alone(device, monkeypatch):
    """Not on the programs, on descriptors, on the rows beside it, or on whether E is stored."""
    from fastpo.kernels import exp_logits

    batch = hostile(device, (-65, -150))
    batch.hidden, batch.tokens = batch.hidden.repeat(3, 1), batch.tokens.repeat(3)
    batch.mask = batch.mask.repeat(3)

    def numbers(count=3 * N, store=True):
        e = triton_exp.empty_e(count, batch.weight) if store else None
        rows = triton_exp.exp_rows(
            batch.clean()[:count],
            batch.exp_head(),
            batch.tokens[:count],
            batch.mask[:count],
            1.0,
            e,
        )
        stats = triton_exp.row_stats(rows, rows.tokens, 1.0)
        return [stats.logprobs[:N], stats.entropy[:N], *([] if e is None else [e[:N].float()])]

    first = numbers()
    for other in (numbers(N), numbers(2 * N), numbers(store=False)):
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=False))
    for programs in (1, 7):
        monkeypatch.setattr(exp_logits, "processors", lambda device, p=programs: p)
        assert all(torch.equal(a, b) for a, b in zip(first, numbers(), strict=True))


def test_losses_equal_the_row_kernels(device):
    """The rule between the GEMMs is the one of `row_policy_loss`, every input present or not."""
    from fastpo.backends import triton as triton_rows

    batch, gen = Batch(device, n=20), torch.Generator().manual_seed(3)
    normal = lambda: torch.randn(20, generator=gen).to(device)  # noqa: E731
    rows = batch.rows()
    logprobs = triton_exp.row_stats(rows, batch.tokens, 1.0, batch.mask).logprobs
    weight = batch.mask / 20
    old, ref = logprobs + 0.2 * normal(), logprobs + 0.2 * normal()
    old[~batch.mask], full = math.nan, torch.full_like(weight, 0.01) * batch.mask
    cases = [
        (Objective(), RowInputs(weight, normal(), None, None, None)),
        (Objective(surrogate="cispo", ratio_max=1.1), RowInputs(weight, normal(), old, None, None)),
        (Objective(surrogate="sapo"), RowInputs(weight, normal(), old, None, None)),
        (Objective(surrogate="reinforce"), RowInputs(weight, normal(), None, None, None)),
        (
            Objective(kl_coef=0.1, kl_ratio_weighted=True, entropy_coef=0.1),
            RowInputs(weight, normal(), old, ref, full),
        ),
        (
            Objective(),  # bounds per token, and an SFT term
            RowInputs(weight, normal(), old, None, None, 0.9 - 10 * full, 1 + full, 3 * full),
        ),
        (fastpo.dppo(), RowInputs(weight, normal(), old, None, None)),
        (fastpo.topr(), RowInputs(weight, normal(), old, None, None)),
    ]
    product = batch.products(torch.float32).detach()
    for objective, inputs in cases:
        rows, out = batch.rows(), torch.empty_like(product)
        mine = triton_exp.row_policy_loss(rows, batch.tokens, inputs, objective, 1.0, rows)
        theirs = triton_rows.row_policy_loss(product, batch.tokens, inputs, objective, 1.0, out)
        for a, b in zip(mine[:3], theirs[:3], strict=True):
            assert (a - b).abs().max() < 2e-6
        assert torch.equal(mine.clipped, theirs.clipped)
        mine = rows.factors[:, None] * rows.e.float()
        assert (mine - out).norm() < 4e-3 * out.norm()


def test_an_entropy_gradient_needs_e_without_the_tanh_slope(device):
    batch = Batch(device, softcap=3.0)
    rows = batch.rows(tanh_slope=True)
    with pytest.raises(ValueError, match="tanh_slope=False"):
        triton_exp.row_grad(rows, batch.tokens, None, batch.c, batch.b, 1.0, rows)
