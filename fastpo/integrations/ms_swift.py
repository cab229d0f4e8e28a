"""ms-swift 4: the log-probs of its GRPO trainer from the model's own forward, without logits.

    from fastpo.integrations import ms_swift as fastpo_swift
    fastpo_swift.install()             # in a file that --external_plugins names, on every rank

The trainer's one local forward is replaced; what it makes of the log-probs and entropies stays
ms-swift's own: every loss_type, all importance-sampling levels, rollout correction, teachers,
masks, metrics. Sequence parallelism keeps ms-swift's own scoring, and use_liger_kernel its own
loss. A multimodal template that embeds the prompt itself hands over no input_ids, and raises.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastpo.integrations._request import Request
from fastpo.integrations.transformers import attach


def install() -> None:
    """Put the function into ms-swift's GRPO trainer; twice changes nothing."""
    from swift.rlhf_trainers.grpo_trainer import GRPOTrainer

    GRPOTrainer._get_logps_via_local_forward = logps_via_local_forward


def logps_via_local_forward(
    trainer: Any,
    model: Any,
    model_inputs: dict[str, Any],
    logits_to_keep: int,
    input_ids: Tensor,
    compute_entropy: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Log-probs and entropies [B, C] of the last C = `logits_to_keep` ids, 0 where padded.

    A padding-free batch is one row, whose ids cross sequences: ms-swift masks those.
    """
    inputs, keys = dict(model_inputs), trainer.model_kwarg_keys
    if "logits_to_keep" in keys:
        inputs["logits_to_keep"] = logits_to_keep + 1
    if "position_ids" in keys:
        inputs.setdefault("position_ids", None)  # as ms-swift's call: the model's, padding counted
    length = input_ids.shape[1]
    mask = torch.arange(length, device=input_ids.device) >= length - logits_to_keep
    mask = mask.expand(input_ids.shape)
    padding = inputs.get("attention_mask")
    if isinstance(padding, Tensor) and padding.shape == input_ids.shape:
        mask = mask & (padding != 0)
    request = Request(completion_mask=mask, temperature=trainer.temperature)
    scored = attach(model)(**inputs, token_logprobs=request)
    entropy = scored.entropy[:, -logits_to_keep:] if compute_entropy else None
    return scored.logprobs[:, -logits_to_keep:], entropy
