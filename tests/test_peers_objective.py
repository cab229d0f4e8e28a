"""The specification against the losses of TRL 1.16 and verl 0.9, called in their own packages.

Values, and gradients in the log-probs and the entropy, agree to 1e-10 in float64. Where fastpo
differs by design, the difference itself is asserted.
"""

import types
from collections import defaultdict

import pytest
import torch

from fastpo import presets
from fastpo.objective import (
    CLIPPED_HIGH,
    CLIPPED_LOW,
    CLIPPED_MAX,
    KL_ESTIMATORS,
    Objective,
    entropy_weights,
    token_loss,
    token_weights,
)
from fastpo.segments import Segments

pytestmark = pytest.mark.peer
B, T = 5, 7
CLOSE = {"rtol": 1e-10, "atol": 1e-12}


@pytest.fixture(autouse=True)
def float64_by_default():
    """TRL picks SAPO's temperatures with torch.where on floats, which has the default dtype."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def batch(seed=0, dead_sequence=True, spread=0.25) -> dict[str, torch.Tensor]:
    """A realistic [B, T] batch: ragged right padding, one hole in a sequence, one sequence dead."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    logp = -normal(B, T).exp()
    mask = torch.arange(T) < torch.tensor([7, 3, 1, 5, 6])[:, None]
    mask[0, 2] = False
    if dead_sequence:
        mask[3] = False
    return {
        "logp": logp,
        "old": logp - spread * normal(B, T),
        "ref": logp - 0.5 * normal(B, T),
        "entropy": normal(B, T).abs(),
        "a": normal(B),
        "token_a": normal(B, T),
        "iw": (0.3 * normal(B, T)).exp(),
        "sw": (0.3 * normal(B)).exp(),
        "mask": mask,
    }


