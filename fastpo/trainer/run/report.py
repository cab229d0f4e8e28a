"""The end of a run: summary.json, the curves, and what the terminal says about before and after."""

from __future__ import annotations

import json
import os
import platform
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

import fastpo
from fastpo.trainer.config import Config
from fastpo.trainer.evaluation import Evaluation
from fastpo.trainer.run.directory import CURVES, SUMMARY, path_of
from fastpo.trainer.run.plot import plot

SHOWN_ANSWERS = 3


MOST_CHARACTERS = 120  # of a prompt or a completion in the table


def digest(evaluation: Evaluation, per_problem: int) -> dict[str, Any]:
    """An evaluation as plain numbers and its first answers: what a checkpoint keeps of it."""
    shown = evaluation.answers[: SHOWN_ANSWERS * per_problem : per_problem]
    names = sorted({name for answer in evaluation.answers for name in answer.parts})
    parts = {n: [a.parts[n] for a in evaluation.answers if n in a.parts] for n in names}
    return {
        "accuracy": evaluation.accuracy,
        "greedy_accuracy": evaluation.greedy_accuracy,
        "reward": evaluation.reward,
        "mean_length": evaluation.mean_length,
        **{f"rewards/{name}/mean": sum(v) / len(v) for name, v in parts.items()},
        "answers": [
            {
                "prompt": answer.problem.prompt,
                "answer": answer.problem.answer,
                "text": answer.text,
                "correct": answer.correct,
            }
            for answer in shown
        ],
    }


def write_summary(
    run_dir: Path, before: dict[str, Any], after: dict[str, Any], **about: Any
) -> dict[str, Any]:
    """Write summary.json: `seed`, `seconds`, `before`, `after` (held-out), and where it ran."""
    summary = {
        **about,
        "before": {name: value for name, value in before.items() if name != "answers"},
        "after": {name: value for name, value in after.items() if name != "answers"},
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, "
        f"{torch.get_num_threads()} torch threads",
        "versions": _versions(),
    }
    (run_dir / CURVES).unlink(missing_ok=True)  # those of a run that is now longer
    text = json.dumps(summary, indent=2, ensure_ascii=False)
    (run_dir / SUMMARY).write_text(text + "\n", encoding="utf-8")
    return summary


def score(found: dict[str, Any]) -> tuple[float, float]:
    """By which evaluations are compared: accuracy, then reward."""
    return found["accuracy"], found["reward"]


def completed(run_dir: Path, steps: int) -> dict[str, Any] | None:
    """The summary of a run of so many steps, if it has been written."""
    try:
        summary = json.loads((run_dir / SUMMARY).read_text(encoding="utf-8"))
        return summary if summary["steps"] >= steps else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def draw_what_lacks(config: Config, out: Console) -> dict[str, Any] | None:
    """Draw the curves of a run that was stopped when they alone were left, and give its summary."""
    run_dir = path_of(config)
    if (run_dir / CURVES).exists() or not (done := completed(run_dir, config.steps)):
        return None
    out.print(f"Curves:  {plot(run_dir)}", soft_wrap=True, markup=False)
    return done


def show(
    out: Console, before: dict[str, Any], after: dict[str, Any], curves: Path, command: str
) -> None:
    """Print the tables, the path of the curves and the line that repeats the run."""
    out.print(_number_table(before, after))
    out.print(_answer_table(before["answers"], after["answers"]))
    out.print(f"Curves:  {curves}", soft_wrap=True, markup=False)
    out.print(f"Repeat:  {command}", soft_wrap=True, markup=False)


def _number_table(before: dict[str, Any], after: dict[str, Any]) -> Table:
    table = Table(title="Held-out problems", title_justify="left")
    table.add_column(overflow="fold")
    for heading in ("before", "after", "change"):
        table.add_column(heading, justify="right", no_wrap=True)
    for key in (name for name in before if name != "answers" and name in after):
        change = after[key] - before[key]
        name = key if key.startswith("rewards/") else key.replace("_", " ")
        table.add_row(name, f"{before[key]:.3f}", f"{after[key]:.3f}", f"{change:+.3f}")
    return table


def _answer_table(before: list[dict], after: list[dict]) -> Table:
    table = Table(title="Answers to the first of them", title_justify="left")
    for heading in ("prompt", "right answer", "before", "after"):
        table.add_column(heading, overflow="fold")
    for old, new in zip(before, after, strict=True):
        prompt, answer = _tail(old["prompt"]), _head(old["answer"] or "-")
        table.add_row(escape(prompt), escape(answer), _mark(old), _mark(new))
    return table


def _head(text: str) -> str:
    """The beginning of a text that is too long for a table."""
    more = len(text) - MOST_CHARACTERS
    return text if more <= 0 else f"{text[:MOST_CHARACTERS]}... ({more} more characters)"


def _tail(text: str) -> str:
    """The end of a long prompt: what tells problems apart stands there."""
    more = len(text) - MOST_CHARACTERS
    return text if more <= 0 else f"({more} characters before) ...{text[-MOST_CHARACTERS:]}"


def _mark(answer: dict[str, Any]) -> str:
    colour, verdict = ("green", "right") if answer["correct"] else ("red", "wrong")
    return f"[{colour}]{escape(_head(answer['text']))}  ({verdict})[/]"


def _versions() -> dict[str, str]:
    import transformers

    return {
        "fastpo": fastpo.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }
