"""TRL's GRPOTrainer whose loss is one `linear_policy_loss` inside the model's own forward.

TRL keeps its data, generation, rewards, metrics and adaptive entropy control. What is replaced is
the model that its `_compute_loss` calls: a `_Scorer` answers TRL's request for log-probs, and with
the same forward makes the loss. TRL then goes through its own loss code without a graph, on [B, C]
numbers: its metrics come from there, and its loss value must be the one that is trained on.

Imported by `fastpo.integrations.trl` on use: importing this file imports TRL.
"""

from __future__ import annotations

import inspect
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from trl import GRPOTrainer as StockGRPOTrainer

from fastpo.integrations._request import Request
from fastpo.integrations.transformers import attach, innermost
from fastpo.objective import Objective

_CLIP = ("grpo", "bnpo", "dr_grpo", "dapo", "luspo")
_AGGREGATIONS = {
    "grpo": "sequence_mean",
    "sapo": "sequence_mean",
    "luspo": "sequence_sum",
    "dr_grpo": "constant",
}
_GLOBAL_TOKENS = ("dapo", "cispo", "vespo")  # divided by the tokens of the whole batch
_DRIFT = 1e-3  # of the largest advantage: far above rounding, far below another loss


class _Scorer:
    """What TRL calls in the model's place: log-probs and entropies by fastpo, in its forward.

    With `loss_inputs`, the same forward makes the loss: `result`, a `CausalLMPolicyLoss`.
    """

    def __init__(self, trainer: GRPOTrainer, model: Any, loss_inputs: dict[str, Any] | None = None):
        self.trainer = trainer
        self.model = model
        self.loss_inputs = loss_inputs
        self.result: Any = None

    def __call__(
        self, *, input_ids: Tensor, labels: Tensor, fused_lm_head: bool, **inputs: Any
    ) -> SimpleNamespace:
        """TRL's call of a model with its fused head; fields [B, C] for the last C tokens."""
        scored = labels != -100
        accepted = inspect.signature(innermost(self.model).forward).parameters
        completion = int(scored.any(0).long().argmax()) if self.loss_inputs is None else None
        if completion is None:
            completion = input_ids.shape[1] - self.loss_inputs["mask"].shape[1]
        tokens = input_ids.shape[1] - completion
        if "logits_to_keep" in accepted:
            inputs["logits_to_keep"] = tokens + 1
        else:
            tokens = input_ids.shape[1] - 1
        if "position_ids" in accepted:
            inputs["position_ids"] = None  # as TRL's own call: the model's, padding counted
        common = {
            "temperature": self.trainer.temperature,
            "fp32_head": self.trainer.args.cast_lm_head_to_fp32,
        }
        inputs["input_ids"] = input_ids
        if self.loss_inputs is None:
            request = Request(completion_mask=scored, **common)
            result = self.model(**inputs, token_logprobs=request)
        else:
            request = Request(**self._aligned(input_ids, tokens), **common)
            with torch.enable_grad():
                result = self.result = self.model(**inputs, policy_loss=request)
        return SimpleNamespace(
            log_probs=result.logprobs, entropy=result.entropy, aux_loss=result.aux_loss
        )

    def _aligned(self, input_ids: Tensor, tokens: int) -> dict[str, Any]:
        """The loss's inputs with per-token ones [B, C] widened on the left to [B, `tokens`]."""
        made = dict(self.loss_inputs)
        mask = made.pop("mask")
        missing = input_ids.shape[1] - mask.shape[1]
        made["completion_mask"] = torch.nn.functional.pad(mask, (missing, 0))
        for name, value in made.items():
            if isinstance(value, Tensor) and value.ndim == 2 and value.shape[1] == mask.shape[1]:
                made[name] = torch.nn.functional.pad(value, (tokens - mask.shape[1], 0))
        return made


