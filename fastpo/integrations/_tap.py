"""A tap on a model's LM head: the model's own forward runs, and what would enter the head is ours.

The trunk is never called by name. So whatever a class does before its head (a transform, a
multiplier, an image tower), whatever its forward returns beside logits (a router loss), and
whatever wraps it (DDP, FSDP, peft, autocast, torch.compile) stays as it is.
"""

from __future__ import annotations

import sys
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastpo.integrations._lm_head import Sample, check_logits, output_embeddings, read_head, sample

CHECKED_ROWS = 4
FRAMEWORKS = ("torch", "deepspeed", "accelerate", "fastpo")
WRAPPERS = ("torch", "deepspeed", "accelerate", "peft")

Consume = Callable[[Tensor, dict[str, Any]], Tensor]
"""What stands in for the head's product: hidden [B, K, D] and the head -> any tensor."""


class Tap:
    """Closed, it lets the head do its work. Open, it hands the head's input to `consume`.

    Opened by `run`, in which the model must call its head exactly once. The tensor that `consume`
    returns leaves through the head's own hooks (FSDP's and ZeRO-3's gather the weight again before
    its backward); the model then sees a few stand-in logits. On the first run, and again when the
    head has changed, these are true logits of a few rows: the model finishes them (scale, softcap,
    whatever else it does), and the result must be what `read_head` would have made of these rows.
    """

    def __init__(self) -> None:
        self.consume: Consume | None = None
        self.model: Any = None
        self.around: list[Call] = []  # of the model and its wrappers
        self.result: Tensor | None = None
        self.stand_in: Tensor | None = None
        self.made: tuple[Tensor, int] | None = None  # what `consume` returned, its version
        self.sample: Sample | None = None
        self.checked: object = None  # the state of the head that was compared
        self.cleared: set[int] = set()  # numbers of the hooks that changed no logits
        self.calls = 0

    @torch.compiler.disable
    def take(self, head: nn.Module, hidden: Tensor) -> Tensor:
        """Called in the head's place, inside its forward: weights are gathered, autocast is on."""
        self.calls += 1
        if self.calls > 1:
            raise ValueError(_called(self.model, "more than once"))
        # Behind hooks that came later: ZeRO-3's are put back after each generation of TRL.
        head._forward_hooks.move_to_end(head._fastpo_hook.id)
        reading = read_head(self.model, head)
        state = head_state(head)
        self.stand_in = hidden.new_zeros(*hidden.shape[:-1], 1)
        if self.checked != state or not {hook.number for hook in self._hooks()} <= self.cleared:
            rows = hidden.detach().reshape(-1, hidden.shape[-1])[-CHECKED_ROWS:]
            with torch.no_grad():
                self.stand_in = head._fastpo_forward(rows[None])
            self.sample = sample(reading, rows)
            self.checked = state
        made = self.consume(hidden, reading)
        self.made = made, _version(made)
        return made

    @torch.compiler.disable
    def check_hooks(self, head: nn.Module, output: Tensor) -> None:
        """Refuse hooks that change the head's output: they would change the loss in its place.

        Those of the frameworks that shard a head may: they hand the same numbers on.
        """
        made, version = self.made
        if output is made and _version(made) == version:
            return
        others = [hook.name for hook in _hooks_of_others(head)]
        if others:
            raise ValueError(
                f"{type(self.model).__name__}'s LM head has a forward hook that changes its output "
                f"(of {', '.join(others)}): remove it, or score the logits with fastpo.policy_loss"
            )

    @torch.compiler.disable
    def verify(self, outputs: Any) -> None:
        """Compare the logits that the model made of the stand-in rows with the reading."""
        if self.sample is None:
            return
        expected, self.sample = self.sample, None
        logits = getattr(outputs, "logits", None)
        try:
            if logits is None:
                raise ValueError(f"{type(self.model).__name__} returns no logits to compare with")
            check_logits(self.model, expected, logits.reshape(-1, logits.shape[-1]))
            self._verify_hooks(expected, outputs)
        except ValueError:
            self.checked = None
            raise

    def _hooks(self) -> list[Hook]:
        return [hook for call in self.around for hook in _hooks_of_others(call.module)]

    def _verify_hooks(self, expected: Sample, outputs: Any) -> None:
        """Run the hooks around the model on these logits: in a scored call they see none."""
        made = self.made[0]
        if made.ndim == 0 and getattr(outputs, "loss", None) is None:
            outputs.loss = made.detach().clone()  # hooks that log it find it in a scored call, too
        for call in self.around:
            if hooks := _hooks_of_others(call.module):
                _run_before(call)
            for hook in hooks:
                self._verify_hook(hook, call, expected, outputs)

    def _verify_hook(self, hook: Hook, call: Call, expected: Sample, outputs: Any) -> None:
        inputs = call[1:] if hook.takes_keywords else call[1:2]
        try:
            returned = hook.function(hook.module, *inputs, outputs)
            logits = (outputs if returned is None else returned).logits
            check_logits(self.model, expected, logits.reshape(-1, logits.shape[-1]))
        except Exception as error:  # the hook's own, of any kind
            raise ValueError(
                f"{type(hook.module).__name__} has a forward hook, {hook.name}, that changes "
                f"{type(self.model).__name__}'s logits or cannot be run on a few of them: "
                "remove it, or score the logits with fastpo.policy_loss"
            ) from error
        self.cleared.add(hook.number)


class Call(NamedTuple):
    """A call of `module` that is under way, and what it was given."""

    module: nn.Module
    inputs: tuple
    keywords: dict[str, Any]


