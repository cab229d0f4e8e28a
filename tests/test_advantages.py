"""Group advantages: the plain torch specification and the compiled operator against naive loops."""

from __future__ import annotations

import math
from collections import defaultdict
from functools import partial

import pytest
import torch

import fastpo
from fastpo import advantages
from fastpo.advantages import ESTIMATORS, num_excluded

pytestmark = pytest.mark.usefixtures("implementation")

EPS = 1e-6
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
INTEGERS = [torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64]


def naive(rewards, ids, estimator, lengths=None, eps=EPS):
    """The definitions, one Python float at a time, in the textbook's own form."""
    groups = defaultdict(list)
    for i, key in enumerate(ids):
        if math.isfinite(rewards[i]):
            groups[key].append(i)
    centered = {}
    for members in groups.values():
        mean = math.fsum(rewards[i] for i in members) / len(members)
        centered |= {i: rewards[i] - mean for i in members}
    batch = math.sqrt(math.fsum(x * x for x in centered.values()) / max(len(centered) - 1, 1))
    out = [0.0] * len(rewards)
    for members in groups.values():
        mine = [rewards[i] for i in members]
        if len(set(mine)) < 2:
            continue
        std = math.sqrt(math.fsum(centered[i] ** 2 for i in members) / (len(members) - 1))
        best, second = sorted(mine)[-1], sorted(mine)[-2]
        weights = [1.0 if lengths is None else float(lengths[i]) for i in members]
        weighted = math.fsum(w * r for w, r in zip(weights, mine, strict=True))
        for i in members:
            others = (math.fsum(mine) - rewards[i]) / (len(mine) - 1)
            out[i] = {
                "grpo": centered[i] / (std + eps),
                "dr_grpo": centered[i],
                "rloo": rewards[i] - others,
                "opo": rewards[i] - weighted / (math.fsum(weights) or 1.0),
                "passk": (best - second) / (std + eps) if rewards[i] == best else 0.0,
                "reinforce_pp": centered[i] / (batch + eps),
                "maxrl": centered[i] / (math.fsum(mine) / len(mine) + eps),
            }[estimator]
    return out


def taken(rewards, estimator):
    """What an estimator takes: maxrl no rewards below 0."""
    return rewards.abs() if estimator == "maxrl" else rewards


