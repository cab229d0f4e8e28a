"""The kernels compiled for GPUs that are not here: registers, spills, access widths, recompiles.

Everything runs in subprocesses, which compile where this one interprets. FASTPO_AOT_PYTHON names
another interpreter to compile with, say one of an environment with an older Triton.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fastpo.testing.budget import __file__ as _inside_fastpo

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed"
)

REPOSITORY = Path(_inside_fastpo).parents[2]
TARGETS = ("sm_80", "sm_90", "sm_100", "sm_120", "gfx942")
ALIGNED = (32000, 128256, 151936, 262144)
SCALAR_LOADS = 11  # token, weight, advantage, ...: one each per row
SCALAR_STORES = 9  # loss, log-prob, ..., the token's gradient; zero-fill and sweeps are wide


def run_python(code: str, *arguments: str) -> str:
    """Output of a Python program in a process where Triton compiles."""
    python = os.environ.get("FASTPO_AOT_PYTHON", sys.executable)
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    environment.pop("TRITON_INTERPRET", None)
    command = [python, "-c", code, *arguments]
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


def compile_kernels(targets, dtypes, vocabularies) -> list[dict]:
    code = "from fastpo.testing.aot import main; main()"
    options = ["--json", "--targets", *targets, "--dtypes", *dtypes]
    return json.loads(run_python(code, *options, "--vocab", *map(str, vocabularies)))


def check_resources(kernels: list[dict]) -> None:
    """No spills; 16-byte accesses where V is a multiple of 16, one narrow one per row number."""
    for kernel in kernels:
        assert kernel["stack"] == 0 and kernel["spills"] == 0, kernel
        assert kernel["threads"] == 512, kernel
        assert kernel["registers"] <= 129, kernel  # one program of 512 threads fits an SM
        if kernel["vocab"] in ALIGNED:
            assert kernel["wide_loads"] >= 4, kernel
            assert kernel["narrow_loads"] <= SCALAR_LOADS, kernel
            if "fp32 -> bf16" in kernel["kernel"]:  # 4 columns a thread: 8 bytes of bf16
                assert kernel["narrow_stores"] <= 24 + SCALAR_STORES, kernel
            else:
                assert kernel["narrow_stores"] <= SCALAR_STORES, kernel
                assert kernel["wide_stores"] >= 4 or kernel["kernel"] == "row_stats", kernel


def show(kernels: list[dict], capsys) -> None:
    """The table, whatever pytest captures: registers are what a change here moves."""
    with capsys.disabled():
        print()
        for k in kernels:
            name = f"{k['kernel']} {k['target']} {k['dtype']} V={k['vocab']}"
            print(f"{name:58} {k['registers']:4} registers, {k['wide_loads']:3} wide loads")


def test_resources_on_hopper(capsys):
    kernels = compile_kernels(["sm_90"], ["bf16"], [151936])
    assert {k["kernel"] for k in kernels} == {"row_stats", "row_grad", "row_policy_loss", "scale"}
    check_resources(kernels)
    show(kernels, capsys)


@pytest.mark.slow
def test_short_rows_take_fewer_threads_and_spill_nothing():
    kernels = compile_kernels(["sm_90"], ["bf16", "fp32"], [1000, 1024, 8192, 16384])
    for kernel in kernels:
        assert kernel["stack"] == 0 and kernel["spills"] == 0, kernel
    threads = {(k["dtype"], k["vocab"]): k["threads"] for k in kernels}
    assert threads["bf16", 8192] == 128 and threads["bf16", 16384] == 256


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("target", TARGETS)
def test_resources_everywhere(target, capsys):
    kernels = compile_kernels([target], ["bf16", "fp32"], [50257, *ALIGNED])
    assert len(kernels) == 5 * (4 + 5)
    check_resources(kernels)
    show(kernels, capsys)


RECOMPILATION = """
import json, torch
from fastpo.kernels import row_grad, row_policy_loss, row_stats, scale
from fastpo.backends.base import Rule
from fastpo.objective import Objective
from fastpo.testing.aot import recording_keys

