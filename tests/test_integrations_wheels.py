"""fastpo in SkyRL, OpenRLHF and AReaL: each adapter against the trainer's own function, from its
wheel (tools/peer_wheels.txt), on the same inputs: loss, gradient, metrics."""

from __future__ import annotations

from types import SimpleNamespace

import parity_notes
import peer_wheels
import pytest
import torch

from fastpo.integrations import areal, openrlhf, skyrl

pytestmark = [
    pytest.mark.peer,
    pytest.mark.skipif(not peer_wheels.PEERS.is_dir(), reason="needs the wheels of test-all"),
]

B, T = 5, 9


class Data:
    """Five sequences of fp64 log-probs, some tokens masked, one sequence without any."""

    def __init__(self):
        gen = torch.Generator().manual_seed(3)

        def noise(scale):
            return scale * torch.randn(B, T, generator=gen, dtype=torch.float64)

        self.logprobs = -2 * torch.rand(B, T, generator=gen, dtype=torch.float64) - 0.05
        self.old = (self.logprobs + noise(0.5)).clamp(max=-0.01)
        self.rollout = (self.old + noise(0.3)).clamp(max=-0.01)
        self.advantages = noise(1.0)
        self.mask = torch.rand(B, T, generator=gen) > 0.3
        self.empty = self.mask.clone()
        self.empty[2] = False

    def call(self, loss_of):
        """(loss, gradient), the rest of what `loss_of(logprobs)` returns."""
        logprobs = self.logprobs.clone().requires_grad_()
        loss, *rest = loss_of(logprobs)
        return (loss.detach(), *torch.autograd.grad(loss, logprobs)), rest


NO_CORRECTION = {
    **{"tis_ratio_type": None, "sequence_mask_metric": None},
    **{"outlier_token_is_threshold_low": None, "outlier_token_is_threshold_high": None},
    **{"token_mask_is_threshold_low": None, "token_mask_is_threshold_high": None},
}
CORRECTIONS = {
    "none": NO_CORRECTION,
    "token": NO_CORRECTION | {"tis_ratio_type": "token", "token_tis_ratio_clip_high": 1.3},
    "sequence": NO_CORRECTION
    | {"tis_ratio_type": "sequence", "sequence_tis_ratio_clip_high": 1.2}
    | {"token_mask_is_threshold_low": 0.7, "token_mask_is_threshold_high": 1.4},
}


@pytest.fixture
def skyrl_losses():
    with peer_wheels.wheel("skyrl", "ray", "jaxtyping", "loguru", "skyrl.train"):
        import ray

        ray.is_initialized.return_value = False
        from skyrl.backends.skyrl_train.utils import ppo_utils

        yield ppo_utils


@pytest.mark.parametrize("correction", CORRECTIONS)
@pytest.mark.parametrize("name", skyrl.PRESETS)
def test_skyrls_losses_with_every_setting_of_its_config(
    skyrl_losses, name, correction, record_property
):
    """REGRESSIONS 38: bounds, temperatures and corrections are the config's."""
    skyrl.install()
    skyrl.install()
    config = SimpleNamespace(
        policy_loss_type=name if name in ("regular", "dual_clip") else "regular",
        loss_reduction="sequence_mean",
        eps_clip_low=0.2,
        eps_clip_high=0.3,
        clip_ratio_c=1.5,
        cispo=SimpleNamespace(cispo_eps_clip_low=0.4, cispo_eps_clip_high=0.6),
        sapo=SimpleNamespace(tau_pos=1.3, tau_neg=1.7),
        dppo=SimpleNamespace(dppo_type="binary_tv", delta_low=0.05, delta_high=0.1),
        off_policy_correction=SimpleNamespace(**CORRECTIONS[correction]),
    )
    data, registry = Data(), skyrl_losses.PolicyLossRegistry

    def loss_of(registered):
        return data.call(
            lambda logprobs: registry.get(registered)(
                logprobs,
                data.old,
                data.advantages,
                config=config,
                loss_mask=data.mask.double(),
                rollout_logprobs=data.rollout,
            )
        )

    for dppo_type in ("binary_tv", "binary_kl") if name == "dppo" else ("",):
        config.dppo.dppo_type = dppo_type
        (loss, grad), (metrics,) = loss_of(f"fastpo_{name}")
        (their_loss, their_grad), (expected,) = loss_of(name)
        value = their_loss if name != "dppo" else loss  # another function of the same gradient
        ours, theirs = (loss, grad), (value, their_grad)
        parity_notes.note(
            record_property, "SkyRL", f"{name}, correction {correction}", ours, theirs
        )
        torch.testing.assert_close(grad, their_grad, rtol=1e-6, atol=1e-9)
        torch.testing.assert_close(loss, value, rtol=1e-6, atol=1e-9)
        assert metrics == pytest.approx(expected, rel=1e-6)
        assert metrics["clip_ratio"] > 0 or name == "sapo"
        assert grad.abs().sum() > 0


