"""Programs that judge a completion against an answer: 1.0 = right, 0.0 = wrong.

Each takes `(completion, answer, row)`, where `row` is everything the data has on the problem, and
evaluates nothing of what a model wrote but bounded arithmetic. `module:function` names your own.
"""

from __future__ import annotations

import ast
import inspect
import json
import operator
import re
import string
from collections.abc import Callable
from fractions import Fraction
from typing import Any

from fastpo.trainer.data.tasks import import_attribute
from fastpo.trainer.run.errors import RecipeError

MAX_DIGITS = 30
NUMBER = re.compile(r"-?\$?\d[\d,]*(?:\.\d+)?(?:/\d+)?|-?\$?\.\d+")
BOXED = re.compile(r"\\boxed\{([^{}]*)\}")
ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
OPERATORS = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}
Check = Callable[[str, str, Any], float]


def exact(completion: str, answer: str, row: Any) -> float:
    """The completion is the answer, but for white space around it."""
    return float(completion.strip() == answer.strip())


def text(completion: str, answer: str, row: Any) -> float:
    """The same words: case, punctuation and the amount of white space do not matter."""
    return float(_words(completion) == _words(answer))


def numeric(completion: str, answer: str, row: Any) -> float:
    """The last number, or that in the last `\\boxed{}`, is the answer's (GSM8K: behind `####`)."""
    found, right = last_number(completion), last_number(answer)
    return float(found is not None and found == right)


def math(completion: str, answer: str, row: Any) -> float:
    """Mathematically equal, as the package `math-verify` sees it."""
    import math_verify

    return float(math_verify.verify(math_verify.parse(answer), math_verify.parse(completion)))


def countdown(completion: str, answer: str, row: Any) -> float:
    """An expression of `row["numbers"]`, each used once, that gives the answer.

    It is what stands in `<answer>` tags, or else on the last line; `= result` may follow.
    """
    tagged = ANSWER.findall(completion)
    lines = tagged[-1:] or completion.strip().splitlines()[-1:]
    expression = lines[0].partition("=")[0].strip() if lines else ""
    used: list[Fraction] = []
    value = arithmetic(expression, used)
    numbers = sorted(Fraction(str(number)) for number in row["numbers"])
    return float(value is not None and sorted(used) == numbers and value == last_number(answer))


def json_field(name: str) -> Check:
    """A check that the last JSON object in the completion has the answer in field `name`."""

    def check(completion: str, answer: str, row: Any) -> float:
        decoder, found = json.JSONDecoder(), None
        for match in re.finditer(r"\{", completion):
            try:
                found, _ = decoder.raw_decode(completion, match.start())
            except (ValueError, RecursionError):
                continue
        value = found.get(name) if isinstance(found, dict) else None
        shown = value if isinstance(value, str) else json.dumps(value)
        return float(value is not None and shown == answer)

    return check


VERIFIERS: dict[str, Check] = {
    check.__name__: check for check in (exact, text, numeric, math, countdown)
}


def verifier_named(name: str) -> Check:
    """One of VERIFIERS, `json.FIELD`, or `module:function`.

    Raises:
        RecipeError: no such verifier, one of another signature, or `math` without its package.
    """
    if name.startswith("json."):
        return json_field(name.removeprefix("json."))
    if name == "math":
        try:
            import math_verify  # noqa: F401
        except ImportError:
            raise RecipeError(
                "verifier 'math' needs the package math-verify: pip install math-verify"
            ) from None
    known = f"{', '.join(VERIFIERS)}, json.FIELD"
    return VERIFIERS.get(name) or _checked(name, import_attribute(name, "verifier", known))


def _checked(name: str, check: Any) -> Check:
    """A verifier that can be called as such."""
    try:
        inspect.signature(check).bind("", "", None)
    except ValueError:  # of C: has none that could be read
        return check
    except TypeError as error:
        raise RecipeError(
            f"verifier {name!r} cannot be called: {error}; expected a function of (completion, "
            "answer, row) that returns a number"
        ) from None
    return check


def last_number(text: str) -> Fraction | None:
    """The number in the last `\\boxed{}`, or else the last one in the text: 1,234.5, -3/4, $7."""
    boxed = BOXED.findall(text)
    found = NUMBER.findall(boxed[-1] if boxed else text)
    digits = re.sub(r"[$,]", "", found[-1]) if found else ""
    if not digits or len(digits) > MAX_DIGITS:
        return None
    try:
        return Fraction(digits)
    except (ValueError, ZeroDivisionError):  # "1.5/2", "3/0"
        return None


def arithmetic(expression: str, used: list[Fraction]) -> Fraction | None:
    """The value of `+ - * /` and parentheses over integers, which are added to `used`; or None."""
    if len(expression) > 200:
        return None
    try:
        return _value(ast.parse(expression, mode="eval").body, used)
    except (SyntaxError, ValueError, ZeroDivisionError, RecursionError, MemoryError):
        return None


def _value(node: ast.AST, used: list[Fraction]) -> Fraction:
    if isinstance(node, ast.Constant) and type(node.value) is int and node.value < 10**MAX_DIGITS:
        used.append(Fraction(node.value))
        return used[-1]
    if isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
        return OPERATORS[type(node.op)](_value(node.left, used), _value(node.right, used))
    raise ValueError(f"{type(node).__name__} is no arithmetic")


def _words(text: str) -> list[str]:
    return text.casefold().translate(str.maketrans("", "", string.punctuation)).split()
