"""The layout by its imports: layers point downwards, no circle, no file too long to read."""

from __future__ import annotations

import ast
import functools
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FACADE = ("fastpo", "fastpo._api")  # the public names, from everywhere
LONGEST = 400  # lines; objective.py is the specification, read as one text
# A package or module may import those after it (and itself), never those before.
LAYERS = (
    ("fastpo.cli",),
    ("fastpo.trainer",),
    ("fastpo.integrations",),
    ("fastpo.testing",),
    ("fastpo.doctor", "fastpo.plan", "fastpo.plan_buffers"),
    ("fastpo.critic", "fastpo.kept", "fastpo.mismatch"),
    ("fastpo.ops",),
    ("fastpo.backends",),
)


@functools.cache
def modules() -> dict[str, Path]:
    files = sorted((ROOT / "fastpo").rglob("*.py"))
    names = (".".join(f.relative_to(ROOT).with_suffix("").parts) for f in files)
    return {name.removesuffix(".__init__"): f for name, f in zip(names, files, strict=True)}


def imports(name: str, path: Path, *, at_import: bool) -> set[str]:
    """Modules of fastpo that a module names; `at_import`: those that its own import executes."""
    tree = ast.parse(path.read_text())
    nodes = _executed(tree) if at_import else ast.walk(tree)
    found: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            submodules = {f"{node.module}.{alias.name}" for alias in node.names}
            found.update(submodules & modules().keys() or {node.module})
    return {f for f in found if f in modules() and f not in (*FACADE, name)}


def _executed(tree: ast.AST):
    """Nodes outside functions and TYPE_CHECKING blocks."""
    for node in ast.iter_child_nodes(tree):
        guarded = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        if guarded or isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        yield node
        yield from _executed(node)


def layer(name: str) -> int:
    for index, prefixes in enumerate(LAYERS):
        if any(name == prefix or name.startswith(f"{prefix}.") for prefix in prefixes):
            return index
    return len(LAYERS)


def test_imports_point_downwards():
    wrong = [
        f"{name} imports {target}"
        for name, path in modules().items()
        for target in imports(name, path, at_import=False)
        if layer(target) < layer(name) and name not in FACADE
    ]
    assert not wrong


def test_no_circle():
    graph = {n: imports(n, path, at_import=True) for n, path in modules().items()}
    graph = {name: targets for name, targets in graph.items() if name not in FACADE}
    while graph:
        leaves = [name for name, targets in graph.items() if not targets & graph.keys()]
        assert leaves, f"circle among {sorted(graph)}"
        for leaf in leaves:
            del graph[leaf]


def test_backends_never_import_each_other():
    for name, path in modules().items():
        if name in ("fastpo.backends.torch", "fastpo.backends.cpp", "fastpo.backends.triton"):
            others = {f"fastpo.backends.{x}" for x in ("torch", "cpp", "triton")} - {name}
            assert not imports(name, path, at_import=False) & others


@pytest.mark.parametrize("folder", ["fastpo", "kernels", "csrc", "benchmarks", "tools", "tests"])
def test_no_file_is_too_long_to_read(folder):
    files = [f for f in (ROOT / folder).rglob("*") if f.suffix in (".py", ".h", ".cpp", ".cu")]
    assert files
    long = {f.name: n for f in files if (n := len(f.read_text().splitlines())) > LONGEST}
    long.pop("objective.py", None)
    assert not long


def test_the_first_call_of_the_readme_runs():
    """Pasted as it stands, into an interpreter that knows nothing else."""
    code = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S).group(1)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "entropy" in done.stdout
