"""Whole batches under the specification: masks, packing, accumulation, hostile numbers.

`REGRESSIONS` rows in the docstrings are bugs that other fused losses had.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastpo import presets
from fastpo.objective import entropy_weights, token_loss, token_weights
from fastpo.segments import Segments

FP64 = torch.float64
CPU = torch.device("cpu")
PRESETS = {name: getattr(presets, name) for name in presets.__all__}
JUNK = (torch.nan, torch.inf, -torch.inf, 1e38, -1e38)
OPTIONS = {
    "plain": {},
    "kl": {"kl_coef": 0.1},
    "all": {"kl_coef": 0.1, "kl_ratio_weighted": True, "entropy_coef": 0.02},
}


def make(name: str, options: str):
    length = {"max_length": 9} if name == "dr_grpo" else {}
    return PRESETS[name](**length, **OPTIONS[options])


def inputs(lengths: list[int], seed: int = 0, dtype=FP64) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def normal(size: int) -> torch.Tensor:
        return torch.randn(size, dtype=dtype, generator=generator)

    n = sum(lengths)
    logp = -normal(n).exp()
    return {
        "logp": logp,
        "old": logp - 0.2 * normal(n),
        "ref": logp - 0.5 * normal(n),
        "a": normal(n),
        "iw": (0.3 * normal(n)).exp(),
        "entropy": normal(n).abs(),
        "sw": (0.3 * normal(len(lengths))).exp(),
    }


def packed(lengths: list[int]) -> Segments:
    return Segments.packed(torch.tensor([0, *lengths]).cumsum(0), sum(lengths))


def objective_and_grads(objective, t, segments, mask=None, normalizer=None, weights=True):
    """The whole objective, its gradients in log-probs and entropy, and the per-token terms."""
    logp = t["logp"].clone().requires_grad_()
    entropy = t["entropy"].clone().requires_grad_()
    terms = token_loss(
        objective,
        logp,
        t["a"],
        old_logprobs=t["old"],
        ref_logprobs=t["ref"] if objective.kl_coef else None,
        importance_weights=t["iw"] if weights else None,
        sequence_weights=t["sw"] if weights else None,
        mask=mask,
        segments=segments,
    )
    given = {"normalizer": normalizer, "dtype": logp.dtype}
    loss = (token_weights(objective, mask, segments, **given) * terms.loss).sum()
    bonus = entropy_weights(objective, mask, segments, **given)
    if bonus is not None:
        loss = loss - (bonus * (entropy if mask is None else entropy.masked_fill(~mask, 0))).sum()
    assert loss.requires_grad
    grads = torch.autograd.grad(loss, [logp, entropy], allow_unused=True, materialize_grads=True)
    return loss.detach(), *grads, terms


def layout(kind: str) -> tuple[list[int], Segments]:
    """Five sequences as [5, 4] or packed, and the mask's fourth sequence is always dead."""
    lengths = [4, 4, 4, 4, 4] if kind == "padded" else [4, 1, 0, 6, 3]
    return lengths, Segments.padded(5, 4, CPU) if kind == "padded" else packed(lengths)


def some_mask(segments: Segments) -> torch.Tensor:
    mask = torch.arange(segments.rows) % 3 != 1
    return mask & (segments.ids != 3)


@pytest.mark.parametrize("kind", ["padded", "packed"])
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("name", PRESETS)
def test_masked_slots_change_nothing(name, options, kind):
    """REGRESSIONS row 17: NaN, inf and huge numbers in every masked slot of every input."""
    lengths, segments = layout(kind)
    objective = make(name, options)
    mask = some_mask(segments)
    t = inputs(lengths)
    clean = objective_and_grads(objective, t, segments, mask)
    dead_sequence = torch.arange(len(lengths)) == 3
    for junk in JUNK:
        dirty = {key: x.masked_fill(~mask, junk) for key, x in t.items() if key != "sw"}
        dirty["sw"] = t["sw"].masked_fill(dead_sequence, junk)
        result = objective_and_grads(objective, dirty, segments, mask)
        assert all(torch.equal(x, y) for x, y in zip(clean[:3], result[:3], strict=True)), junk
        assert not result[1][~mask].any() and not result[2][~mask].any()
    assert clean[0].isfinite() and clean[1][mask].any()


@pytest.mark.parametrize("kind", ["padded", "packed"])
@pytest.mark.parametrize("name", PRESETS)
def test_all_masked_gives_a_differentiable_zero(name, kind):
    """REGRESSIONS rows 8 and 15."""
    lengths, segments = layout(kind)
    objective = make(name, "all")
    t = {key: torch.full_like(x, torch.nan) for key, x in inputs(lengths).items()}
    mask = torch.zeros(segments.rows, dtype=torch.bool)
    for normalizer in (None, 0, 7) if objective.aggregation == "token_mean" else (None,):
        loss, grad, entropy_grad, _ = objective_and_grads(
            objective, t, segments, mask, normalizer=normalizer
        )
        assert loss == 0 and not grad.any() and not entropy_grad.any()


