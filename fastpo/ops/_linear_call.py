"""What the two linear autograd functions share: one call's settings, its chunk buffers, its gradients."""

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


@dataclass(frozen=True, kw_only=True)
class LinearCall:
    """Everything about one call but hidden, weight and bias, which autograd must see."""

    tokens: Tensor  # (N,) int64
    temperature: float | Tensor
    logit_scale: float
    softcap: float | None
    logits_dtype: torch.dtype
    chunk_tokens: int | None
    backend: ModuleType
    live: Tensor | None  # (N,) bool
    live_count: int | None  # how many are live, where the host knows
    compacts: bool  # dead rows are left out of the GEMMs, not only blanked

    def head(self, weight: Tensor, bias: Tensor | None) -> Head:
        """The head, detached: gradients are written by hand."""
        return Head(
            weight=weight.detach(),
            bias=None if bias is None else bias.detach(),
            logit_scale=self.logit_scale,
            softcap=self.softcap,
        )

    def chunks(self, rows_of: Tensor | None, head: Head) -> list[Rows]:
        """Chunks over the rows where `rows_of` (N,) is True, or over all of them for None."""
        rows = self.tokens.numel()
        index = None
        if rows_of is not None and self.compacts:
            index = _chunks.indices(rows_of, self.live_count if rows_of is self.live else None)
        count = rows if index is None else index.numel()
        return _chunks.cut(index, rows, self.chunk_size(count, head))

    def chunk_size(self, rows: int, head: Head) -> int:
        """Tokens per chunk for `rows` tokens in all."""
        if self.chunk_tokens is not None:
            return self.chunk_tokens
        row_bytes = (
            head.weight.shape[0] * self.logits_dtype.itemsize * (1 if self.softcap is None else 2)
        )
        return _chunks.chunk_rows(rows, row_bytes, _chunks.budget_bytes(head.weight.device))

    def row_temperature(self, rows: Rows, head: Head) -> float | Tensor:
        """The temperature of a chunk's rows, as the row primitives take it."""
        per_token = isinstance(self.temperature, Tensor)
        return head.temperature(self.temperature[rows] if per_token else self.temperature)


class Workspace:
    """The chunk-sized buffers, allocated once per pass."""

    def __init__(self, call: LinearCall, head: Head, chunks: list[Rows], *, gradient: bool):
        self.call, self.head = call, head
        rows = max((_length(chunk) for chunk in chunks), default=0)
        vocabulary, device = head.weight.shape[0], head.weight.device
        self._logits = torch.empty(rows, vocabulary, dtype=call.logits_dtype, device=device)
        # tanh must survive the row primitive: the gradient goes through it.
        self._apart = (
            torch.empty_like(self._logits) if gradient and call.softcap is not None else None
        )

    def logits(self, hidden: Tensor) -> Tensor:
        """The logits (n, V) of a chunk of hidden states (n, D)."""
        logits = self._logits[: hidden.shape[0]]
        self.head.logits_(logits, hidden)
        return logits

    def grad_buffer(self, logits: Tensor) -> Tensor:
        """Where the row primitive writes the gradient of `logits`."""
        if self._apart is not None:
            return self._apart[: logits.shape[0]]
        return alias_rows(logits, self.grad_dtype)

    def linear_grad(self, logits: Tensor, grad: Tensor) -> Tensor:
        """The gradient at the GEMM's output, from what the row primitive left in `grad`."""
        if self._apart is None:
            return grad
        self.head.through_tanh_(grad, logits)
        if grad.dtype == self.grad_dtype:
            return grad
        narrow = alias_rows(logits, self.grad_dtype)
        narrow.copy_(grad)
        return narrow

    @property
    def grad_dtype(self) -> torch.dtype:
        """bf16 operands take a bf16 gradient where the GEMM accumulates wide; elsewhere no rounding."""
        weight = self.head.weight
        return (
            weight.dtype if has_wide_gemm(weight.device, weight.dtype) else self.call.logits_dtype
        )


class LinearGrads:
    """Gradients of hidden, weight and bias, accumulated over chunks; None where not needed."""

    def __init__(self, head: Head, hidden: Tensor, needs: tuple[bool, bool, bool]):
        self.head = head
        self.needed = needs
        needs_hidden, needs_weight, needs_bias = needs
        wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        self.hidden = torch.zeros_like(hidden) if needs_hidden else None  # dead rows stay 0
        self.weight = torch.zeros_like(head.weight, dtype=wide) if needs_weight else None
        self.bias = torch.zeros_like(head.bias, dtype=wide) if needs_bias else None

    def add(self, rows: Rows, hidden: Tensor, grad: Tensor) -> None:
        """Add one chunk: its rows, its hidden states (n, D) and the gradient (n, V)."""
        if self.hidden is not None:
            self._hidden_grad(rows, grad)
        if self.weight is not None:
            self.head.add_weight_grad_(self.weight, grad, hidden)
        if self.bias is not None:
            self.head.add_bias_grad_(self.bias, grad)

    def _hidden_grad(self, rows: Rows, grad: Tensor) -> None:
        if isinstance(rows, slice) and grad.dtype == self.hidden.dtype:
            self.head.hidden_grad_(self.hidden[rows], grad)
            return
        part = torch.empty(
            grad.shape[0], self.hidden.shape[1], dtype=grad.dtype, device=grad.device
        )
        self.head.hidden_grad_(part, grad)
        _chunks.put(self.hidden, rows, part)

    def scaled(
        self, factor: Tensor | None, dtype: torch.dtype, backend: ModuleType
    ) -> Iterator[Tensor | None]:
        """hidden, weight, bias gradients times `factor` (0-d, on device), in `dtype`."""
        for grad in (self.hidden, self.weight, self.bias):
            yield None if grad is None else _downcast(grad, factor, dtype, backend)


def _downcast(
    grad: Tensor, factor: Tensor | None, dtype: torch.dtype, backend: ModuleType
) -> Tensor:
    if grad.dtype != dtype:
        return (
            grad.to(dtype)
            if factor is None
            else torch.mul(grad, factor, out=torch.empty_like(grad, dtype=dtype))
        )
    if factor is not None:
        backend.scale_(grad if grad.ndim == 2 else grad[None], factor)
    return grad


def _length(rows: Rows) -> int:
    return rows.stop - rows.start if isinstance(rows, slice) else rows.numel()


def take_hidden(hidden: Tensor, rows: Rows, live: Tensor | None) -> Tensor:
    """A chunk of hidden states (n, D), exactly 0 where `live` is False: NaN there would reach dW."""
    part = hidden[rows]
    return part if live is None else part.masked_fill(~live[rows][:, None], 0)
