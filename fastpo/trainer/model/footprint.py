"""What a recipe takes of a rank's memory, before anything is loaded: `fastpo plan RECIPE`.

Weights, gradients and moments follow from the model's config. Activations are what autograd saves
in a pass of fake tensors, which have shapes and no data, with attention taken for fused (what is
[T, T] is left out); the loss is `fastpo.plan`'s. Other buffers of a few MiB are not counted.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fastpo import plan
from fastpo.trainer import optimizer
from fastpo.trainer.algorithm import resolve
from fastpo.trainer.config import Config
from fastpo.trainer.model import distributed
from fastpo.trainer.model.loading import checkpoint_layers, outline
from fastpo.trainer.model.policy import Policy

PHASES = {"load": "while loading", "rollout": "of a rollout", "update": "of an update"}
EVER = tuple(PHASES)
KEPT = ("rollout", "update")
CPU = torch.device("cpu")  # of the fake tensors
TOKENS = 61  # of the pass that is measured, and twice as many: no width of a model


class Part(NamedTuple):
    """Some bytes of a rank, and when they are alive."""

    name: str
    bytes: float
    phases: tuple[str, ...] = KEPT


class Footprint(NamedTuple):
    """What a run takes of every rank."""

    model: str
    parameters: int
    trained: int
    ranks: int
    parts: list[Part]
    activations: dict[bool, float]  # bytes, by whether layers are checkpointed

    def peak(self, phase: str) -> float:
        """Bytes in a phase."""
        return sum(part.bytes for part in self.parts if phase in part.phases)


def footprint(config: Config, ranks: int, *, alphabet: str | None, stop: str | None) -> Footprint:
    """The parts of a run of `config` on so many ranks; nothing but the model's config is read."""
    from torch._subclasses import FakeTensorMode

    policy = outline(config.model, alphabet=alphabet, stop=stop)
    if policy.model.supports_gradient_checkpointing:
        checkpoint_layers(policy.model)  # both ways are measured
    with FakeTensorMode(allow_non_fake_inputs=True):
        _materialize(policy.model)
        fake = replace(policy, device=CPU)
        activations, casts = _activations(fake, config.optim.token_budget)
        cache = _cache_bytes(fake)
    model, size = policy.model, policy.dtype.itemsize
    total = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    own = config.rollout.engine == "own"
    parts = _of_training(config, policy, ranks)
    if ranks > 1:
        layers = [sum(p.numel() for p in m.parameters()) for m in distributed.units(model)]
        casts = size * (total - sum(layers) + 3 * max(layers, default=0))
        if own:
            parts.append(Part("whole model to sample from", total * size, ("rollout",)))
    elif own and size < 4:
        parts.append(Part("weights, cast to sample from", trained * size, ("rollout",)))
    head = model.get_output_embeddings().weight
    loss = plan.plan(
        vocab=head.shape[0],
        hidden=head.shape[1],
        tokens=config.optim.token_budget,
        dtype=policy.dtype,
        device="cuda" if "cuda" in (config.device or "cuda") else "cpu",
    )
    if not any(p.requires_grad for p in model.get_output_embeddings().parameters()):
        learned = (buffer for buffer in loss.buffers if not buffer.name.endswith("dW"))
        loss = replace(loss, buffers=tuple(learned))
    kept = config.model.gradient_checkpointing
    parts += [
        *(_of_rollout(config, ranks, cache, head.shape[0], size) if own else ()),
        Part("weights, cast or gathered", casts, ("update",)),
        Part("activations" + ", checkpointed" * kept, activations[kept], ("update",)),
        Part("the loss", loss.peak_bytes, ("update",)),
    ]
    if config.rollout.ahead:  # both phases at a time; one process shares what is frozen
        weights = sum(p.numel() * p.itemsize for p in model.parameters())
        one = ((), ("load",), EVER)
        parts = [p if p.phases in one else p._replace(phases=KEPT) for p in parts]
        parts.append(Part("copy that samples ahead", weights if ranks > 1 else 4 * trained, EVER))
    return Footprint(type(model).__name__, total, trained, ranks, parts, activations)


def _of_training(config: Config, policy: Policy, ranks: int) -> list[Part]:
    """What a rank keeps from step to step, and the gradients of an update."""
    algorithm = resolve(config.algorithm, config.rollout.max_new_tokens)
    model, shards = policy.model, ranks // config.replicas
    ever, kept, update = ((), (), ()) if config.offload else (EVER, KEPT, ("update",))
    host = ", on the host" * config.offload

    def weights(parameters: Iterable[Tensor]) -> float:
        return sum(p.numel() * p.itemsize for p in parameters) / shards

    def moments(parameters: Iterable[Tensor]) -> float:
        counts = [p.numel() / shards for p in parameters if p.requires_grad]
        return sum(optimizer.moment_bytes(config.optim.name, count) for count in counts)

    all_of_it = list(model.parameters())
    trained = sum(p.numel() for p in all_of_it if p.requires_grad)
    parts = [
        Part("the model as it is read", weights(all_of_it) * shards * (ranks > 1), ("load",)),
        Part("weights" + host, weights(all_of_it), ever),
        Part("moments of AdamW" + host, moments(all_of_it), kept),
        Part("gradients" + host, 4 * trained / shards, update),
    ]
    if algorithm.objective.kl_coef and not config.model.lora.rank:
        parts.append(Part("reference policy" + host, weights(all_of_it), kept))
    if algorithm.critic:  # its gradients have gone when the policy's come
        trunk = [p for p in model.base_model.parameters() if ranks > 1 or p.requires_grad]
        parts.append(Part("critic and its moments" + host, weights(trunk) + moments(trunk), kept))
    return parts


