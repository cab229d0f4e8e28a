"""The critic of PPO: values of every token, advantages by GAE, and the clipped value loss.

Its trunk is a copy of the policy's with a scalar head, which begins at 0. It costs a second model
and a second optimizer; GRPO and its family take the mean of a group for a baseline instead.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn

import fastpo
from fastpo.trainer.config import CriticConfig, OptimConfig
from fastpo.trainer.experience import Sample
from fastpo.trainer.microbatch import MicroBatch, micro_batches
from fastpo.trainer.policy import Policy
from fastpo.trainer.run.errors import TrainerError


class Critic:
    """V(prompt and tokens so far), with its optimizer."""

    def __init__(self, policy: Policy, config: CriticConfig, optim: OptimConfig):
        self.config, self.optim = config, optim
        self.policy = replace(policy, model=copy.deepcopy(policy.model))  # of which the trunk runs
        width = policy.model.get_output_embeddings().weight.shape[1]
        self.head = nn.Linear(width, 1, device=policy.device)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)
        self.modules = nn.ModuleDict({"trunk": self.policy.model.base_model, "head": self.head})
        self.parameters = list(self.modules.parameters())
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=config.learning_rate, weight_decay=0.0
        )

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps of the critic."""
        return {"modules": self.modules.state_dict(), "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take a checkpoint's weights and moments, and keep this recipe's learning rate."""
        self.modules.load_state_dict(state["modules"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.optimizer.param_groups[0]["lr"] = self.config.learning_rate

    def values(self, batch: MicroBatch) -> Tensor:
        """Values (N,) fp32 of the states in which the batch's tokens were drawn."""
        return self.head(batch.hidden(self.policy).float()).squeeze(-1)

    @torch.no_grad()
    def assign_advantages(self, groups: list[list[Sample]]) -> None:
        """Advantages and returns of every token by GAE; the reward comes with the last token."""
        samples = [member for group in groups for member in group]
        for member in samples:
            member.live = member.judged
        judged = [member for member in samples if member.live]
        if not judged:
            raise TrainerError(
                "no reward of this batch is a finite number: check the task's reward"
            )
        order, values = [], []
        for part, batch in micro_batches(judged, self.policy, self.optim):
            order += part
            values.append(self.values(batch))
        lengths = torch.tensor([member.length for member in order])
        ends = lengths.cumsum(0)
        rewards = torch.zeros(int(ends[-1]))
        rewards[ends - 1] = torch.tensor([member.reward for member in order])
        old = torch.cat(values).cpu()
        found = fastpo.gae(
            rewards,
            old,
            gamma=self.config.gamma,
            lam=self.config.lam,
            cu_seqlens=nn.functional.pad(ends, (1, 0)).int(),
            whiten=True,
        )
        columns = (x.split(lengths.tolist()) for x in (found.advantages, found.returns, old))
        for member, *parts in zip(order, *columns, strict=True):
            member.advantage, member.returns, member.values = (part.tolist() for part in parts)

    def learn(self, samples: list[Sample], generator: torch.Generator) -> dict[str, float]:
        """As many updates on the batch as the policy makes; the value metrics of the step."""
        live = [sample for sample in samples if sample.live]
        if not live:
            return {}
        sums = torch.zeros(4, dtype=torch.float64)
        for _ in range(self.optim.epochs):
            order = torch.randperm(len(live), generator=generator)
            for part in order.tensor_split(self.optim.updates_per_batch):
                if len(part):
                    sums += self._update([live[i] for i in part.tolist()])
        loss, norm, clipped, updates = sums.tolist()
        returns = torch.tensor([r for s in live for r in s.returns], dtype=torch.float64)
        before = torch.tensor([v for s in live for v in s.values], dtype=torch.float64)
        left = (returns - before).var(correction=0) / returns.var(correction=0).clamp(min=1e-12)
        return {
            "value/loss": loss / updates,
            "value/grad_norm": norm / updates,
            "value/clip_ratio": clipped / updates,
            "value/mean": before.mean().item(),
            "value/explained_variance": 1 - left.item(),
        }

    def _update(self, samples: list[Sample]) -> Tensor:
        """One update; its loss, gradient norm and share of clipped tokens, and 1."""
        self.optimizer.zero_grad(set_to_none=True)
        tokens = sum(sample.length for sample in samples)
        loss, clipped = 0.0, 0.0
        for part, batch in micro_batches(samples, self.policy, self.optim):
            returns, old = (
                torch.tensor([x for s in part for x in column(s)], device=self.policy.device)
                for column in (attrgetter("returns"), attrgetter("values"))
            )
            result = fastpo.value_loss(
                self.values(batch),
                returns,
                old_values=None if self.config.clip is None else old,
                clip=self.config.clip,
                normalizer=tokens,
            )
            result.loss.backward()
            loss, clipped = loss + result.loss.detach(), clipped + result.metrics["clipped"]
        norm = nn.utils.clip_grad_norm_(self.parameters, self.optim.max_grad_norm)
        if not torch.isfinite(loss + norm):
            raise TrainerError(
                f"value loss {loss.item():.4g}, gradient norm {norm.item():.4g}: not finite, no "
                "update was made; lower critic.learning_rate, or look for infinite rewards"
            )
        self.optimizer.step()
        return torch.stack([loss, norm, clipped / tokens, torch.ones_like(loss)]).double().cpu()
