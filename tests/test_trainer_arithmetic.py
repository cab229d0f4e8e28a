"""The addition task of `make demo-smollm2`, and that a model made of text trains on it."""

import random
from pathlib import Path

import pytest

from fastpo.trainer.data.arithmetic import Addition
from fastpo.trainer.data.tasks import load_task
from fastpo.trainer.run import recipe

RECIPE = Path(__file__).resolve().parents[1] / "recipes" / "smollm2.toml"


def test_only_the_sum_alone_is_right():
    task = Addition()
    problem = task.problem(random.Random(0))
    assert task.reward(problem, problem.answer.removesuffix("\n")) == 1.0
    for wrong in ("", " ", f" {problem.data + 1}", f" {problem.data}, so", f"{problem.data} = "):
        assert task.reward(problem, wrong) == 0.0


@pytest.mark.parametrize("shots", [0, 1, 3])
def test_prompts_show_solved_lines_and_never_the_one_asked(shots):
    task = Addition(low=0, high=1, shots=shots)
    for seed in range(50):
        *solved, question = task.problem(random.Random(seed)).prompt.split("\n")
        assert len(solved) == shots
        assert all(not line.startswith(question) for line in solved)
        for line in solved:
            terms, total = line.split(" = ")
            assert sum(map(int, terms.split(" + "))) == int(total)


def test_every_prompt_and_answer_is_in_the_alphabet():
    task = Addition(shots=2)
    for seed in range(50):
        problem = task.problem(random.Random(seed))
        assert set(problem.prompt + problem.answer) <= set(task.alphabet)
        assert problem.answer.endswith(task.stop) and task.stop not in problem.answer[:-1]


@pytest.mark.parametrize("arguments", [{"low": 5, "high": 5}, {"low": -1}, {"shots": -1}])
def test_impossible_arguments_are_refused(arguments):
    with pytest.raises(ValueError, match="expected"):
        Addition(**arguments)


def test_the_recipe_loads_its_task():
    config = recipe.load(RECIPE)
    assert isinstance(load_task(config.task, config.task_args), Addition)
