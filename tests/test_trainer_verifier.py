"""Other people's code in processes of its own: hostile tasks cost one line, and never the run."""

import contextlib
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch

from fastpo.trainer.data.tasks import Problem, SortDigits, Verdict
from fastpo.trainer.data.verifier import Verifier
from fastpo.trainer.run.errors import TrainerError

PROBLEM = Problem("21=", "12")
ANSWERS = [(PROBLEM, "12"), (PROBLEM, "21")]
VERDICTS = [Verdict(1.0, {}), Verdict(0.0, {})]


def task_whose(*, reward=None, problem=None):
    """`sort`, with one of its methods doing something else first."""

    class Hostile(SortDigits):
        def reward(self, asked, completion):
            before = reward() if reward else None
            return super().reward(asked, completion) if before is None else before

        def problem(self, rng):
            before = problem() if problem else None
            return super().problem(rng) if before is None else before

    return Hostile()


def hang():
    while True:
        with contextlib.suppress(BaseException):
            time.sleep(60)


def alarm():
    """As math-verify limits its own time."""
    heard = []
    signal.signal(signal.SIGALRM, lambda *_: heard.append(1))
    signal.setitimer(signal.ITIMER_REAL, 0.01)
    while not heard:
        time.sleep(0.001)


def spoil():
    random.seed(0)
    torch.manual_seed(0)
    os.chdir("/")
    os.environ["FASTPO_TEST"] = "spoilt"
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    torch.set_default_dtype(torch.float64)


def children():
    """Processes below this one."""
    found = subprocess.run(["ps", "-o", "pid=", "--ppid", str(os.getpid())], capture_output=True)
    return len(found.stdout.split()) - 1  # without ps


def test_verdicts_come_in_order_from_several_workers():
    numbers = [str(n) for n in range(500)]
    asked = [(Problem(f"{n}=", n), n) for n in numbers]
    asked[7] = (asked[7][0], "no")
    with Verifier(SortDigits(), workers=3) as verifier:
        verdicts = verifier.judge(asked)
        assert [v.reward for v in verdicts] == [float(i != 7) for i in range(500)]
        assert verifier.judge([]) == []


def test_parts_of_a_reward_are_plain_numbers():
    with Verifier(task_whose(reward=lambda: {"reward": torch.tensor(0.5), "format": 1})) as both:
        assert both.judge(ANSWERS) == [Verdict(0.5, {"format": 1.0})] * 2


def test_problems_are_those_of_the_generator_itself():
    task = SortDigits()
    mine, theirs = random.Random(3), random.Random(3)
    with Verifier(task, workers=2) as verifier:
        drawn = verifier.draw(theirs, 5) + verifier.draw(theirs, 2)
    assert drawn == [task.problem(mine) for _ in range(7)]
    assert mine.getstate() == theirs.getstate()


@pytest.mark.parametrize("harmless", [alarm, os.fork, spoil, lambda: os.fork() and None])
def test_what_a_verifier_does_to_its_process_meets_neither_the_run_nor_its_verdict(harmless):
    """REGRESSIONS 42: alarms, forks that come back, global state."""
    state, place = random.getstate(), os.getcwd()
    seed, handler = torch.get_rng_state(), signal.getsignal(signal.SIGINT)
    task = task_whose(reward=lambda: harmless() and None)
    with Verifier(task, workers=1) as verifier:
        assert verifier.judge(ANSWERS * 3) == VERDICTS * 3
        assert verifier.judge(ANSWERS) == VERDICTS
    assert random.getstate() == state and os.getcwd() == place
    assert torch.equal(torch.get_rng_state(), seed) and "FASTPO_TEST" not in os.environ
    assert signal.getsignal(signal.SIGINT) == handler
    assert torch.get_default_dtype() == torch.float32


@pytest.mark.parametrize(
    ("task", "parts"),
    [
        (task_whose(reward=hang), ["Hostile.reward took longer than 0.3 s", "prompt '21='"]),
        (task_whose(problem=hang), ["Hostile.problem took longer than 0.3 s"]),
        (
            task_whose(reward=lambda: subprocess.run(["sleep", "60"]) and None),
            ["Hostile.reward took longer"],
        ),
        (task_whose(reward=lambda: os._exit(3)), ["reward ended its process (exit code 3)"]),
        (
            task_whose(reward=lambda: os.kill(os.getpid(), signal.SIGKILL)),
            ["reward ended its process (killed by SIGKILL)"],
        ),
        (task_whose(problem=lambda: os._exit(3)), ["problem ended its process (exit code 3)"]),
        (task_whose(problem=sys.exit), ["Hostile.problem raised SystemExit"]),
        (
            task_whose(problem=lambda: Problem("1=", "1", threading.Lock())),
            ["Hostile.problem gave what no pipe can carry", "lock", "Problem.data"],
        ),
        (task_whose(reward=lambda: "right"), ["reward raised ValueError", "prompt '21='"]),
    ],
)
def test_a_hostile_task_is_one_line_and_leaves_no_process(task, parts):
    """REGRESSIONS 42: hangs that swallow exceptions, dead processes, unsendable problems."""
    before = children()
    with pytest.raises(TrainerError) as caught, Verifier(task, workers=2, seconds=0.3) as verifier:
        verifier.draw(random.Random(), 2)
        verifier.judge(ANSWERS)
    assert "\n" not in str(caught.value)
    for part in parts:
        assert part in str(caught.value)
    assert children() == before


def test_a_worker_whose_run_has_failed_ends_without_a_word(capfd):
    """What another one raised is the run's last line, with no traceback of a broken pipe before."""
    turn = multiprocessing.Value("i", 0)

    def one_raises_the_other_is_late():
        with turn:
            turn.value += 1
            first = turn.value == 1
        time.sleep(0.1 if first else 0.3)
        return {}["nothing"] if first else 1.0

    task = task_whose(reward=one_raises_the_other_is_late)
    with Verifier(task, workers=2) as verifier, pytest.raises(TrainerError, match="nothing"):
        verifier.judge(ANSWERS)
    assert capfd.readouterr().err == ""


def test_the_limit_is_for_one_call_not_for_a_batch():
    task = task_whose(reward=lambda: time.sleep(0.1))
    with Verifier(task, workers=1, seconds=0.6) as verifier:
        assert len(verifier.judge(ANSWERS * 5)) == 10


def test_workers_judge_side_by_side():
    task = task_whose(reward=lambda: time.sleep(0.2))
    with Verifier(task, workers=4) as verifier:
        started = time.monotonic()
        verifier.judge(ANSWERS * 4)
    assert time.monotonic() - started < 0.2 * 8 / 2


@pytest.mark.slow
def test_a_killed_run_leaves_no_worker_behind():
    """Not even one whose verifier hangs."""
    code = (
        "import os, random, signal, time\n"
        "from fastpo.trainer.data.tasks import SortDigits\n"
        "from fastpo.trainer.data.verifier import Verifier\n"
        "class Task(SortDigits):\n"
        "    def problem(self, rng):\n"
        "        print(os.getpid(), flush=True); time.sleep(600)\n"
        "Verifier(Task(), workers=1, seconds=600).draw(random.Random(), 1)\n"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as run:
        worker = int(run.stdout.readline())
        run.kill()
    deadline = time.monotonic() + 5
    while os.path.exists(f"/proc/{worker}") and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not os.path.exists(f"/proc/{worker}")
