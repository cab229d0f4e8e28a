"""What users pass to the linear ops beside what all ops take: hidden states, a head, how to cut."""

from __future__ import annotations

from numbers import Integral
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from fastpo.ops import checks
from fastpo.ops.kept import Kept


class LinearOptions(NamedTuple):
    """How a linear op makes its logits, as the user said; see `fastpo.linear_policy_loss`."""

    logit_scale: float
    softcap: float | None
    logits_dtype: torch.dtype | None
    chunk_tokens: int | None
    tp_group: ProcessGroup | None
    live_rows: int | None


def check_linear_op(
    hidden: object,
    weight: object,
    bias: object,
    tokens: object,
    mask: object,
    temperature: object,
    options: LinearOptions,
) -> None:
    """What the linear ops share. Ids beyond this rank's shard of a head are for others to check."""
    _check_head(hidden, weight, bias)
    checks.check_rows(tokens, mask, temperature, hidden)
    checks.check_positive("logit_scale", options.logit_scale)
    if options.softcap is not None:
        checks.check_positive("softcap", options.softcap)
    _check_logits_dtype(options.logits_dtype, operand_dtype(hidden))
    _check_chunk_tokens(options.chunk_tokens)
    checks.check_group("tp_group", options.tp_group, "weight is sharded along V")
    if options.tp_group is None:
        checks.check_token_range(tokens, weight.shape[0], mask)
    _check_live_rows(options.live_rows, mask)


def _check_chunk_tokens(chunk_tokens: object) -> None:
    if chunk_tokens is None:
        return
    if isinstance(chunk_tokens, bool) or not isinstance(chunk_tokens, Integral):
        raise TypeError(f"chunk_tokens is {type(chunk_tokens).__name__}, expected an int or None")
    if chunk_tokens < 1:
        raise ValueError(f"chunk_tokens is {chunk_tokens}, expected at least 1, or None")


def _check_head(hidden: object, weight: object, bias: object) -> None:
    """hidden [..., D], weight [V, D], bias [V], in one dtype unless autocast is on."""
    if isinstance(weight, Tensor) and weight.numel() == 0:
        raise ValueError(
            f"weight has shape {list(weight.shape)}, no elements: if DeepSpeed ZeRO-3 partitioned "
            "it, call inside deepspeed.zero.GatheredParameters"
        )
    checks.check_matrix("hidden", hidden, "D")
    _check_orientation(weight, hidden.shape[-1])
    checks.check_matrix("weight", weight, "D", leading=("V",))
    checks.check_device("weight", weight, hidden)
    if weight.shape[1] != hidden.shape[-1]:
        raise ValueError(
            f"weight has shape {list(weight.shape)}, expected [V, {hidden.shape[-1]}], the LM head "
            f"of hidden states {list(hidden.shape)}"
        )
    if bias is not None:
        checks.check_not_sharded("bias", bias)
        checks.check_tensor("bias", bias, weight.shape[:1], hidden)
    dtype = operand_dtype(hidden)
    if dtype != hidden.dtype or autocasts(hidden):
        return
    for name, value in (("weight", weight), ("bias", bias)):
        if value is not None and value.dtype != dtype:
            raise TypeError(
                f"{name} has dtype {value.dtype}, expected {dtype} as the hidden states: "
                "cast one of them, or call under torch.autocast"
            )


def _check_orientation(weight: object, width: int) -> None:
    """Not a head [D, V], as `hidden @ weight` would take it."""
    if not isinstance(weight, Tensor) or weight.ndim != 2 or weight.shape[1] == width:
        return
    if weight.shape[0] == width:
        copied = "" if weight.stride(0) == 1 else ".contiguous()"
        raise ValueError(
            f"weight has shape {list(weight.shape)}, expected [V, {width}]: it looks transposed, "
            f"pass weight.t(){copied}, or an nn.Linear's weight as it is"
        )


def autocasts(hidden: Tensor) -> bool:
    """Whether autocast is on where `hidden` is; like torch's, it leaves float64 alone."""
    return torch.is_autocast_enabled(hidden.device.type) and hidden.dtype != torch.float64


def operand_dtype(hidden: Tensor) -> torch.dtype:
    """The dtype of the head's product: autocast's where that is on."""
    return torch.get_autocast_dtype(hidden.device.type) if autocasts(hidden) else hidden.dtype


def _check_logits_dtype(requested: object, operands: torch.dtype) -> None:
    wide = checks.wide_dtype(operands)
    allowed = (wide, torch.bfloat16) if operands == torch.bfloat16 else (wide,)
    if requested is not None and requested not in allowed:
        raise ValueError(
            f"logits_dtype is {requested} for {operands} operands, expected None or one of "
            f"{', '.join(map(str, allowed))}"
        )


