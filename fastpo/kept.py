"""Kept sets, the ids that tokens were sampled from, in the form that the ops take.

    kept = fastpo.kept_from_arrays([o.token_ids for o in masks], [o.offsets for o in masks])
    fastpo.linear_policy_loss(hidden, weight, tokens, advantages, **kept._asdict(), ...)

From what an inference engine returns (`kept_from_arrays`), from a bool mask over the vocabulary
(`kept_from_mask`), or from the sampler's own logits and its filter (`kept_from_logits`).
"""

from __future__ import annotations

from numbers import Integral, Real
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastpo.ops import checks

_BLOCK = 1 << 26  # probabilities of `kept_from_logits` that exist at a time


class KeptTokens(NamedTuple):
    """Two arguments of the ops. Row i, in flattened order, has kept
    kept_tokens[kept_offsets[i] : kept_offsets[i + 1]]; no ids mean the whole vocabulary."""

    kept_tokens: Tensor  # [M] int64
    kept_offsets: Tensor  # [N + 1] int64, from 0 to M


def kept_from_arrays(
    token_ids: Any,
    offsets: Any,
    *,
    mask: Tensor | None = None,
    device: torch.device | str | None = None,
) -> KeptTokens:
    """The kept sets that vLLM (`SamplingMask.token_ids`, `.offsets`) and its like return.

    Args:
        token_ids: ids of one completion's tokens, one token's behind the other's, as a list, a
            NumPy array or an integer tensor; or a list of such, one per completion.
        offsets: one more number than the completion has tokens: token i kept
            token_ids[offsets[i] : offsets[i + 1]]; or a list of such, one per completion.
        mask: [...] bool: the positions of a padded batch that these tokens stand at, in flattened
            order; the others get no ids. None = there are no others.
        device: of the result; None = that of `mask`, or the CPU.

    Raises:
        TypeError, ValueError: see the message. Ids are checked by the op that takes them.
    """
    if not isinstance(offsets, list | tuple) or (offsets and isinstance(offsets[0], Integral)):
        token_ids, offsets = [token_ids], [offsets]
    if len(token_ids) != len(offsets):
        raise ValueError(
            f"token_ids are those of {len(token_ids)} completions and offsets of {len(offsets)}, "
            "expected one array of each per completion"
        )
    none = [torch.empty(0, dtype=torch.int64)]
    ids = none + [_integers("token_ids", x, n) for n, x in enumerate(token_ids)]
    sizes = none + [
        _sizes(_integers("offsets", x, n), len(ids[n + 1]), n) for n, x in enumerate(offsets)
    ]
    ids, sizes = torch.cat(ids), torch.cat(sizes)
    if mask is not None:
        sizes = _spread(sizes, mask)
        device = mask.device if device is None else device
    return KeptTokens(ids.to(device), _offsets(sizes).to(device))


def kept_from_mask(keep: Tensor, *, mask: Tensor | None = None) -> KeptTokens:
    """The kept sets of a bool mask over the vocabulary. Waits for the device.

    Args:
        keep: [N, V] or [B, T, V] bool, True where the sampler could choose. Rows that are True
            everywhere get no ids: they are over the whole vocabulary.
        mask: [...] bool: rows that count; the others get no ids, whatever `keep` says.

    Raises:
        TypeError, ValueError: wrong types or shapes, or a row that counts and kept nothing.
    """
    if not isinstance(keep, Tensor) or keep.dtype != torch.bool:
        got = keep.dtype if isinstance(keep, Tensor) else type(keep).__name__
        raise TypeError(f"keep is {got}, expected a bool tensor [N, V] or [B, T, V]")
    if keep.ndim not in (2, 3):
        raise ValueError(f"keep has shape {list(keep.shape)}, expected [N, V] or [B, T, V]")
    checks.check_mask(mask, keep.shape[:-1], keep)
    keep = keep.flatten(0, -2)  # (N, V)
    mask = None if mask is None else mask.flatten().bool()
    sizes = keep.sum(1)
    nothing = sizes == 0 if mask is None else (sizes == 0) & mask
    if nothing.any():
        raise ValueError(
            f"row {int(nothing.nonzero()[0])} keeps no id, expected at least that of its token: "
            "pass mask where rows do not count; NaN logits keep none either"
        )
    narrow = sizes < keep.shape[1] if mask is None else (sizes < keep.shape[1]) & mask
    return KeptTokens((keep & narrow[:, None]).nonzero()[:, 1], _offsets(sizes.where(narrow, 0)))


