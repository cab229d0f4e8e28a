"""`rollout_correction` against formulas by hand, verl's and TRL's own functions."""

from __future__ import annotations

import math

import pytest
import torch

import fastpo
from fastpo.mismatch import REJECTIONS

FP64 = torch.float64
LENGTHS = [6, 1, 0, 4, 5]
B, T = len(LENGTHS), 6


def batch(spread=0.7, seed=0) -> dict[str, torch.Tensor]:
    """[B, T]; sequence 2 has no unmasked token, sequence 3 a hole."""
    generator = torch.Generator().manual_seed(seed)
    old = -torch.randn(B, T, dtype=FP64, generator=generator).exp()
    mask = torch.arange(T) < torch.tensor(LENGTHS)[:, None]
    mask[3, 1] = False
    return {
        "old": old,
        "rollout": old - spread * torch.randn(B, T, dtype=FP64, generator=generator),
        "mask": mask,
        "a": torch.randn(B, dtype=FP64, generator=generator),
    }


def correct(t: dict, **options) -> fastpo.RolloutCorrection:
    return fastpo.rollout_correction(t["old"], t["rollout"], mask=t["mask"], **options)


def ratios(t: dict, level: str) -> torch.Tensor:
    """[B, T] ratios of a level, sequence by sequence, in plain Python."""
    d = t["old"] - t["rollout"]
    result = torch.ones(B, T, dtype=FP64)
    for b in range(B):
        own = d[b][t["mask"][b]].tolist()
        whole = math.fsum(own) / (max(len(own), 1) if level == "geometric" else 1)
        for i in range(T):
            result[b, i] = math.exp(d[b, i] if level == "token" else whole)
    return result


@pytest.mark.parametrize("level", ["token", "sequence", "geometric"])
@pytest.mark.parametrize("low, high", [(None, 1.3), (0.5, 1.5), (0.9, None)])
def test_modes_by_hand(level, low, high):
    t = batch()
    r = ratios(t, level)
    least, most = low or 0.0, high or math.inf
    inside = (r >= least) & (r <= most)
    for mode, weights, mask in (
        ("truncate", r.clamp(least, most), t["mask"]),
        ("mask", r * inside, t["mask"]),
        ("reject", torch.ones_like(r), t["mask"] & inside),
        ("none", torch.ones_like(r), t["mask"]),
    ):
        bounds = {} if mode == "none" else {"low": low, "high": high}
        got = correct(t, mode=mode, level=level, **bounds)
        torch.testing.assert_close(got.weights, weights * t["mask"], rtol=1e-12, atol=0)
        assert torch.equal(got.mask, mask), mode
        cut = (~inside & t["mask"]).sum() if mode != "none" else torch.tensor(0)
        torch.testing.assert_close(got.metrics["cut"], cut / t["mask"].sum(), check_dtype=False)


@pytest.mark.parametrize("mode", ["truncate", "mask", "reject", "none"])
@pytest.mark.parametrize("level", ["token", "sequence", "geometric"])
def test_packed_equals_padded(level, mode):
    """And NaN or inf in masked slots changes nothing (REGRESSIONS 17)."""
    t = batch()
    options = {
        "mode": mode,
        "level": level,
        **({} if mode == "none" else {"low": 0.4, "high": 2.5}),
        "reject": {"seq_max_k3": 1.0, "token_k2": 0.5, "seq_mean_k1": (0.7, 1.3)},
        "off_policy_threshold": 0.05,
        "normalize": True,
    }
    padded = correct(t, advantages=t["a"], **options)
    keep = torch.arange(T) < torch.tensor(LENGTHS)[:, None]  # the hole of sequence 3 stays in
    old, rollout = (t[key].masked_fill(~t["mask"], torch.nan)[keep] for key in ("old", "rollout"))
    packed = fastpo.rollout_correction(
        old,
        rollout,
        mask=t["mask"][keep],
        cu_seqlens=torch.tensor([0, *LENGTHS]).cumsum(0).int(),
        advantages=t["a"],
        **options,
    )
    torch.testing.assert_close(packed.weights, padded.weights[keep], rtol=1e-12, atol=0)
    assert torch.equal(packed.mask, padded.mask[keep])
    assert 0 < padded.mask.sum() < t["mask"].sum()
    for key, value in padded.metrics.items():
        torch.testing.assert_close(packed.metrics[key], value, rtol=1e-12, atol=0, msg=key)


