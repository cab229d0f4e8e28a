"""The autograd functions of the linear ops, and the token-level loss of a chunk."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from fastpo.backends.base import RowDetails, RowInputs, RowLosses, RowStats
from fastpo.backends.two_step import two_step
from fastpo.objective import Objective
from fastpo.ops.autograd import first_order, hand_over, row_grads, save, saved
from fastpo.ops.batch import LossBatch, loss_of_rows, of_rows
from fastpo.ops.checks import wide_dtype
from fastpo.ops.gradient_scale import GradientScale
from fastpo.ops.head import Head
from fastpo.ops.linear_chunks import ChunkRows, LinearCall, put_each, take_each
from fastpo.ops.linear_workspace import Chunk, LinearGrads, Workspace


class ChunkLoss(Protocol):
    """A loss that can be finished, with its gradient, from the logits of one chunk."""

    @property
    def has_entropy_gradient(self) -> bool:
        """Whether the loss may depend on the entropies."""

    def chunks(
        self, call: LinearCall, head: Head, *, gradient: bool
    ) -> tuple[list[ChunkRows], list[ChunkRows]]:
        """Chunks that need a gradient, and chunks whose losses and statistics are enough."""

    def losses(self, call: LinearCall, chunk: Chunk, temperature: float | Tensor) -> RowLosses:
        """Losses of a chunk's rows; fills `chunk.grad` where there is one."""


class LossBeside(Protocol):
    """Rows that enter no chunk: their losses, and their gradients, added to those of the chunks."""

    @property
    def add_to(self) -> Tensor | None:
        """Where the weight's gradient is added, in place of handing it to autograd."""

    def finish(
        self, head: Head, hidden: Tensor, losses: RowLosses, grads: LinearGrads | None
    ) -> RowLosses:
        """The losses of all rows from those of the chunks; adds to `grads`."""


class FusedLinearLoss(torch.autograd.Function):
    """loss, logprobs, entropy, clip flags of (hidden, weight, bias). One backward only.

    The gradient is made in the forward pass, while a chunk's logits exist: 6 N D V operations. Per
    chunk: logits GEMM, the row primitives over it in place, dH GEMM, dW GEMM into an fp32 sum.
    """

    @staticmethod
    def forward(
        ctx,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        call: LinearCall,
        chunk_loss: ChunkLoss,
        needs: tuple[bool, bool, bool],
        beside: LossBeside | None = None,
    ):
        head, hidden = call.head(weight, bias), hidden.detach()
        with_gradient, without = chunk_loss.chunks(call, head, gradient=any(needs))
        workspace = Workspace(call, head, with_gradient, without, weight_grad=needs[1])

        scale = _scale_of(workspace) if any(needs) else None
        through = call if scale is None else replace(call, backend=scale)

        def losses_of(rows: ChunkRows, *, gradient: bool) -> RowLosses:
            chunk = workspace.load(hidden, rows, gradient=gradient)
            losses = chunk_loss.losses(through, chunk, call.row_temperature(rows, head))
            if gradient:
                if scale is not None:
                    scale.follow(grads)
                workspace.keep(chunk)
            return losses

        parts, grads = [], None
        idle = [losses_of(rows, gradient=False) for rows in without]
        if any(needs):
            covers = call.index is None and not without
            wide = beside is not None
            grads = LinearGrads(workspace, hidden, needs, all_rows=covers, wide=wide)
            for group in workspace.groups:
                parts += [losses_of(rows, gradient=True) for rows in group]
                if len(parts) == len(with_gradient):
                    workspace.free_logits()
                grads.add(*workspace.waiting())
            if scale is not None:
                scale.undo(grads)
            grads.finish(call.backend)
        parts += idle
        losses = scatter_losses(call, hidden, with_gradient + without, parts)
        if beside is not None:
            losses = beside.finish(head, hidden, losses, grads)
        ctx.grads, ctx.backend = grads, call.backend
        ctx.add_to = None if beside is None else beside.add_to
        ctx.mark_non_differentiable(losses.logprobs, losses.entropy, losses.clipped)
        ctx.set_materialize_grads(False)
        return losses.loss.sum(), losses.logprobs, losses.entropy, losses.clipped

    @staticmethod
    @first_order
    def backward(ctx, loss_grad: Tensor | None, *_):
        if loss_grad is None:
            return (None,) * 7
        grads, ctx.grads = ctx.grads, None
        if grads is None:
            raise RuntimeError(
                "backward through linear_policy_loss a second time: the first one handed over the "
                "gradient, which was made in the forward pass; call linear_policy_loss again"
            )
        # Where looking costs nothing, the usual factor costs nothing either.
        is_one = loss_grad.device.type == "cpu" and loss_grad.item() == 1
        scaled = grads.scaled(None if is_one else loss_grad, ctx.backend)
        return *hand_over(scaled, ctx.add_to), None, None, None, None


