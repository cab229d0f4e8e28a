"""What does not depend on how many ranks share the vocabulary, and how far the rest is apart."""

from __future__ import annotations

import sys
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from ranks import run_rank, run_ranks

import fastpo
from fastpo.testing.budget import assert_within_budget
from fastpo.testing.linear import LinearCase

FIELDS = ("loss", "logprobs", "entropy")
VOCABULARY = 320


def degree(rank: int, ranks: int) -> None:
    objective = fastpo.dapo(kl_coef=0.1, entropy_coef=0.05)
    part = VOCABULARY // ranks
    rows = slice(rank * part, (rank + 1) * part)
    for dtype in (torch.float32, torch.bfloat16):
        whole = LinearCase.random(dtype=dtype, vocabulary=VOCABULARY)
        case = replace(whole, weight=whole.weight[rows])
        runs = []
        for _ in range(2):
            result, grads = case.fused(objective, tp_group=dist.group.WORLD)
            runs.append([*(getattr(result, name).detach() for name in FIELDS), *grads])
        assert all(torch.equal(first, again) for first, again in zip(*runs, strict=True))
        for value in runs[0][:-1]:  # all but the shard's own gradient
            everywhere = [torch.empty_like(value) for _ in range(ranks)]
            dist.all_gather(everywhere, value)
            assert all(torch.equal(other, value) for other in everywhere)
        exact, truth = whole.eager(objective, torch.float64)
        single, grads = whole.fused(objective)
        for name, value in zip(FIELDS[1:], runs[0][1:], strict=False):
            wanted = getattr(exact, name).where(whole.mask, 0)
            assert_within_budget(value, wanted, getattr(single, name), name=name)
        assert_within_budget(runs[0][3], truth[0], grads[0], name="hidden")
        assert_within_budget(runs[0][4], truth[1][rows], grads[1][rows], name="weight")


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 4])
def test_every_rank_has_the_same_bits_and_the_error_of_one_process(ranks, tmp_path):
    """And a second run has them again. Other degrees have others (docs/distributed.md)."""
    run_ranks(tmp_path, ranks, degree)


if __name__ == "__main__":
    run_rank(*sys.argv[1:], globals())
