"""The GPU benchmarks on a machine without one: peers compute the right thing, absence is said."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from cluster_emulation import EmulatedCluster, build

ROOT = Path(__file__).resolve().parents[1]
BENCHMARKS = ROOT / "benchmarks"
COMPILER = shutil.which("g++") or shutil.which("clang++")
RESIDENT = "row-resident kernel alone, in place"
OURS = ["row kernel alone, in place", "fastpo, in place", "fastpo", "eager"]


def load(name: str):
    """A module of benchmarks/, which is no package."""
    spec = importlib.util.spec_from_file_location(name, BENCHMARKS / f"{name}.py")
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def bench():
    return load("bench_logits_gpu")


def check_gradient(bench, name: str, device) -> None:
    for dtype, budget in ((torch.float32, 1e-5), (torch.bfloat16, 5e-3)):
        problem = bench.Problem.random(5, 320, device, dtype)
        error = bench.gradient_error(bench.PEERS[name], problem)
        assert error < budget, f"{name} {dtype}: {error}"


@pytest.mark.parametrize("name", OURS)
def test_gradients_are_right(bench, name, triton_backend, device):
    check_gradient(bench, name, device)


def test_a_backend_that_cannot_run_says_why(bench, device):
    """What `measure`'s caller writes into the table in place of a time."""
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(RuntimeError, match="it runs on CUDA tensors, got cpu"):
        bench.gradient(bench.PEERS[RESIDENT], bench.Problem.random(5, 320, device))


@pytest.mark.slow
@pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")
def test_the_resident_kernel_is_timed_and_checked(bench, tmp_path, monkeypatch, capsys):
    """Its peer in the table and its part of the sanitizer's workload, emulated."""
    rows = EmulatedCluster(build(COMPILER, tmp_path))
    rows.unavailable = lambda device: None
    monkeypatch.setattr(bench, "cuda_rows", rows)
    check_gradient(bench, RESIDENT, torch.device("cpu"))
    assert rows.blocks >= 1
    load("small_launches").main([rows])
    assert "all results are right" in capsys.readouterr().out


@pytest.mark.peer
@pytest.mark.parametrize("name", ["TRL kernels", "Liger GRPO"])
def test_peer_adapters_are_right(bench, name, triton_backend, device):
    pytest.importorskip({"TRL kernels": "trl", "Liger GRPO": "liger_kernel"}[name])
    check_gradient(bench, name, device)


def test_a_wrong_peer_is_noticed(bench, device):
    problem = bench.Problem.random(5, 320, device)
    assert bench.gradient_error(lambda p, x: 1.2 * bench.eager(p, x), problem) > bench.WRONG


def test_the_inplace_peer_works_in_place(bench, triton_backend, device):
    problem = bench.Problem.random(5, 320, device)
    grad = bench.gradient(bench.PEERS["fastpo, in place"], problem)
    assert grad.data_ptr() == problem.logits.data_ptr()
    other = bench.Problem.random(5, 320, device)
    assert torch.equal(bench.gradient(bench.row_kernel, other), grad)
    kept = bench.Problem.random(5, 320, device)
    assert torch.equal(bench.gradient(bench.PEERS["fastpo"], kept), grad)
    assert torch.equal(kept.logits, bench.Problem.random(5, 320, device).logits)


def test_the_page_shows_results_and_failures(bench):
    timed = bench.Result("fastpo", 32000, 128, 1.5, 0.9, 2000.0, 1 << 30, 2e-3)
    failed = bench.Result("eager", 32000, 128, note="failed: out of memory")
    page = bench.markdown([timed, failed], {32000: 3000.0}, "a GPU")
    assert "| fastpo | 32000 | 128 | 1.500 | 90 % | 2000 | 1.00 GiB | 2.0e-03 |  |" in page
    assert "| eager | 32000 | 128 |  |  |  |  |  | failed: out of memory |" in page
    assert "3000 GB/s at V = 32000" in page


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
@pytest.mark.parametrize("script", ["gpu.py", "bench_logits_gpu.py", "probes_gpu.py"])
def test_without_a_gpu_one_line_says_so(script, tmp_path):
    environment = os.environ | {"PYTHONPATH": str(BENCHMARKS.parent)}
    command = [sys.executable, str(BENCHMARKS / script)]
    command += [] if script == "probes_gpu.py" else ["--out", str(tmp_path / "out")]
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert result.returncode != 0 and not (tmp_path / "out").exists()
    message = (result.stdout + result.stderr).strip()
    assert "no GPU" in message and len(message.splitlines()) == 1


