"""Ops on logits: `policy_loss` and `token_logprobs`. Check, flatten to rows, call the primitives.

policy_loss     token-level objective: `row_policy_loss` makes the gradient in the forward pass,
                one read and one write of the logits (`FusedPolicyLoss`)
                sequence-level objective, fp16 logits, torch.compile: as below, then the loss of
                `fastpo.ops.from_logprobs`
token_logprobs  `row_stats` forward, `row_grad` backward (`LogitsTokenLogprobs`)
kept_tokens     the logits of these ids alone, gathered, in plain torch; dense rows as above
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import Tensor

from fastpo import backends
from fastpo.backends.base import RowInputs, RowLosses, RowStats
from fastpo.objective import Objective
from fastpo.ops import checks
from fastpo.ops.autograd import first_order, row_grads, save, saved
from fastpo.ops.batch import LossBatch, flat_mask, flat_rows, flat_temperature, of_rows
from fastpo.ops.checks import LossInputs
from fastpo.ops.from_logprobs import loss_of_batch
from fastpo.ops.kept import Kept, check_kept, kept_logprobs
from fastpo.ops.results import PolicyLoss, TokenLogprobs, TokenStatistics
from fastpo.rule import Rule, as_objective

_Rows = TypeVar("_Rows", bound=tuple)


def policy_loss(
    logits: Tensor,
    tokens: Tensor,
    advantages: Tensor,
    *,
    objective: Objective | Rule,
    mask: Tensor | None = None,
    old_logprobs: Tensor | None = None,
    ref_logprobs: Tensor | None = None,
    importance_weights: Tensor | None = None,
    clip_bounds: tuple[Tensor, Tensor] | None = None,
    nll_weights: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    cu_seqlens: Tensor | None = None,
    normalizer: Tensor | float | None = None,
    inplace: bool = False,
    backend: str | None = None,
    kept_tokens: Tensor | None = None,
    kept_offsets: Tensor | None = None,
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
        advantages: [...] per token, or [B] (or [B, 1]) per sequence.
        objective: which loss; see `fastpo.Objective` and the presets; or a callable of your own,
            `rule(logprobs, entropy, tokens) -> loss` per token, see `fastpo.loss_rule`.
        mask: [...] bool or 0/1 integers, the tokens that count; None = all. Masked rows are never
            read.
        old_logprobs: [...] of the policy that sampled; None = strictly on-policy (the ratio is 1
            and keeps its gradient).
        ref_logprobs: [...] of the reference policy; required exactly when `objective.kl_coef != 0`.
        importance_weights: [...] or [B] rollout-mismatch weights (TIS, MIS), without gradient.
        clip_bounds: (low, high), each [...]: bounds on r per token in place of the objective's,
            for objectives that clip r or gate by it (DCPO, RIPO).
        nll_weights: [...] weight of an SFT term beside the policy loss: -nll_weight * logprob per
            token, under the same mask and aggregation (VAPO).
        temperature: sampling temperature, a float or one per token [...]; log-probs are those of
            softmax(logits / temperature), and the gradient carries 1 / temperature.
        cu_seqlens: (B + 1,) int32 offsets of the sequences of a packed [N] batch.
        normalizer: global token count (token_mean) or sequence count (other aggregations), for
            gradient accumulation and data parallelism; None = this batch's own.
        inplace: the gradient overwrites the logits: no extra memory of their size. A second
            backward raises.
        backend: "torch", "cpp" or "triton"; None = the best available. An explicit request never
            falls back.
        kept_tokens: [M] int64 or int32: the ids that each token was sampled from (top-k, top-p);
            log-probs, entropies and gradients are those of the softmax over them. Not with inplace.
        kept_offsets: [N + 1] int64 or int32, rows in flattened order: row i has
            kept_tokens[kept_offsets[i] : kept_offsets[i + 1]]; none = the whole vocabulary.

    Raises:
        ValueError, TypeError: see the message: what was got, what is expected, what to do.
    """
    objective = as_objective(objective)
    given = LossInputs(
        objective,
        advantages,
        mask,
        old_logprobs,
        ref_logprobs,
        importance_weights,
        cu_seqlens,
        normalizer,
        clip_bounds,
        nll_weights,
    )
    checks.check_logits_op(logits, tokens, mask, temperature, inplace=inplace)
    leading = logits.shape[:-1]
    checks.check_loss(given, leading, logits)
    check_kept(kept_tokens, kept_offsets, tokens, mask, logits.shape[-1], inplace=inplace)
    backend = backends.resolve(backend, logits.device, logits.dtype)
    batch = LossBatch.from_inputs(given, leading, logits)
    through = {"leading": leading, "backend": backends.load(backend)}
    tokens, temperature = flat_rows(tokens, torch.int64), flat_temperature(temperature, logits)
    kept = Kept.from_inputs(kept_tokens, kept_offsets, batch.mask)
    if kept is not None:
        rows = (tokens, batch.mask, temperature, backend)
        return loss_of_batch(batch, *_kept_rows(logits, *rows, kept), **through)
    needs_grad = torch.is_grad_enabled() and logits.requires_grad
    compiling = torch.compiler.is_compiling()
    # An fp16 gradient, about p / N, underflows before a loss scale is multiplied in.
    needs_loss_scale = needs_grad and logits.dtype == torch.float16
    if not objective.is_token_level or needs_loss_scale or compiling:
        # The compiler reuses buffers itself. The fused path would gain nothing under it: a gradient
        # saved in the forward graph is copied before the backward graph may scale it.
        logprobs, entropy = LogitsTokenLogprobs.apply(
            logits, tokens, batch.mask, temperature, backend, inplace and not compiling
        )
        return loss_of_batch(batch, logprobs, entropy, **through)
    settings = (objective, temperature, backend, needs_grad, inplace)
    loss, logprobs, entropy, clipped = FusedPolicyLoss.apply(
        logits, tokens, batch.row_inputs(), *settings
    )
    metrics = batch.metrics(logprobs, entropy, clipped, backend=through["backend"])
    return PolicyLoss(loss, logprobs.view(leading), entropy.view(leading), metrics)


