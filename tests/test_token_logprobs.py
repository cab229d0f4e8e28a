"""`token_logprobs`: values, both gradients, hostile logits, on every backend of this machine."""

from __future__ import annotations

import pytest
import torch

import fastpo
from fastpo import backends
from fastpo.backends import unavailable
from fastpo.testing.budget import assert_within_budget

BACKENDS = [
    pytest.param(name, marks=pytest.mark.slow if name == "triton" else ())  # interpreted
    for name in ("torch", "cpp", "triton")
    if backends.unavailable(name) is None
]
NEG_INF = float("-inf")


def eager(logits, tokens, temperature, dtype):
    """log_softmax, gather and entropy in `dtype`; -inf logits contribute nothing to the entropy."""
    leaf = logits.to(dtype, copy=True).requires_grad_()
    scaled = (leaf / temperature).log_softmax(-1)
    terms = scaled.exp() * scaled.masked_fill(scaled == NEG_INF, 0)
    return leaf, scaled.gather(-1, tokens[..., None])[..., 0], -terms.sum(-1)


def gradients(leaf, logprobs, entropy, upstream):
    loss = sum(
        (out * grad).sum()
        for out, grad in zip((logprobs, entropy), upstream, strict=True)
        if grad is not None
    )
    return torch.autograd.grad(loss, leaf)[0]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("vocab", [7, 1000, 1152, 50257])
