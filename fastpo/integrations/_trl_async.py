"""TRL's experimental AsyncGRPOTrainer with fastpo's loss over its packed trees of samples.

Imported by `fastpo.integrations.trl` on use: importing this file imports TRL.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from trl.experimental.async_grpo import AsyncGRPOTrainer as StockAsyncGRPOTrainer

from fastpo.integrations._request import Request
from fastpo.integrations._trl_scorer import check_value
from fastpo.integrations.transformers import attach
from fastpo.objective import Objective


class _PackedScorer:
    """What TRL calls in the model's place; the same forward makes the loss: `result`."""

    def __init__(self, model: Any, loss_inputs: dict[str, Any]):
        self.model = model
        self.loss_inputs = loss_inputs
        self.result: Any = None

    def __call__(
        self, *, input_ids: Tensor, shift_labels: Tensor, fused_lm_head: bool, **inputs: Any
    ) -> SimpleNamespace:
        """TRL's call on a packed row [1, N]; log-probs and entropies [1, N], 0 if not scored."""
        positions = self.loss_inputs["positions"]
        request = Request(tokens=shift_labels[0, positions], **self.loss_inputs)
        with torch.enable_grad():
            self.result = self.model(input_ids=input_ids, **inputs, policy_loss=request)
        scored = self.result.logprobs, self.result.entropy
        full = [
            x.new_zeros(input_ids.shape).index_put((0 * positions, positions), x) for x in scored
        ]
        return SimpleNamespace(log_probs=full[0], entropy=full[1], aux_loss=self.result.aux_loss)


class AsyncGRPOTrainer(StockAsyncGRPOTrainer):
    """TRL's `AsyncGRPOTrainer` with fastpo's loss; same arguments, same numbers, same metrics.

    A row packs samples as a tree: a position that several of them share is forwarded once, and
    scored once for each of them, with its own old log-prob and advantage.

    Raises:
        RuntimeError: in training, TRL's loss code gives another value than fastpo's.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        attach(self.model)

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Tensor:
        """0-d loss, differentiable; metrics as TRL logs them."""
        accumulation = self.current_gradient_accumulation_steps
        selected = inputs["token_index"] >= 0
        rank_tokens = inputs["global_n_tokens"][0] / self.accelerator.num_processes
        scorer = _PackedScorer(
            model,
            {
                "positions": inputs["token_index"][selected],
                "advantages": inputs["advantages"][selected],
                "old_logprobs": inputs["old_log_probs"][selected],
                "normalizer": rank_tokens.clamp(min=1) * accumulation,
                "objective": self._objective(),
                "temperature": self.temperature,
            },
        )
        with torch.no_grad():
            stock = super().compute_loss(scorer, inputs, return_outputs, num_items_in_batch)
        loss = scorer.result.loss
        if self.aux_loss_enabled:
            loss = loss + self.router_aux_loss_coef * scorer.result.aux_loss / accumulation
        check_value(loss, stock, inputs["advantages"])
        return loss

    def _objective(self) -> Objective:
        return Objective(
            name="trl async grpo", clip_low=self.epsilon_low, clip_high=self.epsilon_high
        )
