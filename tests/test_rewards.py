"""DAPO's overlong penalty."""

import pytest
import torch

import fastpo


def test_equation_13():
    lengths = torch.tensor([0, 80, 81, 90, 95, 100, 101, 10**9])
    penalty = fastpo.overlong_penalty(lengths, max_length=100, cache_length=20)
    assert penalty.dtype == torch.float32
    assert penalty.tolist() == pytest.approx([0, 0, -0.05, -0.5, -0.75, -1, -1, -1])


def test_the_ends_are_exact():
    lengths = torch.tensor([3 * 2**24, 3 * 2**24 + 1, 4 * 2**24 - 1, 4 * 2**24])
    sizes = {"max_length": 4 * 2**24, "cache_length": 2**24}
    penalty = fastpo.overlong_penalty(lengths, **sizes)
    assert penalty[0] == 0 and penalty[-1] == -1
    assert -1 < penalty[2] < penalty[1] < 0


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8, torch.float32, torch.float16])
def test_any_number_type(dtype):
    lengths = torch.tensor([10, 15, 20], dtype=dtype)
    penalty = fastpo.overlong_penalty(lengths, max_length=20, cache_length=10)
    assert penalty.tolist() == [0, -0.5, -1]


def test_the_cache_may_be_the_whole_length():
    penalty = fastpo.overlong_penalty(torch.tensor([0, 1, 4]), max_length=4, cache_length=4)
    assert penalty.tolist() == [0, -0.25, -1]


@pytest.mark.parametrize("cache_length", [0, -1, 101])
def test_a_cache_that_does_not_fit(cache_length):
    with pytest.raises(ValueError, match=f"cache_length is {cache_length}.*expected"):
        fastpo.overlong_penalty(torch.ones(1), max_length=100, cache_length=cache_length)


def test_wrong_types():
    for lengths, bound in (([3, 4], 10), (torch.tensor([3]), "10"), (torch.tensor([3]), True)):
        with pytest.raises(TypeError, match="expected"):
            fastpo.overlong_penalty(lengths, max_length=bound, cache_length=1)


def test_a_mask_is_not_a_length():
    with pytest.raises(TypeError, match="sum a mask"):
        fastpo.overlong_penalty(torch.ones(3, dtype=torch.bool), max_length=8, cache_length=4)
