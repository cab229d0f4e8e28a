"""fastpo: fused policy-optimization losses for LLM reinforcement learning."""

from fastpo.objective import Objective
from fastpo.ops._checks import set_debug
from fastpo.ops.from_logprobs import policy_loss_from_logprobs
from fastpo.ops.logits import policy_loss, token_logprobs
from fastpo.ops.results import PolicyLoss, TokenLogprobs

__version__ = "0.1.0"
