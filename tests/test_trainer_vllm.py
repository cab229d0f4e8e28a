"""`rollout.engine = "vllm"` against a stand-in with the names and signatures of vLLM 0.33.

The stand-in samples from a model of its own, which has only the weights that it was given.
"""

import sys
from dataclasses import dataclass, field, replace
from types import ModuleType, SimpleNamespace

import pytest
import torch
import transformers

import fastpo
from fastpo.trainer.config import ModelConfig, OptimConfig
from fastpo.trainer.data.tasks import Problem
from fastpo.trainer.experience import Sample
from fastpo.trainer.loop import train
from fastpo.trainer.microbatch import MicroBatch
from fastpo.trainer.model.loading import load_policy, make_policy
from fastpo.trainer.rollout import Sampling, sample
from fastpo.trainer.rollout_vllm import VllmRollout
from fastpo.trainer.run import recipe
from fastpo.trainer.run.errors import RecipeError, TrainerError
from fastpo.trainer.source import copy_of
from fastpo.trainer.update import Learner, Sums

CPU = torch.device("cpu")
ALPHABET = "0123456789="
PROMPTS = [[3, 4, 5], [6], [7, 8]]


@dataclass(kw_only=True)
class SamplingParams:
    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool = False
    max_tokens: int | None = 16
    logprobs: int | None = None
    detokenize: bool = True


@dataclass
class Weights:
    """`load_weights` as models of vLLM have it: names of Hugging Face; returns those it took."""

    model: torch.nn.Module
    calls: list[str] = field(default_factory=list)
    stale: bool = False  # keys of old weights may be in the prefix cache

    @torch.no_grad()
    def load_weights(self, weights):
        own, taken, self.stale = self.model.state_dict(), set(), True
        for name, weight in weights:
            self.calls.append(name)
            if name in own:
                own[name].copy_(weight)
                taken.add(name)
        return taken


class LLM:
    def __init__(
        self,
        model: str,
        *,
        dtype: str = "auto",
        gpu_memory_utilization: float = 0.92,
        return_sampling_mask: bool = False,
        logprobs_mode: str = "raw_logprobs",
        enable_sleep_mode: bool = False,
        max_model_len: int | None = None,
    ):
        if gpu_memory_utilization > 1:
            raise ValueError("gpu_memory_utilization must be at most 1\nand more")
        assert logprobs_mode == "processed_logprobs" and dtype in ("float32", "bfloat16")
        self.masks, self.awake = return_sampling_mask, True
        inner = transformers.AutoModelForCausalLM.from_pretrained(model)
        for parameter in inner.parameters():
            parameter.data.fill_(torch.nan)  # nothing works before weights were handed over
        self.weights = Weights(inner)

    def apply_model(self, func):
        assert self.awake
        return [func(self.weights)]

    def reset_prefix_cache(self, reset_running_requests: bool = False) -> bool:
        self.weights.stale = False
        return True

    def sleep(self, level: int = 1, mode: str = "abort"):
        self.awake = False

    def wake_up(self, tags: list[str] | None = None) -> bool:
        self.awake = True
        return True

    @torch.no_grad()
    def generate(self, prompts, sampling_params=None, *, use_tqdm=True, lora_request=None):
        assert self.awake and not self.weights.stale and len(prompts) == len(sampling_params)
        return [
            SimpleNamespace(outputs=[self._one(p["prompt_token_ids"], s, i) for i in range(s.n)])
            for p, s in zip(prompts, sampling_params, strict=True)
        ]

    def _one(self, prompt, asked, index):
        random = torch.Generator().manual_seed(asked.seed + index)
        tokens, logprobs, kept, reason = [], [], [], "length"
        while len(tokens) < asked.max_tokens:
            ids = torch.tensor([[*prompt, *tokens]])
            logits = self.weights.model(ids).logits[0, -1].float() / (asked.temperature or 1.0)
            if asked.top_k:
                logits[logits < logits.topk(asked.top_k).values[-1]] = -torch.inf
            scores = logits.log_softmax(-1)
            drawn = torch.multinomial(scores.exp(), 1, generator=random).item()
            token = drawn if asked.temperature else scores.argmax().item()
            tokens.append(token)
            logprobs.append({token: SimpleNamespace(logprob=scores[token].item())})
            kept.append(scores.isfinite().nonzero().flatten().tolist()[::-1])
            if token in asked.stop_token_ids:
                reason = "stop"
                break
        return SimpleNamespace(
            token_ids=tokens,
            logprobs=logprobs if asked.logprobs == 0 else None,
            finish_reason=reason,
            sampling_mask=SimpleNamespace(token_ids=kept) if self.masks else None,
        )


@pytest.fixture(autouse=True)
def vllm(monkeypatch):
    module = ModuleType("vllm")
    module.LLM, module.SamplingParams = LLM, SamplingParams
    monkeypatch.setitem(sys.modules, "vllm", module)
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")


@pytest.fixture
def config(tmp_path):
    """A recipe that samples from the three likeliest tokens of a small model."""
    torch.manual_seed(0)
    sizes = ModelConfig(hidden_size=32, layers=1, heads=2)
    make_policy(sizes, CPU, alphabet=ALPHABET, stop=None).save(tmp_path / "model")
    return recipe.load(
        None,
        [
            *("rollout.engine=vllm", "rollout.top_k=3", f"model.path={tmp_path / 'model'}"),
            *("rollout.group_size=2", "rollout.max_new_tokens=6", "rollout.temperature=0.7"),
        ],
    )


