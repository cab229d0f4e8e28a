"""Hostile batches, 200 of them, for each adapter that is tested against its trainer's own function.

One sequence or token, masks without any, padding on the left, what lies under the mask, ratios of
up to e^19, advantages of 0 and of 300, bf16: there the trainer's function gets the same numbers in
fp64, and must be met within bf16's resolution of the gradient.
"""

from __future__ import annotations

import math
import random
from types import SimpleNamespace

import peer_wheels
import pytest
import torch

from fastpo.integrations import areal, openrlhf, skyrl
from fastpo.integrations import verl as verl_integration

pytestmark = [pytest.mark.peer, pytest.mark.slow]

CASES = 200
RTOL = {
    torch.float64: 1e-6,
    torch.float32: 3e-5,
    torch.bfloat16: 2 * torch.finfo(torch.bfloat16).eps,
}
NAMES = ("logprobs", "old", "rollout", "advantages")


class Batch:
    """Log-probs [B, T] of three policies, advantages and a mask; `choose` is the seed's choice."""

    def __init__(self, seed: int):
        gen, self.choose = torch.Generator().manual_seed(seed), random.Random(seed).choice
        self.seed, self.B, self.T = seed, self.choose([1, 1, 2, 5]), self.choose([1, 2, 3, 7, 12])
        self.dtype = self.choose([torch.float64, torch.float64, torch.float32, torch.bfloat16])
        self.spread = self.choose([0, 1e-3, 0.3, 0.3, 2, 8])

        def noise(scale):
            drawn = scale * torch.randn(self.B, self.T, generator=gen, dtype=torch.float64)
            return drawn.clamp(-19, 19) if scale < 100 else drawn

        self.logprobs = -noise(1).abs() - 1e-3
        self.old = (self.logprobs - noise(self.spread)).clamp(max=-1e-3)
        self.rollout = (self.old - noise(self.choose([0, 0.1, 1]))).clamp(max=-1e-3)
        self.advantages = noise(self.choose([1, 1, 1e-3, 300, 0]))
        self.mask = self._mask(gen)
        for name in NAMES:  # what lies under the mask is anything
            values = getattr(self, name)
            values[~self.mask] = self.choose([-17.0, -1.0, 0.0])
            setattr(self, name, values.to(self.dtype))

    def _mask(self, gen) -> torch.Tensor:
        positions, lengths = (
            torch.arange(self.T),
            torch.randint(1, self.T + 1, (self.B, 1), generator=gen),
        )
        mask = torch.rand(self.B, self.T, generator=gen) > 0.4
        match self.choose(["random", "random", "left", "right", "one token", "empty row", "all"]):
            case "left":
                mask = positions >= self.T - lengths
            case "right":
                mask = positions < lengths
            case "one token":
                mask = torch.zeros(self.B, self.T, dtype=torch.bool)
            case "empty row":
                mask[self.choose(range(self.B))] = False
            case "all":
                mask = torch.ones_like(mask)
        mask[self.choose(range(self.B)), self.choose(range(self.T))] = True
        return mask

    def wide(self) -> SimpleNamespace:
        """The same numbers, in fp64 where they are bf16."""
        dtype = torch.float64 if self.dtype == torch.bfloat16 else self.dtype
        numbers = {name: getattr(self, name).to(dtype) for name in NAMES}
        return SimpleNamespace(mask=self.mask, **numbers)


def called(loss_of, batch):
    """(loss, its gradient, the rest) of `loss_of(logprobs, batch)`, a trainer's or an adapter's."""
    logprobs = batch.logprobs.clone().requires_grad_()
    loss, *rest = loss_of(logprobs, batch)
    return loss.detach(), torch.autograd.grad(loss, logprobs)[0], rest


def compare(batch: Batch, ours, theirs, what: object, *, value: bool = True) -> list:
    """What else (metrics) both returned, as pairs. `what` names the case where one fails."""
    mine, other = called(ours, batch), called(theirs, batch.wide())
    rtol = RTOL[batch.dtype]
    message = f"seed {batch.seed}, {batch.dtype}, {what}: {mine[:2]} against {other[:2]}"
    unit = batch.advantages.double().abs().max().item() + 1e-30
    if value:
        assert math.isclose(mine[0], other[0], rel_tol=rtol, abs_tol=rtol * unit), message
    grads = [x.double() for x in (mine[1], other[1])]
    scale = grads[1].abs().max()
    assert ((grads[0] - grads[1]).abs() <= rtol * (grads[1].abs() + 1e-3 * scale)).all(), message
    return list(zip(mine[2], other[2], strict=True))


