"""Hostile inputs to the Triton row primitives; the numbers name rows of the defects others had."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from fastpo.backends import triton as triton_rows
from fastpo.backends.base import RowInputs, alias_rows
from fastpo.objective import CLIPPED_HIGH, CLIPPED_LOW, CLIPPED_MAX, Objective
from fastpo.testing.rows import (
    RowCase,
    check_policy_loss,
    check_stats_and_grad,
    exact_logprobs,
    expected_policy_loss,
    run_policy_loss,
)

pytestmark = pytest.mark.usefixtures("poisoned_empty", "triton_backend")

NAN, INF = float("nan"), float("inf")
CLIP = Objective(clip_low=0.2, clip_high=0.28)
EVERYTHING = Objective(kl_coef=0.1, kl_estimator="k3", kl_ratio_weighted=True, entropy_coef=0.05)
REINFORCE = Objective(surrogate="reinforce")


def numbers(advantages, *, old=None, ref=None, weight=None, entropy_weight=None) -> RowInputs:
    """Per-token inputs from plain lists."""
    advantages = torch.tensor(advantages)
    weight = torch.ones_like(advantages) if weight is None else torch.tensor(weight)
    optional = (None if x is None else torch.tensor(x) for x in (old, ref, entropy_weight))
    return RowInputs(weight, advantages, *optional)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shift", [-110.0, 80.0])
def test_shifted_logits(shift, dtype, device):
    """All logits far from 0: exp of a raw logit over- or underflows."""
    case = RowCase.random(3, 600, EVERYTHING, dtype=dtype, device=device)
    case = case.with_logits((case.logits.float() + shift).to(dtype))
    check_policy_loss(triton_rows, _on_its_own_logprobs(case), EVERYTHING)
    check_stats_and_grad(triton_rows, case)


def test_offset_of_ten_thousand_keeps_six_digits(device):
    """Maximum and log of the sum are kept apart: one lse in fp32 would cost 5e-4 here."""
    case = RowCase.random(3, 600, CLIP, device=device, temperature=0.9)
    case = case.with_logits(case.logits + 1e4)
    stats = triton_rows.row_stats(case.logits, case.tokens, 0.9)
    exact, _ = expected_policy_loss(case, CLIP)
    assert (stats.logprobs - exact.logprobs).abs().max() < 5e-6
    assert (stats.entropy - exact.entropy).abs().max() < 5e-6


def _on_its_own_logprobs(case: RowCase) -> RowCase:
    """Old and reference log-probs beside those of the case's present logits."""
    near = exact_logprobs(case).float() + 0.1
    ref = None if case.inputs.ref_logprobs is None else near - 0.3
    inputs = case.inputs._replace(old_logprobs=near, ref_logprobs=ref)
    return dataclasses.replace(case, inputs=inputs)


def _removed(name: str, case: RowCase) -> torch.Tensor:
    """(N, V) bool: which logits become -inf."""
    removed = torch.zeros(case.logits.shape, dtype=torch.bool, device=case.logits.device)
    if name == "first block":
        removed[:, :300] = True
    elif name == "last block":
        removed[:, 700:] = True
    elif name == "every other":
        removed[:, ::2] = True
    else:
        removed[:] = True
    return removed.scatter(1, case.tokens[:, None], False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["first block", "last block", "every other", "all but the token"])
def test_minus_infinity(name, dtype, device, small_layout):
    """10: top-k masks and padded heads: p = 0, nothing in entropy or gradient."""
    case = RowCase.random(3, 1000, EVERYTHING, dtype=dtype, device=device, temperature=1.0)
    removed = _removed(name, case)
    case = _on_its_own_logprobs(case.with_logits(case.logits.masked_fill(removed, -INF)))
    check_stats_and_grad(triton_rows, case)
    check_policy_loss(triton_rows, case, EVERYTHING)
    _, grad = run_policy_loss(triton_rows, case, EVERYTHING)
    assert not grad[removed].any()


def test_token_of_probability_zero(device):
    """10: the token itself is -inf: log-prob -inf off-policy, and the gradient stays finite."""
    case = RowCase.random(2, 300, CLIP, device=device)
    case = case.with_logits(case.logits.scatter(1, case.tokens[:, None], -INF))
    rows, grad = run_policy_loss(triton_rows, case, CLIP)
    assert torch.equal(rows.logprobs, torch.full((2,), -INF, device=device))
    assert rows.loss.isfinite().all() and grad.isfinite().all()


