"""Count the bytes that Triton kernels ask of memory, exactly, without a GPU.

    with count_traffic() as traffic:
        fused_loss(logits, ...)
    print(traffic.report(unit=logits.nbytes))

Works under Triton's interpreter (TRITON_INTERPRET=1) on anybody's kernels: every active lane of
every load, store and atomic counts its element size. These are requests: what a cache serves is in
them.

The model of what DRAM sees: a program's first read of a 32-byte sector and its writes reach DRAM.
A sector that it reads *again* comes from L2 if L2 holds all that was touched in between.
`reuse_window` is the largest such amount, in distinct sectors, within one program; with P programs
at a time, P windows must fit into L2. `reread_bytes` is what depends on it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
from triton.runtime.interpreter import GridExecutor, InterpreterBuilder

_SECTOR_BITS = 5  # 32 bytes, the unit of DRAM and L2 transfers on NVIDIA GPUs


@dataclass(kw_only=True)
class KernelTraffic:
    """Bytes that all launches of one kernel asked for."""

    launches: int = 0
    load_bytes: int = 0
    store_bytes: int = 0
    atomic_bytes: int = 0  # counted twice: read and written
    reread_bytes: int = 0  # the part of load_bytes that its own program had loaded before
    reuse_window: int = 0  # most bytes one program touched between two loads of a sector

    @property
    def total_bytes(self) -> int:
        """Everything requested."""
        return self.load_bytes + self.store_bytes + self.atomic_bytes

    @property
    def dram_bytes(self) -> int:
        """What remains when every second read of a program is served on chip."""
        return self.total_bytes - self.reread_bytes


@dataclass
class Traffic:
    """What `count_traffic` collects: {kernel name: KernelTraffic}, in the order of first launch."""

    kernels: dict[str, KernelTraffic] = field(default_factory=dict)

    @property
    def total_bytes(self) -> int:
        """Everything requested by all kernels."""
        return sum(k.total_bytes for k in self.kernels.values())

    @property
    def dram_bytes(self) -> int:
        """Of all kernels; what one kernel reads after another did counts again."""
        return sum(k.dram_bytes for k in self.kernels.values())

    def report(self, unit: int) -> str:
        """One line per kernel, in multiples of `unit` bytes (usually the logits' size)."""
        lines = [
            f"{name}: {k.launches} launches, loads {k.load_bytes / unit:.4f} (again "
            f"{k.reread_bytes / unit:.4f}, window {k.reuse_window} B), stores "
            f"{k.store_bytes / unit:.4f}, atomics {k.atomic_bytes / unit:.4f}, total "
            f"{k.total_bytes / unit:.4f}"
            for name, k in self.kernels.items()
        ]
        total = f"total {self.total_bytes / unit:.4f}, less rereads {self.dram_bytes / unit:.4f}"
        return "\n".join([*lines, f"{total} (x {unit} B)"])


class _Recorder:
    """Attributes each memory operation to the kernel and program that runs it."""

    def __init__(self) -> None:
        self.traffic = Traffic()
        self._kernel = KernelTraffic()
        self._clock = 0  # memory operations of the current program
        self._touched: dict[int, int] = {}  # sector -> clock of the program's last access
        self._loaded: set[int] = set()

    def begin_launch(self, name: str) -> None:
        self._kernel = self.traffic.kernels.setdefault(name, KernelTraffic())
        self._kernel.launches += 1

    def begin_program(self) -> None:
        self._clock = 0
        self._touched.clear()
        self._loaded.clear()

    def load(self, addresses: np.ndarray, itemsize: int) -> None:
        self._kernel.load_bytes += addresses.size * itemsize
        sectors, counts = np.unique(addresses >> np.uint64(_SECTOR_BITS), return_counts=True)
        sectors, counts = sectors.tolist(), counts.tolist()
        again = [
            (sector, count)
            for sector, count in zip(sectors, counts, strict=True)
            if sector in self._loaded
        ]
        if again:
            self._kernel.reread_bytes += itemsize * sum(count for _, count in again)
            oldest = min(self._touched[sector] for sector, _ in again)
            since = sum(clock > oldest for clock in self._touched.values())
            window = since << _SECTOR_BITS
            self._kernel.reuse_window = max(self._kernel.reuse_window, window)
        self._loaded.update(sectors)
        self._touch(sectors)

    def store(self, addresses: np.ndarray, itemsize: int) -> None:
        self._kernel.store_bytes += addresses.size * itemsize
        self._touch(np.unique(addresses >> np.uint64(_SECTOR_BITS)).tolist())

    def atomic(self, addresses: np.ndarray, itemsize: int) -> None:
        self._kernel.atomic_bytes += 2 * addresses.size * itemsize
        self._touch(np.unique(addresses >> np.uint64(_SECTOR_BITS)).tolist())

    def _touch(self, sectors: list[int]) -> None:
        self._clock += 1
        self._touched.update(dict.fromkeys(sectors, self._clock))


@contextlib.contextmanager
def count_traffic() -> Iterator[Traffic]:
    """Inside, every interpreted Triton kernel's memory requests are counted. Yields the counts."""
    recorder = _Recorder()
    with contextlib.ExitStack() as patches:
        _wrap_launches(patches, recorder)
        _wrap(patches, "create_masked_load", recorder.load, mask_position=1)
        _wrap(patches, "create_masked_store", recorder.store, mask_position=2)
        _wrap(patches, "create_atomic_rmw", recorder.atomic, pointer_position=1, mask_position=3)
        _wrap(patches, "create_atomic_cas", recorder.atomic, mask_position=None)
        yield recorder.traffic


def _replace(patches: contextlib.ExitStack, owner: type, name: str, make_replacement) -> None:
    original = getattr(owner, name)
    setattr(owner, name, make_replacement(original))
    patches.callback(setattr, owner, name, original)


def _wrap(patches, name: str, record, *, mask_position: int | None, pointer_position: int = 0):
    """Record the active addresses of the interpreter's memory operation `name` before it runs."""

    def make_replacement(original):
        def operation(self, *arguments, **options):
            pointers = arguments[pointer_position]
            addresses = np.asarray(pointers.data)
            if mask_position is not None:
                mask = np.broadcast_to(arguments[mask_position].data, addresses.shape)
                addresses = addresses[mask]
            record(addresses.ravel(), pointers.get_element_ty().primitive_bitwidth // 8)
            return original(self, *arguments, **options)

        return operation

    _replace(patches, InterpreterBuilder, name, make_replacement)


def _wrap_launches(patches, recorder: _Recorder) -> None:
    def counted_launch(original):
        def launch(self, *arguments, **options):
            recorder.begin_launch(self.fn.__name__)
            return original(self, *arguments, **options)

        return launch

    def counted_program(original):
        def set_grid_idx(self, *index):
            recorder.begin_program()
            return original(self, *index)

        return set_grid_idx

    _replace(patches, GridExecutor, "__call__", counted_launch)
    _replace(patches, InterpreterBuilder, "set_grid_idx", counted_program)
