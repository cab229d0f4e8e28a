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

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from fastpo import backends
from fastpo.objective import Objective
from fastpo.ops import checks
from fastpo.ops.batch import LossBatch, flat_mask, flat_rows, flat_temperature
from fastpo.ops.from_logprobs import loss_of_batch
from fastpo.ops.kept import Kept, check_kept, kept_logprobs
from fastpo.ops.logits_autograd import FusedPolicyLoss, LogitsTokenLogprobs, primitives
from fastpo.ops.loss_checks import LossInputs, check_loss
from fastpo.ops.results import PolicyLoss, TokenLogprobs, TokenStatistics
from fastpo.ops.tensor_parallel import VocabularyShard
from fastpo.rule import LossRule, as_objective


def policy_loss(
    logits: Tensor,
    tokens: Tensor,
    advantages: Tensor,
    *,
    objective: Objective | LossRule,
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
    tp_group: ProcessGroup | None = None,
    cp_group: ProcessGroup | None = None,
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
        tp_group: process group over which the logits are sharded along V in rank order, in parts of
            any size: [..., V / ranks] here, everything else alike on all ranks. All of them get the
            same loss, and the gradient of their own columns.
        cp_group: process group over which the tokens of every sequence are split (context
            parallelism). Sequence i is the same one on all ranks, of which each passes its own
            tokens, if any, and numbers per sequence as [B, 1] beside cu_seqlens, else [B]. Loss and
            metrics are this rank's share, and so are gradients of weights: they add up to those of
            the whole sequences. Every rank must call, and run the backward pass, as often.
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
    per_token = (advantages, mask, old_logprobs, ref_logprobs, importance_weights)
    per_call = (cu_seqlens, normalizer, clip_bounds, nll_weights, cp_group)
    given = LossInputs(objective, *per_token, *per_call)
    checks.check_logits_op(logits, tokens, mask, temperature, inplace=inplace)
    leading = logits.shape[:-1]
    check_loss(given, leading, logits)
    backend, vocabulary = _backend(backend, logits, tp_group)
    checks.check_token_range(tokens, vocabulary, mask)
    check_kept(kept_tokens, kept_offsets, tokens, mask, vocabulary, inplace=inplace)
    batch = LossBatch.from_inputs(given, leading, logits)
    through = {"leading": leading, "backend": primitives(backend)}
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
    tp_group: ProcessGroup | None = None,
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
        tp_group, backend, kept_tokens, kept_offsets: as in `policy_loss`.
        statistics: "log_sum_sq_probs", "mean_logits", "is_top1", any of them, from the same launch
            and without gradient: a `TokenStatistics` comes back. Not with kept_tokens or tp_group.

    Raises:
        ValueError, TypeError: see the message: what was got, what is expected, what to do.
    """
    inplace = inplace or inplace_backward
    checks.check_logits_op(logits, tokens, mask, temperature, inplace=inplace)
    backend, vocabulary = _backend(backend, logits, tp_group)
    checks.check_token_range(tokens, vocabulary, mask)
    check_kept(kept_tokens, kept_offsets, tokens, mask, vocabulary, inplace=inplace)
    checks.check_statistics(statistics)
    if statistics and not (kept_tokens is None and tp_group is None):
        what = "tp_group" if kept_tokens is None else "kept_tokens"
        raise ValueError(f"statistics with {what}: they are of whole rows, ask for one of both")
    if statistics and backend not in backends.WITH_DETAILS:
        raise ValueError(
            f"statistics with backend {backend!r}, which has none but log-probs and entropies: "
            f"expected one of {', '.join(backends.WITH_DETAILS)} or None"
        )
    leading = logits.shape[:-1]
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


def _backend(
    name: str | None, logits: Tensor, tp_group: ProcessGroup | None
) -> tuple[str | VocabularyShard, int | Tensor]:
    """The backend, of this rank's columns if there are others, and the size of the vocabulary."""
    checks.check_group("tp_group", tp_group, "logits are sharded along V")
    name = backends.resolve(name, logits.device, logits.dtype)
    if tp_group is None:
        return name, logits.shape[-1]
    shard = VocabularyShard.of_logits(backends.load(name), tp_group, logits)
    return shard, shard.vocabulary


def _kept_rows(
    logits: Tensor,
    tokens: Tensor,
    mask: Tensor | None,
    temperature: float | Tensor,
    backend: str | VocabularyShard,
    kept: Kept,
) -> tuple[Tensor, Tensor]:
    """Log-probs and entropies (N,): over the kept ids, or the whole vocabulary in dense rows."""
    shard = backend if isinstance(backend, VocabularyShard) else None
    outputs = kept_logprobs(logits, tokens, kept.sets, temperature, mask, shard)
    if kept.dense is None:
        return outputs
    rows = (tokens, kept.dense, temperature, backend, False)
    whole = LogitsTokenLogprobs.apply(logits, *rows)
    return tuple(torch.where(kept.dense, x, y) for x, y in zip(whole, outputs, strict=True))
