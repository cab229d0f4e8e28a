"""What a policy-optimization loss is, as data, and its per-token mathematics in plain torch.

This module is the specification. It works in any floating dtype on any device, differentiates by
autograd, and every fused backend is tested against it in float64. Nothing here touches the
vocabulary: inputs are the log-probabilities of the sampled tokens, one number per token position.

Shapes: N token positions ("rows"), B sequences. Units: log-probabilities and entropies in nats.
"""

from __future__ import annotations

import difflib
import math
from dataclasses import dataclass, fields
from numbers import Integral, Real
from typing import NamedTuple

import torch
from torch import Tensor

from fastpo.segments import Segments

SURROGATES = ("clip", "cispo", "sapo", "reinforce", "gate", "gmpo", "vespo")
TOKEN_SURROGATES = SURROGATES[:5]  # loss of a token depends on that token's log-prob alone
GATES = ("none", "ratio", "tv", "kl")
KL_ESTIMATORS = ("k1", "k2", "k3", "abs", "k1+", "k3+")
AGGREGATIONS = ("token_mean", "sequence_mean", "sequence_sum", "constant")
RATIO_LEVELS = ("token", "sequence", "sequence_token")

FLOAT_MAX = torch.finfo(torch.float32).max  # backends take numbers as float32
MAX_LOG_RATIO = 20.0  # |log r| is clamped here before exp: 0 * inf would be NaN for clipped tokens
VESPO_MIN_LOG_WEIGHT = math.log(1e-8)
VESPO_MIN_RATE = 1e-4
BINARY_KL_EPS = 1e-8  # added to both 1 - p, as in verl: p = 1 has a finite divergence

# Fields that mean something to some surrogates only; elsewhere they must keep their default.
_ONLY_FOR = {
    **dict.fromkeys(("clip_low", "clip_high"), ("clip", "gmpo", "gate")),
    **dict.fromkeys(("sapo_tau_pos", "sapo_tau_neg"), ("sapo",)),
    **dict.fromkeys(
        ("vespo_k_pos", "vespo_lambda_pos", "vespo_k_neg", "vespo_lambda_neg"), ("vespo",)
    ),
    "ratio_max": ("clip", "cispo", "gate"),
    "ratio_min": ("cispo", "gate"),
    **dict.fromkeys(
        (
            *("ratio_max_pos", "ratio_power_pos", "ratio_power_neg"),
            *("gate", "gate_two_sided", "gate_keep_low", "gate_keep_high"),
        ),
        ("gate",),
    ),
}


def without_meaning(surrogate: str, gate: str) -> set[str]:
    """Fields that the surrogate never looks at, nor, of "gate", the gate."""
    unused = {field for field, users in _ONLY_FOR.items() if surrogate not in users}
    if surrogate == "gate" and gate == "none":
        unused |= {"clip_low", "clip_high", "gate_two_sided"}
    return unused


_PYTHON_TYPES = {"str": str, "bool": bool, "int": Integral, "float": Real}


