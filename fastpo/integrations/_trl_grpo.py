"""TRL's GRPOTrainer with fastpo's loss, whose settings are an `Objective`.

Imported by `fastpo.integrations.trl` on use: importing this file imports TRL.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from trl import GRPOTrainer as StockGRPOTrainer

from fastpo.integrations._trl_scorer import FusedLoss, loss_mask
from fastpo.objective import Objective

_CLIP = ("grpo", "bnpo", "dr_grpo", "dapo", "luspo")
_AGGREGATIONS = {
    "grpo": "sequence_mean",
    "sapo": "sequence_mean",
    "luspo": "sequence_sum",
    "dr_grpo": "constant",
}
_GLOBAL_TOKENS = ("dapo", "cispo", "vespo")  # divided by the tokens of the whole batch


class GRPOTrainer(FusedLoss, StockGRPOTrainer):
    """`trl.GRPOTrainer` with fastpo's loss; same arguments, same numbers, same metrics.

    Covers every `loss_type` of TRL 1.16, token and sequence level, delta, beta with and without
    bias correction, entropy bonus (fixed and adaptive), vLLM importance ratios, tool masks,
    per-token advantages, `top_entropy_quantile` and `off_policy_mask_threshold` (these two take a
    statistics pass first), router loss, LoRA (the head's too), fp32 head.

    Raises:
        ValueError: when made, for what is not covered; nothing falls back to TRL's loss.
        RuntimeError: in training, TRL's loss code gives another value than fastpo's.
    """

    def _check_settings(self) -> None:
        if self.top_entropy_quantile < 1.0 and self._entropy_bonus_enabled:
            raise ValueError(
                "top_entropy_quantile < 1 with an entropy bonus is not covered: TRL restricts the "
                "bonus to the kept tokens; switch one of them off, or use trl.GRPOTrainer"
            )
        self._objective(entropy_coef=0.0)

    def _objective(self, entropy_coef: float) -> Objective:
        """This trainer's settings as an Objective."""
        args, loss_type = self.args, self.loss_type
        options: dict[str, Any] = {"aggregation": _AGGREGATIONS.get(loss_type, "token_mean")}
        if loss_type in _CLIP:
            options |= {
                "clip_low": self.epsilon_low,
                "clip_high": self.epsilon_high,
                "ratio_max": args.delta,
            }
        elif loss_type == "cispo":
            options |= {"surrogate": "cispo", "ratio_max": self.epsilon_high}
        elif loss_type in ("sapo", "vespo"):
            names = ("k_pos", "lambda_pos", "k_neg", "lambda_neg") if loss_type == "vespo" else ()
            options |= {f"vespo_{name}": getattr(args, f"vespo_{name}") for name in names}
            options["surrogate"] = loss_type
            if loss_type == "sapo":
                options["sapo_tau_pos"] = args.sapo_temperature_pos
                options["sapo_tau_neg"] = args.sapo_temperature_neg
        else:
            raise ValueError(f"loss_type={loss_type!r} is not covered: use trl.GRPOTrainer")
        if loss_type == "dr_grpo":
            options["max_length"] = self.max_completion_length
        weighted = self.beta != 0.0 and args.use_bias_correction_kl
        if self.importance_sampling_level == "sequence" and (loss_type != "vespo" or weighted):
            options["ratio_level"] = "sequence"
        try:
            return Objective(
                name=f"trl {loss_type}",
                kl_coef=self.beta,
                kl_ratio_weighted=weighted,
                entropy_coef=entropy_coef,
                **options,
            )
        except ValueError as error:
            raise ValueError(
                f"loss_type={loss_type!r} with importance_sampling_level="
                f"{self.importance_sampling_level!r} and these settings is not covered: {error}"
            ) from error

    @property
    def _needs_statistics(self) -> bool:
        return self.off_policy_mask_threshold is not None or self.top_entropy_quantile < 1.0

    def _scaled(self, result: Any, mask: Tensor, advantages: Tensor) -> Tensor:
        loss = result.loss
        if self.loss_type not in _GLOBAL_TOKENS:
            loss = loss / self._accumulation
        if self.aux_loss_enabled:
            loss = loss + self.router_aux_loss_coef * result.aux_loss / self._accumulation
        return loss

    def _loss_inputs(
        self, inputs: dict[str, Any], statistics: tuple[Tensor, Tensor] | None
    ) -> dict[str, Any]:
        mask, advantages = loss_mask(inputs), inputs["advantages"]
        if statistics is not None:
            kept = self._kept_tokens(statistics, inputs, mask)
            advantages = (advantages[:, None] if advantages.ndim == 1 else advantages) * kept
        normalizer = None
        if self.loss_type in _GLOBAL_TOKENS:
            tokens = inputs["num_items_in_batch"].clamp(min=1.0) / self.accelerator.num_processes
            if self.model.training:
                tokens = tokens * self._accumulation / self.args.steps_per_generation
            normalizer = tokens
        return {
            "mask": mask != 0,
            "advantages": advantages,
            "old_logprobs": inputs.get("old_per_token_logps"),
            "ref_logprobs": inputs["ref_per_token_logps"] if self.beta != 0.0 else None,
            "importance_weights": self._importance_weights(inputs),
            "normalizer": normalizer,
            "objective": self._objective(self._entropy_coef(mask, normalizer)),
        }

    def _importance_weights(self, inputs: dict[str, Any]) -> Tensor | None:
        """[B] or [B, C] vLLM importance ratios. VESPO takes them whenever they are there."""
        applied = self.use_vllm and self.vllm_importance_sampling_correction
        if not applied and self.loss_type != "vespo":
            return None
        ratio = inputs.get("importance_sampling_ratio")
        if ratio is not None and ratio.ndim == 2 and ratio.shape[1] == 1:
            return ratio[:, 0]
        return ratio

    def _entropy_coef(self, mask: Tensor, normalizer: Tensor | None) -> float:
        """The bonus's coefficient on fastpo's token mean, which divides by `normalizer`.

        TRL takes the mean over this micro-batch's tokens, whatever the policy term divides by.
        """
        if not self._entropy_bonus_enabled:
            return 0.0
        coef = self.entropy_coef
        if self.use_adaptive_entropy and self._last_world_entropy > self.args.entropy_target:
            coef = 0.0
        if normalizer is None:
            return float(coef)
        return float(
            coef * normalizer.item() / (mask.sum().clamp(min=1).item() * self._accumulation)
        )

    def _kept_tokens(
        self, statistics: tuple[Tensor, Tensor], inputs: dict[str, Any], mask: Tensor
    ) -> Tensor:
        """[B, C] or [B, 1] factors 0 or 1 that the current policy's statistics decide."""
        logprobs, entropy = statistics
        kept = torch.ones_like(logprobs)
        if self.top_entropy_quantile < 1.0:
            kept = kept * self.get_high_entropy_mask(entropy, mask, 1 - self.top_entropy_quantile)
        if self.off_policy_mask_threshold is not None:
            advantages = inputs["advantages"]
            old = inputs.get("old_per_token_logps")
            old = logprobs if old is None else old
            kept = kept * self.get_off_policy_mask(
                advantages=advantages[:, None] if advantages.ndim == 1 else advantages,
                per_token_logps=logprobs,
                sampling_per_token_logps=inputs.get("sampling_per_token_logps", old),
                mask=mask,
                off_policy_threshold=self.off_policy_mask_threshold,
            )
        return kept
