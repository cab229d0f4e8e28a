"""Policy loss and its gradients from hidden states on CPU, against the three bare GEMMs and peers.

    python benchmarks/bench_linear_cpu.py                    # ratios and peak memory in one table
    python -m pytest benchmarks/bench_linear_cpu.py --benchmark-only

Times are forward + backward, interleaved round by round and compared by their minimum, since other
programs share the machine. Peak memory is the growth of the resident set over the inputs, of a
process of its own for each method. A method whose gradients are wrong is reported as wrong.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

from linear_methods import METHODS, Problem, bare_gemms, relative_error, unavailable  # noqa: E402
from memory_curve import high_water_mark, reset_high_water_mark  # noqa: E402
from provenance import provenance  # noqa: E402

BATCH, LENGTH, WIDTH, VOCAB = 8, 256, 576, 49152  # N = 2048 and the head of SmolLM2-135M
TORCH_METHODS = ("torch linear_cross_entropy", "torch linear_cross_entropy, chunked")
CPU_METHODS = ("fastpo", "eager", *TORCH_METHODS, "TRL", "Liger")
PEAKED = 24  # standard deviation of logits whose gradient is below 2^-126 in many columns
WRONG = 1e-4  # of fp32 gradients
TABLE = HERE / "results" / "linear_cpu.md"


@pytest.fixture(scope="module")
def problem() -> Problem:
    return Problem.random(BATCH, LENGTH, WIDTH, VOCAB)


@pytest.mark.benchmark(group="linear policy loss, forward + backward")
@pytest.mark.parametrize("name", ("three bare GEMMs", *CPU_METHODS))
def test_linear_policy_loss(benchmark, problem, name):
    method = bare_gemms if name == "three bare GEMMs" else METHODS[name]
    if method is not bare_gemms:
        reason = unavailable(name, "cpu")
        if reason is not None:
            pytest.skip(reason)
        assert relative_error(method(problem), METHODS["eager"](problem)) < WRONG
    benchmark.pedantic(method, args=(problem,), rounds=3, warmup_rounds=1)


def times(problem: Problem, names: list[str], rounds: int) -> dict[str, list[float]]:
    """Seconds of every method in every round."""
    methods = {"three bare GEMMs": bare_gemms} | {name: METHODS[name] for name in names}
    seconds = {name: [] for name in methods}
    for _ in range(rounds):
        for name, method in methods.items():
            start = time.perf_counter()
            method(problem)
            seconds[name].append(time.perf_counter() - start)
    return seconds


def peak_bytes(name: str) -> int:
    """Growth of the resident set over the inputs in this process, after a small warm-up."""
    METHODS[name](Problem.random(2, 16, WIDTH, 1000))
    problem = Problem.random(BATCH, LENGTH, WIDTH, VOCAB)
    reset_high_water_mark()
    before = high_water_mark()
    METHODS[name](problem)
    return high_water_mark() - before


def peak_bytes_apart(name: str) -> int:
    """`peak_bytes` of a process of its own."""
    command = [sys.executable, __file__, "--peak", name]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ.copy())
    if done.returncode:
        raise RuntimeError(f"{name}: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def table(rounds: int) -> str:
    """The Markdown table."""
    problem = Problem.random(BATCH, LENGTH, WIDTH, VOCAB)
    exact = METHODS["eager"](problem)
    errors, notes = {}, []
    for name in CPU_METHODS:
        reason = unavailable(name, "cpu")
        if reason is None:
            errors[name] = relative_error(METHODS[name](problem), exact)
        else:
            notes.append(f"{name} did not run: {reason}.")
    right = [name for name, error in errors.items() if error < WRONG]
    notes += [f"{name} is wrong: error {e:.1e}." for name, e in errors.items() if name not in right]
    seconds = times(problem, right, rounds)
    floor = min(seconds["three bare GEMMs"])
    results = (problem.hidden.numel() + problem.weight.numel()) * 4
    rows = [f"| three bare GEMMs | 1.00 | {_spread(seconds['three bare GEMMs'])} | | |"]
    for name in right:
        extra = (peak_bytes_apart(name) - results) / 2**20
        cells = (name, f"{min(seconds[name]) / floor:.2f}", _spread(seconds[name]))
        rows.append(f"| {' | '.join(cells)} | {extra:.0f} | {errors[name]:.1e} |")
    rows += peaked_rows(floor, rounds)
    return "\n".join(
        [
            "# Policy loss from hidden states on CPU, forward + backward",
            "",
            f"N = {BATCH * LENGTH}, D = {WIDTH}, V = {VOCAB}, fp32, {torch.get_num_threads()} "
            f"threads; {rounds} interleaved rounds. Time: minimum over minimum of the bare GEMMs. "
            "Extra memory: beyond inputs and gradients, each in a process of its own. Error: of "
            f"loss, dH and dW against eager. Peaked: logits of standard deviation {PEAKED}, not 1, "
            "whose gradients are subnormal in many columns unless a method flushes them; "
            "processors differ in what these cost.",
            "",
            "| method | time / bare GEMMs | seconds: min, median | extra MiB | error |",
            "|---|---|---|---|---|",
            *rows,
            "",
            *notes,
            provenance("python benchmarks/bench_linear_cpu.py --write"),
            "",
        ]
    )


def peaked_rows(floor: float, rounds: int) -> list[str]:
    """Rows of the table for peaked logits, relative to the same floor."""
    problem = Problem.random(BATCH, LENGTH, WIDTH, VOCAB, spread=PEAKED)
    exact, names = METHODS["eager"](problem), ["fastpo", "eager"]
    seconds = times(problem, names, rounds)
    rows = []
    for name in names:
        error = relative_error(METHODS[name](problem), exact)
        cells = (f"{name}, peaked", f"{min(seconds[name]) / floor:.2f}", _spread(seconds[name]))
        rows.append(f"| {' | '.join(cells)} | | {error:.1e} |")
    return rows


def _spread(seconds: list[float]) -> str:
    return f"{min(seconds):.2f}, {statistics.median(seconds):.2f}"


def main() -> None:
    """Print the table, and write it with --write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--write", action="store_true", help=f"write {TABLE.name}")
    parser.add_argument("--peak", metavar="METHOD", help="print one method's peak bytes only")
    options = parser.parse_args()
    if options.peak:
        print(json.dumps(peak_bytes(options.peak)))
        return
    text = table(options.rounds)
    print(text)
    if options.write:
        TABLE.write_text(text)


if __name__ == "__main__":
    main()
