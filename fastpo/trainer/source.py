"""Where batches come from: groups of samples, drawn until every one can teach (dynamic sampling).

A step asks for its batch. With `rollout.ahead` that of step k + 1 is drawn in a thread while step k
learns, by a copy of the policy as it was before that: who is faster decides nothing, and the same
schedule without a thread gives the same bits. Between two steps the thread is at rest, so that
evaluations, checkpoints and signals find a batch that is whole.
"""

from __future__ import annotations

import copy
import ctypes
import math
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch

from fastpo.trainer.algorithm import Algorithm
from fastpo.trainer.config import RolloutConfig
from fastpo.trainer.data.tasks import ProblemStream
from fastpo.trainer.data.verifier import Verifier
from fastpo.trainer.experience import (
    Sample,
    from_plain,
    is_informative,
    punish_overlong,
    roll_out,
    to_plain,
)
from fastpo.trainer.model import distributed
from fastpo.trainer.model.policy import Policy
from fastpo.trainer.rollout import Sampling
from fastpo.trainer.run.errors import TrainerError

STOP_SECONDS = 5.0  # for a thread that is to end at once


@dataclass(kw_only=True)
class Batch:
    """The groups of one step."""

    groups: list[list[Sample]]  # to learn from
    sampled: list[list[Sample]] = field(repr=False)  # all of them, with those that were discarded
    rounds: int
    carried: int = 0  # of the groups: how many come from the step before
    fresh: bool = True  # all groups are of the policy that learns them
    seconds: float = 0.0  # that drawing them took

    @property
    def samples(self) -> list[Sample]:
        """The samples to learn from, groups side by side."""
        return [sample for group in self.groups for sample in group]


