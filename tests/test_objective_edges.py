"""Edges of the specification that only rare inputs reach: clamps, fractional counts, signs."""

import math

import pytest
import torch

import fastpo
from fastpo.objective import Objective, token_loss, token_weights
from fastpo.segments import Segments

FP64 = torch.float64
THREE = Segments.padded(1, 3, torch.device("cpu"))


def numbers(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=FP64)


def vespo_phi(log_weight: float, k: float = 2.0, rate: float = 3.0) -> float:
    return math.exp(rate + k * log_weight - rate * math.exp(log_weight))


def vespo_gradient(d: torch.Tensor, objective=None, **weights) -> torch.Tensor:
    """c of three tokens with A = 1: minus phi of the sequence's weight."""
    logp = torch.full_like(d, -1).requires_grad_()
    terms = token_loss(
        objective or fastpo.vespo(),
        logp,
        torch.ones_like(d),
        old_logprobs=-1 - d,
        segments=THREE,
        **weights,
    )
    return torch.autograd.grad(terms.loss.sum(), logp)[0]


def test_vespo_rate_is_at_least_1e_4():
    """With lambda = 0 the weight would grow as W^k without a bound."""
    objective = fastpo.vespo(vespo_lambda_pos=0.0)
    grad = vespo_gradient(numbers(10, 0, 0), objective)
    torch.testing.assert_close(grad, numbers(*[-vespo_phi(10, rate=1e-4)] * 3), rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    "weights, log_weight",
    [
        ({"importance_weights": numbers(0, 1, 1)}, 6 + math.log(1e-8)),
        ({"sequence_weights": numbers(0)}, 6 + math.log(1e-8)),
        ({"importance_weights": numbers(math.exp(-12), math.exp(-14), 1)}, math.log(1e-8)),
    ],
    ids=["a token's", "the sequence's", "their sum"],
)
def test_vespo_log_weights_are_clamped_one_by_one_and_summed(weights, log_weight):
    """A weight of 0 counts as 1e-8, not as -inf that the rest cannot make up for."""
    grad = vespo_gradient(numbers(2, 2, 2), **weights)
    torch.testing.assert_close(grad, numbers(*[-vespo_phi(log_weight)] * 3), rtol=1e-12, atol=0)


def test_vespo_log_weights_are_clamped_from_above_too():
    objective = fastpo.vespo(vespo_lambda_pos=0.0)
    weights = numbers(math.exp(30), 1, 1)
    grad = vespo_gradient(numbers(-8, 0, 0), objective, importance_weights=weights)
    torch.testing.assert_close(grad, numbers(*[-vespo_phi(12, rate=1e-4)] * 3), rtol=1e-12, atol=0)


@pytest.mark.parametrize("half", [0.5, torch.tensor(0.5), torch.tensor(0.5, dtype=FP64)])
@pytest.mark.parametrize("aggregation", ["token_mean", "sequence_sum"])
def test_a_fractional_normalizer_is_not_rounded(aggregation, half):
    """A global count divided by the number of ranks, as verl passes it, may lie below 1."""
    weight = token_weights(
        Objective(aggregation=aggregation), None, THREE, normalizer=half, dtype=FP64
    )
    assert weight.tolist() == [2.0, 2.0, 2.0]


@pytest.mark.parametrize("estimator", ["k1", "k3", "k3+"])
def test_the_reported_kl_keeps_no_graph(estimator):
    """It lives as long as the metrics: a graph would keep every activation of the step."""
    logp = numbers(-1, -2, -0.5).requires_grad_()
    objective = fastpo.ppo(kl_coef=0.1, kl_estimator=estimator)
    terms = token_loss(objective, logp, numbers(1, 1, 1), ref_logprobs=numbers(-1.5, -1, -1))
    assert terms.loss.requires_grad
    assert not terms.kl.requires_grad and not terms.ratio.requires_grad


def test_old_kl_is_that_of_old_from_new():
    """k3 of KL(old || new), exp(d) - d - 1 at d = logp - old = 1: e - 2, and not e^-1."""
    old = torch.full((4,), -2.0)
    result = fastpo.policy_loss_from_logprobs(
        old + 1, torch.ones(4), objective=fastpo.ppo(), old_logprobs=old
    )
    torch.testing.assert_close(result.metrics["old_kl"], torch.tensor(4 * (math.e - 2)))
