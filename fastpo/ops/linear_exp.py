"""The linear ops on the backends "triton-exp": E = exp(u - o) in place of a chunk's logits.

A chunk is as many rows as make E as large as an fp32 gradient of the weight, 2 D: one GEMM each for
logits, hidden and weight, and for N <= 2 D the last of them writes the weight's gradient in its own
dtype, without an fp32 sum. The losses of a chunk are those of linear_autograd.py: the backend's row
primitives take `ExpRows` for logits.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from fastpo.backends import triton_exp
from fastpo.backends.triton_exp import ExpHead, ExpRows
from fastpo.ops.autograd import first_order, row_grads, save, saved
from fastpo.ops.batch import of_rows
from fastpo.ops.head import Head, add_matmul_
from fastpo.ops.linear_autograd import (
    ChunkLoss,
    FusedLinearLoss,
    LinearTokenLogprobs,
    scatter_losses,
)
from fastpo.ops.linear_chunks import ChunkRows, LinearCall, length, put, take
from fastpo.ops.linear_workspace import LinearGrads
from fastpo.ops.results import PolicyLoss
from fastpo.ops.tensor_parallel import VocabularyShard

LOG_LARGEST_SUM = 60  # of kernels/exp_sums.py


class ExpShard(VocabularyShard):
    """A rank's columns of E. The sums of all ranks are sums: `exp_rows` adds them up, and what
    follows needs no other number of another rank."""

    row_stats = staticmethod(triton_exp.row_stats)
    row_grad = staticmethod(triton_exp.row_grad)
    row_policy_loss = staticmethod(triton_exp.row_policy_loss)

    def max_(self, x: Tensor) -> None:
        """See `fastpo.backends.triton_exp.Shard`."""
        dist.all_reduce(x, dist.ReduceOp.MAX, group=self.group)


def count_redone(result: PolicyLoss) -> PolicyLoss:
    """With `redone` among the metrics: tokens whose row was made a second time, from its maximum.

    Those are the ones whose S, 1 / p of the token, passed e^60: log-prob below -60, or NaN.
    """
    redone = (result.logprobs >= -LOG_LARGEST_SUM).logical_not_().sum()
    return result._replace(metrics=result.metrics | {"redone": redone})


@dataclass(frozen=True, kw_only=True)
class ExpChunk:
    """Rows on their way through the head."""

    rows: ChunkRows
    hidden: Tensor  # (n, D), zeros in masked rows
    logits: ExpRows  # what the row primitives take for logits
    grad: ExpRows | None  # the same, where they are to make a gradient of it


class ExpPass:
    """One pass over chunks, with one buffer of E for all of them, or one for each if kept."""

    def __init__(
        self, call: LinearCall, head: Head, chunks: list[ChunkRows], *, entropy_gradient: bool
    ):
        """entropy_gradient: the entropies may have a gradient."""
        self._call, self._tanh_slope = call, not entropy_gradient
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
        exp = triton_exp.exp_rows(
            part,
            self._head,
            call.tokens[rows],
            mask,
            of_rows(call.temperature, rows),
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


class ExpGrads(LinearGrads):
    """Gradients from diag(f) E by plain GEMMs: dH = f (E W), dW = E^T (f h), db = E^T f."""

    def __init__(
        self,
        head: Head,
        hidden: Tensor,
        needs: tuple[bool, ...],
        chunks: list[ChunkRows],
        *,
        all_rows: bool,
    ):
        """chunks: all that will be added; all_rows: they cover every row of `hidden`."""
        self.head, self.dtype, self.shape = head, hidden.dtype, hidden.shape
        wide = {"dtype": torch.float32, "device": hidden.device}
        shape = (hidden.shape[:-1].numel(), hidden.shape[-1])
        new = torch.empty if all_rows else torch.zeros
        self.hidden = new(shape, dtype=hidden.dtype, device=hidden.device) if needs[0] else None
        # One product rounds its own sums, save on CPU, where a bf16 one may read past a ragged K.
        single = len(chunks) == 1 and hidden.device.type != "cpu"
        new = torch.empty if chunks else torch.zeros
        own = {"dtype": head.weight.dtype, "device": hidden.device}
        self.weight = new(head.weight.shape, **(own if single else wide)) if needs[1] else None
        self.bias = torch.zeros(head.bias.shape, **wide) if needs[2] else None
        self._beta = 0.0  # nothing has been written into `weight` yet

    def add(self, chunk: ExpChunk) -> None:
        """Add a chunk whose row primitive has made E and f a gradient."""
        e, factors = chunk.grad.e, chunk.grad.factors[:, None]
        wide = {"dtype": torch.float32, "device": e.device}
        if self.hidden is not None:
            product = torch.empty(chunk.hidden.shape, **wide)
            add_matmul_(product, e, self.head.weight)
            put(self.hidden, chunk.rows, product.mul_(factors))
        if self.weight is not None:
            scaled = torch.empty_like(chunk.hidden, memory_format=torch.contiguous_format)
            torch.mul(chunk.hidden, factors, out=scaled)
            add_matmul_(self.weight, e.t(), scaled, beta=self._beta)
            self._beta = 1.0
        if self.bias is not None:
            column = torch.zeros(e.shape[0], 8, dtype=e.dtype, device=e.device)  # 16-byte rows
            column[:, :1] = factors
            product = torch.empty(e.shape[1], 8, **wide)
            add_matmul_(product, e.t(), column)
            self.bias.add_(product[:, 0])

    def finish(self, backend: object) -> None:
        """After the last chunk: the sum over shards."""
        if self.hidden is not None and isinstance(backend, ExpShard):
            backend.sum_(self.hidden)


class FusedExpLoss(FusedLinearLoss):
    """`FusedLinearLoss` by exponentials: 6 N D V operations, its backward the same."""

    @staticmethod
    def forward(
        ctx,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        call: LinearCall,
        chunk_loss: ChunkLoss,
        needs: tuple[bool, bool, bool],
    ):
        head, hidden = call.head(weight, bias), hidden.detach()
        with_gradient, without = chunk_loss.chunks(call, head, gradient=any(needs))
        chunks, covers = with_gradient + without, call.index is None and not without
        grads = None
        if any(needs):
            grads = ExpGrads(head, hidden, needs, with_gradient, all_rows=covers)
        entropy_gradient = chunk_loss.has_entropy_gradient
        one_pass = ExpPass(call, head, chunks, entropy_gradient=entropy_gradient)
        parts = []
        for number, rows in enumerate(chunks):
            chunk = one_pass.load(hidden, rows, gradient=number < len(with_gradient))
            parts.append(chunk_loss.losses(call, chunk, of_rows(call.temperature, rows)))
            if chunk.grad is not None:
                grads.add(chunk)
        if grads is not None:
            grads.finish(call.backend)
        losses = scatter_losses(call, hidden, chunks, parts)
        ctx.grads, ctx.backend, ctx.add_to = grads, call.backend, None
        ctx.mark_non_differentiable(losses.logprobs, losses.entropy, losses.clipped)
        return losses.loss.sum(), losses.logprobs, losses.entropy, losses.clipped


class ExpTokenLogprobs(LinearTokenLogprobs):
    """`LinearTokenLogprobs` by exponentials: 8 N D V operations; or 6, where the call keeps them
    for the backward, 2 bytes times N V."""

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, bias: Tensor | None, call: LinearCall):
        keep = call.keeps_exponentials and any(ctx.needs_input_grad)
        head = call.head(weight, bias)
        chunks = call.chunks(head)
        one_pass = ExpPass(call, head, chunks, entropy_gradient=True)
        # Of their own: views of one tensor could not be edited in place by whoever gets them.
        scores = [torch.zeros(call.tokens.numel(), device=hidden.device) for _ in range(2)]
        ctx.kept = []
        for rows in chunks:
            chunk = one_pass.load(hidden.detach(), rows, gradient=keep)
            stats = call.backend.row_stats(chunk.logits, chunk.logits.tokens, 1.0)
            put(scores[0], rows, stats.logprobs)
            put(scores[1], rows, stats.entropy)
            if keep:
                ctx.kept.append(chunk)
        ctx.set_materialize_grads(False)
        save(ctx, hidden, weight, bias)
        ctx.call = call
        return tuple(scores)

    @staticmethod
    @first_order
    def backward(ctx, logprob_grad: Tensor | None, entropy_grad: Tensor | None):
        if logprob_grad is None and entropy_grad is None:
            return None, None, None, None
        call, (hidden, weight, bias) = ctx.call, saved(ctx)
        if logprob_grad is None:
            logprob_grad = torch.zeros_like(entropy_grad)
        incoming = [row_grads(x, call.mask, torch.float32) for x in (logprob_grad, entropy_grad)]
        # The gradient takes the kept chunks' place: a second backward makes them again.
        kept, ctx.kept = ctx.kept, []
        head, hidden = call.head(weight, bias), hidden.detach()
        grads = _chunk_grads(call, head, hidden, *incoming, ctx.needs_input_grad, kept)
        del kept  # before the wide sums get a narrow copy each
        return *grads.scaled(None, call.backend), None


def _chunk_grads(
    call: LinearCall,
    head: Head,
    hidden: Tensor,
    logprob_grad: Tensor,
    entropy_grad: Tensor | None,
    needs: tuple[bool, ...],
    kept: list[ExpChunk],
) -> ExpGrads:
    """Make each chunk's E again, unless it is kept, and push the incoming gradients (N,) through
    it."""
    chunks = [chunk.rows for chunk in kept] or call.chunks(head)
    grads = ExpGrads(head, hidden, needs[:3], chunks, all_rows=call.index is None)
    one_pass = ExpPass(call, head, chunks, entropy_gradient=entropy_grad is not None)
    for number, rows in enumerate(chunks):
        chunk = kept[number] if kept else one_pass.load(hidden, rows, gradient=True)
        call.backend.row_grad(
            chunk.logits,
            chunk.logits.tokens,
            None,  # statistics: they are in the chunk
            logprob_grad[rows],
            of_rows(entropy_grad, rows),
            of_rows(call.temperature, rows),
            chunk.grad,
        )
        grads.add(chunk)
    grads.finish(call.backend)
    return grads
