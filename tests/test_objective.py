"""The specification against closed forms written out by hand, finite differences and mutants.

The references here are plain Python on floats, one token at a time: they share no code with
`fastpo.objective`.
"""

import itertools
import math

import pytest
import torch
from objective_cases import FP64, PRESETS, label, packed, ragged, surrogate_by_table

from fastpo import objective as spec
from fastpo import presets
from fastpo.backends.base import ObjectiveParams
from fastpo.objective import (
    CLIPPED_HIGH,
    CLIPPED_LOW,
    CLIPPED_MAX,
    KL_ESTIMATORS,
    Objective,
    token_loss,
)


def kl_by_table(params: ObjectiveParams, k: float, d: float) -> tuple[float, float]:
    """KL value and derivative of one token, from the same table."""
    bounded = min(-k, 20)
    q = math.exp(bounded)
    k3 = (q - bounded - 1, 1 - q if -k <= 20 else 0.0)
    sign = math.copysign(1, k) if k else 0.0
    values = [(k, 1.0), (k * k / 2, k), k3, (abs(k), sign), (k, k), (k3[0], k)]
    value, derivative = values[params.kl - 1]
    if params.kl_ratio_weighted:
        r = math.exp(min(max(d, -20), 20))
        dr = r if abs(d) <= 20 else 0.0
        return value * r, derivative * r + value * dr
    return value, derivative


LOG_RATIOS = (-1e3, -30, -20.5, -20, -19.5, -2, -0.25, -0.1, 0, 0.1, 0.2, 0.3, 1.7, 20, 20.5, 1e3)
ADVANTAGES = (-1.7, -0.3, 0.0, 0.6, 2.0)
KL_LOG_RATIOS = (-1e3, -20.5, -20, -3, -0.5, 0, 0.5, 20, 30)


def token_grid() -> tuple[list[tuple[float, float, float]], dict[str, torch.Tensor]]:
    """Every (d, A, k) of the grid, and the tensors that give exactly these numbers."""
    points = list(itertools.product(LOG_RATIOS, ADVANTAGES, KL_LOG_RATIOS))
    d, a, k = (torch.tensor(column, dtype=FP64) for column in zip(*points, strict=True))
    # Multiples of 1/8 keep logp - (logp - d) exact for the d that sit on a bound.
    logp = torch.full_like(d, -0.75)
    return points, {"logp": logp, "a": a, "old": logp - d, "ref": logp - k}


def check_closed_form(objective: Objective) -> None:
    """token_loss and its gradient equal the table of `ObjectiveParams` on the whole grid."""
    _, t = token_grid()
    params = ObjectiveParams.from_objective(objective)
    logp = t["logp"].clone().requires_grad_()
    ref = t["ref"] if objective.kl_coef else None
    terms = token_loss(objective, logp, t["a"], old_logprobs=t["old"], ref_logprobs=ref)
    (grad,) = torch.autograd.grad(terms.loss.sum(), logp)
    columns = (x.tolist() for x in (t["logp"], t["logp"] - t["old"], t["a"], t["logp"] - t["ref"]))
    for i, (x, d, a, k) in enumerate(zip(*columns, strict=True)):
        loss, slope = surrogate_by_table(params, x, d, a)
        kl, kl_slope = kl_by_table(params, k, d) if params.kl else (0.0, 0.0)
        # Terms as large as e^40 cancel, so errors are judged by the largest term of the token.
        allowed = 1e-13 * (1 + abs(loss) + abs(slope) + params.kl_coef * (abs(kl) + abs(kl_slope)))
        at = f"d={d} A={a} k={k}"
        assert abs(terms.loss[i].item() - loss - params.kl_coef * kl) <= allowed, at
        assert abs(grad[i].item() - slope - params.kl_coef * kl_slope) <= allowed, at


TOKEN_OPTIONS = [
    {},
    *({"kl_coef": 0.3, "kl_estimator": kl} for kl in KL_ESTIMATORS),
    *({"kl_coef": 0.3, "kl_estimator": kl, "kl_ratio_weighted": True} for kl in KL_ESTIMATORS),
]


