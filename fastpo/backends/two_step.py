"""A policy loss in two steps: statistics of the rows, any loss on one number per token, gradient.

What a backend does in one launch for the losses that its kernel knows.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fastpo.backends.base import Backend, RowInputs, RowLosses
from fastpo.objective import Objective
from fastpo.rule import RuleObjective

LossOf = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def two_step(
    backend: Backend,
    logits: Tensor,
    tokens: Tensor,
    temperature: float | Tensor,
    out: Tensor | None,
    *,
    mask: Tensor | None,
    loss_of: LossOf,
    rule: RuleObjective | None = None,
) -> RowLosses:
    """Statistics, any loss on (N,) numbers by autograd, then the gradient: what `row_policy_loss`
    does in one launch for the losses that a kernel knows. See `differentiate` for the rest."""
    stats = backend.row_stats(logits, tokens, temperature, mask)
    numbers = (stats.logprobs, stats.entropy)
    loss, clipped, *grads = differentiate(loss_of, *numbers, gradient=out is not None, rule=rule)
    if out is not None:
        backend.row_grad(logits, tokens, stats, *grads, temperature, out)
    return RowLosses(loss, *numbers, clipped)


def differentiate(
    loss_of: LossOf,
    logprobs: Tensor,
    entropy: Tensor,
    *,
    gradient: bool,
    rule: RuleObjective | None = None,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Loss and clip flags of every row, and the gradients of the loss's sum with respect to the
    log-probs and, unless it does not depend on them, the entropies; without `gradient` None.

    `loss_of` takes log-probs and entropies, and returns the weighted loss of every row,
    differentiable in them, and its clip flags. A `rule` that it calls may have no parameters: their
    gradient would be lost.
    """
    with torch.set_grad_enabled(gradient):  # inference mode knows no requires_grad_
        numbers = [x.detach().requires_grad_(gradient) for x in (logprobs, entropy)]
        loss, clipped = loss_of(*numbers)
        if not gradient:
            return loss.detach(), clipped, None, None
        if rule is not None:
            rule.check_depends_only_on(loss, *numbers)
        grads = torch.autograd.grad(loss.sum(), numbers, allow_unused=True)
    c, e = (None if x is None else x.contiguous() for x in grads)
    return loss.detach(), clipped, torch.zeros_like(logprobs) if c is None else c, e


def two_step_policy_loss(
    backend: Backend,
    logits: Tensor,
    tokens: Tensor,
    inputs: RowInputs,
    objective: Objective,
    temperature: float | Tensor,
    out: Tensor | None,
) -> RowLosses:
    """`row_policy_loss` of a backend that fuses nothing: two steps through the specification."""
    mask = inputs.mask

    def loss_of(logprobs: Tensor, entropy: Tensor) -> tuple[Tensor, Tensor]:
        terms = inputs.token_loss(objective, logprobs, mask)
        loss = inputs.weight * terms.loss
        if inputs.entropy_weight is not None:
            loss = loss - inputs.entropy_weight * entropy
        return loss, terms.clipped

    return two_step(backend, logits, tokens, temperature, out, mask=mask, loss_of=loss_of)
