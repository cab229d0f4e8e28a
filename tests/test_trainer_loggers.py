"""Where a run's numbers go: W&B, TensorBoard, the progress shown, curves."""

import sys

from tiny_runs import one_line

from fastpo.cli import main


def test_wandb_is_named_before_anything_is_written(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "wandb", None)
    tiny("log.wandb=mine", code=2)
    one_line(capsys, "log.wandb is 'mine'", "pip install wandb")
    assert not (tmp_path / "run").exists()


def test_wandb_gets_every_number_of_a_run_and_of_what_goes_on_from_it(tiny, monkeypatch):
    seen = []

    class Run:
        def log(self, values, step):
            seen.extend((name, step) for name in values)

        def finish(self):
            seen.append("finished")

    module = type(sys)("wandb")
    module.init = lambda **options: seen.append(options) or Run()
    monkeypatch.setitem(sys.modules, "wandb", module)
    run = tiny("log.wandb=mine")
    assert seen[0]["project"] == "mine" and seen[0]["id"] == run.name
    assert seen[0]["config"]["rollout.prompts"] == 4
    assert ("reward", 1) in seen and ("eval_accuracy", 0) in seen and seen[-1] == "finished"
    seen.clear()
    tiny("log.wandb=mine", "--resume", "steps=3")
    assert seen[0]["id"] == run.name and seen[0]["resume"] == "allow" and ("reward", 3) in seen


def test_curves_of_several_runs_share_one_picture(tiny, tmp_path, capsys):
    one, two = (tiny(f"run_dir={tmp_path}/{n}", f"seed={n}").parent / str(n) for n in (0, 1))
    target = tmp_path / "both.png"
    assert main(["plot", str(one), str(two), "--out", str(target)]) == 0
    assert target.read_bytes()[:4] == b"\x89PNG"
    assert main(["plot", *[str(one)] * 9]) == 2
    one_line(capsys, "9 runs", "at most 7")


def test_tensorboard_gets_every_number_where_it_is_installed(tiny, monkeypatch):
    seen = []

    class Writer:
        def __init__(self, path, purge_step):
            seen.append(purge_step)

        def add_scalar(self, name, value, step):
            seen.append((name, step))

        def close(self):
            seen.append("closed")

    module = type(sys)("torch.utils.tensorboard")
    module.SummaryWriter = Writer
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    tiny("log.tensorboard=true")
    assert ("reward", 1) in seen and ("eval_accuracy", 0) in seen
    assert seen[0] is None and seen[-1] == "closed"
    seen.clear()
    tiny("log.tensorboard=true", "--resume", "steps=3")
    assert seen[0] == 3  # events of steps that are done again are dropped


def test_the_progress_shown_has_the_six_numbers(tiny, capsys):
    tiny()
    lines = capsys.readouterr().out.splitlines()
    last = next(line for line in lines if line.startswith("step 2/2"))
    for part in ("reward", "acc", "len", "entropy", "clip", "groups kept"):
        assert part in last
