"""The sums over tokens that a policy loss reports: what they are of, and the specification.

A backend may have a function `metric_sums(inputs, objective) -> (8,)` of its own, all of METRICS in
a fixed order of additions, undefined where the input is not given: on GPUs every operation of the
table below is a launch.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastpo.objective import MAX_LOG_RATIO, Objective, kl_term
from fastpo.rule import RuleObjective

METRICS = ("tokens", "ratio", "old_kl", "clip_low", "clip_high", "clip_max", "entropy", "ref_kl")


class MetricInputs(NamedTuple):
    """Per-token numbers, (N,) in the accumulation dtype but for flags and mask; all detached."""

    logprobs: Tensor
    entropy: Tensor | None
    clipped: Tensor  # uint8 bits, as in `fastpo.backends.base.RowLosses`
    mask: Tensor | None  # bool, the tokens that count; None = all
    old_logprobs: Tensor | None  # None = on-policy, r = 1
    ref_logprobs: Tensor | None
    ratio: Tensor | None  # of a sequence-level objective; None = exp(clamp(logp - old, +-20))
    ref_kl: Tensor | None  # likewise; None = the objective's estimate from logp - ref


def metric_sums(inputs: MetricInputs, objective: Objective | RuleObjective) -> Tensor:
    """(k,) the sums of METRICS that are of something given, in that order: one table, one sum."""
    logprobs, mask = inputs.logprobs, inputs.mask
    old = logprobs if inputs.old_logprobs is None else inputs.old_logprobs
    log_ratio = (logprobs - old).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    ratio = log_ratio.exp() if inputs.ratio is None else inputs.ratio
    bits = torch.arange(3, dtype=torch.uint8, device=logprobs.device)
    columns = [
        torch.ones_like(logprobs) if mask is None else mask,
        ratio,
        log_ratio.expm1() - log_ratio,  # exact near 0, as k3
        *((inputs.clipped >> bits[:, None]) & 1),  # CLIPPED_LOW, CLIPPED_HIGH, CLIPPED_MAX
    ]
    if inputs.entropy is not None:
        columns.append(inputs.entropy)
    if inputs.ref_logprobs is not None:
        ref_kl = inputs.ref_kl
        if ref_kl is None:
            ref_kl = kl_term(objective, logprobs - inputs.ref_logprobs, ratio)
        columns.append(ref_kl)
    table = torch.stack(columns)  # flags become floats
    if mask is not None:
        table = table.masked_fill_(~mask, 0)
    return table.sum(1)
