"""The numbers of a step, under the names TRL's users know, from sums over the whole step.

Rewards, accuracy and lengths are of everything that was sampled, groups that dynamic sampling
discarded included: they describe the policy. Entropy, clipping and KL are of the tokens trained on.
"""

from __future__ import annotations

import resource
import statistics
import sys
from collections import defaultdict

import torch

from fastpo.trainer.experience import Sample, is_informative
from fastpo.trainer.source import Batch

CORRECTION = {  # under TRL's names where it has some
    "sampling/importance_sampling_ratio/mean": "sampling/ratio_mean",
    "sampling/importance_sampling_ratio/min": "sampling/ratio_min",
    "sampling/importance_sampling_ratio/max": "sampling/ratio_max",
    "sampling/sampling_logp_difference/max": "sampling/difference_max",
    **{f"sampling/{name}": f"sampling/{name}" for name in ("cut", "ess", "kl_k1", "kl_k3")},
}


def rollout_metrics(batch: Batch, by: str = "correct") -> dict[str, float]:
    """Rewards, lengths in tokens, and groups, which teach something `by` a metric."""
    samples = [sample for group in batch.sampled for sample in group]
    lengths = [sample.length for sample in samples]
    ended = [sample.length for sample in samples if sample.completion.finished]
    spreads = [_spread(group) for group in batch.sampled]
    return {
        "reward": _mean([s.reward for s in samples if s.judged]),
        "reward_std": _mean(spreads),
        "frac_reward_zero_std": _mean([spread < 1e-8 for spread in spreads]),
        "accuracy": _mean([s.correct for s in samples if s.judged]),
        "completions/mean_length": _mean(lengths),
        "completions/min_length": min(lengths),
        "completions/max_length": max(lengths),
        "completions/clipped_ratio": 1 - len(ended) / len(samples),
        "completions/mean_terminated_length": _mean(ended),
        "groups_kept": _mean([is_informative(group, by) for group in batch.sampled]),
        "groups_trained": len(batch.groups),
        "groups_carried": batch.carried,
        "gen_batches": batch.rounds,
        "invalid_rewards": sum(not sample.judged for sample in samples),
        **_part_metrics(samples),
    }


def _part_metrics(samples: list[Sample]) -> dict[str, float]:
    """Mean and standard deviation of every named component of the task's reward."""
    parts = defaultdict(list)
    for sample in samples:
        for name, value in sample.parts.items():
            parts[name].append(value)
    found = {}
    for name, values in sorted(parts.items()):
        found[f"rewards/{name}/mean"] = _mean(values)
        found[f"rewards/{name}/std"] = statistics.stdev(values) if len(values) > 1 else 0.0
    return found


def update_metrics(sums: dict[str, float]) -> dict[str, float]:
    """Means per token and per update from the sums of a step."""
    tokens = max(sums.get("tokens", 0.0), 1.0)
    updates = max(sums.get("updates", 0.0), 1.0)
    low, high = sums.get("clip_low", 0.0) / tokens, sums.get("clip_high", 0.0) / tokens
    region = low + high + sums.get("clip_max", 0.0) / tokens
    values = {
        "loss": sums.get("loss", 0.0) / updates,
        "grad_norm": sums.get("grad_norm", 0.0) / updates,
        "entropy": sums.get("entropy", 0.0) / tokens,
        "clip_ratio/low_mean": low,
        "clip_ratio/high_mean": high,
        "clip_ratio/region_mean": region,
        "old_kl": sums.get("old_kl", 0.0) / tokens,
        "sampling/sampling_logp_difference/mean": sums.get("sampled_difference", 0.0)
        / max(sums.get("sampled", 0.0), 1.0),
    }
    if "ref_kl" in sums:
        values["kl"] = sums["ref_kl"] / tokens
    for name, ours in CORRECTION.items():
        if ours in sums:
            values[name] = sums[ours]
    return values


def speed_metrics(
    batch: Batch, epochs: int, update_seconds: float, step_seconds: float
) -> dict[str, float]:
    """Seconds, tokens per second and peak memory (GiB; of the process where there is no GPU).

    A rollout's tokens are those generated, an update's those of forward and backward passes. The
    share of rollouts is that of the time in which there is no update, but the wait for a rollout.
    """
    generated = sum(sample.length for group in batch.sampled for sample in group)
    learned = epochs * sum(len(s.prompt) + s.length for s in batch.samples if s.live)
    return {
        "rollout_time": batch.seconds,
        "update_time": update_seconds,
        "step_time": step_seconds,
        "rollout_time_share": 1 - update_seconds / step_seconds,
        "rollout_tokens_per_second": generated / batch.seconds,
        "update_tokens_per_second": learned / update_seconds,
        "peak_memory_gib": _peak_bytes() / 2**30,
    }


def _peak_bytes() -> int:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _spread(group: list[Sample]) -> float:
    rewards = [sample.reward for sample in group if sample.judged]
    return statistics.stdev(rewards) if len(rewards) > 1 else 0.0


def _mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else 0.0
