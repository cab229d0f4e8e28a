"""The backend "triton-exp" of the linear ops: exponentials, not logits, leave the first GEMM.

With E = bf16(exp(u - o)) and its row sums (kernels/_exp_rows.py has the algebra) no kernel sweeps
over logits, and the loss is needed only when all rows of E are there:

    exp_rows(hidden, head, ...)        the logits GEMM: E and sums of n rows
    row_stats, row_policy_loss         log-probs, entropies, losses: n numbers
    row_grad                           c = dL/dlogp and e = dL/dH -> f, so that diag(f) E is the
                                       gradient at the product hidden @ weight.T + bias

The last three are the row primitives of `fastpo.backends.base.Backend`, with `ExpRows` in place of
logits and, where a gradient is wanted, as `out`.

Log-probs and the hidden states' gradient are as exact as those of the row kernels; the weight's is
18 to 35 % noisier, unbiased, since f h is rounded to bf16 besides E.
"""

from __future__ import annotations

import importlib
import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from fastpo.backends import triton as triton_rows
from fastpo.backends.base import ObjectiveParams, RowInputs, RowLosses, RowStats
from fastpo.objective import Objective

LOG2_E = math.log2(math.e)

scale_ = triton_rows.scale_
metric_sums = triton_rows.metric_sums


def unavailable(device: torch.device | None = None) -> str | None:
    """None if the kernels can run on `device`, else one line: why not, and what would help."""
    reason = triton_rows.unavailable(device)
    if reason is not None:
        return reason
    on_gpu = device is None or torch.device(device).type == "cuda"
    if on_gpu and torch.version.hip is not None:
        return "its tiles are measured on NVIDIA GPUs only; use backend='triton' on ROCm"
    if on_gpu and torch.cuda.get_device_capability(device) < (8, 0):
        return "it needs bf16 tensor cores, compute capability 8.0; use backend='torch'"
    return None


class Shard(Protocol):
    """A vocabulary split over ranks: column 0 of the weight is token `start` of `vocabulary`."""

    start: Tensor | int
    vocabulary: Tensor | int

    def sum_(self, x: Tensor) -> None:
        """Add up over ranks, in place."""

    def max_(self, x: Tensor) -> None:
        """The largest of the ranks, in place."""


@dataclass(frozen=True, kw_only=True)
class ExpHead:
    """softcap * tanh(logit_scale * (hidden @ weight.T + bias) / softcap), or without the tanh."""

    weight: Tensor  # (V, D) bf16
    bias: Tensor | None  # (V,) bf16
    logit_scale: float = 1.0
    softcap: float | None = None

    @property
    def gain(self) -> float:
        """What the kernels multiply du/dz by beside slope * ln 2: the slope inside the tanh."""
        return 1.0 if self.softcap is None else self.logit_scale / self.softcap

    @property
    def inner(self) -> float:
        """The factor inside the tanh as the kernels take it, by exp2(2 x)."""
        return 2 * LOG2_E * self.gain

    def slopes(self, temperature: float | Tensor, rows: int) -> Tensor:
        """(rows,) fp32: log2(e) times what turns a product, or its tanh, into u."""
        outer = LOG2_E * (self.logit_scale if self.softcap is None else self.softcap)
        if isinstance(temperature, Tensor):
            return (outer / temperature.to(self.weight.device, torch.float32)).contiguous()
        like = {"dtype": torch.float32, "device": self.weight.device}
        return torch.full((rows,), outer / temperature, **like)


@dataclass(frozen=True, kw_only=True)
class ExpRows:
    """What the logits GEMM leaves of n rows. Masked rows: shift +inf, E zero."""

    head: ExpHead
    e: Tensor | None  # (n, V) bf16, exp(u - o)
    has_tanh_slope: bool  # E also holds the softcap's slope, 1 - tanh^2
    tokens: Tensor  # (n,) int64, ids in the head's columns
    totals: Tensor  # (2, n) fp32: S, M of the whole vocabulary
    targets: Tensor  # (n,) fp32: the tokens' products plus bias, or their tanh
    slopes: Tensor  # (n,) fp32
    shifts: Tensor  # (n,) fp32: o log2(e)
    factors: Tensor  # (n,) fp32: f, once there is a gradient
    redone: Tensor  # (1,) int32: rows whose offset is their maximum

    @property
    def _numbers(self) -> tuple[Tensor, ...]:
        return self.totals, self.targets, self.slopes, self.shifts

    @property
    def _options(self) -> dict[str, object]:
        return {"gain": self.head.gain, "softcap": self.head.softcap is not None}


