"""Kept sets: log-probs over the ids that the sampler could choose each token from (top-k, top-p).

Trained against the whole vocabulary, the ratio of such a token carries the kept mass: 0.9 on
average at top_p = 0.8 although nothing has changed. Over the set that was kept it is 1.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastpo.backends.base import KeptSets
from fastpo.backends.torch import kept_stats_of
from fastpo.ops import checks
from fastpo.ops.batch import flat_rows
from fastpo.ops.tensor_parallel import VocabularyShard


class Kept(NamedTuple):
    """The kept sets of a call, and which rows have none."""

    sets: KeptSets
    dense: Tensor | None  # (N,) bool: rows over the whole vocabulary; None = the host knows of none

    @classmethod
    def from_inputs(
        cls, kept_tokens: Tensor | None, kept_offsets: Tensor | None, mask: Tensor | None
    ) -> Kept | None:
        """What `check_kept` has checked; `mask` (N,). Masked rows are neither kept nor dense."""
        if kept_tokens is None:
            return None
        sets = KeptSets(flat_rows(kept_tokens, torch.int64), flat_rows(kept_offsets, torch.int64))
        dense = sets.offsets.diff() == 0
        dense = dense if mask is None else dense & mask
        if checks.inspects_values(dense) and not bool(dense.any()):
            dense = None
        return cls(sets, dense)


def check_kept(
    kept_tokens: object,
    kept_offsets: object,
    tokens: Tensor,
    mask: Tensor | None,
    vocabulary: int | Tensor,
    *,
    inplace: bool = False,
) -> None:
    """[M] ids and [N + 1] offsets, or neither. Values are read on CPU, and in debug mode."""
    if kept_tokens is None and kept_offsets is None:
        return
    if inplace:
        raise ValueError(
            "inplace with kept_tokens: their gradient is scattered into a new tensor of zeros, "
            "expected inplace=False"
        )
    if kept_tokens is None or kept_offsets is None:
        given, missing = "kept_tokens", "kept_offsets"
        if kept_tokens is None:
            given, missing = missing, given
        raise ValueError(f"{given} is given without {missing}: pass both, or neither")
    rows = tokens.numel()
    for name, value, length in (
        ("kept_tokens", kept_tokens, None),
        ("kept_offsets", kept_offsets, rows + 1),
    ):
        shape = "[M]" if length is None else f"[{length}], one more than there are tokens"
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} is {type(value).__name__}, expected a tensor {shape}")
        if value.ndim != 1 or (length is not None and value.numel() != length):
            raise ValueError(f"{name} has shape {list(value.shape)}, expected {shape}")
        if value.dtype not in (torch.int64, torch.int32):
            raise TypeError(f"{name} have dtype {value.dtype}, expected int64 or int32")
        checks.check_device(name, value, tokens)
    if checks.inspects_values(kept_tokens):
        _check_offsets(kept_offsets, kept_tokens.numel())
        _check_ids(kept_tokens, kept_offsets, flat_rows(tokens), mask, int(vocabulary))


def _check_offsets(offsets: Tensor, count: int) -> None:
    if offsets[0] != 0 or offsets[-1] != count:
        raise ValueError(
            f"kept_offsets go from {int(offsets[0])} to {int(offsets[-1])}, expected from 0 to "
            f"{count}, the number of kept_tokens"
        )
    falls = (offsets.diff() < 0).nonzero()
    if falls.numel():
        row = int(falls[0])
        raise ValueError(
            f"kept_offsets fall from {int(offsets[row])} to {int(offsets[row + 1])} at row {row}, "
            "expected offsets that never fall: those of a row's ids follow those of the row before"
        )


def _check_ids(
    ids: Tensor, offsets: Tensor, tokens: Tensor, mask: Tensor | None, vocabulary: int
) -> None:
    """Inside the vocabulary, no id twice in a row, the sampled token among its row's."""
    sizes = offsets.diff()
    rows = torch.arange(sizes.numel(), device=ids.device).repeat_interleave(sizes)
    outside = ((ids < 0) | (ids >= vocabulary)).nonzero()
    if outside.numel():
        at = int(outside[0])
        raise ValueError(
            f"kept_tokens[{at}] is {int(ids[at])} (row {int(rows[at])}), expected an id in "
            f"[0, {vocabulary})"
        )
    keys = (rows * vocabulary + ids).sort().values
    twice = (keys[1:] == keys[:-1]).nonzero()
    if twice.numel():
        key = int(keys[twice[0]])
        raise ValueError(
            f"kept_tokens hold {key % vocabulary} twice in row {key // vocabulary}, expected every "
            "id once: it would count twice in the softmax"
        )
    missing = (sizes > 0).index_fill(0, rows[ids == tokens[rows]], False)
    if mask is not None:
        missing &= mask.reshape(-1).bool()
    if missing.any():
        row = int(missing.nonzero()[0])
        raise ValueError(
            f"kept_tokens of row {row} do not hold its token {int(tokens[row])}, expected the ids "
            "that it was sampled from: are tokens and kept_offsets shifted against each other?"
        )


def kept_logprobs(
    logits: Tensor,
    tokens: Tensor,
    kept: KeptSets,
    temperature: float | Tensor,
    mask: Tensor | None,
    shard: VocabularyShard | None = None,
) -> tuple[Tensor, Tensor]:
    """Log-probs and entropies (N,) of the rows with ids, 0 elsewhere, differentiable in `logits`.

    logits [..., V], or the columns of a shard; the rest (N,). A few numbers a row are read:
    autograd writes the gradient.
    """
    every = torch.arange(tokens.numel(), device=tokens.device)
    rows = every.repeat_interleave(kept.offsets.diff(), output_size=kept.ids.numel())
    where = (rows,) if logits.ndim == 2 else (rows // logits.shape[1], rows % logits.shape[1])
    wide = checks.wide_dtype(logits.dtype)
    if shard is None:
        z = logits[(*where, kept.ids)].to(wide)
    else:
        z = shard.gather_kept(logits, where, kept.ids, wide)
    stats = kept_stats_of(z, tokens, kept, temperature, mask)
    return stats.logprobs, stats.entropy
