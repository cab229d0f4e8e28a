"""The row primitives in plain torch, held to the contract where the other backends are."""

from __future__ import annotations

import pytest
import torch

from fastpo.backends import torch as torch_rows
from fastpo.objective import Objective
from fastpo.testing.rows import (
    RowCase,
    check_confident_tokens,
    check_details,
    check_details_of_hostile_rows,
    check_no_subnormal_leaves,
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocab", [1, 7, 1000, 4097])
def test_details(vocab, dtype):
    """Sum of squared probabilities, mean logit and top-1 hit, as TRL's kernel defines them."""
    temperature = torch.linspace(0.5, 2, 6)
    case = RowCase.random(6, vocab, Objective(), dtype=dtype, temperature=temperature)
    case.tokens[::2] = case.logits[::2].argmax(1)
    check_details(torch_rows, case)
    check_details(torch_rows, case.with_logits((case.logits.float() + 80).to(dtype)))


def test_details_of_hostile_rows():
    check_details_of_hostile_rows(torch_rows)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_subnormal_leaves(dtype):
    """REGRESSIONS 49: products over subnormal gradients take 12 to 15 times as long."""
    check_no_subnormal_leaves(torch_rows, dtype)


def test_confident_tokens():
    check_confident_tokens(torch_rows)
