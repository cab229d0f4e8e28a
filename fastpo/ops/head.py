"""The LM head on one chunk of tokens: its logits, the three gradients of that product, and the
matrix product they all are."""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

COLUMNS_MULTIPLE = 32
"""Rows of a buffer are padded with zeros to whole tiles of this many columns: `zero_padded`."""
HEAD_BLOCK = 4096  # rows or columns of a low-precision operand that are widened at a time


@dataclass(frozen=True, kw_only=True)
class Head:
    """logits = softcap * tanh(logit_scale * (hidden @ weight.T + bias) / softcap), or without tanh.

    The factors cost nothing: `gain` (logit_scale, or logit_scale / softcap) rides in the GEMMs as
    alpha, and the outer softcap in the temperature of the row primitives. So with a softcap the
    chunk holds t = tanh(...), and `temperature` turns t into the scaled logits u.
    """

    weight: Tensor  # (V, D)
    bias: Tensor | None  # (V,)
    logit_scale: float = 1.0
    softcap: float | None = None

    @property
    def gain(self) -> float:
        """What multiplies hidden @ weight.T + bias before the tanh, if there is one."""
        return self.logit_scale if self.softcap is None else self.logit_scale / self.softcap

    def temperature(self, temperature: float | Tensor) -> float | Tensor:
        """The temperature that the row primitives must divide the chunk by."""
        return temperature if self.softcap is None else temperature / self.softcap

    def logits_(self, out: Tensor, hidden: Tensor) -> None:
        """Fill `out` (n, V) with the logits, before the outer softcap, of `hidden` (n, D)."""
        if self.bias is not None:  # as a 1-D input, addmm would copy it, too
            out.copy_(self.bias.expand_as(out))
        beta = 0.0 if self.bias is None else self.gain
        add_matmul_(out, hidden, self.weight.t(), alpha=self.gain, beta=beta)
        if self.softcap is not None:
            out.tanh_()

    def through_tanh_(self, grad: Tensor, tanh: Tensor) -> None:
        """grad *= 1 - t^2. Both (n, V); `tanh` is overwritten."""
        grad.mul_(tanh.square_().neg_().add_(1))

    def hidden_grad_(self, out: Tensor, grad: Tensor) -> None:
        """Fill `out` (n, D) with the gradient of the hidden states from `grad` (n, V)."""
        add_matmul_(out, grad, self.weight, alpha=self.gain, beta=0.0)

    def weight_grad_(self, total: Tensor, grad: Tensor, hidden: Tensor, *, beta: float) -> None:
        """total (V, D) = beta * total + gain * grad.T @ hidden, in the dtype of `total`."""
        add_matmul_(total, grad.t(), hidden, alpha=self.gain, beta=beta)

    def add_bias_grad_(self, total: Tensor, grad: Tensor) -> None:
        """total (V,) += gain * the column sums of grad."""
        total.add_(torch.sum(grad, 0, dtype=total.dtype), alpha=self.gain)


