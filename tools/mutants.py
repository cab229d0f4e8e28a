"""Does a test notice? Run the mutants of tools/mutants.toml, one small defect in the code at a time.

    python tools/mutants.py [--only AREA ...] [--list] [--jobs 2] [--seconds 300] [--verbose]

A mutant names a file, the text `before`, which occurs there exactly once, what stands `after` in its
place, and the `tests` that must fail then. It is killed if one does (or the time is up), and has
survived otherwise. Those with a reason under `equivalent` compute the same, and are not run.

Everything happens in copies of the checkout. The tests run in forks of this process, which has
imported torch and others once; a mutant of csrc is linked from the object files that it leaves alone.
The tests of all chosen mutants must first pass on the code as it is.
"""

from __future__ import annotations

import argparse
import importlib
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from contextlib import suppress
from pathlib import Path

os.environ |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}  # no threads before a fork
ROOT = Path(__file__).resolve().parent.parent
COPIED = ("fastpo", "csrc", "kernels", "tests", "tools", "benchmarks", "docs", "recipes")
PRELOADED = (
    *("torch", "triton", "numpy", "pytest", "pydantic", "rich.console"),
    *("transformers", "transformers.models.llama.modeling_llama", "tokenizers"),
)
PASSED, FAILED, ERRORS = 0, 1, 2  # exit codes of pytest; a mutant that cannot be imported is 2
UNBUILT = 100  # our own: the mutant does not compile


def area_of(file: str) -> str:
    """`trainer/run` of fastpo/trainer/run/report.py, `csrc` of csrc/exp.h, `plan` of fastpo/plan.py."""
    path = Path(file).relative_to("fastpo") if file.startswith("fastpo/") else Path(file)
    return path.stem if path.parent == Path() else path.parent.as_posix()


def read(only: list[str]) -> list[dict]:
    """The chosen mutants, in the order of the list; exits if one no longer fits the code."""
    try:
        import tomllib
    except ImportError:
        import tomli as tomllib
    listed = tomllib.loads((ROOT / "tools" / "mutants.toml").read_text(encoding="utf-8"))["mutant"]
    stale = []
    for number, mutant in enumerate(listed, start=1):
        mutant |= {"number": number, "area": area_of(mutant["file"])}
        found = (ROOT / mutant["file"]).read_text(encoding="utf-8").count(mutant["before"])
        if found != 1 or mutant["before"] == mutant["after"]:
            stale.append(f"{number} {mutant['file']}: {found} times {mutant['before']!r}")
    if stale:
        sys.exit("mutants: `before` must occur once and differ from `after`:\n" + "\n".join(stale))
    return [m for m in listed if not only or m["area"] in only]


def copy_tree(to: Path) -> Path:
    """The checkout, its built extension included."""
    ignored = shutil.ignore_patterns("__pycache__", "results")
    for name in COPIED:
        shutil.copytree(ROOT / name, to / name, ignore=ignored)
    for file in ROOT.iterdir():
        if file.is_file():
            shutil.copy2(file, to)
    return to


class Builder:
    """Compiles csrc once, and then what includes a changed file."""

    def __init__(self, tree: Path):
        environment = {**os.environ, "FASTPO_FORCE_EXT": "1", "FASTPO_CUDA": "0"}
        command = [sys.executable, "setup.py", "build_ext", "--inplace", "--force"]
        done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"mutants: the extension does not build\n{done.stderr[-2000:]}")
        lines = [shlex.split(line) for line in done.stdout.splitlines() if " -o " in line]
        self.compile = [line for line in lines if "-c" in line]
        self.link = next(line for line in lines if "-shared" in line)

    def build(self, tree: Path, file: str) -> bool:
        """Compile the units that see `file`; of the SIMD levels, the one that tests run on."""
        link = list(self.link)
        for command in self.compile:
            unit, target = command[command.index("-c") + 1], command[command.index("-o") + 1]
            widest = not unit.startswith("csrc/rows_") or unit in ("csrc/rows_dispatch.cpp", WIDEST)
            if file not in includes(tree, unit) or not widest:
                continue
            fresh = f"{target}.mutant.o"
            command = [{target: fresh, "-O3": "-O1"}.get(word, word) for word in command]
            link = [fresh if word == target else word for word in link]
            if subprocess.run(command, cwd=tree).returncode:
                return False
        return subprocess.run(link, cwd=tree).returncode == 0


with open("/proc/cpuinfo") as _info:
    _flags = _info.read()
WIDEST = next(
    f"csrc/rows_{level}.cpp"
    for level, flag in (("avx512", "avx512dq"), ("avx2", " avx2"), ("portable", ""))
    if flag in _flags
)


def includes(tree: Path, file: str) -> set[str]:
    """`file` and all of csrc that it includes."""
    found, waiting = set(), [file]
    while waiting:
        found.add(name := waiting.pop())
        names = re.findall(r'#include "([^"]+)"', (tree / name).read_text(encoding="utf-8"))
        waiting += [f"csrc/{n}" for n in names if f"csrc/{n}" not in found]
    return found


def fork(tree: Path, tests: list[str], log: Path, before: object = lambda: True) -> int:
    """Run tests in `tree`, in a process group of their own; its id."""
    sys.stdout.flush()
    if child := os.fork():
        return child
    os.setsid()
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1), os.dup2(output, 2)
    os.chdir(tree)
    sys.path.insert(0, str(tree))
    os.environ["PYTHONPATH"] = str(tree)
    code = UNBUILT
    try:
        if before():
            import pytest

            options = ["-x", "-q", "-m", "", "-p", "no:cacheprovider", "--tb=short"]
            code = int(pytest.main([*options, *tests]))
    finally:
        sys.stdout.flush()
        os._exit(code)