@pytest.mark.parametrize("column", [0, 31, 32, 127, 128, 255, 256, 511, 512, 767, 768, 999])
def test_tokens_on_block_edges(column, device, small_layout):
    case = RowCase.random(2, 1000, CLIP, device=device)
    case = dataclasses.replace(case, tokens=torch.full_like(case.tokens, column))
    check_policy_loss(triton_rows, _on_its_own_logprobs(case), CLIP)


@pytest.mark.parametrize("token", [-1, 300, 2**31 - 1, 2**31 + 7, -(2**40)])
def test_token_outside_the_vocabulary(token, device):
    """21: NaN in that row alone, and no read there."""
    case = RowCase.random(3, 300, CLIP, device=device)
    expected_rows, expected_grad = run_policy_loss(triton_rows, case, CLIP)
    case.tokens[1] = token
    rows, grad = run_policy_loss(triton_rows, case, CLIP)
    stats = triton_rows.row_stats(case.logits, case.tokens, case.temperature)
    assert rows.loss[1].isnan() and rows.logprobs[1].isnan() and stats.logprobs[1].isnan()
    assert stats.entropy.isfinite().all()
    for other in (0, 2):
        assert torch.equal(rows.loss[other], expected_rows.loss[other])
        assert torch.equal(grad[other], expected_grad[other])


@pytest.mark.parametrize("token", [-1, 300, 2**32 + 5])
def test_row_grad_of_a_token_that_another_shard_owns(token, device):
    """It matches no column: dz_j = -c p_j everywhere."""
    case = RowCase.random(1, 300, CLIP, device=device)
    stats = triton_rows.row_stats(case.logits, case.tokens, 1.0)
    c, out = torch.ones(1, device=device), torch.empty_like(case.logits)
    outside = torch.full_like(case.tokens, token)
    triton_rows.row_grad(case.logits, outside, stats, c, None, 1.0, out)
    torch.testing.assert_close(out, -case.logits.softmax(-1))


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_dead_rows_are_never_read(bad, device):
    """17: whatever stands in masked slots changes nothing; outputs and gradient are exactly 0."""
    case = RowCase.random(4, 300, EVERYTHING, device=device)
    expected_rows, expected_grad = run_policy_loss(triton_rows, case, EVERYTHING)
    dead = torch.tensor([False, True, False, True], device=device)
    inputs = case.inputs.map(lambda x: x.masked_fill(dead, bad))
    inputs = inputs._replace(
        weight=case.inputs.weight.masked_fill(dead, 0),
        entropy_weight=case.inputs.entropy_weight.masked_fill(dead, 0),
    )
    logits = case.logits.masked_fill(dead[:, None], bad)
    tokens = case.tokens.masked_fill(dead, -100)
    case = dataclasses.replace(case, logits=logits, tokens=tokens, inputs=inputs)
    rows, grad = run_policy_loss(triton_rows, case, EVERYTHING)
    for got, expected in zip((*rows, grad), (*expected_rows, expected_grad), strict=True):
        assert torch.equal(got[~dead], expected[~dead])
        assert not got[dead].any()
    stats = triton_rows.row_stats(logits, tokens, 0.8, ~dead)
    assert all(x.isfinite().all() and not x[dead].any() for x in stats)
    out, zero = (
        torch.empty_like(logits),
        dead.float() - 1,
    )  # c = -1 on unmasked rows, 0 on dead ones
    triton_rows.row_grad(logits, tokens, stats, zero, zero, 0.8, out)
    assert out.isfinite().all() and not out[dead].any()


