"""Where batches come from: drawn when a step asks for one, or while the step before it learns.

With `rollout.ahead` the batch of step k + 1 is drawn in a thread while step k learns, by a copy of
the policy as it was before that: who is faster decides nothing, and the same schedule without a
thread gives the same bits. Between two steps the thread is at rest, so that evaluations,
checkpoints and signals find a batch that is whole.
"""

from __future__ import annotations

import copy
import ctypes
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch

from fastpo.trainer import distributed
from fastpo.trainer.algorithm import Algorithm
from fastpo.trainer.config import RolloutConfig
from fastpo.trainer.experience import Batch, Sample, collect, from_plain, to_plain
from fastpo.trainer.policy import Policy
from fastpo.trainer.rollout import Sampling
from fastpo.trainer.tasks import ProblemStream
from fastpo.trainer.verifier import Verifier

STOP_SECONDS = 5.0  # for a thread that is to end at once


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
            TrainerError: what `collect` raises, or has raised ahead.
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
        batch = collect(
            policy,
            self.verifier,
            self.problems,
            self.config.prompts,
            Sampling.of(self.config),
            self.algorithm,
            self.generator,
            self.surplus,
        )
        self.surplus = batch.surplus
        return batch

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
            prompts, algorithm = self.config.prompts, self.algorithm
            batch = Batch.of(carried, sampled, ahead["rounds"], prompts, algorithm)
            batch.seconds, batch.fresh = ahead["seconds"], False
            self.surplus = batch.surplus
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
                wait(
                    [self.outcome]
                )  # not `join`, which a signal leaves with the thread called dead
        finally:
            if not self.outcome.done():
                thread, end = ctypes.c_ulong(self.ident), ctypes.py_object(SystemExit)
                ctypes.pythonapi.PyThreadState_SetAsyncExc(thread, end)  # at its next line
            self.join(STOP_SECONDS)
