"""fastpo in ms-swift's GRPO trainer: its own loss, from its wheel, on log-probs of either."""

from __future__ import annotations

import importlib
from types import SimpleNamespace

import parity_notes
import peer_wheels
import pytest
import torch
import trl_runs

from fastpo.integrations import ms_swift

pytestmark = [
    pytest.mark.peer,
    pytest.mark.skipif(not peer_wheels.PEERS.is_dir(), reason="needs the wheels of test-all"),
]

B, T, C = 4, 11, 6
STUBS = (
    *("trl", "wandb", "swanlab", "swift.dataset", "swift.rewards", "swift.rl_core"),
    *("swift.sequence_parallel", "swift.template", "swift.trainers", "swift.utils"),
    *(
        f"swift.rlhf_trainers.{name}"
        for name in ("arguments", "gkd_helpers", "rollout_mixin", "utils")
    ),
)


@pytest.fixture(scope="module")
def grpo():
    """ms-swift's GRPOTrainer without what it inherits; TRL's own log-softmax and entropy."""
    utils = pytest.importorskip("trl.trainer.utils")
    with peer_wheels.wheel("swift", *STUBS):
        names = ("trl", "trl.trainer.utils", "swift.trainers")
        stock, functions, mixins = map(importlib.import_module, names)
        rollout, helpers = (
            importlib.import_module(f"swift.rlhf_trainers.{name}")
            for name in ("rollout_mixin", "utils")
        )
        stock.GRPOTrainer = type("Stock", (), {"__init__": None, "log": None})
        rollout.RolloutTrainerMixin, mixins.SwiftMixin = (type(x, (), {}) for x in "RM")
        helpers.profiling_decorator = lambda function: function
        functions.selective_log_softmax = utils.selective_log_softmax
        functions.entropy_from_logits = utils.entropy_from_logits
        from swift.rlhf_trainers import grpo_trainer

        grpo_trainer.nanmin, grpo_trainer.nanmax = utils.nanmin, utils.nanmax
        grpo_trainer.WINDOW_NORMALIZED_LOSS_TYPES = ("cispo", "dapo", "fipo")
        yield grpo_trainer


