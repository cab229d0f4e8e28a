"""TRL's AsyncGRPOTrainer with fastpo's loss against itself, on trees of samples, five steps."""

from __future__ import annotations

import functools

import parity_notes
import pytest
import trl_async_runs
import trl_runs

pytestmark = pytest.mark.peer


@pytest.fixture
def family(monkeypatch):
    """Stock, fastpo's, and the config; the tree's attention in plain torch."""
    stock = pytest.importorskip("trl.experimental.async_grpo")
    pytest.importorskip("datasets")
    for module, name, value in trl_async_runs.patches():
        monkeypatch.setattr(module, name, value)
    from fastpo.integrations.trl import AsyncGRPOTrainer

    return (stock.AsyncGRPOTrainer, AsyncGRPOTrainer), stock.AsyncGRPOConfig


CASES = {
    "clipped": {"epsilon": 0.1, "epsilon_high": 0.2},
    "accumulation": {"gradient_accumulation_steps": 2},
    "temperature": {"temperature": 0.7},
    "token budget": {"token_budget": 40},
}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_five_steps_equal_stock(case, family, tmp_path, record_property):
    """Loss, gradient norm, metrics and weights, positions shared by two samples included."""
    pair, config = family

    def run(trainer_class):
        return trl_async_runs.trained(trainer_class, config, tmp_path, **CASES[case])

    noted = functools.partial(parity_notes.write, record_property, "TRL AsyncGRPO", case)
    rows = trl_runs.assert_the_same(run, pair, noted)
    assert any(v > 0 for row in rows for k, v in row.items() if k.startswith("clip_ratio"))
