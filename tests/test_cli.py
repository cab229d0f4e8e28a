"""The command line, in process: whole tiny runs, and one clear line for whatever goes wrong."""

import io
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
import transformers

from fastpo import backends
from fastpo.cli import main
from fastpo.trainer import experience, tasks
from fastpo.trainer.run import checkpoint
from fastpo.trainer.run.signals import TERMINATION, StopRequest, terminable
from fastpo.trainer.tasks import Problem
from fastpo.trainer.update import Learner

TINY = """
task = "even"
threads = 1
steps = 2
[model]
hidden_size = 32
layers = 1
heads = 2
[rollout]
prompts = 4
group_size = 4
max_new_tokens = 4
[optim]
learning_rate = 1e-2
[eval]
problems = 16
temperature = 1.0
[verifier]
workers = 1
"""
METRICS = (
    *("reward", "reward_std", "frac_reward_zero_std", "accuracy", "groups_kept", "num_tokens"),
    *("completions/mean_length", "completions/clipped_ratio", "entropy", "loss", "grad_norm"),
    *("clip_ratio/low_mean", "clip_ratio/high_mean", "clip_ratio/region_mean", "learning_rate"),
)
EVALUATION = 2 * 16  # rewards asked for before the first step: sampled and greedy


class Even:
    """Begin with an even digit: right by chance one time in three, so every step can learn."""

    alphabet, stop = "0123456789=", None
    sabotage = None  # what happens, once, when reward number `after` has been asked for
    after = math.inf
    done = None  # a file that says that it has happened

    def __init__(self):
        self.calls = 0

    def problem(self, rng):
        return Problem(f"{rng.randrange(10_000)}=", str(2 * rng.randrange(5)))

    def reward(self, problem, completion):
        self.calls += 1
        if self.calls > self.after and not self.done.exists():
            self.done.touch()
            self.sabotage()
        return float(completion[:1] in set("02468"))


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    monkeypatch.setitem(tasks.TASKS, "even", Even)
    monkeypatch.setattr(Even, "done", tmp_path / "done")
    path = tmp_path / "tiny.toml"
    path.write_text(TINY + "\n[log]\ntensorboard = false\n")
    run = tmp_path / "run"

    def train(*arguments, code=0):
        assert main(["train", str(path), f"run_dir={run}", *arguments]) == code
        return run

    return train


def one_line(capsys, *parts):
    """The error printed: one line that contains every part."""
    error = capsys.readouterr().err.strip()
    assert error.startswith("fastpo: ") and "\n" not in error
    for part in parts:
        assert part in error, error
    return error


