"""A test's function in several processes that share a gloo group."""

from __future__ import annotations

import os
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import torch.distributed as dist

ROOT = Path(__file__).resolve().parents[1]


def run_ranks(directory: Path, ranks: int, function: Callable[[int, int], None]) -> None:
    """Run function(rank, ranks), whose file ends in `run_rank(*sys.argv[1:], globals())`."""
    file = function.__globals__["__file__"]
    command = [sys.executable, file, function.__name__, str(ranks), str(directory / "rendezvous")]
    path = os.pathsep.join([str(ROOT), str(ROOT / "tools")])
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    processes = [
        subprocess.Popen([*command, str(rank)], env=environment, stderr=subprocess.PIPE, text=True)
        for rank in range(ranks)
    ]
    errors = [process.communicate(timeout=100)[1] for process in processes]
    for process, error in zip(processes, errors, strict=True):
        assert process.returncode == 0, error


def run_rank(name: str, ranks: str, rendezvous: str, rank: str, functions: dict) -> None:
    """One process of `run_ranks`."""
    rank, ranks = int(rank), int(ranks)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=ranks)
    try:
        functions[name](rank, ranks)
        dist.barrier()
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    # Not by way of Python's finalization: a gloo thread lets go of the last collective's tensors
    # whenever it comes to that, and its wait for the GIL then ends in std::terminate (Python 3.11).
    os._exit(0)
