"""Kept sets from an engine's arrays, from a mask, and from logits with the sampler's filter."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

import fastpo

PROBS = torch.tensor([0.03, 0.5, 0.11, 0.25, 0.11])


def sets(kept: fastpo.KeptTokens) -> list[list[int]]:
    """The ids of every row, in order."""
    ids, offsets = kept.kept_tokens.tolist(), kept.kept_offsets.tolist()
    assert offsets[0] == 0 and offsets[-1] == len(ids)
    return [sorted(ids[a:b]) for a, b in itertools.pairwise(offsets)]


@pytest.mark.parametrize("kind", [list, np.array, lambda x: np.array(x, np.int32), torch.tensor])
def test_arrays_of_an_engine(kind):
    """One completion; several, one of them empty; and at their places in a padded batch."""
    one = fastpo.kept_from_arrays(kind([7, 3, 9]), kind([0, 2, 2, 3]))
    assert sets(one) == [[3, 7], [], [9]]
    arrays = [kind([7, 3, 9]), [], kind([4])], [kind([0, 2, 2, 3]), kind([0]), kind([0, 1])]
    assert sets(fastpo.kept_from_arrays(*arrays)) == [[3, 7], [], [9], [4]]
    mask = torch.tensor([[0, 1, 1, 1, 0], [1, 0, 0, 0, 0]], dtype=torch.bool)
    padded = fastpo.kept_from_arrays(*arrays, mask=mask)
    assert sets(padded) == [[], [3, 7], [], [9], [], [4], [], [], [], []]
    assert {x.dtype for x in padded} == {torch.int64}
    assert sets(fastpo.kept_from_arrays([], [])) == []


def test_a_mask_over_the_vocabulary():
    """Rows that kept everything, or do not count, have no ids."""
    keep = torch.rand(3, 4, 6) > 0.5
    keep[..., 2] = True
    keep[1, 1] = True
    keep[2, 3] = False
    counts = torch.ones(3, 4, dtype=torch.bool)
    counts[2, 3] = counts[0, 0] = False
    expected = [row.nonzero()[:, 0].tolist() for row in keep.flatten(0, 1)]
    expected[5] = expected[11] = expected[0] = []
    assert sets(fastpo.kept_from_mask(keep, mask=counts)) == expected
    assert sets(fastpo.kept_from_mask(keep[:2].flatten(0, 1)))[0] != []


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({}, []),
        ({"top_k": 2}, [1, 3]),
        ({"top_k": 5}, []),
        ({"top_p": 0.5}, [1]),
        ({"top_p": 0.51}, [1, 3]),
        ({"top_p": 0.76}, [1, 2, 3, 4]),  # equally likely ones stay together
        ({"min_p": 0.3}, [1, 3]),
        ({"top_k": 2, "top_p": 0.6}, [1]),  # two thirds of what top-k left
    ],
)
def test_logits_under_the_samplers_filter(options, kept, monkeypatch):
    """At any temperature, a number or one per row, and however the rows are cut."""
    temperature = torch.tensor([[0.5, 1.0], [2.0, 0.7], [1.0, 3.0]])
    logits = PROBS.log() * temperature[..., None]
    mask = torch.tensor([[1, 1], [1, 0], [1, 1]], dtype=torch.bool)
    logits[1, 1] = math.nan
    monkeypatch.setattr("fastpo.kept._BLOCK", 10)
    found = fastpo.kept_from_logits(logits, temperature=temperature, mask=mask, **options)
    assert sets(found) == [kept, kept, kept, [], kept, kept]
    half = fastpo.kept_from_logits(logits[0, :1], temperature=0.5, **options)
    assert sets(half) == [kept]


def test_a_token_of_probability_zero_is_never_kept():
    logits = torch.tensor([[0.0, -math.inf, 1.0]])
    assert sets(fastpo.kept_from_logits(logits)) == [[0, 2]]


@pytest.mark.parametrize("shape", [(40, 300), (5, 8, 300)])
def test_the_ratio_of_what_was_drawn_from_these_sets_is_one(shape):
    """REGRESSIONS 45: with the sets of the sampler's logits, through the op, at a temperature."""
    logits = 3 * torch.randn(shape)
    options = {"top_p": 0.8, "temperature": 0.7}
    kept = fastpo.kept_from_logits(logits, **options)
    drawn = fastpo.sampling_mask((logits / 0.7).softmax(-1), top_p=0.8)
    table = (logits / 0.7).masked_fill(~drawn, -math.inf).log_softmax(-1)
    tokens = table.exp().flatten(0, -2).multinomial(1).view(shape[:-1])
    sampled = table.gather(-1, tokens[..., None])[..., 0]
    found = fastpo.token_logprobs(logits, tokens, temperature=0.7, **kept._asdict()).logprobs
    torch.testing.assert_close(found, sampled, atol=1e-5, rtol=0)


ARRAYS, MASK, LOGITS = fastpo.kept_from_arrays, fastpo.kept_from_mask, fastpo.kept_from_logits
ROW = torch.zeros(1, 4)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: ARRAYS([[1], [2]], [[0, 1]]), ValueError, "2 completions and offsets of 1"),
        (lambda: ARRAYS([1, 2], [0, 1]), ValueError, r"\[0, 1\].*from 0 to 2"),
        (lambda: ARRAYS([1, 2], [1, 2]), ValueError, "completion 0 are"),
        (lambda: ARRAYS([[1], [1, 2]], [[0, 1], [0, 2, 1, 2]]), ValueError, "completion 1 are"),
        (lambda: ARRAYS([1.5], [0, 1]), TypeError, "float32, expected ints"),
        (lambda: ARRAYS("ab", [0, 2]), TypeError, "token_ids of completion 0 is str"),
        (lambda: ARRAYS(np.ones((1, 1), int), [0, 1]), ValueError, r"\[1, 1\], expected one"),
        (lambda: ARRAYS([1], [0, 1], mask=torch.ones(3).bool()), ValueError, "3 True, .* 1 token"),
        (lambda: MASK(ROW), TypeError, "keep is torch.float32"),
        (lambda: MASK(ROW[0].bool()), ValueError, r"\[4\], expected"),
        (lambda: MASK(ROW.bool()), ValueError, "row 0 keeps no id"),
        (lambda: LOGITS(ROW * math.nan), ValueError, "row 0 keeps no id"),
        (lambda: LOGITS(ROW, top_p=0.0), ValueError, "top_p is 0.0, expected a share"),
        (lambda: LOGITS(ROW, min_p=2), ValueError, "min_p is 2"),
        (lambda: LOGITS(ROW, top_k=-1), ValueError, "top_k is -1"),
        (lambda: LOGITS(ROW, top_k=0.5), TypeError, "top_k is float"),
        (lambda: LOGITS(ROW, temperature=0.0), ValueError, "temperature is 0.0"),
    ],
)
def test_bad_input_is_refused_in_one_line(call, error, words):
    with pytest.raises(error, match=words) as raised:
        call()
    assert "\n" not in str(raised.value)
