"""Write results/demo.md from the summary.json of demo runs.

for seed in 0 1 2 3 4; do make demo SEED=$seed; done
python benchmarks/demo_table.py runs/demo-seed[0-4]
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

TARGET = Path(__file__).parent / "results" / "demo.md"
HEAD = (
    "| seed | accuracy before | after | rise | greedy before | after | rise | seconds | tokens |\n"
    "|---|---|---|---|---|---|---|---|---|\n"
)


def table(summaries: list[dict]) -> str:
    """The Markdown page: one row per run, and where and with what they ran."""
    rows = "".join(map(_row, summaries))
    first = summaries[0]
    versions = ", ".join(f"{name} {version}" for name, version in first["versions"].items())
    commands = "\n".join(f"    {summary['command']}" for summary in summaries)
    return (
        "# The demo: DAPO teaches a small Llama to sort six digits\n\n"
        f"{HEAD}{rows}\n"
        f"Accuracy is of {first['held_out_problems']} held-out problems, the same for every seed "
        f"and never trained on, {_how(first)}; greedy is of greedy decoding. Before = after the "
        "supervised warm-up, which stands in for a pretrained checkpoint. Seconds are wall time, "
        "with warm-up and evaluations, beside whatever else the machine ran.\n\n"
        f"{commands}\n\n"
        f"{first['date']}; {first['machine']}; {versions}.\n"
    )


def _row(summary: dict) -> str:
    cells = [str(summary["seed"])]
    for name in ("accuracy", "greedy_accuracy"):
        before, after = summary["before"][name], summary["after"][name]
        cells += [f"{before:.3f}", f"{after:.3f}", f"{after - before:+.3f}"]
    cells += [f"{summary['seconds']:.0f}", f"{summary['num_tokens']:,}"]
    return f"| {' | '.join(cells)} |\n"


def _how(summary: dict) -> str:
    temperature = summary["eval_temperature"]
    return f"sampled at temperature {temperature:g}" if temperature else "decoded greedily"


if __name__ == "__main__":
    TARGET.write_text(
        table([json.loads((Path(run) / "summary.json").read_text()) for run in sys.argv[1:]])
    )
    print(TARGET)
