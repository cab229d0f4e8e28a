"""Trustworthy arithmetic in Triton's interpreter, which runs kernels on CPU tensors for tests.

The interpreter stores bf16 as raw 16-bit integers. As shipped it truncates fp32 -> bf16 where a
GPU rounds to nearest even, and does arithmetic on the raw bits; up to Triton 3.6 its fp32 fma
rounds twice. `fix_arithmetic` repairs all three; `check_arithmetic` proves it on a small kernel, so
that no test passes on wrong arithmetic.

Import Triton with TRITON_INTERPRET=1 in the environment, then call `fix_arithmetic()` once.
"""

from __future__ import annotations

import numpy as np
import torch
import triton
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle


def interpreting() -> bool:
    """Whether this process's Triton interprets kernels instead of compiling them."""
    return not isinstance(tl.sum, triton.JITFunction)


def fix_arithmetic() -> None:
    """Make bf16 casts round to nearest even, bf16 arithmetic real, and fma round once.

    Does nothing when already done.

    Raises:
        RuntimeError: Triton compiles kernels in this process, or something is still wrong.
    """
    if not interpreting():
        raise RuntimeError("Triton compiles here: set TRITON_INTERPRET=1 before it is imported")
    if not getattr(InterpreterBuilder, "_fastpo_fixed", False):
        InterpreterBuilder._fastpo_fixed = True
        _patch_casts()
        _patch_arithmetic()
        _patch_fma()
    check_arithmetic()


def _is_bfloat16(handle: TensorHandle) -> bool:
    return handle.dtype.scalar == tl.bfloat16


def _widen(handle: TensorHandle) -> np.ndarray:
    """bf16 bits -> the same values in float32."""
    return (handle.data.view(np.uint16).astype(np.uint32) << 16).view(np.float32)


def _round(values: np.ndarray) -> np.ndarray:
    """Values -> bits of the nearest bf16, ties to even, NaN kept."""
    values = np.ascontiguousarray(values, dtype=np.float32)
    bits = values.view(np.uint32)
    to_even = np.uint32(0x7FFF) + ((bits >> 16) & 1)
    rounded = ((bits + to_even) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded)


def _patch_casts() -> None:
    original_cast = InterpreterBuilder.cast_impl
    original_convert = InterpreterBuilder.create_fp_to_fp

    def cast(self, source, destination_type):
        if _is_bfloat16(source):
            source = TensorHandle(_widen(source), tl.float32)
        if destination_type.scalar == tl.bfloat16:
            return TensorHandle(_round(source.data.astype(np.float32)), tl.bfloat16)
        return original_cast(self, source, destination_type)

    def convert(self, source, destination_type, rounding):
        nearest = rounding in (None, interpreter._ir.ROUNDING_MODE.RTNE)
        if nearest and destination_type.scalar == tl.bfloat16:
            return cast(self, source, destination_type)
        return original_convert(self, source, destination_type, rounding)

    InterpreterBuilder.cast_impl = cast
    InterpreterBuilder.create_fp_to_fp = convert


def _patch_arithmetic() -> None:
    """Binary and unary operations and tl.dot on bf16 compute in float32 and round once."""
    binary, unary = InterpreterBuilder.binary_op, InterpreterBuilder.unary_op
    dot = InterpreterBuilder.create_dot

    def binary_op(self, left, right, operation):
        if not (_is_bfloat16(left) and _is_bfloat16(right)):
            return binary(self, left, right, operation)
        result = operation(_widen(left), _widen(right))
        if result.dtype == np.bool_:
            return TensorHandle(result, tl.int1)
        return TensorHandle(_round(result), tl.bfloat16)

    def unary_op(self, argument, operation):
        if not _is_bfloat16(argument):
            return unary(self, argument, operation)
        return TensorHandle(_round(operation(_widen(argument))), tl.bfloat16)

    def create_dot(self, left, right, *arguments):
        if _is_bfloat16(left):
            left, right = (TensorHandle(_widen(x), tl.float32) for x in (left, right))
        return dot(self, left, right, *arguments)

    InterpreterBuilder.binary_op = binary_op
    InterpreterBuilder.unary_op = unary_op
    InterpreterBuilder.create_dot = create_dot


def _patch_fma() -> None:
    """The product of two fp32 numbers is exact in fp64, so one sum there rounds as an fma does."""
    original = InterpreterBuilder.create_fma

    def create_fma(self, x, y, z):
        if z.data.dtype != np.float32:
            return original(self, x, y, z)
        total = x.data.astype(np.float64) * y.data + z.data
        return TensorHandle(total.astype(np.float32), z.dtype.scalar)

    InterpreterBuilder.create_fma = create_fma


@triton.jit
def _arithmetic_kernel(x_ptr, y_ptr, sum_ptr, rounded_ptr, fma_ptr, n, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i, mask=i < n, other=0.0)
    y = tl.load(y_ptr + i, mask=i < n, other=0.0)
    tl.store(sum_ptr + i, x + y, mask=i < n)
    product = x.to(tl.float32) * y.to(tl.float32)
    tl.store(rounded_ptr + i, product.to(tl.bfloat16), mask=i < n)
    third = x.to(tl.float32) / 3.0
    tl.store(fma_ptr + i, tl.fma(third, third, -(third * third)), mask=i < n)


def check_arithmetic() -> None:
    """Compare bf16 addition and rounding, and fp32 fma, with torch's, bit by bit.

    Raises:
        RuntimeError: they differ, so that no result of this interpreter can be trusted.
    """
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(256, generator=generator).bfloat16() for _ in range(2))
    total, product, residue = torch.empty_like(x), torch.empty_like(x), torch.empty(256)
    _arithmetic_kernel[(1,)](x, y, total, product, residue, 256, BLOCK=256)
    third = x.float() / 3.0
    exact_residue = (third.double().square() - (third * third).double()).float()
    pairs = ((total, x + y), (product, x * y), (residue, exact_residue))
    wrong = [(got != expected).sum().item() for got, expected in pairs]
    if any(wrong):
        raise RuntimeError(
            f"the interpreter of triton {triton.__version__} is wrong in {wrong} of 256 bf16 sums, "
            "bf16 products and fp32 fmas: tests on it would prove nothing; adapt "
            "tools/triton_interpreter.py"
        )
