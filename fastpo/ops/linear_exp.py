"""The linear ops on the backends "triton-exp": E = exp(u - o) in place of a chunk's logits.

The same loop over chunks as with logits, with other buffers: `Workspace` and `LinearGrads` have
counterparts here. A chunk is as many rows as make E as large as an fp32 gradient of the weight,
2 D: one GEMM each for logits, hidden and weight, and for N <= 2 D the last of them writes the
weight's gradient in its own dtype, without an fp32 sum.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from fastpo.backends import triton_exp
from fastpo.backends.triton_exp import ExpHead, ExpRows
from fastpo.ops.head import Head, add_matmul_
from fastpo.ops.linear_chunks import (
    ChunkRows,
    LinearCall,
    LinearGrads,
    Workspace,
    length,
    put,
    take,
)
from fastpo.ops.tensor_parallel import VocabularyShard


class ExpShard(VocabularyShard):
    """A rank's columns of E. The sums of all ranks are sums: `exp_rows` adds them up, and what
    follows needs no other number of another rank."""

    row_stats = staticmethod(triton_exp.row_stats)
    row_grad = staticmethod(triton_exp.row_grad)
    row_policy_loss = staticmethod(triton_exp.row_policy_loss)

    def max_(self, x: Tensor) -> None:
        """See `fastpo.backends.triton_exp.Shard`."""
        dist.all_reduce(x, dist.ReduceOp.MAX, group=self.group)


@dataclass(frozen=True, kw_only=True)
class ExpChunk:
    """Rows on their way through the head."""

    rows: ChunkRows
    hidden: Tensor  # (n, D), zeros in dead rows
    logits: ExpRows  # what the row primitives take for logits
    grad: ExpRows | None  # the same, where they are to make a gradient of it


class ExpWorkspace:
    """`Workspace`, with one buffer of E for all chunks, or one for each if they are kept."""

    def __init__(self, call: LinearCall, head: Head, chunks: list[ChunkRows], *, tanh_slope: bool):
        self._call, self._tanh_slope = call, tanh_slope
        self._head = ExpHead(
            weight=head.weight, bias=head.bias, logit_scale=head.logit_scale, softcap=head.softcap
        )
        self._rows = max((length(chunk) for chunk in chunks), default=0)
        self._e = None

    def load(self, hidden: Tensor, rows: ChunkRows, *, gradient: bool) -> ExpChunk:
        """E of a chunk, or its sums alone."""
        call, part, mask = self._call, take(hidden, rows), self._call.row_mask(rows)
        if mask is not None:
            part = part.masked_fill(~mask[:, None], 0)
        temperature = call.temperature
        exp = triton_exp.exp_rows(
            part,
            self._head,
            call.tokens[rows],
            mask,
            temperature[rows] if isinstance(temperature, Tensor) else temperature,
            self._room(part.shape[0]) if gradient else None,
            shard=call.backend if isinstance(call.backend, ExpShard) else None,
            tanh_slope=self._tanh_slope,
        )
        return ExpChunk(rows=rows, hidden=part, logits=exp, grad=exp if gradient else None)

    def _room(self, rows: int) -> Tensor:
        if self._call.keeps_exponentials:
            return triton_exp.empty_e(rows, self._head.weight)
        if self._e is None:
            self._e = triton_exp.empty_e(self._rows, self._head.weight)
        return self._e[:rows]

    def linear_grad(self, chunk: ExpChunk) -> ExpRows:
        """diag(f) E is the gradient at the GEMM's output."""
        return chunk.logits


class ExpGrads(LinearGrads):
    """Gradients from diag(f) E by plain GEMMs: dH = f (E W), dW = E^T (f h), db = E^T f."""

    def __init__(
        self,
        head: Head,
        hidden: Tensor,
        needs: tuple[bool, bool, bool],
        *,
        all_rows: bool,
        one_chunk: bool,
    ):
        super().__init__(head, hidden, needs, all_rows=all_rows)
        # On CPU a bf16 product may read past a ragged K; there it is widened.
        if one_chunk and self.weight is not None and hidden.device.type == "cuda":
            self.weight = torch.empty_like(head.weight)

    def add(self, chunk: ExpChunk, grad: ExpRows) -> None:
        """Add a chunk; see `LinearGrads.add`."""
        e, factors = grad.e, grad.factors[:, None]
        wide = {"dtype": torch.float32, "device": e.device}
        if self.hidden is not None:
            product = torch.empty(chunk.hidden.shape, **wide)
            add_matmul_(product, e, self.head.weight)
            put(self.hidden, chunk.rows, product.mul_(factors))
        if self.weight is not None:
            scaled = torch.empty_like(chunk.hidden, memory_format=torch.contiguous_format)
            torch.mul(chunk.hidden, factors, out=scaled)
            add_matmul_(self.weight, e.t(), scaled, beta=0.0 if self._empty else 1.0)
            self._empty = False
        if self.bias is not None:
            # f in two bf16 parts, 16 bits in all, in a matrix of 16-byte rows.
            parts = torch.zeros(e.shape[0], 8, dtype=e.dtype, device=e.device)
            parts[:, :1] = factors
            parts[:, 1:2] = factors - parts[:, :1].float()
            product = torch.empty(e.shape[1], 8, **wide)
            add_matmul_(product, e.t(), parts)
            self.bias.add_(product[:, 0]).add_(product[:, 1])


def make_workspace(
    call: LinearCall,
    head: Head,
    chunks: list[ChunkRows],
    *,
    gradient: bool,
    entropy_gradient: bool = False,
) -> Workspace | ExpWorkspace:
    """The buffers of a pass over `chunks`, as the call's backend needs them.

    entropy_gradient: the entropies may have a gradient.
    """
    if call.exponentials:
        return ExpWorkspace(call, head, chunks, tanh_slope=not entropy_gradient)
    return Workspace(call, head, chunks, gradient=gradient)


def make_grads(
    call: LinearCall,
    head: Head,
    hidden: Tensor,
    needs: tuple[bool, bool, bool],
    *,
    all_rows: bool,
    one_chunk: bool,
) -> LinearGrads:
    """The sums of gradients over chunks that cover all rows, or of which there is but one."""
    if call.exponentials:
        return ExpGrads(head, hidden, needs, all_rows=all_rows, one_chunk=one_chunk)
    return LinearGrads(head, hidden, needs, all_rows=all_rows)
