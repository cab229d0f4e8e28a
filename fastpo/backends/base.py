"""The contract of a backend: the row primitives and one scaling, and the numbers they exchange.

A row is one token position's logits z, (V,). With u = z / temperature, m = max_j u_j,
s = sum_j exp(u_j - m) and p = softmax(u):

    logprob = (u_y - m) - log s          entropy H = log s - E_p[u - m]
    dz_j    = (1 / temperature) * (c * (1[j = y] - p_j) + e * p_j * (E_p[u] - u_j))

where c = dL/dlogprob and e = dL/dH. The maximum and the log of the sum are kept apart, since one
`lse` would round at the size of the logits (an offset of 1e4 costs 5e-4 instead of 1e-6).

Every backend module exports `row_stats`, `row_grad`, `row_policy_loss`, `scale_` with the
signatures of `Backend`, plus `unavailable()`. Two of them are primitives: `row_policy_loss` is
their composition (two_step.py), unless a backend fuses the three steps into one launch. Callers
have validated and flattened: logits (N, V) with unit stride in V and any row stride, the rest
contiguous (N,). Rules all of them keep:

* A masked row is never read and its gradient and outputs are exactly 0, whatever NaN or inf stands
  there. Masked: `mask` False (row_stats); c and e both 0 (row_grad); weight and entropy weight
  both 0 (row_policy_loss). An unmasked row with c = e = 0 (say, clipped) has a gradient of
  exactly 0, too.
* A token outside [0, V) on an unmasked row gives NaN in that row's log-prob and loss, and reads
  nothing out of bounds. In `row_grad` it matches no column (a vocabulary shard that does not own
  the token).
* -inf logits have p = 0 and add nothing to entropy or gradient.
* NaN is never swallowed on an unmasked row (mind min/max instructions).
* Rows are independent and sums have a fixed order: same bits for any N, any chunking, in place or
  not, and `row_stats` and `row_policy_loss` agree bit by bit on logprob and entropy.
* No subnormal leaves `row_grad`, `row_policy_loss` or `scale_`: |g| < 2^-126 becomes 0 before g is
  rounded to the gradient's dtype (fp64: 2^-1022), since some CPUs multiply subnormals 12 to 15
  times slower and peaked logits make most columns such. So bf16, which has the range of fp32, holds
  none either; the subnormals of fp16, from 2^-14 down, are normal numbers in fp32 and stay.
* Accumulation is fp32 for fp32 / bf16 / fp16 logits (the torch backend: fp64 for fp64).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from fastpo.objective import (
    GATES,
    KL_ESTIMATORS,
    TOKEN_SURROGATES,
    Objective,
    TokenLoss,
    token_loss,
)


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


class KeptSets(NamedTuple):
    """The token ids that each row's softmax is over, where it is not the whole vocabulary.

    Row i has ids[offsets[i] : offsets[i + 1]], all different; none means that it is not such a row.
    """

    ids: Tensor  # (M,) int64
    offsets: Tensor  # (N + 1,) int64, rising from 0 to M


class KeptHead(NamedTuple):
    """An LM head as kept rows see it: z = gain * (hidden . weight[id] + bias[id]), or its tanh."""

    weight: Tensor  # (V, D), of the dtype of the hidden states, unit stride in D
    bias: Tensor | None  # (V,)
    gain: float
    capped: bool  # tanh follows; the outer softcap rides in the temperature


class KeptRows(NamedTuple):
    """Rows of an LM head of which some columns alone are asked for."""

    hidden: Tensor  # (N, D)
    head: KeptHead
    tokens: Tensor  # (N,) int64
    kept: KeptSets
    temperature: float | Tensor  # or (N,) fp32


class KeptGrads(NamedTuple):
    """Where `kept_grad` leaves its gradients: of the operands' dtype or fp32; None = not wanted."""

    hidden: Tensor | None  # (N, D)
    weight: Tensor | None  # (V, D)
    bias: Tensor | None  # (V,)


