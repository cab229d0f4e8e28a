"""`make gpu`: everything that needs a GPU, in two parts of at most 280 seconds each.

    python benchmarks/gpu.py [--part 1 | --part 2] [--out DIR]

Part 1: probes, every test that runs on a GPU, a first timing of both ops. Part 2: DRAM bytes by
Nsight Compute, the full tables, memcheck. docs/gpu.md says what to read first.

It takes the interpreter that runs it, installs nothing from a network, and keeps PYTHONPATH; wheels
in .cache/wheels are unpacked beside it. A step that fails or reaches its limit stops no other, and
what it printed until then is in gpu.log. Writes 8 files to --out, else $OUT, else
benchmarks/results. Exits with 1 when a step failed, with 2 without a GPU.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
PART_SECONDS = 280
START_SECONDS = 15  # of it: imports before the first step, writing after the last
GRACE_SECONDS = 15  # what a benchmark may run beyond its own limit: one measurement
WHEELS, SITE = ROOT / ".cache" / "wheels", ROOT / ".cache" / "site"
FILES = (  # of either part; and one of each part's own
    *("gpu.md", "gpu.json", "gpu.log"),
    *("logits_gpu.md", "logits_gpu.json", "linear_gpu.md", "linear_gpu.json"),
)
OWN_FILE = {1: "exp_logits_gpu.json", 2: "dram_rows.csv"}
FIXTURES = {"device", "triton_backend", "small_layout"}  # of tests/conftest.py: what has one is
ON_DEVICE = re.compile(rf"mark\.gpu|fixtures?\w*\([^)]*\"({'|'.join(FIXTURES)})\"")  # on a GPU
QUICK = "(gpu or device) and not slow and not peer"


@dataclass(kw_only=True)
class Plan:
    """A step to come."""

    name: str
    limit: float  # seconds; what the steps before it left is added
    command: list[str]
    variables: dict[str, str] = field(default_factory=dict)
    timed: bool = False  # takes --seconds: start no measurement after that
    needs: str | None = None  # a program on PATH without which it is left out


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


def test_files() -> list[str]:
    """The test files in which something runs on a GPU where there is one: they import no more than
    torch, Triton and pytest, which a file of the trainer's would."""
    tests = sorted((ROOT / "tests").glob("test_*.py"))
    return [str(path.relative_to(ROOT)) for path in tests if _runs_on_device(path.read_text())]


def _runs_on_device(text: str) -> bool:
    functions = (node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef))
    names = {each.arg for function in functions for each in function.args.args}
    return bool(names & FIXTURES) or ON_DEVICE.search(text) is not None