@dataclass(frozen=True, kw_only=True)
class Objective:
    """A policy-optimization objective: surrogate, ratio, clipping, penalties and aggregation.

    Make one with a preset (`fastpo.dapo()`, `fastpo.grpo(kl_coef=0.04)`, ...), each of which takes
    any field below as an override. Instances are immutable and hashable.

    With d = logp - old and r = exp(clamp(d, -20, 20)), a token's loss is

        surrogate(r, A) + kl_coef * kl(logp, ref) [* r if kl_ratio_weighted]
                        + old_kl_coef * kl(logp, old)

    and the objective is sum_t w_t * loss_t - entropy_coef * (token mean of the entropy), where the
    weights w_t follow from `aggregation` (see `token_weights`).

    Raises:
        TypeError: a field of the wrong type.
        ValueError: an unknown name, a number out of its range, or options that contradict.
    """

    name: str = "custom"
    """A label for logs; it selects nothing."""
    surrogate: str = "clip"
    """clip | cispo | sapo | reinforce | gate | gmpo | vespo."""
    ratio_level: str = "token"
    """token: r_t; sequence: s = exp(mean_t d_t), shared by the sequence; sequence_token: sg(s) *
    p_t / sg(p_t), the same value, its gradient each token's own (clip, cispo and sapo)."""
    aggregation: str = "token_mean"
    """token_mean | sequence_mean | sequence_sum | constant."""
    clip_low: float = 0.2
    """r is clipped from below at 1 - clip_low (gmpo: log r at -clip_low; gate: see there)."""
    clip_high: float = 0.2
    """r is clipped from above at 1 + clip_high (gmpo: log r at clip_high; gate: see there)."""
    ratio_max: float | None = None
    """clip: bound on r where A < 0 (TRL's `delta`, verl's `clip_ratio_c`). cispo, gate: the upper
    bound on the weight."""
    ratio_min: float = 0.0
    """cispo, gate: the lower bound on the weight."""
    gate: str = "none"
    """gate: what tells whether a token is inside: none | ratio, r in [1 - clip_low, 1 + clip_high]
    | tv, p - p_old in [-clip_low, clip_high] | kl, the KL of the two Bernoulli distributions
    (p_old, p), with the sign of p - p_old, in [-clip_low, clip_high]."""
    gate_two_sided: bool = False
    """gate: both bounds hold for every token; else the upper where A > 0, the lower where A < 0."""
    gate_keep_low: float = 0.0
    """gate: below the lower bound the weight is this times the bound (gate="ratio"); 0 drops."""
    gate_keep_high: float = 0.0
    """gate: above the upper bound the weight is this times the bound (gate="ratio"); 0 drops."""
    ratio_power_pos: int = 1
    """gate: the weight is r to this power, 1, 0 or -1, where A > 0, then bounded."""
    ratio_power_neg: int = 1
    """gate: the same where A <= 0."""
    ratio_max_pos: float | None = None
    """gate: a second upper bound on the weight where A > 0."""
    kl_coef: float = 0.0
    """Weight of the KL penalty to the reference policy; 0 needs no `ref_logprobs`."""
    kl_estimator: str = "k3"
    """k1 | k2 | k3 | abs | k1+ | k3+; "+" keeps the value and takes the gradient of k2."""
    kl_ratio_weighted: bool = False
    """Multiply the KL term by r (TRL's `use_bias_correction_kl`)."""
    old_kl_coef: float = 0.0
    """Weight of a KL penalty to the behaviour policy, on d = logp - old."""
    old_kl_estimator: str = "k2"
    """Its estimator, as `kl_estimator`."""
    entropy_coef: float = 0.0
    """Weight of the entropy bonus: subtracts coef * token mean of the entropy."""
    max_length: int | None = None
    """constant aggregation divides by B * max_length; None = T of a [B, T] batch."""
    sapo_tau_pos: float = 1.0
    """SAPO's gate temperature where A > 0."""
    sapo_tau_neg: float = 1.05
    """SAPO's gate temperature where A <= 0."""
    vespo_k_pos: float = 2.0
    """VESPO's gamma shape where A >= 0."""
    vespo_lambda_pos: float = 3.0
    """VESPO's gamma rate where A >= 0."""
    vespo_k_neg: float = 3.0
    """VESPO's gamma shape where A < 0."""
    vespo_lambda_neg: float = 2.0
    """VESPO's gamma rate where A < 0."""

    def __new__(cls, **options: object) -> Objective:
        for name in options:
            if name not in cls.__dataclass_fields__:
                raise unknown_option("Objective", name)
        return super().__new__(cls)

    def __post_init__(self) -> None:
        self._check_types()
        self._check_names()
        self._check_numbers()
        if self.ratio_level != "token" and self.surrogate not in ("clip", "cispo", "sapo"):
            raise ValueError(
                f"ratio_level={self.ratio_level!r} is defined for surrogate 'clip', 'cispo' or "
                f"'sapo', got {self.surrogate!r}; "
                "gmpo and vespo already couple a whole sequence with ratio_level='token'"
            )
        self._check_meaning()
        self._check_bounds()

    def _check_names(self) -> None:
        for field, allowed in (
            ("surrogate", SURROGATES),
            ("ratio_level", RATIO_LEVELS),
            ("aggregation", AGGREGATIONS),
            ("kl_estimator", KL_ESTIMATORS),
            ("old_kl_estimator", KL_ESTIMATORS),
            ("gate", GATES),
        ):
            value = getattr(self, field)
            if value not in allowed:
                raise ValueError(f"{field} is {value!r}, expected one of {', '.join(allowed)}")

    def _check_types(self) -> None:
        for field in fields(self):
            value, wanted = getattr(self, field.name), field.type.removesuffix(" | None")
            if value is None and wanted != field.type:
                continue
            if not isinstance(value, _PYTHON_TYPES[wanted]) or (
                isinstance(value, bool) and wanted != "bool"
            ):
                raise TypeError(
                    f"{field.name} is {value!r} ({type(value).__name__}), expected {field.type}"
                )
            if wanted in ("float", "int") and not is_finite(value):
                raise ValueError(f"{field.name} is {shown(value)}, expected a finite number")

    def _check_numbers(self) -> None:
        vespo = [field.name for field in fields(self) if field.name.startswith("vespo_")]
        bounds = ("clip_low", "clip_high", "ratio_min", "gate_keep_low", "gate_keep_high")
        for field in (*bounds, "kl_coef", "old_kl_coef", *vespo):
            if getattr(self, field) < 0:
                raise ValueError(f"{field} is {getattr(self, field)}, expected a number >= 0")
        for field in ("sapo_tau_pos", "sapo_tau_neg"):
            if getattr(self, field) <= 0:
                raise ValueError(f"{field} is {getattr(self, field)}, expected a number > 0")
        if self.max_length is not None and self.max_length <= 0:
            raise ValueError(
                f"max_length is {self.max_length}, expected a positive number of tokens"
            )
        for field in ("ratio_power_pos", "ratio_power_neg"):
            if getattr(self, field) not in (1, 0, -1):
                raise ValueError(f"{field} is {getattr(self, field)}, expected 1, 0 or -1")

    def _check_meaning(self) -> None:
        kind = f"surrogate={self.surrogate!r}"
        if self.surrogate == "gate":
            kind = f"gate={self.gate!r}, which has no bounds"
        ignored_by = dict.fromkeys(without_meaning(self.surrogate, self.gate), kind)
        if self.kl_coef == 0:
            ignored_by |= dict.fromkeys(("kl_estimator", "kl_ratio_weighted"), "kl_coef=0")
        if self.old_kl_coef == 0:
            ignored_by["old_kl_estimator"] = "old_kl_coef=0"
        if self.aggregation != "constant":
            ignored_by["max_length"] = f"aggregation={self.aggregation!r}"
        for field in fields(self):
            value = getattr(self, field.name)
            if value != field.default and field.name in ignored_by:
                raise ValueError(
                    f"{field.name} is {value!r} but has no meaning for {ignored_by[field.name]}; "
                    f"leave it {field.default!r}"
                )

    def _check_bounds(self) -> None:
        if self.surrogate == "cispo" and self.ratio_max is None:
            raise ValueError("surrogate='cispo' needs ratio_max, the bound on the ratio, e.g. 5.0")
        lowest = 1 + self.clip_high if self.surrogate == "clip" else self.ratio_min
        for field in ("ratio_max", "ratio_max_pos"):
            value = getattr(self, field)
            if value is not None and value <= lowest:
                raise ValueError(f"{field} is {value}, expected more than {lowest:g}")
        if self.gate != "ratio" and (self.gate_keep_low or self.gate_keep_high):
            raise ValueError(
                f"gate_keep_low and gate_keep_high scale a bound on the ratio, got gate="
                f"{self.gate!r}: leave them 0 (outside tokens are dropped), or use gate='ratio'"
            )

    @property
    def bounds(self) -> tuple[float, float]:
        """(low, high): what the surrogate compares, r or the gate's divergence, with."""
        if self.surrogate == "cispo":
            return self.ratio_min, self.ratio_max
        if self.surrogate == "gate" and self.gate == "none":
            return -math.inf, math.inf
        center = 0.0 if self.gate in ("tv", "kl") or self.surrogate == "gmpo" else 1.0
        return center - self.clip_low, center + self.clip_high

    @property
    def takes_clip_bounds(self) -> bool:
        """True when `bounds` are bounds on r, so that per-token ones can take their place."""
        return self.surrogate in ("clip", "cispo") or self.gate == "ratio"

    @property
    def acts_without_advantage(self) -> bool:
        """True when a token with A = 0 still has a gradient: a KL penalty, an entropy bonus."""
        return any((self.kl_coef, self.old_kl_coef, self.entropy_coef))

    @property
    def is_token_level(self) -> bool:
        """True when a token's loss depends on its own log-prob alone: one pass can fuse it."""
        return self.ratio_level == "token" and self.surrogate in TOKEN_SURROGATES

    @property
    def needs_sequences(self) -> bool:
        """True when the loss or its aggregation needs to know where sequences begin and end."""
        return not self.is_token_level or self.aggregation != "token_mean"


