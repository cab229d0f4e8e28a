"""The linear ops on "triton-exp" with a head sharded along V over processes."""

from __future__ import annotations

import os
import subprocess
import sys
import traceback
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import fastpo
from fastpo.testing.budget import relative_error
from fastpo.testing.interpreter import fix_arithmetic
from fastpo.testing.linear import LinearCase

SHARDS = (100, 1, 206)  # of 307 columns, ragged
OBJECTIVES = (fastpo.dapo(entropy_coef=0.05), fastpo.cispo(), fastpo.gspo())


def case_of(objective) -> LinearCase:
    """A head with everything; for cispo plain, with rows that are redone and a token id whose
    shard is another rank's."""
    if objective.surrogate != "cispo":
        head = {"bias": True, "softcap": 4.0, "logit_scale": 1.2, "temperature": 0.7}
        return LinearCase.random(dtype=torch.bfloat16, width=64, **head)
    case = LinearCase.random(dtype=torch.bfloat16, width=64)
    hidden, weight, mask = case.hidden.clone(), case.weight.float(), case.mask.clone()
    for row, number in enumerate((65, 105, 300)):
        token = case.tokens[0, row]
        other = weight[(token + 150) % 307]
        hidden[0, row] = (other * (number / (other @ (other - weight[token])))).bfloat16()
    mask[0, :3] = True
    return replace(case, hidden=hidden, mask=mask)


def one_rank(rank: int) -> None:
    """The same log-probs as of one process; gradients to bf16's rounding."""
    start = sum(SHARDS[:rank])
    rows = slice(start, start + SHARDS[rank])
    for objective in OBJECTIVES:
        whole = case_of(objective)
        bias = None if whole.bias is None else whole.bias[rows]
        case = replace(whole, weight=whole.weight[rows], bias=bias)
        options = {"backend": "triton-exp", "chunk_tokens": 42}
        expected, grads = whole.fused(objective, **options)
        for run in (case.fused, case.two_step):
            result, shard_grads = run(objective, tp_group=dist.group.WORLD, **options)
            for field in ("loss", "logprobs", "entropy"):
                torch.testing.assert_close(
                    getattr(result, field), getattr(expected, field), rtol=2e-6, atol=2e-6
                )
            hidden, weight, *rest = shard_grads
            assert relative_error(hidden, grads[0]) < 2**-7  # bf16 sums over ranks
            assert relative_error(weight, grads[1][rows]) < 2**-8
            assert not rest or relative_error(rest[0], grads[2][rows]) < 2**-8


def main(rank: str, rendezvous: str) -> None:
    """One process."""
    fix_arithmetic()
    options = {"rank": int(rank), "world_size": len(SHARDS)}
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", **options)
    try:
        one_rank(int(rank))
        dist.barrier()
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)  # see test_distributed_linear.py


@pytest.mark.slow
def test_shards_on_three_ranks(tmp_path):
    """Sums of S and M, the owner's z_y, and one maximum for the rows to redo."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "1"}
    environment["PYTHONPATH"] = str(Path(__file__).parents[1])
    processes = [
        subprocess.Popen(
            [sys.executable, __file__, str(rank), str(tmp_path / "rendezvous")],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(len(SHARDS))
    ]
    errors = [process.communicate(timeout=250)[1] for process in processes]
    for process, error in zip(processes, errors, strict=True):
        assert process.returncode == 0, error


if __name__ == "__main__":
    main(*sys.argv[1:])
