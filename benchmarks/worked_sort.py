"""The task of the ablation: sort digits, with working or without, in a bounded number of tokens."""

from __future__ import annotations

import random

from fastpo.trainer.data.tasks import Problem


class WorkedSort:
    """`531=` -> `135`, or with the work shown: `5,35,135`; what follows the last comma counts.

    The work makes every token easy, a digit put into its place, but takes n (n + 3) / 2 tokens, end
    token included: the longest problems leave no room for it and are cut off. A policy has to find
    out how much of it pays.
    """

    alphabet = "0123456789=,"
    stop = None

    def __init__(self, shortest: int = 3, longest: int = 8, worked: float = 0.7):
        if not 1 <= shortest <= longest:
            raise ValueError(
                f"digits from {shortest} to {longest}, expected 1 <= shortest <= longest"
            )
        self.shortest, self.longest, self.worked = shortest, longest, worked

    def problem(self, rng: random.Random) -> Problem:
        """Digits with repetition; a share `worked` of the answers to imitate show their work."""
        digits = rng.choices("0123456789", k=rng.randint(self.shortest, self.longest))
        result = "".join(sorted(digits))
        answer = result
        if rng.random() < self.worked:
            answer = ",".join("".join(sorted(digits[:n])) for n in range(1, len(digits) + 1))
        return Problem(prompt=f"{''.join(digits)}=", answer=answer, data=result)

    def reward(self, problem: Problem, completion: str) -> float:
        """1.0 if the sorted digits follow the last comma."""
        return float(completion.rpartition(",")[2] == problem.data)