class TokenLoss(NamedTuple):
    """Per-token terms of an objective, before the weights. All (N,), on the input's device."""

    loss: Tensor  # surrogate + KL penalty, differentiable
    ratio: Tensor  # importance ratio the surrogate used, detached
    kl: Tensor | None  # KL estimate to the reference, detached
    clipped: Tensor  # uint8: CLIPPED_LOW | CLIPPED_HIGH | CLIPPED_MAX, 0 = no bound was at work


CLIPPED_LOW, CLIPPED_HIGH, CLIPPED_MAX = 1, 2, 4


def token_loss(
    objective: Objective,
    logprobs: Tensor,
    advantages: Tensor,
    *,
    old_logprobs: Tensor | None = None,
    ref_logprobs: Tensor | None = None,
    importance_weights: Tensor | None = None,
    sequence_weights: Tensor | None = None,
    clip_bounds: tuple[Tensor, Tensor] | None = None,
    nll_weights: Tensor | None = None,
    mask: Tensor | None = None,
    segments: Segments | None = None,
) -> TokenLoss:
    """Per-token loss of `objective`, in the dtype of `logprobs`, differentiable in them alone.

    All tensors are (N,), `mask` is bool, `sequence_weights` is (B,). What stands in masked slots
    (or in a sequence without an unmasked token) is never used, NaN and inf included; NaN in an
    unmasked slot shows in the loss. `old_logprobs=None` means strictly on-policy: r is 1 and keeps
    its gradient.

    Two corrections for rollout mismatch, each optional: `importance_weights` holds one number per
    token and `sequence_weights` one per sequence. Both multiply the advantage, except that gmpo
    takes the geometric mean of the token weights over the sequence, and vespo multiplies them into
    its weight W: every token's once, and the sequence's once.

    `clip_bounds` (low, high), each (N,), take the place of the objective's bounds on r (DCPO,
    RIPO). `nll_weights` (N,) add an SFT term beside the policy loss: -nll_weight * logp (VAPO).

    Raises:
        ValueError: sequences are needed and `segments` is None, `ref_logprobs` are missing or
            superfluous, or the objective has no bounds on r and `clip_bounds` are given.
    """
    _check_given(objective, ref_logprobs, sequence_weights, segments)
    if clip_bounds is not None:
        check_takes_clip_bounds(objective)
        clip_bounds = tuple(_constant(bound, mask, 1) for bound in clip_bounds)
    logprobs = logprobs if mask is None else logprobs.masked_fill(~mask, 0)
    old_logprobs = _constant(logprobs if old_logprobs is None else old_logprobs, mask, 0)
    tokens = _Tokens(
        logprobs=logprobs,
        old_logprobs=old_logprobs,
        log_ratio=logprobs - old_logprobs,
        advantages=_constant(advantages, mask, 0),
        importance_weights=_constant(importance_weights, mask, 1),
        sequence_weights=_constant_sequence_weights(sequence_weights, mask, segments),
        bounds=clip_bounds or objective.bounds,
        mask=mask,
        segments=segments,
    )
    loss, ratio, clipped = _SURROGATES[objective.surrogate](objective, tokens)
    kl = None
    if ref_logprobs is not None:
        weighting = _ratio(objective, tokens) if objective.kl_ratio_weighted else None
        kl = kl_term(objective, logprobs - _constant(ref_logprobs, mask, 0), weighting)
        loss = loss + objective.kl_coef * kl
        kl = kl.detach()
    if objective.old_kl_coef != 0:
        loss = loss + objective.old_kl_coef * _kl(objective.old_kl_estimator, tokens.log_ratio)
    if nll_weights is not None:
        loss = loss - _constant(nll_weights, mask, 0) * logprobs
    return TokenLoss(loss, ratio.detach(), kl, clipped)


