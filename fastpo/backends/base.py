"""The contract of a backend: three row primitives and one scaling, and the numbers they exchange.

A row is one token position's logits z, (V,). With u = z / temperature, m = max_j u_j,
s = sum_j exp(u_j - m) and p = softmax(u):

    logprob = (u_y - m) - log s          entropy H = log s - E_p[u - m]
    dz_j    = (1 / temperature) * (c * (1[j = y] - p_j) + e * p_j * (E_p[u] - u_j))

where c = dL/dlogprob and e = dL/dH. The maximum and the log of the sum are kept apart, since one
`lse` would round at the size of the logits (an offset of 1e4 costs 5e-4 instead of 1e-6).

Every backend module exports `row_stats`, `row_grad`, `row_policy_loss`, `scale_` with the
signatures of `Backend`, plus `unavailable()`. Callers have validated and flattened: logits (N, V)
with unit stride in V and any row stride, the rest contiguous (N,). Rules all of them keep:

* A dead row is never read and its gradient and outputs are exactly 0, whatever NaN or inf stands
  there. Dead: `live` False (row_stats); c and e both 0 (row_grad); weight and entropy weight both 0
  (row_policy_loss). A live row with c = e = 0 (say, clipped) also has an exactly zero gradient.
* A token outside [0, V) on a live row gives NaN in that row's log-prob and loss, and reads nothing
  out of bounds. In `row_grad` it matches no column (a vocabulary shard that does not own the
  token).
* -inf logits have p = 0 and add nothing to entropy or gradient.
* NaN is never swallowed on a live row (mind min/max instructions).
* Rows are independent and sums have a fixed order: same bits for any N, any chunking, in place or
  not, and `row_stats` and `row_policy_loss` agree bit by bit on logprob and entropy.
* No subnormal leaves `row_grad`, `row_policy_loss` or `scale_`: |g| < 2^-126 becomes 0 before g is
  rounded to the gradient's dtype (fp64: 2^-1022), since some CPUs multiply subnormals 12 to 15
  times slower and peaked logits make most columns such. So bf16, which has the range of fp32, holds
  none either; the subnormals of fp16, from 2^-14 down, are normal numbers in fp32 and stay.
* Accumulation is fp32 for fp32 / bf16 / fp16 logits (the torch backend: fp64 for fp64).
"""

from __future__ import annotations

import math
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from fastpo.objective import KL_ESTIMATORS, TOKEN_SURROGATES, Objective


class RowStats(NamedTuple):
    """What one sweep over a row leaves behind. All (N,) fp32 (fp64 for fp64 logits)."""

    logprobs: Tensor  # log-prob of the token
    entropy: Tensor  # entropy of the row, nats
    row_max: Tensor  # m, in units of u
    log_sum: Tensor  # log s


class RowDetails(NamedTuple):
    """Statistics that some trainers log or weight by, without a gradient. All (N,)."""

    log_sum_sq_probs: Tensor  # log sum_j p_j^2, fp32 (fp64 for fp64 logits)
    mean_logits: Tensor  # mean of u over the vocabulary, likewise; -inf if a logit is
    is_top1: Tensor  # bool: the token's logit is the row's largest, and the first of several such


class RowInputs(NamedTuple):
    """Per-token numbers of a token-level objective. All (N,) fp32."""

    weight: Tensor  # w_t: aggregation, mask and normalizer in one number; 0 = dead
    advantages: Tensor  # importance weights already multiplied in
    old_logprobs: Tensor | None  # None = on-policy, r = 1
    ref_logprobs: Tensor | None  # given iff kl_coef != 0
    entropy_weight: Tensor | None  # given iff entropy_coef != 0; e = -entropy_weight


class RowLosses(NamedTuple):
    """What `row_policy_loss` returns per row. (N,)."""

    loss: Tensor  # fp32, w_t * (surrogate + kl_coef * kl) - entropy_weight * H
    logprobs: Tensor  # fp32
    entropy: Tensor  # fp32
    clipped: Tensor  # uint8 bits CLIPPED_LOW | CLIPPED_HIGH | CLIPPED_MAX of fastpo.objective


