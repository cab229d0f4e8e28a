"""From a batch of samples to optimizer updates.

On-policy the surrogate's ratio is exactly 1: the loss is minus the mean advantage, which is about
0, and nothing is clipped, while its gradient is the full policy gradient. Watch the reward, not the
loss. Clipping begins with the second update on one batch (`updates_per_batch`, `epochs`).
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

import fastpo
from fastpo.trainer import optimizer
from fastpo.trainer.algorithm import correction_inputs
from fastpo.trainer.config import OptimConfig
from fastpo.trainer.experience import Sample
from fastpo.trainer.microbatch import MicroBatch, advantages_of, micro_batches
from fastpo.trainer.model import distributed
from fastpo.trainer.model.policy import Policy
from fastpo.trainer.run import console


class Sums(defaultdict):
    """Sums over the micro-batches of a step, kept on the device: `read` synchronizes once."""

    def __init__(self) -> None:
        super().__init__(float)

    def add(self, values: dict[str, Tensor | float]) -> None:
        """Add every value to the sum of its name."""
        for name, value in values.items():
            self[name] = self[name] + value

    def read(self) -> dict[str, float]:
        """All sums, over all ranks, as Python numbers."""
        return distributed.total(self)


class Learner:
    """A policy with its optimizer and, where there is a KL penalty, its reference policy."""

    def __init__(
        self,
        policy: Policy,
        config: OptimConfig,
        objective: fastpo.Objective,
        temperature: float,
        reference: Policy | None = None,
        total_updates: int = 0,  # of the run: where a decay of the learning rate ends
        correction: dict[str, Any] | None = None,  # of fastpo.rollout_correction
    ):
        self.policy = policy
        self.config = config
        self.objective = objective
        self.temperature = temperature
        self.reference = reference
        self.parameters = [p for p in policy.model.parameters() if p.requires_grad]
        self.optimizer = optimizer.kind(config.name)(
            self.parameters,
            lr=config.learning_rate,
            betas=(config.beta1, config.beta2),
            weight_decay=config.weight_decay,
        )
        self.total_updates = total_updates
        self.correction = correction
        self.synced = False  # the reference is no longer that of the beginning
        self.unused: list[Tensor] = []  # weights of such a one, kept while there is no KL penalty
        self.updates = 0  # that are over, those without a sample to learn from included

    @property
    def learning_rate(self) -> float:
        """The rate of the next update."""
        return self.config.learning_rate * rate_factor(
            self.config, self.total_updates, self.updates
        )

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps of the learner."""
        state = {"optimizer": optimizer.state_of(self.optimizer), "updates": self.updates}
        if self.synced:
            state["reference"] = [p.detach() for p in self.reference.model.parameters()]
        elif self.unused:
            state["reference"] = self.unused
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take a checkpoint's moments and update count, and keep this recipe's numbers."""
        optimizer.load(self.optimizer, state["optimizer"])
        self.updates = state["updates"]
        if self.reference and "reference" in state:
            self._set_reference(state["reference"])
        elif "reference" in state:
            self.unused = [weight.cpu() for weight in state["reference"]]

    def learn(
        self, samples: list[Sample], generator: torch.Generator, *, fresh: bool = True
    ) -> Sums:
        """`epochs` passes of `updates_per_batch` updates over one batch of samples.

        `fresh`: the policy as it is sampled all of them.
        """
        sums = Sums()
        on_policy = fresh and self.config.updates_per_batch == 1 and self.config.epochs == 1
        if self.correction or (self.config.old_logprobs == "recompute" and not on_policy):
            self.recompute_old_logprobs(samples)
        if self.correction:
            sums.add(self.correct(samples))
        console.tell(f"learning from {len(samples)} completions")
        for part in mini_batches(samples, self.config, generator):
            self.update(part, sums, on_policy=on_policy)
        return sums

    def update(self, samples: list[Sample], sums: Sums, *, on_policy: bool) -> None:
        """One optimizer update; gradients are accumulated over micro-batches of bounded size.

        Every micro-batch divides by the token count (sequence count) of the whole mini-batch, so
        that how it is cut, and over how many ranks, changes nothing. Samples without loss never
        meet the model.

        Raises:
            TrainerError: loss or gradient is not finite; the parameters are left as they were.
        """
        live = [sample for sample in samples if sample.tokens_learned]
        if not live:
            self.updates += 1  # the learning rate follows the steps of the run, taken or not
            return
        by_tokens = self.objective.aggregation == "token_mean"
        normalizer = sum(sample.tokens_learned for sample in live) if by_tokens else len(samples)
        loss = torch.zeros((), device=self.policy.device)
        for _, batch in micro_batches(live, self.policy, self.config):
            result = self._loss(batch, normalizer, on_policy)
            (result.loss * distributed.size()).backward()  # FSDP2 takes the mean over ranks
            loss += result.loss.detach()
            if (
                "updates" not in sums
            ):  # but for carried samples, the policy is still the one that sampled
                sums.add(_sampled_difference(result.logprobs, batch))
            sums.add(result.metrics)
        optimizer.set_rate(self.optimizer, self.learning_rate)
        hint = "lower optim.learning_rate, or look for infinite rewards or log-probs"
        sums.add(optimizer.step(self.optimizer, loss, self.config.max_grad_norm, "loss", hint))
        self.updates += 1

    def _loss(self, batch: MicroBatch, normalizer: int, on_policy: bool) -> fastpo.PolicyLoss:
        reference = None if self.reference is None else self._score(self.reference, batch)
        return self.policy.inside(
            lambda: fastpo.linear_policy_loss(
                batch.hidden(self.policy),
                tokens=batch.tokens,
                advantages=batch.advantages,
                objective=self.objective,
                old_logprobs=None if on_policy else batch.old_logprobs,
                ref_logprobs=reference,
                temperature=self.temperature,
                cu_seqlens=batch.cu_seqlens,
                normalizer=normalizer,
                **batch.loss_options(),
                **self.policy.head(),
            )
        )

    def correct(self, samples: list[Sample]) -> dict[str, float]:
        """Weigh every token by how the policy's log-probs differ from the sampler's.

        Over the whole batch, which every rank holds. Returns the metrics of
        `fastpo.rollout_correction`, the share of this rank.
        """
        live = [sample for sample in samples if sample.live]
        if not live:
            return {}
        lengths = torch.tensor([sample.length for sample in live])
        found = fastpo.rollout_correction(
            torch.tensor([p for s in live for p in s.old_logprobs]),
            torch.tensor([p for s in live for p in s.completion.logprobs]),
            cu_seqlens=torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int(),
            **self.correction,
            **correction_inputs(self.correction, advantages_of(live)),
        )
        columns = (x.split(lengths.tolist()) for x in (found.weights, found.mask))
        for sample, weights, mask in zip(live, *columns, strict=True):
            sample.weights, sample.mask = weights.tolist(), mask.tolist()
        return {f"sampling/{k}": v.item() / distributed.size() for k, v in found.metrics.items()}

    def sync_reference(self) -> None:
        """The reference becomes the policy as it is."""
        self._set_reference(self.policy.model.parameters())

    def _set_reference(self, weights: Iterable[Tensor]) -> None:
        distributed.assign(self.reference.model.parameters(), weights)
        self.synced = True

    def recompute_old_logprobs(self, samples: list[Sample]) -> None:
        """Old log-probs as the update computes them: low-precision decoding gives others.

        Of samples that carry a loss: the others need none, and may have no advantages to lay out.
        """
        samples = [sample for sample in samples if sample.live]
        found = by_token(samples, self.policy, self.config, partial(self._score, self.policy))
        for sample, logprobs in zip(samples, found, strict=True):
            sample.old_logprobs = logprobs

    @torch.no_grad()
    def _score(self, policy: Policy, batch: MicroBatch) -> Tensor:
        """Log-probs (N,) of the batch's tokens under `policy`, over what they were drawn from."""
        return policy.inside(
            lambda: fastpo.linear_token_logprobs(
                batch.hidden(policy),
                tokens=batch.tokens,
                temperature=self.temperature,
                **batch.kept,
                **policy.head(),
            )
        ).logprobs