@pytest.mark.parametrize("where", ["logits", "weight", "advantages", "old", "ref", "temperature"])
def test_nan_of_an_unmasked_row_stays_visible(where, device):
    """18: no min, max or clamp may swallow it."""
    case = RowCase.random(2, 300, EVERYTHING, device=device, temperature=torch.tensor([0.7, 0.8]))
    inputs, logits = case.inputs, case.logits.clone()
    if where == "logits":
        logits[1, 17] = NAN
    elif where == "temperature":
        case.temperature[1] = NAN
    else:
        field = {"old": "old_logprobs", "ref": "ref_logprobs"}.get(where, where)
        getattr(inputs, field)[1] = NAN
    rows, grad = run_policy_loss(triton_rows, case.with_logits(logits), EVERYTHING)
    assert rows.loss[1].isnan() and grad[1].isnan().any()
    assert rows.loss[0].isfinite() and grad[0].isfinite().all()


@pytest.mark.parametrize("log_ratio", [-1e3, -100.0, 100.0, 1e3])
@pytest.mark.parametrize("advantage", [-1.0, 0.0, 1.0])
def test_extreme_log_ratios(advantage, log_ratio, device):
    """18: a clipped token has gradient 0, not 0 * inf."""
    case = RowCase.random(1, 300, CLIP, device=device)
    exact, _ = expected_policy_loss(case, CLIP)
    old = (exact.logprobs - log_ratio).float()
    inputs = case.inputs._replace(
        old_logprobs=old, advantages=torch.full_like(old, advantage), ref_logprobs=None
    )
    case = dataclasses.replace(case, inputs=inputs)
    rows, grad = run_policy_loss(triton_rows, case, CLIP)
    expected_rows, _ = expected_policy_loss(case, CLIP)
    torch.testing.assert_close(rows.loss, expected_rows.loss.float(), rtol=1e-5, atol=0)
    assert not grad.any()  # |log ratio| > 20: the ratio has saturated


@pytest.mark.parametrize("estimator", ["k3", "k3+"])
def test_a_reference_far_above(estimator, device):
    """ref - logp > 20: the exponent of k3 is clamped, and there its slope is 0, not e^20."""
    objective = Objective(kl_coef=0.1, kl_estimator=estimator)
    case = RowCase.random(2, 90, objective, device=device)
    far = case.inputs.ref_logprobs + torch.tensor([25.0, 60.0], device=device)
    case = dataclasses.replace(case, inputs=case.inputs._replace(ref_logprobs=far))
    for row in range(2):  # a large row would hide a small one
        check_policy_loss(triton_rows, case.take(slice(row, row + 1)), objective)


def test_an_entropy_bonus_alone_keeps_a_row_alive(device):
    """Weight 0 and entropy weight not: c = 0, and the entropy's gradient is all there is."""
    objective = Objective(entropy_coef=0.05)
    case = RowCase.random(2, 90, objective, device=device)
    weight = torch.zeros_like(case.inputs.weight)
    case = dataclasses.replace(case, inputs=case.inputs._replace(weight=weight))
    check_policy_loss(triton_rows, case, objective)


def test_clip_bits(device):
    """r below, above, beyond, and inside; on a bound the gradient flows."""
    objective = Objective(clip_low=0.5, clip_high=1.0, ratio_max=4.0)
    logits = torch.zeros(6, 4, device=device)  # log-prob -log 4
    ratios = torch.tensor([0.25, 5.0, 8.0, 1.0, 2.0, 0.25])
    old = -ratios.log() - torch.tensor(4.0).log()
    advantages = [-1.0, 1.0, -1.0, -1.0, -1.0, 1.0]
    inputs = numbers(advantages).map(lambda x: x.to(device))
    inputs = inputs._replace(old_logprobs=old.to(device))
    tokens = torch.zeros(6, dtype=torch.int64, device=device)
    out = torch.empty_like(logits)
    rows = triton_rows.row_policy_loss(logits, tokens, inputs, objective, 1.0, out)
    expected = [CLIPPED_LOW, CLIPPED_HIGH, CLIPPED_MAX, 0, 0, 0]
    assert rows.clipped.tolist() == expected
    assert (out.abs().sum(1) > 0).tolist() == [bits == 0 for bits in expected]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("vocab", [300, 1537])
def test_in_place_equals_out_of_place_bit_by_bit(vocab, dtype, device, small_layout):
    case = RowCase.random(3, vocab, EVERYTHING, dtype=dtype, device=device)
    rows, grad = run_policy_loss(triton_rows, case, EVERYTHING)
    inplace_rows, inplace_grad = run_policy_loss(triton_rows, case, EVERYTHING, inplace=True)
    assert all(torch.equal(a, b) for a, b in zip(rows, inplace_rows, strict=True))
    assert torch.equal(grad, inplace_grad)


