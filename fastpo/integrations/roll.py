"""ROLL: the RLVR actor's loss by fastpo, as a worker class to name in the config.

    from fastpo.integrations.roll import actor_worker
    class ActorWorker(actor_worker()): pass      # in a module of yours; then
    # actor_train: {worker_cls: my_module.ActorWorker}

pg_clip, use_pg_clip_range, dual_clip_loss, importance_sampling, loss_agg_mode, the KL loss and
rl_loss_coef mean what they mean there; the train/infer masks and ratios, sample weights, the
entropy, positive and TOPR terms, and dynamic batching with seq-mean-token-sum raise.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fastpo.integrations._tokens import clipped_by, is_clipped, masked_mean, refuse, token_terms

REFUSED = (
    *("train_infer_ratio_mask", "train_infer_diff_mask"),
    *("train_infer_ratio_seq_mask", "train_infer_diff_seq_mask"),
    *("use_rollout_importance_sampling_ratio", "difficulty_loss_weight", "length_loss_weight"),
    *("entropy_loss_coef", "postive_loss_coef", "use_topr_neg_loss_coef"),
)


def actor_worker() -> type:
    """ROLL's RLVR `ActorWorker` with another `loss_func`."""
    from roll.pipeline.rlvr.actor_worker import ActorWorker
    from roll.utils.functionals import agg_loss

    class FastpoActorWorker(ActorWorker):
        def loss_func(self, data: Any, output_tensor: Tensor) -> tuple[Tensor, dict[str, float]]:
            config, batch = self.pipeline_config, data.batch
            _check(config, self.worker_config)
            mask = batch["response_mask"][:, 1:].long()
            mask = batch.get("final_response_mask", mask)
            ids, attended = batch["input_ids"], batch["response_mask"]
            logprobs = self.strategy.op_compute_log_probs(
                logits=output_tensor, input_ids=ids, attention_mask=attended
            )
            old, advantages = batch["old_log_probs"], batch["advantages"]
            terms = token_terms(_objective(config), logprobs, old, advantages, mask)
            mode = {"loss_mask": mask, "loss_agg_mode": config.loss_agg_mode}
            pg_loss = agg_loss(loss_mat=terms.loss, **mode)
            total, metrics = pg_loss, {"actor/pg_loss": pg_loss}
            if config.use_kl_loss:
                ref = (batch["ref_log_probs"] - logprobs).where(mask.bool(), 0)
                kl_loss = agg_loss(loss_mat=ref.exp() - ref - 1, **mode)
                total = total + config.kl_loss_coef * kl_loss
                metrics["actor/kl_loss"] = kl_loss
            total = total * config.rl_loss_coef
            clipped = is_clipped(terms).to(logprobs.dtype)
            metrics |= {"actor/total_loss": total, "actor/clipfrac": agg_loss(clipped, **mode)}
            metrics["actor/ratio_mean"] = masked_mean(terms.ratio, mask)
            return total, {name: value.detach().item() for name, value in metrics.items()}

    return FastpoActorWorker


def _check(config: Any, worker_config: Any) -> None:
    refuse("ROLL", {name: getattr(config, name, None) for name in REFUSED})
    if worker_config.use_dynamic_batching_in_train and config.loss_agg_mode == "seq-mean-token-sum":
        raise ValueError(
            "use_dynamic_batching_in_train with loss_agg_mode='seq-mean-token-sum' rescales the "
            "loss, which fastpo's does not: expected one of the two; or ROLL's own loss"
        )


def _objective(config: Any) -> Any:
    low = config.pg_clip_low if config.use_pg_clip_range else config.pg_clip
    high = config.pg_clip_high if config.use_pg_clip_range else config.pg_clip
    preset = clipped_by("importance_sampling", config.importance_sampling, sequence="seq")
    dual = 1 + config.pg_clip * 2 if config.dual_clip_loss else None
    return preset(clip_low=low, clip_high=high, ratio_max=dual)
