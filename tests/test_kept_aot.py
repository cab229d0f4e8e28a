"""The kernels of kept sets, compiled for GPUs that are not here: no spills, wide loads of rows."""

from __future__ import annotations

import pytest
from triton_aot import OTHER_TRITON, ROOT, TARGETS, inspect_elsewhere

TRITONS = {"installed": None, "3.6.0": OTHER_TRITON}


@pytest.mark.parametrize(
    ("target", "triton"),
    [
        ("sm_90", "installed"),
        *(
            pytest.param(target, triton, marks=pytest.mark.slow)
            for target in TARGETS
            for triton in TRITONS
            if (target, triton) != ("sm_90", "installed")
        ),
    ],
)
def test_no_spills_and_wide_loads_of_the_rows_of_a_head(target, triton):
    folder = TRITONS[triton]
    if folder is not None and not folder.is_dir():
        pytest.skip(f"{folder.relative_to(ROOT)} is missing: `make test-all` installs it")
    options = ["--kernels", "kept", "--targets", target, "--vocab", 1024]
    kernels = inspect_elsewhere(options, folder)
    names = ["kept_stats", "kept_hidden_grad", "kept_weight_grad"]
    assert [k["kernel"] for k in kernels] == names
    for kernel in kernels:
        assert kernel["stack"] == 0 and kernel["spills"] == 0, kernel
        assert kernel["registers"] <= (168 if target == "gfx942" else 128), kernel
        assert kernel["wide_loads"] >= 4, kernel
