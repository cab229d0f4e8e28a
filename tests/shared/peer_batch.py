"""A batch for comparisons with other libraries, and our numbers for it."""

import pytest
import torch

from fastpo.objective import (
    Objective,
    entropy_weights,
    token_loss,
    token_weights,
)
from fastpo.segments import Segments

B, T = 5, 7
CLOSE = {"rtol": 1e-10, "atol": 1e-12}


@pytest.fixture(autouse=True)
def float64_by_default():
    """Both make some tensors of Python floats, which have the default dtype."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def batch(seed=0, dead_sequence=True, spread=0.25) -> dict[str, torch.Tensor]:
    """A realistic [B, T] batch: ragged right padding, one hole in a sequence, one sequence dead."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    logp = -normal(B, T).exp()
    mask = torch.arange(T) < torch.tensor([7, 3, 1, 5, 6])[:, None]
    mask[0, 2] = False
    if dead_sequence:
        mask[3] = False
    return {
        "logp": logp,
        "old": logp - spread * normal(B, T),
        "ref": logp - 0.5 * normal(B, T),
        "entropy": normal(B, T).abs(),
        "a": normal(B),
        "token_a": normal(B, T),
        "iw": (0.3 * normal(B, T)).exp(),
        "sw": (0.3 * normal(B)).exp(),
        "mask": mask,
    }


def ours(
    objective: Objective, t: dict, advantages: torch.Tensor, normalizer=None, **weights
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Loss and gradients of the specification on the [B, T] batch."""
    segments = Segments.padded(B, T, torch.device("cpu"))
    mask = t["mask"].reshape(-1)
    logp, entropy = (t[key].clone().requires_grad_() for key in ("logp", "entropy"))
    advantages = advantages if advantages.ndim == 2 else advantages[:, None].expand(B, T)
    terms = token_loss(
        objective,
        logp.reshape(-1),
        advantages.reshape(-1),
        old_logprobs=None if t["old"] is None else t["old"].reshape(-1),
        ref_logprobs=t["ref"].reshape(-1) if objective.kl_coef else None,
        mask=mask,
        segments=segments,
        **weights,
    )
    given = {"normalizer": normalizer, "dtype": torch.float64}
    loss = (token_weights(objective, mask, segments, **given) * terms.loss).sum()
    bonus = entropy_weights(objective, mask, segments, dtype=torch.float64)
    if bonus is not None:
        loss = loss - (bonus * entropy.reshape(-1)).sum()
    return results(loss, logp, entropy)


def results(loss, logp, entropy):
    grads = torch.autograd.grad(loss, [logp, entropy], allow_unused=True, materialize_grads=True)
    return loss.detach(), *grads
