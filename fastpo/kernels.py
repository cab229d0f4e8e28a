"""Stands for the package `fastpo.kernels` where the Triton files are still in the top-level folder
`kernels/` of a checkout; once installed they lie beside this file. The folder has no `__init__.py`:
as a top-level package it would shadow the `kernels` of PyPI."""

from pathlib import Path

_here = Path(__file__).parent
__path__ = [
    str(
        next(
            p for p in (_here / "kernels", _here.parent / "kernels") if (p / "row_grad.py").exists()
        )
    )
]
