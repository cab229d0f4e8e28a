"""Does a model give the same numbers in every layout that a run uses? Asked once, at its start.

Packed sequences see each other where an attention mask ignores position ids (OPT, GPT-OSS); a cache
of anything but keys and values (Mamba, RWKV) may not be copied, or loses gradients; an encoder sees
the padding on its right. None of these raises by itself. (What a head does, `lm_head` compares.)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

import fastpo
from fastpo.trainer.config import OptimConfig
from fastpo.trainer.data.tasks import Problem
from fastpo.trainer.experience import Sample
from fastpo.trainer.microbatch import MicroBatch, layout_of
from fastpo.trainer.model.attention import FLASH, VARLEN
from fastpo.trainer.model.policy import Policy
from fastpo.trainer.rollout import Sampling, sample
from fastpo.trainer.run.errors import RecipeError, TrainerError

PROMPT_LENGTHS, NEW_TOKENS = (3, 8), 5  # unequal, so that there is padding
# Times what embeddings off by a unit in the last place change (and one unit more). Other orders of
# summation gave 0.1 to 2 times that, in 2 layers and in 32; the weakest cross-talk, LFM2's, 80.
ALLOWANCE = 20.0


class Numbers(NamedTuple):
    """What a model makes of some sequences."""

    hidden: Tensor  # (N, D)
    gradient: Tensor  # of the first trained parameter behind them
    logprobs: Tensor  # (N,) by fastpo


def check(policy: Policy, optim: OptimConfig) -> None:
    """Compare sampler, head and micro-batches with the model on one sequence at a time.

    A model whose sequences see each other in a packed row gets rows, unless packing was asked for.

    Raises:
        RecipeError: one of them gives other numbers, or does not work with this model.
    """
    try:
        _check(policy, optim)
    except RecipeError:
        asked = policy.config.attention or optim.packing
        if asked or not layout_of(policy, optim)["packed"]:
            raise
        policy.model.set_attn_implementation("sdpa")
        _check(policy, optim)


def _check(policy: Policy, optim: OptimConfig) -> None:
    # Kernels of flash attention have no float32, nor has the base of adapters.
    half = policy.kernel in (FLASH, VARLEN) or policy.config.lora.rank
    if policy.dtype != torch.float32 and not half:
        policy = replace(policy, config=replace(policy.config, dtype="float32"))
    name = type(policy.model).__name__
    samples = _attempt(f"the sampler cannot decode {name}", lambda: _sampled(policy))
    with torch.compiler.set_stance("force_eager") if policy.config.compile else nullcontext():
        alone = _attempt(name, lambda: _alone(policy, samples))
        with _rounded_embeddings(policy):
            rounded = _alone(policy, samples)
    eps = torch.finfo(policy.dtype).eps
    allowed = [ALLOWANCE * (_distance(*pair) + eps) for pair in zip(rounded, alone, strict=True)]
    drawn = torch.tensor([p for s in samples for p in s.completion.logprobs], device=policy.device)
    layout = layout_of(policy, optim)
    if policy.config.compile and layout["packed"] and policy.kernel not in (FLASH, VARLEN):
        raise RecipeError(
            f"model.compile cannot trace {policy.kernel}: set optim.packing=false, and pad rows"
        )
    what = f"{name} with {_setting(layout)}"
    together = _attempt(what, lambda: _numbers(policy, samples, **layout))
    for kind, got, right, most in (
        (f"log-probs of {name} in the sampler and alone", drawn, alone.logprobs, allowed[2]),
        (f"{what}: hidden states alone and in a batch", together.hidden, alone.hidden, allowed[0]),
        (f"{what}: gradients alone and in a batch", together.gradient, alone.gradient, allowed[1]),
    ):
        error = _distance(got, right)
        if not error <= most:
            raise RecipeError(
                f"{kind} differ by {error:.2g} of their size, expected at most {most:.2g}: the "
                "loss would be silently wrong"
            )


def _alone(policy: Policy, samples: list[Sample]) -> Numbers:
    parts = [_numbers(policy, [s]) for s in samples]
    hidden, gradients, logprobs = zip(*parts, strict=True)
    return Numbers(torch.cat(hidden), sum(gradients), torch.cat(logprobs))


def _distance(got: Tensor, expected: Tensor) -> float:
    return ((got - expected).abs().max() / expected.abs().max().clamp(min=1e-30)).item()


@contextmanager
def _rounded_embeddings(policy: Policy) -> Iterator[None]:
    """In here the model's input is off by a unit in the last place, up or down by column."""

    def round_off(module: nn.Module, inputs: object, output: Tensor) -> Tensor:
        signs = 1.0 - 2.0 * (torch.arange(output.shape[-1], device=output.device) % 2)
        return output * (1 + signs * torch.finfo(policy.dtype).eps)

    handle = policy.model.get_input_embeddings().register_forward_hook(round_off)
    try:
        yield
    finally:
        handle.remove()


def _setting(layout: dict[str, bool]) -> str:
    if layout["packed"]:
        return "optim.packing = true"
    return f"optim.share_prompts = {str(layout['share']).lower()}"


def _attempt(what: str, work: Callable) -> object:
    try:
        return work()
    except Exception as error:  # other people's models raise anything
        if isinstance(error, TrainerError):
            raise
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise RecipeError(f"{what}: {reason}; this trainer cannot use that") from error


def _sampled(policy: Policy) -> list[Sample]:
    """Two completions each of two prompts of any tokens; no token ends them."""
    endless = replace(policy, stop=None, stop_ids=policy.stop_ids[:0])
    size = policy.model.get_input_embeddings().weight.shape[0]
    prompts = [[(7 * n + 3 * i + 1) % min(size, 1000) for i in range(n)] for n in PROMPT_LENGTHS]
    sampling = Sampling(group_size=2, max_new_tokens=NEW_TOKENS)
    completions = sample(endless, prompts, sampling, torch.Generator().manual_seed(0))
    return [
        Sample(problem=Problem(""), prompt=prompt, completion=c, text="", score=0.0, reward=0.0)
        for prompt, c in zip([p for p in prompts for _ in range(2)], completions, strict=True)
    ]


def _numbers(policy: Policy, samples: list[Sample], **layout: bool) -> Numbers:
    batch = MicroBatch.of(samples, policy.device, **layout)
    hidden = batch.hidden(policy)
    gradient = torch.zeros(1, device=policy.device)  # 0 where the head alone is trained
    for parameter in policy.model.parameters() if hidden.requires_grad else ():
        if parameter.requires_grad:
            found = _gradient(hidden, parameter)
            if found is not None:
                gradient = found
                break
            hidden = batch.hidden(policy)  # compiled layers go backward once
    with torch.no_grad():
        scored = fastpo.linear_token_logprobs(hidden, tokens=batch.tokens, **policy.head())
    return Numbers(hidden.detach().float(), gradient, scored.logprobs)


def _gradient(hidden: Tensor, parameter: Tensor) -> Tensor | None:
    """Of a weighted sum of the hidden states, if it depends on the parameter."""
    weights = torch.arange(hidden.shape[1], device=hidden.device) % 7 - 3.0
    total = (hidden.float() * weights).sum()  # the same weights for every row: batches add up
    return torch.autograd.grad(total, parameter, allow_unused=True)[0]
