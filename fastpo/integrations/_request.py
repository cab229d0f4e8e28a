"""What one call of an attached model asks for, and what stands in its LM head's place for it."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from fastpo.ops.linear import linear_policy_loss, linear_token_logprobs
from fastpo.ops.results import PolicyLoss


class Request:
    """`policy_loss` or `token_logprobs` as an object: FSDP2's cast_forward_inputs sees no tensors
    in it, and so rounds no log-probs to bf16. `attach` makes it from the dict where it can."""

    def __init__(self, **options: Any):
        self.options = options


class Scoring:
    """What one call asks for, and what stands in the LM head's place for it."""

    def __init__(self, name: str, options: dict[str, Any], ids: Tensor):
        self.name = name  # the model's class
        self.options = options
        self.ids = ids  # (B, T)
        self.made: PolicyLoss | None = None
        self.positions = options.pop("positions", None)
        taken = [name for name in _MODELS_OWN if name in options]
        if self.positions is not None and "tokens" in taken:
            taken.remove("tokens")
        if taken:
            raise TypeError(
                f"{taken[0]} is given, expected none of {', '.join(_MODELS_OWN)}: hidden states "
                "and head are the model's, tokens are input_ids, and the mask is completion_mask"
            )
        if "statistics" in options:
            raise TypeError(
                "statistics are given, which no model's forward returns: ask "
                "fastpo.linear_token_logprobs, with hidden_states(model, ...) and lm_head(model)"
            )
        self.fp32_head = options.pop("fp32_head", False)
        self.mask = options.pop("completion_mask", None)
        if self.positions is None:
            self._check_mask()
        else:
            self._check_positions()

    def _check_mask(self) -> None:
        if self.mask is None:
            raise TypeError(
                "completion_mask is missing, expected a [B, T] bool tensor: True for the tokens "
                "that were sampled and count"
            )
        if not isinstance(self.mask, Tensor) or self.mask.shape != self.ids.shape:
            found = type(self.mask).__name__
            if isinstance(self.mask, Tensor):
                found = f"of shape {list(self.mask.shape)}"
            raise ValueError(
                f"completion_mask is {found}, expected {list(self.ids.shape)} as input_ids: one "
                "flag per token, prompts included"
            )

    def _check_positions(self) -> None:
        tokens = self.options.get("tokens")
        if self.mask is not None or not isinstance(tokens, Tensor) or tokens.ndim != 1:
            raise TypeError(
                "positions are given, expected tokens [M] beside them, the id that each predicts, "
                "and no completion_mask"
            )
        if self.positions.shape != tokens.shape or self.positions.dtype != torch.int64:
            raise ValueError(
                f"positions are {self.positions.dtype} {list(self.positions.shape)}, expected "
                f"int64 {list(tokens.shape)} as tokens: rows of the flattened hidden states"
            )

    def loss(self, hidden: Tensor, head: dict[str, Any]) -> Tensor:
        """0-d loss of hidden states [B, K, D]."""
        with self._precision(hidden):
            self.made = linear_policy_loss(**self._inputs(hidden, head))
        return self.made.loss

    def logprobs(self, hidden: Tensor, head: dict[str, Any]) -> Tensor:
        """[B, K - 1, 2] log-probs and entropies of hidden states [B, K, D]."""
        with self._precision(hidden):
            return torch.stack(linear_token_logprobs(**self._inputs(hidden, head)), -1)

    def _precision(self, hidden: Tensor) -> AbstractContextManager:
        """`fp32_head` takes the product out of autocast, as trainers that cast the head do."""
        return (
            torch.autocast(hidden.device.type, enabled=False) if self.fp32_head else nullcontext()
        )

    def _inputs(self, hidden: Tensor, head: dict[str, Any]) -> dict[str, Any]:
        if hidden.ndim != 3 or hidden.shape[0] != self.ids.shape[0]:
            raise ValueError(
                f"{self.name} gives its LM head hidden states {list(hidden.shape)}, expected "
                f"[{self.ids.shape[0]}, K, D]: one row per sequence"
            )
        for name in (name for name in _PER_TOKEN if isinstance(self.options.get(name), Tensor)):
            _check_not_rounded(name, self.options[name])
        if self.fp32_head:
            head = {k: v.float() if isinstance(v, Tensor) else v for k, v in head.items()}
        if not torch.is_autocast_enabled(hidden.device.type):
            hidden = hidden.to(head["weight"].dtype)  # a head that was cast to fp32
        if self.positions is not None:
            return {"hidden": hidden.flatten(0, 1)[self.positions], **head, **self.options}
        kept = hidden.shape[1]
        if kept > self.ids.shape[1]:
            raise ValueError(
                f"{self.name} gives its LM head {kept} positions for {self.ids.shape[1]} tokens: "
                "which of them predict tokens is not known (prompt tuning, added image tokens)"
            )
        tokens = self.ids[:, self.ids.shape[1] - kept :][:, 1:]
        mask = (self.mask[:, self.mask.shape[1] - kept :] != 0)[:, 1:]
        options = dict(self.options)
        for name in _PER_TOKEN:
            if isinstance(options.get(name), Tensor):
                options[name] = _per_token(name, options[name], tokens.shape)
        for bound in options.get("clip_bounds") or ():
            if isinstance(bound, Tensor):
                _check_not_rounded("clip_bounds", bound)
                _per_token("clip_bounds", bound, tokens.shape)
        return {"hidden": hidden[:, :-1], "tokens": tokens, "mask": mask, **head, **options}


_PER_TOKEN = (
    "advantages",
    "old_logprobs",
    "ref_logprobs",
    "importance_weights",
    "temperature",
    "nll_weights",
)
_MODELS_OWN = ("hidden", "weight", "bias", "logit_scale", "softcap", "tokens", "mask")
_PER_SEQUENCE = ("advantages", "importance_weights")


def _check_not_rounded(name: str, value: Tensor) -> None:
    if value.dtype in (torch.bfloat16, torch.float16):
        raise TypeError(
            f"{name} arrived as {value.dtype}, expected float32: if FSDP2 rounded it on the way "
            "in, call attach after fully_shard, or use MixedPrecisionPolicy("
            "cast_forward_inputs=False)"
        )


def _per_token(name: str, value: Tensor, shape: torch.Size) -> Tensor:
    """`value` as the ops take it, or a line that says that prompts are included."""
    rows, tokens = shape
    if name in _PER_SEQUENCE and value.shape in ((rows,), (rows, 1)) and shape != (rows, 1):
        return value.reshape(rows)
    if name == "temperature" and value.ndim == 0:
        return value.expand(shape)
    if value.shape != shape and not (name in _PER_SEQUENCE and value.shape == (rows,)):
        either = f"[{rows}] or " if name in _PER_SEQUENCE else ""
        raise ValueError(
            f"{name} has shape {list(value.shape)}, expected {either}[{rows}, {tokens}] = "
            "[B, T - 1]: one per predicted token as input_ids[:, 1:], prompts included"
        )
    return value
