"""Verifiable tasks: something that makes problems and a program that checks answers.

Bring your own: `task = "my_module:MyTask"` in a recipe names any class (or function) that, called
with `task_args`, returns an object with the methods of `Task`.
"""

from __future__ import annotations

import importlib
import random
import sys
from collections.abc import Callable, Iterable, Mapping
from numbers import Number
from typing import Any, NamedTuple, Protocol

from fastpo.trainer.run.errors import RecipeError, TrainerError

HELD_OUT_PART = 5  # of rows that are trained on, too: one in so many
TASK_PARTS = ("alphabet", "stop", "problem", "reward")


class Problem(NamedTuple):
    """One prompt and whatever the verifier needs to judge a completion of it."""

    prompt: str
    answer: str | None = None  # a right completion: the warm-up learns from it, tables show it
    data: Any = None  # for the verifier; anything that can be pickled
    messages: list[dict[str, str]] | None = None  # in place of the prompt, for the chat template


class Verdict(NamedTuple):
    """What a verifier says of a completion."""

    reward: float
    parts: dict[str, float]  # named components, which are logged apart


class Task(Protocol):
    """What the trainer asks of a task."""

    alphabet: str | None
    """Characters of prompts and answers, for a model built with a character vocabulary."""
    stop: str | None
    """Completions end at this string, which must fit in one token (a newline). None = EOS only."""

    def problem(self, rng: random.Random) -> Problem:
        """Draw one problem, using no randomness but `rng`."""

    def reward(self, problem: Problem, completion: str) -> float | Mapping[str, float]:
        """Judge a completion: 1.0 = right, anything less = wrong.

        A NaN reward takes the completion out of the batch (say, a judge that gave up). A mapping
        holds `reward` and named components of it, which are logged apart.
        """


class Source(Protocol):
    """Where problems come from: a task behind its worker processes (`verifier.Verifier`)."""

    name: str
    rows: list[Problem] | None  # all there are to train on; None = the task makes them
    test_rows: list[Problem] | None  # held out as they are; None = some of the others

    def draw(self, rng: random.Random, count: int) -> list[Problem]:
        """`count` problems, by `rng`, which moves on."""


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


ROW_TASKS = {
    "jsonl": "fastpo.trainer.data.rows:JsonLines",
    "datasets": "fastpo.trainer.data.rows:HubRows",
}
TASKS: dict[str, Any] = {"sort": SortDigits, **ROW_TASKS}


def load_task(name: str, arguments: dict[str, Any]) -> Task:
    """Make the task called `name`: one of TASKS, or `module:attribute` (also from the cwd).

    Raises:
        RecipeError: no such task, or it does not take these arguments.
    """
    factory = TASKS.get(name, name)
    if isinstance(factory, str):
        factory = import_attribute(factory, "task", ", ".join(TASKS))
    try:
        task = factory(**arguments)
    except RecipeError:
        raise
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
    for part in ("alphabet", "stop"):
        value = getattr(task, part)
        if not isinstance(value, str | None) or value == "":
            raise RecipeError(
                f"{type(task).__name__}.{part} is {value!r}, expected one string that is not "
                "empty, or None"
            )
    return task


def import_attribute(name: str, kind: str, known: str) -> Any:
    """What `module:attribute` names; the working directory is searched, too.

    Raises:
        RecipeError: it cannot be imported; or it is no such name, and not one of `known`.
    """
    module, colon, attribute = name.partition(":")
    if not colon:
        raise RecipeError(f"{kind} is {name!r}, expected {known}, or your own module:attribute")
    if "" not in sys.path:
        sys.path.insert(0, "")
    try:
        return getattr(importlib.import_module(module), attribute)
    except Exception as error:  # whatever the user's module raises
        raise RecipeError(f"cannot import {kind} {name!r}: {_describe(error)}") from error


def judge(task: Task, problem: Problem, completion: str) -> Verdict:
    """The task's verdict as plain floats; a verifier that raises becomes one line naming it."""
    try:
        found = task.reward(problem, completion)
        if not isinstance(found, Mapping):
            return Verdict(float(found), {})
        parts = {str(name): float(value) for name, value in found.items()}
        return Verdict(parts.pop("reward"), parts)
    except BaseException as error:  # SystemExit, too
        raise TrainerError(
            f"{type(task).__name__}.reward raised {_describe(error)}, for prompt "
            f"{problem.prompt!r} and completion {completion!r}; a verifier returns a number, or a "
            "mapping with `reward`, for any text"
        ) from error


def draw(task: Task, rng: random.Random) -> Problem:
    """The task's next problem, its texts as plain strings."""
    name = type(task).__name__
    try:
        problem = task.problem(rng)
    except BaseException as error:
        raise TrainerError(f"{name}.problem raised {_describe(error)}") from error
    return _plain(problem, f"{name}.problem")


