"""What a run shows while it goes on: a progress bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

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