def token_logprobs(
    logits: Tensor,
    tokens: Tensor,
    *,
    mask: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    inplace: bool = False,
    inplace_backward: bool = False,
    backend: str | None = None,
    kept_tokens: Tensor | None = None,
    kept_offsets: Tensor | None = None,
    statistics: Sequence[str] = (),
) -> TokenLogprobs | TokenStatistics:
    """Log-prob and entropy of every token, both differentiable: the base of any loss you write.

    One read of the logits forward, one read and one write backward, nothing of their size in
    between.

    Args:
        logits: [N, V] or [B, T, V] fp32, bf16 or fp16 (fp64 on the torch backend), unit stride
            along V.
        tokens: [...] int64 or int32; `logits[i]` scores `tokens[i]`.
        mask: [...] bool or 0/1 integers; masked rows are never read, their outputs and gradients
            are 0.
        temperature: a float or one per token [...].
        inplace: the gradient overwrites the logits; a second backward raises.
        inplace_backward: another name of `inplace`.
        backend: as in `policy_loss`.
        kept_tokens, kept_offsets: as in `policy_loss`.
        statistics: "log_sum_sq_probs", "mean_logits", "is_top1", any of them, from the same launch
            and without gradient: a `TokenStatistics` comes back. Not with kept_tokens.

    Raises:
        ValueError, TypeError: see the message: what was got, what is expected, what to do.
    """
    inplace = inplace or inplace_backward
    checks.check_logits_op(logits, tokens, mask, temperature, inplace=inplace)
    check_kept(kept_tokens, kept_offsets, tokens, mask, logits.shape[-1], inplace=inplace)
    checks.check_statistics(statistics)
    if statistics and kept_tokens is not None:
        raise ValueError("statistics with kept_tokens: they are of whole rows, ask for one of both")
    leading = logits.shape[:-1]
    backend = backends.resolve(backend, logits.device, logits.dtype)
    tokens, mask = flat_rows(tokens, torch.int64), flat_mask(mask)
    temperature = flat_temperature(temperature, logits)
    kept = Kept.from_inputs(kept_tokens, kept_offsets, mask)
    if kept is not None:
        logprobs, entropy = _kept_rows(logits, tokens, mask, temperature, backend, kept)
        return TokenLogprobs(logprobs.view(leading), entropy.view(leading))
    outputs = LogitsTokenLogprobs.apply(
        logits,
        tokens,
        mask,
        temperature,
        backend,
        inplace and not torch.compiler.is_compiling(),
        bool(statistics),
    )
    return TokenStatistics.from_rows(outputs, statistics, leading)


