"""The specification against closed forms written out by hand, finite differences and mutants.

The references here are plain Python on floats, one token at a time: they share no code with
`fastpo.objective`.
"""

import itertools
import math

import pytest
import torch
from torch.autograd import gradcheck

from fastpo import objective as spec
from fastpo import presets
from fastpo.backends.base import ObjectiveParams
from fastpo.objective import (
    AGGREGATIONS,
    CLIPPED_HIGH,
    CLIPPED_LOW,
    CLIPPED_MAX,
    KL_ESTIMATORS,
    Objective,
    entropy_weights,
    token_loss,
    token_weights,
)
from fastpo.segments import Segments

FP64 = torch.float64
CPU = torch.device("cpu")
PRESETS = {name: getattr(presets, name) for name in presets.__all__}
TOKEN_LEVEL = [name for name, preset in PRESETS.items() if preset().is_token_level]
SEQUENCE_LEVEL = [name for name in PRESETS if name not in TOKEN_LEVEL]
GATES = [name for name, preset in PRESETS.items() if preset().surrogate == "gate"]
# The loss's value is not the integral of its gradient.
STOPPED_GRADIENT = ("cispo", "vespo", "gspo_token", *GATES)


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x > -700 else 0.0


def surrogate_by_table(
    params: ObjectiveParams, logp: float, d: float, a: float
) -> tuple[float, float]:
    """Loss and c of one token, from the table in `fastpo.backends.base.ObjectiveParams`."""
    r = math.exp(min(max(d, -20), 20))
    dr = r if abs(d) <= 20 else 0.0
    if params.surrogate == 0:
        stopped = (
            (a > 0 and r > params.ratio_high)
            or (a < 0 and r < params.ratio_low)
            or (a < 0 and r > params.ratio_max)
        )
        clip = min(max(r, params.ratio_low), params.ratio_high)
        return -min(min(r, params.ratio_max) * a, clip * a), 0.0 if stopped else -a * dr
    if params.surrogate == 1:
        weight = a * min(max(r, params.ratio_low), params.ratio_high)
        return -weight * logp, -weight
    if params.surrogate == 2:
        tau = params.tau_pos if a > 0 else params.tau_neg
        gate = sigmoid(tau * (r - 1))
        return -4 / tau * a * gate, -4 * a * gate * (1 - gate) * dr
    return -a * logp, -a


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


def label(options: dict) -> str:
    return "-".join(f"{value}" for value in options.values()) or "plain"


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


def by_hand(objective, d, logp, a, w, iw, sw):
    """Sequence-level losses of one sequence, and the gradient of sum_t w_t loss_t."""
    n = len(d)
    if objective.surrogate == "clip":
        mean = math.fsum(d) / n
        s = math.exp(min(max(mean, -20), 20))
        ds = s / n if abs(mean) <= 20 else 0.0
        own = objective.ratio_level == "sequence_token"
        params = ObjectiveParams.from_objective(objective)
        losses, slopes = [], []
        for t in range(n):
            loss, c = surrogate_by_table(params, 0.0, math.log(s), a[t] * iw[t] * sw)
            losses.append(loss)
            slopes.append(w[t] * c / s * ds)
        return losses, [n * x for x in slopes] if own else [math.fsum(slopes)] * n
    if objective.surrogate == "gmpo":
        low, high = -objective.clip_low, objective.clip_high
        clipped = [
            0.0 if at == 0 else min(x, high) if at > 0 else max(x, low)
            for x, at in zip(d, a, strict=True)
        ]
        scale = sw * math.exp(math.fsum(map(math.log, iw)) / n) * math.fsum(a) / n
        ratio = math.exp(math.fsum(clipped) / n)
        passes = [
            (at > 0 and x <= high) or (at < 0 and x >= low) for x, at in zip(d, a, strict=True)
        ]
        return [-scale * ratio] * n, [-sum(w) * scale * ratio / n * p for p in passes]
    least = math.log(1e-8)

    def clamp(x):
        return min(max(x, least), 20.0)

    log_w = math.fsum(min(max(x, -20), 20) for x in d) + clamp(math.log(sw))
    log_w = clamp(log_w + math.fsum(clamp(math.log(x)) for x in iw))
    coefficients = []
    for at in a:
        k, rate = (
            (objective.vespo_k_pos, objective.vespo_lambda_pos)
            if at >= 0
            else (objective.vespo_k_neg, objective.vespo_lambda_neg)
        )
        coefficients.append(-at * math.exp(rate + k * log_w - rate * math.exp(log_w)))
    losses = [c * x for c, x in zip(coefficients, logp, strict=True)]
    return losses, [wt * c for wt, c in zip(w, coefficients, strict=True)]