class RowInputs(NamedTuple):
    """Per-token numbers of a token-level objective. All (N,) fp32."""

    weight: Tensor  # w_t: aggregation, mask and normalizer in one number; 0 = masked
    advantages: Tensor  # importance weights already multiplied in
    old_logprobs: Tensor | None  # None = on-policy, r = 1
    ref_logprobs: Tensor | None  # given iff kl_coef != 0
    entropy_weight: Tensor | None  # given iff entropy_coef != 0; e = -entropy_weight
    clip_low: Tensor | None = None  # bounds on r in place of the objective's, both or none
    clip_high: Tensor | None = None
    nll_weight: Tensor | None = None  # of an SFT term, -nll_weight * logprob

    def map(self, function: Callable[[Tensor], Tensor]) -> RowInputs:
        """The same with `function` applied to every tensor that is given."""
        return RowInputs(*(None if x is None else function(x) for x in self))

    @property
    def clip_bounds(self) -> tuple[Tensor, Tensor] | None:
        """(low, high), or None for those of the objective."""
        return None if self.clip_low is None else (self.clip_low, self.clip_high)

    @property
    def mask(self) -> Tensor:
        """(N,) bool: rows that are read."""
        if self.entropy_weight is None:
            return self.weight != 0
        return (self.weight != 0) | (self.entropy_weight != 0)

    def token_loss(self, objective: Objective, logprobs: Tensor, mask: Tensor) -> TokenLoss:
        """The specification on these numbers, before weights."""
        return token_loss(
            objective,
            logprobs,
            self.advantages,
            old_logprobs=self.old_logprobs,
            ref_logprobs=self.ref_logprobs,
            clip_bounds=self.clip_bounds,
            nll_weights=self.nll_weight,
            mask=mask,
        )


class RowLosses(NamedTuple):
    """What `row_policy_loss` returns per row. (N,)."""

    loss: Tensor  # fp32, w_t * (surrogate + kl_coef * kl) - entropy_weight * H
    logprobs: Tensor  # fp32
    entropy: Tensor  # fp32
    clipped: Tensor  # uint8 bits CLIPPED_LOW | CLIPPED_HIGH | CLIPPED_MAX of fastpo.objective


class ObjectiveParams(NamedTuple):
    """A token-level objective as the numbers a kernel takes.

    c before the weight, with A the advantage, d = logp - old (0 on-policy),
    r = exp(clamp(d, +-20)), r' = dr/dd = r where |d| <= 20, else 0:

        0 clip       -A r', or 0 if (A > 0 and r > ratio_high) or (A < 0 and r < ratio_low)
                     or (A < 0 and r > ratio_max);    loss -min(min(r, ratio_max) A, clip(r) A)
        1 cispo      -A clip(r, ratio_low, ratio_high);   loss c logp
        2 sapo       -4 A g (1 - g) r', g = sigmoid(tau (r - 1)), tau by A > 0;  loss -(4 / tau) A g
        3 reinforce  -A;                              loss -A logp
        4 gate       -A w;                            loss c logp
                     w = min(max(exp(k clamp(d, +-20)), ratio_min), m) inside the gate, with
                     k = power_pos, m = min(ratio_max, ratio_max_pos) where A > 0, else
                     k = power_neg, m = ratio_max; where D < ratio_low and (A < 0 or two_sided),
                     w = keep_low ratio_low; where D > ratio_high and (A > 0 or two_sided),
                     w = keep_high ratio_high; D by `gate`: 0 none, 1 r, 2 p - q, 3 the KL of the
                     two Bernoulli distributions (q, p) with the sign of p - q, q = exp(old)

    kl with k = logp - ref, q = exp(min(-k, 20)); value / derivative:
        1 k1: k / 1     2 k2: k^2/2 / k     3 k3: q - min(-k, 20) - 1 / (1 - q, 0 where -k > 20)
        4 abs: |k| / sign(k)     5 k1+: k / k     6 k3+: as k3 / k
    With kl_ratio_weighted the value is kl * r and the derivative dkl * r + kl * r'. `old_kl` is
    another such estimate, of k = d, without r. A row's own bounds replace ratio_low, ratio_high.
    """

    surrogate: int
    kl: int  # 0 = none
    kl_ratio_weighted: bool
    old_kl: int  # 0 = none
    gate: int
    two_sided: bool
    ratio_low: float  # `Objective.bounds`
    ratio_high: float
    ratio_max: float  # inf = none
    ratio_min: float
    ratio_max_pos: float  # inf = none
    power_pos: int
    power_neg: int
    keep_low: float
    keep_high: float
    kl_coef: float
    old_kl_coef: float
    tau_pos: float
    tau_neg: float

    @classmethod
    @functools.cache
    def from_objective(cls, objective: Objective) -> ObjectiveParams:
        """Encode a token-level objective; bounds are computed in float64, as torch does."""
        ratio_low, ratio_high = objective.bounds

        def kl(coef: float, estimator: str) -> int:
            return 0 if coef == 0 else 1 + KL_ESTIMATORS.index(estimator)

        def most(bound: float | None) -> float:
            return math.inf if bound is None else bound

        return cls(
            surrogate=TOKEN_SURROGATES.index(objective.surrogate),
            kl=kl(objective.kl_coef, objective.kl_estimator),
            kl_ratio_weighted=objective.kl_ratio_weighted,
            old_kl=kl(objective.old_kl_coef, objective.old_kl_estimator),
            gate=GATES.index(objective.gate),
            two_sided=objective.gate_two_sided,
            ratio_low=ratio_low,
            ratio_high=ratio_high,
            ratio_max=most(objective.ratio_max),
            ratio_min=objective.ratio_min,
            ratio_max_pos=most(objective.ratio_max_pos),
            power_pos=objective.ratio_power_pos,
            power_neg=objective.ratio_power_neg,
            keep_low=objective.gate_keep_low,
            keep_high=objective.gate_keep_high,
            kl_coef=objective.kl_coef,
            old_kl_coef=objective.old_kl_coef,
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
        mask: Tensor | None = None,
    ) -> RowStats:
        """One read of the logits. tokens int64 (N,); temperature float or (N,) fp32; mask bool."""

    def row_details(
        self,
        logits: Tensor,
        tokens: Tensor,
        temperature: float | Tensor,
        mask: Tensor | None = None,
    ) -> tuple[RowStats, RowDetails]:
        """`row_stats`, bit by bit, and more from the same launch. Masked rows: 0 and False.

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

        `objective` is token-level; a kernel takes its `ObjectiveParams`.
        `out` has the logits' dtype, or a 2-byte dtype under fp32 logits. It may be `logits` itself,
        or `alias_rows(logits, dtype)`: the *upper* half of each fp32 row, so that a sweep from the
        last column to the first never overwrites a logit it has yet to read.
        """

    def kept_stats(self, rows: KeptRows, mask: Tensor | None = None) -> tuple[RowStats, Tensor]:
        """Statistics of the rows with ids, by gathered dot products; z of every id, (M,).

        u = z / temperature, and everything is as in `row_stats` with -inf at the other columns.
        A row with one id has log-prob and entropy 0 and is never read, nor is a masked row or one
        without ids, whose statistics are 0. A token that is not among its row's ids gives NaN.
        """

    def kept_grad(
        self,
        rows: KeptRows,
        stats: RowStats,
        logits: Tensor,
        logprob_grad: Tensor,
        entropy_grad: Tensor | None,
        grads: KeptGrads,
        add: bool = False,
    ) -> None:
        """Fill `grads` from what `kept_stats` returned and the row gradients c and e.

        Hidden states: rows with ids are written, others left alone; those with one id or
        c = e = 0 get zeros. Weight and bias: every row is written once, zeros included, or, with
        `add`, the rows of ids that occur are added to. The sum of an id runs over its rows in
        order: same bits for any number of threads.
        """

    def scale_(self, grad: Tensor, factor: Tensor) -> None:
        """grad *= factor (0-d, on device); reads and writes nothing when the factor is 1."""


