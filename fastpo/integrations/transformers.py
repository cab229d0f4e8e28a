"""Hugging Face transformers: from a causal LM and token ids to the policy loss, without logits.

    result = causal_lm_policy_loss(
        model, input_ids, advantages, completion_mask=mask, objective=fastpo.dapo()
    )
    result.loss.backward()

Under FSDP2 call it inside the wrapped model's forward, where the head's weight is gathered.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from fastpo.ops.linear import linear_policy_loss
from fastpo.ops.results import PolicyLoss


def lm_head(model: nn.Module) -> dict[str, Any]:
    """`weight`, `bias`, `logit_scale` and `softcap` of a causal LM, as the linear ops take them.

    Reads what families put after the product: a final softcap (Gemma), a factor (Cohere, Falcon-H1,
    HyperCLOVA X), a divisor (Granite, MiniCPM3).
    """
    head = model.get_output_embeddings()
    if head is None:
        raise ValueError(f"{type(model).__name__} has no LM head: expected a causal language model")
    config = model.config.get_text_config()
    return {
        "weight": head.weight,
        "bias": getattr(head, "bias", None),
        "logit_scale": _logit_scale(config),
        "softcap": getattr(config, "final_logit_softcapping", None),
    }


def _logit_scale(config: Any) -> float:
    for name in ("logit_scale", "output_multiplier", "lm_head_multiplier"):
        factor = getattr(config, name, None)
        if factor is not None:
            return float(factor)
    divisor = getattr(config, "logits_scaling", None)
    if divisor is None:
        return 1.0
    return float(divisor) if config.model_type == "hyperclovax" else 1.0 / divisor


def causal_lm_policy_loss(
    model: nn.Module,
    input_ids: Tensor,
    advantages: Tensor,
    *,
    completion_mask: Tensor,
    attention_mask: Tensor | None = None,
    model_inputs: dict[str, Any] | None = None,
    **options: Any,
) -> PolicyLoss:
    """`fastpo.linear_policy_loss` on a causal LM: position t scores token t + 1.

    Args:
        model: a transformers causal LM; its trunk is `model.base_model`.
        input_ids: [B, T] prompts and completions.
        advantages: [B] per sequence, or [B, T - 1] per predicted token.
        completion_mask: [B, T] bool, the tokens that were sampled and count; its first column,
            which nothing predicts, is ignored.
        attention_mask: [B, T] for the model, if there is padding on the left.
        model_inputs: further keyword arguments of the trunk.
        options: keywords of `linear_policy_loss` (objective, old_logprobs, ...); per-token ones
            have shape [B, T - 1], that of `input_ids[:, 1:]`.

    Returns:
        PolicyLoss over [B, T - 1].
    """
    outputs = model.base_model(
        input_ids=input_ids, attention_mask=attention_mask, use_cache=False, **(model_inputs or {})
    )
    return linear_policy_loss(
        outputs.last_hidden_state[:, :-1],
        tokens=input_ids[:, 1:],
        advantages=advantages,
        mask=completion_mask[:, 1:],
        **lm_head(model),
        **options,
    )