@pytest.mark.parametrize("options", TOKEN_OPTIONS, ids=label)
@pytest.mark.parametrize("name", ["dapo", "cispo", "sapo", "reinforce"])
def test_closed_form(name, options):
    check_closed_form(PRESETS[name](**options))


@pytest.mark.parametrize("options", [{}, {"kl_coef": 0.3}], ids=label)
@pytest.mark.parametrize(
    "objective",
    [
        presets.dapo(ratio_max=3.0),
        presets.ppo(clip_low=10.0, clip_high=0.0, ratio_max=1.01),
        presets.cispo(ratio_max=0.9),
        presets.cispo(ratio_min=0.7, ratio_max=1.28),
        presets.sapo(sapo_tau_pos=0.3, sapo_tau_neg=7.0),
    ],
    ids=str,
)
def test_closed_form_with_other_bounds(objective, options):
    check_closed_form(Objective(**{**vars(objective), **options}))


def slope_at(objective: Objective, d: float, a: float) -> tuple[float, int, float]:
    """c, flags and ratio of one token at exactly d."""
    logp = torch.tensor([d], dtype=FP64, requires_grad=True)
    zero, advantage = torch.zeros(1, dtype=FP64), torch.tensor([a], dtype=FP64)
    terms = token_loss(objective, logp, advantage, old_logprobs=zero)
    (grad,) = torch.autograd.grad(terms.loss.sum(), logp)
    return grad.item(), terms.clipped.item(), terms.ratio.item()


@pytest.mark.parametrize("a", [-1.5, 1.5])
def test_gradient_at_exact_ties(a):
    """On a bound, and at r = 1, the gradient is whole; just outside, where it loses, it is 0."""
    slope, flags, r = slope_at(presets.ppo(), 0.0, a)
    assert (slope, flags, r) == (-a, 0, 1.0)
    for d, bound, losing, flag in (
        (0.25, "clip_high", a > 0, CLIPPED_HIGH),
        (-0.25, "clip_low", a < 0, CLIPPED_LOW),
    ):
        _, _, r = slope_at(presets.reinforce(), d, a)
        width = abs(r - 1)  # exact, and so is 1 + width, for r in [0.5, 2]
        on, flags, _ = slope_at(presets.ppo(**{bound: width}), d, a)
        assert (on, flags) == (-a * r, 0)
        inside = {bound: math.nextafter(width, 0) - 1e-15}
        off, flags, _ = slope_at(presets.ppo(**inside), d, a)
        assert (off, flags) == ((0.0, flag) if losing else (-a * r, 0))


def test_gradient_at_the_two_sided_bound():
    _, _, r = slope_at(presets.reinforce(), 1.0, -1.0)
    assert slope_at(presets.ppo(ratio_max=r), 1.0, -1.0)[:2] == (r, 0)
    below = math.nextafter(r, 0)
    assert slope_at(presets.ppo(ratio_max=below), 1.0, -1.0)[:2] == (0.0, CLIPPED_MAX)
    assert slope_at(presets.ppo(ratio_max=below), 1.0, 1.0)[:2] == (0.0, CLIPPED_HIGH)
    assert slope_at(presets.cispo(ratio_max=r), 1.0, -1.0)[:2] == (r, 0)
    assert slope_at(presets.cispo(ratio_max=below), 1.0, 1.0)[:2] == (-below, CLIPPED_MAX)
    assert slope_at(presets.cispo(ratio_max=below), 1.0, -1.0)[:2] == (below, 0)  # as TRL counts