def check(rewards, ids, estimator, **options):
    """`group_advantages` against the loops; returns its result."""
    result = fastpo.group_advantages(rewards, group_ids=ids, estimator=estimator, **options)
    exact = naive(rewards.double().tolist(), ids.tolist(), estimator, options.get("lengths"))
    expected = torch.tensor(exact, dtype=torch.float64).float()
    torch.testing.assert_close(result.advantages, expected, rtol=3e-7, atol=1e-8)
    return result


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_any_layout_of_groups(estimator):
    """Permuted, interleaved, uneven groups, groups of one, any ids (REGRESSIONS row 22)."""
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        count = int(torch.randint(1, 200, (), generator=generator))
        rewards = taken(torch.randn(count, generator=generator), estimator)
        ids = torch.randint(-9, 9, (count,), generator=generator) * 2**58
        result = check(rewards, ids, estimator)
        shuffle = torch.randperm(count, generator=generator)
        again = check(rewards[shuffle], ids[shuffle], estimator)
        torch.testing.assert_close(again.advantages, result.advantages[shuffle])
        assert torch.equal(again.informative, result.informative[shuffle])
        assert again.num_informative == result.num_informative


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_group_size_is_consecutive_ids(estimator):
    rewards = taken(torch.randn(24), estimator)
    by_size = fastpo.group_advantages(rewards, group_size=6, estimator=estimator)
    ids = torch.arange(24) // 6
    by_ids = fastpo.group_advantages(rewards, group_ids=ids.int(), estimator=estimator)
    for a, b in zip(by_size, by_ids, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("value", [0.35, 0.4, 1e6 + 0.1, -1e-30, 0.0])
def test_equal_rewards_give_exactly_zero(value, estimator):
    """sqrt(E[x^2] - E[x]^2) leaves 1e-4, which eps then magnifies (REGRESSIONS row 11)."""
    for dtype in DTYPES:
        rewards = taken(torch.full((21,), value, dtype=torch.float64).to(dtype), estimator)
        result = fastpo.group_advantages(rewards, group_size=7, estimator=estimator)
        assert not result.advantages.any() and not result.informative.any()
        assert result.num_informative == 0


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("offset", [0.0, 1.0, 1e6])
def test_tiny_spreads(offset, estimator):
    """No floor under the variance, no cancellation (REGRESSIONS row 12)."""
    rewards = offset + torch.tensor([1.0, 2, 4, 7, 3, 3], dtype=torch.float64) * 2.0**-20
    check(rewards, torch.tensor([0, 0, 0, 0, 1, 1]), estimator)


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_reward_that_is_no_number_is_left_out(bad, estimator):
    """It must not poison its group (REGRESSIONS row 23)."""
    ids = torch.tensor([0, 1, 0, 1, 0, 1, 2, 2, 3])
    rewards = torch.tensor([1.0, 0.0, 0.5, 1.0, bad, 0.25, bad, 0.5, bad])
    result = check(rewards, ids, estimator)
    kept = rewards.isfinite()
    alone = fastpo.group_advantages(rewards[kept], group_ids=ids[kept], estimator=estimator)
    assert torch.equal(result.advantages[kept], alone.advantages)
    assert (result.advantages[~kept] == 0).all() and not result.informative[~kept].any()
    assert result.informative.tolist() == [True, True, True, True, False, True, False, False, False]
    assert result.num_informative == 2 and num_excluded(rewards) == 3


@pytest.mark.parametrize("dtype", [*DTYPES, *INTEGERS])
def test_reward_types(dtype):
    rewards = torch.tensor([1, 0, 0, 1, 1, 1, 1, 1, 0, 0, 0, 1]).to(dtype)
    result = check(rewards, torch.arange(12) // 4, "grpo")
    assert result.advantages.dtype == torch.float32
    assert result.informative.dtype == torch.bool
    assert result.num_informative.dtype == torch.int64 and result.num_informative.dim() == 0
    assert result.informative.tolist() == [True] * 4 + [False] * 4 + [True] * 4
    assert result.num_informative == 2


def test_opo_weighs_by_length():
    rewards, ids = torch.randn(40), torch.randint(0, 5, (40,))
    check(rewards, ids, "opo", lengths=torch.randint(1, 900, (40,)))
    alike = fastpo.group_advantages(
        rewards, group_ids=ids, estimator="opo", lengths=torch.full((40,), 7)
    )
    plain = fastpo.group_advantages(rewards, group_ids=ids, estimator="dr_grpo")
    torch.testing.assert_close(alike.advantages, plain.advantages)
    empty = fastpo.group_advantages(
        rewards, group_ids=ids, estimator="opo", lengths=torch.zeros(40)
    )
    torch.testing.assert_close(empty.advantages, plain.advantages)


def test_passk_credits_one_best_sample():
    rewards = torch.tensor([3.0, 1, 2, 3, 3, 0, 5])
    result = check(rewards, torch.tensor([0, 0, 0, 1, 1, 1, 2]), "passk")
    assert result.advantages[0] > 0 and result.advantages.count_nonzero() == 1


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_an_empty_batch(estimator):
    for groups in ({"group_size": 8}, {"group_ids": torch.zeros(0, dtype=torch.long)}):
        result = fastpo.group_advantages(torch.zeros(0), estimator=estimator, **groups)
        assert result.advantages.shape == result.informative.shape == (0,)
        assert result.num_informative == 0


def test_strided_inputs_and_no_graph():
    rewards = torch.randn(12, 2, requires_grad=True)[:, 0]
    ids = (torch.arange(24) // 8)[::2]
    result = fastpo.group_advantages(rewards, group_ids=ids)
    assert not result.advantages.requires_grad
    again = fastpo.group_advantages(rewards.detach().clone(), group_ids=ids.clone())
    assert torch.equal(result.advantages, again.advantages)


def test_implementations_equal_the_specification(implementation):
    """They share their arithmetic up to the order of sums: one reward or three, whitened or not."""
    if implementation == "specified":
        pytest.skip("it is what the others are compared with")
    generator = torch.Generator().manual_seed(0)
    for trial in range(30):
        rewards = torch.randint(-3, 3, (60, 3), generator=generator) / 3
        rewards[torch.randint(0, 60, (4,), generator=generator)] = math.nan
        rewards[torch.randint(0, 60, (9,), generator=generator), 1] = math.nan
        ids = torch.randint(0, 9, (60,), generator=generator)
        lengths = torch.randint(0, 5, (60,), generator=generator)
        several, whiten = trial % 2 == 0, trial % 3 == 0
        rewards, weights = (
            (rewards, torch.tensor([1.0, 0.3, -2.0])) if several else (rewards[:, 0], None)
        )
        for estimator in ESTIMATORS:
            sizes = lengths if estimator in ("opo", "reinforce_pp") and trial % 4 else None
            options = {"lengths": sizes, "weights": weights, "whiten": whiten}
            own = taken(rewards, estimator)
            got = fastpo.group_advantages(own, group_ids=ids, estimator=estimator, **options)
            want = advantages._specified(own, ids, estimator, EPS, **options)
            torch.testing.assert_close(got.advantages, want.advantages, rtol=1e-6, atol=1e-7)
            assert torch.equal(got.informative, want.informative)
            assert got.num_informative == want.num_informative


def test_operator_passes_opcheck_and_compiles(implementation):
    if implementation != "compiled":
        pytest.skip("it is about the operator")
    weights = torch.ones(2, dtype=torch.float64)
    for arguments in (
        (torch.randn(12), 4, None, 0, EPS, None),
        (torch.randn(12, 2), 4, None, 0, EPS, None, weights, True),
    ):
        torch.library.opcheck(torch.ops.fastpo.group_advantages.default, arguments)
    rewards, ids = torch.randn(12), torch.arange(12) % 3
    for options in ({"group_size": 4}, {"group_ids": ids, "estimator": "opo", "lengths": ids + 1}):
        step = partial(fastpo.group_advantages, **options)
        compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(rewards).advantages, step(rewards).advantages)


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ({}, "got neither of group_size and group_ids"),
        ({"group_size": 2, "group_ids": torch.zeros(6, dtype=torch.long)}, "got both"),
        ({"group_size": 4}, "group_size is 4, expected a positive divisor of the 6 rewards"),
        ({"group_size": 0}, "group_size is 0, expected"),
        ({"group_ids": torch.zeros(5, dtype=torch.long)}, "group_ids have shape"),
        ({"group_size": 2, "estimator": "ppo"}, "estimator is 'ppo', expected one of grpo, "),
        ({"group_size": 2, "eps": -1.0}, "eps is -1.0, expected"),
        ({"group_size": 2, "eps": math.nan}, "eps is nan, expected"),
        ({"group_size": 2, "lengths": torch.ones(6)}, "got lengths for estimator='grpo'"),
        ({"group_size": 2, "eps": 10**400}, "eps is an integer of 1329 bits, expected"),
        ({"group_size": 2, "eps": math.inf}, "eps is inf, expected"),
        ({"group_size": 2, "estimator": "opo", "lengths": torch.ones(5)}, "lengths have shape"),
        ({"group_size": 2, "estimator": "opo", "lengths": -torch.ones(6)}, "below 0 or not"),
        ({"group_size": 2, "estimator": "opo", "lengths": torch.ones(6) / 0}, "below 0 or not"),
    ],
)
def test_wrong_values(groups, message):
    with pytest.raises(ValueError, match=message):
        fastpo.group_advantages(torch.zeros(6), **groups)


