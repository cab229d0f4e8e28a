"""`gae` and `value_loss` against loops written by hand, verl, and hostile slots."""

from __future__ import annotations

import pytest
import torch

import fastpo
from fastpo import _extension, critic
from fastpo.segments import Segments

FP64 = torch.float64
LENGTHS = [4, 1, 0, 7, 3]
B, T = len(LENGTHS), 9

pytestmark = pytest.mark.usefixtures("implementation")


def batch(seed=0, dtype=FP64) -> dict[str, torch.Tensor]:
    """[B, T] numbers with holes in the mask; sequence 2 has no unmasked token."""
    generator = torch.Generator().manual_seed(seed)

    def normal():
        return torch.randn(B, T, generator=generator, dtype=FP64).to(dtype)

    mask = torch.arange(T) < torch.tensor(LENGTHS)[:, None]
    mask[3, 2:4] = False  # what a tool said
    return {
        "rewards": normal(),
        "values": normal(),
        "old": normal(),
        "returns": normal(),
        "mask": mask,
    }


def by_hand(rewards, values, mask, gamma, lam) -> tuple[list[float], list[float]]:
    """One sequence, from its last token to its first."""
    advantages, returns = [0.0] * len(rewards), [0.0] * len(rewards)
    value, advantage = 0.0, 0.0
    for t in reversed(range(len(rewards))):
        if not mask[t]:
            continue
        advantage = rewards[t] + gamma * value - values[t] + gamma * lam * advantage
        value = values[t]
        advantages[t], returns[t] = advantage, advantage + values[t]
    return advantages, returns


@pytest.mark.parametrize("gamma, lam", [(1.0, 0.95), (0.9, 0.7), (1.0, 1.0), (0.9, 0.0), (0, 0.5)])
@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_gae_by_hand(layout, gamma, lam):
    """REGRESSIONS 17: NaN and inf in masked slots change nothing."""
    t = batch()
    rows = [
        by_hand(*(x.tolist() for x in row), gamma, lam)
        for row in zip(t["rewards"], t["values"], t["mask"], strict=True)
    ]
    expected = torch.tensor(rows, dtype=FP64).transpose(0, 1)  # (2, B, T)
    rewards, values = (t[key].masked_fill(~t["mask"], torch.nan) for key in ("rewards", "values"))
    values[1, 5] = torch.inf
    options = {"gamma": gamma, "lam": lam}
    if layout == "padded":
        got = fastpo.gae(rewards, values, mask=t["mask"], **options)
    else:
        cut = torch.tensor([4, 1, 0, 9, 3])  # holes of sequence 3 stay in; sequence 2 has no row
        keep = torch.arange(T) < cut[:, None]
        expected = expected[:, keep]
        offsets = torch.tensor([0, *cut]).cumsum(0).int()
        got = fastpo.gae(
            rewards[keep], values[keep], mask=t["mask"][keep], cu_seqlens=offsets, **options
        )
    for x, y in zip(got, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-12)


def test_whitened_by_hand():
    """Mean 0 and unbiased variance 1 over the unmasked tokens of the batch; the returns stay."""
    t = batch()
    options = {"mask": t["mask"], "gamma": 0.9, "lam": 0.7}
    plain = fastpo.gae(t["rewards"], t["values"], **options)
    got = fastpo.gae(t["rewards"], t["values"], whiten=True, **options)
    raw = plain.advantages[t["mask"]]
    expected = torch.zeros(B, T, dtype=FP64)
    expected[t["mask"]] = (raw - raw.mean()) / (raw.var() + 1e-8).sqrt()
    torch.testing.assert_close(got.advantages, expected, rtol=1e-12, atol=1e-12)
    assert torch.equal(got.returns, plain.returns)


def test_a_nan_stays_in_its_own_sequence():
    t = batch()
    t["rewards"][3, 5] = torch.nan
    clean = fastpo.gae(batch()["rewards"], t["values"], mask=t["mask"], gamma=0.9, lam=0.8)
    got = fastpo.gae(t["rewards"], t["values"], mask=t["mask"], gamma=0.9, lam=0.8)
    assert got.advantages[3, :2].isnan().all() and got.advantages[3, 6] == clean.advantages[3, 6]
    others = [0, 1, 2, 4]
    assert torch.equal(got.advantages[others], clean.advantages[others])


