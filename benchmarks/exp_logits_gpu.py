"""Decides on a GPU how `backend="triton-exp"` is built, and whether it should be the default.

    python benchmarks/exp_logits_gpu.py [--seconds 60] [--out DIR] [--shape N D V]

In order, the most decisive first, and nothing new is started after --seconds:

1. z_y: does the diagonal product of exp_targets.py have the bits of its logit in the GEMM? With all
   numbers scaled by 2^20 any difference moves E[i, y] away from exactly 1. If it is not 1.0 for a
   width of 64 columns but for 256: set WIDTH = 256 there; if for neither, log-probs are biased.
2. Errors of log-probs against fp64.
3. The GEMM beside cuBLAS's, for several tiles (kernels/_exp_tiles.py has the default): the fastest
   one whose bits are right should be the default.
4. The whole op: three bare GEMMs, backend="triton", backend="triton-exp", forward and backward.
   Default where it is faster and its bits are right.

On a machine without one, under TRITON_INTERPRET=1, a small --shape runs all of it but the times.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import fastpo  # noqa: E402
from fastpo.backends import triton_exp  # noqa: E402

SHAPE = (8192, 4096, 151936)  # N, D, V
REPETITIONS = 7
SCORED_ROWS = 32


def candidates() -> dict[str, object]:
    """{name: tile}, the default first."""
    from fastpo.kernels import _exp_tiles as tiles

    def named(tile) -> str:
        text = f"{tile.M}x{tile.N}x{tile.K}, {tile.num_warps} warps, {tile.num_stages} stages"
        text += f", parts {tile.PARTS}, group {tile.GROUP}"
        text += "" if tile.TMA else ", pointers"
        return text + ("" if tile.FLATTEN else ", not flattened")

    pointers = tiles._BY_POINTERS
    major = tiles._capability() // 10
    default = tiles._BY_TMA.get(major, pointers)
    found = [default, pointers, pointers._replace(GROUP=8)]
    if default.TMA:
        wide = default._replace(N=256, PARTS=1, num_stages=3)
        found += [
            wide,
            wide._replace(FLATTEN=False),
            default._replace(GROUP=8),
            default._replace(GROUP=32),
            tiles._NARROW,
            tiles.ExpTile(128, 128, 64, 2, True, True, 16, 4, 3, PER_SM=2),
        ]
    return {named(tile): tile for tile in dict.fromkeys(found)}


class Problem:
    """Random operands; a token's logit is one of many, logits of standard deviation 2."""

    def __init__(self, n: int, d: int, v: int, device: torch.device):
        generator = torch.Generator(device).manual_seed(0)

        def normal(*size: int) -> torch.Tensor:
            return torch.randn(size, generator=generator, device=device)

        self.hidden = normal(n, d).bfloat16()
        self.weight = torch.empty(v, d, device=device, dtype=torch.bfloat16)
        for part in self.weight.split(8192):
            part.copy_(normal(*part.shape) * 2 / d**0.5)
        self.tokens = torch.randint(v, (n,), generator=generator, device=device)
        self.advantages = normal(n)
        self.e = triton_exp.empty_e(n, self.weight)
        self.targets = torch.empty(n, device=device)
        self.ones = torch.ones(n, device=device)

    def exact_logprobs(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Some rows, and their log-probs in fp64, a part of the vocabulary at a time."""
        rows = torch.linspace(0, len(self.tokens) - 1, SCORED_ROWS, device=self.e.device).long()
        rows = rows.unique()
        hidden = self.hidden[rows].double()
        parts = [hidden @ part.double().t() for part in self.weight.split(8192)]
        logits = torch.cat(parts, 1)
        return rows, logits.log_softmax(1).gather(1, self.tokens[rows, None])[:, 0]


def milliseconds(call: Callable[[], object], device: torch.device) -> float:
    """Median time on the device; NaN under the interpreter."""
    call()
    if device.type != "cuda":
        return float("nan")
    torch.cuda.synchronize()
    spent = []
    for _ in range(REPETITIONS):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call()
        end.record()
        end.synchronize()
        spent.append(begin.elapsed_time(end))
    return sorted(spent)[len(spent) // 2]


def make_targets(problem: Problem, width: int, depth: int = 64) -> None:
    """z_y by a diagonal product `width` columns wide."""
    from fastpo.kernels import exp_targets

    exp_targets.exp_targets(
        problem.hidden,
        problem.weight,
        problem.tokens,
        None,
        problem.targets,
        depth=depth,
        width=width,
    )


def make_e(problem: Problem, tile, scale: float) -> torch.Tensor:
    """E with all of u scaled; returns the sums (2, tiles, n)."""
    from fastpo.kernels import exp_logits

    slopes, n, v = problem.ones * scale, len(problem.tokens), len(problem.weight)
    partials = torch.empty(2, tile.tiles(v), n, device=problem.e.device)
    shifts = problem.targets * slopes
    operands = (problem.hidden, problem.weight, problem.e, None, slopes, shifts, partials, tile)
    exp_logits.exp_logits(*operands)
    return partials


def measure_tile(problem: Problem, tile, bare: float) -> dict:
    """Bits of z_y for both widths, largest error of log-probs, time."""
    device = problem.e.device
    result: dict[str, object] = {}
    chosen = problem.tokens[:, None]
    for width in (256, 64):  # 64, the default, last: the rest goes on with it
        make_targets(problem, width, tile.K)
        make_e(problem, tile, 2.0**20)
        same = (problem.e.gather(1, chosen) == 1).float().mean().item()
        result[f"bit-equal z_y, {width} columns"] = same
    rows, exact = problem.exact_logprobs()
    scale = triton_exp.LOG2_E
    sums = make_e(problem, tile, scale)[0].sum(0).double()
    left = problem.targets.double() * problem.ones.mul(scale).double()
    left -= (problem.targets * scale).double()
    mine = (left / scale - sums.log())[rows]
    result["log-prob error"] = (mine - exact).abs().max().item()
    result["log-prob bias"] = (mine - exact).mean().item()
    result["ms"] = milliseconds(lambda: make_e(problem, tile, scale), device)
    result["of cuBLAS"] = result["ms"] / bare
    return result


def measure_op(problem: Problem, backend: str | None) -> float:
    """Forward and backward of the op, or of three bare GEMMs."""
    hidden, weight = problem.hidden, problem.weight
    if backend is None:

        def call():
            torch.mm(hidden, weight.t(), out=problem.e)
            return problem.e @ weight, problem.e.t() @ hidden

        return milliseconds(call, hidden.device)
    leaves = [x.detach().requires_grad_() for x in (hidden, weight)]

    def call():
        loss = fastpo.linear_policy_loss(
            *leaves, problem.tokens, problem.advantages, objective=fastpo.dapo(), backend=backend
        ).loss
        return torch.autograd.grad(loss, leaves)

    return milliseconds(call, hidden.device)


def steps(problem: Problem) -> list[tuple[str, Callable[[], dict]]]:
    """What to measure, in order."""
    device = problem.e.device
    hidden, weight = problem.hidden, problem.weight
    bare = milliseconds(lambda: torch.mm(hidden, weight.t(), out=problem.e), device)
    tiles = candidates()
    first = next(iter(tiles))

    def tile_step(name: str) -> tuple[str, Callable[[], dict]]:
        return name, lambda: measure_tile(problem, tiles[name], bare)

    def op_step(backend: str | None) -> tuple[str, Callable[[], dict]]:
        name = "op: three bare GEMMs" if backend is None else f"op: {backend}"
        return name, lambda: {"ms": measure_op(problem, backend)}

    def target_time() -> dict:
        return {"ms": milliseconds(lambda: make_targets(problem, 64), device)}

    found = [("cuBLAS, logits GEMM", lambda: {"ms": bare}), tile_step(first)]
    found += [op_step(None), op_step("triton-exp"), op_step("triton"), ("z_y", target_time)]
    return found + [tile_step(name) for name in tiles if name != first]


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--shape", type=int, nargs=3, default=SHAPE, metavar=("N", "D", "V"))
    parser.add_argument("--out", type=Path, help="write exp_logits_gpu.json there")
    options = parser.parse_args()
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if not torch.cuda.is_available() and not interpreted:
        parser.exit(2, "torch sees no GPU; TRITON_INTERPRET=1 and a small --shape try the script\n")
    if interpreted:
        from fastpo.testing.interpreter import fix_arithmetic

        fix_arithmetic()
    device = torch.device("cpu" if interpreted else "cuda")
    deadline = time.monotonic() + options.seconds
    results: dict[str, dict] = {}
    for name, measure in steps(Problem(*options.shape, device)):
        if time.monotonic() > deadline:
            print(f"{name}: not reached in {options.seconds:g} s")
            continue
        try:
            results[name] = measure()
        except Exception as error:  # a tile that does not fit this GPU stops no other
            results[name] = {"error": f"{type(error).__name__}: {error}".splitlines()[0]}
        numbers = (
            f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}"
            for key, value in results[name].items()
        )
        print(f"{name}: " + "; ".join(numbers), flush=True)
        if options.out is not None:
            options.out.mkdir(parents=True, exist_ok=True)
            report = {"shape": list(options.shape), "results": results}
            (options.out / "exp_logits_gpu.json").write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