def test_metrics_by_hand():
    t = batch()
    got = correct(t, mode="truncate", level="token", high=1.2)
    d, w = (t["old"] - t["rollout"])[t["mask"]], got.weights[t["mask"]]
    expected = {
        "ratio_mean": d.exp().mean(),
        "ratio_min": d.exp().min(),
        "ratio_max": d.exp().max(),
        "weight_mean": w.mean(),
        "ess": w.sum() ** 2 / (len(w) * (w**2).sum()),
        "cut": (d.exp() > 1.2).double().mean(),
        "kl_k1": -d.mean(),
        "kl_k3": (d.exp() - 1 - d).mean(),
        "difference_mean": d.abs().mean(),
        "difference_max": d.abs().max(),
    }
    assert expected.keys() == got.metrics.keys()
    for key, value in expected.items():
        torch.testing.assert_close(got.metrics[key], value, rtol=1e-12, atol=0, msg=key)


def statistic(d: list[float], name: str) -> list[float]:
    """k1, k2 or k3 of every token of one sequence, or of the sequence for every token."""
    scope, kind = name.rsplit("_", 1)
    each = [{"k1": x, "k2": x * x / 2, "k3": math.exp(x) - 1 - x}[kind] for x in d]
    reduce = {"seq_sum": math.fsum, "seq_max": max, "seq_mean": lambda x: math.fsum(x) / len(x)}
    return each if scope == "token" else [reduce[scope](each)] * len(d)


@pytest.mark.parametrize("name", REJECTIONS)
def test_rejection_by_hand(name):
    t = batch()
    low, high = (0.5, 1.6) if name == "seq_sum_k1" else (0.7, 1.25)
    bound = (low, high) if name.endswith("k1") else 0.2
    expected = torch.zeros(B, T, dtype=torch.bool)
    for b in range(B):
        d = (t["old"] - t["rollout"])[b][t["mask"][b]].tolist()
        values = statistic(d, name) if d else []
        inside = [low <= math.exp(x) <= high if name.endswith("k1") else x <= 0.2 for x in values]
        expected[b, t["mask"][b]] = torch.tensor(inside, dtype=torch.bool)
    got = correct(t, mode="none", level="token", reject={name: bound})
    assert torch.equal(got.mask, expected)
    assert 0 < expected.sum() < t["mask"].sum()


def test_off_policy_masking_by_hand():
    """Out are tokens with A < 0 of sequences whose mean of -d is above the threshold."""
    old = torch.full((4, 2), -1.0)
    rollout = old + torch.tensor([[0.5], [0.5], [0.5], [-0.5]])  # -d
    advantages = torch.tensor([-1.0, 0.0, 1.0, -1.0])
    got = fastpo.rollout_correction(
        old, rollout, mode="none", off_policy_threshold=0.2, advantages=advantages
    )
    assert got.mask.tolist() == [[False] * 2, [True] * 2, [True] * 2, [True] * 2]


def test_a_perfect_match_changes_nothing():
    t = batch(spread=0.0)
    got = correct(t, mode="mask", level="sequence", low=0.99, high=1.01, reject={"token_k3": 1e-9})
    assert torch.equal(got.weights, t["mask"].double()) and torch.equal(got.mask, t["mask"])
    assert got.metrics["ess"] == 1 and got.metrics["cut"] == 0 and got.metrics["kl_k3"] == 0


