"""`exp_logits` and its companions compiled for GPUs that are not here: registers, spills, memory.

Under the Triton that is installed and under 3.6.0, which GPU machines with torch 2.11 have.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from triton_aot import OTHER_TRITON, ROOT, run_compiling

TRITONS = [None, pytest.param(OTHER_TRITON, id="3.6.0")]
SHARED_MEMORY = {"sm_80": 166_912, "sm_90": 232_448, "sm_100": 232_448, "sm_120": 101_376}

PROGRAM = """
import json, sys, torch
from dataclasses import asdict
import fastpo
from fastpo.backends.base import ObjectiveParams
from fastpo.kernels import _exp_tiles, exp_entropy_grad, exp_logits, exp_row_grad
from fastpo.kernels import exp_row_policy_loss, exp_row_stats, exp_sums, exp_targets
from triton_aot import compiling_for, read_resources

target, vocab, width, *only = sys.argv[1:]
n, V, D = 8192, int(vocab), int(width)

def meta(*shape, dtype=torch.float32):
    return torch.empty(shape, dtype=dtype, device="meta")

low = torch.bfloat16
hidden, weight, one_bias = meta(n, D, dtype=low), meta(V, D, dtype=low), meta(V, dtype=low)
e, x, totals = meta(n, V + -V % 8, dtype=low)[:, :V], meta(n), meta(2, n)
tokens, rows = meta(n, dtype=torch.int64), meta(n, dtype=torch.int32)
count = meta(1, dtype=torch.int32)
wild, clipped = meta(n, dtype=torch.bool), meta(n, dtype=torch.uint8)
params = ObjectiveParams.from_objective(fastpo.dapo(kl_coef=0.1, kl_ratio_weighted=True))._asdict()

def gemms(name, bias, softcap):
    tile = _exp_tiles.exp_tile(hidden, weight, bias, softcap)
    options = dict(softcap=softcap, tanh_gradient=softcap, inner=0.1)
    operands = (hidden, weight, e, bias, x, x, meta(2, tile.tiles(V), n))
    redo = dict(options, rows=rows, count=count, tile=_exp_tiles.redo_tile(tile))
    return {
        "logits" + name: lambda: exp_logits.exp_logits(*operands, tile, **options),
        "redo" + name: lambda: exp_logits.exp_logits(*operands, **redo),
        "maxima" + name: lambda: exp_logits.exp_logits(*operands, maxima=True, **redo),
    }

numbers = (totals, x, x, x)
small = {
    "targets": lambda: exp_targets.exp_targets(hidden, weight, tokens, one_bias, x, softcap=True),
    "sums": lambda: exp_sums.exp_sums(meta(2, 594, n), totals),
    "wild rows": lambda: exp_sums.wild_rows(totals, x, wild, rows, count),
    "row stats": lambda: exp_row_stats.exp_row_stats(*numbers, x, x),
    "row grad": lambda: exp_row_grad.exp_row_grad(e, tokens, *numbers, x, x, softcap=True),
    "row loss": lambda: exp_row_policy_loss.exp_row_policy_loss(
        e, tokens, *numbers, (x,) * 8, (x, x, x, clipped), x, x, V=V, softcap=True, **params),
    "entropy": lambda: exp_entropy_grad.exp_entropy_grad(
        e, tokens, *numbers, x, x, x, softcap=True),
}
found = []
with compiling_for(target) as compiled:
    heads = (("", None, False), (" bias", one_bias, False), (" softcap", None, True),
             (" bias softcap", one_bias, True))
    calls = {label: call for head in heads for label, call in gemms(*head).items()} | small
    for label, launch in calls.items():
        if only and label not in only:
            continue
        launch()
        context = dict(target=target, dtype="bf16", vocab=V, label=label)
        resources = asdict(read_resources(compiled[-1], **context))
        ptx, mma = compiled[-1].asm["ptx"], ("wgmma", "tcgen05.mma", "mma.sync")
        found.append(resources | {"tensor_cores": sum(ptx.count(name) for name in mma)})
print(json.dumps(found))
"""


def resources(
    target: str,
    *only: str,
    vocab: int = 151936,
    width: int = 4096,
    triton: Path | None = None,
) -> list[dict]:
    """What the compiler made of the kernels, or of `only` these, in a process that compiles."""
    if triton is not None and not triton.is_dir():
        pytest.skip(f"{triton.relative_to(ROOT)} is missing: `make test-all` installs it")
    arguments = (target, str(vocab), str(width), *only)
    return json.loads(run_compiling(PROGRAM, *arguments, triton=triton))


def check(kernels: list[dict], capsys) -> None:
    """Nothing in local memory, all of it in an SM, products by tensor cores."""
    for k in kernels:
        assert k["stack"] == 0 and k["spills"] == 0, k
        assert k["shared"] <= SHARED_MEMORY[k["target"]], k
        product = k["kernel"].split()[0] in ("logits", "redo", "maxima", "targets")
        assert (k["tensor_cores"] > 0) == product, k
        with capsys.disabled():
            print(f"\n{k['kernel']:20} {k['target']:7} {k['registers']:4} registers", end="")


def test_the_logits_gemm_on_hopper(capsys):
    kernels = resources("sm_90", "logits", "redo")
    assert [k["kernel"] for k in kernels] == ["logits", "redo"]
    check(kernels, capsys)


@pytest.mark.aot
@pytest.mark.timeout(900)
@pytest.mark.parametrize("triton", TRITONS)
@pytest.mark.parametrize("size", [(151936, 4096), (50257, 4100)], ids=["whole", "ragged"])
@pytest.mark.parametrize("target", SHARED_MEMORY)
def test_resources_everywhere(target, size, triton, capsys):
    kernels = resources(target, vocab=size[0], width=size[1], triton=triton)
    assert len(kernels) == 4 * 3 + 7
    check(kernels, capsys)