def _check_given(
    objective: Objective,
    ref_logprobs: Tensor | None,
    sequence_weights: Tensor | None,
    segments: Segments | None,
) -> None:
    if segments is None and (sequence_weights is not None or not objective.is_token_level):
        raise ValueError(
            f"objective {objective.name!r} couples whole sequences, or has sequence_weights, "
            "and got segments=None: pass the Segments of the batch"
        )
    if (ref_logprobs is None) != (objective.kl_coef == 0):
        got = "None" if ref_logprobs is None else "a tensor"
        raise ValueError(
            f"ref_logprobs is {got} with kl_coef={objective.kl_coef:g}: "
            "they are required exactly when kl_coef != 0"
        )


def check_takes_clip_bounds(objective: Objective) -> None:
    """Refuse per-token bounds on r where the objective compares r with none."""
    if not objective.takes_clip_bounds:
        raise ValueError(
            f"clip_bounds are given but objective {objective.name!r} (surrogate="
            f"{objective.surrogate!r}, gate={objective.gate!r}) has no bounds on r: use surrogate "
            "'clip' or 'cispo', or gate='ratio'; or leave them None"
        )


def kl_term(objective: Objective, log_ratio: Tensor, ratio: Tensor | None) -> Tensor:
    """The KL penalty of every token before kl_coef, from k = logp - ref (N,) and the ratio r."""
    kl = _kl(objective.kl_estimator, log_ratio)
    return kl * ratio if objective.kl_ratio_weighted else kl