def rows(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def weights(run):
    return transformers.AutoModelForCausalLM.from_pretrained(run / "checkpoint").state_dict()


def test_a_run_leaves_everything_behind(tiny, capsys):
    run = tiny("seed=3", "eval.every=1")
    output = capsys.readouterr().out
    steps = [row for row in rows(run) if "reward" in row]
    assert [row["step"] for row in steps] == [1, 2]
    for name in METRICS:
        assert isinstance(steps[0][name], int | float), name
    for first in steps:
        spent = first["rollout_time"] + first["update_time"]
        assert first["step_time"] == pytest.approx(spent) and 0 < first["rollout_time_share"] < 1
        assert 1 <= first["completions/min_length"] <= first["completions/mean_length"] <= 4
        assert first["accuracy"] == pytest.approx(first["reward"], abs=0.5)
    assert 0 < steps[0]["num_tokens"] < steps[1]["num_tokens"]
    assert [row["step"] for row in rows(run) if "eval_accuracy" in row] == [0, 1, 2]
    summary = json.loads((run / "summary.json").read_text())
    assert summary["seed"] == 3 and summary["seconds"] > 0
    assert 0 <= summary["before"]["accuracy"] <= 1 and 0 <= summary["after"]["accuracy"] <= 1
    assert (run / "curves.png").read_bytes()[:4] == b"\x89PNG"
    sample = json.loads((run / "samples.jsonl").read_text().splitlines()[0])
    assert sample["prompt"].endswith("=") and sample["reward"] in (0.0, 1.0)
    assert "seed = 3" in (run / "config.toml").read_text()
    assert weights(run)["model.norm.weight"].shape == (32,)
    for part in ("before", "after", str(run / "curves.png"), "Repeat:  fastpo train", "seed=3"):
        assert part in output
    assert main(["eval", str(run)]) == 0
    after = summary["after"]
    output = capsys.readouterr().out
    assert f"accuracy  {after['accuracy']:.3f}  (95 %: " in output
    assert f"greedy {after['greedy_accuracy']:.3f}" in output
    (run / "curves.png").unlink()
    assert main(["plot", str(run)]) == 0 and (run / "curves.png").exists()


@pytest.mark.parametrize("preset", ["dapo", "grpo", "gspo", "cispo", "ppo"])
def test_reward_rises(tiny, preset):
    run = tiny(
        *(f"algorithm.preset={preset}", "algorithm.overlong_filter=false", "steps=8"),
        *("optim.updates_per_batch=4", "rollout.prompts=8", "eval.problems=64"),
        "critic.learning_rate=1e-2",
    )
    summary = json.loads((run / "summary.json").read_text())
    assert summary["after"]["accuracy"] > summary["before"]["accuracy"] + 0.3


@pytest.mark.parametrize(
    "options",
    [
        ["optim.updates_per_batch=2", "optim.epochs=2", "algorithm.objective.kl_coef=0.1"],
        ["warmup.max_steps=2", "checkpoint_every=1", "algorithm.preset=grpo"],
        ["algorithm.preset=ppo", "optim.updates_per_batch=2", "critic.warmup_steps=1"],
        ["algorithm.carry_surplus=true", "rollout.prompts=5", "seed=2"],
        ["algorithm.objective.kl_coef=0.1", "algorithm.sync_reference_every=1"],
        ["algorithm.correction.mode=mask", "algorithm.correction.high=1.0001"],
    ],
)
def test_resuming_is_bit_exact(tiny, options):
    """Four steps equal two steps, a stop, and two more: parameters and metrics, bit by bit."""
    run = tiny("steps=4", *options)
    whole, expected = weights(run), [row["reward"] for row in rows(run) if "reward" in row]
    run = tiny("steps=2", "existing=move_aside", *options)
    torch.manual_seed(999)  # in the process that resumes, no random state goes on
    random.seed(999)
    with (run / "metrics.jsonl").open("a") as file:  # a step that no checkpoint knows
        file.write('{"step": 3, "reward": 9.0}\n')
    torch.manual_seed(999)  # as in a fresh process: nothing may hang on the global generators
    random.seed(999)
    tiny("--resume", "steps=4", *options)
    resumed = weights(run)
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)
    assert [row["reward"] for row in rows(run) if "reward" in row] == expected


def test_resuming_is_bit_exact_while_the_learning_rate_decays(tiny, monkeypatch):
    """The schedule of a run that was stopped on its way is the one it would have followed."""
    options = ["steps=4", "optim.decay=cosine", "algorithm.dynamic_sampling=false"]
    run = tiny(*options)
    whole, rates = weights(run), [row["learning_rate"] for row in rows(run) if "reward" in row]
    assert rates[0] == 1e-2 and rates == sorted(rates, reverse=True) and rates[-1] < 2e-3
    monkeypatch.setattr(Even, "after", EVALUATION + 2 * 16 + 5)
    monkeypatch.setattr(Even, "sabotage", lambda self: os.kill(os.getppid(), signal.SIGTERM))
    tiny(*options, "existing=move_aside", code=143)
    tiny(*options, "--resume")
    assert [row["learning_rate"] for row in rows(run) if "reward" in row] == rates
    assert all(torch.equal(value, whole[name]) for name, value in weights(run).items())


