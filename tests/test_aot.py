"""The row kernels compiled for GPUs that are not here: registers, spills, instructions, recompiles.

Everything runs in subprocesses, which compile where this one interprets: under the Triton that is
installed and under 3.6.0, which the GPU images that torch 2.10 and 2.11 come in have. The two lay
tensors out differently, so each claim about machine code is checked under both.

Every kernel at every width for every target is half an hour of compiling (`make aot`). The slow
tests compile what that has shown to be the worst of it, for all targets under both Tritons: the
fused kernel with every option, the most of a row kept, and what spilled once.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from triton_aot import OTHER_TRITON, ROOT, innermost_loops, inspect_elsewhere, run_compiling

TRITONS = [None, pytest.param(OTHER_TRITON, marks=pytest.mark.slow, id="3.6.0")]
TARGETS = ("sm_80", "sm_90", "sm_100", "sm_120", "gfx942")
ALIGNED = (32000, 128256, 151936, 262144)
SCALAR_LOADS = 11  # token, weight, advantage, ...: one each per row
SCALAR_STORES = 9  # loss, log-prob, ..., the token's gradient; zero-fill and sweeps are wide
MOST_BARRIERS = 10  # three merges of at most three, one before the token's store; none in a loop
DETAILS_BARRIERS = 12  # of four merges more
MOST_INSTRUCTIONS = {"bf16": 17.5, "fp32": 16.5}  # per logit, both sweeps, DAPO, sm_80 and sm_90


def there(triton: Path | None) -> Path | None:
    """The folder of another Triton, or a skip."""
    if triton is not None and not triton.is_dir():
        pytest.skip(f"{triton.relative_to(ROOT)} is missing: `make test-all` installs it")
    return triton


def run_python(code: str, *arguments: str, triton: Path | None = None) -> str:
    """Output of a Python program in a process where Triton, the given one, compiles."""
    return run_compiling(code, *arguments, triton=there(triton))


def compile_kernels(targets, dtypes, vocabularies, triton=None, only=()) -> list[dict]:
    options = ["--kernels", "rows", "--targets", *targets, "--dtypes", *dtypes]
    options += ["--vocab", *vocabularies, *(["--only", *only] if only else [])]
    kernels = inspect_elsewhere(options, there(triton))
    assert triton is None or {k["triton"] for k in kernels} == {"3.6.0"}
    return kernels


def check_resources(kernels: list[dict]) -> None:
    """No spills; 16-byte accesses where V is a multiple of 16, one narrow one per row number."""
    for kernel in kernels:
        assert kernel["stack"] == 0 and kernel["spills"] == 0, kernel
        assert kernel["threads"] == 512, kernel
        most = 256 if kernel["target"] == "gfx942" else 129
        assert kernel["registers"] <= most, kernel  # one program of 512 threads fits an SM
        if kernel["target"] != "gfx942":
            check_sweeps(kernel)
        if kernel["vocab"] in ALIGNED:
            assert kernel["wide_loads"] >= 4, kernel
            assert kernel["narrow_loads"] <= SCALAR_LOADS, kernel
            if "fp32 -> bf16" in kernel["kernel"]:  # 4 columns a thread: 8 bytes of bf16
                assert kernel["narrow_stores"] <= 28 + SCALAR_STORES, kernel
            else:
                assert kernel["narrow_stores"] <= SCALAR_STORES, kernel
                assert kernel["wide_stores"] >= 4 or "row_stats" in kernel["kernel"], kernel


def check_sweeps(kernel: dict) -> None:
    """Lanes are threads, so nothing crosses them in a loop; the loops are as short as they were."""
    assert kernel["loop_shuffles"] == 0, kernel
    most = MOST_BARRIERS + DETAILS_BARRIERS * kernel["kernel"].endswith("details")
    assert kernel["barriers"] <= most, kernel
    if kernel["kernel"] == "row_policy_loss" and kernel["vocab"] in ALIGNED:
        instructions = kernel["first_sweep"] + kernel["second_sweep"]
        assert instructions <= MOST_INSTRUCTIONS[kernel["dtype"]], kernel


def show(kernels: list[dict], capsys) -> None:
    """The table, whatever pytest captures: these are what a change of a kernel moves."""
    with capsys.disabled():
        print()
        for k in kernels:
            name = f"{k['kernel']} {k['target']} {k['dtype']} V={k['vocab']} triton {k['triton']}"
            sweeps = f"{k['first_sweep']} + {k['second_sweep']} instructions per logit"
            print(f"{name:72} {k['registers']:4} registers, {sweeps}")


@pytest.mark.parametrize("triton", TRITONS)
def test_resources_on_hopper(triton, capsys):
    kernels = compile_kernels(["sm_90"], ["bf16"], [151936], triton)
    assert {k["kernel"].split(",")[0] for k in kernels} == {
        "row_stats",
        "row_grad",
        "row_policy_loss",
        "scale",
    }
    check_resources(kernels)
    show(kernels, capsys)


@pytest.mark.slow
def test_short_rows_take_fewer_threads_and_spill_nothing():
    """Also two layouts that spilled when a row's tail was summed in larger pieces."""
    few = ["row_policy_loss"]
    kernels = compile_kernels(["sm_90"], ["bf16", "fp32"], [1000, 8192, 16384], OTHER_TRITON, few)
    for kernel in kernels:
        assert kernel["stack"] == 0 and kernel["spills"] == 0, kernel
        if kernel["vocab"] == 16384:
            instructions = kernel["first_sweep"] + kernel["second_sweep"]
            assert instructions <= MOST_INSTRUCTIONS[kernel["dtype"]], kernel
    threads = {(k["dtype"], k["vocab"]): k["threads"] for k in kernels}
    assert threads["bf16", 8192] == 128 and threads["fp32", 16384] == 256
    check_resources(compile_kernels(["sm_100"], ["bf16"], [32000], only=WORST))


