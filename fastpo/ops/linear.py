"""Ops on hidden states and the LM head: `linear_policy_loss` and `linear_token_logprobs`.

With N tokens, width D and vocabulary V, the head's logits are N x V numbers, the largest tensor of
a training step. Here they exist for one chunk of tokens at a time. Which way a call goes, and why:

    call                              way                                  N D V code
    loss, token-level objective       c depends on the row alone: the       6    TokenLevelLoss
                                      gradient is made while its chunk of
                                      logits exists
    loss, a rule in plain torch       the same, by statistics, autograd on  6    RuleLoss
                                      a number per token, and gradient
    loss, sequence-level objective,   c depends on the sequence: chunks of  6    SequenceLevelLoss
    every sequence fits a chunk and   whole sequences, statistics, then
    the host knows where they end     the gradient, the logits still there
    loss, sequence-level, else        c is known when the logits are gone:  8    LinearTokenLogprobs
                                      backward computes them again               and loss_of_batch
    log-probs                         any loss may follow                   8    LinearTokenLogprobs
    rows with kept_tokens             a few dot products each, no GEMM      0    LinearKeptLogprobs
                                                                                 and loss_of_batch
    dense rows beside them            as without                            6/8  KeptLoss besides

The first three are `FusedLinearLoss`. A frozen head or trunk saves its GEMM; without any gradient
one GEMM is left. `tp_group` changes none of this: `VocabularyShard` is a backend.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from fastpo import backends
from fastpo._compile import untraced
from fastpo.objective import Objective
from fastpo.ops import checks
from fastpo.ops.batch import LossBatch, flat_mask, flat_rows, flat_temperature
from fastpo.ops.from_logprobs import loss_of_batch
from fastpo.ops.kept import Kept, check_kept
from fastpo.ops.linear_autograd import (
    ChunkLoss,
    FusedLinearLoss,
    LinearTokenLogprobs,
    RuleLoss,
    TokenLevelLoss,
)
from fastpo.ops.linear_checks import (
    LinearOptions,
    autocasts,
    check_exponentials,
    check_kept_options,
    check_linear_op,
    operand_dtype,
)
from fastpo.ops.linear_chunks import LinearCall, unmasked_rows
from fastpo.ops.linear_exp import ExpShard, ExpTokenLogprobs, FusedExpLoss, count_redone
from fastpo.ops.linear_kept import KeptCall, KeptLoss, LinearKeptLogprobs
from fastpo.ops.linear_sequences import SequenceLevelLoss
from fastpo.ops.loss_checks import LossInputs, check_loss
from fastpo.ops.results import PolicyLoss, TokenLogprobs, TokenStatistics
from fastpo.ops.tensor_parallel import VocabularyShard
from fastpo.rule import LossRule, as_objective

_untraced = untraced("its loop over chunks runs GEMMs and one kernel each: nothing to compile")


@_untraced
def linear_policy_loss(
    hidden: Tensor,
    weight: Tensor,
    tokens: Tensor,
    advantages: Tensor,
    *,
    bias: Tensor | None = None,
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
    backend: str | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    logits_dtype: torch.dtype | None = None,
    chunk_tokens: int | None = None,
    tp_group: ProcessGroup | None = None,
    cp_group: ProcessGroup | None = None,
    live_rows: int | None = None,
    kept_tokens: Tensor | None = None,
    kept_offsets: Tensor | None = None,
    dense_rows: int | None = None,
    add_weight_grad_to: Tensor | None = None,
) -> PolicyLoss:
    """Policy loss from hidden states and the LM head; no [N, V] tensor is ever made.

        logits = softcap * tanh(logit_scale * (hidden @ weight.T + bias) / softcap)

    The gradient is made in the forward pass: three GEMMs, 6 N D V operations (4 with a frozen head;
    2 when nothing requires a gradient), and one backward only: a second one raises. Sequence-level
    objectives do so where every sequence fits a chunk; where one does not, or its length is known
    on a GPU alone (cu_seqlens), the backward computes the logits again, 8 N D V. Equal to
    `linear_token_logprobs` followed by `policy_loss_from_logprobs` for every objective and option.

    On CPU, masked tokens never enter a GEMM, and tokens with A = 0 (without KL penalty and entropy
    bonus) never enter a gradient GEMM. On GPU that takes `live_rows`, since counting them on device
    would wait for it; without it masked rows are computed and dropped.

    On CPU, log-probs and the hidden states' gradient do not depend on the chunking, bit for bit;
    the weight's gradient is a sum over chunks in fp32. On CUDA cuBLAS chooses a kernel by the shape
    of a chunk, and so may change the last bits of its logits; and a chunk is at most 1/8 of the
    free memory, which under 10 GB makes its size, and those bits, differ from run to run: give
    `chunk_tokens` where runs must be bit-equal. Put gradient-accumulation factors into
    `normalizer`, which is free, rather than on the loss, which rounds a bf16 gradient twice.

    Args:
        hidden: [N, D] or [B, T, D] fp32, bf16 or fp16 (fp64 on the torch backend), unit stride in
            D; the last hidden states, after the final norm. `hidden[i]` predicts `tokens[i]`:
            nothing is shifted here.
        weight: [V, D] of the same dtype; a LoRA adapter's effective weight; tied embeddings too.
        tokens: [...] int64 or int32 sampled ids.
        advantages: [...] per token, or [B] (or [B, 1]) per sequence.
        bias: [V], or None.
        objective: which loss; see `fastpo.Objective` and the presets; or a callable of your own,
            `rule(logprobs, entropy, tokens) -> loss` per token, see `fastpo.loss_rule`.
        mask: [...] bool or 0/1 integers, the tokens that count; None = all. NaN in masked rows
            changes nothing.
        old_logprobs: [...] of the policy that sampled; None = strictly on-policy (the ratio is 1
            and keeps its gradient).
        ref_logprobs: [...] of the reference policy; required exactly when `objective.kl_coef != 0`.
        importance_weights: [...] or [B] rollout-mismatch weights (TIS, MIS), without gradient.
        clip_bounds: (low, high), each [...]: bounds on r per token in place of the objective's,
            for objectives that clip r or gate by it (DCPO, RIPO).
        nll_weights: [...] weight of an SFT term beside the policy loss: -nll_weight * logprob per
            token, under the same mask and aggregation (VAPO).
        temperature: sampling temperature, a float or one per token [...].
        cu_seqlens: (B + 1,) int32 offsets of the sequences of a packed [N] batch.
        normalizer: global token count (token_mean) or sequence count (other aggregations), for
            gradient accumulation and data parallelism; None = this batch's own.
        backend: "torch", "cpp" or "triton"; None = the best available. An explicit request never
            falls back. "triton-exp", for bf16 operands on GPUs from compute capability 8.0: the
            first GEMM stores exponentials in place of logits, which no kernel then sweeps over
            (docs/exponentials.md); "triton-exp-kept" keeps them for the backward of
            `linear_token_logprobs`: 2 bytes times N V for 6 N D V in place of 8.
        logit_scale: factor on the logits (Cohere's logit_scale, 1 / Granite's logits_scaling).
        softcap: Gemma's final_logit_softcapping; None = none.
        logits_dtype: None = float32, which keeps the GEMM's fp32 sums; torch.bfloat16 (for bf16
            operands) rounds the logits: half the chunk's memory, about 1e-2 off in log-probs.
        chunk_tokens: tokens per chunk; None = from a byte budget (see `fastpo plan`).
        tp_group: process group over which `weight` (and `bias`) is sharded along V in rank order,
            in parts of any size. All ranks pass the same tokens and hidden states, and get the same
            loss, the whole gradient of the hidden states and their own shard's of the weight.
        cp_group: process group over which the tokens of every sequence are split; see
            `policy_loss`. Sequence-level objectives take 8 N D V then, as where no sequence fits.
        live_rows: the number of True in `mask`, which a trainer knows on the host when it builds
            the batch. A wrong one raises on CPU and gives NaN on GPU.
        kept_tokens: [M] int64 or int32: the ids that each token was sampled from (top-k, top-p), as
            vLLM and SGLang return them; log-probs, entropies and gradients are those of the softmax
            over them. Such rows never enter a GEMM.
        kept_offsets: [N + 1] int64 or int32, rows in flattened order: row i has
            kept_tokens[kept_offsets[i] : kept_offsets[i + 1]]; none = the whole vocabulary.
        dense_rows: how many tokens under the mask have no kept ids, 0 where all were sampled from a
            set. On GPU nobody knows without waiting for the device, and without it every row enters
            the GEMMs. A wrong one raises on CPU and gives NaN on GPU.
        add_weight_grad_to: [V, D], usually `weight.grad`: with kept sets, the backward adds the
            weight's gradient to this tensor, the rows of kept ids alone, and hands autograd none.
            For gradient accumulation: no zeros of [V, D] are written, nor added (at N 2048, D 576,
            V 49152 in fp32 on one CPU thread 23 ms for 41). Autograd sees nothing of it: hooks on
            `weight` get None, so not under DDP or FSDP; and every backward adds,
            `torch.autograd.grad` with respect to other tensors included.

    Raises:
        ValueError, TypeError: see the message: what was got, what is expected, what to do.
        RuntimeError: on a second backward through a gradient that the forward pass made.
    """
    options = LinearOptions(logit_scale, softcap, logits_dtype, chunk_tokens, tp_group, live_rows)
    objective = as_objective(objective)
    per_token = (advantages, mask, old_logprobs, ref_logprobs, importance_weights)
    per_call = (cu_seqlens, normalizer, clip_bounds, nll_weights, cp_group)
    given = LossInputs(objective, *per_token, *per_call)
    check_linear_op(hidden, weight, bias, tokens, mask, temperature, options)
    leading = hidden.shape[:-1]
    check_loss(given, leading, hidden)
    call = _linear_call(hidden, weight, tokens, mask, temperature, backend, options)
    kept = (kept_tokens, kept_offsets, dense_rows, add_weight_grad_to)
    kept = _kept_call(call, hidden, weight, tokens, mask, *kept)
    operands = _operands(hidden, weight, bias)
    batch = LossBatch.from_inputs(given, leading, hidden)
    beside = None
    if kept is not None and kept.dense is not None:
        operands = (operands[0].reshape(-1, hidden.shape[-1]), *operands[1:])
        beside = KeptLoss.of(kept, batch, operands[0], call.head(*operands[1:]))
        call = kept.dense
    none = kept is not None and kept.dense is None
    chunk_loss = None if none else _chunk_loss(batch, call, weight, beside)
    if chunk_loss is None:
        logprobs, entropy = _logprobs(*operands, call, kept)
        result = loss_of_batch(batch, logprobs, entropy, leading=leading, backend=call.backend)
        return count_redone(result) if call.exponentials else result
    needs = tuple(torch.is_grad_enabled() and x is not None and x.requires_grad for x in operands)
    arguments = (*operands, call, chunk_loss, needs)
    if call.exponentials:
        loss, logprobs, entropy, clipped = FusedExpLoss.apply(*arguments)
    else:
        loss, logprobs, entropy, clipped = FusedLinearLoss.apply(*arguments, beside)
    metrics = batch.metrics(
        logprobs, entropy, clipped, backend=call.backend, **_sequence_terms(batch, logprobs)
    )
    (loss,) = call.checked(loss)
    result = PolicyLoss(loss, logprobs.view(leading), entropy.view(leading), metrics)
    return count_redone(result) if call.exponentials else result


def _chunk_loss(
    batch: LossBatch, call: LinearCall, weight: Tensor, beside: KeptLoss | None
) -> ChunkLoss | None:
    """What finishes the loss chunk by chunk, or None where that takes the log-probs of all."""
    objective = batch.objective
    if objective.is_token_level:
        return TokenLevelLoss(inputs=batch.row_inputs(), objective=objective)
    if batch.rule is not None and not batch.rule.couples_sequences:
        return RuleLoss.from_batch(batch)
    chunk_loss = SequenceLevelLoss.from_batch(batch, call, weight)
    if chunk_loss is None or beside is None:
        return chunk_loss
    return replace(chunk_loss, others=(beside.stats.logprobs, beside.stats.entropy))


def _sequence_terms(batch: LossBatch, logprobs: Tensor) -> dict[str, Tensor | None]:
    """What the metrics of a sequence-level objective do not follow from a token's own numbers."""
    if batch.objective.is_token_level or batch.rule is not None:
        return {}
    with torch.no_grad():
        whole = batch.token_loss(logprobs)
    return {"ratio": whole.ratio, "ref_kl": whole.kl}