@pytest.mark.parametrize("name", PRESETS)
def test_empty_batches(name):
    for lengths, segments in (([], packed([])), ([0, 0], packed([0, 0]))):
        loss, grad, _, terms = objective_and_grads(make(name, "all"), inputs(lengths), segments)
        assert loss == 0 and grad.shape == terms.ratio.shape == (0,)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("name", PRESETS)
def test_padded_equals_packed(name, options):
    """Ragged sequences, two of them empty, once packed and once padded with junk."""
    lengths, width = [4, 1, 0, 6, 3, 0], 6
    objective = make(name, options)
    t = inputs(lengths, seed=5)
    place = torch.tensor([width * b + i for b, n in enumerate(lengths) for i in range(n)])
    mask = torch.zeros(width * len(lengths), dtype=torch.bool)
    mask[place] = True
    wide = {"sw": t["sw"]}
    for key in t.keys() - {"sw"}:
        wide[key] = torch.full_like(mask, torch.nan, dtype=FP64).index_copy(0, place, t[key])
    flat = objective_and_grads(objective, t, packed(lengths))
    padded = objective_and_grads(objective, wide, Segments.padded(len(lengths), width, CPU), mask)
    close = {"rtol": 1e-12, "atol": 1e-13}
    torch.testing.assert_close(padded[0], flat[0], **close)
    for got, expected in zip(padded[1:3], flat[1:3], strict=True):
        torch.testing.assert_close(got[place], expected, **close)
        assert not got[~mask].any()
    assert torch.equal(padded[3].clipped[place], flat[3].clipped)


@settings(max_examples=5, deadline=None)
@given(
    st.lists(st.integers(0, 5), min_size=1, max_size=7).filter(sum),
    st.lists(st.integers(0, 2), min_size=7, max_size=7),
    st.integers(0, 10**6),
)
@pytest.mark.parametrize("aggregation", ["token_mean", "sequence_mean", "sequence_sum", "constant"])
@pytest.mark.parametrize("name", PRESETS)
def test_any_split_into_micro_batches_gives_the_same_gradient(
    name, aggregation, lengths, owners, seed
):
    """REGRESSIONS row 16: with `normalizer`, micro-batches or ranks of any sizes add up."""
    length = 8 if aggregation == "constant" else None
    objective = PRESETS[name](aggregation=aggregation, max_length=length, kl_coef=0.1)
    t = inputs(lengths, seed)
    mask = torch.rand(sum(lengths), generator=torch.Generator().manual_seed(seed)) < 0.7
    count = mask.sum() if aggregation == "token_mean" else len(lengths)
    whole = objective_and_grads(objective, t, packed(lengths), mask)
    total, grad = torch.zeros((), dtype=FP64), torch.zeros_like(t["logp"])
    ids = packed(lengths).ids
    owner = torch.tensor(owners[: len(lengths)])
    for micro in range(3):
        rows, sequences = owner[ids] == micro, owner == micro
        part = {key: x[sequences if key == "sw" else rows] for key, x in t.items()}
        own = [n for n, o in zip(lengths, owners, strict=False) if o == micro]
        loss, grad[rows], _, _ = objective_and_grads(
            objective, part, packed(own), mask[rows], normalizer=count
        )
        total += loss
    torch.testing.assert_close(total, whole[0], rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(grad, whole[1], rtol=1e-11, atol=1e-13)


def test_a_token_mean_without_normalizer_does_weigh_by_micro_batch():
    """The bug of row 16, shown, so that the test above is known to tell the difference."""
    lengths = [5, 1]
    t = inputs(lengths)
    _, grad, _, _ = objective_and_grads(presets.dapo(), t, packed(lengths))
    first = {key: x[:1] if key == "sw" else x[:5] for key, x in t.items()}
    _, part, _, _ = objective_and_grads(presets.dapo(), first, packed([5]))
    torch.testing.assert_close(part / 2, grad[:5] * 6 / 10, rtol=1e-12, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, FP64])
@pytest.mark.parametrize("d", [1e3, -1e3, 89.0, 20.5])
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("name", PRESETS)
def test_extreme_log_ratios_stay_finite(name, options, d, dtype):
    """REGRESSIONS row 18: old and ref 1e3 nats away, advantage 0 or not."""
    objective, lengths = make(name, options), [3, 2]
    t = inputs(lengths, dtype=dtype)
    t["old"], t["ref"] = t["logp"] - d, t["logp"] - d
    loss, grad, _, _ = objective_and_grads(objective, t, packed(lengths))
    assert loss.isfinite() and grad.isfinite().all()
    t["a"] = torch.zeros_like(t["a"])
    loss, grad, _, _ = objective_and_grads(objective, t, packed(lengths), weights=False)
    assert loss.isfinite() and grad.isfinite().all()
    if options == "plain" and objective.old_kl_coef == 0:
        assert loss == 0 and not grad.any()


