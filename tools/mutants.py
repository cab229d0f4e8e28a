"""Does a test notice? Run the mutants of tools/mutants.toml, one small defect at a time.

    python tools/mutants.py [--only AREA ...] [--number N ...] [--list] [--jobs 2] [--seconds 300]

A mutant names a file, the text `before`, which occurs there exactly once, what stands `after` in
its place, and the `tests` that must fail then. It is killed if one does, or the time is up, and has
survived otherwise. Those with a reason under `equivalent` compute the same, and are not run.

Everything happens in copies of the checkout, where the tests of all chosen mutants must first pass.
They run in forks of this process, which has imported torch once. A mutant of csrc names the `units`
to compile anew, `rows` for the one of the SIMD level that tests run on.
"""

from __future__ import annotations

import argparse
import importlib
import os
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

os.environ |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}  # none before a fork

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("fastpo", "csrc", "kernels", "tests", "tools", "benchmarks", "docs", "recipes")
PRELOADED = ("triton", "numpy", "pytest", "transformers.models.llama.modeling_llama", "tokenizers")
KINDS = ("killed", "survived", "broken", "equivalent")
LEVELS = (("avx512", "avx512dq"), ("avx2", " avx2"), ("portable", ""))  # and a flag of the CPU
UNBUILT = 100  # our own exit code, beside pytest's: the mutant does not compile


def area_of(file: str) -> str:
    """`trainer` of fastpo/trainer/loop.py, `csrc` of csrc/exp.h, `plan` of fastpo/plan.py."""
    path = Path(file.removeprefix("fastpo/"))
    return path.stem if path.parent == Path() else path.parent.as_posix()


def read() -> list[dict]:
    """All mutants; exits if one no longer fits the code."""
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    mutants = tomllib.loads((ROOT / "tools" / "mutants.toml").read_text())["mutant"]
    stale = []
    for number, mutant in enumerate(mutants, start=1):
        mutant |= {"number": number, "area": area_of(mutant["file"])}
        found = (ROOT / mutant["file"]).read_text().count(mutant["before"])
        if found != 1 or mutant["before"] == mutant["after"]:
            stale.append(f"{number} {mutant['file']}: {found} times {mutant['before']!r}")
    if stale:
        sys.exit("mutants: `before` must occur once and differ from `after`:\n" + "\n".join(stale))
    return mutants


