"""Two ranks under torchrun (gloo) do what one process does, or end in one line."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

ROOT = Path(__file__).parents[1]
TASK = """
import functools, os
import torch
torch.compile = functools.partial(torch.compile, backend="aot_eager")  # graphs, no code to wait for
from fastpo.trainer.data.tasks import Problem

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
# Mini-batches, a KL penalty whose reference moves, shared prompts, recomputed log-probs, tokens
# rejected by them, refilled groups and what they leave over.
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
sync_reference_every = 2
carry_surplus = true
correction = { mode = "none", reject = { token_k1 = [0.5, 2.0] } }
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
TWO = ("--nproc-per-node", "2")
LEARNING_RATE = 2e-3


def start(tmp_path, name, *arguments, launcher=TWO):
    (tmp_path / "digits_task.py").write_text(TASK)
    (tmp_path / "recipe.toml").write_text(RECIPE)
    torchrun = ("-m", "torch.distributed.run", *launcher) if launcher else ()
    command = [sys.executable, *torchrun, "-m", "fastpo.cli", "train", "recipe.toml"]
    return subprocess.Popen(
        [*command, f"run_dir={name}", *arguments],
        cwd=tmp_path,
        env=os.environ
        | {
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def train(tmp_path, name, *arguments, code=0, ranks=2):
    """Standard output, and the lines of fastpo on standard error."""
    process = start(tmp_path, name, *arguments, launcher=TWO if ranks == 2 else ())
    output, errors = process.communicate(timeout=250)
    assert process.returncode == code, errors
    return output, said(errors)


def said(errors):
    return [line for line in errors.splitlines() if line.startswith("fastpo: ")]


def rows(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def same(one, other, weights="model"):
    """The curves and the weights of two runs, but for seconds.

    AdamW divides a gradient by its own size: where it is zero but for rounding, a weight in
    thousands may move by up to a step of the learning rate either way.
    """
    file = f"checkpoint/{weights}.safetensors"
    weights, expected = (load_file(run / file) for run in (one, other))
    assert weights.keys() == expected.keys()
    apart = torch.cat([(weights[name] - expected[name]).abs().flatten() for name in weights])
    assert apart.quantile(0.999) < 1e-5 and apart.max() < LEARNING_RATE
    for row, right in zip(rows(one), rows(other), strict=True):
        for name, value in right.items():
            if not any(part in name for part in ("time", "per_second", "memory")):
                assert row[name] == pytest.approx(value, abs=1e-5, rel=1e-5), (row["step"], name)


PPO = (
    *("algorithm.preset=ppo", "algorithm.dynamic_sampling=false", "algorithm.carry_surplus=false"),
    *("critic.learning_rate=1e-3", "critic.clip=0.01", "optim.epochs=2", "algorithm.correction={}"),
)


def critic_of(run):
    """Its weights and moments, by name."""
    state = torch.load(run / "checkpoint/trainer_state.pt", weights_only=True)["critic"]
    moments = state["optimizer"]["state"]
    return dict(state["modules"]) | {(i, n): x for i in moments for n, x in moments[i].items()}


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """The run of one process."""
    folder = tmp_path_factory.mktemp("one")
    train(folder, "run", ranks=1)
    return folder / "run"


@pytest.mark.slow
@pytest.mark.parametrize(
    "more",
    [("optim.share_prompts=true", "offload=true"), ("replicas=2", "optim.token_budget=1")],
    ids=str,
)
def test_two_ranks_train_as_one_process_does(tmp_path, one, more):
    """REGRESSIONS 16, 32: the same completions, curves and weights; in another layout, with shards
    on the host (which on CPU they are), as two replicas, and with a micro-batch per sample, too."""
    output, _ = train(tmp_path, "run", *more)
    assert output.count("Held-out accuracy before") == 1  # rank 0 alone speaks
    same(tmp_path / "run", one)
    two, right = (
        [json.loads(line)["completion"] for line in (run / "samples.jsonl").open()]
        for run in (tmp_path / "run", one)
    )
    assert two == right and len(two) == 4 * 4
    assert max(row.get("gen_batches", 0) for row in rows(one)) > 1  # refilled


def in_two_parts(tmp_path, ranks, *options):
    """The directory of a run that was stopped at step 2 and went on, each on so many ranks."""
    train(tmp_path, "run", *options, "steps=2", ranks=ranks[0])
    more = "model.gradient_checkpointing=true"
    train(tmp_path, "run", "--resume", *options, more, ranks=ranks[1])
    assert (tmp_path / "run/summary.json").exists()
    metrics = tmp_path / "run/metrics.jsonl"  # the first part evaluated at its last step
    kept = [x for x in metrics.open() if json.loads(x)["step"] != 2 or "reward" in json.loads(x)]
    metrics.write_text("".join(kept))
    return tmp_path / "run"


@pytest.mark.slow
def test_two_ranks_draw_ahead_as_one_process_does(tmp_path):
    """Messages of the thread and gathers of the update do not wait for each other."""
    for ranks in (1, 2):
        train(tmp_path, f"run{ranks}", "rollout.ahead=true", ranks=ranks)
    same(tmp_path / "run2", tmp_path / "run1")


@pytest.mark.slow
def test_compiled_layers_train_on_two_ranks_as_others_do(tmp_path):
    """Under FSDP2, and run again in the backward pass."""
    compiled = ("model.compile=true", "model.gradient_checkpointing=true")
    for name, more in (("plain", ()), ("compiled", compiled)):
        train(tmp_path, name, "steps=2", "optim.packing=false", *more)
    same(tmp_path / "compiled", tmp_path / "plain")


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [(2, 1), (1, 2)], ids=str)
def test_a_run_resumes_on_another_number_of_ranks(tmp_path, one, ranks):
    same(in_two_parts(tmp_path, ranks), one)


@pytest.fixture(scope="module")
def one_with_a_critic(tmp_path_factory):
    """The run of one process."""
    folder = tmp_path_factory.mktemp("critic")
    train(folder, "run", *PPO, ranks=1)
    return folder / "run"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ranks", "more"), [((2, 2), ["replicas=2"]), ((2, 1), []), ((1, 2), [])], ids=str
)
def test_a_critic_trains_and_resumes_on_two_ranks_as_on_one(
    tmp_path, one_with_a_critic, ranks, more
):
    """REGRESSIONS 63: value curve, weights and moments are those of one process."""
    expected = critic_of(one_with_a_critic)
    assert expected["head.weight"].abs().max() > 1e-3
    assert max(row.get("value/clip_ratio", 0) for row in rows(one_with_a_critic)) > 0.1
    run = in_two_parts(tmp_path, ranks, *PPO, *more)
    same(run, one_with_a_critic)
    found = critic_of(run)
    assert found.keys() == expected.keys()
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name], atol=1e-5, rtol=1e-4, msg=str(name))


