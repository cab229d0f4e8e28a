"""Rewards of completions, before they become advantages."""

from __future__ import annotations

from numbers import Real

import torch
from torch import Tensor


def overlong_penalty(lengths: Tensor, *, max_length: int, cache_length: int) -> Tensor:
    """DAPO's soft overlong punishment (arXiv 2503.14476, eq. 13), to be added to the reward.

        0                                            length <= max_length - cache_length
        (max_length - cache_length - length) / cache_length            in between, linear
        -1                                           length >= max_length

    Args:
        lengths: (B,) completion lengths in tokens, integer or floating.
        max_length: the length, in tokens, from which the penalty is -1.
        cache_length: how many tokens before `max_length` the penalty begins.

    Returns:
        (B,) fp32 in [-1, 0], on the device of `lengths`.

    Raises:
        ValueError: `cache_length` is not in 1 ... `max_length`.
        TypeError: `lengths` is no tensor, boolean (a mask?) or complex; a bound is no number.
    """
    for name, bound in (("max_length", max_length), ("cache_length", cache_length)):
        if isinstance(bound, bool) or not isinstance(bound, Real):
            raise TypeError(f"{name} is {type(bound).__name__}, expected a number of tokens")
    if not 0 < cache_length <= max_length:
        raise ValueError(
            f"cache_length is {cache_length} and max_length {max_length}, expected "
            "0 < cache_length <= max_length; for no penalty, do not call this"
        )
    if not isinstance(lengths, Tensor):
        raise TypeError(
            f"lengths are {type(lengths).__name__}, expected a tensor; use torch.tensor(...)"
        )
    if lengths.dtype == torch.bool or lengths.is_complex():
        raise TypeError(
            f"lengths are {lengths.dtype}, expected token counts; sum a mask over its tokens"
        )
    # In float64, which holds every length exactly: the penalty is exactly 0 and -1 at the ends.
    excess = (max_length - cache_length - lengths.double()) / cache_length
    return excess.clamp(-1, 0).float()
