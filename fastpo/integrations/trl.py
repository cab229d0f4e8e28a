"""TRL: its RL trainers with fastpo's loss, and the fused LM head of its other trainers.

    from fastpo.integrations.trl import GRPOTrainer  # in place of trl's; the loss is fastpo's
    # and RLOOTrainer, GMPOTrainer, AsyncGRPOTrainer

    from fastpo.integrations import trl as fastpo_trl
    fastpo_trl.install()  # log-probs alone: DPO, KTO, SFT, ..., and the losses stay TRL's own

These trainers score tokens through one autograd function. After `install()` it is
`fastpo.linear_token_logprobs`, every field of it, for policy and reference alike. TRL 1.15 has the
same functions, except for AsyncGRPOTrainer, which packs other rows there and is refused.
"""

from __future__ import annotations

import importlib
import logging
import types
from pathlib import Path
from typing import Any

from torch import Tensor

from fastpo.ops.linear import linear_token_logprobs

_READER, _NAME = "add_fused_lm_head", "_ChunkedLogProbFunction"
_STATISTICS = ("log_sum_sq_probs", "mean_logits", "is_top1")
_log = logging.getLogger(__name__)


class _FastpoLogProbs:
    """Stands in for TRL's autograd function: `apply` on (n, D) hidden states, (n,) labels."""

    def __init__(self, original: Any):
        self.original = original
        self.calls = 0

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
        """TRL's five per-token fields in its order; those not in `outputs` are None."""
        self.calls += 1
        if self.calls == 1:
            _log.info("fastpo scores the tokens of TRL's trainers")
        scored = linear_token_logprobs(
            hidden,
            weight.to(hidden.dtype),
            labels,
            bias=None if bias is None else bias.to(hidden.dtype),
            temperature=temperature,
            logit_scale=logit_scale,
            softcap=softcap,
            statistics=[name for name in _STATISTICS if name in outputs],
        )
        _gather_in_backward(scored.logprobs, weight, bias)
        fields = ("entropy", *_STATISTICS)
        return scored.logprobs, *(getattr(scored, n) if n in outputs else None for n in fields)


def _gather_in_backward(logprobs: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Under ZeRO-3 the head is partitioned again when backward reads it: gather it meanwhile."""
    from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

    if not is_deepspeed_zero3_enabled() or logprobs.grad_fn is None:
        return
    from trl.trainer import utils

    node = logprobs.grad_fn
    while "LinearTokenLogprobs" not in node.name():
        node = node.next_functions[0][0]
    context: list[Any] = []

    def gather(_: Any) -> None:
        context.append(utils.maybe_gather_lm_head_ctx(weight, bias))
        context[-1].__enter__()

    def release(*_: Any) -> None:
        context.pop().__exit__(None, None, None)

    node.register_prehook(gather)
    node.register_hook(release)


def install() -> None:
    """Let TRL's trainers score tokens with fastpo. Calling it twice changes nothing.

    Raises:
        ImportError: TRL is not installed, or is a version that does not read what is replaced.
    """
    from trl.trainer import utils

    if isinstance(getattr(utils, _NAME, None), _FastpoLogProbs):
        return
    if not hasattr(utils, _NAME) or not _reads(getattr(utils, _READER, None), _NAME):
        import trl

        raise ImportError(
            f"trl {trl.__version__} has no trl.trainer.utils.{_READER} that reads {_NAME}, so "
            "nothing would reach fastpo, expected trl 1.15 or 1.16: pip install 'trl>=1.15,<1.17'"
        )
    setattr(utils, _NAME, _FastpoLogProbs(getattr(utils, _NAME)))


def _reads(function: Any, name: str) -> bool:
    """Whether a function, or one inside it, looks `name` up when it runs."""

    def in_code(code: types.CodeType) -> bool:
        inner = (x for x in code.co_consts if isinstance(x, types.CodeType))
        return name in code.co_names or any(map(in_code, inner))

    return isinstance(function, types.FunctionType) and in_code(function.__code__)


def calls() -> int:
    """How often TRL has called fastpo since `install()`: 0 after a step means that it does not.

    Raises:
        RuntimeError: not installed.
    """
    from trl.trainer import utils

    current = getattr(utils, _NAME, None)
    if not isinstance(current, _FastpoLogProbs):
        raise RuntimeError("fastpo is not installed in TRL: call install() first")
    return current.calls


def uninstall() -> None:
    """Give TRL its own function back."""
    from trl.trainer import utils

    current = getattr(utils, _NAME, None)
    if isinstance(current, _FastpoLogProbs):
        setattr(utils, _NAME, current.original)


_TRAINERS = {
    "GRPOTrainer": "_trl_grpo",
    "RLOOTrainer": "_trl_sequence",
    "GMPOTrainer": "_trl_sequence",
    "AsyncGRPOTrainer": "_trl_async",
}


def __getattr__(name: str) -> Any:
    if name in _TRAINERS:  # subclasses of TRL's: TRL is imported when one is asked for
        if name == "AsyncGRPOTrainer":
            _check_packs_trees()
        return getattr(importlib.import_module(f"fastpo.integrations.{_TRAINERS[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _check_packs_trees() -> None:
    import trl

    packing = Path(trl.__file__).parent / "experimental" / "async_grpo" / "packing.py"
    if not packing.is_file():
        raise ImportError(
            f"trl {trl.__version__} packs no trees of samples, which AsyncGRPOTrainer scores, "
            "expected trl 1.16: pip install 'trl>=1.16,<1.17'"
        )