class Tree:
    """A copy of the checkout; with `compiles`, one that can rebuild its extension."""

    def __init__(self, path: Path, *, compiles: bool):
        self.path = path
        for name in FOLDERS:
            shutil.copytree(ROOT / name, path / name, ignore=shutil.ignore_patterns("__pycache__"))
        for file in filter(Path.is_file, ROOT.iterdir()):
            shutil.copy2(file, path)
        self.commands = self._build() if compiles else []
        self.extension = {file: file.read_bytes() for file in (path / "fastpo").glob("_C*.so")}

    def _build(self) -> list[list[str]]:
        switches = {"FASTPO_FORCE_EXT": "1", "FASTPO_CUDA": "0", "FASTPO_CXXFLAGS": "-O1"}
        command = [sys.executable, "setup.py", "build_ext", "--inplace", "--force"]
        output = subprocess.run(
            command,
            cwd=self.path,
            env=os.environ | switches,
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        return [shlex.split(line) for line in output.splitlines() if " -o " in line]

    def apply(self, mutant: dict) -> None:
        """Write the mutated file, at a time that no compiled copy of it has."""
        file = self.path / mutant["file"]
        self.saved = file, file.read_text()
        file.write_text(self.saved[1].replace(mutant["before"], mutant["after"]))
        os.utime(file, (mutant["number"], mutant["number"]))

    def restore(self, mutant: dict) -> None:
        """Undo `apply` and `compile`."""
        path, text = self.saved
        path.write_text(text)
        for file, content in self.extension.items() if mutant["area"] == "csrc" else ():
            file.write_bytes(content)

    def compile(self, units: list[str]) -> bool:
        """Compile some units, `rows` at the SIMD level that tests run on, and link."""
        level = next(name for name, flag in LEVELS if flag in Path("/proc/cpuinfo").read_text())
        link, good = list(next(c for c in self.commands if "-shared" in c)), True
        link[link.index("-o") + 1] = str(next(iter(self.extension)))  # not below build/
        for unit in units:
            source = f"csrc/rows_{level}.cpp" if unit == "rows" else f"csrc/{unit}.cpp"
            command = next(c for c in self.commands if source in c)
            target = command[command.index("-o") + 1]
            changed = {target: f"{target}.mutant.o"}
            command, link = ([changed.get(x, x) for x in line] for line in (command, link))
            good &= not subprocess.run(command, cwd=self.path).returncode
        return good and not subprocess.run(link, cwd=self.path).returncode


def fork(tree: Tree, tests: list[str], log: Path, units: list[str] | None = None) -> int:
    """Run tests in a tree, in a process group of their own; its id."""
    sys.stdout.flush()
    if child := os.fork():
        return child
    code = UNBUILT
    try:
        os.setsid()
        output = os.open(log, os.O_WRONLY | os.O_CREAT)
        os.dup2(output, 1), os.dup2(output, 2)
        os.chdir(tree.path)
        sys.path.insert(0, str(tree.path))
        os.environ["PYTHONPATH"] = str(tree.path)
        if not units or tree.compile(units):
            import pytest

            code = int(pytest.main(["-x", "-q", "-m", "", "-p", "no:cacheprovider", *tests]))
    finally:
        sys.stdout.flush()
        os._exit(code)


def wait_for(children: dict[int, float]) -> tuple[int, str]:
    """The next child that ends, or whose time is up, and what that says of a mutant."""
    while True:
        for child, deadline in children.items():
            ended, status = os.waitpid(child, os.WNOHANG)
            if late := not ended and time.monotonic() > deadline:
                os.killpg(child, signal.SIGKILL)
                os.waitpid(child, 0)
            if ended or late:
                with suppress(ProcessLookupError):  # what its tests have started
                    os.killpg(child, signal.SIGKILL)
                code = 1 if late else os.waitstatus_to_exitcode(status)
                # 2: a test file cannot be imported; below 0: crashed
                return child, "survived" if code == 0 else "killed" if code <= 2 else "broken"
        time.sleep(0.05)


def run(mutants: list[dict], folder: Path, jobs: int, seconds: float) -> None:
    """Give every mutant its `result`."""
    compiles = any(mutant["area"] == "csrc" for mutant in mutants)
    trees = [Tree(folder / f"tree{job}", compiles=compiles) for job in range(jobs)]
    every, log = sorted({test for m in mutants for test in m["tests"]}), folder / "true"
    child = fork(trees[0], every, log)
    if wait_for({child: time.monotonic() + seconds + 30 * len(every)})[1] != "survived":
        sys.exit(f"mutants: the tests must pass on the code as it is\n{log.read_text()[-4000:]}")
    todo, running = mutants[::-1], {}
    while todo or running:
        while todo and trees:
            mutant, tree = todo.pop(), trees.pop()
            tree.apply(mutant)
            child = fork(tree, mutant["tests"], folder / str(mutant["number"]), mutant.get("units"))
            running[child] = (time.monotonic() + seconds, tree, mutant)
        child, result = wait_for({child: entry[0] for child, entry in running.items()})
        _, tree, mutant = running.pop(child)
        tree.restore(mutant)
        trees.append(tree)
        say(mutant | {"result": result})
        mutant["result"] = result
        if result == "broken":
            print((folder / str(mutant["number"])).read_text()[-2000:])


def say(mutant: dict) -> None:
    """One line."""
    what = mutant.get("note") or " ".join(mutant["after"].split())[:70]
    print(f"{mutant['number']:>4} {mutant['result']:<11}{mutant['file']}: {what}", flush=True)


def report(mutants: list[dict]) -> float:
    """Print the table of areas; the share of killed ones in per cent."""
    counts = defaultdict(Counter)
    for mutant in mutants:
        counts[mutant["area"]][mutant["result"]] += 1
    for area, found in counts.items():
        print(f"{area:<14}", *(f"{found[kind]:>4} {kind}" for kind in KINDS if found[kind]))
    total = sum(counts.values(), Counter())
    judged = total.total() - total["equivalent"]
    score = 100 * total["killed"] / max(judged, 1)
    print(f"score: {total['killed']} of {judged}, {score:.1f} %, {total['equivalent']} equivalent")
    return score


def main() -> int:
    """0 if at least 95 % of the mutants that are run are killed."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", nargs="+", metavar="AREA", help="such as ops, csrc, trainer/run")
    parser.add_argument("--number", nargs="+", type=int, help="these alone")
    parser.add_argument("--list", action="store_true", help="show them, run nothing")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=300, help="the longest one may take")
    options = parser.parse_args()
    mutants = [
        mutant | {"result": "equivalent" if "equivalent" in mutant else mutant["area"]}
        for mutant in read()
        if not options.only or mutant["area"] in options.only
        if not options.number or mutant["number"] in options.number
    ]
    if options.list:
        for mutant in mutants:
            say(mutant)
        return 0
    import torch

    if not torch.cuda.is_available():
        os.environ.setdefault("TRITON_INTERPRET", "1")  # decided when Triton is imported
    for name in PRELOADED:
        with suppress(ImportError):
            importlib.import_module(name)
    chosen = [mutant for mutant in mutants if mutant["result"] != "equivalent"]
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        run(chosen, Path(folder), options.jobs, options.seconds)
    return 0 if report(mutants) >= 95 else 1


if __name__ == "__main__":
    sys.exit(main())
