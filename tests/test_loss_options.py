"""`clip_bounds` and `nll_weights` through every op and backend: one computation, whichever way."""

from __future__ import annotations

import pytest
import torch

import fastpo
from fastpo import backends
from fastpo.testing.budget import assert_within_budget

BACKENDS = [
    pytest.param(name, marks=pytest.mark.slow if name == "triton" else ())  # interpreted
    for name in ("torch", "cpp", "triton")
    if backends.unavailable(name) is None
]
B, T, D, V = 4, 6, 16, 97
OBJECTIVES = {
    "dapo": fastpo.dapo(ratio_max=4.0),
    "cispo": fastpo.cispo(),
    "ce_gppo": fastpo.ce_gppo(),
    "gspo": fastpo.gspo(),
    "gspo_token": fastpo.gspo_token(),
    "sapo": fastpo.sapo(),
    "gmpo": fastpo.gmpo(),
    "ipo": fastpo.ipo(kl_coef=0.1),
}


class Case:
    """Hidden states and a head, old = logp + N(0, 0.2); every third token has A = 0."""

    def __init__(self, objective: fastpo.Objective):
        gen = torch.Generator().manual_seed(9)

        def normal(*shape):
            return torch.randn(*shape, generator=gen)

        self.objective = objective
        self.hidden, self.head = normal(B, T, D), normal(V, D)
        self.tokens = torch.randint(0, V, (B, T), generator=gen)
        self.advantages = normal(B, T)
        self.advantages[:, ::3] = 0
        self.mask = torch.rand(B, T, generator=gen) > 0.2
        self.mask[2] = False
        logp = self.logprobs(torch.float64)[0].float()
        width = 0.01 + 0.25 * torch.rand(B, T, generator=gen)
        self.options = {
            "objective": objective,
            "mask": self.mask,
            "old_logprobs": logp + 0.2 * normal(B, T),
            "ref_logprobs": logp + 0.2 * normal(B, T) if objective.kl_coef else None,
            "nll_weights": torch.rand(B, T, generator=gen),
        }
        if objective.takes_clip_bounds:
            self.options["clip_bounds"] = (1 - width, 1 + width)

    def logprobs(self, dtype, hidden=None, head=None):
        hidden = self.hidden.to(dtype) if hidden is None else hidden
        head = self.head.to(dtype) if head is None else head
        table = (hidden @ head.T).log_softmax(-1)
        return table.gather(-1, self.tokens[..., None])[..., 0], table

    def spec(self, dtype=torch.float64):
        """Eager log-softmax, the specification, autograd: loss, gradients of hidden and head."""
        leaves = [x.to(dtype).requires_grad_() for x in (self.hidden, self.head)]
        logprobs, _ = self.logprobs(dtype, *leaves)
        loss = fastpo.policy_loss_from_logprobs(logprobs, self.advantages, **self.options).loss
        return loss.detach(), *torch.autograd.grad(loss, leaves)

    def run(self, op: str, backend: str):
        leaves = [x.clone().requires_grad_() for x in (self.hidden, self.head)]
        where, options = (self.tokens, self.advantages), {"backend": backend, **self.options}
        if op == "policy_loss":
            result = fastpo.policy_loss(leaves[0] @ leaves[1].T, *where, **options)
        elif op == "two steps":
            two = fastpo.linear_token_logprobs(
                *leaves, self.tokens, mask=self.mask, backend=options.pop("backend")
            )
            result = fastpo.policy_loss_from_logprobs(two.logprobs, self.advantages, **options)
        else:
            chunk = 3 if op == "small chunks" else None
            result = fastpo.linear_policy_loss(*leaves, *where, chunk_tokens=chunk, **options)
        return result, result.loss.detach(), *torch.autograd.grad(result.loss, leaves)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("op", ["policy_loss", "two steps", "linear_policy_loss", "small chunks"])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_way_is_the_specification(name, op, backend):
    """REGRESSIONS 3, 4: fused == two steps for these options too; A = 0 keeps its NLL gradient."""
    case = Case(OBJECTIVES[name])
    exact, plain = case.spec(), case.spec(torch.float32)
    result, *got = case.run(op, backend)
    torch.testing.assert_close(got[0], exact[0].float())  # one number: its baseline may be lucky
    for i, label in enumerate(("hidden", "head"), start=1):
        assert_within_budget(got[i], exact[i], plain[i], factor=4, name=label)
    steps, *_ = case.run("two steps", backend)
    for key, value in result.metrics.items():
        if key in steps.metrics:
            torch.testing.assert_close(value, steps.metrics[key], msg=key)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_options_matter(name):
    """Dropping either changes the gradient: the comparison above is no comparison of zeros."""
    case = Case(OBJECTIVES[name])
    whole = case.spec()
    for option in ("clip_bounds", "nll_weights"):
        if option in case.options:
            without = Case(OBJECTIVES[name])
            del without.options[option]
            assert not torch.allclose(whole[1], without.spec()[1]), option


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("op", ["policy_loss", "linear_policy_loss"])
def test_masked_slots_may_hold_anything(op, backend):
    """REGRESSIONS 17."""
    clean, dirty = Case(OBJECTIVES["ce_gppo"]), Case(OBJECTIVES["ce_gppo"])
    dirty.options["nll_weights"] = dirty.options["nll_weights"].masked_fill(~dirty.mask, torch.nan)
    dirty.options["clip_bounds"] = tuple(
        x.masked_fill(~dirty.mask, torch.nan) for x in dirty.options["clip_bounds"]
    )
    for x, y in zip(clean.run(op, backend)[1:], dirty.run(op, backend)[1:], strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("op", ["policy_loss", "two steps", "linear_policy_loss"])
@pytest.mark.parametrize(
    "options, error, words",
    [
        ({"clip_bounds": torch.ones(B, T)}, TypeError, r"clip_bounds is Tensor.*\(low, high\)"),
        ({"clip_bounds": (0.8, 1.2)}, TypeError, r"clip_bounds\[0\] is float"),
        ({"clip_bounds": (torch.ones(B), torch.ones(B))}, ValueError, r"clip_bounds\[0\].*shape"),
        ({"clip_bounds": (torch.ones(B, T),) * 3}, TypeError, "clip_bounds is tuple"),
        (
            {"clip_bounds": (torch.full((B, T), 1.2), torch.full((B, T), 0.8))},
            ValueError,
            "low bound above the high one",
        ),
        ({"objective": fastpo.sapo()}, ValueError, "sapo.*no bounds on r"),
        ({"nll_weights": torch.ones(B)}, ValueError, "nll_weights has shape"),
        ({"nll_weights": torch.ones(B, T).long()}, TypeError, "nll_weights.*floating"),
    ],
)
def test_refusals(options, error, words, op):
    case = Case(OBJECTIVES["dapo"])
    case.options |= options
    with pytest.raises(error, match=words):
        case.run(op, "torch")
