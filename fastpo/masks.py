"""Which tokens of sampled sequences count."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral

import torch
from torch import Tensor


def completion_mask(ids: Tensor, eos_ids: int | Sequence[int] | Tensor) -> Tensor:
    """True up to and including the first end token of every completion: the `mask` of the ops.

    By position, not by id: where the padding token is the end token, the first one still counts,
    for the model must learn to stop, and the rest does not.

    Args:
        ids: [..., T] integer ids of the completions, without their prompts, padded on the right
            with anything.
        eos_ids: the id that ends a completion, or several of them (a model's
            `generation_config.eos_token_id` as it is).

    Returns:
        [..., T] bool; all True where a completion was cut before it ended.

    Raises:
        TypeError, ValueError: ids are no integer tensor [..., T], or eos_ids are no ids.
    """
    if not isinstance(ids, Tensor):
        raise TypeError(f"ids is {type(ids).__name__}, expected an integer tensor [..., T]")
    if ids.dtype.is_floating_point or ids.dtype.is_complex or ids.dtype == torch.bool:
        raise TypeError(f"ids have dtype {ids.dtype}, expected an integer dtype")
    if ids.ndim == 0:
        raise ValueError("ids has no dimension, expected [..., T]")
    if not isinstance(eos_ids, Tensor):
        listed = [eos_ids] if isinstance(eos_ids, Integral) else eos_ids
        if not isinstance(listed, Sequence) or not all(
            isinstance(x, Integral) and not isinstance(x, bool) for x in listed
        ):
            raise TypeError(f"eos_ids is {eos_ids!r}, expected an id or several ids")
        eos_ids = torch.tensor(list(listed), dtype=torch.int64)
    elif eos_ids.dtype.is_floating_point or eos_ids.dtype.is_complex or eos_ids.dtype == torch.bool:
        raise TypeError(f"eos_ids have dtype {eos_ids.dtype}, expected an integer dtype")
    if eos_ids.numel() == 0:
        raise ValueError("eos_ids is empty, expected at least one id that ends a completion")
    ends = torch.isin(ids, eos_ids.to(ids.device, non_blocking=True))
    return ends.cumsum(-1) - ends.to(torch.int64) == 0  # no end before this token
