"""Validation of what users pass to the linear ops, and the choice of rows that enter the GEMMs."""

from __future__ import annotations

import math
from numbers import Integral, Real

import torch
import torch.distributed as dist
from torch import Tensor

from fastpo import backends
from fastpo.ops import _checks
from fastpo.ops._linear_call import LinearCall
from fastpo.ops._rows import flat_rows, flat_temperature
from fastpo.ops._tensor_parallel import VocabularyShard


def operands(hidden: object, weight: object, bias: object) -> tuple[Tensor, Tensor, Tensor | None]:
    """hidden [..., D], weight [V, D], bias [V], checked, in one dtype: autocast's where on."""
    if isinstance(weight, Tensor) and weight.numel() == 0:
        raise ValueError(
            f"weight has shape {list(weight.shape)}, no elements: if DeepSpeed ZeRO-3 partitioned "
            "it, call inside deepspeed.zero.GatheredParameters"
        )
    _checks.check_matrix("hidden", hidden, "D")
    _checks.check_matrix("weight", weight, "D", leading=("V",))
    _checks.check_device("weight", weight, hidden)
    if weight.shape[1] != hidden.shape[-1]:
        raise ValueError(
            f"weight has shape {list(weight.shape)}, expected [V, {hidden.shape[-1]}], the LM head "
            f"of hidden states {list(hidden.shape)}"
        )
    if bias is not None:
        _checks.check_not_sharded("bias", bias)
        _checks.check_tensor("bias", bias, weight.shape[:1], hidden)
    return _one_dtype(hidden, weight, bias)


