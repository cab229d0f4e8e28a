"""Ways from hidden states to a policy loss and its gradients, under one signature, for benchmarks.

Each method takes a `Problem` and returns loss, dH and dW of the same clipped, token-mean loss at
temperature 1. `relative_error` holds them to each other before anything is timed.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

import fastpo
from fastpo import backends

OBJECTIVE = fastpo.dapo()
TRL_COLUMNS = 32768  # TRL 1.16's own choice of columns per tile

Result = tuple[Tensor, Tensor, Tensor]


@dataclass
class Problem:
    """A batch of B sequences of T tokens, all mask, off-policy. D wide, V columns."""

    hidden: Tensor  # [B, T, D], requires grad
    weight: Tensor  # (V, D), requires grad
    tokens: Tensor  # [B, T]
    advantages: Tensor  # (B,)
    old_logprobs: Tensor  # [B, T]

    @classmethod
    def random(
        cls,
        batch: int,
        length: int,
        width: int,
        vocab: int,
        *,
        device="cpu",
        dtype=torch.float32,
        spread: float = 1.0,
    ) -> Problem:
        """Logits of standard deviation `spread`; old log-probs are the policy's own + N(0, 0.1)."""
        generator = torch.Generator(device).manual_seed(0)

        def normal(*size: int) -> Tensor:
            return torch.randn(size, generator=generator, device=device)

        hidden = normal(batch, length, width).to(dtype)
        weight = torch.empty(vocab, width, device=device, dtype=dtype)
        weight.normal_(0, spread * width**-0.5, generator=generator)
        tokens = torch.randint(vocab, (batch, length), generator=generator, device=device)
        own = fastpo.linear_token_logprobs(hidden, weight, tokens).logprobs
        return cls(
            hidden=hidden.requires_grad_(),
            weight=weight.requires_grad_(),
            tokens=tokens,
            advantages=normal(batch),
            old_logprobs=own + 0.1 * normal(batch, length),
        )

    @property
    def flat_hidden(self) -> Tensor:
        """(N, D)"""
        return self.hidden.flatten(0, 1)

    def finish(self, loss: Tensor) -> Result:
        """The loss and its gradients."""
        return loss.detach(), *torch.autograd.grad(loss, [self.hidden, self.weight])

    def finish_logprobs(self, logprobs: Tensor) -> Result:
        """The loss of log-probs (N,), in plain torch, and its gradients."""
        ratio = (logprobs.float().view_as(self.old_logprobs) - self.old_logprobs).exp()
        advantages = self.advantages[:, None]
        bounded = ratio.clamp(1 - OBJECTIVE.clip_low, 1 + OBJECTIVE.clip_high)
        return self.finish(-torch.min(ratio * advantages, bounded * advantages).mean())


def bare_gemms(problem: Problem) -> Result:
    """The floor: the three products, nothing else. Not a loss."""
    with torch.no_grad():
        hidden = problem.flat_hidden
        logits = hidden @ problem.weight.t()
        return logits[0, 0], logits @ problem.weight, logits.t() @ hidden


def fastpo_exponentials(problem: Problem) -> Result:
    """fastpo.linear_policy_loss, with exponentials in place of logits."""
    return fastpo_linear(problem, "triton-exp")


def fastpo_linear(problem: Problem, backend: str | None = None) -> Result:
    """fastpo.linear_policy_loss."""
    return problem.finish(
        fastpo.linear_policy_loss(
            problem.hidden,
            problem.weight,
            problem.tokens,
            problem.advantages,
            objective=OBJECTIVE,
            old_logprobs=problem.old_logprobs,
            backend=backend,
        ).loss
    )


def _eager_logprobs(hidden: Tensor, weight: Tensor, tokens: Tensor) -> Tensor:
    scores = (hidden @ weight.t()).float().log_softmax(-1)
    return scores.gather(-1, tokens[:, None])[:, 0]


def eager(problem: Problem) -> Result:
    """All logits, log_softmax, gather."""
    tokens = problem.tokens.flatten()
    return problem.finish_logprobs(_eager_logprobs(problem.flat_hidden, problem.weight, tokens))


def compiled(problem: Problem) -> Result:
    """The same under torch.compile."""
    function = _compiled_logprobs()
    return problem.finish_logprobs(
        function(problem.flat_hidden, problem.weight, problem.tokens.flatten())
    )


