"""Choosing the backend that runs the row primitives. Backends are imported on first use only."""

from __future__ import annotations

import importlib
from types import ModuleType

import torch as pytorch  # `torch` will be this package's own submodule, backends/torch.py

from fastpo._compile import constant

_MODULES = {
    "torch": "fastpo.backends.torch",
    "cpp": "fastpo.backends.cpp",
    "triton": "fastpo.backends.triton",
    "cuda": "fastpo.backends.cuda",  # by name alone, until it is measured
}
BACKENDS = tuple(_MODULES)
WITH_DETAILS = ("torch", "cpp", "triton")
"""Those that have `row_details`, for the statistics of the log-prob ops."""
_LINEAR_MODULES = {
    "triton-exp": "fastpo.backends.triton_exp",
    "triton-exp-kept": "fastpo.backends.triton_exp",
}
LINEAR_BACKENDS = tuple(_LINEAR_MODULES)
"""Of the linear ops alone, by name alone: they make the logits, or never have any."""
_loaded: dict[str, ModuleType] = {}
_PREFERENCE = {"cpu": ("cpp", "torch"), "cuda": ("triton", "torch")}  # ROCm devices are "cuda" too


def unavailable(name: str, device: pytorch.device | str = "cpu") -> str | None:
    """Why backend `name` cannot run on `device`: one line, or None if it can.

    Raises:
        ValueError: there is no backend of that name.
    """
    known = _MODULES | _LINEAR_MODULES
    if name not in known:
        raise ValueError(f"backend is {name!r}, expected one of {', '.join(known)} or None")
    try:
        module = _loaded[name] = importlib.import_module(known[name])
    except ImportError as error:
        return f"{known[name]} does not import ({error})"
    return module.unavailable(pytorch.device(device))


@constant  # Dynamo cannot trace imports, and need not
def resolve(
    name: str | None, device: pytorch.device, dtype: pytorch.dtype, *, linear: bool = False
) -> str:
    """The backend to run on `device`: `name` itself if it can, the best available one for None.

    `linear`: for an op on hidden states, which LINEAR_BACKENDS serve too.

    Raises:
        ValueError: an explicitly requested backend cannot run here. It never falls back silently.
    """
    if name is None:
        return _best(device, dtype)
    if name in LINEAR_BACKENDS and not linear:
        raise ValueError(
            f"backend {name!r} makes exponentials from hidden states and a head, got logits: use "
            "backend='triton', or a linear op"
        )
    reason = unavailable(name, device)
    if reason is not None:
        raise ValueError(f"backend {name!r} cannot run on {device}: {reason}")
    if name != "torch" and dtype == pytorch.float64:
        raise ValueError(
            f"backend {name!r} computes in float32, got float64 logits: use backend='torch'"
        )
    return name


def load(name: str) -> ModuleType:
    """The module of a backend that `resolve` has named (see `fastpo.backends.base.Backend`)."""
    return _loaded[name]


def _best(device: pytorch.device, dtype: pytorch.dtype) -> str:
    wide = dtype == pytorch.float64
    candidates = ("torch",) if wide else _PREFERENCE.get(device.type, ("torch",))
    return next(name for name in candidates if unavailable(name, device) is None)
