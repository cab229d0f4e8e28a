"""torch.compile's marks on functions, without importing it: `torch._dynamo` would be a third of the
time that `import fastpo` takes, and most processes never compile."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable

import torch


def constant(function: Callable) -> Callable:
    """`torch.compiler.assume_constant_result`, which is this attribute."""
    function._dynamo_marked_constant = True
    return function


def untraced(reason: str) -> Callable[[Callable], Callable]:
    """`torch.compiler.disable(reason=...)`, applied once there is a compiler to be kept out."""

    def decorate(function: Callable) -> Callable:
        disabled = None

        @functools.wraps(function)
        def call(*args, **kwargs):
            nonlocal disabled
            if "torch._dynamo" not in sys.modules:
                return function(*args, **kwargs)
            if disabled is None:
                disabled = torch.compiler.disable(function, reason=reason)
            return disabled(*args, **kwargs)

        # What Dynamo looks for in a function that it is about to trace.
        call._torchdynamo_disable = True
        call._torchdynamo_disable_msg = reason
        return call

    return decorate