def plans(part: int, out: Path) -> list[Plan]:
    """The steps of one part; their limits add up to PART_SECONDS - START_SECONDS at most."""
    python, to = sys.executable, ["--out", str(out)]

    def script(name: str, *options: str) -> list[str]:
        return [python, str(HERE / f"{name}.py"), *options]

    small = script("small_launches")
    if part == 1:
        workers = min(12, os.cpu_count() or 1)
        parallel = ["-n", str(workers)] if importlib.util.find_spec("xdist") else []
        pytest = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-o", "timeout=90"]
        pytest += ["--continue-on-collection-errors"]  # one file that does not import is one less
        first_look = ["--vocab", "151936", "32000"]
        return [
            Plan(name="probes", limit=30, command=script("probes_gpu")),
            Plan(
                name="extension", limit=20, command=[]
            ),  # runs since the start: what is left of it
            Plan(name="tests", limit=100, command=[*pytest, *parallel, "-m", QUICK, *test_files()]),
            Plan(
                name="logits",
                limit=35,
                command=script("bench_logits_gpu", *first_look, *to),
                timed=True,
            ),
            Plan(
                name="linear",
                limit=45,
                command=script("bench_linear_gpu", "--shapes", "TRL's own, Qwen3-8B", *to),
                timed=True,
            ),
            Plan(
                name="exponentials",
                limit=35,
                command=script("exp_logits_gpu", *to),
                timed=True,
            ),
        ]
    memcheck = ["compute-sanitizer", "--tool", "memcheck", "--error-exitcode", "9", *small]
    return [
        Plan(name="DRAM bytes", limit=45, command=script("dram_rows_gpu", *to), needs="ncu"),
        Plan(name="logits", limit=75, command=script("bench_logits_gpu", *to), timed=True),
        Plan(name="linear", limit=85, command=script("bench_linear_gpu", *to), timed=True),
        Plan(name="small launches", limit=20, command=small),  # compiles for the next
        Plan(
            name="memcheck",
            limit=40,
            command=memcheck,
            variables={"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},  # each tensor its own allocation
            needs="compute-sanitizer",
        ),
    ]


def environment(**variables: str) -> dict[str, str]:
    """This process's, with the checkout and unpacked wheels before what PYTHONPATH holds."""
    paths = [str(ROOT), str(SITE), os.environ.get("PYTHONPATH", "")]
    mine = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
    mine.pop("TRITON_INTERPRET", None)
    return mine | {"PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1"} | variables


def unpack_wheels() -> None:
    """Install the wheels that were carried here, without their dependencies and without network."""
    wheels = sorted(map(str, WHEELS.glob("*.whl")))
    if wheels and not SITE.is_dir():
        pip = [sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps"]
        subprocess.run([*pip, "--target", str(SITE), *wheels], check=False)


def build_extension(log: Path) -> subprocess.Popen:
    """Start compiling the C++/CUDA extension for this GPU."""
    major, minor = torch.cuda.get_device_capability()
    archs = os.environ.get("TORCH_CUDA_ARCH_LIST", f"{major}.{minor}")
    variables = environment(FASTPO_FORCE_EXT="1", TORCH_CUDA_ARCH_LIST=archs)
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    return _start(command, log, variables)


def _start(command: list[str], log: Path, variables: dict[str, str]) -> subprocess.Popen:
    """A process group of its own, its output at the end of `log`."""
    with log.open("ab") as output:
        return subprocess.Popen(
            command,
            cwd=ROOT,
            env=variables,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def finish(
    name: str, process: subprocess.Popen, limit: float, log: Path, offset: int, since: float
) -> Step:
    """Wait for a process, at most `limit` seconds; its output stands in `log` from `offset` on."""
    note = ""
    try:
        code = process.wait(timeout=max(limit, 1))
    except BaseException as reason:  # its limit, or the end of this process
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        if not isinstance(reason, subprocess.TimeoutExpired):
            raise
        code, note = None, f"\nstopped after {limit:.0f} s"
    with log.open("rb") as output:
        output.seek(offset)
        text = output.read().decode(errors="replace")
    tail = "\n".join(text.strip().splitlines()[-15:]) + note
    command = " ".join(map(str, process.args))
    return Step(name, command, code, time.monotonic() - since, tail)


def run_step(plan: Plan, limit: float, log: Path) -> Step:
    """Run one command from the repository's root, at most `limit` seconds."""
    if plan.needs is not None and shutil.which(plan.needs) is None:
        return Step(plan.name, plan.needs, None, 0.0, f"{plan.needs} is not on PATH")
    command = plan.command
    if plan.timed:
        command = [*command, "--seconds", f"{max(limit - GRACE_SECONDS, 5):.0f}"]
    start, offset = time.monotonic(), log.stat().st_size if log.exists() else 0
    process = _start(command, log, environment(**plan.variables))
    return finish(plan.name, process, limit, log, offset, start)


def run_part(part: int, out: Path) -> Iterator[Step]:
    """The steps of a part, each as soon as it is done."""
    log, ext_log = out / "gpu.log", out / "extension.log"
    deadline = start = time.monotonic()
    extension = build_extension(ext_log) if part == 1 else None
    for plan in plans(part, out):
        deadline += plan.limit
        print(f"gpu: {plan.name}", flush=True)
        if plan.command:
            step = run_step(plan, deadline - time.monotonic(), log)
        else:
            limit = deadline - time.monotonic()
            step = finish(plan.name, extension, limit, ext_log, 0, start)
            log.open("ab").write(ext_log.read_bytes())
            ext_log.unlink()
        print(f"gpu: {step.name}: {outcome(step)}, {step.seconds:.0f} s\n{step.tail}", flush=True)
        yield step


def outcome(step: Step) -> str:
    """One or a few words."""
    if step.exit_code is None:
        return "did not finish"
    return "passed" if step.passed else f"failed with exit code {step.exit_code}"


def markdown(steps: list[Step], machine: str) -> str:
    """The summary page."""
    lines = [f"# GPU run\n\n{machine}\n", "| step | outcome | seconds |", "|---|---|---|"]
    lines += [f"| {s.name} | {outcome(s)} | {s.seconds:.0f} |" for s in steps]
    tails = [f"\n## {s.name}\n\n`{s.command}`\n\n```\n{s.tail}\n```" for s in steps]
    return "\n".join([*lines, *tails, ""])


def save(out: Path, steps: list[Step]) -> None:
    """Write gpu.md and gpu.json: after every step, so that a run cut short leaves them."""
    versions = f"torch {torch.__version__}, CUDA {torch.version.cuda}, HIP {torch.version.hip}"
    machine = f"{torch.cuda.get_device_name()}, {versions}"
    (out / "gpu.md").write_text(markdown(steps, machine))
    record = {"machine": machine, "steps": [asdict(s) for s in steps]}
    (out / "gpu.json").write_text(json.dumps(record, indent=1))


def main(arguments: list[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    default = os.environ.get("OUT") or HERE / "results"
    parser.add_argument("--out", type=Path, default=Path(default))
    parser.add_argument("--part", type=int, choices=(1, 2), help="default: one after the other")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print(
            "gpu: torch sees no GPU; `make test` and `make bench` run on the CPU", file=sys.stderr
        )
        return 2
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "gpu.log").unlink(missing_ok=True)
    unpack_wheels()
    steps: list[Step] = []
    for part in (1, 2) if options.part is None else (options.part,):
        for step in run_part(part, options.out.resolve()):
            steps.append(step)
            save(options.out, steps)
    return 0 if all(s.passed for s in steps) else 1


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # which ends the step's processes too
    sys.exit(main())