def test_skyrls_rollout_loss_needs_rollout_logprobs(skyrl_losses):
    data = Data()
    with pytest.raises(ValueError, match="rollout_logprobs is None"):
        skyrl.policy_loss("rollout_is")(data.logprobs, data.old, data.advantages, None)


def test_skyrls_megatron_head():
    gen = torch.Generator().manual_seed(2)
    hidden, weight = torch.randn(2, 5, 8, generator=gen), torch.randn(31, 8, generator=gen)
    target = torch.randint(0, 31, (2, 5), generator=gen)
    arguments = (weight, target, 0, 31, 5, None)
    ours = skyrl.fused_lm_head("torch", hidden.requires_grad_(), *arguments, False)
    expected = (hidden @ weight.t()).log_softmax(-1).gather(-1, target[..., None])[..., 0]
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)
    assert ours.requires_grad
    assert not skyrl.fused_lm_head("torch", hidden, *arguments, True).requires_grad
    with pytest.raises(ValueError, match="has 31 rows, expected those of the ids from 0 to 20"):
        skyrl.fused_lm_head("torch", hidden, weight, target, 0, 20, 5, None, False)


OPENRLHF = [
    {},
    {"dual_clip": 1.4},
    {"token_level_loss": False},
    {"policy_loss_type": "gspo"},
    {"policy_loss_type": "gspo", "is_correction_level": "token"},
    {"is_correction_level": "token", "is_correction_threshold": (0.7, 1.2)},
    {"is_correction_level": "token", "is_correction_mode": "clip"},
    {"is_correction_level": "seq", "is_correction_threshold": (0.95, 1.1), "dual_clip": 1.4},
    {"is_correction_level": "token", "is_correction_gating": "tv"},
    {"is_correction_level": "seq", "is_correction_gating": "binary_kl"},
]


@pytest.mark.parametrize("counts", ["local", "global"])
@pytest.mark.parametrize("settings", OPENRLHF, ids=lambda x: "-".join(map(str, x.values())))
def test_openrlhfs_policy_loss_with_every_setting(settings, counts, record_property):
    """REGRESSIONS 38: clips, dual clip, gspo, sample means, counts, every level and gate."""
    feature = ", ".join(f"{name} {value}" for name, value in settings.items()) or "defaults"
    settings = {"clip_eps_low": 0.2, "clip_eps_high": 0.3} | settings
    if settings.get("is_correction_gating", "ratio") != "ratio":
        settings["is_correction_threshold"] = (0, 0.02)
    elif settings.get("is_correction_mode") == "clip":
        settings["is_correction_threshold"] = (0.8, 1.1)
    totals = {"dp_size": 2, "batch_num_tokens": 90.0, "global_batch_size": 12.0}
    data = Data()
    # OpenRLHF's mean of a sequence without a token is NaN
    whole = settings.get("is_correction_level") == "seq"
    mask = (data.mask if whole else data.empty).double()
    with peer_wheels.wheel("openrlhf", "deepspeed"):
        from openrlhf.models import loss as loss_module

        results = [
            data.call(
                lambda logprobs, module=module: module(
                    logprobs,
                    data.old,
                    data.advantages,
                    action_mask=mask,
                    rollout_log_probs=data.rollout,
                    **(totals if counts == "global" else {}),
                )
            )
            for module in (
                openrlhf.policy_loss_class(loss_module)(**settings),
                loss_module.PolicyLoss(**settings),
            )
        ]
    (ours, metrics), (theirs, expected) = results
    parity_notes.note(record_property, "OpenRLHF", feature, ours, theirs)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-9)
    for mine, other in zip(metrics, expected, strict=True):
        assert (mine is None) == (other is None)
        if mine is not None:
            assert float(mine) == pytest.approx(float(other), rel=1e-6)


def test_openrlhfs_own_loss_types_only():
    """REGRESSIONS 38: OpenRLHF raises for another policy_loss_type when it computes."""
    data = Data()
    with peer_wheels.wheel("openrlhf", "deepspeed"):
        from openrlhf.models import loss

        made = openrlhf.policy_loss_class(loss)(policy_loss_type="cispo")
        with pytest.raises(ValueError, match="policy_loss_type is 'cispo', expected one of ppo"):
            made(data.logprobs, data.old, data.advantages)


