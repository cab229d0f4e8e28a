"""A training step at 2k to 128k tokens on CPU: results/long_context.md and docs/long-context.png.

    python benchmarks/long_context.py [--tokens 2048 8192 32768 131072]

A two-layer Llama, D 128, V 49,152 (SmolLM2's), fp32, one thread. N tokens are sequences of at most
8,192, packed without padding; the trunk is checkpointed by sequence, so that it holds the
activations of one at a time, and the loss sees all N at once. Eager makes all logits, TRL is its
`ChunkedLogProbFunction` (on CPU its torch path) with the loss behind it, fastpo is
`linear_policy_loss`. Every point is a process of its own with at most 8 GiB of data; points that
are in results/long_context.json are not measured again.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

from memory_curve import high_water_mark, reset_high_water_mark  # noqa: E402
from provenance import provenance  # noqa: E402

WIDTH, LAYERS, VOCAB, LONGEST = 128, 2, 49152, 8192
LIMIT = 8 * 2**30  # bytes of data of a process: what does not fit in them is said so
GIB = 2**30
METHODS = {"eager": "eager, all logits", "trl": "TRL, chunked", "fastpo": "fastpo"}
COLOURS = {"eager": "#ee6677", "trl": "#ccbb44", "fastpo": "#4477aa", "trunk": "#999999"}
RECORDS = HERE / "results" / "long_context.json"
TABLE = HERE / "results" / "long_context.md"
PICTURE = HERE.parent / "docs" / "long-context.png"


def model():
    """The trunk and head."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=WIDTH,
        intermediate_size=4 * WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=LONGEST,
        tie_word_embeddings=False,
    )
    return LlamaForCausalLM(config)


def policy_loss(method: str, hidden, weight, tokens, advantages):
    """DAPO's loss, on-policy, and the mean entropy of the policy, by one of three ways."""
    import torch

    import fastpo

    objective = fastpo.dapo()
    if method == "fastpo":
        return fastpo.linear_policy_loss(hidden, weight, tokens, advantages, objective=objective)
    if method == "trl":
        from trl.kernels import ChunkedLogProbFunction
        from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE as CHUNK

        more = (None, 1.0, ("entropy",))
        logprobs = ChunkedLogProbFunction.apply(hidden, weight, None, tokens, 1.0, CHUNK, *more)[0]
    else:
        scores = torch.log_softmax(hidden @ weight.t(), -1)
        logprobs = scores.gather(-1, tokens[:, None])[:, 0]
    return fastpo.policy_loss_from_logprobs(logprobs, advantages, objective=objective)


class Phase:
    """CPU seconds and growth of the resident set's high-water mark of a block."""

    def __enter__(self) -> Phase:
        reset_high_water_mark()
        self.before, self.start = high_water_mark(), time.process_time()
        return self

    def __exit__(self, *_: object) -> None:
        self.seconds = time.process_time() - self.start
        self.bytes = high_water_mark() - self.before


def step(method: str, made, ids, advantages) -> tuple[Phase, Phase, Phase, float]:
    """One step: the trunk forward, the loss both ways, the trunk backward."""
    import torch
    from torch.utils.checkpoint import checkpoint

    trunk, weight = made.model, made.lm_head.weight
    with Phase() as forward:
        states = [
            checkpoint(lambda x: trunk(x)[0][0], row[None], use_reentrant=False) for row in ids
        ]
        hidden = torch.cat(states)
    leaf = hidden.detach().requires_grad_()
    tokens = ids.roll(-1, 1).flatten()
    with Phase() as loss:
        result = policy_loss(method, leaf, weight, tokens, advantages)
        result.loss.backward()
    with Phase() as backward:
        hidden.backward(leaf.grad)
    return forward, loss, backward, weight.grad.double().norm().item()


