"""AdamW by name, its step over all ranks, and its state in a checkpoint: that of one process.

`adamw_8bit` is torchao's: moments in two bytes per parameter in place of eight, a scale for every
256 of a rank's shard (Dettmers et al. 2021, arXiv 2110.02861). A checkpoint holds these as plain
tensors, so that a resumed run is the same; uneven shards, and those that cut its blocks, are
rounded anew.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from fastpo.trainer.model import distributed
from fastpo.trainer.run.errors import RecipeError, TrainerError

BLOCK, SMALLEST = 256, 4096  # values per scale; of a shard that is quantized


def kind(name: str) -> Callable[..., torch.optim.Optimizer]:
    """What makes the optimizer that `optim.name` says.

    Raises:
        RecipeError: its package is not installed.
    """
    if name == "adamw_8bit":
        try:
            from torchao.optim import AdamW8bit
        except ImportError:
            raise RecipeError("optim.name=adamw_8bit needs torchao: pip install torchao") from None
        return AdamW8bit
    fused = name == "adamw_fused" or None
    return lambda parameters, **settings: torch.optim.AdamW(parameters, fused=fused, **settings)


def moment_bytes(name: str, numel: float) -> float:
    """Of the two moments of so many values on a rank."""
    quantized = name == "adamw_8bit" and numel >= SMALLEST and numel % BLOCK == 0
    return numel * (2 + 8 / BLOCK if quantized else 8)


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """The learning rate of the next step; torchao's is a tensor."""
    for group in optimizer.param_groups:
        group["lr"] = torch.tensor(rate) if isinstance(group["lr"], Tensor) else rate


def step(
    optimizer: torch.optim.Optimizer, loss: Tensor, max_norm: float, name: str, hint: str
) -> dict[str, Tensor | float]:
    """One step by the gradients that are there, clipped over all ranks; none is left after it.

    `loss` is this rank's part. Returns sums for the step's metrics.

    Raises:
        TrainerError: loss or gradient is not finite; the parameters are left as they were.
    """
    norm = torch.nn.utils.clip_grad_norm_(_parameters(optimizer), max_norm)
    norm, ranks = distributed.full_tensor(norm), distributed.size()
    of_all = distributed.total({"loss": loss})["loss"]
    if not math.isfinite(of_all + norm.item()):
        raise TrainerError(
            f"{name} {of_all:.4g}, gradient norm {norm.item():.4g}: not finite, no update was "
            f"made; {hint}"
        )
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)  # a rollout needs the room
    return {"loss": loss, "grad_norm": norm / ranks, "updates": 1 / ranks}


def state_of(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Its state for `distributed.full`."""
    state = optimizer.state_dict()
    moments = {
        index: {name: _plain(value) for name, value in values.items()}
        for index, values in state["state"].items()
    }
    return {**state, "state": moments}


def load(optimizer: torch.optim.Optimizer, saved: dict[str, Any]) -> None:
    """Take a checkpoint's moments, by whatever AdamW, and keep this one's settings."""
    parameters, own = _parameters(optimizer), optimizer.param_groups
    groups = [
        {**group, "params": old["params"]}
        for group, old in zip(own, saved["param_groups"], strict=True)
    ]
    moments = {
        index: {name: _placed(optimizer, name, v, parameters[index]) for name, v in values.items()}
        for index, values in saved["state"].items()
    }
    optimizer.load_state_dict({"state": moments, "param_groups": groups})


def _parameters(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def _plain(value: Any) -> Any:
    """A moment in plain tensors, which may be sharded; of 8 bits only where all shards are alike:
    else one may be quantized and another, which is small, not."""
    local = value.to_local() if isinstance(value, DTensor) else value
    if isinstance(value, DTensor) and len(value) % _shards(value)[1]:
        local = _whole(_parts(local)) if hasattr(local, "codes") else local
        return _spread(local, value, shape=value.shape, stride=value.stride())
    if not hasattr(local, "codes"):
        return value
    parts = _parts(local)
    for name in ("codes", "scale") if isinstance(value, DTensor) else ():
        parts[name] = _spread(parts[name], value)
    return parts


def _parts(local: Tensor) -> dict[str, Tensor]:
    return {"codes": local.codes, "scale": local.scale, "qmap": local.qmap}


def _whole(value: Any) -> Tensor:
    """The numbers of a moment, float32."""
    if isinstance(value, Tensor):
        return value
    rows = value["qmap"][value["codes"].long()].view(-1, BLOCK) * value["scale"][:, None]
    return rows.view(value["codes"].shape)


def _spread(local: Tensor, like: DTensor, **layout: Any) -> DTensor:
    return DTensor.from_local(local, like.device_mesh, like.placements, run_check=False, **layout)


def _shards(value: Tensor) -> tuple[int, int]:
    """Which shard of rows this is, of how many."""
    mesh = value.device_mesh if isinstance(value, DTensor) else None
    return (mesh.get_local_rank(mesh.ndim - 1), mesh.size(mesh.ndim - 1)) if mesh else (0, 1)


def _placed(optimizer: torch.optim.Optimizer, name: str, value: Any, parameter: Tensor) -> Any:
    """A moment of a file as `optimizer` holds it: sharded as its parameter is, quantized or not."""
    if name == "step":
        return value
    if not hasattr(optimizer, "_new_buffer"):
        return distributed.place_like(_whole(value), parameter)
    buffer = optimizer._new_buffer(parameter, name == "exp_avg")
    local = buffer.to_local() if isinstance(buffer, DTensor) else buffer
    if isinstance(value, dict) and hasattr(local, "codes"):
        rank, ranks = _shards(parameter)
        first = rank * -(-len(parameter) // ranks)  # row of the shard
        block, cut = divmod(first * parameter[:1].numel(), BLOCK)
        if not cut:
            local.codes.copy_(value["codes"][first : first + len(local)])
            local.scale.copy_(value["scale"][block : block + len(local.scale)])
            return buffer
    return buffer.copy_(distributed.place_like(_whole(value), parameter))
