"""`policy_loss_from_logprobs`: the loss alone, in plain torch on [N] numbers."""

from __future__ import annotations

import torch
from torch import Tensor

from fastpo.objective import Objective
from fastpo.ops import _checks
from fastpo.ops._batch import LossBatch
from fastpo.ops.results import PolicyLoss


def policy_loss_from_logprobs(
    logprobs: Tensor,
    advantages: Tensor,
    *,
    objective: Objective,
    entropy: Tensor | None = None,
    mask: Tensor | None = None,
    old_logprobs: Tensor | None = None,
    ref_logprobs: Tensor | None = None,
    importance_weights: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    normalizer: Tensor | float | None = None,
) -> PolicyLoss:
    """Policy loss from log-probs the caller already has: the specification of the fused ops.

    Args:
        logprobs: [N] or [B, T] floating, nats; differentiable. bf16 and fp16 are computed in fp32.
        advantages: [...] per token, or [B] per sequence.
        objective: which loss; see `fastpo.Objective`.
        entropy: [...] entropies, nats, differentiable; required when `objective.entropy_coef != 0`.
        mask: [...] bool, the tokens that count; None = all.
        old_logprobs: [...] of the policy that sampled; None = strictly on-policy.
        ref_logprobs: [...] of the reference policy; required exactly when `objective.kl_coef != 0`.
        importance_weights: [...] or [B] rollout-mismatch weights, without gradient.
        cu_seqlens: (B + 1,) int32 offsets of the sequences of a packed [N] batch.
        normalizer: global token count (token_mean) or sequence count (other aggregations).

    Raises:
        ValueError, TypeError: see the message: what was got, what is expected, what to do.
    """
    if not isinstance(logprobs, Tensor):
        raise TypeError(f"logprobs is {type(logprobs).__name__}, expected a tensor [N] or [B, T]")
    _checks.check_floating("logprobs", logprobs)
    if logprobs.ndim not in (1, 2):
        raise ValueError(f"logprobs has shape {list(logprobs.shape)}, expected [N] or [B, T]")
    if entropy is not None:
        _checks.check_tensor("entropy", entropy, logprobs.shape, logprobs)
        _checks.check_floating("entropy", entropy)
    batch = LossBatch.make(
        objective=objective,
        leading=logprobs.shape,
        like=logprobs,
        advantages=advantages,
        mask=mask,
        old_logprobs=old_logprobs,
        ref_logprobs=ref_logprobs,
        importance_weights=importance_weights,
        cu_seqlens=cu_seqlens,
        normalizer=normalizer,
    )
    return loss_of_batch(batch, logprobs, entropy)


def loss_of_batch(batch: LossBatch, logprobs: Tensor, entropy: Tensor | None) -> PolicyLoss:
    """The weighted sum over tokens of the specification's loss, minus the entropy bonus."""
    flat, flat_entropy = _rows(batch, logprobs), _rows(batch, entropy)
    terms = batch.token_loss(flat)
    loss = (batch.weight * terms.loss).sum()
    if batch.entropy_weight is not None:
        if flat_entropy is None:
            raise ValueError(
                "objective.entropy_coef != 0 needs `entropy`, the entropy of every token"
            )
        loss = loss - (batch.entropy_weight * flat_entropy).sum()
    flat = flat.detach()
    flat_entropy = None if flat_entropy is None else flat_entropy.detach()
    return PolicyLoss(
        loss,
        flat.view(batch.leading),
        None if flat_entropy is None else flat_entropy.view(batch.leading),
        batch.metrics(flat, flat_entropy, terms),
    )


def _rows(batch: LossBatch, values: Tensor | None) -> Tensor | None:
    """[...] -> (N,) in the accumulation dtype, 0 under a False mask whatever stands there."""
    if values is None:
        return None
    flat = values.reshape(-1).to(batch.weight.dtype)
    return flat if batch.mask is None else torch.where(batch.mask, flat, 0.0)
