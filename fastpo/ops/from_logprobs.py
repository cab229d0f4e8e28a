"""`policy_loss_from_logprobs`: the loss alone, in plain torch on [N] numbers."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from fastpo.objective import Objective
from fastpo.ops import checks
from fastpo.ops.batch import LossBatch
from fastpo.ops.loss_checks import LossInputs, check_loss
from fastpo.ops.results import PolicyLoss
from fastpo.rule import LossRule, as_objective


def policy_loss_from_logprobs(
    logprobs: Tensor,
    advantages: Tensor,
    *,
    objective: Objective | LossRule,
    entropy: Tensor | None = None,
    mask: Tensor | None = None,
    old_logprobs: Tensor | None = None,
    ref_logprobs: Tensor | None = None,
    importance_weights: Tensor | None = None,
    clip_bounds: tuple[Tensor, Tensor] | None = None,
    nll_weights: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    normalizer: Tensor | float | None = None,
    cp_group: ProcessGroup | None = None,
) -> PolicyLoss:
    """Policy loss from log-probs the caller already has: the specification of the fused ops.

    Args:
        logprobs: [N] or [B, T] floating, nats; differentiable. bf16 and fp16 are computed in fp32.
        advantages: [...] per token, or [B] (or [B, 1]) per sequence.
        objective: which loss; see `fastpo.Objective`; or a callable, see `fastpo.loss_rule`.
        entropy: [...] entropies, nats, differentiable; required when `objective.entropy_coef != 0`.
        mask: [...] bool or 0/1 integers, the tokens that count; None = all.
        old_logprobs: [...] of the policy that sampled; None = strictly on-policy.
        ref_logprobs: [...] of the reference policy; required exactly when `objective.kl_coef != 0`.
        importance_weights: [...] or [B] rollout-mismatch weights, without gradient.
        clip_bounds: (low, high), each [...]: bounds on r per token in place of the objective's,
            for objectives that clip r or gate by it (DCPO, RIPO).
        nll_weights: [...] weight of an SFT term beside the policy loss: -nll_weight * logprob per
            token, under the same mask and aggregation (VAPO).
        cu_seqlens: (B + 1,) int32 offsets of the sequences of a packed [N] batch.
        normalizer: global token count (token_mean) or sequence count (other aggregations).
        cp_group: process group over which the tokens of every sequence are split; see
            `policy_loss`.

    Raises:
        ValueError, TypeError: see the message: what was got, what is expected, what to do.
    """
    objective = as_objective(objective)
    per_token = (advantages, mask, old_logprobs, ref_logprobs, importance_weights)
    per_call = (cu_seqlens, normalizer, clip_bounds, nll_weights, cp_group)
    given = LossInputs(objective, *per_token, *per_call)
    _check_logprobs(logprobs, entropy)
    check_loss(given, logprobs.shape, logprobs)
    if objective.entropy_coef != 0 and entropy is None:
        raise ValueError("objective.entropy_coef != 0 needs `entropy`, the entropy of every token")
    batch = LossBatch.from_inputs(given, logprobs.shape, logprobs)
    rows = [_masked_rows(x, batch) for x in (logprobs, entropy)]
    return loss_of_batch(batch, *rows, leading=logprobs.shape)


def _check_logprobs(logprobs: object, entropy: object) -> None:
    if not isinstance(logprobs, Tensor):
        raise TypeError(f"logprobs is {type(logprobs).__name__}, expected a tensor [N] or [B, T]")
    checks.check_floating("logprobs", logprobs)
    if logprobs.ndim not in (1, 2):
        raise ValueError(f"logprobs has shape {list(logprobs.shape)}, expected [N] or [B, T]")
    if entropy is not None:
        checks.check_tensor("entropy", entropy, logprobs.shape, logprobs)
        checks.check_floating("entropy", entropy)


def _masked_rows(values: Tensor | None, batch: LossBatch) -> Tensor | None:
    """[...] -> (N,) in the accumulation dtype, 0 under a False mask whatever stands there."""
    if values is None:
        return None
    rows = values.reshape(-1).to(batch.weight.dtype)
    return rows if batch.mask is None else torch.where(batch.mask, rows, 0.0)


def loss_of_batch(
    batch: LossBatch,
    logprobs: Tensor,
    entropy: Tensor | None,
    *,
    leading: torch.Size,
    backend: object = None,
) -> PolicyLoss:
    """The weighted sum over tokens of the specification's loss, minus the entropy bonus.

    logprobs and entropy are (N,), 0 under a False mask; `leading` is the shape of the result, and
    `backend` that of the rows, if they went through one.
    """
    terms = batch.token_loss(logprobs, entropy)
    loss = (batch.weight * terms.loss).sum()
    if batch.entropy_weight is not None:
        loss = loss - (batch.entropy_weight * entropy).sum()
    # Copies: the backward pass, or the caller, still needs the numbers that came in.
    logprobs = logprobs.detach().clone()
    entropy = None if entropy is None else entropy.detach().clone()
    whole = {"ratio": terms.ratio, "ref_kl": terms.kl}
    metrics = batch.metrics(logprobs, entropy, terms.clipped, backend=backend, **whole)
    return PolicyLoss(
        loss,
        logprobs.view(leading),
        None if entropy is None else entropy.view(leading),
        metrics,
    )