@_untraced
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
    tp_group: ProcessGroup | None = None,
    backend: str | None = None,
    live_rows: int | None = None,
    kept_tokens: Tensor | None = None,
    kept_offsets: Tensor | None = None,
    dense_rows: int | None = None,
    add_weight_grad_to: Tensor | None = None,
    statistics: Sequence[str] = (),
) -> TokenLogprobs | TokenStatistics:
    """Log-prob and entropy of every token from hidden states, both differentiable.

    The base of any loss you write. One GEMM forward, the same one and two more backward (8 N D V in
    all), four numbers per token kept in between. Arguments, and what enters the GEMMs, are as in
    `linear_policy_loss`; the gradients of rows whose incoming gradients are both 0 are skipped too.

    `statistics` names any of "log_sum_sq_probs", "mean_logits" and "is_top1": they come from the
    same logits, without gradient, in a `TokenStatistics`. Not with kept_tokens, nor with tp_group.

    Raises:
        ValueError, TypeError: see the message: what was got, what is expected, what to do.
    """
    options = LinearOptions(logit_scale, softcap, logits_dtype, chunk_tokens, tp_group, live_rows)
    check_linear_op(hidden, weight, bias, tokens, mask, temperature, options)
    leading = hidden.shape[:-1]
    call = _linear_call(hidden, weight, tokens, mask, temperature, backend, options)
    kept = (kept_tokens, kept_offsets, dense_rows, add_weight_grad_to)
    kept = _kept_call(call, hidden, weight, tokens, mask, *kept)
    _check_statistics(statistics, call, kept)
    outputs = _logprobs(*_operands(hidden, weight, bias), call, kept, bool(statistics))
    return TokenStatistics.from_rows(outputs, statistics, leading)


