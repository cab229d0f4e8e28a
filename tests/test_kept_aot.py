"""The kernels of kept sets, compiled for GPUs that are not here: no spills, wide loads of rows."""

from __future__ import annotations

from pathlib import Path

import pytest
from triton_aot import OTHER_TRITON, ROOT, TARGETS, inspect_elsewhere

NAMES = ["kept_stats", "kept_hidden_grad", "kept_weight_grad"]


def check(targets: list[str], triton: Path | None = None) -> None:
    options = ["--kernels", "kept", "--targets", *targets, "--vocab", 1024]
    kernels = inspect_elsewhere(options, triton)
    assert [k["kernel"] for k in kernels] == NAMES * len(targets)
    for kernel in kernels:
        assert kernel["stack"] == 0 and kernel["spills"] == 0, kernel
        assert kernel["registers"] <= (168 if kernel["target"] == "gfx942" else 128), kernel
        assert kernel["wide_loads"] >= 4, kernel


def test_no_spills_and_wide_loads_on_hopper():
    check(["sm_90"])


@pytest.mark.slow
@pytest.mark.parametrize("triton", [None, OTHER_TRITON], ids=["installed", "3.6.0"])
def test_no_spills_and_wide_loads_everywhere(triton):
    if triton is not None and not triton.is_dir():
        pytest.skip(f"{triton.relative_to(ROOT)} is missing: `make test-all` installs it")
    check(list(TARGETS), triton)
