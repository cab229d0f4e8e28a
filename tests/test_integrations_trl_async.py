"""TRL's AsyncGRPOTrainer with fastpo's loss against itself, on trees of samples, five steps."""

from __future__ import annotations

import contextlib
import functools
import itertools
import queue
from types import SimpleNamespace

import parity_notes
import pytest
import torch
import trl_runs

pytestmark = pytest.mark.peer


def attention(query, key, value, cu_q, cu_k, max_q, max_k, *, softmax_scale, causal, window_size):
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

    def __init__(self):
        from trl.experimental.async_grpo.async_rollout_worker import RolloutSample

        self.rollout_buffer, self.metrics_queue = queue.Queue(), queue.Queue()
        gen = torch.Generator().manual_seed(3)
        for group in range(40):
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

    def start(self):
        pass

    def stop(self):
        pass

    def update_model_version(self, model_version):
        pass

    def check_health(self, stale_after_s):
        pass


class NoTransfer:
    def init_weight_transfer(self):
        pass

    def pause(self):
        pass

    def send_weights(self, iterator):
        for _ in iterator:
            pass

    def resume(self):
        pass

    def destroy(self):
        pass


@pytest.fixture
def family(monkeypatch):
    """Stock, fastpo's, and the config; the tree's attention in plain torch."""
    stock = pytest.importorskip("trl.experimental.async_grpo")
    pytest.importorskip("datasets")
    from trl.experimental.async_grpo import async_grpo_trainer, packing

    monkeypatch.setattr(async_grpo_trainer, "get_peak_flops_per_device", lambda *_: None)
    kernels = SimpleNamespace(flash_attn_varlen_func=attention)
    monkeypatch.setattr(packing, "_flash_attn", lambda: kernels)
    from fastpo.integrations.trl import AsyncGRPOTrainer

    return (stock.AsyncGRPOTrainer, AsyncGRPOTrainer), stock.AsyncGRPOConfig


def trained(trainer_class, config, folder, model, **settings):
    import datasets
    import transformers

    model.save_pretrained(folder / "model")
    transformers.set_seed(1)
    settings = {"max_staleness": 99, "token_budget": 0, "gradient_checkpointing": False} | settings
    trainer = trainer_class(
        model=str(folder / "model"),
        args=config(output_dir=str(folder), **trl_runs.SETTINGS | settings),
        train_dataset=datasets.Dataset.from_dict({"prompt": list(trl_runs.PROMPTS)}),
        processing_class=trl_runs.tokenizer(),
        rollout_worker=Worker(),
        weight_transfer=NoTransfer(),
    )
    with contextlib.suppress(StopIteration):
        trainer.train()
    return trainer.state.log_history, trl_runs.weights(trainer)


CASES = {
    "clipped": {"epsilon": 0.1, "epsilon_high": 0.2},
    "accumulation": {"gradient_accumulation_steps": 2},
    "temperature": {"temperature": 0.7},
    "token budget": {"token_budget": 40},
}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_five_steps_equal_stock(case, family, tmp_path, record_property):
    """Loss, gradient norm, metrics and weights, positions shared by two samples included."""
    pair, config = family

    def run(trainer_class):
        return trained(trainer_class, config, tmp_path, trl_runs.tiny(), **CASES[case])

    noted = functools.partial(parity_notes.write, record_property, "TRL AsyncGRPO", case)
    rows = trl_runs.assert_the_same(run, pair, noted)
    assert any(v > 0 for row in rows for k, v in row.items() if k.startswith("clip_ratio"))
