"""The specification against the losses of TRL 1.16; differences by design are asserted."""

import types
from collections import defaultdict

import pytest
import torch
from peer_batch import CLOSE, B, T, batch, float64_by_default, ours, results  # noqa: F401

from fastpo import presets
from fastpo.objective import (
    CLIPPED_MAX,
    Objective,
    token_loss,
)

pytestmark = pytest.mark.peer


def assert_same(got, expected) -> None:
    assert expected[1].abs().max() > 1e-4  # a test of zeros proves nothing
    for x, y in zip(got, expected, strict=True):
        torch.testing.assert_close(x, y, **CLOSE)


@pytest.fixture(scope="module")
def trainer_class():
    return pytest.importorskip("trl.trainer.grpo_trainer", reason="needs trl").GRPOTrainer


def trl(trainer_class, loss_type, t, advantages, items=23.0, ratio=None, metrics=None, **options):
    """GRPOTrainer._compute_loss itself, on an object with the attributes that it reads.

    What it logs goes to `metrics` {"train": {name: [values]}}.
    """
    logp, entropy = (t[key].clone().requires_grad_() for key in ("logp", "entropy"))
    fields = {
        "loss_type": loss_type,
        "importance_sampling_level": "token",
        "beta": 0.0,
        "epsilon_low": 0.2,
        "epsilon_high": 0.28,
        "entropy_coef": 0.0,
        "max_completion_length": 19,
        "top_entropy_quantile": 1.0,
        "off_policy_mask_threshold": None,
        "use_vllm": ratio is not None,
        "vllm_importance_sampling_correction": ratio is not None,
        "aux_loss_enabled": False,
        "use_adaptive_entropy": False,
        "current_gradient_accumulation_steps": 1,
        "model": types.SimpleNamespace(training=True),
        "_metrics": defaultdict(lambda: defaultdict(list)) if metrics is None else metrics,
    }
    arguments = {
        "delta": None,
        "use_bias_correction_kl": False,
        "sapo_temperature_pos": 1.0,
        "sapo_temperature_neg": 1.05,
        "vespo_k_pos": 2.0,
        "vespo_lambda_pos": 3.0,
        "vespo_k_neg": 3.0,
        "vespo_lambda_neg": 2.0,
        "steps_per_generation": 1,
    }
    unknown = options.keys() - fields.keys() - arguments.keys()
    assert not unknown, unknown
    fake = types.SimpleNamespace(**{**fields, **{k: options[k] for k in options if k in fields}})
    fake.args = types.SimpleNamespace(
        **{**arguments, **{k: options[k] for k in options if k in arguments}}
    )
    fake.accelerator = types.SimpleNamespace(
        num_processes=1,
        sync_gradients=True,
        device="cpu",
        gather=lambda x: x,
        reduce=lambda x, reduction: x,
        pad_across_processes=lambda x, **kwargs: x,
    )
    fake._entropy_bonus_enabled = fake.entropy_coef != 0
    fake._get_per_token_logps_and_entropies = lambda *args, **kwargs: (logp, entropy, None)
    fake.get_gamma_weights = trainer_class.get_gamma_weights
    fake.get_off_policy_mask = trainer_class.get_off_policy_mask
    fake.get_high_entropy_mask = types.MethodType(trainer_class.get_high_entropy_mask, fake)
    inputs = {
        "prompt_ids": torch.zeros(B, 2, dtype=torch.long),
        "prompt_mask": torch.ones(B, 2, dtype=torch.long),
        "completion_ids": torch.zeros(B, T, dtype=torch.long),
        "completion_mask": t["mask"].long(),
        "advantages": advantages,
        "ref_per_token_logps": t["ref"],
        "num_items_in_batch": torch.tensor(items),
    }
    if t["old"] is not None:
        inputs["old_per_token_logps"] = t["old"]
    if ratio is not None:
        inputs["importance_sampling_ratio"] = ratio
    return results(trainer_class._compute_loss(fake, fake.model, inputs), logp, entropy)