@pytest.mark.parametrize("name", PRESETS)
def test_on_policy_ratio_is_one_and_keeps_its_gradient(name):
    """REGRESSIONS rows 13 and 19: None equals old = logp bit by bit; off-policy differs."""
    t = ragged()
    segments = packed()
    results = {}
    for key, old in (("none", None), ("equal", t["logp"].clone()), ("off", t["old"])):
        logp = t["logp"].clone().requires_grad_()
        terms = token_loss(PRESETS[name](), logp, t["a"], old_logprobs=old, segments=segments)
        (grad,) = torch.autograd.grad((t["w"] * terms.loss).sum(), logp)
        results[key] = (terms.loss.detach(), grad, terms.ratio, terms.clipped)
    assert all(map(torch.equal, results["none"], results["equal"]))
    assert (results["none"][2] == 1).all() and not results["none"][3].any()
    assert (results["none"][1] != 0).all()
    if PRESETS[name]().surrogate != "reinforce":
        assert not torch.allclose(results["none"][1], results["off"][1])


def test_only_logprobs_get_a_gradient():
    t = {key: value.clone().requires_grad_() for key, value in ragged().items()}
    for name, preset in PRESETS.items():
        terms = token_loss(
            preset(kl_coef=0.1),
            t["logp"],
            t["a"],
            old_logprobs=t["old"],
            ref_logprobs=t["ref"],
            importance_weights=t["iw"],
            sequence_weights=t["sw"],
            segments=packed(),
        )
        inputs = [t[key] for key in ("logp", "a", "old", "ref", "iw", "sw")]
        grads = torch.autograd.grad(terms.loss.sum(), inputs, allow_unused=True)
        assert [grad is not None for grad in grads] == [True] + [False] * 5, name


@pytest.mark.parametrize("estimator", KL_ESTIMATORS)
def test_kl_estimators_are_zero_at_equality_and_reported(estimator):
    t = ragged()
    objective = presets.grpo(kl_coef=1.0, kl_estimator=estimator)
    same = token_loss(objective, t["logp"], t["a"], ref_logprobs=t["logp"])
    assert (same.kl == 0).all()
    terms = token_loss(objective, t["logp"], t["a"], ref_logprobs=t["ref"])
    plain = token_loss(presets.grpo(), t["logp"], t["a"])
    torch.testing.assert_close(terms.loss - plain.loss, terms.kl, rtol=1e-12, atol=1e-12)
    assert not terms.kl.requires_grad
    if estimator in ("k2", "k3", "k3+", "abs"):
        assert (terms.kl > 0).all()


def test_flags_count_what_is_clipped():
    """Against a count by hand, with and without the two-sided bound."""
    points, t = token_grid()
    for ratio_max in (None, 3.0):
        terms = token_loss(
            presets.dapo(ratio_max=ratio_max), t["logp"], t["a"], old_logprobs=t["old"]
        )
        expected = []
        for d, a, _ in points:
            r = math.exp(min(d, 20))
            low = CLIPPED_LOW if a < 0 and r < 0.8 else 0
            high = CLIPPED_HIGH if a > 0 and r > 1.28 else 0
            expected.append(low | high | (CLIPPED_MAX if ratio_max and a < 0 and r > 3 else 0))
        assert terms.clipped.tolist() == expected


def _without_gradient(objective, tokens):
    loss, ratio, clipped = spec._clip(objective, tokens)
    return loss.detach() + 0 * tokens.logprobs, ratio, clipped


def _with_swapped_bounds(objective, tokens):
    swapped = Objective(clip_low=objective.clip_high, clip_high=objective.clip_low)
    return spec._clip(swapped, tokens._replace(bounds=swapped.bounds))


def _with_unclipped_gradient(objective, tokens):
    loss, ratio, clipped = spec._clip(objective, tokens)
    through = spec._exp(tokens.log_ratio) * tokens.weighted_advantages()
    return loss.detach() - through + through.detach(), ratio, clipped


@pytest.mark.parametrize(
    "mutant", [_without_gradient, _with_swapped_bounds, _with_unclipped_gradient]
)
def test_a_mutant_of_the_clip_is_caught(monkeypatch, mutant):
    """The closed-form check must fail when the surrogate is wrong: a zeroed gradient, first."""
    check_closed_form(presets.dapo())
    monkeypatch.setitem(spec._SURROGATES, "clip", mutant)
    with pytest.raises(AssertionError):
        check_closed_form(presets.dapo())
