"""fp16 gradients of logits: times a power of two that follows the largest of them, on device.

An unscaled gradient, about p / N, is below fp16's smallest number, and c = dL/dlogp has no bound
that is known before the log-probs are. So the statistics come first; then c and e = dL/dH bound the
gradient of every row,

    |dz_j| <= (|c| + |e| (1 + log V)) / T,     since p_j |E[u] - u_j| <= H p_j - p_j log p_j,

and the scale puts the largest bound of a chunk at 2^13: nothing overflows, and what is lost below
2^-24 is 2^-37 of it. The scale only falls from chunk to chunk. Where it does, the sums so far are
multiplied as well; where it stays, the factor is 1 and `scale_` reads nothing.
"""

from __future__ import annotations

import math
from types import ModuleType

import torch
from torch import Tensor

from fastpo.backends.base import RowStats
from fastpo.backends.two_step import two_step_policy_loss
from fastpo.ops.linear_workspace import LinearGrads, Workspace
from fastpo.ops.tensor_parallel import VocabularyShard

_TARGET = 13  # of fp16's exponents, up to 15
_MOST = 100  # exponent of the scale, for gradients that are 0


class GradientScale:
    """A backend (see `fastpo.backends.base.Backend`) whose gradients are times `scale`."""

    def __init__(self, backend: ModuleType | VocabularyShard, workspace: Workspace):
        self.backend, self._workspace = backend, workspace
        weight = workspace.head.weight
        self.row_stats = backend.row_stats
        vocabulary = getattr(backend, "vocabulary", weight.shape[0])
        log_v = vocabulary.log() if isinstance(vocabulary, Tensor) else math.log(vocabulary)
        self._entropy_slope = 1 + log_v
        self.scale = torch.full((), 2.0**_MOST, device=weight.device)
        self._change = torch.ones_like(self.scale)

    def row_grad(
        self,
        logits: Tensor,
        tokens: Tensor,
        stats: RowStats,
        logprob_grad: Tensor,
        entropy_grad: Tensor | None,
        temperature: float | Tensor,
        out: Tensor,
    ) -> None:
        """See `fastpo.backends.base.Backend`; lowers the scale first if it must."""
        bound = logprob_grad.abs()
        if entropy_grad is not None:
            bound = bound + self._entropy_slope * entropy_grad.abs()
        bound = (bound / temperature).nan_to_num(0, 0, 0)  # such a row has no finite gradient
        largest = bound.amax() if bound.numel() else bound.new_zeros(())
        exponent = (_TARGET - torch.frexp(largest).exponent).clamp(-_MOST, _MOST)
        exponent = exponent.masked_fill(largest == 0, _MOST)
        scale = torch.minimum(self.scale, torch.exp2(exponent.to(self.scale)))
        self._change, self.scale = scale / self.scale, scale
        scaled = (logprob_grad * scale, None if entropy_grad is None else entropy_grad * scale)
        self.backend.row_grad(logits, tokens, stats, *scaled, temperature, out)

    row_policy_loss = two_step_policy_loss  # the scale must be known before a gradient is written

    def follow(self, grads: LinearGrads) -> None:
        """After `row_grad`, before its chunk is kept: bring what is there to the new scale."""
        self._workspace.rescale(self._change, self.backend)
        grads.rescale(self._change, self.backend)

    def undo(self, grads: LinearGrads) -> None:
        """After the last chunk."""
        grads.rescale(1 / self.scale, self.backend)
