"""Ops on logits: `policy_loss` and `token_logprobs`. Validate, flatten, call the row primitives."""

from __future__ import annotations

import torch
from torch import Tensor

from fastpo import backends
from fastpo.objective import Objective, TokenLoss
from fastpo.ops import _checks
from fastpo.ops._batch import LossBatch
from fastpo.ops._logits_fused import FusedCall, FusedPolicyLoss
from fastpo.ops._logits_two_step import LogitsTokenLogprobs
from fastpo.ops._rows import flat_rows, flat_temperature
from fastpo.ops.from_logprobs import loss_of_batch
from fastpo.ops.results import PolicyLoss, TokenLogprobs


def policy_loss(
    logits: Tensor,
    tokens: Tensor,
    advantages: Tensor,
    *,
    objective: Objective,
    mask: Tensor | None = None,
    old_logprobs: Tensor | None = None,
    ref_logprobs: Tensor | None = None,
    importance_weights: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    cu_seqlens: Tensor | None = None,
    normalizer: Tensor | float | None = None,
    inplace: bool = False,
    backend: str | None = None,
) -> PolicyLoss:
    """Policy loss from logits, with its gradient, in one read and one write of the logits.

    Token-level objectives compute the gradient in the forward pass; an upstream gradient other than
    1 is multiplied in on device. Sequence-level ones, fp16 logits, and everything under
    torch.compile, read the logits once more in the backward pass. Equal to `token_logprobs`
    followed by `policy_loss_from_logprobs` for every objective and option.

    Args:
        logits: [N, V] or [B, T, V] fp32, bf16 or fp16 (fp64 on the torch backend), unit stride
            along V. `logits[i]` scores `tokens[i]`: nothing is shifted here.
        tokens: [...] int64 or int32 sampled ids.
        advantages: [...] per token, or [B] per sequence.
        objective: which loss; see `fastpo.Objective` and the presets.
        mask: [...] bool, the tokens that count; None = all. Masked rows are never read.
        old_logprobs: [...] of the policy that sampled; None = strictly on-policy (the ratio is 1
            and keeps its gradient).
        ref_logprobs: [...] of the reference policy; required exactly when `objective.kl_coef != 0`.
        importance_weights: [...] or [B] rollout-mismatch weights (TIS, MIS), without gradient.
        temperature: sampling temperature, a float or one per token [...]; log-probs are those of
            softmax(logits / temperature), and the gradient carries 1 / temperature.
        cu_seqlens: (B + 1,) int32 offsets of the sequences of a packed [N] batch.
        normalizer: global token count (token_mean) or sequence count (other aggregations), for
            gradient accumulation and data parallelism; None = this batch's own.
        inplace: the gradient overwrites the logits: no extra memory of their size. A second
            backward raises.
        backend: "torch", "cpp" or "triton"; None = the best available. An explicit request never
            falls back.

    Raises:
        ValueError, TypeError: see the message: what was got, what is expected, what to do.
    """
    _checks.check_matrix("logits", logits, "V")
    leading = logits.shape[:-1]
    batch = LossBatch.make(
        objective=objective,
        leading=leading,
        like=logits,
        advantages=advantages,
        mask=mask,
        old_logprobs=old_logprobs,
        ref_logprobs=ref_logprobs,
        importance_weights=importance_weights,
        cu_seqlens=cu_seqlens,
        normalizer=normalizer,
    )
    backend = _prepare(logits, tokens, mask, temperature, inplace, backend)
    temperature = flat_temperature(temperature, logits)
    needs_grad = torch.is_grad_enabled() and logits.requires_grad
    tokens = flat_rows(tokens).long()
    compiling = torch.compiler.is_compiling()
    # An fp16 gradient, about p / N, underflows before a loss scale is multiplied in.
    needs_loss_scale = needs_grad and logits.dtype == torch.float16
    if not objective.is_token_level or needs_loss_scale or compiling:
        # The compiler reuses buffers itself. The fused path would gain nothing under it: a gradient
        # saved in the forward graph is copied before the backward graph may scale it.
        logprobs, entropy = LogitsTokenLogprobs.apply(
            logits, tokens, batch.mask, temperature, backend, inplace and not compiling
        )
        return loss_of_batch(batch, logprobs.view(leading), entropy.view(leading))
    call = FusedCall(tokens, batch.row_inputs(), objective, temperature, backend)
    loss, logprobs, entropy, clipped = FusedPolicyLoss.apply(logits, call, needs_grad, inplace)
    with torch.no_grad():
        terms = batch.token_loss(logprobs)
    metrics = batch.metrics(
        logprobs, entropy, TokenLoss(terms.loss, terms.ratio, terms.kl, clipped)
    )
    return PolicyLoss(loss, logprobs.view(leading), entropy.view(leading), metrics)


def token_logprobs(
    logits: Tensor,
    tokens: Tensor,
    *,
    mask: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    inplace_backward: bool = False,
    backend: str | None = None,
) -> TokenLogprobs:
    """Log-prob and entropy of every token, both differentiable: the base of any loss you write.

    One read of the logits forward, one read and one write backward, nothing of their size in
    between.

    Args:
        logits: [N, V] or [B, T, V] fp32, bf16 or fp16 (fp64 on the torch backend), unit stride
            along V.
        tokens: [...] int64 or int32; `logits[i]` scores `tokens[i]`.
        mask: [...] bool; masked rows are never read, their outputs and gradients are 0.
        temperature: a float or one per token [...].
        inplace_backward: the gradient overwrites the logits; a second backward raises.
        backend: as in `policy_loss`.

    Raises:
        ValueError, TypeError: see the message: what was got, what is expected, what to do.
    """
    _checks.check_matrix("logits", logits, "V")
    leading = logits.shape[:-1]
    _checks.check_mask(mask, leading, logits)
    backend = _prepare(logits, tokens, mask, temperature, inplace_backward, backend)
    live = flat_rows(mask)
    inplace_backward = inplace_backward and not torch.compiler.is_compiling()
    logprobs, entropy = LogitsTokenLogprobs.apply(
        logits,
        flat_rows(tokens).long(),
        live,
        flat_temperature(temperature, logits),
        backend,
        inplace_backward,
    )
    return TokenLogprobs(logprobs.view(leading), entropy.view(leading))


def _prepare(logits, tokens, mask, temperature, inplace: bool, backend: str | None) -> str:
    """Check what both ops take and choose the backend."""
    leading = logits.shape[:-1]
    _checks.check_tokens(tokens, leading, logits.shape[-1], mask, logits)
    _checks.check_temperature(temperature, leading, mask, logits)
    if inplace and _overlaps(logits):
        raise ValueError(
            "inplace on expanded or overlapping logits would write one row's gradient over "
            "another's: clone them"
        )
    return backends.resolve(backend, logits.device, logits.dtype)


def _overlaps(tensor: Tensor) -> bool:
    """Whether elements of `tensor` may share memory, as those of an expanded view do."""
    last = 0  # the last element, in memory, of the dimensions so far
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1 and stride <= last:
            return True
        last += stride * (size - 1)
    return False
