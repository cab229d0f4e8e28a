"""`fastpo train RECIPE --dry-run --ranks N`: all that can go wrong before there are weights.

The task and its workers, tokenizer, prompts, algorithm and the shares of N ranks are as in a run;
the model has shapes alone (`meta`), and the ranks are one process with a group that only pretends.
What needs weights (does the model pack, is its head what it seems) a run checks when it starts.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict

import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from fastpo.integrations._lm_head import read_head
from fastpo.trainer import optimizer, rollout_vllm
from fastpo.trainer.algorithm import resolve
from fastpo.trainer.config import Config
from fastpo.trainer.critic import beside
from fastpo.trainer.data.tasks import ROW_TASKS, held_out, load_task
from fastpo.trainer.data.verifier import Verifier
from fastpo.trainer.model import distributed
from fastpo.trainer.model.footprint import Footprint, footprint
from fastpo.trainer.model.loading import outline
from fastpo.trainer.run import directory, recipe
from fastpo.trainer.run.errors import RecipeError
from fastpo.trainer.warmup import reference_answers


def plan(config: Config, ranks: int) -> Footprint:
    """The memory of a run; of its task, no problem is asked.

    Raises:
        RecipeError: prompts or replicas that so many ranks cannot share.
    """
    resolve(config.algorithm, config.rollout.max_new_tokens)
    distributed.check_size(recipe.flatten(config), ranks)
    if config.task in ROW_TASKS:  # neither their rows nor their verifiers need to be there
        alphabet, stop = (config.task_args.get(part) for part in ("alphabet", "stop"))
    else:
        task = load_task(config.task, config.task_args)
        alphabet, stop = task.alphabet, task.stop
    return footprint(config, ranks, alphabet=alphabet, stop=stop)


def dry_run(config: Config, ranks: int) -> Footprint:
    """Check a recipe for so many ranks; the memory it will take.

    Raises:
        TrainerError: what a run would refuse, in the same words.
    """
    algorithm = resolve(config.algorithm, config.rollout.max_new_tokens)
    distributed.check_size(recipe.flatten(config), ranks)
    optimizer.kind(config.optim.name)
    if config.rollout.engine == "vllm":
        rollout_vllm.installed()
    path = directory.path_of(config)
    fresh = not path.exists() or directory.can_begin_again(path)
    if not fresh and config.existing == "refuse":
        raise RecipeError(f"{path} exists: a run would refuse to write to it")
    task = load_task(config.task, config.task_args)
    with Verifier(task, **asdict(config.verifier)) as verifier:
        policy = outline(config.model, alphabet=verifier.alphabet, stop=verifier.stop)
        fits = policy.fits(config.rollout.max_prompt_tokens)
        problems = held_out(verifier, config.eval.problems, fits)
        policy.encode_all(problems, config.rollout.max_new_tokens)
        if config.warmup.max_steps:
            reference_answers(problems)
        verifier.judge([(problem, problem.answer or "") for problem in problems[:1]])
    try:
        read_head(policy.model)
    except ValueError as error:
        raise RecipeError(str(error)) from error
    with _pretended(ranks):
        models = [beside(policy, config)] if algorithm.critic else []
        for sharded in (*models, distributed.shard(policy, config)):
            _check_shards(sharded.model, ranks)
    return footprint(config, ranks, alphabet=task.alphabet, stop=task.stop)


def _check_shards(model: nn.Module, ranks: int) -> None:
    whole = [name for name, p in model.named_parameters() if not isinstance(p, DTensor)]
    if ranks > 1 and whole:
        raise RecipeError(f"{whole[0]} of {type(model).__name__} is not sharded")


@contextmanager
def _pretended(ranks: int) -> Iterator[None]:
    """In here this process is the first of so many ranks, whose messages nobody answers."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
    try:
        yield
    finally:
        dist.destroy_process_group()
