"""The linear ops on "triton-exp", which stores exponentials in place of logits, against fp64."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import fastpo
from fastpo.kernels import exp_logits, exp_sums
from fastpo.ops.linear_exp import LOG_LARGEST_SUM
from fastpo.testing.budget import assert_within_budget, cosine
from fastpo.testing.linear import LinearCase
from fastpo.testing.objectives import PRESETS

pytestmark = pytest.mark.usefixtures("poisoned_empty", "triton_backend")

HEADS = {
    "plain": {},
    "bias": {"bias": True},
    "scale": {"logit_scale": 0.3, "temperature": 0.7},
    "softcap": {"softcap": 4.0},
    "all": {"bias": True, "logit_scale": 1.7, "softcap": 5.0, "temperature": 0.6},
}
QUICK = ["dapo_all", "cispo", "grpo_kl", "gspo", "vespo"]


def bfloat16_case(device, **options) -> LinearCase:
    case = LinearCase.random(dtype=torch.bfloat16, width=64, **options)
    moved = {k: v.to(device) for k, v in vars(case).items() if isinstance(v, torch.Tensor)}
    return replace(case, **moved)


def low_precision_gradients(case: LinearCase, objective) -> list[torch.Tensor]:
    """What plain torch makes of bf16 operands at best: fp32 logits, a bf16 gradient of them, fp32
    sums in the GEMMs, bf16 results."""
    leaves = [x.float().requires_grad_() for x in case.leaves()]
    raw = leaves[0] @ leaves[1].t()
    raw = raw + leaves[2] if len(leaves) == 3 else raw
    logits = raw * case.logit_scale
    if case.softcap is not None:
        logits = case.softcap * torch.tanh(logits / case.softcap)
    t = case.temperature
    scores = (logits / (t[..., None] if isinstance(t, torch.Tensor) else t)).log_softmax(-1)
    logprobs = scores.gather(-1, case.tokens[..., None])[..., 0]
    loss = fastpo.policy_loss_from_logprobs(
        logprobs,
        case.advantages,
        entropy=-(scores.exp() * scores).sum(-1),
        **case.options(objective),
    ).loss
    (g,) = torch.autograd.grad(loss, raw)
    g = g.bfloat16().float().flatten(0, 1)
    grads = [g @ leaves[1], g.t() @ leaves[0].flatten(0, 1), g.sum(0)]
    return [x.detach().bfloat16() for x in grads[: len(leaves)]]


def check(case: LinearCase, objective, run, **options) -> None:
    """Numbers within 3 times, gradients within twice plain torch's error in low precision."""
    exact, exact_grads = case.eager(objective, torch.float64)
    plain, _ = case.eager(objective, torch.float32)
    result, grads = run(objective, **({"backend": "triton-exp"} | options))
    assert_within_budget(result.logprobs, exact.logprobs, plain.logprobs, factor=3)
    assert_within_budget(result.entropy, exact.entropy, plain.entropy, factor=5)
    # A sum of terms of either sign: its rounding error is that of terms of order 1.
    scale = exact.loss.abs().clamp(min=1)
    assert (result.loss - exact.loss).abs() < 2e-6 * scale + 4 * (plain.loss - exact.loss).abs()
    baseline = low_precision_gradients(case, objective)
    names = ("hidden", "weight", "bias")
    for name, grad, truth, low in zip(names, grads, exact_grads, baseline, strict=False):
        assert grad.dtype == torch.bfloat16
        truth = truth.reshape(grad.shape)
        # In fp32: the budget then has no unit in the last place of bf16 to spare.
        low = low.float().view(grad.shape)
        assert_within_budget(grad.float(), truth, low, factor=2, name=name)
        assert cosine(grad, truth) > 1 - 2e-5


PAIRS = [
    pytest.param(preset, head, marks=() if preset in QUICK else pytest.mark.slow)
    for preset in PRESETS
    for head in (HEADS if preset == "dapo_all" else ("plain", "all"))
]


@pytest.mark.parametrize(("preset", "head"), PAIRS)
def test_matches_all_logits_in_fp64(preset, head, device):
    case = bfloat16_case(device, **HEADS[head])
    check(case, PRESETS[preset], case.fused)


@pytest.mark.parametrize("chunk_tokens", [16, 50])
@pytest.mark.parametrize("preset", ["dapo", "gspo"])
def test_chunks(preset, chunk_tokens, device):
    """Chunks of 16 tokens cut sequences of 21, which then take the two steps."""
    case = bfloat16_case(device, bias=True)
    check(case, PRESETS[preset], case.fused, chunk_tokens=chunk_tokens)


