"""Vocabulary shards on two ranks: logits [N, V / ranks], and kept sets on logits and heads.

Against one process with all columns, which the tests of those ops compare with the specification.
"""

from __future__ import annotations

import math
import sys

import pytest
import torch
import torch.distributed as dist
from ranks import run_rank, run_ranks
from torch import Tensor

import fastpo

V, SHARDS = 307, (100, 207)
OBJECTIVES = {
    "dapo_all": fastpo.dapo(ratio_max=4.0, kl_coef=0.1, entropy_coef=0.05),
    "gspo": fastpo.gspo(),
    "rule": lambda logprobs, entropy, tokens: -tokens.advantages * logprobs - 0.1 * entropy,
}


def close(actual: Tensor, expected: Tensor, rtol: float = 1e-6) -> None:
    assert actual.shape == expected.shape
    scale = expected.norm().clamp(min=1) if expected.ndim == 0 else expected.norm()
    error = (actual - expected).norm()
    assert error <= rtol * scale, f"{error} of {scale}"


def columns(rank: int) -> slice:
    start = sum(SHARDS[:rank])
    return slice(start, start + SHARDS[rank])


def of_logits(logits: Tensor, tokens: Tensor, objective, *, fused=True, **options):
    """(loss, logprobs, entropy, dlogits)."""
    leaf = logits.clone().requires_grad_()
    loss = {n: options.pop(n, None) for n in ("advantages", "old_logprobs", "ref_logprobs")}
    if callable(objective):
        loss["ref_logprobs"] = None
    given = leaf if not options.get("inplace") else leaf * 1
    if fused:
        result = fastpo.policy_loss(given, tokens, objective=objective, **loss, **options)
    else:
        scored = fastpo.token_logprobs(given, tokens, **options)
        result = fastpo.policy_loss_from_logprobs(
            scored.logprobs,
            objective=objective,
            entropy=scored.entropy,
            mask=options["mask"],
            **loss,
        )
    (3 * result.loss).backward()
    return result.loss.detach(), result.logprobs, result.entropy, leaf.grad


def sharded_logits(rank: int, ranks: int) -> None:
    torch.manual_seed(0)
    for name, objective in OBJECTIVES.items():
        logits = 3 * torch.randn(3, 7, V)
        tokens = torch.randint(V, (3, 7))
        options = {"mask": torch.rand(3, 7) > 0.2, "temperature": 0.5 + torch.rand(3, 7)}
        logits[~options["mask"]] = math.nan
        if name == "gspo":  # padded columns, all of this rank's
            logits[..., :100] = -math.inf
            tokens.clamp_(min=100)
        scored = fastpo.token_logprobs(logits, tokens, **options).logprobs
        old, ref = (scored + 0.3 * torch.randn(3, 7) for _ in range(2))
        options |= {"advantages": torch.randn(3), "old_logprobs": old}
        options["ref_logprobs"] = ref if name == "dapo_all" else None
        expected = of_logits(logits, tokens, objective, **options)
        own = logits[..., columns(rank)].contiguous()
        for extra in ({}, {"inplace": True}, {"fused": False}):
            given = options | extra | {"tp_group": dist.group.WORLD}
            *numbers, grad = of_logits(own, tokens, objective, **given)
            for got, want in zip(numbers, expected, strict=False):
                close(got, want)
            close(grad, expected[3][..., columns(rank)])
    with pytest.raises(ValueError, match=r"expected an id in \[0, 307\)"):
        fastpo.token_logprobs(own, tokens + V, tp_group=dist.group.WORLD)


@pytest.mark.slow
def test_logits_of_vocabulary_shards_on_two_ranks(tmp_path):
    run_ranks(tmp_path, 2, sharded_logits)


def sharded_kept_sets(rank: int, ranks: int) -> None:
    from test_kept_sets import KeptBatch  # this process is a script: its folder is on the path

    group = {"tp_group": dist.group.WORLD}
    for number, (dtype, dense) in enumerate(
        [(torch.float32, True), (torch.float32, False), (torch.bfloat16, True)]
    ):
        torch.manual_seed(number)
        batch = KeptBatch(dtype, dense=dense, bias=torch.randn(V).to(dtype))
        for row, first in ((4, 0), (8, 100)):  # tokens that are the first column of a shard
            ids = batch.ids[batch.offsets[row] : batch.offsets[row + 1]]
            if first not in ids:
                ids[0] = first
            batch.tokens[0, row] = first
            assert ids.unique().numel() == ids.numel()
            batch.mask[0, row] = True
        objective = OBJECTIVES["dapo_all"]
        for backend in ("torch", "cpp"):
            whole, hidden_grad, weight_grad = batch.linear(objective, backend)
            weight, bias = batch.weight, batch.head["bias"]
            batch.weight = weight[columns(rank)].clone()
            batch.head["bias"] = bias[columns(rank)].clone()
            result, *grads = batch.linear(objective, backend, **group)
            batch.weight, batch.head["bias"] = weight, bias
            exact = 1e-2 if dtype == torch.bfloat16 else 1e-6  # gradients are rounded to bf16
            for field in ("loss", "logprobs", "entropy"):
                close(getattr(result, field), getattr(whole, field))
            for got, want in zip(grads, (hidden_grad, weight_grad[columns(rank)]), strict=True):
                close(got, want, exact)
            logits = batch.logits(torch.float32)
            options = batch.options(objective) | batch.kept | {"advantages": batch.advantages}
            options |= {"temperature": 0.8, "backend": backend}
            options.pop("objective")
            expected = of_logits(logits, batch.tokens, objective, **options)
            own = logits[..., columns(rank)].contiguous()
            *numbers, grad = of_logits(own, batch.tokens, objective, **options, **group)
            for got, want in zip((*numbers, grad), expected[:3], strict=False):
                close(got, want)
            close(grad, expected[3][..., columns(rank)])
    batch.ids[0] = 2 * V  # every rank has a head of V here
    with pytest.raises(ValueError, match=r"is 614 \(row 0\), expected an id in \[0, 614\)"):
        batch.linear(objective, "torch", **group)


@pytest.mark.slow
def test_kept_sets_over_vocabulary_shards_on_two_ranks(tmp_path):
    run_ranks(tmp_path, 2, sharded_kept_sets)


def test_a_group_that_is_none():
    logits = torch.randn(2, 5)
    with pytest.raises(TypeError, match=r"tp_group is str, .* over which logits are sharded"):
        fastpo.token_logprobs(logits, torch.zeros(2, dtype=torch.long), tp_group="tp")


if __name__ == "__main__":
    run_rank(*sys.argv[1:], globals())