def rows_of(task: Task, part: str) -> list[Problem] | None:
    """The task's `rows` or `test_rows`, if it has some, checked as if it had drawn them.

    Raises:
        TrainerError: a row is no Problem, or there is none to train on.
    """
    rows, name = getattr(task, part, None), type(task).__name__
    if rows is None:
        return None
    rows = [_plain(row, f"{name}.{part}") for row in rows]
    if not rows and part == "rows":
        raise TrainerError(
            f"{name}.rows are empty, expected problems, or None: `problem` makes them"
        )
    return rows


def _plain(problem: Any, whose: str) -> Problem:
    if not isinstance(problem, Problem):
        raise TrainerError(f"{whose} gave {problem!r}, expected a Problem")
    prompt, answer = problem.prompt, problem.answer
    if not isinstance(prompt, str):
        raise TrainerError(f"{whose} gave the prompt {prompt!r}, expected text")
    if not isinstance(answer, str | Number | None):
        raise TrainerError(f"{whose} gave the answer {answer!r}, expected text or None")
    # Not numpy.str_, say: a checkpoint that holds another type than Python's own cannot be read.
    return problem._replace(prompt=str(prompt), answer=None if answer is None else str(answer))


def _describe(error: BaseException) -> str:
    """`KeyError: 'sum'`, on one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())


class ProblemStream:
    """An endless, resumable stream of problems, without those whose prompt is in `exclude`.

    A task that makes problems is asked for them. One that has `rows` gives each once per epoch, in
    an order drawn anew.
    """

    MAX_TRIES = 1000

    def __init__(
        self,
        task: Source,
        seed: str,
        exclude: Iterable[str] = (),
        fits: Callable[[Problem], bool] = lambda problem: True,
    ):
        self.task = task
        self.exclude = set(exclude)
        self.fits = fits  # others are skipped
        self.rng = random.Random(seed)
        self._begin_epoch()

    def state(self) -> dict[str, Any]:
        """Plain values from which `load_state` goes on."""
        return {"rng": self.rng.getstate(), "epoch": self.epoch, "position": self.position}

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on where another stream of the same rows was; a shorter list begins a new epoch."""
        if self.task.rows:
            self.rng.setstate(state["epoch"])
            self._begin_epoch()
        self.rng.setstate(state["rng"])
        self.position = state["position"]

    def take(self, count: int, *, distinct: bool = False) -> list[Problem]:
        """The next `count` problems; `distinct`: and exclude their prompts from now on.

        Raises:
            TrainerError: the task makes too few different prompts; or see `draw`.
        """
        taken: list[Problem] = []
        tries = 0  # in a row without a new problem
        limit = max(self.MAX_TRIES, 2 * len(self.task.rows or ()))
        while len(taken) < count:
            for problem in self._draw(count - len(taken)):
                tries += 1
                if problem.prompt in self.exclude or not self.fits(problem):
                    continue
                taken.append(problem)
                tries = 0
                if distinct:
                    self.exclude.add(problem.prompt)
            if tries >= limit:
                raise TrainerError(
                    f"{self.task.name} makes too few different prompts: {tries} in a row were "
                    f"among {len(self.exclude)} held-out ones, or longer than "
                    "rollout.max_prompt_tokens; lower eval.problems, or raise that"
                )
        return taken

    def _draw(self, count: int) -> list[Problem]:
        rows = self.task.rows
        if rows is None:
            return self.task.draw(self.rng, count)
        if self.position >= len(self.order):
            self._begin_epoch()
        chosen = self.order[self.position : self.position + count]
        self.position += len(chosen)
        return [rows[index] for index in chosen]

    def _begin_epoch(self) -> None:
        self.epoch, self.position = self.rng.getstate(), 0  # before its order was drawn
        count = len(self.task.rows or ())
        self.order = self.rng.sample(range(count), count)


def held_out(
    task: Source, count: int, fits: Callable[[Problem], bool] = lambda problem: True
) -> list[Problem]:
    """`count` different problems, the same for every seed; a task's own test rows in their order.

    Of a task that has `rows` and no test rows, a fifth at most: the others are there to train on.

    Raises:
        TrainerError: the task makes too few; or no test row fits.
    """
    if task.test_rows is None:
        if task.rows is not None:
            different = len({row.prompt for row in task.rows})
            count = min(count, max(1, different // HELD_OUT_PART))
        return ProblemStream(task, "held-out", fits=fits).take(count, distinct=True)
    problems = [problem for problem in task.test_rows if fits(problem)]
    if not problems:
        raise TrainerError("no test row fits rollout.max_prompt_tokens: raise it")
    return problems[:count]


def fewer_held_out(task: Source, wanted: int, found: int) -> str:
    """A line on rows that were too few to hold out what was asked for; "" where they were not."""
    if task.rows is None or task.test_rows is not None or found >= wanted:
        return ""
    return (
        f"Held out: {found} of {len(task.rows)} rows, a fifth at most, and not eval.problems = "
        f"{wanted}; rows of their own, task_args.test, are held out as they are"
    )
