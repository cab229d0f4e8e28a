"""Chunks: their sizes, and that results do not depend on them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import fastpo
from fastpo.ops import head as head_module
from fastpo.ops import linear, linear_chunks, linear_workspace
from fastpo.ops.linear_checks import LinearOptions
from fastpo.ops.linear_chunks import LinearCall
from fastpo.ops.linear_workspace import Workspace
from fastpo.testing.budget import assert_within_budget
from fastpo.testing.linear import LinearCase


@pytest.mark.parametrize("rows", [1, 255, 256, 257, 1000, 4096, 131072, 131073])
@pytest.mark.parametrize("row_bytes", [1, 4 * 32000, 4 * 151936])
def test_chunks_are_even_multiples_within_the_budget(rows, row_bytes):
    budget = 2**27
    size = linear_chunks.chunk_rows(rows, row_bytes, budget)
    count = -(-rows // size)
    assert size <= rows or rows == 1
    assert size * row_bytes <= budget or size <= 256
    assert size % 256 == 0 or count == 1
    assert size - (rows - (count - 1) * size) < 256 * count  # the last one is not a sliver


def test_a_softcap_takes_two_buffers_of_the_budget():
    """The tanh must outlive the row primitive, so half as many rows fit."""
    rows = []
    for options in ({}, {"softcap": 3.0}):
        case = LinearCase.random(shape=(1, 4), width=4, vocabulary=2**15, **options)
        settings = LinearOptions(1.0, case.softcap, None, None, None, None)
        rows_of = (case.hidden, case.weight, case.tokens, None, 1.0, None)
        call = linear._linear_call(*rows_of, settings)
        rows.append(call.chunk_rows(10**6, case.weight))
    assert rows == [1024, 512]


def test_cut_covers_every_row_once():
    index = torch.tensor([0, 3, 4, 9, 11])
    assert torch.cat(linear_chunks.cut(index, 12, 2)).tolist() == index.tolist()
    assert [linear_chunks.length(rows) for rows in linear_chunks.cut(None, 12, 5)] == [5, 5, 2]
    assert linear_chunks.cut(index[:0], 12, 2) == linear_chunks.cut(None, 0, 5) == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("preset", ["dapo", "gspo"])
def test_results_do_not_depend_on_the_chunking(preset, dtype):
    """Bit by bit, but for dW and db: sums over chunks, whose order differs.

    The bound of those is that of any fp32 sum over N tokens in another order.
    """
    objective = {"dapo": fastpo.dapo(entropy_coef=0.01), "gspo": fastpo.gspo()}[preset]
    case = LinearCase.random(shape=(5, 51), dtype=dtype, bias=True)
    whole, grads = case.fused(objective, chunk_tokens=10**6)
    noise = max(torch.finfo(torch.float32).eps if dtype != torch.float64 else 1e-15, 1e-15)
    for size in (1, 2, 3, 5, 7, 16, 17, 33, 100, 128, 254):
        result, others = case.fused(objective, chunk_tokens=size)
        assert torch.equal(result.loss, whole.loss)
        assert torch.equal(result.logprobs, whole.logprobs)
        assert torch.equal(result.entropy, whole.entropy)
        assert torch.equal(others[0], grads[0])
        for grad, other in zip(grads[1:], others[1:], strict=True):
            rounding = torch.finfo(dtype).eps if dtype == torch.bfloat16 else 0
            assert (grad.double() - other.double()).norm() < (
                4 * noise + rounding
            ) * grad.double().norm()


@pytest.mark.parametrize("threads", [1, 2])
def test_a_row_scores_the_same_in_any_batch(threads):
    """Old log-probs of one sequence alone equal the new ones of a packed batch, bit by bit."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        case = LinearCase.random(shape=(1, 97), width=96, vocabulary=2000)
        hidden, tokens = case.hidden[0], case.tokens[0]
        packed, entropy = fastpo.linear_token_logprobs(hidden, case.weight, tokens)
        for start, stop in ((0, 1), (0, 3), (1, 8), (8, 40), (40, 97)):
            rows = slice(start, stop)
            alone = fastpo.linear_token_logprobs(hidden[rows], case.weight, tokens[rows])
            assert torch.equal(alone.logprobs, packed[rows])
            assert torch.equal(alone.entropy, entropy[rows])
    finally:
        torch.set_num_threads(before)


def test_loss_and_scoring_agree_bit_by_bit():
    """Old log-probs from linear_token_logprobs, new ones from the loss: r = 1 exactly."""
    case = LinearCase.random(dtype=torch.bfloat16)
    scored = fastpo.linear_token_logprobs(case.hidden, case.weight, case.tokens, mask=case.mask)
    for objective in (fastpo.dapo(), fastpo.gspo()):
        result, _ = replace(case, old_logprobs=scored.logprobs).fused(objective, chunk_tokens=7)
        assert torch.equal(result.logprobs, scored.logprobs)
        assert torch.equal(result.entropy, scored.entropy)
        assert result.metrics["old_kl"] == 0


