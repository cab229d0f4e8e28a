"""Launch every Triton kernel once on small shapes: the workload for compute-sanitizer.

compute-sanitizer --tool memcheck --error-exitcode 9 python benchmarks/small_launches.py
"""

from __future__ import annotations

import sys

import torch

import fastpo
from fastpo.backends import triton as triton_rows
from fastpo.backends.base import alias_rows
from fastpo.testing.rows import RowCase, check_policy_loss, check_stats_and_grad

OBJECTIVE = fastpo.grpo(kl_coef=0.1, entropy_coef=0.05)


def launch_all(vocab: int, dtype: torch.dtype, device: torch.device) -> None:
    """Statistics, gradients in and out of place, in the upper half of fp32 rows, and scaling."""
    case = RowCase.random(3, vocab, OBJECTIVE, dtype=dtype, device=device)
    check_stats_and_grad(triton_rows, case)
    for inplace in (False, True):
        check_policy_loss(triton_rows, case, OBJECTIVE, inplace=inplace)
    logits = case.logits.clone()
    if dtype == torch.float32:
        out = alias_rows(logits, torch.bfloat16)
        arguments = (case.tokens, case.inputs, OBJECTIVE, case.temperature, out)
        triton_rows.row_policy_loss(logits, *arguments)
    triton_rows.scale_(logits, torch.tensor(0.5, device=device))


def main() -> None:
    """One short row, one on a block edge, one with a body of blocks before its kept tail."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    reason = triton_rows.unavailable(device)
    if reason is not None:
        sys.exit(f"small_launches: {reason}")
    for vocab in (7, 1024, 50257, 65536):
        for dtype in (torch.float32, torch.bfloat16):
            launch_all(vocab, dtype, device)
    print("small_launches: all kernels ran, all results are right")


if __name__ == "__main__":
    main()
