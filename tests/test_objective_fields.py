"""No field of an Objective is taken and ignored: changed alone, it changes the loss or raises."""

from __future__ import annotations

import itertools
from dataclasses import fields, replace

import pytest
import torch

import fastpo
from fastpo.objective import AGGREGATIONS, GATES, KL_ESTIMATORS, RATIO_LEVELS, SURROGATES, Objective

GRADED = (0.05, 0.3, 1.2)
OTHERS = {  # other values of every field: a new one needs its line here
    "surrogate": SURROGATES,
    "ratio_level": RATIO_LEVELS,
    "aggregation": AGGREGATIONS,
    "clip_low": GRADED,
    "clip_high": GRADED,
    "ratio_max": (None, 0.9, 1.3, 2.0),
    "ratio_min": GRADED,
    "gate": GATES,
    "gate_two_sided": (False, True),
    "gate_keep_low": GRADED,
    "gate_keep_high": GRADED,
    "ratio_power_pos": (1, 0, -1),
    "ratio_power_neg": (1, 0, -1),
    "ratio_max_pos": (None, 0.9, 1.3),
    "kl_coef": GRADED,
    "kl_estimator": KL_ESTIMATORS,
    "kl_ratio_weighted": (False, True),
    "old_kl_coef": GRADED,
    "old_kl_estimator": KL_ESTIMATORS,
    "entropy_coef": GRADED,
    "max_length": (None, 5, 70),
    "sapo_tau_pos": GRADED,
    "sapo_tau_neg": GRADED,
    "vespo_k_pos": GRADED,
    "vespo_lambda_pos": GRADED,
    "vespo_k_neg": GRADED,
    "vespo_lambda_neg": GRADED,
}
KINDS = [{"surrogate": name} for name in SURROGATES if name != "gate"]
KINDS += [{"surrogate": "gate", "gate": gate} for gate in GATES]
for kind in KINDS:
    kind |= {"ratio_max": 1.5} if kind["surrogate"] == "cispo" else {}
    kind |= {"clip_low": 0.1, "clip_high": 0.4} if kind.get("gate") in ("ratio", "tv", "kl") else {}
EXTRAS = (
    {},
    {"kl_coef": 0.2, "old_kl_coef": 0.1},
    {"aggregation": "constant"},
    {"ratio_level": "sequence"},
    {"ratio_level": "sequence_token", "kl_coef": 0.2},
)


def twins(a: Objective, b: Objective) -> bool:
    """Two names of one loss: cispo is a gate without bounds; its sequence ratio has no gradient."""
    if a.surrogate == b.surrogate == "cispo":
        return "token" not in (a.ratio_level, b.ratio_level)
    return {a.surrogate, b.surrogate} == {"cispo", "gate"}


def test_every_field_is_among_them():
    assert {field.name for field in fields(Objective)} - {"name"} == OTHERS.keys()


def outcome(objective: Objective) -> torch.Tensor:
    """Loss and both gradients, on tokens likely and rare, near and far from the old policy."""
    gen = torch.Generator().manual_seed(3)

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=gen, dtype=torch.float64)

    logprobs = -normal(10, 64).exp()
    shifts = torch.linspace(-0.8, 0.8, 10, dtype=torch.float64)[:, None]
    old, ref = (logprobs * (shifts + normal(10, 64)).exp() for _ in range(2))
    advantages, mask = normal(10, 64), torch.rand(10, 64, generator=gen) > 0.3
    mask[2::2, 3:] = False  # short sequences, whose sum of d is within vespo's range
    leaves = [logprobs.requires_grad_(), normal(10, 64).abs().requires_grad_()]
    result = fastpo.policy_loss_from_logprobs(
        leaves[0],
        advantages,
        entropy=leaves[1],
        objective=objective,
        mask=mask,
        old_logprobs=old,
        ref_logprobs=ref if objective.kl_coef else None,
    )
    grads = torch.autograd.grad(result.loss, leaves, materialize_grads=True)
    return torch.cat([result.loss.detach().view(1), *(x.flatten() for x in grads)])


@pytest.mark.parametrize("kind", KINDS, ids=lambda x: "-".join(map(str, x.values())))
def test_a_field_that_changes_nothing_is_refused(kind):
    """REGRESSIONS 4, 73: for every surrogate and gate, with and without KL, at every level."""
    for extra in EXTRAS:
        try:
            base = Objective(**kind, **extra)
        except ValueError:
            continue
        before = outcome(base)
        for name, value in itertools.chain(*([(n, x) for x in v] for n, v in OTHERS.items())):
            if value == getattr(base, name):
                continue
            try:
                changed = replace(base, **{name: value})
            except ValueError:
                continue
            if not twins(base, changed):
                ignored = torch.equal(outcome(changed), before)
                assert not ignored, f"{base}: {name}={value} is ignored"


@pytest.mark.parametrize(
    "options, words",
    [
        ({"kl_estimator": "k1"}, "kl_estimator is 'k1' but has no meaning for kl_coef=0; leave it"),
        ({"kl_ratio_weighted": True}, "kl_ratio_weighted is True .* kl_coef=0; leave it False"),
        ({"old_kl_estimator": "k3"}, "old_kl_estimator is 'k3' .* old_kl_coef=0; leave it 'k2'"),
        ({"max_length": 8}, "max_length is 8 .* aggregation='token_mean'; leave it None"),
    ],
)
def test_refusals(options, words):
    """REGRESSIONS 73."""
    with pytest.raises(ValueError, match=words):
        Objective(**options)
