"""verl's fused LM head (`model.use_fused_kernels=True`) by fastpo: FSDP models and Megatron.

verl's own fused heads multiply by `lm_head.weight` and stop there: models with a final softcap, a
scale or a bias (Gemma 2, Cohere, Granite, Phi) get other log-probs than their own. Here the head
is the one that `fastpo.integrations.transformers.lm_head` reads and checks.
"""

from __future__ import annotations

import functools
import importlib
import types
from typing import Any

import torch
from torch import Tensor, nn

from fastpo.integrations._lm_head import read_head
from fastpo.integrations.transformers import lm_head
from fastpo.ops.linear import linear_token_logprobs

NAME = "fastpo"  # model.fused_kernel_options.impl_backend


def install() -> None:
    """Let verl know the fused-kernel backend "fastpo". Nothing changes for who does not name it."""
    from verl.models.transformers import monkey_patch
    from verl.utils.experimental import torch_functional

    if not hasattr(monkey_patch.patch_forward_with_backends, "__wrapped__"):
        monkey_patch.patch_forward_with_backends = _accepting_fastpo(
            monkey_patch.patch_forward_with_backends
        )
        torch_functional.FusedLinearForPPO = _fused_linear(torch_functional.FusedLinearForPPO)


def install_megatron() -> None:
    """Replace the Megatron head, `linear_cross_entropy`, in every verl module that uses it.

    Raises:
        ImportError: Megatron is not installed.
    """
    from verl.utils.kernel import linear_cross_entropy as kernel

    kernel.linear_cross_entropy = linear_cross_entropy
    for name in ("model_forward_fused", "model_forward_1f1b_overlap"):
        importlib.import_module(
            f"verl.models.mcore.{name}"
        ).linear_cross_entropy = linear_cross_entropy


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    temperature: float = 1.0,
    reduction: str = "none",
    dist_process_group: Any = None,
) -> tuple[Tensor, Tensor]:
    """verl's `linear_cross_entropy`: log-probs (fp32) and entropy of each label, flat (N,).

    Args:
        hidden: [..., D]. weight: [V, D], or this rank's rows of it under `dist_process_group`.
        labels: [...] ids. reduction: "none", the only one verl uses.

    Raises:
        ValueError: another reduction.
    """
    if reduction != "none":
        raise ValueError(f"reduction is {reduction!r}, expected 'none': reduce the log-probs")
    scored = linear_token_logprobs(
        hidden.reshape(-1, hidden.shape[-1]),
        weight,
        labels.reshape(-1),
        temperature=temperature,
        tp_group=dist_process_group,
    )
    return scored.logprobs, scored.entropy


def _accepting_fastpo(original: Any) -> Any:
    """verl's `patch_forward_with_backends` that knows one more backend."""

    @functools.wraps(original)
    def patch_forward_with_backends(
        model: nn.Module, use_fused_kernels: bool = False, fused_kernels_backend: str | None = None
    ) -> None:
        if not use_fused_kernels or fused_kernels_backend != NAME:
            original(model, use_fused_kernels, fused_kernels_backend)
            return
        if not any(parameter.is_meta for parameter in model.parameters()):
            lm_head(model)  # refuses a head that cannot be expressed, before training begins
        original(model, True, "torch")
        model._verl_fused_kernels_backend = NAME
        dense = importlib.import_module("verl.models.transformers.dense_common")
        if type(model).forward is dense.forward_with_torch_backend:
            model.forward = types.MethodType(_dense_forward, model)
        print(f"Using fastpo for the fused LM head of {type(model).__name__}")

    return patch_forward_with_backends


def _dense_forward(
    self: nn.Module,
    input_ids: Tensor | None = None,
    *,
    labels: Tensor | None = None,
    shift_labels: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    return_dict: bool | None = None,
    logits_to_keep: int | Tensor = 0,
    **trunk_inputs: Any,
) -> Any:
    """What verl's engines call a model by: log-probs and entropy [B, T] instead of logits."""
    from verl.models.transformers.dense_common import CausalLMOutputForPPO, forward_base_model

    if shift_labels is None:
        source = input_ids if labels is None else labels
        shift_labels = source.roll(-1, dims=-1)
    accepted = forward_base_model.__code__.co_varnames[: forward_base_model.__code__.co_argcount]
    trunk_inputs = {name: value for name, value in trunk_inputs.items() if name in accepted}
    outputs = forward_base_model(self, input_ids=input_ids, **trunk_inputs)
    scored = linear_token_logprobs(
        outputs[0], tokens=shift_labels, temperature=temperature, **read_head(self)
    )
    return CausalLMOutputForPPO(
        log_probs=scored.logprobs,
        entropy=scored.entropy,
        past_key_values=outputs.past_key_values,
        hidden_states=outputs.hidden_states,
        attentions=outputs.attentions,
    )


def _fused_linear(original: type) -> type:
    """verl's head module with one more backend: multimodal models build it in their forward."""

    class FusedLinearForPPO(original):
        def __init__(self, chunk_size: int = 512, impl_backend: str = "torch"):
            super().__init__(chunk_size, "torch" if impl_backend == NAME else impl_backend)
            self.impl_backend = impl_backend

        def forward(
            self,
            hidden_states: Tensor,
            vocab_weights: Tensor,
            input_ids: Tensor,
            temperature: float | Tensor = 1.0,
        ) -> tuple[Tensor, Tensor]:
            if self.impl_backend != NAME:
                return super().forward(hidden_states, vocab_weights, input_ids, temperature)
            scored = linear_token_logprobs(
                hidden_states, vocab_weights, input_ids.to(torch.int64), temperature=temperature
            )
            return scored.logprobs, scored.entropy

    return FusedLinearForPPO
