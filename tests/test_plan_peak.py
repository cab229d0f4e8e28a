"""`fastpo plan` against the bytes that a call allocates, counted exactly: within 3 %.

tools/plan_peaks.py counts the GPU's way without one, at the sizes that GPUs train; the CPU's runs.
"""

from __future__ import annotations

import pytest

pytest.importorskip("triton.runtime.interpreter")

from plan_peaks import (
    BF16,
    FP16,
    FP32,
    OPTIONS,
    SHAPES,
    as_on_a_gpu,
    counted,
    interpreted,
    planned,
    planned_option,
)

from fastpo import plan
from fastpo.ops import linear_chunks

SHARE = 0.03  # that plan and count may differ by
SLOW = pytest.mark.slow
DTYPES = [BF16, *(pytest.param(dtype, marks=SLOW) for dtype in (FP16, FP32))]


@pytest.fixture
def on_gpu():
    if not interpreted():
        pytest.skip("Triton compiles here")
    with as_on_a_gpu():
        yield


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_every_shape(shape, dtype, on_gpu):
    """REGRESSIONS 80: narrow hidden states took a buffer that nothing waited in."""
    assert planned(shape, dtype) == pytest.approx(counted(shape, dtype), rel=SHARE)


@pytest.mark.parametrize("path", plan.EXP_PATHS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_exponentials(shape, path, on_gpu):
    """REGRESSIONS 80: kept exponentials stood beside the results that they were no longer for."""
    op = "linear_token_logprobs" if path.endswith("kept") else "linear_policy_loss"
    found = counted(shape, BF16, path, op=op)
    assert planned(shape, BF16, path) == pytest.approx(found, rel=SHARE)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("option", OPTIONS)
def test_every_option(option, dtype, on_gpu):
    for shape in (SHAPES["one super-chunk"], SHAPES["two"]):
        found = counted(shape, dtype, **OPTIONS[option])
        assert planned_option(option, shape, dtype) == pytest.approx(found, rel=SHARE)


def test_flat_in_tokens(on_gpu):
    """Beyond results, inputs' size and 32 bytes a token, from one super-chunk on."""
    extra = []
    for tokens in (16384, 65536):
        shape = (tokens, 4096, 151936)
        extra.append(counted(shape, BF16) - 2 * tokens * 4096)
    assert extra[1] == pytest.approx(extra[0], rel=1e-3)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", [512, 1500])
@pytest.mark.parametrize(
    "option", [None, "softcap", *(pytest.param(x, marks=pytest.mark.slow) for x in ("log-probs",))]
)
def test_on_a_cpu(option, tokens, dtype, monkeypatch):
    """Run, not imagined: one chunk, and three of which the last is ragged."""
    monkeypatch.setattr(linear_chunks, "CPU_BUDGET", 2**24)
    options, shape = OPTIONS.get(option, {}), (tokens, 128, 8000)
    found = counted(shape, dtype, None, device="cpu", **options)
    told = planned(shape, dtype, device="cpu", softcap="softcap" in options)
    assert told == pytest.approx(found, rel=SHARE)
