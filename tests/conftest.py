"""What all tests share: Triton kernels run on this machine, and unwritten memory shows."""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import os
import sys
from types import ModuleType
from unittest.mock import MagicMock

os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

HAS_GPU = torch.cuda.is_available()
HAS_TRITON = importlib.util.find_spec("triton") is not None
if not HAS_TRITON:
    collect_ignore_glob = ["test_triton_*.py", "test_traffic.py", "test_*aot.py"]
if not HAS_GPU and "triton" not in sys.modules:
    os.environ.setdefault("TRITON_INTERPRET", "1")  # decided once, when Triton is imported


HELPERS = (
    "cpp_cases",
    "learner_cases",
    "objective_cases",
    "peer_batch",
    "policy_batch",
    "tiny_runs",
)
pytest.register_assert_rewrite(*HELPERS, "tiny_transformers")


def pytest_addoption(parser: pytest.Parser, pluginmanager: pytest.PytestPluginManager) -> None:
    """What pyproject.toml asks of pytest-timeout, which a machine with a GPU may not have."""
    if not pluginmanager.hasplugin("timeout"):
        parser.addini("timeout", "of a test, which nothing keeps here")


def pytest_configure(config: pytest.Config) -> None:
    """Refuse to test on an interpreter that computes wrongly: such tests would prove nothing."""
    config.addinivalue_line("markers", "timeout(seconds): of pytest-timeout")
    if HAS_GPU or not HAS_TRITON:
        return
    from triton_interpreter import fix_arithmetic

    try:
        fix_arithmetic()
    except RuntimeError as error:
        pytest.exit(str(error), returncode=3)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """`gpu` skips where there is none; `device` marks what runs on a GPU where there is one."""
    for item in items:
        if not HAS_GPU and item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="torch sees no GPU"))
        if "device" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.device)


@pytest.fixture(autouse=True)
def seeded() -> None:
    """A test that fails fails again."""
    torch.manual_seed(0)


@pytest.fixture
def device() -> torch.device:
    """Where Triton kernels run: the GPU, or the CPU under the interpreter."""
    if not HAS_TRITON:
        pytest.skip("triton is not installed")
    return torch.device("cuda" if HAS_GPU else "cpu")


@pytest.fixture
def poisoned_empty():
    """Every uninitialized tensor holds NaN (integers: their largest value)."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    filled = torch.utils.deterministic.fill_uninitialized_memory
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.utils.deterministic.fill_uninitialized_memory = filled
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def triton_backend(device: torch.device):
    """`fastpo.backends.triton`, ready to run on `device`."""
    from fastpo.backends import triton as triton_rows

    reason = triton_rows.unavailable(device)
    if reason is not None:
        pytest.skip(reason)
    return triton_rows


@pytest.fixture
def small_layout(monkeypatch: pytest.MonkeyPatch, triton_backend) -> None:
    """Steps of 256 columns, two kept: short rows have a body and a tail as long ones do.

    64 lanes are the least that fill a warp of every GPU (AMD's CDNA has 64).
    """
    from fastpo.kernels import _layout

    def layout(V: int, itemsize: int, aligned: bool, amd: bool) -> _layout.RowLayout:
        constants = _layout.RowLayout(LANES=64, WIDTH=2, ADJACENT=aligned, STEP=2, KEPT=1)
        return constants.with_tail(V, most=4)

    monkeypatch.setattr(_layout, "_layout", layout)


@pytest.fixture(scope="session")
def emulated_advantages(tmp_path_factory: pytest.TempPathFactory):
    """The CUDA kernels of group_advantages and gae, their threads being loops."""
    import advantage_emulation

    if advantage_emulation.COMPILER is None:
        pytest.skip("no C++ compiler")
    return advantage_emulation.EmulatedAdvantages(tmp_path_factory.mktemp("advantages"))


@pytest.fixture(params=["compiled", "emulated", "specified"])
def implementation(request, monkeypatch: pytest.MonkeyPatch) -> str:
    """What advantages are made by: the operators, if built, as on a GPU, or plain torch."""
    from fastpo import _extension

    if request.param == "specified":
        monkeypatch.setattr(_extension, "devices", lambda: ())
    elif (reason := _extension.load_error()) is not None:
        pytest.skip(reason)
    elif request.param == "emulated":
        emulated = request.getfixturevalue("emulated_advantages")
        for name in ("group_advantages", "gae"):
            monkeypatch.setattr(torch.ops.fastpo, name, getattr(emulated, name))
    return request.param


@pytest.fixture
def tiny(tmp_path, monkeypatch: pytest.MonkeyPatch):
    """See `tiny_runs.trainer`."""
    from tiny_runs import trainer

    return trainer(tmp_path, monkeypatch)


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch):
    """`stand_in("a.b.c", name=...)`: a module of that path with these names."""

    def make(path: str, **names: object) -> ModuleType:
        parts = path.split(".")
        for end in range(1, len(parts) + 1):
            name = ".".join(parts[:end])
            if name not in sys.modules:
                monkeypatch.setitem(sys.modules, name, ModuleType(name))
                if end > 1:
                    parent = sys.modules[".".join(parts[: end - 1])]
                    monkeypatch.setattr(parent, parts[end - 1], sys.modules[name], raising=False)
        vars(sys.modules[path]).update(names)
        return sys.modules[path]

    return make


class RayStub(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """verl's package imports ray, which its loss functions never call."""

    def find_spec(self, name, path, target=None):
        if name.partition(".")[0] == "ray":
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec):
        return MagicMock(name=spec.name, __path__=[])

    def exec_module(self, module):
        pass


@pytest.fixture(scope="module")
def verl():
    """(core_algos, config class); ray is stubbed where it is not installed."""
    stub = RayStub()
    sys.meta_path.append(stub)
    try:
        core = pytest.importorskip("verl.trainer.ppo.core_algos", reason="needs verl")
        from verl.workers.config import ActorConfig
    finally:
        sys.meta_path.remove(stub)
        for name, module in list(sys.modules.items()):
            if name.partition(".")[0] == "ray" and isinstance(module, MagicMock):
                del sys.modules[name]
    return core, ActorConfig
