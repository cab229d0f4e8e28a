"""Two ranks under torchrun (gloo) do what one process does, or end in one line."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

ROOT = Path(__file__).parents[1]
TASK = """
import os
from fastpo.trainer.tasks import Problem

class Digits:
    '''Copy digits; the reward is the share of them that is right.'''
    alphabet, stop = "0123456789=", None
    def __init__(self, missing_on=""):
        if missing_on and os.environ.get("RANK") == missing_on:
            raise ImportError("no module named judge")
    def problem(self, rng):
        text = "".join(rng.choices("0123456789", k=rng.choice([2, 3])))
        return Problem(prompt=text + "=", answer=text)
    def reward(self, problem, completion):
        return sum(a == b for a, b in zip(problem.answer, completion)) / len(problem.answer)
"""
# Mini-batches, a KL penalty, shared prompts, recomputed log-probs, refilled groups.
RECIPE = """
task = "digits_task:Digits"
steps = 4
threads = 1
[model]
hidden_size = 32
heads = 2
[warmup]
max_steps = 6
[rollout]
prompts = 6
group_size = 3
max_new_tokens = 5
[algorithm]
preset = "dapo"
dynamic_sampling_by = "reward"
objective = { kl_coef = 0.05 }
[optim]
learning_rate = 2e-3
updates_per_batch = 2
old_logprobs = "recompute"
token_budget = 60
[verifier]
workers = 1
[eval]
problems = 7
temperature = 1.0
[log]
tensorboard = false
"""
TORCHRUN = ("-m", "torch.distributed.run", "--nproc-per-node", "2")


def start(tmp_path, name, *arguments, ranks=2, **environment):
    (tmp_path / "digits_task.py").write_text(TASK)
    (tmp_path / "recipe.toml").write_text(RECIPE)
    launcher = TORCHRUN if ranks > 1 else ()
    command = [sys.executable, *launcher, "-m", "fastpo.cli", "train", "recipe.toml"]
    return subprocess.Popen(
        [*command, f"run_dir={name}", *arguments],
        cwd=tmp_path,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def train(tmp_path, name, *arguments, code=0, **options):
    """Standard output, and the lines of fastpo on standard error."""
    process = start(tmp_path, name, *arguments, **options)
    output, errors = process.communicate(timeout=150)
    assert process.returncode == code, errors
    return output, said(errors)


def said(errors):
    return [line for line in errors.splitlines() if line.startswith("fastpo: ")]


def rows(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def same(one, other):
    """The curves and the weights of two runs, but for seconds."""
    weights, expected = (load_file(run / "checkpoint/model.safetensors") for run in (one, other))
    assert weights.keys() == expected.keys()
    for name, value in weights.items():
        torch.testing.assert_close(value, expected[name], atol=1e-5, rtol=0, msg=name)
    for row, right in zip(rows(one), rows(other), strict=True):
        for name, value in right.items():
            if not any(part in name for part in ("time", "per_second", "memory")):
                assert row[name] == pytest.approx(value, abs=1e-5, rel=1e-5), (row["step"], name)


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """The run of one process."""
    folder = tmp_path_factory.mktemp("one")
    train(folder, "run", ranks=1)
    return folder / "run"


@pytest.mark.slow
def test_two_ranks_train_as_one_process_does(tmp_path, one):
    """REGRESSIONS 16, 32: the same completions, curves and weights; in another layout, too."""
    output, _ = train(tmp_path, "run", "optim.share_prompts=true")
    assert output.count("Held-out accuracy before") == 1  # rank 0 alone speaks
    same(tmp_path / "run", one)
    two, right = (
        [json.loads(line)["completion"] for line in (run / "samples.jsonl").open()]
        for run in (tmp_path / "run", one)
    )
    assert two == right and len(two) == 4 * 4
    assert max(row.get("gen_batches", 0) for row in rows(one)) > 1  # refilled


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [(2, 1), (1, 2)], ids=str)
def test_a_run_resumes_on_another_number_of_ranks(tmp_path, one, ranks):
    train(tmp_path, "run", "steps=2", ranks=ranks[0])
    train(tmp_path, "run", "--resume", ranks=ranks[1])
    assert (tmp_path / "run/summary.json").exists()
    for name in ("metrics.jsonl",):  # the first run evaluated at its last step
        lines = (tmp_path / "run" / name).read_text().splitlines()
        kept = [x for x in lines if json.loads(x)["step"] != 2 or "reward" in json.loads(x)]
        (tmp_path / "run" / name).write_text("\n".join(kept) + "\n")
    same(tmp_path / "run", one)
