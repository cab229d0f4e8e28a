"""torchtitan's RL: a loss that takes hidden states, with the LM head inside.

    from fastpo.integrations.torchtitan import PolicyLoss
    loss = PolicyLoss.Config(preset="dapo", clip_high=0.28)      # in a config of experiments/rl

It is a `ChunkedLossWrapper`, so that the trainer skips the model's head and hands it over
(`set_lm_head`); instead of chunks of logits and a loss on each, one `linear_policy_loss`. FSDP2:
the head is gathered here, its gradient reduced at the end of the backward. Tensor parallelism: a
head sharded along V. Sequence-level presets raise: torchtitan passes no sequence boundaries.
Metrics are those of torchtitan's DAPO loss. A log-ratio is bounded by 20, where torchtitan's is by
10; tokens whose generator log-prob is not finite are dropped, as there.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastpo.integrations._tokens import summed_preset
from fastpo.objective import MAX_LOG_RATIO, Objective
from fastpo.ops.linear import linear_policy_loss


def __getattr__(name: str) -> Any:
    if name == "PolicyLoss":
        return _loss_class()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


@functools.cache
def _loss_class() -> type:
    from torchtitan.components.loss import BaseLoss, ChunkedLossWrapper

    class PolicyLoss(ChunkedLossWrapper):
        @dataclass(kw_only=True, slots=True)
        class Config(BaseLoss.Config):
            preset: str = "dapo"
            """One of fastpo's presets, token level."""
            clip_low: float | None = None
            """The ratio is clipped at 1 - clip_low; None = the preset's."""
            clip_high: float | None = None
            """The ratio is clipped at 1 + clip_high; None = the preset's."""

        def __init__(self, config: Any, *, compile_config: Any = None) -> None:
            self.objective = _objective(config)
            self.lm_head = None

        def __call__(
            self,
            pred: Tensor,
            labels: Tensor,
            global_valid_tokens: Tensor | float | None = None,
            *,
            generator_logprobs: Tensor,
            advantages: Tensor,
            loss_mask: Tensor,
        ) -> tuple[Tensor, dict[str, Tensor]]:
            total = 1 if global_valid_tokens is None else global_valid_tokens
            total = total.clamp(min=1) if isinstance(total, Tensor) else max(total, 1)
            mask = loss_mask & generator_logprobs.isfinite()
            with _gathered(self.lm_head) as head:
                result = linear_policy_loss(
                    _plain(pred),
                    **head,
                    tokens=labels,
                    advantages=advantages,
                    objective=self.objective,
                    mask=mask,
                    old_logprobs=generator_logprobs,
                    normalizer=total,
                )
            dropped = (loss_mask & ~mask).sum()
            difference = (result.logprobs - generator_logprobs).where(mask, 0)
            return result.loss, _metrics(self.objective, result, difference, mask, dropped, total)

    PolicyLoss.__qualname__ = "PolicyLoss"
    return PolicyLoss


def _objective(config: Any) -> Objective:
    """The preset with the config's clips, summed over tokens."""
    given = {"clip_low": config.clip_low, "clip_high": config.clip_high}
    given = {name: value for name, value in given.items() if value is not None}
    plain = summed_preset(config.preset)
    if given and (plain.surrogate == "cispo" or not plain.takes_clip_bounds):
        raise ValueError(
            f"{', '.join(given)} with preset {config.preset!r}, which does not clip the ratio at "
            "1 - clip_low and 1 + clip_high: leave them None"
        )
    objective = summed_preset(config.preset, **given)
    if not objective.is_token_level or objective.kl_coef:
        raise ValueError(
            f"preset {config.preset!r} needs sequences, which torchtitan does not pass: "
            "expected a token-level one, e.g. dapo"
        )
    return objective


@contextmanager
def _gathered(head: nn.Module | None) -> Iterator[dict[str, Any]]:
    """A head's local weight, bias and tensor-parallel group, for the length of a block."""
    if head is None:
        raise ValueError("the loss has no LM head yet: call set_lm_head first")
    sharded = hasattr(head, "unshard")  # FSDP2; its root's backward reduces what is unsharded
    if sharded:
        head.unshard()
    bias = getattr(head, "bias", None)
    weight, group = _shard(head.weight)
    bias = None if bias is None else _shard(bias)[0]
    yield {"weight": weight, "bias": bias, "tp_group": group}
    if sharded and not torch.is_grad_enabled():
        head.reshard()


def _shard(parameter: Tensor) -> tuple[Tensor, Any]:
    """This rank's rows of a parameter, and the group over which there are more."""
    from torch.distributed.tensor import DTensor, Shard

    if not isinstance(parameter, DTensor):
        return parameter, None
    if parameter.device_mesh.ndim != 1 or not isinstance(parameter.placements[0], Shard):
        return _plain(parameter), None
    if parameter.placements[0].dim != 0:
        raise ValueError(f"the head is sharded as {parameter.placements}, expected (Shard(0),)")
    return parameter.to_local(), parameter.device_mesh.get_group()


def _plain(values: Tensor) -> Tensor:
    """A replicated DTensor's own copy, whose gradient is whole on every rank."""
    from torch.distributed.tensor import DTensor, Replicate

    if not isinstance(values, DTensor):
        return values
    if any(not isinstance(placement, Replicate) for placement in values.placements):
        raise ValueError(f"got a tensor placed as {values.placements}, expected it replicated")
    return values.to_local(grad_placements=values.placements)


def _metrics(
    objective: Objective,
    result: Any,
    difference: Tensor,
    mask: Tensor,
    dropped: Tensor,
    total: Tensor | float,
) -> dict[str, Tensor]:
    """torchtitan's names; sums over its denominator, so that ranks add up."""
    ratio = difference.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    low, high = objective.bounds
    moved = ((ratio < low - 1e-6) | (ratio > high + 1e-6)) & mask
    return {
        "loss/mean": result.loss.detach(),
        "loss/ratio_mean": result.metrics["ratio"] / total,
        "loss/ratio_clipped_frac": moved.sum() / total,
        "loss/generator_logprob_nan_frac": dropped / total,
        "bit_wise/logprob_diff/mean": difference.sum() / total,
        "bit_wise/ratio_tokens_different/mean": ((difference.abs() > 1e-6) & mask).sum() / total,
        "bit_wise/logprob_diff/max": difference.abs().max(),
        "trainer/entropy/mean": result.metrics["entropy"] / total,
    }
