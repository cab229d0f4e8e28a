"""Single modules of large trainers, imported from wheels that were unpacked but never installed.

`make test-all` puts those of peer_wheels.txt into .cache/peers. Their dependencies (DeepSpeed,
vLLM, ...) would take gigabytes; a loss function needs none of them.
"""

from __future__ import annotations

import ast
import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import MagicMock

PEERS = Path(__file__).parents[1] / ".cache" / "peers"


class WheelFinder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Modules of one wheel: its packages' __init__ files do not run; `stubs` are mocks."""

    def __init__(self, name: str, stubs: tuple[str, ...]):
        self.name, self.stubs = name, stubs

    def find_spec(self, name, path=None, target=None):
        if any(name == stub or name.startswith(f"{stub}.") for stub in self.stubs):
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        if name.partition(".")[0] != self.name:
            return None
        place = PEERS.joinpath(*name.split("."))
        if place.is_dir():
            spec = importlib.machinery.ModuleSpec(name, self, is_package=True)
            spec.submodule_search_locations = [str(place)]
            return spec
        return importlib.util.spec_from_file_location(name, place.with_suffix(".py"))

    def create_module(self, spec):
        if spec.submodule_search_locations:
            return None
        return MagicMock(name=spec.name, __path__=[])

    def exec_module(self, module):
        pass


@contextmanager
def wheel(name: str, *stubs: str) -> Iterator[None]:
    """Inside, `import name.module` finds the wheel's own file; afterwards nothing is left of it."""
    finder = WheelFinder(name, stubs)
    known = {key: sys.modules.pop(key) for key in list(sys.modules) if _owned(key, name, stubs)}
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        for key in [key for key in sys.modules if _owned(key, name, stubs)]:
            del sys.modules[key]
        sys.modules.update(known)


def _owned(key: str, name: str, stubs: tuple[str, ...]) -> bool:
    return any(key == root or key.startswith(f"{root}.") for root in (name, *stubs))


def outline(root: Path, module: str) -> dict[str, tuple[str, ...]]:
    """Names of a module that is not run -> arguments of functions, fields of classes, () of others.

    Methods are "Class.method"; what is imported counts, since that is where others look it up.
    """
    path = root.joinpath(*module.split("."))
    path = path.with_suffix(".py") if path.with_suffix(".py").is_file() else path / "__init__.py"
    return dict(_names(ast.parse(path.read_text()).body, "")) if path.is_file() else {}


def _names(body: list[ast.stmt], prefix: str) -> Iterator[tuple[str, tuple[str, ...]]]:
    for node in body:
        if isinstance(node, ast.FunctionDef):
            arguments = node.args
            given = (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)
            yield prefix + node.name, tuple(x.arg for x in given)
        elif isinstance(node, ast.ClassDef):
            fields = [x.target.id for x in node.body if _is_field(x)]
            yield prefix + node.name, tuple(fields)
            yield from _names(node.body, f"{prefix}{node.name}.")
        elif isinstance(node, ast.ImportFrom | ast.Import):
            yield from ((prefix + (x.asname or x.name), ()) for x in node.names)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            yield from ((prefix + x.id, ()) for x in targets if isinstance(x, ast.Name))
        elif isinstance(node, ast.If | ast.Try):
            yield from _names(node.body, prefix)


def _is_field(node: ast.stmt) -> bool:
    return isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
