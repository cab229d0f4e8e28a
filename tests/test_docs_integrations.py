"""docs/integrations.md: its examples run, and it speaks of every adapter."""

from __future__ import annotations

import functools
import math
import re
import sys
from importlib import metadata
from pathlib import Path

import peer_wheels
import pytest

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "integrations.md").read_text()
BLOCKS = re.findall(r"<!-- run(?:: (\w+))? -->\n```python\n(.*?)```", PAGE, flags=re.DOTALL)
WHEELS = {  # of tools/peer_wheels.txt: the wheel, what is mocked; the places that change hands
    "skyrl": (
        ("skyrl", "ray", "jaxtyping", "loguru", "skyrl.train", "megatron"),
        [
            "skyrl.backends.skyrl_train.distributed.megatron.model_utils._fused_lm_head_logprob_apply"
        ],
    ),
    "openrlhf": (
        ("openrlhf", "deepspeed", "openrlhf.trainer"),
        ["openrlhf.models.loss.PolicyLoss", "openrlhf.trainer.ray.ppo_actor.PolicyLoss"],
    ),
    "areal": (("areal", "areal.trainer"), ["areal.trainer.ppo.actor.ppo_actor_loss_fn"]),
    "ms_swift": (
        ("swift", "swift.rlhf_trainers.grpo_trainer"),
        ["swift.rlhf_trainers.grpo_trainer.GRPOTrainer._get_logps_via_local_forward"],
    ),
}
VERSIONS = {  # rows of the table: the package
    **{"transformers": "transformers", "TRL GRPO": "trl", "TRL AsyncGRPO": "trl", "TRL DPO": "trl"},
    **{"verl": "verl", "SkyRL": "skyrl", "OpenRLHF": "openrlhf", "AReaL": "areal"},
    "ms-swift": "ms_swift",
}
EXAMPLES = {
    kind: [text for k, text in BLOCKS if k == kind] for kind in ("", "trl", "verl", *WHEELS)
}


def run(example):
    names: dict[str, object] = {}
    exec(compile(example, "docs/integrations.md", "exec"), names)
    return names


@pytest.mark.parametrize("example", EXAMPLES[""], ids=lambda text: text.splitlines()[2][:40])
def test_an_example_runs(example):
    gradients = [x.grad for x in run(example)["model"].parameters() if x.grad is not None]
    assert gradients and all(x.isfinite().all() for x in gradients)


@pytest.mark.slow
@pytest.mark.peer
@pytest.mark.parametrize("example", EXAMPLES["trl"], ids=lambda text: text.splitlines()[1][:60])
def test_an_example_of_trl_trains(example, tmp_path, monkeypatch):
    """As it stands on the page: offline, with a tokenizer and a model of four words."""
    pytest.importorskip("trl")
    pytest.importorskip("datasets")
    from fastpo.integrations import trl as integration

    monkeypatch.chdir(tmp_path)
    try:
        trainer = run(example)["trainer"]
    finally:
        integration.uninstall()
    norms = [row["grad_norm"] for row in trainer.state.log_history if "grad_norm" in row]
    assert len(norms) == trainer.state.global_step == 2
    assert all(map(math.isfinite, norms)) and any(norms)


@pytest.mark.peer
@pytest.mark.parametrize("example", EXAMPLES["verl"])
def test_an_example_of_verl_runs(example, verl):
    """After what verl's entry point does in every process."""
    from fastpo.integrations import verl as integration

    integration.install()
    names = run(example)
    gradient = names["log_prob"].grad
    assert gradient.isfinite().all() and (gradient != 0).any()
    assert names["metrics"]["actor/ppo_kl"] < 0


@pytest.mark.peer
@pytest.mark.parametrize("package", WHEELS)
def test_an_example_changes_what_the_trainer_calls(package):
    """In a wheel that was unpacked but never installed: what its modules import is mocked."""
    if not peer_wheels.PEERS.is_dir():
        pytest.skip("needs the wheels of test-all")
    names, places = WHEELS[package]
    with peer_wheels.wheel(*names):
        for example in EXAMPLES[package]:
            run(example)
        for place in places:
            root, *path = place.split(".")
            function = functools.reduce(getattr, path, sys.modules[root])
            assert function.__module__ == f"fastpo.integrations.{package}", place


@pytest.mark.peer
@pytest.mark.parametrize("row", VERSIONS)
def test_the_table_has_the_versions_that_run_here(row):
    found = metadata.distributions(name=VERSIONS[row], path=[str(peer_wheels.PEERS), *sys.path])
    installed = next(iter(found), None)
    if installed is None:
        pytest.skip(f"needs {VERSIONS[row]}")
    (line,) = (line for line in PAGE.splitlines() if line.startswith(f"| {row}"))
    said = line.split("|")[2].strip().split(", ")[0]
    assert installed.version.startswith(said), f"the page says {said}, {installed.version} is here"


def test_every_marked_example_is_run():
    assert sum(map(len, EXAMPLES.values())) == len(BLOCKS) == PAGE.count("<!-- run") >= 4


def test_every_adapter_is_on_the_page():
    files = (path.stem for path in (ROOT / "fastpo" / "integrations").glob("[a-z]*.py"))
    named = {"transformers", "trl", "verl", "verl_head", "verl_plugin"}
    for name in files:
        spoken = name in named or f"integrations.{name}" in PAGE or f"import {name} as" in PAGE
        assert spoken, f"docs/integrations.md does not say how to use fastpo.integrations.{name}"
