"""What the hand-written backward passes share."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch


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
