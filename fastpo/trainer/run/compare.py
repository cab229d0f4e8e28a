"""Runs side by side: `fastpo compare RUN...`."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from fastpo.trainer.run import directory, recipe, report
from fastpo.trainer.run.errors import RecipeError

OWN = {"seed", "run_dir", "existing", "steps"}  # settings that are no difference worth a column
LAST_SHARE = 10  # the reward shown is the mean of the last tenth of the steps


def compare(runs: Sequence[Path], out: Console | None = None) -> None:
    """Print a row for every run, and the settings that differ; of runs that are alike, the mean.

    Raises:
        RecipeError: a directory is no run, or a run has no metrics yet.
    """
    found = [_read(run) for run in runs]
    differing = [
        key
        for key in dict.fromkeys(key for each in found for key in each["settings"])
        if key not in OWN and len({_shown(each, key) for each in found}) > 1
    ]
    out = out or Console(highlight=False)
    table = Table(title="Held-out accuracy and training reward", title_justify="left")
    table.add_column("run", overflow="fold")
    for heading in ("steps", "before", "after", "best", "change", "reward", "min"):
        table.add_column(heading, justify="right", no_wrap=True)
    for each in found:
        table.add_row(escape(each["name"]), *_cells(each))
    if len(found) > 1 and not differing:
        table.add_section()
        table.add_row("mean", *_over(found, statistics.fmean, NUMBERS))
        table.add_row("standard deviation", *_over(found, statistics.stdev, SPREADS))
    out.print(table)
    for each in found if differing else ():
        for line in (each["name"], *(f"  {_shown(each, key)}" for key in differing)):
            out.print(line, markup=False, soft_wrap=True)


def _shown(each: dict[str, Any], key: str) -> str:
    """A setting of a run, as an override gives it."""
    value = each["settings"].get(key)
    return f"{key}={'none' if value is None else json.dumps(value, ensure_ascii=False)}"


def _leaves(values: dict[str, Any]) -> dict[str, Any]:
    """Settings that are tables, such as task_args, key by key."""
    return {
        name: leaf
        for key, value in values.items()
        for name, leaf in (
            _leaves({f"{key}.{part}": v for part, v in value.items()}).items()
            if isinstance(value, dict)
            else [(key, value)]
        )
    }


def _read(run: Path) -> dict[str, Any]:
    rows = directory.read_metrics(run)
    trained = [row for row in rows if isinstance(row.get("reward"), int | float)]
    if not trained:
        raise RecipeError(f"{run} has no metrics yet: train at least one step")
    held_out = [row["eval_accuracy"] for row in rows if "eval_accuracy" in row]
    last = trained[-max(1, len(trained) // LAST_SHARE) :]
    summary = report.completed(run, trained[-1]["step"]) or {}
    seconds = summary.get("seconds") or sum(row.get("step_time") or 0.0 for row in trained)
    return {
        "name": str(run),
        "settings": _leaves(recipe.flatten(directory.config_of(run))),
        "steps": trained[-1]["step"],
        "before": held_out[0] if held_out else None,
        "after": held_out[-1] if len(held_out) > 1 else None,
        "best": max(held_out[1:], default=None),
        "change": held_out[-1] - held_out[0] if len(held_out) > 1 else None,
        "reward": statistics.fmean(row["reward"] for row in last),
        "minutes": seconds / 60,
    }


NUMBERS = {"before": ".3f", "after": ".3f", "best": ".3f", "change": "+.3f", "reward": ".3f"}
SPREADS = dict.fromkeys(NUMBERS, ".3f")


def _cells(each: dict[str, Any]) -> list[str]:
    shown = ["-" if each[key] is None else format(each[key], f) for key, f in NUMBERS.items()]
    return [str(each["steps"]), *shown, f"{each['minutes']:.1f}"]


def _over(
    found: list[dict[str, Any]], of: Callable[[list[float]], float], forms: dict[str, str]
) -> list[str]:
    """A statistic of every number that all runs have."""
    columns = {key: [each[key] for each in found] for key in forms}
    return [
        "",
        *("-" if None in v else format(of(v), forms[key]) for key, v in columns.items()),
        "",
    ]
