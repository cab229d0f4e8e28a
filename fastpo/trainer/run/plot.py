"""The curves of a run as one PNG."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastpo.trainer.run.directory import CURVES, read_metrics
from fastpo.trainer.run.errors import RecipeError

OVERLAY = Path("compare.png")
Series = tuple[str, str, str]  # metric, label, colour
Line = tuple[Series, list[int], list[float]]  # with steps and values
COLOURS = ("#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377", "#222222")

PANELS: tuple[tuple[str, tuple[Series, ...]], ...] = (
    ("Accuracy", (("accuracy", "sampled", "#4477aa"), ("eval_accuracy", "held-out", "#222222"))),
    ("Reward", (("reward", "mean", "#228833"), ("reward_std", "std within groups", "#bbbbbb"))),
    ("Groups with right and wrong answers", (("groups_kept", "share", "#aa3377"),)),
    ("Entropy, nats per token", (("entropy", "entropy", "#ee6677"),)),
    (
        "Clipped tokens, share",
        (
            ("clip_ratio/low_mean", "at 1 - clip_low", "#66ccee"),
            ("clip_ratio/high_mean", "at 1 + clip_high", "#ccbb44"),
        ),
    ),
    ("Completion length, tokens", (("completions/mean_length", "mean", "#4477aa"),)),
)
OVERLAID = (  # of every panel, where several runs share it
    ("accuracy", "eval_accuracy"),
    ("reward",),
    ("groups_kept",),
    ("entropy",),
    ("clip_ratio/region_mean",),
    ("completions/mean_length",),
)


def plot(run_dir: Path) -> Path:
    """Draw `run_dir/curves.png` from its metrics.jsonl and return its path.

    Raises:
        RecipeError: there are no metrics.
    """
    rows = _rows(run_dir)
    lines = [[(s, *_points(rows, s[0])) for s in series] for _, series in PANELS]
    return _draw(lines, run_dir.name, run_dir / CURVES)


def overlay(runs: Sequence[Path], target: Path | None = None) -> Path:
    """Draw several runs into one PNG, in a colour each.

    Raises:
        RecipeError: a run has no metrics, or there are more runs than colours.
    """
    if len(runs) > len(COLOURS):
        raise RecipeError(f"got {len(runs)} runs, expected at most {len(COLOURS)}: one colour each")
    found = [(run, _rows(run), colour) for run, colour in zip(runs, COLOURS, strict=False)]
    lines = [
        [
            ((metric, _name(run, runs), colour), *_points(rows, metric))
            for run, rows, colour in found
            for metric in metrics
        ]
        for metrics in OVERLAID
    ]
    return _draw(lines, "Held-out accuracy: dashed", target or OVERLAY)


def _name(run: Path, runs: Sequence[Path]) -> str:
    """The last part of its path, or all of it where that is not unique."""
    return run.name if [other.name for other in runs].count(run.name) == 1 else str(run)


def _rows(run_dir: Path) -> list[dict[str, Any]]:
    rows = read_metrics(run_dir)
    if not rows:
        raise RecipeError(f"{run_dir} has no metrics yet: train at least one step")
    return rows


def _draw(panels: list[list[Line]], title: str, target: Path) -> Path:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(2, 3, figsize=(13, 6.4), layout="constrained")
    for axis, (heading, _), lines in zip(axes.flat, PANELS, panels, strict=True):
        _panel(axis, heading, lines)
    for axis in axes[-1]:
        axis.set_xlabel("step")
    figure.suptitle(title, fontsize=13)
    fresh = target.with_name(f"{target.name}.new")  # a file of that name is a whole picture
    figure.savefig(fresh, dpi=110, format="png")
    fresh.replace(target)
    plt.close(figure)
    return target


def smooth(values: list[float], span: int) -> list[float]:
    """Moving average over `span` values around each, over fewer at both ends."""
    half = span // 2
    windows = (values[max(0, i - half) : i + half + 1] for i in range(len(values)))
    return [sum(window) / len(window) for window in windows]


def _points(rows: list[dict[str, Any]], metric: str) -> tuple[list[int], list[float]]:
    found = [(r["step"], r[metric]) for r in rows if isinstance(r.get(metric), int | float)]
    return [step for step, _ in found], [value for _, value in found]


def _panel(axis: Any, title: str, lines: list[Line]) -> None:
    for (metric, label, colour), steps, values in lines:
        if metric.startswith("eval_"):
            axis.plot(steps, values, "o--", color=colour, markersize=4, label=label, zorder=3)
        else:
            axis.plot(steps, values, color=colour, alpha=0.25, linewidth=0.8)
            axis.plot(steps, smooth(values, len(values) // 12), color=colour, label=label)
    axis.set_title(title, loc="left", fontsize=10.5)
    axis.grid(color="#e5e5e5", linewidth=0.7)
    axis.spines[["top", "right"]].set_visible(False)
    axis.margins(x=0.01)
    if title != "Reward":  # everything else is a magnitude: noise must not fill the panel
        axis.set_ylim(bottom=0)
    if title.startswith(("Accuracy", "Groups")):
        axis.set_ylim(top=1.02)
    named = {label: handle for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    if len(named) > 1:
        axis.legend(named.values(), named.keys(), frameon=False, fontsize=9)
