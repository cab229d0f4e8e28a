"""The per-token numbers of a loss call: validated, flattened to rows, in the accumulation dtype."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fastpo.backends.base import RowInputs
from fastpo.objective import (
    CLIPPED_HIGH,
    CLIPPED_LOW,
    CLIPPED_MAX,
    MAX_LOG_RATIO,
    Objective,
    TokenLoss,
    entropy_weights,
    token_loss,
    token_weights,
)
from fastpo.ops import _checks
from fastpo.ops._rows import flat_rows
from fastpo.segments import Segments


@dataclass(frozen=True, kw_only=True)
class LossBatch:
    """Everything a policy loss needs but the policy's own log-probs. Tensors are (N,)."""

    objective: Objective
    segments: Segments
    leading: torch.Size
    mask: Tensor | None
    advantages: Tensor
    old_logprobs: Tensor | None
    ref_logprobs: Tensor | None
    importance_weights: Tensor | None
    sequence_weights: Tensor | None  # (B,), importance weights given per sequence
    weight: Tensor
    entropy_weight: Tensor | None

    @classmethod
    def make(
        cls,
        *,
        objective: Objective,
        leading: torch.Size,
        like: Tensor,
        advantages: Tensor,
        mask: Tensor | None,
        old_logprobs: Tensor | None,
        ref_logprobs: Tensor | None,
        importance_weights: Tensor | None,
        cu_seqlens: Tensor | None,
        normalizer: Tensor | float | None,
    ) -> LossBatch:
        """Validate and flatten; `like` gives the device, and float64 keeps float64."""
        _checks.check_objective(objective)
        _checks.check_mask(mask, leading, like)
        _checks.check_normalizer(normalizer)
        _check_reference(objective, ref_logprobs)
        segments = _checks.segments_of(leading, cu_seqlens, objective, like)
        dtype = torch.float64 if like.dtype == torch.float64 else torch.float32

        def rows(name: str, value: Tensor | None) -> Tensor | None:
            if value is None:
                return None
            _checks.check_tensor(name, value, leading, like)
            _checks.check_floating(name, value)
            return value.detach().reshape(-1).to(dtype)

        flat_mask = flat_rows(mask)
        per_sequence = _is_per_sequence(importance_weights, leading, segments)
        if importance_weights is not None and not per_sequence:
            importance_weights = _per_token(
                "importance_weights", importance_weights, leading, segments, like, dtype
            )
        return cls(
            objective=objective,
            segments=segments,
            leading=leading,
            mask=flat_mask,
            advantages=_per_token("advantages", advantages, leading, segments, like, dtype),
            old_logprobs=rows("old_logprobs", old_logprobs),
            ref_logprobs=rows("ref_logprobs", ref_logprobs),
            importance_weights=None if per_sequence else importance_weights,
            sequence_weights=importance_weights.detach().to(dtype) if per_sequence else None,
            weight=token_weights(
                objective, flat_mask, segments, normalizer=normalizer, dtype=dtype
            ),
            entropy_weight=entropy_weights(
                objective, flat_mask, segments, normalizer=normalizer, dtype=dtype
            ),
        )

    def row_inputs(self) -> RowInputs:
        """The inputs of `row_policy_loss`: importance weights multiply the advantage."""
        advantages = self.advantages
        if self.importance_weights is not None:
            advantages = advantages * self.importance_weights
        if self.sequence_weights is not None:
            advantages = advantages * self.segments.spread(self.sequence_weights)
        rows = (self.weight, advantages, self.old_logprobs, self.ref_logprobs, self.entropy_weight)
        # One sequence's advantage, spread over its tokens, is an expanded view of stride 0.
        return RowInputs(*(None if x is None else x.contiguous() for x in rows))

    def token_loss(self, logprobs: Tensor) -> TokenLoss:
        """The specification's per-token terms for log-probs (N,)."""
        return token_loss(
            self.objective,
            logprobs,
            self.advantages,
            old_logprobs=self.old_logprobs,
            ref_logprobs=self.ref_logprobs,
            importance_weights=self.importance_weights,
            sequence_weights=self.sequence_weights,
            mask=self.mask,
            segments=self.segments,
        )

    def metrics(
        self, logprobs: Tensor, entropy: Tensor | None, terms: TokenLoss
    ) -> dict[str, Tensor]:
        """Sums and counts over live tokens (see `PolicyLoss.metrics`). Detached inputs, (N,)."""
        live = torch.ones_like(logprobs) if self.mask is None else self.mask.to(logprobs.dtype)

        def total(values: Tensor) -> Tensor:
            return values.where(live != 0, 0).sum()

        def count(bit: int) -> Tensor:
            return total((terms.clipped & bit != 0).to(live.dtype))

        old = logprobs if self.old_logprobs is None else self.old_logprobs
        log_ratio = (logprobs - old).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
        sums = {
            "tokens": live.sum(),
            "ratio": total(terms.ratio),
            "old_kl": total(log_ratio.expm1() - log_ratio),  # exact near 0, as k3
            "clip_low": count(CLIPPED_LOW),
            "clip_high": count(CLIPPED_HIGH),
            "clip_max": count(CLIPPED_MAX),
        }
        if entropy is not None:
            sums["entropy"] = total(entropy)
        if terms.kl is not None:
            sums["ref_kl"] = total(terms.kl)
        return sums


def _check_reference(objective: Objective, ref_logprobs: Tensor | None) -> None:
    if objective.kl_coef != 0 and ref_logprobs is None:
        raise ValueError(
            f"objective {objective.name!r} has kl_coef={objective.kl_coef} but ref_logprobs is "
            f"None: pass the "
            "reference policy's log-probs, or set kl_coef=0"
        )
    if objective.kl_coef == 0 and ref_logprobs is not None:
        raise ValueError(
            f"ref_logprobs are given but objective {objective.name!r} has kl_coef=0 and would "
            f"ignore them: "
            "set kl_coef, or pass ref_logprobs=None"
        )


def _is_per_sequence(value: object, leading: torch.Size, segments: Segments) -> bool:
    """Whether a tensor holds one number per sequence: [B], and not the shape of the tokens."""
    knows_sequences = len(leading) == 2 or segments.offsets is not None
    return (
        isinstance(value, Tensor)
        and value.dtype.is_floating_point
        and value.device == segments.device
        and knows_sequences
        and value.shape != leading
        and value.shape == (segments.count,)
    )


def _per_token(
    name: str,
    value: object,
    leading: torch.Size,
    segments: Segments,
    like: Tensor,
    dtype: torch.dtype,
) -> Tensor:
    """Spread a [B] value over its sequences, or flatten a [...] one. (N,)"""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} is {type(value).__name__}, expected a tensor")
    _checks.check_floating(name, value)
    _checks.check_device(name, value, like)
    value = value.detach().to(dtype)
    if value.shape == leading:
        return value.reshape(-1)
    if _is_per_sequence(value, leading, segments):
        return segments.spread(value)
    knows_sequences = len(leading) == 2 or segments.offsets is not None
    per_sequence = f" or one per sequence, [{segments.count}]" if knows_sequences else ""
    raise ValueError(
        f"{name} has shape {list(value.shape)}, expected one per token, "
        f"{list(leading)}{per_sequence}"
    )
