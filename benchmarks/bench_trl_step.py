"""A GRPO step of TRL on CPU: its own trainer, with `install()`, and fastpo's GRPOTrainer.

    python benchmarks/bench_trl_step.py [--rounds 3]

One step is `_compute_loss` and its backward on one fixed batch, all of it TRL's shapes: B x (prompt
+ completion) tokens, a two-layer trunk and the head of SmolLM2-135M. CPU seconds (minimum of the
rounds, which are interleaved) and the growth of the resident set over the model and its gradients;
every variant and round is a process of its own. TRL's own numbers on a CPU are those of its path
for devices without Triton.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

from memory_curve import high_water_mark, reset_high_water_mark  # noqa: E402
from provenance import provenance  # noqa: E402

BATCH, PROMPT, COMPLETION, WIDTH, VOCAB = 8, 16, 134, 576, 49152  # N = 1072 scored tokens
VARIANTS = {"trl": "trl.GRPOTrainer", "install": "with install()", "fastpo": "fastpo's GRPOTrainer"}
TABLE = HERE / "results" / "trl_step.md"


def trainer(variant: str, folder: str):
    """A GRPO trainer of `variant` around a two-layer Llama, without data worth the name."""
    import datasets
    import torch
    import transformers
    import trl
    from tokenizers import Tokenizer, models

    from fastpo.integrations import trl as integration

    if variant == "install":
        integration.install()
    made = integration.GRPOTrainer if variant == "fastpo" else trl.GRPOTrainer
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=WIDTH,
        intermediate_size=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=9,
        num_key_value_heads=3,
    )
    words = Tokenizer(models.WordLevel({"<pad>": 0, "<eos>": 1}, unk_token="<eos>"))
    return made(
        model=transformers.LlamaForCausalLM(config),
        reward_funcs=lambda completions, **_: [0.0] * len(completions),
        args=trl.GRPOConfig(
            output_dir=folder,
            per_device_train_batch_size=BATCH,
            num_generations=BATCH,
            max_completion_length=COMPLETION,
            loss_type="dapo",
            use_cpu=True,
            bf16=False,
            report_to=[],
        ),
        train_dataset=datasets.Dataset.from_dict({"prompt": ["a"] * BATCH}),
        processing_class=transformers.PreTrainedTokenizerFast(
            tokenizer_object=words, pad_token="<pad>", eos_token="<eos>"
        ),
    )


def measure(variant: str) -> dict[str, float]:
    """CPU seconds and peak bytes of the second of two steps, and the loss and gradient norm."""
    import torch

    with tempfile.TemporaryDirectory() as folder:
        made = trainer(variant, folder)
    made.current_gradient_accumulation_steps = 1
    gen = torch.Generator().manual_seed(1)
    ids = torch.randint(2, VOCAB, (BATCH, PROMPT + COMPLETION), generator=gen)
    inputs = {
        "prompt_ids": ids[:, :PROMPT],
        "prompt_mask": torch.ones(BATCH, PROMPT, dtype=torch.long),
        "completion_ids": ids[:, PROMPT:],
        "completion_mask": torch.ones(BATCH, COMPLETION, dtype=torch.long),
        "advantages": torch.randn(BATCH, generator=gen),
        "num_items_in_batch": torch.tensor(float(BATCH * COMPLETION)),
    }
    model = made.model.train()
    for _ in range(2):  # the first makes what lasts: gradients, fastpo's look at the head
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter.grad.zero_()
        reset_high_water_mark()
        before = high_water_mark()
        start = time.process_time()
        loss = made._compute_loss(model, inputs)
        loss.backward()
        seconds, peak = time.process_time() - start, high_water_mark() - before
    norm = torch.stack([p.grad.norm() for p in model.parameters()]).norm()
    return {"seconds": seconds, "bytes": peak, "loss": loss.item(), "norm": norm.item()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--variant", choices=VARIANTS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.variant:
        print(json.dumps(measure(arguments.variant)))
        return
    found = {variant: [] for variant in VARIANTS}
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    for _ in range(arguments.rounds):
        for variant in VARIANTS:
            command = [sys.executable, __file__, "--variant", variant]
            run = subprocess.run(command, env=environment, capture_output=True, text=True)
            if run.returncode:
                raise SystemExit(run.stderr)
            found[variant].append(json.loads(run.stdout.splitlines()[-1]))
    TABLE.write_text(table(found))
    print(TABLE.read_text())


def table(found: dict[str, list[dict[str, float]]]) -> str:
    """The results as Markdown."""
    best = {v: min(r["seconds"] for r in rows) for v, rows in found.items()}
    lines = [
        "# A GRPO step of TRL on CPU",
        "",
        f"Loss and backward, fp32, one thread, B {BATCH}, prompt {PROMPT}, completion "
        f"{COMPLETION}, D {WIDTH}, V {VOCAB}; TRL's path for devices without Triton.",
        "",
        "| | CPU seconds | of TRL | peak over the inputs, MiB | loss | gradient norm |",
        "|---|---|---|---|---|---|",
    ]
    for variant, rows in found.items():
        peak = max(row["bytes"] for row in rows) / 2**20
        lines.append(
            f"| {VARIANTS[variant]} | {best[variant]:.2f} | {best[variant] / best['trl']:.2f} "
            f"| {peak:.0f} | {rows[0]['loss']:.6f} | {rows[0]['norm']:.6f} |"
        )
    foot = provenance("python benchmarks/bench_trl_step.py")
    return "\n".join([*lines, "", foot]) + "\n"


if __name__ == "__main__":
    main()
