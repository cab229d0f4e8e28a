"""The gate family, per-token clip bounds, the NLL term and the KL to the behaviour policy.

References are plain Python on floats, one formula per preset, written from the papers.
"""

import itertools
import math

import pytest
import torch

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
from fastpo.segments import Segments

FP64 = torch.float64


def binary_kl(p: float, q: float) -> float:
    """KL of Bernoulli(q) from Bernoulli(p), with verl's 1e-8."""
    return q * math.log(q / p) + (1 - q) * math.log((1 - q + 1e-8) / (1 - p + 1e-8))


# Weight w of a token, c = -A w, from p = exp(logp), q = exp(old) and the sign of A.
def dppo_tv(p, q, a):
    return 0.0 if (a > 0 and p - q > 0.15) or (a < 0 and p - q < -0.15) else min(p / q, 20)


def dppo_kl(p, q, a):
    far = binary_kl(p, q) > 0.05
    return 0.0 if far and ((a > 0 and p > q) or (a < 0 and p < q)) else min(p / q, 20)


def ipo(p, q, a):
    return 0.0 if abs(p - q) > 0.1 else p / q


def icepop(p, q, a):
    return p / q if 0.5 <= p / q <= 5 else 0.0


def topr(p, q, a):
    return 1.0 if a > 0 else min(p / q, 1.0)


def aspo(p, q, a):
    r = p / q
    if a > 0:
        return 0.0 if r > 1.2 else min(1 / r, 3.0)
    return 0.0 if a < 0 and r < 0.8 else min(r, 3.0)


def ce_gppo(p, q, a):
    r = p / q
    if a > 0 and r > 1.2:
        return 1.0 * 1.2
    return 0.75 * 0.8 if a < 0 and r < 0.8 else r


def cispo(p, q, a):
    return min(max(p / q, 0.6), 1.3)


WEIGHTS = {
    "dppo tv": (presets.dppo(), dppo_tv),
    "dppo kl": (presets.dppo(gate="kl"), dppo_kl),
    "ipo": (presets.ipo(old_kl_coef=0.0), ipo),
    "icepop": (presets.icepop(), icepop),
    "topr": (presets.topr(), topr),
    "aspo": (presets.aspo(), aspo),
    "ce_gppo": (presets.ce_gppo(), ce_gppo),
    "cispo": (presets.cispo(ratio_min=0.6, ratio_max=1.3), cispo),
}
PROBS = (1e-8, 1e-3, 0.03, 0.1, 0.3, 0.41, 0.51, 0.72, 0.9, 0.999, 1 - 1e-6)


def grid() -> tuple[list[tuple[float, float, float]], dict[str, torch.Tensor]]:
    """Every (p, q, A) with log-ratios inside the clamp, and the tensors of their logs."""
    points = list(itertools.product(PROBS, PROBS, (-1.7, 0.0, 0.6)))
    p, q, a = (torch.tensor(column, dtype=FP64) for column in zip(*points, strict=True))
    return points, {"logp": p.log(), "old": q.log(), "a": a}


def differentiate(objective, t, **options):
    logp = t["logp"].clone().requires_grad_()
    terms = token_loss(objective, logp, t["a"], old_logprobs=t["old"], **options)
    (grad,) = torch.autograd.grad(terms.loss.sum(), logp)
    return terms, grad


@pytest.mark.parametrize("name", WEIGHTS)
def test_presets_have_the_gradient_of_their_paper(name):
    """-sg(w) A logp, at every combination of p, p_old and the sign of A."""
    objective, weight = WEIGHTS[name]
    points, t = grid()
    terms, grad = differentiate(objective, t)
    expected = torch.tensor([-a * weight(p, q, a) for p, q, a in points], dtype=FP64)
    torch.testing.assert_close(grad, expected, rtol=1e-9, atol=1e-15)
    torch.testing.assert_close(terms.loss.detach(), expected * t["logp"], rtol=1e-9, atol=1e-15)
    assert len({round(x, 6) for x in expected.tolist()}) > 5


