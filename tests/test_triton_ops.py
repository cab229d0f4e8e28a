"""The public ops on the Triton backend: every preset, torch.compile, autocast, checkpointing."""

from __future__ import annotations

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import fastpo
from fastpo.backends import triton as triton_rows
from fastpo.objective import Objective
from fastpo.testing.budget import assert_within_budget
from fastpo.testing.rows import RowCase

pytestmark = pytest.mark.usefixtures("triton_backend")

PRESETS = {
    "ppo": fastpo.ppo(ratio_max=3.0),
    "grpo": fastpo.grpo(kl_coef=0.04),
    "dapo": fastpo.dapo(entropy_coef=0.01),
    "dr_grpo": fastpo.dr_grpo(max_length=64),
    "bnpo": fastpo.bnpo(),
    "gspo": fastpo.gspo(clip_low=0.05, clip_high=0.05),
    "luspo": fastpo.luspo(),
    "cispo": fastpo.cispo(),
    "sapo": fastpo.sapo(kl_coef=0.1, kl_estimator="k1+"),
    "gmpo": fastpo.gmpo(kl_coef=0.1, entropy_coef=0.02),
    "vespo": fastpo.vespo(),
    "gpg": fastpo.gpg(),
    "reinforce": fastpo.reinforce(kl_coef=0.1, kl_estimator="abs", kl_ratio_weighted=True),
}
BATCH, WIDTH, VOCAB = 2, 4, 307


def batch(objective: Objective, device, dtype=torch.float32) -> tuple[torch.Tensor, dict]:
    """Logits [B, T, V], and the other arguments of `policy_loss`, with a masked tail."""
    case = RowCase.random(
        BATCH * WIDTH, VOCAB, fastpo.grpo(kl_coef=0.1), dtype=dtype, device=device
    )
    shape = (BATCH, WIDTH)
    mask = torch.ones(shape, dtype=torch.bool, device=device)
    mask[1, 2:] = False
    arguments = {
        "tokens": case.tokens.view(shape),
        "advantages": case.inputs.advantages[:BATCH],
        "objective": objective,
        "mask": mask,
        "old_logprobs": case.inputs.old_logprobs.view(shape),
        "ref_logprobs": case.inputs.ref_logprobs.view(shape) if objective.kl_coef else None,
        "temperature": 0.8,
    }
    return case.logits.view(*shape, VOCAB), arguments


def differentiate(logits, arguments, *, upstream=1.0, **options):
    leaf = logits.clone().requires_grad_()
    result = fastpo.policy_loss(leaf, **arguments, **options)
    (result.loss * upstream).backward()
    return result, leaf.grad


@pytest.mark.parametrize("name", PRESETS)
def test_presets_equal_the_reference_backend(name, device):
    logits, arguments = batch(PRESETS[name], device)
    result, grad = differentiate(logits, arguments, backend="triton")
    plain, plain_grad = differentiate(logits, arguments, backend="torch")
    exact, exact_grad = differentiate(
        logits.double(),
        {k: v.double() if isinstance(v, torch.Tensor) and v.is_floating_point() else v
         for k, v in arguments.items()},
        backend="torch",
    )  # fmt: skip
    torch.testing.assert_close(result.loss.double(), exact.loss, rtol=3e-6, atol=0)
    assert_within_budget(grad, exact_grad, plain_grad, factor=4, name="gradient")
    assert set(result.metrics) == set(plain.metrics)
    for key, value in result.metrics.items():
        torch.testing.assert_close(value, plain.metrics[key], rtol=1e-4, atol=1e-5, msg=key)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("upstream", [1.0, -2.5])
def test_inplace_and_upstream_gradients(upstream, dtype, device):
    logits, arguments = batch(PRESETS["dapo"], device, dtype)
    _, grad = differentiate(logits, arguments, backend="triton", upstream=upstream)
    activation = (logits.clone().requires_grad_() * 1.0).requires_grad_()
    activation.retain_grad()
    result = fastpo.policy_loss(activation, **arguments, backend="triton", inplace=True)
    (result.loss * upstream).backward()
    assert torch.equal(activation.grad, grad)
    assert torch.equal(activation.detach(), grad)  # the gradient took the logits' place


def test_all_masked_gives_a_differentiable_zero(device):
    """8, 15: NaN logits under a mask that is False everywhere."""
    logits, arguments = batch(PRESETS["grpo"], device)
    arguments["mask"] = torch.zeros_like(arguments["mask"])
    result, grad = differentiate(logits * float("nan"), arguments, backend="triton")
    assert result.loss.requires_grad and result.loss == 0 and not grad.any()


@pytest.mark.parametrize("which", ["logprobs", "entropy", "both"])
def test_a_loss_of_ones_own(which, device):
    """7: backward through log-probs alone, entropy alone, and both."""
    logits, arguments = batch(PRESETS["grpo"], device)
    grads = []
    for backend, wide in (
        ("triton", torch.float32),
        ("torch", torch.float32),
        ("torch", torch.float64),
    ):
        leaf = logits.to(wide).clone().requires_grad_()
        out = fastpo.token_logprobs(leaf, arguments["tokens"], temperature=0.7, backend=backend)
        terms = {"logprobs": out.logprobs.square().sum(), "entropy": out.entropy.sum()}
        loss = sum(terms.values()) if which == "both" else terms[which]
        loss.backward()
        grads.append(leaf.grad)
    ours, plain, exact = grads
    assert_within_budget(ours, exact, plain, factor=4)