def test_a_resumed_run_says_what_changed_and_refuses_what_cannot(tiny, capsys):
    run = tiny()
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    for change, old in (
        ("seed=1", "0 -> 1"),
        ("model.hidden_size=64", "32 -> 64"),
        ("eval.problems=8", "16 -> 8"),
    ):
        tiny("--resume", "steps=3", change, code=2)
        one_line(capsys, change.partition("=")[0], old, "another run_dir")
    tiny("--resume", "steps=3", "algorithm.objective.kl_coef=0.1", code=2)
    one_line(capsys, "kl_coef is 0.1", "no reference policy")
    assert before == {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    tiny("--resume", "steps=3", "optim.learning_rate=1e-3")
    output = capsys.readouterr().out
    assert "Changed since the run began: steps 2 -> 3, optim.learning_rate 0.01 -> 0.001" in output
    assert [row["learning_rate"] for row in rows(run) if "reward" in row] == [0.01, 0.01, 0.001]


def test_a_directory_that_is_no_run_is_never_moved_aside(tiny, tmp_path, capsys):
    (tmp_path / "precious").mkdir()
    tiny(f"run_dir={tmp_path / 'precious'}", "existing=move_aside", code=2)
    one_line(capsys, "precious", "holds no run")
    tiny(f"run_dir={tmp_path}", "existing=move_aside", code=2)
    assert (tmp_path / "precious").is_dir()


def test_an_existing_run_is_left_alone_or_moved_aside(tiny, capsys):
    run = tiny()
    before = (run / "metrics.jsonl").read_bytes()
    tiny("seed=1", code=2)
    one_line(capsys, "exists", "run_dir", "--resume", "move_aside")
    assert (run / "metrics.jsonl").read_bytes() == before
    tiny("--resume", code=1)
    one_line(capsys, "step 2 of 2", "raise steps")
    (run / "summary.json").unlink()
    tiny("seed=1", "existing=move_aside")
    output = " ".join(capsys.readouterr().out.split())
    assert f"Moved the run that was in {run} to {run}.1; it was not done: --resume would" in output
    assert (run.with_name("run.1") / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["optim.lerning_rate=1"], ["optim.lerning_rate", "optim.learning_rate"]),
        (["steps=many"], ["steps", "'many'", "integer"]),
        (["task=none_such"], ["none_such", "sort"]),
        (["model.path=/nowhere"], ["/nowhere"]),
        (["algorithm.preset=dpo"], ["algorithm.preset", "dapo"]),
        (["run_dir={nope}"], ["run_dir", "{task}"]),
        (["run_dir=/dev/null/run"], ["/dev/null/run"]),
        (["device=abacus"], ["device", "'abacus'"]),
        (["device=meta"], ["device", "'meta'"]),
        (["eval.problems=10001"], ["eval.problems"]),
        (["seed=18446744073709551616"], ["seed", "less than"]),
        (["optim.beta1=1.0"], ["optim.beta1", "less than 1"]),
        (["optim.decay=sine"], ["optim.decay", "'linear'"]),
        (["model.attention=abacus"], ["cannot build", "abacus"]),
        (["model.hidden_size=6"], ["model.hidden_size", "multiple"]),
    ],
)
def test_bad_input_starts_nothing(tiny, tmp_path, capsys, arguments, parts):
    path = tmp_path / "tiny.toml"
    code = main(["train", str(path), f"run_dir={tmp_path / 'run'}", *arguments])
    assert code != 0
    one_line(capsys, *parts)
    assert not (tmp_path / "run").exists()


def test_missing_files_are_named(tmp_path, capsys):
    assert main(["train", str(tmp_path / "absent.toml")]) == 2
    one_line(capsys, "absent.toml", "No such file")
    assert main(["plot", str(tmp_path)]) == 2
    one_line(capsys, "metrics.jsonl")
    assert main(["eval", str(tmp_path)]) == 2
    one_line(capsys, "config.toml")


def test_resume_without_a_checkpoint(tiny, capsys):
    tiny("--resume", code=1)
    one_line(capsys, "no checkpoint", "without --resume")


def test_a_raising_verifier_keeps_metrics_and_a_checkpoint(tiny, monkeypatch, capsys):
    monkeypatch.setattr(Even, "after", EVALUATION + 4 * 16)
    monkeypatch.setattr(Even, "sabotage", lambda self: {}["nothing"])
    run = tiny("steps=50", "algorithm.dynamic_sampling=false", code=1)
    one_line(capsys, "Even.reward raised KeyError", "completion")
    assert [row["step"] for row in rows(run)] == [0, 1, 2, 3, 4]
    assert checkpoint.load_state(run / "checkpoint")["step"] == 4


def test_a_verifier_that_raises_in_an_evaluation_costs_no_step(tiny, monkeypatch, capsys):
    monkeypatch.setattr(Even, "after", EVALUATION + 2 * 16 + 3)
    monkeypatch.setattr(Even, "sabotage", lambda self: {}["nothing"])
    run = tiny("steps=50", "eval.every=2", "algorithm.dynamic_sampling=false", code=1)
    one_line(capsys, "Even.reward raised KeyError")
    assert checkpoint.load_state(run / "checkpoint")["step"] == 2
    assert [row["step"] for row in rows(run)] == [0, 1, 2]


