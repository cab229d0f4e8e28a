"""Builds fastpo's optional extension, `fastpo._C`. All metadata is in pyproject.toml.

The extension is compiled against the torch that is importable here (`--no-build-isolation`),
through its stable ABI: one build serves every torch >= 2.10. Without torch, pybind11 or a compiler,
or if the compilation fails, one line says so and the installation goes on without it.

Environment: FASTPO_NO_EXT=1 leaves the extension out; FASTPO_FORCE_EXT=1 makes its failure fatal;
FASTPO_CUDA=1 / 0 compiles the CUDA sources or not (default: if torch is a CUDA build and nvcc is
found); TORCH_CUDA_ARCH_LIST names the architectures, as for any torch extension;
FASTPO_CXXFLAGS is added to the C++ compiler's flags.
"""

import os
import platform
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import setuptools
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

if int(setuptools.__version__.split(".")[0]) < 77:  # pip checks this in isolated builds only
    sys.exit(
        f"fastpo: setuptools is {setuptools.__version__}, expected 77 or newer to build: "
        "pip install --upgrade setuptools"
    )

from setuptools.modified import newer_group

TORCH_TARGET = "2.10"  # the oldest torch that the extension loads under
DEFAULT_CUDA_ARCHS = "8.0;9.0;10.0;12.0+PTX"
X86 = platform.machine().lower() in ("x86_64", "amd64")
SIMD_FLAGS = {
    "rows_avx512.cpp": ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma", "-mf16c"],
    "rows_avx2.cpp": ["-mavx2", "-mfma", "-mf16c"],
}
CXX_FLAGS = [
    *("-std=c++17", "-O3", "-g0", "-fvisibility=hidden", "-fno-math-errno"),
    "-ffp-contract=off",  # else copies of one kernel could fuse differently, and so differ in bits
    "-fno-strict-aliasing",  # a 2-byte gradient is written over the fp32 logits it comes from
    *("-Wall", "-Wextra", "-Wno-unused-parameter"),
    *("-Wno-uninitialized", "-Wno-maybe-uninitialized"),  # GCC 12 warns of its own intrinsics
]


def switched(name):
    """Whether an environment switch is on, off, or not set (None)."""
    value = os.environ.get(name, "")
    return None if not value else value not in ("0", "false", "no", "off")


def notice(text):
    """One line on the terminal, even under pip, which shows a build's output only on failure."""
    print(f"fastpo: {text}", file=sys.stderr)


def why(error):
    """The root of a build error in a few words; a compiler has said the rest itself."""
    while error.__cause__ or error.__context__:
        error = error.__cause__ or error.__context__
    if isinstance(error, subprocess.CalledProcessError):
        return f"{error.cmd[0]} failed, see above"
    if isinstance(error, FileNotFoundError):
        return f"there is no {error.filename}"
    return error


def find_nvcc():
    """Path of nvcc from CUDA_HOME, CUDA_PATH or PATH, or None."""
    for root in filter(None, map(os.environ.get, ("CUDA_HOME", "CUDA_PATH"))):
        if (nvcc := Path(root, "bin", "nvcc")).exists():
            return nvcc
    found = shutil.which("nvcc")
    return Path(found).resolve() if found else None


def wants_cuda(torch):
    """Decided from the torch build and nvcc, not from a visible GPU: images are built without."""
    wanted = switched("FASTPO_CUDA")
    if wanted is None:
        return torch.version.cuda is not None and find_nvcc() is not None
    if wanted and find_nvcc() is None:
        raise RuntimeError("FASTPO_CUDA=1, but there is no nvcc on PATH or under CUDA_HOME")
    return wanted


def cuda_archs():
    """[(number, with PTX)] from TORCH_CUDA_ARCH_LIST: "8.0;9.0+PTX" -> [("80", False), ...]."""
    archs = []
    for entry in re.split(r"[;\s]+", os.environ.get("TORCH_CUDA_ARCH_LIST") or DEFAULT_CUDA_ARCHS):
        match = re.fullmatch(r"(\d+)\.(\d+[af]?)(\+PTX)?", entry)
        if not match:
            raise RuntimeError(
                f"TORCH_CUDA_ARCH_LIST holds {entry!r}, expected e.g. 8.0;9.0;10.0+PTX"
            )
        archs.append((match[1] + match[2], bool(match[3])))
    return archs


def gencode(archs):
    """nvcc's flags for machine code, and PTX where wanted, of every architecture."""
    flags = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch, _ in archs]
    return flags + [f"-gencode=arch=compute_{a},code=compute_{a}" for a, ptx in archs if ptx]