class GRPOTrainer(StockGRPOTrainer):
    """`trl.GRPOTrainer` with fastpo's loss; same arguments, same numbers, same metrics.

    Covers every `loss_type` of TRL 1.16, token and sequence level, delta, beta with and without
    bias correction, entropy bonus (fixed and adaptive), vLLM importance ratios, tool masks,
    per-token advantages, `top_entropy_quantile` and `off_policy_mask_threshold` (these two take a
    statistics pass first), router loss, LoRA (the head's too), fp32 head.

    Raises:
        ValueError: when made, for what is not covered; nothing falls back to TRL's loss.
        RuntimeError: in training, TRL's loss code gives another value than fastpo's.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        if self.top_entropy_quantile < 1.0 and self._entropy_bonus_enabled:
            raise ValueError(
                "top_entropy_quantile < 1 with an entropy bonus is not covered: TRL restricts the "
                "bonus to the kept tokens; switch one of them off, or use trl.GRPOTrainer"
            )
        self._objective(entropy_coef=0.0)
        attach(self.model)
        if self.ref_model is not None:
            attach(self.ref_model)

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

    def _get_per_token_logps_and_entropies(self, model: Any, *args: Any, **kwargs: Any) -> Any:
        """TRL's, through fastpo: old and reference log-probs are of the policy's own kernels."""
        if not isinstance(model, _Scorer):
            model = _Scorer(self, model)
        return super()._get_per_token_logps_and_entropies(model, *args, **kwargs)

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        """0-d loss, differentiable; metrics as TRL logs them."""
        training = self.model.training
        accumulation = self.current_gradient_accumulation_steps if training else 1.0
        scorer = _Scorer(self, model, self._loss_inputs(model, inputs, accumulation))
        with torch.no_grad():
            stock = super()._compute_loss(scorer, inputs)
        result = scorer.result
        loss = result.loss
        if self.loss_type not in _GLOBAL_TOKENS:
            loss = loss / accumulation
        if self.aux_loss_enabled:
            loss = loss + self.router_aux_loss_coef * result.aux_loss / accumulation
        self._compare(loss, stock, inputs["advantages"])
        return loss

    def _compare(self, loss: Tensor, stock: Tensor, advantages: Tensor) -> None:
        ours, theirs = loss.item(), stock.item()
        if not abs(ours - theirs) <= _DRIFT * (abs(theirs) + advantages.abs().max().item()):
            import trl

            raise RuntimeError(
                f"fastpo's loss is {ours:.6g}, that of trl {trl.__version__}'s own code "
                f"{theirs:.6g}: this configuration is not covered; use trl.GRPOTrainer"
            )

    def _loss_inputs(
        self, model: Any, inputs: dict[str, Any], accumulation: float
    ) -> dict[str, Any]:
        """Keywords of `linear_policy_loss`, per-token ones [B, C], and `mask` [B, C]."""
        mask = inputs["completion_mask"]
        if "tool_mask" in inputs:
            mask = mask * inputs["tool_mask"]
        advantages = inputs["advantages"]
        kept = self._kept_tokens(model, inputs, mask)
        if kept is not None:
            advantages = (advantages[:, None] if advantages.ndim == 1 else advantages) * kept
        made = {
            "mask": mask != 0,
            "advantages": advantages,
            "old_logprobs": inputs.get("old_per_token_logps"),
            "ref_logprobs": inputs["ref_per_token_logps"] if self.beta != 0.0 else None,
            "importance_weights": self._importance_weights(inputs),
            "normalizer": None,
        }
        if self.loss_type in _GLOBAL_TOKENS:
            tokens = inputs["num_items_in_batch"].clamp(min=1.0) / self.accelerator.num_processes
            if self.model.training:
                tokens = tokens * accumulation / self.args.steps_per_generation
            made["normalizer"] = tokens
        made["objective"] = self._objective(
            self._entropy_coef(mask, made["normalizer"], accumulation)
        )
        return made

    def _importance_weights(self, inputs: dict[str, Any]) -> Tensor | None:
        """[B] or [B, C] vLLM importance ratios. VESPO takes them whenever they are there."""
        applied = self.use_vllm and self.vllm_importance_sampling_correction
        if not applied and self.loss_type != "vespo":
            return None
        ratio = inputs.get("importance_sampling_ratio")
        if ratio is not None and ratio.ndim == 2 and ratio.shape[1] == 1:
            return ratio[:, 0]
        return ratio

    def _entropy_coef(self, mask: Tensor, normalizer: Tensor | None, accumulation: float) -> float:
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
        return float(coef * normalizer.item() / (mask.sum().clamp(min=1).item() * accumulation))

    def _kept_tokens(self, model: Any, inputs: dict[str, Any], mask: Tensor) -> Tensor | None:
        """[B, C] or [B, 1] factors 0 or 1 that the current policy's statistics decide."""
        threshold = self.off_policy_mask_threshold
        if threshold is None and self.top_entropy_quantile >= 1.0:
            return None
        logprobs, entropy = self._statistics(model, inputs)
        kept = torch.ones_like(logprobs)
        if self.top_entropy_quantile < 1.0:
            kept = kept * self.get_high_entropy_mask(entropy, mask, 1 - self.top_entropy_quantile)
        if threshold is not None:
            advantages = inputs["advantages"]
            old = inputs.get("old_per_token_logps")
            old = logprobs if old is None else old
            kept = kept * self.get_off_policy_mask(
                advantages=advantages[:, None] if advantages.ndim == 1 else advantages,
                per_token_logps=logprobs,
                sampling_per_token_logps=inputs.get("sampling_per_token_logps", old),
                mask=mask,
                off_policy_threshold=threshold,
            )
        return kept

    @torch.no_grad()
    def _statistics(self, model: Any, inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """[B, C] log-probs and entropies of the current policy, by a forward of their own."""
        ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
        attention = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
        named = inspect.signature(StockGRPOTrainer._get_per_token_logps_and_entropies).parameters
        extra = {name: inputs[name] for name in named if name in inputs}
        logprobs, entropy, _ = self._get_per_token_logps_and_entropies(
            model,
            ids,
            attention,
            inputs["completion_ids"].size(1),
            compute_entropy=True,
            **extra,
        )
        return logprobs, entropy