# TRL's loss type -> our preset, TRL's options, and the normalizer that TRL takes from the batch.
TRL_LOSSES = {
    "grpo": (presets.grpo(clip_high=0.28), {}, None),
    "bnpo": (presets.bnpo(clip_high=0.28), {}, None),
    "dr_grpo": (presets.dr_grpo(clip_high=0.28, max_length=19), {}, None),
    "dapo": (presets.dapo(), {}, 23.0),
    "cispo": (presets.cispo(ratio_max=1.3), {"epsilon_high": 1.3}, 23.0),
    "sapo": (presets.sapo(), {}, None),
    "vespo": (presets.vespo(), {}, 23.0),
    "luspo": (
        presets.luspo(clip_low=0.05, clip_high=0.1),
        {"importance_sampling_level": "sequence", "epsilon_low": 0.05, "epsilon_high": 0.1},
        None,
    ),
    "gspo": (
        presets.gspo(clip_low=0.05, clip_high=0.1),
        {"importance_sampling_level": "sequence", "epsilon_low": 0.05, "epsilon_high": 0.1},
        None,
    ),
}
TRL_NAME = {"gspo": "grpo"}
CLIPPED = [name for name, (objective, *_) in TRL_LOSSES.items() if objective.surrogate == "clip"]


def both(trainer_class, name, t, key="a", changes=None, trl_options=None, **weights):
    """The pair (ours, TRL's) for one loss type, with the same change made to both."""
    objective, options, normalizer = TRL_LOSSES[name]
    objective = Objective(**{**vars(objective), **(changes or {})})
    options = {**options, **(trl_options or {})}
    theirs = trl(trainer_class, TRL_NAME.get(name, name), t, t[key], **options)
    return ours(objective, t, t[key], normalizer, **weights), theirs


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("key", ["a", "token_a"])
@pytest.mark.parametrize("name", TRL_LOSSES)
def test_trl_loss_types(trainer_class, name, key, seed):
    assert_same(*both(trainer_class, name, batch(seed), key))


@pytest.mark.parametrize("name", TRL_LOSSES)
def test_trl_on_policy(trainer_class, name):
    assert_same(*both(trainer_class, name, {**batch(), "old": None}))


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("name", TRL_LOSSES)
def test_trl_kl(trainer_class, name, weighted):
    changes = {"kl_coef": 0.3, "kl_ratio_weighted": weighted}
    options = {"beta": 0.3, "use_bias_correction_kl": weighted}
    if name in ("gspo", "luspo") or not weighted:
        assert_same(*both(trainer_class, name, batch(), "a", changes, options))
    else:
        assert_same(*both(trainer_class, name, batch(), "token_a", changes, options))


@pytest.mark.parametrize("name", CLIPPED)
def test_trl_delta(trainer_class, name):
    t = batch(spread=0.6)
    got = both(trainer_class, name, t, "a", {"ratio_max": 1.3}, {"delta": 1.3})
    assert_same(*got)
    without = both(trainer_class, name, t)
    assert not torch.allclose(got[0][1], without[0][1])


@pytest.mark.parametrize("name", TRL_LOSSES)
def test_trl_importance_weights_per_token(trainer_class, name):
    t = batch()
    t["iw"] = t["iw"].masked_fill(~t["mask"], 1)
    t["iw"][0, 1] = 0  # a token rejected by the mismatch mask
    assert_same(
        *both(
            trainer_class,
            name,
            t,
            "a",
            None,
            {"ratio": t["iw"]},
            importance_weights=t["iw"].view(-1),
        )
    )


@pytest.mark.parametrize("name", TRL_LOSSES)
def test_trl_importance_weights_per_sequence(trainer_class, name):
    t = batch()
    t["sw"][1] = 0
    assert_same(
        *both(
            trainer_class, name, t, "a", None, {"ratio": t["sw"][:, None]}, sequence_weights=t["sw"]
        )
    )


@pytest.mark.parametrize("name", TRL_LOSSES)
def test_trl_entropy_bonus(trainer_class, name):
    got, theirs = both(
        trainer_class, name, batch(), "a", {"entropy_coef": 0.07}, {"entropy_coef": 0.07}
    )
    assert_same(got, theirs)
    assert theirs[2].abs().max() > 1e-4