@pytest.fixture
def gpu(monkeypatch):
    """benchmarks/gpu.py on a machine that seems to have an H100."""
    module = load("gpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "an H100")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    return module


def test_a_step_that_hangs_or_fails_is_recorded(gpu, tmp_path):
    programs = {
        "hangs": ("print('before', flush=True); import time; time.sleep(60)", 2),
        "fails": ("print('why'); raise SystemExit(3)", 60),
        "passes": ("print('fine')", 60),
    }
    steps = []
    for name, (code, limit) in programs.items():
        plan = gpu.Plan(name=name, limit=limit, command=[sys.executable, "-c", code])
        steps.append(gpu.run_step(plan, plan.limit, tmp_path / "gpu.log"))
    missing = gpu.Plan(name="missing", limit=5, command=["x"], needs="no-such-program")
    steps.append(gpu.run_step(missing, 5, tmp_path / "gpu.log"))
    assert [step.exit_code for step in steps] == [None, 3, 0, None]
    assert [step.passed for step in steps] == [False, False, True, False]
    assert steps[0].tail == "before\nstopped after 2 s" and steps[1].tail == "why"
    assert "not on PATH" in steps[3].tail
    assert (tmp_path / "gpu.log").read_text() == "before\nwhy\nfine\n"
    gpu.save(tmp_path, steps)
    page = (tmp_path / "gpu.md").read_text()
    assert "did not finish" in page and "failed with exit code 3" in page and "an H100" in page


class StubbedProcess:
    """Stands for subprocess.Popen: records the command, writes a line, ends at once."""

    pid = 2**30  # nobody's
    started: ClassVar[list] = []

    def __init__(self, command, *, env, stdout, **options):
        self.args = command
        self.started.append((command, env))
        stdout.write(b"a line\n")

    def wait(self, timeout=None) -> int:
        return 0 if "memcheck" not in self.args else 9


@pytest.fixture
def started(gpu, monkeypatch) -> list:
    """[(command, environment)] of the processes that gpu.py starts from now on."""
    StubbedProcess.started.clear()
    monkeypatch.setattr(gpu.subprocess, "Popen", StubbedProcess)
    monkeypatch.setattr(gpu.shutil, "which", lambda name: name)
    return StubbedProcess.started


@pytest.mark.parametrize("part", [1, 2])
def test_dry_run(part, gpu, started, tmp_path, monkeypatch):
    """The limits fit one call, every script and option exists, PYTHONPATH is kept, few files."""
    monkeypatch.setenv("PYTHONPATH", "/carried/site")
    planned = gpu.plans(part, tmp_path)
    assert sum(plan.limit for plan in planned) + gpu.START_SECONDS <= gpu.PART_SECONDS
    assert gpu.main(["--part", str(part), "--out", str(tmp_path)]) == (0 if part == 1 else 1)
    assert len(started) == len(planned)
    for command, environment in started:
        paths = environment["PYTHONPATH"].split(os.pathsep)
        assert paths[0] == str(ROOT) and paths[-1] == "/carried/site"
        assert "TRITON_INTERPRET" not in environment
        scripts = [Path(x) for x in map(str, command) if x.endswith(".py") and "test" not in x]
        for script in scripts:
            source = (ROOT / script).read_text()
            options = [x for x in command[command.index(str(script)) + 1 :] if x.startswith("--")]
            known = "--inplace" if script.name == "setup.py" else source
            assert all(option in known for option in options), command
    written = {path.name for path in tmp_path.iterdir()}
    assert written <= set(gpu.FILES) and len({*gpu.FILES, gpu.OWN_FILE[part]}) <= 8
    page = (tmp_path / "gpu.md").read_text()
    assert all(f"| {plan.name} |" in page for plan in planned)
    assert ("failed with exit code 9" in page) == (part == 2)  # and the steps before it are there


def test_what_a_step_leaves_goes_to_the_next(gpu, started, tmp_path):
    """A benchmark starts measurements until its own limit and all time saved before it are up."""
    gpu.main(["--part", "1", "--out", str(tmp_path)])
    limits = {plan.name: plan.limit for plan in gpu.plans(1, tmp_path)}
    (seconds,) = (
        int(command[command.index("--seconds") + 1])
        for command, _ in started
        if "exp_logits_gpu.py" in str(command)
    )
    assert sum(limits.values()) - gpu.GRACE_SECONDS - 10 < seconds < sum(limits.values())


@pytest.mark.slow
def test_every_gpu_test_is_run(gpu, tmp_path):
    """What the run's own pytest command collects is all that is marked, and holds the linear op."""
    (command,) = (plan.command for plan in gpu.plans(1, tmp_path) if "pytest" in plan.command)
    arguments = command[command.index("pytest") + 1 :]
    if "-n" in arguments:
        del arguments[arguments.index("-n") : arguments.index("-n") + 2]
    run, everything = collected(arguments), collected(["-m", gpu.QUICK, "tests"])
    assert run == everything
    for name in ("test_linear_gpu", "test_triton_rows", "test_the_kernel_is_the_specification"):
        assert any(name in test for test in run)


BARE = """
import sys, pytest

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in sys.argv[1].split():
            raise ModuleNotFoundError(f"No module named {name!r}")

sys.meta_path.insert(0, Absent())
raise SystemExit(pytest.main(["--collect-only", *sys.argv[2:]]))
"""
EXTRAS = (
    "transformers tokenizers safetensors rich pydantic annotated_types hypothesis peft trl verl"
)


@pytest.mark.slow
def test_gpu_tests_need_torch_triton_and_pytest_alone(gpu):
    """REGRESSIONS 82: a machine with a GPU and no more; one file that does not import stops all."""
    command = [sys.executable, "-c", BARE, EXTRAS, "-q", "-m", gpu.QUICK, *gpu.test_files()]
    plain = os.environ | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}  # hypothesis has a plugin
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=plain)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]


