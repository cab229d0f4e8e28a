"""`fastpo doctor`: what this machine has, and what would enable the rest."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil

import torch

import fastpo
from fastpo import _extension, backends

PACKAGES = {
    "triton": "the default backend on GPUs",
    "transformers": "fastpo train; pip install 'fastpo[train]'",
    "flash-attn": "attention on GPUs, else by torch's varlen_attn; pip install 'fastpo[flash]'",
    "tensorboard": "event files of a run; pip install tensorboard",
    "wandb": "log.wandb of a recipe; pip install wandb",
    "trl": "fastpo.integrations.trl; pip install 'fastpo[trl]'",
    "verl": "fastpo.integrations.verl; pip install 'fastpo[verl]'",
}


def report() -> str:
    """A few lines of text: versions, devices, the extension, and every backend on every device."""
    lines = [
        f"fastpo {fastpo.__version__}, Python {platform.python_version()}, {platform.machine()}, "
        f"{os.cpu_count()} cores, {torch.get_num_threads()} torch threads",
        f"torch {torch.__version__}",
        *(_package(name, use) for name, use in PACKAGES.items()),
        "",
        f"C++ extension: {_cpp_extension()}",
        f"GPU: {_gpu()}",
        *_wide_gemms(),
    ]
    for device in ("cpu", "cuda"):
        lines += ["", f"Backends for {device} tensors:"]
        lines += [_backend(name, device) for name in backends.BACKENDS]
        lines += [_backend(name, device) for name in backends.LINEAR_BACKENDS]
    return "\n".join(lines)


def _package(name: str, use: str) -> str:
    try:
        return f"{name} {importlib.metadata.version(name)}"
    except importlib.metadata.PackageNotFoundError:
        return f"{name} is not installed ({use})"


def _cpp_extension() -> str:
    try:
        info = _extension.build_info()
    except ImportError as error:
        compiler = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
        way_out = (
            "pip install --no-build-isolation -e . builds it"
            if compiler
            else "install a C++17 compiler (apt install g++), then reinstall fastpo"
        )
        return f"missing ({error}); {way_out}"
    except RuntimeError as error:  # FASTPO_SIMD names a level that this CPU lacks
        return f"unusable: {error}"
    archs = ", ".join(info["cuda_archs"]) or "none (built without nvcc, or beside a CPU torch)"
    return f"SIMD {info['simd']} of {', '.join(info['simd_compiled'])}; CUDA architectures {archs}"


def _gpu() -> str:
    if torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability()
        return f"{torch.cuda.get_device_name()} (compute capability {major}.{minor})"
    if torch.version.cuda is None and torch.version.hip is None:
        return "none: this torch is a CPU build; a CUDA or ROCm build of torch enables one"
    return "none found by torch.cuda; is a driver installed and a device visible?"


def _wide_gemms() -> list[str]:
    """What the speed of a low-precision LM head hangs on; nothing without a GPU."""
    if not torch.cuda.is_available():
        return []
    from fastpo.ops.head import wide_gemm

    lines = []
    for dtype in (torch.bfloat16, torch.float16):
        found = wide_gemm(torch.device("cuda", torch.cuda.current_device()), dtype)
        how = f"yes, by torch.{found}(out_dtype=)" if found else "no: about 12 times slower in fp32"
        lines.append(f"{dtype} products with float32 sums: {how}")
    return lines


def _backend(name: str, device: str) -> str:
    width = max(map(len, backends.LINEAR_BACKENDS))
    if device == "cuda" and not torch.cuda.is_available():
        return f"  {name:{width}} no: there is no GPU"
    reason = backends.unavailable(name, device)
    if reason is not None:
        return f"  {name:{width}} no: {reason}"
    if name in backends.LINEAR_BACKENDS:
        return f"  {name:{width}} yes, for bfloat16 operands of the linear ops, by name"
    default = backends.resolve(None, torch.device(device), torch.float32)
    return f"  {name:{width}} yes{', the default' if name == default else ''}"
