"""What users pass to the linear ops beside what all ops take: hidden states, a head, how to cut."""

from __future__ import annotations

from numbers import Integral
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from fastpo.ops import checks
from fastpo.ops.tensor_parallel import check_tp_group


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
    check_tp_group(options.tp_group, "weight is")
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
    if live_rows is None:
        return
    if mask is None:
        raise ValueError(
            "live_rows is given without mask: it says on the host what mask says on device, "
            "pass both"
        )
    if isinstance(live_rows, bool) or not isinstance(live_rows, Integral) or live_rows < 0:
        got = live_rows if isinstance(live_rows, Integral) else type(live_rows).__name__
        raise ValueError(f"live_rows is {got}, expected an int, the number of True in mask")
    if checks.inspects_values(mask) and live_rows != int(mask.sum()):
        raise ValueError(
            f"live_rows is {live_rows}, mask has {int(mask.sum())} True: pass the count of the "
            "same mask"
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
