"""The row primitives in plain torch, held to the contract where the other backends are."""

from __future__ import annotations

import pytest
import torch

from fastpo.backends import torch as torch_rows
from fastpo.testing.rows import check_no_subnormal_leaves


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_subnormal_leaves(dtype):
    """REGRESSIONS 49: products over subnormal gradients take 12 to 15 times as long."""
    check_no_subnormal_leaves(torch_rows, dtype)
