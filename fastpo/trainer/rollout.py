"""Sampling completions with a KV cache, from any Hugging Face causal LM.

`generate` of transformers costs more per token than a small model does. This sampler prefills every
prompt once, copies its cache for the whole group, and stops decoding rows that have ended.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fastpo.trainer.policy import Policy
from fastpo.trainer.run.errors import TrainerError


@dataclass(kw_only=True)
class Completion:
    """One sampled completion, with the log-probs it was sampled at (the old policy's)."""

    tokens: list[int]  # the end token included
    logprobs: list[float]  # nats, under the sampling temperature
    finished: bool  # False: cut off at max_new_tokens


@torch.no_grad()
def sample(
    policy: Policy,
    prompts: list[list[int]],
    *,
    group_size: int,
    max_new_tokens: int,
    temperature: float,
    generator: torch.Generator,
    batch_size: int = 1024,
) -> list[Completion]:
    """`group_size` completions of every prompt, a group's side by side. Temperature 0 = greedy.

    Where a completion ends follows from the position of its first stop token, never from looking
    for the padding id: a tokenizer whose pad token is its EOS token loses nothing.
    """
    completions = []
    step = max(1, batch_size // group_size)
    for start in range(0, len(prompts), step):
        decoding = _Decoding(policy, prompts[start : start + step], group_size, max_new_tokens)
        completions += decoding.run(temperature, generator)
    return completions


class _Decoding:
    """Decoding of one batch: B = prompts * group_size rows, of which R still run."""

    def __init__(
        self, policy: Policy, prompts: list[list[int]], group_size: int, max_new_tokens: int
    ):
        self.policy = policy
        self.max_new_tokens = max_new_tokens
        ids, padding = left_pad(prompts, policy.device)
        self.mask = None if padding is None else ~padding  # [R, T]; None = no row is padded
        positions = self._positions(ids)
        output = self._forward(ids, positions, None)
        self.cache = output.past_key_values
        self.cache.batch_repeat_interleave(group_size)
        self.logits = output.logits[:, -1].repeat_interleave(group_size, 0)  # [R, V]
        self.position = positions[:, -1:].repeat_interleave(group_size, 0)  # [R, 1]
        if self.mask is not None:
            self.mask = self.mask.repeat_interleave(group_size, 0)
        self.rows = torch.arange(len(prompts) * group_size, device=policy.device)  # (R,) of B

    def run(self, temperature: float, generator: torch.Generator) -> list[Completion]:
        shape = (len(self.rows), self.max_new_tokens)
        tokens = torch.zeros(shape, dtype=torch.long, device=self.rows.device)
        logprobs = torch.zeros(shape, device=self.rows.device)
        lengths = torch.full(shape[:1], self.max_new_tokens, device=self.rows.device)
        finished = torch.zeros(shape[:1], dtype=torch.bool, device=self.rows.device)
        for step in range(self.max_new_tokens):
            chosen, chosen_logprobs = choose(self.logits, temperature, generator)
            tokens[self.rows, step] = chosen
            logprobs[self.rows, step] = chosen_logprobs
            ended = torch.isin(chosen, self.policy.stop_ids) & ~finished[self.rows]
            lengths[self.rows[ended]] = step + 1
            finished[self.rows[ended]] = True
            if step + 1 == self.max_new_tokens or finished.all():
                break
            self._advance(chosen, ~finished[self.rows])
        return [
            Completion(tokens=t[:n], logprobs=p[:n], finished=f)
            for t, p, n, f in zip(
                tokens.tolist(), logprobs.tolist(), lengths.tolist(), finished.tolist(), strict=True
            )
        ]

    def _advance(self, chosen: Tensor, running: Tensor) -> None:
        # Dropping rows copies the cache: worth it once half of them have ended.
        if running.sum() <= len(running) // 2:
            keep = running.nonzero().squeeze(1)
            self.cache.batch_select_indices(keep)
            self.rows, self.position, chosen = self.rows[keep], self.position[keep], chosen[keep]
            self.mask = None if self.mask is None else self.mask[keep]
        self.position = self.position + 1
        if self.mask is not None:
            self.mask = torch.nn.functional.pad(self.mask, (0, 1), value=True)
        self.logits = self._forward(chosen[:, None], self.position, self.cache).logits[:, -1]

    def _forward(self, ids: Tensor, positions: Tensor, cache):
        return self.policy.model(
            input_ids=ids,
            attention_mask=None if self.mask is None else self.mask.long(),
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )

    def _positions(self, ids: Tensor) -> Tensor:
        if self.mask is None:
            return torch.arange(ids.shape[1], device=ids.device).expand(ids.shape)
        return (self.mask.long().cumsum(1) - 1).clamp(min=0)


def left_pad(prompts: list[list[int]], device: torch.device) -> tuple[Tensor, Tensor | None]:
    """Ids [B, T] and where they are padding [B, T], or None where all prompts are equally long."""
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts], device=device)
    lengths = torch.tensor([len(p) for p in prompts], device=device)
    if min(map(len, prompts)) == width:
        return ids, None
    return ids, torch.arange(width, device=device) < (width - lengths)[:, None]


def choose(logits: Tensor, temperature: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Tokens (R,) and their fp32 log-probs (R,) from logits [R, V]; temperature 0 = greedy."""
    logprobs = (logits.float() / (temperature or 1.0)).log_softmax(-1)
    if logprobs[:, 0].isnan().any():  # one NaN or inf makes its whole row NaN
        raise TrainerError("the policy's logits are not finite; lower optim.learning_rate")
    if temperature == 0:
        tokens = logprobs.argmax(-1)
    else:
        tokens = torch.multinomial(logprobs.exp(), 1, generator=generator).squeeze(1)
    return tokens, logprobs.gather(1, tokens[:, None]).squeeze(1)
