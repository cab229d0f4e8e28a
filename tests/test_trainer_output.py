"""What a run writes and shows: checkpoints whole or not at all, a bar that fits, curves."""

import io
import json
import resource

import pytest
from rich.console import Console

from fastpo.trainer.config import Config
from fastpo.trainer.run import checkpoint
from fastpo.trainer.run.console import SHOWN, Display
from fastpo.trainer.run.directory import RunLog, create, read_metrics
from fastpo.trainer.run.errors import RecipeError, TrainerError
from fastpo.trainer.run.plot import plot, smooth

METRICS = dict.fromkeys(SHOWN, 0.5)


def state(step):
    return dict.fromkeys(checkpoint.KEYS) | {"step": step}


class Weights:
    """A policy that saves one file."""

    def __init__(self, text):
        self.text = text

    def save(self, directory):
        directory.mkdir()
        (directory / "model").write_text(self.text)


def test_a_checkpoint_replaces_the_last_one_as_a_whole(tmp_path):
    checkpoint.save(tmp_path, Weights("first"), state(1))
    checkpoint.save(tmp_path, Weights("second"), state(2))
    found = checkpoint.find(tmp_path)
    assert (found / "model").read_text() == "second"
    assert checkpoint.load_state(found) == state(2)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


def test_a_full_disk_leaves_the_last_checkpoint(tmp_path):
    """A limit on the size of files stands in for the disk: torch reports neither as an OSError."""
    checkpoint.save(tmp_path, Weights("first"), state(1))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
    try:
        with pytest.raises(TrainerError, match=r"cannot write checkpoint .* is intact") as caught:
            checkpoint.save(tmp_path, Weights("second"), state(2))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]
    found = checkpoint.find(tmp_path)
    assert (found / "model").read_text() == "first" and checkpoint.load_state(found)["step"] == 1
    checkpoint.save(tmp_path, Weights("third"), state(3))
    assert (checkpoint.find(tmp_path) / "model").read_text() == "third"


def test_a_model_without_trainer_state_cannot_be_resumed(tmp_path):
    Weights("model").save(tmp_path / "checkpoint")
    with pytest.raises(TrainerError, match="not a run to resume"):
        checkpoint.load_state(checkpoint.find(tmp_path))


def test_the_bar_and_its_numbers_fit_eighty_columns():
    screen = io.StringIO()
    out = Console(file=screen, force_terminal=True, width=80, color_system=None)
    with Display(steps=3, start=0, print_every=1, console=out) as display:
        display.step(1, METRICS)
        display.say("a line above, with [brackets]")
    lines = screen.getvalue().splitlines()
    assert any("groups kept 50%" in line for line in lines)
    assert any("1/3" in line for line in lines)
    assert any("a line above, with [brackets]" in line for line in lines)


def test_without_a_terminal_lines_come_every_so_often():
    screen = io.StringIO()
    with Display(
        steps=5, start=0, print_every=2, console=Console(file=screen, width=200)
    ) as display:
        for step in range(1, 6):
            display.step(step, METRICS)
    assert [line.split()[1] for line in screen.getvalue().splitlines()] == ["2/5", "4/5", "5/5"]


def test_metrics_are_json_even_when_a_number_is_not_finite(tmp_path):
    log = RunLog(tmp_path, tensorboard=False)
    log.metrics(1, {"reward": float("nan"), "entropy": 0.5})
    log.close()
    assert read_metrics(tmp_path) == [{"step": 1, "reward": None, "entropy": 0.5}]
    assert plot(tmp_path).stat().st_size > 10_000


def test_a_line_cut_off_by_a_crash_is_dropped_on_resume(tmp_path):
    lines = [json.dumps({"step": step}) + "\n" for step in (1, 2, 3)]
    (tmp_path / "metrics.jsonl").write_text("".join(lines) + '{"step": 4, "rew')
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2, 3]  # a run may be writing it
    RunLog(tmp_path, tensorboard=False, resume_at=2).close()
    assert read_metrics(tmp_path) == [{"step": 1}, {"step": 2}]


def test_a_run_that_is_being_written_is_left_to_its_writer(tmp_path):
    path = tmp_path / "run"
    config = Config(run_dir=str(path), existing="move_aside")
    log = RunLog(create(config), tensorboard=False)
    log.metrics(1, {"reward": 1.0})
    for second in (lambda: create(config), lambda: RunLog(path, tensorboard=False, resume_at=0)):
        with pytest.raises(RecipeError, match="run is being written by another fastpo"):
            second()
    assert read_metrics(path) == [{"step": 1, "reward": 1.0}]
    log.close()
    assert create(config).exists() and (tmp_path / "run.1" / "metrics.jsonl").exists()


def test_samples_may_hold_any_character(tmp_path):
    """JSON leaves U+2028 as it is, and str.splitlines ends a line there."""
    for resume_at in (None, 1):
        log = RunLog(tmp_path, tensorboard=False, resume_at=resume_at)
        for step in (1, 2):
            log.sample(step, completion=f"a\u2028b\u0085c\r\n{step}")
        log.close()
    text = (tmp_path / "samples.jsonl").read_text(encoding="utf-8")
    steps = [json.loads(line)["step"] for line in text.removesuffix("\n").split("\n")]
    assert steps == [1, 1, 2]


def test_smoothing_keeps_lines_straight_and_averages_noise():
    assert smooth([1.0, 2.0, 3.0, 4.0, 5.0], 2)[1:-1] == pytest.approx([2.0, 3.0, 4.0])
    assert smooth([0.0, 1.0] * 20, 10)[20] == pytest.approx(0.5, abs=0.05)
    assert smooth([3.0], 0) == [3.0]