def by_table(params: ObjectiveParams, logp: float, old: float, a: float) -> tuple[float, int]:
    """(w, flags) from the table in `fastpo.backends.base.ObjectiveParams`."""
    p, q, d = math.exp(logp), math.exp(old), min(max(logp - old, -20), 20)
    k, most = (
        (params.power_pos, min(params.ratio_max, params.ratio_max_pos))
        if a > 0
        else (params.power_neg, params.ratio_max)
    )
    divergence = [
        0.0,
        math.exp(d),
        p - q,
        math.copysign(1, p - q) * binary_kl(p, q) if p != q else 0.0,
    ][params.gate]
    if params.gate and divergence < params.ratio_low and (a < 0 or params.two_sided):
        return params.keep_low * params.ratio_low, CLIPPED_LOW
    if params.gate and divergence > params.ratio_high and (a > 0 or params.two_sided):
        return params.keep_high * params.ratio_high, CLIPPED_HIGH
    powered = math.exp(k * d)
    return min(max(powered, params.ratio_min), most), CLIPPED_MAX if powered > most else 0


@pytest.mark.parametrize(
    "gate, two_sided", [("none", False), *itertools.product(("ratio", "tv", "kl"), (False, True))]
)
@pytest.mark.parametrize("powers", [(1, 1), (0, -1), (-1, 0)])
def test_every_option_of_the_gate(gate, powers, two_sided):
    keep = {"gate_keep_low": 0.5, "gate_keep_high": 2.0} if gate == "ratio" else {}
    objective = Objective(
        surrogate="gate",
        gate=gate,
        gate_two_sided=two_sided,
        ratio_power_pos=powers[0],
        ratio_power_neg=powers[1],
        ratio_min=0.3,
        ratio_max=6.0,
        ratio_max_pos=2.5,
        **keep,
        **({} if gate == "none" else {"clip_low": 0.1, "clip_high": 0.3}),
    )
    points, t = grid()
    terms, grad = differentiate(objective, t)
    params = ObjectiveParams.from_objective(objective)
    for i, (p, q, a) in enumerate(points):
        weight, flags = by_table(params, math.log(p), math.log(q), a)
        at = f"p={p} q={q} A={a}"
        assert grad[i].item() == pytest.approx(-a * weight, rel=1e-9, abs=1e-15), at
        assert terms.clipped[i].item() == flags, at


def test_a_token_on_a_bound_is_inside():
    """p - p_old exactly at the bound; one bit further it is outside."""
    t = {
        "logp": torch.tensor([0.5], dtype=FP64).log(),
        "old": torch.tensor([0.25], dtype=FP64).log(),
    }
    t["a"] = torch.ones(1, dtype=FP64)
    width = (t["logp"].exp() - t["old"].exp()).item()
    inside, _ = differentiate(presets.dppo(clip_high=width), t)
    outside, grad = differentiate(presets.dppo(clip_high=math.nextafter(width, 0)), t)
    assert inside.clipped.item() == 0 and outside.clipped.item() == CLIPPED_HIGH
    assert grad.item() == 0
    t = {"logp": t["old"], "old": t["logp"], "a": -t["a"]}
    inside, _ = differentiate(presets.dppo(clip_low=width), t)
    outside, grad = differentiate(presets.dppo(clip_low=math.nextafter(width, 0)), t)
    assert inside.clipped.item() == 0 and outside.clipped.item() == CLIPPED_LOW
    assert grad.item() == 0


