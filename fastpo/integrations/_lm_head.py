"""The LM head of a causal LM, as the linear ops take it: effective weight, bias, scale, softcap.

What can be read is read: the names of scale and softcap in the configs, LoRA and DoRA by type.
Nothing is believed: `check_logits` compares the reading with logits that the model itself made.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
FACTORS = ("logit_scale", "output_multiplier", "lm_head_multiplier")
READ = "weight, bias, LoRA or DoRA, then one scale and one softcap"


def read_head(model: nn.Module, head: nn.Module | None = None) -> dict[str, Any]:
    """`weight`, `bias`, `logit_scale` and `softcap` of `model`, not yet compared with its logits.

    Args:
        model: a causal LM of transformers, or what has its `config` and `get_output_embeddings`.
        head: its LM head, if that is at hand; None = `model.get_output_embeddings()`.
    """
    head = output_embeddings(model) if head is None else head
    config = model.config.get_text_config()
    weight, bias = effective_weight(head)
    vocabulary = getattr(config, "unpadded_vocab_size", None)  # Inkling drops the padding rows
    if vocabulary is not None:
        weight, bias = weight[:vocabulary], None if bias is None else bias[:vocabulary]
    return {
        "weight": weight,
        "bias": bias,
        "logit_scale": _logit_scale(config),
        "softcap": next((c for c in (getattr(config, n, None) for n in SOFTCAPS) if c), None),
    }


def output_embeddings(model: nn.Module) -> nn.Module:
    """The LM head's module, which maps hidden states to logits."""
    head = model.get_output_embeddings()
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise ValueError(
            f"{type(model).__name__} is an encoder-decoder, whose head predicts decoder_input_ids, "
            "not input_ids: expected a causal language model; score its logits with "
            "fastpo.policy_loss"
        )
    if head is None:
        raise ValueError(
            f"{type(model).__name__} names no LM head (get_output_embeddings() is None): expected "
            "a causal language model; score its logits with fastpo.policy_loss"
        )
    return head


def _logit_scale(config: Any) -> float:
    for name in FACTORS:  # Cohere, Muse Glimmer, Falcon-H1
        factor = getattr(config, name, None)
        if factor is not None:
            return float(factor)
    divisor = getattr(config, "logits_scaling", None)  # Granite; HyperCLOVA X multiplies by it
    if divisor is None or config.model_type == "minicpm3":  # which scales what enters its head
        return 1.0
    return float(divisor) if config.model_type == "hyperclovax" else 1.0 / divisor


def effective_weight(head: nn.Module) -> tuple[Tensor, Tensor | None]:
    """Weight [V, D] and bias [V] that `head` multiplies by, adapters of peft merged in the graph.

    LoRA gives W + s B A, DoRA that with its columns' norms replaced; gradients reach A, B and the
    magnitudes. The sum is rounded to W's dtype, as peft's own `merge` does.

    Raises:
        ValueError: an adapter of another kind, or one that is no fixed matrix (dropout).
    """
    if type(head).__module__.startswith("peft."):
        return _adapted_weight(head)
    weight = getattr(head, "weight", None)
    if not isinstance(weight, Tensor) or not weight.dtype.is_floating_point:
        found = "no weight" if weight is None else f"a weight of type {type(weight).__name__}"
        if isinstance(weight, Tensor):
            found = f"a weight of dtype {weight.dtype}"
        raise ValueError(
            f"the LM head is {type(head).__name__} with {found}, expected a floating [V, D] "
            "matrix: leave the head out of quantization, or score the logits with policy_loss"
        )
    return weight, getattr(head, "bias", None)


def _adapted_weight(head: Any) -> tuple[Tensor, Tensor | None]:
    from peft.tuners.lora import Linear
    from peft.utils.other import ModulesToSaveWrapper

    if isinstance(head, ModulesToSaveWrapper):
        active = [name for name in head.active_adapters if name in head.modules_to_save]
        saved = head.modules_to_save[active[0]] if active and not head.disable_adapters else None
        return effective_weight(head.original_module if saved is None else saved)
    if not isinstance(head, Linear):
        raise ValueError(
            f"the LM head carries {type(head).__module__}.{type(head).__name__}, expected a LoRA "
            "or DoRA adapter, or none: leave the head out of target_modules"
        )
    weight, bias = effective_weight(head.get_base_layer())
    if head.merged or head.disable_adapters:
        if head.merged and head.disable_adapters:
            raise ValueError("the LM head's adapter is merged and disabled: call unmerge() first")
        return weight, bias
    for name in head.active_adapters:
        if name in head.lora_A:
            weight, bias = _with_lora(head, name, weight, bias)
    return weight, bias


