"""fastpo: fused policy-optimization losses for LLM reinforcement learning."""

# ruff: noqa: F405

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastpo._api import *  # noqa: F403

__version__ = "0.2.0.dev0"

__all__ = [
    "Gae",
    "GroupAdvantages",
    "KeptTokens",
    "Objective",
    "PolicyLoss",
    "RolloutCorrection",
    "TokenInputs",
    "TokenLogprobs",
    "ValueLoss",
    "aspo",
    "bnpo",
    "ce_gppo",
    "cispo",
    "completion_mask",
    "dapo",
    "dppo",
    "dr_grpo",
    "dro",
    "gae",
    "gmpo",
    "gpg",
    "group_advantages",
    "grpo",
    "gspo",
    "gspo_token",
    "icepop",
    "ipo",
    "kept_from_arrays",
    "kept_from_logits",
    "kept_from_mask",
    "linear_policy_loss",
    "linear_token_logprobs",
    "loss_rule",
    "luspo",
    "overlong_penalty",
    "policy_loss",
    "policy_loss_from_logprobs",
    "ppo",
    "reinforce",
    "rollout_correction",
    "sampling_mask",
    "sapo",
    "set_debug",
    "token_logprobs",
    "topr",
    "value_loss",
    "vespo",
]


def __getattr__(name: str) -> Any:
    """Import the ops, and torch, when the first of them is used: `fastpo --help` needs neither."""
    if name in __all__:
        public = importlib.import_module("fastpo._api")
        globals().update({each: getattr(public, each) for each in __all__})
        return globals()[name]
    if not name.startswith("_"):
        try:
            return importlib.import_module(f"fastpo.{name}")
        except ModuleNotFoundError as error:
            if error.name != f"fastpo.{name}":
                raise
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
