"""REGRESSIONS 48: a bf16 product that reads past the last column finds zeros there.

The oneDNN of torch 2.13 does, on processors with AMX, where K is not a multiple of 32. Here every
product is made to: what it finds behind a row of its left operand, times zero, is added to the row.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import fastpo
from fastpo import backends
from fastpo.ops import head
from fastpo.ops.head import zero_padded
from fastpo.ops.linear_chunks import LinearCall
from fastpo.ops.linear_workspace import Workspace
from fastpo.testing.budget import relative_error
from fastpo.testing.linear import LinearCase

BACKENDS = [name for name in ("torch", "cpp") if backends.unavailable(name) is None]
OBJECTIVES = {"dapo": fastpo.dapo(), "gspo": fastpo.gspo(clip_low=1.0, clip_high=9.0)}
TILE = 32


def behind(a: torch.Tensor) -> torch.Tensor:
    """(m, ...) what stands behind each row of `a` (m, k) up to a whole tile; NaN beyond memory."""
    m, k = a.shape
    missing = -k % TILE
    memory = a.as_strided((a.untyped_storage().nbytes() // a.itemsize,), (1,), 0)
    rows, columns = torch.arange(m)[:, None], torch.arange(k, k + missing)[None]
    where = a.storage_offset() + rows * a.stride(0) + columns * a.stride(1)
    inside = where < memory.numel()
    return memory[where.where(inside, 0)].float().where(inside, torch.nan)


@pytest.fixture
def reads_past_k(monkeypatch):
    """Low-precision `addmm` as on AMX; returns the list of its ragged calls."""
    addmm, ragged = torch.addmm, []

    def over_reading(input, a, b, **options):
        result = addmm(input, a, b, **options)
        if a.dtype.itemsize == 2 and a.shape[1] % TILE and result.numel():
            ragged.append(tuple(a.shape))
            result.add_((behind(a) * 0).sum(1, keepdim=True).to(result.dtype))
        return result

    monkeypatch.setattr(torch, "addmm", over_reading)
    return ragged


def case_with_gaps(width: int, **head) -> LinearCase:
    """Hidden states that are a view with NaN between its rows."""
    case = LinearCase.random(
        shape=(2, 56), width=width, vocabulary=5000, dtype=torch.bfloat16, **head
    )
    wide = torch.full((*case.tokens.shape, 2 * width), torch.nan, dtype=torch.bfloat16)
    wide[..., :width] = case.hidden
    return replace(case, hidden=wide[..., :width], mask=None)


def gradients(case, **options):
    """Of the hidden states and the head, without the copy that `LinearCase.fused` makes."""
    hidden, weight = case.hidden.requires_grad_(), case.weight.requires_grad_()
    result = fastpo.linear_policy_loss(
        hidden, weight, case.tokens, case.advantages, bias=case.bias, **options
    )
    return result, torch.autograd.grad(result.loss, [hidden, weight])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("way", ["bf16 logits", "bf16 gradient"])
@pytest.mark.parametrize("width", [24, 64])
@pytest.mark.parametrize("head", [{}, {"softcap": 3.0, "bias": True}], ids=["plain", "softcap"])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_row_is_finite(name, head, width, way, backend, reads_past_k, monkeypatch):
    """Garbage between rows, and the fp32 logits beside their bf16 gradient, reach nothing."""
    objective, case = OBJECTIVES[name], case_with_gaps(width, **head)
    options = case.options(objective) | case.head() | {"backend": backend, "chunk_tokens": 60}
    if way == "bf16 logits":
        options["logits_dtype"] = torch.bfloat16
    else:
        monkeypatch.setattr(LinearCall, "grad_dtype", lambda *_: torch.bfloat16)
    result, grads = gradients(case, **options)
    assert reads_past_k, "no product had a ragged K: this test tests nothing"
    assert result.loss.isfinite()
    assert all(bool(grad.isfinite().all()) for grad in grads)
    scored = fastpo.linear_token_logprobs(
        case.hidden, case.weight, case.tokens, logits_dtype=options.get("logits_dtype")
    )
    assert scored.logprobs.isfinite().all()
    grads = torch.autograd.grad(scored.logprobs.sum(), [case.hidden, case.weight])
    assert all(bool(grad.isfinite().all()) for grad in grads)


@pytest.mark.parametrize("bad", ["advantage", "hidden"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_bad_row_harms_itself_only(backend, bad, reads_past_k):
    """One NaN: every other row of the hidden states' gradient keeps its bits."""
    case = case_with_gaps(40)
    options = case.options(OBJECTIVES["dapo"])
    options |= {"logits_dtype": torch.bfloat16, "backend": backend, "normalizer": 112}
    hidden, advantages = case.hidden.detach().clone(), case.advantages.clone()
    advantages[advantages == 0] = 1.0  # rows without a gradient would be left out
    _, (clean, _) = gradients(replace(case, advantages=advantages), **options)
    (advantages if bad == "advantage" else hidden)[0, 5] = torch.nan
    poisoned = replace(case, hidden=hidden, advantages=advantages)
    result, (grad, _) = gradients(poisoned, **options)
    assert reads_past_k
    others = torch.ones(2, 56, dtype=torch.bool)
    others[0, 5] = False
    assert torch.equal(grad[others], clean[others])
    assert result.loss.isnan()