@pytest.mark.parametrize("through", ["logprobs", "entropy", "both"])
def test_values_and_gradients(vocab, dtype, through, backend):
    """REGRESSIONS 7: entropy carries its gradient, alone and together with the log-prob."""
    gen = torch.Generator().manual_seed(vocab)
    rows = 5 if vocab > 5000 else 24  # enough that the baseline is no stroke of luck
    logits = (2 * torch.randn(rows, vocab, generator=gen)).to(dtype)
    tokens = torch.randint(0, vocab, (rows,), generator=gen)
    upstream = torch.randn(2, rows, generator=gen)
    upstream = (
        None if through == "entropy" else upstream[0],
        None if through == "logprobs" else upstream[1],
    )
    exact = eager(logits, tokens, 0.7, torch.float64)
    rough = eager(logits, tokens, 0.7, dtype)
    leaf = logits.clone().requires_grad_()
    fused = fastpo.token_logprobs(leaf, tokens, temperature=0.7, backend=backend)
    assert_within_budget(
        fused.logprobs.detach(), exact[1].detach(), rough[1].detach(), name="logprobs"
    )
    assert_within_budget(
        fused.entropy.detach(), exact[2].detach(), rough[2].detach(), name="entropy"
    )
    assert_within_budget(
        gradients(leaf, *fused, upstream), gradients(*exact, upstream), gradients(*rough, upstream)
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_vocabulary_of_one(dtype, backend):
    """The only token has log-prob 0, entropy 0 and no gradient, up to the rounding of its logit."""
    logits = (2 * torch.randn(8, 1, generator=torch.Generator().manual_seed(1))).to(dtype)
    leaf = logits.clone().requires_grad_()
    fused = fastpo.token_logprobs(
        leaf, torch.zeros(8, dtype=torch.long), temperature=0.7, backend=backend
    )
    (fused.logprobs + fused.entropy).sum().backward()
    rounding = torch.finfo(torch.float32).eps * (logits.float() / 0.7).abs().max()
    for result in (fused.logprobs, fused.entropy, leaf.grad.float()):
        assert (result.abs() <= rounding).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shift", [-110.0, 80.0, 1e4])
def test_shifted_logits(shift, backend):
    """All logits near -110 underflow exp, near 80 overflow its sum, near 1e4 round an lse."""
    base = torch.randn(4, 1152, generator=torch.Generator().manual_seed(1))
    logits = base + shift
    tokens = torch.tensor([0, 1, 1150, 1151])
    _, logprobs, entropy = eager(logits, tokens, 1.0, torch.float64)
    _, rough, rough_entropy = eager(logits, tokens, 1.0, torch.float32)
    fused = fastpo.token_logprobs(logits, tokens, backend=backend)
    assert_within_budget(fused.logprobs, logprobs.detach(), rough.detach())
    assert_within_budget(fused.entropy, entropy.detach(), rough_entropy.detach())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("vocab", [1000, 9001])
@pytest.mark.parametrize(
    "hidden",
    [
        pytest.param(slice(0, 600), id="first block"),
        pytest.param(slice(-300, None), id="last block"),
        pytest.param(slice(None), id="all but the token"),
    ],
)
def test_minus_infinity_has_no_probability(hidden, vocab, backend):
    """REGRESSIONS 10: no -inf minus -inf, no 0 * -inf."""
    logits = torch.randn(2, vocab, generator=torch.Generator().manual_seed(2))
    tokens = torch.tensor([650, 660])
    kept = logits[torch.arange(2), tokens]
    logits[:, hidden] = NEG_INF
    logits[torch.arange(2), tokens] = kept
    exact = eager(logits, tokens, 1.0, torch.float64)
    rough = eager(logits, tokens, 1.0, torch.float32)
    leaf = logits.clone().requires_grad_()
    fused = fastpo.token_logprobs(leaf, tokens, backend=backend)
    assert_within_budget(fused.logprobs.detach(), exact[1].detach(), rough[1].detach())
    assert_within_budget(fused.entropy.detach(), exact[2].detach(), rough[2].detach())
    upstream = (torch.tensor([1.0, -2.0]), torch.tensor([0.5, 0.25]))
    grad = gradients(leaf, *fused, upstream)
    assert (grad[logits == NEG_INF] == 0).all() and grad.isfinite().all()
    probs = logits.double().softmax(-1)
    onehot = torch.nn.functional.one_hot(tokens, vocab)
    inner = logits.double().masked_fill(logits == NEG_INF, 0)
    spread = probs * ((probs * inner).sum(-1, keepdim=True) - inner)
    truth = upstream[0][:, None] * (onehot - probs) + upstream[1][:, None] * spread
    assert_within_budget(grad, truth, truth.float())


@pytest.mark.parametrize("backend", BACKENDS)
def test_token_with_minus_infinity(backend):
    """REGRESSIONS 10: the sampled token itself at -inf: log-prob -inf, entropy finite."""
    logits = torch.zeros(1, 100)
    logits[0, 3] = NEG_INF
    fused = fastpo.token_logprobs(logits, torch.tensor([3]), backend=backend)
    assert fused.logprobs.item() == NEG_INF
    torch.testing.assert_close(fused.entropy, torch.tensor([99.0]).log())


@pytest.mark.parametrize("backend", BACKENDS)
def test_bounds(backend):
    """REGRESSIONS 25: logp <= 0 and 0 <= entropy <= log V, also for one-hot and uniform rows."""
    gen = torch.Generator().manual_seed(3)
    logits = torch.cat([torch.randn(64, 777, generator=gen) * s for s in (1e-3, 1, 30, 1e4)])
    tokens = logits.argmax(-1)
    fused = fastpo.token_logprobs(logits, tokens, backend=backend)
    limit = torch.tensor(777.0).log().item()
    assert (fused.logprobs <= 0).all()
    assert (fused.entropy >= 0).all()
    assert (fused.entropy <= limit * (1 + 1e-6)).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_upstream_gradients(backend):
    """REGRESSIONS 5: expanded, strided and offset incoming gradients."""
    logits = torch.randn(6, 33, generator=torch.Generator().manual_seed(4))
    tokens = torch.arange(6)
    results = []
    upstreams = (
        torch.ones(6),
        torch.ones(1).expand(6),
        torch.ones(12)[::2],
        torch.ones(9)[3:],
    )
    for upstream in upstreams:
        leaf = logits.clone().requires_grad_()
        out = fastpo.token_logprobs(leaf, tokens, backend=backend)
        torch.autograd.backward([out.logprobs, out.entropy], [upstream, upstream])
        results.append(leaf.grad)
    assert all(torch.equal(results[0], other) for other in results[1:])


@pytest.mark.parametrize("backend", BACKENDS)
def test_inplace_backward(backend):
    """REGRESSIONS 9: same bits, no second buffer, second use raises."""
    logits = torch.randn(6, 33, generator=torch.Generator().manual_seed(5))
    tokens = torch.arange(6)
    plain = logits.clone().requires_grad_()
    fastpo.token_logprobs(plain, tokens, backend=backend).logprobs.sum().backward()
    leaf = logits.clone().requires_grad_()
    loss = fastpo.token_logprobs(
        leaf, tokens, inplace_backward=True, backend=backend
    ).logprobs.sum()
    loss.backward(retain_graph=True)
    assert torch.equal(leaf.grad, plain.grad) and leaf.grad.data_ptr() == leaf.data_ptr()
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


@pytest.mark.parametrize("backend", BACKENDS)
def test_int32_tokens(backend):
    logits = torch.randn(6, 33)
    tokens = torch.arange(6)
    a = fastpo.token_logprobs(logits, tokens, backend=backend)
    b = fastpo.token_logprobs(logits, tokens.int(), backend=backend)
    assert torch.equal(a.logprobs, b.logprobs)


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiles_without_graph_breaks(backend):
    """torch.compile(fullgraph=True) sees the row primitives as opaque ops."""
    tokens = torch.arange(6)

    def loss(logits, advantages):
        return fastpo.policy_loss(
            logits, tokens, advantages, objective=fastpo.dapo(entropy_coef=0.01), backend=backend
        ).loss

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    logits = torch.randn(6, 33, generator=torch.Generator().manual_seed(6))
    grads = []
    for call in (loss, compiled):
        leaf = logits.clone().requires_grad_()
        call(leaf, torch.linspace(-1, 1, 6)).backward()
        grads.append(leaf.grad)
    torch.testing.assert_close(*grads)
    assert grads[0].norm() > 0


def test_compiles_for_any_temperature_and_normalizer():
    """They change every step: as symbols they pass the checks without a graph break."""
    tokens, graphs = torch.arange(6), []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    @torch.compile(fullgraph=True, backend=backend)
    def loss(logits, temperature, normalizer):
        options = {"objective": fastpo.dapo(), "temperature": temperature, "normalizer": normalizer}
        return fastpo.policy_loss(logits, tokens, torch.ones(6), **options).loss

    logits = torch.randn(6, 33)
    for temperature, normalizer in ((1.0, 5), (0.7, 6), (0.8, 9), (0.9, 11)):
        expected = torch.tensor(-6.0 / normalizer)  # on-policy: r = 1
        torch.testing.assert_close(loss(logits, temperature, normalizer), expected)
    assert len(graphs) == 2  # with the values of the first call, then with symbols


@pytest.mark.parametrize("backend", BACKENDS)
def test_under_gradient_checkpointing_and_autocast(backend):
    weight = torch.randn(33, 8, requires_grad=True)
    hidden = torch.randn(6, 8)
    advantages = torch.linspace(-1, 1, 6)

    def head(hidden):
        logits = hidden @ weight.T
        return fastpo.policy_loss(
            logits, torch.arange(6), advantages, objective=fastpo.dapo(), backend=backend
        ).loss

    with torch.autocast("cpu", dtype=torch.bfloat16):
        (plain,) = torch.autograd.grad(head(hidden), weight)
        checkpointed = torch.utils.checkpoint.checkpoint(head, hidden, use_reentrant=False)
        (again,) = torch.autograd.grad(checkpointed, weight)
    assert torch.equal(plain, again) and plain.norm() > 0


NAMES = ("log_sum_sq_probs", "mean_logits", "is_top1")


@pytest.mark.parametrize("backend", [x for x in ("torch", "cpp") if unavailable(x) is None])
@pytest.mark.parametrize("head", ["logits", "hidden"])
def test_statistics(head, backend):
    """From the launch that makes the log-probs, which stay the same bit by bit; no gradient."""
    hidden, weight = torch.randn(3, 7, 8), 3 * torch.randn(301, 8) * 8**-0.5
    logits = 4 * (hidden @ weight.t() / 4).tanh()
    tokens, mask = logits.argmax(-1), torch.rand(3, 7) > 0.3
    tokens[:, ::2] = 5
    given, options = (logits,), {"temperature": 0.7, "mask": mask, "backend": backend}
    op = fastpo.token_logprobs
    if head == "hidden":
        given, op = (hidden, weight), fastpo.linear_token_logprobs
        options |= {"softcap": 4.0, "chunk_tokens": 5}
    leaf = given[0].clone().requires_grad_()
    plain = op(leaf, *given[1:], tokens, **options)
    result = op(leaf, *given[1:], tokens, statistics=NAMES, **options)
    assert torch.equal(result.logprobs, plain.logprobs)
    grads = [torch.autograd.grad(x.logprobs.sum(), leaf)[0] for x in (plain, result)]
    assert torch.equal(*grads) and not any(x.requires_grad for x in result[2:])
    scaled = logits.double() / 0.7
    squares = (2 * scaled.log_softmax(-1)).logsumexp(-1)
    for got, want in zip(result[2:], (squares, scaled.mean(-1)), strict=False):
        torch.testing.assert_close(got, want.where(mask, 0).float(), rtol=1e-5, atol=1e-5)
    assert torch.equal(result.is_top1, (logits.argmax(-1) == tokens) & mask)
    one = op(leaf, *given[1:], tokens, statistics=["is_top1"], **options)
    assert one.mean_logits is None and torch.equal(one.is_top1, result.is_top1)


@pytest.mark.parametrize(
    ("statistics", "error", "words"),
    [("is_top1", TypeError, "is str"), (("top1",), ValueError, "'top1', expected names among")],
)
def test_statistics_that_are_none(statistics, error, words):
    logits, tokens = torch.randn(2, 9), torch.zeros(2, dtype=torch.int64)
    with pytest.raises(error, match=words):
        fastpo.token_logprobs(logits, tokens, statistics=statistics)
    with pytest.raises(error, match=words):
        fastpo.linear_token_logprobs(logits, torch.randn(5, 9), tokens, statistics=statistics)
