"""Shapes and dtypes of the compiled operators, for torch.compile. Imported once they are registered."""

from __future__ import annotations

import torch
from torch import Tensor


def _vectors(logits: Tensor, *dtypes: torch.dtype) -> tuple[Tensor, ...]:
    return tuple(logits.new_empty(logits.shape[0], dtype=dtype) for dtype in dtypes)


@torch.library.register_fake("fastpo::cpp_row_stats")
def _(logits, *arguments):
    return _vectors(logits, *[torch.float32] * 4)


@torch.library.register_fake("fastpo::cpp_row_policy_loss")
@torch.library.register_fake("fastpo::cpp_row_policy_loss_out")
@torch.library.register_fake("fastpo::cpp_row_policy_loss_")
def _(logits, *arguments):
    return _vectors(logits, *[torch.float32] * 3, torch.uint8)


@torch.library.register_fake("fastpo::cpp_row_grad_out")
@torch.library.register_fake("fastpo::cpp_row_grad_")
@torch.library.register_fake("fastpo::cpp_scale_")
def _(*arguments):
    return None
