"""The benchmarks compare like with like: every method's loss and gradients, at tiny size."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


def load(name: str):
    """A benchmark file as a module, its neighbours importable."""
    spec = importlib.util.spec_from_file_location(name, BENCHMARKS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    sys.path.insert(0, str(BENCHMARKS))
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(BENCHMARKS))
    return module


@pytest.fixture(scope="module")
def methods():
    return load("linear_methods")


def check(methods, name):
    reason = methods.unavailable(name, "cpu")
    if reason is not None:
        pytest.skip(reason)
    problem = methods.Problem.random(2, 40, 16, 300)
    exact = methods.eager(problem)
    assert exact[1].norm() > 1e-4
    assert methods.relative_error(methods.METHODS[name](problem), exact) < 1e-5


@pytest.mark.parametrize("name", ["fastpo", "eager", "torch linear_cross_entropy"])
def test_own_and_torch_methods_agree(methods, name):
    check(methods, name)


@pytest.mark.peer
@pytest.mark.parametrize("name", ["TRL", "Liger", "torch.compile"])
def test_peers_agree(methods, name):
    check(methods, name)


def test_floor_is_the_three_products(methods):
    from torch.utils.flop_counter import FlopCounterMode

    problem = methods.Problem.random(2, 40, 16, 300)
    with FlopCounterMode(display=False) as counter:
        methods.bare_gemms(problem)
    assert counter.get_total_flops() == 6 * 80 * 16 * 300


def test_a_wrong_gradient_is_noticed(methods):
    problem = methods.Problem.random(2, 40, 16, 300)
    loss, hidden, weight = methods.eager(problem)
    assert methods.relative_error((loss, hidden, 1.01 * weight), (loss, hidden, weight)) > 9e-3
    assert methods.relative_error((loss, hidden * torch.nan, weight), (loss, hidden, weight)) > 1e9


@pytest.mark.parametrize("arguments", [["--help"], ["--rows", "3"]])
def test_the_rows_benchmark_reads_its_command_line(arguments, monkeypatch, capsys):
    """It ran, for minutes, whatever it was asked."""
    monkeypatch.setattr("sys.argv", ["bench_cpu_rows.py", *arguments])
    with pytest.raises(SystemExit) as ended:
        load("bench_cpu_rows").main()
    assert ended.value.code == (0 if arguments == ["--help"] else 2)
    said = capsys.readouterr()
    assert "--write" in said.out + said.err


@pytest.mark.parametrize("name", ["bench_linear_cpu", "bench_linear_gpu", "memory_curve"])
def test_benchmark_files_import(name):
    assert callable(load(name).main)


def test_truth_of_the_gpu_table(methods):
    problem = methods.Problem.random(2, 40, 16, 300)
    truth = load("bench_linear_gpu").exact(problem, chunk=32)
    assert methods.relative_error(methods.eager(problem), truth) < 1e-5
