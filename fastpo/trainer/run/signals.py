"""Signals: Ctrl-C, SIGTERM and SIGHUP that let a step finish; a limit on other people's code."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

TERMINATION = tuple(
    getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)
)


class Terminated(KeyboardInterrupt):
    """SIGTERM or SIGHUP, as an exception that lets files be closed."""

    def __init__(self, signal_number: int):
        super().__init__()
        self.exit_code = 128 + signal_number


@contextmanager
def terminable() -> Iterator[None]:
    """In this context SIGTERM and SIGHUP raise Terminated where they would end the process."""

    def terminate(number: int, frame: FrameType | None) -> None:
        raise Terminated(number)

    previous = _install(terminate, TERMINATION)
    try:
        yield
    finally:
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


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise TimeoutError in Python code that runs longer (not inside one long C call).

    Only in the main thread, and only where the system has interval timers; elsewhere no limit.
    """
    if threading.current_thread() is not threading.main_thread() or not hasattr(
        signal, "setitimer"
    ):
        yield
        return

    def expire(number: int, frame: FrameType | None) -> None:
        raise TimeoutError(f"took longer than {seconds:g} s")

    previous = signal.signal(signal.SIGALRM, expire)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
