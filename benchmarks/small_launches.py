"""Launch every kernel on rows of logits once, of the backends "triton" and "cuda", on small shapes:
the workload for compute-sanitizer.

compute-sanitizer --tool memcheck --error-exitcode 9 python benchmarks/small_launches.py
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Sequence

import torch

import fastpo
from fastpo.backends import cuda as cuda_rows
from fastpo.backends import triton as triton_rows
from fastpo.backends.base import Backend, alias_rows
from fastpo.testing.rows import RowCase, check_policy_loss, check_stats_and_grad

VOCABULARIES = (7, 1024, 50257, 65536)
OBJECTIVE = fastpo.grpo(kl_coef=0.1, entropy_coef=0.05)


def launch_all(rows: Backend, vocab: int, dtype: torch.dtype, device: torch.device) -> None:
    """Statistics, gradients in and out of place, in the upper half of fp32 rows, and scaling."""
    case = RowCase.random(3, vocab, OBJECTIVE, dtype=dtype, device=device)
    check_stats_and_grad(rows, case)
    for inplace in (False, True):
        check_policy_loss(rows, case, OBJECTIVE, inplace=inplace)
    logits = case.logits.clone()
    if dtype == torch.float32:
        out = alias_rows(logits, torch.bfloat16)
        arguments = (case.tokens, case.inputs, OBJECTIVE, case.temperature, out)
        rows.row_policy_loss(logits, *arguments)
    rows.scale_(logits, torch.tensor(0.5, device=device))


def main(backends: Sequence[Backend] = (triton_rows, cuda_rows)) -> None:
    """One short row, one on a block edge, one with a body of blocks before its kept tail."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    reasons = {rows: rows.unavailable(device) for rows in backends}
    if all(reasons.values()):
        sys.exit(f"small_launches: {reasons[backends[0]]}")
    for rows in backends:
        if reasons[rows] is not None:
            print(f"small_launches: without {rows.__name__}: {reasons[rows]}")
            continue
        for vocab, dtype in itertools.product(VOCABULARIES, (torch.float32, torch.bfloat16)):
            launch_all(rows, vocab, dtype, device)
    print("small_launches: all kernels ran, all results are right")


if __name__ == "__main__":
    main()
