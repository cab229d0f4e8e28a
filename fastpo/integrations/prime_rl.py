"""prime-rl: its RL loss by fastpo, from the config alone, and its fused LM head.

    [trainer.loss]
    type = "custom"
    import_path = "fastpo.integrations.prime_rl.policy_loss"
    kwargs = { preset = "dapo", clip_high = 0.3 }          # any field of fastpo.Objective

    from fastpo.integrations import prime_rl
    prime_rl.install_head()                                # before the model is set up

prime-rl hands over one sequence at a time and divides the sum of all losses itself. So the loss is
a sum over the sequence's tokens, whatever the preset's own aggregation; `aggregation` raises.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastpo.integrations._tokens import summed_preset
from fastpo.ops.from_logprobs import policy_loss_from_logprobs
from fastpo.ops.linear import linear_token_logprobs


def policy_loss(inputs: Any, preset: str = "ppo", **fields: Any) -> Any:
    """prime-rl's `LossInputs` of one sequence -> its `LossOutputs`, metrics per token.

    Args:
        preset: one of `fastpo.presets`; fields: what it takes in place of its defaults.

    Raises:
        ValueError: an unknown preset, an aggregation, an entropy bonus (prime-rl has no entropy
            here), a KL penalty without reference, or loss weights beside a penalty.
    """
    from prime_rl.trainer.rl.loss import LossOutputs

    if "aggregation" in fields:
        raise ValueError("aggregation is given, but prime-rl divides the sum over tokens itself")
    objective = summed_preset(preset, **fields)
    weights = inputs.loss_weights
    if weights is not None and (objective.acts_without_advantage or preset in ("gmpo", "vespo")):
        raise ValueError(
            f"loss_weights with preset {preset!r}: they would weigh its advantage alone, expected "
            "an objective without penalties and with a loss proportional to the advantage"
        )
    result = policy_loss_from_logprobs(
        inputs.trainer_logprobs[None],
        inputs.advantages[None],
        objective=objective,
        mask=inputs.loss_mask[None],
        old_logprobs=inputs.inference_logprobs[None],
        ref_logprobs=inputs.ref_logprobs[None] if objective.kl_coef else None,
        importance_weights=None if weights is None else weights[None],
        normalizer=1,
    )
    count = result.metrics["tokens"].clamp(min=1)
    means = {name: x / count for name, x in result.metrics.items() if name != "tokens"}
    return LossOutputs(loss=result.loss, metrics=means)


def install_head() -> None:
    """Let prime-rl's fused head be `linear_token_logprobs`; Gemma's own one stays."""
    from prime_rl.trainer.models.layers import lm_head

    if lm_head.FusedOutputLinear.__module__ != __name__:
        lm_head.FusedOutputLinear = output_linear(lm_head.FusedOutputLinear)


def output_linear(original: type) -> type:
    """prime-rl's head with a temperature per token, and its sampling masks as kept sets."""

    class FusedOutputLinear(original):
        def forward(
            self,
            hidden_states: Tensor,
            labels: Tensor | None = None,
            temperature: Tensor | None = None,
            sampling_mask: Tensor | None = None,
        ) -> dict[str, Tensor]:
            if labels is None or temperature is None:  # prime-rl's cross-entropy
                return super().forward(hidden_states, labels, temperature, sampling_mask)
            if sampling_mask is not None and getattr(self, "return_mask_logprobs", False):
                raise ValueError("return_mask_logprobs (score centering) is not in fastpo's head")
            call = {"temperature": temperature, "chunk_tokens": self.chunk_size}
            kept = {} if sampling_mask is None else _kept(sampling_mask, labels)
            scored = linear_token_logprobs(hidden_states, self.weight, labels, **call, **kept)
            if not kept:
                return {"logprobs": scored.logprobs, "entropy": scored.entropy}
            with torch.no_grad():  # prime-rl's entropy, which it logs, is the whole vocabulary's
                whole = linear_token_logprobs(hidden_states, self.weight, labels, **call)
            return {"logprobs": scored.logprobs, "entropy": whole.entropy}

    return FusedOutputLinear


def _kept(sampling_mask: Tensor, labels: Tensor) -> dict[str, Tensor | int]:
    """Of ids [B, S, K], padded with -1. A label outside of its set: the whole vocabulary.

    On a GPU both selecting and counting wait for it; the count keeps the others out of the GEMMs.
    """
    ids, wanted = sampling_mask.flatten(0, 1), labels.reshape(-1, 1)
    kept = (ids >= 0) & (ids == wanted).any(-1, keepdim=True)
    offsets = torch.nn.functional.pad(kept.sum(-1).cumsum(0), (1, 0))
    dense_rows = int((offsets.diff() == 0).sum())
    return {"kept_tokens": ids[kept], "kept_offsets": offsets, "dense_rows": dense_rows}