class Hook(NamedTuple):
    """A forward hook of `module`; no other of this process has its number."""

    module: nn.Module
    number: int
    function: Callable[..., Any]
    takes_keywords: bool
    name: str


def _hooks_of_others(module: nn.Module) -> list[Hook]:
    """A module's forward hooks that no framework has put there."""
    keywords = module._forward_hooks_with_kwargs
    return [
        Hook(module, number, hook, number in keywords, name)
        for number, hook, name in _of_others(module._forward_hooks)
    ]


def _of_others(hooks: dict[int, Any]) -> Iterator[tuple[int, Callable[..., Any], str]]:
    for number, hook in hooks.items():
        function = getattr(hook, "func", hook)  # partials
        if (getattr(function, "__module__", None) or "").split(".")[0] not in FRAMEWORKS:
            yield number, hook, getattr(function, "__qualname__", type(hook).__name__)


def _run_before(call: Call) -> None:
    """A module's pre-hooks: some forward hooks take away what these have put down (timers)."""
    keywords = call.module._forward_pre_hooks_with_kwargs
    for number, hook, _ in _of_others(call.module._forward_pre_hooks):
        with suppress(Exception):  # it has run on them before
            hook(*(call if number in keywords else call[:2]))


@torch.compiler.disable
def _calls_around(model: nn.Module) -> list[Call]:
    """Of `model`, and of the wrappers (DDP, peft, torch.compile) in whose call the present one is.

    A model does not know what wraps it; the stack does, and the walk takes microseconds.
    """
    found, frame = [], sys._getframe()
    while frame is not None:
        if frame.f_code is nn.Module._call_impl.__code__:
            given = frame.f_locals
            caller = given["self"]
            if caller is model or type(caller).__module__.split(".")[0] in WRAPPERS:
                found.append(Call(caller, given["args"], given["kwargs"]))
        frame = frame.f_back
    if all(call.module is not model for call in found):
        found.insert(0, Call(model, (), {}))
    return found


def _version(tensor: Tensor) -> int:
    """How often it was written to; unknown of tensors made under inference mode."""
    return 0 if tensor.is_inference() else tensor._version


def head_state(head: nn.Module) -> object:
    """What tells one use of a head from another: its class, its hooks, the adapters that are on."""
    adapters = tuple(getattr(head, "active_adapters", None) or ())
    disabled = bool(getattr(head, "disable_adapters", False))
    numbers = [
        number
        for hooks in (head._forward_hooks, head._forward_pre_hooks)
        for number, _, _ in _of_others(hooks)
    ]
    return (id(head), type(head), adapters, disabled, *numbers)


def _tapped_forward(self: nn.Module, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    if self._fastpo_tap.consume is None:
        return self._fastpo_forward(hidden, *args, **kwargs)
    return self._fastpo_tap.take(self, hidden)


def _deliver(head: nn.Module, args: Any, output: Tensor) -> Tensor | None:
    """The head's last forward hook: keeps the result, hands the stand-in to the model."""
    tap = head._fastpo_tap
    if tap.stand_in is None:
        return None
    tap.check_hooks(head, output)
    tap.result, stand_in, tap.stand_in = output, tap.stand_in, None
    return stand_in


def open_tap(head: nn.Module) -> Tap:
    """Put a tap on `head`, once; it stays closed until `run`."""
    if "_fastpo_tap" not in head.__dict__:
        head._fastpo_forward = head.forward
        head._fastpo_tap = Tap()
        head._fastpo_hook = head.register_forward_hook(_deliver)
        head.forward = types.MethodType(_tapped_forward, head)
    return head._fastpo_tap


def close_tap(head: nn.Module) -> None:
    """Take the tap off `head` again."""
    if "_fastpo_tap" not in head.__dict__:
        return
    head._fastpo_hook.remove()
    previous = head._fastpo_forward
    del head.forward
    if getattr(previous, "__func__", None) is not type(head).forward:
        head.forward = previous
    del head._fastpo_forward, head._fastpo_tap, head._fastpo_hook


def _called(model: nn.Module, times: str) -> str:
    return (
        f"{type(model).__name__}'s forward calls its LM head {times}, expected once: score its "
        "logits with fastpo.policy_loss"
    )


@contextmanager
def tapped(model: nn.Module) -> Iterator[Tap]:
    """A tap for the length of one block, or the one that is there."""
    head = output_embeddings(model)
    kept = "_fastpo_tap" in head.__dict__
    try:
        yield open_tap(head)
    finally:
        if not kept:
            close_tap(head)


def run(
    model: nn.Module, forward: Callable[..., Any], consume: Consume, *args: Any, **kwargs: Any
) -> tuple[Tensor, Any]:
    """`forward(*args, **kwargs)` of `model` with `consume` in its head's place.

    Returns:
        What `consume` returned, and the model's outputs, whose logits are meaningless.

    Raises:
        ValueError: the model calls its head not at all or more than once, or its logits are not
            those of the head as read.
    """
    tap = open_tap(output_embeddings(model))
    tap.model, tap.consume, tap.calls, tap.result = model, consume, 0, None
    tap.around = _calls_around(model)
    try:
        outputs = forward(*args, **kwargs)
        if not tap.calls:
            raise ValueError(_called(model, "not at all"))
        tap.verify(outputs)
        return tap.result, outputs
    finally:
        tap.model = tap.consume = tap.result = tap.stand_in = tap.sample = tap.made = None
        tap.around = []