def assert_metrics(batch: Batch, ours: dict, theirs: dict, what: object) -> None:
    if batch.dtype != torch.bfloat16:  # whose rounding moves ratios over a bound
        got = {name: float(ours[name]) for name in theirs}
        expected = {name: float(x) for name, x in theirs.items()}
        assert got == pytest.approx(expected, rel=1e-4, abs=1e-5, nan_ok=True), (batch.seed, what)


@pytest.fixture(scope="module")
def skyrl_registry():
    if not peer_wheels.PEERS.is_dir():
        pytest.skip("needs the wheels of test-all")
    with peer_wheels.wheel("skyrl", "ray", "jaxtyping", "loguru", "skyrl.train"):
        import ray

        ray.is_initialized.return_value = False
        from skyrl.backends.skyrl_train.utils import ppo_utils

        skyrl.install()
        yield ppo_utils.PolicyLossRegistry


def test_skyrl(skyrl_registry):
    """REGRESSIONS 78: every loss, with and without a correction of the rollout's ratio."""
    names = ("tis_ratio_type", "sequence_mask_metric")
    names += tuple(f"outlier_token_is_threshold_{end}" for end in ("low", "high"))
    names += tuple(f"token_mask_is_threshold_{end}" for end in ("low", "high"))
    off = dict.fromkeys(names)
    for seed in range(CASES):
        batch = Batch(seed)
        name = batch.choose([x for x in skyrl.PRESETS if x != "gspo" or batch.spread < 2])
        correction = batch.choose(
            [off, off | {"tis_ratio_type": "token", "token_tis_ratio_clip_high": 1.3}]
        )
        config = SimpleNamespace(
            policy_loss_type=name if name in ("regular", "dual_clip") else "regular",
            loss_reduction="sequence_mean",
            **{"eps_clip_low": 0.2, "eps_clip_high": 0.3, "clip_ratio_c": 1.5},
            cispo=SimpleNamespace(cispo_eps_clip_low=0.4, cispo_eps_clip_high=0.6),
            sapo=SimpleNamespace(tau_pos=1.3, tau_neg=1.7),
            dppo=SimpleNamespace(
                dppo_type=batch.choose(["binary_tv", "binary_kl"]), delta_low=0.05, delta_high=0.1
            ),
            off_policy_correction=SimpleNamespace(**correction),
        )

        def loss_of(registered, config=config):
            def of(logprobs, given):
                tensors = (
                    logprobs,
                    given.old,
                    given.advantages,
                    config,
                    given.mask.to(logprobs.dtype),
                )
                return skyrl_registry.get(registered)(*tensors, given.rollout)

            return of

        value = name != "dppo"  # another function of the same gradient
        what = name, correction["tis_ratio_type"]
        pair = compare(batch, loss_of(f"fastpo_{name}"), loss_of(name), what, value=value)
        assert_metrics(batch, *pair[0], what)


def test_openrlhf():
    """REGRESSIONS 78: clips, dual clip, sample means, gspo, and the correction's levels."""
    if not peer_wheels.PEERS.is_dir():
        pytest.skip("needs the wheels of test-all")
    token = {"is_correction_level": "token"}
    settings = [
        *({}, {"dual_clip": 1.4}, {"token_level_loss": False}, {"policy_loss_type": "gspo"}),
        token | {"is_correction_threshold": (0.7, 1.2)},
        token | {"is_correction_mode": "clip", "is_correction_threshold": (0.8, 1.1)},
        token | {"is_correction_gating": "tv", "is_correction_threshold": (0, 0.02)},
    ]
    with peer_wheels.wheel("openrlhf", "deepspeed"):
        from openrlhf.models import loss as module

        for seed in range(CASES):
            batch = Batch(seed)
            chosen = {"clip_eps_low": 0.2, "clip_eps_high": 0.3} | batch.choose(settings)
            totals = {"dp_size": 2, "batch_num_tokens": 90.0, "global_batch_size": 12.0}
            totals = batch.choose([{}, totals])

            def loss_of(loss_class, chosen=chosen, totals=totals):
                def of(logprobs, given):
                    tensors = (
                        logprobs,
                        given.old,
                        given.advantages,
                        given.mask.to(logprobs.dtype),
                        given.rollout,
                    )
                    return loss_class(**chosen)(*tensors, **totals)

                return of

            ours = loss_of(openrlhf.policy_loss_class(module))
            pairs = compare(batch, ours, loss_of(module.PolicyLoss), chosen)
            known = [pair for pair in pairs if pair[1] is not None]
            assert_metrics(batch, *(dict(enumerate(x)) for x in zip(*known, strict=True)), chosen)