@pytest.mark.parametrize("narrow", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("vocab", [1000, 1536])
def test_gradient_in_the_upper_half_of_fp32_rows(vocab, narrow, device, small_layout):
    """The narrower gradient overwrites only logits that have been read."""
    case = RowCase.random(3, vocab, EVERYTHING, device=device)
    out = torch.empty(3, vocab, dtype=narrow, device=device)
    arguments = (case.tokens, case.inputs, EVERYTHING, case.temperature)
    expected = triton_rows.row_policy_loss(case.logits, *arguments, out)
    stats = triton_rows.row_stats(case.logits, case.tokens, case.temperature)
    row_grads = (case.inputs.weight, case.inputs.advantages)
    grad_out = torch.empty_like(out)
    triton_rows.row_grad(case.logits, case.tokens, stats, *row_grads, case.temperature, grad_out)
    for logits in (case.logits.clone(), case.logits.clone()):
        view = alias_rows(logits, narrow)
        rows = triton_rows.row_policy_loss(logits, *arguments, view)
        assert torch.equal(view, out)
        assert all(torch.equal(a, b) for a, b in zip(rows, expected, strict=True))
    logits = case.logits.clone()
    view = alias_rows(logits, narrow)
    triton_rows.row_grad(logits, case.tokens, stats, *row_grads, case.temperature, view)
    assert torch.equal(view, grad_out)


def test_other_overlaps_are_refused(device):
    case = RowCase.random(2, 64, CLIP, device=device)
    lower_half = case.logits.view(torch.bfloat16)[:, :64]
    with pytest.raises(ValueError, match="alias_rows"):
        triton_rows.row_policy_loss(case.logits, case.tokens, case.inputs, CLIP, 1.0, lower_half)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_does_not_know_how_many_there_are(dtype, device):
    """Batch invariance: the same bits alone, in any batch, and at any place in it."""
    case = RowCase.random(7, 500, EVERYTHING, dtype=dtype, device=device)
    rows, grad = run_policy_loss(triton_rows, case, EVERYTHING)
    for cut in (slice(0, 1), slice(3, 4), slice(2, 7)):
        part_rows, part_grad = run_policy_loss(triton_rows, case.take(cut), EVERYTHING)
        assert all(torch.equal(a[cut], b) for a, b in zip(rows, part_rows, strict=True))
        assert torch.equal(grad[cut], part_grad)


def test_a_lone_row_has_no_stride(device):
    """A (1, V) view may carry any row stride; the result is that of the same row in a batch."""
    case = RowCase.random(3, 320, EVERYTHING, dtype=torch.bfloat16, device=device)
    _, grad = run_policy_loss(triton_rows, case, EVERYTHING)
    lone = case.take(slice(1, 2))
    lone = lone.with_logits(lone.logits.as_strided((1, 320), (7, 1)))
    assert torch.equal(run_policy_loss(triton_rows, lone, EVERYTHING)[1], grad[1:2])


@pytest.mark.parametrize("view", ["transposed batch", "every other row", "offset", "padded"])
def test_row_strides(view, device):
    """5: any row stride, any first element."""
    case = RowCase.random(3, 320, EVERYTHING, device=device)
    if view == "transposed batch":
        logits = torch.stack([case.logits, case.logits + 1], 1)[:, 0]
    elif view == "every other row":
        logits = case.logits.repeat_interleave(2, 0)[::2]
    elif view == "offset":
        logits = torch.cat([case.logits[:, :1], case.logits], 1)[:, 1:]
    else:
        logits = torch.cat([case.logits, case.logits[:, :64] * NAN], 1)[:, :320]
    assert not logits.is_contiguous() and torch.equal(logits, case.logits)
    check_policy_loss(triton_rows, case.with_logits(logits), EVERYTHING)
    check_stats_and_grad(triton_rows, case.with_logits(logits))


def test_strided_gradient_leaves_its_neighbours_alone(device):
    case = RowCase.random(2, 100, CLIP, device=device)
    buffer = torch.full((2, 128), 7.0, device=device)
    arguments = (case.logits, case.tokens, case.inputs, CLIP, case.temperature)
    triton_rows.row_policy_loss(*arguments, buffer[:, 14:114])
    assert torch.equal(buffer[:, 14:114], run_policy_loss(triton_rows, case, CLIP)[1])
    assert (buffer[:, :14] == 7).all() and (buffer[:, 114:] == 7).all()


def test_the_ratio_moves_up_to_the_clamp_of_its_logarithm(device):
    """At |log r| = 20 exactly the slope is r, as torch.clamp's gradient has it; 0 beyond."""
    case = RowCase.random(4, 300, CLIP, device=device)
    logprobs = triton_rows.row_stats(case.logits, case.tokens, case.temperature).logprobs
    log_ratio = torch.tensor([20.0, -20.0, 20.00001, -20.00001], device=device)
    old = logprobs - log_ratio
    assert torch.equal((logprobs - old).abs() > 20, log_ratio.abs() > 20)
    inputs = RowInputs(torch.ones_like(old), -log_ratio.sign(), old, None, None)  # never clipped
    _, grad = run_policy_loss(triton_rows, dataclasses.replace(case, inputs=inputs), CLIP)
    assert grad.ne(0).any(1).tolist() == [True, True, False, False]


def test_bounds(device):
    """25: log p <= 0 and 0 <= H <= log V, from nearly uniform to nearly certain."""
    scale = torch.logspace(-4, 4, 12)[:, None]
    logits = (scale * torch.randn(12, 400, generator=torch.Generator().manual_seed(0))).to(device)
    stats = triton_rows.row_stats(logits, logits.argmax(1), 0.37)
    assert (stats.logprobs <= 0).all() and (stats.entropy >= 0).all()
    assert (stats.entropy <= torch.tensor(400.0).log().item() * (1 + 1e-6)).all()


def test_more_rows_than_a_grid_dimension_holds(device):
    """2: 70,000 rows on the GPU; interpreted, the launch grid itself is read."""
    from fastpo.kernels import _layout

    if device.type == "cuda":
        logits = torch.randn(70_000, 8, device=device)
        tokens = torch.randint(0, 8, (70_000,), device=device)
        stats = triton_rows.row_stats(logits, tokens, 1.0)
        expected = logits.log_softmax(-1).gather(1, tokens[:, None])[:, 0]
        torch.testing.assert_close(stats.logprobs, expected)
        return
    grids = []

    class Kernel:
        def __getitem__(self, grid):
            grids.append(grid)
            return lambda *arguments, **options: None

    logits = torch.empty(70_000, 8)
    _layout.launch_rows(Kernel(), logits, _layout.row_layout(logits))
    assert grids == [(70_000,)]  # the first dimension, which holds 2^31 - 1


@pytest.mark.parametrize("view", ["expanded", "every other", "column"])
def test_strides_of_the_numbers_per_token(view, device):
    """5: expanded and strided row inputs are read as what they are, never as their neighbours."""
    case = RowCase.random(4, 300, EVERYTHING, device=device, temperature=torch.full((4,), 0.8))

    def restride(x: torch.Tensor) -> torch.Tensor:
        if view == "expanded":
            return x[:1].expand(4)
        poison = torch.full_like(x, 7 if x.dtype == torch.int64 else NAN)
        pairs = torch.stack([x, poison], 1)
        return pairs[:, 0] if view == "column" else pairs.flatten()[::2]

    strided = dataclasses.replace(
        case,
        tokens=restride(case.tokens),
        temperature=restride(case.temperature),
        inputs=case.inputs.map(restride),
    )
    assert not strided.tokens.is_contiguous()
    check_policy_loss(triton_rows, strided, EVERYTHING)
    stats = triton_rows.row_stats(case.logits, strided.tokens, strided.temperature)
    c, e = strided.inputs.advantages, strided.inputs.weight
    results = []
    for numbers in ((stats, c, e), (stats, c.contiguous(), e.contiguous())):
        out = torch.empty_like(case.logits)
        arguments = (case.logits, strided.tokens, *numbers, strided.temperature, out)
        triton_rows.row_grad(*arguments)
        results.append(out)
    assert torch.equal(*results)
