"""Checkpoints: a Hugging Face model directory plus `trainer_state.pt`, written whole or not at all.

The state holds optimizer moments, random states, and the position in the data. It is loaded with
`weights_only=True` and the weights are safetensors: reading a checkpoint runs no code from it.
`SHA256SUMS` (`sha256sum -c` reads it) tells flipped bits and missing files.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import time
from pathlib import Path
from typing import Any

import torch

from fastpo.trainer.model.policy import Snapshot
from fastpo.trainer.run.errors import TrainerError, reason_of

NAME, PREVIOUS, BEST = "checkpoint", "checkpoint.previous", "best"
STATE, MANIFEST = "trainer_state.pt", "SHA256SUMS"
KEYS = {
    *("step", "num_tokens", "seconds", "before", "learner", "critic"),
    *("source", "order"),  # what comes next
}
Score = tuple[float, float]  # of an evaluation: accuracy, then reward


class Keeper:
    """When a run writes a checkpoint, and which it keeps: the last two and the best.

    Args:
        every: steps between two; 0 = by the clock alone.
        minutes: between two, at most (of whole steps); 0 = by steps alone.
        best: the best score of the run so far.
    """

    def __init__(self, run_dir: Path, *, every: int, minutes: float, best: Score | None = None):
        self.run_dir, self.every, self.minutes, self.best = run_dir, every, minutes, best
        self._last = time.monotonic()
        self._read_back = True

    def is_due(self, step: int) -> bool:
        """Whether to write one after this step."""
        waited = time.monotonic() - self._last
        return bool(
            (self.every and step % self.every == 0)
            or (self.minutes and waited >= 60 * self.minutes)
        )

    def save(self, policy: Snapshot, state: dict[str, Any]) -> Path:
        """`save`; the first one of a run is read back."""
        path = save(self.run_dir, policy, state, read_back=self._read_back)
        self._read_back, self._last = False, time.monotonic()
        return path

    def is_best(self, score: Score) -> bool:
        """Whether no earlier evaluation of the run was as good."""
        return self.best is None or score > self.best

    def keep_best(self, score: Score) -> None:
        """Keep the checkpoint just written as `best`, too, by links where the disk has them."""
        fresh, old = self.run_dir / f"{BEST}.new", self.run_dir / f"{BEST}.old"
        shutil.rmtree(fresh, ignore_errors=True)
        shutil.copytree(self.run_dir / NAME, fresh, copy_function=_link)
        _swap(fresh, self.run_dir / BEST, old)
        shutil.rmtree(old, ignore_errors=True)
        self.best = score


def save(
    run_dir: Path, policy: Snapshot, state: dict[str, Any], *, read_back: bool = False
) -> Path:
    """Write `run_dir/checkpoint` atomically: at every moment a complete one is on disk.

    The new one is written beside the old one and flushed to disk before it takes its name; the old
    one becomes `checkpoint.previous`, where `find` looks, too.

    Raises:
        TrainerError: a full disk; or (`read_back`) a state that `load_state` would refuse.
    """
    target, fresh = run_dir / NAME, run_dir / f"{NAME}.new"
    shutil.rmtree(fresh, ignore_errors=True)
    try:
        policy.save(fresh)
        torch.save(state, fresh / STATE)
        if read_back:
            torch.load(fresh / STATE, weights_only=True, mmap=True)
        write_manifest(fresh)
        _flush(fresh)
    except Exception as error:  # torch and safetensors have their own kinds for a full disk
        shutil.rmtree(fresh, ignore_errors=True)
        raise TrainerError(
            f"cannot write checkpoint {target} ({reason_of(error)}); the last one, if any, is "
            "intact"
        ) from error
    _swap(fresh, target, run_dir / PREVIOUS)
    _flush_directory(run_dir)
    return target


def find(run_dir: Path) -> Path:
    """The newest checkpoint of a run.

    Raises:
        TrainerError: there is none.
    """
    for name in (NAME, PREVIOUS):
        if (run_dir / name).is_dir():
            return run_dir / name
    raise TrainerError(
        f"no checkpoint in {run_dir}: nothing to resume or evaluate; train without --resume "
        "(existing=move_aside keeps what is there)"
    )


def load_state(checkpoint: Path) -> dict[str, Any]:
    """The trainer's state of a checkpoint whose files are all as they were written.

    Raises:
        TrainerError: missing, truncated, of another version, or holding anything but tensors and
            plain values.
    """
    if not (checkpoint / STATE).exists():
        raise TrainerError(f"{checkpoint} has no {STATE}: it is a model, not a run to resume")
    verify(checkpoint)
    try:
        state = torch.load(checkpoint / STATE, weights_only=True)
    except Exception as error:  # zip, pickle and key errors, by how the file is damaged
        raise _damaged(checkpoint, STATE, reason_of(error)) from error
    if not isinstance(state, dict) or set(state) != KEYS:
        raise TrainerError(
            f"checkpoint {checkpoint / STATE} was written by another version of fastpo: train anew "
            "in another run_dir, with model.path set to the checkpoint if you want its weights"
        )
    return state


def write_manifest(directory: Path) -> None:
    """Write the digests of all its files into it."""
    names = sorted(path.name for path in directory.iterdir() if path.name != MANIFEST)
    lines = [f"{_sha256(directory / name)}  {name}\n" for name in names]
    (directory / MANIFEST).write_text("".join(lines), encoding="utf-8")


def verify(checkpoint: Path) -> None:
    """Compare every file of a checkpoint with its manifest, where it has one.

    Raises:
        TrainerError: a file is missing or differs.
    """
    manifest = checkpoint / MANIFEST
    for line in manifest.read_text(encoding="utf-8").splitlines() if manifest.exists() else ():
        digest, _, name = line.partition("  ")
        if not (checkpoint / name).is_file():
            raise _damaged(checkpoint, name, "it is missing")
        if _sha256(checkpoint / name) != digest:
            raise _damaged(checkpoint, name, f"its SHA-256 is not the one in {MANIFEST}")


def _damaged(checkpoint: Path, name: str, reason: str) -> TrainerError:
    cure = "restore it, or train anew in another run_dir"
    if checkpoint.name == NAME and (checkpoint.parent / PREVIOUS).is_dir():
        cure = f"move {checkpoint} away, and --resume goes on from {PREVIOUS}"
    return TrainerError(f"checkpoint {checkpoint / name} is damaged ({reason}): {cure}")


def _swap(fresh: Path, target: Path, previous: Path) -> None:
    """Give `fresh` the name `target`, whose holder becomes `previous`."""
    if target.exists():
        shutil.rmtree(previous, ignore_errors=True)
        target.rename(previous)
    fresh.rename(target)


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # a file system without links
        shutil.copy2(source, target)


def _sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as content:
        while block := content.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


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
