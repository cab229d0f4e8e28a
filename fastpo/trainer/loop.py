"""The training loop: rollouts, rewards, dynamic sampling, updates, until the steps are done."""

from __future__ import annotations

import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from fastpo.trainer import critic, optimizer
from fastpo.trainer.algorithm import resolve
from fastpo.trainer.config import Config
from fastpo.trainer.data.tasks import ProblemStream, fewer_held_out, held_out, load_task
from fastpo.trainer.data.verifier import Verifier
from fastpo.trainer.evaluation import evaluate_held_out
from fastpo.trainer.experience import assign_advantages, mute_truncated
from fastpo.trainer.metrics import rollout_metrics, speed_metrics, update_metrics
from fastpo.trainer.model import distributed, loading, selfcheck
from fastpo.trainer.model.policy import Policy, Snapshot
from fastpo.trainer.run import checkpoint, console, directory, recipe, report
from fastpo.trainer.run.errors import Interrupted, RecipeError, TrainerError
from fastpo.trainer.run.plot import plot
from fastpo.trainer.run.signals import StopRequest, terminable
from fastpo.trainer.source import Batch, Source, copy_of
from fastpo.trainer.update import Learner, Sums
from fastpo.trainer.warmup import reference_answers, warm_up

REFERENCE = "reference"  # the frozen policy of the KL penalty, saved so that a resumed run has it


def train(
    config: Config, *, resume: bool = False, command: str = "", out: Console | None = None
) -> dict[str, Any]:
    """Run (or go on with) a whole training run and return its summary.

    Everything is written to `directory.path_of(config)`: config.toml, metrics.jsonl, samples.jsonl,
    checkpoint/, curves.png, summary.json. On one process, a run resumed from a checkpoint ends with
    the same parameters, bit by bit, as one that was never stopped.

    Raises:
        TrainerError: see its subclasses; what was written so far stays.
    """
    out = out or console.Output(highlight=False)
    with (
        distributed.ranks() as join,
        terminable(),
        # Its processes fork off first, before there are threads or a CUDA context.
        Verifier(load_task(config.task, config.task_args), **asdict(config.verifier)) as verifier,
    ):
        join()
        out.quiet = out.quiet or distributed.rank() > 0
        if resume and (done := distributed.first(lambda: report.draw_what_lacks(config, out))):
            return done
        trainer = Trainer(config, verifier, resume=resume, out=out)
        try:
            with trainer.display:
                trainer.run()
                after = trainer.evaluate()
            return distributed.first(lambda: trainer.finish(after, command))
        finally:
            if trainer.log:
                trainer.log.close()


def train_step(run: Trainer) -> tuple[Batch, dict[str, float]]:
    """One iteration of reinforcement learning: the batch it learned from, and its numbers."""
    started = time.monotonic()
    # Prompts, rollouts, rewards and overlong punishment, refilled until every group can teach.
    batch = run.source.take()
    sampled = time.monotonic()
    with run.source.drawing_ahead():
        if run.critic is None:
            assign_advantages(batch.groups, run.algorithm.estimator)
        else:
            run.critic.assign_advantages(batch.groups)
        if run.algorithm.overlong_filter:
            mute_truncated(batch.groups)
        learning_rate = run.learner.learning_rate
        values = {} if run.critic is None else run.critic.learn(batch.samples, run.order)
        sums = Sums()
        if run.critic is None or run.step >= run.config.critic.warmup_steps:
            sums = run.learner.learn(batch.samples, run.order, fresh=batch.fresh)
        means = update_metrics(sums.read())
        learned = time.monotonic()
    return batch, {
        **rollout_metrics(batch, run.algorithm.dynamic_sampling_by),
        **means,
        **values,
        "learning_rate": learning_rate,
        **speed_metrics(
            batch, run.config.optim.epochs, learned - sampled, time.monotonic() - started
        ),
    }


