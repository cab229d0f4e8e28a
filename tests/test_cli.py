"""The command line, in process: whole tiny runs, and one clear line for whatever goes wrong."""

import io
import json
import math
import shutil
import subprocess
import sys

import pytest
import torch
from tiny_runs import EVALUATION, Even, one_line, rows, weights

from fastpo import backends
from fastpo.cli import main
from fastpo.trainer.data.tasks import Problem
from fastpo.trainer.run import checkpoint

METRICS = (
    *("reward", "reward_std", "frac_reward_zero_std", "accuracy", "groups_kept", "num_tokens"),
    *("completions/mean_length", "completions/clipped_ratio", "entropy", "loss", "grad_norm"),
    *("clip_ratio/low_mean", "clip_ratio/high_mean", "clip_ratio/region_mean", "learning_rate"),
)


def test_a_run_leaves_everything_behind(tiny, capsys):
    run = tiny("seed=3", "eval.every=1")
    output = capsys.readouterr().out
    steps = [row for row in rows(run) if "reward" in row]
    assert [row["step"] for row in steps] == [1, 2]
    for name in METRICS:
        assert isinstance(steps[0][name], int | float), name
    for first in steps:
        assert first["step_time"] >= first["rollout_time"] + first["update_time"]
        assert 0 < first["rollout_time_share"] < 1
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


def test_a_run_that_failed_before_its_first_step_does_not_block_the_next(tiny, monkeypatch, capsys):
    monkeypatch.setattr(Even, "after", EVALUATION)
    monkeypatch.setattr(Even, "sabotage", lambda self: {}["nothing"])
    run = tiny(code=1)
    one_line(capsys, "Even.reward raised KeyError")
    assert [row["step"] for row in rows(run)] == [0]
    tiny("seed=1")
    assert "ended before its first step" in " ".join(capsys.readouterr().out.split())
    assert [row["step"] for row in rows(run) if "eval_accuracy" in row] == [0, 2]
    assert "seed = 1" in (run / "config.toml").read_text()
    tiny("seed=2", code=2)  # of a run with steps, nothing is lost
    one_line(capsys, "exists", "move_aside")


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["optim.lerning_rate=1"], ["optim.lerning_rate", "optim.learning_rate"]),
        (["optim.lr=1"], ["optim.lr", "optim has learning_rate, warmup_steps"]),
        (["optim.learning_rte=1"], ["nearest known key is 'optim.learning_rate'"]),
        (["steps=many"], ["steps", "'many'", "integer"]),
        (["task=none_such"], ["none_such", "sort"]),
        (["model.path=/nowhere"], ["/nowhere", "no such folder"]),
        (["model.path=.cache/nowhere"], [".cache/nowhere", "no such folder"]),
        (["algorithm.preset=dpo"], ["algorithm.preset", "dapo"]),
        (["run_dir={nope}"], ["run_dir", "{task}"]),
        (["run_dir=/dev/null/run"], ["/dev/null/run"]),
        (["device=abacus"], ["device", "'abacus'"]),
        (["device=meta"], ["device", "'meta'"]),
        (["eval.problems=10001"], ["eval.problems"]),
        (["seed=18446744073709551616"], ["seed", "less than"]),
        (["optim.beta1=1.0"], ["optim.beta1", "less than 1"]),
        (["optim.decay=sine"], ["optim.decay", "'linear'"]),
        (["model.attention=abacus"], ["cannot build a model with model.attention=abacus"]),
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
    one_line(capsys, "has no config.toml", "expected the directory of a run")
    assert main(["eval", str(tmp_path / "absent")]) == 2
    one_line(capsys, "absent", "directory of a run or a model, or a recipe")


def test_evaluating_what_a_recipe_begins_with_says_that_it_is_untrained(tiny, tmp_path, capsys):
    tiny()
    for path, said in (("tiny.toml", True), ("run", False)):
        capsys.readouterr()
        assert main(["eval", str(tmp_path / path), "rollout.max_new_tokens=2"]) == 0
        assert ("untrained" in capsys.readouterr().err) is said


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
    monkeypatch.setattr(Even, "__init__", lambda self, **_: setattr(self, "calls", 0))
    for rate in ("0.01", "0.02"):
        tiny(
            *(f"run_dir={tmp_path}/lr{rate}", f"optim.learning_rate={rate}"),
            *(f"task_args.rate={rate}", "task_args.same=1"),
        )
    capsys.readouterr()
    assert main(["compare", f"{tmp_path}/lr0.01", f"{tmp_path}/lr0.02"]) == 0
    output = capsys.readouterr().out
    assert "optim.learning_rate=0.01" in output and "optim.learning_rate=0.02" in output
    assert "\n  task_args.rate=0.02\n" in output and "task_args.same" not in output
    assert "group_size" not in output and "standard deviation" not in output
    summary = json.loads((tmp_path / "lr0.02" / "summary.json").read_text())
    assert f"{summary['after']['accuracy']:.3f}" in output
    assert main(["compare", str(tmp_path)]) == 2
    one_line(capsys, "metrics.jsonl", "directory of a run", f"{tmp_path}/lr0.01, {tmp_path}/lr0.02")


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
