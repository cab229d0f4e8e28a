"""Checkpoints: a Hugging Face model directory plus `trainer_state.pt`, written whole or not at all.

The state holds optimizer moments, random states, and the position in the data. It is loaded with
`weights_only=True` and the weights are safetensors: reading a checkpoint runs no code from it.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import torch

from fastpo.trainer.policy import Policy
from fastpo.trainer.run.errors import TrainerError

NAME = "checkpoint"
STATE = "trainer_state.pt"
KEYS = {
    *("step", "num_tokens", "seconds", "before", "learner"),
    *("problems", "generator", "order"),  # random states
}


def save(run_dir: Path, policy: Policy, state: dict[str, Any]) -> Path:
    """Write `run_dir/checkpoint` atomically: at every moment a complete one is on disk.

    The new one is written beside the old one and flushed to disk before it takes its name. Between
    the two renames the old one is `checkpoint.old`, where `find` looks, too.
    """
    target, fresh, old = run_dir / NAME, run_dir / f"{NAME}.new", run_dir / f"{NAME}.old"
    shutil.rmtree(fresh, ignore_errors=True)
    try:
        policy.save(fresh)
        torch.save(state, fresh / STATE)
        _flush(fresh)
    except Exception as error:  # torch and safetensors have their own kinds for a full disk
        shutil.rmtree(fresh, ignore_errors=True)
        reason = str(error).strip().split("\n")[0][:200]
        raise TrainerError(
            f"cannot write checkpoint {target} ({reason}); the last one, if any, is intact"
        ) from error
    if target.exists():
        shutil.rmtree(old, ignore_errors=True)
        target.rename(old)
    fresh.rename(target)
    _flush_directory(run_dir)
    shutil.rmtree(old, ignore_errors=True)
    return target


def find(run_dir: Path) -> Path:
    """The checkpoint of a run.

    Raises:
        TrainerError: there is none.
    """
    for name in (NAME, f"{NAME}.old"):
        if (run_dir / name).is_dir():
            return run_dir / name
    raise TrainerError(
        f"no checkpoint in {run_dir}: nothing to resume, train without --resume "
        "(existing=move_aside keeps what is there)"
    )


def load_state(checkpoint: Path) -> dict[str, Any]:
    """The trainer's state of a checkpoint.

    Raises:
        TrainerError: missing, truncated, of another version, or holding anything but tensors and
            plain values.
    """
    try:
        state = torch.load(checkpoint / STATE, weights_only=True)
    except FileNotFoundError:
        raise TrainerError(
            f"{checkpoint} has no {STATE}: it is a model, not a run to resume"
        ) from None
    except Exception as error:  # zip, pickle and key errors, by how the file is damaged
        reason = str(error).strip().split("\n")[0][:200]
        raise TrainerError(
            f"checkpoint {checkpoint / STATE} is damaged ({reason}): restore it, or train anew in "
            "another run_dir"
        ) from error
    if not isinstance(state, dict) or set(state) != KEYS:
        raise TrainerError(
            f"checkpoint {checkpoint / STATE} was written by another version of fastpo: train anew "
            "in another run_dir, with model.path set to the checkpoint if you want its weights"
        )
    return state


def _flush(directory: Path) -> None:
    for path in directory.iterdir():
        with path.open("rb+") as file:
            os.fsync(file.fileno())
    _flush_directory(directory)


def _flush_directory(directory: Path) -> None:
    if os.name != "posix":  # elsewhere a directory cannot be opened
        return
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
