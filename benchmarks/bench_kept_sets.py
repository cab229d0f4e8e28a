"""Log-probs over kept sets and their gradients on CPU, against dense ways and the three bare GEMMs.

    python benchmarks/bench_kept_sets.py                     # one table
    python benchmarks/bench_kept_sets.py --write             # into benchmarks/results/kept_sets.md

One call is the clipped, token-mean loss of N tokens from hidden states: forward, backward, and the
gradients of the hidden states and of the head, dense and with its zeros. Sizes of the kept sets are
those that top-p sampling was reported to keep: half the tokens one id, 8 on average, 1 % over 80.
Times are CPU seconds of one thread, minima of interleaved rounds: other programs share the machine.
"""

from __future__ import annotations

import argparse
import importlib
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

from provenance import provenance  # noqa: E402

import fastpo  # noqa: E402
from fastpo import _extension  # noqa: E402

OBJECTIVE = fastpo.dapo()
TABLE = HERE / "results" / "kept_sets.md"
TRL_COLUMNS = 32768  # TRL 1.16's own choice of columns per tile
WRONG = {torch.float32: 1e-4, torch.bfloat16: 2e-2}  # of gradients rounded to the dtype
SHAPES = [(2048, 576, 49152, torch.float32), (2048, 576, 49152, torch.bfloat16)]

Result = tuple[Tensor, Tensor, Tensor]


@dataclass
class Problem:
    """N tokens off-policy, sampled from their kept sets."""

    hidden: Tensor  # (N, D), requires grad
    weight: Tensor  # (V, D), requires grad
    tokens: Tensor  # (N,)
    kept_tokens: Tensor  # (M,)
    kept_offsets: Tensor  # (N + 1,)
    advantages: Tensor  # (N,)
    old_logprobs: Tensor  # (N,)

    @classmethod
    def random(cls, rows: int, width: int, vocab: int, dtype: torch.dtype) -> Problem:
        """Old log-probs are the policy's own over the kept sets + N(0, 0.1)."""
        gen = torch.Generator().manual_seed(0)

        def normal(*size: int) -> Tensor:
            return torch.randn(size, generator=gen)

        several = (1.35 * normal(rows) + 1.55).exp().clamp(2, 512).long()
        sizes = torch.where(torch.rand(rows, generator=gen) < 0.46, 1, several)
        chosen = [torch.randint(vocab, (size,), generator=gen).unique() for size in sizes.tolist()]
        counts = torch.tensor([len(ids) for ids in chosen])
        pick = (torch.rand(rows, generator=gen) * counts).long()
        offsets = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)])
        ids = torch.cat(chosen)
        problem = cls(
            hidden=normal(rows, width).to(dtype).requires_grad_(),
            weight=(normal(vocab, width) * width**-0.5).to(dtype).requires_grad_(),
            tokens=ids[offsets[:-1] + pick],
            kept_tokens=ids,
            kept_offsets=offsets,
            advantages=normal(rows),
            old_logprobs=torch.zeros(rows),
        )
        with torch.no_grad():
            own = fastpo.linear_token_logprobs(
                problem.hidden, problem.weight, problem.tokens, **problem.kept
            ).logprobs
        problem.old_logprobs = own + 0.1 * normal(rows)
        return problem

    @property
    def kept(self) -> dict[str, Tensor]:
        return {"kept_tokens": self.kept_tokens, "kept_offsets": self.kept_offsets}

    @property
    def rows(self) -> Tensor:
        """(M,) the row of every kept id."""
        return torch.arange(len(self.tokens)).repeat_interleave(self.kept_offsets.diff())

    def finish(self, loss: Tensor) -> Result:
        return loss.detach(), *torch.autograd.grad(loss, [self.hidden, self.weight])

    def finish_logprobs(self, logprobs: Tensor) -> Result:
        """The loss of log-probs (N,), in plain torch, and its gradients."""
        ratio = (logprobs.float() - self.old_logprobs).exp()
        bounded = ratio.clamp(1 - OBJECTIVE.clip_low, 1 + OBJECTIVE.clip_high)
        return self.finish(-torch.min(ratio * self.advantages, bounded * self.advantages).mean())


def bare_gemms(problem: Problem) -> Result:
    """The three products of a dense head in fp32, nothing else. Not a loss."""
    with torch.no_grad():
        hidden, weight = problem.hidden.float(), problem.weight.float()
        logits = hidden @ weight.t()
        return logits[0, 0], logits @ weight, logits.t() @ hidden


def fastpo_kept(problem: Problem) -> Result:
    """`linear_policy_loss` with kept sets."""
    return _fastpo(problem, **problem.kept)


def fastpo_dense(problem: Problem) -> Result:
    """`linear_policy_loss` over the whole vocabulary: another loss, at the dense price."""
    return _fastpo(problem)


