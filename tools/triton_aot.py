"""Compile the Triton kernels for GPUs that are not here, and read what the compiler made of them.

    python tools/triton_aot.py --targets sm_90 gfx942 --vocab 151936

prints registers, spills, instructions per logit, shuffles, barriers and the width of the memory
accesses of every kernel. It goes through the launchers themselves, so the constants, flags and
options are those of a real launch.

    python tools/triton_aot.py --page benchmarks/results/aot.md --also .cache/triton-3.6.0

writes the committed table, under this Triton and under another one unpacked into a folder
(`make aot`). Exits with 1 if a kernel spills registers.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import triton
from aot_launches import Launches, exp_launches, kept_launches, row_launches
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

ROOT = Path(__file__).resolve().parents[1]
OTHER_TRITON = ROOT / ".cache" / "triton-3.6.0"  # `make test-all` installs it there
TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "sm_120": GPUTarget("cuda", 120, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
VOCABULARIES = (32000, 50257, 128256, 151936, 262144)
PRODUCTS = r"wgmma\.mma_async|tcgen05\.mma|mma\.sync"
KERNELS = ("rows", "kept", "exp")
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
    triton: str  # the version that compiled it
    threads: int
    registers: int  # per thread
    stack: int  # bytes per thread
    spills: int  # loads and stores of local memory, or spilled vector registers
    first_sweep: float | None  # instructions per logit of the loop that loads (None: no such loop)
    second_sweep: float | None  # of the loop that loads and stores
    loop_shuffles: int | None  # in any loop (None: not counted on this target)
    barriers: int | None
    wide_loads: int  # 16 bytes
    narrow_loads: int
    wide_stores: int  # 16 bytes
    narrow_stores: int
    shared: int  # bytes of shared memory
    tensor_cores: int | None  # their instructions in the PTX (None: not counted on this target)


def read_resources(
    compiled, *, target: str, dtype: str, vocab: int, label: str, columns: int | None = None
) -> Resources:
    """Inspect a compiled kernel: SASS for NVIDIA targets, the assembly's metadata for AMD.

    `columns` is how many logits a thread takes in one iteration of its loops; without it there are
    no instructions per logit.
    """
    nvidia = "cubin" in compiled.asm
    counts = _from_sass(compiled, columns) if nvidia else _from_amdgcn(compiled)
    return Resources(
        kernel=label,
        target=target,
        dtype=dtype,
        vocab=vocab,
        triton=triton.__version__,
        threads=compiled.metadata.num_warps * TARGETS[target].warp_size,
        shared=compiled.metadata.shared,
        tensor_cores=len(re.findall(PRODUCTS, compiled.asm["ptx"])) if nvidia else None,
        **counts,
    )


def _from_sass(compiled, columns: int | None) -> dict:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = _tool("cuobjdump", "--dump-resource-usage", file.name)
        sass = _tool("nvdisasm", "-c", file.name)
    instructions, loops = innermost_loops(sass)

    def per_logit(loads: bool, stores: bool) -> float | None:
        found = [
            len(loop)
            for loop in loops
            if (count(loop, "LDG") > 0, count(loop, "STG") > 0) == (loads, stores)
        ]
        return round(sum(found) / columns, 1) if found and columns else None

    loads, stores = count(instructions, "LDG"), count(instructions, "STG")
    wide_loads, wide_stores = (count(instructions, rf"{x}\S*\.128") for x in ("LDG", "STG"))
    return {
        "registers": int(re.search(r"REG:(\d+)", usage).group(1)),
        "stack": int(re.search(r"STACK:(\d+)", usage).group(1)),
        "spills": count(instructions, "LDL|STL"),
        "first_sweep": per_logit(loads=True, stores=False),
        "second_sweep": per_logit(loads=True, stores=True),
        "loop_shuffles": sum(count(loop, "SHFL") for loop in loops),
        "barriers": count(instructions, "BAR"),
        "wide_loads": wide_loads,
        "narrow_loads": loads - wide_loads,
        "wide_stores": wide_stores,
        "narrow_stores": stores - wide_stores,
    }


def innermost_loops(sass: str) -> tuple[list[str], list[list[str]]]:
    """(all instructions, those of every loop without another in it) of an nvdisasm listing.

    An instruction is its opcode with modifiers and operands, without a predicate.
    """
    instructions: list[str] = []
    labels: dict[str, int] = {}
    spans: list[tuple[int, int]] = []
    for line in sass.splitlines():
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            labels[label[1]] = len(instructions)
        elif found := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?(.*?);", line):
            instructions.append(found[1])
            target = re.match(r"BRA\b.*`\((\.L_x_\d+)\)", found[1])
            start = labels.get(target[1]) if target else None
            if start is not None and start < len(instructions) - 1:  # the last BRA jumps to itself
                spans.append((start, len(instructions)))
    inner = [
        (start, end)
        for start, end in spans
        if not any(start <= s and e <= end and (s, e) != (start, end) for s, e in spans)
    ]
    return instructions, [instructions[start:end] for start, end in inner]


def count(instructions: list[str], opcode: str) -> int:
    """How many instructions have an opcode that begins with the regular expression `opcode`."""
    return sum(re.match(opcode, instruction) is not None for instruction in instructions)


def _tool(name: str, *arguments: str) -> str:
    """Output of a CUDA binary tool that comes with Triton."""
    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    return subprocess.run([path, *arguments], capture_output=True, text=True, check=True).stdout


def _from_amdgcn(compiled) -> dict:
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
        "first_sweep": None,
        "second_sweep": None,
        "loop_shuffles": None,
        "barriers": None,
        "wide_loads": wide_loads,
        "narrow_loads": len(loads) - wide_loads,
        "wide_stores": wide_stores,
        "narrow_stores": len(stores) - wide_stores,
    }


def inspect_rows(
    targets: Sequence[str], dtypes: Sequence[str], vocabularies: Sequence[int], only: Sequence[str]
) -> list[Resources]:
    """Compile the row kernels for every combination; what one binary serves is compiled once."""
    from fastpo.kernels._layout import row_layout

    found = []
    for target, dtype, vocab in itertools.product(targets, dtypes, vocabularies):
        with compiling_for(target) as compiled:
            layout = row_layout(torch.empty(1, vocab, dtype=DTYPES[dtype]))
            context = {"target": target, "dtype": dtype, "vocab": vocab}
            context["columns"] = layout.STEP * layout.WIDTH
            for label, launch in _chosen(row_launches(vocab, DTYPES[dtype]), only).items():
                launch()
                found.append(read_resources(compiled[-1], label=label, **context))
    return found


def inspect_heads(
    launches: Callable[[int, int], Launches],
    targets: Sequence[str],
    vocabularies: Sequence[int],
    width: int,
    only: Sequence[str],
) -> list[Resources]:
    """The same for kernels on a bf16 head (vocab, width); a launch may be of several kernels."""
    found = []
    for target, vocab in itertools.product(targets, vocabularies):
        context = {"target": target, "dtype": "bf16", "vocab": vocab}
        with compiling_for(target) as compiled:  # tiles depend on it
            for label, launch in _chosen(launches(vocab, width), only).items():
                compiled.clear()
                launch()
                for kernel in compiled:
                    own = kernel.metadata.name.strip("_").removesuffix("_kernel")
                    name = label if len(compiled) == 1 else own
                    found.append(read_resources(kernel, label=name, **context))
    return found


def _chosen(launches: Launches, only: Sequence[str]) -> Launches:
    return {label: x for label, x in launches.items() if not only or label in only}


def table(resources: list[Resources]) -> str:
    """The resources as a Markdown table."""
    names = list(asdict(resources[0]))
    lines = ["| " + " | ".join(n.replace("_", " ") for n in names) + " |"]
    lines.append("|" + "---|" * len(names))
    for resource in resources:
        cells = ("" if v is None else str(v) for v in asdict(resource).values())
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def page(resources: list[Resources]) -> str:
    """The committed page: the table and how to read it."""
    return f"""# Machine code of the Triton kernels

