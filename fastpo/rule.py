"""A loss of your own: `objective=` takes a callable, at the cost of a built-in sequence-level loss.

    def clipped(logprobs, entropy, tokens):
        ratio = (logprobs - tokens.old_logprobs).exp()
        gain = torch.min(ratio * tokens.advantages, ratio.clamp(0.8, 1.2) * tokens.advantages)
        return -gain - 0.001 * entropy

    fastpo.linear_policy_loss(hidden, weight, ids, advantages, objective=clipped, mask=mask)

It runs between the statistics of the rows and their gradient, on one number per token: 3 N V on
logits, and 6 N D V on hidden states, a chunk of tokens at a time, on every backend.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Integral
from typing import NamedTuple

import torch
from torch import Tensor

from fastpo.objective import AGGREGATIONS, Objective, is_finite, shown


class TokenInputs(NamedTuple):
    """What a rule gets beside log-probs and entropies: (n,) each, without gradient.

    Where the mask is False the numbers are harmless (A = 0, log-probs 0, weights 1), and what the
    rule returns is not used.
    """

    advantages: Tensor
    old_logprobs: Tensor
    """The detached log-probs themselves where the caller gave none: the ratio is 1."""
    ref_logprobs: Tensor | None
    importance_weights: Tensor | None
    mask: Tensor | None
    """bool; None = all."""
    sequence_ids: Tensor | None
    """Rising from 0; of a rule with `couples_sequences`, which gets whole sequences."""

    @property
    def old(self) -> Tensor:
        """`old_logprobs`"""
        return self.old_logprobs

    @property
    def ref(self) -> Tensor | None:
        """`ref_logprobs`"""
        return self.ref_logprobs

    @property
    def weights(self) -> Tensor | None:
        """`importance_weights`"""
        return self.importance_weights


LossRule = Callable[[Tensor, Tensor, TokenInputs], Tensor]


def loss_rule(
    *,
    aggregation: str = "token_mean",
    couples_sequences: bool = False,
    max_length: int | None = None,
) -> Callable[[LossRule], LossRule]:
    """Decorates `rule(logprobs, entropy, tokens) -> loss`, each (n,), for `objective=`.

    A callable without it is a token mean of losses that depend on their own token alone.

    Args:
        aggregation: how the per-token losses are weighted, as in `fastpo.Objective`.
        couples_sequences: a token's loss depends on other tokens of its sequence: the rule gets
            whole sequences, and `tokens.sequence_ids`. On hidden states that is 6 N D V where every
            sequence fits a chunk, else 8.
        max_length: what aggregation "constant" divides by beside B; with it alone.

    Raises:
        TypeError: a setting of the wrong type, or a method, which holds no settings.
        ValueError: an unknown aggregation, or a `max_length` that is not positive or not used.
    """
    if aggregation not in AGGREGATIONS:
        raise ValueError(
            f"aggregation is {aggregation!r}, expected one of {', '.join(AGGREGATIONS)}"
        )
    if not isinstance(couples_sequences, bool):
        raise TypeError(f"couples_sequences is {couples_sequences!r}, expected True or False")
    if max_length is not None:
        if isinstance(max_length, bool) or not isinstance(max_length, Integral):
            raise TypeError(f"max_length is {max_length!r}, expected a number of tokens, or None")
        if not (is_finite(max_length) and max_length > 0):
            raise ValueError(
                f"max_length is {shown(max_length)}, expected a positive number of tokens"
            )
        if aggregation != "constant":
            raise ValueError(
                f"max_length is {max_length} but has no meaning for aggregation={aggregation!r}; "
                "leave it None"
            )

    def decorate(rule: LossRule) -> LossRule:
        if inspect.ismethod(rule):
            raise TypeError(
                f"loss_rule on the method {rule.__name__} of an object, which holds no settings, "
                "expected a function: decorate it in its class, or wrap it in a lambda"
            )
        rule.aggregation = aggregation
        rule.couples_sequences = couples_sequences
        rule.max_length = max_length
        return rule

    return decorate


@dataclass(frozen=True, kw_only=True)
class RuleObjective:
    """A rule where an `Objective` is expected: what the ops ask of one."""

    rule: LossRule
    name: str
    aggregation: str
    couples_sequences: bool
    max_length: int | None
    kl_coef: float = 0.0
    kl_estimator: str = "k3"  # of the metric ref_kl
    kl_ratio_weighted: bool = False
    entropy_coef: float = 0.0
    is_token_level: bool = False  # no kernel knows it

    @classmethod
    def from_callable(cls, rule: LossRule) -> RuleObjective:
        """With what `loss_rule` left on it."""
        return cls(
            rule=rule,
            name=getattr(rule, "__name__", type(rule).__name__),
            aggregation=getattr(rule, "aggregation", "token_mean"),
            couples_sequences=getattr(rule, "couples_sequences", False),
            max_length=getattr(rule, "max_length", None),
        )

    @property
    def needs_sequences(self) -> bool:
        """See `fastpo.Objective`."""
        return self.couples_sequences or self.aggregation != "token_mean"

    def check_signature(self) -> None:
        """The rule can be called with its three arguments.

        Raises:
            TypeError: it takes fewer, or needs more.
        """
        if torch.compiler.is_compiling():
            return
        try:
            signature = inspect.signature(self.rule)
        except ValueError:  # something built in, which does not say
            return
        try:
            signature.bind(None, None, None)
        except TypeError as error:
            raise TypeError(
                f"objective is {self.name}{signature}, expected a rule that can be called with "
                f"(logprobs, entropy, tokens): {error}"
            ) from None

    def losses(self, logprobs: Tensor, entropy: Tensor | None, tokens: TokenInputs) -> Tensor:
        """The rule's per-token losses (n,), checked.

        Raises:
            TypeError, ValueError: it returned something else.
        """
        loss = self.rule(logprobs, entropy, tokens)
        expected = f"a floating tensor of shape {list(logprobs.shape)}, one loss per token"
        if not isinstance(loss, Tensor):
            raise TypeError(f"{self.name}() returned {type(loss).__name__}, expected {expected}")
        if loss.shape != logprobs.shape:
            raise ValueError(
                f"{self.name}() returned shape {list(loss.shape)}, expected {expected}: it is "
                "weighted and summed afterwards"
            )
        if not loss.dtype.is_floating_point:
            raise TypeError(f"{self.name}() returned dtype {loss.dtype}, expected {expected}")
        if logprobs.requires_grad and not loss.requires_grad:
            raise ValueError(
                f"{self.name}() returned a tensor without a graph, expected one that depends on "
                "logprobs or entropy: leave out detach(), no_grad() and item()"
            )
        return loss.to(logprobs.dtype)

    def check_depends_only_on(self, loss: Tensor, *outputs: Tensor) -> None:
        """Refuse parameters of the rule's own where their gradient would be lost.

        Raises:
            ValueError: the graph of `loss` ends in another leaf than `outputs`.
        """
        known, seen = {id(x) for x in outputs}, set()
        waiting = [loss.grad_fn]
        while waiting:
            node = waiting.pop()
            if node is None or node in seen:
                continue
            seen.add(node)
            variable = getattr(node, "variable", None)
            if variable is not None and id(variable) not in known:
                raise ValueError(
                    f"{self.name}() uses a tensor of shape {list(variable.shape)} that requires a "
                    "gradient, which this way would lose: detach it, or use linear_token_logprobs "
                    "and a loss of plain torch"
                )
            waiting += [next_node for next_node, _ in node.next_functions]


def as_objective(objective: object) -> object:
    """An Objective as it is, a rule as a `RuleObjective`; anything else for others to refuse."""
    if isinstance(objective, Objective) or objective is Objective or not callable(objective):
        return objective
    if getattr(objective, "__module__", "") == "fastpo.presets":
        return objective  # a preset that was not called
    return RuleObjective.from_callable(objective)
