"""TRL's trainers with their loss inside the model's own forward: what they share.

TRL keeps its data, generation, rewards, metrics and adaptive entropy control. What is replaced is
the model that its `_compute_loss` calls: a `Scorer` answers TRL's request for log-probs, and with
the same forward makes the loss. TRL then goes through its own loss code without a graph, on [B, C]
numbers: its metrics come from there, and its loss value must be the one that is trained on.
"""

from __future__ import annotations

import inspect
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from fastpo.integrations._request import Request
from fastpo.integrations.transformers import attach, innermost

_DRIFT = 1e-3  # of the largest advantage: far above rounding, far below another loss


class Scorer:
    """What TRL calls in the model's place: log-probs and entropies by fastpo, in its forward.

    With `loss_inputs`, the same forward makes the loss: `result`, a `CausalLMPolicyLoss`.
    `statistics` are [B, C] log-probs and entropies that TRL sees where the loss's mask is False.
    """

    def __init__(
        self,
        trainer: Any,
        model: Any,
        loss_inputs: dict[str, Any] | None = None,
        statistics: tuple[Tensor, Tensor] | None = None,
    ):
        self.trainer = trainer
        self.model = model
        self.loss_inputs = loss_inputs
        self.statistics = statistics
        self.result: Any = None

    def __call__(
        self, *, input_ids: Tensor, labels: Tensor, fused_lm_head: bool, **inputs: Any
    ) -> SimpleNamespace:
        """TRL's call of a model with its fused head; fields [B, C] for the last C tokens."""
        wanted = labels != -100
        accepted = inspect.signature(innermost(self.model).forward).parameters
        completion = int(wanted.any(0).long().argmax()) if self.loss_inputs is None else None
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
            "fp32_head": getattr(self.trainer.args, "cast_lm_head_to_fp32", False),
        }
        inputs["input_ids"] = input_ids
        if self.loss_inputs is None:
            request = Request(completion_mask=wanted, **common)
            result = self.model(**inputs, token_logprobs=request)
        else:
            request = Request(**self._aligned(input_ids, tokens), **common)
            with torch.enable_grad():
                result = self.result = self.model(**inputs, policy_loss=request)
        scored = result.logprobs, result.entropy
        if self.statistics is not None:
            mask = self.loss_inputs["mask"]
            mine = (x[:, -mask.shape[1] :] for x in scored)
            scored = [x.where(mask, y) for x, y in zip(mine, self.statistics, strict=True)]
        return SimpleNamespace(log_probs=scored[0], entropy=scored[1], aux_loss=result.aux_loss)

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


class FusedLoss:
    """Put before a trainer of TRL: its `_compute_loss`, through a `Scorer`.

    The trainer gives `_check_settings`, `_loss_inputs` and `_scaled`.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._check_settings()
        attach(self.model)
        if self.ref_model is not None:
            attach(self.ref_model)

    def _check_settings(self) -> None:
        """Raise for what is not covered, when the trainer is made."""
        raise NotImplementedError

    def _loss_inputs(
        self, inputs: dict[str, Any], statistics: tuple[Tensor, Tensor] | None
    ) -> dict[str, Any]:
        """Keywords of `linear_policy_loss`, per-token ones [B, C], and `mask` [B, C]."""
        raise NotImplementedError

    def _scaled(self, result: Any, mask: Tensor, advantages: Tensor) -> Tensor:
        """What TRL's own code makes of the loss afterwards: its accumulation, its router loss."""
        raise NotImplementedError

    @property
    def _needs_statistics(self) -> bool:
        """Whether the loss's inputs depend on the current policy: a forward of its own."""
        return False

    @property
    def _accumulation(self) -> float:
        return self.current_gradient_accumulation_steps if self.model.training else 1.0

    def _get_per_token_logps_and_entropies(self, model: Any, *args: Any, **kwargs: Any) -> Any:
        """TRL's, through fastpo: old and reference log-probs are of the policy's own kernels."""
        if not isinstance(model, Scorer):
            model = Scorer(self, model)
        return super()._get_per_token_logps_and_entropies(model, *args, **kwargs)

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        """0-d loss, differentiable; metrics as TRL logs them."""
        statistics = self._statistics(model, inputs) if self._needs_statistics else None
        scorer = Scorer(self, model, self._loss_inputs(inputs, statistics), statistics)
        with torch.no_grad():
            stock = super()._compute_loss(scorer, inputs)
        loss = self._scaled(scorer.result, scorer.loss_inputs["mask"], inputs["advantages"])
        check_value(loss, stock, inputs["advantages"])
        return loss

    @torch.no_grad()
    def _statistics(self, model: Any, inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """[B, C] log-probs and entropies of the current policy, by a forward of their own."""
        ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
        attention = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
        named = inspect.signature(super()._get_per_token_logps_and_entropies).parameters
        extra = {name: inputs[name] for name in named if name in inputs}
        logprobs, entropy, _ = self._get_per_token_logps_and_entropies(
            model, ids, attention, inputs["completion_ids"].size(1), compute_entropy=True, **extra
        )
        return logprobs, entropy


def check_value(loss: Tensor, stock: Tensor, advantages: Tensor) -> None:
    """Raise where TRL's own code gives another value than fastpo's, beyond rounding.

    Raises:
        RuntimeError: what both are.
    """
    ours, theirs = loss.item(), stock.item()
    if not abs(ours - theirs) <= _DRIFT * (abs(theirs) + advantages.abs().max().item()):
        import trl

        raise RuntimeError(
            f"fastpo's loss is {ours:.6g}, that of trl {trl.__version__}'s own code "
            f"{theirs:.6g}: this configuration is not covered; use trl's own trainer"
        )


def loss_mask(inputs: dict[str, Any]) -> Tensor:
    """[B, C] 0 or 1: the completion's tokens without those that tools wrote."""
    mask = inputs["completion_mask"]
    return mask * inputs["tool_mask"] if "tool_mask" in inputs else mask


def untrained(mask: Tensor, advantages: Tensor) -> Tensor:
    """0-d: what sequences without a token add to a mean of -r A over all of them: r is 1 there."""
    return -advantages.where(~mask.any(1), 0).sum() / len(mask)