def _kept_rows(
    logits: Tensor,
    tokens: Tensor,
    mask: Tensor | None,
    temperature: float | Tensor,
    backend: str,
    kept: Kept,
) -> tuple[Tensor, Tensor]:
    """Log-probs and entropies (N,): over the kept ids, or the whole vocabulary in dense rows."""
    outputs = kept_logprobs(logits, tokens, kept.sets, temperature, mask)
    if kept.dense is None:
        return outputs
    rows = (tokens, kept.dense, temperature, backend, False)
    whole = LogitsTokenLogprobs.apply(logits, *rows)
    return tuple(torch.where(kept.dense, x, y) for x, y in zip(whole, outputs, strict=True))


class FusedPolicyLoss(torch.autograd.Function):
    """Gradient in forward. The first backward hands its buffer over; another recomputes it."""

    @staticmethod
    def forward(
        ctx,
        logits: Tensor,
        tokens: Tensor,
        inputs: RowInputs,
        objective: Objective | Rule,
        temperature: float | Tensor,
        backend: str,
        needs_grad: bool,
        inplace: bool,
    ):
        grad = None
        if needs_grad:
            grad = logits.detach() if inplace else torch.empty_like(logits)
        rows = _row_losses(logits, tokens, inputs, objective, temperature, backend, grad)
        ctx.grad, ctx.backend, ctx.inplace = grad, backend, inplace
        if needs_grad and not inplace:
            per_row = temperature if isinstance(temperature, Tensor) else None
            save(ctx, logits, tokens, per_row, *inputs)
            ctx.objective, ctx.temperature = objective, temperature
        ctx.mark_non_differentiable(rows.logprobs, rows.entropy, rows.clipped)
        ctx.set_materialize_grads(False)
        return rows.loss.sum(), rows.logprobs, rows.entropy, rows.clipped

    @staticmethod
    @first_order
    def backward(ctx, loss_grad: Tensor | None, *_):
        if loss_grad is None:
            return (None,) * 8
        grad, ctx.grad = ctx.grad, None
        if grad is None:
            if ctx.inplace:
                raise RuntimeError(
                    "backward through an inplace policy_loss a second time: its gradient buffer "
                    "was the logits themselves and is gone; pass inplace=False to keep the graph"
                )
            logits, tokens, per_row, *inputs = saved(ctx)
            temperature = ctx.temperature if per_row is None else per_row
            grad = torch.empty_like(logits)
            settings = (ctx.objective, temperature, ctx.backend)
            _row_losses(logits, tokens, RowInputs(*inputs), *settings, grad)
        for view in row_views(grad):
            backends.load(ctx.backend).scale_(view, loss_grad)
        return grad, *(None,) * 7


def _row_losses(
    logits: Tensor,
    tokens: Tensor,
    inputs: RowInputs,
    objective: Objective | Rule,
    temperature: float | Tensor,
    backend: str,
    grad: Tensor | None,
) -> RowLosses:
    """`row_policy_loss` over all rows; the gradient goes to `grad`, of the shape of `logits`."""
    views = row_views(logits.detach())
    outs = [None] * len(views) if grad is None else matching_views(grad, views)
    parts = []
    for view, out, cut in zip(views, outs, slices(views), strict=True):
        own = RowInputs(*(of_rows(x, cut) for x in inputs))
        row_policy_loss = backends.load(backend).row_policy_loss
        parts.append(
            row_policy_loss(view, tokens[cut], own, objective, of_rows(temperature, cut), out)
        )
    return concatenate(parts)


