"""A callable as the objective: the same numbers as the built-in loss that it writes out, at the
cost of one pass, and a refusal of everything that would train something else."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import fastpo
from fastpo import backends
from fastpo.testing.linear import LinearCase

BACKENDS = [
    pytest.param(name, marks=pytest.mark.slow if name == "triton" else ())  # interpreted
    for name in ("torch", "cpp", "triton")
    if backends.unavailable(name) is None
]


def ratio_of(logprobs, tokens):
    return (logprobs - tokens.old_logprobs).clamp(-20, 20).exp()


def dapo(logprobs, entropy, tokens):
    ratio, advantages = ratio_of(logprobs, tokens), tokens.advantages
    if tokens.importance_weights is not None:
        advantages = advantages * tokens.importance_weights
    return -torch.min(ratio * advantages, ratio.clamp(0.8, 1.28) * advantages)


def with_kl_and_entropy(logprobs, entropy, tokens):
    inverse = tokens.ref - logprobs
    return dapo(logprobs, entropy, tokens) + 0.1 * (inverse.expm1() - inverse) - 0.05 * entropy


@fastpo.loss_rule(aggregation="sequence_mean", couples_sequences=True)
def gspo(logprobs, entropy, tokens):
    mask = torch.ones_like(logprobs) if tokens.mask is None else tokens.mask.to(logprobs.dtype)
    count = int(tokens.sequence_ids.max()) + 1

    def mean(x):
        zeros = torch.zeros(count, dtype=x.dtype)
        total = zeros.index_add(0, tokens.sequence_ids, x * mask)
        return (total / zeros.index_add(0, tokens.sequence_ids, mask).clamp(min=1))[
            tokens.sequence_ids
        ]

    ratio = mean(logprobs - tokens.old).exp()
    return -torch.min(ratio * tokens.advantages, ratio.clamp(0.5, 4.0) * tokens.advantages)


RULES = {
    "dapo": (dapo, fastpo.dapo()),
    "everything": (with_kl_and_entropy, fastpo.dapo(kl_coef=0.1, entropy_coef=0.05)),
    "gspo": (gspo, fastpo.gspo(clip_low=0.5, clip_high=3.0)),
}


def close(got, expected, skip=()):
    for name in ("loss", "logprobs", "entropy"):
        torch.testing.assert_close(getattr(got[0], name), getattr(expected[0], name))
    for grad, other in zip(got[1], expected[1], strict=True):
        assert (grad - other).norm() <= 3e-6 * other.norm()
    for name, value in expected[0].metrics.items():
        if name not in skip and not name.startswith("clip"):  # a rule says nothing of clips
            torch.testing.assert_close(got[0].metrics[name], value, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("chunk_tokens", [None, 30, 8])
@pytest.mark.parametrize("name", RULES)
def test_equals_the_loss_it_writes_out_on_hidden_states(name, chunk_tokens, backend):
    rule, objective = RULES[name]
    case = LinearCase.random(bias=True, softcap=4.0)
    extra = {"chunk_tokens": chunk_tokens, "backend": backend}
    if name != "everything":
        extra["normalizer"] = 17.0
    if objective.kl_coef:
        extra["ref_logprobs"] = case.ref_logprobs
    skip = ("ratio",) if name == "gspo" else ()  # the sequence's; a rule has each token's own
    close(case.fused(rule_as_objective(rule), **extra), case.fused(objective, **extra), skip)


class rule_as_objective:
    """`LinearCase.options` asks an objective for its kl_coef."""

    kl_coef = 0.0

    def __init__(self, rule):
        self.rule = rule
        for name in ("aggregation", "couples_sequences", "max_length"):
            if hasattr(rule, name):
                setattr(self, name, getattr(rule, name))

    def __call__(self, logprobs, entropy, tokens):
        return self.rule(logprobs, entropy, tokens)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", RULES)
def test_equals_the_loss_it_writes_out_on_logits_and_logprobs(name, backend):
    rule, objective = RULES[name]
    case = LinearCase.random()
    options = case.options(objective) | {"importance_weights": torch.rand(3) + 0.5}
    if name == "gspo":  # it leaves them out
        del options["importance_weights"]
    results = []
    for each in (rule, objective):
        logits = (case.hidden @ case.weight.t()).requires_grad_()
        given = options | {"objective": each}
        result = fastpo.policy_loss(logits, case.tokens, case.advantages, backend=backend, **given)
        results.append((result, torch.autograd.grad(result.loss, [logits])))
        logprobs = case.old_logprobs.clone().requires_grad_()
        alone = fastpo.policy_loss_from_logprobs(
            logprobs, case.advantages, entropy=torch.ones(3, 21), **given
        )
        results.append((alone, torch.autograd.grad(alone.loss, [logprobs])))
    skip = ("ratio",) if name == "gspo" else ()
    close(results[0], results[2], skip)
    close(results[1], results[3], skip)


@pytest.mark.parametrize("chunk_tokens", [None, 8])
def test_weights_per_sequence_reach_a_rule(chunk_tokens):
    """A chunk knows no sequences: there they are weights per token."""
    case = LinearCase.random()
    weights = torch.tensor([0.5, 2.0, 0.0])
    options = {"mask": case.mask, "old_logprobs": case.old_logprobs, "importance_weights": weights}
    losses = [
        fastpo.linear_policy_loss(
            case.hidden,
            case.weight,
            case.tokens,
            case.advantages,
            objective=objective,
            chunk_tokens=chunk_tokens,
            **options,
        ).loss
        for objective in (dapo, fastpo.dapo())
    ]
    torch.testing.assert_close(*losses)


@pytest.mark.parametrize(("name", "chunk_tokens", "gemms"), [("dapo", 32, 3), ("gspo", 64, 3)])
def test_costs_one_pass(name, chunk_tokens, gemms):
    """6 N D V, as a built-in loss of its kind."""
    case = LinearCase.random(shape=(2, 64), width=16, vocabulary=300)
    hidden, weight = case.leaves()
    with FlopCounterMode(display=False) as counter:
        fastpo.linear_policy_loss(
            hidden,
            weight,
            case.tokens,
            torch.ones(2),
            objective=RULES[name][0],
            old_logprobs=case.old_logprobs,
            chunk_tokens=chunk_tokens,
        ).loss.backward()
    assert counter.get_total_flops() == 2 * gemms * 128 * 16 * 300


@pytest.mark.parametrize("name", RULES)
def test_masked_slots_may_hold_anything(name, monkeypatch):
    """REGRESSIONS 17: whatever the rule makes of it, in rows that enter the GEMMs too."""
    from fastpo.ops import linear
    from fastpo.ops.linear_chunks import LinearCall

    rule, objective = RULES[name]
    case = LinearCase.random()
    ref = {"ref_logprobs": case.ref_logprobs} if objective.kl_coef else {}
    expected = case.fused(rule_as_objective(rule), **ref)
    dead = ~case.mask
    for tensor in (case.hidden, case.old_logprobs, case.ref_logprobs, case.advantages):
        tensor[dead] = torch.nan
    close(case.fused(rule_as_objective(rule), **ref), expected)
    monkeypatch.setattr(linear, "unmasked_rows", lambda *_: (None, None))
    monkeypatch.setattr(LinearCall, "reads_values", False)
    close(case.fused(rule_as_objective(rule), **ref), expected)


def test_gradients_through_log_probs_and_entropy():
    """REGRESSIONS 7: of a rule that multiplies them, against autograd over all logits in fp64."""
    case = replace(LinearCase.random(dtype=torch.float64, bias=True), mask=None)
    leaves = case.leaves()
    logprobs, entropy = case.eager_logprobs(torch.float64, leaves)
    exact = torch.autograd.grad((logprobs.square() * entropy).mean(), leaves)
    hidden, weight, bias = leaves = case.leaves()
    loss = fastpo.linear_policy_loss(
        hidden,
        weight,
        case.tokens,
        case.advantages,
        bias=bias,
        objective=lambda logp, entropy, tokens: logp.square() * entropy,
        chunk_tokens=16,
    ).loss
    for grad, other in zip(torch.autograd.grad(loss, leaves), exact, strict=True):
        assert (grad - other).norm() < 1e-12 * other.norm()


def test_compiles_on_logits():
    case = LinearCase.random()
    options = case.options(fastpo.dapo()) | {"objective": dapo}
    logits = (case.hidden @ case.weight.t()).requires_grad_()

    def step(logits):
        return fastpo.policy_loss(logits, case.tokens, case.advantages, **options).loss

    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    grads = [torch.autograd.grad(each(logits), logits)[0] for each in (step, compiled)]
    torch.testing.assert_close(*grads)


PARAMETER = torch.ones(1, requires_grad=True)
WRONG = {
    "a number": (lambda p, h, t: 0.5, TypeError, "returned float, expected a floating tensor"),
    "a mean": (
        lambda p, h, t: p.mean(),
        ValueError,
        r"returned shape \[\], expected .*one loss per",
    ),
    "a mask": (lambda p, h, t: p > 0, TypeError, "returned dtype torch.bool, expected"),
    "no graph": (lambda p, h, t: p.detach(), ValueError, r"without a graph.*leave out detach\(\)"),
    "two arguments": (lambda p, h: p, TypeError, r"\(p, h\), expected a rule .*too many"),
    "four arguments": (lambda p, h, t, x: p, TypeError, r"expected a rule .*missing.*'x'"),
    "a parameter": (lambda p, h, t: p * PARAMETER, ValueError, "that requires a gradient, which"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_rules_are_refused_in_a_line(case):
    rule, error, message = WRONG[case]
    data = LinearCase.random()
    hidden, weight = data.leaves()
    with pytest.raises(error, match=message) as caught:
        fastpo.linear_policy_loss(hidden, weight, data.tokens, data.advantages, objective=rule)
    assert "\n" not in str(caught.value)
    if case != "a parameter":
        with pytest.raises(error, match=message):
            logits = hidden @ weight.t()
            fastpo.policy_loss(logits, data.tokens, data.advantages, objective=rule)


def test_a_parameter_of_the_rule_trains_where_autograd_runs_through():
    logprobs, weight = -torch.rand(4), torch.ones(1, requires_grad=True)
    loss = fastpo.policy_loss_from_logprobs(
        logprobs, torch.ones(4), objective=lambda p, h, t: -t.advantages * p * weight
    ).loss
    loss.backward()
    assert weight.grad is not None and weight.grad != 0


class Adder:
    def append(self, logprobs, entropy, tokens):
        return logprobs


def test_what_a_rule_cannot_have():
    with pytest.raises(ValueError, match="aggregation is 'mean', expected one of"):
        fastpo.loss_rule(aggregation="mean")
    for options, error in (
        ({"max_length": "9"}, TypeError),
        ({"max_length": 0}, ValueError),
        ({"couples_sequences": "no"}, TypeError),
        ({"max_length": 9, "aggregation": "sequence_sum"}, ValueError),
    ):
        with pytest.raises(error, match=rf"{next(iter(options))} is .*(, expected|no meaning)"):
            fastpo.loss_rule(**options)
    with pytest.raises(TypeError, match="loss_rule on the method append of an object"):
        fastpo.loss_rule()(Adder().append)
    with pytest.raises(TypeError, match="is the class Objective itself, expected what it returns"):
        fastpo.policy_loss_from_logprobs(torch.zeros(4), torch.ones(4), objective=fastpo.Objective)
    with pytest.raises(ValueError, match=r"gspo.*needs to know the sequences"):
        fastpo.policy_loss_from_logprobs(torch.zeros(4), torch.ones(4), objective=gspo)
    bounds = (torch.zeros(4), torch.ones(4))
    with pytest.raises(ValueError, match="clip_bounds are given but the objective is a rule, dapo"):
        fastpo.policy_loss_from_logprobs(
            torch.zeros(4), torch.ones(4), objective=dapo, clip_bounds=bounds
        )


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("chunk_tokens", [None, 3])
def test_a_rule_that_writes_into_what_it_gets_changes_nobody_elses(chunk_tokens, masked):
    """In-place arithmetic is the rule's own business: the caller's tensors, the returned log-probs
    and the metrics stay what they are, with a mask or without."""

    def in_place(logprobs, entropy, tokens):
        tokens.advantages.mul_(-2)
        if tokens.mask is not None:
            tokens.mask.logical_not_()
        tokens.old.zero_()
        return logprobs.mul_(entropy.add_(1)) * tokens.advantages

    def out_of_place(logprobs, entropy, tokens):
        return logprobs * (entropy + 1) * (-2 * tokens.advantages)

    case = LinearCase.random()
    mask = case.mask if masked else None
    results, slopes = [], []
    for rule in (in_place, out_of_place):
        hidden, weight = case.leaves()
        given = [x.clone() for x in (case.advantages, case.old_logprobs, case.mask)]
        options = {"objective": rule, "old_logprobs": given[1], "chunk_tokens": chunk_tokens}
        options["mask"] = given[2] if masked else None
        result = fastpo.linear_policy_loss(hidden, weight, case.tokens, given[0], **options)
        result.loss.backward()
        for x, y in zip(given, (case.advantages, case.old_logprobs, case.mask), strict=True):
            assert torch.equal(x, y)
        results.append(result)
        slopes.append(hidden.grad)
        logprobs = result.logprobs.clone().requires_grad_()
        two_step = fastpo.policy_loss_from_logprobs(
            logprobs * 1, case.advantages, objective=rule, entropy=result.entropy, mask=mask
        )
        assert torch.equal(two_step.logprobs, result.logprobs)
    assert torch.equal(*slopes) and torch.equal(results[0].logprobs, results[1].logprobs)
    assert results[0].metrics == results[1].metrics


def test_on_policy_ratio_is_one_and_keeps_its_gradient():
    case = replace(LinearCase.random(), mask=None)
    hidden, weight = case.leaves()
    result = fastpo.linear_policy_loss(hidden, weight, case.tokens, case.advantages, objective=dapo)
    assert torch.equal(result.metrics["ratio"], result.metrics["tokens"])
    result.loss.backward()
    assert hidden.grad.norm() > 0
