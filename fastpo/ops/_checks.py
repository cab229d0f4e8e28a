"""Validation of what users pass: one line that says what was got, what is expected, what to do."""

from __future__ import annotations

import math
from numbers import Real

import torch
from torch import Tensor

from fastpo.objective import Objective
from fastpo.segments import Segments

_debug = False


def set_debug(enabled: bool) -> None:
    """Also check on GPU what costs a host synchronization there: token range, temperature values,
    cu_seqlens. CPU tensors are always checked. Off by default."""
    global _debug
    _debug = bool(enabled)


def inspects_values(tensor: Tensor) -> bool:
    """Whether reading values of `tensor` on the host is allowed: on CPU, or in debug mode."""
    return not torch.compiler.is_compiling() and (tensor.device.type == "cpu" or _debug)


def check_tensor(
    name: str, value: object, shape: torch.Size, like: Tensor, *, what: str = ""
) -> None:
    """`value` is a tensor of `shape` on the device of `like`."""
    if not isinstance(value, Tensor):
        raise TypeError(
            f"{name} is {type(value).__name__}, expected a tensor of shape {list(shape)}"
        )
    if value.shape != shape:
        raise ValueError(f"{name} has shape {list(value.shape)}, expected {list(shape)}{what}")
    check_device(name, value, like)


def check_device(name: str, value: Tensor, like: Tensor) -> None:
    """`value` lives where `like` does."""
    if value.device != like.device:
        raise ValueError(f"{name} is on {value.device}, expected {like.device}: move it there")


def check_floating(name: str, value: Tensor) -> None:
    """`value` has a floating dtype."""
    if not value.dtype.is_floating_point:
        raise TypeError(f"{name} has dtype {value.dtype}, expected a floating dtype")


def check_matrix(
    name: str, value: object, last: str, *, leading: tuple[str, ...] = ("N", "B, T")
) -> None:
    """Logits, hidden states or a head: floating, [leading, last], unit stride in the last dim."""
    expected = " or ".join(f"[{dims}, {last}]" for dims in leading)
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} is {type(value).__name__}, expected a tensor {expected}")
    check_not_sharded(name, value)
    if value.dtype not in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        raise TypeError(f"{name} has dtype {value.dtype}, expected float32, bfloat16 or float16")
    if value.ndim not in [dims.count(",") + 2 for dims in leading]:
        raise ValueError(f"{name} has shape {list(value.shape)}, expected {expected}")
    if value.shape[-1] == 0:
        raise ValueError(f"{name} has shape {list(value.shape)}: {last} is 0, expected at least 1")
    if value.shape[-1] > 1 and value.numel() > 0 and value.stride(-1) != 1:
        raise ValueError(
            f"{name} has stride {value.stride(-1)} in its last dimension, expected 1: call "
            f".contiguous()"
        )


def check_not_sharded(name: str, value: Tensor) -> None:
    """Not a DTensor, whose local shard would silently be taken for the whole."""
    if type(value).__name__ == "DTensor":
        raise TypeError(
            f"{name} is a sharded DTensor, expected a plain tensor: call the loss inside the "
            f"model's forward, "
            "where FSDP has gathered it, or pass value.full_tensor(), or tp_group for a "
            "vocabulary shard"
        )


def check_tokens(
    tokens: object, leading: torch.Size, vocabulary: int, mask: Tensor | None, like: Tensor
):
    """tokens: int64 or int32 ids of the leading shape, inside the vocabulary under a True mask."""
    check_tensor("tokens", tokens, leading, like, what=" (one id per row; the ops never shift)")
    if tokens.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"tokens have dtype {tokens.dtype}, expected int64 or int32")
    if not inspects_values(tokens):
        return
    outside = (tokens < 0) | (tokens >= vocabulary)
    if mask is not None:
        outside &= mask
    if outside.any():
        where = outside.nonzero()[0].tolist()
        raise ValueError(
            f"tokens{where} is {tokens[tuple(where)].item()}, expected an id in [0, {vocabulary}): "
            "mask positions that carry no token"
        )


def check_mask(mask: object, leading: torch.Size, like: Tensor) -> None:
    """mask: None or bool of the leading shape."""
    if mask is None:
        return
    check_tensor("mask", mask, leading, like)
    if mask.dtype != torch.bool:
        raise TypeError(f"mask has dtype {mask.dtype}, expected torch.bool: call mask.bool()")


