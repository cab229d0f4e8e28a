"""Tasks made of rows, and the verifiers that ship with them."""

import json
import random
import sys

import pytest

from fastpo.trainer.data import verifiers
from fastpo.trainer.data.tasks import ProblemStream, fewer_held_out, held_out, load_task
from fastpo.trainer.data.verifier import Verifier
from fastpo.trainer.run.errors import RecipeError, TrainerError

ROWS = [{"prompt": f"{n}+1=", "answer": str(n + 1)} for n in range(7)]


@pytest.fixture
def write(tmp_path):
    def write(rows, name="rows.jsonl"):
        path = tmp_path / name
        lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
        path.write_text("\n".join(lines) + "\n")
        return str(path)

    return write


def prompts(problems):
    return [problem.prompt for problem in problems]


def test_every_row_comes_once_per_epoch_in_another_order(write):
    with Verifier(load_task("jsonl", {"train": write(ROWS)}), workers=1) as source:
        stream = ProblemStream(source, "train-0")
        epochs = [prompts(stream.take(7)) for _ in range(3)]
        assert all(sorted(epoch) == sorted(row["prompt"] for row in ROWS) for epoch in epochs)
        assert len(set(map(tuple, epochs))) == 3
        assert epochs[0] == prompts(ProblemStream(source, "train-0").take(7))
        assert epochs[0] != prompts(ProblemStream(source, "train-1").take(7))


@pytest.mark.parametrize("taken", [0, 3, 7, 10])
def test_an_epoch_goes_on_where_its_state_was_taken(write, taken):
    with Verifier(load_task("jsonl", {"train": write(ROWS)}), workers=1) as source:
        first, second = ProblemStream(source, "train-0"), ProblemStream(source, "other")
        first.take(taken)
        second.take(2)
        second.load_state(first.state())
        assert first.take(20) == second.take(20)


def test_held_out_rows_are_the_test_file_or_taken_out_of_training(write):
    test = [{"prompt": f"{n}+2=", "answer": str(n + 2)} for n in range(3)]
    args = {"train": write([*ROWS, test[1]]), "test": write(test, "test.jsonl")}
    with Verifier(load_task("jsonl", args), workers=1) as source:
        kept = held_out(source, 10)
        assert prompts(kept) == [row["prompt"] for row in test]
        assert prompts(held_out(source, 2)) == [row["prompt"] for row in test[:2]]
        with pytest.raises(TrainerError, match="no test row fits"):
            held_out(source, 2, lambda problem: False)
        stream = ProblemStream(source, "train-0", prompts(kept))
        assert not {"1+2="} & set(prompts(stream.take(50)))
    rows = [{"prompt": f"{n}+1=", "answer": str(n + 1)} for n in (*range(20), 1)]
    with Verifier(load_task("jsonl", {"train": write(rows)}), workers=1) as source:
        kept = prompts(held_out(source, 4))
        assert len(set(kept)) == 4
        rest = set(prompts(ProblemStream(source, "train-0", kept).take(50)))
        assert len(rest) == 16 and not rest & set(kept)
        assert fewer_held_out(source, 4, len(kept)) == ""
        assert prompts(held_out(source, 256)) == kept  # a fifth at most, and a line says so
        assert "4 of 21 rows" in fewer_held_out(source, 256, len(kept))
    with Verifier(load_task("jsonl", {"train": write(ROWS[:2])}), workers=1) as source:
        assert len(held_out(source, 256)) == 1  # one is left to train on


def test_rows_that_do_not_fit_are_skipped(write):
    with Verifier(load_task("jsonl", {"train": write(ROWS)}), workers=1) as source:
        stream = ProblemStream(source, "train-0", fits=lambda problem: problem.prompt < "2")
        assert set(prompts(stream.take(9))) == {"0+1=", "1+1="}


def test_messages_and_other_columns_reach_the_problem(write):
    row = {"chat": [{"role": "user", "content": "5+1?", "id": 3}], "gold": 6, "level": "easy"}
    task = load_task("jsonl", {"train": write([row]), "prompt": "chat", "answer": "gold"})
    problem = task.problem(random.Random())
    assert problem.messages == [{"role": "user", "content": "5+1?"}]
    assert (problem.prompt, problem.answer, problem.data) == ("5+1?", "6", row)


