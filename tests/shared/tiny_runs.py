"""Tiny runs of the trainer, in process, and what they leave."""

import json
import math

import transformers

from fastpo.cli import main
from fastpo.trainer.data import tasks
from fastpo.trainer.data.tasks import Problem

TINY = """
task = "even"
threads = 1
steps = 2
[model]
hidden_size = 32
layers = 1
heads = 2
[rollout]
prompts = 4
group_size = 4
max_new_tokens = 4
[optim]
learning_rate = 1e-2
[eval]
problems = 16
temperature = 1.0
[verifier]
workers = 1
"""
EVALUATION = 2 * 16  # rewards asked for before the first step: sampled and greedy


class Even:
    """Begin with an even digit: right by chance one time in three, so every step can learn."""

    alphabet, stop = "0123456789=", None
    sabotage = None  # what happens, once, when reward number `after` has been asked for
    after = math.inf
    done = None  # a file that says that it has happened

    def __init__(self):
        self.calls = 0

    def problem(self, rng):
        return Problem(f"{rng.randrange(10_000)}=", str(2 * rng.randrange(5)))

    def reward(self, problem, completion):
        self.calls += 1
        if self.calls > self.after and not self.done.exists():
            self.done.touch()
            self.sabotage()
        return float(completion[:1] in set("02468"))


def trainer(folder, monkeypatch):
    """A command that trains on `Even` in `folder / "run"`, which it returns."""
    monkeypatch.setitem(tasks.TASKS, "even", Even)
    monkeypatch.setattr(Even, "done", folder / "done")
    path = folder / "tiny.toml"
    path.write_text(TINY + "\n[log]\ntensorboard = false\n")
    run = folder / "run"

    def train(*arguments, code=0):
        assert main(["train", str(path), f"run_dir={run}", *arguments]) == code
        return run

    return train


def one_line(capsys, *parts):
    """The error printed: one line that contains every part."""
    error = capsys.readouterr().err.strip()
    assert error.startswith("fastpo: ") and "\n" not in error
    for part in parts:
        assert part in error, error
    return error


def rows(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def weights(run):
    return transformers.AutoModelForCausalLM.from_pretrained(run / "checkpoint").state_dict()
