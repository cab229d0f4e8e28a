"""Tasks: problems, verifiers, streams that resume, held-out problems that stay held out."""

import contextlib
import random
import sys

import numpy as np
import pytest

from fastpo.trainer.data.tasks import (
    Problem,
    ProblemStream,
    SortDigits,
    draw,
    held_out,
    judge,
    load_task,
    parse_integer,
)
from fastpo.trainer.data.verifier import Verifier
from fastpo.trainer.run.errors import RecipeError, TrainerError


@pytest.fixture
def source():
    """Makes `sort` behind a worker process."""
    with contextlib.ExitStack() as stack:
        yield lambda **kw: stack.enter_context(Verifier(SortDigits(**kw), workers=1))


OWN_TASK = """
class Half:
    alphabet, stop = "yes?", None
    def problem(self, rng): pass

class Yes(Half):
    def __init__(self, n=1): self.n = n
    def reward(self, problem, completion): return 1.0

class Rude:
    def __init__(self): {}["nothing"]
"""


def test_sort_accepts_the_sorted_digits_and_nothing_else():
    task = SortDigits(digits=4)
    problem = task.problem(random.Random(0))
    digits = problem.prompt.removesuffix("=")
    assert len(digits) == 4 and problem.answer == "".join(sorted(digits))
    assert task.reward(problem, problem.answer) == 1.0
    for wrong in ("", problem.answer[::-1] + "0", problem.answer + "=", problem.answer[:-1]):
        assert task.reward(problem, wrong) == 0.0


def test_parse_integer_is_bounded_and_evaluates_nothing():
    """REGRESSIONS 29: `98**87**76` must not be computed, nor a megabyte of digits converted."""
    assert parse_integer(" 42\n") == 42
    assert parse_integer("-7") == -7
    for text in ("98**87**76", "1+1", "", "-", "4 2", "9" * 1_000_000, "٣", "1e9"):
        assert parse_integer(text) is None


def test_training_problems_are_never_held_out_ones(source):
    task = source(digits=2)
    kept = held_out(task, 50)
    assert len({problem.prompt for problem in kept}) == 50
    assert kept == held_out(task, 50)
    stream = ProblemStream(task, "train-0", [problem.prompt for problem in kept])
    assert not {problem.prompt for problem in stream.take(300)} & {p.prompt for p in kept}


def test_a_stream_goes_on_where_its_state_was_taken(source):
    first = ProblemStream(source(), "train-0")
    first.take(5)
    state = first.rng.getstate()
    second = ProblemStream(source(), "train-1")
    second.rng.setstate(state)
    assert first.take(7) == second.take(7)


def test_too_few_different_problems_is_an_error_and_no_endless_loop(source):
    with pytest.raises(TrainerError, match=r"eval\.problems"):
        held_out(source(digits=1), 11)
    everything = [f"{digit}=" for digit in range(10)]
    with pytest.raises(TrainerError, match="held-out"):
        ProblemStream(source(digits=1), "train", everything).take(1)


def test_a_task_of_the_users_own_is_imported_from_the_working_directory(tmp_path, monkeypatch):
    (tmp_path / "my_own_task.py").write_text(OWN_TASK)
    (tmp_path / "my_broken_task.py").write_text("class Yes\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p])
    assert load_task("my_own_task:Yes", {"n": 3}).n == 3
    for name, reason in (
        ("my_own_task:No", "cannot import task 'my_own_task:No': AttributeError"),
        ("my_own_task:Half", "a Half without reward"),
        ("my_own_task:Rude", "KeyError: 'nothing'"),
        ("my_broken_task:Yes", "SyntaxError"),
    ):
        with pytest.raises(RecipeError, match=reason) as caught:
            load_task(name, {})
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("srt", {}, "task is 'srt', expected sort"),
        ("sort", {"digitz": 3}, "digitz"),
        ("sort", {"digits": 0}, "at least 1"),
        ("no_such_module:Task", {}, "cannot import"),
    ],
)
def test_unknown_tasks_and_arguments(name, arguments, message):
    with pytest.raises(RecipeError, match=message):
        load_task(name, arguments)


@pytest.mark.parametrize("part", ["alphabet", "stop"])
@pytest.mark.parametrize("value", [["a", "b"], 3, b"a", ""])
def test_alphabet_and_stop_are_one_string(part, value, monkeypatch):
    """REGRESSIONS 46: several stop strings, say, before anything is made."""
    monkeypatch.setattr(SortDigits, part, value)
    with pytest.raises(RecipeError, match=rf"SortDigits\.{part} is .*, expected one string"):
        load_task("sort", {})


@pytest.mark.parametrize(
    ("part", "rows", "message"),
    [
        ("rows", [("1=", "1")], r"rows gave \('1=', '1'\), expected a Problem"),
        ("test_rows", ["1="], "test_rows gave '1=', expected a Problem"),
        ("rows", [Problem(b"1=")], "rows gave the prompt b'1=', expected text"),
        ("rows", [], "rows are empty, expected problems, or None"),  # once an endless loop
    ],
)
def test_rows_are_problems_with_plain_texts(part, rows, message):
    """REGRESSIONS 40: numpy strings of a task's own rows become Python's, like drawn ones."""
    task = SortDigits()
    setattr(task, part, rows)
    with pytest.raises(TrainerError, match=message):
        Verifier(task, workers=1)
    setattr(task, part, [Problem(np.str_("1="), np.int64(1))])
    with Verifier(task, workers=1) as verifier:
        [row] = getattr(verifier, part)
    assert type(row.prompt) is str and row.answer == "1"


@pytest.mark.parametrize(
    ("broken", "kind"),
    [
        (lambda: 1 / 0, "ZeroDivisionError"),
        (sys.exit, "SystemExit"),
        (lambda: None, "TypeError"),
        (lambda: {"format": 1.0}, "KeyError: 'reward'"),
        (lambda: {"reward": "yes"}, "ValueError"),
    ],
)
def test_a_raising_verifier_is_named_with_the_completion(broken, kind):
    class Broken(SortDigits):
        def reward(self, problem, completion):
            return broken()

    with pytest.raises(TrainerError) as caught:
        judge(Broken(), Problem("12=", "12"), "21")
    for part in ("Broken.reward", kind, "'12='", "'21'"):
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("made", "reason"),
    [
        (lambda: {}["sum"], "raised KeyError: 'sum'"),
        (lambda: "12=", "gave '12=', expected a Problem"),
        (lambda: Problem(12), "gave the prompt 12, expected text"),
        (lambda: Problem("12=", ["12"]), r"gave the answer \['12'\], expected text or None"),
    ],
)
def test_a_task_that_makes_no_problems_is_named(made, reason):
    class Broken(SortDigits):
        def problem(self, rng):
            return made()

    with pytest.raises(TrainerError, match=rf"Broken\.problem {reason}"):
        draw(Broken(), random.Random())


@pytest.mark.parametrize(
    ("answer", "text"),
    [
        (np.str_("12"), "12"),
        (12, "12"),
        (np.int64(12), "12"),
        (np.float32(1.5), "1.5"),
        (None, None),
    ],
)
def test_problems_hold_plain_text_whatever_the_task_gives(answer, text):
    """REGRESSIONS 40: a row of a string array is a numpy.str_, which no checkpoint reads back."""

    class Rows(SortDigits):
        def problem(self, rng):
            return Problem(np.str_("12="), answer)

    problem = draw(Rows(), random.Random())
    assert problem == Problem("12=", text)
    assert type(problem.prompt) is str and type(problem.answer) is type(text)
