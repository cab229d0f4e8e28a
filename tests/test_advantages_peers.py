"""Group advantages against the estimators of verl and TRL."""

from __future__ import annotations

import ast
import inspect
import math
import textwrap
from types import SimpleNamespace

import pytest
import torch

import fastpo

pytestmark = pytest.mark.usefixtures("implementation")

VERL = {
    "grpo": ("compute_grpo_outcome_advantage", {"norm_adv_by_std_in_grpo": True}),
    "dr_grpo": ("compute_grpo_outcome_advantage", {"norm_adv_by_std_in_grpo": False}),
    "rloo": ("compute_rloo_outcome_advantage", {}),
    "opo": ("compute_opo_outcome_advantage", {}),
    "passk": ("compute_grpo_passk_outcome_advantage", {"config": {}}),
    "reinforce_pp": ("compute_reinforce_plus_plus_baseline_outcome_advantage", {}),
}


@pytest.mark.peer
@pytest.mark.parametrize("estimator", VERL)
def test_verl(estimator, verl):
    """verl 0.9 on groups of several completions; only opo sees lengths other than 1."""
    name, options = VERL[estimator]
    generator = torch.Generator().manual_seed(0)
    rewards, ids = torch.rand(24, generator=generator), torch.arange(24) % 5
    lengths = torch.randint(1, 9, (24,), generator=generator) if estimator == "opo" else None
    mask = torch.ones(24, 1) if lengths is None else (torch.arange(9) < lengths[:, None]).float()
    token_rewards = torch.zeros_like(mask)
    token_rewards[:, 0] = rewards
    theirs, _ = getattr(verl[0], name)(token_rewards, mask, ids.numpy(), **options)
    ours = fastpo.group_advantages(rewards, group_ids=ids, estimator=estimator, lengths=lengths)
    torch.testing.assert_close(ours.advantages, theirs[:, 0], rtol=1e-4, atol=1e-6)


@pytest.mark.peer
def test_reinforce_pp_over_tokens_as_verl(verl):
    generator = torch.Generator().manual_seed(0)
    rewards, ids = torch.rand(24, generator=generator), torch.arange(24) % 5
    lengths = torch.randint(1, 9, (24,), generator=generator)
    mask = (torch.arange(9) < lengths[:, None]).float()
    token_rewards = torch.zeros_like(mask)
    token_rewards[:, 0] = rewards
    theirs, _ = verl[0].compute_reinforce_plus_plus_baseline_outcome_advantage(
        token_rewards, mask, ids.numpy()
    )
    ours = fastpo.group_advantages(
        rewards, group_ids=ids, estimator="reinforce_pp", lengths=lengths
    )
    torch.testing.assert_close(ours.advantages, theirs[:, 0], rtol=1e-4, atol=1e-6)


@pytest.mark.peer
def test_gdpo_as_verl(verl):
    """One token each, so that verl's mean over tokens is one over completions."""
    generator = torch.Generator().manual_seed(0)
    rewards, ids = torch.rand(20, 2, generator=generator), torch.arange(20) % 4
    weights = torch.tensor([1.0, 0.3])
    mask = torch.ones(20, 1)
    batch = {"prompts": torch.zeros(20, 1), "attention_mask": torch.ones(20, 2).long()}
    config = {"gdpo_reward_keys": ["a", "b"], "gdpo_reward_weights": weights.tolist()}
    columns = {"a": rewards[:, 0].numpy(), "b": rewards[:, 1].numpy()}
    theirs, _ = verl[0].compute_gdpo_outcome_advantage(
        rewards[:, :1], mask, ids.numpy(), config=config, non_tensor_batch=columns, batch=batch
    )
    ours = fastpo.group_advantages(rewards, group_ids=ids, weights=weights, whiten=True)
    torch.testing.assert_close(ours.advantages, theirs[:, 0], rtol=1e-4, atol=1e-6)


@pytest.mark.peer
def test_gdpo_as_trl():
    """TRL 1.16 has no function of its own for it: the lines of its trainer run here, NaN rewards
    (no score of that kind) and a completion without any score included."""
    trl = pytest.importorskip("trl.trainer.grpo_trainer")
    source = textwrap.dedent(inspect.getsource(trl.GRPOTrainer._generate_and_score_completions))
    (branch,) = (
        node.body
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.If) and "'normalize_then_sum'" in ast.unparse(node.test)
    )
    generator = torch.Generator().manual_seed(0)
    rewards = torch.rand(24, 3, generator=generator)
    rewards[4:8, 1] = 0.5  # equal in its group
    rewards[0, 2] = rewards[9, 0] = math.nan
    rewards[13] = math.nan
    weights = torch.tensor([1.0, 0.3, 2.0])
    names = {
        "self": SimpleNamespace(reward_funcs=[None] * 3, reward_weights=weights),
        "rewards_per_func": rewards,
        "num_generations": 4,
        "unscorable_mask": rewards.isnan().all(1),
        "device": "cpu",
    }
    exec(ast.unparse(branch), {**vars(trl), **names}, scope := {})
    theirs = scope["advantages"].nan_to_num(0.0)
    ours = fastpo.group_advantages(rewards, group_size=4, weights=weights, whiten=True, eps=1e-4)
    assert theirs.count_nonzero() == 23
    torch.testing.assert_close(ours.advantages, theirs, rtol=1e-5, atol=1e-6)