REJECTIONS = {
    "none": None,
    "mask": {"level": "token", "action": "mask", "metric": "ratio"},
    "clamp": {"level": "token", "action": "clamp", "metric": "ratio"},
    "sequence": {"level": "sequence", "action": "mask", "metric": "kl_k3"},
}


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("c_clip", [None, 1.4])
@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("rejection", REJECTIONS)
def test_areals_actor_loss_with_every_setting(rejection, level, c_clip, packed, record_property):
    """REGRESSIONS 38: clips, dual clip, both levels, rejection; per-token statistics too."""
    settings = REJECTIONS[rejection]
    if settings is not None:
        bounds = {"upper": 1.2, "lower": 0.8} if "ratio" in settings.values() else {"upper": 0.05}
        settings = SimpleNamespace(agg="mean", **{"lower": None} | settings | bounds)
    data = Data()
    mask, shape = data.empty, (-1,) if packed else (B, T)
    tensors = {
        "proximal_logprobs": data.old.reshape(shape),
        "old_logprobs": data.rollout.reshape(shape),
        "advantages": data.advantages.reshape(shape),
        "loss_mask": mask.reshape(shape),
    }
    if packed:
        tensors["cu_seqlens"] = torch.arange(0, B * T + 1, T, dtype=torch.int32)
    stubs = ("einops", "torchdata", "areal.api", "areal.infra")
    with peer_wheels.wheel("areal", *stubs, "areal.utils.logging", "areal.utils.seqpack"):
        from areal.utils.functional import functional

        results = [
            data.call(
                lambda logprobs, loss=loss: loss(
                    logprobs.reshape(shape),
                    **tensors,
                    eps_clip=0.2,
                    eps_clip_higher=0.3,
                    c_clip=c_clip,
                    rejection_sampling=settings,
                    importance_sampling_level=level,
                )
            )
            for loss in (areal.ppo_actor_loss_fn, functional.ppo_actor_loss_fn)
        ]
    (ours, (statistics,)), (theirs, (expected,)) = results
    parity_notes.note(
        record_property, "AReaL", f"{level} level, rejection {rejection}", ours, theirs
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-9)
    assert statistics.keys() == expected.keys()
    mask = tensors["loss_mask"]
    for name, value in expected.items():
        if name == "filtered_fraction":
            assert statistics[name] == pytest.approx(value)
        elif name == "loss":  # a token that was rejected shows in neither mean
            kept = statistics.get("behave_mask", mask) if "mask" in rejection else mask
            torch.testing.assert_close(statistics[name][kept], value[kept], rtol=1e-6, atol=1e-9)
        else:
            torch.testing.assert_close(statistics[name][mask], value[mask], rtol=1e-6, atol=1e-9)


def test_install_puts_the_functions_where_the_actors_look():
    with peer_wheels.wheel("openrlhf", "deepspeed", "openrlhf.trainer"):
        from openrlhf.models import loss
        from openrlhf.trainer.ray import ppo_actor

        openrlhf.install()
        installed = ppo_actor.PolicyLoss
        openrlhf.install()
        assert ppo_actor.PolicyLoss is loss.PolicyLoss is installed
        assert installed.__module__ == openrlhf.__name__
    with peer_wheels.wheel("areal", "areal.trainer"):
        from areal.trainer.ppo import actor

        areal.install()
        assert actor.ppo_actor_loss_fn is areal.ppo_actor_loss_fn


def test_skyrl_sends_a_loss_to_its_workers(skyrl_losses):
    """REGRESSIONS 36: its registry pickles what is registered, by value or by name."""
    cloudpickle = pytest.importorskip("cloudpickle")
    skyrl.install()
    registered = skyrl_losses.PolicyLossRegistry.get("fastpo_regular")
    loss = cloudpickle.loads(cloudpickle.dumps(registered))
    data = Data()
    settings = {"eps_clip_low": 0.2, "eps_clip_high": 0.3}
    config = SimpleNamespace(**settings, off_policy_correction=SimpleNamespace(**NO_CORRECTION))
    arguments = (data.logprobs, data.old, data.advantages, config)
    assert loss(*arguments)[0] == registered(*arguments)[0]


def test_areal_refuses_a_level_that_it_does_not_know():
    data = Data()
    with pytest.raises(ValueError, match="importance_sampling_level is 'turn', expected one of"):
        areal.ppo_actor_loss_fn(
            *(data.logprobs, data.old, data.old, data.advantages, 0.2, data.mask),
            importance_sampling_level="turn",
        )
