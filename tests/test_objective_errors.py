"""Every refusal of `Objective` and `token_loss`: what was got, what is expected."""

import pytest
import torch

from fastpo import presets
from fastpo.objective import Objective, token_loss
from fastpo.segments import Segments

BAD = [
    ({"surrogate": "ppo"}, ValueError, ["surrogate is 'ppo'", "clip, cispo, sapo, reinforce"]),
    ({"ratio_level": "batch"}, ValueError, ["ratio_level is 'batch'", "token, sequence"]),
    ({"aggregation": "mean"}, ValueError, ["aggregation is 'mean'", "token_mean, sequence_mean"]),
    ({"kl_estimator": "k2+"}, ValueError, ["kl_estimator is 'k2+'", "k1, k2, k3, abs, k1+, k3+"]),
    ({"clip_low": -0.1}, ValueError, ["clip_low is -0.1", ">= 0"]),
    ({"clip_high": -1}, ValueError, ["clip_high is -1", ">= 0"]),
    ({"kl_coef": -1e-3}, ValueError, ["kl_coef is -0.001", ">= 0"]),
    ({"vespo_lambda_neg": -2.0}, ValueError, ["vespo_lambda_neg is -2.0", ">= 0"]),
    ({"vespo_k_pos": -2.0}, ValueError, ["vespo_k_pos is -2.0", ">= 0"]),
    ({"sapo_tau_pos": 0.0}, ValueError, ["sapo_tau_pos is 0.0", "> 0"]),
    ({"sapo_tau_neg": -1.0}, ValueError, ["sapo_tau_neg is -1.0", "> 0"]),
    ({"max_length": 0}, ValueError, ["max_length is 0", "positive"]),
    ({"ratio_max": 1.2}, ValueError, ["ratio_max is 1.2", "more than 1.2"]),
    ({"surrogate": "cispo"}, ValueError, ["cispo", "needs ratio_max"]),
    ({"surrogate": "cispo", "ratio_max": 0.0}, ValueError, ["ratio_max is 0.0", "more than 0"]),
    ({"surrogate": "sapo", "ratio_max": 3.0}, ValueError, ["no meaning", "'sapo'", "None"]),
    ({"surrogate": "reinforce", "ratio_level": "sequence"}, ValueError, ["'reinforce'", "'clip'"]),
    ({"surrogate": "gate", "ratio_level": "sequence_token"}, ValueError, ["'gate'", "'clip'"]),
    ({"gate": "tv"}, ValueError, ["gate is 'tv'", "no meaning", "'clip'", "'none'"]),
    ({"surrogate": "gate", "gate": "js"}, ValueError, ["gate is 'js'", "none, ratio, tv, kl"]),
    ({"surrogate": "gate", "gate_keep_low": 0.5}, ValueError, ["gate='none'", "gate='ratio'"]),
    ({"surrogate": "gate", "ratio_power_pos": 2}, ValueError, ["ratio_power_pos is 2", "0 or -1"]),
    ({"surrogate": "gate", "ratio_power_neg": 1.0}, TypeError, ["ratio_power_neg", "int"]),
    ({"surrogate": "gate", "ratio_min": 2.0, "ratio_max": 1.0}, ValueError, ["more than 2"]),
    ({"ratio_min": 0.5}, ValueError, ["ratio_min is 0.5", "no meaning", "leave it 0.0"]),
    ({"old_kl_coef": -1.0}, ValueError, ["old_kl_coef is -1.0", ">= 0"]),
    ({"old_kl_estimator": "k9"}, ValueError, ["old_kl_estimator is 'k9'", "k1, k2, k3"]),
    ({"entropy_coef": float("nan")}, ValueError, ["entropy_coef is nan", "finite"]),
    ({"clip_high": float("inf")}, ValueError, ["clip_high is inf", "finite"]),
    ({"kl_coef": 10**400}, ValueError, ["kl_coef is an integer of 1329 bits", "finite"]),
    ({"max_length": 10**400}, ValueError, ["max_length is an integer", "finite"]),
    ({"clip_low": "0.2"}, TypeError, ["clip_low is '0.2' (str)", "expected float"]),
    ({"kl_coef": None}, TypeError, ["kl_coef is None", "expected float"]),
    ({"clip_low": True}, TypeError, ["clip_low is True (bool)", "expected float"]),
    ({"kl_ratio_weighted": 1}, TypeError, ["kl_ratio_weighted is 1 (int)", "expected bool"]),
    ({"max_length": 8.0}, TypeError, ["max_length is 8.0 (float)", "expected int | None"]),
    ({"surrogate": "sapo", "clip_low": 0.1}, ValueError, ["clip_low is 0.1", "'sapo'", "0.2"]),
    ({"surrogate": "reinforce", "clip_high": 0.3}, ValueError, ["clip_high", "'reinforce'"]),
    ({"surrogate": "cispo", "ratio_max": 5.0, "clip_high": 4}, ValueError, ["clip_high", "cispo"]),
    ({"surrogate": "gate", "clip_low": 0.1}, ValueError, ["clip_low is 0.1", "gate='none'"]),
    ({"sapo_tau_neg": 1.1}, ValueError, ["sapo_tau_neg is 1.1", "'clip'", "leave it 1.05"]),
    ({"vespo_k_pos": 1.0}, ValueError, ["vespo_k_pos is 1.0", "'clip'", "leave it 2.0"]),
    ({"surrogate": "gate", "gate_two_sided": True}, ValueError, ["gate_two_sided", "no bounds"]),
    ({"clip_high": 1e39}, ValueError, ["clip_high is 1e+39", "finite"]),
    ({"name": 3}, TypeError, ["name is 3 (int)", "expected str"]),
    ({"ratio_max": torch.tensor(3.0)}, TypeError, ["ratio_max", "(Tensor)", "float | None"]),
]


