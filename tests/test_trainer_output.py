"""What a run writes and shows: checkpoints whole or not at all, a bar that fits, curves."""

import errno
import io
import json
import os
import resource
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from rich.console import Console

from fastpo.trainer.config import Config
from fastpo.trainer.metrics import speed_metrics
from fastpo.trainer.run import checkpoint, console, report
from fastpo.trainer.run.console import SHOWN, Display
from fastpo.trainer.run.directory import RunLog, create, read_metrics, write_config
from fastpo.trainer.run.errors import RecipeError, TrainerError
from fastpo.trainer.run.plot import plot, smooth

METRICS = dict.fromkeys(SHOWN, 0.5)


def state(step):
    return dict.fromkeys(checkpoint.KEYS) | {"step": step}


def names(directory):
    return sorted(path.name for path in directory.iterdir())


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
    assert (tmp_path / "checkpoint.previous" / "model").read_text() == "first"
    checkpoint.save(tmp_path, Weights("third"), state(3))
    assert (tmp_path / "checkpoint.previous" / "model").read_text() == "second"
    assert names(tmp_path) == ["checkpoint", "checkpoint.previous"]


@pytest.mark.parametrize("renames", [0, 1])
def test_a_crash_at_either_rename_leaves_a_checkpoint(tmp_path, monkeypatch, renames):
    checkpoint.save(tmp_path, Weights("first"), state(1))
    checkpoint.save(tmp_path, Weights("second"), state(2))
    done, rename = [], Path.rename

    def crash(self, target):
        if len(done) == renames:
            raise KeyboardInterrupt
        done.append(target)
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", crash)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.save(tmp_path, Weights("third"), state(3))
    monkeypatch.undo()
    assert checkpoint.load_state(checkpoint.find(tmp_path))["step"] == 2
    checkpoint.save(tmp_path, Weights("fourth"), state(4))
    assert checkpoint.load_state(checkpoint.find(tmp_path))["step"] == 4


def test_what_a_crash_left_half_written_gets_into_no_checkpoint(tmp_path):
    (tmp_path / "checkpoint.new").mkdir()
    (tmp_path / "checkpoint.new" / "model.old-shard").write_text("junk")
    checkpoint.save(tmp_path, Weights("whole"), state(1))
    assert names(tmp_path / "checkpoint") == ["SHA256SUMS", "model", "trainer_state.pt"]
    assert names(tmp_path) == ["checkpoint"]


def test_files_reach_the_disk_before_they_take_their_name(tmp_path, monkeypatch):
    order, fsync, rename = [], os.fsync, Path.rename

    def synced(descriptor):
        order.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(Path, "rename", lambda s, t: order.append("rename") or rename(s, t))
    checkpoint.save(tmp_path, Weights("model"), state(1))
    before = order[: order.index("rename")]
    assert sorted(before) == ["SHA256SUMS", "checkpoint.new", "model", "trainer_state.pt"]
    assert order[-1] == tmp_path.name


def test_a_state_that_cannot_be_read_back_is_refused_when_it_is_first_saved(tmp_path):
    """REGRESSIONS 40."""
    keeper = checkpoint.Keeper(tmp_path, every=0, minutes=0)
    bad = state(1) | {"before": np.float64(0.5)}
    with pytest.raises(TrainerError, match="more than tensors and plain values") as caught:
        keeper.save(Weights("model"), bad)
    assert "weights_only" not in str(caught.value) and names(tmp_path) == []
    keeper.save(Weights("model"), state(2))
    loads = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "load", lambda *_, **__: loads.append(1))
        keeper.save(Weights("model"), state(3))
    assert loads == []