def _with_lora(
    head: Any, name: str, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """`weight` and `bias` with one adapter of a peft LoRA layer added."""
    variant = getattr(head, "lora_variant", {}).get(name)
    if variant is not None and type(variant).__name__ != "DoraLinearVariant":
        raise ValueError(
            f"the LM head's adapter {name!r} is a {type(variant).__name__}, expected LoRA or DoRA: "
            "leave the head out of target_modules"
        )
    dropout = getattr(head.lora_dropout[name], "p", 0.0)
    if dropout and head.training:
        raise ValueError(
            f"the LM head's adapter {name!r} drops out {dropout} of its inputs, so it is no fixed "
            "matrix: set lora_dropout=0, or leave the head out of target_modules"
        )
    up, down, scale = head.lora_B[name], head.lora_A[name].weight, head.scaling[name]
    merged = weight.to(down.dtype) + scale * (up.weight @ down)  # (V, D)
    if variant is not None:
        norms = torch.linalg.vector_norm(merged, dim=1).detach()  # constants, as DoRA has them
        merged = (head.lora_magnitude_vector[name].weight / norms)[:, None] * merged
    if up.bias is not None:
        added = scale * up.bias
        bias = added if bias is None else (bias.to(added.dtype) + added).to(bias.dtype)
    return merged.to(weight.dtype), bias


class Sample(NamedTuple):
    """What the head as read makes of a few rows: made where its weight is gathered, used later."""

    exact: Tensor  # (n, V) fp64, finished logits
    rounded: Tensor  # (n, V) the same from a product in the model's dtype
    eps: float  # of that dtype


@torch.no_grad()
def sample(head: dict[str, Any], hidden: Tensor) -> Sample:
    """Logits of `hidden` [n, D] by the reading `head`, exact and rounded."""
    dtype = torch.promote_types(hidden.dtype, head["weight"].dtype)
    if torch.is_autocast_enabled(hidden.device.type):
        dtype = torch.get_autocast_dtype(hidden.device.type)
    exact, rounded = (_logits(hidden, head, x) for x in (torch.float64, dtype))
    return Sample(exact, rounded, torch.finfo(dtype).eps)


def _logits(hidden: Tensor, head: dict[str, Any], dtype: torch.dtype) -> Tensor:
    """(n, V) finished logits in fp64 whose product was made in `dtype`."""
    weight, bias = head["weight"].to(dtype), head["bias"]
    with torch.autocast(hidden.device.type, enabled=False):
        logits = linear(hidden.to(dtype), weight, None if bias is None else bias.to(dtype))
    logits = logits.double() * head["logit_scale"]
    softcap = head["softcap"]
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


@torch.no_grad()
def check_logits(model: nn.Module, sample: Sample, logits: Tensor) -> None:
    """Raise if `logits` [n, V], the model's own of the sampled rows, are not those of the reading.

    The allowance is what rounding does: four times the error of the same product in the model's
    dtype against fp64, and four units in the last place for the steps behind it.

    Raises:
        ValueError: naming the model's class.
    """
    name, exact = type(model).__name__, sample.exact
    if logits.shape[-1] != exact.shape[-1]:
        raise ValueError(
            f"{name} makes {logits.shape[-1]} logits from an LM head of {exact.shape[-1]} rows: "
            f"fastpo reads {READ}; score its logits with fastpo.policy_loss"
        )
    scale = exact.square().mean().sqrt()
    eps = max(sample.eps, torch.finfo(logits.dtype).eps)
    allowed = 4 * (sample.rounded - exact).square().mean().sqrt() + 4 * eps * scale
    error = (logits.double() - exact).square().mean().sqrt()
    if not error <= allowed:  # NaN too
        raise ValueError(
            f"{name} does more in its LM head than fastpo reads ({READ}): logits differ by "
            f"{error.item():.3g} of {scale.item():.3g}; score its logits with fastpo.policy_loss"
        )