Compiled ahead of time, without a GPU, through the launchers themselves. Sweeps are instructions per
logit in the kernel's loops: the first reads, the second reads and writes. The kept tail of a row is
straight code and not in them. `row_*` and `scale` take logits; `kept_*` rows with the ids that they
kept, of a bf16 head of width 4096.

{table(resources)}

`make aot` makes this page.
"""


def run_compiling(code: str, *arguments: str, triton: Path | None = None) -> str:
    """Output of a Python program in a process whose Triton, that in the folder `triton`, compiles.

    Raises:
        RuntimeError: the program failed; the end of what it wrote to stderr.
    """
    folders = [*([] if triton is None else [triton]), ROOT, ROOT / "tools"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, folders))}
    environment |= {"OMP_NUM_THREADS": "1"}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, "-c", code, *arguments]
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    if result.returncode != 0:
        raise RuntimeError(result.stderr[-3000:])
    return result.stdout


def inspect_elsewhere(options: Sequence[object], triton: Path | None = None) -> list[dict]:
    """What the command line finds with these options, in a process whose Triton compiles: the one
    that is installed, or that in a folder."""
    code = "from triton_aot import main; main()"
    return json.loads(run_compiling(code, "--json", *map(str, options), triton=triton))


def main() -> None:
    """Command line: compile, inspect, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kernels", nargs="+", default=list(KERNELS), choices=KERNELS)
    parser.add_argument("--targets", nargs="+", default=list(TARGETS), choices=list(TARGETS))
    parser.add_argument("--dtypes", nargs="+", default=list(DTYPES), choices=list(DTYPES))
    parser.add_argument("--vocab", nargs="+", type=int, default=list(VOCABULARIES))
    parser.add_argument("--width", type=int, default=4096, help="of the hidden states")
    parser.add_argument("--only", nargs="+", default=[], metavar="LABEL", help="these alone")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--page", type=Path, help="write a Markdown page there")
    parser.add_argument("--also", type=Path, help="a folder with another Triton")
    options = parser.parse_args()
    resources = inspect(options)
    if options.also is not None:
        resources += [Resources(**x) for x in inspect_elsewhere(_again(options), options.also)]
    if options.page is not None:
        options.page.write_text(page(resources))
    elif options.json:
        json.dump([asdict(r) for r in resources], sys.stdout)
    else:
        print(table(resources))
    spilled = [r for r in resources if r.stack or r.spills]
    if spilled and not options.json:
        sys.exit(f"triton_aot: {len(spilled)} of {len(resources)} spill\n{table(spilled)}")


def inspect(options: argparse.Namespace) -> list[Resources]:
    """What the options name."""
    sys.path.insert(0, str(ROOT))  # this checkout, not another one that is installed
    nvidia = [target for target in options.targets if TARGETS[target].backend == "cuda"]
    head = (options.vocab, options.width, options.only)
    found = []
    if "rows" in options.kernels:
        found += inspect_rows(options.targets, options.dtypes, options.vocab, options.only)
    if "kept" in options.kernels:
        found += inspect_heads(kept_launches, options.targets, *head)
    if "exp" in options.kernels:
        found += inspect_heads(exp_launches, nvidia, *head)
    return found


def _again(options: argparse.Namespace) -> list[object]:
    """The options that say what to compile, as a command line has them."""
    names = ("kernels", "targets", "dtypes", "vocab", "only")
    words = [[f"--{name}", *getattr(options, name)] for name in names if getattr(options, name)]
    return [*itertools.chain(*words), "--width", options.width]


if __name__ == "__main__":
    main()