def scatter_losses(
    call: LinearCall, hidden: Tensor, chunks: list[ChunkRows], parts: list[RowLosses]
) -> RowLosses:
    """The losses of all rows, 0 where no chunk was."""
    if len(parts) == 1 and isinstance(chunks[0], slice):
        return parts[0]  # a slice that is alone is all rows
    table = _table(call, hidden, len(RowLosses._fields))
    for rows, part in zip(chunks, parts, strict=True):
        put_each(table, rows, part)
    *numbers, clipped = table
    return RowLosses(*numbers, clipped.to(torch.uint8))


def _table(call: LinearCall, hidden: Tensor, columns: int) -> Tensor:
    """(columns, N) zeros in the accumulation dtype."""
    shape, dtype = (columns, call.tokens.numel()), wide_dtype(hidden.dtype)
    return torch.zeros(shape, dtype=dtype, device=hidden.device)


@dataclass(frozen=True, kw_only=True)
class TokenLevelLoss:
    """A token-level objective: one launch of `row_policy_loss` finishes any set of rows."""

    inputs: RowInputs
    objective: Objective

    @property
    def has_entropy_gradient(self) -> bool:
        """See `ChunkLoss`."""
        return self.inputs.entropy_weight is not None

    def chunks(
        self, call: LinearCall, head: Head, *, gradient: bool
    ) -> tuple[list[ChunkRows], list[ChunkRows]]:
        """With A = 0 and neither KL penalty nor entropy bonus a row's gradient is 0."""
        if not gradient:
            return [], call.chunks(head)
        if not call.reads_values or self.objective.acts_without_advantage:
            return call.chunks(head), []
        if bool(self.inputs.advantages.all()):
            return call.chunks(head), []
        has_gradient = self.inputs.advantages != 0
        if self.inputs.nll_weight is not None:
            has_gradient |= self.inputs.nll_weight != 0
            if bool(has_gradient.all()):
                return call.chunks(head), []
        return call.chunks(head, only=has_gradient), call.chunks(head, only=~has_gradient)

    def losses(self, call: LinearCall, chunk: Chunk, temperature: float | Tensor) -> RowLosses:
        """See `ChunkLoss`."""
        return call.backend.row_policy_loss(
            chunk.logits,
            call.tokens[chunk.rows],
            take_each(self.inputs, chunk.rows),
            self.objective,
            temperature,
            chunk.grad,
        )


@dataclass(frozen=True, kw_only=True)
class RuleLoss:
    """A rule in plain torch whose losses depend on their own token alone: any rows at a time."""

    batch: LossBatch
    has_entropy_gradient: bool = True

    @classmethod
    def from_batch(cls, batch: LossBatch) -> RuleLoss:
        """Weights per sequence become weights per token: a chunk knows no sequences."""
        if batch.sequence_weights is not None:
            weights = batch.segments.broadcast(batch.sequence_weights)
            batch = replace(batch, sequence_weights=None, importance_weights=weights)
        return cls(batch=batch)

    def chunks(
        self, call: LinearCall, head: Head, *, gradient: bool
    ) -> tuple[list[ChunkRows], list[ChunkRows]]:
        """Only the rule knows which rows have no gradient."""
        return (call.chunks(head), []) if gradient else ([], call.chunks(head))

    def losses(self, call: LinearCall, chunk: Chunk, temperature: float | Tensor) -> RowLosses:
        """See `ChunkLoss`."""
        return two_step(
            call.backend,
            chunk.logits,
            call.tokens[chunk.rows],
            temperature,
            chunk.grad,
            mask=call.row_mask(chunk.rows),
            loss_of=loss_of_rows(self.batch.rows(chunk.rows)),
            rule=self.batch.rule,
        )


