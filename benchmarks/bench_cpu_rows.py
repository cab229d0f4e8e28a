"""The row primitives on one CPU thread, against the floor (an in-place scale) and eager PyTorch.

    python benchmarks/bench_cpu_rows.py [--rounds N] [--write]   ratios from one run, as a table
    pytest benchmarks/bench_cpu_rows.py                          the same under pytest-benchmark

A method is one PPO loss of N tokens with its gradient on the logits. All methods run with one
malloc, tuned to keep freed memory, so that page faults do not slow eager PyTorch down.
"""

from __future__ import annotations

import argparse
import ctypes
import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fastpo import _extension
from fastpo.backends import cpp as cpp_rows
from fastpo.backends.base import RowInputs
from fastpo.objective import Objective

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

from provenance import provenance  # noqa: E402

TABLE = HERE / "results" / "cpu_rows.md"
SHAPES = [(512, 32768), (128, 151936)]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
PPO = Objective(clip_low=0.2, clip_high=0.28)
PEAKED = 24.0  # standard deviation of logits whose gradient is below 2^-126 in many columns
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of mallopt(3)


def keep_freed_memory() -> None:
    """glibc: serve every size from the heap and never give it back. Elsewhere: nothing."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


@dataclass(frozen=True, kw_only=True)
class Batch:
    """N rows of logits and what a PPO loss needs beside them."""

    logits: Tensor  # (N, V)
    tokens: Tensor  # (N,)
    inputs: RowInputs
    out: Tensor  # (N, V)

    @classmethod
    def random(cls, shape: tuple[int, int], dtype: torch.dtype, spread: float = 2.0) -> Batch:
        rows, vocab = shape
        logits = (spread * torch.randn(rows, vocab)).to(dtype)
        tokens = torch.randint(0, vocab, (rows,))
        inputs = RowInputs(
            weight=torch.full((rows,), 1 / rows),
            advantages=torch.randn(rows),
            old_logprobs=torch.full((rows,), -math.log(vocab)),
            ref_logprobs=None,
            entropy_weight=None,
        )
        return cls(logits=logits, tokens=tokens, inputs=inputs, out=torch.empty_like(logits))


def scale_in_place(batch: Batch) -> Callable[[], object]:
    """The floor: one read and one write of every logit."""
    return lambda: batch.logits.mul_(1.0)


def fastpo_in_place(batch: Batch) -> Callable[[], object]:
    """Loss and gradient; the gradient overwrites the logits, which later rounds take as logits."""
    return lambda: cpp_rows.row_policy_loss(
        batch.logits, batch.tokens, batch.inputs, PPO, 1.0, batch.logits
    )


def fastpo_out_of_place(batch: Batch) -> Callable[[], object]:
    """Loss and gradient, the gradient in a matrix of its own."""
    return lambda: cpp_rows.row_policy_loss(
        batch.logits, batch.tokens, batch.inputs, PPO, 1.0, batch.out
    )


def fastpo_statistics(batch: Batch) -> Callable[[], object]:
    """Log-prob and entropy only: what old and reference log-probs cost."""
    return lambda: cpp_rows.row_stats(batch.logits, batch.tokens, 1.0)


def eager(batch: Batch) -> Callable[[], object]:
    """What trainers write: log_softmax, gather, clipped ratio, backward."""
    leaf = batch.logits.detach().clone().requires_grad_()

    def step() -> None:
        logprobs = leaf.log_softmax(-1).gather(-1, batch.tokens[:, None])[:, 0].float()
        ratio = (logprobs - batch.inputs.old_logprobs).exp()
        clipped = ratio.clamp(1 - PPO.clip_low, 1 + PPO.clip_high)
        advantages = batch.inputs.advantages
        (-torch.min(ratio * advantages, clipped * advantages).mean()).backward()
        leaf.grad = None

    return step


def compiled(batch: Batch) -> Callable[[], object]:
    """torch.compile of a weighted cross-entropy: the same V-wide work, no clipping."""
    leaf = batch.logits.detach().clone().requires_grad_()

    @torch.compile
    def loss(logits: Tensor) -> Tensor:
        nll = torch.nn.functional.cross_entropy(logits.float(), batch.tokens, reduction="none")
        return (batch.inputs.advantages * nll).mean()

    def step() -> None:
        loss(leaf).backward()
        leaf.grad = None

    return step


METHODS = {
    "in-place scale": scale_in_place,
    "fastpo, in place": fastpo_in_place,
    "fastpo, out of place": fastpo_out_of_place,
    "fastpo, statistics only": fastpo_statistics,
    "eager": eager,
    "torch.compile": compiled,
}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """One thread, one malloc; skips where the extension is missing."""
    if (reason := _extension.load_error()) is not None:
        pytest.skip(reason)
    keep_freed_memory()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("method", METHODS)
def test_rows(benchmark, method, dtype, shape):
    benchmark.group = f"{dtype} {shape[0]} x {shape[1]}"
    run = METHODS[method](Batch.random(shape, DTYPES[dtype]))
    benchmark.pedantic(run, rounds=7, warmup_rounds=2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("method", ["fastpo, out of place", "eager"])
def test_peaked_rows(benchmark, method, dtype):
    benchmark.group = f"{dtype} {SHAPES[0][0]} x {SHAPES[0][1]}, peaked"
    run = METHODS[method](Batch.random(SHAPES[0], DTYPES[dtype], PEAKED))
    benchmark.pedantic(run, rounds=7, warmup_rounds=2)


def milliseconds(runs: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """The fastest of `rounds` of each, interleaved, so that a busy moment hits all of them."""
    best = dict.fromkeys(runs, math.inf)
    for _ in range(rounds + 1):  # the first warms up
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            best[name] = min(best[name], 1e3 * (time.perf_counter() - start))
    return best


def extra_memory(run: Callable[[], object]) -> int | None:
    """Bytes by which one call raises the resident set; None where the kernel does not tell."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak
        before = _resident("VmRSS")
        run()
        return max(_resident("VmHWM") - before, 0)
    except (OSError, AttributeError):
        return None


