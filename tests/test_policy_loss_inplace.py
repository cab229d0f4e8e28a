"""`policy_loss` and memory: gradients in the logits, strides, second backwards."""

from __future__ import annotations

import pytest
import torch
from policy_batch import BACKENDS, DTYPES, Batch

import fastpo
from fastpo.testing.objectives import PRESETS


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["dapo_all", "gspo", "cispo"])
def test_inplace_is_bitwise_the_same(name, dtype, backend):
    batch, objective = Batch(dtype), PRESETS[name]
    result, grad = batch.fused(objective, backend=backend)
    inplace, inplace_grad = batch.fused(objective, backend=backend, inplace=True)
    assert torch.equal(result.loss, inplace.loss)
    assert torch.equal(grad, inplace_grad)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["dapo", "gspo"])
def test_inplace_gradient_lives_in_the_logits(name, backend):
    """REGRESSIONS 9: no second buffer, and a second backward says so instead of returning it."""
    batch = Batch()
    logits = batch.logits.clone().requires_grad_()
    storage = logits.data_ptr()
    loss = fastpo.policy_loss(
        logits,
        batch.tokens,
        batch.advantages,
        inplace=True,
        backend=backend,
        **batch.options(PRESETS[name]),
    ).loss
    loss.backward(retain_graph=True)
    assert logits.grad.data_ptr() == storage
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


def test_inplace_under_an_op_that_saved_the_logits_is_noticed():
    """A softcap's tanh saves its output: overwriting it must not give wrong gradients silently."""
    batch = Batch()
    raw = batch.logits.clone().requires_grad_()
    capped = 30 * torch.tanh(raw / 30)
    saved = torch.tanh(raw)
    for logits, fails in ((capped, False), (saved, True)):
        result = fastpo.policy_loss(
            logits, batch.tokens, batch.advantages, inplace=True, objective=fastpo.dapo()
        )
        if fails:
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                result.loss.backward()
        else:
            result.loss.backward()


@pytest.mark.parametrize("backend", BACKENDS)
def test_backward_twice_out_of_place_accumulates(backend):
    batch = Batch()
    _, once = batch.fused(fastpo.dapo(), backend=backend)
    logits = batch.logits.clone().requires_grad_()
    loss = fastpo.policy_loss(
        logits,
        batch.tokens,
        batch.advantages,
        temperature=batch.temperature,
        backend=backend,
        **batch.options(fastpo.dapo()),
    ).loss
    (first,) = torch.autograd.grad(3 * loss, logits, retain_graph=True)
    (second,) = torch.autograd.grad(loss, logits, retain_graph=True)
    torch.testing.assert_close(first, 3 * once)
    assert torch.equal(second, once)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "cut",
    [
        pytest.param(lambda x: x[:, :-1], id="shifted"),
        pytest.param(lambda x: x[::2], id="every other sequence"),
        pytest.param(lambda x: x[:1].expand(4, *x.shape[1:]), id="expanded"),
        pytest.param(lambda x: x.transpose(0, 1), id="time first"),
        pytest.param(lambda x: x[2:], id="offset"),
    ],
)
def test_strided_logits(cut, backend):
    """REGRESSIONS 5: any leading strides, without a copy; gradients reach the base tensor."""
    batch = Batch()
    base = batch.logits.clone().requires_grad_()
    view = cut(base)
    tokens = cut(batch.tokens)
    advantages = torch.linspace(-1, 1, view.shape[0])
    options = {"objective": fastpo.dapo(), "old_logprobs": cut(batch.old), "mask": cut(batch.mask)}
    fastpo.policy_loss(view, tokens, advantages, backend=backend, **options).loss.backward()
    copied = batch.logits.clone().requires_grad_()
    dense = cut(copied).contiguous()
    fastpo.policy_loss(dense, tokens, advantages, backend=backend, **options).loss.backward()
    assert torch.equal(base.grad, copied.grad)
    assert base.grad.norm() > 0


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["dapo_all", "gspo"])
def test_strided_arguments(name, backend):
    """REGRESSIONS 5: an every-other view of any per-token argument, which stays strided when flat,
    and a float64 one."""
    batch, objective = Batch(), PRESETS[name]
    temperature = torch.rand(batch.tokens.shape) + 0.5
    expected, grad = batch.fused(objective, backend=backend, temperature=temperature)
    names = ("tokens", "mask", "old", "ref", "weights")
    for each in names:
        setattr(batch, each, getattr(batch, each).repeat_interleave(2, 1)[:, ::2])
    strided = temperature.repeat_interleave(2, 1)[:, ::2]
    for cast in (strided, strided.double()):
        got, got_grad = batch.fused(objective, backend=backend, temperature=cast)
        assert torch.equal(got.loss, expected.loss)
        assert torch.equal(got_grad, grad)


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_gradient_work_without_need(backend):
    batch = Batch()
    result = fastpo.policy_loss(
        batch.logits, batch.tokens, batch.advantages, objective=fastpo.dapo(), backend=backend
    )
    assert not result.loss.requires_grad
    with torch.no_grad():
        quiet = fastpo.policy_loss(
            batch.logits.clone().requires_grad_(),
            batch.tokens,
            batch.advantages,
            objective=fastpo.dapo(),
            inplace=True,
            backend=backend,
        )
    assert torch.equal(quiet.loss, result.loss)
