"""What a run shows while it goes on: a progress bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from pathlib import Path

from rich.console import Console, Group
from rich.live import Live
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn
from rich.text import Text

from fastpo.trainer.config import Config
from fastpo.trainer.model.policy import Policy
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


QUIET_SECONDS = 60.0  # the longest that a run which has no terminal for a bar says nothing
_open: list[Display] = []


def tell(text: str) -> None:
    """Say what goes on at the moment, to the display that is open, if any."""
    if _open:
        _open[-1].doing(text)


def headline(config: Config, policy: Policy, run_dir: Path) -> str:
    """The first line of a run: what is trained, on what and how."""
    size = sum(parameter.numel() for parameter in policy.model.parameters()) / 1e6
    return (
        f"{type(policy.model).__name__}, {size:.2f} M parameters, on {policy.device}, attention by "
        f"{policy.kernel}: "
        f"{config.algorithm.preset}, {config.steps} steps of {config.rollout.prompts} x "
        f"{config.rollout.group_size} completions. Everything goes to {run_dir}"
    )


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
        self.phase = ""
        self._doing = Text(style="dim")
        self._said = time.monotonic()
        group = Group(self._bar, self._numbers, self._doing)
        self._live = Live(group, console=console, refresh_per_second=4)

    def __enter__(self) -> Display:
        _open.append(self)
        if self._animated:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        _open.remove(self)
        self._doing.plain = ""
        self._live.stop()

    def doing(self, text: str) -> None:
        """Show what goes on at the moment; without a bar, as a line when all was quiet for long."""
        self._doing.plain = f"{self.phase}: {text}" if self.phase else text
        if not self._animated and time.monotonic() - self._said > QUIET_SECONDS:
            self.say(self._doing.plain)

    def say(self, text: str) -> None:
        """Print one line, above the bar where there is one."""
        self._said = time.monotonic()
        self.console.print(escape(text), soft_wrap=True)

    def step(self, step: int, metrics: dict[str, float]) -> None:
        """Show the numbers of a finished step."""
        shown = (f"{name} {form.format(metrics[key])}" for key, (name, form) in SHOWN.items())
        self._numbers.plain = "  ".join(shown)
        self._bar.update(self._task, completed=step)
        if not self._animated and (step % self.print_every == 0 or step == self.steps):
            self.say(f"step {step}/{self.steps}  {self._numbers.plain}")
