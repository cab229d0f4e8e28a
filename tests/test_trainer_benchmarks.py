"""What the trainer's benchmarks compare differs in what they say it does, and in nothing else."""

import importlib.util
import math
import random
import sys
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from fastpo.trainer.algorithm import resolve
from fastpo.trainer.run import recipe

ROOT = Path(__file__).resolve().parents[1]


def load(name):
    """A benchmark file as a module; the neighbours that it puts into the path stay out of it."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    path = list(sys.path)
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path[:] = path
    return module


def flat(config):
    """Every setting of what a recipe optimizes, but for its name."""
    found = asdict(resolve(config.algorithm, config.rollout.max_new_tokens))
    return found.pop("objective") | found | {"name": ""}


def test_every_rung_of_the_ladder_adds_one_technique_and_the_last_is_dapo():
    ladder = load("ablation")
    algorithms = [
        flat(recipe.load(ladder.RECIPE, ladder.techniques(rung)))
        for rung in range(len(ladder.RUNGS))
    ]
    for old, new in pairwise(algorithms):
        assert sum(old[name] != new[name] for name in old) == 1
    dapo = ["algorithm.preset=dapo", f"algorithm.overlong_cache={ladder.CACHE}"]
    assert algorithms[-1] == flat(recipe.load(ladder.RECIPE, dapo))


def test_the_ladder_is_compared_when_all_have_seen_as_many_tokens():
    ladder = load("ablation")
    slow, fast = (
        {
            "num_tokens": 2000 * pace,
            "held_out": [(0, 0.1), (1000 * pace, 0.5), (2000 * pace, 0.6)],
            "metrics": {"num_tokens": [1000 * pace, 2000 * pace]},
        }
        for pace in (1, 2)
    )
    found = [ladder.accuracy_at(slow, tokens) for tokens in (0, 500, 1000, 2000)]
    assert found == pytest.approx([0.1, 0.3, 0.5, 0.6])
    assert math.isnan(ladder.accuracy_at(slow, 2001))
    runs = [[slow, slow], [fast, fast]]
    assert ladder.equal_tokens(runs) == 2000
    cells = [cell.strip() for cell in ladder._row_at(1, runs, 2000).split("|")]
    assert cells[2:-1] == ["0.500 +- 0.000", "-0.100 +- 0.000", "-0.100 +- 0.000", "1"]


def test_what_follows_the_last_comma_is_judged_and_work_takes_room():
    task = load("worked_sort").WorkedSort(shortest=4, longest=4, worked=0.5)
    rng, lengths = random.Random(0), set()
    for _ in range(20):
        problem = task.problem(rng)
        assert task.reward(problem, problem.answer) == 1.0
        assert task.reward(problem, problem.answer + ",") == 0.0
        assert task.reward(problem, problem.answer[:-1]) == 0.0
        lengths.add(len(problem.answer))
    assert lengths == {4, 4 * 7 // 2 - 1}


@pytest.mark.parametrize("method", ["fastpo", pytest.param("trl", marks=pytest.mark.peer)])
def test_the_long_context_step_is_the_same_by_every_method(method, monkeypatch):
    benchmark = load("long_context")
    monkeypatch.setattr(benchmark, "VOCAB", 300)
    ids, advantages = torch.randint(300, (2, 16)), torch.randn(32)
    grads = []
    for name in ("eager", method):
        made = benchmark.model()
        benchmark.step(name, made, ids, advantages)
        grads.append(torch.cat([p.grad.flatten() for p in made.parameters()]))
    torch.testing.assert_close(*grads, atol=1e-6, rtol=1e-4)
    assert grads[0].norm() > 1e-3


def test_both_caches_of_a_rollout_draw_the_same_tokens(monkeypatch):
    benchmark = load("rollout_cache")
    monkeypatch.setattr(benchmark.rollout, "growing", None)  # and put back at the end
    policy = benchmark.endless()
    drawn = [benchmark.measure(policy, 8, 12, name)[1] for name in benchmark.CACHES]
    assert drawn[0] == drawn[1] and len(set(map(tuple, drawn[0]))) == 8
    assert {len(tokens) for tokens in drawn[0]} == {12}