@pytest.mark.parametrize("name", ["dapo", "gspo"])
def test_linear_ops(name, device):
    """Hidden states and a head: `row_policy_loss` in place in fp32 logits, or stats then grad."""
    _, arguments = batch(PRESETS[name], device)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(BATCH, WIDTH, 16, generator=generator).to(device)
    weight = torch.randn(VOCAB, 16, generator=generator).to(device)
    results = []
    for backend in ("triton", "torch"):
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        result = fastpo.linear_policy_loss(h, w, **arguments, backend=backend)
        result.loss.backward()
        results.append((result.loss.detach(), h.grad, w.grad))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["dapo", pytest.param("gspo", marks=pytest.mark.slow)])
def test_torch_compile_fullgraph(name, device):
    logits, arguments = batch(PRESETS[name], device)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def step(logits):
        return fastpo.policy_loss(logits, **arguments, backend="triton").loss

    leaf = logits.clone().requires_grad_()
    loss = step(leaf)
    loss.backward()
    expected, grad = differentiate(logits, arguments, backend="triton")
    torch.testing.assert_close(loss, expected.loss)
    torch.testing.assert_close(leaf.grad, grad)


@pytest.mark.slow
def test_operators_keep_their_schema(device):
    """torch.library.opcheck: declared mutations, fakes and dispatch of every operator."""
    case = RowCase.random(3, 64, fastpo.grpo(kl_coef=0.1, entropy_coef=0.1), device=device)
    ops, logits, tokens = torch.ops.fastpo, case.logits, case.tokens
    stats = triton_rows.row_stats(logits, tokens, 1.0)
    x = case.inputs.weight
    row_grad = (tokens, stats.row_max, stats.log_sum, stats.entropy, x, x, 1.0, None)
    calls = [
        (ops.triton_row_stats, (logits, tokens, 1.0, x, x > 0)),
        (ops.triton_row_grad_out, (logits, *row_grad, torch.zeros_like(logits))),
    ]
    for op, arguments in calls:
        torch.library.opcheck(op.default, arguments)


def test_autocast_and_checkpointing(device):
    """The op computes in fp32 under autocast, and again when its caller is checkpointed."""
    logits, arguments = batch(PRESETS["dapo"], device)
    expected, grad = differentiate(logits, arguments, backend="triton")
    leaf = logits.clone().requires_grad_()

    def caller(x):
        return fastpo.policy_loss(x * 1.0, **arguments, backend="triton").loss

    with torch.autocast(device.type, dtype=torch.bfloat16):
        loss = checkpoint(caller, leaf, use_reentrant=False)
    loss.backward()
    torch.testing.assert_close(loss, expected.loss)
    torch.testing.assert_close(leaf.grad, grad)


def test_an_explicit_request_never_falls_back(monkeypatch):
    """28: where Triton cannot run, asking for it raises, with what would help."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "no GPU" in triton_rows.unavailable(torch.device("cuda"))
    assert "got mps" in triton_rows.unavailable(torch.device("mps"))
    monkeypatch.setattr(triton_rows.importlib, "import_module", _import_nothing)
    assert "pip install triton" in triton_rows.unavailable(torch.device("cpu"))


def _import_nothing(name: str):
    raise ImportError(f"No module named {name!r}")


@pytest.mark.gpu
def test_no_host_synchronization(device):
    """Forward and backward enqueue work and never wait for it."""
    logits, arguments = batch(PRESETS["dapo"], device)
    differentiate(logits, arguments, backend="triton")  # compile first
    leaf = logits.clone().requires_grad_()
    torch.cuda.set_sync_debug_mode("error")
    try:
        fastpo.policy_loss(leaf, **arguments, backend="triton").loss.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_beyond_two_to_the_31(device):
    """1: the last rows of a tensor of just over 2^31 elements."""
    vocab = 262144
    rows = 2**31 // vocab + 2
    if torch.cuda.mem_get_info()[0] < 3 * rows * vocab * 2:
        pytest.skip("needs 13 GB of free GPU memory")
    logits = torch.zeros(rows, vocab, dtype=torch.bfloat16, device=device)
    case = RowCase.random(3, vocab, fastpo.dapo(), dtype=torch.bfloat16, device=device)
    logits[-3:] = case.logits
    weight = torch.zeros(rows, device=device)
    weight[-3:] = case.inputs.weight
    inputs = case.inputs._replace(
        weight=weight,
        advantages=case.inputs.advantages.repeat(rows // 3 + 1)[-rows:],
        old_logprobs=case.inputs.old_logprobs.repeat(rows // 3 + 1)[-rows:],
    )
    tokens = case.tokens.repeat(rows // 3 + 1)[-rows:]
    arguments = (tokens, inputs, fastpo.dapo(), case.temperature)
    out = torch.empty_like(case.logits)
    triton_rows.row_policy_loss(case.logits, case.tokens, case.inputs, *arguments[2:], out)
    triton_rows.row_policy_loss(logits, *arguments, logits)
    assert torch.equal(logits[-3:], out) and not logits[:-3].any()
