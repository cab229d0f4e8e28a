"""A task's code, in processes of its own: whatever it does there, a run goes on or says one line.

`problem` and `reward` are other people's programs. They hang, exit, fork, set alarms, swallow
exceptions, seed generators and change directories; out there none of it meets the training.

Workers are forks, made before the run has threads or a CUDA context: the task is neither pickled
nor imported again. Problems, completions and rewards travel as pickles over pipes.
"""

from __future__ import annotations

import ctypes
import math
import mmap
import multiprocessing
import os
import random
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection, wait
from multiprocessing.reduction import ForkingPickler
from typing import Any

from fastpo.trainer.data.tasks import Problem, Task, Verdict, draw, judge, rows_of
from fastpo.trainer.run import console
from fastpo.trainer.run.errors import TrainerError
from fastpo.trainer.run.signals import TERMINATION

MOST_WORKERS = 8  # of a default; each is a fork, so memory is shared
PARTS_PER_WORKER = 4  # of a batch: answers differ in what judging them costs
CLOSING_SECONDS = 0.5
PR_SET_PDEATHSIG = 1  # of <sys/prctl.h>
_fork = multiprocessing.get_context("fork")


class Verifier:
    """A task behind worker processes; a context manager, which ends them.

    Every worker has its own copy of the task, as it was made: what `problem` or `reward` change on
    it stays with that worker. Problems are drawn in the first one only.

    Args:
        workers: how many; 0 = one per core, at most 8.
        seconds: the longest that one call of `problem` or `reward` may take, wall time.
    """

    def __init__(self, task: Task, *, workers: int = 0, seconds: float = 10.0):
        self.alphabet, self.stop, self.name = task.alphabet, task.stop, type(task).__name__
        self.rows, self.test_rows = rows_of(task, "rows"), rows_of(task, "test_rows")
        self.seconds = seconds
        self._pool: list[_Worker] = []
        for _ in range(workers or min(MOST_WORKERS, _cores())):
            self._pool.append(_Worker(task, [worker.connection for worker in self._pool]))

    def __enter__(self) -> Verifier:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the workers, and whatever the task has started in them."""
        for worker in self._pool:
            worker.connection.close()
        deadline = time.monotonic() + CLOSING_SECONDS
        for worker in self._pool:
            worker.end(deadline)
        self._pool.clear()

    def draw(self, rng: random.Random, count: int) -> list[Problem]:
        """`count` problems of the task, by `rng`, which moves on as if it had been used here.

        Raises:
            TrainerError: `problem` raised, took too long, or returned no problem that can be sent.
        """
        console.tell(f"{self.name} makes {count} problems")
        [(problems, state)] = self._run(_draw, [(rng.getstate(), count)])
        rng.setstate(state)
        return problems

    def judge(self, answers: Sequence[tuple[Problem, str]]) -> list[Verdict]:
        """The verdict on every (problem, completion), in their order.

        Raises:
            TrainerError: `reward` raised, took too long, ended its process, or gave no number.
        """
        console.tell(f"{self.name} judges {len(answers)} completions")
        size = max(1, math.ceil(len(answers) / (PARTS_PER_WORKER * len(self._pool))))
        parts = [answers[i : i + size] for i in range(0, len(answers), size)]
        return [verdict for part in self._run(_judge, parts) for verdict in part]

    def _run(self, work: Any, parts: Sequence[Any]) -> list[Any]:
        """`work` on every part, each in the next worker that is free; results in order."""
        results, todo = [None] * len(parts), list(enumerate(parts))[::-1]
        idle, busy = self._pool[::-1], {}
        try:
            while todo or busy:
                while todo and idle:
                    worker = idle.pop()
                    index, part = todo.pop()
                    worker.send(work, part)
                    busy[worker.connection] = (worker, index, part)
                for connection in self._ready(busy):
                    worker, index, part = busy.pop(connection)
                    results[index] = self._result(worker, part)
                    idle.append(worker)
        except BaseException:  # what is still on its way must not answer a later question
            self.close()
            raise
        return results

    def _ready(self, busy: dict[Connection, tuple[_Worker, int, Any]]) -> list[Connection]:
        """Connections with an answer, or the error that a worker has taken too long."""
        oldest, _, part = min(busy.values(), key=lambda entry: entry[0].started)
        left = oldest.started + self.seconds - time.monotonic()
        ready = wait(busy, timeout=max(left, 0.0))
        if not ready and time.monotonic() > oldest.started + self.seconds:
            raise self._error(
                f"took longer than {self.seconds:g} s (verifier.seconds)", oldest, part
            )
        return ready

    def _result(self, worker: _Worker, part: Any) -> Any:
        try:
            error, result = worker.connection.recv()
        except EOFError:
            raise self._error(f"ended its process ({worker.fate()})", worker, part) from None
        if error:
            raise TrainerError(error)
        return result

    def _error(self, what: str, worker: _Worker, part: Any) -> TrainerError:
        if isinstance(part, tuple):
            return TrainerError(f"{self.name}.problem {what}")
        problem, text = part[worker.position]
        return TrainerError(
            f"{self.name}.reward {what}, for prompt {problem.prompt!r} and completion {text!r}; a "
            "verifier must judge any text"
        )


def _cores() -> int:
    """This process's part of those that it may use, where the system says so."""
    linux = hasattr(os, "sched_getaffinity")
    cores = len(os.sched_getaffinity(0)) if linux else os.cpu_count() or 1
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))  # torchrun's


