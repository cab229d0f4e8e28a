"""Hugging Face transformers: the policy loss inside a causal LM's own forward, without logits.

    model = attach(model)  # before or after peft, DDP, FSDP2, accelerate, torch.compile
    result = model(
        input_ids=ids,
        policy_loss=dict(advantages=advantages, completion_mask=mask, objective=fastpo.dapo()),
    )
    result.loss.backward()

Every other call of the model, `generate` too, is what it was. `causal_lm_policy_loss` is the same
for a bare model, in one call.
"""

from __future__ import annotations

import functools
import inspect
import types
import weakref
from collections.abc import Mapping
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from fastpo.integrations._lm_head import output_embeddings, read_head
from fastpo.integrations._request import Request, Scoring
from fastpo.integrations._tap import close_tap, head_state, run, tapped
from fastpo.ops.results import PolicyLoss

Model = TypeVar("Model", bound=nn.Module)

_compared: weakref.WeakKeyDictionary[nn.Module, object] = weakref.WeakKeyDictionary()


class CausalLMPolicyLoss(NamedTuple):
    """What `model(..., policy_loss=...)` returns; [B, T - 1] as `input_ids[:, 1:]`."""

    loss: Tensor
    """0-d fp32, differentiable: the policy loss alone."""
    logprobs: Tensor
    """[B, T - 1] fp32, detached, 0 where the mask is False."""
    entropy: Tensor
    """[B, T - 1] fp32, detached, nats."""
    metrics: dict[str, Tensor]
    """As in `fastpo.PolicyLoss`: sums and counts."""
    aux_loss: Tensor | None
    """A mixture of experts' router loss, differentiable, unweighted, where the model makes one
    (`output_router_logits`): add `config.router_aux_loss_coef * aux_loss` to train with it."""


class CausalLMLogprobs(NamedTuple):
    """What `model(..., token_logprobs=...)` returns; [B, T - 1] as `input_ids[:, 1:]`."""

    logprobs: Tensor
    """[B, T - 1] fp32, differentiable, 0 where the mask is False."""
    entropy: Tensor
    """[B, T - 1] fp32, differentiable, nats."""
    aux_loss: Tensor | None
    """A mixture of experts' router loss, as in `CausalLMPolicyLoss`."""


def attach(model: Model) -> Model:
    """Teach a causal LM, bare or wrapped, the keywords `policy_loss` and `token_logprobs`.

    `model(input_ids=[B, T], ..., policy_loss=dict(advantages=, completion_mask=, objective=, ...))`
    runs the model's own forward through all that wraps it, puts `fastpo.linear_policy_loss` in the
    place of the LM head, and returns a `CausalLMPolicyLoss`. The dict holds

    * `advantages`: [B] per sequence, or [B, T - 1] per predicted token, prompts included;
    * `completion_mask`: [B, T] bool or 0/1, the tokens that were sampled and count; its first
      column, which nothing predicts, is ignored;
    * `fp32_head=True` for a product in fp32, outside autocast;
    * or, in `completion_mask`'s place, `positions` and `tokens`, both [M] int64: rows of the hidden
      states flattened to [B * T], and the id that each predicts (packed batches; trees, where a
      position is scored several times); per-token keywords and results are then [M];
    * any other keyword of `linear_policy_loss` (objective, old_logprobs, temperature, normalizer,
      logits_dtype, ...), per-token ones [B, T - 1] fp32, that is, as `input_ids[:, 1:]`.

    `token_logprobs=dict(completion_mask=, ...)` takes keywords of `fastpo.linear_token_logprobs`
    and returns `CausalLMLogprobs`: old and reference log-probs, or the base of a loss of your own.
    With the model's `logits_to_keep=K` only the last K positions are scored, and T - 1 means K - 1.
    Positions that the caller leaves out follow the attention mask where padding is on the left.

    On the first scored call, and when the head has changed or a forward hook has come, on the model
    or a wrapper, a few rows are compared with the model's own logits. A hook that begins to change
    them later is not seen.

    Returns:
        `model`, its innermost transformers model changed in place; `detach` undoes it.

    Raises:
        TypeError: no causal LM of transformers inside.
        ValueError: at the call: a head that fastpo cannot express, named by its class.
    """
    inner = innermost(model)
    if "_fastpo_forward" not in inner.__dict__:
        output_embeddings(inner)
        inner._fastpo_forward = inner.__dict__.get("forward")
        inner._fastpo_hook = inner.register_forward_pre_hook(
            _keep_dtypes, prepend=True, with_kwargs=True
        )
        inner.forward = types.MethodType(_attached_forward(type(inner).forward), inner)
    return model


def detach(model: Model) -> Model:
    """Undo `attach`: the model's forward and LM head are what they were.

    Raises:
        ValueError: something else has replaced the forward since: undo that first.
    """
    inner = innermost(model)
    if "_fastpo_forward" not in inner.__dict__:
        return model
    if not hasattr(inner.forward, "_fastpo"):
        raise ValueError(
            f"{type(inner).__name__}.forward has been replaced since attach (accelerate does so): "
            "undo that first, as accelerator.unwrap_model(model, keep_fp32_wrapper=False) does"
        )
    previous = inner._fastpo_forward
    del inner.forward
    if previous is not None:
        inner.forward = previous
    inner._fastpo_hook.remove()
    del inner._fastpo_forward, inner._fastpo_hook
    close_tap(output_embeddings(inner))
    return model


