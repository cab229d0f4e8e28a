"""Policy loss and its gradient from logits on a GPU: fastpo against its peers, in one run.

    python benchmarks/bench_logits_gpu.py --out benchmarks/results --seconds 240

Time is the median of forward + backward, the logits restored before each repetition outside the
timed region (which also takes them out of L2). The floor is one read and one write of the logits at
the copy bandwidth that this run measures. A peer whose gradient is wrong is reported as wrong, and
not timed.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

import fastpo
from fastpo.backends import cuda as cuda_rows
from fastpo.backends import triton as triton_rows
from fastpo.backends.base import Backend, RowInputs

VOCABULARIES = (32000, 128256, 151936, 262144)
LOGITS_BYTES = 2 << 30
CLIP = 0.2
WRONG = 0.05  # relative error of the gradient; bf16 rounding costs 2e-3
REPETITIONS = 15


@dataclass
class Problem:
    """One batch [1, T, V] of a clipped policy loss, token mean, temperature 1."""

    logits: Tensor  # (1, T, V)
    tokens: Tensor  # (1, T)
    advantages: Tensor  # (1,): one sequence
    old_logprobs: Tensor  # (1, T)

    @classmethod
    def random(cls, rows: int, vocab: int, device, dtype=torch.bfloat16, seed: int = 0) -> Problem:
        """Logits neither flat nor certain; old log-probs near the true ones."""
        generator = torch.Generator(device).manual_seed(seed)
        options = {"generator": generator, "device": device}
        logits = torch.empty(1, rows, vocab, dtype=dtype, device=device)
        logits.normal_(0, 3, generator=generator)
        tokens = torch.randint(0, vocab, (1, rows), **options)
        chosen = logits.gather(-1, tokens[..., None])[..., 0].float()
        totals = [part.float().logsumexp(-1) for part in logits[0].split(256)]
        old = chosen - torch.cat(totals)[None] + 0.1 * torch.randn(1, rows, **options)
        return cls(logits, tokens, torch.ones(1, device=device), old)

    def clipped_loss(self, logprobs: Tensor) -> Tensor:
        """-min(r A, clip(r) A), mean over tokens, of log-probs (1, T)."""
        ratio = (logprobs - self.old_logprobs).exp()
        advantages = self.advantages[:, None]
        clipped = ratio.clamp(1 - CLIP, 1 + CLIP)
        return -torch.min(ratio * advantages, clipped * advantages).mean()


Peer = Callable[[Problem, Tensor], Tensor]  # (problem, leaf logits) -> loss; of ALONE: gradient


def eager(problem: Problem, logits: Tensor) -> Tensor:
    """TRL's formula in plain PyTorch, on fp32 logits."""
    table = logits.float().log_softmax(-1)
    return problem.clipped_loss(table.gather(-1, problem.tokens[..., None])[..., 0])


def compiled(problem: Problem, logits: Tensor) -> Tensor:
    """The same through torch.compile."""
    return _compiled_eager(problem.tokens, problem.old_logprobs, problem.advantages, logits)


@torch.compile(dynamic=False)
def _compiled_eager(tokens, old_logprobs, advantages, logits):
    return eager(Problem(logits, tokens, advantages, old_logprobs), logits)


def trl(problem: Problem, logits: Tensor) -> Tensor:
    """TRL's Triton log-prob and entropy kernels, then the loss in PyTorch."""
    from trl.kernels.logprob_entropy import selective_log_softmax_and_entropy

    return problem.clipped_loss(selective_log_softmax_and_entropy(logits, problem.tokens)[0])


def liger(problem: Problem, logits: Tensor) -> Tensor:
    """Liger's Triton GRPO loss, gradient in place; it wants one position more than tokens."""
    from liger_kernel.ops.grpo_loss import GrpoLossFunction

    tokens = problem.tokens[:, :-1].contiguous()
    old = problem.old_logprobs[:, :-1].contiguous()
    mask = torch.ones_like(tokens)
    tensors = (logits, old, None, tokens, problem.advantages, mask)
    loss, *_ = GrpoLossFunction.apply(
        *tensors, 1.0, 0.0, CLIP, CLIP, True, "grpo", None, False
    )  # temperature, KL coefficient, clips, in place, loss, length, reduction
    return loss.sum() / problem.tokens.numel()


def _fastpo(problem: Problem, logits: Tensor, *, inplace: bool) -> Tensor:
    return fastpo.policy_loss(
        logits,
        problem.tokens,
        problem.advantages,
        objective=fastpo.ppo(clip_low=CLIP, clip_high=CLIP),
        old_logprobs=problem.old_logprobs,
        inplace=inplace,
        backend="triton",
    ).loss


