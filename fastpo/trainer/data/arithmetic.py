"""Addition in plain text, for language models that come with a tokenizer."""

from __future__ import annotations

import random

from fastpo.trainer.data.tasks import Problem, parse_integer


class Addition:
    """`8 + 14 = 22`, a newline, `25 + 7 =`: complete the last line; 1.0 for the right sum alone.

    The solved lines above show the format (few-shot). A completion ends at its newline, so whatever
    follows the number on its line makes the answer wrong: the format is part of the task.
    """

    alphabet = "0123456789+= \n"
    stop = "\n"

    MAX_SHOTS = 3  # fewer than the different problems of the smallest range

    def __init__(self, low: int = 2, high: int = 30, shots: int = 1):
        if not 0 <= low < high:
            raise ValueError(f"low and high are {low} and {high}, expected 0 <= low < high")
        if not 0 <= shots <= self.MAX_SHOTS:
            raise ValueError(f"shots is {shots}, expected 0 to {self.MAX_SHOTS}")
        self.low = low
        self.high = high
        self.examples = "".join(self._solved(random.Random(index)) for index in range(shots))

    def problem(self, rng: random.Random) -> Problem:
        """Both terms uniform in [low, high], and no line that is already solved above."""
        while True:
            a, b = self._terms(rng)
            question = f"{a} + {b} ="
            if f"\n{question} " not in f"\n{self.examples}":
                return Problem(prompt=self.examples + question, answer=f" {a + b}\n", data=a + b)

    def reward(self, problem: Problem, completion: str) -> float:
        """1.0 if the completion is the sum and nothing else."""
        return float(parse_integer(completion) == problem.data)

    def _terms(self, rng: random.Random) -> tuple[int, int]:
        return rng.randint(self.low, self.high), rng.randint(self.low, self.high)

    def _solved(self, rng: random.Random) -> str:
        a, b = self._terms(rng)
        return f"{a} + {b} = {a + b}\n"
