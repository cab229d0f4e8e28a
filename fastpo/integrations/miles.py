"""Miles: its log-probs by `fastpo.token_logprobs`, and its clipped surrogate by fastpo.

    --custom-megatron-init-path fastpo.integrations.miles.install

Miles is a fork of slime whose losses have moved and take other arguments: slime's adapter does not
fit it as it is. As there, its `policy_loss_function` takes two functions from fastpo, and all else
is Miles' own: every argument is honoured, and no custom loss is needed. `true_on_policy_mode`
scores as SGLang does, bit for bit, and stays Miles' own.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fastpo.integrations import slime


def install(args: Any = None) -> None:
    """Put both functions where Miles' losses look them up; twice changes nothing."""
    from miles.backends.training_utils.loss_hub import logit_processors, losses

    losses.compute_policy_loss = slime.compute_policy_loss
    logit_processors.calculate_log_probs_and_entropy = calculate_log_probs_and_entropy


def calculate_log_probs_and_entropy(
    logits: Tensor,
    tokens: Tensor,
    tp_group: Any,
    with_entropy: bool = False,
    entropy_requires_grad: bool = True,
    chunk_size: int = -1,
    true_on_policy: bool = False,
    vocab_size: int | None = None,
) -> tuple[Tensor, Tensor | None]:
    """As `slime.calculate_log_probs_and_entropy`, or Miles' own where `true_on_policy`."""
    if true_on_policy:
        from miles.backends.training_utils.loss_hub import math_utils

        return math_utils.calculate_log_probs_and_entropy(
            *(logits, tokens, tp_group, with_entropy, entropy_requires_grad, chunk_size),
            *(true_on_policy, vocab_size),
        )
    return slime.calculate_log_probs_and_entropy(
        logits, tokens, tp_group, with_entropy, with_entropy_grad=entropy_requires_grad
    )
