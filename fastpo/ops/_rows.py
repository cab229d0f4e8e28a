"""Seeing [..., V] tensors as rows without copying them."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor

Temperature = float | Tensor
_Rows = TypeVar("_Rows", bound=tuple)


def row_views(matrix: Tensor) -> list[Tensor]:
    """(n, V) views that cover a [N, V] or [B, T, V] tensor in order, one where strides allow.

    `logits[:, :-1]`, the usual shift, cannot merge its batch and time dimensions: it becomes one
    view per sequence instead of a copy of the logits.
    """
    if matrix.ndim == 2:
        return [matrix]
    batch, width, vocabulary = matrix.shape
    if batch <= 1 or width == 1 or matrix.stride(0) == width * matrix.stride(1):
        return [matrix.flatten(0, 1)] if batch else [matrix.reshape(0, vocabulary)]
    return list(matrix.unbind(0))


def matching_views(grad: Tensor, views: list[Tensor]) -> list[Tensor]:
    """Views of `grad`, which is contiguous or the viewed tensor itself, cut as `views` are."""
    own = row_views(grad)
    if len(own) == len(views):
        return own
    return [grad.flatten(0, 1)[cut] for cut in slices(views)]


def slices(views: list[Tensor]) -> list[slice]:
    """Where the rows of each view stand among all rows."""
    cuts, start = [], 0
    for view in views:
        cuts.append(slice(start, start + view.shape[0]))
        start += view.shape[0]
    return cuts


def concatenate(parts: list[_Rows]) -> _Rows:
    """Join named tuples of (n,) tensors along the rows."""
    if len(parts) == 1:
        return parts[0]
    return type(parts[0])(*(torch.cat(columns) for columns in zip(*parts, strict=True)))


def flat_rows(values: Tensor | None) -> Tensor | None:
    """[...] as contiguous (N,): kernels read neighbours, and reshape alone would keep a stride."""
    return None if values is None else values.reshape(-1).contiguous()


def flat_temperature(temperature: Temperature, matrix: Tensor) -> Temperature:
    """A float, or (N,) in the accumulation dtype: the temperature of the rows of `matrix`.

    Under torch.compile always (N,): a float would be part of the graph, another one compile anew.
    """
    wide = torch.float64 if matrix.dtype == torch.float64 else torch.float32
    if isinstance(temperature, Tensor):
        return flat_rows(temperature.detach()).to(wide)
    if not torch.compiler.is_compiling():
        return float(temperature)
    rows = matrix.shape[:-1].numel()
    return torch.full((rows,), temperature, dtype=wide, device=matrix.device)


def temperature_of(temperature: Temperature, rows: slice) -> Temperature:
    """The temperature of some of the rows."""
    return temperature[rows] if isinstance(temperature, Tensor) else temperature