@pytest.mark.slow
def test_adapters_train_on_two_ranks_as_on_one(tmp_path, one):
    """With the reference below them, and layers checkpointed; a base of bfloat16, too."""
    arguments = (
        *("model.lora.rank=4", f"model.path={one / 'checkpoint'}", "warmup.max_steps=0"),
        *("model.gradient_checkpointing=true", "steps=2", "algorithm.sync_reference_every=0"),
    )
    for ranks in (1, 2):
        train(tmp_path, f"run{ranks}", *arguments, ranks=ranks)
    same(tmp_path / "run2", tmp_path / "run1", "adapter_model")
    low = (*arguments, *PPO, "model.dtype=bfloat16")
    train(tmp_path, "low", *low, "replicas=2")
    train(tmp_path, "low", "--resume", *low, "steps=3")
    names = [name for name in critic_of(tmp_path / "low") if isinstance(name, str)]
    assert names and all("lora" in name or name.startswith("head.") for name in names)
    assert [row["step"] for row in rows(tmp_path / "low") if "reward" in row] == [1, 2, 3]


@pytest.mark.slow
@pytest.mark.peer
def test_moments_of_eight_bits_resume_bit_for_bit_on_two_ranks(tmp_path, monkeypatch):
    """On one process, whose blocks are others, almost."""
    pytest.importorskip("torchao")
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")  # compiling takes minutes
    wide = ("model.hidden_size=128", "optim.name=adamw_8bit", "steps=3", "warmup.max_steps=2")
    train(tmp_path, "whole", *wide)
    train(tmp_path, "run", *wide, "steps=2")
    shutil.copytree(tmp_path / "run", tmp_path / "one")
    for name, ranks in (("run", 2), ("one", 1)):
        train(tmp_path, name, "--resume", *wide, ranks=ranks)
    whole, run, one = (
        load_file(tmp_path / n / "checkpoint/model.safetensors") for n in ("whole", "run", "one")
    )
    assert all(torch.equal(run[name], value) for name, value in whole.items())
    assert all((one[name] - value).abs().max() < 2e-3 for name, value in whole.items())
    state = torch.load(tmp_path / "run/checkpoint/trainer_state.pt", weights_only=True)
    moments = [m["exp_avg"] for m in state["learner"]["optimizer"]["state"].values()]
    assert {type(m) for m in moments} == {dict, torch.Tensor}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("argument", "line"),
    [
        ("rollout.prompts=5", "rollout.prompts is 5, expected a multiple of the 2 ranks"),
        ('task_args={missing_on = "1"}', "rank 1: task 'digits_task:Digits' does not take"),
        ("run_dir=.", "fastpo: . exists and is left as it is"),
    ],
    ids=["all", "rank 1", "rank 0"],
)
def test_what_goes_wrong_on_some_ranks_is_one_line(tmp_path, argument, line):
    _, lines = train(tmp_path, "run", argument, code=1)  # torchrun's own exit code
    assert len(lines) == 1 and line in lines[0], lines
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_ranks_that_disagree_on_the_recipe_are_told(tmp_path):
    """Two machines, each with a launcher and a learning rate of its own."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    network = ("--nnodes", "2", "--nproc-per-node", "1", "--master-port", port, "--node-rank")
    launchers = [
        start(tmp_path, "run", f"optim.learning_rate={rate}", launcher=(*network, node))
        for node, rate in (("0", "1e-4"), ("1", "1e-5"))
    ]
    errors = [launcher.communicate(timeout=150)[1] for launcher in launchers]
    assert all(launcher.returncode for launcher in launchers)
    assert said("".join(errors)) == [
        "fastpo: optim.learning_rate is 0.0001 on rank 0 and 1e-05 on rank 1: start all ranks by "
        "the same command and recipe"
    ]


def rank_of(launcher, rank):
    """Process id of a rank."""
    children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
    return next(
        int(pid)
        for pid in children
        if f"RANK={rank}".encode() in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    )


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="finds the rank in /proc")
def test_a_killed_rank_leaves_one_line_and_a_checkpoint_that_resumes(tmp_path):
    launcher = start(tmp_path, "run", "steps=500", "checkpoint_every=1")
    metrics = tmp_path / "run/metrics.jsonl"
    deadline = time.monotonic() + 100
    while not (metrics.exists() and metrics.read_text().count("reward_std") > 2):
        assert time.monotonic() < deadline and launcher.poll() is None
        time.sleep(0.05)
    os.kill(rank_of(launcher, 1), signal.SIGKILL)
    lines = said(launcher.communicate(timeout=60)[1])
    assert launcher.returncode
    assert len(lines) == 1 and lines[0].startswith("fastpo: another rank has gone"), lines
    done = torch.load(tmp_path / "run/checkpoint/trainer_state.pt", weights_only=True)["step"]
    train(tmp_path, "run", "--resume", f"steps={done + 1}", ranks=1)
    assert [r["step"] for r in rows(tmp_path / "run") if "reward" in r] == [*range(1, done + 2)]