class _Tokens(NamedTuple):
    """The inputs of a surrogate, harmless in masked slots: r = 1, A = 0, weights and bounds 1."""

    logprobs: Tensor
    old_logprobs: Tensor
    log_ratio: Tensor
    advantages: Tensor
    importance_weights: Tensor | None
    sequence_weights: Tensor | None  # (B,)
    bounds: tuple[Tensor, Tensor] | tuple[float, float]  # (N,) each, or the objective's
    mask: Tensor | None
    segments: Segments | None

    def weighted_advantages(self) -> Tensor:
        advantages = self.advantages
        if self.importance_weights is not None:
            advantages = advantages * self.importance_weights
        if self.sequence_weights is not None:
            advantages = advantages * self.segments.broadcast(self.sequence_weights)
        return advantages


def _constant(values: Tensor | None, mask: Tensor | None, fill: float) -> Tensor | None:
    """`values` without gradient and with `fill` in the masked slots."""
    if values is None:
        return None
    return values.detach() if mask is None else values.detach().masked_fill(~mask, fill)


def _constant_sequence_weights(
    weights: Tensor | None, mask: Tensor | None, segments: Segments | None
) -> Tensor | None:
    # Where this rank's rows use them: a collective for whole sequences would change nothing.
    used = None if mask is None or weights is None else segments.own_sum(mask.to(weights.dtype)) > 0
    return _constant(weights, used, 1)


def clamp(x: Tensor, low: float | Tensor, high: float | Tensor) -> Tensor:
    """x within [low, high], with gradient 1 on the closed interval.

    That is torch.clamp up to 2.13. From 2.14 on its gradient at a bound is 0, so that PPO's min
    would halve the gradient of a token whose ratio has just reached the bound.
    """
    if not x.requires_grad:
        return x.clamp(low, high)
    return torch.where((x >= low) & (x <= high), x, x.detach().clamp(low, high))


def _exp(log_ratio: Tensor) -> Tensor:
    return clamp(log_ratio, -MAX_LOG_RATIO, MAX_LOG_RATIO).exp()


def _ratio(objective: Objective, tokens: _Tokens) -> Tensor:
    if objective.ratio_level == "token":
        return _exp(tokens.log_ratio)
    log_ratio = tokens.segments.broadcast(tokens.segments.mean(tokens.log_ratio, tokens.mask))
    if objective.ratio_level == "sequence_token":
        log_ratio = log_ratio.detach() + (tokens.logprobs - tokens.logprobs.detach())
    return _exp(log_ratio)


def _clip(objective: Objective, tokens: _Tokens) -> tuple[Tensor, Tensor, Tensor]:
    """PPO: -min(r A, clip(r, 1 - low, 1 + high) A), r bounded by ratio_max where A < 0."""
    ratio, advantages = _ratio(objective, tokens), tokens.weighted_advantages()
    low, high = tokens.bounds
    bounded = ratio if objective.ratio_max is None else clamp(ratio, 0, objective.ratio_max)
    loss = -torch.min(bounded * advantages, clamp(ratio, low, high) * advantages)
    clipped = _flags((advantages < 0) & (ratio < low), CLIPPED_LOW)
    clipped |= _flags((advantages > 0) & (ratio > high), CLIPPED_HIGH)
    if objective.ratio_max is not None:
        clipped |= _flags((advantages < 0) & (ratio > objective.ratio_max), CLIPPED_MAX)
    return loss, ratio, clipped


def _cispo(objective: Objective, tokens: _Tokens) -> tuple[Tensor, Tensor, Tensor]:
    """CISPO: -sg(clip(r, low, high)) A logp: a clipped token keeps its gradient, but bounded.

    Counted as clipped is what PPO would stop: above the bound where A > 0 (as TRL and Liger count),
    below it where A < 0.
    """
    ratio, advantages = _ratio(objective, tokens).detach(), tokens.weighted_advantages()
    low, high = tokens.bounds
    loss = -ratio.clamp(low, high) * advantages * tokens.logprobs
    clipped = _flags((advantages < 0) & (ratio < low), CLIPPED_LOW)
    return loss, ratio, clipped | _flags((advantages > 0) & (ratio > high), CLIPPED_MAX)


