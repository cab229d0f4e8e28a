"""The kernels of kept sets, compiled for GPUs that are not here: no spills, wide loads of rows."""

from __future__ import annotations

import json

import pytest
from triton_aot import run_compiling

CODE = """
import json, sys
from dataclasses import asdict
import torch
from triton_aot import compiling_for, read_resources
from fastpo.kernels import kept_rows

target = sys.argv[1]
hidden, weight = torch.zeros(4, 4096).bfloat16(), torch.zeros(1024, 4096).bfloat16()
head = (torch.zeros(4).long(), torch.arange(32), torch.arange(0, 33, 8), 1.0)
row, bias = torch.ones(4), torch.zeros(1024).bfloat16()
with compiling_for(target) as compiled:
    stats, logits = kept_rows.kept_stats(hidden, weight, bias, *head, row, 1.0, True, row.bool())
    outs = (torch.empty_like(hidden), torch.empty_like(weight), bias)
    numbers = (1.0, True, logits, tuple(stats), row, row)
    kept_rows.kept_grad(hidden, weight, *head, row, *numbers, *outs, False)
options = {"target": target, "dtype": "bf16", "vocab": 1024}
print(json.dumps([
    asdict(read_resources(kernel, label=kernel.metadata.name, **options)) for kernel in compiled
]))
"""


@pytest.mark.parametrize(
    "target", ["sm_90", *(pytest.param(x, marks=pytest.mark.aot) for x in ("sm_80", "gfx942"))]
)
def test_no_spills_and_wide_loads_of_the_rows_of_a_head(target):
    kernels = json.loads(run_compiling(CODE, target, triton=None))
    assert [k["kernel"] for k in kernels] == [
        "_kept_stats_kernel",
        "_kept_hidden_grad_kernel",
        "_kept_weight_grad_kernel",
    ]
    for kernel in kernels:
        assert kernel["stack"] == 0 and kernel["spills"] == 0, kernel
        assert kernel["registers"] <= 128 and kernel["wide_loads"] >= 4, kernel