class LinearTokenLogprobs(torch.autograd.Function):
    """logprobs, entropy of (hidden, weight, bias), for any loss: statistics forward, the logits
    once more backward. Saves four numbers per token, 8 N D V operations in all."""

    @staticmethod
    def forward(
        ctx,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        call: LinearCall,
        with_details: bool = False,
    ):
        head = call.head(weight, bias)
        stats, details = statistics(call, head, hidden.detach(), with_details=with_details)
        ctx.mark_non_differentiable(*details)
        ctx.set_materialize_grads(False)
        save(ctx, hidden, weight, bias, *stats)
        ctx.call = call
        # Copies: whoever edits a returned log-prob must not edit what the backward pass reads.
        return stats.logprobs.clone(), stats.entropy.clone(), *details

    @staticmethod
    @first_order
    def backward(ctx, logprob_grad: Tensor | None, entropy_grad: Tensor | None, *_):
        if logprob_grad is None and entropy_grad is None:
            return (None,) * 5
        hidden, weight, bias, *stats = saved(ctx)
        call, stats = ctx.call, RowStats(*stats)
        incoming = [
            row_grads(grad, call.mask, stats.logprobs.dtype)
            for grad in (logprob_grad, entropy_grad)
        ]
        head = call.head(weight, bias)
        grads = chunk_grads(call, head, hidden.detach(), stats, *incoming, ctx.needs_input_grad)
        return *grads.scaled(None, call.backend), None, None


def statistics(
    call: LinearCall,
    head: Head,
    hidden: Tensor,
    only: Tensor | None = None,
    *,
    with_details: bool = False,
) -> tuple[RowStats, RowDetails | tuple[()]]:
    """Statistics (N,) of all rows, or of those where `only` (N,) is True, and details if asked for;
    0 on masked and other rows."""
    table = _table(call, hidden, 7 if with_details else 4)
    sweep = call.backend.row_details if with_details else call.backend.row_stats
    chunks = call.chunks(head, only)
    workspace = Workspace(call, head, [], chunks)
    for rows in chunks:
        part = sweep(
            workspace.load(hidden, rows, gradient=False).logits,
            call.tokens[rows],
            call.row_temperature(rows, head),
            call.row_mask(rows),
        )
        put_each(table, rows, (*part[0], *part[1]) if with_details else part)
    stats = RowStats(*table[:4])
    if not with_details:
        return stats, ()
    *numbers, is_top1 = table[4:]
    return stats, RowDetails(*numbers, is_top1.bool())


def chunk_grads(
    call: LinearCall,
    head: Head,
    hidden: Tensor,
    stats: RowStats,
    logprob_grad: Tensor | None,
    entropy_grad: Tensor | None,
    needs: tuple[bool, ...],
    *,
    wide: bool = False,
) -> LinearGrads:
    """Compute each chunk's logits again and push the incoming gradients (N,) through them.

    wide: the head's gradient is a sum that more will be added to.
    """
    if logprob_grad is None:
        logprob_grad = torch.zeros_like(stats.logprobs)
    only = None
    if call.reads_values:  # clipped tokens, and A = 0, have no gradient to push
        only = logprob_grad != 0
        if entropy_grad is not None:
            only |= entropy_grad != 0
        if bool(only.all()):
            only = None
    chunks = call.chunks(head, only)
    workspace = Workspace(call, head, chunks, weight_grad=needs[1])
    covers = call.index is None and only is None
    grads = LinearGrads(workspace, hidden, needs[:3], all_rows=covers, wide=wide)
    scale = _scale_of(workspace)
    backend = call.backend if scale is None else scale
    for group in workspace.groups:
        for rows in group:
            chunk = workspace.load(hidden, rows, gradient=True)
            backend.row_grad(
                chunk.logits,
                call.tokens[rows],
                take_each(stats, rows),
                logprob_grad[rows],
                of_rows(entropy_grad, rows),
                call.row_temperature(rows, head),
                chunk.grad,
            )
            if scale is not None:
                scale.follow(grads)
            workspace.keep(chunk)
            del chunk
        if group is workspace.groups[-1]:
            workspace.free_logits()
        grads.add(*workspace.waiting())
    if scale is not None:
        scale.undo(grads)
    grads.finish(call.backend)
    return grads


def _scale_of(workspace: Workspace) -> GradientScale | None:
    """Of fp16 gradients, which need one."""
    is_fp16 = workspace.grad_dtype == torch.float16
    return GradientScale(workspace.call.backend, workspace) if is_fp16 else None