def _kernel(name: str):
    """A module of fastpo.kernels: they import triton."""
    return importlib.import_module(f"fastpo.kernels.{name}")


def empty_e(rows: int, weight: Tensor) -> Tensor:
    """Room for E of `rows` rows: (rows, V) bf16 in rows of a multiple of 16 bytes."""
    V, multiple = weight.shape[0], _kernel("_exp_tiles").PAD_COLUMNS
    shape = (rows, -(-V // multiple) * multiple)
    return torch.empty(shape, dtype=torch.bfloat16, device=weight.device)[:, :V]


def exp_rows(
    hidden: Tensor,
    head: ExpHead,
    tokens: Tensor,
    mask: Tensor | None,
    temperature: float | Tensor,
    e: Tensor | None,
    *,
    shard: Shard | None = None,
    tanh_slope: bool = False,
) -> ExpRows:
    """The logits GEMM of `hidden` (n, D), masked rows zero, into `e` (n, V), or its sums alone.

    tokens (n,) int64, ids of the whole vocabulary; mask (n,) bool, None = all; temperature a
    number or (n,). `tanh_slope`: put a softcap's slope into E at once, which saves a pass over it
    where no gradient of the entropy will be asked for. No host sync: rows with log p_y < -60 are
    listed and redone on device.
    """
    n, weight = hidden.shape[0], head.weight
    softcap = head.softcap is not None
    local = tokens if shard is None else tokens - shard.start
    targets = torch.empty(n, dtype=torch.float32, device=hidden.device)
    common = {"inner": head.inner, "softcap": softcap}
    _kernel("exp_targets").exp_targets(hidden, weight, local, head.bias, targets, **common)
    if shard is not None:
        shard.sum_(targets)  # 0 where the token is another rank's
    vocabulary = weight.shape[0] if shard is None else shard.vocabulary
    targets.masked_fill_((tokens < 0) | (tokens >= vocabulary), torch.nan)
    slopes = head.slopes(temperature, n)
    shifts = targets * slopes
    if mask is not None:
        shifts.masked_fill_(~mask, torch.inf)
    common["tanh_gradient"] = softcap and tanh_slope
    totals, shifts, redone = _sums(hidden, head, e, slopes, shifts, shard, common)
    return ExpRows(
        head=head,
        e=e,
        has_tanh_slope=common["tanh_gradient"],
        tokens=local,
        totals=totals,
        targets=targets,
        slopes=slopes,
        shifts=shifts,
        factors=torch.empty_like(targets),
        redone=redone,
    )


def _sums(
    hidden: Tensor,
    head: ExpHead,
    e: Tensor | None,
    slopes: Tensor,
    shifts: Tensor,
    shard: Shard | None,
    common: dict[str, object],
) -> tuple[Tensor, Tensor, Tensor]:
    """Fill E. Returns S and M (2, n), the shifts that it ended with, and how many were replaced."""
    tiles, gemm, sums = (_kernel(name) for name in ("_exp_tiles", "exp_logits", "exp_sums"))
    tile = tiles.exp_tile(hidden, head.weight, head.bias, head.softcap is not None)
    n = hidden.shape[0]
    partials = slopes.new_empty(2, tile.tiles(head.weight.shape[0]), n)
    totals, tops = slopes.new_empty(2, n), slopes.new_empty(1, n)
    operands = (hidden, head.weight, e, head.bias, slopes)
    gemm.exp_logits(*operands, shifts, partials, tile, **common)
    sums.exp_sums(partials, totals)
    if shard is not None:
        shard.sum_(totals)

    wild, rows = torch.empty_like(shifts, dtype=torch.bool), shifts.new_empty(n, dtype=torch.int32)
    count = torch.zeros(1, dtype=torch.int32, device=shifts.device)
    sums.wild_rows(totals, shifts, wild, rows, count)
    again = {"tile": tiles.redo_tile(tile), "rows": rows, "count": count, **common}
    gemm.exp_logits(*operands, shifts, partials, maxima=True, **again)
    sums.exp_sums(partials, tops, maxima=True)
    if shard is not None:
        shard.max_(tops)  # of all ranks, always: no host knows whether there is a row
    shifts = torch.where(wild, tops[0], shifts)
    gemm.exp_logits(*operands, shifts, partials, **again)
    sums.exp_sums(partials, totals)
    if shard is not None:
        shard.sum_(totals)
    return totals, shifts, count


def row_stats(
    rows: ExpRows, tokens: Tensor, temperature: float | Tensor, mask: Tensor | None = None
) -> RowStats:
    """Log-probs and entropies (n,), 0 on masked rows. What follows `rows` they were made from."""
    logprobs, entropy = torch.empty_like(rows.targets), torch.empty_like(rows.targets)
    _kernel("exp_row_stats").exp_row_stats(*rows._numbers, logprobs, entropy)
    return RowStats(logprobs, entropy, rows.shifts / LOG2_E, rows.totals[0].log())


def row_grad(
    rows: ExpRows,
    tokens: Tensor,
    stats: RowStats | None,
    logprob_grad: Tensor,
    entropy_grad: Tensor | None,
    temperature: float | Tensor,
    out: ExpRows,
) -> None:
    """Fill the factors of `out`, which is `rows`: diag(f) E is then the products' gradient.

    `rows` hold the tokens, temperatures and statistics they were made with: these arguments are for
    backends of logits. With an entropy gradient, or a softcap whose slope is not in E, that takes
    one pass over E.

    Raises:
        ValueError: there is an entropy gradient, but E already holds a softcap's slope.
    """
    arguments = (rows.e, rows.tokens, *rows._numbers, logprob_grad.contiguous())
    if rows.head.softcap is not None and not rows.has_tanh_slope and entropy_grad is None:
        entropy_grad = torch.zeros_like(logprob_grad)
    if entropy_grad is None:
        _kernel("exp_row_grad").exp_row_grad(*arguments, out.factors, **rows._options)
        return
    if rows.has_tanh_slope:
        raise ValueError(
            "the entropy has a gradient, but E was made with tanh_slope=True, for losses without "
            "one: make the rows with tanh_slope=False"
        )
    kernel = _kernel("exp_entropy_grad").exp_entropy_grad
    kernel(*arguments, entropy_grad.contiguous(), out.factors, **rows._options)


def row_policy_loss(
    rows: ExpRows,
    tokens: Tensor,
    inputs: RowInputs,
    objective: Objective,
    temperature: float | Tensor,
    out: ExpRows | None,
) -> RowLosses:
    """Losses of a token-level objective and, with `out`, what `row_grad` does; one launch where
    that needs no pass over E."""
    like = rows.targets
    losses = RowLosses(
        *(torch.empty_like(like) for _ in range(3)), torch.empty_like(like, dtype=torch.uint8)
    )
    capped = rows.head.softcap is not None and not rows.has_tanh_slope
    one_launch = out is not None and inputs.entropy_weight is None and not capped
    logprob_grad = torch.empty_like(like)
    _kernel("exp_row_policy_loss").exp_row_policy_loss(
        rows.e if one_launch else None,
        rows.tokens,
        *rows._numbers,
        tuple(None if x is None else x.contiguous() for x in inputs),
        tuple(losses),
        logprob_grad,
        rows.factors,
        ObjectiveParams.from_objective(objective),
        V=rows.head.weight.shape[0],
        **rows._options,
    )
    if out is not None and not one_launch:
        entropy_grad = None if inputs.entropy_weight is None else -inputs.entropy_weight
        row_grad(rows, tokens, None, logprob_grad, entropy_grad, temperature, out)
    return losses