def cudart_folder():
    """Where libcudart_static.a lies beside nvcc, in a toolkit or in NVIDIA's PyPI packages."""
    # nvcc may be a script that starts the real one elsewhere: it says itself where its toolkit is.
    said = subprocess.run(
        [find_nvcc(), "--dryrun", "-E", "none.cu"], capture_output=True, text=True
    )
    top = re.search(r"^#\$ TOP=(.+)$", said.stderr, re.MULTILINE)
    root = Path(top[1]) if top else find_nvcc().parent.parent
    for folder in ("lib64", "lib", "targets/x86_64-linux/lib", "targets/sbsa-linux/lib"):
        if (root / folder / "libcudart_static.a").exists():
            return str((root / folder).resolve())
    raise RuntimeError(
        f"no libcudart_static.a under {root}; install the CUDA runtime's static library"
    )


class BuildExtension(build_ext):
    """Compiles every file with its own flags, the .cu files with nvcc, all side by side."""

    def build_extension(self, ext):
        """Build `ext`; unless FASTPO_FORCE_EXT is set, a failure is a notice."""
        if not self.force and not newer_group(ext.depends, self.get_ext_fullpath(ext.name)):
            return
        try:
            sources, ext.sources = ext.sources, []
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                ext.extra_objects = list(
                    pool.map(lambda source: self._compile(ext, source), sources)
                )
            super().build_extension(ext)
        except Exception as error:
            if switched("FASTPO_FORCE_EXT"):
                raise
            notice(f"the C++ extension was not built ({why(error)}); going on without it")

    def _compile(self, ext, source):
        Path(self.build_temp).mkdir(parents=True, exist_ok=True)
        if source.endswith(".cu"):
            return self._compile_cuda(source)
        flags = CXX_FLAGS + SIMD_FLAGS.get(Path(source).name, [])
        flags += os.environ.get("FASTPO_CXXFLAGS", "").split()
        (made,) = self.compiler.compile(
            [source], self.build_temp, ext.define_macros, ext.include_dirs, extra_postargs=flags
        )
        return made

    def _compile_cuda(self, source):
        target = str(Path(self.build_temp, Path(source).stem + ".cu.o"))
        command = [str(find_nvcc()), "-std=c++17", "-O3", "-Xcompiler=-fPIC,-fvisibility=hidden"]
        subprocess.run([*command, *gencode(cuda_archs()), "-c", source, "-o", target], check=True)
        return target


def link_flags(cuda):
    """Flags and libraries, in the order that linkers mind."""
    # torch is loaded before the extension is; it stays a declared dependency so that weak symbols
    # of its CUDA half resolve. The CUDA runtime is linked statically: it needs no driver to load.
    runtime = ["-lcudart_static", "-lrt", "-lpthread", "-ldl"] if cuda else []
    linux = ["-Wl,--no-as-needed", "-Wl,--exclude-libs,ALL"] if sys.platform == "linux" else []
    return [*linux, "-ltorch", "-ltorch_cpu", *runtime]


def make_extension():
    """The `Extension`, with everything that only the installed torch knows."""
    import pybind11
    import torch
    from torch.utils import cpp_extension

    cuda = wants_cuda(torch)
    archs = " ".join(f"sm_{arch}" for arch, _ in cuda_archs()) if cuda else ""
    sources = [
        path.as_posix()
        for path in sorted(Path("csrc").iterdir())
        if path.suffix in ((".cpp", ".cu") if cuda else (".cpp",))
        and (X86 or path.name not in SIMD_FLAGS)
    ]
    major, minor = map(int, TORCH_TARGET.split("."))
    macros = [
        ("TORCH_TARGET_VERSION", f"0x{major:02x}{minor:02x}000000000000"),
        ("FASTPO_TORCH_TARGET", f'"{TORCH_TARGET}"'),
        ("FASTPO_CUDA_ARCHS", f'"{archs}"'),
        *([("FASTPO_X86", None)] if X86 else []),
        *([("FASTPO_WITH_CUDA", None), ("USE_CUDA", None)] if cuda else []),
    ]
    return Extension(
        "fastpo._C",
        sources,
        depends=[*map(str, Path("csrc").iterdir()), "setup.py"],
        # pybind11's own headers first: the copy in torch 2.10 refuses code of the stable ABI.
        include_dirs=[pybind11.get_include(), *cpp_extension.include_paths()],
        library_dirs=[*cpp_extension.library_paths(), *([cudart_folder()] if cuda else [])],
        define_macros=macros,
        extra_link_args=link_flags(cuda),
        language="c++",
        optional=not switched("FASTPO_FORCE_EXT"),
    )


def extensions():
    """The extensions to build: one, or none with a notice that says why."""
    if switched("FASTPO_NO_EXT"):
        return []
    try:
        return [make_extension()]
    except (ImportError, RuntimeError) as error:
        if switched("FASTPO_FORCE_EXT"):
            raise
        notice(f"no C++ extension ({error}); install with --no-build-isolation beside torch")
        return []


setup(ext_modules=extensions(), cmdclass={"build_ext": BuildExtension})
