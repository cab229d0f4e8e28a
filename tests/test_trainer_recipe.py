"""Recipes: TOML and overrides in, a checked Config out, one clear line for every mistake."""

from dataclasses import replace
from pathlib import Path

import pytest

from fastpo.advantages import ESTIMATORS
from fastpo.trainer.algorithm import resolve
from fastpo.trainer.config import Config
from fastpo.trainer.run import recipe
from fastpo.trainer.run.errors import RecipeError

RECIPES = sorted((Path(__file__).parent.parent / "recipes").glob("*.toml"))


def write(tmp_path, text):
    path = tmp_path / "recipe.toml"
    path.write_text(text)
    return path


def test_recipe_and_overrides_reach_every_kind_of_field(tmp_path):
    path = write(tmp_path, "steps = 7\n[optim]\nlearning_rate = 1e-4\n[task_args]\ndigits = 3\n")
    config = recipe.load(
        path,
        ["optim.beta2=0.99", "algorithm.dynamic_sampling=false", "task_args.digits=4", "steps=9"],
    )
    assert (config.steps, config.optim.learning_rate, config.optim.beta2) == (9, 1e-4, 0.99)
    assert config.algorithm.dynamic_sampling is False
    assert config.task_args == {"digits": 4}


def test_none_overrides_a_value_of_the_recipe(tmp_path):
    path = write(tmp_path, "[algorithm]\noverlong_cache = 3\n")
    assert recipe.load(path).algorithm.overlong_cache == 3
    assert recipe.load(path, ["algorithm.overlong_cache=none"]).algorithm.overlong_cache is None


def test_text_needs_no_quotes_and_numbers_may_name_a_directory(tmp_path):
    path = write(tmp_path, "")
    assert recipe.load(path, ["model.path=models/a b"]).model.path == "models/a b"
    assert recipe.load(path, ["model.path=2024"]).model.path == "2024"


@pytest.mark.parametrize(
    ("text", "overrides", "parts"),
    [
        ("stps = 3", [], ["'stps'", "'steps'"]),
        ("", ["optim.larning_rate=1"], ["'optim.larning_rate'", "'optim.learning_rate'"]),
        ("", ["optm.learning_rate=1"], ["'optm'", "'optim'"]),
        ("steps = 'many'", [], ["steps", "'many'", "integer"]),
        ("", ["optim.learning_rate=fast"], ["optim.learning_rate", "'fast'", "number"]),
        ("", ["algorithm.overlong_filter=7"], ["algorithm.overlong_filter", "7", "boolean"]),
        ("", ["rollout.group_size=1"], ["rollout.group_size", "1", "greater than or equal to 2"]),
        ("", ["optim.learning_rate=true"], ["optim.learning_rate is true", "expected float > 0"]),
        ("steps = true", [], ["steps is true, expected int >= 1"]),
        ("", ["eval.every=false"], ["eval.every is false, expected int"]),
        ("", ["optim.learning_rate=nan"], ["optim.learning_rate", "nan", "finite number"]),
        ("", ["model.dtype=int8"], ["model.dtype", "'int8'", "'float32'"]),
        ("", ["model.dtype=float16"], ["model.dtype", "'float16'", "'bfloat16'"]),
        ("", ["threads=100000"], ["threads", "100000", "1024"]),
        ("", ["algorithm.kl_coef=0.1"], ["it is algorithm.objective.kl_coef"]),
        ("", ["clip_high=0.3"], ["it is algorithm.objective.clip_high"]),
        ("", ["optim=3"], ["optim", "table"]),
        ("", ["algorithm.correction=none"], ["algorithm.correction is None", "dictionary"]),
        (  # REGRESSIONS 59
            "[rollout.engine_args]\nmax_model_len = 9",
            [],
            ["engine_args names max_model_len", "rollout.engine=vllm"],
        ),
        ("seed = 1", ["seed.x=3"], ["seed.x", "seed is a value"]),
        ("", ["steps"], ["'steps'", "key=value"]),
        ("steps = ", [], ["not valid TOML"]),
    ],
)
def test_a_mistake_is_one_line_that_names_it(tmp_path, text, overrides, parts):
    with pytest.raises(RecipeError) as caught:
        recipe.load(write(tmp_path, text), overrides)
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert part in message
    assert caught.value.exit_code == 2


def test_none_switches_a_bound_of_the_preset_off(tmp_path):
    """REGRESSIONS 60: it was dropped in silence, and the preset's own number stayed."""
    text = ["algorithm.preset=dppo", "algorithm.objective.ratio_max=none"]
    config = recipe.load(None, [*text, "algorithm.objective.gate=none"])
    objective = resolve(config.algorithm, max_new_tokens=16).objective
    assert (objective.ratio_max, objective.gate) == (None, "none")
    path = tmp_path / "again.toml"
    path.write_text(recipe.dump(config))
    assert resolve(recipe.load(path).algorithm, max_new_tokens=16).objective == objective


def test_missing_recipe_is_named(tmp_path):
    with pytest.raises(RecipeError, match=r"cannot read recipe .*absent\.toml"):
        recipe.load(tmp_path / "absent.toml")


def test_dump_reads_back_to_the_same_config(tmp_path):
    config = Config(
        task='with "quotes" and ünicode',
        task_args={"digits": 3, "names": ["a", "b"], "more": {"a b": 1, "deep": {"x": 2}}},
    )
    config = replace(config, algorithm=replace(config.algorithm, objective={"clip_high": 0.31}))
    assert recipe.load(write(tmp_path, recipe.dump(config))) == config


def test_every_setting_is_documented():
    settings = list(recipe.settings())
    assert len(settings) > 40
    assert [setting.key for setting in settings if not setting.help] == []
    (estimator,) = (s.help for s in settings if s.key == "algorithm.estimator")
    assert [name for name in ESTIMATORS if name not in estimator] == []


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_committed_recipes_are_valid(path):
    assert recipe.load(path).steps > 0
