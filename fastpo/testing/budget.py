"""Error budgets derived from data: how far a result may be from the float64 truth.

No hand-tuned tolerances: the budget of a low-precision computation is a multiple of the error that
plain torch makes when it does the same computation in the same low precision.
"""

from __future__ import annotations

import torch
from torch import Tensor


def relative_error(actual: Tensor, exact: Tensor) -> float:
    """||actual - exact|| / ||exact|| in float64; inf when anything is NaN. Any equal shapes."""
    difference = (actual.double() - exact.double()).norm().item()
    scale = exact.double().norm().item()
    error = difference / scale if scale > 0 else difference
    return error if error == error else float("inf")


def cosine(actual: Tensor, exact: Tensor) -> float:
    """Cosine of the angle between two tensors seen as vectors; 1 if both are 0, 0 if one is."""
    a, b = actual.double().flatten(), exact.double().flatten()
    norms = (a.norm() * b.norm()).item()
    if norms == 0:
        return 1.0 if a.norm() == b.norm() else 0.0
    return (a @ b).item() / norms


def assert_within_budget(
    actual: Tensor, exact: Tensor, baseline: Tensor, *, factor: float = 2.0, name: str = "result"
) -> None:
    """`actual` is at most `factor` times as far from `exact` (fp64) as `baseline` is.

    Half a unit in the last place of actual's dtype is always allowed: a lucky baseline is no
    target.

    Raises:
        AssertionError: names the shape, both errors, and the worst element with its coordinates.
    """
    if actual.shape != exact.shape:
        raise AssertionError(f"{name}: shape {list(actual.shape)}, expected {list(exact.shape)}")
    error, reference = relative_error(actual, exact), relative_error(baseline, exact)
    budget = factor * reference + torch.finfo(actual.dtype).eps / 2
    if error <= budget:
        return
    distance = (actual.double() - exact.double()).abs().nan_to_num(torch.inf)
    worst = torch.unravel_index(distance.argmax(), distance.shape) if distance.numel() else ()
    where = tuple(int(i) for i in worst)
    raise AssertionError(
        f"{name} {list(actual.shape)}: relative error {error:.3g} exceeds the budget {budget:.3g} "
        f"({factor:g} x baseline {reference:.3g}); worst at {where}: got "
        f"{actual[where].item():.9g}, "
        f"exact {exact[where].item():.9g}, baseline {baseline[where].item():.9g}"
    )
