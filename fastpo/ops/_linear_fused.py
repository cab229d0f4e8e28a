"""The gradient is made in the forward pass, while a chunk's logits exist: 6 N D V operations."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from fastpo.backends.base import RowInputs, RowLosses
from fastpo.objective import Objective
from fastpo.ops import _chunks
from fastpo.ops._autograd import first_order
from fastpo.ops._chunks import Rows
from fastpo.ops._head import Head
from fastpo.ops._linear_call import Chunk, LinearCall, LinearGrads, Workspace
from fastpo.ops._tensor_parallel import VocabularyShard


class ChunkLoss(Protocol):
    """A loss that can be finished, with its gradient, from the logits of one chunk."""

    def chunks(
        self, call: LinearCall, head: Head, *, gradient: bool
    ) -> tuple[list[Rows], list[Rows]]:
        """Chunks that need a gradient, and chunks whose losses and statistics are enough."""

    def losses(self, call: LinearCall, chunk: Chunk, temperature: float | Tensor) -> RowLosses:
        """Losses of a chunk's rows; fills `chunk.grad` where there is one."""


class FusedLinearLoss(torch.autograd.Function):
    """loss, logprobs, entropy, clip flags of (hidden, weight, bias). One backward only.

    Per chunk: logits GEMM, the row primitives over it in place, dH GEMM, dW GEMM into an fp32 sum.
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
    ):
        head, hidden = call.head(weight, bias), hidden.detach()
        grads = LinearGrads(head, hidden, needs) if any(needs) else None
        losses = _empty_losses(call.tokens, hidden.dtype)
        paying, idle = chunk_loss.chunks(call, head, gradient=any(needs))
        workspace = Workspace(call, head, paying + idle, gradient=any(needs))
        for number, rows in enumerate(paying + idle):
            chunk = workspace.load(hidden, rows, gradient=number < len(paying))
            part = chunk_loss.losses(call, chunk, call.row_temperature(rows, head))
            for full, values in zip(losses, part, strict=True):
                _chunks.put(full, rows, values)
            if chunk.grad is not None:
                grads.add(chunk, workspace.linear_grad(chunk))
        if needs[0] and isinstance(call.backend, VocabularyShard):
            call.backend.sum_(grads.hidden)
        ctx.grads, ctx.backend = grads, call.backend
        ctx.mark_non_differentiable(losses.logprobs, losses.entropy, losses.clipped)
        return losses.loss.sum(), losses.logprobs, losses.entropy, losses.clipped

    @staticmethod
    @first_order
    def backward(ctx, loss_grad: Tensor, *_):
        grads, ctx.grads = ctx.grads, None
        if grads is None:
            raise RuntimeError(
                "backward through linear_policy_loss a second time: the first one handed over the "
                "gradient, which was made in the forward pass; call linear_policy_loss again"
            )
        return *grads.scaled(loss_grad, ctx.backend), None, None, None


@dataclass(frozen=True, kw_only=True)
class TokenLevelLoss:
    """A token-level objective: one launch of `row_policy_loss` finishes any set of rows."""

    inputs: RowInputs
    objective: Objective

    def chunks(
        self, call: LinearCall, head: Head, *, gradient: bool
    ) -> tuple[list[Rows], list[Rows]]:
        """With A = 0 and no KL penalty, entropy bonus or NLL term a row's gradient is 0."""
        if not gradient:
            return [], call.chunks(head)
        if not call.may_look or self.objective.acts_without_advantage:
            return call.chunks(head), []
        pays = self.inputs.advantages != 0
        if self.inputs.nll_weight is not None:
            pays |= self.inputs.nll_weight != 0
        if bool(pays.all()):
            return call.chunks(head), []
        return call.chunks(head, only=pays), call.chunks(head, only=~pays)

    def losses(self, call: LinearCall, chunk: Chunk, temperature: float | Tensor) -> RowLosses:
        """See `ChunkLoss`."""
        return call.backend.row_policy_loss(
            chunk.logits,
            call.tokens[chunk.rows],
            RowInputs(*(None if x is None else x[chunk.rows] for x in self.inputs)),
            self.objective,
            temperature,
            chunk.grad,
        )


def _empty_losses(tokens: Tensor, dtype: torch.dtype) -> RowLosses:
    dtype = torch.float64 if dtype == torch.float64 else torch.float32
    zeros = [torch.zeros(tokens.shape, dtype=dtype, device=tokens.device) for _ in range(3)]
    return RowLosses(*zeros, torch.zeros_like(tokens, dtype=torch.uint8))
