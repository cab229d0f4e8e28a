"""Signals, and readers that go away: a run stops at a checkpoint, or goes on."""

import io
import json
import os
import signal
import sys
import threading
import time

import pytest
from tiny_runs import EVALUATION, Even, one_line, rows

from fastpo.trainer import experience
from fastpo.trainer.run import checkpoint
from fastpo.trainer.run.signals import TERMINATION, StopRequest, terminable
from fastpo.trainer.source import Source


@pytest.fixture
def sigint_as_in_a_terminal():
    """Shells start background jobs, CI among them, with SIGINT ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("sigint_as_in_a_terminal")
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_ctrl_c_saves_a_checkpoint_that_resumes(tiny, monkeypatch, capsys, number, code):
    monkeypatch.setattr(Even, "after", EVALUATION + 2 * 16 + 5)
    monkeypatch.setattr(Even, "sabotage", lambda self: os.kill(os.getppid(), number))
    run = tiny("steps=5", "algorithm.dynamic_sampling=false", code=code)
    output, error = capsys.readouterr()
    assert "stopping after this step" in output
    assert "stopped at step 3" in error and "--resume" in error and error.count("\n") == 1
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    tiny("steps=5", "algorithm.dynamic_sampling=false", "--resume")
    assert [row["step"] for row in rows(run) if "reward" in row] == [1, 2, 3, 4, 5]


@pytest.mark.usefixtures("sigint_as_in_a_terminal")
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("after", [5, 256 + 5], ids=["warm-up", "first evaluation"])
def test_a_signal_before_the_first_step_stops_at_once(
    tiny, monkeypatch, capsys, number, code, after
):
    monkeypatch.setattr(Even, "after", after)
    monkeypatch.setattr(Even, "sabotage", lambda self: os.kill(os.getppid(), number))
    run = tiny("warmup.max_steps=1", code=code)
    one_line(capsys, "stopped at once")
    assert [row for row in rows(run) if row["step"] > 0] == []
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


@pytest.mark.usefixtures("sigint_as_in_a_terminal")
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_inside_a_destructor_is_not_lost(tiny, monkeypatch, capsys, number, code):
    """REGRESSIONS 42: Python prints what a destructor raises, and goes on."""

    class Bomb:
        def __del__(self):
            signal.raise_signal(number)

    def sampled(*arguments, **options):
        Bomb()
        return sample(*arguments, **options)

    sample = experience.sample
    monkeypatch.setattr(experience, "sample", sampled)
    monkeypatch.setattr(Even, "reward", lambda *_: time.sleep(0.1) or 1.0)
    tiny(code=code)
    one_line(capsys, "stopped at once")


@pytest.mark.usefixtures("sigint_as_in_a_terminal")
def test_a_run_stopped_in_its_last_evaluation_is_finished_by_resuming(tiny, monkeypatch, capsys):
    monkeypatch.setattr(Even, "after", EVALUATION + 2 * 16 + 5)
    monkeypatch.setattr(Even, "sabotage", lambda self: os.kill(os.getppid(), signal.SIGINT))
    run = tiny("algorithm.dynamic_sampling=false", code=130)
    one_line(capsys, "stopped at once")
    tiny("algorithm.dynamic_sampling=false", "--resume")
    assert json.loads((run / "summary.json").read_text())["steps"] == 2
    assert [row["step"] for row in rows(run)] == [0, 1, 2, 2]  # the last is the evaluation


def test_ignored_signals_stay_ignored(tiny, monkeypatch):
    """A run under nohup, or in the background of a script, hears no Ctrl-C."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        monkeypatch.setattr(Even, "after", EVALUATION + 5)
        monkeypatch.setattr(Even, "sabotage", lambda self: os.kill(os.getppid(), signal.SIGINT))
        run = tiny("algorithm.dynamic_sampling=false")
    finally:
        signal.signal(signal.SIGINT, before)
    assert (run / "summary.json").exists()


def test_signal_handlers_are_put_back():
    before = [signal.getsignal(number) for number in (signal.SIGINT, *TERMINATION)]
    with terminable(), StopRequest(print):
        assert signal.getsignal(signal.SIGTERM) != before[1]
    assert [signal.getsignal(number) for number in (signal.SIGINT, *TERMINATION)] == before


def test_a_reader_that_goes_away_costs_no_step(tiny, monkeypatch, capsys):
    """`fastpo train ... | head`."""

    class Pipe(io.StringIO):
        def write(self, text):
            if text.startswith("step 2/"):
                raise BrokenPipeError
            return super().write(text)

        def fileno(self):
            return os.open(os.devnull, os.O_RDWR)

    monkeypatch.setattr(sys, "stdout", Pipe())
    run = tiny("steps=5", "log.print_every=1", code=1)
    monkeypatch.undo()
    one_line(capsys, "reader of the output has gone")
    assert checkpoint.load_state(run / "checkpoint")["step"] == 2


@pytest.mark.usefixtures("sigint_as_in_a_terminal")
def test_a_second_ctrl_c_stops_at_once(tiny, monkeypatch, capsys):
    def interrupt(self):
        for _ in range(2):  # at once they would be one
            os.kill(os.getppid(), signal.SIGINT)
            time.sleep(0.3)

    monkeypatch.setattr(Even, "after", EVALUATION + 5)
    monkeypatch.setattr(Even, "sabotage", interrupt)
    tiny(code=130)
    one_line(capsys, "stopped at once")


@pytest.mark.usefixtures("sigint_as_in_a_terminal")
def test_a_second_ctrl_c_stops_a_thread_that_draws_ahead(tiny, monkeypatch, capsys):
    def endless(self):
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.3)
        while True:
            time.sleep(0.01)

    monkeypatch.setattr(Source, "_draw_ahead", endless)
    threads = threading.active_count()
    tiny("rollout.ahead=true", code=130)
    one_line(capsys, "stopped at once")
    assert threading.active_count() == threads


def test_a_signal_during_the_last_step_lets_the_run_finish(tiny, monkeypatch):
    monkeypatch.setattr(Even, "after", EVALUATION + 1 * 16 + 5)
    monkeypatch.setattr(Even, "sabotage", lambda self: os.kill(os.getppid(), signal.SIGINT))
    run = tiny("steps=2", "algorithm.dynamic_sampling=false")
    assert (run / "summary.json").exists()