def launch_all(rows, vocab, dtype, temperature, number):
    logits = torch.empty(rows + 1, vocab, dtype=dtype)[1:]
    x, y = torch.zeros(rows + 3)[3:], torch.zeros(rows + 1, dtype=torch.int64)[1:]
    rule = Rule.from_objective(Objective(kl_coef=0.1, old_kl_coef=0.1))._asdict()
    whole = ("surrogate", "kl", "kl_ratio_weighted", "old_kl", "gate", "two_sided")
    rule |= {field: 1 + number for field in rule if field not in whole}
    row_stats.row_stats(logits, y, temperature, None, None)
    row_grad.row_grad(logits, y, x, x, x, x, x, temperature, None, logits)
    row_policy_loss.row_policy_loss(logits, y, *[x] * 8, temperature, None, logits, **rule)
    scale.scale_(logits, x[0])

def keys(lengths, vocabularies, dtypes, temperatures):
    with recording_keys() as found:
        for dtype in dtypes:
            for vocab in vocabularies:
                for i, rows in enumerate(lengths):
                    temperature = temperatures[i % len(temperatures)]
                    launch_all(rows, vocab, getattr(torch, dtype), temperature, 0.01 * i)
    return {name: len(kernel) for name, kernel in found.items()}

lengths = [1, 2, 15, 16, 17, 1024, *range(100, 100 + 7 * 44, 7)]
temperatures = [1.0, 0.5, 0.6, 0.7, 0.8, 0.9, 1.1, 1.5, 2.0, 1e-3]
assert len(set(lengths)) == 50
print(json.dumps({
    "lengths": keys(lengths, [4096], ["bfloat16"], temperatures),
    "dtypes": keys([5, 16], [4096], ["bfloat16", "float16", "float32"], [1.0]),
    "vocabularies of a class": keys([5], [151936, 128256, 32000 + 48 * 512], ["bfloat16"], [1.0]),
    "a vocabulary of another class": keys([5], [151936, 50257], ["bfloat16"], [1.0]),
}))
"""


def test_nothing_recompiles():
    """REGRESSIONS 27: 50 lengths, 10 temperatures, any coefficients: one binary."""
    counts = json.loads(run_python(RECOMPILATION))
    kernels = {"_row_stats_kernel", "_row_grad_kernel", "_row_policy_loss_kernel", "_scale_kernel"}
    expected = {"lengths": 1, "dtypes": 3, "vocabularies of a class": 1}
    expected["a vocabulary of another class"] = 2
    for what, binaries in expected.items():
        found = {name.rsplit(".")[-1]: count for name, count in counts[what].items()}
        assert found == dict.fromkeys(kernels, binaries), what


INT64_OFFSETS = """
import re, torch
from fastpo.testing.aot import compiling_for, launches
for label, launch in launches(151936, torch.bfloat16).items():
    with compiling_for("sm_90") as compiled:
        launch()
    ttir = compiled[-1].asm["ttir"]
    wide = len(re.findall(r"arith.muli .* : i64", ttir))
    narrow = len(re.findall(r"arith.muli %(?:pid|row)\\S* .* : i32", ttir))
    print(label, wide, narrow, "arith.extsi" in ttir)
"""


def test_row_offsets_are_computed_in_64_bits():
    """1: program id and stride are widened before they are multiplied, in every kernel."""
    lines = run_python(INT64_OFFSETS).splitlines()
    assert len(lines) == 4
    for line in lines:
        wide, narrow, extended = line.split()[-3:]
        assert int(wide) >= 1 and narrow == "0" and extended == "True", line


SWEEP = """
import json, re, torch
from fastpo.testing.aot import compiling_for, launches
calls = launches(151936, torch.bfloat16)
sweeps = []
for label in ("row_stats", "row_policy_loss"):
    with compiling_for("sm_90") as compiled:
        calls[label]()
    ttgir = compiled[-1].asm["ttgir"]
    layouts = re.findall(r"^#(?:blocked|linear)\\w* = .*", ttgir, re.MULTILINE)
    sweep = re.search(r"scf.for [^\\n]*iter_args.*?math.log", ttgir, re.DOTALL).group()
    sweep = re.sub(r"loc\\(.*?\\)", "", sweep)  # places in the source
    sweep = re.sub(r"%[\\w#:-]+", "%", sweep)  # names of values
    sweeps.append(sorted(layouts) + sweep.splitlines())
print(json.dumps(sweeps))
"""


def test_both_first_sweeps_compile_alike():
    """Same operations on the same layouts in the same order: log-probs agree to the last bit."""
    in_row_stats, in_policy_loss = json.loads(run_python(SWEEP))
    assert len(in_row_stats) > 200
    assert in_row_stats == in_policy_loss
