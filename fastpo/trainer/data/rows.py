"""Tasks made of rows: `task = "jsonl"` reads files, `task = "datasets"` what Hugging Face loads.

task = "jsonl"
[task_args]
train = "train.jsonl"                        # {"prompt": "What is 2 + 3?", "answer": "5"}
test = "test.jsonl"                          # held out as it is; none = some rows of train
reward = { numeric = 1.0, "my_code:polite" = 0.1 }
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fastpo.trainer import hub
from fastpo.trainer.data.tasks import Problem
from fastpo.trainer.data.verifiers import verifier_named
from fastpo.trainer.run.errors import RecipeError


class JsonLines:
    """One JSON object per line, with a prompt and what the verifiers need.

    Args:
        train, test: paths. Without `test`, held-out problems are taken out of `train`.
        prompt: column of the prompt: text, or a list of messages with `role` and `content`.
        answer: column of the answer, given to verifiers, and imitated by a warm-up.
        reward: name of a verifier (see `verifiers`), or a table of names and weights: the reward is
            the weighted sum, and every part is logged. 1.0 counts as right.
        stop, alphabet: see `Task`.

    Raises:
        RecipeError: a file or column is missing, a line is no JSON object, a file has no rows, a
            verifier is not known.
    """

    def __init__(
        self,
        train: Any,
        test: Any = None,
        *,
        prompt: str = "prompt",
        answer: str = "answer",
        reward: str | dict[str, float] = "text",
        stop: str | None = None,
        alphabet: str | None = None,
    ):
        self.alphabet, self.stop = alphabet, stop
        self.columns = prompt, answer
        weights = {reward: 1.0} if isinstance(reward, str) else reward
        self.parts = [(name, verifier_named(name), float(w)) for name, w in weights.items()]
        self.rows = self._problems(train)
        self.test_rows = None if test is None else self._problems(test)

    def reward(self, problem: Problem, completion: str) -> dict[str, float]:
        """The weighted sum of the verifiers, and each of them."""
        found = {
            name: float(check(completion, problem.answer, problem.data))
            for name, check, _ in self.parts
        }
        total = sum(weight * found[name] for name, _, weight in self.parts)
        return {"reward": total, **(found if len(found) > 1 else {})}

    def problem(self, rng: Any) -> Problem:
        """Any row."""
        return rng.choice(self.rows)

    def read(self, source: Any) -> Iterator[tuple[str, Any]]:
        """Every row with a name of its place."""
        try:
            with Path(source).expanduser().open(encoding="utf-8") as lines:
                for number, line in enumerate(lines, start=1):
                    if line.strip():
                        yield f"{source} line {number}", json.loads(line)
        except json.JSONDecodeError as error:
            raise RecipeError(f"{source} line {number} is not JSON: {error}") from None
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or error
            raise RecipeError(
                f"cannot read {source}: {reason} (a recipe that comes with fastpo says in its "
                "first lines what makes it)"
            ) from None

    def _problems(self, source: Any) -> list[Problem]:
        problems = [self._problem(place, row) for place, row in self.read(source)]
        if not problems:
            raise RecipeError(f"{source} has no rows")
        return problems

    def _problem(self, place: str, row: Any) -> Problem:
        prompt, answer = self.columns
        missing = [c for c in self.columns if not isinstance(row, dict) or row.get(c) is None]
        if missing:
            known = ", ".join(row) if isinstance(row, dict) else type(row).__name__
            raise RecipeError(f"{place} has no column {missing[0]!r}, it has: {known}")
        given, messages = row[prompt], None
        if not isinstance(given, str):
            try:
                messages = [{"role": m["role"], "content": m["content"]} for m in given]
                given = "\n".join(m["content"] for m in messages)
            except (TypeError, KeyError):
                raise RecipeError(
                    f"{place}: column {prompt!r} is {given!r}, expected text or messages with "
                    "`role` and `content`"
                ) from None
        right = row[answer]
        text = right if isinstance(right, str) else json.dumps(right)
        return Problem(prompt=given, answer=text, data=row, messages=messages)


class HubRows(JsonLines):
    """As `JsonLines`, but `train` and `test` are arguments of `datasets.load_dataset`.

    A table such as `{ path = "openai/gsm8k", name = "main", split = "train" }`, or a directory that
    `save_to_disk` wrote.
    """

    def read(self, source: Any) -> Iterator[tuple[str, Any]]:
        """Every row with a name of its place."""
        try:
            import datasets

            with hub.asked_once(source.get("path", "") if isinstance(source, dict) else source):
                rows = (
                    datasets.load_dataset(**source)
                    if isinstance(source, dict)
                    else datasets.load_from_disk(str(source))
                )
        except Exception as error:  # of many kinds, by where the data is
            reason = " ".join(str(error).split())[:200]
            raise RecipeError(f"cannot load the data set {source}: {reason}") from None
        if isinstance(rows, dict):
            raise RecipeError(f"the data set {source} has splits {', '.join(rows)}: name one")
        yield from ((f"row {number} of {source}", row) for number, row in enumerate(rows))
