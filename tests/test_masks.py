"""`completion_mask`: up to and including the first end token."""

from __future__ import annotations

import pytest
import torch

import fastpo


@pytest.mark.parametrize("eos", [2, [2], (2, 7), torch.tensor([2, 7])])
def test_ends_with_the_first_end_token(eos):
    """REGRESSIONS 20: pad == eos: the first one is trained, the padding is not; any of several."""
    ids = torch.tensor([[5, 2, 2, 2], [5, 5, 5, 5], [2, 5, 2, 5], [5, 7, 5, 2]])
    several = not isinstance(eos, int) and len(eos) == 2
    last = [1, 1, 0, 0] if several else [1, 1, 1, 1]
    expected = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1], [1, 0, 0, 0], last], dtype=torch.bool)
    assert torch.equal(fastpo.completion_mask(ids, eos), expected)
    assert torch.equal(fastpo.completion_mask(ids[0], eos), expected[0])


def test_empty_shapes():
    for shape in ((0, 4), (3, 0), (0,)):
        mask = fastpo.completion_mask(torch.zeros(shape, dtype=torch.int32), 0)
        assert mask.shape == shape and mask.dtype == torch.bool


@pytest.mark.parametrize(
    ("ids", "eos", "error", "message"),
    [
        ([1, 2], 2, TypeError, "ids is list, expected an integer tensor"),
        (torch.zeros(3), 2, TypeError, "ids have dtype torch.float32, expected an integer"),
        (torch.tensor(3), 2, ValueError, "ids has no dimension"),
        (torch.tensor([3]), None, TypeError, "eos_ids is None, expected an id or several"),
        (torch.tensor([3]), "</s>", TypeError, "eos_ids is '</s>'"),
        (torch.tensor([3]), True, TypeError, "eos_ids is True, expected an id or several"),
        (torch.tensor([3]), torch.tensor([3.0]), TypeError, "eos_ids have dtype torch.float32"),
        (torch.tensor([3]), [], ValueError, "eos_ids is empty"),
    ],
)
def test_wrong_arguments(ids, eos, error, message):
    with pytest.raises(error, match=message):
        fastpo.completion_mask(ids, eos)