def kept_from_logits(
    logits: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    mask: Tensor | None = None,
) -> KeptTokens:
    """The kept sets of a sampler that draws from softmax(logits / temperature) under a filter.

    Those of the very logits that were sampled from: another forward pass rounds otherwise, and may
    keep another id at the edge.

    Args:
        logits: [N, V] or [B, T, V] floating.
        temperature: a float, or one per row [...].
        top_k, top_p, min_p: as in `sampling_mask`.
        mask: [...] bool: rows that count; the others get no ids.

    Raises:
        TypeError, ValueError: see the message.
    """
    checks.check_matrix("logits", logits, "V")
    checks.check_mask(mask, logits.shape[:-1], logits)
    checks.check_temperature(temperature, logits.shape[:-1], mask, logits)
    rows = logits.detach().flatten(0, -2)
    scales = torch.as_tensor(temperature, device=rows.device).flatten().expand(len(rows))
    mask = rows.new_ones(len(rows), dtype=torch.bool) if mask is None else mask.flatten()
    block = max(1, _BLOCK // rows.shape[1])
    parts = []
    for z, scale, own in zip(*(x.split(block) for x in (rows, scales, mask)), strict=True):
        probs = (z.to(checks.wide_dtype(z.dtype)) / scale[:, None]).softmax(-1)
        keep = sampling_mask(probs, top_k=top_k, top_p=top_p, min_p=min_p)
        parts.append(kept_from_mask(keep, mask=own))
    ids = torch.cat([part.kept_tokens for part in parts])
    return KeptTokens(ids, _offsets(torch.cat([part.kept_offsets.diff() for part in parts])))


def sampling_mask(
    probs: Tensor, *, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0
) -> Tensor:
    """Which tokens a filter leaves to draw from: top-k, then top-p of the rest, then min-p.

    Equally likely tokens stay or go together, so that a set may be larger than `top_k`.

    Args:
        probs: [..., V] of the whole vocabulary, under the temperature.
        top_k: only the k likeliest; 0 = all.
        top_p: only the likeliest that together hold this share of what top-k left.
        min_p: only those of at least this share of the likeliest one's probability.

    Returns:
        [..., V] bool; all False in rows with NaN.

    Raises:
        TypeError, ValueError: a filter outside of its range.
    """
    if isinstance(top_k, bool) or not isinstance(top_k, Integral):
        raise TypeError(f"top_k is {type(top_k).__name__}, expected an int, 0 = all")
    if top_k < 0:
        raise ValueError(f"top_k is {top_k}, expected a number of tokens, 0 = all")
    for name, value, inside, words in (
        ("top_p", top_p, lambda x: 0 < x <= 1, "a share in (0, 1], 1 = all"),
        ("min_p", min_p, lambda x: 0 <= x <= 1, "a share in [0, 1], 0 = all"),
    ):
        if isinstance(value, bool) or not isinstance(value, Real):
            raise TypeError(f"{name} is {type(value).__name__}, expected {words}")
        if not inside(value):
            raise ValueError(f"{name} is {value}, expected {words}")
    least = torch.zeros_like(probs[..., :1])  # probability that is still drawn
    if 0 < top_k < probs.shape[-1]:
        least = probs.topk(top_k).values[..., -1:]
    if top_p < 1:
        ordered = probs.where(probs >= least, 0.0).sort(descending=True).values
        above = ordered.cumsum(-1) - ordered  # share of the tokens that are likelier
        drawn = above < top_p * ordered.sum(-1, keepdim=True)
        least = ordered.where(drawn, torch.inf).amin(-1, keepdim=True)
    if min_p:
        least = least.maximum(min_p * probs.amax(-1, keepdim=True))
    return (probs >= least) & (probs > 0)


def _integers(name: str, value: Any, number: int) -> Tensor:
    """A list, array or tensor of integers as int64 on the CPU."""
    try:
        tensor = torch.as_tensor(value, device="cpu")
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(
            f"{name} of completion {number} is {type(value).__name__}, expected a list or an array "
            "of integers"
        ) from error
    if tensor.ndim != 1:
        raise ValueError(
            f"{name} of completion {number} has shape {list(tensor.shape)}, expected one dimension"
        )
    if tensor.numel() and (tensor.is_floating_point() or tensor.dtype == torch.bool):
        raise TypeError(f"{name} of completion {number} have dtype {tensor.dtype}, expected ints")
    return tensor.to(torch.int64)


def _sizes(offsets: Tensor, count: int, number: int) -> Tensor:
    """How many ids each token of completion `number` kept."""
    sizes = offsets.diff()
    if offsets.numel() == 0 or offsets[0] != 0 or offsets[-1] != count or (sizes < 0).any():
        raise ValueError(
            f"offsets of completion {number} are {offsets[:4].tolist()}...{offsets[-1:].tolist()}, "
            f"expected numbers that never fall from 0 to {count}, the number of its token_ids"
        )
    return sizes


def _spread(sizes: Tensor, mask: Tensor) -> Tensor:
    """Sizes of the positions under the mask, and 0 of the others."""
    places = mask.detach().cpu().flatten().bool().nonzero()[:, 0]
    if places.numel() != sizes.numel():
        raise ValueError(
            f"mask has {places.numel()} True, expected one for each of the {sizes.numel()} tokens "
            "that offsets tell of"
        )
    return sizes.new_zeros(mask.numel()).index_copy(0, places, sizes)


def _offsets(sizes: Tensor) -> Tensor:
    return torch.nn.functional.pad(sizes.cumsum(0), (1, 0))