WORST = ("row_policy_loss, gated", "row_policy_loss fp32 -> bf16, all options")


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("triton", [None, OTHER_TRITON], ids=["installed", "3.6.0"])
def test_the_worst_kernels_everywhere(target, triton, capsys):
    """At V = 262,144 a lane keeps most; 50,257 is not aligned."""
    kernels = compile_kernels([target], ["bf16", "fp32"], [262144], triton, WORST)
    kernels += compile_kernels([target], ["bf16", "fp32"], [50257], triton, WORST[:1])
    assert len(kernels) == 3 + 2
    check_resources(kernels)
    show(kernels, capsys)


LISTING = """
        /*0000*/                   MOV R1, c[0x0][0x28] ;
.L_x_1:
        /*0010*/              @!P0 LDG.E.128 R4, [R2.64] ;
.L_x_0:
        /*0020*/                   SHFL.BFLY PT, R5, R4, 0x10, 0x1f ;
        /*0030*/              @P1  BRA `(.L_x_0) ;
        /*0040*/              @P0  BRA `(.L_x_1) ;
.L_x_2:
        /*0050*/                   BRA `(.L_x_2);
"""


def test_loops_of_a_listing():
    """The innermost ones alone; the branch to itself that ends every kernel is none."""
    instructions, loops = innermost_loops(LISTING)
    assert len(instructions) == 6 and instructions[1].startswith("LDG.E.128")
    assert [[x.split()[0] for x in loop] for loop in loops] == [["SHFL.BFLY", "BRA"]]