@pytest.mark.parametrize(
    "logp, old", [(0.0, -0.5), (-0.5, 0.0), (0.0, 0.0), (0.0, 1e-7), (-1e3, 0)]
)
def test_certain_tokens_have_a_finite_divergence(logp, old):
    """p = 1, and log-probs that rounding has lifted above 0: no NaN, no wrong side."""
    t = {"logp": torch.tensor([logp], dtype=FP64), "old": torch.tensor([old], dtype=FP64)}
    for a, flag in ((1.0, CLIPPED_HIGH), (-1.0, CLIPPED_LOW)):
        t["a"] = torch.full((1,), a, dtype=FP64)
        terms, grad = differentiate(presets.dppo(gate="kl"), t)
        assert grad.isfinite().all() and terms.loss.isfinite()
        moved = abs(logp - old) > 1e-3 and (logp > old) == (a > 0)
        assert terms.clipped.item() == (flag if moved else 0)


@pytest.mark.parametrize("estimator", KL_ESTIMATORS)
def test_kl_to_the_behaviour_policy_is_a_kl_to_old(estimator):
    """Beside one to a reference: the sum of both, value and gradient."""
    _, t = grid()
    ref = t["old"] - 0.3
    plain = {"kl_coef": 0.2, "kl_estimator": "k3"}
    both = presets.reinforce(**plain, old_kl_coef=0.7, old_kl_estimator=estimator)
    terms, grad = differentiate(both, t, ref_logprobs=ref)
    alone, alone_grad = differentiate(presets.reinforce(**plain), t, ref_logprobs=ref)
    to_old = presets.reinforce(kl_coef=0.7, kl_estimator=estimator)
    zero = {**t, "a": 0 * t["a"]}
    kl, kl_grad = differentiate(to_old, zero, ref_logprobs=t["old"])
    close = {"rtol": 1e-12, "atol": 1e-12}
    torch.testing.assert_close(terms.loss, alone.loss + kl.loss, **close)
    torch.testing.assert_close(grad, alone_grad + kl_grad, **close)
    assert torch.equal(terms.kl, alone.kl)  # the reference's alone
    assert kl_grad.abs().max() > 0.1


def test_dro_is_reinforce_with_half_the_squared_log_ratio():
    _, t = grid()
    terms, grad = differentiate(presets.dro(old_kl_coef=0.3), t)
    d = t["logp"] - t["old"]
    torch.testing.assert_close(terms.loss.detach(), -t["a"] * t["logp"] + 0.15 * d**2)
    torch.testing.assert_close(grad, -t["a"] + 0.3 * d)


def test_gspo_token_keeps_each_tokens_own_advantage_and_weight():
    """REGRESSIONS 39: gradient -A_t w_t s, where gspo spreads the mean of the sequence."""
    generator = torch.Generator().manual_seed(1)
    logp, old, a, iw = (torch.randn(5, dtype=FP64, generator=generator) * 0.3 for _ in range(4))
    t = {"logp": logp - 1, "old": old - 1, "a": a}
    options = {"importance_weights": iw.exp(), "segments": Segments.padded(1, 5, iw.device)}
    objective = presets.gspo_token(clip_low=0.9, clip_high=9.0)
    terms, grad = differentiate(objective, t, **options)
    s = (t["logp"] - t["old"]).mean().exp()
    torch.testing.assert_close(grad, -a * iw.exp() * s, rtol=1e-12, atol=0)
    gspo, gspo_grad = differentiate(presets.gspo(clip_low=0.9, clip_high=9.0), t, **options)
    torch.testing.assert_close(terms.loss, gspo.loss)
    torch.testing.assert_close(gspo_grad, grad.mean().expand(5))


