"""Less memory, the same numbers: checkpointed layers, adapters in place of a trained model."""

import random
from dataclasses import replace
from functools import partial

import peft
import pytest
import torch
import transformers
from peak_bytes import peak_bytes
from safetensors.torch import load_file

import fastpo
from fastpo.trainer.config import LoraConfig, ModelConfig, OptimConfig
from fastpo.trainer.data.tasks import SortDigits
from fastpo.trainer.evaluation import evaluate_saved
from fastpo.trainer.experience import Sample
from fastpo.trainer.loop import train
from fastpo.trainer.microbatch import MicroBatch
from fastpo.trainer.model import selfcheck
from fastpo.trainer.model.footprint import footprint
from fastpo.trainer.model.loading import load_policy, make_policy, outline
from fastpo.trainer.rollout import Sampling, sample
from fastpo.trainer.run import recipe
from fastpo.trainer.run.errors import RecipeError, TrainerError
from fastpo.trainer.update import Learner, Sums
from fastpo.trainer.warmup import reference_sample

CPU = torch.device("cpu")
TASK = SortDigits(digits=3)
SIZES = {"hidden_size": 32, "layers": 2, "heads": 2}
ADAPTED = LoraConfig(rank=4, alpha=16)


def make(**options):
    torch.manual_seed(0)
    config = ModelConfig(**{**SIZES, **options})
    return make_policy(config, CPU, alphabet=TASK.alphabet, stop=None)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A saved model that is right sometimes."""
    policy, rng = make(), random.Random(0)
    learner = Learner(policy, OptimConfig(learning_rate=1e-2), fastpo.reinforce(), temperature=1.0)
    for _ in range(40):
        problems = [TASK.problem(rng) for _ in range(32)]
        answers = [reference_sample(policy, p, p.answer) for p in problems]
        learner.update(answers, Sums(), on_policy=True)
    folder = tmp_path_factory.mktemp("base")
    policy.save(folder)
    return folder


def judged(policy):
    """Samples of the policy with rewards less their mean as advantages."""
    rng = random.Random(1)
    problems = [TASK.problem(rng) for _ in range(16)]
    prompts = policy.encode_all(problems, 5)
    sampling = Sampling(group_size=2, max_new_tokens=5)
    completions = sample(policy, prompts, sampling, torch.Generator().manual_seed(2))
    owners = [index for index in range(16) for _ in range(2)]
    scores = [
        TASK.reward(problems[owner], policy.decode(completion.tokens))
        for owner, completion in zip(owners, completions, strict=True)
    ]
    assert 0 < sum(scores) < len(scores)
    return [
        Sample(
            problem=problems[owner],
            prompt=prompts[owner],
            completion=completion,
            text="",
            score=score,
            reward=score,
            advantage=score - sum(scores) / len(scores),
        )
        for owner, completion, score in zip(owners, completions, scores, strict=True)
    ]


def learn(policy, steps=2, reference=None, **optim):
    """The sums of every step of a run on samples of its own."""
    config = OptimConfig(**{"learning_rate": 5e-3, "token_budget": 90, **optim})
    objective = fastpo.dapo(kl_coef=0.05 if reference else 0.0)
    learner = Learner(policy, config, objective, 1.0, reference)
    order = torch.Generator().manual_seed(3)
    return [learner.learn(judged(policy), order).read() for _ in range(steps)]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_checkpointed_layers_learn_bit_for_bit(base, dtype):
    found = []
    for kept in (False, True):
        config = ModelConfig(dtype=dtype, gradient_checkpointing=kept)
        policy = load_policy(base, config, CPU, stop=None)
        found.append((learn(policy, updates_per_batch=2), policy.model.state_dict()))
    (sums, weights), (again, others) = found
    assert sums == again and sums[0]["updates"] == 2
    assert all(torch.equal(weight, others[name]) for name, weight in weights.items())


def test_checkpointed_layers_take_less_memory():
    """REGRESSIONS 56: peak bytes; a layer runs again where there are gradients, and only there."""
    peaks, calls = [], []
    for kept in (False, True):
        policy = make(layers=6, gradient_checkpointing=kept)
        calls.clear()
        policy.model.model.layers[3].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
        ids = torch.randint(3, 12, (16, 64))
        work = policy.hidden_states
        peaks.append(peak_bytes(lambda: work(ids).sum().backward()))  # noqa: B023
        with torch.no_grad():
            policy.hidden_states(ids)
        assert len(calls) == 2 + kept and not any(m.training for m in policy.model.modules())
    assert peaks[1] < 0.4 * peaks[0]


def test_a_fused_step_is_the_same_but_for_rounding(base):
    found = []
    for name, fused in (("adamw", None), ("adamw_fused", True)):
        policy = load_policy(base, ModelConfig(), CPU, stop=None)
        learner = Learner(policy, OptimConfig(name=name), fastpo.dapo(), 1.0)
        learner.update(judged(policy), Sums(), on_policy=True)
        assert learner.optimizer.param_groups[0]["fused"] is fused
        found.append(torch.cat([p.detach().flatten() for p in policy.model.parameters()]))
    torch.testing.assert_close(*found, atol=1e-7, rtol=1e-6)


def adapted(path, **options):
    """A policy of which only adapters learn."""
    torch.manual_seed(4)
    return load_policy(path, ModelConfig(**{"lora": ADAPTED, **options}), CPU, stop=None)


@pytest.mark.parametrize("options", [{}, {"gradient_checkpointing": True}, {"dtype": "bfloat16"}])
def test_adapters_learn_and_the_reference_is_the_model_below_them(base, options):
    """Of its first updates: rewards rise, KL rises from 0, the base stays bit for bit."""
    policy = adapted(base, **options)
    selfcheck.check(policy, OptimConfig())
    before = {n: w.clone() for n, w in policy.model.state_dict().items()}
    reference = policy.without_adapters()
    assert reference.model is policy.model
    scored = learn(policy, steps=1, reference=reference)[0]
    assert scored["ref_kl"] == 0.0  # B begins at 0
    learn(policy, steps=3, reference=reference)
    changed = {n for n, w in policy.model.state_dict().items() if not torch.equal(w, before[n])}
    assert changed == {n for n in before if ".lora_" in n}
    batch = MicroBatch.of(judged(policy), CPU)
    learner = Learner(policy, OptimConfig(), fastpo.dapo(), 1.0)
    start = adapted(base, **options)
    if policy.dtype == torch.float32:
        start = load_policy(base, ModelConfig(), CPU, stop=None)
    expected, got, own = (learner._score(p, batch) for p in (start, reference, policy))
    assert torch.equal(got, expected) and (own - got).abs().max() > 0.1
    assert all(p.requires_grad == (".lora_" in n) for n, p in policy.model.named_parameters())


def test_saved_adapters_load_into_transformers_and_merge(base, tmp_path):
    policy = adapted(base)
    learn(policy)
    policy.save(tmp_path / "saved")
    ids = torch.randint(3, 12, (2, 6))
    with torch.no_grad():
        expected = policy.model(ids).logits
        loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
        merged = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "saved")
        assert torch.equal(loaded(ids).logits, expected)
        plain = merged.merge_and_unload()
        torch.testing.assert_close(plain(ids).logits, expected, atol=1e-5, rtol=1e-5)
    assert not (tmp_path / "saved" / "model.safetensors").exists()
    again = adapted(tmp_path / "saved")
    for (name, weight), other in zip(
        policy.model.named_parameters(), again.model.parameters(), strict=True
    ):
        assert torch.equal(weight, other) and weight.requires_grad == other.requires_grad, name


@pytest.mark.parametrize(
    ("lora", "line"),
    [
        (LoraConfig(rank=8, alpha=16), "have rank 4 and alpha 16, got model.lora.rank=8 and alpha"),
        (LoraConfig(rank=4, alpha=64), "alpha=64: set model.lora.rank=4 and model.lora.alpha=16"),
        (LoraConfig(), "got model.lora.rank=0 and .* to train them"),
        (replace(ADAPTED, target_modules=["q_proj"]), r"target_modules = \['q_proj'\]: expected"),
        (ADAPTED, None),
    ],
)
def test_adapters_to_go_on_with_are_those_of_the_recipe(base, tmp_path, lora, line):
    """REGRESSIONS 62: by a run, and by a plan of it."""
    adapted(base).save(tmp_path)
    config = ModelConfig(path=str(tmp_path), lora=lora)
    for make_it in (partial(make_policy, config, CPU), partial(outline, config)):
        if line is None:
            model = make_it(alphabet=None, stop=None).model
            assert {p.shape[0] for n, p in model.named_parameters() if "lora_A" in n} == {4}
            continue
        with pytest.raises(RecipeError, match=line) as caught:
            make_it(alphabet=None, stop=None)
        assert "\n" not in str(caught.value)


def test_adapters_of_the_head_alone_are_planned_checked_and_learn(base):
    """On a tied head: no hidden state depends on what is trained."""
    lora = replace(ADAPTED, target_modules=["lm_head"])
    policy = adapted(base, lora=lora)
    selfcheck.check(policy, OptimConfig())
    before = {n: w.clone() for n, w in policy.model.named_parameters()}
    learn(policy)
    changed = {n for n, w in policy.model.named_parameters() if not torch.equal(w, before[n])}
    assert changed == {n for n in before if n.startswith("lm_head.lora_")}
    config = recipe.load(None, [f"model.path={base}", "model.lora.rank=4"])
    config.model.lora = lora
    planned = footprint(config, 1, alphabet=None, stop=None)
    assert planned.parameters == sum(p.numel() for p in policy.model.parameters())
    assert planned.trained == sum(before[n].numel() for n in changed)


def test_what_does_not_go_together_is_one_line(base, tmp_path):
    for overrides, line in (
        (["model.gradient_checkpointing=true", "optim.share_prompts=true"], "set one of them to"),
        (["model.lora.rank=4"], r"set model\.path"),
        (["model.lora.rank=4", "model.path=x", "warmup.max_steps=3"], r"warmup\.max_steps=0"),
        (
            ["model.lora.rank=4", "model.path=x", "algorithm.sync_reference_every=2"],
            "without its adapters: set one of them to 0",
        ),
    ):
        with pytest.raises(RecipeError, match=line) as caught:
            recipe.load(None, overrides)
        assert "\n" not in str(caught.value)
    with pytest.raises(RecipeError, match=r"model\.lora: .*elsewhere") as caught:
        adapted(base, lora=replace(ADAPTED, target_modules=["elsewhere"]))
    assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_a_run_of_adapters_resumes_bit_for_bit_and_is_evaluated(base, tmp_path):
    """REGRESSIONS 40: with a KL penalty, and layers checkpointed on the way."""

    def run(folder, *overrides, resume=False):
        config = recipe.load(
            None,
            [
                *("task=sort", "task_args.digits=3", "steps=4", "threads=1", "verifier.workers=1"),
                *("rollout.prompts=8", "rollout.group_size=4", "rollout.max_new_tokens=5"),
                *("algorithm.objective.kl_coef=0.05", "optim.updates_per_batch=2"),
                *("optim.learning_rate=5e-3", "eval.problems=20", "log.tensorboard=false"),
                *(f"model.path={base}", "model.lora.rank=4", f"run_dir={folder}", *overrides),
            ],
        )
        summary = train(config, resume=resume)
        return summary, load_file(folder / "checkpoint" / "adapter_model.safetensors")

    summary, weights = run(tmp_path / "whole")
    run(tmp_path / "parts", "steps=2")
    more = "model.gradient_checkpointing=true"
    _, others = run(tmp_path / "parts", more, resume=True)
    assert all(torch.equal(weight, others[name]) for name, weight in weights.items())
    assert not (tmp_path / "whole" / "reference").exists()
    for path in (tmp_path / "whole", tmp_path / "whole" / "checkpoint"):
        assert evaluate_saved(path, []).accuracy == summary["after"]["accuracy"]
    with pytest.raises(TrainerError, match=r"cannot change model\.lora\.rank"):
        run(tmp_path / "parts", "model.lora.rank=8", "steps=5", resume=True)
