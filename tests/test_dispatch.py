"""How many operations a call dispatches: on a GPU each of them is a launch of its own."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

import fastpo
from fastpo import backends
from fastpo.ops import checks
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
@pytest.mark.parametrize(("objective", "most"), [(fastpo.dapo(), 22), (EVERYTHING, 33)])
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
@pytest.mark.parametrize(("masked", "most"), [(False, 28), (True, 39)])
def test_linear_policy_loss_of_one_chunk(masked, most):
    """A mask costs a gather of what comes in and a scatter of what goes out, on CPU."""
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


@pytest.fixture
def launches(monkeypatch, triton_backend):
    """The names of the Triton kernels launched, as a GPU would see them: one each, and whatever the
    interpreter does in their place is none of its business."""
    from triton.runtime import interpreter

    names: list[str] = []
    run = interpreter.GridExecutor.__call__

    def launch(self, *args, **kwargs):
        names.append(self.fn.__name__.strip("_"))
        with _disable_current_modes():
            return run(self, *args, **kwargs)

    monkeypatch.setattr(interpreter.GridExecutor, "__call__", launch)
    # On a GPU no check reads a value: it would wait for the device.
    monkeypatch.setattr(checks, "inspects_values", lambda tensor: False)
    return names


TRITON_OBJECTIVES = {
    "dapo": fastpo.dapo(),
    "dapo with KL and entropy": EVERYTHING,
    "grpo with KL": fastpo.grpo(kl_coef=0.04),
    "cispo": fastpo.cispo(),
}


@pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are compiled, not interpreted")
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", TRITON_OBJECTIVES)
def test_policy_loss_on_triton(name, masked, launches):
    """At most 12 launches beside the row kernel, forward and backward, with all metrics."""
    case, objective = LinearCase.random(shape=(2, 4)), TRITON_OBJECTIVES[name]
    options = case.options(objective) | {"mask": case.mask if masked else None, "inplace": True}
    logits = case.hidden @ case.weight.t()
    advantages = case.advantages[:, 0].clone()

    def step():
        leaf = logits.detach().requires_grad_()
        options["backend"] = "triton"
        loss = fastpo.policy_loss(leaf, case.tokens, advantages, **options).loss
        torch.autograd.grad(loss, leaf)

    step()
    launches.clear()
    with Counting() as counting:
        step()
    assert launches == ["row_policy_loss_kernel", "metric_sums_kernel", "scale_kernel"]
    assert counting.seen.total() + len(launches) - 1 <= 12, counting.seen
