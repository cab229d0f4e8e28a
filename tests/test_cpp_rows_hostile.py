"""The C++ row primitives on masked rows, NaN, wild tokens, huge log-ratios and many rows."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from cpp_cases import CLIP, EVERYTHING, SURROGATES, assert_same_bits, run

from fastpo.backends import cpp as cpp_rows
from fastpo.objective import Objective
from fastpo.testing.rows import (
    RowCase,
    check_policy_loss,
)

if (reason := cpp_rows.unavailable()) is not None:
    pytest.skip(reason, allow_module_level=True)

pytestmark = pytest.mark.usefixtures("poisoned_empty")


def test_an_entropy_bonus_alone_keeps_a_row_alive():
    """Weight 0 and entropy weight not: c = 0, and the entropy's gradient is all there is."""
    objective = Objective(entropy_coef=0.05)
    case = RowCase.random(2, 90, objective)
    weight = torch.zeros_like(case.inputs.weight)
    case = dataclasses.replace(case, inputs=case.inputs._replace(weight=weight))
    check_policy_loss(cpp_rows, case, objective)


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_dead_rows_are_never_read(poison):
    """NaN times a mask of 0 is NaN: dead rows must be skipped instead (REGRESSIONS row 17)."""
    case = RowCase.random(6, 130, EVERYTHING, temperature=torch.linspace(0.6, 1.4, 6))
    dead = torch.tensor([False, True, False, True, True, False])
    inputs = case.inputs.map(lambda x: x.masked_fill(dead, poison))
    inputs = inputs._replace(
        weight=case.inputs.weight.masked_fill(dead, 0),
        entropy_weight=case.inputs.entropy_weight.masked_fill(dead, 0),
    )
    poisoned = dataclasses.replace(
        case,
        logits=case.logits.masked_fill(dead[:, None], poison),
        tokens=case.tokens.masked_fill(dead, 10**12),
        inputs=inputs,
    )
    clean, got = run(case), run(poisoned)
    for want, have in zip(clean, got, strict=True):
        assert torch.equal(have[~dead], want[~dead])
        assert (have[dead] == 0).all()
    stats = cpp_rows.row_stats(poisoned.logits, poisoned.tokens, case.temperature, ~dead)
    assert all((x[dead] == 0).all() and x[~dead].isfinite().all() for x in stats)


def test_dead_rows_of_row_grad_are_never_read():
    logits = torch.full((3, 40), math.nan)
    stats = [torch.full((3,), math.nan)] * 4
    out = torch.full_like(logits, math.nan)
    zero = torch.zeros(3)
    cpp_rows.row_grad(logits, torch.full((3,), -7), stats, zero, zero, 1.0, out)
    assert (out == 0).all()


@pytest.mark.parametrize("field", ["logits", "old_logprobs", "ref_logprobs", "advantages"])
@pytest.mark.parametrize("name", SURROGATES)
def test_nan_of_an_unmasked_row_stays_visible(name, field):
    """min and max instructions drop NaN by the order of their operands (REGRESSIONS row 18)."""
    objective = dataclasses.replace(SURROGATES[name], kl_coef=0.1)
    case = RowCase.random(3, 90, objective)
    if field == "logits":
        for column in (0, 40, 89):
            logits = case.logits.clone()
            logits[1, column] = math.nan
            loss, logprobs, *_ = run(case.with_logits(logits), objective)
            assert loss.isnan().tolist() == logprobs.isnan().tolist() == [False, True, False]
        return
    if field == "old_logprobs" and name == "reinforce":
        return  # it has no ratio
    values = getattr(case.inputs, field).clone()
    values[1] = math.nan
    case = dataclasses.replace(case, inputs=case.inputs._replace(**{field: values}))
    assert run(case, objective)[0].isnan().tolist() == [False, True, False]


def test_tokens_outside_the_vocabulary():
    """NaN in that row's log-prob and loss, no wild read (REGRESSIONS row 21)."""
    case = RowCase.random(5, 60, CLIP)
    bad = dataclasses.replace(case, tokens=torch.tensor([0, -1, 59, 60, 2**62]))
    loss, logprobs, entropy, *_ = run(bad, CLIP)
    assert loss.isnan().tolist() == logprobs.isnan().tolist() == [False, True, False, True, True]
    assert entropy.isfinite().all()
    stats = cpp_rows.row_stats(bad.logits, bad.tokens, bad.temperature)
    out = torch.empty_like(bad.logits)
    cpp_rows.row_grad(bad.logits, bad.tokens, stats, torch.ones(5), None, bad.temperature, out)
    expected = -(bad.logits / bad.temperature).softmax(1)[1] / bad.temperature
    torch.testing.assert_close(out[1], expected, rtol=1e-5, atol=1e-7)


def test_extreme_log_ratios():
    """A clipped token of log-ratio +-1e3 has gradient 0, not 0 * inf (TRL 1.16, Liger 0.8.5)."""
    case = RowCase.random(4, 80, CLIP)
    old = case.inputs.old_logprobs + torch.tensor([1e3, -1e3, 1e3, -1e3])
    advantages = torch.tensor([1.0, 1.0, -1.0, -1.0])
    inputs = case.inputs._replace(old_logprobs=old, advantages=advantages)
    loss, *_, grad = run(dataclasses.replace(case, inputs=inputs), CLIP)
    assert loss.isfinite().all()
    assert (grad == 0).all()


def test_many_rows():
    """A launch grid of rows overflowed at 65,536 (REGRESSIONS row 2)."""
    check_policy_loss(cpp_rows, RowCase.random(70_000, 8, CLIP), CLIP)


def test_offsets_beyond_32_bits():
    """Rows 2^31 elements apart (REGRESSIONS row 1). The memory between them is never touched."""
    torch.use_deterministic_algorithms(False)  # which would fill it
    apart = torch.empty(2**31 + 64, dtype=torch.bfloat16).as_strided((2, 64), (2**31, 1))
    case = RowCase.random(2, 64, CLIP, dtype=torch.bfloat16)
    want = run(case, CLIP)
    apart.copy_(case.logits)
    rows = cpp_rows.row_policy_loss(apart, case.tokens, case.inputs, CLIP, case.temperature, apart)
    assert_same_bits([*rows, apart], want)
