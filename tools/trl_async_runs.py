"""Short runs of TRL's AsyncGRPOTrainer on a CPU: rollouts made up, attention in torch."""

from __future__ import annotations

import contextlib
import itertools
import queue
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import trl_runs
from torch import Tensor


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    max_q: int,
    max_k: int,
    *,
    softmax_scale: float,
    causal: bool,
    window_size: Any,
) -> Tensor:
    """FlashAttention's varlen function on (N, heads, d), a segment of the tree at a time."""
    parts = []
    segments = itertools.pairwise(cu_q.tolist()), itertools.pairwise(cu_k.tolist())
    for (q0, q1), (k0, k1) in zip(*segments, strict=True):
        q, k, v = (x.transpose(0, 1) for x in (query[q0:q1], key[k0:k1], value[k0:k1]))
        k, v = (x.repeat_interleave(len(q) // len(x), 0) for x in (k, v))
        sees = torch.ones(q1 - q0, k1 - k0, dtype=torch.bool).tril(k1 - k0 - (q1 - q0))
        attended = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, attn_mask=sees, scale=softmax_scale
        )
        parts.append(attended.transpose(0, 1))
    return torch.cat(parts)


class Worker:
    """Rollouts made up on the spot: pairs that share a prompt, and one that goes on where another
    has ended, so that positions are scored several times."""

    def __init__(self) -> None:
        from trl.experimental.async_grpo.async_rollout_worker import RolloutSample

        self.rollout_buffer: queue.Queue = queue.Queue()
        self.metrics_queue: queue.Queue = queue.Queue()
        gen = torch.Generator().manual_seed(3)
        for group in range(80):
            prompt = torch.randint(3, 23, (4,), generator=gen).tolist()
            shared = torch.randint(3, 23, (3,), generator=gen).tolist()
            for branch in range(2):
                length = 3 + branch
                tail = torch.randint(3, 23, (length,), generator=gen).tolist()
                ids = prompt + shared + tail
                mask = [0] * len(prompt) + [1] * (len(ids) - len(prompt))
                logprobs = -3 + torch.randn(len(ids), generator=gen)
                self.rollout_buffer.put(
                    RolloutSample(
                        prompt=[],
                        completion=[],
                        input_ids=torch.tensor(ids),
                        completion_mask=torch.tensor(mask),
                        old_log_probs=logprobs * torch.tensor(mask),
                        advantage=float(torch.randn((), generator=gen)),
                        model_version=0,
                        metrics={"reward": 1.0},
                        group_id=group,
                    )
                )

    def start(self) -> None:
        pass

    def stop(self) -> None:
        pass

    def update_model_version(self, model_version: int) -> None:
        pass

    def check_health(self, stale_after_s: float) -> None:
        pass


class NoTransfer:
    """Weights go nowhere: nothing samples from them."""

    def init_weight_transfer(self) -> None:
        pass

    def pause(self) -> None:
        pass

    def send_weights(self, iterator: Any) -> None:
        for _ in iterator:
            pass

    def resume(self) -> None:
        pass

    def destroy(self) -> None:
        pass


def patches() -> list[tuple[object, str, object]]:
    """(module, name, value) of what TRL takes from a GPU: a tree's attention, and peak FLOPs."""
    from trl.experimental.async_grpo import async_grpo_trainer, packing

    kernels = SimpleNamespace(flash_attn_varlen_func=attention)
    return [
        (async_grpo_trainer, "get_peak_flops_per_device", lambda *_: None),
        (packing, "_flash_attn", lambda: kernels),
    ]


def trained(
    trainer_class: type, config_class: type, folder: Path, **settings: Any
) -> tuple[list[dict[str, float]], dict[str, Tensor]]:
    """Logged rows and final parameters of a short run, as `trl_runs.trained`."""
    import datasets
    import transformers

    trl_runs.save_tiny(folder / "model")
    transformers.set_seed(1)
    settings = {"max_staleness": 99, "token_budget": 0, "gradient_checkpointing": False} | settings
    trainer = trainer_class(
        model=str(folder / "model"),
        args=config_class(output_dir=str(folder), **trl_runs.SETTINGS | settings),
        train_dataset=datasets.Dataset.from_dict({"prompt": list(trl_runs.PROMPTS)}),
        processing_class=trl_runs.tokenizer(),
        rollout_worker=Worker(),
        weight_transfer=NoTransfer(),
    )
    with contextlib.suppress(StopIteration):
        trainer.train()
    return trainer.state.log_history, trl_runs.weights(trainer)
