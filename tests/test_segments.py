"""Sums over sequences: padded and packed, ragged, empty, differentiable twice, deterministic."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastpo.segments import Segments

CPU = torch.device("cpu")
LENGTHS = st.lists(st.integers(0, 7), min_size=0, max_size=8)


def packed(lengths: list[int], dtype=torch.int32) -> Segments:
    offsets = torch.tensor([0, *lengths], dtype=dtype).cumsum(0, dtype=dtype)
    return Segments.packed(offsets, sum(lengths))


@settings(max_examples=60, deadline=None)
@given(LENGTHS, st.integers(0, 2**31 - 1))
def test_packed_sums_and_means_equal_a_loop(lengths, seed):
    generator = torch.Generator().manual_seed(seed)
    segments = packed(lengths)
    values = torch.randn(segments.rows, dtype=torch.float64, generator=generator)
    mask = torch.rand(segments.rows, generator=generator) < 0.6
    total, mean = segments.sum(values, mask), segments.mean(values, mask)
    assert total.shape == mean.shape == (len(lengths),)
    for b, (part, own) in enumerate(zip(values.split(lengths), mask.split(lengths), strict=True)):
        kept = part[own].tolist()
        assert total[b].item() == pytest.approx(sum(kept), abs=1e-12)
        assert mean[b].item() == pytest.approx(sum(kept) / max(len(kept), 1), abs=1e-12)


@settings(max_examples=60, deadline=None)
@given(LENGTHS)
def test_broadcast_gives_every_row_its_sequence(lengths):
    segments = packed(lengths)
    values = torch.arange(len(lengths), dtype=torch.float32)
    expected = [b for b, length in enumerate(lengths) for _ in range(length)]
    assert segments.broadcast(values).tolist() == expected == segments.ids.tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("lengths", [[3, 0, 0, 4], [0, 2, 5, 0, 0], [7], [0, 0], []])
def test_packed_gradients_are_exact_gathers(lengths, dtype):
    segments = packed(lengths)
    values = torch.arange(segments.rows, dtype=dtype).requires_grad_()
    scale = torch.arange(1, len(lengths) + 1, dtype=dtype)
    (grad,) = torch.autograd.grad((segments.sum(values) * scale).sum(), values)
    assert grad.tolist() == [b + 1 for b, length in enumerate(lengths) for _ in range(length)]
    per_sequence = torch.zeros(len(lengths), dtype=dtype, requires_grad=True)
    row_scale = torch.arange(1, segments.rows + 1, dtype=dtype)
    (grad,) = torch.autograd.grad(
        (segments.broadcast(per_sequence) * row_scale).sum(), per_sequence
    )
    assert grad.tolist() == [part.sum().item() for part in row_scale.split(lengths)]


def test_packed_operations_pass_gradcheck_twice():
    segments = packed([2, 0, 3, 1])
    mask = torch.tensor([True, False, True, True, True, False])
    rows = torch.randn(6, dtype=torch.float64, requires_grad=True)
    sequences = torch.randn(4, dtype=torch.float64, requires_grad=True)
    for function, value in (
        (lambda x: segments.sum(x, mask).square(), rows),
        (lambda x: segments.mean(x, mask).exp(), rows),
        (lambda x: segments.broadcast(x).square(), sequences),
    ):
        assert torch.autograd.gradcheck(function, value)
        assert torch.autograd.gradgradcheck(function, value)


@pytest.mark.parametrize("junk", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_masked_rows_are_not_used(layout, junk):
    segments = Segments.padded(2, 3, CPU) if layout == "padded" else packed([3, 3])
    values = torch.tensor([1.0, junk, 2.0, junk, junk, junk], requires_grad=True)
    mask = values.isfinite()
    mean = segments.mean(values, mask)
    assert mean.tolist() == [1.5, 0.0]
    mean.sum().backward()
    assert values.grad.tolist() == [0.5, 0.0, 0.5, 0.0, 0.0, 0.0]


def test_maxima_are_of_unmasked_rows():
    values = torch.tensor([3.0, 9.0, 1.0, 7.0, torch.nan, 2.0])
    mask = torch.tensor([True, False, True, False, False, False])
    padded = Segments.padded(2, 3, values.device)
    packed = Segments.packed(torch.tensor([0, 3, 3, 6]), 6)
    assert padded.max(values, mask).tolist() == [3, 0]
    assert packed.max(values, mask).tolist() == [3, 0, 0]


def test_padded_equals_packed():
    values = torch.randn(12, dtype=torch.float64)
    padded, equal = Segments.padded(3, 4, CPU), packed([4, 4, 4])
    torch.testing.assert_close(padded.sum(values), equal.sum(values), rtol=1e-14, atol=1e-14)
    assert torch.equal(padded.broadcast(values[:3]), equal.broadcast(values[:3]))
    assert torch.equal(padded.ids, equal.ids)


@pytest.mark.parametrize("batch, width", [(0, 5), (3, 0), (0, 0)])
def test_empty_padded_batches(batch, width):
    segments = Segments.padded(batch, width, CPU)
    assert segments.mean(torch.empty(0)).tolist() == [0.0] * batch
    assert segments.broadcast(torch.zeros(batch)).shape == (0,)
    assert segments.ids.shape == (0,)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_offsets_of_either_integer_dtype_and_strided(dtype):
    offsets = torch.tensor([0, 9, 2, 9, 5, 9], dtype=dtype)[::2]
    segments = Segments.packed(offsets, 5)
    assert segments.sum(torch.ones(10)[::2]).tolist() == [2.0, 3.0]
    assert segments.ids.tolist() == [0, 0, 1, 1, 1]


def test_sums_repeat_bit_by_bit():
    segments = packed([1000, 3, 2000])
    values = torch.randn(3003)
    first = segments.sum(values)
    assert all(torch.equal(first, segments.sum(values)) for _ in range(5))
