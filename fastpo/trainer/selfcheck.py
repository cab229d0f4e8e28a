"""Does a model give the same numbers in every layout that a run uses? Asked once, at its start.

Packed sequences see each other where an attention mask ignores position ids (OPT, GPT-OSS); a cache
of anything but keys and values (Mamba, RWKV) may not be copied, or loses gradients; an encoder sees
the padding on its right; a head may do more than multiply. None of these raises by itself.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

import fastpo
from fastpo.trainer.config import OptimConfig
from fastpo.trainer.experience import Sample
from fastpo.trainer.microbatch import MicroBatch, layout_of
from fastpo.trainer.policy import Policy
from fastpo.trainer.rollout import Sampling, sample
from fastpo.trainer.run.errors import RecipeError, TrainerError
from fastpo.trainer.tasks import Problem

PROMPT_LENGTHS, NEW_TOKENS = (3, 8), 5  # unequal, so that there is padding
# Relative to the largest number: rounding is below 1e-5 in float32, cross-talk above 5e-3. Flash
# attention exists in low precision only, where rounding is about 1e-2.
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 5e-2}


class Numbers(NamedTuple):
    """What a model makes of some sequences."""

    hidden: Tensor  # (N, D)
    gradient: Tensor  # of the first trained parameter


def check(policy: Policy, optim: OptimConfig) -> None:
    """Compare sampler, head and micro-batches with the model on one sequence at a time.

    Raises:
        RecipeError: one of them gives other numbers, or does not work with this model.
    """
    if policy.dtype != torch.float32 and not policy.packs:
        policy = replace(policy, config=replace(policy.config, dtype="float32"))
    name = type(policy.model).__name__
    samples = _attempt(f"the sampler cannot decode {name}", lambda: _sampled(policy))
    alone = [_numbers(policy, [s]) for s in samples]
    pairs = zip(alone, samples, strict=True)
    scored = torch.cat([_logprobs(policy, numbers.hidden, s) for numbers, s in pairs])
    own = torch.cat([_own_logprobs(policy, s) for s in samples])
    _compare(policy, f"log-probs by the LM head of {name} and those of its own logits", scored, own)
    drawn = torch.tensor([p for s in samples for p in s.completion.logprobs], device=own.device)
    _compare(policy, f"log-probs of {name} in the sampler, with a cache, and without", drawn, own)
    expected = Numbers(torch.cat([n.hidden for n in alone]), sum(n.gradient for n in alone))
    layout = layout_of(policy, optim)
    what = f"{name}, {_setting(layout)}"
    found = _attempt(what, lambda: _numbers(policy, samples, **layout))
    for kind, got, right in zip(("hidden states", "gradients"), found, expected, strict=True):
        _compare(policy, f"{what}: {kind} of sequences together and alone", got, right)


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


def _compare(policy: Policy, what: str, got: Tensor, expected: Tensor) -> None:
    error = ((got - expected).abs().max() / expected.abs().max().clamp(min=1e-30)).item()
    if not error <= TOLERANCE[policy.dtype]:
        raise RecipeError(
            f"{what} differ by {error:.2g} of their size, expected at most "
            f"{TOLERANCE[policy.dtype]:g}: this trainer would compute a wrong loss"
        )


def _sampled(policy: Policy) -> list[Sample]:
    """Greedy completions of two prompts of any tokens; no token ends them."""
    endless = replace(policy, stop=None, stop_ids=policy.stop_ids[:0])
    size = policy.model.get_input_embeddings().weight.shape[0]
    prompts = [[(7 * n + 3 * i + 1) % min(size, 1000) for i in range(n)] for n in PROMPT_LENGTHS]
    sampling = Sampling(group_size=1, max_new_tokens=NEW_TOKENS, temperature=0.0)
    completions = sample(endless, prompts, sampling, torch.Generator())
    return [
        Sample(problem=Problem(""), prompt=prompt, completion=c, text="", score=0.0, reward=0.0)
        for prompt, c in zip(prompts, completions, strict=True)
    ]


def _numbers(policy: Policy, samples: list[Sample], **layout: bool) -> Numbers:
    hidden = MicroBatch.of(samples, policy.device, **layout).hidden(policy)
    columns = torch.arange(hidden.shape[1], device=hidden.device)
    weights = columns % 7 - 3.0  # the same for every row: batches add up
    first = next(p for p in policy.model.parameters() if p.requires_grad)
    (gradient,) = torch.autograd.grad((hidden.float() * weights).sum(), first)
    return Numbers(hidden.detach().float(), gradient)


@torch.no_grad()
def _logprobs(policy: Policy, hidden: Tensor, s: Sample) -> Tensor:
    tokens = torch.tensor(s.completion.tokens, device=policy.device)
    hidden = hidden.to(policy.dtype)
    return fastpo.linear_token_logprobs(hidden, tokens=tokens, **policy.head()).logprobs


@torch.no_grad()
def _own_logprobs(policy: Policy, s: Sample) -> Tensor:
    ids = torch.tensor([s.prompt + s.completion.tokens], device=policy.device)
    with policy.precision():
        logits = policy.model(input_ids=ids, use_cache=False).logits[0, len(s.prompt) - 1 : -1]
    return logits.float().log_softmax(-1).gather(1, ids[0, len(s.prompt) :, None]).squeeze(1)