def _sapo(objective: Objective, tokens: _Tokens) -> tuple[Tensor, Tensor, Tensor]:
    """SAPO: -A (4 / tau) sigmoid(tau (r - 1)), a soft gate in place of the clip."""
    ratio, advantages = _ratio(objective, tokens), tokens.weighted_advantages()
    tau = _choose(advantages > 0, objective.sapo_tau_pos, objective.sapo_tau_neg, ratio)
    loss = -advantages * (4 / tau) * torch.sigmoid(tau * (ratio - 1))
    return loss, ratio, _no_flags(ratio)


def _reinforce(objective: Objective, tokens: _Tokens) -> tuple[Tensor, Tensor, Tensor]:
    """REINFORCE: -A logp. The ratio is reported, not used."""
    loss = -tokens.weighted_advantages() * tokens.logprobs
    return loss, _ratio(objective, tokens), _no_flags(loss)


def _gate(objective: Objective, tokens: _Tokens) -> tuple[Tensor, Tensor, Tensor]:
    """The gate family: -sg(w) A logp with w = clip(r^k, ratio_min, ratio_max) inside the gate.

    Outside, w is gate_keep times the bound that does not hold, 0 by default.
    """
    advantages = tokens.weighted_advantages()
    ratio = _ratio(objective, tokens).detach()
    positive, negative = advantages > 0, advantages < 0
    power = _choose(positive, objective.ratio_power_pos, objective.ratio_power_neg, ratio)
    most = _bound(objective.ratio_max)
    most = _choose(positive, min(most, _bound(objective.ratio_max_pos)), most, ratio)
    # Not r ** k: NaN ** 0 is 1, and a NaN must stay visible.
    powered = (power * tokens.log_ratio.detach().clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)).exp()
    weight = torch.minimum(powered.clamp(min=objective.ratio_min), most)
    low, high = tokens.bounds
    divergence = _divergence(objective.gate, tokens, ratio)
    below = (divergence < low) & (negative | objective.gate_two_sided)
    above = (divergence > high) & (positive | objective.gate_two_sided)
    if objective.gate != "none":
        weight = torch.where(below, objective.gate_keep_low * low, weight)
        weight = torch.where(above, objective.gate_keep_high * high, weight)
    clipped = _flags(below, CLIPPED_LOW) | _flags(above, CLIPPED_HIGH)
    clipped |= _flags((powered > most) & ~below & ~above, CLIPPED_MAX)
    return -weight * advantages * tokens.logprobs, ratio, clipped


def _divergence(gate: str, tokens: _Tokens, ratio: Tensor) -> Tensor:
    """What a gate compares with its bounds: r, p - p_old, or the binary KL with that sign."""
    if gate in ("none", "ratio"):
        return ratio
    logprobs, old_logprobs = tokens.logprobs.detach(), tokens.old_logprobs
    old_probs = old_logprobs.exp()
    difference = logprobs.exp() - old_probs
    if gate == "tv":
        return difference
    others, old_others = (
        (-x.expm1()).clamp(min=0) + BINARY_KL_EPS for x in (logprobs, old_logprobs)
    )
    kl = old_probs * (old_logprobs - logprobs) + (1 - old_probs) * (old_others / others).log()
    return torch.where(difference > 0, kl, -kl)


def _bound(bound: float | None) -> float:
    return math.inf if bound is None else bound


def _gmpo(objective: Objective, tokens: _Tokens) -> tuple[Tensor, Tensor, Tensor]:
    """GMPO: -A exp(mean_t clipped d_t), with A the sequence's mean advantage (verl's geo_mean).

    The clip acts on d, pessimistically by the sign of A, before the geometric mean.
    """
    log_ratio, advantages = tokens.log_ratio, tokens.advantages
    mask, segments = tokens.mask, tokens.segments
    sign = advantages.sign()
    low, high = tokens.bounds
    pessimistic = sign * torch.min(sign * log_ratio, sign * clamp(log_ratio, low, high))
    ratio = _exp(segments.mean(pessimistic, mask))
    advantage = segments.mean(advantages, mask)
    if tokens.importance_weights is not None:
        advantage = advantage * segments.mean(tokens.importance_weights.log(), mask).exp()
    if tokens.sequence_weights is not None:
        advantage = advantage * tokens.sequence_weights
    clipped = _flags((advantages < 0) & (log_ratio < low), CLIPPED_LOW)
    clipped |= _flags((advantages > 0) & (log_ratio > high), CLIPPED_HIGH)
    return segments.broadcast(-advantage * ratio), segments.broadcast(ratio), clipped