def test_trl_off_policy_and_entropy_masks_are_importance_weights(trainer_class):
    """What TRL multiplies the token losses by goes into our weights, as it is homogeneous in A."""
    t = batch(spread=1.0, dead_sequence=False)
    keep = trainer_class.get_off_policy_mask(
        t["a"][:, None], t["logp"], t["old"], t["mask"].long(), 0.1
    )
    assert 0 < keep.sum() < B
    options = {"off_policy_mask_threshold": 0.1}
    weights = {"sequence_weights": keep[:, 0].double()}
    assert_same(*both(trainer_class, "dapo", t, "a", None, options, **weights))
    threshold = t["entropy"][t["mask"]].float().quantile(0.5)  # TRL takes it in float32
    weights = {"importance_weights": (t["entropy"] >= threshold).double().view(-1)}
    options = {"top_entropy_quantile": 0.5}
    assert_same(*both(trainer_class, "dapo", t, "token_a", None, options, **weights))


def test_differs_from_trl_nan_for_a_clipped_token_far_off_policy(trainer_class):
    t = batch()
    t["old"][0, 0], t["a"][0] = t["logp"][0, 0] - 1000, 1.0
    got, theirs = both(trainer_class, "dapo", t)
    assert theirs[1][0, 0].isnan()
    assert got[1][0, 0] == 0
    torch.testing.assert_close(got[0], theirs[0], **CLOSE)


def test_differs_from_trl_nan_in_masked_slots(trainer_class):
    t = batch()
    clean = ours(TRL_LOSSES["dapo"][0], t, t["a"], 23.0)
    t["old"] = t["old"].masked_fill(~t["mask"], torch.nan)
    got, theirs = both(trainer_class, "dapo", t)
    assert theirs[0].isnan()
    assert all(map(torch.equal, got, clean))


def test_differs_from_trl_k3_saturates(trainer_class):
    t = batch()
    t["ref"][0, 0] = t["logp"][0, 0] + 800
    got, theirs = both(trainer_class, "grpo", t, "a", {"kl_coef": 0.1}, {"beta": 0.1})
    assert theirs[0].isinf() and not theirs[1].isfinite().all()
    assert got[0].isfinite() and got[1].isfinite().all()


def test_differs_from_trl_vespo_sums_importance_weights_of_masked_tokens(trainer_class):
    t = batch()
    options = {"ratio": t["iw"]}
    got, theirs = both(
        trainer_class, "vespo", t, "a", None, options, importance_weights=t["iw"].view(-1)
    )
    assert not torch.allclose(got[1], theirs[1])
    ones = {"ratio": t["iw"].masked_fill(~t["mask"], 1)}
    _, masked = both(trainer_class, "vespo", t, "a", None, ones)
    assert_same(got, masked)


def test_differs_from_trl_vespo_hides_a_nan(trainer_class):
    t = batch()
    t["old"][1, 0] = torch.nan
    got, theirs = both(trainer_class, "vespo", t)
    assert theirs[0].isfinite() and not theirs[1][1].any()
    assert got[0].isnan()


def test_cispo_counts_as_trl_does(trainer_class):
    """Above the bound and A > 0: a bounded weight with A < 0 is no clip there."""
    t = batch(spread=0.7)
    metrics = defaultdict(lambda: defaultdict(list))
    trl(trainer_class, "cispo", t, t["a"], epsilon_high=1.1, metrics=metrics)
    advantages = t["a"][:, None].expand(B, T)
    terms = token_loss(
        presets.cispo(ratio_max=1.1), t["logp"], advantages, old_logprobs=t["old"], mask=t["mask"]
    )
    got = ((terms.clipped & CLIPPED_MAX) != 0).sum() / t["mask"].sum()
    (theirs,) = metrics["train"]["cispo_clip_ratio"]
    assert got.item() == pytest.approx(theirs) and 0 < theirs < 1
