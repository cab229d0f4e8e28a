"""`fastpo plan RECIPE` says what a run takes, and a run takes it. `--dry-run` finds mistakes."""

import json
import sys
from pathlib import Path

import pytest
import torch
import transformers
from peak_bytes import peak_bytes

import fastpo
from fastpo.cli import main
from fastpo.trainer import hub
from fastpo.trainer.data.tasks import Problem
from fastpo.trainer.experience import Sample
from fastpo.trainer.model import attention
from fastpo.trainer.model.footprint import footprint
from fastpo.trainer.model.loading import character_tokenizer, make_policy
from fastpo.trainer.rollout import Completion, Sampling, sample
from fastpo.trainer.run import recipe
from fastpo.trainer.update import Learner, Sums

CPU = torch.device("cpu")
ALPHABET = "0123456789="
RECIPES = Path(__file__).parents[1] / "recipes"
SIZES = ("model.hidden_size=128", "model.layers=4", "device=cpu", "rollout.max_prompt_tokens=30")
slow = pytest.mark.slow
SHARE = 0.15  # that plan and measurement may differ by


def planned(*overrides, ranks=1):
    config = recipe.load(None, [*SIZES, *overrides])
    return config, footprint(config, ranks, alphabet=ALPHABET, stop=None)


@pytest.mark.parametrize(
    ("kept", "dtype"),
    [
        ("true", "bfloat16"),
        *(pytest.param(*case, marks=slow) for case in (("true", "float32"), ("false", "bfloat16"))),
        pytest.param("false", "float32", marks=slow),
    ],
)
def test_an_update_takes_what_was_planned(dtype, kept):
    config, plan = planned(
        *(f"model.dtype={dtype}", f"model.gradient_checkpointing={kept}"), "optim.token_budget=2048"
    )
    policy = make_policy(config.model, CPU, alphabet=ALPHABET, stop=None)
    learner = Learner(policy, config.optim, fastpo.dapo(), 1.0)
    samples = [
        Sample(
            problem=Problem(""),
            prompt=[3] * 8,
            completion=Completion(tokens=[4] * 120, logprobs=[-1.0] * 120, finished=True),
            text="",
            score=0.0,
            reward=0.0,
            advantage=float(index % 2),
        )
        for index in range(32)  # two micro-batches
    ]
    learner.update(samples, Sums(), on_policy=True)
    moments = [value for of in learner.optimizer.state.values() for value in of.values()]
    peak = peak_bytes(
        lambda: learner.update(samples, Sums(), on_policy=True), [*learner.parameters, *moments]
    )
    assert plan.peak("update") == pytest.approx(peak, rel=SHARE)


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_rollout_beside_an_update_takes_what_both_do_and_a_copy(ranks):
    _, plan = planned("model.dtype=bfloat16", "rollout.prompts=32", ranks=ranks)
    _, ahead = planned(
        "rollout.ahead=true", "model.dtype=bfloat16", "rollout.prompts=32", ranks=ranks
    )
    own = [part.bytes for part in plan.parts if part.phases == ("rollout",)]
    assert len(own) == 3
    both = plan.peak("update") + sum(own) + 4 * plan.parameters
    assert ahead.peak("rollout") == ahead.peak("update") == pytest.approx(both)
    assert ahead.peak("load") == pytest.approx(plan.peak("load") + 4 * plan.parameters)


@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=slow)])
def test_a_rollout_takes_what_was_planned(dtype):
    config, plan = planned(
        *(f"model.dtype={dtype}", "rollout.prompts=32", "rollout.group_size=8"),
        "rollout.max_new_tokens=40",
    )
    policy = make_policy(config.model, CPU, alphabet=ALPHABET, stop=None)
    policy.stop_ids = policy.stop_ids[:0]
    sampling, generator = Sampling.of(config.rollout), torch.Generator()
    peak = peak_bytes(
        lambda: sample(policy, [[3] * 30] * 32, sampling, generator), policy.model.parameters()
    )
    learning = {"moments of AdamW", "gradients"}
    parts = [part for part in plan.parts if part.name not in learning]
    assert plan._replace(parts=parts).peak("rollout") == pytest.approx(peak, rel=SHARE)


def sizes(plan):
    return {part.name: part.bytes for part in plan.parts}


