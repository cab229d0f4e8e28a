"""The objective of a policy loss and every number it takes beside log-probs, checked."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from fastpo.objective import Objective, check_takes_clip_bounds
from fastpo.ops import checks
from fastpo.rule import RuleObjective


class LossInputs(NamedTuple):
    """The arguments that every policy loss takes beside its log-probs, as the user gave them."""

    objective: Objective | RuleObjective
    advantages: Tensor
    mask: Tensor | None
    old_logprobs: Tensor | None
    ref_logprobs: Tensor | None
    importance_weights: Tensor | None
    cu_seqlens: Tensor | None
    normalizer: Tensor | float | None
    clip_bounds: tuple[Tensor, Tensor] | None = None
    nll_weights: Tensor | None = None
    cp_group: dist.ProcessGroup | None = None


def check_loss(given: LossInputs, leading: torch.Size, like: Tensor) -> None:
    """The objective and every number that a policy loss takes per token or per sequence."""
    objective = given.objective
    check_objective(objective)
    checks.check_mask(given.mask, leading, like)
    checks.check_normalizer(given.normalizer)
    checks.check_layout(leading, given.cu_seqlens, objective, like)
    _check_clip_bounds(given, leading, like)
    for name in ("old_logprobs", "ref_logprobs", "nll_weights"):
        value = getattr(given, name)
        if value is not None:
            checks.check_tensor(name, value, leading, like)
            checks.check_floating(name, value)
    for name in ("advantages", "importance_weights"):
        value = getattr(given, name)
        if value is not None or name == "advantages":
            split = given.cp_group is not None
            shape = (leading, given.cu_seqlens, like)
            checks.check_per_token_or_sequence(name, value, *shape, split=split)
    _check_cp_group(given, leading, like)
    if objective.kl_coef != 0 and given.ref_logprobs is None:
        raise ValueError(
            f"objective {objective.name!r} has kl_coef={objective.kl_coef} but ref_logprobs is "
            "None: pass the reference policy's log-probs, or set kl_coef=0"
        )
    takes_reference = objective.kl_coef != 0 or isinstance(objective, RuleObjective)
    if given.ref_logprobs is not None and not takes_reference:
        raise ValueError(
            f"ref_logprobs are given but objective {objective.name!r} has kl_coef=0 and would "
            "ignore them: set kl_coef, or pass ref_logprobs=None"
        )


def _check_clip_bounds(given: LossInputs, leading: torch.Size, like: Tensor) -> None:
    bounds = given.clip_bounds
    if bounds is None:
        return
    if not isinstance(bounds, tuple | list) or len(bounds) != 2:
        raise TypeError(
            f"clip_bounds is {type(bounds).__name__}, expected (low, high), two tensors of shape "
            f"{list(leading)}"
        )
    for name, bound in zip(("clip_bounds[0]", "clip_bounds[1]"), bounds, strict=True):
        checks.check_tensor(name, bound, leading, like)
        checks.check_floating(name, bound)
    if isinstance(given.objective, RuleObjective):
        raise ValueError(
            f"clip_bounds are given but the objective is a rule, {given.objective.name}: it clips "
            "as it likes; leave them None"
        )
    check_takes_clip_bounds(given.objective)
    if not checks.inspects_values(like):
        return
    ordered = bounds[0] <= bounds[1]
    if not (ordered if given.mask is None else ordered | ~given.mask.bool()).all():
        raise ValueError(
            "clip_bounds hold a low bound above the high one, or NaN, on an unmasked token: "
            "expected low <= r <= high, e.g. (0.8, 1.28)"
        )


def _check_cp_group(given: LossInputs, leading: torch.Size, like: Tensor) -> None:
    """A group over which the same sequences go on, and an objective that can add up over it."""
    group, objective = given.cp_group, given.objective
    checks.check_group("cp_group", group, "the tokens of every sequence are split")
    if group is None:
        return
    if isinstance(objective, RuleObjective) and objective.couples_sequences:
        raise ValueError(
            f"cp_group with the rule {objective.name}, which couples sequences and would see this "
            "rank's part of them: expected a built-in objective; or take linear_token_logprobs and "
            "add up over the group in a loss of your own"
        )
    if objective.needs_sequences:
        checks.check_same_sequences(group, leading, given.cu_seqlens, like)


def check_objective(objective: object) -> None:
    """objective: a fastpo.Objective."""
    if isinstance(objective, RuleObjective):
        return objective.check_signature()
    if isinstance(objective, Objective):
        return
    if callable(objective):
        name, kind = objective.__name__, "class" if objective is Objective else "preset"
        raise TypeError(
            f"objective is the {kind} {name} itself, expected what it returns: call it, "
            f"fastpo.{name}()"
        )
    raise TypeError(
        f"objective is {type(objective).__name__}, expected a fastpo.Objective, e.g. fastpo.dapo()"
        ", or a callable rule(logprobs, entropy, tokens)"
    )
