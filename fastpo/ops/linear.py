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
                                      (dense rows beside them: 8)                and loss_of_batch

The first three are `FusedLinearLoss`. A frozen head or trunk saves its GEMM; without any gradient
one GEMM is left. `tp_group` changes none of this: `VocabularyShard` is a backend.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from fastpo import backends
from fastpo._compile import untraced
from fastpo.objective import Objective
from fastpo.ops import checks
from fastpo.ops.batch import LossBatch, flat_mask, flat_rows, flat_temperature
from fastpo.ops.checks import LossInputs
from fastpo.ops.from_logprobs import loss_of_batch
from fastpo.ops.kept import Kept, check_kept
from fastpo.ops.linear_autograd import (
    FusedLinearLoss,
    LinearTokenLogprobs,
    RuleLoss,
    TokenLevelLoss,
)
from fastpo.ops.linear_checks import (
    autocasts,
    check_exponentials,
    check_linear_op,
    operand_dtype,
)
from fastpo.ops.linear_chunks import LinearCall
from fastpo.ops.linear_exp import ExpShard, ExpTokenLogprobs, FusedExpLoss
from fastpo.ops.linear_kept import LinearKeptLogprobs
from fastpo.ops.linear_sequences import SequenceLevelLoss
from fastpo.ops.results import PolicyLoss, TokenLogprobs, TokenStatistics
from fastpo.ops.tensor_parallel import VocabularyShard
from fastpo.rule import LossRule, RuleObjective, as_objective

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
    live_rows: int | None = None,
    kept_tokens: Tensor | None = None,
    kept_offsets: Tensor | None = None,
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
        live_rows: the number of True in `mask`, which a trainer knows on the host when it builds
            the batch. A wrong one raises on CPU and gives NaN on GPU.
        kept_tokens: [M] int64 or int32: the ids that each token was sampled from (top-k, top-p), as
            vLLM and SGLang return them; log-probs, entropies and gradients are those of the softmax
            over them. Such rows never enter a GEMM.
        kept_offsets: [N + 1] int64 or int32, rows in flattened order: row i has
            kept_tokens[kept_offsets[i] : kept_offsets[i + 1]]; none = the whole vocabulary.

    Raises:
        ValueError, TypeError: see the message: what was got, what is expected, what to do.
        RuntimeError: on a second backward through a gradient that the forward pass made.
    """
    options = {
        "logit_scale": logit_scale,
        "softcap": softcap,
        "logits_dtype": logits_dtype,
        "chunk_tokens": chunk_tokens,
        "tp_group": tp_group,
        "live_rows": live_rows,
    }
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
    check_linear_op(hidden, weight, bias, tokens, mask, temperature, **options)
    leading = hidden.shape[:-1]
    checks.check_loss(given, leading, hidden)
    call = _linear_call(hidden, weight, tokens, mask, temperature, backend, **options)
    kept = _kept_sets(call, kept_tokens, kept_offsets, tokens, mask, weight.shape[0])
    hidden, weight, bias = _operands(hidden, weight, bias)
    batch = LossBatch.from_inputs(given, leading, hidden)
    if kept is not None:
        logprobs, entropy = _logprobs(hidden, weight, bias, call, kept)
        return loss_of_batch(batch, logprobs, entropy, leading=leading, backend=call.backend)
    if objective.is_token_level:
        chunk_loss = TokenLevelLoss(inputs=batch.row_inputs(), objective=objective)
    elif isinstance(objective, RuleObjective) and not objective.couples_sequences:
        chunk_loss = RuleLoss.from_batch(batch)
    else:
        chunk_loss = SequenceLevelLoss.from_batch(batch, call, weight)
    if chunk_loss is None:
        logprobs, entropy = _logprobs(hidden, weight, bias, call, None)
        return loss_of_batch(batch, logprobs, entropy, leading=leading, backend=call.backend)
    needs = tuple(
        torch.is_grad_enabled() and x is not None and x.requires_grad
        for x in (hidden, weight, bias)
    )
    fused = FusedExpLoss if call.exponentials else FusedLinearLoss
    loss, logprobs, entropy, clipped = fused.apply(hidden, weight, bias, call, chunk_loss, needs)
    terms = {}
    if isinstance(objective, Objective) and not objective.is_token_level:
        with torch.no_grad():
            whole = batch.token_loss(logprobs)
        terms = {"ratio": whole.ratio, "ref_kl": whole.kl}
    metrics = batch.metrics(logprobs, entropy, clipped, backend=call.backend, **terms)
    (loss,) = call.checked(loss)
    return PolicyLoss(loss, logprobs.view(leading), entropy.view(leading), metrics)


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
    options = {
        "logit_scale": logit_scale,
        "softcap": softcap,
        "logits_dtype": logits_dtype,
        "chunk_tokens": chunk_tokens,
        "tp_group": tp_group,
        "live_rows": live_rows,
    }
    check_linear_op(hidden, weight, bias, tokens, mask, temperature, **options)
    leading = hidden.shape[:-1]
    call = _linear_call(hidden, weight, tokens, mask, temperature, backend, **options)
    kept = _kept_sets(call, kept_tokens, kept_offsets, tokens, mask, weight.shape[0])
    _check_statistics(statistics, call, kept)
    outputs = _logprobs(*_operands(hidden, weight, bias), call, kept, bool(statistics))
    return TokenStatistics.from_rows(outputs, statistics, leading)


def _check_statistics(statistics: object, call: LinearCall, kept: Kept | None) -> None:
    checks.check_statistics(statistics)
    whole = kept is None and not call.exponentials and hasattr(call.backend, "row_details")
    if statistics and not whole:
        what = "kept_tokens" if kept is not None else type(call.backend).__name__
        raise ValueError(
            f"statistics with {what}: they are of whole rows of a whole head, expected one of the "
            "backends 'torch', 'cpp' and 'triton' with neither kept_tokens nor tp_group"
        )


def _logprobs(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    call: LinearCall,
    kept: Kept | None,
    with_details: bool = False,
) -> tuple[Tensor, ...]:
    """Log-probs and entropies (N,), differentiable; with details also those, which are not."""
    if with_details:
        outputs = LinearTokenLogprobs.apply(hidden, weight, bias, call, True)
    elif kept is None:
        score = ExpTokenLogprobs if call.exponentials else LinearTokenLogprobs
        outputs = score.apply(hidden, weight, bias, call)
    else:
        rows = hidden.reshape(-1, hidden.shape[-1])
        outputs = LinearKeptLogprobs.apply(rows, weight, bias, call, kept)
    return call.checked(*outputs)


def _kept_sets(
    call: LinearCall,
    kept_tokens: Tensor | None,
    kept_offsets: Tensor | None,
    tokens: Tensor,
    mask: Tensor | None,
    columns: int,
) -> Kept | None:
    """Checked, if the backend knows what to do with them; the weight here makes `columns`."""
    rows = call.backend
    sharded = isinstance(rows, VocabularyShard)
    check_kept(kept_tokens, kept_offsets, tokens, mask, rows.vocabulary if sharded else columns)
    backend = rows.backend if sharded else rows
    if kept_tokens is not None and not hasattr(backend, "kept_stats"):
        raise ValueError(
            f"kept_tokens with {backend.__name__}, which has no gathered rows of a head: expected "
            "one of the backends 'torch', 'cpp' and 'triton'"
        )
    return Kept.from_inputs(kept_tokens, kept_offsets, call.mask)


def _linear_call(
    hidden: Tensor,
    weight: Tensor,
    tokens: Tensor,
    mask: Tensor | None,
    temperature: float | Tensor,
    backend: str | None,
    *,
    logit_scale: float,
    softcap: float | None,
    logits_dtype: torch.dtype | None,
    chunk_tokens: int | None,
    tp_group: ProcessGroup | None,
    live_rows: int | None,
) -> LinearCall:
    """What `check_linear_op` has checked, as rows."""
    exponentials = backend in backends.LINEAR_BACKENDS
    if exponentials:
        check_exponentials(backend, operand_dtype(hidden), logits_dtype)
    logits_dtype = logits_dtype or checks.wide_dtype(operand_dtype(hidden))
    rows = backends.load(backends.resolve(backend, hidden.device, logits_dtype, linear=True))
    if tp_group is not None:
        shard = ExpShard if exponentials else VocabularyShard
        rows = shard.of_head(rows, tp_group, weight)
        checks.check_token_range(tokens, rows.vocabulary, mask)
    mask = flat_mask(mask)
    index, wrong_count = _unmasked_rows(mask, live_rows)
    return LinearCall(
        tokens=flat_rows(tokens, torch.int64),
        temperature=flat_temperature(temperature, hidden),
        logit_scale=float(logit_scale),
        softcap=None if softcap is None else float(softcap),
        logits_dtype=logits_dtype,
        chunk_tokens=chunk_tokens,
        backend=rows,
        mask=mask,
        index=index,
        wrong_count=wrong_count,
        exponentials=exponentials,
        keeps_exponentials=backend == "triton-exp-kept" and torch.is_grad_enabled(),
    )


def _unmasked_rows(
    mask: Tensor | None, live_rows: int | None
) -> tuple[Tensor | None, Tensor | None]:
    """(n,) rows under the mask, or None for all, and whether `live_rows` is wrong (0-d bool).

    On GPU, counting them would wait for the device: there it takes the caller's count, and whether
    that is right is left on the device.
    """
    if mask is None or (live_rows is None and mask.device.type != "cpu"):
        return None, None
    if mask.device.type == "cpu" and checks.inspects_values(mask):
        index, wrong_count = mask.nonzero()[:, 0], None
    else:
        size = min(live_rows, mask.numel())
        index = torch.nonzero_static(mask, size=size, fill_value=0)[:, 0]
        wrong_count = mask.sum() != live_rows
    return None if index.numel() == mask.numel() else index, wrong_count


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
