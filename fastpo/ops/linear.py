"""Ops on hidden states and the LM head: `linear_policy_loss` and `linear_token_logprobs`."""

from __future__ import annotations

import torch
from torch import Tensor

from fastpo import backends
from fastpo.objective import Objective, TokenLoss
from fastpo.ops import _checks
from fastpo.ops._batch import LossBatch
from fastpo.ops._linear_call import LinearCall
from fastpo.ops._linear_fused import FusedLinearLoss
from fastpo.ops._linear_recompute import LinearTokenLogprobs
from fastpo.ops._rows import flat_temperature
from fastpo.ops.from_logprobs import loss_of_batch
from fastpo.ops.results import PolicyLoss, TokenLogprobs


def linear_policy_loss(
    hidden: Tensor,
    weight: Tensor,
    tokens: Tensor,
    advantages: Tensor,
    *,
    bias: Tensor | None = None,
    objective: Objective,
    mask: Tensor | None = None,
    old_logprobs: Tensor | None = None,
    ref_logprobs: Tensor | None = None,
    importance_weights: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    cu_seqlens: Tensor | None = None,
    normalizer: Tensor | float | None = None,
    backend: str | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    logits_dtype: torch.dtype | None = None,
    chunk_tokens: int | None = None,
    tp_group=None,
    live_rows: int | Tensor | None = None,
) -> PolicyLoss:
    """Policy loss from hidden states and the LM head; no [N, V] tensor is ever made."""
    hidden, weight, bias = _operands(hidden, weight, bias)
    leading = hidden.shape[:-1]
    batch = LossBatch.make(
        objective=objective,
        leading=leading,
        like=hidden,
        advantages=advantages,
        mask=mask,
        old_logprobs=old_logprobs,
        ref_logprobs=ref_logprobs,
        importance_weights=importance_weights,
        cu_seqlens=cu_seqlens,
        normalizer=normalizer,
    )
    call = _call(
        hidden,
        weight,
        tokens,
        mask,
        temperature,
        backend,
        logit_scale,
        softcap,
        logits_dtype,
        chunk_tokens,
        live_rows,
    )
    flat = hidden.reshape(-1, hidden.shape[-1])
    if not objective.is_token_level:
        logprobs, entropy = LinearTokenLogprobs.apply(flat, weight, bias, call)
        return loss_of_batch(batch, logprobs.view(leading), entropy.view(leading))
    needs = tuple(
        torch.is_grad_enabled() and x is not None and x.requires_grad for x in (flat, weight, bias)
    )
    loss, logprobs, entropy, clipped = FusedLinearLoss.apply(
        flat, weight, bias, call, batch.row_inputs(), objective, needs
    )
    with torch.no_grad():
        terms = batch.token_loss(logprobs)
    metrics = batch.metrics(
        logprobs, entropy, TokenLoss(terms.loss, terms.ratio, terms.kl, clipped)
    )
    return PolicyLoss(loss, logprobs.view(leading), entropy.view(leading), metrics)


def linear_token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    tokens: Tensor,
    *,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    logits_dtype: torch.dtype | None = None,
    chunk_tokens: int | None = None,
    tp_group=None,
    backend: str | None = None,
    live_rows: int | Tensor | None = None,
) -> TokenLogprobs:
    """Log-prob and entropy of every token from hidden states, both differentiable."""
    hidden, weight, bias = _operands(hidden, weight, bias)
    leading = hidden.shape[:-1]
    _checks.check_mask(mask, leading, hidden)
    call = _call(
        hidden,
        weight,
        tokens,
        mask,
        temperature,
        backend,
        logit_scale,
        softcap,
        logits_dtype,
        chunk_tokens,
        live_rows,
    )
    flat = hidden.reshape(-1, hidden.shape[-1])
    logprobs, entropy = LinearTokenLogprobs.apply(flat, weight, bias, call)
    return TokenLogprobs(logprobs.view(leading), entropy.view(leading))


def _operands(hidden, weight, bias):
    _checks.check_matrix("hidden", hidden, "D")
    _checks.check_matrix("weight", weight, "D")
    return hidden, weight, bias


def _call(
    hidden,
    weight,
    tokens,
    mask,
    temperature,
    backend,
    logit_scale,
    softcap,
    logits_dtype,
    chunk_tokens,
    live_rows,
):
    leading = hidden.shape[:-1]
    _checks.check_tokens(tokens, leading, weight.shape[0], mask, hidden)
    _checks.check_temperature(temperature, leading, mask, hidden)
    wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    dtype = logits_dtype or wide
    return LinearCall(
        tokens=tokens.reshape(-1).long(),
        temperature=flat_temperature(temperature),
        logit_scale=logit_scale,
        softcap=softcap,
        logits_dtype=dtype,
        chunk_tokens=chunk_tokens,
        backend=backends.load(backends.resolve(backend, hidden.device, dtype)),
        live=None if mask is None else mask.reshape(-1),
        live_count=None,
        compacts=hidden.device.type == "cpu",
    )
