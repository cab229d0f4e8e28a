"""What the hand-written backward passes share."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable

import torch
from torch import Tensor


def first_order(backward: Callable) -> Callable:
    """Decorates a `backward` without a derivative of its own: under create_graph=True it raises.

    torch's `once_differentiable` would return a constant there unless the incoming gradient itself
    requires one: a gradient penalty added to the loss would silently train nothing.
    """

    @functools.wraps(backward)
    def checked(ctx, *grads):
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise RuntimeError(
                "backward with create_graph=True through fastpo: its gradients are computed by "
                "kernels and have no derivative; use torch's log_softmax with "
                "policy_loss_from_logprobs for second derivatives"
            )
        return backward(ctx, *grads)

    return checked


def save(ctx, *tensors: Tensor | None) -> None:
    """`ctx.save_for_backward` that also takes tensors made under inference mode, as a frozen head
    may be: torch refuses those, for want of a version counter to see later changes by."""
    if torch.compiler.is_compiling():
        ctx.save_for_backward(*tensors)
        return
    unversioned = [x is not None and x.is_inference() for x in tensors]
    ctx.save_for_backward(*(None if u else x for u, x in zip(unversioned, tensors, strict=True)))
    if any(unversioned):
        ctx.unversioned = [x if u else None for u, x in zip(unversioned, tensors, strict=True)]


def saved(ctx) -> tuple[Tensor | None, ...]:
    """What `save` was given."""
    tensors = ctx.saved_tensors
    others = getattr(ctx, "unversioned", None)
    if others is None:
        return tensors
    return tuple(x if other is None else other for x, other in zip(tensors, others, strict=True))


def row_grads(grad: Tensor | None, mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """An incoming gradient of log-probs or entropies as contiguous rows, exactly 0 under a False
    mask, whatever a loss made of the zeros that stand there."""
    if grad is None:
        return None
    grad = grad.to(dtype).contiguous()
    return grad if mask is None else torch.where(mask, grad, 0.0)


def hand_over(
    grads: Iterable[Tensor | None], add_to: Tensor | None
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of hidden, weight and bias for autograd; that of the weight is added to `add_to`
    instead, where there is such a place."""
    hidden, weight, bias = grads
    if add_to is not None and weight is not None:
        add_to.add_(weight)
        weight = None
    return hidden, weight, bias
