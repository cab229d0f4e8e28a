"""Compile the Triton kernels for GPUs that are not here, and read what the compiler made of them.

    python -m fastpo.testing.aot --targets sm_90 gfx942 --vocab 151936

prints registers, stack, spills and the width of the memory accesses of every kernel. It goes
through the launchers themselves, so the constants, flags and options are those of a real launch.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "sm_120": GPUTarget("cuda", 120, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
VOCABULARIES = (32000, 50257, 128256, 151936, 262144)
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


class _AbsentDevice:
    """What the JIT asks of a driver before it launches anything."""

    def __init__(self, target: GPUTarget):
        self._target = target

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> str:
        return str(self._target)  # one cache of compiled kernels per target

    def get_current_stream(self, device) -> int:
        return 0


@contextlib.contextmanager
def compiling_for(target: str) -> Iterator[list]:
    """Inside, Triton launches compile for `target` and run nothing; yields the compiled kernels.

    Raises:
        ValueError: `target` is not in TARGETS.
        RuntimeError: this process interprets kernels (TRITON_INTERPRET=1) instead.
    """
    if target not in TARGETS:
        raise ValueError(f"target is {target!r}, expected one of {', '.join(TARGETS)}")
    if not isinstance(triton.language.sum, JITFunction):
        raise RuntimeError("unset TRITON_INTERPRET: nothing is compiled in this process")
    compiled, run = [], JITFunction.run

    def compile_only(self, *args, grid, warmup, **kwargs):
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        compiled.append(kernel)
        return kernel

    driver = triton.runtime.driver
    previous = driver._active
    driver.set_active(_AbsentDevice(TARGETS[target]))
    JITFunction.run = compile_only
    try:
        yield compiled
    finally:
        JITFunction.run = run
        driver._active = previous


@contextlib.contextmanager
def recording_keys(target: str = "sm_90") -> Iterator[dict[str, set[str]]]:
    """Inside, launches neither compile nor run; yields {kernel: keys it would have."""
    keys: dict[str, set[str]] = {}

    def record(*, key, fn, **_):
        keys.setdefault(fn.name, set()).add(key)
        return True  # tells the JIT not to compile

    runtime = triton.knobs.runtime
    previous, runtime.jit_cache_hook = runtime.jit_cache_hook, record
    try:
        with compiling_for(target):
            yield keys
    finally:
        runtime.jit_cache_hook = previous


@dataclass(frozen=True, kw_only=True)
class Resources:
    """What one kernel takes of a GPU, from its machine code; the counts are of instructions."""

    kernel: str
    target: str
    dtype: str
    vocab: int
    threads: int
    registers: int  # per thread
    stack: int  # bytes per thread
    spills: int  # loads and stores of local memory, or spilled vector registers
    wide_loads: int  # 16 bytes
    narrow_loads: int
    wide_stores: int  # 16 bytes
    narrow_stores: int
    shared: int  # bytes of shared memory


def read_resources(compiled, *, target: str, dtype: str, vocab: int, label: str) -> Resources:
    """Inspect a compiled kernel: SASS for NVIDIA targets, the assembly's metadata for AMD."""
    counts = _from_sass(compiled) if "cubin" in compiled.asm else _from_amdgcn(compiled)
    return Resources(
        kernel=label,
        target=target,
        dtype=dtype,
        vocab=vocab,
        threads=compiled.metadata.num_warps * TARGETS[target].warp_size,
        shared=compiled.metadata.shared,
        **counts,
    )


def _from_sass(compiled) -> dict[str, int]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = _tool("cuobjdump", "--dump-resource-usage", file.name)
        sass = _tool("nvdisasm", "-c", file.name)
    loads, stores = len(re.findall(r"\bLDG", sass)), len(re.findall(r"\bSTG", sass))
    wide_loads = len(re.findall(r"\bLDG\S*\.128", sass))
    wide_stores = len(re.findall(r"\bSTG\S*\.128", sass))
    return {
        "registers": int(re.search(r"REG:(\d+)", usage).group(1)),
        "stack": int(re.search(r"STACK:(\d+)", usage).group(1)),
        "spills": len(re.findall(r"\b(?:LDL|STL)\b", sass)),
        "wide_loads": wide_loads,
        "narrow_loads": loads - wide_loads,
        "wide_stores": wide_stores,
        "narrow_stores": stores - wide_stores,
    }


def _tool(name: str, *arguments: str) -> str:
    """Output of a CUDA binary tool that comes with Triton."""
    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    return subprocess.run([path, *arguments], capture_output=True, text=True, check=True).stdout


def _from_amdgcn(compiled) -> dict[str, int]:
    text = compiled.asm["amdgcn"]

    def number(field: str) -> int:
        return int(re.search(rf"\.{field}:\s+(\d+)", text).group(1))

    access = r"\b(?:global|buffer|flat)_{}_\w+"
    loads, stores = (re.findall(access.format(kind), text) for kind in ("load", "store"))
    wide_loads, wide_stores = (sum(x.endswith("x4") for x in ops) for ops in (loads, stores))
    return {
        "registers": number("vgpr_count"),
        "stack": number("private_segment_fixed_size"),
        "spills": number("vgpr_spill_count"),  # scalar registers spill into vector ones, not memory
        "wide_loads": wide_loads,
        "narrow_loads": len(loads) - wide_loads,
        "wide_stores": wide_stores,
        "narrow_stores": len(stores) - wide_stores,
    }


def launches(vocab: int, dtype: torch.dtype) -> dict[str, Callable[[], object]]:
    """{label: launch} of every kernel on one row of `vocab` logits, with every optional input."""
    from fastpo.backends.base import Rule
    from fastpo.kernels import row_grad, row_policy_loss, row_stats, scale
    from fastpo.objective import Objective

    logits = torch.empty(1, vocab, dtype=dtype)
    token = torch.zeros(1, dtype=torch.int64)
    x = torch.zeros(1)
    live = torch.ones(1, dtype=torch.bool)
    rule = Rule.from_objective(Objective(kl_coef=0.1, kl_ratio_weighted=True))._asdict()

    def policy_loss(out: Tensor):
        return lambda: row_policy_loss.row_policy_loss(logits, token, *[x] * 8, 1.0, x, out, **rule)

    calls = {
        "row_stats": lambda: row_stats.row_stats(logits, token, 1.0, x, live),
        "row_grad": lambda: row_grad.row_grad(logits, token, x, x, x, x, x, 1.0, x, logits),
        "row_policy_loss": policy_loss(logits),
        "scale": lambda: scale.scale_(logits, x[0]),
    }
    if dtype == torch.float32:
        upper_half = logits.view(torch.bfloat16)[:, vocab:]
        calls["row_policy_loss fp32 -> bf16"] = policy_loss(upper_half)
    return calls


def inspect_kernels(targets, dtypes, vocabularies) -> list[Resources]:
    """Compile every kernel for every combination; what one binary serves is compiled once."""
    found = []
    for target in targets:
        for dtype in dtypes:
            for vocab in vocabularies:
                for label, launch in launches(vocab, DTYPES[dtype]).items():
                    with compiling_for(target) as compiled:
                        launch()
                    context = {"target": target, "dtype": dtype, "vocab": vocab, "label": label}
                    found.append(read_resources(compiled[-1], **context))
    return found


def table(resources: list[Resources]) -> str:
    """The resources as a Markdown table."""
    names = list(asdict(resources[0]))
    lines = ["| " + " | ".join(names) + " |", "|" + "---|" * len(names)]
    lines += ["| " + " | ".join(str(v) for v in asdict(r).values()) + " |" for r in resources]
    return "\n".join(lines)


def main() -> None:
    """Command line: compile, inspect, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--targets", nargs="+", default=list(TARGETS), choices=list(TARGETS))
    parser.add_argument("--dtypes", nargs="+", default=list(DTYPES), choices=list(DTYPES))
    parser.add_argument("--vocab", nargs="+", type=int, default=list(VOCABULARIES))
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    options = parser.parse_args()
    resources = inspect_kernels(options.targets, options.dtypes, options.vocab)
    if options.json:
        json.dump([asdict(r) for r in resources], sys.stdout)
    else:
        print(table(resources))


if __name__ == "__main__":
    main()