def split_temperature(temperature: float | Tensor) -> tuple[float, Tensor | None]:
    """The two arguments of a kernel: one number, or one per row, contiguous."""
    if isinstance(temperature, Tensor):
        return 1.0, temperature.contiguous()
    return float(temperature), None


def written(tensor: Tensor) -> None:
    """Tell autograd that a kernel wrote into `tensor`, as torch's in-place operators do: who saved
    the old values for a backward pass must hear that they are gone."""
    if not (torch.compiler.is_compiling() or tensor.is_inference()):
        torch.autograd.graph.increment_version(tensor)


def alias_rows(logits: Tensor, dtype: torch.dtype) -> Tensor:
    """A (N, V) view of `dtype` on the last bytes of every row of contiguous `logits`."""
    if dtype == logits.dtype:
        return logits
    ratio = logits.element_size() // dtype.itemsize
    v = logits.shape[1]
    return logits.view(dtype)[:, (ratio - 1) * v :] if ratio > 1 else logits


def overwrites(logits: Tensor, out: Tensor) -> bool:
    """Whether `out` lies in the rows of `logits`, where a sweep from the last column to the first
    may write it: in the logits' own place, or, narrower, in the upper part of every row's bytes.

    Raises:
        ValueError: it shares the storage in another way, so that a logit would be overwritten
            before it is read.
    """
    if out is logits or torch.compiler.is_compiling():  # traced ops never pass an alias
        return out is logits
    if not torch._C._is_alias_of(out, logits):
        return False
    wide, narrow, columns = logits.element_size(), out.element_size(), logits.shape[1]
    same_rows = out.stride(0) * narrow == logits.stride(0) * wide or logits.shape[0] <= 1
    ahead = out.storage_offset() * narrow - logits.storage_offset() * wide  # bytes
    if same_rows and ahead >= (wide - narrow) * columns:
        row_bytes = max(logits.stride(0), columns) * wide
        if ahead == 0 if wide == narrow else ahead + columns * narrow <= row_bytes:
            return True
    raise ValueError(
        "out shares the storage of logits but is neither logits nor alias_rows(logits, dtype): it "
        "would overwrite logits that have yet to be read; pass one of those, or its own tensor"
    )