def fastpo_inplace(problem: Problem, logits: Tensor) -> Tensor:
    """fastpo, the gradient overwriting the logits."""
    return _fastpo(problem, logits, inplace=True)


def fastpo_separate(problem: Problem, logits: Tensor) -> Tensor:
    """fastpo, the gradient in a tensor of its own."""
    return _fastpo(problem, logits, inplace=False)


def row_kernel(problem: Problem, logits: Tensor, rows: Backend = triton_rows) -> Tensor:
    """fastpo's one launch without the op around it: what the op adds is the difference.

    Returns the gradient, which has overwritten the logits.

    Raises:
        RuntimeError: the backend `rows` cannot run here.
    """
    reason = rows.unavailable(logits.device)
    if reason is not None:
        raise RuntimeError(reason)
    tokens, old = problem.tokens.flatten(), problem.old_logprobs.flatten()
    ones = torch.ones_like(old)
    advantages = problem.advantages.expand_as(old).contiguous()
    inputs = RowInputs(ones / old.numel(), advantages, old, None, None)
    flat = logits.detach()[0]
    rows.row_policy_loss(flat, tokens, inputs, fastpo.ppo(clip_low=CLIP, clip_high=CLIP), 1.0, flat)
    return flat[None]


def resident_kernel(problem: Problem, logits: Tensor) -> Tensor:
    """The same of backend "cuda", which reads a logit once."""
    return row_kernel(problem, logits, cuda_rows)


ALONE = (row_kernel, resident_kernel)  # their result is the gradient
PEERS: dict[str, Peer] = {
    "row kernel alone, in place": row_kernel,
    "row-resident kernel alone, in place": resident_kernel,
    "fastpo, in place": fastpo_inplace,
    "fastpo": fastpo_separate,
    "TRL kernels": trl,
    "Liger GRPO": liger,
    "eager": eager,
    "torch.compile": compiled,  # last: compiling takes longest
}


def gradient(peer: Peer, problem: Problem) -> Tensor:
    """dloss/dlogits of one run. The peers that work in place overwrite `problem.logits`."""
    if peer in ALONE:
        return peer(problem, problem.logits)
    leaf = problem.logits.detach().requires_grad_()
    (grad,) = torch.autograd.grad(peer(problem, leaf), leaf)
    return grad


def gradient_error(peer: Peer, problem: Problem) -> float:
    """||gradient - exact|| / ||exact||, exact = the eager formula in fp64."""
    exact_leaf = problem.logits.double().requires_grad_()
    rows = slice(0, -1) if peer is liger else slice(None)  # Liger takes one position less
    table = exact_leaf.log_softmax(-1)
    logprobs = table.gather(-1, problem.tokens[..., None])[..., 0]
    ratio = (logprobs - problem.old_logprobs.double()).exp()
    advantages = problem.advantages[:, None]
    losses = -torch.min(ratio * advantages, ratio.clamp(1 - CLIP, 1 + CLIP) * advantages)
    (losses[:, rows].sum() / losses.numel()).backward()
    copy = replace(problem, logits=problem.logits.clone())
    got, exact = gradient(peer, copy).double(), exact_leaf.grad
    return ((got - exact).norm() / exact.norm()).item()


@dataclass
class Result:
    """One row of the table."""

    peer: str
    vocab: int
    rows: int
    milliseconds: float | None = None
    share_of_floor: float | None = None  # floor time / time
    gigabytes_per_second: float | None = None  # 2 N V bytes / time
    peak_extra_bytes: int | None = None  # beyond the logits
    gradient_error: float | None = None
    note: str = ""


def median_ms(step: Callable[[], None], restore: Callable[[], None]) -> float:
    """Median device time of `step`, `restore` before each repetition outside the timing."""
    times = []
    for repetition in range(REPETITIONS + 3):
        restore()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        step()
        end.record()
        end.synchronize()
        if repetition >= 3:  # the first compile, load modules and fill the allocator
            times.append(start.elapsed_time(end))
    return statistics.median(times)


def copy_ms(logits: Tensor) -> float:
    """Time to copy the logits: one read and one write of them, the floor of the loss."""
    other = torch.empty_like(logits)
    scratch = torch.empty(256 << 20, dtype=torch.uint8, device=logits.device)
    return median_ms(lambda: other.copy_(logits), lambda: scratch.zero_())


