"""The specification against the losses of verl 0.9; differences by design are asserted."""

import pytest
import torch
from peer_batch import CLOSE, B, T, batch, float64_by_default, ours, results  # noqa: F401

from fastpo import presets
from fastpo.objective import (
    CLIPPED_HIGH,
    CLIPPED_LOW,
    CLIPPED_MAX,
    KL_ESTIMATORS,
    Objective,
    token_loss,
)

pytestmark = pytest.mark.peer


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
