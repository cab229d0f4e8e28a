"""Ops on logits: `policy_loss` and `token_logprobs`. Validate, flatten, call the row primitives."""

from __future__ import annotations

import torch
from torch import Tensor

from fastpo import backends
from fastpo.backends.base import RowInputs, RowLosses, RowStats
from fastpo.objective import Objective, TokenLoss
from fastpo.ops import _checks
from fastpo.ops._batch import LossBatch
from fastpo.ops._rows import (
    Temperature,
    concatenate,
    flat_temperature,
    matching_views,
    row_views,
    slices,
)
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
    1 is multiplied in on device. Sequence-level ones, and everything under torch.compile, read the
    logits once more in the backward pass. Equal to `token_logprobs` followed by
    `policy_loss_from_logprobs` for every objective and option.

    Args:
        logits: [N, V] or [B, T, V] fp32, bf16 or fp16 (fp64 on the torch backend), unit stride in
        V.
            `logits[i]` scores `tokens[i]`: nothing is shifted here.
        tokens: [...] int64 or int32 sampled ids.
        advantages: [...] per token, or [B] per sequence.
        objective: which loss; see `fastpo.Objective` and the presets.
        mask: [...] bool, the tokens that count; None = all. Masked rows are never read.
        old_logprobs: [...] of the policy that sampled; None = strictly on-policy (the ratio is 1
        and
            keeps its gradient).
        ref_logprobs: [...] of the reference policy; required exactly when `objective.kl_coef != 0`.
        importance_weights: [...] or [B] rollout-mismatch weights (TIS, MIS), without gradient.
        temperature: sampling temperature, a float or one per token [...]; log-probs are those of
            softmax(logits / temperature), and the gradient carries 1 / temperature.
        cu_seqlens: (B + 1,) int32 offsets of the sequences of a packed [N] batch.
        normalizer: global token count (token_mean) or sequence count (other aggregations), for
            gradient accumulation and data parallelism; None = this batch's own.
        inplace: the gradient overwrites the logits: no extra memory of their size. A second
        backward
            raises.
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
    temperature = flat_temperature(temperature)
    needs_grad = torch.is_grad_enabled() and logits.requires_grad
    if not objective.is_token_level or torch.compiler.is_compiling():
        inplace = (
            inplace and not torch.compiler.is_compiling()
        )  # the compiler reuses buffers itself
        logprobs, entropy = _TokenLogprobs.apply(
            logits, tokens.reshape(-1).long(), batch.mask, temperature, backend, inplace
        )
        return loss_of_batch(batch, logprobs.view(leading), entropy.view(leading))
    call = _FusedCall(
        tokens.reshape(-1).long(), batch.row_inputs(), objective, temperature, backend
    )
    loss, logprobs, entropy, clipped = _FusedPolicyLoss.apply(logits, call, needs_grad, inplace)
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
        logits: [N, V] or [B, T, V] fp32, bf16 or fp16 (fp64 on the torch backend), unit stride in
        V. tokens: [...] int64 or int32; `logits[i]` scores `tokens[i]`.
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
    live = None if mask is None else mask.reshape(-1)
    inplace_backward = inplace_backward and not torch.compiler.is_compiling()
    logprobs, entropy = _TokenLogprobs.apply(
        logits,
        tokens.reshape(-1).long(),
        live,
        flat_temperature(temperature),
        backend,
        inplace_backward,
    )
    return TokenLogprobs(logprobs.view(leading), entropy.view(leading))


def _prepare(logits, tokens, mask, temperature, inplace: bool, backend: str | None) -> str:
    """Check what both ops take and choose the backend."""
    leading = logits.shape[:-1]
    _checks.check_tokens(tokens, leading, logits.shape[-1], mask, logits)
    _checks.check_temperature(temperature, leading, mask, logits)
    if inplace and any(
        stride == 0 and size > 1 for stride, size in zip(logits.stride(), logits.shape, strict=True)
    ):
        raise ValueError(
            "inplace on expanded logits would write one row's gradient over another's: clone them"
        )
    return backends.resolve(backend, logits.device, logits.dtype)


class _FusedCall:
    """One fused loss call on rows: what the forward pass needs, kept for a second backward."""

    def __init__(
        self,
        tokens: Tensor,
        inputs: RowInputs,
        objective: Objective,
        temperature: Temperature,
        backend: str,
    ):
        self.tokens, self.inputs, self.objective = tokens, inputs, objective
        self.temperature, self.backend = temperature, backend

    def run(self, logits: Tensor, grad: Tensor | None) -> RowLosses:
        """Losses of all rows; the gradient goes to `grad`, of the shape of `logits`."""
        views = row_views(logits)
        grads = [None] * len(views) if grad is None else matching_views(grad, views)
        cuts = slices(views)
        return concatenate(
            [
                backends.load(self.backend).row_policy_loss(
                    view,
                    self.tokens[cut],
                    RowInputs(*(None if x is None else x[cut] for x in self.inputs)),
                    self.objective,
                    self.temperature[cut]
                    if isinstance(self.temperature, Tensor)
                    else self.temperature,
                    out,
                )
                for view, cut, out in zip(views, cuts, grads, strict=True)
            ]
        )