class Source:
    """One batch per step, and the state that decides what is drawn next.

    Args:
        policy: what is trained, and draws when asked.
        sampler: its copy (`copy_of`), which draws ahead; none = nothing is.
    """

    def __init__(
        self,
        policy: Policy,
        sampler: Policy | None,
        verifier: Verifier,
        problems: ProblemStream,
        config: RolloutConfig,
        algorithm: Algorithm,
        generator: torch.Generator,
    ):
        self.policy, self.sampler = policy, sampler
        self.verifier, self.problems, self.generator = verifier, problems, generator
        self.config, self.algorithm = config, algorithm
        self.surplus: list[list[Sample]] = []  # judged, and left for the next batch
        self._next: Future[Batch] | None = None  # drawn ahead, or why it could not be
        self._group = distributed.own_group() if sampler else None
        on_gpu = sampler is not None and policy.device.type == "cuda"
        self._stream = torch.cuda.Stream(policy.device) if on_gpu else None

    def take(self) -> Batch:
        """The batch of this step.

        Raises:
            TrainerError: not a single informative group in all rounds; or what `roll_out` raises,
                or has raised ahead.
        """
        if self._next is None:
            return self._draw(self.policy)
        drawn, self._next = self._next, None
        return drawn.result()

    @contextmanager
    def drawing_ahead(self) -> Iterator[None]:
        """While the body learns, draw the next batch, and wait for it; without a sampler, do not.

        What goes wrong in that is the next step's error: this one is done and recorded.
        """
        if self.sampler is None:
            yield
            return
        self._update_sampler()
        thread = _Thread(self._draw_ahead)
        self._next = thread.outcome
        with thread:
            yield

    @torch.no_grad()
    def _update_sampler(self) -> None:
        models = (self.sampler.model, self.policy.model)
        for old, new in zip(*(model.parameters() for model in models), strict=True):
            if old.requires_grad:
                old.copy_(distributed.full_tensor(new.detach()))
        if self._stream:
            self._stream.wait_stream(torch.cuda.current_stream(self.policy.device))

    def _draw_ahead(self) -> Batch:
        distributed.speak_in(self._group)
        with torch.cuda.stream(self._stream):
            batch = self._draw(self.sampler)
        batch.fresh = False
        return batch

    def _draw(self, policy: Policy) -> Batch:
        """Sample groups until `prompts` of them can teach something (dynamic sampling).

        A group where all answers are right, or all wrong, has advantages of 0: with dynamic
        sampling on it is replaced by fresh problems, for at most `max_gen_batches` rounds. The
        surplus of the batch before comes first.
        """
        started = time.monotonic()
        algorithm, sampling = self.algorithm, Sampling.of(self.config)
        most, prompts = algorithm.max_gen_batches, self.config.prompts
        carried = self.surplus[: prompts - 1]  # in a changed recipe there may be more of them
        sampled: list[list[Sample]] = []
        rounds = found = 0
        while (missing := prompts - len(carried) - found) > 0 and rounds < most:
            count = _groups_to_sample(missing, found, len(sampled), prompts if rounds else missing)
            drawn = distributed.first(partial(self.problems.take, count))
            groups = roll_out(policy, self.verifier, drawn, sampling, self.generator)
            punish_overlong(groups, sampling.max_new_tokens, algorithm.overlong_cache)
            sampled += groups
            found += len(self._teaching(groups))
            rounds += 1
        if not carried and not found:
            raise TrainerError(_nothing_to_learn(sampled, rounds, algorithm.dynamic_sampling_by))
        return self._batch(carried, sampled, rounds, time.monotonic() - started)

    def _teaching(self, groups: list[list[Sample]]) -> list[list[Sample]]:
        if not self.algorithm.dynamic_sampling:
            return groups
        return [g for g in groups if is_informative(g, self.algorithm.dynamic_sampling_by)]

    def _batch(
        self, carried: list[list[Sample]], sampled: list[list[Sample]], rounds: int, seconds: float
    ) -> Batch:
        prompts, kept = self.config.prompts, [*carried, *self._teaching(sampled)]
        self.surplus = kept[prompts:] if self.algorithm.carry_surplus else []
        return Batch(
            groups=kept[:prompts],
            sampled=sampled,
            rounds=rounds,
            carried=len(carried),
            fresh=not carried,
            seconds=seconds,
        )

    def state(self) -> dict[str, Any]:
        """Plain values from which `load_state` goes on, with all that was drawn."""
        ahead = None
        if self._next and not self._next.exception():
            batch = self._next.result()
            ahead = {
                "carried": to_plain(batch.groups[: batch.carried]),
                "sampled": to_plain(batch.sampled),
                "rounds": batch.rounds,
                "seconds": batch.seconds,
            }
        return {
            "problems": self.problems.state(),
            "generator": self.generator.get_state(),
            "surplus": [] if ahead else to_plain(self.surplus),
            "ahead": ahead,
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on where another source was, but for groups that a changed recipe has no room for."""
        self.problems.load_state(state["problems"])
        self.generator.set_state(state["generator"])
        size = self.config.group_size
        self.surplus = from_plain(state["surplus"], size)
        if ahead := state["ahead"]:
            carried, sampled = (from_plain(ahead[name], size) for name in ("carried", "sampled"))
            batch = self._batch(carried, sampled, ahead["rounds"], ahead["seconds"])
            batch.fresh = False
            if batch.groups:
                self._next = Future()
                self._next.set_result(batch)


def copy_of(policy: Policy) -> Policy:
    """The policy with weights of its own, but for those that are not trained."""
    shared = {id(p): p for p in policy.model.parameters() if not p.requires_grad}
    return replace(policy, model=copy.deepcopy(policy.model, shared))


class _Thread(threading.Thread):
    """Work beside a block, which waits for it at its end; a signal ends both at once."""

    def __init__(self, work: Callable[[], Any]):
        super().__init__(daemon=True)
        self.work, self.outcome = work, Future()

    def run(self) -> None:
        try:
            self.outcome.set_result(self.work())
        except BaseException as error:
            self.outcome.set_exception(error)

    def __enter__(self) -> None:
        self.start()

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None or issubclass(kind, Exception):
                wait([self.outcome])  # a signal in `join` would leave a live thread called dead
        finally:
            if not self.outcome.done():
                thread, end = ctypes.c_ulong(self.ident), ctypes.py_object(SystemExit)
                ctypes.pythonapi.PyThreadState_SetAsyncExc(thread, end)  # at its next line
            self.join(STOP_SECONDS)


def _groups_to_sample(missing: int, kept: int, sampled: int, most: int) -> int:
    """As many as should fill the batch at the rate kept so far, a tenth more, at most one batch."""
    return min(most, math.ceil(1.1 * missing * sampled / kept)) if kept else most


def _nothing_to_learn(sampled: list[list[Sample]], rounds: int, by: str) -> str:
    samples = [member for group in sampled for member in group]
    accuracy = sum(member.correct for member in samples) / len(samples)
    hint = (
        "the task is solved for this policy: make it harder or stop here"
        if accuracy > 0.5
        else "the task is too hard for this policy: make it easier, or start from a better one "
        "(warmup.max_steps, model.path)"
    )
    if by == "correct" and any(is_informative(group, "reward") for group in sampled):
        hint = "their rewards differ, though: set algorithm.dynamic_sampling_by=reward to use that"
    what = "right and wrong answers" if by == "correct" else "different rewards"
    return (
        f"no group had {what} in {rounds} rounds of sampling ({len(samples)} completions, accuracy "
        f"{accuracy:.2f}): {hint}; or raise rollout.group_size or algorithm.max_gen_batches"
    )
