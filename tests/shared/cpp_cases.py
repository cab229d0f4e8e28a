"""Objectives, and what the tests of the C++ row primitives share."""

from __future__ import annotations

import torch

from fastpo.backends import cpp as cpp_rows
from fastpo.objective import Objective
from fastpo.testing.rows import (
    RowCase,
    run_policy_loss,
)

SURROGATES = {
    "clip": Objective(clip_low=0.2, clip_high=0.28),
    "dual_clip": Objective(clip_low=0.1, clip_high=0.1, ratio_max=1.2),
    "cispo": Objective(surrogate="cispo", ratio_max=1.1),
    "sapo": Objective(surrogate="sapo"),
    "reinforce": Objective(surrogate="reinforce"),
}
CLIP = SURROGATES["clip"]
EVERYTHING = Objective(kl_coef=0.1, kl_estimator="k3", kl_ratio_weighted=True, entropy_coef=0.05)


def run(case: RowCase, objective: Objective = EVERYTHING):
    """Losses and gradient as one list of tensors, out of place."""
    rows, grad = run_policy_loss(cpp_rows, case, objective)
    return [*rows, grad]


def assert_same_bits(a: list[torch.Tensor], b: list[torch.Tensor]) -> None:
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=0, equal_nan=True)