def test_wrong_types_and_shapes():
    with pytest.raises(TypeError, match=r"group_ids are torch\.float32.*long"):
        fastpo.group_advantages(torch.zeros(6), group_ids=torch.zeros(6))
    for dtype in (torch.complex64, torch.uint16, torch.float8_e4m3fn):
        with pytest.raises(TypeError, match=rf"rewards are {dtype}, expected bool"):
            fastpo.group_advantages(torch.zeros(6).to(dtype), group_size=2)
    with pytest.raises(TypeError, match=r"rewards are list.*torch\.tensor"):
        fastpo.group_advantages([0.0, 1.0], group_size=2)
    with pytest.raises(TypeError, match="group_ids are list"):
        fastpo.group_advantages(torch.zeros(2), group_ids=[0, 0])
    for size in (2.0, "2", True):
        with pytest.raises(TypeError, match=r"group_size is \w+, expected an int"):
            fastpo.group_advantages(torch.zeros(6), group_size=size)
    with pytest.raises(TypeError, match="eps is NoneType, expected a number"):
        fastpo.group_advantages(torch.zeros(6), group_size=2, eps=None)
    for lengths, got in (([1, 1], "list"), (torch.ones(2).bool(), r"torch\.bool")):
        with pytest.raises(TypeError, match=f"lengths are {got}"):
            fastpo.group_advantages(torch.zeros(2), group_size=2, estimator="opo", lengths=lengths)
    with pytest.raises(ValueError, match=r"rewards have shape \(2, 3\).*flatten"):
        fastpo.group_advantages(torch.zeros(2, 3), group_size=3)


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("big", [1e150, 1e155, 1e200, 1e308, 1.7e308])
def test_huge_rewards_give_no_nan(big, estimator):
    """Where a square, a difference or the fp32 result overflows, the advantage is 0."""
    rewards = torch.tensor([big, -big, 0.0, 1.0, 1.0, 2.0, 3.0, 5.0], dtype=torch.float64)
    rewards = taken(rewards, estimator)
    result = fastpo.group_advantages(rewards, group_size=4, estimator=estimator)
    assert result.advantages.isfinite().all()
    alone = fastpo.group_advantages(rewards[4:], group_size=4, estimator=estimator)
    if estimator != "reinforce_pp":  # whose std is the batch's
        assert torch.equal(result.advantages[4:], alone.advantages)


def test_maxrl_is_the_reward_over_its_mean():
    """Binary rewards with a share p right: (1 - p) / p and -1."""
    rewards = torch.tensor([1.0, 0, 0, 0, 1, 1, 1, 0])
    got = fastpo.group_advantages(rewards, group_size=4, estimator="maxrl", eps=0.0).advantages
    expected = torch.tensor([3, -1, -1, -1, 1 / 3, 1 / 3, 1 / 3, -1])
    torch.testing.assert_close(got, expected)


