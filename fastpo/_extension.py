"""The compiled extension `fastpo._C`: loading it, and telling torch.compile of its operators."""

from __future__ import annotations

import functools
import importlib
import warnings

import torch
from torch import Tensor

from fastpo._compile import constant


def _vectors(like: Tensor, *dtypes: torch.dtype) -> tuple[Tensor, ...]:
    return tuple(like.new_empty(like.shape[0], dtype=dtype) for dtype in dtypes)


def _row_stats(logits, *arguments):
    return _vectors(logits, *[torch.float32] * 4)


def _row_details(logits, *arguments):
    return _vectors(logits, *[torch.float32] * 6, torch.bool)


def _kept_stats(hidden, weight, bias, tokens, ids, *arguments):
    return *_vectors(hidden, *[torch.float32] * 4), *_vectors(ids, torch.float32)


def _row_policy_loss(logits, *arguments):
    return _vectors(logits, *[torch.float32] * 3, torch.uint8)


def _group_advantages(rewards, *arguments):
    return *_vectors(rewards, torch.float32, torch.bool), rewards.new_empty((), dtype=torch.int64)


def _gae(rewards, *arguments):
    return torch.empty_like(rewards)


def _nothing(*arguments):
    return None


# The operators, and how torch.compile sees what they return.
_FAKES = {
    "cpp_row_stats": _row_stats,
    "cpp_row_details": _row_details,
    "cpp_kept_stats": _kept_stats,
    "cpp_kept_grad": _nothing,
    "cpp_row_policy_loss": _row_policy_loss,
    "cpp_row_grad": _nothing,
    "cpp_scale_": _nothing,
    "cuda_row_stats": _row_stats,
    "cuda_row_grad": _nothing,
    "cuda_row_policy_loss": _row_policy_loss,
    "cuda_scale_": _nothing,
    "gae": _gae,
    "group_advantages": _group_advantages,
}
_BUILD = "with a C++17 compiler, run `pip install --no-build-isolation -e .` beside torch >= 2.10"


@functools.cache
def load_error() -> str | None:
    """None once the operators `torch.ops.fastpo.*` are there, else why not and what helps."""
    try:
        build_info()
    except (ImportError, RuntimeError) as error:
        return f"the C++ extension does not load ({error}); {_BUILD}"
    missing = [name for name in _FAKES if not hasattr(torch.ops.fastpo, name)]
    if missing:
        reason = f"the C++ extension is of another version (it has no {missing[0]}); {_BUILD}"
        warnings.warn(f"fastpo goes on without it, slower: {reason}", stacklevel=2)
        return reason
    for name, fake in _FAKES.items():
        torch.library.register_fake(f"fastpo::{name}", fake)
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
