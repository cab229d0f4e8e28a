"""Sampling completions with a KV cache, from any Hugging Face causal LM.

`generate` of transformers costs more per token than a small model does. This sampler prefills every
prompt once, copies its cache for the whole group, appends to buffers that double (concatenation
copies the cache for every token: a third of a rollout of 256), and drops rows that have ended.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from typing import Any, Protocol

import torch
from torch import Tensor

import fastpo
from fastpo.trainer.config import RolloutConfig
from fastpo.trainer.model import distributed
from fastpo.trainer.model.policy import Policy
from fastpo.trainer.run import console
from fastpo.trainer.run.errors import TrainerError

SYNC_EVERY = 8  # tokens between two looks at which rows have ended, where a look stalls the GPU


@dataclass(kw_only=True)
class Completion:
    """One sampled completion, with the log-probs it was sampled at."""

    tokens: list[int]  # the end token included
    logprobs: list[float]  # nats, under the sampling temperature, over what could be drawn
    finished: bool  # False: cut off at max_new_tokens
    kept_tokens: list[int] = field(default_factory=list)  # what could be: ids, token by token
    kept_offsets: list[int] = field(default_factory=list)  # and where they start; none = anything


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How completions are drawn."""

    group_size: int  # completions per prompt
    max_new_tokens: int
    temperature: float = 1.0  # 0 = greedy
    top_k: int = 0  # 0 = all
    top_p: float = 1.0
    min_p: float = 0.0
    kept_sets: bool = True  # log-probs are over the tokens that these leave
    batch_size: int = 1024  # completions side by side

    @classmethod
    def of(cls, config: RolloutConfig, **changes: Any) -> Sampling:
        """As the recipe says for training, but for `changes`."""
        names = [field.name for field in fields(cls)]
        return cls(**{**{name: getattr(config, name) for name in names}, **changes})

    @property
    def filter(self) -> dict[str, float]:
        """Of `fastpo.sampling_mask`; {} where every token may be drawn."""
        given = {"top_k": self.top_k, "top_p": self.top_p, "min_p": self.min_p}
        return {} if given == {"top_k": 0, "top_p": 1.0, "min_p": 0.0} else given


class Rollout(Protocol):
    """What the trainer asks of a sampler: `sample` is one, `rollout_vllm.VllmRollout` another."""

    def __call__(
        self,
        policy: Policy,
        prompts: list[list[int]],
        sampling: Sampling,
        generator: torch.Generator,
        share: slice = slice(None),
    ) -> list[Completion]:
        """`group_size` completions of every prompt of `share`, a group's side by side.

        With the log-probs they were sampled at and, where not every token could be drawn, kept
        sets. `generator` moves on alike on all ranks, whatever their share.
        """


