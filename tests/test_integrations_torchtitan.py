"""fastpo's loss in torchtitan: against its documented signature."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from trainer_data import D, Data, V

from fastpo.integrations import torchtitan


@pytest.fixture
def titan(stand_in, monkeypatch):
    """torchtitan's BaseLoss and ChunkedLossWrapper, and fastpo's loss on them."""

    class BaseLoss:
        @dataclass(kw_only=True, slots=True)
        class Config:
            pass

    class ChunkedLossWrapper(BaseLoss):
        def set_lm_head(self, lm_head):
            self.lm_head = lm_head

    stand_in("torchtitan.components.loss", BaseLoss=BaseLoss, ChunkedLossWrapper=ChunkedLossWrapper)
    torchtitan._loss_class.cache_clear()
    yield torchtitan.PolicyLoss
    torchtitan._loss_class.cache_clear()


def test_torchtitans_loss_takes_hidden_states(titan):
    """Loss, gradients and metrics of torchtitan's DAPO loss on the head's logits."""
    loss_fn = titan(titan.Config(preset="dapo", clip_low=0.2, clip_high=0.3))
    data = Data()
    arguments = {
        "generator_logprobs": data.scored()[0].reshape(-1) - 0.3 * data.advantages.reshape(-1),
        "advantages": data.advantages.reshape(-1).float(),
        "loss_mask": data.mask.reshape(-1),
    }
    arguments["generator_logprobs"] = arguments["generator_logprobs"].float()
    dropped = int(arguments["loss_mask"].nonzero()[0])
    arguments["generator_logprobs"][dropped] = torch.nan
    hidden, labels = data.hidden.reshape(-1, D), data.labels.reshape(-1)
    with pytest.raises(ValueError, match="call set_lm_head first"):
        loss_fn(hidden, labels, 40.0, **arguments)
    head = torch.nn.Linear(D, V, bias=False)
    head.weight.data = data.weight
    loss_fn.set_lm_head(head)
    hidden.requires_grad_()
    loss, metrics = loss_fn(hidden, labels, torch.tensor(40.0), **arguments)
    grads = torch.autograd.grad(loss, [hidden, head.weight])

    logprobs = head(hidden).log_softmax(-1).gather(-1, labels[:, None])[:, 0]
    mask = arguments["loss_mask"].clone()
    mask[dropped] = False
    old, advantages = arguments["generator_logprobs"][mask], arguments["advantages"][mask]
    ratio = (logprobs[mask] - old).exp()
    expected = -torch.min(ratio * advantages, ratio.clamp(0.8, 1.3) * advantages).sum() / 40
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    truth = torch.autograd.grad(expected, [hidden, head.weight])
    torch.testing.assert_close(grads, truth, rtol=1e-4, atol=1e-6)
    moved = ((ratio < 0.8) | (ratio > 1.3)).sum() / 40
    assert metrics["loss/ratio_clipped_frac"].item() == pytest.approx(moved.item())
    assert metrics["loss/generator_logprob_nan_frac"].item() == pytest.approx(1 / 40)
    assert metrics["loss/ratio_mean"].item() == pytest.approx((ratio.sum() / 40).item(), rel=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(loss_fn(hidden, labels, 40, **arguments)[0], loss.detach())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"preset": "gspo"}, "preset 'gspo' needs sequences"),
        ({"preset": "nope"}, "preset is 'nope', expected one of"),
        ({"preset": "reinforce", "clip_low": 0.1}, "clip_low with preset 'reinforce'"),
        ({"preset": "cispo", "clip_high": 0.1}, "clip_high with preset 'cispo'"),
    ],
)
def test_torchtitans_loss_refuses_what_it_cannot_honour(titan, fields, message):
    """REGRESSIONS 38."""
    with pytest.raises(ValueError, match=message):
        titan(titan.Config(**fields))
