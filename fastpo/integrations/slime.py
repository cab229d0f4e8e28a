"""slime: its log-probs by `fastpo.token_logprobs`, and its clipped surrogate by fastpo.

    --loss-type custom_loss
    --custom-loss-function-path fastpo.integrations.slime.policy_loss

    from fastpo.integrations import slime as fastpo_slime
    fastpo_slime.install()        # or once, e.g. in --custom-megatron-init-path, for every loss

Responses, temperature, context parallelism and top-p masks are slime's own code around the two
functions; so are TIS, OPSM, GSPO, CISPO, KL, entropy, reducers and metrics, and every argument of
them is honoured.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastpo import presets
from fastpo.integrations._tokens import is_clipped, score_shards, token_terms


def install(args: Any = None) -> None:
    """Put both functions where slime's losses look them up; twice changes nothing."""
    from slime.backends.megatron_utils import loss

    loss.calculate_log_probs_and_entropy = calculate_log_probs_and_entropy
    loss.compute_policy_loss = compute_policy_loss


def policy_loss(
    args: Any, batch: dict[str, Any], logits: Tensor, sum_of_sample_mean: Callable[[Tensor], Tensor]
) -> tuple[Tensor, dict[str, Tensor]]:
    """slime's custom loss: its own `policy_loss_function` after `install()`."""
    from slime.backends.megatron_utils import loss

    install()
    return loss.policy_loss_function(args, batch, logits, sum_of_sample_mean)


def compute_policy_loss(
    ppo_kl: Tensor,
    advantages: Tensor,
    eps_clip: float,
    eps_clip_high: float,
    eps_clip_c: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Loss and 0 or 1 for what was clipped, per token [N]; `ppo_kl` is old - new log-probs."""
    objective = presets.ppo(clip_low=eps_clip, clip_high=eps_clip_high, ratio_max=eps_clip_c)
    terms = token_terms(objective, -ppo_kl, torch.zeros_like(ppo_kl), advantages)
    return terms.loss, is_clipped(terms).float()


def calculate_log_probs_and_entropy(
    logits: Tensor,
    tokens: Tensor,
    tp_group: Any,
    with_entropy: bool = False,
    chunk_size: int = -1,
    log_prob_keep_mask: Tensor | None = None,
    with_entropy_grad: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """Log-probs [T, 1] and entropy [T] (or None) of logits [T, V / tp], scaled by slime already.

    `log_prob_keep_mask` [T, V / tp] bounds the log-probs' softmax; the entropy stays the whole
    vocabulary's. `chunk_size` bounds the memory of slime's copies, of which there are none here.
    """
    whole = kept = None
    if with_entropy or log_prob_keep_mask is None:
        whole = score_shards(logits, tokens, tp_group)
    if log_prob_keep_mask is not None:
        kept = logits.masked_fill(~log_prob_keep_mask, -torch.inf)
        kept = score_shards(kept, tokens, tp_group)
    logprobs = (whole if kept is None else kept).logprobs[:, None]
    if not with_entropy:
        return logprobs, None
    return logprobs, whole.entropy if with_entropy_grad else whole.entropy.detach()
