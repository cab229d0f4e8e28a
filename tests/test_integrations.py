"""fastpo inside verl."""

from __future__ import annotations

import pytest
import torch

import fastpo

B, T = 3, 9


@pytest.mark.peer
def test_registered_objective_is_verls_own_loss(verl):
    """fastpo.integrations.verl: the registry's entry, global batch counts included."""
    from fastpo.integrations.verl import register

    core, config_class = verl
    register("fastpo_dapo", fastpo.dapo(ratio_max=1.3))
    gen = torch.Generator().manual_seed(3)
    logprobs = -torch.rand(B, T, generator=gen, dtype=torch.float64)
    old = logprobs + 0.6 * torch.randn(B, T, generator=gen, dtype=torch.float64)
    advantages = torch.randn(B, T, generator=gen, dtype=torch.float64)
    weights = torch.rand(B, T, generator=gen, dtype=torch.float64) + 0.5
    mask = (torch.rand(B, T, generator=gen) > 0.3).double()
    config = config_class(
        strategy="fsdp",
        rollout_n=1,
        use_dynamic_bsz=True,
        clip_ratio_low=0.2,
        clip_ratio_high=0.28,
        clip_ratio_c=1.3,
    )
    config.global_batch_info.update(batch_num_tokens=40, dp_size=2)
    values, metrics = [], []
    for name in ("fastpo_dapo", "vanilla"):
        logp = logprobs.clone().requires_grad_()
        loss, logged = core.get_policy_loss_fn(name)(
            old_log_prob=old,
            log_prob=logp,
            advantages=advantages,
            response_mask=mask,
            config=config,
            rollout_is_weights=weights,
        )
        values.append((loss.detach(), *torch.autograd.grad(loss, logp)))
        metrics.append(logged)
    torch.testing.assert_close(*values, rtol=1e-10, atol=1e-12)
    assert metrics[0] == pytest.approx(metrics[1], rel=1e-6)
    assert all(abs(value) > 0.01 for value in metrics[0].values())
    with pytest.raises(ValueError, match=r"kl_coef=0.1 .* expected 0: verl adds"):
        register("fastpo_kl", fastpo.dapo(kl_coef=0.1))
