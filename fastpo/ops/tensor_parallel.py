"""The row primitives over a vocabulary sharded along V: a rank holds some columns of each row."""

from __future__ import annotations

from types import ModuleType

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from fastpo.backends.base import (
    KeptGrads,
    KeptRows,
    KeptSets,
    RowStats,
)
from fastpo.backends.torch import kept_stats_of
from fastpo.backends.two_step import two_step_policy_loss

_FAR_BELOW = -1e18  # of a logit: p = 0, and its square is finite


class VocabularyShard:
    """A backend (see `fastpo.backends.base.Backend`) whose logits are this rank's columns.

    One all_gather of four floats per row merges the statistics, so every rank returns those of the
    whole vocabulary; gradients are of the local columns. Token ids are the whole vocabulary's.
    """

    def __init__(
        self,
        backend: ModuleType,
        group: dist.ProcessGroup,
        local: int,
        place: tuple[Tensor, Tensor],
    ):
        """local: columns of this rank; place: its first one, and those of all ranks."""
        self.backend, self.group, self.local = backend, group, local
        self.scale_ = backend.scale_
        self.metric_sums = getattr(backend, "metric_sums", None)
        # On device: reading them on the host would wait for the GPU.
        self.start, self.vocabulary = place

    @classmethod
    def of_head(
        cls, backend: ModuleType, group: dist.ProcessGroup, weight: Tensor
    ) -> VocabularyShard:
        """Columns that this rank's part (V_local, D) of a head makes."""
        return cls(backend, group, weight.shape[0], _place_of_head(weight, group))

    @classmethod
    def of_logits(
        cls, backend: ModuleType, group: dist.ProcessGroup, logits: Tensor
    ) -> VocabularyShard:
        """Columns [..., V_local] that the caller has made."""
        local = logits.shape[-1]
        return cls(backend, group, local, _place(local, logits.device, group))

    def row_stats(
        self,
        logits: Tensor,
        tokens: Tensor,
        temperature: float | Tensor,
        mask: Tensor | None = None,
    ) -> RowStats:
        """Merge in log space. With shard i: m_i, log s_i, and E_i = log s_i - H_i = E_p[u - m_i]:

        M = max m_i     log S = logsumexp(m_i - M + log s_i)
        p_i = exp(m_i - M + log s_i - log S)
        E = sum_i p_i (E_i + m_i - M)     H = log S - E
        logprob = (u_y - m_i - log s_i) + log s_i + m_i - M - log S on the shard that owns y
        """
        local = self._local_tokens(tokens)
        owned = (local >= 0) & (local < self.local)
        stats = self.backend.row_stats(logits, local.where(owned, 0), temperature, mask)
        target = (stats.logprobs + stats.log_sum).where(owned, -torch.inf)  # u_y - m_i
        packed = torch.stack(
            [stats.row_max, stats.log_sum, stats.log_sum - stats.entropy, target], dim=1
        )
        return _merge(_gather(packed, self.group), self._outside(tokens), mask)

    def row_grad(self, logits: Tensor, tokens: Tensor, *arguments: object) -> None:
        """The local columns' gradient, from merged statistics."""
        self.backend.row_grad(logits, self._local_tokens(tokens), *arguments)

    row_policy_loss = two_step_policy_loss  # statistics must be merged before there is a loss

    def kept_stats(self, rows: KeptRows, mask: Tensor | None = None) -> tuple[RowStats, Tensor]:
        """Every rank's own ids, then one sum of a float per id. Ids of other ranks are computed as
        another one, all rows of the weight the same, for how many they are the host does not know.
        """
        local = self._local_sets(rows.kept, rows.tokens)
        _, logits = self.backend.kept_stats(rows._replace(kept=local), mask)
        logits = logits.masked_fill_(~self.owns(rows.kept.ids), 0)
        dist.all_reduce(logits, group=self.group)
        return kept_stats_of(logits, rows.tokens, rows.kept, rows.temperature, mask), logits

    def kept_grad(
        self,
        rows: KeptRows,
        stats: RowStats,
        logits: Tensor,
        logprob_grad: Tensor,
        entropy_grad: Tensor | None,
        grads: KeptGrads,
        add: bool = False,
    ) -> None:
        """The gradient of the local ids, and of the hidden states the sum over all ranks."""
        logits = logits.masked_fill(~self.owns(rows.kept.ids), _FAR_BELOW)  # p = 0
        total = grads.hidden
        if total is not None:
            total = torch.zeros_like(total, dtype=torch.promote_types(total.dtype, torch.float32))
        local = rows._replace(
            kept=self._local_sets(rows.kept, rows.tokens), tokens=self._local_tokens(rows.tokens)
        )
        incoming = (stats, logits, logprob_grad, entropy_grad)
        self.backend.kept_grad(local, *incoming, grads._replace(hidden=total), add=add)
        if total is not None:
            self.sum_(total)
            has_ids = rows.kept.offsets.diff() > 0
            grads.hidden.copy_(total.where(has_ids[:, None], grads.hidden))

    def owns(self, ids: Tensor) -> Tensor:
        """Which ids are of this rank's columns."""
        return (ids >= self.start) & (ids < self.start + self.local)

    def gather_kept(
        self, logits: Tensor, rows: tuple[Tensor, ...], ids: Tensor, dtype: torch.dtype
    ) -> Tensor:
        """Logits (M,) of ids (M,) wherever their columns are, differentiable in the local ones."""
        owned = self.owns(ids)
        own = logits[(*rows, self._local_tokens(ids).where(owned, 0))]
        return _Sum.apply(own.masked_fill(~owned, 0).to(dtype), self.group)

    def _local_sets(self, kept: KeptSets, tokens: Tensor) -> KeptSets:
        """Local ids, with that of another column than the token's in place of foreign ones."""
        if self.local == 1:
            raise ValueError(
                "kept_tokens with tp_group and a shard of 1 column, expected at least 2 per rank"
            )
        sizes = kept.offsets.diff()
        token = self._local_tokens(tokens).repeat_interleave(sizes, output_size=kept.ids.numel())
        other = (token + 1) % self.local
        ids = self._local_tokens(kept.ids).where(self.owns(kept.ids), other)
        return KeptSets(ids, kept.offsets)

    def sum_(self, hidden_grad: Tensor) -> None:
        """Add up the shards' contributions to the gradient of the hidden states."""
        dist.all_reduce(hidden_grad, group=self.group)

    def _local_tokens(self, tokens: Tensor) -> Tensor:
        return tokens - self.start

    def _outside(self, tokens: Tensor) -> Tensor:
        return (tokens < 0) | (tokens >= self.vocabulary)