def mini_batches(
    samples: list[Sample], config: OptimConfig, generator: torch.Generator
) -> Iterator[list[Sample]]:
    """`epochs` times `updates_per_batch` disjoint parts of a batch, in random order."""
    for _ in range(config.epochs):
        order = torch.randperm(len(samples), generator=generator)
        for part in order.tensor_split(config.updates_per_batch):
            yield [samples[i] for i in part.tolist()]


def by_token(
    samples: list[Sample],
    policy: Policy,
    config: OptimConfig,
    score: Callable[[MicroBatch], Tensor],
) -> list[list[float]]:
    """A number of every token of every sample; each rank scores its share, and hears the rest."""
    number = {id(sample): index for index, sample in enumerate(samples)}
    found: dict[int, list[float]] = {}
    for part, batch in micro_batches(samples, policy, config):
        pieces = score(batch).split([sample.length for sample in part])
        for sample, numbers in zip(part, pieces, strict=bool(part)):
            found[number[id(sample)]] = numbers.tolist()
    of_all = {k: v for theirs in distributed.everyones(lambda: found) for k, v in theirs.items()}
    return [of_all[index] for index in range(len(samples))]


def _sampled_difference(logprobs: Tensor, batch: MicroBatch) -> dict[str, Tensor | int]:
    """How far log-probs are from the sampler's, over tokens that were computed: others hold 0."""
    difference, count = (logprobs - batch.sampled_logprobs).abs(), len(logprobs)
    if batch.correction:
        difference = difference.where(batch.correction["mask"], 0)
        count = batch.correction["live_rows"]
    return {"sampled": count, "sampled_difference": difference.sum()}


def rate_factor(config: OptimConfig, total: int, update: int) -> float:
    """Share of the peak learning rate at `update` (from 0) of `total`: warm-up, then decay."""
    warm = config.warmup_steps
    if update < warm:
        return (update + 1) / warm
    left = max(0.0, (total - update) / max(total - warm, 1))
    return {
        "constant": 1.0,
        "linear": left,
        "cosine": (1 - math.cos(math.pi * left)) / 2,
    }[config.decay]
