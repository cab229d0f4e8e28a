"""The compiled extension `fastpo._C`: loading it, and telling torch.compile of its operators."""

from __future__ import annotations

import functools
import importlib

import torch
from torch import Tensor

from fastpo._compile import constant


@functools.cache
def load_error() -> str | None:
    """None once the operators `torch.ops.fastpo.*` are there, else why not and what helps."""
    try:
        build_info()
    except (ImportError, RuntimeError) as error:
        return (
            f"the C++ extension does not load ({error}); with a C++17 compiler, run "
            "`pip install --no-build-isolation -e .` beside torch >= 2.10"
        )
    _register_fakes()
    return None


def build_info() -> dict[str, object]:
    """What was built: SIMD levels and the one in use, CUDA architectures, oldest torch, compiler.

    Raises:
        ImportError: the extension was not built, or does not fit this Python or torch.
        RuntimeError: the environment variable FASTPO_SIMD names a level that this CPU lacks.
    """
    return importlib.import_module("fastpo._C").build_info()


@constant  # Dynamo cannot trace imports, and need not
def devices() -> tuple[str, ...]:
    """The device types that the compiled operators serve; () without the extension."""
    if load_error() is not None:
        return ()
    return ("cpu", "cuda") if build_info()["cuda_archs"] else ("cpu",)


def _register_fakes() -> None:
    def vectors(like: Tensor, *dtypes: torch.dtype) -> tuple[Tensor, ...]:
        return tuple(like.new_empty(like.shape[0], dtype=dtype) for dtype in dtypes)

    def row_stats(logits, *arguments):
        return vectors(logits, *[torch.float32] * 4)

    def row_details(logits, *arguments):
        return vectors(logits, *[torch.float32] * 6, torch.bool)

    def kept_stats(hidden, weight, bias, tokens, ids, *arguments):
        return *vectors(hidden, *[torch.float32] * 4), *vectors(ids, torch.float32)

    def row_policy_loss(logits, *arguments):
        return vectors(logits, *[torch.float32] * 3, torch.uint8)

    def group_advantages(rewards, *arguments):
        return *vectors(rewards, torch.float32, torch.bool), rewards.new_empty(
            (), dtype=torch.int64
        )

    def gae(rewards, *arguments):
        return torch.empty_like(rewards)

    def nothing(*arguments):
        return None

    for name, fake in {
        "cpp_row_stats": row_stats,
        "cpp_row_details": row_details,
        "cpp_kept_stats": kept_stats,
        "cpp_kept_grad": nothing,
        "cpp_row_policy_loss": row_policy_loss,
        "cpp_row_grad": nothing,
        "cpp_scale_": nothing,
        "cuda_row_stats": row_stats,
        "cuda_row_grad": nothing,
        "cuda_row_policy_loss": row_policy_loss,
        "cuda_scale_": nothing,
        "gae": gae,
        "group_advantages": group_advantages,
    }.items():
        torch.library.register_fake(f"fastpo::{name}", fake)
