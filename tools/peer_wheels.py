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


def source(module: str) -> ast.Module:
    """The syntax tree of a module of a wheel, which is not run."""
    return ast.parse(PEERS.joinpath(*module.split(".")).with_suffix(".py").read_text())