def _check_statistics(statistics: object, call: LinearCall, kept: KeptCall | None) -> None:
    checks.check_statistics(statistics)
    whole = kept is None and not call.exponentials and hasattr(call.backend, "row_details")
    if statistics and not whole:
        of = "tp_group" if isinstance(call.backend, VocabularyShard) else call.backend.__name__
        what = of if kept is None else "kept_tokens"
        raise ValueError(
            f"statistics with {what}: they are of whole rows of a whole head, expected one of the "
            "backends 'torch', 'cpp' and 'triton' with neither kept_tokens nor tp_group"
        )


def _logprobs(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    call: LinearCall,
    kept: KeptCall | None,
    with_details: bool = False,
) -> tuple[Tensor, ...]:
    """Log-probs and entropies (N,), differentiable; with details also those, which are not."""
    if with_details:
        outputs = LinearTokenLogprobs.apply(hidden, weight, bias, call, True)
    elif kept is None:
        score = ExpTokenLogprobs if call.exponentials else LinearTokenLogprobs
        outputs = score.apply(hidden, weight, bias, call)
    else:
        call, rows = kept.rows, hidden.reshape(-1, hidden.shape[-1])
        outputs = LinearKeptLogprobs.apply(rows, weight, bias, kept)
    return call.checked(*outputs)