def test_what_is_shared_and_what_is_not(tmp_path):
    """The figures one can work out by hand."""
    alone, shared = planned()[1], planned(ranks=4)[1]
    count = alone.parameters
    assert count == sum(
        p.numel()
        for p in make_policy(
            planned()[0].model, CPU, alphabet=ALPHABET, stop=None
        ).model.parameters()
    )
    assert sizes(alone)["weights"] == 4 * count == 4 * sizes(shared)["weights"]
    assert sizes(alone)["moments of AdamW"] == 8 * count == 4 * sizes(shared)["moments of AdamW"]
    assert sizes(shared)["whole model to sample from"] == 4 * count
    assert sizes(planned("replicas=2", ranks=4)[1])["weights"] == 2 * count
    kl = planned("algorithm.objective.kl_coef=0.1", "algorithm.critic=true")[1]
    assert kl.peak("rollout") - alone.peak("rollout") == (4 + 12) * count
    policy = make_policy(planned()[0].model, CPU, alphabet=ALPHABET, stop=None)
    policy.save(tmp_path)
    lora = planned(f"model.path={tmp_path}", "model.lora.rank=2", "model.dtype=bfloat16")[1]
    adapters = 2 * 4 * (4 * 2 * 128 + 3 * (128 + 512))
    assert lora.trained == adapters and lora.parameters == count + adapters
    assert sizes(lora)["weights"] == 2 * count + 4 * adapters
    ppo = ("algorithm.preset=ppo", f"model.path={tmp_path}", "model.lora.rank=2")
    critics = [sizes(planned(*ppo, ranks=n)[1])["critic and its moments"] for n in (1, 2)]
    assert critics == [
        12 * adapters,
        (4 * count + 12 * adapters) / 2,
    ]  # alone it shares what is frozen


def test_eight_bits_and_the_host_take_from_the_device():
    """Moments of 2 bytes and two scales for 256; small tensors keep theirs."""
    config, plan = planned("optim.name=adamw_8bit")
    policy = make_policy(config.model, CPU, alphabet=ALPHABET, stop=None)
    large = sum(p.numel() for p in policy.model.parameters() if p.numel() >= 4096)
    small = plan.parameters - large
    assert small and sizes(plan)["moments of AdamW"] == large * (2 + 8 / 256) + small * 8
    there, here = (planned(f"offload={o}", "replicas=2", ranks=4)[1] for o in ("true", "false"))
    assert sizes(there)["weights, on the host"] == sizes(here)["weights"] > 0
    for phase, states in (("rollout", 4 + 8), ("update", 4 + 8 + 4)):
        assert here.peak(phase) - there.peak(phase) == states * plan.parameters / 2


@pytest.fixture
def offline(tmp_path, monkeypatch):
    """A tiny Qwen3 (its config and a tokenizer alone) and rows in the columns of every recipe."""
    monkeypatch.chdir(tmp_path)
    config = transformers.Qwen3Config(
        vocab_size=16,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        eos_token_id=1,
    )
    config.save_pretrained("model")
    tokenizer = character_tokenizer(ALPHABET)
    tokenizer.chat_template = "{{ messages[-1]['content'] }}="
    tokenizer.save_pretrained("model")
    rows = [{"prompt": f"{n}", "question": f"{n}", "answer": f"{n}"} for n in range(10, 50)]
    Path("rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return [
        *("task=jsonl", "task_args.train=rows.jsonl", "task_args.test=rows.jsonl"),
        *("task_args.reward=numeric", "model.path=model", "model.system_prompt=none"),
    ]


@pytest.mark.parametrize(
    ("name", "ranks"),
    [("gsm8k-0.6b", 1), ("dapo-8gpu", 8), ("dapo-2nodes", 16), ("dapo-2nodes", 64)],
)
def test_recipes_for_gpus_pass_a_dry_run(offline, capsys, name, ranks):
    path = str(RECIPES / f"{name}.toml")
    assert main(["train", path, *offline, "--dry-run", "--ranks", str(ranks)]) == 0
    checked = capsys.readouterr().out
    checked, said, _ = checked.partition("The dry run passed: ")
    assert said and f"on {ranks} rank" in checked and "peak of an update" in checked
    assert main(["plan", path, *offline, "--ranks", str(ranks)]) == 0
    assert capsys.readouterr().out == checked
    # Of rows and verifiers, which a plan does not need, nothing has to be there.
    absent = ["task_args.train=absent", "task_args.reward=absent", "task_args.test=none"]
    assert main(["plan", path, *offline, *absent, "--ranks", str(ranks)]) == 0
    assert capsys.readouterr().out == checked
    assert sorted(p.name for p in Path().iterdir()) == ["model", "rows.jsonl"]  # nothing is written
    assert not torch.distributed.is_initialized()


def test_a_plan_may_be_the_first_to_see_a_model(offline, capsys, monkeypatch):
    """Of a model at a path it stopped at an attention whose name only loading had registered."""
    for names in (transformers.AttentionInterface, transformers.AttentionMaskInterface):
        monkeypatch.setattr(names, "_global_mapping", dict(names._global_mapping))
        names._global_mapping.pop(attention.OURS, None)
    assert main(["plan", str(RECIPES / "gsm8k-0.6b.toml"), *offline]) == 0
    assert "Qwen3ForCausalLM" in capsys.readouterr().out


