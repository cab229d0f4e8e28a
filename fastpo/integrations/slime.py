"""slime: its log-probs by `fastpo.token_logprobs`, and its PPO loss by fastpo.

    --loss-type custom_loss
    --custom-loss-function-path fastpo.integrations.slime.policy_loss

    from fastpo.integrations import slime as fastpo_slime
    fastpo_slime.install()        # e.g. in --custom-megatron-init-path: log-probs for every loss

Log-probs and entropy come from slime's own `get_log_probs_and_entropy`, which knows responses,
temperature and context parallelism and, after `install()`, scores tokens with fastpo. eps_clip,
eps_clip_high, eps_clip_c, entropy_coef, use_rollout_logprobs and the KL settings are honoured;
other losses and corrections raise: they are slime's own `policy_loss`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastpo import presets
from fastpo.integrations._tokens import is_clipped, refuse, score_shards, token_terms


def install() -> None:
    """Let slime's losses and its log-prob pass score tokens with fastpo."""
    from slime.backends.megatron_utils import loss

    loss.calculate_log_probs_and_entropy = calculate_log_probs_and_entropy


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


def policy_loss(
    args: Any, batch: dict[str, Any], logits: Tensor, sum_of_sample_mean: Callable[[Tensor], Tensor]
) -> tuple[Tensor, dict[str, Tensor]]:
    """slime's custom loss: PPO's surrogate with its arguments, reduced by its own function.

    Raises:
        ValueError: an argument asks for another loss or correction.
    """
    from slime.backends.megatron_utils.loss import get_log_probs_and_entropy
    from slime.utils.ppo_utils import compute_approx_kl

    mode = getattr(args, "policy_loss_mode", "ppo")
    other = ("use_opsm", "use_tis", "get_mismatch_metrics", "custom_pg_loss_reducer_function_path")
    settings = {name: getattr(args, name, None) for name in other}
    settings["advantage_estimator"] = "gspo" if args.advantage_estimator == "gspo" else None
    refuse("slime", settings | {"policy_loss_mode": None if mode == "ppo" else mode})
    names = ("unconcat_tokens", "total_lengths", "response_lengths")
    given = {name: batch[name] for name in names} | {"max_seq_lens": batch.get("max_seq_lens")}
    _, scored = get_log_probs_and_entropy(logits, args=args, with_entropy=True, **given)
    logprobs, entropy = (torch.cat(scored[name]) for name in ("log_probs", "entropy"))
    old = batch["rollout_log_probs"] if args.use_rollout_logprobs else batch.get("log_probs")
    old = torch.cat(old) if old else logprobs.detach()
    terms = token_terms(
        presets.ppo(
            clip_low=args.eps_clip, clip_high=args.eps_clip_high, ratio_max=args.eps_clip_c
        ),
        logprobs,
        torch.cat(batch["advantages"]),
        old_logprobs=old,
    )
    pg_loss, entropy_loss = sum_of_sample_mean(terms.loss), sum_of_sample_mean(entropy)
    loss = pg_loss - args.entropy_coef * entropy_loss
    metrics = {
        "pg_loss": pg_loss,
        "entropy_loss": entropy_loss,
        "pg_clipfrac": sum_of_sample_mean(is_clipped(terms).to(logprobs.dtype)),
        "ppo_kl": sum_of_sample_mean(old - logprobs),
    }
    if args.use_kl_loss:
        ratio = torch.exp(logprobs - old) if getattr(args, "use_unbiased_kl", False) else None
        ref = torch.cat(batch["ref_log_probs"])
        kl = compute_approx_kl(
            logprobs, ref, kl_loss_type=args.kl_loss_type, importance_ratio=ratio
        )
        metrics["kl_loss"] = sum_of_sample_mean(kl)
        loss = loss + args.kl_loss_coef * metrics["kl_loss"]
    if logprobs.numel() == 0:  # a rank without responses still takes part in the backward
        loss = loss + 0 * logits.sum()
    metrics = {name: value.detach() for name, value in metrics.items()}
    return loss, {"loss": loss.detach()} | metrics