def innermost(model: nn.Module) -> nn.Module:
    """The transformers model inside DDP, FSDP, peft and torch.compile wrappers."""
    inner = model
    while True:
        if hasattr(type(inner), "get_output_embeddings"):
            return inner
        if hasattr(type(inner), "get_base_model"):  # peft
            inner = inner.get_base_model()
            continue
        modules = getattr(inner, "_modules", {})
        wrapped = [
            modules[n] for n in ("_orig_mod", "module", "_fsdp_wrapped_module") if n in modules
        ]
        if not wrapped:
            raise TypeError(
                f"model is {type(model).__name__}, expected a causal LM of transformers (with "
                "get_output_embeddings), or DDP, FSDP, peft or torch.compile around one"
            )
        inner = wrapped[0]


_KEYWORDS = ("policy_loss", "token_logprobs")


def _keep_dtypes(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict]:
    """Prepended forward pre-hook: runs before FSDP2's, if the model was sharded first."""
    hidden = {k: Request(**kwargs[k]) for k in _KEYWORDS if isinstance(kwargs.get(k), dict)}
    return args, {**kwargs, **hidden}


def _attached_forward(original: Any) -> Any:
    """A forward with two more keywords. It has `original`'s signature, which `generate` reads."""

    @functools.wraps(original)
    def forward(
        self: nn.Module,
        *args: Any,
        policy_loss: dict[str, Any] | None = None,
        token_logprobs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> Any:
        if policy_loss is None and token_logprobs is None:
            return _own_forward(self)(*args, **kwargs)
        return _scored(self, args, kwargs, policy_loss, token_logprobs)

    forward._fastpo = True
    return forward


def _own_forward(model: nn.Module) -> Any:
    """The forward under ours; looked up anew, so that a deep copy of the model runs itself."""
    previous = model.__dict__.get("_fastpo_forward")
    return types.MethodType(type(model).forward, model) if previous is None else previous


@torch.compiler.disable(recursive=False)
def _scored(
    model: nn.Module,
    args: tuple,
    kwargs: dict[str, Any],
    policy_loss: dict[str, Any] | None,
    token_logprobs: dict[str, Any] | None,
) -> CausalLMPolicyLoss | CausalLMLogprobs:
    """One forward with a loss or log-probs in the head's place. Compiled code runs beneath it."""
    if policy_loss is not None and token_logprobs is not None:
        raise ValueError("policy_loss and token_logprobs are both given, expected one of them")
    kwargs = _model_inputs(model, args, kwargs)
    asked = token_logprobs if policy_loss is None else policy_loss
    if not isinstance(asked, Request | Mapping):
        raise TypeError(
            f"policy_loss or token_logprobs is {type(asked).__name__}, expected a dict: "
            "completion_mask, advantages, objective, ..."
        )
    options = dict(asked.options if isinstance(asked, Request) else asked)
    request = Scoring(type(model).__name__, options, kwargs["input_ids"])
    consume = request.logprobs if policy_loss is None else request.loss
    result, outputs = run(model, _own_forward(model), consume, **kwargs)
    aux_loss = getattr(outputs, "aux_loss", None)
    if policy_loss is None:
        logprobs, entropy = result.unbind(-1)
        return CausalLMLogprobs(logprobs, entropy, aux_loss)
    return CausalLMPolicyLoss(result, *request.made[1:], aux_loss)


def _model_inputs(model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The model's keyword arguments: no cache, no labels, positions that skip padding."""
    accepted = inspect.signature(type(model).forward).parameters
    kwargs = {**dict(zip(list(accepted)[1:], args, strict=False)), **kwargs}
    ids = kwargs.get("input_ids")
    if not isinstance(ids, Tensor) or ids.ndim != 2:
        found = list(ids.shape) if isinstance(ids, Tensor) else type(ids).__name__
        raise ValueError(
            f"input_ids is {found}, expected [B, T] ids, prompts and completions: the policy loss "
            "reads the tokens that it scores from them"
        )
    if kwargs.get("labels") is not None:
        raise ValueError("labels are given beside policy_loss, which has its own: leave them out")
    takes_any = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in accepted.values())
    if "use_cache" in accepted or takes_any:
        kwargs["use_cache"] = False
    if "return_dict" in kwargs:
        kwargs["return_dict"] = True  # the outputs are read here; the caller gets ours
    mask = kwargs.get("attention_mask")
    if (
        "position_ids" in accepted
        and "position_ids" not in kwargs
        and isinstance(mask, Tensor)
        and mask.shape == ids.shape
        and not hasattr(model.base_model, "get_rope_index")  # it counts images, too
    ):
        kwargs["position_ids"] = (mask.long().cumsum(-1) - 1).clamp_(min=0)
    return kwargs


def causal_lm_policy_loss(
    model: nn.Module,
    input_ids: Tensor,
    advantages: Tensor,
    *,
    completion_mask: Tensor,
    attention_mask: Tensor | None = None,
    model_inputs: dict[str, Any] | None = None,
    **options: Any,
) -> PolicyLoss:
    """`fastpo.linear_policy_loss` on a bare causal LM: position t scores token t + 1.

    Args:
        model: a transformers causal LM, not wrapped: for DDP, FSDP, peft, accelerate and
            torch.compile, `attach` keeps the wrapper in the path.
        input_ids: [B, T] prompts and completions.
        advantages: [B] per sequence, or [B, T - 1] per predicted token.
        completion_mask: [B, T] bool, the tokens that were sampled and count; its first column,
            which nothing predicts, is ignored.
        attention_mask: [B, T] for the model, if there is padding on the left; without
            `position_ids` in `model_inputs`, positions count from the first token that it keeps.
        model_inputs: further keyword arguments of the model's forward.
        options: keywords of `linear_policy_loss` (objective, old_logprobs, logits_dtype, ...);
            per-token ones have shape [B, T - 1], that of `input_ids[:, 1:]`.

    Returns:
        PolicyLoss over [B, T - 1]. A router loss is left to `attach`.

    Raises:
        TypeError: a wrapper.
        ValueError: a head that fastpo cannot express, named by its class.
    """
    _check_bare(model)
    inputs = {"input_ids": input_ids, **(model_inputs or {})}
    if attention_mask is not None:
        inputs["attention_mask"] = attention_mask
    asked = {"advantages": advantages, "completion_mask": completion_mask, **options}
    with tapped(model):
        return PolicyLoss(*_scored(model, (), inputs, asked, None)[:4])


def _check_bare(model: nn.Module) -> None:
    from torch.distributed.fsdp import FSDPModule

    wrapper = None
    if not hasattr(type(model), "get_output_embeddings") or isinstance(model, FSDPModule):
        wrapper = type(model).__name__
    elif "_original_forward" in model.__dict__:
        wrapper = f"{type(model).__name__} prepared by accelerate"
    elif model._compiled_call_impl is not None:
        wrapper = f"{type(model).__name__} compiled in place"
    elif "forward" in model.__dict__ and not hasattr(model.forward, "_fastpo"):
        wrapper = f"{type(model).__name__} with a forward of its own in the place of its class's"
    elif {*model._forward_hooks.values(), *model._forward_pre_hooks.values()} - {_keep_dtypes}:
        wrapper = f"{type(model).__name__} with forward hooks"
    if wrapper is not None:
        raise TypeError(
            f"model is {wrapper}, expected a bare causal LM of transformers: call fastpo."
            "integrations.transformers.attach(model), then model(input_ids=..., policy_loss=...), "
            "which goes through the wrapper"
        )


def hidden_states(model: nn.Module, **inputs: Any) -> Tensor:
    """[B, K, D]: what `model(**inputs)` hands to its LM head, differentiable. No logits are made.

    With `lm_head` this is all that the linear ops need, for every class: whatever stands before
    the head (a transform, a multiplier) is in it.
    """
    with tapped(model):
        return run(model, _own_forward(model), lambda hidden, head: hidden, **inputs)[0]


def lm_head(model: nn.Module, *, trunk: bool = True) -> dict[str, Any]:
    """`weight`, `bias`, `logit_scale` and `softcap` of a causal LM, as the linear ops take them.

    LoRA and DoRA on the head are merged in the graph. Once per model, and again when another
    adapter is on, a few tokens are scored and compared with the model's own logits.

    Args:
        model: a bare causal LM.
        trunk: True if the head is for `model.base_model(...).last_hidden_state`, which some
            families change before their head; False if it is for `hidden_states(model, ...)`.

    Raises:
        ValueError: the model does more in its head than that, or cannot be run on ids alone.
    """
    reading = read_head(model)
    if isinstance(model, nn.Module):
        state = (head_state(output_embeddings(model)), trunk)
        if _compared.get(model) != state:
            _compare(model, reading["weight"], trunk)
            _compared[model] = state
    return reading


@torch.no_grad()
def _compare(model: nn.Module, weight: Tensor, trunk: bool) -> None:
    """One forward of a few tokens; the tap compares what the model makes of them."""
    ids = torch.arange(min(4, weight.shape[0]), device=weight.device)[None]
    name = type(model).__name__
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        hidden = hidden_states(model, input_ids=ids)
        found = model.base_model(input_ids=ids)[0] if trunk else hidden
    except Exception as error:  # models raise many kinds
        reason = str(error).strip().split("\n")[0]
        raise ValueError(
            reason if name in reason else f"{name} cannot be run on token ids alone: {reason}"
        ) from error
    finally:
        for module in training:
            module.training = True
    if found.shape != hidden.shape or not torch.allclose(found, hidden, rtol=1e-2, atol=1e-3):
        raise ValueError(
            f"{name} changes its trunk's hidden states before its LM head: take them from "
            "hidden_states(model, ...), the head from lm_head(model, trunk=False)"
        )
