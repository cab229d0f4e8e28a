"""Peak memory of a forward + backward against the number of tokens: docs/memory-curve.png.

    python benchmarks/memory_curve.py measure --tokens 4096 8192 16384 32768
    python benchmarks/memory_curve.py draw

`measure` runs each point in a process of its own on CPU, in fp32, and adds it to
results/memory.json: the growth of the resident set's high-water mark over inputs already touched.
`draw` writes the picture and results/memory.md.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import torch

import fastpo
from fastpo import plan

sys.path.insert(0, str(Path(__file__).resolve().parent))
from provenance import provenance

ROOT = Path(__file__).resolve().parents[1]
RECORDS = ROOT / "benchmarks" / "results" / "memory.json"
TABLE = ROOT / "benchmarks" / "results" / "memory.md"
PICTURE = ROOT / "docs" / "memory-curve.png"
GIB = 2**30


def high_water_mark() -> int:
    """Bytes of the largest resident set so far."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/self/status has no VmHWM: this measurement needs Linux")


def reset_high_water_mark() -> None:
    """From here on, the largest resident set is the present one."""
    Path("/proc/self/clear_refs").write_text("5")


def step(path: str, hidden, weight, tokens, advantages) -> None:
    """One forward + backward by fastpo, or by eager PyTorch over all logits."""
    objective = fastpo.dapo()
    if path == "fastpo":
        loss = fastpo.linear_policy_loss(
            hidden, weight, tokens, advantages, objective=objective
        ).loss
    else:
        loss = eager_loss(hidden, weight, tokens, advantages, objective)
    loss.backward()


def eager_loss(hidden, weight, tokens, advantages, objective):
    """The textbook: all logits, log_softmax, gather."""
    scores = torch.log_softmax(hidden @ weight.t(), -1)
    logprobs = scores.gather(-1, tokens[:, None])[:, 0]
    return fastpo.policy_loss_from_logprobs(logprobs, advantages, objective=objective).loss


def measure(path: str, tokens: int, hidden: int, vocab: int) -> dict:
    """Peak bytes beyond the inputs, and seconds, of one step in this process."""
    torch.manual_seed(0)
    states = torch.randn(tokens, hidden).requires_grad_()
    weight = torch.randn(vocab, hidden).mul_(hidden**-0.5).requires_grad_()
    ids, advantages = torch.randint(vocab, (tokens,)), torch.randn(tokens)
    step(
        path,
        *(x[:32].detach().clone().requires_grad_() for x in (states, weight)),
        ids[:32] % 32,
        advantages[:32],
    )  # loads libraries, makes their buffers
    reset_high_water_mark()
    before = high_water_mark()
    start = time.perf_counter()
    step(path, states, weight, ids, advantages)
    seconds = time.perf_counter() - start
    planned = plan.plan(
        vocab=vocab, hidden=hidden, tokens=tokens, dtype=torch.float32, path=path, device="cpu"
    )
    return {
        "path": path,
        "tokens": tokens,
        "hidden": hidden,
        "vocab": vocab,
        "peak_bytes": high_water_mark() - before,
        "planned_peak_bytes": planned.peak_bytes,
        "results_bytes": (tokens + vocab) * hidden * 4,
        "seconds": seconds,
        "threads": torch.get_num_threads(),
    }


def measure_apart(path: str, tokens: int, hidden: int, vocab: int) -> dict:
    """`measure` in a process of its own."""
    command = [sys.executable, __file__, "one", path, str(tokens), str(hidden), str(vocab)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{path} with {tokens} tokens failed: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    many = commands.add_parser("measure")
    many.add_argument("--tokens", type=int, nargs="+", required=True)
    many.add_argument("--hidden", type=int, default=512)
    many.add_argument("--vocab", type=int, default=151936)
    many.add_argument("--path", choices=("fastpo", "materialized"), default="fastpo")
    one = commands.add_parser("one")
    one.add_argument("path", choices=("fastpo", "materialized"))
    for name in ("tokens", "hidden", "vocab"):
        one.add_argument(name, type=int)
    commands.add_parser("draw")
    options = parser.parse_args()
    if options.command == "one":
        point = measure(options.path, options.tokens, options.hidden, options.vocab)
        print(json.dumps(point))
    elif options.command == "draw":
        draw(json.loads(RECORDS.read_text()))
    else:
        for tokens in options.tokens:
            record(measure_apart(options.path, tokens, options.hidden, options.vocab))


def record(point: dict) -> None:
    """Add a point to results/memory.json, in place of one of the same shape."""
    points = json.loads(RECORDS.read_text()) if RECORDS.exists() else []
    shape = ("path", "hidden", "vocab", "tokens")
    points = [old for old in points if any(old[key] != point[key] for key in shape)] + [point]
    points.sort(key=lambda each: [each[key] for key in shape])
    RECORDS.write_text(json.dumps(points, indent=1) + "\n")
    print(row(point))


def row(point: dict) -> str:
    """One line of the Markdown table."""
    peak, results = point["peak_bytes"] / GIB, point["results_bytes"] / GIB
    planned = point["planned_peak_bytes"] / GIB
    cells = (point["path"], str(point["hidden"]), f"{point['tokens']:,}", f"{results:.3f}")
    more = (
        f"{peak:.3f}",
        f"{peak - results:.3f}",
        f"{planned:.3f}",
        f"{point['seconds']:.0f}",
        str(point["threads"]),
    )
    return f"| {' | '.join((*cells, *more))} |"


def draw(points: list[dict]) -> None:
    """The picture and the table."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.2), dpi=150)
    tokens = sorted({point["tokens"] for point in points})
    vocab = points[0]["vocab"]
    logits = [3 * n * vocab * 4 / GIB for n in tokens]
    axes.plot(tokens, logits, "--", color="0.6", label="eager, computed: 3 N V 4 bytes")
    for path, marker in (("materialized", "s"), ("fastpo", "o")):
        for hidden in sorted({p["hidden"] for p in points if p["path"] == path}, reverse=True):
            chosen = [p for p in points if (p["path"], p["hidden"]) == (path, hidden)]
            extra = [(p["peak_bytes"] - p["results_bytes"]) / GIB for p in chosen]
            name = "eager" if path == "materialized" else path
            label = f"{name}, measured, D = {hidden}"
            axes.plot([p["tokens"] for p in chosen], extra, f"{marker}-", label=label)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(tokens, [f"{n // 1024}k" for n in tokens])
    axes.set_xlabel("tokens N")
    axes.set_ylabel("GiB beyond inputs and gradients")
    axes.set_title(f"Peak memory of a policy loss, forward + backward: V = {vocab}, fp32, CPU")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    PICTURE.parent.mkdir(exist_ok=True)
    figure.savefig(PICTURE)
    TABLE.write_text(table(points))
    print(PICTURE, TABLE)


def table(points: list[dict]) -> str:
    """results/memory.md"""
    first = points[0]
    lines = [
        "# Memory of a policy loss from hidden states, forward + backward",
        "",
        f"V = {first['vocab']}, fp32, CPU, GiB. Peak: growth of the "
        "resident set beyond the inputs. Results: the gradients returned. Extra: peak less "
        "results. Planned: what `fastpo plan` says. Seconds: on a machine busy with other work.",
        "",
        "| path | D | tokens | results | peak | extra | planned peak | seconds | threads |",
        "|---|---|---|---|---|---|---|---|---|",
        *map(row, points),
        "",
        provenance("python benchmarks/memory_curve.py measure --tokens N ...; ... draw"),
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
