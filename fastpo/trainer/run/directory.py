"""The run directory: never overwritten; metrics and samples as JSON lines, flushed every step."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import fields
from pathlib import Path
from typing import Any, TextIO

from fastpo.trainer.config import Config, WarmupConfig
from fastpo.trainer.run import recipe
from fastpo.trainer.run.errors import RecipeError, TrainerError

FIXED = {
    *("task", "task_args", "seed"),
    *(f"model.{key}" for key in ("path", "dtype", "hidden_size", "layers", "heads")),
    *(f"model.lora.{key}" for key in ("rank", "alpha", "target_modules")),
    *(f"warmup.{field.name}" for field in fields(WarmupConfig)),  # over before the first checkpoint
    *(f"eval.{key}" for key in ("problems", "temperature", "samples")),  # before = after - rise
}
METRICS, SAMPLES, CONFIG = "metrics.jsonl", "samples.jsonl", "config.toml"
SUMMARY, CURVES = "summary.json", "curves.png"


def path_of(config: Config) -> Path:
    """Where this run writes: `config.run_dir` with {task} and {seed} filled in."""
    try:
        name = config.run_dir.format(task=config.task.replace(":", "."), seed=config.seed)
        return Path(name).expanduser()
    except (KeyError, IndexError, ValueError, AttributeError):
        raise RecipeError(
            f"run_dir is {config.run_dir!r}, expected no fields but {{task}} and {{seed}}"
        ) from None


def create(config: Config, say: Callable[[str], None]) -> Path:
    """Make the directory of a new run and write its config; `say` what was moved out of the way.

    What failed before its first step has left nothing to keep: its directory is taken again.

    Raises:
        RecipeError: it exists and `config.existing` says refuse.
    """
    path = path_of(config)
    if config.log.wandb:
        _import_wandb(config.log.wandb)
    if can_begin_again(path):
        with (path / METRICS).open("a") as metrics:
            _claim(metrics)
            for name in (METRICS, SAMPLES):
                (path / name).write_text("")
        say(f"The run in {path} had ended before its first step: it begins again")
        write_config(path, config)
        return path
    if path.exists():
        if config.existing == "refuse":
            raise RecipeError(
                f"{path} exists and is left as it is: choose another run_dir, go on with --resume, "
                "or set existing=move_aside"
            )
        if not (path / CONFIG).is_file():
            raise RecipeError(f"{path} exists and holds no run: it is not moved aside")
        with (path / METRICS).open("a") as metrics:
            _claim(metrics)
        aside = path.rename(_free_name(path))
        going = any(aside.glob("checkpoint*")) and not (aside / SUMMARY).exists()
        hint = "; it was not done: --resume would have gone on with it" if going else ""
        say(f"Moved the run that was in {path} to {aside}{hint}")
    path.mkdir(parents=True)
    write_config(path, config)
    return path


def can_begin_again(path: Path) -> bool:
    """Whether `path` holds a run without a checkpoint or a step, e.g. one that soon failed."""
    kept = (*path.glob("checkpoint*"), path / SUMMARY, path / CURVES)
    if not (path / CONFIG).is_file() or any(file.exists() for file in kept):
        return False
    with suppress(RecipeError):
        metrics = path / METRICS
        return not metrics.exists() or all(row["step"] == 0 for row in read_metrics(path))
    return False


def config_of(path: Path, overrides: Iterable[str] = ()) -> Config:
    """The recipe that a run in `path` wrote.

    Raises:
        RecipeError: no such file, or an empty or malformed one.
    """
    file = path / CONFIG
    if not file.exists():
        raise RecipeError(f"{path} has no {CONFIG}{_runs_in(path)}")
    if not file.stat().st_size:
        raise RecipeError(f"{file} is empty (was the disk full?): restore it, or train anew")
    return recipe.load(file, overrides)


def check_resumable(path: Path, config: Config) -> list[str]:
    """What differs between the recipe a run began with and `config`, as text.

    Raises:
        RecipeError: something differs that a run cannot change on its way.
    """
    before, now = recipe.flatten(config_of(path)), recipe.flatten(config)
    changed = {key: f"{before[key]} -> {now[key]}" for key in now if before[key] != now[key]}
    for key, change in changed.items():
        if key in FIXED:
            raise RecipeError(
                f"a run cannot change {key} on its way ({change}): set it back, or train anew in "
                "another run_dir"
            )
    return [f"{key} {change}" for key, change in changed.items()]


def write_config(path: Path, config: Config) -> None:
    """Write config.toml, which `fastpo train` takes as a recipe again."""
    _replace(path / CONFIG, recipe.dump(config))


def _free_name(path: Path) -> Path:
    number = 1
    while (aside := path.with_name(f"{path.name}.{number}")).exists():
        number += 1
    return aside


class RunLog:
    """metrics.jsonl, samples.jsonl and, where tensorboard is installed, event files.

    Attributes:
        gaps: steps up to `resume_at` that metrics.jsonl lacks, as text.
        best: the best score (accuracy, reward) of its evaluations after the first step.
    """

    def __init__(
        self,
        path: Path,
        *,
        tensorboard: bool,
        wandb: str | None = None,
        resume_at: int | None = None,
    ):
        self._metrics = (path / METRICS).open("a", encoding="utf-8")
        _claim(self._metrics)
        self._samples = (path / SAMPLES).open("a", encoding="utf-8")
        if resume_at is not None:
            for file in (self._metrics, self._samples):
                _drop_after(file, resume_at)
        rows = read_metrics(path)
        self.gaps = _gaps(rows, resume_at or 0)
        self.best = _best(rows)
        self._events = _event_writer(path, resume_at) if tensorboard else None
        self._wandb = _wandb_run(path, wandb) if wandb else None

    def metrics(self, step: int, values: dict[str, float]) -> None:
        """Append one line; a number that is not finite is written as null."""
        finite = {k: v if math.isfinite(v) else None for k, v in values.items()}
        self._write(self._metrics, {"step": step, **finite})
        if self._wandb:
            self._wandb.log(values, step=step)
        if self._events:
            for name, value in values.items():
                self._events.add_scalar(name, value, step)

    def sample(self, step: int, **values: Any) -> None:
        """Append one completion."""
        self._write(self._samples, {"step": step, **values})

    def close(self) -> None:
        """Close all files."""
        for file in (self._metrics, self._samples):
            with suppress(OSError):  # of the last write, which has been said
                file.close()
        if self._events:
            self._events.close()
        if self._wandb:
            self._wandb.finish()

    @staticmethod
    def _write(file: TextIO, values: dict[str, Any]) -> None:
        try:
            file.write(json.dumps(values, ensure_ascii=False) + "\n")
            file.flush()
        except OSError as error:
            raise TrainerError(
                f"cannot write {file.name}: {error.strerror}; the last checkpoint, if any, is "
                "intact, and --resume goes on from it"
            ) from error


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl; one still being written, or cut off, is left out.

    Raises:
        RecipeError: no such file, or a line that is not one of ours.
    """
    return [values for _, values in _lines(path / METRICS)]