def collected(arguments: list[str]) -> set[str]:
    """The ids of the tests that a pytest command selects."""
    quiet = [] if "-q" in arguments else ["-q"]  # twice would print counts alone
    command = [sys.executable, "-m", "pytest", *quiet, "--collect-only", *arguments]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stdout[-2000:]
    return {line for line in result.stdout.splitlines() if "::" in line}


def test_dram_bytes_are_read_from_the_profiler():
    """Three launches of ncu's CSV, one metric a line, in its own units."""
    dram = load("dram_rows_gpu")
    lines = ["==PROF== noise", '"ID","Kernel Name","Metric Name","Metric Unit","Metric Value"']
    for launch in range(3):
        for metric, (unit, value) in {
            "dram__bytes_read.sum": ("Mbyte", "1,000.5"),
            "dram__bytes_write.sum": ("byte", "500"),
            "gpu__time_duration.sum": ("us", "250"),
            "lts__t_sector_hit_rate.pct": ("%", "61.2"),
            "smsp__issue_active.avg.pct_of_peak_sustained_active": ("%", "70"),
            "sm__warps_active.avg.pct_of_peak_sustained_active": ("%", "25"),
        }.items():
            lines.append(f'"{launch}","_row_stats_kernel","{metric}","{unit}","{value}"')
    launches = dram.read_launches("\n".join(lines))
    assert len(launches) == 3 and launches[0]["read"] == 1000.5e6 and launches[2]["time"] == 250e-6
    table = dram.report(launches, rows=1056).splitlines()
    ratio = (1000.5e6 + 500) / (1056 * 32000 * 2)
    assert table[2].startswith(f"| row_stats | bf16 | 32000 | {ratio:.2f} | 0.250 | 61 | 70 | 25")
    assert dram.read_launches("==ERROR== no counters") == []


def test_the_profiled_workload_runs(triton_backend, device):
    load("dram_rows_gpu").launch_all(device, vocabularies=(320,), rows=2)


@pytest.mark.slow
def test_the_sanitizer_workload_runs(triton_backend, device, capsys):
    load("small_launches").main()
    assert "all results are right" in capsys.readouterr().out