def _vespo(objective: Objective, tokens: _Tokens) -> tuple[Tensor, Tensor, Tensor]:
    """VESPO: -sg(phi(W)) A logp, W = exp(sum_t d_t), phi(W) = e^lambda W^k e^(-lambda W)."""
    log_weight = tokens.segments.broadcast(_vespo_log_weight(tokens))
    positive = tokens.advantages >= 0
    k = _choose(positive, objective.vespo_k_pos, objective.vespo_k_neg, log_weight)
    rate = _choose(positive, objective.vespo_lambda_pos, objective.vespo_lambda_neg, log_weight)
    rate = rate.clamp(min=VESPO_MIN_RATE)
    phi = (rate + k * log_weight - rate * log_weight.exp()).exp()
    return -phi * tokens.advantages * tokens.logprobs, _exp(tokens.log_ratio), _no_flags(phi)


def _vespo_log_weight(tokens: _Tokens) -> Tensor:
    """log W, (B,), detached: the clamped log-ratios and the log importance weights, summed."""
    terms = tokens.log_ratio.detach().clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    if tokens.importance_weights is not None:
        terms = terms + _vespo_clamp(tokens.importance_weights.log())
    log_weight = tokens.segments.sum(terms, tokens.mask)
    if tokens.sequence_weights is not None:
        log_weight = log_weight + _vespo_clamp(tokens.sequence_weights.log())
    return _vespo_clamp(log_weight)


def _vespo_clamp(log_weight: Tensor) -> Tensor:
    return log_weight.clamp(VESPO_MIN_LOG_WEIGHT, MAX_LOG_RATIO)


_SURROGATES = {
    "clip": _clip,
    "cispo": _cispo,
    "sapo": _sapo,
    "reinforce": _reinforce,
    "gate": _gate,
    "gmpo": _gmpo,
    "vespo": _vespo,
}


def _choose(condition: Tensor, yes: float, no: float, like: Tensor) -> Tensor:
    """Two numbers picked by `condition`: torch.where on two floats would round them to float32."""
    return torch.full_like(like, no).masked_fill(condition, yes)


def _kl(estimator: str, log_ratio: Tensor) -> Tensor:
    """Estimate KL(policy || reference) per token from k = logp - ref (Schulman 2020, "kl-approx").

    k1: k, k2: k^2 / 2, abs: |k|, k3: exp(-k) + k - 1, with -k clamped at 20 before exp, so that
    value and gradient saturate there (TRL does not clamp; verl also clamps the value to 10).
    "k1+" and "k3+" have the value of k1 and k3 and the gradient of k2, which is the unbiased one
    (verl's straight-through forms).
    """
    if estimator.endswith("+"):
        value, unbiased = _kl(estimator[:-1], log_ratio.detach()), _kl("k2", log_ratio)
        return unbiased - unbiased.detach() + value
    if estimator == "k1":
        return log_ratio
    if estimator == "k2":
        return 0.5 * log_ratio.square()
    if estimator == "abs":
        return log_ratio.abs()
    inverse = clamp(-log_ratio, -math.inf, MAX_LOG_RATIO)
    return inverse.expm1() - inverse  # expm1: near 0 the difference would be all rounding error


def _flags(condition: Tensor, bit: int) -> Tensor:
    return condition.to(torch.uint8) * bit


def _no_flags(like: Tensor) -> Tensor:
    return torch.zeros_like(like, dtype=torch.uint8)


