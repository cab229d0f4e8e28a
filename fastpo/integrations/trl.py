"""TRL: its trainers' fused LM head computed by fastpo, with one line before the trainer is made.

    from fastpo.integrations import trl as fastpo_trl
    fastpo_trl.install()

GRPO, RLOO, DPO, KTO and SFT trainers of TRL 1.16 score tokens through one autograd function. After
`install()` it is `fastpo.linear_token_logprobs`; the losses stay TRL's own. Fields that only TRL's
kernel computes (is_top1, mean_logits, log_sum_sq_probs) are still computed by TRL's kernel.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fastpo.ops.linear import linear_token_logprobs

_FIELDS = ("log_probs", "entropy")
_NAME = "_ChunkedLogProbFunction"


class _FastpoLogProbs:
    """Stands in for TRL's autograd function: `apply` on (n, D) hidden states, (n,) labels."""

    def __init__(self, original: Any):
        self.original = original

    def apply(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        temperature: float,
        chunk_size: int,
        softcap: float | None,
        logit_scale: float,
        outputs: tuple[str, ...],
    ) -> tuple[Tensor | None, ...]:
        """TRL's five per-token fields in its order: log-probs, entropy, and three None."""
        if not set(outputs) <= set(_FIELDS):
            return self.original.apply(
                hidden,
                weight,
                bias,
                labels,
                temperature,
                chunk_size,
                softcap,
                logit_scale,
                outputs,
            )
        scored = linear_token_logprobs(
            hidden,
            weight.to(hidden.dtype),
            labels,
            bias=None if bias is None else bias.to(hidden.dtype),
            temperature=temperature,
            logit_scale=logit_scale,
            softcap=softcap,
        )
        return scored.logprobs, scored.entropy if "entropy" in outputs else None, None, None, None


def install() -> None:
    """Let TRL's trainers score tokens with fastpo. Calling it twice changes nothing.

    Raises:
        ImportError: TRL is not installed, or is a version without the function that is replaced.
    """
    from trl.trainer import utils

    original = getattr(utils, _NAME, None)
    if original is None:
        import trl

        raise ImportError(
            f"trl {trl.__version__} has no trl.trainer.utils.{_NAME}, expected trl 1.16: "
            "pip install 'trl>=1.16,<1.17'"
        )
    if not isinstance(original, _FastpoLogProbs):
        setattr(utils, _NAME, _FastpoLogProbs(original))


def uninstall() -> None:
    """Give TRL its own function back."""
    from trl.trainer import utils

    current = getattr(utils, _NAME, None)
    if isinstance(current, _FastpoLogProbs):
        setattr(utils, _NAME, current.original)


def __getattr__(name: str) -> Any:
    if name == "GRPOTrainer":  # a subclass of TRL's: TRL is imported when it is asked for
        from fastpo.integrations._trl_grpo import GRPOTrainer

        return GRPOTrainer
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