def _one_dtype(
    hidden: Tensor, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    if torch.is_autocast_enabled(hidden.device.type) and hidden.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(hidden.device.type)
        return hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    for name, value in (("weight", weight), ("bias", bias)):
        if value is not None and value.dtype != hidden.dtype:
            raise TypeError(
                f"{name} has dtype {value.dtype}, expected {hidden.dtype} as the hidden states: "
                "cast one of them, or call under torch.autocast"
            )
    return hidden, weight, bias


def flat_hidden(hidden: Tensor) -> Tensor:
    """[B, T, D] as (N, D) where strides allow; `hidden[:, :-1]` stays as it is, without a copy."""
    merges = hidden.ndim == 3 and (
        hidden.shape[0] <= 1 or hidden.stride(0) == hidden.shape[1] * hidden.stride(1)
    )
    return hidden.flatten(0, 1) if merges else hidden


def linear_call(
    hidden: Tensor,
    weight: Tensor,
    tokens: object,
    *,
    mask: Tensor | None,
    temperature: object,
    backend: str | None,
    logit_scale: object,
    softcap: object,
    logits_dtype: torch.dtype | None,
    chunk_tokens: object,
    tp_group: dist.ProcessGroup | None,
    live_rows: int | Tensor | None,
) -> LinearCall:
    """Check the rest of a linear op's arguments; `mask` has been checked."""
    leading = hidden.shape[:-1]
    logit_scale = _positive("logit_scale", logit_scale)
    softcap = None if softcap is None else _positive("softcap", softcap)
    dtype = _logits_dtype(logits_dtype, hidden.dtype)
    _check_chunk_tokens(chunk_tokens)
    rows = backends.load(backends.resolve(backend, hidden.device, dtype))
    vocabulary = weight.shape[0]
    if tp_group is not None:
        rows = VocabularyShard(rows, _process_group(tp_group), vocabulary, hidden)
        vocabulary = int(rows.vocabulary) if _checks.inspects_values(hidden) else vocabulary
    _checks.check_tokens(tokens, leading, vocabulary, mask, hidden)
    _checks.check_temperature(temperature, leading, mask, hidden)
    tokens = flat_rows(tokens).long()
    live = flat_rows(mask)
    index, contradicted = _live_index(live, live_rows, leading)
    return LinearCall(
        tokens=tokens,
        temperature=flat_temperature(temperature, hidden),
        logit_scale=logit_scale,
        softcap=softcap,
        logits_dtype=dtype,
        chunk_tokens=chunk_tokens,
        backend=rows,
        live=live,
        index=index,
        contradicted=contradicted,
    )


def _live_index(
    live: Tensor | None, live_rows: int | Tensor | None, leading: torch.Size
) -> tuple[Tensor | None, Tensor | None]:
    """(n,) the live rows or None for all, and whether `live_rows` contradicts the mask (0-d bool).

    On GPU, counting the live rows would wait for the device: there it takes the caller's number or
    host mask, and whether that is right is left on the device.
    """
    if live_rows is None:
        if live is None or live.device.type != "cpu":
            return None, None
        return _unless_all(live.nonzero()[:, 0], live), None
    if live is None:
        raise ValueError(
            "live_rows is given without mask: it says on the host what mask says on device, "
            "pass both"
        )
    index = _named_rows(live, live_rows, leading)
    contradicted = (live.sum() != index.numel()) | ~live[index].all()
    if not _checks.inspects_values(live):
        return _unless_all(index, live), contradicted
    if contradicted:
        raise ValueError(
            f"live_rows names {index.numel()} rows, mask has {int(live.sum())} True, or others: "
            "pass the host copy of the same mask"
        )
    return _unless_all(index, live), None


def _named_rows(live: Tensor, live_rows: int | Tensor, leading: torch.Size) -> Tensor:
    if isinstance(live_rows, Tensor):
        if live_rows.dtype != torch.bool or live_rows.device.type != "cpu":
            raise ValueError(
                f"live_rows is {live_rows.dtype} on {live_rows.device}, expected a bool tensor on "
                "cpu, the host copy of mask, or the number of True in it"
            )
        _checks.check_tensor("live_rows", live_rows, leading, live_rows)
        return live_rows.reshape(-1).nonzero()[:, 0].to(live.device, non_blocking=True)
    if isinstance(live_rows, bool) or not isinstance(live_rows, Integral) or live_rows < 0:
        raise ValueError(
            f"live_rows is {live_rows!r}, expected the number of True in mask, or mask's host copy"
        )
    size = min(live_rows, live.numel())
    return torch.nonzero_static(live, size=size, fill_value=0)[:, 0]


def _unless_all(index: Tensor, live: Tensor) -> Tensor | None:
    return None if index.numel() == live.numel() else index


def _positive(name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} is {type(value).__name__}, expected a number")
    if not 0 < value < math.inf:
        raise ValueError(f"{name} is {value}, expected a finite number > 0")
    return float(value)


def _logits_dtype(requested: torch.dtype | None, operands: torch.dtype) -> torch.dtype:
    wide = torch.float64 if operands == torch.float64 else torch.float32
    allowed = (wide, torch.bfloat16) if operands == torch.bfloat16 else (wide,)
    if requested is None:
        return wide
    if requested not in allowed:
        raise ValueError(
            f"logits_dtype is {requested} for {operands} operands, expected None or one of "
            f"{', '.join(map(str, allowed))}"
        )
    return requested


def _check_chunk_tokens(chunk_tokens: object) -> None:
    if chunk_tokens is None:
        return
    if isinstance(chunk_tokens, bool) or not isinstance(chunk_tokens, Integral):
        raise TypeError(f"chunk_tokens is {type(chunk_tokens).__name__}, expected an int or None")
    if chunk_tokens < 1:
        raise ValueError(f"chunk_tokens is {chunk_tokens}, expected at least 1, or None")


def _process_group(group: object) -> dist.ProcessGroup:
    if not isinstance(group, dist.ProcessGroup):
        raise TypeError(
            f"tp_group is {type(group).__name__}, expected a torch.distributed.ProcessGroup over "
            "which weight is sharded along V (a DeviceMesh has get_group())"
        )
    return group