def _materialize(model: nn.Module) -> None:
    """`to_empty` that keeps what is tied one, under adapters, too, where `tie_weights` fails."""
    places = [(m, name, p) for m in model.modules() for name, p in m._parameters.items()]
    model.to_empty(device=CPU)
    made: dict[int, nn.Parameter | None] = {}
    for module, name, shape in places:
        module._parameters[name] = made.setdefault(id(shape), module._parameters[name])


def _of_rollout(config: Config, ranks: int, cache: float, vocab: int, size: int) -> list[Part]:
    rollout = config.rollout
    groups = min(max(1, rollout.batch_size // rollout.group_size), -(-rollout.prompts // ranks))
    rows = groups * rollout.group_size
    room = (rollout.max_prompt_tokens or 0) + rollout.max_new_tokens
    return [
        Part(f"KV cache, {rows} x {room} tokens", rows * room * cache, ("rollout",)),
        Part(f"logits of {rows} rows", rows * vocab * (size + 20), ("rollout",)),
    ]


def _activations(policy: Policy, tokens: int) -> tuple[dict[bool, float], float]:
    """Bytes that `tokens` tokens save for the backward pass, without and with checkpointed layers;
    and those of cast weights."""
    found, casts = {}, 0.0
    for kept in (False, True):
        one = replace(policy, config=replace(policy.config, gradient_checkpointing=kept))
        short, long = (_saved(one, count) for count in (TOKENS, 2 * TOKENS))
        found[kept] = (long - short) / TOKENS * tokens
        if not kept:
            casts = 2 * short - long
    layers = sum(bool(getattr(m, "gradient_checkpointing", 0)) for m in policy.model.modules())
    # A layer runs again; gradients inside of it take another third of that, as measured.
    found[True] += 4 / 3 * found[False] / max(layers, 1)
    return found, casts


def _saved(policy: Policy, tokens: int) -> int:
    own = {p.untyped_storage()._cdata for p in policy.model.parameters()}
    saved: dict[int, Tensor] = {}

    def pack(value: Tensor) -> Tensor:
        key = value.untyped_storage()._cdata
        if key not in own and value.shape[-2:] != (tokens, tokens):
            saved[key] = value
        return value

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
        policy.hidden_states(torch.zeros(1, tokens, dtype=torch.long))
    return sum(value.untyped_storage().nbytes() for value in saved.values())


@torch.no_grad()
def _cache_bytes(policy: Policy) -> float:
    """Keys and values of one token."""
    ids = torch.zeros(1, TOKENS, dtype=torch.long)
    with policy.forward_pass():
        cache = policy.model.base_model(input_ids=ids, use_cache=True).past_key_values
    layers = [
        (layer.keys.numel() + layer.values.numel()) * policy.dtype.itemsize / TOKENS
        for layer in getattr(cache, "layers", ())
        if isinstance(getattr(layer, "keys", None), Tensor)
    ]
    return sum(layers) + max(layers, default=0)  # where a buffer grows, the old one stands, too


def table(found: Footprint, config: Config) -> str:
    """The plan as text."""
    lines = [
        f"{found.model}, {found.parameters / 1e6:,.1f} M parameters, {found.trained / 1e6:,.1f} M "
        f"of them trained, on {found.ranks} rank{'s' * (found.ranks > 1)}; every rank takes"
    ]
    for part in found.parts:
        if part.bytes:
            when = "" if part.phases in (EVER, ()) else f"   {', '.join(part.phases)}"
            lines.append(f"  {part.name:<44} {plan.human(part.bytes):>11}{when}")
    for phase, name in PHASES.items():
        lines.append(f"  {'peak ' + name:<44} {plan.human(found.peak(phase)):>11}")
    kept = config.model.gradient_checkpointing
    other = found.peak("update") + found.activations[not kept] - found.activations[kept]
    switch = f"  with model.gradient_checkpointing = {str(not kept).lower()}"
    lines.append(f"{switch:<46} {plan.human(other):>11}")
    if config.rollout.engine != "own":
        lines.append("  and vLLM takes its own share: rollout.engine_args.gpu_memory_utilization")
    elif config.rollout.max_prompt_tokens is None:
        lines.append("  prompts are not counted: rollout.max_prompt_tokens is not given")
    return "\n".join(lines)
