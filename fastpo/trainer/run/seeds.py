"""The same recipe under several seeds, one run after another, and the table of them."""

from __future__ import annotations

from dataclasses import replace

from fastpo.trainer.config import Config
from fastpo.trainer.loop import train
from fastpo.trainer.model import distributed
from fastpo.trainer.run import directory, report
from fastpo.trainer.run.compare import compare
from fastpo.trainer.run.errors import RecipeError


def train_each(config: Config, seeds: str, *, resume: bool = False, command: str = "") -> None:
    """Train `config` with every seed of "0,1,2"; `resume`: only what is not complete yet.

    Raises:
        RecipeError: `seeds` is no list of numbers, or the runs would share a directory.
    """
    if distributed.launched():
        raise RecipeError(
            "--seeds trains one run after another on one process: start torchrun for every seed"
        )
    try:
        configs = [replace(config, seed=int(seed)) for seed in seeds.split(",")]
    except ValueError:  # pydantic's errors, too
        raise RecipeError(f"--seeds is {seeds!r}, expected numbers, e.g. 0,1,2") from None
    paths = [directory.path_of(each) for each in configs]
    if len(set(paths)) < len(paths):
        raise RecipeError(
            f"run_dir is {config.run_dir!r}: with --seeds {seeds} every run needs a directory of "
            "its own; put {seed} into it"
        )
    for each, path in zip(configs, paths, strict=True):
        if not (resume and report.completed(path, each.steps)):
            train(each, resume=resume and path.exists(), command=command)
    compare(paths)
