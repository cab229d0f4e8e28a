"""How far two implementations of a loss are apart: noted by tests, read by benchmarks/parity.py."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

PROPERTY = "parity"
Record = Callable[[str, object], None]  # pytest's record_property


def note(record: Record, trainer: str, feature: str, ours: Any, theirs: Any) -> None:
    """Note (loss, gradients ...) of both: relative differences, the gradients' in one norm."""
    write(record, trainer, feature, relative(ours[:1], theirs[:1]), relative(ours[1:], theirs[1:]))


def write(record: Record, trainer: str, feature: str, loss: float, gradient: float) -> None:
    """Note two relative differences."""
    record(PROPERTY, json.dumps([trainer, feature, loss, gradient]))


def relative(ours: Any, theirs: Any) -> float:
    """Norm of the difference over the norm of `theirs`, in fp64, of tensors or numbers."""
    a, b = (_flat(values) for values in (ours, theirs))
    return ((a - b).norm() / b.norm()).item()


def _flat(values: Any) -> Tensor:
    return torch.cat([torch.as_tensor(x, dtype=torch.float64).detach().reshape(-1) for x in values])