def _fastpo(problem: Problem, **kept: Tensor) -> Result:
    return problem.finish(
        fastpo.linear_policy_loss(
            problem.hidden,
            problem.weight,
            problem.tokens,
            problem.advantages,
            objective=OBJECTIVE,
            old_logprobs=problem.old_logprobs,
            **kept,
        ).loss
    )


def masked_dense(problem: Problem, dtype: torch.dtype = torch.float32) -> Result:
    """What trainers do: all logits, -inf where nothing was kept, log_softmax."""
    logits = problem.hidden.to(dtype) @ problem.weight.to(dtype).t()
    outside = torch.ones(logits.shape, dtype=torch.bool)
    outside[problem.rows, problem.kept_tokens] = False
    table = logits.masked_fill(outside, -torch.inf).log_softmax(1)
    return problem.finish_logprobs(table.gather(1, problem.tokens[:, None])[:, 0])


def trl_dense(problem: Problem) -> Result:
    """TRL's chunked log-probs over the whole vocabulary, for it takes no mask: another loss."""
    function = importlib.import_module("trl.kernels").ChunkedLogProbFunction
    arguments = (None, problem.tokens, 1.0, TRL_COLUMNS, None, 1.0, ())
    return problem.finish_logprobs(function.apply(problem.hidden, problem.weight, *arguments)[0])


KEPT: dict[str, Callable[[Problem], Result]] = {
    "fastpo, kept sets": fastpo_kept,
    "all logits, mask, log_softmax": masked_dense,
}
WHOLE: dict[str, Callable[[Problem], Result]] = {
    "fastpo, whole vocabulary (another loss)": fastpo_dense,
    "TRL, whole vocabulary (another loss)": trl_dense,
}


def error(actual: Result, exact: Result) -> float:
    """The worst of the errors of loss, dH and dW: |a - e| / |e| in fp64."""
    pairs = zip(actual, exact, strict=True)
    return max(((a.double() - e).norm() / e.norm()).item() for a, e in pairs)


def cpu_seconds(problem: Problem, rounds: int) -> dict[str, float]:
    """The least of `rounds` interleaved rounds; losses over the whole vocabulary are run once."""
    methods = {"three bare GEMMs": bare_gemms} | KEPT | WHOLE
    best = dict.fromkeys(methods, float("inf"))
    for number in range(rounds):
        for name, method in methods.items():
            if number and name in WHOLE:
                continue
            for _ in range(5 if method is fastpo_kept else 1):  # short, and so easily disturbed
                start = time.process_time()
                method(problem)
                best[name] = min(best[name], time.process_time() - start)
    return best


def table(shape: tuple[int, int, int, torch.dtype], rounds: int) -> list[str]:
    """Markdown rows of one shape."""
    problem = Problem.random(*shape)
    exact = masked_dense(problem, torch.float64)
    errors = {name: error(method(problem), exact) for name, method in KEPT.items()}
    wrong = [name for name, e in errors.items() if not e < WRONG[shape[-1]]]
    if wrong:
        raise SystemExit(f"wrong: {', '.join(wrong)}: {errors}")
    seconds = cpu_seconds(problem, rounds)
    floor = seconds["three bare GEMMs"]
    label = f"{str(shape[-1])[6:]} {shape[0]} x {shape[1]} x {shape[2]}"
    shown = {name: f"{e:.1e}" for name, e in errors.items()}
    return [
        f"| {label} | {name} | {1e3 * s:.1f} | {floor / s:.2f} | {shown.get(name, '')} |"
        for name, s in seconds.items()
    ]


def main() -> None:
    """Print the table, and write it with --write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--write", action="store_true", help=f"write {TABLE.name}")
    options = parser.parse_args()
    if (reason := _extension.load_error()) is not None:
        raise SystemExit(reason)
    torch.set_num_threads(1)
    problem = Problem.random(*SHAPES[0])
    sizes = problem.kept_offsets.diff().float()
    rows = [row for shape in SHAPES for row in table(shape, options.rounds)]
    text = "\n".join(
        [
            "# Log-probs over kept sets on CPU, forward + backward, one thread",
            "",
            "The clipped, token-mean loss of N tokens from hidden states of width D, each over the "
            f"ids that it was sampled from: {sizes.mean():.1f} on average, median "
            f"{sizes.median():.0f}, {100 * (sizes == 1).float().mean():.0f} % of tokens one, 1 % "
            f"more than {sizes.quantile(0.99):.0f}. All gradients are dense; the zeros of dW are "
            f"written in the time given. CPU milliseconds, minimum of {options.rounds} interleaved "
            "rounds (other losses: one). Error: of loss, dH and dW against all logits in fp64.",
            "",
            "| dtype N x D x V | method | ms | bare GEMMs / it | error |",
            "|---|---|---|---|---|",
            *rows,
            "",
            provenance("OMP_NUM_THREADS=1 python benchmarks/bench_kept_sets.py --write"),
            "",
        ]
    )
    print(text)
    if options.write:
        TABLE.write_text(text)


if __name__ == "__main__":
    main()
