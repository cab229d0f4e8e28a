"""TRL's RLOO and GMPO trainers with fastpo's loss against themselves: five steps, all they log."""

from __future__ import annotations

import functools

import parity_notes
import pytest
import torch
import trl_runs

pytestmark = pytest.mark.peer

OFF_POLICY = {"num_iterations": 2, "gradient_accumulation_steps": 2}
RLOO = {
    "clipped": {"epsilon": 0.05, "epsilon_high": 0.1, **OFF_POLICY},
    "beta": {"beta": 0.2, **OFF_POLICY},
    "normalized, rewards clipped": {"normalize_advantages": True, "reward_clip_range": (0.2, 0.9)},
    "truncated": {"mask_truncated_completions": True, **OFF_POLICY},
    "temperature": {"temperature": 0.7, **OFF_POLICY},
}
GMPO = {
    "clipped": {"epsilon": 0.02, "epsilon_high": 0.05, **OFF_POLICY},
    "beta": {"beta": 0.2, **OFF_POLICY},
    "top entropy": {"top_entropy_quantile": 0.4, **OFF_POLICY},
    "truncated": {"mask_truncated_completions": True, **OFF_POLICY},
    "fp32 head": {"cast_lm_head_to_fp32": True},
}


@pytest.fixture(scope="module")
def rloo():
    """RLOO: stock, fastpo's, and the config."""
    trl = pytest.importorskip("trl")
    pytest.importorskip("datasets")
    from fastpo.integrations.trl import RLOOTrainer

    return (trl.RLOOTrainer, RLOOTrainer), trl.RLOOConfig


@pytest.fixture(scope="module")
def gmpo():
    """GMPO, likewise."""
    stock = pytest.importorskip("trl.experimental.gmpo")
    pytest.importorskip("datasets")
    from fastpo.integrations.trl import GMPOTrainer

    return (stock.GMPOTrainer, GMPOTrainer), stock.GMPOConfig


def assert_the_same(family, folder, mixin=None, model=lambda: None, noted=None, **settings):
    pair, config = family
    if mixin is not None:
        pair = tuple(type("Mixed", (mixin, base), {}) for base in pair)

    def run(trainer_class):
        return trl_runs.trained(trainer_class, config, folder, model=model(), **settings)

    return trl_runs.assert_the_same(run, pair, noted)


def clips(rows):
    return [v for row in rows for k, v in row.items() if k.startswith("clip_ratio/")]


@pytest.mark.slow
@pytest.mark.parametrize("case", RLOO)
def test_rloo_equals_stock(case, rloo, tmp_path, record_property):
    """Loss, gradient norm, metrics and weights: a ratio of sums, clipped; all in the rewards."""
    noted = functools.partial(parity_notes.write, record_property, "TRL RLOO", case)
    rows = assert_the_same(rloo, tmp_path, noted=noted, **RLOO[case])
    assert case != "clipped" or any(clip > 0 for clip in clips(rows))


@pytest.mark.slow
@pytest.mark.parametrize("case", GMPO)
def test_gmpo_equals_stock(case, gmpo, tmp_path, record_property):
    noted = functools.partial(parity_notes.write, record_property, "TRL GMPO", case)
    rows = assert_the_same(gmpo, tmp_path, noted=noted, **GMPO[case])
    assert case != "clipped" or any(clip > 0 for clip in clips(rows))


class Tools:
    """Some of every completion's tokens are a tool's, of one completion all."""

    def _generate_and_score_completions(self, inputs):
        out = super()._generate_and_score_completions(inputs)
        mask = out["completion_mask"]
        gen = torch.Generator().manual_seed(int(mask.sum()))
        out["tool_mask"] = (torch.rand(mask.shape, generator=gen) > 0.3).long()
        out["tool_mask"][0] = 0
        out["tool_mask"][1:, 0] = 1
        return out


@pytest.mark.slow
def test_gmpo_with_a_completion_of_tool_tokens_alone(gmpo, tmp_path):
    """TRL's ratio of no token is 1: its advantage counts in the loss's value, not in the gradient.

    TRL's per-sequence share of clips is 0 / 0 there, which it leaves out.
    """
    assert_the_same(gmpo, tmp_path, Tools, **OFF_POLICY)


@pytest.mark.slow
def test_rloo_with_a_router_loss_and_a_lora(rloo, tmp_path):
    peft = pytest.importorskip("peft")
    mixture = {"num_local_experts": 4, "output_router_logits": True, "router_aux_loss_coef": 0.5}
    assert_the_same(rloo, tmp_path, model=lambda: trl_runs.tiny("Mixtral", **mixture), beta=0.0)
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    assert_the_same(rloo, tmp_path, peft_config=config, beta=0.1, **OFF_POLICY)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"entropy_coef": 0.1}, "entropy_coef given, which GMPO of TRL ignores"),
        ({"delta": 2.0}, "delta given"),
        ({"importance_sampling_level": "sequence"}, "importance_sampling_level given"),
        ({"off_policy_mask_threshold": 0.1}, "off_policy_mask_threshold given"),
        ({"beta": 0.1, "top_entropy_quantile": 0.5}, "top_entropy_quantile < 1 with beta"),
    ],
)
def test_gmpo_refuses_what_it_would_ignore(settings, message, gmpo, tmp_path):
    (_, ours), config = gmpo
    with pytest.raises(ValueError, match=message):
        trl_runs.trained(ours, config, tmp_path, **settings)


def test_another_loss_of_a_later_trl_stops_training(rloo, tmp_path):
    (_, ours), config = rloo

    class Later(ours.__mro__[2]):
        def _compute_loss(self, model, inputs):
            return 2 * super()._compute_loss(model, inputs) + 1

    later = type("Later", (ours.__mro__[1], Later), dict(vars(ours)))
    with pytest.raises(RuntimeError, match=r"fastpo's loss is .* this configuration"):
        trl_runs.trained(later, config, tmp_path)