class Malicious:
    """A pickle that touches a file when it is read."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_code_in_a_state_is_never_run_nor_advised(tmp_path):
    checkpoint.save(tmp_path, Weights("model"), state(1))
    found, touched = checkpoint.find(tmp_path), tmp_path / "touched"
    torch.save(state(1) | {"before": Malicious(touched)}, found / checkpoint.STATE)
    checkpoint.write_manifest(found)
    with pytest.raises(TrainerError, match="more than tensors and plain values") as caught:
        checkpoint.load_state(found)
    assert not touched.exists()
    assert "weights_only" not in str(caught.value) and "add_safe" not in str(caught.value)
    torch.load(found / checkpoint.STATE, weights_only=False)
    assert touched.exists()  # it would have


@pytest.mark.parametrize("name", ["model", checkpoint.STATE])
def test_a_flipped_bit_is_found(tmp_path, name):
    """REGRESSIONS 47."""
    checkpoint.save(tmp_path, Weights("first"), state(1))
    checkpoint.save(tmp_path, Weights("second"), state(2))
    file = tmp_path / "checkpoint" / name
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(TrainerError, match=f"{name} is damaged .*SHA-256.*move .* away, and --res"):
        checkpoint.load_state(checkpoint.find(tmp_path))
    shutil.rmtree(tmp_path / "checkpoint")
    assert checkpoint.load_state(checkpoint.find(tmp_path))["step"] == 1
    (tmp_path / "checkpoint.previous" / "model").unlink()
    with pytest.raises(TrainerError, match=r"model is damaged .it is missing.*restore it"):
        checkpoint.load_state(checkpoint.find(tmp_path))


def test_checkpoints_come_by_steps_and_by_the_clock(tmp_path, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(checkpoint.time, "monotonic", lambda: clock[0])
    keeper = checkpoint.Keeper(tmp_path, every=3, minutes=10)
    assert [keeper.is_due(step) for step in (1, 2, 3)] == [False, False, True]
    clock[0] = 601
    assert keeper.is_due(4)
    keeper.save(Weights("model"), state(4))
    clock[0] = 1200
    assert not keeper.is_due(5)
    never = checkpoint.Keeper(tmp_path, every=0, minutes=0)
    clock[0] = 1e9
    assert not never.is_due(6)


def test_the_best_checkpoint_stays_when_later_ones_come(tmp_path):
    keeper = checkpoint.Keeper(tmp_path, every=0, minutes=0, best=(0.1, 0.0))
    for step, score in ((1, (0.1, 0.0)), (2, (0.5, 0.1)), (3, (0.4, 0.9)), (4, (0.5, 0.2))):
        keeper.save(Weights(f"step {step}"), state(step))
        if keeper.is_best(score):
            keeper.keep_best(score)
        if step == 3:
            assert checkpoint.load_state(tmp_path / "best")["step"] == 2
    assert (tmp_path / "best" / "model").read_text() == "step 4"
    keeper.save(Weights("step 5"), state(5))
    assert (tmp_path / "best" / "model").read_text() == "step 4"
    assert names(tmp_path) == ["best", "checkpoint", "checkpoint.previous"]


def test_the_policy_before_training_is_not_the_best_checkpoint(tmp_path):
    """There is none of it; a resumed run knows the best score of the steps that came after."""
    lines = [(0, 0.9, 0.9), (1, 0.1, 0.2), (2, 0.1, 0.3), (3, 0.0, 0.9)]
    log = RunLog(tmp_path, tensorboard=False)
    for step, accuracy, reward in lines:
        log.metrics(step, {"eval_accuracy": accuracy, "eval_reward": reward})
    log.metrics(4, {"reward": 1.0})
    log.close()
    log = RunLog(tmp_path, tensorboard=False, resume_at=4)
    log.close()
    assert log.best == (0.1, 0.3)


def test_a_config_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    write_config(tmp_path, Config(seed=1))
    before = (tmp_path / "config.toml").read_text()

    def half(self, text, **_):
        with self.open("w") as file:
            file.write(text[:20])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_text", half)
    with pytest.raises(OSError, match="No space"):
        write_config(tmp_path, Config(seed=2))
    assert (tmp_path / "config.toml").read_text() == before


def test_missing_lines_of_metrics_are_said(tmp_path):
    lines = [json.dumps({"step": step, "reward": 0.5}) + "\n" for step in (1, 2, 5)]
    (tmp_path / "metrics.jsonl").write_text("".join(lines))
    log = RunLog(tmp_path, tensorboard=False, resume_at=5)
    log.close()
    assert log.gaps == "2 of 5 steps, the first of them step 3"


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
    assert names(tmp_path) == ["checkpoint"]
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


def test_a_long_phase_is_seen_on_a_terminal_and_said_elsewhere(monkeypatch):
    """Warm-up, evaluation and long rollouts: what goes on in them reaches the open display."""
    clock = [0.0]
    monkeypatch.setattr(console.time, "monotonic", lambda: clock[0])
    console.tell("nobody listens")
    screen = io.StringIO()
    out = Console(file=screen, force_terminal=True, width=80, color_system=None)
    with Display(steps=3, start=0, print_every=1, console=out) as display:
        display.phase = "warm-up"
        console.tell("update 7 of at most 40")
        display.say("this draws it")
    assert "warm-up: update 7 of at most 40" in screen.getvalue()
    screen = io.StringIO()
    with Display(steps=3, start=0, print_every=1, console=Console(file=screen, width=80)):
        for clock[0] in (30.0, 59.0, 61.0, 62.0, 122.0):
            console.tell(f"token {clock[0]:.0f}")
    assert screen.getvalue().split("\n") == ["token 61", "token 122", ""]


def test_speed_is_tokens_over_seconds():
    def completion(length, live=True):
        return SimpleNamespace(length=length, prompt=[1, 2], live=live)

    kept = [completion(3), completion(5), completion(9, live=False)]
    batch = SimpleNamespace(sampled=[kept, [completion(3)]], samples=kept, seconds=4.0)
    found = speed_metrics(batch, epochs=2, update_seconds=1.0, step_seconds=5.0)
    assert 0.05 < found.pop("peak_memory_gib") < 500
    assert found == {
        "rollout_time": 4.0,
        "update_time": 1.0,
        "step_time": 5.0,
        "rollout_time_share": 0.8,
        "rollout_tokens_per_second": (3 + 5 + 9 + 3) / 4.0,
        "update_tokens_per_second": 2 * (3 + 5 + 2 * 2) / 1.0,
    }


def test_a_full_disk_names_the_file(tmp_path):
    log = RunLog(tmp_path, tensorboard=False)
    log._metrics = open("/dev/full", "a")  # noqa: SIM115
    with pytest.raises(
        TrainerError, match=r"cannot write /dev/full: No space left on device; .*res"
    ):
        log.metrics(1, {"reward": 1.0})
    log.close()


def test_long_texts_are_cut_where_they_say_least():
    """The end of a prompt tells problems apart; a completion begins with its answer."""
    screen = io.StringIO()
    long = {"prompt": "few-shot " * 100 + "2 + 2 =", "answer": None, "correct": True}
    found = {"accuracy": 1.0, "answers": [long | {"text": "4" + " and on" * 100}]}
    report.show(Console(file=screen, width=2000), found, found, Path("curves.png"), "fastpo")
    output = " ".join(screen.getvalue().split())
    assert "2 + 2 =" in output and "characters before" in output and "more characters" in output
    assert len(screen.getvalue()) < 5000


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
    log = RunLog(create(config, print), tensorboard=False)
    log.metrics(1, {"reward": 1.0})
    for second in (
        lambda: create(config, print),
        lambda: RunLog(path, tensorboard=False, resume_at=0),
    ):
        with pytest.raises(RecipeError, match="run is being written by another fastpo"):
            second()
    assert read_metrics(path) == [{"step": 1, "reward": 1.0}]
    log.close()
    said = []
    assert create(config, said.append).exists() and (tmp_path / "run.1" / "metrics.jsonl").exists()
    assert said == [f"Moved the run that was in {path} to {path}.1"]


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
