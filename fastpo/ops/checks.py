"""What users pass to the ops, checked before anything is built. Every message is one line that says
what was got, what is expected, and what to do.

What the ops share. Where a call is checked: `check_logits_op` here, `fastpo.ops.linear_checks` for
hidden states and a head, `fastpo.ops.loss_checks` for an objective and its numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Real

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fastpo.backends.base import RowDetails
from fastpo.objective import Objective, is_finite, shown
from fastpo.rule import RuleObjective

_debug = False


def set_debug(enabled: bool) -> None:
    """Also check on GPU what costs a host synchronization there: token range, temperature values,
    cu_seqlens. CPU tensors are always checked. Off by default."""
    global _debug
    _debug = bool(enabled)


def inspects_values(tensor: Tensor) -> bool:
    """Whether reading values of `tensor` on the host is allowed: on CPU, or in debug mode."""
    return not torch.compiler.is_compiling() and (tensor.device.type == "cpu" or _debug)


def check_logits_op(
    logits: object, tokens: object, mask: object, temperature: object, *, inplace: bool
) -> None:
    """What `policy_loss` and `token_logprobs` share, but for ids, of which a shard knows less."""
    check_matrix("logits", logits, "V")
    check_rows(tokens, mask, temperature, logits)
    if inplace and overlaps(logits):
        raise ValueError(
            "inplace on expanded or overlapping logits would write one row's gradient over "
            "another's: clone them"
        )


def check_rows(tokens: object, mask: object, temperature: object, like: Tensor) -> None:
    """tokens, mask and temperature: one per row of `like` [..., V or D]."""
    leading = like.shape[:-1]
    check_mask(mask, leading, like)
    check_tensor("tokens", tokens, leading, like, what=" (one id per row; the ops never shift)")
    if tokens.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"tokens have dtype {tokens.dtype}, expected int64 or int32")
    check_temperature(temperature, leading, mask, like)


def check_token_range(tokens: Tensor, vocabulary: int | Tensor, mask: Tensor | None) -> None:
    """Ids inside the vocabulary under a True mask, where values may be read."""
    if not inspects_values(tokens) or tokens.numel() == 0:
        return
    vocabulary = int(vocabulary)  # of shards, a number on the device
    lowest, highest = (int(x) for x in tokens.aminmax())
    if lowest >= 0 and highest < vocabulary:
        return
    outside = (tokens < 0) | (tokens >= vocabulary)
    if mask is not None:
        outside &= mask.bool()
    if outside.any():
        where = outside.nonzero()[0].tolist()
        value = tokens[tuple(where)].item()
        hint = "mask positions that carry no token"
        if value == -100:
            hint = "-100 marks ignored labels elsewhere, here pass mask=tokens != -100"
        raise ValueError(f"tokens{where} is {value}, expected an id in [0, {vocabulary}): {hint}")


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
    if isinstance(value, nn.Module):
        raise TypeError(
            f"{name} is a module, {type(value).__name__}, expected a tensor {expected}: pass its "
            "weight (and bias=its bias, if there is one)"
        )
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
            ".contiguous()"
        )


def check_group(name: str, group: object, over: str) -> None:
    """None or a process group."""
    if group is not None and not isinstance(group, dist.ProcessGroup):
        raise TypeError(
            f"{name} is {type(group).__name__}, expected a torch.distributed.ProcessGroup over "
            f"which {over} (a DeviceMesh has get_group())"
        )


def check_not_sharded(name: str, value: Tensor) -> None:
    """Not a DTensor, whose local shard would silently be taken for the whole."""
    if type(value).__name__ == "DTensor":
        raise TypeError(
            f"{name} is a sharded DTensor, expected a plain tensor: call the loss inside the "
            "model's forward, where FSDP has gathered it, or pass value.full_tensor(), or tp_group "
            "for a vocabulary shard"
        )


def check_mask(mask: object, leading: torch.Size, like: Tensor) -> None:
    """mask: None, or bool or 0/1 integers of the leading shape."""
    if mask is None:
        return
    check_tensor("mask", mask, leading, like)
    if mask.dtype.is_floating_point or mask.dtype.is_complex:
        raise TypeError(f"mask has dtype {mask.dtype}, expected torch.bool: call mask.bool()")
    if mask.dtype != torch.bool and inspects_values(mask) and mask.numel():
        lowest, highest = (int(x) for x in mask.aminmax())
        if lowest < 0 or highest > 1:
            raise ValueError(
                f"mask holds {lowest if lowest < 0 else highest}, expected bool, or integers that "
                "are 0 or 1: call mask.bool()"
            )


def check_positive(name: str, value: object, *, what: str = "a number") -> None:
    """A finite number > 0."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} is {type(value).__name__}, expected {what}")
    if not (is_finite(value) and value > 0):
        raise ValueError(f"{name} is {shown(value)}, expected a finite number > 0")


def check_temperature(
    temperature: object, leading: torch.Size, mask: Tensor | None, like: Tensor
) -> None:
    """A finite number > 0, or a tensor of them with the leading shape."""
    if not isinstance(temperature, Tensor):
        return check_positive("temperature", temperature, what="a float or a tensor")
    check_tensor("temperature", temperature, leading, like, what=" or a Python float")
    check_floating("temperature", temperature)
    if inspects_values(temperature):
        good = temperature.isfinite() & (temperature > 0)
        if not (good if mask is None else good | ~mask.bool()).all():
            raise ValueError(
                "temperature holds a value that is not finite and positive on an unmasked row"
            )


