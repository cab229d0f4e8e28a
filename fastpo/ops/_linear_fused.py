"""Token-level objectives: the gradient is made in the forward pass, 6 N D V floating-point operations."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastpo.backends.base import RowInputs, RowLosses
from fastpo.objective import Objective
from fastpo.ops import _chunks
from fastpo.ops._chunks import Rows
from fastpo.ops._linear_call import LinearCall, LinearGrads, Workspace, take_hidden


class FusedLinearLoss(torch.autograd.Function):
    """loss, logprobs, entropy, clip flags of (hidden, weight, bias). One backward only.

    Per chunk: logits GEMM, `row_policy_loss` over it in place, dH GEMM, dW GEMM into an fp32 sum.
    """

    @staticmethod
    def forward(
        ctx, hidden, weight, bias, call: LinearCall, inputs: RowInputs, objective: Objective, needs
    ):
        head = call.head(weight, bias)
        hidden = hidden.detach()
        gradient = any(needs)
        pays = _pays(inputs, objective) if gradient and call.compacts else None
        with_grad, without = _schedule(call, head, pays, gradient)
        losses = _empty_losses(inputs.weight)
        grads = LinearGrads(head, hidden, needs) if gradient else None
        workspace = Workspace(call, head, with_grad + without, gradient=gradient)
        blank = None if call.compacts else call.live
        for rows in with_grad + without:
            chunk = take_hidden(hidden, rows, blank)
            logits = workspace.logits(chunk)
            keeps = gradient and any(rows is each for each in with_grad)
            grad = workspace.grad_buffer(logits) if keeps else None
            part = call.backend.row_policy_loss(
                logits,
                call.tokens[rows],
                RowInputs(*(None if x is None else x[rows] for x in inputs)),
                objective,
                call.row_temperature(rows, head),
                grad,
            )
            for full, values in zip(losses, part, strict=True):
                _chunks.put(full, rows, values)
            if keeps:
                grads.add(rows, chunk, workspace.linear_grad(logits, grad))
        ctx.grads, ctx.backend, ctx.dtype = grads, call.backend, hidden.dtype
        ctx.mark_non_differentiable(losses.logprobs, losses.entropy, losses.clipped)
        return losses.loss.sum(), losses.logprobs, losses.entropy, losses.clipped

    @staticmethod
    @once_differentiable
    def backward(ctx, loss_grad: Tensor, *_):
        grads, ctx.grads = ctx.grads, None
        if grads is None:
            raise RuntimeError(
                "backward through linear_policy_loss a second time: its gradient was made in the forward pass "
                "and handed over by the first backward; call linear_policy_loss again"
            )
        return *grads.scaled(loss_grad, ctx.dtype, ctx.backend), None, None, None, None


def _pays(inputs: RowInputs, objective: Objective) -> Tensor | None:
    """(N,) rows whose gradient can differ from 0; None if that is every live row."""
    if objective.kl_coef != 0 or objective.entropy_coef != 0:
        return None
    return inputs.advantages != 0


def _schedule(
    call: LinearCall, head, pays: Tensor | None, gradient: bool
) -> tuple[list[Rows], list[Rows]]:
    """Chunks that need a gradient, and chunks whose statistics and loss are enough."""
    if not gradient:
        return [], call.chunks(call.live, head)
    if pays is None or bool(pays.all()):
        return call.chunks(call.live, head), []
    live = torch.ones_like(pays) if call.live is None else call.live
    return call.chunks(live & pays, head), call.chunks(live & ~pays, head)


def _empty_losses(like: Tensor) -> RowLosses:
    zeros = [torch.zeros_like(like) for _ in range(3)]
    return RowLosses(*zeros, torch.zeros_like(like, dtype=torch.uint8))
