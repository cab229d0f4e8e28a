"""The CUDA sources compile for every GPU we name, and link and load where there is none."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastpo.advantages import ESTIMATORS

ROOT = Path(__file__).parents[1]
SOURCES = sorted((ROOT / "csrc").glob("*.cu"))
NVCC = shutil.which("nvcc", path=f"{os.environ.get('CUDA_HOME', '')}/bin:{os.environ['PATH']}")

MOST_REGISTERS = {"row_cluster.cu": 64}  # 4 blocks of 256 threads; at 48, 5 of them

needs_nvcc = pytest.mark.skipif(NVCC is None, reason="nvcc is neither on PATH nor in CUDA_HOME")


def later(arch: str):
    """An architecture that CI compiles for, and the quick tests do not."""
    return pytest.param(arch, marks=pytest.mark.slow)


@needs_nvcc
@pytest.mark.parametrize("arch", ["80", "90a", *map(later, ["90", "100", "100a", "120"])])
@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.name)
def test_compiles_without_spills(source, arch, tmp_path):
    """And in registers that leave room for the blocks which share a processor."""
    command = [NVCC, "-std=c++17", "-O3", f"-gencode=arch=compute_{arch},code=sm_{arch}", "-c"]
    command += ["-Werror=all-warnings", "--ptxas-options=-v", str(source), "-o", "kernel.o"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert f"for 'sm_{arch}'" in done.stderr
    usage = [line for line in done.stderr.splitlines() if "spill" in line]
    assert usage and all("0 bytes spill stores, 0 bytes spill loads" in line for line in usage)
    registers = [int(n) for n in re.findall(r"Used (\d+) registers", done.stderr)]
    print(f"{source.name} for sm_{arch}: {sorted(registers)} registers")
    assert len(registers) == len(usage) and max(registers) <= MOST_REGISTERS.get(source.name, 255)


@needs_nvcc
@pytest.mark.slow
def test_links_and_loads_without_a_driver(tmp_path):
    """FASTPO_CUDA=1 under a CPU build of torch: the CUDA runtime is linked statically."""
    pytest.importorskip("pybind11")
    source = tmp_path / "source"
    for folder in ("csrc", "kernels", "fastpo"):
        shutil.copytree(ROOT / folder, source / folder, ignore=shutil.ignore_patterns("*.so"))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    environment = {**os.environ, "FASTPO_CUDA": "1", "FASTPO_FORCE_EXT": "1"}
    environment |= {"TORCH_CUDA_ARCH_LIST": "8.0;9.0+PTX"}
    build = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    done = subprocess.run(build, cwd=source, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    code = (
        "import torch; from fastpo import _extension, group_advantages;"
        "print(_extension.build_info()['cuda_archs'], _extension.devices());"
        "print(group_advantages(torch.tensor([0., 1.]), group_size=2).advantages.tolist())"
    )
    run = subprocess.run(
        [sys.executable, "-c", code],
        cwd=source,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(source)},
    )
    assert run.returncode == 0, run.stderr
    assert "['sm_80', 'sm_90'] ('cpu', 'cuda')" in run.stdout and "0.707" in run.stdout


@pytest.mark.gpu
@pytest.mark.parametrize("columns", [1, 3])
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_the_kernel_is_the_specification(estimator, columns):
    """On a GPU: every layout against plain torch on the CPU, twice with the same bits."""
    from fastpo import _extension, advantages, group_advantages

    if "cuda" not in _extension.devices():
        pytest.skip("the extension was built without CUDA")
    for count in (1, 24, 1000, 20_000):
        generator = torch.Generator().manual_seed(count)
        rewards = torch.randn(count, columns, generator=generator)
        rewards[torch.randint(0, count, (count // 10,), generator=generator)] = torch.nan
        ids = torch.randint(0, count // 6 + 1, (count,), generator=generator) - 3
        options = {"weights": torch.rand(columns), "whiten": columns > 1}
        want = advantages._specified(rewards, ids, estimator, 1e-6, **options)
        sent = (rewards.cuda(), ids.cuda())
        got = [
            group_advantages(sent[0], group_ids=sent[1], estimator=estimator, **options)
            for _ in range(2)
        ]
        assert all(torch.equal(a, b) for a, b in zip(*got, strict=True))
        torch.testing.assert_close(got[0].advantages.cpu(), want.advantages, rtol=1e-6, atol=1e-7)
        assert torch.equal(got[0].informative.cpu(), want.informative)
        assert got[0].num_informative.cpu() == want.num_informative
