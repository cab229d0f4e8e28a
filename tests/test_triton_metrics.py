"""The sums of the metrics in one kernel, against the table in plain torch."""

from __future__ import annotations

import pytest
import torch

from fastpo.backends import triton as triton_rows
from fastpo.backends.metrics import METRICS, MetricInputs, metric_sums
from fastpo.objective import KL_ESTIMATORS, Objective
from fastpo.testing.budget import assert_within_budget

pytestmark = pytest.mark.usefixtures("poisoned_empty", "triton_backend")


def random_inputs(count: int, device, *, spread: float = 0.5, **given) -> MetricInputs:
    """Everything but ratio and ref_kl, which `given` may hold; NaN in the masked slots."""
    generator = torch.Generator().manual_seed(count)

    def random() -> torch.Tensor:
        return torch.randn(count, generator=generator)

    mask = random() > -0.5
    logprobs, clipped = -random().abs(), (random() * 3).clamp(0, 7).to(torch.uint8)
    numbers = [logprobs, random().abs(), logprobs + spread * random(), logprobs + spread * random()]
    logprobs, entropy, old, ref = (x.masked_fill(~mask, torch.nan).to(device) for x in numbers)
    inputs = MetricInputs(
        logprobs, entropy, clipped.to(device), mask.to(device), old, ref, None, None
    )
    return inputs._replace(**given)


def check(inputs: MetricInputs, objective: Objective) -> None:
    """Against the specification in float64; what is not given is left out of both.

    Of five prefixes of the tokens, as one vector: a single sum in float32 may be exact by luck.
    """
    names = [name for name in METRICS if name != "entropy" or inputs.entropy is not None]
    names = [name for name in names if name != "ref_kl" or inputs.ref_logprobs is not None]
    found, exact, plain = [], [], []
    for part in range(1, 6):
        some = inputs._replace(
            **{
                name: x[: -(-len(x) * part // 5)]
                for name, x in inputs._asdict().items()
                if x is not None
            }
        )
        wide = [x.double() if x is not None and x.is_floating_point() else x for x in some]
        exact.append(metric_sums(MetricInputs(*wide), objective))
        plain.append(metric_sums(some, objective))
        sums = triton_rows.metric_sums(some, objective)
        found.append(sums[[METRICS.index(name) for name in names]])
    columns = [torch.stack(x).T for x in (found, exact, plain)]
    for name, *values in zip(names, *columns, strict=True):
        assert_within_budget(*values, factor=4, name=name)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("estimator", KL_ESTIMATORS)
def test_every_estimator_over_several_programs(estimator, weighted, device):
    objective = Objective(kl_coef=0.1, kl_estimator=estimator, kl_ratio_weighted=weighted)
    check(random_inputs(2500, device), objective)


@pytest.mark.parametrize("count", [1, 1023, 1024, 1025])
def test_sizes_and_what_may_be_missing(count, device):
    objective = Objective()
    inputs = random_inputs(count, device)
    check(inputs, objective)
    whole = MetricInputs(*(None if x is None else x.nan_to_num(0.5) for x in inputs))
    check(whole._replace(mask=None, entropy=None), objective)
    check(whole._replace(mask=None, old_logprobs=None, ref_logprobs=None), objective)
    given = {"ratio": inputs.entropy + 1, "ref_kl": inputs.entropy * 0.1}  # GSPO brings its own
    check(inputs._replace(**given), objective)


@pytest.mark.parametrize("spread", [1e-4, 1e-2, 3.0, 40.0])
def test_small_and_huge_log_ratios(spread, device):
    """exp(x) - 1 - x is all rounding error near 0, and is clamped at 20."""
    check(random_inputs(300, device, spread=spread), Objective())


def test_no_tokens(device):
    assert torch.equal(
        triton_rows.metric_sums(random_inputs(0, device), Objective()),
        torch.zeros(len(METRICS), device=device),
    )


def test_nan_of_an_unmasked_token_shows(device):
    """And only where it has a part: the counts stay."""
    inputs = random_inputs(1500, device)
    row = inputs.mask.nonzero()[-1, 0]
    inputs.logprobs[row] = torch.nan
    sums = triton_rows.metric_sums(inputs, Objective())
    nan = {name for name, x in zip(METRICS, sums, strict=True) if x.isnan()}
    assert nan == {"ratio", "old_kl", "ref_kl"}


def test_the_same_bits_in_every_run(device):
    inputs = random_inputs(5000, device)
    first = triton_rows.metric_sums(inputs, Objective())
    assert all(torch.equal(triton_rows.metric_sums(inputs, Objective()), first) for _ in range(3))
