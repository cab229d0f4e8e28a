"""pass@k, maj@k and intervals against their definitions."""

import itertools
import math
import statistics

import pytest

from fastpo.trainer.run.scores import interval, majority_at, pass_at


@pytest.mark.parametrize("right", [[True, False, False, True, False], [False] * 4, [True] * 3])
def test_pass_at_k_is_the_share_of_subsets_with_a_right_answer(right):
    for k in range(1, len(right) + 1):
        subsets = [any(chosen) for chosen in itertools.combinations(right, k)]
        assert pass_at(k, right) == pytest.approx(statistics.fmean(subsets))


def test_majority_votes_over_texts_and_shares_ties():
    texts = ["4", "5", "4", "5", "5", "6"]
    right = [text == "4" for text in texts]
    assert majority_at(1, texts, right) == pytest.approx(2 / 6)
    assert majority_at(2, texts, right) == pytest.approx((1 / 2 + 1 / 2 + 0) / 3)
    assert majority_at(3, texts, right) == pytest.approx((1 + 0) / 2)
    assert majority_at(6, texts, right) == 0.0


@pytest.mark.parametrize(("mean", "problems"), [(0.0, 20), (1.0, 20), (0.3, 50), (0.5, 400)])
def test_the_interval_ends_where_the_score_test_begins_to_reject(mean, problems):
    """Wilson: |mean - p| = 1.96 sqrt(p (1 - p) / n) at both ends that are not 0 or 1."""
    for end in interval(mean, problems):
        if 0 < end < 1:
            z = abs(mean - end) / math.sqrt(end * (1 - end) / problems)
            assert z == pytest.approx(1.959964, rel=1e-6)
    low, high = interval(mean, problems)
    assert 0 <= low <= mean <= high <= 1 and high - low > 0
