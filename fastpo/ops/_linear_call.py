"""What the linear autograd functions share: one call's settings, chunk buffers and gradients."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from fastpo.backends.base import alias_rows
from fastpo.ops import _chunks
from fastpo.ops._chunks import Rows
from fastpo.ops._gemm import has_wide_gemm
from fastpo.ops._head import Head
from fastpo.ops._tensor_parallel import VocabularyShard

DOWNCAST_ELEMENTS = 2**24  # torch's CPU multiplication into a narrower dtype makes a wide temporary


@dataclass(frozen=True, kw_only=True)
class LinearCall:
    """Everything about one call but hidden, weight and bias, which autograd must see."""

    tokens: Tensor  # (N,) int64
    temperature: float | Tensor  # or (N,)
    logit_scale: float
    softcap: float | None
    logits_dtype: torch.dtype
    chunk_tokens: int | None
    backend: ModuleType | VocabularyShard
    live: Tensor | None  # (N,) bool; None = all
    index: Tensor | None  # (n,) the live rows, so that no other enters a GEMM; None = all enter
    contradicted: Tensor | None  # 0-d bool: index is not the live rows, as found out on device

    @property
    def blank(self) -> Tensor | None:
        """(N,) bool where dead rows do enter the GEMMs and must hold zeros, for NaN * 0 is NaN."""
        return self.live if self.index is None else None

    @property
    def may_look(self) -> bool:
        """Whether values may steer the host: on CPU, where reading them synchronizes nothing."""
        return self.tokens.device.type == "cpu"

    def visible(self, *outputs: Tensor) -> tuple[Tensor, ...]:
        """The outputs, NaN if the caller's live rows contradict the mask."""
        if self.contradicted is None:
            return outputs
        return tuple(x.masked_fill(self.contradicted, torch.nan) for x in outputs)

    def head(self, weight: Tensor, bias: Tensor | None) -> Head:
        """The head, detached: gradients are written by hand."""
        return Head(
            weight=weight.detach(),
            bias=None if bias is None else bias.detach(),
            logit_scale=self.logit_scale,
            softcap=self.softcap,
        )

    def chunks(self, head: Head, only: Tensor | None = None) -> list[Rows]:
        """Chunks over the live rows, or those of them where `only` (N,) is True."""
        index = self.index
        if only is not None:
            index = only.nonzero()[:, 0] if index is None else index[only[index]]
        rows = self.tokens.numel() if index is None else index.numel()
        return _chunks.cut(index, self.tokens.numel(), self.chunk_rows(rows, head.weight))

    def chunk_rows(self, rows: int, weight: Tensor) -> int:
        """Tokens per chunk for `rows` tokens in all."""
        if self.chunk_tokens is not None:
            return self.chunk_tokens
        if isinstance(self.backend, VocabularyShard):
            # Ranks with ragged shards and other free memory must cut at the same tokens.
            return _chunks.chunk_rows(rows, 1, _chunks.SHARDED_ROWS)
        buffers = 1 if self.softcap is None else 2
        row_bytes = weight.shape[0] * self.logits_dtype.itemsize * buffers
        return _chunks.chunk_rows(rows, row_bytes, _chunks.budget_bytes(weight.device))

    def row_temperature(self, rows: Rows, head: Head) -> float | Tensor:
        """The temperature of a chunk's rows, as the row primitives take it."""
        per_token = isinstance(self.temperature, Tensor)
        return head.temperature(self.temperature[rows] if per_token else self.temperature)


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """Rows on their way through the head. The padded tensors have rows of zeros at the end."""

    rows: Rows
    hidden: Tensor  # (padded n, D)
    padded_logits: Tensor  # (padded n, V)
    padded_grad: Tensor | None  # (padded n, V), may share storage with the logits

    @property
    def logits(self) -> Tensor:
        """(n, V)"""
        return self.padded_logits[: _chunks.length(self.rows)]

    @property
    def grad(self) -> Tensor | None:
        """(n, V): where the row primitive leaves the gradient of the logits."""
        return None if self.padded_grad is None else self.padded_grad[: _chunks.length(self.rows)]