def _resident(field: str) -> int:
    status = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in status if line.startswith(field))


def table(shape: tuple[int, int], dtype: str, rounds: int, spread: float = 2.0) -> list[str]:
    """Markdown rows: time, its ratio to the floor, eager's ratio to it, extra memory.

    Of peaked logits without the in-place loss, which from its second round on has no such logits.
    """
    batch = Batch.random(shape, DTYPES[dtype], spread)
    kind = " peaked" if spread == PEAKED else ""
    methods = {k: v for k, v in METHODS.items() if not (kind and k == "fastpo, in place")}
    runs = {name: make(batch) for name, make in methods.items()}
    times = milliseconds(runs, rounds)
    lines = []
    for name, run in runs.items():
        extra = extra_memory(run)
        share = "?" if extra is None else f"{extra / batch.logits.nbytes:.2f}"
        lines.append(
            f"| {dtype} {shape[0]} x {shape[1]}{kind} | {name} | {times[name]:.2f} | "
            f"{times[name] / times['in-place scale']:.2f} | "
            f"{times['eager'] / times[name]:.1f} | {share} |"
        )
    return lines


def main() -> None:
    """Print the tables, and write them with --write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--write", action="store_true", help=f"write {TABLE.name}")
    options = parser.parse_args()
    if (reason := _extension.load_error()) is not None:
        raise SystemExit(reason)
    keep_freed_memory()
    torch.set_num_threads(1)
    lines = [
        "# Loss and gradient from logits on CPU, one thread",
        "",
        "One PPO loss of N tokens with its gradient on the logits, N x V. The floor is an in-place "
        "scale of the same tensor: one read and one write. Malloc is tuned alike for all. Minimum "
        f"of {options.rounds} interleaved rounds; {_extension.build_info()['simd']}.",
        "",
        "| logits | method | ms | x floor | eager / it | extra memory / logits |",
        "|---|---|---|---|---|---|",
    ]
    print("\n".join(lines), flush=True)
    for dtype in DTYPES:
        for shape, spread in (*((shape, 2.0) for shape in SHAPES), (SHAPES[0], PEAKED)):
            rows = table(shape, dtype, options.rounds, spread)
            print("\n".join(rows), flush=True)
            lines += rows
    lines += ["", provenance("OMP_NUM_THREADS=1 python benchmarks/bench_cpu_rows.py --write"), ""]
    print("\n".join(lines[-3:]))
    if options.write:
        TABLE.write_text("\n".join(lines))


if __name__ == "__main__":
    main()