@pytest.mark.parametrize("d", [1e3, -1e3])
def test_extreme_differences_stay_finite(d):
    """REGRESSIONS 18: the log of a ratio, and of its sum, is clamped at 20."""
    old = torch.full((2, 3), -2.0)
    for level in ("token", "sequence", "geometric"):
        got = fastpo.rollout_correction(old, old - d, mode="truncate", level=level, high=None)
        assert (got.weights == torch.tensor(math.copysign(20.0, d)).exp()).all()


def test_rejection_sees_the_clamped_difference():
    old = torch.full((1, 2), -2.0)
    bound = {"token_k3": math.exp(20.0), "token_k1": (math.exp(-20.5), math.exp(20.5))}
    got = fastpo.rollout_correction(old, old - 1e3, mode="none", reject=bound)
    assert got.mask.all()


def test_off_policy_sequences_by_hand():
    """Out are tokens with A < 0 of sequences whose mean(rollout - old) is above the threshold."""
    old = torch.full((3, 2), -2.0)
    rollout = old + torch.tensor([[1.0], [1.0], [0.2]])
    advantages = torch.tensor([[-1.0, 1.0], [0.0, 2.0], [-1.0, -1.0]])
    options = {"mode": "none", "off_policy_threshold": 0.5}
    got = fastpo.rollout_correction(old, rollout, advantages=advantages, **options)
    assert got.mask.tolist() == [[False, True], [True, True], [True, True]]
    got = fastpo.rollout_correction(old, rollout, advantages=advantages[:, 0], **options)
    assert got.mask.tolist() == [[False, False], [True, True], [True, True]]


def test_nan_under_the_mask_stays_visible():
    t = batch()
    t["rollout"][0, 1] = torch.nan
    for mode in ("truncate", "mask"):
        got = correct(t, mode=mode, level="token")
        assert got.weights[0, 1].isnan() and got.metrics["kl_k1"].isnan()


def test_nothing_unmasked_and_nothing_at_all():
    """REGRESSIONS 15, 43."""
    t = batch()
    dead = fastpo.rollout_correction(
        t["old"], t["rollout"], mask=torch.zeros_like(t["mask"]), level="sequence", normalize=True
    )
    assert not dead.weights.any() and not dead.mask.any() and dead.metrics["ess"].isnan()
    outside = fastpo.rollout_correction(
        t["old"], t["old"] - 5, mask=t["mask"], mode="mask", normalize=True
    )
    assert not outside.weights.any() and torch.equal(outside.mask, t["mask"])
    for shape in ((0,), (0, 4), (3, 0)):
        cu_seqlens = torch.zeros(1, dtype=torch.int32) if len(shape) == 1 else None
        empty = fastpo.rollout_correction(
            torch.zeros(shape),
            torch.zeros(shape),
            level="geometric",
            reject={"seq_max_k2": 1.0},
            cu_seqlens=cu_seqlens,
        )
        assert empty.weights.shape == empty.mask.shape == shape


def test_the_loss_takes_what_comes_out():
    t = batch()
    got = correct(t, mode="mask", level="sequence", low=0.1, high=5.0, reject={"token_k3": 0.4})
    loss = fastpo.policy_loss_from_logprobs(
        t["old"].requires_grad_(),
        t["a"],
        objective=fastpo.dapo(),
        mask=got.mask,
        importance_weights=got.weights,
    ).loss
    (grad,) = torch.autograd.grad(loss, t["old"])
    expected = -t["a"][:, None] * got.weights / got.mask.sum() * got.mask
    torch.testing.assert_close(grad, expected)


@pytest.fixture
def helper(verl):
    return pytest.importorskip("verl.trainer.ppo.rollout_corr_helper", reason="needs verl")


@pytest.mark.peer
@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("low, high", [(None, 1.3), (0.5, 1.6)])
def test_weights_as_verl(helper, level, normalize, low, high):
    t = batch()
    threshold = high if low is None else f"{low}_{high}"
    expected, metrics = helper.compute_rollout_correction_weights(
        t["old"] - t["rollout"], t["mask"].double(), level, threshold, normalize
    )
    mode = "truncate" if low is None else "mask"
    got = correct(t, mode=mode, level=level, low=low, high=high, normalize=normalize)
    torch.testing.assert_close(got.weights, expected, rtol=1e-7, atol=1e-12)
    if not normalize:
        ess = got.metrics["ess"].item()
        assert ess == pytest.approx(metrics["rollout_is_eff_sample_size"], rel=1e-6)


