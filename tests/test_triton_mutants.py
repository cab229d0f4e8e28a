"""Mutants: a kernel with a classic defect must fail the checks that hold the true kernel.

Each mutation replaces one device function, by its name in the module that calls it.
"""

from __future__ import annotations

import importlib

import pytest
import triton
import triton.language as tl

from fastpo.backends import triton_rows
from fastpo.objective import Objective
from fastpo.testing.rows import RowCase, check_policy_loss

pytestmark = [
    pytest.mark.usefixtures("triton_backend", "small_layout"),
    pytest.mark.skipif(
        isinstance(tl.sum, triton.JITFunction), reason="compiled kernels are not patched"
    ),
]

OBJECTIVE = Objective(kl_coef=0.1, entropy_coef=0.05)


@triton.jit
def _no_policy_gradient(
    logits, columns, token, row, inverse_temperature, c, e, HAS_ENTROPY_GRAD: tl.constexpr
):
    return tl.zeros(logits.shape, tl.float32)


@triton.jit
def _gradient_without_token(
    logits, columns, token, row, inverse_temperature, c, e, HAS_ENTROPY_GRAD: tl.constexpr
):
    row_max, log_sum, mean = row
    centered = logits.to(tl.float32) * inverse_temperature - row_max
    return tl.exp(centered - log_sum) * (e * (mean - tl.maximum(centered, -200.0)) - c)


@triton.jit
def _entropy_gradient_dropped(
    logits, columns, token, row, inverse_temperature, c, e, HAS_ENTROPY_GRAD: tl.constexpr
):
    row_max, log_sum, _ = row
    p = tl.exp(logits.to(tl.float32) * inverse_temperature - row_max - log_sum)
    return tl.where(columns == token, c, 0.0) - c * p


@triton.jit
def _temperature_ignored(temperature, temperatures_ptr):
    return tl.full((), 1.0, tl.float32)


@triton.jit
def _kl_without_slope(log_ratio, KL: tl.constexpr):
    return tl.exp(-log_ratio) + log_ratio - 1.0, log_ratio * 0.0


@triton.jit
def _no_rescale(top, total, moment, origin, inverse_temperature):
    return total, moment


@triton.jit
def _ratio_of_one(logprob, old_logprob):
    return tl.full((), 1.0, tl.float32), tl.full((), 1.0, tl.float32)


MUTATIONS = {
    "the gradient is zero": ("_rows", "block_gradient", _no_policy_gradient),
    "the token's own term is missing": ("_rows", "block_gradient", _gradient_without_token),
    "the entropy's gradient is dropped": ("_rows", "block_gradient", _entropy_gradient_dropped),
    "the temperature is ignored": (
        "row_policy_loss",
        "load_inverse_temperature",
        _temperature_ignored,
    ),
    "the KL has no gradient": ("row_policy_loss", "kl_penalty", _kl_without_slope),
    "the running sums keep their old maximum": ("_rows", "_rescale", _no_rescale),
    "the ratio is always one": ("row_policy_loss", "importance_ratio", _ratio_of_one),
}


def case() -> RowCase:
    return RowCase.random(4, 1000, OBJECTIVE)


def test_the_true_kernel_passes():
    check_policy_loss(triton_rows, case(), OBJECTIVE)


@pytest.mark.parametrize("defect", MUTATIONS)
def test_mutants_fail(defect, monkeypatch):
    module, name, mutant = MUTATIONS[defect]
    module = importlib.import_module(f"fastpo.kernels.{module}")
    monkeypatch.setattr(module, name, mutant)
    with pytest.raises(AssertionError):
        check_policy_loss(triton_rows, case(), OBJECTIVE)