class _Worker:
    """One process, the pipe to it, and the shared memory that says what it is at."""

    def __init__(self, task: Task, siblings: list[Connection]):
        self.connection, theirs = _fork.Pipe()
        self._clock = memoryview(mmap.mmap(-1, 16)).cast("d")  # call began at; index in the part
        self.process = _fork.Process(
            target=_serve,
            args=(task, theirs, self._clock, [*siblings, self.connection], os.getpid()),
            name="fastpo verifier",
        )
        self.process.start()
        theirs.close()

    @property
    def started(self) -> float:
        """When the call that goes on began, on the monotonic clock."""
        return self._clock[0]

    @property
    def position(self) -> int:
        """Which element of the part it is at."""
        return int(self._clock[1])

    def send(self, work: Any, part: Any) -> None:
        """Ask for `work` on a part."""
        self._clock[0], self._clock[1] = time.monotonic(), 0
        with suppress(BrokenPipeError, ConnectionResetError):  # dead: reading its answer says so
            self.connection.send((work, part))

    def fate(self) -> str:
        """How the process ended."""
        self.process.join(CLOSING_SECONDS)
        code = self.process.exitcode
        if code is not None and code < 0:
            return f"killed by {signal.Signals(-code).name}"
        return f"exit code {code}"

    def end(self, deadline: float) -> None:
        """Wait for the process, then kill what is left of its group."""
        self.process.join(max(0.0, deadline - time.monotonic()))
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.kill()  # one that was not yet the leader of its group
        self.process.join()


def _serve(
    task: Task, connection: Connection, clock: memoryview, others: list[Connection], parent: int
) -> None:
    """What a worker does: answer until the pipe closes."""
    os.setsid()  # Ctrl-C in the terminal is for the run; and killpg finds all that the task starts
    _die_with(parent)
    for number in (signal.SIGINT, *TERMINATION):  # not SIG_IGN: programs started here inherit that
        signal.signal(number, lambda *_: None)
    for other in others:  # or this worker would keep its siblings' pipes open
        other.close()
    with suppress(EOFError, BrokenPipeError, ConnectionResetError):  # the run has ended, or failed
        while True:
            work, part = connection.recv()
            connection.send_bytes(_answer(task, work, part, clock))


def _answer(task: Task, work: Any, part: Any, clock: memoryview) -> bytes:
    """A pickle of (error, result), one of them None."""
    try:
        return ForkingPickler.dumps((None, work(task, part, clock)))
    except TrainerError as error:
        return ForkingPickler.dumps((str(error), None))
    except Exception as error:  # of pickling
        reason = " ".join(str(error).split())
        message = f"{type(task).__name__}.problem gave what no pipe can carry ({reason}): "
        return ForkingPickler.dumps((f"{message}keep plain values in Problem.data", None))


def _draw(task: Task, part: tuple[Any, int], clock: memoryview) -> tuple[list[Problem], Any]:
    rng = random.Random()
    rng.setstate(part[0])
    problems = []
    for index in range(part[1]):
        with _one_call(clock, index):
            problems.append(draw(task, rng))
    return problems, rng.getstate()


def _judge(task: Task, part: Sequence[tuple[Problem, str]], clock: memoryview) -> list[Verdict]:
    verdicts = []
    for index, (problem, text) in enumerate(part):
        with _one_call(clock, index):
            verdicts.append(judge(task, problem, text))
    return verdicts


@contextmanager
def _one_call(clock: memoryview, index: int) -> Iterator[None]:
    """Note when a call of the task began; end the forks that come back from it."""
    me = os.getpid()
    clock[0], clock[1] = time.monotonic(), index
    try:
        yield
    finally:
        if os.getpid() != me:
            os._exit(0)


def _die_with(parent: int) -> None:
    """Have the kernel kill this process when the run is killed, whatever the task is doing."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)