LENGTHS = [4, 1, 0, 6, 3]


def ragged(seed=0, spread=0.2, lengths=LENGTHS) -> dict[str, torch.Tensor]:
    """Realistic packed inputs: sharp policy, old = logp - N(0, spread), advantages of any sign."""
    generator = torch.Generator().manual_seed(seed)
    n = sum(lengths)

    def normal(size=n):
        return torch.randn(size, dtype=FP64, generator=generator)

    logp = -normal().exp()
    return {
        "logp": logp,
        "old": logp - spread * normal(),
        "ref": logp - 0.5 * normal(),
        "a": normal(),
        "w": normal().abs() + 0.1,
        "iw": (0.3 * normal()).exp(),
        "sw": (0.3 * normal(len(lengths))).exp(),
        "entropy": normal().abs(),
    }


def packed(lengths=LENGTHS) -> Segments:
    return Segments.packed(torch.tensor([0, *lengths]).cumsum(0), sum(lengths))


@pytest.mark.parametrize("spread", [0.05, 0.4, 30.0])
@pytest.mark.parametrize(
    "objective",
    [
        *(PRESETS[name]() for name in SEQUENCE_LEVEL),
        presets.gspo(clip_low=0.1, clip_high=0.15, ratio_max=1.2),
        presets.gmpo(clip_low=0.05, clip_high=0.1),
        presets.vespo(vespo_k_pos=1.1, vespo_lambda_neg=0.7),
    ],
    ids=str,
)
@pytest.mark.parametrize("weights", ["none", "tokens", "sequences", "both"])
def test_sequence_level_by_hand(objective, spread, weights):
    t = ragged(seed=3, spread=spread)
    iw = t["iw"] if weights in ("tokens", "both") else None
    sw = t["sw"] if weights in ("sequences", "both") else None
    logp = t["logp"].clone().requires_grad_()
    terms = token_loss(
        objective,
        logp,
        t["a"],
        old_logprobs=t["old"],
        importance_weights=iw,
        sequence_weights=sw,
        segments=packed(),
    )
    (grad,) = torch.autograd.grad((t["w"] * terms.loss).sum(), logp)
    losses, grads = [], []
    rows = iter(range(sum(LENGTHS)))
    for b, length in enumerate(LENGTHS):
        if length == 0:
            continue
        own = [next(rows) for _ in range(length)]
        columns = [x[own].tolist() for x in (t["logp"] - t["old"], t["logp"], t["a"], t["w"])]
        token_iw = [1.0] * length if iw is None else iw[own].tolist()
        part = by_hand(objective, *columns, token_iw, 1.0 if sw is None else sw[b].item())
        losses += part[0]
        grads += part[1]
    close = {"rtol": 1e-11, "atol": 1e-13}
    torch.testing.assert_close(terms.loss.detach(), torch.tensor(losses, dtype=FP64), **close)
    torch.testing.assert_close(grad, torch.tensor(grads, dtype=FP64), **close)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"kl_coef": 0.3, "kl_estimator": "k1"},
        {"kl_coef": 0.3, "kl_estimator": "k2", "kl_ratio_weighted": True},
        {"kl_coef": 0.3, "kl_estimator": "k3"},
        {"kl_coef": 0.3, "kl_estimator": "k3", "kl_ratio_weighted": True},
        {"kl_coef": 0.3, "kl_estimator": "abs"},
    ],
    ids=label,
)
@pytest.mark.parametrize("name", [name for name in PRESETS if name not in STOPPED_GRADIENT])
def test_gradcheck(name, options):
    """Finite differences of the weighted loss, importance weights included (REGRESSIONS row 19)."""
    if name in ("gspo", "luspo"):
        options = {**options, "clip_low": 0.2, "clip_high": 0.2}  # else nearly all are clipped
    objective = PRESETS[name](**options)
    t = ragged(seed=11)
    segments = packed()
    weight = token_weights(
        objective if objective.aggregation != "constant" else presets.dr_grpo(max_length=9),
        None,
        segments,
        dtype=FP64,
    )

    def weighted(logp):
        terms = token_loss(
            objective,
            logp,
            t["a"],
            old_logprobs=t["old"],
            ref_logprobs=t["ref"] if objective.kl_coef else None,
            importance_weights=t["iw"],
            sequence_weights=t["sw"],
            segments=segments,
        )
        return (weight * t["w"] * terms.loss).sum()

    logp = t["logp"].clone().requires_grad_()
    assert gradcheck(weighted, logp, rtol=1e-6, atol=1e-9)
    (grad,) = torch.autograd.grad(weighted(logp), logp)
    assert grad.abs().max() > 1e-3


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


