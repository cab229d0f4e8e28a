"""Peak bytes of all tensors while something is done: exact, and on any device, meta included."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class _Watch(TorchDispatchMode):
    """Knows of every storage that an operation returns, until it is freed."""

    def __init__(self) -> None:
        super().__init__()
        self.alive: dict[int, int] = {}
        self.now = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        self.add(found)
        return found

    def add(self, tensors: Any) -> None:
        for value in tree_leaves(tensors):
            if not isinstance(value, Tensor):
                continue
            storage = value.untyped_storage()
            if storage._cdata not in self.alive:
                self.alive[storage._cdata] = size = storage.nbytes()
                self.now += size
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self._freed, storage._cdata)

    def _freed(self, key: int) -> None:
        self.now -= self.alive.pop(key)


def peak_bytes(work: Callable[[], Any], there: Iterable[Tensor] = ()) -> int:
    """The most bytes alive during `work`, those of tensors that are `there` before included."""
    watch = _Watch()
    watch.add(list(there))
    with watch, torch.autograd.set_multithreading_enabled(False):
        work()
    return watch.peak