@pytest.mark.parametrize("shape", [(5, 7, 9000), (5, 9000, 7), (9000, 5, 7), (8, 8, 8)])
@pytest.mark.parametrize("narrow", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("beta", [0.0, 1.0, 0.5])
def test_matmul_of_narrow_operands_is_not_rounded(shape, narrow, beta):
    """(m, k, n) with each of them the vocabulary; what stood there is not read when beta is 0."""
    m, k, n = shape
    a, b = torch.randn(m, k).to(narrow), torch.randn(n, k).to(narrow).t()
    out = torch.randn(m, n) if beta else torch.full((m, n), torch.nan)
    expected = 0.7 * a.double() @ b.double() + (beta * out.double() if beta else 0)
    head_module.add_matmul_(out, a, b, alpha=0.7, beta=beta)
    assert (out - expected).norm() < 1e-6 * expected.norm()


def test_a_narrow_bias_gradient_is_summed_wide():
    """257 has no place in bf16, a count of 257 tokens must have one."""
    head = head_module.Head(weight=torch.zeros(3, 2), bias=torch.zeros(3), logit_scale=0.5)
    total = torch.zeros(3)
    head.add_bias_grad_(total, torch.ones(257, 3, dtype=torch.bfloat16))
    assert total.tolist() == [128.5] * 3


@pytest.mark.parametrize("preset", ["dapo", "gspo"])
@pytest.mark.parametrize("chunk_tokens", [16, 21, 50, 1000])
def test_no_chunk_is_larger_than_asked(preset, chunk_tokens, monkeypatch):
    """Whole sequences too: as many as fit, none left out."""
    sizes = []
    load = Workspace.load

    def counting(self, hidden, rows, *, gradient):
        sizes.append((gradient, linear_chunks.length(rows)))
        return load(self, hidden, rows, gradient=gradient)

    monkeypatch.setattr(Workspace, "load", counting)
    case = LinearCase.random(shape=(5, 21))
    case = replace(case, advantages=torch.ones(5, 21))
    unmasked = int(case.mask.sum())
    case.fused(
        {"dapo": fastpo.dapo(), "gspo": fastpo.gspo(clip_high=9.0)}[preset],
        chunk_tokens=chunk_tokens,
    )
    assert max(size for _, size in sizes) <= chunk_tokens
    assert sum(size for gradient, size in sizes if gradient) == unmasked
    if chunk_tokens == 50:
        assert len(sizes) == -(-unmasked // 50) if preset == "dapo" else len(sizes) <= 3


@pytest.mark.parametrize("preset", ["dapo", "gspo"])
def test_no_uninitialized_memory_is_read(preset, poisoned_empty):
    """Every torch.empty holds NaN: the padding of ragged chunks, the gradient apart from a tanh."""
    objective = {"dapo": fastpo.dapo(entropy_coef=0.01), "gspo": fastpo.gspo()}[preset]
    for options in ({}, {"bias": True, "softcap": 3.0}, {"dtype": torch.bfloat16}):
        case = LinearCase.random(**options)
        for chunk_tokens in (None, 16, 19):
            result, grads = case.fused(objective, chunk_tokens=chunk_tokens)
            assert result.loss.isfinite()
            assert all(bool(grad.isfinite().all()) for grad in grads)


@pytest.mark.parametrize("vocabulary", [1, 2, 7, 4097, 8200])
@pytest.mark.parametrize("width", [1, 3, 130])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_odd_sizes(vocabulary, width, dtype):
    case = LinearCase.random(shape=(2, 9), width=width, vocabulary=vocabulary, dtype=dtype)
    exact, exact_grads = case.eager(fastpo.dapo(), torch.float64)
    result, grads = case.fused(fastpo.dapo())
    torch.testing.assert_close(result.logprobs.double(), exact.logprobs, rtol=1e-6, atol=2e-6)
    tolerance = 4e-6 if dtype == torch.float32 else 8e-3
    for grad, expected in zip(grads, exact_grads, strict=True):
        assert (grad - expected).norm() <= tolerance * expected.norm() + 1e-9


@pytest.mark.parametrize("head", [{}, {"bias": True, "softcap": 3.0}], ids=["plain", "softcap"])
@pytest.mark.parametrize("preset", ["dapo", "gspo"])
def test_gradients_wait_for_one_product_with_the_head(preset, head, monkeypatch):
    """The way of bf16 heads on GPUs: G = 2 D rows of bf16 gradient, then one dW product, the first
    of which is written and not added; with a single one, in the dtype of the head."""
    objective = {"dapo": fastpo.dapo(entropy_coef=0.01), "gspo": fastpo.gspo(clip_high=9.0)}[preset]
    monkeypatch.setattr(LinearCall, "grad_dtype", lambda *_: torch.bfloat16)
    products = []
    product = head_module.add_matmul_

    def looking(out, a, b, *, alpha=1.0, beta=0.0):
        if out.shape == case.weight.shape:
            products.append((a.shape[1], beta, out.dtype))
        product(out, a, b, alpha=alpha, beta=beta)

    monkeypatch.setattr(head_module, "add_matmul_", looking)
    case = LinearCase.random(shape=(8, 30), width=32, vocabulary=1000, dtype=torch.bfloat16, **head)
    case = replace(case, advantages=torch.randn(8, 30).where(case.mask, 1.0))
    _, exact_grads = case.eager(objective, torch.float64)
    _, plain_grads = case.eager(objective, torch.float32)
    groups = {"dapo": (1, 2, 3, 6), "gspo": (1, 2, 4, 8)}[preset]
    for rows, count in zip((256, 128, 64, 32), groups, strict=True):
        monkeypatch.setattr(linear_workspace, "gathered_rows", lambda width, rows=rows: rows)
        products.clear()
        _, grads = case.fused(objective, chunk_tokens=30)
        assert len(products) == count
        assert [beta for _, beta, _ in products] == [0.0] + [1.0] * (len(products) - 1)
        narrow = len(products) == 1
        assert {dtype for *_, dtype in products} == {torch.bfloat16 if narrow else torch.float32}
        assert all(k % 32 == 0 and k <= max(rows, 32) for k, *_ in products)
        for grad, *pair in zip(grads, exact_grads, plain_grads, strict=True):
            assert_within_budget(grad, *pair, factor=2.0)
        _, two_grads = case.two_step(objective, chunk_tokens=30)
        for grad, *pair in zip(two_grads, exact_grads, plain_grads, strict=True):
            assert_within_budget(grad, *pair, factor=2.0)


@pytest.mark.parametrize(
    ("rows", "width", "whole", "half", "chunk"),
    [
        (8192, 4096, 2048, 1024, 1024),  # one product in place of four
        (8192, 576, 4096, 2816, 4096),  # G = 1,280: none waits, so the whole budget
        (20000, 2048, 5120, 3072, 5120),  # G = 4,096
        (32768, 1024, 2048, 1024, 2048),  # two would wait, but for as many products
    ],
)
def test_gradients_wait_only_where_that_saves_products(rows, width, whole, half, chunk):
    """REGRESSIONS 80: else the buffer that they would wait in is memory for nothing."""
    assert linear_chunks.chunk_beside_waiting(rows, whole, half, width) == chunk


def test_without_a_wide_gemm_it_says_so_once_and_takes_the_next_best(monkeypatch):
    """`addmm(out_dtype=)`, then `mm(out_dtype=)`, then float32, of which a GPU warns."""
    missing = set()
    zeros, addmm, mm = torch.zeros, torch.addmm, torch.mm

    def refusing(name, function):
        def call(*args, out_dtype=None, **options):
            if out_dtype is None:
                return function(*args, **options)
            if name in missing:
                raise TypeError(f"{name}() got an unexpected keyword argument 'out_dtype'")
            options.pop("out", None)
            return function(*(x.to(out_dtype) for x in args), **options)

        return call

    monkeypatch.setattr(torch, "zeros", lambda *size, device=None, **kw: zeros(*size, **kw))
    monkeypatch.setattr(torch, "addmm", refusing("addmm", addmm))
    monkeypatch.setattr(torch, "mm", refusing("mm", mm))
    device = torch.device("cuda", 0)
    probe = head_module.wide_gemm.__wrapped__
    assert probe(device, torch.bfloat16) == "addmm"
    missing.add("addmm")
    assert probe(device, torch.bfloat16) == "mm"
    a, b = torch.randn(5000, 24).bfloat16(), torch.randn(24, 40).bfloat16()
    monkeypatch.setattr(head_module, "wide_gemm", lambda *_: "mm")
    for beta in (0.0, 0.5):
        out = torch.full((5000, 40), 2.0) if beta else torch.full((5000, 40), torch.nan)
        head_module.add_matmul_(out, a, b, alpha=0.7, beta=beta)
        torch.testing.assert_close(out, 0.7 * a.float() @ b.float() + 2.0 * beta)
    missing.add("mm")
    with pytest.warns(UserWarning, match=r"float32, about 12 times slower; torch >= 2.10 does"):
        assert probe(device, torch.bfloat16) is None