def _kept_call(
    call: LinearCall,
    hidden: Tensor,
    weight: Tensor,
    tokens: Tensor,
    mask: Tensor | None,
    kept_tokens: Tensor | None,
    kept_offsets: Tensor | None,
    dense_rows: int | None,
    add_to: Tensor | None,
) -> KeptCall | None:
    """Checked, if the backend knows what to do with kept sets."""
    rows = call.backend
    sharded = isinstance(rows, VocabularyShard)
    vocabulary = rows.vocabulary if sharded else weight.shape[0]
    check_kept(kept_tokens, kept_offsets, tokens, mask, vocabulary)
    backend = rows.backend if sharded else rows
    if kept_tokens is not None and not hasattr(backend, "kept_stats"):
        raise ValueError(
            f"kept_tokens with {backend.__name__}, which has no gathered rows of a head: expected "
            "one of the backends 'torch', 'cpp' and 'triton'"
        )
    kept = Kept.from_inputs(kept_tokens, kept_offsets, call.mask)
    check_kept_options(dense_rows, add_to, kept, weight, operand_dtype(hidden))
    return None if kept is None else KeptCall.split(call, kept, dense_rows, add_to)


def _linear_call(
    hidden: Tensor,
    weight: Tensor,
    tokens: Tensor,
    mask: Tensor | None,
    temperature: float | Tensor,
    backend: str | None,
    options: LinearOptions,
) -> LinearCall:
    """What `check_linear_op` has checked, as rows."""
    exponentials = backend in backends.LINEAR_BACKENDS
    if exponentials:
        check_exponentials(backend, operand_dtype(hidden), options.logits_dtype)
    logits_dtype = options.logits_dtype or checks.wide_dtype(operand_dtype(hidden))
    rows = backends.load(backends.resolve(backend, hidden.device, logits_dtype, linear=True))
    if options.tp_group is not None:
        shard = ExpShard if exponentials else VocabularyShard
        rows = shard.of_head(rows, options.tp_group, weight)
        checks.check_token_range(tokens, rows.vocabulary, mask)
    mask = flat_mask(mask)
    index, wrong_count = unmasked_rows(mask, options.live_rows)
    return LinearCall(
        tokens=flat_rows(tokens, torch.int64),
        temperature=flat_temperature(temperature, hidden),
        logit_scale=float(options.logit_scale),
        softcap=None if options.softcap is None else float(options.softcap),
        logits_dtype=logits_dtype,
        chunk_tokens=options.chunk_tokens,
        backend=rows,
        mask=mask,
        index=index,
        wrong_count=wrong_count,
        exponentials=exponentials,
        keeps_exponentials=backend == "triton-exp-kept" and torch.is_grad_enabled(),
    )


def _operands(
    hidden: Tensor, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """In one dtype, autocast's where that is on; [B, T, D] as (N, D) where strides allow:
    `hidden[:, :-1]` stays as it is, without a copy."""
    if autocasts(hidden):
        dtype = operand_dtype(hidden)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    merges = hidden.ndim == 3 and (
        hidden.shape[0] <= 1 or hidden.stride(0) == hidden.shape[1] * hidden.stride(1)
    )
    return hidden.flatten(0, 1) if merges else hidden, weight, bias