def zero_padded(rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """(rows, columns) uninitialized, with zeros between its rows up to whole tiles of columns.

    Every row then begins at a multiple of 16 bytes whatever V is, as wide loads and TMA ask. And a
    product that reads past a ragged K finds zeros there: the bf16 matmul of torch 2.13's oneDNN
    does, on processors with AMX where K is not a multiple of 32 (uxlfoundation/oneDNN#5717), and
    0 * NaN would make one row's NaN the next one's.
    """
    width = math.ceil(columns / COLUMNS_MULTIPLE) * COLUMNS_MULTIPLE
    buffer = torch.empty(rows, width, dtype=dtype, device=device)
    if width > columns:
        buffer[:, columns:].zero_()
    return buffer[:, :columns]


def add_matmul_(
    out: Tensor, a: Tensor, b: Tensor, *, alpha: float = 1.0, beta: float = 0.0
) -> None:
    """out = beta * out + alpha * a @ b, without rounding the product to the operands' dtype.

    out (m, n), a (m, k), b (k, n). What stood in `out` is not read when beta is 0. Where the
    operands are narrower than `out`, CUDA's GEMM returns its fp32 accumulators (`out_dtype`);
    elsewhere the operands are widened in blocks, so that no wide copy of a weight exists.

    A low-precision `a` on CPU has a k of whole tiles, or zeros behind its rows (`zero_padded`).
    """
    if a.dtype == b.dtype == out.dtype:
        torch.addmm(out, a, b, alpha=alpha, beta=beta, out=out)
        return
    wide = wide_gemm(a.device, a.dtype) if a.dtype == b.dtype else None
    if wide == "addmm":
        torch.addmm(out, a, b, alpha=alpha, beta=beta, out_dtype=out.dtype, out=out)
    elif wide == "mm":
        _by_mm(out, a, b, alpha, beta)
    else:
        _in_blocks(out, a, b, alpha, beta)


def _by_mm(out: Tensor, a: Tensor, b: Tensor, alpha: float, beta: float) -> None:
    """A product of its own for every block of rows, then added."""
    for part, left in zip(out.split(HEAD_BLOCK), a.split(HEAD_BLOCK), strict=True):
        product = torch.mm(left, b, out_dtype=out.dtype)
        if beta == 0:
            torch.mul(product, alpha, out=part)
        else:
            part.mul_(beta).add_(product, alpha=alpha)


def _in_blocks(out: Tensor, a: Tensor, b: Tensor, alpha: float, beta: float) -> None:
    """Cut the longest of m, n, k, which is the vocabulary; the other operand is widened once."""
    narrow = a.device.type == "cpu" and a.dtype == b.dtype == torch.bfloat16
    on_tiles = narrow and out.dtype == torch.float32 and has_amx()
    (m, k), n = a.shape, b.shape[1]
    longest = max(m, n, k)
    if longest == n:
        a = a.to(out.dtype)
    elif longest == m:
        b = b.to(out.dtype)
    for start in range(0, longest, HEAD_BLOCK):
        cut = slice(start, start + HEAD_BLOCK)
        if longest == n:
            part, left, right = out[:, cut], a, b[:, cut]
        elif longest == m:
            part, left, right = out[cut], a[cut], b
        else:
            part, left, right = out, a[:, cut], b[cut]
        left, right = left.to(out.dtype), right.to(out.dtype)
        with bf16_tiles() if on_tiles else contextlib.nullcontext():
            torch.addmm(part, left, right, alpha=alpha, beta=beta, out=part)
        if longest == k:
            beta = 1.0


@cache
def has_amx() -> bool:
    """Whether this CPU multiplies bf16 tiles, and this torch says so."""
    probe = getattr(torch.cpu, "_is_amx_tile_supported", None)
    return probe is not None and hasattr(torch.backends.mkldnn, "matmul") and probe()


@contextlib.contextmanager
def bf16_tiles() -> Iterator[None]:
    """fp32 products on AMX tiles: of numbers that bf16 holds, the same but for the order of sums.

    For widened bf16 operands alone: fp32 gradients, and fp16, would lose bits. Not for AVX512-BF16,
    where it gains a tenth and doubles the error of the sums. The switch is the process's, so it is
    on for as long as one product takes.
    """
    matmul = torch.backends.mkldnn.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = "bf16"
    try:
        yield
    finally:
        matmul.fp32_precision = before


@cache
def wide_gemm(device: torch.device, dtype: torch.dtype) -> str | None:
    """How this build multiplies `dtype` matrices on `device` into fp32: "addmm", "mm", or None.

    Probed once. Without it a GPU's low-precision head is multiplied in fp32, some 12 times slower,
    of which it warns once; a CPU widens anyway.
    """
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16):
        return None
    a = torch.zeros(16, 16, device=device, dtype=dtype)
    out = torch.zeros(16, 16, device=device)
    for name in ("addmm", "mm"):
        try:
            if name == "addmm":
                torch.addmm(out, a, a, out_dtype=torch.float32, out=out)
            else:
                torch.mm(a, a, out_dtype=torch.float32)
        except (RuntimeError, TypeError):
            continue
        return name
    warnings.warn(
        f"this torch ({torch.__version__}) does not multiply {dtype} matrices into float32 on "
        f"{device}: the head's products run in float32, about 12 times slower; torch >= 2.10 does",
        stacklevel=2,
    )
    return None
