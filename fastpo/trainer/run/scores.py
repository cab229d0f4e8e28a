"""What several completions per problem say: pass@k, maj@k and intervals."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

from fastpo.trainer.evaluation import Evaluation
from fastpo.trainer.experience import Sample

SHOWN_ANSWERS = 3
Z95 = 1.959964  # of the normal distribution


def pass_at(k: int, right: list[bool]) -> float:
    """Chance that one of k draws without replacement is right (Chen et al., arXiv 2107.03374)."""
    n, wrong = len(right), right.count(False)
    return 1.0 - math.comb(wrong, k) / math.comb(n, k)


def majority_at(k: int, texts: list[str], right: list[bool]) -> float:
    """Chance that the most frequent text of k is right, over disjoint draws of k; ties share."""
    shares = []
    for start in range(0, len(texts) - k + 1, k):
        votes = Counter(texts[start : start + k])
        verdict = dict(zip(texts, right, strict=True))
        winners = [text for text, count in votes.items() if count == max(votes.values())]
        shares.append(sum(verdict[text] for text in winners) / len(winners))
    return sum(shares) / len(shares)


def interval(mean: float, problems: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share over `problems` of them.

    For a mean of several completions per problem it is wider than need be, never narrower: their
    variance is at most that of a single one.
    """
    spread = Z95 * math.sqrt(mean * (1 - mean) / problems + Z95**2 / (4 * problems**2))
    centre, scale = mean + Z95**2 / (2 * problems), 1 + Z95**2 / problems
    return max(0.0, (centre - spread) / scale), min(1.0, (centre + spread) / scale)


def numbers(result: Evaluation) -> dict[str, Any]:
    """Every number of an evaluation; shares come as {"mean", "low", "high"}."""
    groups = [[a for a in group if a.judged] for group in _problems(result)]
    groups = [group for group in groups if group]
    fewest = min(len(group) for group in groups)
    powers = [2**i for i in range(fewest.bit_length()) if fewest > 1]
    found = {"accuracy": _share(groups, lambda group: _mean([a.correct for a in group]))}
    for k in powers:
        right = [[a.correct for a in group] for group in groups]
        texts = [[a.text.strip() for a in group] for group in groups]
        found[f"pass@{k}"] = _share(right, lambda group, k=k: pass_at(k, group))
        votes = list(zip(texts, right, strict=True))
        found[f"maj@{k}"] = _share(votes, lambda group, k=k: majority_at(k, *group))
    return {
        **found,
        "greedy_accuracy": result.greedy_accuracy,
        "reward": result.reward,
        "mean_length": result.mean_length,
        "problems": len(groups),
        "completions": len(result.answers),
    }


def as_json(result: Evaluation) -> str:
    """One line of JSON: `numbers`."""
    return json.dumps(numbers(result))


def as_text(result: Evaluation) -> str:
    """A few answers, then the numbers."""
    found = numbers(result)
    firsts = [group[0] for group in list(_problems(result))[:SHOWN_ANSWERS]]
    lines = [
        f"{a.problem.prompt!r} -> {a.text!r}  ({'right' if a.correct else 'wrong'})" for a in firsts
    ]
    shares = {name: value for name, value in found.items() if isinstance(value, dict)}
    width = max(map(len, shares))
    lines += [
        f"{name:{width}}  {v['mean']:.3f}  (95 %: {v['low']:.3f} to {v['high']:.3f})"
        for name, v in shares.items()
    ]
    return "\n".join(lines) + (
        f"\ngreedy {found['greedy_accuracy']:.3f}  reward {found['reward']:.3f}  mean length "
        f"{found['mean_length']:.1f} tokens  ({found['problems']} problems, "
        f"{found['completions']} completions)"
    )


def _problems(result: Evaluation) -> Iterator[list[Sample]]:
    for start in range(0, len(result.answers), result.per_problem):
        yield result.answers[start : start + result.per_problem]


def _share(groups: list[Any], of: Callable[[Any], float]) -> dict[str, float]:
    mean = _mean([of(group) for group in groups])
    low, high = interval(mean, len(groups))
    return {"mean": mean, "low": low, "high": high}


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
