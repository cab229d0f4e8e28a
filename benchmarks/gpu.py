"""`make gpu`: tests and benchmarks that need a GPU, in one command that ends within ten minutes.

    python benchmarks/gpu.py [--out DIR]

Runs the GPU tests (the interpreted ones again, on the device), compute-sanitizer on small shapes,
and every benchmarks/bench_*_gpu.py. Writes gpu.json and gpu.md beside the benchmarks' own tables,
to --out, else $OUT, else benchmarks/results. Exits with 1 when a step failed, with 2 without a GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

HERE = Path(__file__).parent
ROOT = HERE.parent
TOTAL_SECONDS = 570
SANITIZER_SECONDS = 60
TEST_SECONDS = 200
GRACE_SECONDS = 25  # what a benchmark may run beyond its own limit: one measurement
SANITIZER_TOOLS = ("memcheck", "racecheck")


@dataclass
class Step:
    """What one step did."""

    name: str
    command: str
    exit_code: int | None  # None: it was stopped at its limit, or not run
    seconds: float
    tail: str  # last lines of its output

    @property
    def passed(self) -> bool:
        """Whether it ran to its end without a failure."""
        return self.exit_code == 0


def run_step(name: str, command: list[str], limit: float, **variables: str) -> Step:
    """Run one command from the repository's root, at most `limit` seconds."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"} | variables
    environment.pop("TRITON_INTERPRET", None)
    start = time.monotonic()
    print(f"gpu: {name}", flush=True)
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=max(limit, 1))
        code = process.returncode
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, 9)
        output, _ = process.communicate()
        output, code = f"{output}\nstopped after {limit:.0f} s", None
    tail = "\n".join(output.strip().splitlines()[-15:])
    step = Step(name, " ".join(command), code, time.monotonic() - start, tail)
    print(f"gpu: {name}: {_outcome(step)}\n{tail}", flush=True)
    return step


def run_tests() -> Step:
    """The Triton tests on the device, those marked `gpu` included."""
    tests = sorted(
        str(path.relative_to(ROOT)) for path in (ROOT / "tests").glob("test_triton_*.py")
    )
    command = [sys.executable, "-m", "pytest", "-q", "-m", "not slow and not peer", *tests]
    return run_step("tests", command, TEST_SECONDS)


def run_sanitizer(tool: str) -> Step:
    """compute-sanitizer on every kernel at small shapes, each allocation its own."""
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None:
        return Step(tool, "compute-sanitizer", None, 0.0, "compute-sanitizer is not on PATH")
    program = [sys.executable, str(HERE / "small_launches.py")]
    command = [sanitizer, "--tool", tool, "--error-exitcode", "9", *program]
    return run_step(tool, command, SANITIZER_SECONDS, PYTORCH_NO_CUDA_MEMORY_CACHING="1")


def run_benchmarks(out: Path, deadline: float) -> list[Step]:
    """Every bench_*_gpu.py, the remaining time shared evenly."""
    scripts = sorted(HERE.glob("bench_*_gpu.py"))
    steps = []
    for index, script in enumerate(scripts):
        share = (deadline - time.monotonic()) / (len(scripts) - index)
        seconds = max(share - GRACE_SECONDS, 5)
        command = [sys.executable, str(script), "--out", str(out), "--seconds", f"{seconds:.0f}"]
        steps.append(run_step(script.stem, command, share))
    return steps


def _outcome(step: Step) -> str:
    if step.exit_code is None:
        return "did not finish"
    return "passed" if step.passed else f"failed with exit code {step.exit_code}"


def markdown(steps: list[Step], machine: str) -> str:
    """The summary page."""
    lines = [f"# GPU run\n\n{machine}\n", "| step | outcome | seconds |", "|---|---|---|"]
    lines += [f"| {s.name} | {_outcome(s)} | {s.seconds:.0f} |" for s in steps]
    tails = [f"\n## {s.name}\n\n```\n{s.tail}\n```" for s in steps]
    return "\n".join([*lines, *tails, ""])


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    default = os.environ.get("OUT") or HERE / "results"
    parser.add_argument("--out", type=Path, default=Path(default))
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print(
            "gpu: torch sees no GPU; `make test` and `make bench` run on the CPU", file=sys.stderr
        )
        return 2
    deadline = time.monotonic() + TOTAL_SECONDS
    options.out.mkdir(parents=True, exist_ok=True)
    steps = [run_tests(), *map(run_sanitizer, SANITIZER_TOOLS)]
    steps += run_benchmarks(options.out, deadline)
    versions = f"torch {torch.__version__}, CUDA {torch.version.cuda}, HIP {torch.version.hip}"
    machine = f"{torch.cuda.get_device_name()}, {versions}"
    (options.out / "gpu.md").write_text(markdown(steps, machine))
    record = {"machine": machine, "steps": [asdict(s) for s in steps]}
    (options.out / "gpu.json").write_text(json.dumps(record, indent=1))
    return 0 if all(s.passed for s in steps) else 1


if __name__ == "__main__":
    sys.exit(main())