class Rule(NamedTuple):
    """A token-level objective as the numbers a kernel takes.

    c before the weight, with A the advantage, d = logp - old (0 on-policy),
    r = exp(clamp(d, +-20)), r' = dr/dd = r where |d| <= 20, else 0:

        0 clip       -A r', or 0 if (A > 0 and r > ratio_high) or (A < 0 and r < ratio_low)
                     or (A < 0 and r > ratio_max);    loss -min(min(r, ratio_max) A, clip(r) A)
        1 cispo      -A min(r, ratio_max);            loss -A min(r, ratio_max) logp
        2 sapo       -4 A g (1 - g) r', g = sigmoid(tau (r - 1)), tau by A > 0;  loss -(4 / tau) A g
        3 reinforce  -A;                              loss -A logp

    kl with k = logp - ref, q = exp(min(-k, 20)); value / derivative:
        1 k1: k / 1     2 k2: k^2/2 / k     3 k3: q - min(-k, 20) - 1 / (1 - q, 0 where -k > 20)
        4 abs: |k| / sign(k)     5 k1+: k / k     6 k3+: as k3 / k
    With kl_ratio_weighted the value is kl * r and the derivative dkl * r + kl * r'.
    """

    surrogate: int
    kl: int  # 0 = none
    kl_ratio_weighted: bool
    ratio_low: float  # 1 - clip_low
    ratio_high: float  # 1 + clip_high
    ratio_max: float  # inf = none
    kl_coef: float
    tau_pos: float
    tau_neg: float

    @classmethod
    def of(cls, objective: Objective) -> Rule:
        """Encode a token-level objective; bounds are computed in float64, as torch does."""
        return cls(
            surrogate=TOKEN_SURROGATES.index(objective.surrogate),
            kl=0 if objective.kl_coef == 0 else 1 + KL_ESTIMATORS.index(objective.kl_estimator),
            kl_ratio_weighted=objective.kl_ratio_weighted,
            ratio_low=1 - objective.clip_low,
            ratio_high=1 + objective.clip_high,
            ratio_max=math.inf if objective.ratio_max is None else objective.ratio_max,
            kl_coef=objective.kl_coef,
            tau_pos=objective.sapo_tau_pos,
            tau_neg=objective.sapo_tau_neg,
        )


class Backend(Protocol):
    """The functions of a backend module."""

    def unavailable(self, device: torch.device | None = None) -> str | None:
        """None if the backend can run on `device`, else one line: why, and what would help."""

    def row_stats(
        self,
        logits: Tensor,
        tokens: Tensor,
        temperature: float | Tensor,
        live: Tensor | None = None,
    ) -> RowStats:
        """One read of the logits. tokens int64 (N,); temperature float or (N,) fp32; live bool."""

    def row_details(
        self,
        logits: Tensor,
        tokens: Tensor,
        temperature: float | Tensor,
        live: Tensor | None = None,
    ) -> tuple[RowStats, RowDetails]:
        """`row_stats`, bit by bit, and more from the same launch. Dead rows: 0 and False.

        A row with NaN, or a token outside [0, V), is never top-1.
        """

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
        """One read and one write: fills `out` (N, V), which may share storage with `logits`."""

    def row_policy_loss(
        self,
        logits: Tensor,
        tokens: Tensor,
        inputs: RowInputs,
        objective: Objective,
        temperature: float | Tensor,
        out: Tensor | None,
    ) -> RowLosses:
        """Statistics, loss and, where `out` (N, V) is given, the gradient, in one launch.

        `objective` is token-level; a kernel takes its numbers from `Rule.of(objective)`.
        `out` has the logits' dtype, or a 2-byte dtype under fp32 logits. It may be `logits` itself,
        or `alias_rows(logits, dtype)`: the *upper* half of each fp32 row, so that a sweep from the
        last column to the first never overwrites a logit it has yet to read.
        """

    def scale_(self, grad: Tensor, factor: Tensor) -> None:
        """grad *= factor (0-d, on device); reads and writes nothing when the factor is 1."""


def alias_rows(logits: Tensor, dtype: torch.dtype) -> Tensor:
    """A (N, V) view of `dtype` on the last bytes of every row of contiguous `logits`."""
    if dtype == logits.dtype:
        return logits
    ratio = logits.element_size() // dtype.itemsize
    v = logits.shape[1]
    return logits.view(dtype)[:, (ratio - 1) * v :] if ratio > 1 else logits


def overwrites(logits: Tensor, out: Tensor) -> bool:
    """Whether `out` shares the storage of `logits`, as `logits` itself or as `alias_rows` of it.

    Raises:
        ValueError: it shares the storage in another way, so that a logit would be overwritten
            before it is read.
    """
    if out is logits or torch.compiler.is_compiling():  # traced ops never pass an alias
        return out is logits
    if not torch._C._is_alias_of(out, logits):
        return False
    own = alias_rows(logits, out.dtype)
    if out.storage_offset() == own.storage_offset() and out.stride() == own.stride():
        return True
    raise ValueError(
        "out shares the storage of logits but is neither logits nor alias_rows(logits, dtype): it "
        "would overwrite logits that have yet to be read; pass one of those, or its own tensor"
    )