def test_a_reward_is_a_weighted_sum_of_named_parts(write, tmp_path, monkeypatch):
    (tmp_path / "manners.py").write_text(
        "def polite(completion, answer, row): return 'please' in completion\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p])
    reward = {"numeric": 0.75, "manners:polite": 0.25}
    task = load_task("jsonl", {"train": write(ROWS), "reward": reward})
    problem = task.rows[0]
    assert task.reward(problem, "please, 1") == {
        "reward": 1.0,
        "numeric": 1.0,
        "manners:polite": 1.0,
    }
    assert task.reward(problem, "1")["reward"] == 0.75
    alone = load_task("jsonl", {"train": write(ROWS), "reward": "numeric"})
    assert alone.reward(problem, "is 1") == {"reward": 1.0}


def test_a_data_set_of_hugging_face_gives_the_same_problems(write, tmp_path):
    datasets = pytest.importorskip("datasets")
    path = tmp_path / "saved"
    datasets.Dataset.from_list(ROWS).save_to_disk(str(path))
    rows = load_task("datasets", {"train": str(path)}).rows
    assert rows == load_task("jsonl", {"train": write(ROWS)}).rows


@pytest.mark.parametrize(
    ("rows", "arguments", "message"),
    [
        ([*ROWS, "{broken"], {}, "rows.jsonl line 8 is not JSON"),
        ([{"prompt": "1"}], {}, "rows.jsonl line 1 has no column 'answer', it has: prompt"),
        ([{"prompt": "1", "answer": None}], {}, "no column 'answer'"),
        (["[1]"], {}, "line 1 has no column 'prompt', it has: list"),
        ([{"prompt": 7, "answer": "1"}], {}, "expected text or messages"),
        ([], {}, "rows.jsonl has no rows"),
        (ROWS, {"test": "/nowhere.jsonl"}, "cannot read /nowhere.jsonl"),
        (ROWS, {"reward": "numbers"}, "verifier is 'numbers', expected exact, text, numeric"),
        (ROWS, {"reward": "no_module:f"}, "cannot import verifier 'no_module:f'"),
        (ROWS, {"reward": "operator:not_"}, r"'operator:not_'.*\(completion, answer, row\)"),
        (ROWS, {"reward": "string:digits"}, r"'string:digits'.*\(completion, answer, row\)"),
        (ROWS, {"colour": "red"}, "does not take task_args"),
    ],
)
def test_bad_data_is_one_line_before_anything_starts(write, rows, arguments, message):
    with pytest.raises(RecipeError, match=message) as caught:
        load_task("jsonl", {"train": write(rows), **arguments})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "answer", "right", "wrong"),
    [
        ("exact", "Yes", [" Yes\n"], ["yes", "Yes."]),
        ("text", "The cat.", ["the  CAT!"], ["a cat", ""]),
        (
            "numeric",
            "so 9 - 1 = 8\n#### 8",
            ["8", "7 then 8.0", r"\boxed{8} of 9", "$8"],
            ["", "7"],
        ),
        ("numeric", "1,234.50", ["is 1234.5", "2469/2"], ["1234", "1.234,5"]),
        ("numeric", "-3/4", ["-0.75", r"1 \boxed{-3/4}"], ["3/4", "3/0", "9" * 99]),
        ("json.total", "7", ['x {"total": 7}', '{"a": {}} {"total": "7"}'], ['{"total": 8}', "7"]),
        ("json.name", "Ann", ['{"name": "Ann"}'], ['{"name": null}', "{", "Ann"]),
    ],
)
def test_verifiers(name, answer, right, wrong):
    check = verifiers.verifier_named(name)
    assert [check(completion, answer, {}) for completion in right] == [1.0] * len(right)
    assert [check(completion, answer, {}) for completion in wrong] == [0.0] * len(wrong)


def test_countdown_takes_each_number_once_and_evaluates_nothing_else():
    """REGRESSIONS 29."""
    row = {"numbers": [6, 4, 8, 8]}
    for right in (
        "(6-4)*(8+8)",
        "thinking\n<answer> (8+8)*(6-4) = 32 </answer> done",
        "1\n(6-4)*(8+8)=32",
    ):
        assert verifiers.countdown(right, "32", row) == 1.0
    for wrong in (
        *("8*4", "(6-4)*(8+8)+0", "(6-4)*8*8", "32", "", "(6-4)*(8+8", "6**4**8**8"),
        *("__import__('os').getcwd()", "6/(4-4)+8+8", "(" * 500, "-6+4+8+8", "9" * 150),
    ):
        assert verifiers.countdown(wrong, "32", row) == 0.0
    assert verifiers.countdown("8/(3-8/3)", "24", {"numbers": [8, 8, 3, 3]}) == 1.0  # exactly
    assert verifiers.countdown("8/(3-8/3)", "24", {"numbers": [8, 8, 3]}) == 0.0
