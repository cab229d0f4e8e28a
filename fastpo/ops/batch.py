"""The per-token numbers of a loss call, as rows in the accumulation dtype, and what is summed of
them. What users passed has been checked (`fastpo.ops.checks`)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fastpo.backends.base import RowInputs
from fastpo.backends.metrics import METRICS, MetricInputs, metric_sums
from fastpo.objective import (
    MAX_LOG_RATIO,
    Objective,
    TokenLoss,
    entropy_weights,
    kl_term,
    token_loss,
    token_weights,
)
from fastpo.ops.checks import is_per_sequence, sequence_count, wide_dtype
from fastpo.ops.loss_checks import LossInputs
from fastpo.rule import RuleObjective, TokenInputs
from fastpo.segments import Segments

PER_TOKEN = (
    "mask",
    "advantages",
    "old_logprobs",
    "ref_logprobs",
    "importance_weights",
    "clip_low",
    "clip_high",
    "nll_weights",
    "weight",
    "entropy_weight",
)


@dataclass(frozen=True, kw_only=True)
class LossBatch:
    """Everything a policy loss needs but the policy's own log-probs. Tensors are (N,)."""

    objective: Objective | RuleObjective
    segments: Segments
    mask: Tensor | None
    advantages: Tensor
    old_logprobs: Tensor | None
    ref_logprobs: Tensor | None
    importance_weights: Tensor | None
    sequence_weights: Tensor | None  # (B,), importance weights given per sequence
    clip_low: Tensor | None
    clip_high: Tensor | None
    nll_weights: Tensor | None
    weight: Tensor
    entropy_weight: Tensor | None

    @classmethod
    def from_inputs(cls, given: LossInputs, leading: torch.Size, like: Tensor) -> LossBatch:
        """Flatten checked inputs; `like` gives the device, and float64 keeps float64."""
        objective, dtype = given.objective, wide_dtype(like.dtype)
        count = sequence_count(leading, given.cu_seqlens)
        offsets = flat_rows(given.cu_seqlens)
        segments = Segments.from_batch(leading, offsets, like.device, given.cp_group)
        mask = flat_mask(given.mask)

        def rows(value: Tensor | None) -> Tensor | None:
            return flat_rows(value, dtype)

        advantages, weights = given.advantages, given.importance_weights
        per_sequence = weights is not None and is_per_sequence(weights, leading, count)
        if is_per_sequence(advantages, leading, count):
            advantages = segments.broadcast(rows(advantages))
        low, high = given.clip_bounds or (None, None)
        options = {"normalizer": given.normalizer, "dtype": dtype}
        weight = token_weights(objective, mask, segments, **options)
        if objective.entropy_coef != 0 and objective.aggregation == "token_mean":
            entropy_weight = weight * objective.entropy_coef  # a token mean too: not counted twice
        else:
            entropy_weight = entropy_weights(objective, mask, segments, **options)
        return cls(
            objective=objective,
            segments=segments,
            mask=mask,
            advantages=rows(advantages),
            old_logprobs=rows(given.old_logprobs),
            ref_logprobs=rows(given.ref_logprobs),
            importance_weights=None if per_sequence else rows(weights),
            sequence_weights=rows(weights) if per_sequence else None,
            clip_low=rows(low),
            clip_high=rows(high),
            nll_weights=rows(given.nll_weights),
            weight=weight,
            entropy_weight=entropy_weight,
        )

    @property
    def rule(self) -> RuleObjective | None:
        """The objective, if it is a rule."""
        return self.objective if isinstance(self.objective, RuleObjective) else None

    def rows(self, rows: slice | Tensor) -> LossBatch:
        """Some rows, of which the caller knows the sequences if their losses couple any."""
        values = {name: of_rows(getattr(self, name), rows) for name in PER_TOKEN}
        return replace(self, **values)

    def row_inputs(self) -> RowInputs:
        """The inputs of `row_policy_loss`: importance weights multiply the advantage."""
        advantages = self.advantages
        if self.importance_weights is not None:
            advantages = advantages * self.importance_weights
        if self.sequence_weights is not None:
            advantages = advantages * self.segments.broadcast(self.sequence_weights)
        return RowInputs(
            self.weight,
            advantages,
            self.old_logprobs,
            self.ref_logprobs,
            self.entropy_weight,
            self.clip_low,
            self.clip_high,
            self.nll_weights,
        )

    def token_loss(self, logprobs: Tensor, entropy: Tensor | None = None) -> TokenLoss:
        """The specification's per-token terms for log-probs (N,), or those of a rule, which also
        sees entropies (N,)."""
        if self.rule is not None:
            return self._rule_loss(self.rule, logprobs, entropy)
        return token_loss(
            self.objective,
            logprobs,
            self.advantages,
            old_logprobs=self.old_logprobs,
            ref_logprobs=self.ref_logprobs,
            importance_weights=self.importance_weights,
            sequence_weights=self.sequence_weights,
            clip_bounds=None if self.clip_low is None else (self.clip_low, self.clip_high),
            nll_weights=self.nll_weights,
            mask=self.mask,
            segments=self.segments,
        )

    def _rule_loss(
        self, objective: RuleObjective, logprobs: Tensor, entropy: Tensor | None
    ) -> TokenLoss:
        mask = self.mask

        def harmless(x: Tensor | None, fill: float) -> Tensor | None:
            # where() also stops a gradient of 0 * inf that a masked slot's numbers would give
            return x if x is None or mask is None else torch.where(mask, x, fill)

        def own(x: Tensor | None) -> Tensor | None:
            # The rule may write into what it gets: not into the caller's tensors, nor into ours
            return None if x is None else x.clone()

        logprobs, entropy = harmless(logprobs, 0.0), harmless(entropy, 0.0)
        old = logprobs.detach() if self.old_logprobs is None else harmless(self.old_logprobs, 0.0)
        ref, weights = harmless(self.ref_logprobs, 0.0), harmless(self.importance_weights, 1.0)
        if self.sequence_weights is not None:
            weights = self.segments.broadcast(self.sequence_weights)
        tokens = TokenInputs(
            advantages=own(harmless(self.advantages, 0.0)),
            old_logprobs=own(old),
            ref_logprobs=own(ref),
            importance_weights=own(weights),
            mask=own(mask),
            sequence_ids=self.segments.ids if objective.couples_sequences else None,
        )
        loss = harmless(objective.losses(own(logprobs), own(entropy), tokens), 0.0)
        if self.nll_weights is not None:
            loss = loss - harmless(self.nll_weights, 0.0) * logprobs
        detached = logprobs.detach()
        ratio = (detached - old).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
        kl = None if ref is None else kl_term(objective, detached - ref, ratio)
        return TokenLoss(loss, ratio, kl, torch.zeros_like(loss, dtype=torch.uint8))

    def metrics(
        self,
        logprobs: Tensor,
        entropy: Tensor | None,
        clipped: Tensor,
        *,
        ratio: Tensor | None = None,
        ref_kl: Tensor | None = None,
        backend: object = None,
    ) -> dict[str, Tensor]:
        """Sums and counts over tokens under the mask (see `PolicyLoss.metrics`).

        Inputs (N,), detached. A sequence-level objective brings its own `ratio` and `ref_kl`; those
        of a token-level one follow from the log-probs. `backend`, what the rows went through, may
        add up by itself (fastpo.backends.metrics).
        """
        per_token = (logprobs, entropy, clipped, self.mask, self.old_logprobs, self.ref_logprobs)
        inputs = MetricInputs(*per_token, ratio, ref_kl)
        names = [
            name
            for name in METRICS
            if not (name == "entropy" and entropy is None)
            and not (name == "ref_kl" and self.ref_logprobs is None)
        ]
        compiling = torch.compiler.is_compiling()
        fused = None if compiling else getattr(backend, "metric_sums", None)
        if fused is None:
            return dict(zip(names, metric_sums(inputs, self.objective).unbind(), strict=True))
        sums = dict(zip(METRICS, fused(inputs, self.objective).unbind(), strict=True))
        return {name: sums[name] for name in names}


