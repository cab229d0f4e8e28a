"""Policy loss and its gradients from hidden states on a GPU, against bare GEMMs and peers.

    python benchmarks/bench_linear_gpu.py --out benchmarks/results --seconds 240

bf16, forward + backward. Time is the median of a method's repetitions, as a share of the three bare
GEMMs of the same run; memory is the peak allocated beyond inputs and gradients; error is the worst
of loss, dH and dW against fp64-accumulated chunks. A wrong or missing peer is reported, not timed.
Shapes go from small to large, until the time is used up.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

from linear_methods import (  # noqa: E402
    METHODS,
    Problem,
    Result,
    bare_gemms,
    relative_error,
    unavailable,
)

SHAPES = {  # B, T, D, V
    "Qwen3-0.6B": (4, 2048, 1024, 151936),
    "Llama-3-8B": (4, 2048, 4096, 128256),
    "TRL's own, Qwen3-8B": (4, 2048, 4096, 151936),
    "Gemma": (4, 2048, 3584, 262144),
    "Qwen3-8B, 32k": (4, 8192, 4096, 151936),
    "Qwen3-8B, 131k": (4, 32768, 4096, 151936),
}
WRONG = 0.05  # relative error of a bf16 gradient; rounding alone costs 2e-3
REPETITIONS = 7


def exact(problem: Problem, chunk: int = 1024) -> Result:
    """Loss and gradients from fp32 operands and fp64 softmax, a chunk of tokens at a time."""
    hidden = problem.flat_hidden.detach().float()
    weight = problem.weight.detach().float()
    tokens, old = problem.tokens.flatten(), problem.old_logprobs.flatten()
    advantages = problem.advantages[:, None].expand_as(problem.old_logprobs).flatten()
    low, high = 0.8, 1.28
    loss = torch.zeros((), dtype=torch.float64, device=hidden.device)
    hidden_grad, weight_grad = torch.empty_like(hidden), torch.zeros_like(weight)
    for start in range(0, tokens.numel(), chunk):
        rows = slice(start, start + chunk)
        probs = (hidden[rows] @ weight.t()).double().log_softmax(-1)
        logprobs = probs.gather(-1, tokens[rows, None])[:, 0]
        ratio, a = (logprobs - old[rows]).exp(), advantages[rows]
        surrogate, clipped = ratio * a, ratio.clamp(low, high) * a
        loss -= torch.min(surrogate, clipped).sum() / tokens.numel()
        active = (surrogate <= clipped) / tokens.numel()
        coefficient = (surrogate * active)[:, None]
        grad = probs.exp_().mul_(coefficient)
        grad.scatter_add_(1, tokens[rows, None], -coefficient)
        grad = grad.float()
        hidden_grad[rows] = grad @ weight
        weight_grad.addmm_(grad.t(), hidden[rows])
    return loss, hidden_grad.view_as(problem.hidden), weight_grad


def milliseconds(method: Callable[[Problem], Result], problem: Problem) -> float:
    """Median time of a method after one warm-up."""
    method(problem)
    times = []
    for _ in range(REPETITIONS):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        method(problem)
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop))
    return statistics.median(times)


def extra_bytes(method: Callable[[Problem], Result], problem: Problem) -> int:
    """Peak allocation beyond the inputs and the gradients."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = method(problem)
    results = sum(x.numel() * x.element_size() for x in result)
    return torch.cuda.max_memory_allocated() - before - results


def measure(name: str, problem: Problem, truth: Result) -> dict:
    """One method's figures, or why there are none."""
    reason = unavailable(name, problem.hidden.device)
    if reason is not None:
        return {"method": name, "note": reason}
    method = METHODS[name]
    try:
        error = relative_error(method(problem), truth)
        if error > WRONG:
            return {"method": name, "note": f"wrong: error {error:.1e}"}
        extra = extra_bytes(method, problem)
        return {
            "method": name,
            "error": error,
            "extra_bytes": extra,
            "ms": milliseconds(method, problem),
        }
    except torch.OutOfMemoryError:
        torch.cuda.empty_cache()
        return {"method": name, "note": "out of memory"}
    except Exception as error:  # a peer's failure is a row of the table, not ours
        return {"method": name, "note": f"failed: {type(error).__name__}: {error}"[:200]}


def run_shape(label: str, deadline: float) -> dict:
    """All methods at one shape."""
    batch, length, width, vocab = SHAPES[label]
    problem = Problem.random(batch, length, width, vocab, device="cuda", dtype=torch.bfloat16)
    truth = exact(problem)
    torch.cuda.empty_cache()
    floor, rows = None, []
    try:
        floor = milliseconds(bare_gemms, problem)
    except torch.OutOfMemoryError:  # they hold all logits
        torch.cuda.empty_cache()
        part = Problem.random(1, 8192, width, vocab, device="cuda", dtype=torch.bfloat16)
        floor = milliseconds(bare_gemms, part) * batch * length / 8192
    for name in METHODS:
        if time.monotonic() > deadline:
            break
        rows.append(measure(name, problem, truth))
        torch.cuda.empty_cache()
    return {"shape": label, "size": SHAPES[label], "bare_gemms_ms": floor, "methods": rows}


def table(shapes: list[dict]) -> str:
    """The Markdown tables."""
    device = torch.cuda.get_device_name()
    lines = [f"# Policy loss from hidden states on {device}, bf16, forward + backward", ""]
    for shape in shapes:
        batch, length, width, vocab = shape["size"]
        lines += [
            f"## {shape['shape']}: N = {batch * length}, D = {width}, V = {vocab}",
            "",
            f"Three bare GEMMs: {shape['bare_gemms_ms']:.1f} ms.",
            "",
            "| method | time / bare GEMMs | ms | extra GiB | error |",
            "|---|---|---|---|---|",
            *(_row(row, shape["bare_gemms_ms"]) for row in shape["methods"]),
            "",
        ]
    return "\n".join([*lines, f"torch {torch.__version__}.", ""])


def _row(row: dict, floor: float) -> str:
    if "note" in row:
        return f"| {row['method']} | {row['note']} | | | |"
    cells = (row["method"], f"{row['ms'] / floor:.2f}", f"{row['ms']:.1f}")
    more = (f"{row['extra_bytes'] / 2**30:.2f}", f"{row['error']:.1e}")
    return f"| {' | '.join((*cells, *more))} |"


def main() -> int:
    """Run what the time allows; 2 without a GPU."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=HERE / "results")
    parser.add_argument("--seconds", type=float, default=240)
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=list(SHAPES))
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("bench_linear_gpu: torch sees no GPU", file=sys.stderr)
        return 2
    deadline, shapes = time.monotonic() + options.seconds, []
    for label in options.shapes:
        if time.monotonic() < deadline:
            shapes.append(run_shape(label, deadline))
            options.out.mkdir(parents=True, exist_ok=True)
            (options.out / "linear_gpu.json").write_text(json.dumps(shapes, indent=1) + "\n")
            (options.out / "linear_gpu.md").write_text(table(shapes))
    print(table(shapes))
    return 0


if __name__ == "__main__":
    sys.exit(main())