@pytest.mark.parametrize("backend", ["triton-exp", "triton-exp-kept"])
@pytest.mark.parametrize("head", ["plain", "all"])
@pytest.mark.parametrize("preset", ["dapo", "dapo_all"])
def test_two_steps(preset, head, backend, device):
    """`linear_token_logprobs` and a loss of one's own, E computed again or kept."""
    case = bfloat16_case(device, **HEADS[head])
    check(case, PRESETS[preset], case.two_step, backend=backend, chunk_tokens=40)


def test_fused_equals_two_steps_bit_for_bit(device):
    """REGRESSIONS 3, 13: the same log-probs, so that an on-policy ratio is exactly 1."""
    case = bfloat16_case(device, softcap=4.0)
    fused, _ = case.fused(fastpo.dapo(), backend="triton-exp")
    for backend in ("triton-exp", "triton-exp-kept"):
        steps, _ = case.two_step(fastpo.dapo(), backend=backend, chunk_tokens=16)
        assert torch.equal(fused.logprobs, steps.logprobs)
        assert torch.equal(fused.entropy, steps.entropy)


def test_kept_exponentials_serve_one_backward(device):
    """A second one computes them again: it may not read what the first made of them."""
    case = bfloat16_case(device)
    leaves = case.leaves()
    scored = fastpo.linear_token_logprobs(*leaves, case.tokens, backend="triton-exp-kept")
    loss = (scored.logprobs * case.advantages + scored.entropy).sum()
    first, second = (torch.autograd.grad(loss, leaves, retain_graph=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert first[0].any()


def launches(monkeypatch, case, run, **options) -> tuple[int, int]:
    """(logits GEMMs of all rows, floating-point operations of the other GEMMs over 2 N D V)."""
    calls, original = [], exp_logits.exp_logits

    def counted(*args, **kwargs):
        calls.append(kwargs.get("rows") is None)
        return original(*args, **kwargs)

    monkeypatch.setattr(exp_logits, "exp_logits", counted)
    with FlopCounterMode(display=False) as counter:
        run(fastpo.reinforce(), **options)
    n, (v, d) = case.tokens.numel(), case.weight.shape
    return sum(calls), round(counter.get_total_flops() / (2 * n * d * v), 2)


def test_operations(monkeypatch, device):
    """6 N D V: one GEMM of logits and two plain ones; 8 for two steps, 6 with E kept."""
    case = replace(bfloat16_case(device), mask=None)
    case = replace(case, advantages=case.advantages + 10)
    assert launches(monkeypatch, case, case.fused, backend="triton-exp") == (1, 2.0)
    assert launches(monkeypatch, case, case.two_step, backend="triton-exp") == (2, 2.0)
    assert launches(monkeypatch, case, case.two_step, backend="triton-exp-kept") == (1, 2.0)


@pytest.mark.parametrize("frozen", [0, 1])
def test_frozen_operands_cost_nothing(frozen, monkeypatch, device):
    """REGRESSIONS 6: no GEMM for a weight or hidden states without a gradient."""
    case = replace(bfloat16_case(device), mask=None)

    def run(objective, **options):
        leaves = case.leaves()
        leaves[frozen].requires_grad_(False)
        loss = fastpo.linear_policy_loss(
            *leaves, case.tokens, case.advantages + 10, **case.options(objective), **options
        ).loss
        (grad,) = torch.autograd.grad(loss, [leaves[1 - frozen]])
        assert grad.any()

    assert launches(monkeypatch, case, run, backend="triton-exp")[1] == 1.0


def test_upstream_gradient_scales_all_three(device):
    case = bfloat16_case(device, bias=True)
    leaves = case.leaves()
    loss = fastpo.linear_policy_loss(
        *leaves[:2],
        case.tokens,
        case.advantages,
        bias=leaves[2],
        backend="triton-exp",
        **case.options(fastpo.dapo()),
    ).loss
    scaled = torch.autograd.grad(loss * -4.0, leaves)
    plain = case.fused(fastpo.dapo(), backend="triton-exp")[1]
    for a, b in zip(scaled, plain, strict=True):
        assert torch.equal(a, -4 * b) and b.any()


def test_masked_rows_may_hold_anything(device):
    """REGRESSIONS 17: NaN hidden states, ids outside and NaN numbers under a False mask."""
    case = bfloat16_case(device)
    expected = case.fused(fastpo.dapo(), backend="triton-exp")
    dead = ~case.mask
    dirty = replace(
        case,
        hidden=case.hidden.masked_fill(dead[..., None], torch.nan),
        tokens=case.tokens.masked_fill(dead, -100),
        old_logprobs=case.old_logprobs.masked_fill(dead, torch.nan),
        advantages=case.advantages.masked_fill(dead, torch.inf),
    )
    result, grads = dirty.fused(fastpo.dapo(), backend="triton-exp")
    assert torch.equal(result.loss, expected[0].loss)
    assert all(torch.equal(a, b) for a, b in zip(grads, expected[1], strict=True))
    nobody = replace(case, mask=torch.zeros_like(case.mask))
    result, grads = nobody.fused(fastpo.dapo(), backend="triton-exp")
    assert result.loss == 0 and not any(x.any() for x in grads)


def test_improbable_tokens_reach_the_loss(device):
    """Rows redone on device: SFT-like log-probs of -100 and less, through the whole op."""
    case = bfloat16_case(device)
    hidden = case.hidden.clone()
    weight = case.weight.float()
    for row, number in enumerate((65, 105, 300)):
        token = case.tokens[0, row]
        other = weight[(token + 7) % 307]
        hidden[0, row] = (other * (number / (other @ (other - weight[token])))).bfloat16()
    mask = case.mask.clone()
    mask[0, :3] = True
    case = replace(case, hidden=hidden, mask=mask)
    exact, _ = case.eager_logprobs(torch.float64)
    assert (exact[0, :3] < -60).all()
    case = replace(case, old_logprobs=(exact.detach() + 0.1).float())
    check(case, fastpo.dapo(), case.fused)
    assert pytest.approx(math.exp(LOG_LARGEST_SUM)) == exp_sums.LARGEST_SUM
    for objective in (fastpo.dapo(), fastpo.gspo()):
        result, _ = case.fused(objective, backend="triton-exp", chunk_tokens=4)
        below = (exact < -60)[case.mask].sum()
        assert result.metrics["redone"] == below >= 3 and result.means()["redone"] > 0


@pytest.mark.parametrize("backend", ["triton-exp", "triton-exp-kept"])
def test_returned_numbers_may_be_edited(backend, device):
    """REGRESSIONS 44: in place, before the backward, which reads none of them."""
    case = bfloat16_case(device)
    leaves = case.leaves()
    grads = []
    for edit in (False, True):
        scored = fastpo.linear_token_logprobs(*leaves, case.tokens, backend=backend)
        if edit:
            scored.logprobs.mul_(2)
            scored.entropy.zero_()
        grads.append(torch.autograd.grad(scored.logprobs.sum() * (1 - edit / 2), leaves))
    assert all(torch.equal(a, b) and a.any() for a, b in zip(*grads, strict=True))


def test_an_empty_batch(device):
    """REGRESSIONS 43: no rows, zero gradients."""
    hidden = torch.empty(0, 64, dtype=torch.bfloat16, device=device, requires_grad=True)
    weight = torch.randn(307, 64, device=device).bfloat16().requires_grad_()
    tokens, advantages = torch.empty(0, dtype=torch.int64, device=device), torch.empty(0)
    options = {"backend": "triton-exp"}
    scored = fastpo.linear_token_logprobs(hidden, weight, tokens, **options)
    loss = fastpo.linear_policy_loss(
        hidden, weight, tokens, advantages.to(device), objective=fastpo.dapo(), **options
    ).loss
    for scalar in (scored.logprobs.sum(), loss):
        grads = torch.autograd.grad(scalar, [hidden, weight])
        assert scalar == 0 and grads[0].shape == (0, 64) and not grads[1].any()


def test_refusals(device):
    """REGRESSIONS 4, 28: what this way cannot do is named in one line, and nothing falls back."""
    case = bfloat16_case(device)
    hidden, weight = case.hidden, case.weight
    arguments = {"tokens": case.tokens, "backend": "triton-exp"}
    for dtype in (torch.float16, torch.float32):
        with pytest.raises(ValueError, match=f"got {dtype} operands: cast"):
            fastpo.linear_token_logprobs(hidden.to(dtype), weight.to(dtype), **arguments)
    with pytest.raises(ValueError, match="never stores logits"):
        fastpo.linear_token_logprobs(hidden, weight, **arguments, logits_dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="got logits: use backend='triton'"):
        fastpo.token_logprobs(hidden, case.tokens % 64, backend="triton-exp")


@pytest.mark.gpu
def test_no_host_sync_on_gpu(device):
    case = bfloat16_case(device)
    case.fused(fastpo.dapo(), backend="triton-exp")
    leaves = case.leaves()
    torch.cuda.set_sync_debug_mode("error")
    try:
        result = fastpo.linear_policy_loss(
            *leaves,
            case.tokens,
            case.advantages,
            backend="triton-exp",
            **case.options(fastpo.dapo()),
        )
        torch.autograd.grad(result.loss, leaves)
    finally:
        torch.cuda.set_sync_debug_mode("default")
