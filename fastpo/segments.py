"""Where the sequences of a batch of token rows begin and end, and sums over them."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


class Segments:
    """N token rows cut into B sequences: a padded [B, T] batch, a packed one, or one unknown run.

    Sums are deterministic: no float atomics on any device, in the forward or the backward pass.

    Under context parallelism every rank of `group` has some rows of every sequence, perhaps none:
    sums, means and maxima are then of all ranks' rows, one all-reduce each whatever a rank holds
    (a mean: of sum and count at once), and so is the gradient of a sum, of one loss of which each
    rank makes its share.
    """

    def __init__(
        self,
        rows: int,
        count: int,
        device: torch.device,
        *,
        width: int | None,
        offsets: Tensor | None,
        group: dist.ProcessGroup | None = None,
    ):
        self.rows = rows
        self.count = count
        self.device = device
        self.width = width  # T of a padded batch
        self.offsets = offsets  # (B + 1,) of a packed batch
        self.group = None if group is None or group.size() == 1 else group
        self._ids: Tensor | None = None  # computed on first use

    @classmethod
    def padded(
        cls,
        batch: int,
        width: int,
        device: torch.device,
        group: dist.ProcessGroup | None = None,
    ) -> Segments:
        """Rows of a [B, T] batch: every batch row is one sequence of T positions."""
        return cls(batch * width, batch, device, width=width, offsets=None, group=group)

    @classmethod
    def packed(
        cls, cu_seqlens: Tensor, rows: int, group: dist.ProcessGroup | None = None
    ) -> Segments:
        """Rows of a packed [N] batch; `cu_seqlens` (B + 1,) are the cumulative lengths, 0 first."""
        offsets = cu_seqlens.long()
        count = offsets.numel() - 1
        return cls(rows, count, offsets.device, width=None, offsets=offsets, group=group)

    @classmethod
    def from_batch(
        cls,
        leading: torch.Size,
        cu_seqlens: Tensor | None,
        device: torch.device,
        group: dist.ProcessGroup | None = None,
    ) -> Segments:
        """[B, T], a sequence per row of the batch; [N] with cu_seqlens; or [N], one unknown run."""
        if len(leading) == 2:
            return cls.padded(*leading, device, group)
        if cu_seqlens is not None:
            return cls.packed(cu_seqlens, leading[0], group)
        return cls.padded(1, leading[0], device, group)

    @property
    def ids(self) -> Tensor:
        """(N,) the sequence of every row, found without a host synchronization."""
        if self._ids is None:
            rows = torch.arange(self.rows, device=self.device)
            if self.offsets is None:
                self._ids = rows // max(self.width, 1)
            else:
                # How many sequences have ended at or before the row; right=True counts those that
                # end exactly there, empty ones included.
                self._ids = torch.searchsorted(self.offsets[1:].contiguous(), rows, right=True)
        return self._ids

    @property
    def is_last(self) -> Tensor:
        """(N,) bool: the row is the last of its sequence."""
        ids = self.ids
        return torch.cat([ids[1:] != ids[:-1], torch.ones_like(ids[:1], dtype=torch.bool)])

    def sum(self, values: Tensor, mask: Tensor | None = None) -> Tensor:
        """(N,) -> (B,) sums over each sequence's rows where the mask is True.

        What stands elsewhere is not used, NaN and inf included; a sequence without rows sums to 0.
        """
        return self._of_all_ranks(self.own_sum(values, mask))

    def mean(self, values: Tensor, mask: Tensor | None = None) -> Tensor:
        """(N,) -> (B,) means over each sequence's unmasked rows; 0 for a sequence without any."""
        counted = torch.ones_like(values) if mask is None else mask.to(values.dtype)
        total, count = self.own_sum(values, mask), self.own_sum(counted.detach())
        if self.group is not None:
            total, count = self._of_all_ranks(torch.stack([total, count]))
        return total / count.detach().clamp(min=1)

    def total(self, values: Tensor) -> Tensor:
        """(..., N) -> (...) sums over all rows of the batch."""
        return self._of_all_ranks(values.sum(-1))

    def largest(self, values: Tensor, mask: Tensor) -> Tensor:
        """(..., N) -> (...) maxima over all unmasked rows of the batch, -inf without any."""
        padded = torch.nn.functional.pad(
            values.masked_fill(~mask, -torch.inf), (0, 1), value=-torch.inf
        )
        return self._largest_of_ranks(padded.amax(-1))

    def max(self, values: Tensor, mask: Tensor) -> Tensor:
        """(N,) -> (B,) maxima of numbers >= 0 over each sequence's unmasked rows; 0 without any."""
        values = values.detach().masked_fill(~mask, 0)
        if values.numel() == 0:
            largest = values.new_zeros(self.count)
        elif self.offsets is None:
            largest = values.view(self.count, self.width).amax(1)
        else:
            offsets = {"offsets": self.offsets, "unsafe": True, "initial": 0}
            largest = torch.segment_reduce(values, "max", **offsets)
        return self._largest_of_ranks(largest)

    def own_sum(self, values: Tensor, mask: Tensor | None = None) -> Tensor:
        """`sum` over this rank's rows alone."""
        if mask is not None:
            values = values.masked_fill(~mask, 0)
        if self.offsets is None:
            return values.view(self.count, self.width).sum(1)
        return _PackedSum.apply(values, self.offsets, self.ids)

    def _of_all_ranks(self, sums: Tensor) -> Tensor:
        return sums if self.group is None else _SumOverRanks.apply(sums, self.group)

    def _largest_of_ranks(self, largest: Tensor) -> Tensor:
        if self.group is not None:
            dist.all_reduce(largest, dist.ReduceOp.MAX, group=self.group)
        return largest

    def broadcast(self, values: Tensor) -> Tensor:
        """(B,) -> (N,) give every row its sequence's value."""
        if self.offsets is None:
            return values.unsqueeze(1).expand(self.count, self.width).reshape(-1)
        return _PackedBroadcast.apply(values, self.offsets, self.ids)


class _PackedSum(torch.autograd.Function):
    """Sum over segments; its gradient is a gather, where torch's own walks a segment per thread."""

    @staticmethod
    def forward(ctx, values: Tensor, offsets: Tensor, ids: Tensor) -> Tensor:
        ctx.save_for_backward(offsets, ids)
        if values.numel() == 0:  # torch divides by the number of rows on CUDA
            return values.new_zeros(offsets.numel() - 1)
        return torch.segment_reduce(values, "sum", offsets=offsets, unsafe=True)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return _PackedBroadcast.apply(grad, *ctx.saved_tensors), None, None


class _PackedBroadcast(torch.autograd.Function):
    """A gather by segment; its gradient is the segment sum, where torch's own adds with atomics."""

    @staticmethod
    def forward(ctx, values: Tensor, offsets: Tensor, ids: Tensor) -> Tensor:
        ctx.save_for_backward(offsets, ids)
        return values[ids]

    @staticmethod
    def backward(ctx, grad: Tensor):
        return _PackedSum.apply(grad, *ctx.saved_tensors), None, None


class _SumOverRanks(torch.autograd.Function):
    """The sum of every rank's tensor. What each rank's share of the loss makes of it adds up, too:
    the gradient of the whole loss, which is the sum of the shares."""

    @staticmethod
    def forward(ctx, sums: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        total = sums.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return _SumOverRanks.apply(grad, ctx.group), None