def check_temperature(
    temperature: object, leading: torch.Size, mask: Tensor | None, like: Tensor
) -> None:
    """temperature: a finite number > 0, or a tensor of them with the leading shape."""
    if isinstance(temperature, Tensor):
        check_tensor("temperature", temperature, leading, like, what=" or a Python float")
        check_floating("temperature", temperature)
        if inspects_values(temperature):
            good = temperature.isfinite() & (temperature > 0)
            if not (good if mask is None else good | ~mask).all():
                raise ValueError(
                    "temperature holds a value that is not finite and positive on a live row"
                )
        return
    if isinstance(temperature, bool) or not isinstance(temperature, Real):
        raise TypeError(
            f"temperature is {type(temperature).__name__}, expected a float or a tensor"
        )
    if not 0 < temperature < math.inf:  # Dynamo traces a comparison, not math.isfinite
        raise ValueError(f"temperature is {temperature}, expected a finite number > 0")


def check_normalizer(normalizer: object) -> None:
    """normalizer: None, a finite number >= 0, or a 0-d tensor."""
    if normalizer is None:
        return
    if isinstance(normalizer, Tensor):
        if normalizer.ndim != 0:
            raise ValueError(
                f"normalizer has shape {list(normalizer.shape)}, expected a 0-d tensor or a number"
            )
        if normalizer.dtype == torch.bool or normalizer.is_complex():
            raise TypeError(f"normalizer has dtype {normalizer.dtype}, expected a count")
        if not inspects_values(normalizer):
            return
    elif isinstance(normalizer, bool) or not isinstance(normalizer, Real):
        raise TypeError(
            f"normalizer is {type(normalizer).__name__}, expected a number or a 0-d tensor"
        )
    if not 0 <= normalizer < math.inf:  # Dynamo traces a comparison, not math.isfinite
        raise ValueError(f"normalizer is {normalizer}, expected a finite count >= 0")


def check_objective(objective: object) -> None:
    """objective: a fastpo.Objective."""
    if not isinstance(objective, Objective):
        raise TypeError(
            f"objective is {type(objective).__name__}, expected a fastpo.Objective, e.g. "
            f"fastpo.dapo()"
        )


def sequences_of(leading: torch.Size, cu_seqlens: Tensor | None, like: Tensor) -> Segments:
    """The sequences of a batch; a packed one must say where they begin."""
    if len(leading) == 1 and cu_seqlens is None:
        raise ValueError(
            f"a packed [N] batch, {list(leading)}, needs cu_seqlens (B + 1,) int32, the offsets of "
            "its sequences; or pass a [B, T] batch"
        )
    return segments_of(leading, cu_seqlens, None, like)


def segments_of(
    leading: torch.Size, cu_seqlens: Tensor | None, objective: Objective | None, like: Tensor
) -> Segments:
    """The sequences of a batch, from its leading shape or from cu_seqlens."""
    if len(leading) == 2:
        if cu_seqlens is not None:
            raise ValueError(
                f"cu_seqlens is given for a [B, T] batch {list(leading)}, where every batch row "
                f"is a sequence: "
                "flatten the batch to [N], or leave cu_seqlens None"
            )
        return Segments.padded(*leading, like.device)
    if cu_seqlens is not None:
        _check_cu_seqlens(cu_seqlens, leading[0], like)
        return Segments.packed(cu_seqlens, leading[0])
    if objective.needs_sequences:
        raise ValueError(
            f"objective {objective.name!r} ({objective.aggregation}) needs to know the sequences "
            f"of a packed "
            f"[N] batch: pass cu_seqlens (B + 1,) int32, or a [B, T] batch"
        )
    return Segments.padded(1, leading[0], like.device)


def _check_cu_seqlens(cu_seqlens: object, rows: int, like: Tensor) -> None:
    if not isinstance(cu_seqlens, Tensor):
        raise TypeError(
            f"cu_seqlens is {type(cu_seqlens).__name__}, expected an int32 tensor (B + 1,)"
        )
    if cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"cu_seqlens has dtype {cu_seqlens.dtype}, expected int32")
    if cu_seqlens.ndim != 1 or cu_seqlens.numel() < 1:
        raise ValueError(f"cu_seqlens has shape {list(cu_seqlens.shape)}, expected (B + 1,)")
    check_device("cu_seqlens", cu_seqlens, like)
    if not inspects_values(cu_seqlens):
        return
    if cu_seqlens[0] != 0 or cu_seqlens[-1] != rows or (cu_seqlens.diff() < 0).any():
        raise ValueError(
            f"cu_seqlens is {cu_seqlens[:4].tolist()}...{cu_seqlens[-1].item()}, expected "
            f"non-decreasing offsets "
            f"from 0 to the number of rows, {rows}"
        )
