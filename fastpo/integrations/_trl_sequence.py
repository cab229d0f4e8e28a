"""TRL's RLOOTrainer and its experimental GMPOTrainer: one ratio per sequence, with fastpo's loss.

Imported by `fastpo.integrations.trl` on use: importing this file imports TRL.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from trl import RLOOTrainer as StockRLOOTrainer
from trl.experimental.gmpo import GMPOTrainer as StockGMPOTrainer

from fastpo.integrations._trl_scorer import FusedLoss, loss_mask, untrained
from fastpo.objective import Objective
from fastpo.rule import LossRule, TokenInputs, loss_rule


class RLOOTrainer(FusedLoss, StockRLOOTrainer):
    """`trl.RLOOTrainer` with fastpo's loss; same arguments, same numbers, same metrics.

    TRL's ratio is that of whole sequences, exp(sum_t d_t), where GSPO's is exp(mean_t d_t): no
    `Objective` has it, so it is a rule (`fastpo.loss_rule`) of 6 N D V. All settings of RLOOConfig
    are covered: what is not clipping happens in the rewards, which stay TRL's.

    Raises:
        RuntimeError: in training, TRL's loss code gives another value than fastpo's.
    """

    def _check_settings(self) -> None:
        pass

    def _loss_inputs(
        self, inputs: dict[str, Any], statistics: tuple[Tensor, Tensor] | None
    ) -> dict[str, Any]:
        mask = inputs["completion_mask"] != 0
        first = mask & (mask.cumsum(1) == 1)  # carries the old policy's sum
        return {
            "mask": mask,
            "advantages": inputs["advantages"],
            "old_logprobs": inputs["old_logps"][:, None] * first,
            "objective": sequence_clip(1 - self.epsilon_low, 1 + self.epsilon_high),
        }

    def _scaled(self, result: Any, mask: Tensor, advantages: Tensor) -> Tensor:
        loss = result.loss + untrained(mask, advantages)
        if self.aux_loss_enabled:
            loss = loss + self.router_aux_loss_coef * result.aux_loss
        return loss


def sequence_clip(low: float, high: float) -> LossRule:
    """-min(s A, clip(s, low, high) A) with s = exp(sum_t d_t), a mean over sequences.

    The sum of the old policy's log-probs counts; how it is spread over the tokens does not.
    """

    @loss_rule(aggregation="sequence_mean", couples_sequences=True)
    def rloo(logprobs: Tensor, entropy: Tensor, tokens: TokenInputs) -> Tensor:
        ids, advantages = tokens.sequence_ids, tokens.advantages
        log_ratio = torch.zeros_like(logprobs).index_add(0, ids, logprobs - tokens.old_logprobs)
        ratio = log_ratio.exp()[ids]
        return -torch.min(ratio * advantages, ratio.clamp(low, high) * advantages)

    return rloo


class GMPOTrainer(FusedLoss, StockGMPOTrainer):
    """`trl.experimental.gmpo.GMPOTrainer` with fastpo's loss, that of `fastpo.gmpo`.

    Covers the log-space clips, beta, tool masks, truncated completions and, without beta,
    `top_entropy_quantile` (a statistics pass first). As in TRL, vLLM's importance ratios, a
    router loss and `use_bias_correction_kl` do not enter.

    Raises:
        ValueError: when made, for what TRL's GMPO would ignore in silence, and for beta with
            `top_entropy_quantile`.
        RuntimeError: in training, TRL's loss code gives another value than fastpo's.
    """

    def _check_settings(self) -> None:
        ignored = {
            "entropy_coef": self._entropy_bonus_enabled,
            "off_policy_mask_threshold": self.off_policy_mask_threshold is not None,
            "delta": self.args.delta is not None,
            "importance_sampling_level": self.importance_sampling_level != "token",
        }
        on = [name for name, given in ignored.items() if given]
        if on:
            raise ValueError(f"{', '.join(on)} given, which GMPO of TRL ignores: leave them out")
        if self.beta != 0.0 and self.top_entropy_quantile < 1.0:
            raise ValueError(
                "top_entropy_quantile < 1 with beta is not covered: TRL's penalty counts all "
                "tokens, its ratio the kept ones; switch one of them off, or use TRL's GMPOTrainer"
            )
        self._objective()

    def _objective(self) -> Objective:
        return Objective(
            name="trl gmpo",
            surrogate="gmpo",
            aggregation="sequence_mean",
            clip_low=self.epsilon_low,
            clip_high=self.epsilon_high,
            kl_coef=self.beta,
        )

    @property
    def _needs_statistics(self) -> bool:
        return self.top_entropy_quantile < 1.0

    def _loss_inputs(
        self, inputs: dict[str, Any], statistics: tuple[Tensor, Tensor] | None
    ) -> dict[str, Any]:
        mask = loss_mask(inputs)
        if statistics is not None:
            quantile = 1 - self.top_entropy_quantile
            mask = mask * self.get_high_entropy_mask(statistics[1], mask, quantile)
        return {
            "mask": mask != 0,
            "advantages": inputs["advantages"],
            "old_logprobs": inputs.get("old_per_token_logps"),
            "ref_logprobs": inputs["ref_per_token_logps"] if self.beta != 0.0 else None,
            "objective": self._objective(),
        }

    def _scaled(self, result: Any, mask: Tensor, advantages: Tensor) -> Tensor:
        return (result.loss + untrained(mask, advantages)) / self._accumulation
