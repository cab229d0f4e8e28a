"""docs/integrations.md: its examples run, and it speaks of every adapter."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "integrations.md").read_text()
EXAMPLES = re.findall(r"<!-- run -->\n```python\n(.*?)```", PAGE, flags=re.DOTALL)


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda text: text.splitlines()[2][:40])
def test_an_example_runs(example):
    names: dict[str, object] = {}
    exec(compile(example, "docs/integrations.md", "exec"), names)
    gradients = [x.grad for x in names["model"].parameters() if x.grad is not None]
    assert gradients and all(x.isfinite().all() for x in gradients)


def test_every_adapter_is_on_the_page():
    files = (path.stem for path in (ROOT / "fastpo" / "integrations").glob("[a-z]*.py"))
    named = {"transformers", "trl", "verl", "verl_head", "verl_plugin"}
    for name in files:
        spoken = name in named or f"integrations.{name}" in PAGE or f"import {name} as" in PAGE
        assert spoken, f"docs/integrations.md does not say how to use fastpo.integrations.{name}"