class LogitsTokenLogprobs(torch.autograd.Function):
    """`row_stats` forward, `row_grad` backward."""

    @staticmethod
    def forward(
        ctx,
        logits: Tensor,
        tokens: Tensor,
        mask: Tensor | None,
        temperature: float | Tensor,
        backend: str,
        inplace: bool,
        with_details: bool = False,
    ):
        rows = backends.load(backend)
        sweep = rows.row_details if with_details else rows.row_stats
        views = row_views(logits.detach())
        parts = [
            sweep(view, tokens[cut], of_rows(temperature, cut), of_rows(mask, cut))
            for view, cut in zip(views, slices(views), strict=True)
        ]
        details = ()
        if with_details:
            parts, more = zip(*parts, strict=True)
            details = concatenate(list(more))
            ctx.mark_non_differentiable(*details)
        stats = concatenate(list(parts))
        ctx.set_materialize_grads(False)
        per_row = temperature if isinstance(temperature, Tensor) else None
        save(ctx, logits, tokens, mask, per_row, *stats)
        ctx.temperature, ctx.backend, ctx.inplace = temperature, backend, inplace
        # Copies: whoever edits a returned log-prob must not edit what the backward pass reads.
        return stats.logprobs.clone(), stats.entropy.clone(), *details

    @staticmethod
    @first_order
    def backward(ctx, logprob_grad: Tensor | None, entropy_grad: Tensor | None, *_):
        if logprob_grad is None and entropy_grad is None:
            return (None,) * 7
        if ctx.inplace:
            _refuse_second_backward(ctx)
        logits, tokens, mask, per_row, *stats = saved(ctx)
        stats = RowStats(*stats)
        temperature = ctx.temperature if per_row is None else per_row
        dtype = stats.logprobs.dtype
        logprob_grad = row_grads(logprob_grad, mask, dtype)
        if logprob_grad is None:
            logprob_grad = torch.zeros_like(stats.logprobs)
        entropy_grad = row_grads(entropy_grad, mask, dtype)
        grad = logits.detach() if ctx.inplace else torch.empty_like(logits)
        views = row_views(logits.detach())
        for view, out, cut in zip(views, matching_views(grad, views), slices(views), strict=True):
            backends.load(ctx.backend).row_grad(
                view,
                tokens[cut],
                RowStats(*(x[cut] for x in stats)),
                logprob_grad[cut],
                of_rows(entropy_grad, cut),
                of_rows(temperature, cut),
                out,
            )
        return grad, *(None,) * 6


def _refuse_second_backward(ctx) -> None:
    if getattr(ctx, "consumed", False):
        raise RuntimeError(
            "backward through an inplace loss a second time: the first one overwrote the logits "
            "with their gradient; pass inplace=False to keep the graph"
        )
    ctx.consumed = True


def row_views(matrix: Tensor) -> list[Tensor]:
    """(n, V) views that cover a [N, V] or [B, T, V] tensor in order, one where strides allow.

    `logits[:, :-1]`, the usual shift, cannot merge its batch and time dimensions: it becomes one
    view per sequence instead of a copy of the logits.
    """
    if matrix.ndim == 2:
        return [matrix]
    batch, width, vocabulary = matrix.shape
    if batch <= 1 or width == 1 or matrix.stride(0) == width * matrix.stride(1):
        return [matrix.flatten(0, 1)] if batch else [matrix.reshape(0, vocabulary)]
    return list(matrix.unbind(0))


def matching_views(grad: Tensor, views: list[Tensor]) -> list[Tensor]:
    """Views of `grad`, which is contiguous or the viewed tensor itself, cut as `views` are."""
    own = row_views(grad)
    if len(own) == len(views):
        return own
    return [grad.flatten(0, 1)[cut] for cut in slices(views)]


def slices(views: list[Tensor]) -> list[slice]:
    """Where the rows of each view stand among all rows."""
    cuts, start = [], 0
    for view in views:
        cuts.append(slice(start, start + view.shape[0]))
        start += view.shape[0]
    return cuts


def concatenate(parts: list[_Rows]) -> _Rows:
    """Join named tuples of (n,) tensors along the rows."""
    if len(parts) == 1:
        return parts[0]
    return type(parts[0])(*(torch.cat(columns) for columns in zip(*parts, strict=True)))
