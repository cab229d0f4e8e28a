"""A GRPO and an RLOO step of TRL on CPU: its own trainers, with `install()`, and fastpo's.

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
KINDS = ("GRPO", "RLOO")
VARIANTS = {"trl": "trl.{}Trainer", "install": "with install()", "fastpo": "fastpo's {}Trainer"}
TABLE = HERE / "results" / "trl_step.md"


def trainer(kind: str, variant: str, folder: str):
    """A trainer of `variant` around a two-layer Llama, without data worth the name."""
    import datasets
    import torch
    import transformers
    import trl
    from tokenizers import Tokenizer, models

    from fastpo.integrations import trl as integration

    if variant == "install":
        integration.install()
    made = getattr(integration if variant == "fastpo" else trl, f"{kind}Trainer")
    loss = {"loss_type": "dapo"} if kind == "GRPO" else {"beta": 0.0}
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
        args=getattr(trl, f"{kind}Config")(
            output_dir=folder,
            per_device_train_batch_size=BATCH,
            num_generations=BATCH,
            max_completion_length=COMPLETION,
            **loss,
            use_cpu=True,
            bf16=False,
            report_to=[],
        ),
        train_dataset=datasets.Dataset.from_dict({"prompt": ["a"] * BATCH}),
        processing_class=transformers.PreTrainedTokenizerFast(
            tokenizer_object=words, pad_token="<pad>", eos_token="<eos>"
        ),
    )


def measure(kind: str, variant: str) -> dict[str, float]:
    """CPU seconds and peak bytes of the second of two steps, and the loss and gradient norm."""
    import torch

    with tempfile.TemporaryDirectory() as folder:
        made = trainer(kind, variant, folder)
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
    if kind == "RLOO":
        with torch.no_grad():
            scored = made._get_per_token_logps_and_entropies(
                model, ids, torch.ones_like(ids), COMPLETION
            )
        inputs["old_logps"] = scored[0].sum(1) + 0.1 * torch.randn(BATCH, generator=gen)
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
    parser.add_argument("--one", nargs=2, metavar=("KIND", "VARIANT"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(measure(*arguments.one)))
        return
    found = {(kind, variant): [] for kind in KINDS for variant in VARIANTS}
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    for _ in range(arguments.rounds):
        for case, rows in found.items():
            command = [sys.executable, __file__, "--one", *case]
            run = subprocess.run(command, env=environment, capture_output=True, text=True)
            if run.returncode:
                raise SystemExit(run.stderr)
            rows.append(json.loads(run.stdout.splitlines()[-1]))
    TABLE.write_text(table(found))
    print(TABLE.read_text())


def table(found: dict[tuple[str, str], list[dict[str, float]]]) -> str:
    """The results as Markdown."""
    best = {case: min(row["seconds"] for row in rows) for case, rows in found.items()}
    lines = [
        "# A GRPO and an RLOO step of TRL on CPU",
        "",
        f"Loss and backward, fp32, one thread, B {BATCH}, prompt {PROMPT}, completion "
        f"{COMPLETION}, D {WIDTH}, V {VOCAB}; TRL's path for devices without Triton. CPU seconds: "
        "the least of the rounds, and the most; every round of every line in a process of its own. "
        "Peak: that process's resident set over what it had before the step.",
        "",
        "| | CPU seconds | most | of TRL | peak, MiB | loss | gradient norm |",
        "|---|---|---|---|---|---|---|",
    ]
    for (kind, variant), rows in found.items():
        least, most = best[kind, variant], max(row["seconds"] for row in rows)
        peak = max(row["bytes"] for row in rows) / 2**20
        lines.append(
            f"| {VARIANTS[variant].format(kind)} | {least:.2f} | {most:.2f} "
            f"| {least / best[kind, 'trl']:.2f} | {peak:.0f} | {rows[0]['loss']:.6f} "
            f"| {rows[0]['norm']:.6f} |"
        )
    foot = provenance(f"python benchmarks/bench_trl_step.py --rounds {len(rows)}")
    return "\n".join([*lines, "", foot]) + "\n"


if __name__ == "__main__":
    main()