_places = WeakTensorKeyDictionary()  # of heads: {group: (first column, columns in all)}


def _place_of_head(weight: Tensor, group: dist.ProcessGroup) -> tuple[Tensor, Tensor]:
    """The first of this rank's columns, and the size of the whole vocabulary. 0-d, on device.

    Gathered once per head, not per call. The key is the tensor itself: every rank asks for its part
    of the same head at the same time, while two heads may have shards of one size on this rank and
    of different sizes on another, which would then gather alone and wait forever.
    """
    known = _places.setdefault(weight, {})
    if group not in known:
        known[group] = _place(weight.shape[0], weight.device, group)
    return known[group]


def _place(local: int, device: torch.device, group: dist.ProcessGroup) -> tuple[Tensor, Tensor]:
    sizes = _gather(torch.full((1,), local, device=device), group)[:, 0]  # (ranks,)
    return sizes[: dist.get_rank(group)].sum(), sizes.sum()


class _Sum(torch.autograd.Function):
    """The sum over ranks of (M,), of which every rank then makes the same loss."""

    @staticmethod
    def forward(ctx, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        total = x.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def _gather(local: Tensor, group: dist.ProcessGroup) -> Tensor:
    """(ranks, ...) every rank's `local`, which has the same shape everywhere."""
    ranks = dist.get_world_size(group)
    gathered = local.new_empty((ranks * local.shape[0], *local.shape[1:]))
    dist.all_gather_into_tensor(gathered, local.contiguous(), group=group)
    return gathered.view(ranks, *local.shape)


def _merge(packed: Tensor, outside: Tensor, mask: Tensor | None) -> RowStats:
    """packed (ranks, n, 4): row max, log sum, mean shift, shifted target logit; to (n,) each."""
    maxima, log_sums, shifts, targets = packed.unbind(-1)  # (ranks, n)
    # A shard of -inf logits alone (padded vocabulary rows) has NaN statistics, -inf minus -inf.
    # It has no part in the sum, but its NaN would have one in the maximum and in 0 * NaN below.
    empty = maxima == -torch.inf
    log_sums, targets = log_sums.masked_fill(empty, 0), targets.masked_fill(empty, -torch.inf)
    row_max = maxima.amax(0)
    offsets = maxima - row_max
    log_sum = torch.logsumexp(offsets + log_sums, 0)
    probs = (offsets + log_sums - log_sum).exp()
    # Such a shard has p = 0; 0 * NaN must not reach the sum.
    mean_shift = (probs * (shifts + offsets).masked_fill(probs == 0, 0)).sum(0)
    logprobs = (targets + offsets).amax(0) - log_sum
    merged = RowStats(
        logprobs.masked_fill(outside, torch.nan), log_sum - mean_shift, row_max, log_sum
    )
    return merged if mask is None else RowStats(*(x.where(mask, 0) for x in merged))
