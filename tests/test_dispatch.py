"""How many operations a call dispatches: on a GPU each of them is a launch of its own."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import fastpo
from fastpo import backends
from fastpo.testing.linear import LinearCase

VIEWS_AND_EMPTY = {
    "_local_scalar_dense",
    "_reshape_alias",
    "_unsafe_view",
    "alias",
    "as_strided",
    "detach",
    "empty",
    "empty_like",
    "empty_strided",
    "expand",
    "new_empty",
    "select",
    "slice",
    "split",
    "squeeze",
    "t",
    "transpose",
    "unbind",
    "unsqueeze",
    "view",
}


class Counting(TorchDispatchMode):
    """Counts ATen and fastpo operators that do something; views and allocations do not."""

    def __init__(self):
        super().__init__()
        self.seen = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function._schema.name.split("::")[1]
        if name not in VIEWS_AND_EMPTY:
            self.seen[name] += 1
        return function(*args, **(kwargs or {}))


def count(step) -> Counter:
    step()  # whatever is made once
    with Counting() as counting:
        step()
    return counting.seen


needs_cpp = pytest.mark.skipif(
    backends.unavailable("cpp") is not None, reason="torch's own primitives are many operations"
)
EVERYTHING = fastpo.dapo(kl_coef=0.1, entropy_coef=0.01, ratio_max=3.0)


@needs_cpp
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("objective", "most"), [(fastpo.dapo(), 25), (EVERYTHING, 36)])
def test_policy_loss(objective, most, masked):
    """Forward and backward with all metrics, the checks of values on CPU and the kernels among
    them: the specification is not run a second time for the metrics."""
    case = LinearCase.random()
    options = case.options(objective) | {"mask": case.mask if masked else None, "inplace": True}
    logits = case.hidden @ case.weight.t()
    advantages = case.advantages[:, 0].clone()

    def step():
        leaf = logits.detach().requires_grad_()
        loss = fastpo.policy_loss(leaf, case.tokens, advantages, **options).loss
        torch.autograd.grad(loss, leaf)

    seen = count(step)
    assert seen["cpp_row_policy_loss"] == seen["cpp_scale_"] == 1
    assert seen.total() <= most, seen


@needs_cpp
@pytest.mark.parametrize(("masked", "most"), [(False, 34), (True, 48)])
def test_linear_policy_loss_of_one_chunk(masked, most):
    """A mask costs a gather of each input and a scatter of each output, on CPU."""
    case = LinearCase.random()
    objective = fastpo.dapo()
    options = case.options(objective) | {"mask": case.mask if masked else None}
    leaves = case.leaves()
    advantages = case.advantages[:, 0].clone()

    def step():
        loss = fastpo.linear_policy_loss(*leaves, case.tokens, advantages, **options).loss
        torch.autograd.grad(loss, leaves)

    seen = count(step)
    assert seen["addmm"] == 3
    assert seen.total() <= most, seen