def ours(
    objective: Objective, t: dict, advantages: torch.Tensor, normalizer=None, **weights
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Loss and gradients of the specification on the [B, T] batch."""
    segments = Segments.padded(B, T, torch.device("cpu"))
    mask = t["mask"].reshape(-1)
    logp, entropy = (t[key].clone().requires_grad_() for key in ("logp", "entropy"))
    advantages = advantages if advantages.ndim == 2 else advantages[:, None].expand(B, T)
    terms = token_loss(
        objective,
        logp.reshape(-1),
        advantages.reshape(-1),
        old_logprobs=None if t["old"] is None else t["old"].reshape(-1),
        ref_logprobs=t["ref"].reshape(-1) if objective.kl_coef else None,
        mask=mask,
        segments=segments,
        **weights,
    )
    given = {"normalizer": normalizer, "dtype": torch.float64}
    loss = (token_weights(objective, mask, segments, **given) * terms.loss).sum()
    bonus = entropy_weights(objective, mask, segments, dtype=torch.float64)
    if bonus is not None:
        loss = loss - (bonus * entropy.reshape(-1)).sum()
    return results(loss, logp, entropy)


def results(loss, logp, entropy):
    grads = torch.autograd.grad(loss, [logp, entropy], allow_unused=True, materialize_grads=True)
    return loss.detach(), *grads


def assert_same(got, expected) -> None:
    assert expected[1].abs().max() > 1e-4  # a test of zeros proves nothing
    for x, y in zip(got, expected, strict=True):
        torch.testing.assert_close(x, y, **CLOSE)


# TRL


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


# verl


def verl_loss(verl, loss: str, t: dict, advantages, mode="token-mean", weights=None, **config):
    from verl.workers.config.actor import PolicyLossConfig

    core, config_class = verl
    dro_beta = config.pop("dro_beta", None)
    logp = t["logp"].clone().requires_grad_()
    advantages = advantages if advantages.ndim == 2 else advantages[:, None].expand(B, T)
    settings = {"clip_ratio_low": 0.2, "clip_ratio_high": 0.28, **config}
    value, _ = core.get_policy_loss_fn(loss)(
        old_log_prob=t["old"],
        log_prob=logp,
        advantages=advantages,
        response_mask=t["mask"].double(),
        loss_agg_mode=mode,
        config=config_class(
            strategy="fsdp",
            rollout_n=1,
            use_dynamic_bsz=True,
            policy_loss=PolicyLossConfig(loss_mode=loss, dro_beta=dro_beta),
            **settings,
        ),
        rollout_is_weights=weights,
    )
    return results(value, logp, logp.new_zeros(1, requires_grad=True))[:2]


def verl_pair(verl, objective, loss, t, key, mode="token-mean", weights=None, **config):
    given = {} if weights is None else {"importance_weights": weights.reshape(-1)}
    theirs = verl_loss(verl, loss, t, t[key], mode, weights, **config)
    return ours(objective, t, t[key], **given)[:2], theirs


AGGREGATION = {
    "token_mean": "token-mean",
    "sequence_mean": "seq-mean-token-mean",
    "sequence_sum": "seq-mean-token-sum",
    "constant": "seq-mean-token-sum-norm",
}
# verl divides a sequence by len + 1e-8, in geo_mean inside the exponent too.
VERL_CLOSE = {"rtol": 1e-7, "atol": 1e-9}


def assert_close(got, expected, **tolerance):
    assert expected[1].abs().max() > 1e-4
    for x, y in zip(got, expected, strict=True):
        torch.testing.assert_close(x, y, **(tolerance or CLOSE))


VERL_LOSSES = {
    "vanilla": presets.dapo(ratio_max=3.0),
    "gpg": presets.gpg(),
    "cispo": presets.cispo(ratio_min=0.8, ratio_max=1.28),
    "dppo_tv": presets.dppo(clip_low=0.05, clip_high=0.08, ratio_max=3.0),
    "dppo_kl": presets.dppo(gate="kl", clip_low=0.01, clip_high=0.02, ratio_max=3.0),
}
VERL_CONFIG = {
    "dppo_tv": {"clip_ratio_low": 0.05, "clip_ratio_high": 0.08},
    "dppo_kl": {"clip_ratio_low": 0.01, "clip_ratio_high": 0.02},
}


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("aggregation", AGGREGATION)
@pytest.mark.parametrize("name", VERL_LOSSES)
def test_verl_token_losses_and_aggregations(verl, name, aggregation, weighted):
    t = batch(dead_sequence=False, spread=0.7)
    objective = Objective(**{**vars(VERL_LOSSES[name]), "aggregation": aggregation})
    weights = t["iw"] if weighted else None
    config = VERL_CONFIG.get(name, {})
    pair = verl_pair(
        verl, objective, name, t, "token_a", AGGREGATION[aggregation], weights, **config
    )
    assert_close(*pair, **(VERL_CLOSE if aggregation == "sequence_mean" else CLOSE))


def test_verl_vanilla_bounds_large_ratios_of_bad_tokens(verl):
    t = batch(dead_sequence=False, spread=2.0)
    got, theirs = verl_pair(verl, presets.dapo(ratio_max=3.0), "vanilla", t, "token_a")
    assert_close(got, theirs)
    unbounded = ours(presets.dapo(), t, t["token_a"])
    assert not torch.allclose(unbounded[1], theirs[1])


@pytest.mark.parametrize("weighted", [False, True])
def test_verl_sapo(verl, weighted):
    t = batch(dead_sequence=False)
    weights = t["iw"] if weighted else None
    pair = verl_pair(verl, presets.sapo(), "sapo", t, "token_a", weights=weights)
    assert_close(*pair, **VERL_CLOSE)


@pytest.mark.parametrize("key", ["a", "token_a"])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("aggregation", AGGREGATION)
def test_verl_gspo_is_gspo_token(verl, aggregation, weighted, key):
    """REGRESSIONS 39: per-token advantages and weights act on their own token."""
    t = batch(dead_sequence=False)
    objective = presets.gspo_token(clip_low=0.05, clip_high=0.1, aggregation=aggregation)
    clips = {"clip_ratio_low": 0.05, "clip_ratio_high": 0.1}
    weights = t["iw"] if weighted else None
    pair = verl_pair(verl, objective, "gspo", t, key, AGGREGATION[aggregation], weights, **clips)
    assert_close(*pair, **VERL_CLOSE)


@pytest.mark.parametrize("weighted", [False, True])
def test_verl_gspo_where_advantages_are_constant_over_a_sequence(verl, weighted):
    """There `gspo`, the sequence's own objective, has the same gradient; elsewhere it has not."""
    t = batch(dead_sequence=False)
    objective = presets.gspo(clip_low=0.05, clip_high=0.1)
    clips = {"clip_ratio_low": 0.05, "clip_ratio_high": 0.1}
    weights = t["sw"][:, None].expand(B, T) if weighted else None
    mode = "seq-mean-token-mean"
    assert_close(*verl_pair(verl, objective, "gspo", t, "a", mode, weights, **clips), **VERL_CLOSE)
    got, theirs = verl_pair(verl, objective, "gspo", t, "token_a", mode, weights, **clips)
    torch.testing.assert_close(got[0], theirs[0], **VERL_CLOSE)
    assert not torch.allclose(got[1], theirs[1])


def test_verl_dro(verl):
    t = batch(dead_sequence=False)
    objective = presets.dro(old_kl_coef=0.3)
    assert_close(*verl_pair(verl, objective, "dro", t, "token_a", dro_beta=0.3))


def test_differs_from_verl_dro_weighs_the_advantage_alone(verl):
    t = batch(dead_sequence=False)
    pair = verl_pair(
        verl, presets.dro(old_kl_coef=0.3), "dro", t, "token_a", weights=t["iw"], dro_beta=0.3
    )
    assert not torch.allclose(pair[0][1], pair[1][1])


@pytest.mark.parametrize("gate", ["tv", "kl"])
def test_the_gates_of_dppo_fire_as_often_as_verls(verl, gate):
    """pg_clipfrac counts dropped tokens, pg_clipfrac_lower those whose weight is bounded."""
    core, config_class = verl
    t = batch(dead_sequence=False, spread=0.7)
    clips = VERL_CONFIG[f"dppo_{gate}"]
    _, metrics = core.get_policy_loss_fn(f"dppo_{gate}")(
        old_log_prob=t["old"],
        log_prob=t["logp"],
        advantages=t["token_a"],
        response_mask=t["mask"].double(),
        config=config_class(strategy="fsdp", rollout_n=1, use_dynamic_bsz=True, **clips),
    )
    terms = token_loss(
        VERL_LOSSES[f"dppo_{gate}"], t["logp"], t["token_a"], old_logprobs=t["old"], mask=t["mask"]
    )
    tokens = t["mask"].sum()
    dropped = ((terms.clipped & (CLIPPED_LOW | CLIPPED_HIGH)) != 0).sum() / tokens
    assert dropped.item() == pytest.approx(metrics["actor/pg_clipfrac"], rel=1e-6) and dropped > 0
    bounded = ((terms.clipped & CLIPPED_MAX) != 0).sum() / tokens
    assert bounded.item() == pytest.approx(metrics["actor/pg_clipfrac_lower"], rel=1e-6)


@pytest.mark.parametrize("key", ["a", "token_a"])
@pytest.mark.parametrize("weighted", [False, True])
def test_verl_geo_mean(verl, key, weighted):
    t = batch(spread=0.5)
    objective = presets.gmpo(clip_low=0.3, clip_high=0.35)
    clips = {"clip_ratio_low": 0.3, "clip_ratio_high": 0.35}
    weights = t["iw"] if weighted else None
    pair = verl_pair(verl, objective, "geo_mean", t, key, weights=weights, **clips)
    assert_close(*pair, **VERL_CLOSE)


@pytest.mark.parametrize("weighted", [False, True])
def test_verl_reinforce(verl, weighted):
    core, config_class = verl
    t = batch(dead_sequence=False)
    logp = t["logp"].clone().requires_grad_()
    config = config_class(strategy="fsdp", rollout_n=1, use_dynamic_bsz=True)
    weights = t["iw"] if weighted else None
    loss, _ = core.compute_policy_loss_reinforce(
        t["old"],
        logp,
        t["token_a"],
        t["mask"].double(),
        config=config,
        rollout_is_weights=weights,
    )
    (grad,) = torch.autograd.grad(loss, logp)
    given = {"importance_weights": weights.reshape(-1)} if weighted else {}
    got = ours(presets.reinforce(aggregation="sequence_sum"), t, t["token_a"], **given)
    assert_close(got[:2], (loss.detach(), grad))


@pytest.mark.parametrize("estimator", KL_ESTIMATORS)
def test_verl_kl_penalty(verl, estimator):
    core, _ = verl
    logp = torch.linspace(-3, -0.1, 60).requires_grad_()
    ref = (logp.detach() + torch.linspace(-2, 2, 60)).requires_grad_(False)
    expected = core.kl_penalty(logp, ref, estimator)
    (slope,) = torch.autograd.grad(expected.sum(), logp)
    objective = presets.reinforce(kl_coef=1.0, kl_estimator=estimator)
    got = token_loss(objective, logp, torch.zeros(60), ref_logprobs=ref)
    (grad,) = torch.autograd.grad(got.loss.sum(), logp)
    assert_close((got.kl, grad), (expected.detach(), slope))


def test_differs_from_verl_k3_is_not_cut_at_ten(verl):
    core, _ = verl
    ref = torch.tensor([4.0])
    assert core.kl_penalty(torch.zeros(1), ref, "k3").item() == 10
    got = token_loss(presets.grpo(kl_coef=1.0), torch.zeros(1), ref, ref_logprobs=ref)
    assert got.kl.item() == pytest.approx(torch.tensor(4.0).exp().item() - 5)


@pytest.mark.parametrize("aggregation", ["sequence_mean", "sequence_sum", "constant"])
def test_differs_from_verl_dead_sequences_count(verl, aggregation):
    """4 of 5 sequences have an unmasked token; `normalizer` says so where verl's mean is wanted."""
    t = batch(dead_sequence=True)
    objective = presets.dapo(aggregation=aggregation, ratio_max=3.0)
    theirs = verl_loss(verl, "vanilla", t, t["a"], AGGREGATION[aggregation])
    plain = ours(objective, t, t["a"])[:2]
    assert_close(tuple(x * 5 / 4 for x in plain), theirs, **VERL_CLOSE)
    assert_close(ours(objective, t, t["a"], 4)[:2], theirs, **VERL_CLOSE)


def test_differs_from_verl_gspo_bound_on_the_sequence_ratio(verl):
    t = batch(dead_sequence=False)
    t["old"], t["a"] = t["logp"] - 15, -torch.ones(B)
    got, theirs = verl_pair(verl, presets.gspo_token(), "gspo", t, "a", "seq-mean-token-mean")
    torch.testing.assert_close(got[0], torch.tensor(15.0).exp())
    torch.testing.assert_close(theirs[0], torch.tensor(10.0).exp(), **VERL_CLOSE)