@pytest.mark.parametrize(
    "fields, error, fragments",
    BAD,
    ids=lambda x: ", ".join(x)[:40] if isinstance(x, dict) else None,
)
def test_objective_refuses(fields, error, fragments):
    """REGRESSIONS 53 among them: fields that mean nothing to the surrogate."""
    with pytest.raises(error) as raised:
        Objective(**fields)
    message = str(raised.value)
    assert all(fragment in message for fragment in fragments), message
    assert "\n" not in message


def test_objective_is_immutable_and_hashable():
    objective = presets.dapo()
    with pytest.raises(AttributeError):
        objective.clip_low = 0.1
    assert hash(objective) == hash(presets.dapo()) != hash(presets.dapo(clip_low=0.1))


def test_integers_are_numbers_too():
    assert presets.ppo(clip_low=1, clip_high=2, ratio_max=4).ratio_max == 4


ROW = torch.zeros(4)


@pytest.mark.parametrize("name", ["gspo", "luspo", "gmpo", "vespo"])
def test_sequence_objectives_need_segments(name):
    with pytest.raises(ValueError, match=f"'{name}' couples whole sequences.*pass the Segments"):
        token_loss(getattr(presets, name)(), ROW, ROW)


def test_sequence_weights_need_segments():
    with pytest.raises(ValueError, match=r"sequence_weights.*segments=None"):
        token_loss(presets.dapo(), ROW, ROW, sequence_weights=torch.ones(2))


def test_reference_is_required_exactly_with_kl():
    segments = Segments.padded(1, 4, torch.device("cpu"))
    with pytest.raises(ValueError, match=r"ref_logprobs is None with kl_coef=0.1: .*required"):
        token_loss(presets.grpo(kl_coef=0.1), ROW, ROW, segments=segments)
    with pytest.raises(ValueError, match=r"ref_logprobs is a tensor with kl_coef=0: .*required"):
        token_loss(presets.grpo(), ROW, ROW, ref_logprobs=ROW, segments=segments)