def test_a_critic_is_sharded_and_offloaded_as_the_policy_is(offline, monkeypatch):
    """Every unit of both, the scalar head included."""
    given, shard = [], torch.distributed.fsdp.fully_shard

    def recorded(module, *, offload_policy=None, **options):
        given.append((type(module).__name__, offload_policy))
        return shard(module, **options, **({"offload_policy": offload_policy} if offloaded else {}))

    monkeypatch.setattr(torch.distributed.fsdp, "fully_shard", recorded)
    ppo = ["rollout.prompts=16", *offline, "algorithm.preset=ppo", "--dry-run", "--ranks", "8"]
    for offloaded in (True, False):
        given.clear()
        assert main(["train", *ppo, f"offload={str(offloaded).lower()}"]) == 0
        units = ["Linear", *["Qwen3DecoderLayer"] * 2, "Inside", *["Qwen3DecoderLayer"] * 2]
        assert [name for name, _ in given] == [*units, "Inside"]
        kinds = {type(policy).__name__ for _, policy in given}
        assert kinds == {"CPUOffloadPolicy" if offloaded else "NoneType"}


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (["rollout.prompts=12"], "rollout.prompts is 12, expected a multiple of the 8 ranks"),
        (["replicas=3"], "replicas is 3, expected a divisor of the number of ranks, 8: change it"),
        (["optim.name=adamw_8bit"], "pip install torchao"),
        (["task=absent:Task", "task_args={}"], "cannot import task 'absent:Task'"),
        (["task_args.reward=absent"], "absent"),
        (["model.path=./absent"], "cannot load a model from './absent'"),
        (["rollout.max_new_tokens=50000"], "exceed the 32768 positions"),
        (["rollout.max_prompt_tokens=1"], "no test row fits"),
        (["run_dir=model"], "model exists"),
        (["rollout.engine=vllm"], "pip install vllm"),
        (["algorithm.preset=absent"], "algorithm.preset is 'absent'"),
        (["model.lora.rank=2", "model.lora.target_modules=absent"], "model.lora: "),
    ],
)
def test_a_dry_run_says_what_a_run_would_refuse(offline, capsys, monkeypatch, overrides, line):
    for package in ("vllm", "torchao"):
        monkeypatch.setitem(sys.modules, package, None)
    arguments = ["rollout.prompts=16", *offline, *overrides, "--dry-run", "--ranks", "8"]
    assert main(["train", *arguments]) in (1, 2)
    errors = capsys.readouterr().err
    assert errors.startswith("fastpo: ") and line in errors and errors.count("\n") == 1


def test_a_recipe_may_stand_behind_the_options_of_a_plan(offline, capsys):
    path = str(RECIPES / "demo.toml")
    for arguments in (
        ["--ranks", "8", path],
        [path, "--ranks", "8"],
        ["--ranks=8", path, "seed=1"],
    ):
        assert main(["plan", *arguments]) == 0
        assert "on 8 ranks" in capsys.readouterr().out
    for form in ([], [path]):
        with pytest.raises(SystemExit):
            main(["plan", *form, "--help"])
        usage = capsys.readouterr().out
        assert "plan RECIPE" in usage and "plan --vocab V" in usage


def test_ranks_are_counted_from_one(capsys):
    with pytest.raises(SystemExit):
        main(["plan", str(RECIPES / "demo.toml"), "--ranks", "0"])
    assert "--ranks" in capsys.readouterr().err


def test_a_hub_that_is_not_there_is_tried_once(capsys, monkeypatch):
    """It took 45 seconds."""
    tried = []

    class Session:
        def head(self, url, timeout):
            tried.append(url)
            raise OSError("no route to host")

    from huggingface_hub import constants

    hub._answers.cache_clear()
    monkeypatch.setattr("huggingface_hub.utils.get_session", Session)
    monkeypatch.setattr("huggingface_hub.file_download.get_hf_file_metadata", pytest.fail)
    recipe = str(RECIPES / "gsm8k-0.6b.toml")
    for check, what in ((["plan"], "a model from"), (["train", "--dry-run"], "the data set")):
        assert main([*check, recipe, "model.path=fastpo-tests/absent"]) != 0
        line = capsys.readouterr().err
        assert line.startswith(f"fastpo: cannot load {what} ") and line.count("\n") == 1
    assert tried == [constants.ENDPOINT] and not constants.HF_HUB_OFFLINE
    hub._answers.cache_clear()


def test_a_plan_refuses_ranks_that_replicas_do_not_divide(capsys):
    assert main(["plan", str(RECIPES / "dapo-2nodes.toml")]) != 0
    error = capsys.readouterr().err
    assert "replicas is 2, expected a divisor of the number of ranks, 1: change it" in error
    assert "--ranks of a plan" in error
    assert main(["plan", str(RECIPES / "demo.toml"), "offload=true"]) != 0
    assert "offload=true is for the shards of several ranks" in capsys.readouterr().err
