"""The guard before every interpreted test: wrong arithmetic in the interpreter is noticed."""

from __future__ import annotations

import numpy as np
import pytest
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle
from triton_interpreter import check_arithmetic, fix_arithmetic, interpreting

pytestmark = pytest.mark.skipif(not interpreting(), reason="Triton compiles here")


def truncating_cast(original):
    def cast(self, source, destination_type):
        if source.dtype.scalar.is_fp32() and destination_type.scalar.is_bf16():
            bits = source.data.view(np.uint32) >> 16
            return TensorHandle(bits.astype(np.uint16), destination_type.scalar)
        return original(self, source, destination_type)

    return cast


def fma_that_rounds_twice(original):
    def fma(self, x, y, z):
        return TensorHandle(x.data * y.data + z.data, z.dtype.scalar)

    return fma


def bits_added_as_integers(original):
    def binary_op(self, left, right, operation):
        return TensorHandle(operation(left.data, right.data), left.dtype.scalar)

    return binary_op


def test_the_repaired_interpreter_passes():
    fix_arithmetic()
    fix_arithmetic()
    check_arithmetic()


@pytest.mark.parametrize(
    ("method", "defect"),
    [
        ("cast_impl", truncating_cast),
        ("create_fma", fma_that_rounds_twice),
        ("binary_op", bits_added_as_integers),
    ],
)
def test_a_wrong_interpreter_is_refused(method, defect, monkeypatch):
    monkeypatch.setattr(InterpreterBuilder, method, defect(getattr(InterpreterBuilder, method)))
    with pytest.raises(RuntimeError, match="would prove nothing"):
        check_arithmetic()
