"""Logits in, loss and gradient out of one launch: the gradient is made in the forward pass."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fastpo import backends
from fastpo.backends.base import RowInputs, RowLosses
from fastpo.objective import Objective
from fastpo.ops._autograd import first_order
from fastpo.ops._rows import (
    Temperature,
    concatenate,
    matching_views,
    row_views,
    slices,
    temperature_of,
)


@dataclass(frozen=True)
class FusedCall:
    """What `row_policy_loss` takes beside the logits, kept for a second backward."""

    tokens: Tensor  # (N,) int64
    inputs: RowInputs
    objective: Objective
    temperature: Temperature
    backend: str

    def run(self, logits: Tensor, grad: Tensor | None) -> RowLosses:
        """Losses of all rows; the gradient goes to `grad`, of the shape of `logits`."""
        views = row_views(logits)
        grads = [None] * len(views) if grad is None else matching_views(grad, views)
        parts = zip(views, slices(views), grads, strict=True)
        return concatenate([self._run_rows(view, cut, out) for view, cut, out in parts])

    def _run_rows(self, logits: Tensor, cut: slice, out: Tensor | None) -> RowLosses:
        return backends.load(self.backend).row_policy_loss(
            logits,
            self.tokens[cut],
            RowInputs(*(None if x is None else x[cut] for x in self.inputs)),
            self.objective,
            temperature_of(self.temperature, cut),
            out,
        )


class FusedPolicyLoss(torch.autograd.Function):
    """Gradient in forward. The first backward hands its buffer over; another recomputes it."""

    @staticmethod
    def forward(ctx, logits: Tensor, call: FusedCall, needs_grad: bool, inplace: bool):
        grad = None
        if needs_grad:
            grad = logits.detach() if inplace else torch.empty_like(logits)
        rows = call.run(logits.detach(), grad)
        ctx.grad, ctx.call, ctx.inplace = grad, call, inplace
        if inplace and grad is not None:
            # Whoever saved these logits for its own backward (a softcap's tanh) must hear of it.
            torch.autograd.graph.increment_version(logits)
        elif needs_grad:
            ctx.save_for_backward(logits)
        ctx.mark_non_differentiable(rows.logprobs, rows.entropy, rows.clipped)
        return rows.loss.sum(), rows.logprobs, rows.entropy, rows.clipped

    @staticmethod
    @first_order
    def backward(ctx, loss_grad: Tensor, *_):
        grad, ctx.grad = ctx.grad, None
        if grad is None:
            if ctx.inplace:
                raise RuntimeError(
                    "backward through an inplace policy_loss a second time: its gradient buffer "
                    "was the logits themselves and is gone; pass inplace=False to keep the graph"
                )
            (logits,) = ctx.saved_tensors
            grad = torch.empty_like(logits)
            ctx.call.run(logits.detach(), grad)
        for view in row_views(grad):
            backends.load(ctx.call.backend).scale_(view, loss_grad)
        return grad, None, None, None