@pytest.mark.parametrize("gamma, lam", [(0.0, 0.5), (0.5, 0.0)])
def test_a_decay_of_zero_looks_no_further(gamma, lam):
    t = batch()
    t["rewards"][3, 5] = torch.nan
    got = fastpo.gae(t["rewards"], t["values"], mask=t["mask"], gamma=gamma, lam=lam)
    assert got.advantages.isnan().nonzero().tolist() == [[3, 5]]
    if gamma == 0:  # nor at the next value
        t = batch()
        t["values"][3, 5] = torch.nan
        got = fastpo.gae(t["rewards"], t["values"], mask=t["mask"], gamma=gamma, lam=lam)
        assert got.advantages.isnan().nonzero().tolist() == [[3, 5]]


def test_gae_of_low_precision_is_computed_in_fp64():
    t = batch(dtype=torch.bfloat16)
    got = fastpo.gae(t["rewards"], t["values"], mask=t["mask"], gamma=0.99, lam=0.9)
    exact = fastpo.gae(
        t["rewards"].double(), t["values"].double(), mask=t["mask"], gamma=0.99, lam=0.9
    )
    assert got.advantages.dtype == torch.float32
    assert torch.equal(got.advantages, exact.advantages.float())


def test_a_long_constant_sequence_has_the_closed_form():
    """Rewards 1, values 0: the discounted return is a geometric series."""
    n, gamma = 70_001, 0.999
    ones = torch.ones(n, dtype=FP64)
    offsets = torch.tensor([0, n], dtype=torch.int32)
    got = fastpo.gae(ones, 0 * ones, gamma=gamma, lam=1.0, cu_seqlens=offsets).returns
    left = torch.arange(n, 0, -1, dtype=FP64)
    torch.testing.assert_close(got, (1 - gamma**left) / (1 - gamma), rtol=1e-10, atol=0)


