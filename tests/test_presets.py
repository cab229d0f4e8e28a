"""The named objectives: their published defaults, overrides and docstrings."""

import re
from pathlib import Path

import pytest

from fastpo import presets
from fastpo.objective import Objective

DEFAULTS = {
    "ppo": {},
    "grpo": {"aggregation": "sequence_mean"},
    "dapo": {"clip_high": 0.28},
    "dr_grpo": {"aggregation": "constant"},
    "bnpo": {},
    "gspo": {
        "ratio_level": "sequence",
        "aggregation": "sequence_mean",
        "clip_low": 3e-4,
        "clip_high": 4e-4,
    },
    "luspo": {
        "ratio_level": "sequence",
        "aggregation": "sequence_sum",
        "clip_low": 2e-3,
        "clip_high": 2.5e-3,
    },
    "gspo_token": {
        "ratio_level": "sequence_token",
        "aggregation": "sequence_mean",
        "clip_low": 3e-4,
        "clip_high": 4e-4,
    },
    "cispo": {"surrogate": "cispo", "ratio_max": 5.0},
    "dppo": {
        "surrogate": "gate",
        "gate": "tv",
        "clip_low": 0.15,
        "clip_high": 0.15,
        "ratio_max": 20.0,
    },
    "ipo": {
        "surrogate": "gate",
        "gate": "tv",
        "gate_two_sided": True,
        "clip_low": 0.1,
        "clip_high": 0.1,
        "old_kl_coef": 2e-3,
    },
    "icepop": {
        "surrogate": "gate",
        "gate": "ratio",
        "gate_two_sided": True,
        "clip_low": 0.5,
        "clip_high": 4.0,
    },
    "topr": {"surrogate": "gate", "ratio_power_pos": 0, "ratio_max": 1.0},
    "aspo": {"surrogate": "gate", "gate": "ratio", "ratio_power_pos": -1, "ratio_max": 3.0},
    "ce_gppo": {
        "surrogate": "gate",
        "gate": "ratio",
        "gate_keep_low": 0.75,
        "gate_keep_high": 1.0,
    },
    "dro": {"surrogate": "reinforce", "old_kl_coef": 0.05},
    "sapo": {"surrogate": "sapo", "aggregation": "sequence_mean"},
    "gmpo": {
        "surrogate": "gmpo",
        "aggregation": "sequence_mean",
        "clip_low": 0.4,
        "clip_high": 0.4,
    },
    "vespo": {"surrogate": "vespo"},
    "gpg": {"surrogate": "reinforce"},
    "reinforce": {"surrogate": "reinforce"},
}
SEQUENCE_LEVEL = {"gspo", "gspo_token", "luspo", "gmpo", "vespo"}


def test_every_preset_is_listed():
    assert set(presets.__all__) == set(DEFAULTS)


@pytest.mark.parametrize("name", DEFAULTS)
def test_defaults(name):
    base = {"clip_low": 0.2, "clip_high": 0.2, "aggregation": "token_mean", "surrogate": "clip"}
    objective = getattr(presets, name)()
    assert objective == Objective(**{"name": name, **base, **DEFAULTS[name]})
    assert objective.kl_coef == objective.entropy_coef == 0
    assert objective.is_token_level == (name not in SEQUENCE_LEVEL)


def test_the_two_gates_of_dppo_have_their_own_bounds():
    kl = presets.dppo(gate="kl")
    assert (kl.gate, kl.clip_low, kl.clip_high) == ("kl", 0.05, 0.05)
    assert presets.dppo(gate="kl", clip_high=0.1).clip_high == 0.1


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("beta", "kl_coef"),
        ("kl_loss_coef", "kl_coef"),
        ("delta", "ratio_max"),
        ("clip_ratio_c", "ratio_max"),
        ("epsilon", "clip_low"),
        ("epsilon_high", "clip_high"),
        ("loss_agg_mode", "aggregation"),
        ("loss_type", "aggregation"),
        ("importance_sampling_level", "ratio_level"),
        ("clip_hihg", "clip_high"),
    ],
)
def test_names_that_people_bring(theirs, ours):
    for make in (presets.grpo, Objective):
        with pytest.raises(TypeError, match=f"unknown override {theirs!r}; did you mean {ours!r}"):
            make(**{theirs: 0.1})


@pytest.mark.parametrize("name", DEFAULTS)
def test_any_field_can_be_overridden(name):
    overrides = {"kl_coef": 0.04, "kl_estimator": "k1+", "aggregation": "constant", "max_length": 7}
    objective = getattr(presets, name)(**overrides, name="mine", entropy_coef=-0.1)
    assert {key: getattr(objective, key) for key in overrides} == overrides
    assert (objective.name, objective.entropy_coef) == ("mine", -0.1)
    assert objective.surrogate == getattr(presets, name)().surrogate


@pytest.mark.parametrize(
    "wrong, nearest",
    [("clip_hgh", "clip_high"), ("beta_kl_coef", "kl_coef"), ("maxlength", "max_length")],
)
@pytest.mark.parametrize("name", DEFAULTS)
def test_unknown_override_names_the_nearest_field(name, wrong, nearest):
    with pytest.raises(TypeError) as error:
        getattr(presets, name)(**{wrong: 1.0})
    message = str(error.value)
    assert f"{name}()" in message and repr(wrong) in message
    assert f"did you mean {nearest!r}" in message
    assert "\n" not in message


def test_every_preset_has_a_row_in_the_docs():
    table = Path(__file__).parent.parent.joinpath("docs", "objectives.md").read_text()
    rows = [line for line in table.splitlines() if line.startswith("| `")]
    named = {name for row in rows for name in re.findall(r"`(\w+)`", row.split("|")[1])}
    assert named == set(presets.__all__)


def test_numbers_of_a_preset_go_with_its_surrogate():
    """Another surrogate or gate is an override like any other; what the user gave still counts."""
    assert presets.dapo(surrogate="cispo", ratio_max=5.0).clip_high == 0.2
    assert not presets.ipo(gate="none").gate_two_sided
    with pytest.raises(ValueError, match="no meaning for surrogate='cispo'"):
        presets.dapo(surrogate="cispo", ratio_max=5.0, clip_high=0.3)


def test_bad_values_are_refused_through_a_preset():
    with pytest.raises(ValueError, match="clip_low is -1, expected a number >= 0"):
        presets.dapo(clip_low=-1)


@pytest.mark.parametrize("name", DEFAULTS)
def test_docstrings_name_formula_and_source(name):
    doc = getattr(presets, name).__doc__
    assert "Source: " in doc
    assert "arXiv" in doc or "doi" in doc
    assert "verl" in doc or "TRL" in doc
