"""The row primitives over a vocabulary sharded along V: a rank holds some columns of each row."""

from __future__ import annotations

from types import ModuleType

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from fastpo.backends.base import RowInputs, RowLosses, RowStats, token_level_loss, two_step
from fastpo.objective import Objective


class VocabularyShard:
    """A backend (see `fastpo.backends.base.Backend`) whose logits are this rank's columns.

    One all_gather of four floats per row merges the statistics, so every rank returns those of the
    whole vocabulary; gradients are of the local columns. Token ids are the whole vocabulary's.
    """

    def __init__(self, backend: ModuleType, group: dist.ProcessGroup, weight: Tensor):
        """weight: this rank's part (V_local, D) of the head."""
        self.backend, self.group, self.local = backend, group, weight.shape[0]
        self.scale_ = backend.scale_
        self.metric_sums = getattr(backend, "metric_sums", None)
        # On device: reading them on the host would wait for the GPU.
        self.start, self.vocabulary = _place_of(weight, group)

    def row_stats(
        self,
        logits: Tensor,
        tokens: Tensor,
        temperature: float | Tensor,
        live: Tensor | None = None,
    ) -> RowStats:
        """Merge in log space. With shard i: m_i, log s_i, and E_i = log s_i - H_i = E_p[u - m_i]:

        M = max m_i     log S = logsumexp(m_i - M + log s_i)
        p_i = exp(m_i - M + log s_i - log S)
        E = sum_i p_i (E_i + m_i - M)     H = log S - E
        logprob = (u_y - m_i - log s_i) + log s_i + m_i - M - log S on the shard that owns y
        """
        local = self._local_tokens(tokens)
        owned = (local >= 0) & (local < self.local)
        stats = self.backend.row_stats(logits, local.where(owned, 0), temperature, live)
        target = (stats.logprobs + stats.log_sum).where(owned, -torch.inf)  # u_y - m_i
        packed = torch.stack(
            [stats.row_max, stats.log_sum, stats.log_sum - stats.entropy, target], dim=1
        )
        return _merge(_gather(packed, self.group), self._outside(tokens), live)

    def row_grad(
        self,
        logits: Tensor,
        tokens: Tensor,
        stats: RowStats,
        logprob_grad: Tensor,
        entropy_grad: Tensor | None,
        temperature: float | Tensor,
        out: Tensor,
    ) -> None:
        """The local columns' gradient, from merged statistics."""
        self.backend.row_grad(
            logits,
            self._local_tokens(tokens),
            stats,
            logprob_grad,
            entropy_grad,
            temperature,
            out,
        )

    def row_policy_loss(
        self,
        logits: Tensor,
        tokens: Tensor,
        inputs: RowInputs,
        objective: Objective,
        temperature: float | Tensor,
        out: Tensor | None,
    ) -> RowLosses:
        """Statistics, then the specification's loss on (n,) numbers, then the gradient."""
        live = inputs.live
        loss_of = token_level_loss(inputs, objective, live)
        return two_step(self, logits, tokens, temperature, out, live=live, loss_of=loss_of)

    def sum_(self, hidden_grad: Tensor) -> None:
        """Add up the shards' contributions to the gradient of the hidden states."""
        dist.all_reduce(hidden_grad, group=self.group)

    def _local_tokens(self, tokens: Tensor) -> Tensor:
        return tokens - self.start

    def _outside(self, tokens: Tensor) -> Tensor:
        return (tokens < 0) | (tokens >= self.vocabulary)


_places = WeakTensorKeyDictionary()  # of heads: {group: (first column, columns in all)}


def _place_of(weight: Tensor, group: dist.ProcessGroup) -> tuple[Tensor, Tensor]:
    """The first of this rank's columns, and the size of the whole vocabulary. 0-d, on device.

    Gathered once per head, not per call. The key is the tensor itself: every rank asks for its part
    of the same head at the same time, while two heads may have shards of one size on this rank and
    of different sizes on another, which would then gather alone and wait forever.
    """
    known = _places.setdefault(weight, {})
    if group not in known:
        own = torch.full((1,), weight.shape[0], device=weight.device)
        sizes = _gather(own, group)[:, 0]  # (ranks,)
        known[group] = sizes[: dist.get_rank(group)].sum(), sizes.sum()
    return known[group]


def _gather(local: Tensor, group: dist.ProcessGroup) -> Tensor:
    """(ranks, ...) every rank's `local`, which has the same shape everywhere."""
    ranks = dist.get_world_size(group)
    gathered = local.new_empty((ranks * local.shape[0], *local.shape[1:]))
    dist.all_gather_into_tensor(gathered, local.contiguous(), group=group)
    return gathered.view(ranks, *local.shape)


def _merge(packed: Tensor, outside: Tensor, live: Tensor | None) -> RowStats:
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
    return merged if live is None else RowStats(*(x.where(live, 0) for x in merged))
