"""Log-ratios, ragged batches and closed forms for the tests of the specification."""

import math

import torch

from fastpo import presets
from fastpo.backends.base import ObjectiveParams
from fastpo.segments import Segments

FP64 = torch.float64
PRESETS = {name: getattr(presets, name) for name in presets.__all__}


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x > -700 else 0.0


def surrogate_by_table(
    params: ObjectiveParams, logp: float, d: float, a: float
) -> tuple[float, float]:
    """Loss and c of one token, from the table in `fastpo.backends.base.ObjectiveParams`."""
    r = math.exp(min(max(d, -20), 20))
    dr = r if abs(d) <= 20 else 0.0
    if params.surrogate == 0:
        stopped = (
            (a > 0 and r > params.ratio_high)
            or (a < 0 and r < params.ratio_low)
            or (a < 0 and r > params.ratio_max)
        )
        clip = min(max(r, params.ratio_low), params.ratio_high)
        return -min(min(r, params.ratio_max) * a, clip * a), 0.0 if stopped else -a * dr
    if params.surrogate == 1:
        weight = a * min(max(r, params.ratio_low), params.ratio_high)
        return -weight * logp, -weight
    if params.surrogate == 2:
        tau = params.tau_pos if a > 0 else params.tau_neg
        gate = sigmoid(tau * (r - 1))
        return -4 / tau * a * gate, -4 * a * gate * (1 - gate) * dr
    return -a * logp, -a


def label(options: dict) -> str:
    return "-".join(f"{value}" for value in options.values()) or "plain"


LENGTHS = [4, 1, 0, 6, 3]


def ragged(seed=0, spread=0.2, lengths=LENGTHS) -> dict[str, torch.Tensor]:
    """Realistic packed inputs: sharp policy, old = logp - N(0, spread), advantages of any sign."""
    generator = torch.Generator().manual_seed(seed)
    n = sum(lengths)

    def normal(size=n):
        return torch.randn(size, dtype=FP64, generator=generator)

    logp = -normal().exp()
    return {
        "logp": logp,
        "old": logp - spread * normal(),
        "ref": logp - 0.5 * normal(),
        "a": normal(),
        "w": normal().abs() + 0.1,
        "iw": (0.3 * normal()).exp(),
        "sw": (0.3 * normal(len(lengths))).exp(),
        "entropy": normal().abs(),
    }


def packed(lengths=LENGTHS) -> Segments:
    return Segments.packed(torch.tensor([0, *lengths]).cumsum(0), sum(lengths))
