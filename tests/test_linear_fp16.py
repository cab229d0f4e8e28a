"""fp16 heads whose GEMMs keep fp32 sums, as on GPUs: the gradient of the logits is scaled fp16."""

from __future__ import annotations

import pytest
import torch

import fastpo
from fastpo.ops import head, linear_chunks
from fastpo.testing.linear import LinearCase

OBJECTIVES = {
    "dapo": fastpo.dapo(),
    "entropy": fastpo.dapo(entropy_coef=0.01, kl_coef=0.1),
    "gspo": fastpo.gspo(),
}


@pytest.fixture
def narrow(monkeypatch):
    """Gradients of the dtype of the operands; this machine's products widen them."""
    monkeypatch.setattr(linear_chunks, "wide_gemm", lambda device, dtype: "addmm")


def gradients(objective, *, dtype=torch.float16, upstream=1.0, grow=1.0, **given):
    """Of hidden, weight and bias, in float64; advantages grow from the first row to the last, and
    with them the log-ratios."""
    case = LinearCase.random(dtype=torch.float16, shape=(40, 16), width=64, bias=True)
    leaves = [x.detach().to(dtype).requires_grad_() for x in (case.hidden, case.weight, case.bias)]
    hidden, weight, bias = leaves
    growth = torch.logspace(0, 1, 40, base=grow)[:, None]
    options = case.options(objective) | {"mask": case.mask, "chunk_tokens": 256, "bias": bias}
    options["old_logprobs"] = case.old_logprobs - growth.log()
    result = fastpo.linear_policy_loss(
        hidden, weight, case.tokens, case.advantages * growth, **(options | given)
    )
    return [x.double() for x in torch.autograd.grad(result.loss * upstream, leaves)]


def error(found: torch.Tensor, exact: torch.Tensor) -> float:
    return float((found - exact).norm() / exact.norm())


def check(objective, monkeypatch, **options) -> None:
    """Within twice the error of fp32 gradients of the logits, or of one rounding to fp16."""
    found = gradients(objective, **options)
    monkeypatch.setattr(linear_chunks, "wide_gemm", lambda device, dtype: None)
    wide = gradients(objective, **options)
    exact = gradients(objective, dtype=torch.float64, **options)
    for ours, plain, truth in zip(found, wide, exact, strict=True):
        assert 1e-2 < truth.abs().max() < 6e4  # in fp16's range: the errors are of rounding
        assert error(ours, truth) <= 2 * error(plain, truth) + torch.finfo(torch.float16).eps / 2


@pytest.mark.parametrize("normalizer", [None, 2.0**-20, 131072.0 * 64])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_as_exact_as_fp16_is(name, normalizer, narrow, monkeypatch):
    """Tiny weights neither underflow nor huge ones overflow: the loss scale upstream, as users of
    fp16 have one, brings the results into fp16's range."""
    check(
        OBJECTIVES[name],
        monkeypatch,
        upstream=2.0**4 * (normalizer or 1.0),
        normalizer=normalizer,
    )


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_chunk_with_larger_gradients_than_those_before(name, narrow, monkeypatch):
    """The scale falls from chunk to chunk: sums, and gradients that wait, follow it."""
    check(OBJECTIVES[name], monkeypatch, upstream=2.0**-10, grow=1e3, chunk_tokens=32)


def test_log_probs_first_then_gradients(narrow, monkeypatch):
    """A sequence longer than a chunk: `chunk_grads`, with the scale on."""
    check(fastpo.gspo(), monkeypatch, upstream=64.0, chunk_tokens=8)


def test_products_take_fp16(narrow, monkeypatch):
    """Both operands of every gradient's product are fp16, as tensor cores take them."""
    dtypes = []
    multiply = head.add_matmul_

    def recorded(out, a, b, **factors):
        dtypes.append((out.dtype, a.dtype, b.dtype))
        multiply(out, a, b, **factors)

    monkeypatch.setattr(head, "add_matmul_", recorded)
    gradients(fastpo.dapo())
    assert set(dtypes) == {(torch.float32, torch.float16, torch.float16)} and len(dtypes) >= 6


def test_no_gradient_at_all(narrow):
    for x in gradients(fastpo.dapo(), mask=torch.zeros(40, 16, dtype=torch.bool)):
        assert not x.any()
