"""Where the sequences of a batch of token rows begin and end, and sums over them."""

from __future__ import annotations

import torch
from torch import Tensor


class Segments:
    """N token rows cut into B sequences: a padded [B, T] batch, a packed one, or one unknown run.

    Sums are deterministic: no float atomics on any device, in the forward or the backward pass.
    """

    def __init__(
        self,
        rows: int,
        count: int,
        device: torch.device,
        *,
        width: int | None,
        offsets: Tensor | None,
    ):
        self.rows = rows
        self.count = count
        self.device = device
        self.width = width  # T of a padded batch
        self.offsets = offsets  # (B + 1,) of a packed batch
        self._ids: Tensor | None = None  # computed on first use

    @classmethod
    def padded(cls, batch: int, width: int, device: torch.device) -> Segments:
        """Rows of a [B, T] batch: every batch row is one sequence of T positions."""
        return cls(batch * width, batch, device, width=width, offsets=None)

    @classmethod
    def packed(cls, cu_seqlens: Tensor, rows: int) -> Segments:
        """Rows of a packed [N] batch; `cu_seqlens` (B + 1,) are the cumulative lengths, 0 first."""
        offsets = cu_seqlens.long()
        return cls(rows, offsets.numel() - 1, offsets.device, width=None, offsets=offsets)

    @classmethod
    def from_batch(
        cls, leading: torch.Size, cu_seqlens: Tensor | None, device: torch.device
    ) -> Segments:
        """[B, T], a sequence per row of the batch; [N] with cu_seqlens; or [N], one unknown run."""
        if len(leading) == 2:
            return cls.padded(*leading, device)
        if cu_seqlens is not None:
            return cls.packed(cu_seqlens, leading[0])
        return cls.padded(1, leading[0], device)

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
        if mask is not None:
            values = values.masked_fill(~mask, 0)
        if self.offsets is None:
            return values.view(self.count, self.width).sum(1)
        return _PackedSum.apply(values, self.offsets, self.ids)

    def mean(self, values: Tensor, mask: Tensor | None = None) -> Tensor:
        """(N,) -> (B,) means over each sequence's unmasked rows; 0 for a sequence without any."""
        counted = torch.ones_like(values) if mask is None else mask.to(values.dtype)
        return self.sum(values, mask) / self.sum(counted.detach()).clamp(min=1)

    def max(self, values: Tensor, mask: Tensor) -> Tensor:
        """(N,) -> (B,) maxima of numbers >= 0 over each sequence's unmasked rows; 0 without any."""
        values = values.detach().masked_fill(~mask, 0)
        if values.numel() == 0:
            return values.new_zeros(self.count)
        if self.offsets is None:
            return values.view(self.count, self.width).amax(1)
        return torch.segment_reduce(values, "max", offsets=self.offsets, unsafe=True, initial=0)

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