def engaged(config):
    policy = load_policy(config.model.path, config.model, CPU, stop=None)
    policy.engine = VllmRollout(policy, config.rollout)
    return policy


def draw(policy, config, share=slice(None), **changes):
    sampling = Sampling.of(config.rollout, **changes)
    return sample(policy, PROMPTS, sampling, torch.Generator().manual_seed(0), share)


def as_samples(completions, prompts, **values):
    made = {"text": "", "score": 0.0, "reward": 0.0, **values}
    return [
        Sample(problem=Problem(""), prompt=prompt, completion=completion, **made)
        for completion, prompt in zip(completions, [p for p in prompts for _ in "12"], strict=True)
    ]


def assert_sampled_by(policy, completions):
    """The log-probs are the policy's, over the kept sets, which hold three tokens each."""
    learner = Learner(policy, OptimConfig(), fastpo.dapo(), 0.7)
    scored = learner._score(policy, MicroBatch.of(as_samples(completions, PROMPTS), CPU))
    found = torch.tensor([p for c in completions for p in c.logprobs])
    torch.testing.assert_close(found, scored, atol=1e-5, rtol=0)
    for c in completions:
        assert c.kept_offsets == [3 * n for n in range(len(c.tokens) + 1)]
        assert all(t in c.kept_tokens[3 * n : 3 * n + 3] for n, t in enumerate(c.tokens))


def test_completions_are_those_of_the_weights_as_they_are_now(config):
    policy = engaged(config)
    calls = policy.engine.llm.weights.calls
    first = draw(policy, config)
    assert_sampled_by(policy, first)
    assert calls == [name for name, _ in policy.model.named_parameters()]
    assert draw(policy, config) == first and len(calls) == len(set(calls))  # pushed once
    shares = [draw(policy, config, slice(rank, None, 2)) for rank in (0, 1)]
    assert shares[0][:2] + shares[1] + shares[0][2:] == first
    learner = Learner(policy, OptimConfig(learning_rate=0.1), fastpo.dapo(), 0.7)
    learner.update(as_samples(first, PROMPTS, advantage=1.0), Sums(), on_policy=True)
    second = draw(policy, config)
    assert_sampled_by(policy, second)
    assert second != first and len(calls) == 2 * len(set(calls))
    assert not policy.engine.llm.awake


def test_a_copy_that_draws_ahead_takes_turns_with_the_policy(config):
    """REGRESSIONS 71: two models whose weights were changed equally often are not the same."""
    policy = engaged(config)
    sampler = copy_of(policy)
    with torch.no_grad():
        for model, scale in ((policy.model, 1.5), (sampler.model, 0.5)):
            for parameter in model.parameters():
                parameter.mul_(scale)
    for one in (policy, sampler, policy):
        assert_sampled_by(one, draw(one, config))


def test_ends_and_greedy_decoding(config):
    policy = engaged(config)
    policy.stop_ids = torch.tensor([draw(policy, config)[0].tokens[1]])
    ended = draw(policy, config)[0]
    assert ended.finished and ended.tokens[-1] == policy.stop_ids
    policy.stop_ids = policy.stop_ids[:0]
    assert not any(c.finished for c in draw(policy, config))
    greedy = draw(policy, config, temperature=0.0)
    own = draw(replace(policy, engine=None), config, temperature=0.0)
    assert [c.tokens for c in greedy] == [c.tokens for c in own]


def test_what_cannot_be_is_one_line(config, monkeypatch):
    for overrides, line in (
        (["model.path=none"], "set model.path"),
        (["model.lora.rank=2"], "model.lora.rank=0"),
        (["warmup.max_steps=2"], "warmup.max_steps=0"),
        (["rollout.kept_sets=false"], "set kept_sets=true"),
    ):
        base = ["rollout.engine=vllm", "rollout.top_p=0.9", "model.path=x"]
        with pytest.raises(RecipeError, match=line):
            recipe.load(None, [*base, *overrides])
    config.rollout.engine_args = {"gpu_memory_utilization": 3}
    with pytest.raises(RecipeError, match="vLLM cannot start: gpu_memory_utilization") as caught:
        engaged(config)
    assert "\n" not in str(caught.value)
    config.rollout.engine_args = {}
    policy = engaged(config)
    monkeypatch.setattr(Weights, "load_weights", lambda self, weights: set())
    with pytest.raises(TrainerError, match="no weight model"):
        draw(policy, config)
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(RecipeError, match="pip install vllm"):
        engaged(config)


def test_a_run_corrects_for_the_engine(config, tmp_path):
    config = recipe.load(
        None,
        [
            *(
                "task=sort",
                "task_args.digits=2",
                "steps=1",
                "verifier.workers=1",
                "eval.problems=4",
            ),
            *("rollout.engine=vllm", f"model.path={config.model.path}", f"run_dir={tmp_path}/run"),
            *("rollout.prompts=4", "rollout.group_size=2", "rollout.max_new_tokens=3"),
            *("algorithm.dynamic_sampling=false", "log.tensorboard=false"),
        ],
    )
    assert config.algorithm.correction == {"mode": "truncate"}
    train(config)
    assert 'engine = "vllm"' in (tmp_path / "run/config.toml").read_text()
    assert '"sampling/' in (tmp_path / "run/metrics.jsonl").read_text()
