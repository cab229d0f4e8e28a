"""What a run shows: a progress bar on a terminal, plain lines elsewhere, a report at the end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

SHOWN = {
    "reward": ("reward", "{:.2f}"),
    "accuracy": ("acc", "{:.2f}"),
    "completions/mean_length": ("len", "{:.1f}"),
    "entropy": ("entropy", "{:.3f}"),
    "clip_ratio/region_mean": ("clip", "{:.1%}"),
    "groups_kept": ("groups kept", "{:.0%}"),
}


class Display:
    """Progress of one run; a context manager."""

    def __init__(self, steps: int, start: int, print_every: int, console: Console | None = None):
        self.console = console or Console(highlight=False)
        self.print_every = print_every
        self.steps = steps
        self._progress = Progress(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(bar_width=20),
            TextColumn("{task.fields[numbers]}"),
            TimeRemainingColumn(compact=True),
            console=self.console,
            disable=not self.console.is_terminal,
        )
        self._bar = self._progress.add_task("train", total=steps, completed=start, numbers="")

    def __enter__(self) -> Display:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def say(self, text: str) -> None:
        """Print one line, above the bar where there is one."""
        self.console.print(escape(text), soft_wrap=True)

    def step(self, step: int, metrics: dict[str, float]) -> None:
        """Show the numbers of a finished step."""
        numbers = "  ".join(
            f"{name} {form.format(metrics[key])}"
            for key, (name, form) in SHOWN.items()
            if key in metrics
        )
        self._progress.update(self._bar, completed=step, numbers=numbers)
        if not self.console.is_terminal and (step % self.print_every == 0 or step == self.steps):
            self.say(f"step {step}/{self.steps}  {numbers}")


def report(
    console: Console, summary: dict[str, Any], answers: list[dict], curves: Path | None
) -> None:
    """The end of a run: before and after, a few answers of each, and how to repeat it."""
    table = Table(title="Held-out problems", title_justify="left")
    for heading in ("", "before", "after", "change"):
        table.add_column(heading, justify="left" if not heading else "right")
    before, after = summary["before"], summary["after"]
    for key, name in (("accuracy", "accuracy"), ("reward", "reward"), ("mean_length", "tokens")):
        change = after[key] - before[key]
        table.add_row(name, f"{before[key]:.3f}", f"{after[key]:.3f}", f"{change:+.3f}")
    console.print(table)
    if answers:
        console.print(_answer_table(answers))
    if curves:
        console.print(f"Curves:  {curves}", soft_wrap=True, markup=False)
    console.print(f"Repeat:  {summary['command']}", soft_wrap=True, markup=False)


def _answer_table(answers: list[dict]) -> Table:
    table = Table(title="Sampled answers", title_justify="left")
    for heading in ("prompt", "right answer", "before", "after"):
        table.add_column(heading, overflow="fold")
    for row in answers:
        table.add_row(
            escape(row["prompt"]),
            escape(row["answer"]),
            *(_mark(row[when], row[f"{when}_reward"]) for when in ("before", "after")),
        )
    return table


def _mark(text: str, reward: float) -> str:
    colour, verdict = ("green", "right") if reward >= 1 else ("red", "wrong")
    return f"[{colour}]{escape(text)}  ({verdict})[/]"