def test_rewards_that_are_no_number_are_left_out_of_evaluations(tiny, monkeypatch, capsys):
    def judged(self, problem, completion):
        return math.nan if completion[:1] in set("13579") else float(completion[:1] != "0")

    monkeypatch.setattr(Even, "reward", judged)
    summary = json.loads((tiny() / "summary.json").read_text())
    assert 0 < summary["before"]["accuracy"] < 1
    assert summary["before"]["reward"] == summary["before"]["accuracy"]
    monkeypatch.setattr(Even, "reward", lambda *_: math.nan)
    tiny("existing=move_aside", code=1)
    one_line(capsys, "no reward of an evaluation is a finite number")


def test_a_solved_or_hopeless_task_stops_with_what_to_do(tiny, monkeypatch, capsys):
    monkeypatch.setattr(Even, "reward", lambda self, problem, completion: 0.0)
    run = tiny(code=1)
    one_line(capsys, "no group had right and wrong answers in 8 rounds", "warmup.max_steps")
    assert [row["step"] for row in rows(run)] == [0]


def test_a_non_finite_loss_stops_the_run_and_keeps_the_last_checkpoint(tiny, monkeypatch, capsys):
    run = tiny("steps=2")
    saved = weights(run)
    monkeypatch.setattr(
        "fastpo.trainer.update.Learner._loss",
        lambda self, *_: type(
            "L",
            (),
            {
                "loss": sum(p.sum() for p in self.parameters) * math.nan,
                "metrics": {},
                "logprobs": torch.zeros(1),
            },
        ),
    )
    tiny("steps=4", "--resume", code=1)
    one_line(capsys, "not finite", "optim.learning_rate")
    assert all(torch.equal(value, saved[name]) for name, value in weights(run).items())
    assert max(row["step"] for row in rows(run)) == 2


def test_a_failing_step_keeps_the_steps_before_it(tiny, monkeypatch, capsys):
    """Out of memory in the third step, without a checkpoint so far."""

    def greedy(self, samples, sums, *, on_policy):
        if self.updates == 2:
            torch.empty(2**60)
        update(self, samples, sums, on_policy=on_policy)

    update = Learner.update
    monkeypatch.setattr(Learner, "update", greedy)
    run = tiny("steps=4", code=1)
    one_line(capsys, "allocate memory", "optim.token_budget")
    assert checkpoint.load_state(run / "checkpoint")["step"] == 2
    monkeypatch.setattr(Learner, "update", update)
    tiny("steps=4", "--resume")
    assert [row["step"] for row in rows(run) if "reward" in row] == [1, 2, 3, 4]


@pytest.mark.parametrize("steps", [3, 9])
def test_weights_that_are_not_finite_never_replace_a_checkpoint(tiny, monkeypatch, capsys, steps):
    def explode(self, samples, sums, *, on_policy):
        update(self, samples, sums, on_policy=on_policy)
        self.parameters[0].data.fill_(math.inf)

    run = tiny("steps=2")
    saved, update = weights(run), Learner.update
    monkeypatch.setattr(Learner, "update", explode)
    tiny(f"steps={steps}", "--resume", code=1)
    one_line(capsys, "weights are not finite after step 3", "optim.learning_rate")
    assert all(torch.equal(value, saved[name]) for name, value in weights(run).items())
    assert checkpoint.load_state(run / "checkpoint")["step"] == 2


@pytest.mark.parametrize(
    "damage",
    ["truncated state", "code in the state", "foreign state", "old state", "truncated weights"],
)
def test_a_corrupt_checkpoint_is_named_and_nothing_is_overwritten(tiny, capsys, damage):
    run = tiny()
    state, model = run / "checkpoint" / checkpoint.STATE, run / "checkpoint" / "model.safetensors"
    if damage == "truncated state":
        state.write_bytes(state.read_bytes()[:1000])
    elif damage == "code in the state":
        torch.save({"step": pytest.fail}, state)
    elif damage == "foreign state":
        values = torch.load(state)
        values["learner"]["optimizer"]["param_groups"][0]["params"].pop()
        torch.save(values, state)
    elif damage == "old state":
        torch.save({"step": 2, "optimizer": {}}, state)
    elif damage == "truncated weights":
        model.write_bytes(model.read_bytes()[:1000])
    if not damage.startswith("truncated"):
        checkpoint.write_manifest(run / "checkpoint")
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    tiny("--resume", "steps=4", code=1)
    one_line(capsys, "checkpoint")
    assert before == {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}