@pytest.mark.peer
@pytest.mark.parametrize("scope", ["token", "seq_sum", "seq_mean", "seq_max"])
@pytest.mark.parametrize("kind", ["k1", "k2", "k3"])
def test_rejection_as_verl(helper, scope, kind):
    """verl bounds the inverse ratio by its k1 thresholds: the reciprocals."""
    if (scope, kind) == ("seq_max", "k1"):
        return
    t = batch()
    name = f"{scope}_{kind}"
    low, high = (0.5, 1.6) if scope == "seq_sum" else (0.7, 1.25)
    bound, theirs = ((low, high), f"{1 / high}_{1 / low}") if kind == "k1" else (0.2, 0.2)
    expected, _ = helper.compute_rollout_rejection_mask(
        t["old"] - t["rollout"], t["mask"].double(), name, str(theirs)
    )
    got = correct(t, mode="none", level="token", reject={name: bound})
    assert torch.equal(got.mask, expected.bool())
    assert 0 < got.mask.sum() < t["mask"].sum()


@pytest.mark.peer
def test_kl_as_verl(helper):
    t = batch()
    theirs = helper.compute_offpolicy_metrics(t["old"], t["rollout"], t["mask"].double())
    got = correct(t, mode="none", level="token").metrics
    assert got["kl_k1"].item() == pytest.approx(theirs["kl"], rel=1e-6)
    assert got["kl_k3"].item() == pytest.approx(theirs["k3_kl"], rel=1e-6)


@pytest.mark.peer
@pytest.mark.parametrize("threshold", [-0.1, 0.0, 0.2])
def test_off_policy_sequence_mask_as_trl(threshold):
    trainer = pytest.importorskip("trl.trainer.grpo_trainer", reason="needs trl").GRPOTrainer
    t = batch()
    expected = trainer.get_off_policy_mask(
        t["a"][:, None], t["old"], t["rollout"], t["mask"].double(), threshold
    )
    got = correct(t, mode="none", level="token", off_policy_threshold=threshold, advantages=t["a"])
    assert torch.equal(got.mask, t["mask"] & expected.bool())


ROW = torch.zeros(3)


@pytest.mark.parametrize(
    "options, error, words",
    [
        ({"mode": "clip"}, ValueError, "mode is 'clip', expected one of truncate, mask"),
        ({"level": "seq"}, ValueError, "level is 'seq'"),
        ({"level": "sequence"}, ValueError, "needs cu_seqlens"),
        ({"reject": {"seq_mean_k3": 0.1}}, ValueError, "needs cu_seqlens"),
        ({"low": 3.0}, ValueError, "low is 3.0 and high 2.0"),
        ({"high": 0.0}, ValueError, "high is 0.0"),
        ({"high": "2"}, TypeError, "high is str"),
        ({"reject": ["token_k1"]}, TypeError, "reject is list"),
        ({"reject": {"token_k4": 0.1}}, ValueError, "token_k4"),
        ({"reject": {"token_k1": 2.0}}, ValueError, r"token_k1.*\(low, high\)"),
        ({"reject": {"token_k3": (0.5, 2.0)}}, ValueError, "token_k3.*one number"),
        ({"off_policy_threshold": 0.1}, ValueError, "together"),
        ({"advantages": ROW}, ValueError, "got advantages alone"),
        ({"mask": torch.ones(2).bool()}, ValueError, "mask has shape"),
        ({"mode": "none", "high": 3.0}, ValueError, "high 3.0 but have no meaning for mode='none'"),
    ],
)
def test_refusals(options, error, words):
    with pytest.raises(error, match=words):
        fastpo.rollout_correction(ROW, ROW, **options)
