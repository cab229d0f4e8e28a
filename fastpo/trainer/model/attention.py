"""Attention of packed sequences: each sees itself alone, and no mask of [T, T] is made.

`flash_attention_2` where the flash-attn package is there, else a function of ours that transformers
calls by name. It takes the kernel of `torch.nn.attention.varlen` on a GPU in half precision, and
transformers' sdpa elsewhere, a sequence at a time; whatever is not packed goes to that sdpa as is.
"""

from __future__ import annotations

import inspect
from itertools import groupby
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastpo._compile import untraced
from fastpo.trainer.config import ModelConfig

try:
    from torch.nn.attention.varlen import varlen_attn
except ImportError:
    varlen_attn = None

# As of torch 2.13; older ones know neither windows nor fewer heads of keys.
KERNEL = varlen_attn is not None and "enable_gqa" in inspect.signature(varlen_attn).parameters
OURS, FLASH, VARLEN = "fastpo", "flash_attention_2", "varlen_attn"


class Packing(NamedTuple):
    """Where the sequences of a packed row are."""

    positions: Tensor  # [1, T], start anew with every sequence
    cu_seqlens: Tensor  # (B + 1,) int32
    longest: int

    @classmethod
    def of(cls, sizes: Tensor, device: torch.device) -> Packing:
        """Of sequences of `sizes` (B,) tokens, one after the other."""
        cu_seqlens = nn.functional.pad(sizes.cumsum(0), (1, 0))
        positions = torch.arange(int(cu_seqlens[-1])) - cu_seqlens[:-1].repeat_interleave(sizes)
        return cls(positions[None].to(device), cu_seqlens.int().to(device), int(sizes.max()))

    def inputs(self, implementation: str) -> dict[str, Any]:
        """What the trunk is told, in transformers' names (`FlashAttentionKwargs`)."""
        inputs: dict[str, Any] = {"position_ids": self.positions}  # a mask, if any, goes by them
        if implementation in (OURS, FLASH):
            inputs |= dict.fromkeys(("cu_seq_lens_q", "cu_seq_lens_k"), self.cu_seqlens)
            inputs |= dict.fromkeys(("max_length_q", "max_length_k"), self.longest)
        if implementation == OURS:  # with four dimensions it counts as made; nobody looks at it
            inputs["attention_mask"] = self.positions.new_ones(1, 1, 1, 1)
        return inputs


def choose(config: ModelConfig, device: torch.device) -> str | None:
    """The `attn_implementation` to load a model with; None = transformers' own choice."""
    from transformers.utils import is_flash_attn_2_available

    # It has no float32, and is not traced: of its graphs nothing is known here.
    fits = device.type == "cuda" and config.dtype != "float32" and not config.compile
    return config.attention or (FLASH if fits and is_flash_attn_2_available() else None)


def settle(model: nn.Module, config: ModelConfig) -> None:
    """Ours in place of sdpa, if nothing was asked for and a causal mask is all that a layer has."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(OURS, attend)
    AttentionMaskInterface.register(OURS, sdpa_mask)
    known = model._supports_flash_attn and model._can_set_attn_implementation()
    if config.attention is None and known and model.config._attn_implementation == "sdpa":
        model.set_attn_implementation(OURS)


def kernel(implementation: str, device: torch.device, dtype: torch.dtype) -> str:
    """What attends in packed rows under a name of transformers."""
    if implementation != OURS:
        return implementation
    return VARLEN if _has_kernel(device, dtype) else "sdpa, a sequence at a time"


def _has_kernel(device: torch.device, dtype: torch.dtype) -> bool:
    return KERNEL and device.type == "cuda" and dtype != torch.float32


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: int | None = None,
    sliding_window: int | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Attention as transformers calls it: query [B, H, T, d], keys of H or fewer heads -> B T H d.

    Raises:
        ValueError: packed sequences, and anything but a causal mask or a window of it.
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if cu_seq_lens_q is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    odd = {name for name in ("s_aux", "position_bias", "softcap") if options.get(name) is not None}
    if odd or options.get("is_causal") is False:
        raise ValueError(f"packed rows know no {'/'.join(odd) or 'other than causal attention'}")
    if _has_kernel(value.device, value.dtype) and query.shape[-1] == value.shape[-1] <= 256:
        # Under autocast rotary embeddings are float32, values what the products are.
        query, key, value = (x[0].transpose(0, 1).to(value.dtype) for x in (query, key, value))
        found = varlen_attn(
            *(query, key, value),
            *(cu_seq_lens_q, cu_seq_lens_q, max_length_q, max_length_q),
            scale=options.get("scaling"),
            window_size=(-1 if sliding_window is None else sliding_window - 1, 0),
            enable_gqa=True,
        )
        return found[None], None
    return _one_by_one(module, query, key, value, cu_seq_lens_q, sliding_window, options), None


@untraced("as many calls as there are lengths")
def _one_by_one(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens: Tensor,
    window: int | None,
    options: dict[str, Any],
) -> Tensor:
    """sdpa of every sequence, those of a length side by side where they follow each other."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    found, end = [], 0
    for length, group in groupby(cu_seqlens.diff().tolist()):
        count = len(list(group))
        start, end = end, end + count * length
        tensors = (
            x[0, :, start:end].unflatten(1, (count, length)).transpose(0, 1)
            for x in (query, key, value)
        )
        band = None
        if window is not None and window < length:
            band = query.new_ones(length, length, dtype=torch.bool).tril().triu(1 - window)[None]
        found.append(sdpa_attention_forward(module, *tensors, band, **options)[0].flatten(0, 1))
    return torch.cat(found)[None]
