"""A minimal, complete DAPO/GRPO trainer. One step, in seven parts:

1. draw prompts from a task (`data.tasks`),
2. sample a group of completions of each with a KV cache (`rollout`),
3. let the task's program judge them, with a soft penalty on overlong ones (`experience`),
4. keep groups with right and wrong answers, refill until the batch is full (`source`),
5. turn rewards into group-relative advantages; completions cut off carry no loss,
6. run the model on micro-batches of bounded size and hand hidden states and LM head to
   `fastpo.linear_policy_loss`: the logits of a batch never exist (`update`),
7. clip the gradient, step AdamW, log, evaluate, checkpoint (`loop`).

`fastpo train RECIPE.toml key=value ...` runs it; `config` documents every setting. Here is the
iteration; `data` holds tasks and verifiers, `model` the policy and how it is loaded and sharded,
`run` what a run leaves and shows.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastpo.trainer.config import Config
    from fastpo.trainer.data.tasks import Problem, Task
    from fastpo.trainer.loop import train
    from fastpo.trainer.run.errors import Interrupted, RecipeError, TrainerError

__all__ = ["Config", "Interrupted", "Problem", "RecipeError", "Task", "TrainerError", "train"]

_HOMES = {
    "fastpo.trainer.config": ["Config"],
    "fastpo.trainer.loop": ["train"],
    "fastpo.trainer.run.errors": ["Interrupted", "RecipeError", "TrainerError"],
    "fastpo.trainer.data.tasks": ["Problem", "Task"],
}


def __getattr__(name: str) -> Any:
    """Import what is asked for: `fastpo settings` needs the config, and no torch."""
    for module, names in _HOMES.items():
        if name in names:
            return getattr(importlib.import_module(module), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
