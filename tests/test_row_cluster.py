"""The row-resident CUDA kernels against the float64 specification: emulated here, real on a GPU.

The emulation runs csrc/row_cluster.h on the CPU, which also is the kernels' code. Short rows span
several thread blocks there if shared memory is said to be small.
"""

from __future__ import annotations

import dataclasses
import math
import shutil

import pytest
import torch
from cluster_emulation import H100_BYTES, ClusterOnGpu, EmulatedCluster, build

import fastpo
from fastpo.backends.base import alias_rows
from fastpo.objective import KL_ESTIMATORS, Objective
from fastpo.testing.objectives import GATES, PRESETS
from fastpo.testing.rows import (
    RowCase,
    check_confident_tokens,
    check_no_subnormal_leaves,
    check_policy_loss,
    check_stats_and_grad,
    run_policy_loss,
)

COMPILER = shutil.which("g++") or shutil.which("clang++")
pytestmark = [
    pytest.mark.usefixtures("poisoned_empty"),
    pytest.mark.skipif(COMPILER is None, reason="no C++ compiler"),
]

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
CLIP = Objective(clip_low=0.2, clip_high=0.28)
EVERYTHING = Objective(kl_coef=0.1, kl_estimator="k3", kl_ratio_weighted=True, entropy_coef=0.05)
TOKEN_LEVEL = {name: x for name, x in PRESETS.items() if x.is_token_level}
TOKEN_LEVEL |= {f"{name}, firing": x for name, x in GATES.items()}


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    return build(COMPILER, tmp_path_factory.mktemp("emulation"))


@pytest.fixture
def on_gpu():
    from fastpo.backends import cuda

    if (reason := cuda.unavailable(torch.device("cuda"))) is not None:
        pytest.skip(reason)
    return ClusterOnGpu()


GPU = pytest.param("gpu", marks=pytest.mark.gpu)


@pytest.fixture(params=[H100_BYTES, 1024, 512, GPU])
def cluster(request):
    """Clusters as on an H100, such whose blocks hold 256 or 128 fp32 logits at most, a GPU's."""
    if request.param == "gpu":
        return request.getfixturevalue("on_gpu")
    return EmulatedCluster(request.getfixturevalue("library"), request.param)


@pytest.fixture(params=[H100_BYTES, GPU])
def wide(request):
    """Clusters as on an H100, or on one."""
    if request.param == "gpu":
        return request.getfixturevalue("on_gpu")
    return EmulatedCluster(request.getfixturevalue("library"))


@pytest.mark.parametrize("name", TOKEN_LEVEL)
def test_every_token_level_preset(name, cluster):
    objective = TOKEN_LEVEL[name]
    case = RowCase.random(12, 600, objective, extras=objective.takes_clip_bounds)
    check_policy_loss(cluster, case, objective)
    if isinstance(cluster, EmulatedCluster):
        assert cluster.blocks == {H100_BYTES: 1, 1024: 4, 512: 8}[cluster.most_bytes]
    few = RowCase.random(24, 3, objective)
    check_policy_loss(cluster, few, objective)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("estimator", KL_ESTIMATORS)
def test_kl_estimators(estimator, weighted, cluster):
    objective = Objective(kl_coef=0.3, kl_estimator=estimator, kl_ratio_weighted=weighted)
    check_policy_loss(cluster, RowCase.random(6, 307, objective), objective)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab", [1, 2, 7, 8, 9, 255, 256, 1000, 1152])
