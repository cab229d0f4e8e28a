"""The linear ops on a GPU: bf16 GEMMs with fp32 results, no synchronization, the planned memory."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest
import torch
from torch import Tensor

import fastpo
from fastpo import plan
from fastpo.ops.head import wide_gemm
from fastpo.testing.budget import assert_within_budget
from fastpo.testing.linear import LinearCase

pytestmark = pytest.mark.gpu

OBJECTIVES = {
    "dapo": fastpo.dapo(),
    "dapo_all": fastpo.dapo(ratio_max=4.0, kl_coef=0.1, entropy_coef=0.05),
    "gspo": fastpo.gspo(),
}
HEADS = {"plain": {}, "all": {"bias": True, "logit_scale": 1.7, "softcap": 3.0}}


def on_gpu(case: LinearCase) -> LinearCase:
    values = {field.name: getattr(case, field.name) for field in fields(case)}
    return replace(case, **{name: x.cuda() for name, x in values.items() if isinstance(x, Tensor)})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("name", OBJECTIVES)
def test_matches_fp64(name, head, dtype):
    """fp32 logits of bf16 operands: log-probs as good as fp32's own; gradients within bf16's."""
    case = LinearCase.random(shape=(3, 150), width=64, vocabulary=5003, dtype=dtype, **HEADS[head])
    exact, exact_grads = case.eager(OBJECTIVES[name], torch.float64)
    plain, plain_grads = case.eager(OBJECTIVES[name], torch.float32)
    for extra in ({}, {"live_rows": int(case.mask.sum())}, {"chunk_tokens": 200}):
        result, grads = on_gpu(case).fused(OBJECTIVES[name], **extra)
        assert_within_budget(result.logprobs.cpu(), exact.logprobs, plain.logprobs, factor=4)
        for grad, *pair in zip(grads, exact_grads, plain_grads, strict=True):
            assert_within_budget(grad.cpu(), *pair, factor=4 if dtype == torch.float32 else 2)


@pytest.mark.parametrize("counted", [False, True])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_nothing_waits_for_the_device(name, counted):
    """Forward and backward with a scaled loss, and scoring, never synchronize."""
    host = LinearCase.random(shape=(3, 150), dtype=torch.bfloat16)
    case = on_gpu(host)
    count = int(host.mask.sum()) if counted else None
    leaves = case.leaves()
    options = case.options(OBJECTIVES[name])

    def step():
        result = fastpo.linear_policy_loss(
            *leaves, case.tokens, case.advantages, live_rows=count, **options
        )
        torch.autograd.grad(result.loss * 0.3, leaves)
        scored = fastpo.linear_token_logprobs(*leaves, case.tokens, mask=case.mask, live_rows=count)
        torch.autograd.grad(scored.logprobs.sum(), leaves)

    step()  # probes and compilations
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_wrong_live_rows_give_nan():
    case = on_gpu(LinearCase.random())
    for wrong in (0, int(case.mask.sum()) + 1):
        assert case.fused(fastpo.dapo(), live_rows=wrong)[0].loss.isnan()


def test_planned_peak_is_the_allocated_one():
    """Within 10 %, at a size where the chunk and the head's gradient dominate."""
    tokens, width, vocab = 4096, 512, 60000
    hidden = torch.randn(tokens, width, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(vocab, width, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    ids = torch.randint(vocab, (tokens,), device="cuda")
    advantages = torch.randn(tokens, device="cuda")

    def step():
        loss = fastpo.linear_policy_loss(
            hidden, weight, ids, advantages, objective=fastpo.dapo()
        ).loss
        return torch.autograd.grad(loss, [hidden, weight])

    step()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    peak = torch.cuda.max_memory_allocated() - before
    planned = plan.plan(vocab=vocab, hidden=width, tokens=tokens)
    assert wide_gemm(hidden.device, hidden.dtype)
    assert peak == pytest.approx(planned.peak_bytes, rel=0.10)