def loss_of_rows(batch: LossBatch) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """The loss of a batch as the `loss_of` of `fastpo.backends.two_step.two_step`."""

    def loss_of(logprobs: Tensor, entropy: Tensor) -> tuple[Tensor, Tensor]:
        terms = batch.token_loss(logprobs, entropy)
        loss = batch.weight * terms.loss
        if batch.entropy_weight is not None:
            loss = loss - batch.entropy_weight * entropy
        return loss, terms.clipped

    return loss_of


def flat_rows(values: Tensor | None, dtype: torch.dtype | None = None) -> Tensor | None:
    """[...] as contiguous (N,) without gradient: kernels read neighbours.

    A copy of what was made under inference mode: autograd refuses to save such tensors.
    """
    if values is None:
        return None
    values = values.detach()
    if not (torch.compiler.is_compiling() or torch.is_inference_mode_enabled()):
        values = values.clone() if values.is_inference() else values
    values = values.reshape(-1).contiguous()
    return values if dtype is None else values.to(dtype)


def flat_mask(mask: Tensor | None) -> Tensor | None:
    """[...] bool or integers as (N,) bool."""
    return flat_rows(mask, torch.bool)


def flat_temperature(temperature: float | Tensor, like: Tensor) -> float | Tensor:
    """A float, or (N,) in the accumulation dtype: the temperature of the rows of `like` [..., V].

    Under torch.compile always (N,): a float would be part of the graph, another one compile anew.
    """
    wide = wide_dtype(like.dtype)
    if isinstance(temperature, Tensor):
        return flat_rows(temperature, wide)
    if not torch.compiler.is_compiling():
        return float(temperature)
    rows = like.shape[:-1].numel()
    return torch.full((rows,), temperature, dtype=wide, device=like.device)


def of_rows(values: float | Tensor | None, rows: slice | Tensor) -> float | Tensor | None:
    """Some rows of a (N,) tensor; a number or None is all rows' own."""
    return values[rows] if isinstance(values, Tensor) else values
