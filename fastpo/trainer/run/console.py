"""What a run shows while it goes on: a progress bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

from rich.console import Console, Group
from rich.live import Live
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn
from rich.text import Text

from fastpo.trainer.run.errors import TrainerError

SHOWN = {
    "reward": ("reward", "{:.2f}"),
    "accuracy": ("acc", "{:.2f}"),
    "completions/mean_length": ("len", "{:.1f}"),
    "entropy": ("entropy", "{:.3f}"),
    "clip_ratio/region_mean": ("clip", "{:.1%}"),
    "groups_kept": ("groups kept", "{:.0%}"),
}


class Output(Console):
    """A console whose reader may go away (`| head`): an error like any other, not an exit."""

    def on_broken_pipe(self) -> None:
        """Stop the run, which saves a checkpoint."""
        self.quiet = True
        raise TrainerError("the reader of the output has gone")


class Display:
    """Progress of one run; a context manager."""

    def __init__(self, steps: int, start: int, print_every: int, console: Console):
        self.console = console
        self.print_every = print_every
        self.steps = steps
        self._bar = Progress("step", MofNCompleteColumn(), BarColumn(None), TimeRemainingColumn())
        self._task = self._bar.add_task("train", total=steps, completed=start)
        self._numbers = Text()
        self._animated = console.is_terminal and not console.is_dumb_terminal
        self._live = Live(Group(self._bar, self._numbers), console=console, refresh_per_second=4)

    def __enter__(self) -> Display:
        if self._animated:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._live.stop()

    def say(self, text: str) -> None:
        """Print one line, above the bar where there is one."""
        self.console.print(escape(text), soft_wrap=True)

    def step(self, step: int, metrics: dict[str, float]) -> None:
        """Show the numbers of a finished step."""
        shown = (f"{name} {form.format(metrics[key])}" for key, (name, form) in SHOWN.items())
        self._numbers.plain = "  ".join(shown)
        self._bar.update(self._task, completed=step)
        if not self._animated and (step % self.print_every == 0 or step == self.steps):
            self.say(f"step {step}/{self.steps}  {self._numbers.plain}")
