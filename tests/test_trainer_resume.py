"""Runs that go on: bit-exactly, after a kill or an error, never over a broken checkpoint."""

import json
import math
import os
import random
import signal

import numpy as np
import pytest
import torch
from tiny_runs import EVALUATION, Even, one_line, rows, weights

from fastpo.cli import main
from fastpo.trainer.data.tasks import Problem
from fastpo.trainer.run import checkpoint
from fastpo.trainer.update import Learner


@pytest.mark.parametrize(
    "options",
    [
        ["optim.updates_per_batch=2", "optim.epochs=2", "algorithm.objective.kl_coef=0.1"],
        ["warmup.max_steps=2", "checkpoint_every=1", "algorithm.preset=grpo"],
        ["algorithm.preset=ppo", "optim.updates_per_batch=2", "critic.warmup_steps=1"],
        ["algorithm.carry_surplus=true", "rollout.prompts=5", "seed=2"],
        ["rollout.ahead=true", "algorithm.carry_surplus=true", "rollout.prompts=5", "seed=2"],
        [
            *("algorithm.objective.kl_coef=0.1", "algorithm.sync_reference_every=1"),
            *("algorithm.correction.mode=mask", "algorithm.correction.high=1.0001"),
        ],
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
        ("warmup.max_steps=3", "0 -> 3"),
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


@pytest.mark.parametrize(("before", "now", "has"), [("ppo", "grpo", "a"), ("grpo", "ppo", "no")])
def test_a_run_neither_loses_nor_gets_a_critic_on_its_way(tiny, capsys, before, now, has):
    """REGRESSIONS 64: it was dropped from the next checkpoint, or began anew without warm-up."""
    run = tiny(f"algorithm.preset={before}", "steps=1")
    files = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    tiny("--resume", "steps=2", f"algorithm.preset={now}", code=2)
    one_line(capsys, f"the run has {has} critic", "algorithm.critic is", "train anew")
    assert files == {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    tiny(
        "--resume",
        "steps=2",
        f"algorithm.preset={now}",
        f"algorithm.critic={before == 'ppo'}".lower(),
    )


def test_resume_without_a_checkpoint(tiny, capsys):
    tiny("--resume", code=1)
    one_line(capsys, "no checkpoint", "without --resume")


@pytest.mark.parametrize("ahead", ["false", "true"])
def test_a_raising_verifier_keeps_metrics_and_a_checkpoint(tiny, monkeypatch, capsys, ahead):
    """Where it is asked ahead, the step that is learned meanwhile is kept, too."""
    monkeypatch.setattr(Even, "after", EVALUATION + 4 * 16)
    monkeypatch.setattr(Even, "sabotage", lambda self: {}["nothing"])
    options = ("algorithm.dynamic_sampling=false", f"rollout.ahead={ahead}")
    run = tiny("steps=50", *options, code=1)
    one_line(capsys, "Even.reward raised KeyError", "completion")
    assert [row["step"] for row in rows(run)] == [0, 1, 2, 3, 4]
    assert checkpoint.load_state(run / "checkpoint")["step"] == 4


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


@pytest.mark.parametrize("ahead", ["false", "true"])
def test_a_failing_step_keeps_the_steps_before_it(tiny, monkeypatch, capsys, ahead):
    """Out of memory in the third step, without a checkpoint so far."""

    def greedy(self, samples, sums, *, on_policy):
        if self.updates == 2:
            torch.empty(2**60)
        update(self, samples, sums, on_policy=on_policy)

    update = Learner.update
    monkeypatch.setattr(Learner, "update", greedy)
    run = tiny("steps=4", f"rollout.ahead={ahead}", code=1)
    one_line(capsys, "allocate memory", "optim.token_budget")
    assert checkpoint.load_state(run / "checkpoint")["step"] == 2
    monkeypatch.setattr(Learner, "update", update)
    tiny("steps=4", f"rollout.ahead={ahead}", "--resume")
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
@pytest.mark.parametrize("ahead", ["false", "true"])
def test_kill_9_loses_what_came_after_the_last_checkpoint_and_nothing_else(
    tiny, monkeypatch, ahead
):
    """Best and last checkpoints are whole, and the resumed run is the one that was never killed."""
    options = ["steps=6", "eval.every=1", "checkpoint_minutes=1e-9", f"rollout.ahead={ahead}"]
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


def test_an_empty_config_of_a_run_is_named(tiny, capsys):
    run = tiny()
    (run / "config.toml").write_text("")
    tiny("--resume", "steps=3", code=2)
    one_line(capsys, "config.toml is empty")
    assert main(["eval", str(run)]) == 2
    one_line(capsys, "config.toml is empty")
