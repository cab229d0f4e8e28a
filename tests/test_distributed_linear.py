"""The linear ops over several processes: a head sharded along V, and inside FSDP2."""

from __future__ import annotations

import sys
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from ranks import run_rank, run_ranks
from torch import Tensor, nn

import fastpo
from fastpo.ops import linear_chunks
from fastpo.ops.tensor_parallel import _merge
from fastpo.testing.linear import LinearCase

SHARDS = {2: (100, 207), 3: (1, 250, 56)}  # of 307 columns, ragged
OBJECTIVES = {
    "dapo_all": fastpo.dapo(ratio_max=4.0, kl_coef=0.1, entropy_coef=0.05),
    "cispo": fastpo.cispo(),
    "gspo": fastpo.gspo(),
}


def close(actual: Tensor, expected: Tensor) -> None:
    assert actual.shape == expected.shape
    assert (actual - expected).norm() <= 1e-6 * expected.norm().clamp(min=1)


def sharded_case(case: LinearCase, rank: int, ranks: int) -> tuple[LinearCase, slice]:
    start = sum(SHARDS[ranks][:rank])
    rows = slice(start, start + SHARDS[ranks][rank])
    bias = None if case.bias is None else case.bias[rows]
    return replace(case, weight=case.weight[rows], bias=bias), rows


def vocabulary_parallel(rank: int, ranks: int) -> None:
    for name, objective in OBJECTIVES.items():
        whole = LinearCase.random(bias=True, softcap=3.0, logit_scale=1.2, temperature=0.7)
        if name == "cispo":  # a shard whose logits are all -inf, as padded vocabularies have
            whole.bias[:100] = -torch.inf
            whole = replace(whole, softcap=None, tokens=whole.tokens.clamp(min=101))
        case, rows = sharded_case(whole, rank, ranks)
        expected, grads = whole.fused(objective)
        result, shard_grads = case.fused(objective, tp_group=dist.group.WORLD, chunk_tokens=16)
        for field in ("loss", "logprobs", "entropy"):
            close(getattr(result, field), getattr(expected, field))
        for grad, full in zip(shard_grads, (grads[0], grads[1][rows], grads[2][rows]), strict=True):
            close(grad, full)
        two_step, two_grads = case.two_step(objective, tp_group=dist.group.WORLD)
        close(two_step.loss, expected.loss)
        close(two_grads[0], grads[0])
    many = LinearCase.random(shape=(4, 250))
    case, rows = sharded_case(many, rank, ranks)
    linear_chunks.CPU_BUDGET = 256 * 207 * 4  # ranks that chose their own chunks would part here
    _, grads = case.fused(OBJECTIVES["gspo"], tp_group=dist.group.WORLD)
    close(grads[1], many.fused(OBJECTIVES["gspo"])[1][1][rows])
    with pytest.raises(ValueError, match="expected an id in"):
        replace(case, tokens=case.tokens + 307).fused(objective, tp_group=dist.group.WORLD)


def test_vocabulary_shards_on_two_ranks(tmp_path):
    run_ranks(tmp_path, 2, vocabulary_parallel)


@pytest.mark.slow
def test_vocabulary_shards_on_three_ranks(tmp_path):
    run_ranks(tmp_path, 3, vocabulary_parallel)


class TinyModel(nn.Module):
    """A trunk and a head whose loss is computed inside forward, where FSDP2 has gathered them."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.trunk = nn.Linear(24, 24)
        self.head = nn.Linear(24, 307)

    def forward(self, case: LinearCase, count: int) -> Tensor:
        return fastpo.linear_policy_loss(
            self.trunk(case.hidden).tanh(),
            self.head.weight,
            case.tokens,
            case.advantages,
            bias=self.head.bias,
            **(case.options(OBJECTIVES["dapo_all"]) | {"normalizer": count}),
        ).loss


def half(case: LinearCase, rank: int) -> LinearCase:
    names = ("hidden", "tokens", "advantages", "mask", "old_logprobs", "ref_logprobs")
    return replace(case, **{name: getattr(case, name)[2 * rank : 2 * rank + 2] for name in names})


def fsdp(rank: int, ranks: int) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    case = LinearCase.random(shape=(4, 21))
    count = int(case.mask.sum())
    alone = TinyModel()
    alone(case, count).backward()
    model = TinyModel()
    fully_shard(model, mesh=init_device_mesh("cpu", (ranks,)))
    (model(half(case, rank), count) * ranks).backward()  # FSDP averages over ranks, the loss sums
    for (name, got), (_, want) in zip(
        model.named_parameters(), alone.named_parameters(), strict=True
    ):
        assert (got.grad.full_tensor() - want.grad).norm() < 1e-6 * want.grad.norm(), name
    model.reshard()
    with pytest.raises(TypeError, match=r"weight is a sharded DTensor.*inside the model's forward"):
        fastpo.linear_policy_loss(
            case.hidden, model.head.weight, case.tokens, case.advantages, objective=fastpo.dapo()
        )


@pytest.mark.slow
def test_inside_fsdp2_on_two_ranks(tmp_path):
    """REGRESSIONS 26: equal to one process; outside of forward the weight is refused."""
    run_ranks(tmp_path, 2, fsdp)


def test_merged_statistics_are_those_of_the_whole_row():
    """The merge alone, in this process: shards far apart, one of -inf, a single finite logit."""
    from fastpo.backends import torch as torch_rows

    logits = 5 * torch.randn(6, 40, dtype=torch.float64)
    logits[0, :10] = -torch.inf
    logits[1, 10:] += 500
    logits[2, 1:] = -torch.inf
    logits[3] -= 1e4
    tokens = torch.tensor([12, 3, 0, 39, 10, 9])
    whole = torch_rows.row_stats(logits, tokens, 1.0)
    parts, start = [], 0
    for size in (10, 25, 5):
        local = tokens - start
        owned = (local >= 0) & (local < size)
        shard = torch_rows.row_stats(logits[:, start : start + size], local.where(owned, 0), 1.0)
        target = (shard.logprobs + shard.log_sum).where(owned, -torch.inf)
        shift = shard.log_sum - shard.entropy
        parts.append(torch.stack([shard.row_max, shard.log_sum, shift, target], 1))
        start += size
    merged = _merge(torch.stack(parts), torch.zeros(6, dtype=torch.bool), None)
    outside = torch.arange(6) == 2
    marked = _merge(torch.stack(parts), outside, None)
    assert torch.equal(marked.logprobs.isnan(), outside)  # its row only, and only there
    assert torch.equal(marked.entropy, merged.entropy)
    for name, value in merged._asdict().items():
        torch.testing.assert_close(value, getattr(whole, name), rtol=1e-12, atol=1e-12, msg=name)


if __name__ == "__main__":
    run_rank(*sys.argv[1:], globals())
