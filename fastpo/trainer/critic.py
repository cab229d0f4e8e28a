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
from fastpo.trainer import optimizer
from fastpo.trainer.config import Config
from fastpo.trainer.experience import Sample
from fastpo.trainer.microbatch import MicroBatch, micro_batches
from fastpo.trainer.model import distributed
from fastpo.trainer.model.policy import Policy
from fastpo.trainer.run.errors import RecipeError, TrainerError
from fastpo.trainer.update import Sums, by_token, mini_batches


def beside(policy: Policy, config: Config) -> Policy:
    """The trunk of a critic for a policy that is not sharded yet, with a scalar head; sharded.

    Frozen weights below adapters are the policy's own on one process; on several, which copy what
    they shard, no weight is held twice in between.
    """
    alone = distributed.size() == 1
    kept = [p for p in policy.model.parameters() if not (alone and p.requires_grad)]
    model = copy.deepcopy(policy.model, {id(p): p for p in kept})
    width = model.get_output_embeddings().weight.shape[1]
    head = nn.Linear(width, 1, device=policy.device)
    for parameter in head.parameters():
        nn.init.zeros_(parameter)
    model.set_output_embeddings(head)
    return distributed.shard(replace(policy, model=model), config, exact=head)


def check_kept(saved: dict[str, Any] | None, wanted: bool) -> None:
    """Refuse a run that would lose its critic on its way, or get one that has seen no warm-up.

    Raises:
        RecipeError: `saved` in the checkpoint and `wanted` by the recipe differ.
    """
    if bool(saved) != wanted:
        has, said = ("a", "false") if saved else ("no", "true")
        raise RecipeError(
            f"the run has {has} critic, and algorithm.critic is {said} now: set it back, or train "
            "anew with model.path set to the checkpoint"
        )


class Critic:
    """V(prompt and tokens so far), with its optimizer; `trunk` is made by `beside`."""

    def __init__(self, trunk: Policy, policy: Policy, config: Config):
        self.config, self.optim, self.policy = config.critic, config.optim, trunk
        distributed.assign(*(p.model.base_model.parameters() for p in (trunk, policy)))
        self.head = trunk.model.get_output_embeddings()
        self.modules = nn.ModuleDict({"trunk": trunk.model.base_model, "head": self.head})
        self.weights = {n: p for n, p in self.modules.named_parameters() if p.requires_grad}
        self.parameters = list(self.weights.values())
        self.optimizer = optimizer.kind(self.optim.name)(
            self.parameters, lr=self.config.learning_rate, weight_decay=0.0
        )

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps of the critic: not what is frozen, which the policy's base is."""
        weights = {name: weight.detach() for name, weight in self.weights.items()}
        return {"modules": weights, "optimizer": optimizer.state_of(self.optimizer)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take a checkpoint's weights and moments, and keep this recipe's learning rate."""
        saved = state["modules"]
        distributed.assign(self.parameters, [saved[name] for name in self.weights])
        optimizer.load(self.optimizer, state["optimizer"])

    def values(self, batch: MicroBatch) -> Tensor:
        """Values (N,) fp32 of the states in which the batch's tokens were drawn."""
        return self.policy.inside(lambda: self.head(batch.hidden(self.policy).float())).squeeze(-1)

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
        values = by_token(judged, self.policy, self.optim, self.values)
        lengths = torch.tensor([member.length for member in judged])
        ends = lengths.cumsum(0)
        rewards = torch.zeros(int(ends[-1]))
        rewards[ends - 1] = torch.tensor([member.reward for member in judged])
        old = torch.tensor([value for of_one in values for value in of_one])
        found = fastpo.gae(
            rewards,
            old,
            gamma=self.config.gamma,
            lam=self.config.lam,
            cu_seqlens=nn.functional.pad(ends, (1, 0)).int(),
            whiten=True,
        )
        columns = (x.split(lengths.tolist()) for x in (found.advantages, found.returns, old))
        for member, *parts in zip(judged, *columns, strict=True):
            member.advantage, member.returns, member.values = (part.tolist() for part in parts)

    def learn(self, samples: list[Sample], generator: torch.Generator) -> dict[str, float]:
        """As many updates on the batch as the policy makes; the value metrics of the step."""
        live = [sample for sample in samples if sample.live]
        if not live:
            return {}
        sums = Sums()
        for part in filter(None, mini_batches(live, self.optim, generator)):
            self._update(part, sums)
        found = sums.read()
        returns = torch.tensor([r for s in live for r in s.returns], dtype=torch.float64)
        before = torch.tensor([v for s in live for v in s.values], dtype=torch.float64)
        left = (returns - before).var(correction=0) / returns.var(correction=0).clamp(min=1e-12)
        return {
            "value/loss": found["loss"] / found["updates"],
            "value/grad_norm": found["grad_norm"] / found["updates"],
            "value/clip_ratio": found["clipped"] / found["updates"],
            "value/mean": before.mean().item(),
            "value/explained_variance": 1 - left.item(),
        }

    def _update(self, samples: list[Sample], sums: Sums) -> None:
        tokens = sum(sample.length for sample in samples)
        loss = torch.zeros((), device=self.policy.device)
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
            (result.loss * distributed.size()).backward()  # FSDP2 takes the mean over ranks
            loss += result.loss.detach()
            sums.add({"clipped": result.metrics["clipped"] / tokens})
        hint = "lower critic.learning_rate, or look for infinite rewards"
        sums.add(optimizer.step(self.optimizer, loss, self.optim.max_grad_norm, "value loss", hint))
