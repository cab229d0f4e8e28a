"""Adapters over two processes: torchtitan's loss with FSDP2 and with a sharded head, NeMo-RL's
sequence-parallel head. The trainers themselves are stand-ins."""

from __future__ import annotations

import os
import subprocess
import sys
import traceback
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

N, D, V = 24, 8, 30


def titan_loss():
    """fastpo's loss on stand-ins of torchtitan's classes."""

    class BaseLoss:
        @dataclass(kw_only=True)
        class Config:
            pass

    module = ModuleType("torchtitan.components.loss")
    module.BaseLoss, module.ChunkedLossWrapper = BaseLoss, type("Wrapper", (BaseLoss,), {})
    for name in ("torchtitan", "torchtitan.components", module.__name__):
        sys.modules[name] = module
    from fastpo.integrations.torchtitan import PolicyLoss

    return PolicyLoss(PolicyLoss.Config(clip_high=0.3))


class Model(nn.Module):
    """A trunk whose head the loss calls for."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(5)
        self.trunk, self.head = nn.Linear(D, D), nn.Linear(D, V, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.trunk(hidden).tanh()


def batch() -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    gen = torch.Generator().manual_seed(6)
    hidden, labels = torch.randn(N, D, generator=gen), torch.randint(0, V, (N,), generator=gen)
    per_token = {
        "generator_logprobs": -3 - torch.rand(N, generator=gen),
        "advantages": torch.randn(N, generator=gen),
        "loss_mask": torch.rand(N, generator=gen) > 0.2,
    }
    return hidden, labels, per_token


def train(model: Model, rows: slice = slice(None), scale: float = 1.0) -> Tensor:
    """A backward of some rows of the batch; the gradients are on the model."""
    hidden, labels, per_token = batch()
    loss_fn = titan_loss()
    loss_fn.lm_head = model.head
    total = per_token["loss_mask"].sum()
    per_token = {name: values[rows] for name, values in per_token.items()}
    loss, _ = loss_fn(model(hidden[rows]), labels[rows], total, **per_token)
    (loss * scale).backward()
    return loss.detach()


def titan_fsdp(rank: int, ranks: int) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    alone, model = Model(), Model()
    train(alone)
    mesh = init_device_mesh("cpu", (ranks,))
    fully_shard(model.head, mesh=mesh)
    fully_shard(model, mesh=mesh)
    half = N // ranks
    for _ in range(2):  # a second step finds the head as the first one did
        model.zero_grad()
        train(model, slice(rank * half, (rank + 1) * half), scale=ranks)
        for (name, got), (_, want) in zip(
            model.named_parameters(), alone.named_parameters(), strict=True
        ):
            close(got.grad.full_tensor(), want.grad, name)
    with torch.no_grad():
        hidden, labels, per_token = batch()
        loss_fn = titan_loss()
        loss_fn.lm_head = model.head
        loss_fn(model(hidden), labels, 20.0, **per_token)


def titan_tp(rank: int, ranks: int) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    alone, model = Model(), Model()
    want = train(alone)
    parallelize_module(model.head, init_device_mesh("cpu", (ranks,)), ColwiseParallel())
    close(train(model), want, "loss")
    close(model.trunk.weight.grad, alone.trunk.weight.grad, "trunk")
    close(model.head.weight.grad.full_tensor(), alone.head.weight.grad, "head")


def nemo_tp(rank: int, ranks: int) -> None:
    from fastpo.integrations.nemo_rl import from_parallel_hidden_states_to_logprobs

    gen = torch.Generator().manual_seed(7)
    hidden = torch.randn(6, 2, D, generator=gen, dtype=torch.float32)  # [S, B, D]
    weight = torch.randn(V, D, generator=gen)
    target = torch.randint(0, V, (2, 6), generator=gen)
    whole, head = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    logits = (whole[:-1] @ head.t()).transpose(0, 1)
    truth = logits.log_softmax(-1).gather(-1, target[:, 1:, None])[..., 0]
    (truth * torch.arange(5)).sum().backward()

    part, start = slice(3 * rank, 3 * rank + 3), V // ranks * rank
    shard = hidden[part].clone().requires_grad_()
    rows = weight[start : start + V // ranks].clone().requires_grad_()
    group = dist.group.WORLD
    ours = from_parallel_hidden_states_to_logprobs(
        shard, rows, False, target, start, start + V // ranks, group, chunk_size=4
    )
    (ours * torch.arange(5)).sum().backward()
    close(ours, truth, "log-probs")
    close(shard.grad, whole.grad[part], "hidden")
    close(rows.grad, head.grad[start : start + V // ranks], "weight")


def close(got: Tensor, want: Tensor, name: str) -> None:
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6, msg=lambda text: f"{name}: {text}")


@pytest.mark.slow
@pytest.mark.parametrize("target", ["titan_fsdp", "titan_tp", "nemo_tp"])
def test_two_ranks_are_one_process(tmp_path, target):
    command = [sys.executable, __file__, target, str(tmp_path / "rendezvous")]
    root = str(Path(__file__).parents[1])
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": root}
    ranks = [
        subprocess.Popen([*command, str(rank)], env=environment, stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    errors = [process.communicate(timeout=100)[1] for process in ranks]
    for process, error in zip(ranks, errors, strict=True):
        assert process.returncode == 0, error


if __name__ == "__main__":
    method, rank = f"file://{sys.argv[2]}", int(sys.argv[3])
    dist.init_process_group("gloo", init_method=method, rank=rank, world_size=2)
    try:
        globals()[sys.argv[1]](rank, 2)
        dist.barrier()
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)  # not by way of finalization: see test_distributed_linear.py