@pytest.mark.parametrize("columns", [1, 31, 32, 33, 50257])
def test_padded_rows_are_aligned_and_end_in_zeros(columns, poisoned_empty):
    buffer = zero_padded(3, columns, torch.bfloat16, torch.device("cpu"))
    assert buffer.shape == (3, columns)
    assert buffer.stride(0) % TILE == 0 and buffer.stride(1) == 1
    assert columns % TILE == 0 or not behind(buffer).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gradient_in_the_rows_of_its_logits_is_aligned(dtype, monkeypatch):
    """V = 50257: a bf16 gradient in fp32 rows begins at a multiple of 16 bytes, like they do."""
    case = LinearCase.random(shape=(1, 4), width=8, vocabulary=50257, dtype=torch.bfloat16)
    monkeypatch.setattr(LinearCall, "grad_dtype", lambda *_: dtype)
    seen = []
    load = Workspace.load

    def looking(self, hidden, rows, *, gradient):
        chunk = load(self, hidden, rows, gradient=gradient)
        seen.extend((chunk.logits, chunk.grad))
        return chunk

    monkeypatch.setattr(Workspace, "load", looking)
    case.fused(fastpo.dapo())
    for matrix in seen:
        if matrix is not None:
            assert matrix.data_ptr() % 16 == 0 and matrix.stride(0) * matrix.itemsize % 16 == 0


@pytest.mark.parametrize("dtypes", ["bf16 bf16", "fp32 bf16", "fp16 fp16"])
def test_only_bf16_operands_go_to_tiles(dtypes, monkeypatch):
    """As on a CPU with AMX: the switch is on for their products alone, and off again after one."""
    names = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
    first, second = (names[name] for name in dtypes.split())
    matmul, seen, addmm = torch.backends.mkldnn.matmul, [], torch.addmm
    before = matmul.fp32_precision

    def recorded(*arguments, **options):
        seen.append(matmul.fp32_precision)
        return addmm(*arguments, **options)

    monkeypatch.setattr(head, "has_amx", lambda: True)
    monkeypatch.setattr(torch, "addmm", recorded)
    a, b = torch.randn(7, 64).to(first), torch.randn(64, 5000).to(second)
    out = torch.empty(7, 5000)
    head.add_matmul_(out, a, b)
    assert set(seen) == {"bf16" if dtypes == "bf16 bf16" else before}
    assert matmul.fp32_precision == before
    exact = a.double() @ b.double()
    assert relative_error(out, exact) < 2e-7  # AVX512-BF16, where the switch is not used: 1.6e-7
    with pytest.raises(RuntimeError), head.bf16_tiles():
        raise RuntimeError
    assert matmul.fp32_precision == before


def test_widened_products_are_exact_to_the_last_bits():
    """1e-7 from fp64, with AMX or without: what users' bf16 heads get by default."""
    a, b = torch.randn(64, 576).bfloat16(), torch.randn(576, 5000).bfloat16()
    out = torch.empty(64, 5000)
    head.add_matmul_(out, a, b)
    assert relative_error(out, a.double() @ b.double()) < 1e-7


def test_a_product_in_parts_rounds_its_sum_once():
    """REGRESSIONS 81: dH of a bf16 head on a CPU is summed over blocks of the vocabulary."""
    case = LinearCase.random(
        shape=(1, 64), width=64, vocabulary=5 * head.HEAD_BLOCK, dtype=torch.bfloat16
    )
    exact = replace(case, hidden=case.hidden.double(), weight=case.weight.double())
    _, (expected, _) = exact.eager(fastpo.dapo(), torch.float64)
    _, (grad, _) = case.fused(fastpo.dapo())
    best = (expected.bfloat16().double() - expected).norm()
    assert (grad.double() - expected).norm() <= 1.05 * best