@pytest.mark.parametrize("d", [100.0, 1000.0])
def test_a_clipped_token_far_off_policy_has_gradient_zero(d):
    """0 * inf in TRL 1.16 and Liger 0.8.5; here the log-ratio is clamped before exp."""
    t = inputs([3])
    t["old"], t["a"] = t["logp"] - d, torch.ones_like(t["a"])
    _, grad, _, terms = objective_and_grads(presets.dapo(), t, packed([3]), weights=False)
    assert not grad.any() and terms.clipped.all()


@pytest.mark.parametrize(
    "name, key",
    [
        (name, key)
        for name, preset in PRESETS.items()
        for key in ("logp", "a", "iw", "ref", *(["old"] * (preset().surrogate != "reinforce")))
    ],
)
def test_nan_in_an_unmasked_token_stays_visible(name, key):
    """REGRESSIONS row 18, the other half: no clamp, minimum or nan_to_num may hide it."""
    t = inputs([3, 2])
    t[key][1] = torch.nan
    mask = torch.tensor([True, True, False, True, True])
    loss, *_ = objective_and_grads(make(name, "kl"), t, packed([3, 2]), mask)
    assert loss.isnan()


def test_token_level_objectives_need_no_segments():
    t = inputs([5])
    for name, preset in PRESETS.items():
        if preset().is_token_level:
            alone = token_loss(preset(), t["logp"], t["a"], old_logprobs=t["old"])
            known = token_loss(
                preset(), t["logp"], t["a"], old_logprobs=t["old"], segments=packed([5])
            )
            assert torch.equal(alone.loss, known.loss), name


@pytest.mark.parametrize("name", [name for name in PRESETS if name != "vespo"])
def test_surrogates_are_positively_homogeneous_in_the_advantage(name):
    """Which is why importance weights and off-policy masks may multiply the advantage."""
    objective = PRESETS[name](old_kl_coef=0.0)
    lengths = [4, 1, 3]
    t, segments = inputs(lengths), packed(lengths)
    plain, weighted = (
        token_loss(
            objective,
            t["logp"],
            t["a"],
            old_logprobs=t["old"],
            sequence_weights=weights,
            segments=segments,
        )
        for weights in (None, t["sw"])
    )
    torch.testing.assert_close(
        weighted.loss, plain.loss * segments.broadcast(t["sw"]), rtol=1e-12, atol=1e-14
    )
    assert torch.equal(weighted.clipped, plain.clipped)


@pytest.mark.parametrize("k", [1e-2, 1e-3, 1e-4, 1e-6])
def test_k3_near_zero_keeps_its_digits_and_its_sign_in_float32(k):
    ref = torch.tensor([k, -k])
    terms = token_loss(presets.grpo(kl_coef=1.0), torch.zeros(2), torch.zeros(2), ref_logprobs=ref)
    x = ref.double()
    torch.testing.assert_close(terms.kl.double(), x.expm1() - x, rtol=1e-3, atol=1e-13)
    assert (terms.kl >= 0).all()


def test_sequence_weights_are_one_token_weight_spread_except_in_vespo():
    """A constant token weight equals the sequence weight; vespo counts one per token."""
    lengths = [4, 1, 0, 3]
    t, segments = inputs(lengths), packed(lengths)
    for name, preset in PRESETS.items():
        once, spread = (
            token_loss(preset(), t["logp"], t["a"], old_logprobs=t["old"], segments=segments, **kw)
            for kw in (
                {"sequence_weights": t["sw"]},
                {"importance_weights": segments.broadcast(t["sw"])},
            )
        )
        same = torch.allclose(once.loss, spread.loss, rtol=1e-12, atol=1e-14)
        assert same == (name != "vespo"), name
        # A sequence of one token cannot tell the two apart.
        torch.testing.assert_close(once.loss[4], spread.loss[4], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", ["gspo", "gmpo", "vespo"])
def test_sequence_objectives_trace_without_a_graph_break(name):
    t, cu_seqlens = inputs([3, 0, 2]), torch.tensor([0, 3, 3, 5])

    def loss(logp, cu_seqlens):
        segments = Segments.packed(cu_seqlens, 5)
        terms = token_loss(PRESETS[name](), logp, t["a"], old_logprobs=t["old"], segments=segments)
        return (token_weights(PRESETS[name](), None, segments, dtype=FP64) * terms.loss).sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    grads = []
    for function in (loss, compiled):
        logp = t["logp"].clone().requires_grad_()
        grads.append(torch.autograd.grad(function(logp, cu_seqlens), logp)[0])
    torch.testing.assert_close(*grads, rtol=1e-12, atol=1e-14)
