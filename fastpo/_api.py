"""The public names, all in one place; `fastpo/__init__.py` imports them when the first is used."""

# ruff: noqa: F401

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