@pytest.mark.parametrize("level", ["sequence", "sequence_token"])
def test_cispo_and_sapo_on_the_ratio_of_the_sequence(level):
    """CISPO: s in place of r. SAPO: the same, its gradient shared by the sequence or not."""
    generator = torch.Generator().manual_seed(2)
    logp, old, a = (torch.randn(4, dtype=FP64, generator=generator) * 0.3 for _ in range(3))
    t = {"logp": logp - 1, "old": old - 1, "a": a}
    options = {"segments": Segments.padded(1, 4, a.device)}
    s = (t["logp"] - t["old"]).mean().exp()
    _, grad = differentiate(presets.cispo(ratio_level=level), t, **options)
    torch.testing.assert_close(grad, -a * s)
    _, grad = differentiate(presets.sapo(ratio_level=level), t, **options)
    tau = torch.where(a > 0, 1.0, 1.05).double()
    gate = torch.sigmoid(tau * (s - 1))
    own = -4 * a * gate * (1 - gate) * s
    expected = own if level == "sequence_token" else own.mean().expand(4)
    torch.testing.assert_close(grad, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    "objective",
    [presets.dapo(ratio_max=3.0), presets.cispo(), presets.ce_gppo(), presets.icepop()],
    ids=lambda objective: objective.name,
)
def test_clip_bounds_per_token(objective):
    """Every token as under an objective with its bounds: DCPO's and RIPO's depend on p_old."""
    points, t = grid()
    width = (0.05 / t["old"].exp()).sqrt().clamp(max=0.9)
    bounds = (1 - width, 1 + width)
    terms, grad = differentiate(objective, t, clip_bounds=bounds)
    names = (
        ("ratio_min", "ratio_max") if objective.surrogate == "cispo" else ("clip_low", "clip_high")
    )
    for i in range(0, len(points), 7):
        low, high = (bound[i].item() for bound in bounds)
        own = (low, high) if objective.surrogate == "cispo" else (1 - low, high - 1)
        one = {key: x[i : i + 1] for key, x in t.items()}
        alone = Objective(**{**vars(objective), **dict(zip(names, own, strict=True))})
        expected, slope = differentiate(alone, one)
        torch.testing.assert_close(terms.loss[i], expected.loss[0], rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(grad[i], slope[0], rtol=1e-12, atol=1e-14)
        assert terms.clipped[i] == expected.clipped[0]
    assert not torch.equal(grad, differentiate(objective, t)[1])


@pytest.mark.parametrize("name", ["sapo", "gmpo", "vespo", "reinforce", "topr", "dppo"])
def test_clip_bounds_are_refused_where_r_has_none(name):
    row = torch.zeros(2)
    segments = Segments.padded(1, 2, row.device)
    with pytest.raises(ValueError, match=f"clip_bounds.*{name}.*no bounds on r: use surrogate"):
        token_loss(getattr(presets, name)(), row, row, clip_bounds=(row, row), segments=segments)


@pytest.mark.parametrize("name", presets.__all__)
def test_the_nll_term_adds_minus_w_logp(name):
    """Its coefficient too: c_t -= w_t, for token-level and sequence-level objectives alike."""
    _, t = grid()
    t = {key: x[60:84] for key, x in t.items()}
    weights = torch.linspace(0, 2, 24, dtype=FP64)
    segments = Segments.padded(4, 6, weights.device)
    plain, grad = differentiate(getattr(presets, name)(), t, segments=segments)
    with_nll, nll_grad = differentiate(
        getattr(presets, name)(), t, segments=segments, nll_weights=weights
    )
    torch.testing.assert_close(with_nll.loss, plain.loss - weights * t["logp"])
    torch.testing.assert_close(nll_grad, grad - weights)


def test_extras_in_masked_slots_are_never_used():
    """REGRESSIONS 17 for clip bounds and NLL weights."""
    _, t = grid()
    mask = torch.arange(len(t["a"])) % 3 != 0
    extras = torch.rand(3, len(t["a"]), dtype=FP64)
    hostile = extras.masked_fill(~mask, torch.nan)
    results = [
        differentiate(
            presets.dapo(), t, clip_bounds=(1 - low, 1 + high), nll_weights=nll, mask=mask
        )
        for low, high, nll in (extras, hostile)
    ]
    assert torch.equal(results[0][0].loss, results[1][0].loss)
    assert torch.equal(results[0][1], results[1][1])
    assert not results[1][1][~mask].any()