_cache: dict[str, Callable] = {}


def _compiled_logprobs() -> Callable:
    return _cache.setdefault("logprobs", torch.compile(_eager_logprobs))


def torch_linear_cross_entropy(problem: Problem, options: object | None = None) -> Result:
    """torch.nn.functional.linear_cross_entropy as it comes, where this torch has it."""
    more = {} if options is None else {"options": options}
    tokens = problem.tokens.flatten()
    losses = F.linear_cross_entropy(
        problem.flat_hidden, problem.weight, tokens, reduction="none", **more
    )
    return problem.finish_logprobs(-losses)


def torch_chunked_cross_entropy(problem: Problem) -> Result:
    """The same in chunks, torch's own choice of them (torch 2.13 and newer)."""
    return torch_linear_cross_entropy(problem, torch.nn.LinearCrossEntropyOptions())


def trl(problem: Problem) -> Result:
    """TRL's `ChunkedLogProbFunction`, then the loss."""
    function = importlib.import_module("trl.kernels").ChunkedLogProbFunction
    tokens = problem.tokens.flatten()
    logprobs = function.apply(
        problem.flat_hidden, problem.weight, None, tokens, 1.0, TRL_COLUMNS, None, 1.0, ()
    )[0]
    return problem.finish_logprobs(logprobs)


def liger(problem: Problem) -> Result:
    """Liger's chunked GRPO loss, one sequence per chunk, as it comes but for the clip bounds."""
    module = importlib.import_module("liger_kernel.chunked_loss")
    function = module.LigerFusedLinearGRPOLoss(
        beta=0.0,
        loss_type="dapo",
        use_ref_model=False,
        epsilon_low=OBJECTIVE.clip_low,
        epsilon_high=OBJECTIVE.clip_high,
        compiled=problem.hidden.is_cuda,
    )
    loss, _ = function(
        problem.hidden,
        problem.weight,
        problem.tokens,
        torch.ones_like(problem.old_logprobs),
        problem.advantages,
        old_per_token_logps=problem.old_logprobs,
    )
    return problem.finish(loss)


def cut_cross_entropy(problem: Problem) -> Result:
    """Apple's cut-cross-entropy per token, then the loss."""
    function = importlib.import_module("cut_cross_entropy").linear_cross_entropy
    tokens = problem.tokens.flatten()
    losses = function(problem.flat_hidden, problem.weight, tokens, reduction="none")
    return problem.finish_logprobs(-losses)


METHODS: dict[str, Callable[[Problem], Result]] = {
    "fastpo": fastpo_linear,
    "fastpo, exponentials": fastpo_exponentials,
    "eager": eager,
    "torch.compile": compiled,
    "torch linear_cross_entropy": torch_linear_cross_entropy,
    "torch linear_cross_entropy, chunked": torch_chunked_cross_entropy,
    "TRL": trl,
    "Liger": liger,
    "cut-cross-entropy": cut_cross_entropy,
}


def unavailable(name: str, device: torch.device | str) -> str | None:
    """Why a method cannot run here, or None."""
    packages = {"TRL": "trl", "Liger": "liger_kernel", "cut-cross-entropy": "cut_cross_entropy"}
    if name == "torch linear_cross_entropy" and not hasattr(F, "linear_cross_entropy"):
        return f"torch {torch.__version__} has none"
    if name.endswith("chunked") and not hasattr(torch.nn, "LinearCrossEntropyOptions"):
        return f"torch {torch.__version__} has no LinearCrossEntropyOptions"
    if name == "fastpo, exponentials":
        on_gpu = torch.device(device).type == "cuda"
        reason = backends.unavailable("triton-exp", device) if on_gpu else None
        return reason if on_gpu else "it takes bf16 operands on a GPU"
    if name == "cut-cross-entropy" and torch.device(device).type != "cuda":
        return "its kernels need a GPU"
    try:
        if name in packages:
            importlib.import_module(packages[name])
    except ImportError as error:
        return str(error)
    return None


def relative_error(actual: Result, exact: Result) -> float:
    """The worst of the errors of loss, dH and dW: |a - e| / |e|, in fp64; inf for NaN."""
    worst = 0.0
    for got, want in zip(actual, exact, strict=True):
        want = want.double()
        error = ((got.double() - want).norm() / want.norm()).item()
        worst = max(worst, error) if error == error else float("inf")
    return worst
