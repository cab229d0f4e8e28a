"""Token-level objectives: the gradient is made in the forward pass, in 6 N D V operations."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastpo.backends.base import RowInputs, RowLosses
from fastpo.objective import Objective
from fastpo.ops import _chunks
from fastpo.ops._chunks import Rows
from fastpo.ops._head import Head
from fastpo.ops._linear_call import LinearCall, LinearGrads, Workspace
from fastpo.ops._tensor_parallel import VocabularyShard


class FusedLinearLoss(torch.autograd.Function):
    """loss, logprobs, entropy, clip flags of (hidden, weight, bias). One backward only.

    Per chunk: logits GEMM, `row_policy_loss` over it in place, dH GEMM, dW GEMM into an fp32 sum.
    """

    @staticmethod
    def forward(
        ctx,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        call: LinearCall,
        inputs: RowInputs,
        objective: Objective,
        needs: tuple[bool, bool, bool],
    ):
        head, hidden = call.head(weight, bias), hidden.detach()
        grads = LinearGrads(head, hidden, needs) if any(needs) else None
        losses = _empty_losses(inputs.weight)
        paying, idle = _chunks_by_gradient(call, head, inputs, objective, needed=any(needs))
        workspace = Workspace(call, head, paying + idle, gradient=any(needs))
        for number, rows in enumerate(paying + idle):
            chunk = workspace.load(hidden, rows, gradient=number < len(paying))
            part = call.backend.row_policy_loss(
                chunk.logits,
                call.tokens[rows],
                RowInputs(*(None if x is None else x[rows] for x in inputs)),
                objective,
                call.row_temperature(rows, head),
                chunk.grad,
            )
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
    @once_differentiable
    def backward(ctx, loss_grad: Tensor, *_):
        grads, ctx.grads = ctx.grads, None
        if grads is None:
            raise RuntimeError(
                "backward through linear_policy_loss a second time: the first one handed over the "
                "gradient, which was made in the forward pass; call linear_policy_loss again"
            )
        return *grads.scaled(loss_grad, ctx.backend), None, None, None, None


def _chunks_by_gradient(
    call: LinearCall, head: Head, inputs: RowInputs, objective: Objective, *, needed: bool
) -> tuple[list[Rows], list[Rows]]:
    """Chunks that need a gradient, and chunks whose losses and statistics are enough.

    With A = 0 and neither KL penalty nor entropy bonus a row's gradient is 0. Only the CPU asks.
    """
    if not needed:
        return [], call.chunks(head)
    if not call.may_look or objective.kl_coef != 0 or objective.entropy_coef != 0:
        return call.chunks(head), []
    pays = inputs.advantages != 0
    if bool(pays.all()):
        return call.chunks(head), []
    return call.chunks(head, only=pays), call.chunks(head, only=~pays)


def _empty_losses(like: Tensor) -> RowLosses:
    zeros = [torch.zeros_like(like) for _ in range(3)]
    return RowLosses(*zeros, torch.zeros_like(like, dtype=torch.uint8))
