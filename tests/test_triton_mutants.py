"""Mutants: a kernel with a classic defect must fail the checks that hold the true kernel.

Each mutation replaces one device function, by its name in the module that calls it.
"""

from __future__ import annotations

import importlib

import pytest
import triton
import triton.language as tl
from fastpo.kernels._token_loss import surrogate_loss

from fastpo.backends import triton as triton_rows
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
def _no_gradient(logits, row, inverse_temperature, c, e, HAS_ENTROPY_GRAD: tl.constexpr):
    return tl.zeros(logits.shape, tl.float32)


@triton.jit
def _no_policy_gradient(
    logprob,
    old_logprob,
    ratio,
    slope,
    advantage,
    low,
    high,
    objective,
    KIND: tl.constexpr,
):
    loss, slope, clipped = surrogate_loss(
        logprob, old_logprob, ratio, slope, advantage, low, high, objective, KIND
    )
    return loss, slope * 0.0, clipped


@triton.jit
def _no_token_term(
    out_row_ptr, token, token_logit, V, row, inverse_temperature, c, e, HAS: tl.constexpr
):
    pass


@triton.jit
def _no_entropy_gradient(logits, row, inverse_temperature, c, e, HAS_ENTROPY_GRAD: tl.constexpr):
    row_max, log_sum, _ = row
    return -c * tl.exp(logits.to(tl.float32) * inverse_temperature - row_max - log_sum)


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
    "the policy gradient is zero": ("_token_loss", "surrogate_loss", _no_policy_gradient),
    "the softmax gradient is zero": ("_rows", "softmax_gradient", _no_gradient),
    "the token's own term is missing": ("_rows", "write_token_gradient", _no_token_term),
    "the entropy's gradient is dropped": ("_rows", "softmax_gradient", _no_entropy_gradient),
    "the temperature is ignored": (
        "row_policy_loss",
        "load_inverse_temperature",
        _temperature_ignored,
    ),
    "the KL has no gradient": ("_token_loss", "kl_penalty", _kl_without_slope),
    "the running sums keep their old maximum": ("_rows", "_rescale", _no_rescale),
    "the ratio is always one": ("_token_loss", "importance_ratio", _ratio_of_one),
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
