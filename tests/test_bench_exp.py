"""The script that decides about exponentials on a GPU, on a machine without one."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "exp_logits_gpu.py"


def run(*options: str, interpreted: bool = True) -> subprocess.CompletedProcess:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TRITON_INTERPRET": str(int(interpreted))}
    command = [sys.executable, str(SCRIPT), *options]
    return subprocess.run(command, capture_output=True, text=True, env=environment)


@pytest.mark.slow
def test_every_step_runs_interpreted(tmp_path):
    """All tiles agree with fp64, and z_y has the bits of its logit; only times are missing."""
    pytest.importorskip("triton")
    done = run("--shape", "40", "64", "300", "--out", str(tmp_path))
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "exp_logits_gpu.json").read_text())["results"]
    tiles = {name: found for name, found in results.items() if re.match(r"\d+x", name)}
    assert len(tiles) >= 5 and not any("error" in found for found in results.values()), results
    for name, found in tiles.items():
        assert found["bit-equal z_y, 64 columns"] == 1, name
        assert found["log-prob error"] < 2e-6, name
    assert {"op: triton-exp", "op: triton", "op: three bare GEMMs"} <= set(results)


@pytest.mark.slow
def test_it_keeps_to_its_time_and_says_that_there_is_no_gpu():
    pytest.importorskip("triton")
    done = run("--shape", "40", "64", "300", "--seconds", "0")
    assert done.returncode == 0 and done.stdout.count("not reached in 0 s") >= 8
    if not torch.cuda.is_available():
        done = run(interpreted=False)
        assert done.returncode == 2 and "no GPU" in done.stderr