def _check_live_rows(live_rows: object, mask: Tensor | None) -> None:
    """None or the number of True in `mask`."""
    if live_rows is not None and mask is None:
        raise ValueError(
            "live_rows is given without mask: it says on the host what mask says on device, "
            "pass both"
        )
    _check_count("live_rows", live_rows, mask, "True in mask")


def check_kept_options(
    dense_rows: object, add_to: object, kept: Kept | None, weight: Tensor, operands: torch.dtype
) -> None:
    """What goes with kept sets alone."""
    for name, value in (("dense_rows", dense_rows), ("add_weight_grad_to", add_to)):
        if value is not None and kept is None:
            raise ValueError(
                f"{name} is given without kept_tokens: it is about tokens with kept sets, pass "
                "them or leave it None"
            )
    if kept is None:
        return
    none = torch.zeros(0, dtype=torch.bool)
    dense = none if kept.dense is None else kept.dense
    _check_count("dense_rows", dense_rows, dense, "tokens without kept ids")
    if add_to is not None:
        _check_add_to(add_to, weight, operands)


def _check_add_to(add_to: object, weight: Tensor, operands: torch.dtype) -> None:
    """A tensor like the weight that the backward pass may add to."""
    checks.check_not_sharded("add_weight_grad_to", add_to)
    checks.check_tensor("add_weight_grad_to", add_to, weight.shape, weight)
    allowed = dict.fromkeys((operands, checks.wide_dtype(operands)))
    if add_to.layout != torch.strided or add_to.is_inference():
        kind = "an inference tensor" if add_to.is_inference() else f"of layout {add_to.layout}"
        raise ValueError(
            f"add_weight_grad_to is {kind}, expected a plain dense tensor: pass weight.grad"
        )
    if add_to.dtype not in allowed or add_to.stride(-1) != 1 or add_to.requires_grad:
        raise ValueError(
            f"add_weight_grad_to is {add_to.dtype} of strides {add_to.stride()}, requires_grad="
            f"{add_to.requires_grad}, expected {' or '.join(map(str, allowed))}, stride 1 in the "
            "last dimension and no gradient of its own: pass weight.grad"
        )
    overlaps = checks.overlaps(add_to)
    if overlaps or _shares_memory(add_to, weight):
        raise ValueError(
            f"add_weight_grad_to is {'expanded or overlapping' if overlaps else 'in the weight'}, "
            "where a sum would change other numbers too, expected memory of its own: pass "
            "weight.grad"
        )
    if torch.is_grad_enabled() and not weight.requires_grad:
        raise ValueError(
            "add_weight_grad_to with a weight that requires no gradient: there is none to add, "
            "leave it None"
        )


def _shares_memory(a: Tensor, b: Tensor) -> bool:
    """Whether the bytes from first to last of two non-empty strided tensors meet."""

    def span(x: Tensor) -> tuple[int, int]:
        last = sum(stride * (size - 1) for stride, size in zip(x.stride(), x.shape, strict=True))
        return x.storage_offset() * x.itemsize, (x.storage_offset() + last + 1) * x.itemsize

    (start, end), (other_start, other_end) = span(a), span(b)
    return torch._C._is_alias_of(a, b) and start < other_end and other_start < end


def _check_count(name: str, count: object, mask: Tensor, what: str) -> None:
    """None or how many are True in `mask`, where that can be seen."""
    if count is None:
        return
    if isinstance(count, bool) or not isinstance(count, Integral) or count < 0:
        got = count if isinstance(count, Integral) else type(count).__name__
        raise ValueError(f"{name} is {got}, expected an int, the number of {what}")
    if checks.inspects_values(mask) and count != int(mask.sum()):
        raise ValueError(
            f"{name} is {count}, expected {int(mask.sum())}, the number of {what}: pass the count "
            "of the same batch"
        )


def check_exponentials(backend: str, operands: torch.dtype, logits_dtype: object) -> None:
    """What the backends that make exponentials in place of logits cannot take."""
    if operands != torch.bfloat16:
        raise ValueError(
            f"backend {backend!r} stores exponentials in bfloat16, got {operands} operands: cast "
            "hidden and weight to bfloat16, or use backend='triton'"
        )
    if logits_dtype not in (None, torch.float32):
        raise ValueError(
            f"logits_dtype is {logits_dtype}, but backend {backend!r} never stores logits: leave "
            "logits_dtype=None, or use backend='triton'"
        )
