"""Verifiable tasks: something that makes problems and a program that checks answers.

Bring your own: `task = "my_module:MyTask"` in a recipe names any class (or function) that, called
with `task_args`, returns an object with the methods of `Task`.
"""

from __future__ import annotations

import importlib
import random
import sys
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple, Protocol

from fastpo.trainer.run.errors import RecipeError, TrainerError
from fastpo.trainer.run.signals import time_limit

VERIFIER_SECONDS = 10.0
TASK_PARTS = ("alphabet", "stop", "problem", "reward")


class Problem(NamedTuple):
    """One prompt and whatever the verifier needs to judge a completion of it."""

    prompt: str
    answer: str  # a right completion; the supervised warm-up learns from it
    data: Any = None


class Task(Protocol):
    """What the trainer asks of a task."""

    alphabet: str | None
    """Characters of prompts and answers, for a model built with a character vocabulary."""
    stop: str | None
    """Completions end at this string, which must fit in one token (a newline). None = EOS only."""

    def problem(self, rng: random.Random) -> Problem:
        """Draw one problem, using no randomness but `rng`."""

    def reward(self, problem: Problem, completion: str) -> float:
        """Judge a completion, by a program that always ends: 1.0 = right, anything less = wrong.

        A NaN reward takes the completion out of the batch (say, a judge that timed out).
        """


def parse_integer(text: str, max_digits: int = 30) -> int | None:
    """The integer that `text` consists of, or None: bounded, no `eval` of what a model wrote."""
    digits = text.strip()
    body = digits[1:] if digits[:1] in ("-", "+") else digits
    if not body.isascii() or not body.isdigit() or len(body) > max_digits:
        return None
    return int(digits)


class SortDigits:
    """`5301=` -> `0135`: the digits in ascending order; 1.0 for an exact answer, else 0.0."""

    alphabet = "0123456789="
    stop = None

    def __init__(self, digits: int = 6):
        if digits < 1:
            raise ValueError(f"digits is {digits}, expected at least 1")
        self.digits = digits

    def problem(self, rng: random.Random) -> Problem:
        """Digits drawn uniformly, with repetition."""
        text = "".join(rng.choices("0123456789", k=self.digits))
        return Problem(prompt=f"{text}=", answer="".join(sorted(text)))

    def reward(self, problem: Problem, completion: str) -> float:
        """1.0 if the completion is exactly the sorted digits."""
        return float(completion == problem.answer)


TASKS = {"sort": SortDigits}


def load_task(name: str, arguments: dict[str, Any]) -> Task:
    """Make the task called `name`: one of TASKS, or `module:attribute` (also from the cwd).

    Raises:
        RecipeError: no such task, or it does not take these arguments.
    """
    factory = TASKS.get(name) or _import_attribute(name)
    try:
        task = factory(**arguments)
    except Exception as error:
        raise RecipeError(
            f"task {name!r} does not take task_args {arguments}: {_describe(error)}"
        ) from error
    lacking = [part for part in TASK_PARTS if not hasattr(task, part)]
    if lacking:
        raise RecipeError(
            f"task {name!r} gives a {type(task).__name__} without {', '.join(lacking)}; a task has "
            f"{', '.join(TASK_PARTS)}"
        )
    return task


def _import_attribute(name: str) -> Any:
    module, colon, attribute = name.partition(":")
    if not colon:
        known = ", ".join(TASKS)
        raise RecipeError(f"task is {name!r}, expected {known}, or your own module:attribute")
    if "" not in sys.path:
        sys.path.insert(0, "")
    try:
        return getattr(importlib.import_module(module), attribute)
    except Exception as error:  # whatever the user's module raises
        raise RecipeError(f"cannot import task {name!r}: {_describe(error)}") from error


def judge(task: Task, problem: Problem, completion: str) -> float:
    """The task's reward as a float; a verifier that raises or hangs becomes one line naming it."""
    try:
        with time_limit(VERIFIER_SECONDS):
            return float(task.reward(problem, completion))
    except (Exception, SystemExit) as error:
        raise TrainerError(
            f"{type(task).__name__}.reward raised {_describe(error)}, for prompt "
            f"{problem.prompt!r} and completion {completion!r}; a verifier must judge any text"
        ) from error


def _describe(error: BaseException) -> str:
    """`KeyError: 'sum'`, on one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())


class ProblemStream:
    """An endless, resumable stream of problems, without those whose prompt is in `exclude`."""

    MAX_TRIES = 1000

    def __init__(self, task: Task, seed: str, exclude: Iterable[str] = ()):
        self.task = task
        self.exclude = set(exclude)
        self.rng = random.Random(seed)

    def __iter__(self) -> Iterator[Problem]:
        return self

    def __next__(self) -> Problem:
        for _ in range(self.MAX_TRIES):
            problem = self._draw()
            if problem.prompt not in self.exclude:
                return problem
        raise TrainerError(
            f"{type(self.task).__name__} makes too few different prompts: {self.MAX_TRIES} in a "
            f"row were among {len(self.exclude)} held-out ones; lower eval.problems"
        )

    def _draw(self) -> Problem:
        try:
            problem = self.task.problem(self.rng)
        except Exception as error:
            name = type(self.task).__name__
            raise TrainerError(f"{name}.problem raised {_describe(error)}") from error
        if not isinstance(problem, Problem):
            raise TrainerError(
                f"{type(self.task).__name__}.problem returned {problem!r}, expected a "
                "fastpo.trainer.Problem"
            )
        return problem

    def take(self, count: int) -> list[Problem]:
        """The next `count` problems."""
        return [next(self) for _ in range(count)]


def held_out(task: Task, count: int) -> list[Problem]:
    """`count` different problems, the same for every seed of a run."""
    stream = ProblemStream(task, "held-out")
    problems = []
    for _ in range(count):
        problems.append(next(stream))
        stream.exclude.add(problems[-1].prompt)
    return problems
