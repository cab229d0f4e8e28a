"""A small policy, samples for it, and a learner: what the tests of updates share."""

import torch

import fastpo
from fastpo.trainer.config import ModelConfig, OptimConfig
from fastpo.trainer.data.tasks import Problem
from fastpo.trainer.experience import Sample
from fastpo.trainer.model.loading import make_policy
from fastpo.trainer.rollout import Sampling, sample
from fastpo.trainer.update import Learner, Sums

CPU = torch.device("cpu")
PROMPTS = [[3, 4, 5], [6], [7, 8, 9, 10, 11]]


def make(seed=0, temperature=0.8, objective=None, total_updates=0, **optim):
    torch.manual_seed(seed)
    policy = make_policy(
        ModelConfig(hidden_size=32, layers=1, heads=2), CPU, alphabet="0123456789=", stop=None
    )
    return Learner(
        policy,
        OptimConfig(**optim),
        objective or fastpo.dapo(),
        temperature,
        total_updates=total_updates,
    )


def samples_of(policy, *, temperature=0.8, advantages=None, **sampling):
    completions = sample(
        policy,
        PROMPTS,
        Sampling(group_size=4, max_new_tokens=7, temperature=temperature, **sampling),
        torch.Generator().manual_seed(0),
    )
    torch.manual_seed(1)
    advantages = torch.randn(len(completions)) if advantages is None else advantages
    return [
        Sample(
            problem=Problem("", ""),
            prompt=PROMPTS[index // 4],
            completion=completion,
            text="",
            score=0.0,
            reward=0.0,
            advantage=float(advantages[index]),
        )
        for index, completion in enumerate(completions)
    ]


def gradients(learner, samples, *, on_policy=True):
    """Gradient of one update, with the parameters left where they were."""
    before = [p.detach().clone() for p in learner.parameters]
    sums, found = Sums(), []
    hook = learner.optimizer.register_step_pre_hook(
        lambda *_: found.extend(p.grad.flatten() for p in learner.parameters)
    )
    learner.update(samples, sums, on_policy=on_policy)
    hook.remove()
    gradient = torch.cat(found)
    for parameter, value in zip(learner.parameters, before, strict=True):
        parameter.data.copy_(value)
    return gradient, sums.read()