def measure(method: str, tokens: int) -> dict:
    """The numbers of one step of `tokens` tokens, after one of few that loads the libraries."""
    import torch

    torch.set_num_threads(1)
    made = model().train()
    generator = torch.Generator().manual_seed(1)
    length = min(tokens, LONGEST)
    ids = torch.randint(VOCAB, (tokens // length, length), generator=generator)
    advantages = torch.randn(tokens, generator=generator)
    step(method, made, ids[:1, :64], advantages[:64])
    for parameter in made.parameters():
        parameter.grad.zero_()
    resource.setrlimit(resource.RLIMIT_DATA, (LIMIT, LIMIT))
    forward, loss, backward, norm = step(method, made, ids, advantages)
    return {
        "method": method,
        "tokens": tokens,
        "loss_seconds": loss.seconds,
        "trunk_seconds": forward.seconds + backward.seconds,
        "loss_bytes": loss.bytes,
        "trunk_bytes": max(forward.bytes, backward.bytes),
        "head_gradient_norm": norm,
    }


def measure_apart(method: str, tokens: int) -> dict:
    """`measure` in a process of its own; where memory ran out, a record that says so."""
    command = [sys.executable, __file__, "--point", method, str(tokens)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        if "can't allocate memory" not in done.stderr and "MemoryError" not in done.stderr:
            raise SystemExit(done.stderr[-2000:])
        return {"method": method, "tokens": tokens, "loss_bytes": None}
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, nargs="+", default=[2048, 8192, 32768, 131072])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--point", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.point:
        print(json.dumps(measure(options.point[0], int(options.point[1]))))
        return
    points = json.loads(RECORDS.read_text()) if RECORDS.exists() else []
    for tokens in sorted(options.tokens):
        for method in options.methods:
            if any((p["method"], p["tokens"]) == (method, tokens) for p in points):
                continue
            points.append(measure_apart(method, tokens))
            print(points[-1], flush=True)
            RECORDS.write_text(json.dumps(points, indent=1) + "\n")
    points.sort(key=lambda point: (point["tokens"], list(METHODS).index(point["method"])))
    draw(points)
    TABLE.write_text(table(points))
    print(TABLE.read_text())


def table(points: list[dict]) -> str:
    """results/long_context.md"""
    lines = [
        "# A training step at 2k to 128k tokens on a CPU",
        "",
        "| tokens | loss by | peak of the loss, GiB | of the trunk, GiB | loss, CPU s "
        "| trunk, CPU s | norm of the head's gradient |",
        "|---|---|---|---|---|---|---|",
        *map(_row, points),
        *(f"| {n:,} | {METHODS[method]} | not measured | | | | |" for n, method in missing(points)),
        "",
        f"A Llama of {LAYERS} layers, D {WIDTH}, V {VOCAB:,}, fp32, one thread. The tokens are "
        f"sequences of at most {LONGEST:,}, packed without padding, and the trunk is checkpointed "
        "by sequence: attention sees up to 8k tokens, the loss all of them. Peak: growth of the "
        "resident set over weights, their gradients and what the phase was given (hidden states), "
        "in forward and backward. Eager is computed at 3 N V 4 bytes where it did not fit in "
        f"{LIMIT // GIB} GiB. TRL's path for devices without Triton; it makes entropies, too, as "
        "its trainer does, as fastpo's metrics do. CPU seconds of one step, beside other work.",
        "",
        "![Peak memory and time against the number of tokens](../../docs/long-context.png)",
        "",
        provenance("python benchmarks/long_context.py"),
    ]
    return "\n".join(lines) + "\n"


def missing(points: list[dict]) -> list[tuple[int, str]]:
    """Sizes and methods without a record."""
    found = {(point["tokens"], point["method"]) for point in points}
    return [(n, m) for n in sorted({n for n, _ in found}) for m in METHODS if (n, m) not in found]


def eager_bytes(tokens: int) -> int:
    """Logits, their log-softmax and a gradient of either's size."""
    return 3 * tokens * VOCAB * 4


def _row(point: dict) -> str:
    name = f"| {point['tokens']:,} | {METHODS[point['method']]}"
    if point["loss_bytes"] is None:
        return (
            f"{name} | does not fit (computed: {eager_bytes(point['tokens']) / GIB:.0f}) | | | | |"
        )
    peaks = (f"{point[key] / GIB:.2f}" for key in ("loss_bytes", "trunk_bytes"))
    times = (f"{point[key]:.1f}" for key in ("loss_seconds", "trunk_seconds"))
    return f"{name} | {' | '.join((*peaks, *times))} | {point['head_gradient_norm']:.6g} |"


def draw(points: list[dict]) -> None:
    """docs/long-context.png: peak and time of the loss by method, beside the trunk's."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    sizes = sorted({point["tokens"] for point in points})
    measured = [point for point in points if point["loss_bytes"] is not None]
    panels = (("bytes", GIB, "Peak memory, GiB"), ("seconds", 1, "CPU seconds, one thread"))
    for axis, (unit, scale, title) in zip(axes, panels, strict=True):
        for method, label in METHODS.items():
            own = [point for point in measured if point["method"] == method]
            values = [point[f"loss_{unit}"] / scale for point in own]
            xs = [point["tokens"] for point in own]
            axis.plot(xs, values, "o-", color=COLOURS[method], label=f"loss, {label}")
        trunk = [point for point in measured if point["method"] == "fastpo"]
        values = [point[f"trunk_{unit}"] / scale for point in trunk]
        xs = [point["tokens"] for point in trunk]
        axis.plot(xs, values, "s--", color=COLOURS["trunk"], label="trunk, checkpointed")
        axis.set_title(title, loc="left", fontsize=10.5)
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.set_xticks(sizes, [f"{n // 1024}k" for n in sizes])
        axis.set_xlabel("tokens of a step")
        axis.grid(color="#e5e5e5", linewidth=0.7)
        axis.spines[["top", "right"]].set_visible(False)
    eager = [eager_bytes(n) / GIB for n in sizes]
    axes[0].plot(sizes, eager, ":", color=COLOURS["eager"], label="eager, computed: 3 N V 4 bytes")
    axes[0].legend(frameon=False, fontsize=8.5)
    figure.suptitle(f"A training step, D {WIDTH}, V {VOCAB:,}, fp32", fontsize=11)
    figure.savefig(PICTURE, dpi=110)


if __name__ == "__main__":
    main()
