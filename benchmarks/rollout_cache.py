"""The trainer's rollouts with buffers that double, against caches copied for every token.

    python benchmarks/rollout_cache.py [--rounds 3]

The demo's model (two layers, D 128), completions that never end, fp32, one thread. The DynamicCache
of transformers concatenates: it copies all keys and values for every token. CPU seconds, minimum of
rounds that alternate; both draw the same tokens.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

from provenance import provenance  # noqa: E402

from fastpo.trainer import rollout  # noqa: E402
from fastpo.trainer.config import ModelConfig  # noqa: E402
from fastpo.trainer.model.loading import make_policy  # noqa: E402

TABLE = HERE / "results" / "rollout_cache.md"
SHAPES = ((64, 256), (64, 768))  # completions, tokens of each
CACHES = {"copied": lambda cache, *_: cache, "doubled": rollout.growing}


def endless():
    """The demo's model, whose completions only end where they are cut off."""
    torch.manual_seed(0)
    policy = make_policy(ModelConfig(), torch.device("cpu"), alphabet="0123456789=", stop=None)
    return replace(policy, stop_ids=torch.tensor([], dtype=torch.long))


def measure(policy, rows: int, tokens: int, cache: str) -> tuple[float, list[list[int]]]:
    """CPU seconds of a rollout, and what was drawn."""
    rollout.growing = CACHES[cache]
    sampling = rollout.Sampling(group_size=8, max_new_tokens=tokens)
    prompts = [[3, 4, 5, 6, 7, 8, 9]] * (rows // 8)
    start = time.process_time()
    done = rollout.sample(policy, prompts, sampling, torch.Generator().manual_seed(0))
    return time.process_time() - start, [completion.tokens for completion in done]


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    policy = endless()
    lines = [
        "# Rollouts: buffers that double against caches copied for every token",
        "",
        "| completions | tokens of each | copied, CPU s | doubled, CPU s | speed-up |",
        "|---|---|---|---|---|",
    ]
    for rows, tokens in SHAPES:
        found = {name: [] for name in CACHES}
        for _ in range(rounds):
            drawn = []
            for name in CACHES:
                seconds, texts = measure(policy, rows, tokens, name)
                found[name].append(seconds)
                drawn.append(texts)
            if drawn[0] != drawn[1]:
                raise SystemExit("the two caches draw different tokens")
        copied, doubled = (min(found[name]) for name in CACHES)
        lines.append(
            f"| {rows} | {tokens} | {copied:.2f} | {doubled:.2f} | {copied / doubled:.2f} |"
        )
    lines += [
        "",
        "The demo's model, fp32, one thread; the same tokens either way. "
        f"Minimum of {rounds} rounds that alternate, on a machine that does other work as well.",
        "",
        provenance("python benchmarks/rollout_cache.py"),
    ]
    TABLE.write_text("\n".join(lines) + "\n")
    print(TABLE.read_text())


if __name__ == "__main__":
    main()