class _FusedPolicyLoss(torch.autograd.Function):
    """Gradient in forward. The first backward hands its buffer over; another recomputes it."""

    @staticmethod
    def forward(ctx, logits: Tensor, call: _FusedCall, needs_grad: bool, inplace: bool):
        grad = None
        if needs_grad:
            grad = logits.detach() if inplace else torch.empty_like(logits)
        rows = call.run(logits.detach(), grad)
        ctx.grad, ctx.call, ctx.inplace = grad, call, inplace
        if inplace and grad is not None:
            # Whoever saved these logits for its own backward (a softcap's tanh) must hear of it.
            torch.autograd.graph.increment_version(logits)
        elif needs_grad:
            ctx.save_for_backward(logits)
        ctx.mark_non_differentiable(rows.logprobs, rows.entropy, rows.clipped)
        return rows.loss.sum(), rows.logprobs, rows.entropy, rows.clipped

    @staticmethod
    def backward(ctx, loss_grad: Tensor, *_):
        grad, ctx.grad = ctx.grad, None
        if grad is None:
            if ctx.inplace:
                raise RuntimeError(
                    "backward through an inplace policy_loss a second time: its gradient buffer "
                    "was the logits "
                    "themselves and is gone; pass inplace=False to keep the graph"
                )
            (logits,) = ctx.saved_tensors
            grad = torch.empty_like(logits)
            ctx.call.run(logits.detach(), grad)
        for view in row_views(grad):
            backends.load(ctx.call.backend).scale_(view, loss_grad)
        return grad, None, None, None


class _TokenLogprobs(torch.autograd.Function):
    """`row_stats` forward, `row_grad` backward."""

    @staticmethod
    def forward(ctx, logits, tokens, live, temperature, backend, inplace):
        module = backends.load(backend)
        views = row_views(logits.detach())
        cuts = slices(views)
        stats = concatenate(
            [
                module.row_stats(
                    view,
                    tokens[cut],
                    temperature[cut] if isinstance(temperature, Tensor) else temperature,
                    None if live is None else live[cut],
                )
                for view, cut in zip(views, cuts, strict=True)
            ]
        )
        ctx.set_materialize_grads(False)
        per_token = temperature if isinstance(temperature, Tensor) else None
        ctx.save_for_backward(logits, tokens, live, per_token, *stats)
        ctx.temperature, ctx.backend, ctx.inplace = temperature, backend, inplace
        return stats.logprobs, stats.entropy

    @staticmethod
    def backward(ctx, logprob_grad, entropy_grad):
        if logprob_grad is None and entropy_grad is None:
            return (None,) * 6
        if ctx.inplace:
            _refuse_second_backward(ctx)
        logits, tokens, live, per_token, *stats = ctx.saved_tensors
        stats = RowStats(*stats)
        logprob_grad = _row_grads(logprob_grad, stats.logprobs, live)
        entropy_grad = (
            None if entropy_grad is None else _row_grads(entropy_grad, stats.logprobs, live)
        )
        grad = logits.detach() if ctx.inplace else torch.empty_like(logits)
        views = row_views(logits.detach())
        for view, out, cut in zip(views, matching_views(grad, views), slices(views), strict=True):
            backends.load(ctx.backend).row_grad(
                view,
                tokens[cut],
                RowStats(*(x[cut] for x in stats)),
                logprob_grad[cut],
                None if entropy_grad is None else entropy_grad[cut],
                ctx.temperature if per_token is None else per_token[cut],
                out,
            )
        if ctx.inplace:
            torch.autograd.graph.increment_version(logits)
        return grad, None, None, None, None, None


def _refuse_second_backward(ctx) -> None:
    if getattr(ctx, "consumed", False):
        raise RuntimeError(
            "backward through token_logprobs(inplace_backward=True) a second time: the first one "
            "overwrote the "
            "logits; pass inplace_backward=False to keep the graph"
        )
    ctx.consumed = True


def _row_grads(grad: Tensor | None, like: Tensor, live: Tensor | None) -> Tensor:
    """An incoming gradient as contiguous rows, exactly 0 on dead ones."""
    if grad is None:
        return torch.zeros_like(like)
    grad = grad.to(like.dtype).contiguous()
    return grad if live is None else torch.where(live, grad, 0.0)