def wait_for(running: dict[int, tuple]) -> tuple[int, int | None]:
    """The next process that ends, and its exit code; None: its time was up."""
    while True:
        for child, (deadline, *_) in running.items():
            ended, status = os.waitpid(child, os.WNOHANG)
            if ended:
                return child, os.waitstatus_to_exitcode(status)
            if time.monotonic() > deadline:
                os.killpg(child, signal.SIGKILL)
                os.waitpid(child, 0)
                return child, None
        time.sleep(0.05)


def apply(tree: Path, mutant: dict, at: int) -> Path:
    """Write the mutated file; `at` is its time, which no compiled copy of it has."""
    path = tree / mutant["file"]
    path.write_text(path.read_text().replace(mutant["before"], mutant["after"]))
    os.utime(path, (at, at))
    return path


def restore(tree: Path, file: str) -> None:
    """As it was, and the extension, too."""
    shutil.copy2(ROOT / file, tree / file)
    if file.startswith("csrc/"):
        for kept in (tree / "pristine").iterdir():
            shutil.copy2(kept, tree / "fastpo")


def run(mutants: list[dict], folder: Path, options: argparse.Namespace) -> dict[int, str]:
    """What became of each mutant, by its number."""
    trees = [copy_tree(folder / f"tree{job}") for job in range(options.jobs)]
    builders = {}
    if any(m["file"].startswith("csrc/") for m in mutants):
        builders = {tree: Builder(tree) for tree in trees}
    for tree in trees:
        (tree / "pristine").mkdir()
        for built in (tree / "fastpo").glob("_C*.so"):
            shutil.copy2(built, tree / "pristine")
    every = sorted({test for mutant in mutants for test in mutant["tests"]})
    if not options.unchecked:
        child = fork(trees[0], every, folder / "log")
        _, code = wait_for({child: (time.monotonic() + 60 + 30 * len(every),)})
        if code != PASSED:
            tail = (folder / "log").read_text()[-4000:]
            sys.exit(f"mutants: the tests must pass on the code as it is\n{tail}")
    results, todo, running, start = {}, mutants[::-1], {}, int(time.time())
    while todo or running:
        while todo and trees:
            mutant, tree = todo.pop(), trees.pop()
            apply(tree, mutant, start + mutant["number"])
            before = lambda: True  # noqa: E731
            if mutant["area"] == "csrc":
                before = lambda t=tree, m=mutant: builders[t].build(t, m["file"])  # noqa: E731
            log = folder / f"log{mutant['number']}"
            child = fork(tree, mutant["tests"], log, before)
            running[child] = (time.monotonic() + options.seconds, tree, mutant, log)
        child, code = wait_for(running)
        _, tree, mutant, log = running.pop(child)
        with suppress(ProcessLookupError):  # what the tests have started
            os.killpg(child, signal.SIGKILL)
        restore(tree, mutant["file"])
        trees.append(tree)
        known = {PASSED: "survived", FAILED: "killed", ERRORS: "killed", None: "killed (time)"}
        results[mutant["number"]] = known.get(code, "killed" if code < 0 else "BROKEN")
        say(mutant, results[mutant["number"]])
        if options.verbose or results[mutant["number"]] == "BROKEN":
            print(log.read_text()[-3000:])
    return results


def say(mutant: dict, result: str) -> None:
    what = mutant.get("note") or " ".join(mutant["after"].split())[:70]
    print(f"{mutant['number']:>4} {result:<13} {mutant['file']}: {what}", flush=True)


def report(mutants: list[dict], results: dict[int, str]) -> int:
    """The table of areas; the number of mutants that were not killed."""
    counts = defaultdict(Counter)
    for mutant in mutants:
        result = results.get(mutant["number"], "equivalent").split()[0]
        counts[mutant["area"]][result] += 1
        counts["total"][result] += 1
    kinds = ("killed", "survived", "BROKEN", "equivalent")
    counts["total"] = counts.pop("total")
    for area, found in counts.items():
        print(f"{area:<14}", *(f"{found[kind]:>4} {kind}" for kind in kinds if found[kind]))
    total = counts["total"]
    judged = total["killed"] + total["survived"] + total["BROKEN"]
    print(f"score: {total['killed']} of {judged}, {100 * total['killed'] / max(judged, 1):.1f} %")
    return judged - total["killed"]


def main() -> int:
    """0 if at least 95 % of the mutants that are run are killed."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", nargs="+", metavar="AREA", default=[])
    parser.add_argument("--number", nargs="+", type=int, default=[], help="these alone")
    parser.add_argument("--list", action="store_true", help="show them, run nothing")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument(
        "--seconds", type=float, default=300.0, help="the longest a mutant may take"
    )
    parser.add_argument("--unchecked", action="store_true", help="do not run the true code first")
    parser.add_argument("--verbose", action="store_true", help="what the tests said")
    options = parser.parse_args()
    mutants = [m for m in read(options.only) if not options.number or m["number"] in options.number]
    if options.list:
        for mutant in mutants:
            say(mutant, "equivalent" if "equivalent" in mutant else mutant["area"])
        return 0
    import torch

    if not torch.cuda.is_available():
        os.environ.setdefault("TRITON_INTERPRET", "1")
    for name in PRELOADED:
        with suppress(ImportError):
            importlib.import_module(name)
    chosen = [mutant for mutant in mutants if "equivalent" not in mutant]
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        results = run(chosen, Path(folder), options)
    survived = report(mutants, results)
    return 0 if survived <= 0.05 * max(len(results), 1) else 1


if __name__ == "__main__":
    sys.exit(main())