def _lines(file: Path) -> list[tuple[str, dict[str, Any]]]:
    """Every whole line and what it says."""
    try:
        with file.open(encoding="utf-8") as lines:  # str.splitlines would also cut at U+2028
            found = [(line, json.loads(line)) for line in lines if line.endswith("\n")]
        if all(isinstance(values["step"], int) for _, values in found):
            return found
        reason = "a step is no integer"
    except OSError as error:
        raise RecipeError(f"cannot read {file}: {error.strerror}{_runs_in(file.parent)}") from None
    except (ValueError, KeyError, TypeError) as error:
        reason = str(error)
    raise RecipeError(f"{file} is damaged: {reason}")


def _runs_in(path: Path) -> str:
    """What to name in place of a directory that is no run."""
    runs = sorted(str(file.parent) for file in path.glob(f"*/{METRICS}"))
    more = ", ..." if len(runs) > 4 else ""
    found = f"; in {path} are: {', '.join(runs[:4])}{more}" if runs else ""
    return f" (expected the directory of a run{found})"


def _gaps(rows: list[dict[str, Any]], last: int) -> str:
    missing = sorted(set(range(1, last + 1)) - {row["step"] for row in rows if "reward" in row})
    if not missing:
        return ""
    return f"{len(missing)} of {last} steps, the first of them step {missing[0]}"


def _best(rows: list[dict[str, Any]]) -> tuple[float, float] | None:
    found = [(r.get("eval_accuracy"), r.get("eval_reward")) for r in rows if r["step"] > 0]
    return max((score for score in found if None not in score), default=None)


def _drop_after(file: TextIO, step: int) -> None:
    """Cut off the lines of steps that the checkpoint does not know: resuming does them again."""
    kept = [line for line, values in _lines(Path(file.name)) if values["step"] <= step]
    file.truncate(len("".join(kept).encode()))


def _claim(file: TextIO) -> None:
    """Lock a run's metrics until they are closed, so that no second process writes to the run."""
    if os.name != "posix":
        return
    import fcntl

    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise RecipeError(
            f"{Path(file.name).parent} is being written by another fastpo: wait for it, or choose "
            "another run_dir"
        ) from None
    except OSError:  # a file system without locks
        return


def _replace(file: Path, text: str) -> None:
    """Write a file whole or not at all."""
    fresh = file.with_name(f"{file.name}.new")
    fresh.write_text(text, encoding="utf-8")
    fresh.replace(file)


def _import_wandb(project: str) -> Any:
    try:
        import wandb
    except ImportError:
        raise RecipeError(
            f"log.wandb is {project!r}, but wandb is not installed: pip install wandb"
        ) from None
    return wandb


def _wandb_run(path: Path, project: str) -> Any:
    wandb = _import_wandb(project)
    config = recipe.flatten(config_of(path))
    name = path.resolve().name
    return wandb.init(project=project, name=name, id=name, dir=path, config=config, resume="allow")


def _event_writer(path: Path, resume_at: int | None) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    purge = None if resume_at is None else resume_at + 1
    return SummaryWriter(path / "tensorboard", purge_step=purge)