class Workspace:
    """The chunk-sized buffers of one pass, allocated once, and the steps through them."""

    def __init__(self, call: LinearCall, head: Head, chunks: list[Rows], *, gradient: bool):
        self.call, self.head = call, head
        rows = _chunks.padded(max((_chunks.length(chunk) for chunk in chunks), default=0))
        vocabulary, device = head.weight.shape[0], head.weight.device
        self._logits = torch.empty(rows, vocabulary, dtype=call.logits_dtype, device=device)
        # tanh must survive the row primitive: the gradient goes on through it.
        self._apart = torch.empty_like(self._logits) if gradient and head.softcap else None

    def load(self, hidden: Tensor, rows: Rows, *, gradient: bool) -> Chunk:
        """The logits of a chunk, and room for their gradient."""
        part = _chunks.take(hidden, rows)
        if self.call.blank is not None:
            part = part.masked_fill(~self.call.blank[rows][:, None], 0)
        part = _chunks.pad(part)
        logits = self._logits[: part.shape[0]]
        self.head.logits_(logits, part)
        grad = self._grad_buffer(logits) if gradient else None
        return Chunk(rows=rows, hidden=part, padded_logits=logits, padded_grad=grad)

    def _grad_buffer(self, logits: Tensor) -> Tensor:
        if self._apart is not None:
            return self._apart[: logits.shape[0]]
        return alias_rows(logits, self.grad_dtype)

    def linear_grad(self, chunk: Chunk) -> Tensor:
        """(padded n, V) at the GEMM's output, from what the row primitive left in `chunk.grad`."""
        grad = chunk.padded_grad
        grad[_chunks.length(chunk.rows) :].zero_()
        if self._apart is not None:
            self.head.through_tanh_(grad, chunk.padded_logits)
        if grad.dtype == self.grad_dtype:
            return grad
        narrow = alias_rows(chunk.padded_logits, self.grad_dtype)
        narrow.copy_(grad)
        return narrow

    @property
    def grad_dtype(self) -> torch.dtype:
        """bf16 where the GEMM accumulates bf16 operands wide; else no rounding.

        Not fp16: an unscaled policy gradient, about p / N, is below its smallest number.
        """
        weight = self.head.weight
        narrow = weight.dtype == torch.bfloat16 and has_wide_gemm(weight.device, weight.dtype)
        return torch.bfloat16 if narrow else self.call.logits_dtype


class LinearGrads:
    """Gradients of hidden, weight and bias, summed over chunks; None where not needed."""

    def __init__(self, head: Head, hidden: Tensor, needs: tuple[bool, bool, bool]):
        self.head, self.dtype = head, hidden.dtype
        wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        # fp16 would underflow before an upstream loss scale is multiplied in.
        rows_dtype = wide if hidden.dtype == torch.float16 else hidden.dtype
        shape = (hidden.shape[:-1].numel(), hidden.shape[-1])
        self.shape = hidden.shape
        device = hidden.device
        self.hidden = torch.zeros(shape, dtype=rows_dtype, device=device) if needs[0] else None
        self.weight = torch.zeros_like(head.weight, dtype=wide) if needs[1] else None
        self.bias = torch.zeros_like(head.bias, dtype=wide) if needs[2] else None

    def add(self, chunk: Chunk, grad: Tensor) -> None:
        """Add a chunk, given the gradient (padded n, V) at the GEMM's output."""
        if self.hidden is not None:
            self._put_hidden(chunk, grad)
        if self.weight is not None:
            self.head.add_weight_grad_(self.weight, grad, chunk.hidden)
        if self.bias is not None:
            self.head.add_bias_grad_(self.bias, grad)

    def _put_hidden(self, chunk: Chunk, grad: Tensor) -> None:
        count, rows = grad.shape[0], chunk.rows
        if isinstance(rows, slice) and count == _chunks.length(rows):
            target = self.hidden[rows]
            if target.dtype == grad.dtype:
                self.head.hidden_grad_(target, grad)
                return
        part = torch.empty(count, self.shape[-1], dtype=grad.dtype, device=grad.device)
        self.head.hidden_grad_(part, grad)
        _chunks.put(self.hidden, rows, part[: _chunks.length(rows)])

    def scaled(self, factor: Tensor | None, backend) -> Iterator[Tensor | None]:
        """hidden, weight, bias gradients in the inputs' dtype, times `factor` (0-d, on device)."""
        for grad in (self.hidden, self.weight, self.bias):
            scaled = None if grad is None else _downcast(grad, factor, self.dtype, backend)
            yield scaled.view(self.shape) if grad is self.hidden and grad is not None else scaled


def _downcast(grad: Tensor, factor: Tensor | None, dtype: torch.dtype, backend) -> Tensor:
    if grad.dtype == dtype:
        if factor is not None:
            backend.scale_(grad if grad.ndim == 2 else grad[None], factor)
        return grad
    if factor is None:
        return grad.to(dtype)
    out = torch.empty_like(grad, dtype=dtype)
    rows = max(DOWNCAST_ELEMENTS // grad[0].numel(), 1)
    for source, target in zip(grad.split(rows), out.split(rows), strict=True):
        torch.mul(source, factor, out=target)
    return out