@pytest.mark.parametrize("lam", [0.95, 0.0])
def test_many_sequences_of_every_length(lam):
    """Around the 256 rows that a GPU's block takes at a time, with every third row masked."""
    lengths = torch.tensor([1, 255, 256, 257, 0, 511, 512, 513, 1100])
    offsets = torch.cat([torch.zeros(1).long(), lengths.cumsum(0)])
    generator = torch.Generator().manual_seed(0)
    rewards, values = torch.randn(2, int(lengths.sum()), generator=generator, dtype=FP64)
    mask = torch.rand(rewards.shape, generator=generator) > 1 / 3
    options = {"mask": mask, "gamma": 0.99, "lam": lam}
    got = fastpo.gae(rewards, values, cu_seqlens=offsets.int(), **options)
    columns = [x.split(lengths.tolist()) for x in (rewards, values, mask)]
    rows = [by_hand(*(x.tolist() for x in one), 0.99, lam) for one in zip(*columns, strict=True)]
    for found, numbers in zip(got, zip(*rows, strict=True), strict=True):
        expected = torch.tensor([x for row in numbers for x in row], dtype=FP64)
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.gpu
def test_the_kernel_is_the_specification(implementation):
    """On a GPU: against the operator on the CPU, twice with the same bits."""
    if implementation != "compiled" or "cuda" not in _extension.devices():
        pytest.skip("once, with an extension built with CUDA")
    rewards, values = torch.randn(2, 40, 3000)
    mask = torch.rand(40, 3000) > 0.1
    options = {"gamma": 0.999, "lam": 0.95}
    want = fastpo.gae(rewards, values, mask=mask, **options)
    sent = [x.cuda() for x in (rewards, values, mask)]
    one, two = (fastpo.gae(*sent[:2], mask=sent[2], **options) for _ in range(2))
    assert torch.equal(one.advantages, two.advantages)
    torch.testing.assert_close(one.advantages.cpu(), want.advantages, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("shape", [(0,), (0, 3), (2, 0)])
def test_empty(shape):
    """REGRESSIONS 43."""
    empty = torch.zeros(shape)
    offsets = torch.zeros(1, dtype=torch.int32) if len(shape) == 1 else None
    got = fastpo.gae(empty, empty, gamma=1.0, lam=1.0, cu_seqlens=offsets, whiten=True)
    assert got.advantages.shape == got.returns.shape == shape
    values = empty.clone().requires_grad_()
    loss = fastpo.value_loss(values, empty).loss
    loss.backward()
    assert loss.item() == 0 and values.grad.shape == shape


@pytest.mark.peer
@pytest.mark.parametrize("gamma, lam", [(1.0, 0.95), (0.9, 0.7)])
def test_gae_as_verl(verl, gamma, lam):
    core, _ = verl
    t = batch()
    mask = t["mask"].double()
    advantages, returns = core.compute_gae_advantage_return(
        t["rewards"], t["values"], mask, gamma, lam
    )
    got = fastpo.gae(t["rewards"], t["values"], mask=t["mask"], gamma=gamma, lam=lam, whiten=True)
    torch.testing.assert_close(got.advantages, advantages * mask, rtol=1e-7, atol=1e-8)
    torch.testing.assert_close(got.returns, returns * mask, rtol=1e-12, atol=1e-12)


@pytest.mark.peer
def test_reinforce_plus_plus_as_verl(verl):
    """Values 0 and lam 1: whitened discounted returns."""
    core, _ = verl
    t = batch()
    mask = t["mask"].double()

    class Config:
        gamma = 0.97

    expected, _ = core.compute_reinforce_plus_plus_outcome_advantage(
        t["rewards"], mask, config=Config
    )
    zero = torch.zeros_like(t["values"])
    got = fastpo.gae(t["rewards"], zero, mask=t["mask"], gamma=0.97, lam=1.0, whiten=True)
    torch.testing.assert_close(got.advantages, expected, rtol=1e-7, atol=1e-8)


def value_loss_by_hand(t: dict, clip: float | None, count: float) -> float:
    total = 0.0
    for v, r, old, mask in zip(
        *(t[k].flatten().tolist() for k in ("values", "returns", "old", "mask")),
        strict=True,
    ):
        if mask:
            near = v if clip is None else min(max(v, old - clip), old + clip)
            total += 0.5 * max((v - r) ** 2, (near - r) ** 2)
    return total / count


@pytest.mark.parametrize("clip", [None, 0.2, 1.5])
@pytest.mark.parametrize("normalizer", [None, 100, torch.tensor(0.5)])
def test_value_loss_by_hand(clip, normalizer):
    """Its value, its gradient by finite differences, and NaN in masked slots (REGRESSIONS 17)."""
    t = batch()
    count = int(t["mask"].sum()) if normalizer is None else float(normalizer)
    hostile = {k: t[k].masked_fill(~t["mask"], torch.nan) for k in ("values", "returns", "old")}
    options = {"clip": clip, "old_values": None if clip is None else hostile["old"]}

    def loss(values):
        return fastpo.value_loss(
            values, hostile["returns"], mask=t["mask"], normalizer=normalizer, **options
        ).loss

    values = hostile["values"].requires_grad_()
    got = loss(values)
    torch.testing.assert_close(got.item(), value_loss_by_hand(t, clip, count), rtol=1e-12, atol=0)
    (grad,) = torch.autograd.grad(got, values)
    assert not grad[~t["mask"]].any()
    for where in t["mask"].nonzero().tolist():
        ends = []
        for step in (1e-6, -1e-6):
            moved = {**t, "values": t["values"].clone()}
            moved["values"][tuple(where)] += step
            ends.append(value_loss_by_hand(moved, clip, count))
        slope = (ends[0] - ends[1]) / 2e-6
        assert grad[tuple(where)].item() == pytest.approx(slope, rel=1e-6, abs=1e-8)


def test_value_metrics_by_hand():
    """Sums over unmasked tokens; clipped is where the clipped error is the larger one."""
    t = batch()
    v, r, old = (t[key][t["mask"]] for key in ("values", "returns", "old"))
    near = v.clamp(old - 0.2, old + 0.2)
    options = {"old_values": t["old"], "clip": 0.2, "mask": t["mask"]}
    got = fastpo.value_loss(t["values"], t["returns"], **options)
    expected = {
        "tokens": t["mask"].sum(),
        "clipped": ((near - r).square() > (v - r).square()).sum(),
        "value": v.sum(),
        "return": r.sum(),
        "squared_error": (v - r).square().sum(),
        "squared_return": r.square().sum(),
    }
    assert expected.keys() == got.metrics.keys()
    assert 0 < expected["clipped"] < (near != v).sum()
    for key, value in expected.items():
        torch.testing.assert_close(got.metrics[key], value.double(), rtol=1e-12, atol=0, msg=key)


@pytest.mark.parametrize("side", [-1, 1])
def test_a_value_on_its_bound_keeps_its_gradient(side):
    """The clip is closed, as the policy's: at V = V_old + clip, not rare among bf16 numbers, both
    errors are one number and its slope is V - R, not three quarters of it."""
    values = torch.tensor([1.0 + 0.25 * side], requires_grad=True)
    options = {"old_values": torch.ones(1), "clip": 0.25}
    fastpo.value_loss(values, torch.tensor([3.0]), **options).loss.backward()
    assert values.grad.item() == values.item() - 3.0


@pytest.mark.peer
def test_value_loss_as_verl(verl):
    core, _ = verl
    t = batch()
    values = t["values"].clone().requires_grad_()
    theirs, fraction = core.compute_value_loss(
        values, t["returns"], t["old"], t["mask"].double(), 0.5
    )
    (slope,) = torch.autograd.grad(theirs, values)
    got = fastpo.value_loss(values, t["returns"], old_values=t["old"], clip=0.5, mask=t["mask"])
    (grad,) = torch.autograd.grad(got.loss, values)
    torch.testing.assert_close(got.loss, theirs, rtol=1e-7, atol=0)
    torch.testing.assert_close(grad, slope, rtol=1e-7, atol=1e-12)
    assert 0 < fraction.item() < 1
    torch.testing.assert_close(
        got.metrics["clipped"] / got.metrics["tokens"], fraction, rtol=1e-6, atol=0
    )


def test_all_masked_is_a_differentiable_zero():
    """REGRESSIONS 8, 15."""
    t = batch(dtype=torch.float32)
    values = t["values"].requires_grad_()
    result = fastpo.value_loss(values, t["returns"], mask=torch.zeros_like(t["mask"]))
    result.loss.backward()
    assert result.loss.item() == 0 and not values.grad.any()
    assert result.metrics["tokens"].item() == 0


ROW = torch.zeros(3)
OFFSETS = torch.tensor([0, 3], dtype=torch.int32)


@pytest.mark.parametrize(
    "call, error, words",
    [
        (lambda: fastpo.gae(ROW, ROW, gamma=1, lam=1), ValueError, "needs cu_seqlens"),
        (lambda: fastpo.gae(ROW, ROW, gamma=1.5, lam=1, cu_seqlens=OFFSETS), ValueError, "gamma"),
        (
            lambda: fastpo.gae(ROW, ROW, gamma=1, lam="1", cu_seqlens=OFFSETS),
            TypeError,
            "lam is str",
        ),
        (
            lambda: fastpo.gae(ROW, ROW[:2], gamma=1, lam=1, cu_seqlens=OFFSETS),
            ValueError,
            "values",
        ),
        (lambda: fastpo.gae([0.0], ROW, gamma=1, lam=1), TypeError, "rewards is list"),
        (lambda: fastpo.gae(ROW.long(), ROW, gamma=1, lam=1), TypeError, "floating"),
        (lambda: fastpo.value_loss(ROW, ROW, clip=0.2), ValueError, "together"),
        (lambda: fastpo.value_loss(ROW, ROW, old_values=ROW), ValueError, "got old_values alone"),
        (lambda: fastpo.value_loss(ROW, ROW, clip=-1.0, old_values=ROW), ValueError, "clip is -1"),
        (lambda: fastpo.value_loss(ROW, ROW, mask=ROW), TypeError, "mask"),
    ],
)
def test_refusals(call, error, words):
    with pytest.raises(error, match=words):
        call()


def test_the_operator_passes_opcheck_and_compiles(implementation):
    if implementation != "compiled":
        pytest.skip("it is about the operator")
    t = batch()
    rows = [(t[key] * t["mask"]).flatten() for key in ("rewards", "values", "mask")]
    offsets = torch.arange(B + 1) * T
    torch.library.opcheck(torch.ops.fastpo.gae.default, (*rows, offsets, 0.9, 0.8))
    segments = Segments.padded(B, T, torch.device("cpu"))
    specified = critic._specified(*rows, segments, 0.9, 0.8).where(rows[2], 0)
    got = torch.ops.fastpo.gae(*rows, offsets, 0.9, 0.8)
    torch.testing.assert_close(got, specified, rtol=1e-12, atol=1e-13)

    def step(rewards, values, mask):
        return fastpo.gae(rewards, values, mask=mask, gamma=0.9, lam=0.8).advantages

    arguments = (t["rewards"], t["values"], t["mask"])
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*arguments), step(*arguments))
    for bad in (torch.tensor([0, 5]), torch.tensor([0, 9, 3, 45])):
        with pytest.raises(RuntimeError, match="offsets must"):
            torch.ops.fastpo.gae(*rows, bad, 0.9, 0.8)