@pytest.mark.slow
def test_kill_9_loses_what_came_after_the_last_checkpoint_and_nothing_else(tiny, monkeypatch):
    """Best and last checkpoints are whole, and the resumed run is the one that was never killed."""
    options = ["steps=6", "eval.every=1", "checkpoint_minutes=1e-9"]
    run = tiny(*options)
    whole = weights(run)
    monkeypatch.setattr(Even, "after", 2 * 32 + 4 * 16)
    monkeypatch.setattr(Even, "sabotage", lambda self: os.kill(os.getppid(), signal.SIGKILL))
    if (child := os.fork()) == 0:
        tiny(*options, "existing=move_aside")
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    done = checkpoint.load_state(checkpoint.find(run))["step"]
    assert 1 <= done < 6 and checkpoint.load_state(run / "best")["step"] <= done
    tiny(*options, "--resume")
    assert [row["step"] for row in rows(run) if "reward" in row] == list(range(1, 7))
    assert all(torch.equal(value, whole[name]) for name, value in weights(run).items())


def test_a_run_killed_while_it_drew_its_curves_is_complete(tiny, monkeypatch, capsys):
    def killed(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("matplotlib.figure.Figure.savefig", killed)
        run = tiny(code=130)
    assert (run / "summary.json").exists() and not (run / "curves.png").exists()
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    tiny("--resume")
    assert str(run / "curves.png") in capsys.readouterr().out
    assert (run / "curves.png").read_bytes()[:4] == b"\x89PNG"
    assert all(path.read_bytes() == content for path, content in before.items())
    tiny("--resume", code=1)
    one_line(capsys, "step 2 of 2", "raise steps")


@pytest.mark.parametrize("answer", [np.str_("2"), 2, None])
def test_a_run_resumes_whatever_kind_of_text_its_task_gives(tiny, monkeypatch, answer):
    """REGRESSIONS 40."""
    prompt = np.array([f"{n:05}=" for n in range(10_000)])
    monkeypatch.setattr(
        Even, "problem", lambda self, rng: Problem(prompt[rng.randrange(10_000)], answer)
    )
    tiny()
    run = tiny("--resume", "steps=3")
    assert json.loads((run / "summary.json").read_text())["steps"] == 3


def test_a_warm_up_needs_answers(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(Even, "problem", lambda self, rng: Problem(f"{rng.randrange(10_000)}="))
    tiny("warmup.max_steps=2", code=2)
    one_line(capsys, "warmup.max_steps", "Problem.answer")
    assert not (tmp_path / "run").exists()


def test_parts_of_a_reward_are_logged_apart(tiny, monkeypatch, capsys):
    def judged(self, problem, completion):
        right = completion[:1] in set("02468")
        return {"reward": float(right), "length": len(completion)}

    monkeypatch.setattr(Even, "reward", judged)
    run = tiny()
    step = next(row for row in rows(run) if "reward" in row)
    assert 0 < step["rewards/length/mean"] <= 4
    assert 0 < rows(run)[0]["eval_rewards/length/mean"] <= 4
    assert json.loads((run / "samples.jsonl").read_text().splitlines()[0])["parts"]["length"] > 0
    assert "rewards/length/mean" in capsys.readouterr().out


def test_a_model_with_code_of_its_own_is_not_run(tiny, tmp_path, capsys):
    model = tmp_path / "model"
    shutil.copytree(tiny() / "checkpoint", model)
    names = {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}
    config = json.loads((model / "config.json").read_text()) | {"model_type": "own"}
    (model / "config.json").write_text(json.dumps(config | {"auto_map": names}))
    (model / "code.py").write_text(f"open({str(tmp_path / 'touched')!r}, 'w')")
    capsys.readouterr()
    tiny(f"model.path={model}", f"run_dir={tmp_path / 'other'}", code=2)
    error = one_line(capsys, "code of its own", "trust_remote_code=False")
    assert "True" not in error and not (tmp_path / "touched").exists()


def test_weights_in_a_foreign_pickle_are_refused_without_advice(tiny, tmp_path, capsys):
    model = tiny().parent / "model"
    shutil.copytree(tmp_path / "run" / "checkpoint", model)
    (model / "model.safetensors").unlink()
    torch.save({"lm_head.weight": pytest.fail}, model / "pytorch_model.bin")
    capsys.readouterr()
    tiny(f"model.path={model}", f"run_dir={tmp_path / 'other'}", code=2)
    assert "weights_only" not in one_line(capsys, "more than tensors and plain values")


def test_an_empty_config_of_a_run_is_named(tiny, capsys):
    run = tiny()
    (run / "config.toml").write_text("")
    tiny("--resume", "steps=3", code=2)
    one_line(capsys, "config.toml is empty")
    assert main(["eval", str(run)]) == 2
    one_line(capsys, "config.toml is empty")


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


def test_training_without_a_recipe_takes_settings_alone(tiny, tmp_path, capsys):
    assert main(["train"]) == 2
    one_line(capsys, "no recipe was given", "recipes/demo.toml", "fastpo settings")
    assert main(["train", "task=even", "steps=many"]) == 2
    one_line(capsys, "steps is 'many'")
    with pytest.raises(SystemExit) as stopped:
        main([])
    assert stopped.value.code == 2 and "train a policy" in capsys.readouterr().err


def test_several_seeds_in_one_command_are_runs_of_their_own(tiny, tmp_path, capsys):
    tiny("--seeds", "0,1", code=2)
    one_line(capsys, "--seeds 0,1", "put {seed} into it")
    tiny("--seeds", "0,one", code=2)
    one_line(capsys, "'0,one'", "0,1,2")
    tiny(f"run_dir={tmp_path}/s{{seed}}", "--seeds", "3,4")
    output = capsys.readouterr().out
    assert "standard deviation" in output and output.count("Held-out problems") == 2
    rewards = [
        [row["reward"] for row in rows(tmp_path / f"s{n}") if "reward" in row] for n in (3, 4)
    ]
    assert len(rewards[0]) == len(rewards[1]) == 2 and rewards[0] != rewards[1]
    (tmp_path / "s4" / "summary.json").unlink()
    tiny(f"run_dir={tmp_path}/s{{seed}}", "--seeds", "3,4", "--resume")
    assert capsys.readouterr().out.count("Held-out problems") == 1  # the other is complete


def test_compare_names_what_differs(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "200")
    for rate in ("0.01", "0.02"):
        tiny(f"run_dir={tmp_path}/lr{rate}", f"optim.learning_rate={rate}")
    capsys.readouterr()
    assert main(["compare", f"{tmp_path}/lr0.01", f"{tmp_path}/lr0.02"]) == 0
    output = capsys.readouterr().out
    assert "optim.learning_rate=0.01" in output and "optim.learning_rate=0.02" in output
    assert "group_size" not in output and "standard deviation" not in output
    summary = json.loads((tmp_path / "lr0.02" / "summary.json").read_text())
    assert f"{summary['after']['accuracy']:.3f}" in output
    assert main(["compare", str(tmp_path)]) == 2
    one_line(capsys, "metrics.jsonl")


def test_curves_of_several_runs_share_one_picture(tiny, tmp_path, capsys):
    one, two = (tiny(f"run_dir={tmp_path}/{n}", f"seed={n}").parent / str(n) for n in (0, 1))
    target = tmp_path / "both.png"
    assert main(["plot", str(one), str(two), "--out", str(target)]) == 0
    assert target.read_bytes()[:4] == b"\x89PNG"
    assert main(["plot", *[str(one)] * 9]) == 2
    one_line(capsys, "9 runs", "at most 7")


def test_any_checkpoint_directory_can_be_evaluated(tiny, tmp_path, capsys):
    run = tiny("eval.every=1")
    model = tmp_path / "elsewhere"
    shutil.copytree(run / "checkpoint", model)
    settings = ["eval.problems=16", "eval.temperature=1.0", "rollout.max_new_tokens=4"]
    found = []
    for path in (run, run / "checkpoint", run / "best", model):
        capsys.readouterr()
        extra = ["task=even", *settings] if path is model else []
        assert main(["eval", str(path), *extra, "--json"]) == 0
        found.append(json.loads(capsys.readouterr().out))
    after = json.loads((run / "summary.json").read_text())["after"]
    assert found[0]["accuracy"]["mean"] == after["accuracy"]
    assert found[0] == found[1] == found[3]
    assert main(["eval", str(model)]) == 2
    one_line(capsys, "a model and no run", "task=sort")
    assert main(["eval", str(run), "eval.samples=4", "--json"]) == 0
    numbers = json.loads(capsys.readouterr().out)
    assert main(["eval", str(run), "eval.samples=4", "eval.temperature=0"]) == 2
    one_line(capsys, "eval.samples is 4", "eval.temperature=1.0")
    assert numbers["completions"] == 64 and numbers["pass@4"]["mean"] >= numbers["pass@1"]["mean"]
    content = bytearray((model / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (model / "model.safetensors").write_bytes(content)
    assert main(["eval", str(model), "task=even"]) == 1
    one_line(capsys, "model.safetensors is damaged", "SHA-256")


def test_help_version_and_settings_need_no_torch():
    code = (
        "import sys; from fastpo.cli import main\n"
        "for arguments in (['--help'], ['--version'], ['train', '--help']):\n"
        "    try: main(arguments)\n"
        "    except SystemExit as done: assert done.code == 0\n"
        "assert main(['settings']) == 0\n"
        "assert main(['train', 'steps=many']) == 2\n"
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


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


def test_doctor_names_every_backend_and_what_is_missing(capsys):
    """REGRESSIONS 28: a fast path that is off says so, and why."""
    assert main(["doctor"]) == 0
    output = capsys.readouterr().out
    for part in ("torch", "cpp", "triton", "cuda", "C++ extension", "flash-attn", "GPU"):
        assert part in output
    assert output.count("the default") >= 1
    names = [*backends.BACKENDS, *backends.LINEAR_BACKENDS]
    for device in ("cpu", "cuda"):
        listed = output.partition(f"Backends for {device}")[2].splitlines()[1 : len(names) + 1]
        assert [line.split()[0] for line in listed] == names


@pytest.mark.parametrize("found", ["addmm", None])
def test_doctor_says_whether_products_keep_float32_sums(found, monkeypatch):
    """REGRESSIONS 28: without it a bf16 head on a GPU is an order of magnitude slower."""
    from fastpo import doctor
    from fastpo.ops import head

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(head, "wide_gemm", lambda device, dtype: found)
    lines = doctor._wide_gemms()
    assert len(lines) == 2 and all("float32 sums" in line for line in lines)
    assert all(("torch.addmm" if found else "slower") in line for line in lines)


def test_settings_lists_every_key(capsys):
    assert main(["settings"]) == 0
    output = capsys.readouterr().out
    assert "rollout.group_size = 8  (int >= 2)\n    Completions per prompt." in output
    assert "rollout.max_prompt_tokens = none  (int >= 1 | none)" in output
    assert "optim.decay = \"constant\"  ('constant' | 'linear' | 'cosine')" in output


def test_any_character_is_printed_wherever_the_output_goes(tiny, tmp_path, monkeypatch):
    """A terminal or pipe that knows ASCII only must not end a run."""
    monkeypatch.setattr(Even, "problem", lambda self, rng: Problem(f"é{rng.random()}=", "2"))
    monkeypatch.setattr(Even, "alphabet", "0123456789.e-=é")
    output = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", output)
    tiny()
    assert main(["eval", str(tmp_path / "run")]) == 0
    output.flush()
    assert output.buffer.getvalue().count(rb"\xe90.") == 2 * 3


def test_import_fastpo_and_doctor_need_no_trainer_packages():
    """The trainer's packages are an extra: without them the library and the doctor work."""
    code = (
        "import sys; sys.modules.update(dict.fromkeys(['transformers', 'rich', 'pydantic']))\n"
        "import fastpo; from fastpo.cli import main\n"
        "assert main(['doctor']) == 0; sys.exit(main(['train', 'x.toml']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 2
    assert "fastpo[train]" in done.stderr and "Traceback" not in done.stderr


def test_a_signal_during_the_last_step_lets_the_run_finish(tiny, monkeypatch):
    monkeypatch.setattr(Even, "after", EVALUATION + 1 * 16 + 5)
    monkeypatch.setattr(Even, "sabotage", lambda self: os.kill(os.getppid(), signal.SIGINT))
    run = tiny("steps=2", "algorithm.dynamic_sampling=false")
    assert (run / "summary.json").exists()


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