@torch.no_grad()
def sample(
    policy: Policy,
    prompts: list[list[int]],
    sampling: Sampling,
    generator: torch.Generator,
    share: slice = slice(None),
) -> list[Completion]:
    """`group_size` completions of every prompt (of `share`), a group's side by side.

    One number from `generator` (on the CPU) decides one token, whatever else is in its batch: the
    batch size changes no completion, and neither does who samples the others. Greedy decoding
    draws none, and does a group once.
    Where a completion ends follows from the position of its first stop token, never from looking
    for the padding id: a tokenizer whose pad token is its EOS token loses nothing.
    """
    if sampling.temperature == 0 and sampling.group_size > 1:
        once = sample(policy, prompts, replace(sampling, group_size=1), generator, share)
        return [replace(done) for done in once for _ in range(sampling.group_size)]
    if policy.engine is not None:
        return policy.engine(policy, prompts, sampling, generator, share)
    completions = []
    step = max(1, sampling.batch_size // sampling.group_size) * (share.step or 1)
    with policy.forward_pass(), distributed.whole(policy.root):
        for start in range(0, len(prompts), step):
            part = prompts[start : start + step]
            shape = (len(part), sampling.group_size, sampling.max_new_tokens)
            noise = torch.rand(shape, dtype=torch.float64, generator=generator)[share]
            if mine := part[share]:
                noise = noise.flatten(0, 1).to(policy.device)
                completions += _Decoding(policy, mine, sampling).run(noise)
    return completions


class _Decoding:
    """Decoding of one batch: B = prompts * group_size rows, of which R are still decoded."""

    def __init__(self, policy: Policy, prompts: list[list[int]], sampling: Sampling):
        self.policy = policy
        self.sampling = sampling
        ids, padding = left_pad(prompts, policy.device)
        self.mask = None if padding is None else ~padding  # [R, T]; None = no row is padded
        positions = self._positions(ids)
        output = self._forward(ids, positions, None)
        longest = ids.shape[1] + sampling.max_new_tokens
        self.cache = growing(output.past_key_values, policy.dtype, longest)
        self.logits, self.position = output.logits[:, -1], positions[:, -1:]  # [R, V], [R, 1]
        owner = torch.arange(len(prompts), device=policy.device)
        self._select(owner.repeat_interleave(sampling.group_size))
        self.rows = torch.arange(len(self.position), device=policy.device)  # (R,) of B

    def run(self, noise: Tensor) -> list[Completion]:
        """Decode to the last token, where `noise` [B, max_new_tokens] decides every draw."""
        tokens = torch.zeros(noise.shape, dtype=torch.long, device=noise.device)
        logprobs = torch.zeros(noise.shape, device=noise.device)
        lengths = torch.full(noise.shape[:1], noise.shape[1], device=noise.device)
        finished = torch.zeros(noise.shape[:1], dtype=torch.bool, device=noise.device)
        kept = _KeptSets(tokens)
        for step in range(noise.shape[1]):
            rows = self.rows
            drawn = choose(self.logits, self.sampling, noise[rows, step])
            chosen, logprobs[rows, step], keep = drawn
            tokens[rows, step] = chosen
            kept.add(rows, step, keep)
            ended = torch.isin(chosen, self.policy.stop_ids) & ~finished[rows]
            lengths[rows] = torch.where(ended, step + 1, lengths[rows])
            finished[rows] |= ended
            if step + 1 == noise.shape[1] or self._is_time_to_look(step):
                self._find_stop_text(tokens[:, : step + 1], lengths, finished)
                running = (~finished[rows]).nonzero().squeeze(1)  # the one wait for the device
                if len(running) == 0 or step + 1 == noise.shape[1]:
                    break
                going = f"{len(running)} of {len(tokens)} completions go on"
                console.tell(f"token {step + 1} of at most {noise.shape[1]}, {going}")
                if len(running) <= len(rows) // 2:  # dropping rows copies the cache
                    self._select(running)
                    self.rows, chosen = rows[running], chosen[running]
            self._advance(chosen)
        if logprobs.isnan().any():  # one NaN or inf among its logits makes a whole row NaN
            raise TrainerError("the policy's logits are not finite; lower optim.learning_rate")
        lists = [x.tolist() for x in (tokens, logprobs, lengths, finished)]
        sets = kept.of_rows(lists[2])
        return [
            Completion(tokens=t[:n], logprobs=p[:n], finished=f, kept_tokens=i, kept_offsets=o)
            for t, p, n, f, (i, o) in zip(*lists, sets, strict=True)
        ]

    def _is_time_to_look(self, step: int) -> bool:
        free = self.rows.device.type == "cpu" and not self.policy.stop_spans_tokens
        return free or (step + 1) % SYNC_EVERY == 0

    def _find_stop_text(self, tokens: Tensor, lengths: Tensor, finished: Tensor) -> None:
        """End rows whose text holds a stop string that is spread over several tokens."""
        if not self.policy.stop_spans_tokens:
            return
        for row in self.rows.tolist():
            length = self.policy.length_to_stop(tokens[row, : lengths[row]].tolist())
            if length is not None:
                lengths[row], finished[row] = length, True

    def _select(self, index: Tensor) -> None:
        self.cache.reorder_cache(index)  # the one way of picking rows that every kind of layer has
        self.logits, self.position = self.logits[index], self.position[index]
        self.mask = None if self.mask is None else self.mask[index]

    def _advance(self, chosen: Tensor) -> None:
        self.position = self.position + 1
        if self.mask is not None:
            self.mask = torch.nn.functional.pad(self.mask, (0, 1), value=True)
        self.logits = self._forward(chosen[:, None], self.position, self.cache).logits[:, -1]

    def _forward(self, ids: Tensor, positions: Tensor, cache: Any) -> Any:
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


def growing(cache: Any, dtype: torch.dtype, longest: int) -> Any:
    """Give every layer of a DynamicCache that concatenates a `_Buffer`; others are bounded.

    Autocast hands on float32 keys, rotated, and rounds all of them to `dtype` for every product:
    they are kept in `dtype`, once.
    """
    from transformers.cache_utils import DynamicLayer

    for layer in cache.layers:
        if type(layer) is DynamicLayer:
            layer.keys, layer.values = layer.keys.to(dtype), layer.values.to(dtype)
            layer.update = _Buffer(layer, longest).update
    return cache


class _Buffer:
    """Room for the keys and values of one cache layer [R, heads, T, D], doubled when it is full.

    For `longest` tokens at most.
    """

    def __init__(self, layer: Any, longest: int):
        self.layer, self.longest = layer, longest
        self.room: tuple[Tensor, ...] = ()
        self.shown: Tensor | None = None

    def update(self, keys: Tensor, values: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Append keys and values, and return all of them, as `DynamicLayer.update` does."""
        layer, length = self.layer, self.layer.keys.shape[-2]
        total = length + keys.shape[-2]
        # Rows were picked since: the layer holds new tensors, and the room is of the old ones.
        if self.shown is not layer.keys or total > self.room[0].shape[-2]:
            self.room = tuple(
                old.new_empty(*old.shape[:-2], min(2 * total, self.longest), old.shape[-1])
                for old in (layer.keys, layer.values)
            )
            self.room[0][..., :length, :] = layer.keys
            self.room[1][..., :length, :] = layer.values
        self.room[0][..., length:total, :] = keys
        self.room[1][..., length:total, :] = values
        layer.keys, layer.values = (room[..., :total, :] for room in self.room)
        self.shown = layer.keys
        return layer.keys, layer.values


def left_pad(prompts: list[list[int]], device: torch.device) -> tuple[Tensor, Tensor | None]:
    """Ids [B, T] and where they are padding [B, T], or None where all prompts are equally long."""
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts], device=device)
    lengths = torch.tensor([len(p) for p in prompts], device=device)
    if min(map(len, prompts)) == width:
        return ids, None
    return ids, torch.arange(width, device=device) < (width - lengths)[:, None]


class _KeptSets:
    """What every draw was from, by row and step. Waits for the device once per token."""

    def __init__(self, tokens: Tensor):
        self.sizes = torch.zeros_like(tokens)  # [B, steps]
        self.owners: list[Tensor] = []  # (m,) rows of B
        self.ids: list[Tensor] = []  # (m,)

    def add(self, rows: Tensor, step: int, keep: Tensor | None) -> None:
        """keep [R, V] is of `rows` (R,); None = everything."""
        if keep is None:
            return
        kept = fastpo.kept_from_mask(keep, mask=keep.any(-1))  # logits of NaN keep nothing
        self.sizes[rows, step] = sizes = kept.kept_offsets.diff()
        self.owners.append(rows.repeat_interleave(sizes))
        self.ids.append(kept.kept_tokens)

    def of_rows(self, lengths: list[int]) -> list[tuple[list[int], list[int]]]:
        """(ids, offsets) of the first tokens of every row, empty where nothing was left out."""
        if not self.ids:
            return [([], [])] * len(lengths)
        order = torch.cat(self.owners).argsort(stable=True)  # and by step within a row
        own = torch.cat(self.ids)[order].split(self.sizes.sum(1).tolist())
        starts = torch.nn.functional.pad(self.sizes.cumsum(1), (1, 0)).tolist()
        offsets = [start[: n + 1] for start, n in zip(starts, lengths, strict=True)]
        return [(ids[: at[-1]].tolist(), at) for ids, at in zip(own, offsets, strict=True)]


def choose(
    logits: Tensor, sampling: Sampling, noise: Tensor
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Tokens (R,), their fp32 log-probs (R,), and what was kept [R, V], from logits [R, V].

    A token is where the cumulative distribution passes `noise` (R,), uniform in [0, 1), in float64:
    float32 would never draw tokens below 6e-8. Log-probs are over what the filter keeps, as those
    of the update will be: the ratio of the two policies starts at 1. Without `kept_sets` both are
    over the whole vocabulary. Temperature 0 = greedy, with log-probs of temperature 1.
    """
    scaled = logits.float() / (sampling.temperature or 1.0)
    logprobs, keep = scaled.log_softmax(-1), None
    if sampling.temperature == 0:
        tokens = logprobs.argmax(-1)
    else:
        probs = logprobs.exp()
        if sampling.filter:
            keep = fastpo.sampling_mask(probs, **sampling.filter)
            probs = probs.where(keep, 0.0)
        cumulative = probs.cumsum(-1, dtype=torch.float64)
        drawn = noise[:, None] * cumulative[:, -1:]
        tokens = torch.searchsorted(cumulative, drawn, right=True).squeeze(1)
        tokens = tokens.clamp(max=logits.shape[1] - 1)  # NaN sorts behind everything
        keep = keep if sampling.kept_sets else None
        if keep is not None:
            logprobs = scaled.masked_fill(~keep, -torch.inf).log_softmax(-1)
    return tokens, logprobs.gather(1, tokens[:, None]).squeeze(1), keep
