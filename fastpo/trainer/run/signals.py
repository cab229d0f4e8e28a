"""Signals: Ctrl-C, SIGTERM and SIGHUP let a step finish, or end a run with its files closed."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

TERMINATION = tuple(
    getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)
)
AGAIN_SECONDS = 0.02


class Terminated(KeyboardInterrupt):
    """A signal that ends a process, as an exception that lets files be closed."""

    def __init__(self, signal_number: int):
        super().__init__()
        self.exit_code = 128 + signal_number


@contextmanager
def terminable() -> Iterator[None]:
    """In this context SIGINT, SIGTERM and SIGHUP raise Terminated.

    Raised inside a destructor it would be lost: Python prints such exceptions and goes on. Then the
    signal is sent once more, a moment later.
    """

    def terminate(number: int, frame: FrameType | None) -> None:
        raise Terminated(number)

    def again(number: int) -> None:
        if signal.getsignal(number) is terminate:
            os.kill(os.getpid(), number)

    def unraisable(lost: Any) -> None:
        if isinstance(lost.exc_value, Terminated):
            number = lost.exc_value.exit_code - 128
            threading.Timer(AGAIN_SECONDS, again, (number,)).start()
        else:
            hook(lost)

    previous = _install(terminate, (signal.SIGINT, *TERMINATION))
    hook, sys.unraisablehook = sys.unraisablehook, unraisable
    try:
        yield
    finally:
        sys.unraisablehook = hook
        _put_back(previous)


class StopRequest:
    """In this context the first signal only sets `signal_number`; a second one acts at once."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self.say = say
        self.signal_number: int | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        self._previous = _install(self._handle, (signal.SIGINT, *TERMINATION))
        return self

    def __exit__(self, *_: object) -> None:
        _put_back(self._previous)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.signal_number = number
        _put_back(self._previous)
        with suppress(Exception):  # a terminal that has hung up cannot be told
            self.say("stopping after this step, with a checkpoint; once more stops at once")


def _install(handler: Callable[[int, FrameType | None], None], numbers: Iterable[int]) -> dict:
    """Handle these signals, but not those that are ignored (nohup, background jobs)."""
    # Python allows handlers in the main thread only; elsewhere signals keep their meaning.
    if threading.current_thread() is not threading.main_thread():
        return {}
    heard = [number for number in numbers if signal.getsignal(number) != signal.SIG_IGN]
    return {number: signal.signal(number, handler) for number in heard}


def _put_back(previous: dict[int, Any]) -> None:
    for number, handler in previous.items():
        signal.signal(number, handler)
    previous.clear()
