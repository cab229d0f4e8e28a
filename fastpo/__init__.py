"""fastpo: fused policy-optimization losses for LLM reinforcement learning."""

from fastpo.advantages import GroupAdvantages, group_advantages
from fastpo.critic import Gae, ValueLoss, gae, value_loss
from fastpo.kept import (
    KeptTokens,
    kept_from_arrays,
    kept_from_logits,
    kept_from_mask,
    sampling_mask,
)
from fastpo.masks import completion_mask
from fastpo.mismatch import RolloutCorrection, rollout_correction
from fastpo.objective import Objective
from fastpo.ops.checks import set_debug
from fastpo.ops.from_logprobs import policy_loss_from_logprobs
from fastpo.ops.linear import linear_policy_loss, linear_token_logprobs
from fastpo.ops.logits import policy_loss, token_logprobs
from fastpo.ops.results import PolicyLoss, TokenLogprobs
from fastpo.presets import (
    aspo,
    bnpo,
    ce_gppo,
    cispo,
    dapo,
    dppo,
    dr_grpo,
    dro,
    gmpo,
    gpg,
    grpo,
    gspo,
    gspo_token,
    icepop,
    ipo,
    luspo,
    ppo,
    reinforce,
    sapo,
    topr,
    vespo,
)
from fastpo.rewards import overlong_penalty
from fastpo.rule import TokenInputs, loss_rule

__version__ = "0.1.0"

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
