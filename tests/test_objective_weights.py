"""Weights of tokens and sequences by hand: aggregations, normalizers, the entropy bonus."""

import pytest
import torch
from objective_cases import FP64, packed

from fastpo import presets
from fastpo.objective import (
    AGGREGATIONS,
    Objective,
    entropy_weights,
    token_weights,
)
from fastpo.segments import Segments

CPU = torch.device("cpu")


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
        length = 10 if aggregation == "constant" else None
        objective = Objective(aggregation=aggregation, max_length=length)
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
        objective = Objective(aggregation=aggregation, entropy_coef=0.1)
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


def test_a_mutant_of_the_weights_is_caught(monkeypatch):
    monkeypatch.setattr(Segments, "broadcast", lambda self, x: torch.ones(self.rows, dtype=x.dtype))
    with pytest.raises(AssertionError):
        check_token_weights()