WEIGHTS_BY_HAND = {
    "token_mean": [1 / 5, 0, 1 / 5, 0, 1 / 5, 1 / 5, 1 / 5, 0],
    "sequence_mean": [1 / 8, 0, 1 / 8, 0, 1 / 12, 1 / 12, 1 / 12, 0],
    "sequence_sum": [1 / 4, 0, 1 / 4, 0, 1 / 4, 1 / 4, 1 / 4, 0],
    "constant": [1 / 40, 0, 1 / 40, 0, 1 / 40, 1 / 40, 1 / 40, 0],
}


def check_token_weights() -> None:
    """Sequences of 3, 0, 4 and 1 tokens, with 2, 0, 3 and 0 of them mask."""
    mask = torch.tensor([1, 0, 1, 0, 1, 1, 1, 0], dtype=torch.bool)
    segments = packed([3, 0, 4, 1])
    for aggregation, expected in WEIGHTS_BY_HAND.items():
        objective = Objective(aggregation=aggregation, max_length=10)
        weight = token_weights(objective, mask, segments, dtype=FP64)
        torch.testing.assert_close(weight, torch.tensor(expected, dtype=FP64), rtol=1e-15, atol=0)


def test_weights_and_denominators_come_from_one_mask():
    """REGRESSIONS row 14: dropped tokens leave the denominator too."""
    check_token_weights()


@pytest.mark.parametrize("kind", [int, float, torch.tensor])
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_normalizer_replaces_the_count(aggregation, kind):
    mask = torch.tensor([True, False, True, True, True, True])
    segments = Segments.padded(2, 3, CPU)
    objective = Objective(aggregation=aggregation)
    own = token_weights(objective, mask, segments, dtype=FP64)
    count = 5 if aggregation == "token_mean" else 2
    given = token_weights(objective, mask, segments, normalizer=kind(40), dtype=FP64)
    torch.testing.assert_close(given * 40, own * count, rtol=1e-15, atol=0)


@pytest.mark.parametrize("zero", [0, 0.0, torch.tensor(0)])
def test_a_count_of_zero_gives_zero_and_not_nan(zero):
    for aggregation in AGGREGATIONS:
        objective = Objective(aggregation=aggregation, max_length=3, entropy_coef=0.1)
        mask, segments = torch.zeros(6, dtype=torch.bool), Segments.padded(2, 3, CPU)
        assert not token_weights(objective, mask, segments, normalizer=zero).any()
        assert not entropy_weights(objective, mask, segments).any()


def test_constant_aggregation_takes_the_batch_width():
    segments = Segments.padded(2, 3, CPU)
    assert token_weights(presets.dr_grpo(), None, segments, dtype=FP64).tolist() == [1 / 6] * 6
    longer = token_weights(presets.dr_grpo(max_length=30), None, segments, dtype=FP64)
    assert longer.tolist() == [1 / 60] * 6
    with pytest.raises(ValueError, match=r"packed batch needs Objective.max_length.*dr_grpo\("):
        token_weights(presets.dr_grpo(), None, packed())


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_entropy_bonus_is_a_token_mean_whatever_the_aggregation(aggregation):
    mask = torch.tensor([True, False, True, True, True, True])
    segments = Segments.padded(2, 3, CPU)
    objective = Objective(aggregation=aggregation, entropy_coef=0.05)
    weight = entropy_weights(objective, mask, segments, dtype=FP64)
    torch.testing.assert_close(weight, mask * torch.tensor(0.05 / 5, dtype=FP64))
    assert entropy_weights(Objective(aggregation=aggregation), mask, segments) is None
    if aggregation == "token_mean":
        halved = entropy_weights(objective, mask, segments, normalizer=10, dtype=FP64)
        torch.testing.assert_close(halved, weight / 2)
    else:
        with pytest.raises(ValueError, match=f"counts sequences.*{aggregation}.*token_mean"):
            entropy_weights(objective, mask, segments, normalizer=10)


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


def test_a_mutant_of_the_weights_is_caught(monkeypatch):
    monkeypatch.setattr(Segments, "broadcast", lambda self, x: torch.ones(self.rows, dtype=x.dtype))
    with pytest.raises(AssertionError):
        check_token_weights()
