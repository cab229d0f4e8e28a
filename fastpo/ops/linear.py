"""Ops on hidden states and the LM head: `linear_policy_loss` and `linear_token_logprobs`.

With N tokens, width D and vocabulary V, the head's logits are N x V numbers, the largest tensor of
a training step. Here they exist for one chunk of tokens at a time.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from fastpo.objective import Objective, TokenLoss
from fastpo.ops import _checks, _linear_fused, _linear_inputs
from fastpo.ops._batch import LossBatch
from fastpo.ops._linear_recompute import LinearTokenLogprobs
from fastpo.ops._linear_sequences import SequenceLevelLoss
from fastpo.ops.from_logprobs import loss_of_batch
from fastpo.ops.results import PolicyLoss, TokenLogprobs

_UNTRACED = "its loop over chunks runs GEMMs and one kernel each: nothing there to compile"


@torch.compiler.disable(reason=_UNTRACED)
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
    tp_group: ProcessGroup | None = None,
    live_rows: int | Tensor | None = None,
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
    the weight's gradient is a sum over chunks in fp32. Put gradient-accumulation factors into
    `normalizer`, which is free, rather than on the loss, which rounds a bf16 gradient twice.

    Args:
        hidden: [N, D] or [B, T, D] fp32, bf16 or fp16 (fp64 on the torch backend), unit stride in
            D; the last hidden states, after the final norm. `hidden[i]` predicts `tokens[i]`:
            nothing is shifted here.
        weight: [V, D] of the same dtype; a LoRA adapter's effective weight; tied embeddings too.
        tokens: [...] int64 or int32 sampled ids.
        advantages: [...] per token, or [B] per sequence.
        bias: [V], or None.
        objective: which loss; see `fastpo.Objective` and the presets.
        mask: [...] bool, the tokens that count; None = all. NaN in masked rows changes nothing.
        old_logprobs: [...] of the policy that sampled; None = strictly on-policy (the ratio is 1
            and keeps its gradient).
        ref_logprobs: [...] of the reference policy; required exactly when `objective.kl_coef != 0`.
        importance_weights: [...] or [B] rollout-mismatch weights (TIS, MIS), without gradient.
        temperature: sampling temperature, a float or one per token [...].
        cu_seqlens: (B + 1,) int32 offsets of the sequences of a packed [N] batch.
        normalizer: global token count (token_mean) or sequence count (other aggregations), for
            gradient accumulation and data parallelism; None = this batch's own.
        backend: "torch", "cpp" or "triton"; None = the best available. An explicit request never
            falls back.
        logit_scale: factor on the logits (Cohere's logit_scale, 1 / Granite's logits_scaling).
        softcap: Gemma's final_logit_softcapping; None = none.
        logits_dtype: None = float32, which keeps the GEMM's fp32 sums; torch.bfloat16 (for bf16
            operands) rounds the logits: half the chunk's memory, about 1e-2 off in log-probs.
        chunk_tokens: tokens per chunk; None = from a byte budget (see `fastpo plan`).
        tp_group: process group over which `weight` (and `bias`) is sharded along V in rank order,
            in parts of any size. All ranks pass the same tokens and hidden states, and get the same
            loss, the whole gradient of the hidden states and their own shard's of the weight.
        live_rows: the number of True in `mask`, or its copy on the host, which a trainer has when
            it builds the batch. One that contradicts `mask` raises on CPU and gives NaN on GPU.

    Raises:
        ValueError, TypeError: see the message: what was got, what is expected, what to do.
        RuntimeError: on a second backward through a gradient that the forward pass made.
    """
    hidden, weight, bias = _linear_inputs.operands(hidden, weight, bias)
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
    call = _linear_inputs.linear_call(
        hidden,
        weight,
        tokens,
        mask=mask,
        temperature=temperature,
        backend=backend,
        logit_scale=logit_scale,
        softcap=softcap,
        logits_dtype=logits_dtype,
        chunk_tokens=chunk_tokens,
        tp_group=tp_group,
        live_rows=live_rows,
    )
    hidden = _linear_inputs.flat_hidden(hidden)
    if objective.is_token_level:
        chunk_loss = _linear_fused.TokenLevelLoss(inputs=batch.row_inputs(), objective=objective)
    else:
        chunk_loss = SequenceLevelLoss.of(batch, call, weight)
    if chunk_loss is None:
        logprobs, entropy = call.visible(*LinearTokenLogprobs.apply(hidden, weight, bias, call))
        return loss_of_batch(batch, logprobs.view(leading), entropy.view(leading))
    needs = tuple(
        torch.is_grad_enabled() and x is not None and x.requires_grad
        for x in (hidden, weight, bias)
    )
    loss, logprobs, entropy, clipped = _linear_fused.FusedLinearLoss.apply(
        hidden, weight, bias, call, chunk_loss, needs
    )
    with torch.no_grad():
        terms = batch.token_loss(logprobs)
    metrics = batch.metrics(
        logprobs, entropy, TokenLoss(terms.loss, terms.ratio, terms.kl, clipped)
    )
    (loss,) = call.visible(loss)
    return PolicyLoss(loss, logprobs.view(leading), entropy.view(leading), metrics)


@torch.compiler.disable(reason=_UNTRACED)
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
    live_rows: int | Tensor | None = None,
) -> TokenLogprobs:
    """Log-prob and entropy of every token from hidden states, both differentiable.

    The base of any loss you write. One GEMM forward, the same one and two more backward (8 N D V in
    all), four numbers per token kept in between. Arguments, and what enters the GEMMs, are as in
    `linear_policy_loss`; the gradients of rows whose incoming gradients are both 0 are skipped too.

    Raises:
        ValueError, TypeError: see the message: what was got, what is expected, what to do.
    """
    hidden, weight, bias = _linear_inputs.operands(hidden, weight, bias)
    leading = hidden.shape[:-1]
    _checks.check_mask(mask, leading, hidden)
    call = _linear_inputs.linear_call(
        hidden,
        weight,
        tokens,
        mask=mask,
        temperature=temperature,
        backend=backend,
        logit_scale=logit_scale,
        softcap=softcap,
        logits_dtype=logits_dtype,
        chunk_tokens=chunk_tokens,
        tp_group=tp_group,
        live_rows=live_rows,
    )
    hidden = _linear_inputs.flat_hidden(hidden)
    logprobs, entropy = call.visible(*LinearTokenLogprobs.apply(hidden, weight, bias, call))
    return TokenLogprobs(logprobs.view(leading), entropy.view(leading))