SETTINGS = {
    "loss_type": "grpo",
    "importance_sampling_level": "token",
    "beta": 0.0,
    "epsilon_low": 0.1,
    "epsilon_high": 0.2,
    "tau_pos": 1.0,
    "tau_neg": 1.05,
    "top_entropy_quantile": 1.0,
    "compute_entropy": False,
    "max_completion_length": C,
    "num_generations": 2,
    "real_tau": 0.5,
    "temperature": 0.8,
    "fipo_gamma": 0.9,
    "fipo_clip_range": 0.2,
    "fipo_clip_high_only": True,
    "fipo_safety_threshold": 3.0,
    "off_policy_sequence_mask_delta": None,
    "overlong_filter": False,
}
OFF = {
    **dict.fromkeys(("kl_in_reward", "dynamic_num_samples", "_has_teacher"), False),
    **dict.fromkeys(("log_rollout_offpolicy_metrics", "model_accepts_loss_kwargs"), False),
    **dict.fromkeys(("rollout_importance_sampling_mode", "chord_sft_iterator"), None),
    **{"disable_rollout_importance_sampling": True, "sdar_loss_coef": 0.0},
    **{"compute_loss_func": None, "current_gradient_accumulation_steps": 1},
}
CASES = {
    **{name: {"loss_type": name} for name in ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo")},
    "fipo": {"loss_type": "fipo"},
    "real": {"loss_type": "real"},
    "gspo": {"importance_sampling_level": "sequence"},
    "gspo-token": {"importance_sampling_level": "sequence_token"},
    "beta": {"beta": 0.2},
    "top entropy": {"top_entropy_quantile": 0.4, "compute_entropy": True},
    "off-policy mask": {"off_policy_sequence_mask_delta": 0.1},
    "overlong": {"overlong_filter": True},
}


def trainer_of(grpo, model, settings, *, padding_free=False):
    trainer = object.__new__(grpo.GRPOTrainer)
    settings = SETTINGS | settings
    vars(trainer).update(OFF | settings)
    trainer.model = model.train()
    trainer.args = SimpleNamespace(
        delta=None,
        log_entropy=False,
        top_entropy_quantile=settings["top_entropy_quantile"],
        per_device_train_batch_size=B,
        gradient_accumulation_steps=1,
    )
    trainer.template = SimpleNamespace(padding_free=padding_free, sequence_parallel_size=1)
    trainer.accelerator = SimpleNamespace(num_processes=1, gather_for_metrics=lambda x: x)
    trainer.model_kwarg_keys = ("input_ids", "position_ids", "logits_to_keep", "use_cache")
    return trainer


def batch():
    gen = torch.Generator().manual_seed(5)
    ids = torch.randint(3, 23, (B, T), generator=gen)
    attention = torch.ones(B, T, dtype=torch.long)
    attention[0, :3] = attention[1, -2:] = 0
    advantages = torch.randn(B, 1, generator=gen).expand(B, C)
    noise = -3 + torch.randn(2, B, C, generator=gen)
    return {"input_ids": ids, "attention_mask": attention}, SimpleNamespace(
        completion_mask=attention[:, -C:].bool(),
        truncated_mask=torch.tensor([False, True, False, False]),
        advantages=advantages,
        old_per_token_logps=noise[0],
        ref_per_token_logps=noise[1],
        rollout_per_token_logps=None,
        teacher_per_token_logps=None,
        seq_lengths=torch.full((B,), T),
        num_items_in_batch=torch.tensor(30.0),
        logits_to_keep=C,
    )


def run(grpo, settings):
    """Loss, gradients and metrics of ms-swift's loss on a batch."""
    trainer = trainer_of(grpo, trl_runs.tiny(), settings)
    inputs, data = batch()
    loss, metrics = trainer._compute_loss_and_metrics(trainer.model, inputs, data)
    return (loss, *torch.autograd.grad(loss, list(trainer.model.parameters()))), metrics


def flat(metrics):
    """The floats of nested metrics, by path."""
    return {
        f"{outer}/{inner}": value
        for outer, values in {**metrics, "": metrics}.items()
        if isinstance(values, dict)
        for inner, value in values.items()
        if isinstance(value, float)
    }


@pytest.mark.parametrize("case", CASES)
def test_its_losses_on_log_probs_of_the_fused_head(case, grpo, monkeypatch, record_property):
    """REGRESSIONS 38: each loss, level, mask and quantile, left padding and right."""
    theirs, expected = run(grpo, CASES[case])
    original = grpo.GRPOTrainer._get_logps_via_local_forward
    monkeypatch.setattr(grpo.GRPOTrainer, "_get_logps_via_local_forward", original)
    ms_swift.install()
    ms_swift.install()
    ours, metrics = run(grpo, CASES[case])
    parity_notes.note(record_property, "ms-swift GRPO", case, ours, theirs)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
    assert theirs[1].abs().sum() > 0
    assert metrics.keys() == expected.keys()
    for name, value in flat(expected).items():
        assert flat(metrics)[name] == pytest.approx(value, rel=1e-4, abs=1e-6), name


def test_a_padding_free_row_and_its_entropies(grpo):
    ids = torch.randint(3, 23, (1, T), generator=torch.Generator().manual_seed(6))
    positions = torch.cat([torch.arange(5), torch.arange(T - 5)])[None]
    for name in ("logps", "entropies"):
        results = []
        for score in (
            ms_swift.logps_via_local_forward,
            grpo.GRPOTrainer._get_logps_via_local_forward,
        ):
            trainer = trainer_of(grpo, trl_runs.tiny(), {}, padding_free=True)
            inputs = {"input_ids": ids, "position_ids": positions}
            scored = score(trainer, trainer.model, inputs, T - 1, ids, compute_entropy=True)
            value = scored[name == "entropies"]
            results.append((value, *torch.autograd.grad(value.sum(), trainer.model.lm_head.weight)))
        torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)
    assert ms_swift.logps_via_local_forward(trainer, trainer.model, inputs, 3, ids)[1] is None