def test_awkward_vocabularies(vocab, dtype, library):
    """Slices that end within a vector, hold one column or none, in clusters of 1 to 8 blocks."""
    for most_bytes in (H100_BYTES, 1024, -(-vocab * dtype.itemsize // 128) * 16):
        cluster = EmulatedCluster(library, most_bytes)
        temperature = torch.linspace(0.5, 2, 5)
        case = RowCase.random(5, vocab, EVERYTHING, dtype=dtype, temperature=temperature)
        check_policy_loss(cluster, case, EVERYTHING)
        check_stats_and_grad(cluster, case)
        if vocab == 1:
            rows, grad = run_policy_loss(cluster, case, EVERYTHING)
            assert not any(x.any() for x in (rows.logprobs, rows.entropy, grad))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("vocab", "blocks"), [(50257, (8, 4)), (151936, (8, 8))])
def test_real_vocabularies(vocab, blocks, dtype, wide):
    """Rows of 50,257 logits start at every alignment there is."""
    case = RowCase.random(3, vocab, EVERYTHING, dtype=dtype)
    check_policy_loss(wide, case, EVERYTHING)
    check_stats_and_grad(wide, case)
    check_policy_loss(wide, RowCase.random(3, vocab, CLIP, dtype=dtype), CLIP, inplace=True)
    if isinstance(wide, EmulatedCluster):
        assert wide.blocks == blocks[dtype.itemsize == 2]


def test_a_row_that_no_cluster_holds(library):
    logits = torch.zeros(1, 8 * 512 // 4 + 1)
    with pytest.raises(ValueError, match="no cluster"):
        EmulatedCluster(library, 512).row_stats(logits, torch.zeros(1, dtype=torch.int64), 1.0)


@pytest.mark.parametrize("shift", [-110.0, 110.0, 1e4])
def test_shifted_logits(shift, cluster):
    case = RowCase.random(6, 300, EVERYTHING, temperature=1.0)
    check_policy_loss(cluster, case.with_logits(case.logits + shift), EVERYTHING)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("where", ["first slice", "last slice", "all but the token"])
def test_minus_infinity(where, dtype, cluster):
    case = RowCase.random(6, 200, EVERYTHING, dtype=dtype, temperature=0.7)
    hidden = torch.zeros_like(case.logits, dtype=torch.bool)
    cut = {"first slice": slice(0, 128), "last slice": slice(72, None)}.get(where, slice(None))
    hidden[:, cut] = True
    hidden.scatter_(1, case.tokens[:, None], False)
    case = case.with_logits(case.logits.masked_fill(hidden, -math.inf))
    check_policy_loss(cluster, case, EVERYTHING)
    assert (run_policy_loss(cluster, case, EVERYTHING)[1][hidden] == 0).all()


def test_a_token_with_minus_infinite_logit(cluster):
    """Its log-prob is -inf; nothing else is lost, under an entropy bonus too."""
    for objective in (CLIP, Objective(entropy_coef=0.1)):
        case = RowCase.random(4, 300, objective)
        logits = case.logits.scatter(1, case.tokens[:, None], -math.inf)
        rows, grad = run_policy_loss(cluster, case.with_logits(logits), objective)
        assert (rows.logprobs == -math.inf).all()
        assert all(x.isfinite().all() for x in (rows.loss, rows.entropy, grad))
        assert (grad.gather(1, case.tokens[:, None]) == 0).all()


@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize("poison", [math.nan, -math.nan, math.inf])
@pytest.mark.parametrize("column", [0, 127, 128, 599])
def test_one_bad_logit_in_any_slice_spoils_its_row_alone(column, poison, entropy, cluster):
    objective = EVERYTHING if entropy else CLIP
    case = RowCase.random(3, 600, objective)
    logits = case.logits.clone()
    logits[1, column] = poison
    for dtype in DTYPES:
        rows, grad = run_policy_loss(cluster, case.with_logits(logits.to(dtype)), objective)
        for x in (rows.loss, rows.logprobs, rows.entropy):
            assert x.isnan().tolist() == [False, True, False]
        assert grad.isnan().all(1).tolist() == [False, True, False]


def test_a_row_of_minus_infinity_is_nan(cluster):
    case = RowCase.random(3, 600, CLIP)
    logits = case.logits.clone()
    logits[1] = -math.inf
    rows, grad = run_policy_loss(cluster, case.with_logits(logits), CLIP)
    assert rows.loss.isnan().tolist() == grad.isnan().any(1).tolist() == [False, True, False]


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_dead_rows_are_never_read(poison, cluster):
    case = RowCase.random(6, 600, EVERYTHING, temperature=torch.linspace(0.6, 1.4, 6))
    dead = torch.tensor([False, True, False, True, True, False])
    inputs = case.inputs.map(lambda x: x.masked_fill(dead, poison))
    inputs = inputs._replace(
        weight=case.inputs.weight.masked_fill(dead, 0),
        entropy_weight=case.inputs.entropy_weight.masked_fill(dead, 0),
    )
    logits = case.logits.masked_fill(dead[:, None], poison)
    tokens = case.tokens.masked_fill(dead, 10**12)
    hostile = dataclasses.replace(case, logits=logits, tokens=tokens, inputs=inputs)
    clean = run_policy_loss(cluster, case, EVERYTHING)
    got = run_policy_loss(cluster, hostile, EVERYTHING)
    for want, have in zip([*clean[0], clean[1]], [*got[0], got[1]], strict=True):
        assert torch.equal(have[~dead], want[~dead]) and (have[dead] == 0).all()
    stats = cluster.row_stats(logits, tokens, case.temperature, ~dead)
    assert all((x[dead] == 0).all() and x[~dead].isfinite().all() for x in stats)
    c, out = inputs.weight.masked_fill(dead, 0), torch.full_like(logits, math.nan)
    cluster.row_grad(logits, tokens, stats, c, None, case.temperature, out)
    assert (out[dead] == 0).all() and out.isfinite().all()


def test_tokens_outside_the_vocabulary(cluster):
    case = RowCase.random(5, 600, CLIP)
    bad = dataclasses.replace(case, tokens=torch.tensor([0, -1, 599, 600, 2**62]))
    rows, _ = run_policy_loss(cluster, bad, CLIP)
    wild = [False, True, False, True, True]
    assert rows.loss.isnan().tolist() == rows.logprobs.isnan().tolist() == wild
    assert rows.entropy.isfinite().all()
    stats = cluster.row_stats(bad.logits, bad.tokens, bad.temperature)
    out = torch.empty_like(bad.logits)
    stats = stats._replace(logprobs=stats.logprobs.nan_to_num(0))
    cluster.row_grad(bad.logits, bad.tokens, stats, torch.ones(5), None, bad.temperature, out)
    expected = -(bad.logits / bad.temperature).softmax(1)[1] / bad.temperature
    torch.testing.assert_close(out[1], expected, rtol=1e-5, atol=1e-7)


def test_clipped_rows_have_a_gradient_of_zero(cluster):
    """Also far outside: 0, not 0 * inf."""
    case = RowCase.random(4, 600, CLIP)
    old = case.inputs.old_logprobs + torch.tensor([1e3, -1e3, 1e3, -1e3])
    inputs = case.inputs._replace(old_logprobs=old, advantages=torch.tensor([1.0, 1.0, -1.0, -1.0]))
    rows, grad = run_policy_loss(cluster, dataclasses.replace(case, inputs=inputs), CLIP)
    assert rows.loss.isfinite().all() and (grad == 0).all()


@pytest.mark.gpu
def test_the_ops_by_name(on_gpu):
    """Gradients of `policy_loss(backend="cuda")` are those of the default backend."""
    import fastpo

    case = RowCase.random(6, 32000, CLIP, dtype=torch.bfloat16).to("cuda")
    grads = []
    for backend in ("cuda", None):
        leaf = case.logits.clone().requires_grad_()
        output = fastpo.policy_loss(
            leaf[None],
            case.tokens[None],
            case.inputs.advantages[None],
            objective=CLIP,
            old_logprobs=case.inputs.old_logprobs[None],
            backend=backend,
        )
        output.loss.backward()
        grads.append(leaf.grad)
    torch.testing.assert_close(grads[0], grads[1], rtol=2**-7, atol=1e-9)


def test_confident_tokens(cluster):
    check_confident_tokens(cluster)


@pytest.mark.parametrize("dtype", DTYPES[:2])
@pytest.mark.parametrize("cluster", [H100_BYTES, 1024, GPU], indirect=True)
def test_no_subnormal_leaves(dtype, cluster):
    """REGRESSIONS 49: products over subnormal gradients take 12 to 15 times as long."""
    check_no_subnormal_leaves(cluster, dtype)


@pytest.mark.parametrize("temperature", [1e-30, 1e-6, 1e6, 1e30])
def test_extreme_temperatures(temperature, cluster):
    logits = torch.randn(2, 600, generator=torch.Generator().manual_seed(0))
    logits[:, 400:] = -math.inf
    stats = cluster.row_stats(logits, logits.argmax(1), temperature)
    log_count = 0.0 if temperature < 1 else math.log(400)
    torch.testing.assert_close(stats.entropy, torch.full((2,), log_count))
    torch.testing.assert_close(stats.logprobs, torch.full((2,), -log_count), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab", [7, 600, 607])
def test_places_give_the_same_bits(vocab, dtype, entropy, cluster):
    """In place or not, aligned or not, a 2-byte gradient in fp32 rows, rows alone or together."""
    objective = EVERYTHING if entropy else CLIP
    case = RowCase.random(3, vocab, objective, dtype=dtype)
    rows, grad = run_policy_loss(cluster, case, objective)
    inside, grad_inside = run_policy_loss(cluster, case, objective, inplace=True)
    shifted = torch.empty(3, vocab + 3, dtype=dtype)[:, 1 : vocab + 1].copy_(case.logits)
    apart, grad_apart = run_policy_loss(cluster, case.with_logits(shifted), objective)
    alone = [run_policy_loss(cluster, case.take(slice(i, i + 1)), objective) for i in range(3)]
    for other in (grad_inside, grad_apart, torch.cat([g for _, g in alone])):
        assert torch.equal(grad, other)
    stats = cluster.row_stats(case.logits, case.tokens, case.temperature)
    assert torch.equal(stats.logprobs, rows.logprobs) and torch.equal(stats.entropy, rows.entropy)
    for x, y, z, *parts in zip(rows, inside, apart, *(r for r, _ in alone), strict=True):
        assert torch.equal(x, y) and torch.equal(x, z) and torch.equal(x, torch.cat(parts))

    case = RowCase.random(3, vocab, objective)
    wide, logits = run_policy_loss(cluster, case, objective), case.logits.clone()
    out = alias_rows(logits, dtype)
    losses = cluster.row_policy_loss(logits, case.tokens, case.inputs, objective, 0.8, out)
    assert torch.equal(losses.loss, wide[0].loss) and torch.equal(out, wide[1].to(dtype))
    c = torch.ones(3)
    stats = cluster.row_stats(case.logits, case.tokens, 0.8)
    arguments = (case.tokens, stats, c, c if entropy else None, 0.8)
    logits, exact = case.logits.clone(), torch.empty(3, vocab)
    cluster.row_grad(case.logits, *arguments, exact)
    cluster.row_grad(logits, *arguments, inside := alias_rows(logits, dtype))
    assert torch.equal(inside, exact.to(dtype))


def test_what_the_backend_lacks_is_refused_in_one_line(monkeypatch):
    """Statistics beyond log-prob and entropy, and kept sets of a head: before anything runs."""
    from fastpo.backends import cuda

    monkeypatch.setattr(cuda, "unavailable", lambda device: None)
    hidden, weight, tokens = torch.randn(3, 8), torch.randn(20, 8), torch.tensor([1, 2, 3])
    kept = fastpo.kept_from_arrays([[1, 2, 3]], [[0, 1, 2, 3]])
    calls = {
        "statistics with backend 'cuda'": lambda: fastpo.token_logprobs(
            hidden @ weight.t(), tokens, statistics=["is_top1"], backend="cuda"
        ),
        "statistics with fastpo.backends.cuda": lambda: fastpo.linear_token_logprobs(
            hidden, weight, tokens, statistics=["is_top1"], backend="cuda"
        ),
        "kept_tokens with fastpo.backends.cuda": lambda: fastpo.linear_token_logprobs(
            hidden, weight, tokens, backend="cuda", **kept._asdict()
        ),
    }
    for beginning, call in calls.items():
        with pytest.raises(ValueError) as error:
            call()
        message = str(error.value)
        assert message.startswith(beginning) and "expected one of" in message
        assert "\n" not in message