class Trainer:
    """One run: what it is made of, and the state that a checkpoint keeps."""

    def __init__(self, config: Config, verifier: Verifier, *, resume: bool, out: Console):
        self.config = config
        self.verifier = verifier
        self.out = out
        if config.threads:
            torch.set_num_threads(config.threads)
        loading.quiet_transformers()
        self.device = loading.default_device(config.device)
        self.algorithm = resolve(config.algorithm, config.rollout.max_new_tokens)
        distributed.check(recipe.flatten(config))
        # On the CPU whatever the device: draws depend neither on it nor on the batch size.
        self.generator = torch.Generator().manual_seed(config.seed)
        self.order = torch.Generator().manual_seed(config.seed)  # which samples share an update
        self.step, self.num_tokens, self.seconds = 0, 0, 0.0
        self.before: dict[str, Any] | None = None
        # Born in one of these two: policy, held_out and source; dir and log; learner and critic.
        if resume:
            self._resume()
        else:
            self._start()
        self.keeper = checkpoint.Keeper(
            self.dir,
            every=config.checkpoint_every,
            minutes=config.checkpoint_minutes,
            best=self.log and self.log.best,
        )
        self.display = console.Display(config.steps, self.step, config.log.print_every, out)
        self._clock = time.monotonic() - self.seconds

    def _start(self) -> None:
        torch.manual_seed(self.config.seed)
        self._take_policy(
            loading.make_policy(
                self.config.model,
                self.device,
                alphabet=self.verifier.alphabet,
                stop=self.verifier.stop,
            )
        )
        self.dir = distributed.first(lambda: directory.create(self.config, self._say))
        self.log = self._open_log(None)
        # Made after the warm-up, from whose end the reference policy and the critic are taken.
        self.learner = None

    def _resume(self) -> None:
        self.dir = directory.path_of(self.config)
        saved = checkpoint.find(self.dir)
        changed = directory.check_resumable(self.dir, self.config)
        state = checkpoint.load_state(saved)
        critic.check_kept(state["critic"], self.algorithm.critic)
        left = self.config.steps - state["step"]
        if left < 0 or (left == 0 and report.completed(self.dir, self.config.steps)):
            raise TrainerError(
                f"{self.dir} is at step {state['step']} of {self.config.steps}: nothing to do, "
                "raise steps to train longer"
            )
        if changed:
            self._say(f"Changed since the run began: {', '.join(changed)}")
        self._take_policy(
            loading.load_policy(saved, self.config.model, self.device, stop=self.verifier.stop)
        )
        self.step = state["step"]
        self._make_learner()
        self._load(state)
        self.log = self._open_log(self.step)
        if self.log and self.log.gaps:
            self._say(f"{directory.METRICS} lacks {self.log.gaps}: the curves have a gap there")
        distributed.first(lambda: directory.write_config(self.dir, self.config))

    def _open_log(self, resume_at: int | None) -> directory.RunLog | None:
        if distributed.rank():
            return None
        log = self.config.log
        return directory.RunLog(
            self.dir, tensorboard=log.tensorboard, wandb=log.wandb, resume_at=resume_at
        )

    def _take_policy(self, policy: Policy) -> None:
        """Refuse what cannot be trained, before anything is written, and draw the problems."""
        config = self.config
        optimizer.kind(config.optim.name)
        selfcheck.check(policy, config.optim)
        self.trunk = critic.beside(policy, config) if self.algorithm.critic else None
        sampler = copy_of(policy) if config.rollout.ahead else None
        self.policy = policy = distributed.shard(policy, config)
        if config.rollout.engine == "vllm":
            from fastpo.trainer.rollout_vllm import VllmRollout

            policy.engine = VllmRollout(policy, config.rollout)
        fits = policy.fits(config.rollout.max_prompt_tokens)
        self.held_out = held_out(self.verifier, config.eval.problems, fits)
        if note := fewer_held_out(self.verifier, config.eval.problems, len(self.held_out)):
            self._say(note)
        policy.encode_all(self.held_out, config.rollout.max_new_tokens)
        if config.warmup.max_steps:
            reference_answers(self.held_out)
        exclude = [problem.prompt for problem in self.held_out]
        self.source = Source(
            policy,
            sampler and replace(sampler, engine=policy.engine),
            self.verifier,
            ProblemStream(self.verifier, f"train-{config.seed}", exclude, fits),
            config.rollout,
            self.algorithm,
            self.generator,
        )

    def run(self) -> None:
        """Warm up if asked to, evaluate, then train to the last step."""
        self._say(console.headline(self.config, self.policy, self.dir))
        if self.learner is None:
            self._warm_up()
            self._make_learner()
            self.before = self.evaluate()
            self._say(f"Held-out accuracy before: {self.before['accuracy']:.3f}")
        with StopRequest(self.display.say) as stop:
            while self.step < self.config.steps and not (
                signal_number := distributed.agree(stop.signal_number or 0)
            ):
                self._advance()
                if distributed.first(self._is_save_due):
                    self.save()
            if self.step < self.config.steps:
                raise Interrupted(
                    f"stopped at step {self.step}; checkpoint saved in {self.save()}: the same "
                    "command with --resume goes on from there",
                    signal_number,
                )

    def _say(self, text: str) -> None:
        self.out.print(text, markup=False, soft_wrap=True)

    def _advance(self) -> None:
        """One step and the evaluation that may be due; whatever fails, steps done are kept."""
        self.display.phase = f"step {self.step + 1}"
        try:
            batch, metrics = train_step(self)
            self.step += 1
            every = self.algorithm.sync_reference_every
            if every and self.step % every == 0:
                self.learner.sync_reference()
            self.num_tokens += sum(len(s.prompt) + s.length for g in batch.sampled for s in g)
            metrics["num_tokens"] = self.num_tokens
            distributed.first(lambda: self._record(batch, metrics))
            every = self.config.eval.every or self.config.steps
            if self.step % every == 0 and self.step < self.config.steps:
                found = self.evaluate()
                self.display.say(f"step {self.step}: held-out accuracy {found['accuracy']:.3f}")
                score = report.score(found)
                if distributed.first(lambda: self.keeper.is_best(score)):
                    self.save()
                    distributed.first(lambda: self.keeper.keep_best(score))
        except Exception as error:
            if self.step and distributed.raised_by_all(error):
                self.save()
            raise

    def _is_save_due(self) -> bool:
        return self.keeper.is_due(self.step) or self.step == self.config.steps

    def finish(self, after: dict[str, Any], command: str) -> dict[str, Any]:
        """Write summary.json and curves.png, and report."""
        if self.keeper.is_best(score := report.score(after)):
            self.keeper.keep_best(score)
        command = command or f"fastpo train {self.dir / directory.CONFIG}"
        summary = report.write_summary(
            self.dir,
            self.before,
            after,
            seed=self.config.seed,
            seconds=round(time.monotonic() - self._clock, 1),
            steps=self.step,
            num_tokens=self.num_tokens,
            attention=self.policy.kernel,
            held_out_problems=len(self.held_out),
            eval_temperature=self.config.eval.temperature,
            command=command,
        )
        report.show(self.out, self.before, after, plot(self.dir), command)
        return summary

    def save(self) -> Path:
        """Write a checkpoint of this moment.

        Raises:
            TrainerError: the weights are not finite, or the disk is full; the last one stays.
        """
        snapshot = self.policy.snapshot()
        learned = {
            "learner": self.learner.state_dict(),
            "critic": self.critic and self.critic.state_dict(),
        }
        state = {
            **distributed.full(learned),
            "step": self.step,
            "num_tokens": self.num_tokens,
            "seconds": time.monotonic() - self._clock,
            "before": self.before,
            "source": self.source.state(),
            "order": self.order.get_state(),
        }
        return distributed.first(lambda: self._write(snapshot, state))

    def _write(self, snapshot: Snapshot, state: dict[str, Any]) -> Path:
        if not snapshot.is_finite:
            raise TrainerError(
                f"the policy's weights are not finite after step {self.step}, so no checkpoint of "
                "them was written; lower optim.learning_rate"
            )
        return self.keeper.save(snapshot, state)

    def _load(self, state: dict[str, Any]) -> None:
        self.num_tokens, self.seconds, self.before = (
            state[name] for name in ("num_tokens", "seconds", "before")
        )
        try:
            self.learner.load_state_dict(state["learner"])
            if self.critic:
                self.critic.load_state_dict(state["critic"])
            self.source.load_state(state["source"])
            self.order.set_state(state["order"])
        except (KeyError, RuntimeError, TypeError, ValueError) as error:
            raise TrainerError(f"the checkpoint in {self.dir} does not fit: {error}") from error

    def _warm_up(self) -> None:
        config = self.config.warmup
        if not config.max_steps:
            return
        self.display.phase = "warm-up"
        self._say("Supervised warm-up: it stands in for a pretrained checkpoint.")
        stream, problems = f"warmup-{self.config.seed}", self.source.problems
        warm_up(
            self.policy,
            self.verifier,
            ProblemStream(self.verifier, stream, problems.exclude, problems.fits),
            config,
            self.config.rollout,
            self.generator,
            lambda step, accuracy: self._say(f"warm-up step {step}: accuracy {accuracy:.2f}"),
        )

    def _make_learner(self) -> None:
        optim = self.config.optim
        self.critic = self.trunk and critic.Critic(self.trunk, self.policy, self.config)
        self.learner = Learner(
            self.policy,
            optim,
            self.algorithm.objective,
            self.config.rollout.temperature,
            self._reference(),
            total_updates=self.config.steps * optim.updates_per_batch * optim.epochs,
            correction=self.algorithm.correction,
        )

    def _reference(self) -> Policy | None:
        kl_coef = self.algorithm.objective.kl_coef
        if kl_coef == 0:
            return None
        if self.config.model.lora.rank:
            return self.policy.without_adapters()
        directory = self.dir / REFERENCE
        if self.step == 0:
            self.policy.save(directory)
        if not directory.exists():
            raise RecipeError(
                f"algorithm.objective.kl_coef is {kl_coef}, but the run began without a KL penalty "
                "and kept no reference policy: set it to 0, or train anew"
            )
        reference = loading.load_policy(
            directory, self.config.model, self.device, stop=self.verifier.stop
        )
        return distributed.shard(reference, self.config)

    def evaluate(self) -> dict[str, Any]:
        """Numbers and first answers on the held-out problems; logged."""
        self.display.phase = "evaluation"
        result = evaluate_held_out(self.policy, self.verifier, self.held_out, self.config)
        found = report.digest(result, result.per_problem)
        numbers = {f"eval_{name}": value for name, value in found.items() if name != "answers"}
        distributed.first(lambda: self.log.metrics(self.step, numbers))
        return found

    def _record(self, batch: Batch, metrics: dict[str, float]) -> None:
        self.log.metrics(self.step, metrics)
        self.display.step(self.step, metrics)
        for group in batch.sampled[: self.config.log.samples]:
            first = group[0]
            self.log.sample(
                self.step,
                prompt=first.problem.prompt,
                completion=first.text,
                reward=first.reward,
                correct=first.correct,
                advantage=first.advantage,
                **({"parts": first.parts} if first.parts else {}),
            )
