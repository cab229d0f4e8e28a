"""The LM head on one chunk of tokens: its logits, and the three gradients of that product."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fastpo.ops._gemm import add_matmul_


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
        if self.bias is not None:
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

    def add_weight_grad_(self, total: Tensor, grad: Tensor, hidden: Tensor) -> None:
        """total (V, D) += gain * grad.T @ hidden, accumulated in the dtype of `total`."""
        add_matmul_(total, grad.t(), hidden, alpha=self.gain, beta=1.0)

    def add_bias_grad_(self, total: Tensor, grad: Tensor) -> None:
        """total (V,) += gain * the column sums of grad."""
        total.add_(torch.sum(grad, 0, dtype=total.dtype), alpha=self.gain)
