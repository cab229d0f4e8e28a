"""The names, signatures and import cost that users rely on."""

import inspect
import subprocess
import sys

import pytest

import fastpo
from fastpo import presets

REQUIRED = object()
LOSS_KEYWORDS = {
    "objective": REQUIRED,
    "mask": None,
    "old_logprobs": None,
    "ref_logprobs": None,
    "importance_weights": None,
    "clip_bounds": None,
    "nll_weights": None,
    "cu_seqlens": None,
    "normalizer": None,
    "cp_group": None,
}
LINEAR_KEYWORDS = {
    "bias": None,
    "mask": None,
    "temperature": 1.0,
    "logit_scale": 1.0,
    "softcap": None,
    "logits_dtype": None,
    "chunk_tokens": None,
    "tp_group": None,
    "backend": None,
}
# name -> positional parameters, keyword-only parameters with their defaults
SIGNATURES = {
    "policy_loss": (
        ["logits", "tokens", "advantages"],
        {**LOSS_KEYWORDS, "temperature": 1.0, "inplace": False, "backend": None},
    ),
    "linear_policy_loss": (
        ["hidden", "weight", "tokens", "advantages"],
        {**LOSS_KEYWORDS, **LINEAR_KEYWORDS},
    ),
    "token_logprobs": (
        ["logits", "tokens"],
        {"mask": None, "temperature": 1.0, "inplace_backward": False, "backend": None},
    ),
    "linear_token_logprobs": (["hidden", "weight", "tokens"], LINEAR_KEYWORDS),
    "policy_loss_from_logprobs": (
        ["logprobs", "advantages"],
        {**LOSS_KEYWORDS, "entropy": None},
    ),
    "group_advantages": (
        ["rewards"],
        {
            "group_size": None,
            "group_ids": None,
            "estimator": "grpo",
            "eps": 1e-6,
            "lengths": None,
            "weights": None,
        },
    ),
    "rollout_correction": (
        ["old_logprobs", "rollout_logprobs"],
        {
            "mode": "truncate",
            "level": "token",
            "mask": None,
            "cu_seqlens": None,
            "cp_group": None,
        },
    ),
    "gae": (
        ["rewards", "values"],
        {"gamma": REQUIRED, "lam": REQUIRED, "mask": None, "cu_seqlens": None},
    ),
    "value_loss": (
        ["values", "returns"],
        {"old_values": None, "clip": None, "mask": None, "normalizer": None},
    ),
    "overlong_penalty": (["lengths"], {"max_length": REQUIRED, "cache_length": REQUIRED}),
}
RESULTS = {
    "PolicyLoss": ["loss", "logprobs", "entropy", "metrics"],
    "TokenLogprobs": ["logprobs", "entropy"],
    "GroupAdvantages": ["advantages", "informative", "num_informative"],
    "RolloutCorrection": ["weights", "mask", "metrics"],
    "Gae": ["advantages", "returns"],
    "ValueLoss": ["loss", "metrics"],
}


def test_exports():
    expected = {*SIGNATURES, *RESULTS, *presets.__all__, "Objective", "set_debug"}
    assert expected <= set(fastpo.__all__)
    assert all(hasattr(fastpo, name) for name in fastpo.__all__)


@pytest.mark.parametrize("name", SIGNATURES)
def test_signature(name):
    positional, keywords = SIGNATURES[name]
    parameters = inspect.signature(getattr(fastpo, name)).parameters
    required = [p for p in parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert [p.name for p in required] == positional
    assert all(p.default is p.empty for p in required)
    named = {p.name: p.default for p in parameters.values() if p.kind is p.KEYWORD_ONLY}
    empty = inspect.Parameter.empty
    got = {key: REQUIRED if value is empty else value for key, value in named.items()}
    assert {key: got.get(key, "missing") for key in keywords} == keywords


@pytest.mark.parametrize("name", RESULTS)
def test_result_fields(name):
    assert list(getattr(fastpo, name)._fields)[: len(RESULTS[name])] == RESULTS[name]


@pytest.mark.parametrize("name", fastpo.__all__)
def test_every_public_name_is_documented(name):
    value = getattr(fastpo, name)
    assert isinstance(value, str) or len(inspect.getdoc(value) or "") > 40


def test_importing_fastpo_imports_no_optional_library():
    optional = ["transformers", "trl", "verl", "liger_kernel", "matplotlib", "rich", "pydantic"]
    code = f"import sys, fastpo; print([m for m in {optional} if m in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert run.stdout.strip() == "[]", run.stdout + run.stderr


def test_an_adapter_is_there_after_import_fastpo_alone(monkeypatch):
    integrations = fastpo.integrations
    for name in ("trl", "transformers", "nemo_rl"):
        monkeypatch.delattr(integrations, name, raising=False)  # as if nothing had imported it
        assert getattr(integrations, name).__name__ == f"fastpo.integrations.{name}"
    with pytest.raises(AttributeError, match="has no attribute 'nowhere'"):
        _ = integrations.nowhere
