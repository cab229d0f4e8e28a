"""Build csrc under AddressSanitizer and UndefinedBehaviorSanitizer, and run its tests on it.

    python tools/sanitize.py [pytest arguments]

The build goes to build/sanitize, beside the installed one, and its tests run once per SIMD level of
this CPU. A read or write out of bounds, or undefined behaviour, ends the run with a report. Needs
GCC with its sanitizer libraries, and Linux.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build" / "sanitize"
SANITIZE = "-fsanitize=address,undefined -fno-sanitize-recover=undefined"
# Scratch memory only grows: a row one number too long for it shows while nothing longer has run.
TESTS = [
    "tests/test_cpp_rows_blocks.py::test_scratch_ends_with_the_row",
    "tests/test_cpp_rows_blocks.py",
    "tests/test_cpp_rows.py",
    "tests/test_cpp_rows_hostile.py",
    "tests/test_cpp_operators.py",
    "tests/test_cpp_rows_kept.py",
]
# What says nothing about memory, or takes gigabytes of address space.
LEFT_OUT = (
    "not (graph or opcheck or simd or kl_estimators or many_rows or offsets_beyond or exp_is)"
)


def build() -> Path:
    """Compile, and return the extension's path."""
    environment = {
        **os.environ,
        "FASTPO_FORCE_EXT": "1",
        "FASTPO_CUDA": "0",
        "FASTPO_CXXFLAGS": f"{SANITIZE} -O1 -g1 -fno-omit-frame-pointer",
        "LDFLAGS": SANITIZE,
    }
    command = [sys.executable, "setup.py", "-q", "build_ext"]
    command += [f"--build-lib={BUILD}", f"--build-temp={BUILD / 'objects'}"]
    subprocess.run(command, cwd=ROOT, env=environment, check=True)
    return next((BUILD / "fastpo").glob("_C*.so"))


def library(name: str) -> str:
    """Where the compiler keeps one of its runtime libraries."""
    command = [os.environ.get("CXX", "g++"), f"-print-file-name={name}"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def run_tests(extension: str, arguments: list[str]) -> int:
    """In the sanitized process: the tests, with `fastpo._C` from the sanitized build."""
    sys.path[:0] = [str(ROOT)]
    import pytest
    import torch  # noqa: F401 - its libraries come first

    spec = importlib.util.spec_from_file_location("fastpo._C", extension)
    sys.modules["fastpo._C"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules["fastpo._C"])
    # Uncaptured: a report ends the process before pytest would print what it has captured.
    return pytest.main(
        ["-q", "-x", "-s", "-p", "no:cacheprovider", "-k", LEFT_OUT, *TESTS, *arguments]
    )


def main() -> int:
    """0 if every level's tests passed without a report."""
    extension = build()
    probe = "import torch, fastpo._C as c; print(*c.build_info()['simd_compiled'])"
    environment = {
        **os.environ,
        "LD_PRELOAD": f"{library('libasan.so')} {library('libubsan.so')}",
        "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=0",  # Python keeps what it has allocated
        "UBSAN_OPTIONS": "print_stacktrace=1",
    }
    levels = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, cwd=ROOT)
    for level in levels.stdout.split() or ["portable"]:
        print(f"sanitize: {level}", flush=True)
        command = [sys.executable, __file__, "--run", str(extension), *sys.argv[1:]]
        done = subprocess.run(command, cwd=ROOT, env={**environment, "FASTPO_SIMD": level})
        if done.returncode:
            return done.returncode
    return 0


if __name__ == "__main__":
    if sys.argv[1:2] == ["--run"]:
        sys.exit(run_tests(sys.argv[2], sys.argv[3:]))
    sys.exit(main())
