"""Every way of installing fastpo gives the same importable package, and none hides anyone else's.

The scratch environments see this one's libraries through a .pth file and are installed into without
network or build isolation, from a copy of the checkout.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sysconfig
import venv
from pathlib import Path

import pytest

try:
    import tomllib
except ModuleNotFoundError:
    import tomli as tomllib

REPOSITORY = Path(__file__).resolve().parents[1]
CONFIGURED = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())
VERSION = CONFIGURED["project"]["version"]
KERNEL_MODULES = sorted(path.stem for path in (REPOSITORY / "kernels").glob("*.py"))

IMPORT_ALL = f"""
import importlib, importlib.util, pathlib, sys
import fastpo, fastpo.kernels
root = pathlib.Path(sys.argv[1])
for name in {KERNEL_MODULES!r}:
    importlib.import_module("fastpo.kernels." + name)
assert pathlib.Path(fastpo.__file__).is_relative_to(root), fastpo.__file__
assert fastpo.__version__ == {VERSION!r}
assert "kernels" not in sys.modules
"""

BUILD_LLAMA = """
import torch, transformers
config = transformers.LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=32,
    num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2)
model = transformers.LlamaForCausalLM(config)
assert model(input_ids=torch.tensor([[1, 2, 3]])).logits.shape == (1, 3, 32)
spec = importlib.util.find_spec("kernels")
ours = [] if spec is None else [str(p) for p in spec.submodule_search_locations or [spec.origin]]
"""

HIDDEN = "assert not any(path.startswith(str(root)) for path in ours), ours\n"


class Scratch:
    """A virtual environment that sees this one's libraries, but not this one's fastpo."""

    def __init__(self, directory: Path):
        self.directory = directory
        venv.create(directory, symlinks=True)
        self.python = directory / "bin" / "python"
        self.site = Path(self.run("import sysconfig; print(sysconfig.get_path('purelib'))").strip())
        (self.site / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")

    def run(self, code: str, *argv: str | Path, cwd: Path | None = None) -> str:
        """Run code in the environment, from an unrelated directory unless one is given."""
        return self._call([self.python, "-c", code, *argv], cwd or self.directory)

    def install(self, *what: str | Path) -> None:
        """pip install, offline and without touching the borrowed libraries."""
        offline = ("--no-index", "--no-deps", "--no-build-isolation", "--ignore-installed")
        self._call([self.python, "-m", "pip", "install", *offline, *what], self.directory)

    def _call(self, command: list[str | Path], cwd: Path) -> str:
        environment = os.environ | {"FASTPO_NO_EXT": "1", "OMP_NUM_THREADS": "1"}
        environment.pop("PYTHONPATH", None)
        done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout


@pytest.fixture
def scratch(tmp_path: Path) -> Scratch:
    return Scratch(tmp_path / "venv")


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of what a clone holds: builds leave their droppings there, not in the repository."""
    copy = tmp_path / "checkout"
    ignored = shutil.ignore_patterns("__pycache__", "*.so", "*.egg-info")
    for name in ("fastpo", "kernels", "csrc"):
        shutil.copytree(REPOSITORY / name, copy / name, ignore=ignored)
    for path in REPOSITORY.iterdir():
        if path.is_file():
            shutil.copy(path, copy)
    return copy


def build(scratch: Scratch, checkout: Path, kind: str) -> Path:
    """The wheel or sdist of the checkout, made by the build backend as pip would."""
    code = f"import sys, setuptools.build_meta as b; print(b.build_{kind}(sys.argv[1]))"
    name = scratch.run(code, scratch.directory, cwd=checkout).splitlines()[-1]
    return scratch.directory / name


def test_every_package_directory_is_listed():
    listed = set(CONFIGURED["tool"]["setuptools"]["packages"])
    found = {
        ".".join(path.parent.relative_to(REPOSITORY).parts)
        for path in (REPOSITORY / "fastpo").rglob("*.py")
    }
    assert listed == found | {"fastpo.kernels"}


def test_kernels_is_no_package_of_its_own():
    assert KERNEL_MODULES
    assert not (REPOSITORY / "kernels" / "__init__.py").exists()


@pytest.mark.slow
@pytest.mark.parametrize("flow", ["wheel", "sdist", "editable", "editable-strict"])
def test_installed_package_imports_beside_transformers(flow: str, scratch: Scratch, checkout: Path):
    if flow.startswith("editable"):
        mode = ("--config-settings", "editable_mode=strict") if flow == "editable-strict" else ()
        scratch.install("--editable", checkout, *mode)
        root = checkout
    else:
        scratch.install(build(scratch, checkout, flow))
        shutil.rmtree(checkout)
        root = scratch.site
    scratch.run(IMPORT_ALL + BUILD_LLAMA + HIDDEN, root)
    assert (scratch.python.parent / "fastpo").exists(), "the console script is missing"


@pytest.mark.slow
def test_checkout_imports_without_installation(scratch: Scratch):
    scratch.run(IMPORT_ALL + BUILD_LLAMA, REPOSITORY, cwd=REPOSITORY)


@pytest.mark.slow
def test_wheel_holds_the_kernels_and_the_type_marker(scratch: Scratch, checkout: Path):
    scratch.install(build(scratch, checkout, "wheel"))
    installed = {str(path.relative_to(scratch.site)) for path in scratch.site.rglob("*")}
    assert {f"fastpo/kernels/{name}.py" for name in KERNEL_MODULES} <= installed
    assert {"fastpo/kernels.py", "fastpo/py.typed"} <= installed
    assert not (scratch.site / "kernels").exists()


@pytest.mark.slow
def test_scratch_environment_has_no_other_fastpo(scratch: Scratch):
    found = scratch.run("import importlib.util as u; print(u.find_spec('fastpo'))")
    assert found.strip() == "None"
