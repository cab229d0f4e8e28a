"""vime (vLLM's trainer): a provider of log-probs and entropies straight from the LM head.

    --linear-logp-provider fastpo.integrations.vime.provider

With a context (hidden states and projection) the logits are never read; without one, or where the
vocabulary is padded or a keep mask is given, the logits are scored in place of vime's own kernel,
with its numbers. The temperature belongs to the context: the logits are scaled already.
"""

from __future__ import annotations

from typing import Any

import torch

from fastpo.integrations.slime import calculate_log_probs_and_entropy
from fastpo.ops.linear import linear_token_logprobs

BACKEND = "fastpo"
CONTRACT = "fp32-statistics"


def provider(request: Any) -> dict[str, Any]:
    """vime's `LinearLogpRequest` -> the fields of its `LinearLogpResult`.

    Returns:
        logp [T, 1] fp32; entropy [T] fp32, None unless `with_entropy`, detached unless
        `with_entropy_grad`.
    """
    context = request.context
    padded = context is not None and (
        context.vocab_partition.real_size != context.vocab_partition.padded_size
    )
    if context is None or padded or request.log_prob_keep_mask is not None:
        logp, entropy = calculate_log_probs_and_entropy(
            request.logits,
            request.target_ids,
            request.tensor_parallel_group,
            with_entropy=request.with_entropy,
            log_prob_keep_mask=request.log_prob_keep_mask,
            with_entropy_grad=request.with_entropy_grad,
        )
    else:
        group = request.tensor_parallel_group
        scored = linear_token_logprobs(
            context.hidden,
            context.projection.weight,
            request.target_ids.to(torch.int64),
            bias=context.projection.bias,
            temperature=1.0 if request.temperature is None else request.temperature,
            tp_group=None if group is None or group.size() == 1 else group,
            chunk_tokens=request.chunk_size if request.chunk_size > 0 else None,
        )
        logp, entropy = scored.logprobs[:, None], scored.entropy if request.with_entropy else None
        if entropy is not None and not request.with_entropy_grad:
            entropy = entropy.detach()
    source = "logits" if context is None or padded else "hidden"
    return {
        "logp": logp,
        "entropy": entropy,
        "backend_id": BACKEND,
        "contract_id": CONTRACT,
        "provenance": {"source": "logits" if request.log_prob_keep_mask is not None else source},
    }
