"""`exp_logits` and its companions compiled for GPUs that are not here: registers, spills, memory.

Under the Triton that is installed and under 3.6.0, which GPU machines with torch 2.11 have. All of
them for all targets are compiled by `make aot`; the slow tests compile those of the most work.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from triton_aot import OTHER_TRITON, ROOT, inspect_elsewhere

SHARED_MEMORY = {"sm_80": 166_912, "sm_90": 232_448, "sm_100": 232_448, "sm_120": 101_376}
PRODUCTS = ("exp_logits", "exp_targets")
WORST = ("exp_logits, bias and softcap", "exp_logits, redo, bias and softcap")
UNEVEN = ("exp_logits", "exp_logits, softcap", "exp_logits, redo, bias")  # spilled 6 to 56


def resources(
    target: str, *only: str, vocab: int = 151936, width: int = 4096, triton: Path | None = None
) -> list[dict]:
    """What the compiler made of the kernels `only`, in a process that compiles."""
    if triton is not None and not triton.is_dir():
        pytest.skip(f"{triton.relative_to(ROOT)} is missing: `make test-all` installs it")
    options = ["--kernels", "exp", "--targets", target, "--vocab", vocab, "--width", width]
    return inspect_elsewhere([*options, "--only", *only], triton)


def check(kernels: list[dict], capsys) -> None:
    """Nothing in local memory, all of it in an SM, products by tensor cores."""
    for k in kernels:
        assert k["stack"] == 0 and k["spills"] == 0, k
        assert k["shared"] <= SHARED_MEMORY[k["target"]], k
        assert (k["tensor_cores"] > 0) == k["kernel"].startswith(PRODUCTS), k
        with capsys.disabled():
            print(f"\n{k['kernel']:36} {k['target']:7} {k['registers']:4} registers", end="")


def test_the_logits_gemm_on_hopper(capsys):
    kernels = resources("sm_90", "exp_logits", "exp_logits, redo")
    assert [k["kernel"] for k in kernels] == ["exp_logits", "exp_logits, redo"]
    check(kernels, capsys)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("triton", [None, OTHER_TRITON], ids=["installed", "3.6.0"])
@pytest.mark.parametrize("target", SHARED_MEMORY)
def test_the_worst_kernels_everywhere(target, triton, capsys):
    """A head with everything, of sizes that no tile divides and TMA cannot read; one it can; and
    GPT-2's vocabulary, every column of which has a mask of its own."""
    kernels = resources(target, *WORST, vocab=50257, width=4100, triton=triton)
    kernels += resources(target, WORST[0], triton=triton)
    kernels += resources(target, *UNEVEN, vocab=50257, triton=triton)
    assert len(kernels) == 6
    check(kernels, capsys)
