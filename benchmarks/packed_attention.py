"""Micro-batches on a CPU: packed without a mask, against padded rows and against a mask of [T, T].

    python benchmarks/packed_attention.py [--rounds 3]

One decoder layer of SmolLM-135M's widths (D 576, 9 heads, 3 of keys), fp32, one thread: CPU
seconds of its pass and gradient, minimum of rounds that alternate. All three layouts give the same
hidden states, which is checked.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import torch
from torch.nn.utils.rnn import pad_sequence

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

from provenance import provenance  # noqa: E402

from fastpo.trainer.config import ModelConfig  # noqa: E402
from fastpo.trainer.model.attention import OURS, Packing, choose  # noqa: E402

TABLE = HERE / "results" / "packed_attention.md"
CPU = torch.device("cpu")
SHAPES = ((256, 8, 24), (64, 32, 128), (16, 128, 512), (16, 512, 512))  # sequences, tokens of each


def trunk(width: int = 576, heads: int = 9):
    """A Llama of one layer."""
    import transformers

    choose(ModelConfig(), CPU)
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=256,
        hidden_size=width,
        intermediate_size=width * 8 // 3,
        num_hidden_layers=1,
        num_attention_heads=heads,
        num_key_value_heads=heads // 3,
    )
    return transformers.LlamaForCausalLM(config).model


def padded(model, sequences: list[torch.Tensor]) -> torch.Tensor:
    """Hidden states [T, D] of a sequence per row."""
    model.set_attn_implementation(OURS)
    rows = model(input_ids=pad_sequence(sequences, True), use_cache=False).last_hidden_state
    return torch.cat([row[: len(ids)] for row, ids in zip(rows, sequences, strict=True)])


def packed(model, sequences: list[torch.Tensor], implementation: str = OURS) -> torch.Tensor:
    """Hidden states [T, D] of all sequences in one row."""
    model.set_attn_implementation(implementation)
    packing = Packing.of(torch.tensor([len(ids) for ids in sequences]), CPU)
    ids = torch.cat(sequences)[None]
    inputs = packing.inputs(implementation)
    return model(input_ids=ids, use_cache=False, **inputs).last_hidden_state[0]


LAYOUTS = {
    "padded": padded,
    "packed": packed,
    "masked": lambda model, sequences: packed(model, sequences, "sdpa"),
}


def measure(model, sequences: list[torch.Tensor], rounds: int) -> dict[str, float]:
    """CPU seconds by layout."""
    found = {name: [] for name in LAYOUTS}
    for _ in range(rounds):
        states = []
        for name, layout in LAYOUTS.items():
            start = time.process_time()
            hidden = layout(model, sequences)
            hidden.sum().backward()
            found[name].append(time.process_time() - start)
            states.append(hidden.detach())
        for other in states[1:]:
            torch.testing.assert_close(other, states[0], atol=1e-4, rtol=1e-4)
    return {name: min(seconds) for name, seconds in found.items()}


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    model = trunk()
    lines = [
        "# Micro-batches on a CPU: packed, padded, and packed under a mask",
        "",
        "| sequences | tokens of each | padded, CPU s | packed, CPU s | masked, CPU s |",
        "|---|---|---|---|---|",
    ]
    for count, least, most in SHAPES:
        lengths = torch.linspace(least, most, count).long().tolist()
        seconds = measure(model, [torch.randint(0, 256, (n,)) for n in lengths], rounds)
        each = f"{least} to {most}" if least < most else least
        numbers = " | ".join(f"{seconds[name]:.2f}" for name in LAYOUTS)
        lines.append(f"| {count} | {each} | {numbers} |")
    lines += [
        "",
        "One layer of SmolLM-135M's widths and its gradient, fp32, one thread; they agree. "
        f"Minimum of {rounds} rounds that alternate, on a machine that does other work as well.",
        "",
        provenance("python benchmarks/packed_attention.py"),
    ]
    TABLE.write_text("\n".join(lines) + "\n")
    print(TABLE.read_text())


if __name__ == "__main__":
    main()