def test_areal():
    """REGRESSIONS 78: both levels, padded and packed into unequal sequences, rejections."""
    if not peer_wheels.PEERS.is_dir():
        pytest.skip("needs the wheels of test-all")
    ratio = {"level": "token", "metric": "ratio", "upper": 1.2, "lower": 0.8, "agg": "mean"}
    rejections = [
        *(None, ratio | {"action": "mask"}, ratio | {"action": "clamp"}),
        ratio | {"action": "mask", "level": "sequence"},
    ]
    stubs = ("einops", "torchdata", "areal.api", "areal.infra")
    with peer_wheels.wheel("areal", *stubs, "areal.utils.logging", "areal.utils.seqpack"):
        from areal.utils.functional import functional

        for seed in range(CASES):
            batch = Batch(seed)
            rejection, level = batch.choose(rejections), batch.choose(["token", "sequence"])
            tokens, packed = batch.B * batch.T, batch.choose([True, False])
            shape = (-1,) if packed else (batch.B, batch.T)
            cuts = sorted({0, tokens, *(batch.choose(range(tokens + 1)) for _ in range(3))})
            settings = {
                **{"eps_clip": 0.2, "eps_clip_higher": batch.choose([0.3, None])},
                **{"c_clip": batch.choose([None, 1.4]), "importance_sampling_level": level},
                "rejection_sampling": rejection and SimpleNamespace(**rejection),
                "cu_seqlens": torch.tensor(cuts, dtype=torch.int32) if packed else None,
            }

            def loss_of(loss, shape=shape, settings=settings):
                def of(logprobs, given):
                    tensors = logprobs, given.old, given.rollout, given.advantages
                    logprobs, proximal, old, advantages = (y.reshape(shape) for y in tensors)
                    tensors = {"proximal_logprobs": proximal, "old_logprobs": old}
                    tensors |= {"advantages": advantages, "loss_mask": given.mask.reshape(shape)}
                    return loss(logprobs, **tensors, **settings)

                return of

            ours, theirs = areal.ppo_actor_loss_fn, functional.ppo_actor_loss_fn
            compare(batch, loss_of(ours), loss_of(theirs), (rejection, level, cuts))


def test_verl(verl):
    """REGRESSIONS 78: nine losses, every loss_agg_mode, local and global counts, metrics."""
    core, config_class = verl
    from verl.workers.config.actor import PolicyLossConfig

    verl_integration.install()
    own = {
        **{"fastpo_dapo": "vanilla", "fastpo_sapo": "sapo", "fastpo_gpg": "gpg"},
        **{"fastpo_gmpo": "geo_mean", "fastpo_gspo": "gspo", "fastpo_cispo": "cispo"},
        **{"fastpo_dppo": "dppo_tv", "fastpo_dppo_kl": "dppo_kl", "fastpo_dro": "dro"},
    }
    for seed in range(CASES):
        batch = Batch(seed)
        name = batch.choose([x for x in own if x != "fastpo_gspo" or batch.spread < 2])
        mode = batch.choose(list(verl_integration.AGGREGATIONS))
        config = config_class(
            **{"strategy": "fsdp", "rollout_n": 1, "use_dynamic_bsz": True},
            **{"clip_ratio_low": 0.2, "clip_ratio_high": 0.28, "clip_ratio_c": 1.9},
            policy_loss=PolicyLossConfig(dro_beta=0.3),
        )
        counts = {"batch_num_tokens": 40, "global_batch_size": 12, "dp_size": 2}
        config.global_batch_info.update(batch.choose([{}, counts]))

        def loss_of(registered, config=config, mode=mode):
            def of(logprobs, given):
                mask = given.mask.to(logprobs.dtype)
                loss = core.get_policy_loss_fn(registered)
                return loss(given.old, logprobs, given.advantages, mask, mode, config)

            return of

        pair = compare(batch, loss_of(name), loss_of(own[name]), (name, mode))
        assert_metrics(batch, *pair[0], (name, mode))
