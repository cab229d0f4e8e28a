"""TOML recipe + `key=value` overrides -> Config, and back; every mistake is one clear line."""

from __future__ import annotations

import ast
import difflib
import inspect
import json
import re
import sys
from collections.abc import Iterable, Iterator
from dataclasses import asdict, fields, is_dataclass
from functools import reduce
from operator import getitem
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

from pydantic import TypeAdapter, ValidationError

from fastpo.trainer import config as config_module
from fastpo.trainer.config import Config
from fastpo.trainer.run.errors import RecipeError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


BARE_KEY = re.compile(r"[A-Za-z0-9_-]+")
TAKES_BOOLEANS = re.compile(r"\b(bool|dict)\b")  # in a setting's type
BOUNDS = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}


class Setting(NamedTuple):
    """One documented key of a recipe."""

    key: str  # dotted
    type: str  # with its bounds
    default: str  # as an override gives it
    help: str


def load(path: str | Path | None, overrides: Iterable[str] = ()) -> Config:
    """Read a recipe, apply overrides such as `optim.learning_rate=1e-4`, and check everything.

    Without a path, every setting that no override names has its default.

    Raises:
        RecipeError: a missing or malformed file, an unknown key, a wrong type or value.
    """
    try:
        values = {} if path is None else tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise RecipeError(f"cannot read recipe {path}: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise RecipeError(f"recipe {path} is not valid TOML: {error}") from None
    for override in overrides:
        _apply(values, override)
    return build(values)


def build(values: dict[str, Any]) -> Config:
    """Check nested values (as TOML gives them) and make a Config of them."""
    _rename_fused(values.get("optim"))
    _check_booleans(values)
    try:
        config = TypeAdapter(Config).validate_python(values)
    except ValidationError as error:
        raise RecipeError(_explain(error.errors()[0])) from None
    _check_together(config)
    _check_engine(config)
    return config


def _rename_fused(optim: Any) -> None:
    """`optim.fused` of older runs is `optim.name` now."""
    if not isinstance(optim, dict) or "fused" not in optim:
        return
    fused = optim.pop("fused")
    if not isinstance(fused, bool):
        raise RecipeError(
            f"optim.fused is {fused!r}, expected true or false; it is optim.name=adamw_fused now"
        )
    if fused and (name := optim.setdefault("name", "adamw_fused")) != "adamw_fused":
        raise RecipeError(
            f"optim.fused=true is optim.name=adamw_fused now, and optim.name is {name!r}: set "
            "optim.fused=false, or change optim.name"
        )


def _check_booleans(values: dict[str, Any]) -> None:
    """Refuse true and false where a number is expected: to Python they are 1 and 0."""
    for setting in settings():
        try:
            value = reduce(getitem, setting.key.split("."), values)
        except (KeyError, TypeError):  # not given, or no table: for others to refuse
            continue
        several = value if isinstance(value, list) else [value]
        if any(isinstance(x, bool) for x in several) and not TAKES_BOOLEANS.search(setting.type):
            raise RecipeError(
                f"{setting.key} is {json.dumps(value)}, expected {setting.type} ({setting.help})"
            )


def _check_together(config: Config) -> None:
    """Refuse settings that are fine alone."""
    model, algorithm = config.model, config.algorithm
    if model.gradient_checkpointing and config.optim.share_prompts:
        raise RecipeError(
            "model.gradient_checkpointing runs a layer twice, and optim.share_prompts hands its "
            "keys and values on, once: set one of them to false"
        )
    if config.optim.share_prompts and (config.optim.packing or model.compile):
        other = "optim.packing" if config.optim.packing else "model.compile"
        raise RecipeError(
            f"{other} is of whole sequences, and optim.share_prompts runs prompts by themselves: "
            "set one of them to false"
        )
    if model.lora.rank and (model.path is None or config.warmup.max_steps):
        raise RecipeError(
            "model.lora adapts a model that has learned something, which is also its reference: "
            "set model.path, and warmup.max_steps=0"
        )
    if model.lora.rank and algorithm.sync_reference_every:
        raise RecipeError(
            "algorithm.sync_reference_every moves the reference policy, which with model.lora.rank "
            "is the model without its adapters: set one of them to 0"
        )
    stale = config.rollout.ahead or algorithm.carry_surplus
    if stale and config.optim.old_logprobs == "recompute" and not algorithm.correction:
        raise RecipeError(
            "optim.old_logprobs=recompute forgets that an earlier policy sampled (rollout.ahead, "
            "algorithm.carry_surplus): set algorithm.correction.mode=truncate, or old_logprobs to "
            "sampler"
        )


def _check_engine(config: Config) -> None:
    """What another sampler needs: a model that it can read, and a correction of its ratios."""
    rollout = config.rollout
    if rollout.engine == "own":
        if rollout.engine_args:
            raise RecipeError(
                f"rollout.engine_args names {', '.join(rollout.engine_args)}, which rollout.engine="
                "own does not take: set rollout.engine=vllm, or leave them out"
            )
        return
    if config.model.path is None or config.model.lora.rank or config.warmup.max_steps:
        raise RecipeError(
            "rollout.engine=vllm reads the model itself: set model.path, model.lora.rank=0 and "
            "warmup.max_steps=0"
        )
    if not rollout.kept_sets and (rollout.top_k or rollout.top_p < 1 or rollout.min_p):
        raise RecipeError("rollout.engine=vllm gives log-probs over kept sets: set kept_sets=true")
    if not config.algorithm.correction:
        config.algorithm.correction = {"mode": "truncate"}


def dump(config: Config) -> str:
    """The config as TOML that `load` reads back to an equal one; unset (None) keys are left out."""
    values = asdict(config)
    objective = values["algorithm"]["objective"]
    objective |= {name: "none" for name, value in objective.items() if value is None}
    return _table(values)


def flatten(config: Config) -> dict[str, Any]:
    """Every value under its dotted key."""
    values = asdict(config)
    return {setting.key: reduce(getitem, setting.key.split("."), values) for setting in settings()}


def settings(cls: type = Config, prefix: str = "") -> Iterator[Setting]:
    """Every key of a recipe with its type, default and the docstring under the field."""
    docs = _field_docs(cls)
    hints = get_type_hints(cls, include_extras=True)
    default = cls()
    for field in fields(cls):
        value = getattr(default, field.name)
        if is_dataclass(value):
            yield from settings(type(value), f"{prefix}{field.name}.")
        else:
            text = "none" if value is None else json.dumps(value)
            yield Setting(prefix + field.name, _type(hints[field.name]), text, docs[field.name])


def _type(hint: Any) -> str:
    """`int >= 1`, `'linear' | 'cosine'`, ..."""
    parts = get_args(hint)
    if get_origin(hint) is Annotated:
        bounds = [bound for part in parts[1:] for bound in asdict(part).items()]
        return parts[0].__name__ + ",".join(f" {BOUNDS[name]} {value}" for name, value in bounds)
    if get_origin(hint) is Literal:
        return " | ".join(map(repr, parts))
    if get_origin(hint) in (Union, UnionType):
        return " | ".join(map(_type, parts))
    return {type(None): "none", str: "text"}.get(hint) or (get_origin(hint) or hint).__name__


def _apply(values: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise RecipeError(f"got {override!r}, expected key=value, e.g. optim.learning_rate=1e-4")
    *path, name = key.split(".")
    for part in path:
        values = values.setdefault(part, {})
        if not isinstance(values, dict):
            raise RecipeError(f"{key}: {part} is a value, not a table of the recipe")
    values[name] = _parse(text)


def _parse(text: str) -> Any:
    """A TOML value where it is one, `none` for None, else the text itself."""
    if text.lower() == "none":
        return None
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _explain(error: dict[str, Any]) -> str:
    # Unions add the branch they tried to the location: keep what names a key.
    known = {setting.key: setting for setting in settings()}
    tables = {key.split(".")[0] for key in known if "." in key}
    parts = [str(part) for part in error["loc"]]
    key = next((k for n in range(len(parts), 0, -1) if (k := ".".join(parts[:n])) in known), None)
    if error["type"] == "unexpected_keyword_argument":
        from fastpo.objective import Objective  # and torch, which no other recipe needs

        key = ".".join(parts)
        of_objective = parts[-1] in {field.name for field in fields(Objective)}
        if of_objective and (parts[0] == "algorithm" or len(parts) == 1):
            return f"unknown key {key!r}; it is algorithm.objective.{parts[-1]}"
        return _nearest(key, known, tables)
    if key is None:
        return f"{'.'.join(parts)}: expected a table of keys, got {error['input']!r}"
    expected = error["msg"].removeprefix("Input should be ").removeprefix("a valid ")
    return f"{key} is {error['input']!r}, expected {expected} ({known[key].help})"


def _nearest(key: str, known: Iterable[str], tables: Iterable[str]) -> str:
    """What an unknown key may have meant: one of its table that is alike, or any of that table."""
    table, _, name = key.rpartition(".")
    inside = [k.removeprefix(f"{table}.") for k in known if table and k.startswith(f"{table}.")]
    alike = difflib.get_close_matches(name, inside, n=1)
    if inside and not alike:
        return f"unknown key {key!r}; {table} has {', '.join(inside)}"
    every = [*known, *tables]
    near = f"{table}.{alike[0]}" if alike else difflib.get_close_matches(key, every, 1, 0.0)[0]
    return f"unknown key {key!r}; the nearest known key is {near!r}"


def _table(values: dict[str, Any], name: str = "") -> str:
    """A table under its header, then the tables in it; empty ones are left out."""
    lines, tables = [f"[{name}]\n"] if name else [], []
    for key, value in values.items():
        if isinstance(value, dict):
            tables.append(_table(value, f"{name}.{_key(key)}" if name else _key(key)))
        elif value is not None:
            # JSON's numbers, strings, booleans and flat arrays are TOML, too.
            lines.append(f"{_key(key)} = {json.dumps(value, ensure_ascii=False)}\n")
    return "\n".join(["".join(lines), *filter(None, tables)])


def _key(key: str) -> str:
    return key if BARE_KEY.fullmatch(key) else json.dumps(key, ensure_ascii=False)


def _field_docs(cls: type) -> dict[str, str]:
    """Docstrings that stand under the fields of a dataclass, from its source."""
    tree = ast.parse(inspect.getsource(config_module))
    body = next(n.body for n in tree.body if isinstance(n, ast.ClassDef) and n.name == cls.__name__)
    docs = {}
    for node, below in zip(body, [*body[1:], None], strict=True):
        if isinstance(node, ast.AnnAssign):
            has_doc = isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant)
            docs[node.target.id] = " ".join(below.value.value.split()) if has_doc else ""
    return docs
