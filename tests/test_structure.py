"""Which module may import which: no circle, no arrow back up, and no file too long to read."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "fastpo"
MODULES = sorted(
    path for path in PACKAGE.rglob("*.py") if "kernels" not in path.relative_to(PACKAGE).parts
)
READABLE = [p for p in MODULES if p.relative_to(PACKAGE).parts[0] in ("ops", "backends")]
FORBIDDEN = {
    # where: what it must not know of
    "objective.py": ("backends", "ops", "trainer", "integrations"),
    "segments.py": ("objective", "backends", "ops", "trainer", "integrations"),
    "rule.py": ("backends", "ops", "trainer", "integrations"),
    "backends": ("ops", "trainer", "integrations"),
    "ops": ("trainer", "integrations", "testing"),
    "integrations": ("trainer",),
}


def imports(path: Path) -> set[str]:
    """The fastpo modules that a file imports when it is imported, without `fastpo.`."""
    found = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:  # a submodule, or something that the module defines
                submodule = PACKAGE.parent / f"{node.module}.{alias.name}".replace(".", "/")
                is_module = submodule.is_dir() or submodule.with_suffix(".py").exists()
                found.add(f"{node.module}.{alias.name}" if is_module else node.module)
    return {name.removeprefix("fastpo.") for name in found if name and name.startswith("fastpo.")}


def name_of(path: Path) -> str:
    return path.relative_to(PACKAGE).with_suffix("").as_posix().replace("/", ".")


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_no_arrow_back_up(path):
    top = path.relative_to(PACKAGE).parts[0]
    for area in FORBIDDEN.get(top, ()):
        wrong = {name for name in imports(path) if name.split(".")[0] == area}
        assert not wrong, f"{name_of(path)} imports {wrong}"


def test_no_circle():
    known = {name_of(path).removesuffix(".__init__"): imports(path) for path in MODULES}
    graph = {name: needed & known.keys() - {name} for name, needed in known.items()}
    while leaves := {name for name, needed in graph.items() if not needed}:
        graph = {name: needed - leaves for name, needed in graph.items() if name not in leaves}
    assert not graph, f"modules that import each other: {graph}"


@pytest.mark.parametrize("path", READABLE, ids=name_of)
def test_a_file_is_read_in_one_sitting(path):
    assert len(path.read_text().splitlines()) <= 400, path.name