RECOMPILATION = """
import json, torch
from fastpo.kernels import row_grad, row_policy_loss, row_stats, scale
from fastpo.backends.base import ObjectiveParams
from fastpo.kernels._token_loss import ParamNumbers
from fastpo.objective import Objective
from triton_aot import recording_keys

def launch_all(rows, vocab, dtype, temperature, number):
    logits = torch.empty(rows + 1, vocab, dtype=dtype)[1:]
    x, y = torch.zeros(rows + 3)[3:], torch.zeros(rows + 1, dtype=torch.int64)[1:]
    params = ObjectiveParams.from_objective(Objective(kl_coef=0.1, old_kl_coef=0.1))
    params = params._replace(**dict.fromkeys(ParamNumbers._fields, 1 + number))
    row_stats.row_stats(logits, y, temperature, None, None)
    row_grad.row_grad(logits, y, x, x, x, x, x, temperature, None, logits)
    row_policy_loss.row_policy_loss(logits, y, [x] * 8, temperature, None, logits, params)
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
    "vocabularies of a class": keys([5], [151936, 152000, 217472], ["bfloat16"], [1.0]),
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
from aot_launches import row_launches
from triton_aot import compiling_for
for label, launch in row_launches(151936, torch.bfloat16).items():
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
    assert len(lines) == 8
    for line in lines:
        wide, narrow, extended = line.split()[-3:]
        assert int(wide) >= 1 and narrow == "0" and extended == "True", line


SWEEP = """
import json, re, torch
from aot_launches import row_launches
from triton_aot import compiling_for
calls = row_launches(151936, torch.bfloat16)
sweeps = []
for label in ("row_stats", "row_policy_loss"):
    with compiling_for("sm_90") as compiled:
        calls[label]()
    ttgir = compiled[-1].asm["ttgir"]
    layouts = dict(re.findall(r"^(#\\w+) = (.*)", ttgir, re.MULTILINE))
    sweep = re.search(r"scf.for [^\\n]*iter_args.*?math.log", ttgir, re.DOTALL).group()
    sweep = re.sub(r"loc\\(.*?\\)", "", sweep)  # places in the source
    sweep = re.sub(r"%[\\w#:-]+", "%", sweep)  # names of values
    sweep = re.sub(r"#\\w+", lambda name: layouts.get(name[0], name[0]), sweep)
    sweeps.append(sweep.splitlines())
print(json.dumps(sweeps))
"""


@pytest.mark.parametrize("triton", TRITONS)
def test_both_first_sweeps_compile_alike(triton):
    """Same operations on the same layouts in the same order: log-probs agree to the last bit."""
    in_row_stats, in_policy_loss = json.loads(run_python(SWEEP, triton=triton))
    assert len(in_row_stats) > 200
    assert in_row_stats == in_policy_loss


METRIC_SUMS = """
import json, torch
from dataclasses import asdict
from fastpo.kernels import metrics
from triton_aot import compiling_for, read_resources, recording_keys

def launch(tokens):
    x, flags = torch.zeros(tokens + 3)[3:], torch.zeros(tokens + 1, dtype=torch.uint8)[1:]
    metrics.metric_sums(x, x, flags, flags > 0, x, x, None, None, kl=3, kl_ratio_weighted=True)

with recording_keys() as found:
    for tokens in (1, 16, 17, 1000, 1024, 1025, 8192, 131072):
        launch(tokens)
kernels = []
for target in ("sm_80", "sm_90"):
    with compiling_for(target) as compiled:
        launch(100)
    about = {"target": target, "dtype": "fp32", "vocab": 0, "label": "metric_sums"}
    kernels.append(asdict(read_resources(compiled[-1], **about)))
    kernels[-1]["atomics"] = "atomic" in compiled[-1].asm["ttir"]
print(json.dumps([[len(keys) for keys in found.values()], kernels]))
"""


@pytest.mark.parametrize("triton", TRITONS)
def test_metric_sums(triton):
    """One binary for any number of tokens, without spills or atomics."""
    binaries, kernels = json.loads(run_python(METRIC_SUMS, triton=triton))
    assert binaries == [1]
    for kernel in kernels:
        assert kernel["stack"] == kernel["spills"] == 0 and not kernel["atomics"], kernel
        assert kernel["registers"] <= 80, kernel
        assert kernel["wide_loads"] >= 6 or kernel["narrow_loads"] <= 8 * 7, kernel