def test_maxrl_refuses_negative_rewards():
    """REGRESSIONS 54: their mean is no success rate; below 0 it pushes good answers down."""
    rewards = torch.tensor([-1.0, -1, -1, 1])
    with pytest.raises(ValueError, match=r"rewards hold -1.0, expected none below 0 for 'maxrl'"):
        fastpo.group_advantages(rewards, group_size=4, estimator="maxrl")
    # On a GPU nobody looks: such a group gets 0.
    group = {"group_ids": torch.zeros(4, dtype=torch.int64), "lengths": None, "weights": None}
    of_op = torch.ops.fastpo.group_advantages(rewards, 4, None, 6, 0.0, None, None, False)[0]
    of_spec = advantages._specified(rewards, estimator="maxrl", eps=0.0, whiten=False, **group)
    assert not of_op.any() and not of_spec.advantages.any()


def test_rewards_apart_are_normalized_apart_and_summed():
    """GDPO: a reward of small spread is not drowned by one of large spread."""
    rewards = torch.stack([torch.randn(12), 1e3 * torch.randn(12), torch.zeros(12)], 1)
    rewards[3, 1] = math.nan
    for estimator in ESTIMATORS:
        options = {"group_ids": torch.arange(12) % 3, "estimator": estimator}
        own = taken(rewards, estimator)
        parts = [fastpo.group_advantages(column, **options) for column in own.unbind(1)]
        got = fastpo.group_advantages(own, weights=[1.0, 0.5, 7.0], **options)
        expected = parts[0].advantages + 0.5 * parts[1].advantages
        torch.testing.assert_close(got.advantages, expected)
        assert got.informative.all() and got.num_informative == 3
    equal = fastpo.group_advantages(torch.ones(12, 2), weights=[1, 1], group_size=4)
    assert not equal.advantages.any() and equal.num_informative == 0


def test_whitened_over_the_batch():
    rewards = torch.randn(12)
    rewards[5] = math.nan
    plain = fastpo.group_advantages(rewards, group_size=4, estimator="dr_grpo").advantages
    got = fastpo.group_advantages(rewards, group_size=4, estimator="dr_grpo", whiten=True, eps=0.0)
    counted = torch.arange(12) != 5
    kept = plain[counted]
    torch.testing.assert_close(got.advantages[counted], (kept - kept.mean()) / kept.std())
    assert got.advantages[5] == 0


@pytest.mark.parametrize("eps", [0.0, 1e-6])
def test_nothing_to_normalize_is_zero(eps):
    """Equal rewards, none that counts, and sums beyond fp32 give 0, whitened or not."""
    for rewards in (torch.ones(4), torch.full((4,), math.nan), torch.tensor([1.0])):
        got = fastpo.group_advantages(rewards, group_size=len(rewards), whiten=True, eps=eps)
        assert not got.advantages.any()
    got = fastpo.group_advantages(
        torch.tensor([[0.0, 1e10], [1.0, 2.0]]), group_size=2, weights=[3e38, 3e38], eps=eps
    )
    assert got.advantages.isfinite().all()


def test_reinforce_pp_over_tokens_by_hand():
    """Each completion counts with its length, in the mean and in the standard deviation."""
    rewards, lengths = torch.randn(9, dtype=torch.float64), torch.arange(1, 10)
    got = fastpo.group_advantages(
        rewards, group_size=3, estimator="reinforce_pp", lengths=lengths, eps=0.0
    ).advantages
    centered = (rewards.view(3, 3) - rewards.view(3, 3).mean(1, keepdim=True)).flatten()
    tokens = centered.repeat_interleave(lengths)
    expected = (centered - tokens.mean()) / tokens.std()
    torch.testing.assert_close(got, expected.float())


def test_refusals_of_several_rewards():
    for weights, words in (
        (None, "or .B, R. with weights"),
        ([1.0], r"weights have shape \(1,\), expected \(2,\)"),
        ([1.0, math.inf], "not finite"),
    ):
        with pytest.raises(ValueError, match=words):
            fastpo.group_advantages(torch.zeros(6, 2), group_size=2, weights=weights)
    for weights in ("ab", 1.0, [None, 1.0], {1.0, 2.0}, [[1.0], [2.0]], torch.ones(2) * 1j):
        with pytest.raises(TypeError, match=r"weights are .*, expected .* one per reward"):
            fastpo.group_advantages(torch.zeros(6, 2), group_size=2, weights=weights)
    with pytest.raises(ValueError, match="got weights for rewards of shape"):
        fastpo.group_advantages(torch.zeros(6), group_size=2, weights=[1.0])