def check_statistics(statistics: object) -> None:
    """Names of `fastpo.backends.base.RowDetails`."""
    if isinstance(statistics, str) or not isinstance(statistics, Sequence):
        raise TypeError(
            f"statistics is {type(statistics).__name__}, expected a tuple of names, e.g. "
            '("is_top1",)'
        )
    for name in statistics:
        if name not in RowDetails._fields:
            raise ValueError(
                f"statistics hold {name!r}, expected names among {', '.join(RowDetails._fields)}"
            )


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
        normalizer = normalizer.item()
    elif isinstance(normalizer, bool) or not isinstance(normalizer, Real):
        raise TypeError(
            f"normalizer is {type(normalizer).__name__}, expected a number or a 0-d tensor"
        )
    if not (is_finite(normalizer) and normalizer >= 0):
        raise ValueError(f"normalizer is {shown(normalizer)}, expected a finite count >= 0")


def sequence_count(leading: torch.Size, cu_seqlens: Tensor | None) -> int | None:
    """How many sequences a batch has; None for [N] rows without cu_seqlens, which do not say."""
    if len(leading) == 2:
        return leading[0]
    return None if cu_seqlens is None else cu_seqlens.numel() - 1


def is_per_sequence(value: Tensor, leading: torch.Size, count: int | None) -> bool:
    """Whether a tensor holds one number per sequence, [B] or [B, 1], and not one per token."""
    return value.shape != leading and count is not None and value.shape in ((count,), (count, 1))


def check_per_token_or_sequence(
    name: str,
    value: object,
    leading: torch.Size,
    cu_seqlens: Tensor | None,
    like: Tensor,
    *,
    split: bool = False,
) -> None:
    """A floating tensor of the leading shape, or [B] or [B, 1] where the sequences are known.

    split: [...] are a rank's tokens, whose number may be anything: only the spelling that can never
    be their shape stands for sequences.
    """
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} is {type(value).__name__}, expected a tensor")
    check_floating(name, value)
    check_device(name, value, like)
    count = sequence_count(leading, cu_seqlens)
    if value.shape == leading:
        return
    if not is_per_sequence(value, leading, count):
        per_sequence = "" if count is None else f" or one per sequence, [{count}]"
        raise ValueError(
            f"{name} has shape {list(value.shape)}, expected one per token, "
            f"{list(leading)}{per_sequence}"
        )
    if split and value.ndim == len(leading):
        raise ValueError(
            f"{name} has shape {list(value.shape)} with cp_group, where that may be a rank's "
            f"tokens, too: expected one per token, {list(leading)}, or one per sequence as "
            f"{[count] if len(leading) == 2 else [count, 1]}"
        )


def check_same_sequences(
    group: dist.ProcessGroup, leading: torch.Size, cu_seqlens: Tensor | None, like: Tensor
) -> None:
    """As many sequences on every rank of a group over which they are split, where one may look."""
    if not inspects_values(like):
        return
    count = sequence_count(leading, cu_seqlens)
    counts = torch.zeros(group.size(), dtype=torch.int64, device=like.device)
    counts[group.rank()] = count
    dist.all_reduce(counts, group=group)
    if (counts != count).any():
        raise ValueError(
            f"the ranks of cp_group have {counts.tolist()} sequences, expected the same ones on "
            "all: pass an empty segment of cu_seqlens where a rank has no token of a sequence"
        )


def check_sequences(leading: torch.Size, cu_seqlens: object, like: Tensor) -> None:
    """A batch that says where its sequences end: [B, T], or [N] with cu_seqlens."""
    if len(leading) == 1 and cu_seqlens is None:
        raise ValueError(
            f"a packed [N] batch, {list(leading)}, needs cu_seqlens (B + 1,) int32, the offsets of "
            "its sequences; or pass a [B, T] batch"
        )
    check_layout(leading, cu_seqlens, None, like)


def check_layout(
    leading: torch.Size,
    cu_seqlens: object,
    objective: Objective | RuleObjective | None,
    like: Tensor,
) -> None:
    """The leading shape or cu_seqlens must say where sequences end, if the objective asks."""
    if len(leading) == 2:
        if cu_seqlens is not None:
            raise ValueError(
                f"cu_seqlens is given for a [B, T] batch {list(leading)}, where every batch row "
                "is a sequence: flatten the batch to [N], or leave cu_seqlens None"
            )
    elif cu_seqlens is not None:
        _check_cu_seqlens(cu_seqlens, leading[0], like)
    elif objective is not None and objective.needs_sequences:
        raise ValueError(
            f"objective {objective.name!r} ({objective.aggregation}) needs to know the sequences "
            "of a packed [N] batch: pass cu_seqlens (B + 1,) int32, or a [B, T] batch"
        )


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
            f"non-decreasing offsets from 0 to the number of rows, {rows}"
        )


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """What sums over `dtype` accumulate in, and per-token numbers beside it are."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def overlaps(tensor: Tensor) -> bool:
    """Whether elements of `tensor` may share memory, as those of an expanded view do."""
    if tensor.numel() == 0:
        return False
    last = 0  # the last element, in memory, of the dimensions so far
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1 and stride <= last:
            return True
        last += stride * (size - 1)
    return False
