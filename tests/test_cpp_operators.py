"""The C++ operators of the row primitives: autograd, compilers, wrong arguments, SIMD levels."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cpp_cases import CLIP, EVERYTHING, assert_same_bits

from fastpo import _extension
from fastpo.backends import cpp as cpp_rows
from fastpo.testing.rows import (
    RowCase,
)

if (reason := cpp_rows.unavailable()) is not None:
    pytest.skip(reason, allow_module_level=True)

pytestmark = pytest.mark.usefixtures("poisoned_empty")


def test_writing_is_seen_by_autograd():
    """Overwriting a tensor that autograd saved must raise in backward, not change its gradient."""
    leaf = torch.randn(4, 20, requires_grad=True)
    capped = leaf.tanh()  # saves its output
    with torch.no_grad():
        cpp_rows.scale_(capped, torch.tensor(2.0))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        capped.sum().backward()
    case = RowCase.random(5, 64, EVERYTHING)
    capped = torch.randn(5, 64, requires_grad=True).tanh()
    with torch.no_grad():
        stats = cpp_rows.row_stats(case.logits, case.tokens, 1.0)
        cpp_rows.row_grad(case.logits, case.tokens, stats, torch.ones(5), None, 1.0, capped)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        capped.sum().backward()


def test_compiles_into_one_graph():
    """The two primitives that a compiler sees are opaque to it, the mutation of `out` included."""
    case = RowCase.random(5, 64, EVERYTHING)
    c, e = torch.randn(5), torch.randn(5)

    def step(logits):
        stats = cpp_rows.row_stats(logits, case.tokens, case.temperature)
        out = torch.empty_like(logits)
        cpp_rows.row_grad(logits, case.tokens, stats, c, e, case.temperature, out)
        return *stats, out * 1.0

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    assert_same_bits([*compiled(case.logits)], [*step(case.logits)])


def test_operators_pass_opcheck():
    case = RowCase.random(4, 33, EVERYTHING)
    ops, t = torch.ops.fastpo, torch.full((4,), 0.8)
    rule = [float(x) for x in cpp_rows.ObjectiveParams.from_objective(EVERYTHING)]
    stats = ops.cpp_row_stats(case.logits, case.tokens, 1.0, t, None)
    grad = (case.tokens, *stats, t, t, 1.0, t)
    loss = (case.tokens, *case.inputs, rule, 1.0, t)
    out, factor = torch.zeros_like(case.logits), torch.tensor(2.0)
    for op, arguments in (
        (ops.cpp_row_stats, (case.logits, case.tokens, 1.0, t, t > 0)),
        (ops.cpp_row_grad, (case.logits, *grad, out)),
        (ops.cpp_row_policy_loss, (case.logits, *loss, None)),
        (ops.cpp_row_policy_loss, (case.logits, *loss, out)),
        (ops.cpp_scale_, (case.logits.clone(), factor)),
    ):
        torch.library.opcheck(op.default, arguments)


def test_wrong_arguments_are_refused_by_the_operators():
    """They are the last line: `fastpo.ops` has checked before. Nothing is read out of bounds."""
    case = RowCase.random(4, 33, CLIP)
    with pytest.raises(RuntimeError, match="tokens must be"):
        cpp_rows.row_stats(case.logits, case.tokens.int(), 1.0)
    with pytest.raises(RuntimeError, match="tokens must be"):
        cpp_rows.row_stats(case.logits, case.tokens[:3], 1.0)
    with pytest.raises(RuntimeError, match="unit stride"):
        cpp_rows.row_stats(case.logits.t().contiguous().t(), case.tokens, 1.0)
    with pytest.raises(RuntimeError, match="float32, bfloat16 or float16"):
        cpp_rows.row_stats(case.logits.double(), case.tokens, 1.0)
    with pytest.raises(RuntimeError, match="2-byte dtype under float32"):
        half = case.logits.bfloat16()
        out = torch.empty_like(half, dtype=torch.float16)
        cpp_rows.row_policy_loss(half, case.tokens, case.inputs, CLIP, 1.0, out)


def simd_levels() -> list[str]:
    return _extension.build_info()["simd_compiled"]


@pytest.mark.slow  # the sanitizers run every level, too
@pytest.mark.skipif("FASTPO_SIMD" in os.environ, reason="this run is at a level of its own")
@pytest.mark.parametrize("level", simd_levels())
def test_every_simd_level(level):
    """These files again in a process of their own, at each level that the build holds."""
    environment = {**os.environ, "FASTPO_SIMD": level}
    probe = [sys.executable, "-c", "import torch, fastpo._C as c; print(c.build_info()['simd'])"]
    probed = subprocess.run(probe, env=environment, capture_output=True, text=True)
    if "expected one of" in probed.stderr:
        pytest.skip(f"this CPU lacks {level}")
    assert probed.stdout.strip() == level, probed.stderr
    if level == _extension.build_info()["simd"]:
        return  # the level of this very process
    # What is left out is shared by all levels: the scalar rule, the operators, the dispatch.
    others = "not (kl_estimators or graph or opcheck or simd or autograd or refused or many_rows)"
    files = map(str, Path(__file__).parent.glob("test_cpp_rows*.py"))
    tests = [sys.executable, "-m", "pytest", "-q", "-x", *files, "-k", others]
    done = subprocess.run(tests, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:]


def test_an_unknown_simd_level_is_refused():
    code = "from fastpo.backends import cpp; print(cpp.unavailable())"
    environment = {**os.environ, "FASTPO_SIMD": "mmx"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True
    )
    assert "FASTPO_SIMD is 'mmx', expected one of" in done.stdout
