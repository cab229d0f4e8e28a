"""The GPU benchmarks on a machine without one: peers compute the right thing, absence is said."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
OURS = ["fastpo, in place", "fastpo", "eager"]


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
@pytest.mark.parametrize("script", ["gpu.py", "bench_logits_gpu.py"])
def test_without_a_gpu_one_line_says_so(script, tmp_path):
    environment = os.environ | {"PYTHONPATH": str(BENCHMARKS.parent)}
    command = [sys.executable, str(BENCHMARKS / script), "--out", str(tmp_path / "out")]
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert result.returncode != 0 and not (tmp_path / "out").exists()
    message = (result.stdout + result.stderr).strip()
    assert "no GPU" in message and len(message.splitlines()) == 1


def test_a_step_that_hangs_or_fails_is_recorded():
    gpu = load("gpu")
    hangs = gpu.run_step("hangs", [sys.executable, "-c", "import time; time.sleep(60)"], 1)
    fails = gpu.run_step("fails", [sys.executable, "-c", "print('why'); raise SystemExit(3)"], 60)
    passes = gpu.run_step("passes", [sys.executable, "-c", "print('fine')"], 60)
    assert (hangs.exit_code, fails.exit_code, passes.exit_code) == (None, 3, 0)
    assert [step.passed for step in (hangs, fails, passes)] == [False, False, True]
    assert "stopped after 1 s" in hangs.tail and "why" in fails.tail
    page = gpu.markdown([hangs, fails, passes], "a GPU")
    assert "did not finish" in page and "failed with exit code 3" in page


@pytest.mark.slow
def test_the_sanitizer_workload_runs(triton_backend, device, capsys):
    load("small_launches").main()
    assert "all results are right" in capsys.readouterr().out
