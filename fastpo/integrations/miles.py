"""Miles: its log-probs by `fastpo.token_logprobs`, and its clipped surrogate by fastpo.

    --custom-megatron-init-path fastpo.integrations.miles.install

Miles is a fork of slime whose losses have moved and changed (NaN scrubbing, its own bookkeeping of
mismatch): slime's adapter does not fit it. Nor is a custom loss needed: its `policy_loss_function`
takes the two functions below from its modules, so that TIS, OPSM, GSPO, KL, reducers and metrics
stay Miles' own and every argument of them is honoured. `true_on_policy_mode` scores as SGLang does,
bit for bit, and stays Miles' own.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastpo import presets
from fastpo.integrations import slime
from fastpo.integrations._tokens import is_clipped, token_terms


def install(args: Any = None) -> None:
    """Put both functions where Miles' losses look them up; twice changes nothing."""
    from miles.backends.training_utils.loss_hub import logit_processors, losses

    losses.compute_policy_loss = compute_policy_loss
    logit_processors.calculate_log_probs_and_entropy = calculate_log_probs_and_entropy


def compute_policy_loss(
    ppo_kl: Tensor,
    advantages: Tensor,
    eps_clip: float,
    eps_clip_high: float,
    eps_clip_c: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Loss and 0 or 1 for what was clipped, per token [N]; `ppo_kl` is old - new log-probs."""
    clips = {"clip_low": eps_clip, "clip_high": eps_clip_high, "ratio_max": eps_clip_c}
    old = torch.zeros_like(ppo_kl)
    terms = token_terms(presets.ppo(**clips), -ppo_kl, advantages, old_logprobs=old)
    return terms.loss, is_clipped(terms).float()


def calculate_log_probs_and_entropy(
    logits: Tensor,
    tokens: Tensor,
    tp_group: Any,
    with_entropy: bool = False,
    entropy_requires_grad: bool = True,
    chunk_size: int = -1,
    true_on_policy: bool = False,
    vocab_size: int | None = None,
) -> tuple[Tensor, Tensor | None]:
    """As `slime.calculate_log_probs_and_entropy`, or Miles' own where `true_on_policy`."""
    if true_on_policy:
        from miles.backends.training_utils.loss_hub import math_utils

        return math_utils.calculate_log_probs_and_entropy(
            *(logits, tokens, tp_group, with_entropy, entropy_requires_grad, chunk_size),
            *(true_on_policy, vocab_size),
        )
    return slime.calculate_log_probs_and_entropy(
        logits, tokens, tp_group, with_entropy, with_entropy_grad=entropy_requires_grad
    )