def measure(name: str, problem: Problem, original: Tensor, floor_ms: float) -> Result:
    """Time one peer on `problem`, whose logits are restored from `original`."""
    rows, vocab = original.shape[1:]
    result = Result(name, vocab, rows)
    peer = PEERS[name]
    small = Problem.random(33, vocab, original.device)
    result.gradient_error = gradient_error(peer, small)
    if not result.gradient_error < WRONG:
        result.note = "wrong gradient: not timed"
        return result
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result.milliseconds = median_ms(
        lambda: gradient(peer, problem), lambda: problem.logits.copy_(original)
    )
    result.peak_extra_bytes = torch.cuda.max_memory_allocated() - before
    result.share_of_floor = floor_ms / result.milliseconds
    result.gigabytes_per_second = 2 * original.nbytes / result.milliseconds / 1e6
    return result


def run_vocabulary(vocab: int, deadline: float) -> tuple[list[Result], float]:
    """All peers at one vocabulary until the time is up; also the copy bandwidth in GB/s."""
    rows, results = LOGITS_BYTES // (2 * vocab) // 128 * 128, []
    problem = Problem.random(rows, vocab, torch.device("cuda"))
    original = problem.logits.clone()
    floor_ms = copy_ms(original)
    for name in PEERS:
        if time.monotonic() > deadline:
            result = Result(name, vocab, rows, note="skipped: time is up")
        else:
            try:
                result = measure(name, problem, original, floor_ms)
            except (ImportError, RuntimeError) as error:  # out of memory is a RuntimeError
                reason = str(error).strip().splitlines() or [type(error).__name__]
                result = Result(name, vocab, rows, note=f"failed: {reason[0]}")
        results.append(result)
        print(_row(result), flush=True)
    return results, 2 * original.nbytes / floor_ms / 1e6


HEAD = (
    "| peer | V | N | ms | share of the floor | GB/s | extra memory | gradient error | |\n"
    "|---|---|---|---|---|---|---|---|---|"
)


def _row(r: Result) -> str:
    def show(value: float | None, text: str, scale: float = 1.0) -> str:
        return "" if value is None else text.format(value * scale)

    cells = [
        r.peer,
        str(r.vocab),
        str(r.rows),
        show(r.milliseconds, "{:.3f}"),
        show(r.share_of_floor, "{:.0f} %", 100),
        show(r.gigabytes_per_second, "{:.0f}"),
        show(r.peak_extra_bytes, "{:.2f} GiB", 2.0**-30),
        show(r.gradient_error, "{:.1e}"),
        r.note,
    ]
    return "| " + " | ".join(cells) + " |"


def markdown(results: list[Result], bandwidths: dict[int, float], machine: str) -> str:
    """The page that is committed."""
    copies = ", ".join(f"{value:.0f} GB/s at V = {vocab}" for vocab, value in bandwidths.items())
    return "\n".join(
        [
            "# Policy loss and gradient from bf16 logits\n",
            f"{machine}. Copy bandwidth: {copies}. The floor is one read and one write of the "
            "logits at that bandwidth; GB/s counts those 2 N V bytes, whatever a peer moves.\n",
            HEAD,
            *map(_row, results),
            "",
        ]
    )


def machine() -> str:
    """GPU and versions, for the tables."""
    import triton

    return f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}"


def save(out: Path, results: list[Result], bandwidths: dict[int, float]) -> None:
    """Write logits_gpu.md and logits_gpu.json."""
    (out / "logits_gpu.md").write_text(markdown(results, bandwidths, machine()))
    record = {"machine": machine(), "copy_gigabytes_per_second": bandwidths}
    record["results"] = [asdict(r) for r in results]
    (out / "logits_gpu.json").write_text(json.dumps(record, indent=1))


def main() -> None:
    """Command line: measure, print, save."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--seconds", type=float, default=240.0, help="start nothing after this")
    parser.add_argument("--vocab", type=int, nargs="+", default=list(VOCABULARIES))
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("bench_logits_gpu: torch sees no GPU; `make bench` measures on the CPU")
    deadline = time.monotonic() + options.seconds
    options.out.mkdir(parents=True, exist_ok=True)
    results, bandwidths = [], {}
    for vocab in options.vocab:
        more, bandwidths[vocab] = run_vocabulary(vocab, deadline)
        results += more
        torch.cuda.empty_cache()
        save(options.out, results, bandwidths)  # after each: a run that is cut short leaves these
    print(markdown(results, bandwidths, machine()))


if __name__ == "__main__":
    main()