def token_weights(
    objective: Objective,
    mask: Tensor | None,
    segments: Segments,
    *,
    normalizer: Tensor | float | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """The weight w_t of every token, (N,): 0 under a False mask, else by `objective.aggregation`.

        token_mean      1 / tokens             mean over the unmasked tokens of the batch
        sequence_mean   1 / (B * len_b)        mean over sequences of the mean over their tokens
        sequence_sum    1 / B                  mean over sequences of the sum over their tokens
        constant        1 / (B * max_length)   Dr. GRPO's length-free normalization

    `normalizer` replaces the count of unmasked tokens (token_mean) or of sequences B (the others):
    the global count makes gradient accumulation and data parallelism exact. B counts every sequence
    of the batch, a fully masked one included, as TRL does (verl leaves those out: pass its count as
    `normalizer`).
    """
    mask = _full_mask(mask, segments).to(dtype)
    if objective.aggregation == "token_mean":
        return mask / _token_count(mask, segments, normalizer)
    sequences = count_or_one(segments.count if normalizer is None else normalizer, mask)
    if objective.aggregation == "sequence_mean":
        return mask / (segments.broadcast(segments.sum(mask).clamp(min=1)) * sequences)
    if objective.aggregation == "sequence_sum":
        return mask / sequences
    return mask / (sequences * _max_length(objective, segments))


def entropy_weights(
    objective: Objective,
    mask: Tensor | None,
    segments: Segments,
    *,
    normalizer: Tensor | float | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor | None:
    """entropy_coef * the token-mean weight, (N,), or None without a bonus.

    The bonus is a token mean whatever the aggregation.

    Raises:
        ValueError: `normalizer` counts sequences, which does not say how many tokens there are.
    """
    if objective.entropy_coef == 0:
        return None
    if normalizer is not None and objective.aggregation != "token_mean":
        raise ValueError(
            f"entropy_coef is a token mean, but normalizer counts sequences under "
            f"aggregation={objective.aggregation!r}: use aggregation='token_mean', or no normalizer"
        )
    mask = _full_mask(mask, segments).to(dtype)
    return mask * objective.entropy_coef / _token_count(mask, segments, normalizer)


def _token_count(
    mask: Tensor, segments: Segments, normalizer: Tensor | float | None
) -> Tensor | float:
    """What a token mean divides by, at least 1: the caller's count, or the mask's own (N,)."""
    if normalizer is not None:
        return count_or_one(normalizer, mask)
    return segments.total(mask).clamp(min=1)


def _full_mask(mask: Tensor | None, segments: Segments) -> Tensor:
    return torch.ones(segments.rows, device=segments.device) if mask is None else mask


def _max_length(objective: Objective, segments: Segments) -> int:
    if objective.max_length is not None:
        return objective.max_length
    if segments.width is None or segments.group is not None:
        where = "a packed batch" if segments.width is None else "a rank's part of the sequences"
        raise ValueError(
            f"aggregation='constant' on {where} needs Objective.max_length, the longest "
            "completion in tokens, e.g. fastpo.dr_grpo(max_length=4096)"
        )
    return segments.width


def is_finite(value: Real) -> bool:
    """Whether float32 holds it: no NaN, no infinity, no integer of a thousand bits."""
    try:
        return abs(float(value)) <= FLOAT_MAX
    except OverflowError:
        return False


def shown(value: Real) -> str:
    """A number in a message of one line."""
    huge = isinstance(value, int) and not is_finite(value)
    return f"an integer of {value.bit_length()} bits" if huge else str(value)


def count_or_one(count: Tensor | float, like: Tensor) -> Tensor | float:
    """A count safe to divide by: 0 becomes 1, so that an empty batch gives 0 and not NaN."""
    if isinstance(count, Tensor):
        count = count.to(like.dtype)  # a 0-d CPU tensor combines with any device, without a copy
        return torch.where(count == 0, torch.ones_like(count), count)
    return 1.0 if count == 0 else count


FOREIGN_NAMES = {  # what other libraries call our fields
    "beta": "kl_coef",
    "kl_loss_coef": "kl_coef",
    "kl_loss_type": "kl_estimator",
    "delta": "ratio_max",
    "clip_ratio_c": "ratio_max",
    "epsilon": "clip_low",
    "clip_ratio": "clip_low",
    "clip_ratio_low": "clip_low",
    "epsilon_high": "clip_high",
    "clip_ratio_high": "clip_high",
    "loss_agg_mode": "aggregation",
    "loss_type": "aggregation",
    "importance_sampling_level": "ratio_level",
    "dro_beta": "old_kl_coef",
    "entropy_coeff": "entropy_coef",
    "use_bias_correction_kl": "kl_ratio_weighted",
}


def unknown_option(caller: str, name: str) -> TypeError:
    """The error for an option that no field has, with the field that was likely meant."""
    names = tuple(field.name for field in fields(Objective))
    hint = FOREIGN_NAMES.get(name) or difflib.get_close_matches(name, names, n=1, cutoff=0.0)[0]
    return TypeError(
        f"{caller}() got an unknown override {name!r}; did you mean {hint!r}? "
        f"Fields: {', '.join(names)}"
    )
