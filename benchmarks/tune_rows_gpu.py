"""Time `row_policy_loss` under other row layouts, to choose the table in kernels/_layout.py.

python benchmarks/tune_rows_gpu.py --vocab 151936 --dtype bfloat16

Prints the share of the copy floor for every (threads, waves a step, waves kept), best first. What
computes a wrong gradient or does not compile is listed as such.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Iterator

import torch
from bench_logits_gpu import LOGITS_BYTES, Problem, copy_ms, fastpo_inplace, gradient, median_ms

from fastpo.kernels import _layout


def candidates(vocab: int, itemsize: int) -> Iterator[_layout.RowLayout]:
    """Layouts of 8 to 64 logits per thread and step, 8 to 128 kept."""
    width = 16 // itemsize
    for lanes, step, kept in itertools.product((256, 512, 1024), (2, 4, 8), (2, 4, 8, 12, 16)):
        if step <= kept and kept * width <= 256 // itemsize:
            layout = _layout.RowLayout(lanes, width, True, step, 1)
            yield layout.with_tail(vocab, kept)


def time_layout(layout: _layout.RowLayout, problem: Problem, original: torch.Tensor) -> float:
    """Milliseconds of loss and gradient in place with `layout`."""
    _layout._layout = lambda *shape: layout
    return median_ms(
        lambda: gradient(fastpo_inplace, problem), lambda: problem.logits.copy_(original)
    )


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--vocab", type=int, default=151936)
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("tune_rows_gpu: torch sees no GPU")
    dtype = getattr(torch, options.dtype)
    rows = LOGITS_BYTES // (dtype.itemsize * options.vocab) // 128 * 128
    problem = Problem.random(rows, options.vocab, torch.device("cuda"), dtype)
    original = problem.logits.clone()
    floor, expected = copy_ms(original), gradient(fastpo_inplace, problem).clone()
    lines = []
    for layout in candidates(options.vocab, dtype.itemsize):
        try:
            milliseconds = time_layout(layout, problem, original)
        except Exception as error:  # a layout may exceed the registers or threads of this GPU
            lines.append((0.0, f"{layout}: {type(error).__name__}"))
            continue
        problem.logits.copy_(original)
        close = torch.allclose(gradient(fastpo_inplace, problem), expected, rtol=0.02, atol=1e-7)
        share = floor / milliseconds if close else 0.0
        outcome = f"{milliseconds:.3f} ms, {share:.1%} of the floor" if close else "wrong gradient"
        lines.append((share, f"{layout}: {outcome}"))
        print(lines[-1][1], flush=True)
    print("\nbest first:", *(text for _, text in sorted(lines, reverse=True)), sep="\n")


if __name__ == "__main__":
    main()
