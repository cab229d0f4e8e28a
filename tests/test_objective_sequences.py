"""Sequence-level losses, and gradients of all, by hand and by gradcheck."""

import math

import pytest
import torch
from objective_cases import FP64, LENGTHS, PRESETS, label, packed, ragged, surrogate_by_table
from torch.autograd import gradcheck

from fastpo import presets
from fastpo.backends.base import ObjectiveParams
from fastpo.objective import (
    token_loss,
    token_weights,
)

TOKEN_LEVEL = [name for name, preset in PRESETS.items() if preset().is_token_level]
SEQUENCE_LEVEL = [name for name in PRESETS if name not in TOKEN_LEVEL]
GATES = [name for name, preset in PRESETS.items() if preset().surrogate == "gate"]
# The loss's value is not the integral of its gradient.
STOPPED_GRADIENT = ("cispo", "vespo", "gspo_token", *GATES)


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
