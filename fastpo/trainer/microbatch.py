"""Micro-batches: samples laid out for one forward pass, and cut to bounded size.

Three layouts give the same hidden states: a sample per row, right-padded (`Rows`); all in one row
without padding (`Rows`, packed); and every prompt once, with the keys and values of it handed to
all of its completions (`SharedPrompts`).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

import fastpo
from fastpo.trainer.config import OptimConfig
from fastpo.trainer.experience import Sample
from fastpo.trainer.model import distributed
from fastpo.trainer.model.attention import Packing
from fastpo.trainer.model.policy import Policy
from fastpo.trainer.rollout import Completion, left_pad


@dataclass(kw_only=True)
class Rows:
    """Whole sequences, one per row or all in one, and the positions that predict completions."""

    ids: Tensor  # [B, T] right-padded, or [1, T] packed
    packing: Packing | None  # of a packed row
    rows: Tensor  # (N,) where in ids each prediction is made
    columns: Tensor  # (N,)

    @classmethod
    def of(cls, samples: list[Sample], device: torch.device, *, packed: bool) -> Rows:
        """Lay samples out; the last token of each predicts nothing and is left out."""
        sequences = [torch.tensor(s.prompt + s.completion.tokens[:-1]) for s in samples]
        rows, columns = _places(samples)
        first = torch.tensor([len(s.prompt) - 1 for s in samples])  # predicts the first token
        packing = None
        if packed:
            sizes = torch.tensor([len(sequence) for sequence in sequences])
            first += sizes.cumsum(0) - sizes
            packing = Packing.of(sizes, device)
            ids = torch.cat(sequences)[None]
        else:
            ids = pad_sequence(sequences, batch_first=True)
        columns += first[rows]
        return cls(
            ids=ids.to(device),
            packing=packing,
            rows=(torch.zeros_like(rows) if packed else rows).to(device),
            columns=columns.to(device),
        )

    def hidden(self, policy: Policy) -> Tensor:
        """Hidden states (N, D) that predict completion tokens."""
        return policy.hidden_states(self.ids, self.packing)[self.rows, self.columns]


@dataclass(kw_only=True)
class SharedPrompts:
    """P different prompts and the B completions that go on from their cache, gradient included."""

    prompts: Tensor  # [P, T] left-padded
    mask: Tensor  # [P, T] False = padding
    owner: Tensor  # (B,) whose completion it is, of P
    ids: Tensor  # [B, C] completions without their last token, right-padded
    rows: Tensor  # (N,) where in [B, 1 + C] each prediction is made
    columns: Tensor  # (N,)

    @classmethod
    def of(cls, samples: list[Sample], device: torch.device) -> SharedPrompts:
        """Lay samples out; equal prompts are one, whichever groups they came from."""
        numbers: dict[tuple[int, ...], int] = {}
        owner = [numbers.setdefault(tuple(s.prompt), len(numbers)) for s in samples]
        prompts, padding = left_pad([list(prompt) for prompt in numbers], device)
        ids = pad_sequence([torch.tensor(s.completion.tokens[:-1]) for s in samples], True)
        if distributed.size() > 1 and not ids.shape[1]:  # a pass that no rank may leave out
            ids = ids.new_zeros(len(samples), 1)
        rows, columns = _places(samples)
        return cls(
            prompts=prompts,
            mask=torch.ones_like(prompts, dtype=torch.bool) if padding is None else ~padding,
            owner=torch.tensor(owner, device=device),
            ids=ids.long().to(device),
            rows=rows.to(device),
            columns=columns.to(device),
        )

    def hidden(self, policy: Policy) -> Tensor:
        """Hidden states (N, D) that predict completion tokens."""
        with policy.forward_pass():
            return self._hidden(policy.model.base_model)[self.rows, self.columns]

    def _hidden(self, trunk: nn.Module) -> Tensor:
        first = trunk(
            input_ids=self.prompts,
            attention_mask=self.mask.long(),
            position_ids=(self.mask.cumsum(1) - 1).clamp(min=0),
            use_cache=True,
        )
        states = first.last_hidden_state[self.owner, -1:]  # [B, 1, D]
        if self.ids.shape[1]:
            cache = first.past_key_values
            cache.reorder_cache(self.owner)
            mask = torch.cat([self.mask[self.owner], torch.ones_like(self.ids, dtype=bool)], 1)
            start = self.mask.sum(1)[self.owner, None]  # [B, 1]
            rest = trunk(
                input_ids=self.ids,
                attention_mask=mask.long(),
                position_ids=start + torch.arange(self.ids.shape[1], device=start.device),
                past_key_values=cache,
                use_cache=True,
            )
            states = torch.cat([states, rest.last_hidden_state], 1)
        return states  # [B, 1 + C, D]


@dataclass(kw_only=True)
class MicroBatch:
    """The N completion tokens of some samples, sample by sample, and where they are predicted."""

    layout: Rows | SharedPrompts
    tokens: Tensor  # (N,) what was sampled
    cu_seqlens: Tensor  # (B + 1,) int32: whose they are
    advantages: Tensor  # (B,), or (N,) by a critic
    sampled_logprobs: Tensor  # (N,) as the sampler computed them
    old_logprobs: Tensor  # (N,) of the policy that sampled
    kept: dict[str, Tensor | int]  # what the tokens were drawn from, as the ops take it; {} = any
    correction: dict[str, Tensor | int]  # of importance, with its mask; {} = none

    @classmethod
    def of(
        cls,
        samples: list[Sample],
        device: torch.device,
        *,
        packed: bool = False,
        share: bool = False,
    ) -> MicroBatch:
        """Lay samples out: packed, or with shared prompts, or else one per row."""
        lengths = torch.tensor([s.length for s in samples])
        return cls(
            layout=SharedPrompts.of(samples, device)
            if share
            else Rows.of(samples, device, packed=packed),
            tokens=torch.tensor([t for s in samples for t in s.completion.tokens], device=device),
            cu_seqlens=torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int().to(device),
            advantages=advantages_of(samples).to(device),
            sampled_logprobs=torch.tensor(
                [p for s in samples for p in s.completion.logprobs], device=device
            ),
            old_logprobs=torch.tensor([p for s in samples for p in s.old_logprobs], device=device),
            kept=_kept([s.completion for s in samples], device),
            correction=_correction(samples, device),
        )

    def hidden(self, policy: Policy) -> Tensor:
        """Hidden states (N, D) that predict completion tokens: no other row meets the head."""
        return self.layout.hidden(policy).to(policy.dtype)

    def loss_options(self) -> dict[str, Tensor | int]:
        """Kept sets and correction as the loss takes them: counts are those under its mask."""
        return self.kept | self.correction

    def idle(self) -> MicroBatch:
        """The same forward pass with no token to learn from."""
        rows, columns = self.layout.rows[:0], self.layout.columns[:0]
        return MicroBatch(
            layout=replace(self.layout, rows=rows, columns=columns),
            tokens=self.tokens[:0],
            cu_seqlens=self.cu_seqlens[:1],
            advantages=self.advantages[:0],
            sampled_logprobs=self.sampled_logprobs[:0],
            old_logprobs=self.old_logprobs[:0],
            kept=_no_rows(self.kept),
            correction=_no_rows(self.correction),
        )


def advantages_of(samples: list[Sample]) -> Tensor:
    """Of every sample (B,), or of every token (N,) by a critic."""
    if isinstance(samples[0].advantage, list):
        return torch.tensor([a for s in samples for a in s.advantage])
    return torch.tensor([s.advantage for s in samples])


def _no_rows(options: dict[str, Tensor | int]) -> dict[str, Tensor | int]:
    return {
        name: 0 if isinstance(value, int) else value[: name == "kept_offsets"]
        for name, value in options.items()
    }


def _kept(completions: list[Completion], device: torch.device) -> dict[str, Tensor | int]:
    """With the number of tokens that were drawn from anything: a GPU would have to be asked."""
    if not any(c.kept_offsets for c in completions):
        return {}
    offsets = [c.kept_offsets or [0] * (len(c.tokens) + 1) for c in completions]
    kept = fastpo.kept_from_arrays([c.kept_tokens for c in completions], offsets, device=device)
    return kept._asdict() | {"dense_rows": sum(_draws_from_anything(completions))}


def _draws_from_anything(completions: list[Completion]) -> list[bool]:
    """Of every token."""
    offsets = [c.kept_offsets or [0] * (len(c.tokens) + 1) for c in completions]
    return [a == b for each in offsets for a, b in itertools.pairwise(each)]


def _correction(samples: list[Sample], device: torch.device) -> dict[str, Tensor | int]:
    """importance_weights and mask (N,), and what the host knows of the mask."""
    if not any(s.weights for s in samples):
        return {}
    weights = [w for s in samples for w in s.weights or [1.0] * s.length]
    mask = [m for s in samples for m in s.mask or [True] * s.length]
    correction = {
        "importance_weights": torch.tensor(weights, device=device),
        "mask": torch.tensor(mask, device=device),
        "live_rows": sum(mask),
    }
    if any(s.completion.kept_offsets for s in samples):
        dense = _draws_from_anything([s.completion for s in samples])
        correction["dense_rows"] = sum(a and b for a, b in zip(mask, dense, strict=True))
    return correction


def layout_of(policy: Policy, config: OptimConfig) -> dict[str, bool]:
    """How micro-batches are laid out, as `MicroBatch.of` takes it."""
    packed = config.packing
    if packed is None:
        packed = policy.packs and not config.share_prompts
    return {"packed": packed, "share": config.share_prompts and not packed}


def _places(samples: list[Sample]) -> tuple[Tensor, Tensor]:
    """Which sample every completion token belongs to (N,), and its index in the completion (N,)."""
    lengths = torch.tensor([s.length for s in samples])
    rows = torch.arange(len(samples)).repeat_interleave(lengths)
    return rows, torch.arange(len(rows)) - (lengths.cumsum(0) - lengths)[rows]


def _width(sample: Sample) -> int:
    return len(sample.prompt) + sample.length


def by_token_budget(
    samples: list[Sample], budget: int, *, packed: bool = False
) -> Iterator[list[Sample]]:
    """Micro-batches of similar lengths within `budget` tokens, padding counted unless packed."""
    part: list[Sample] = []
    total = 0
    for sample in sorted(samples, key=_width):
        width = _width(sample)  # the longest so far
        if part and (total if packed else width * len(part)) + width > budget:
            yield part
            part, total = [], 0
        part.append(sample)
        total += width
    if part:
        yield part


def micro_batches(
    samples: list[Sample], policy: Policy, config: OptimConfig
) -> Iterator[tuple[list[Sample], MicroBatch]]:
    """Samples of this rank in micro-batches of the size and layout that the recipe says.

    Every rank gets as many, the last of them idle if need be: under FSDP2 a pass is one of all.
    """
    layout = layout_of(policy, config)
    ordered = sorted(samples, key=_width)
    parts = [
        list(by_token_budget(share, config.token_budget, packed=layout["packed"]))
        for share in (ordered[rank :: distributed.size()] for rank in range(distributed.size()))
    ]
    mine = parts[distributed.rank()]
    for part in mine:
        yield part, MicroBatch.of(part, policy.device, **layout)
    for _ in range(max(map(len, parts)) - len(mine)):
        yield [], MicroBatch.of(ordered[:1], policy.device, **layout).idle()
