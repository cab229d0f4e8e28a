"""PPO with its critic beside DAPO on the demo's task: results/ppo.md and docs/ppo-curves.png.

    fastpo train recipes/demo.toml --seeds 0,1,2 && fastpo train recipes/demo-ppo.toml --seeds 0,1,2
    python benchmarks/ppo_table.py [--seeds 0,1,2]

Reads runs/demo-seed* and runs/demo-ppo-seed*.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

from provenance import provenance  # noqa: E402
from safetensors import safe_open  # noqa: E402

from fastpo.trainer.run import directory  # noqa: E402
from fastpo.trainer.run.plot import smooth  # noqa: E402

KINDS = {"DAPO": "runs/demo-seed{}", "PPO": "runs/demo-ppo-seed{}"}
COLOURS = {"DAPO": "#4477aa", "PPO": "#ee6677"}
MODELS = {"DAPO": 1, "PPO": 2}  # trained: the policy, and the critic
BYTES = 16  # of a parameter in training: weight, gradient and two moments, float32
TABLE = HERE / "results" / "ppo.md"
PICTURE = HERE.parent / "docs" / "ppo-curves.png"


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", default="0,1,2")
    seeds = parser.parse_args().seeds
    runs = {
        kind: [read(Path(pattern.format(seed))) for seed in seeds.split(",")]
        for kind, pattern in KINDS.items()
    }
    draw(runs)
    TABLE.write_text(table(runs, seeds))
    print(TABLE.read_text())


def read(run: Path) -> dict:
    """A run's summary, its rows of metrics and the parameters of its policy."""
    with safe_open(run / "checkpoint" / "model.safetensors", "pt") as file:
        shapes = [file.get_slice(name).get_shape() for name in file.keys()]  # noqa: SIM118
    summary = json.loads((run / directory.SUMMARY).read_text())
    return {
        **summary,
        "rows": directory.read_metrics(run),
        "parameters": sum(map(math.prod, shapes)),
    }


def series(run: dict, metric: str) -> list[float]:
    """A metric, step by step."""
    return [row[metric] for row in run["rows"] if metric in row]


def table(runs: dict[str, list[dict]], seeds: str) -> str:
    """results/ppo.md"""
    lines = [
        "# PPO and its critic beside DAPO, on the demo's task",
        "",
        "| | seed | accuracy before | after | greedy after | tokens seen | seconds "
        "| of which updates | peak memory, GiB | of training state, MB |",
        "|---|---|---|---|---|---|---|---|---|---|",
        *(_row(kind, run) for kind, each in runs.items() for run in each),
        *(_mean(kind, each) for kind, each in runs.items()),
        "",
        "Same model, start, updates and schedule, 512 samples a step to learn from; accuracy of "
        "512 held-out problems sampled at temperature 1. DAPO takes 64 groups of 8 that can teach "
        "something, and the advantages of the group; PPO takes 256 prompts with 2 completions each "
        "as they come, and the advantages of a critic (own trunk, scalar head) by GAE. Peak memory "
        "is of the whole process, most of it Python and torch at this size; training state is "
        f"{BYTES} bytes for every trained parameter, the critic's included: what grows with the "
        "model. Seconds: wall time, beside whatever else the machine ran.",
        "",
        "![Curves of both](../../docs/ppo-curves.png)",
        "",
        provenance(
            f"fastpo train recipes/demo.toml --seeds {seeds}; fastpo train recipes/demo-ppo.toml "
            f"--seeds {seeds}; python benchmarks/ppo_table.py --seeds {seeds}"
        ),
    ]
    return "\n".join(lines) + "\n"


def _numbers(kind: str, run: dict) -> list[float]:
    return [
        *(run["before"]["accuracy"], run["after"]["accuracy"], run["after"]["greedy_accuracy"]),
        *(run["num_tokens"], run["seconds"], sum(series(run, "update_time"))),
        max(series(run, "peak_memory_gib")),
        BYTES * MODELS[kind] * run["parameters"] / 1e6,
    ]


FORMS = ("{:.3f}", "{:.3f}", "{:.3f}", "{:,.0f}", "{:.0f}", "{:.0f}", "{:.2f}", "{:.1f}")


def _cells(numbers: list[float]) -> str:
    return " | ".join(form.format(number) for form, number in zip(FORMS, numbers, strict=True))


def _row(kind: str, run: dict) -> str:
    return f"| {kind} | {run['seed']} | {_cells(_numbers(kind, run))} |"


def _mean(kind: str, runs: list[dict]) -> str:
    columns = zip(*(_numbers(kind, run) for run in runs), strict=True)
    return f"| **{kind}** | mean | {_cells([statistics.fmean(column) for column in columns])} |"


def draw(runs: dict[str, list[dict]]) -> None:
    """docs/ppo-curves.png: accuracy by step and by tokens, entropy, what the critic explains."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 4, figsize=(16, 4), layout="constrained")
    for kind, each in runs.items():
        for run in each:
            _curves(axes, kind, run, label=kind if run is each[0] else None)
    titles = ("Held-out accuracy", "Accuracy while training", "Entropy, nats per token")
    for axis, title in zip(axes, (*titles, "Variance the critic explains"), strict=True):
        axis.set_title(title, loc="left", fontsize=10.5)
        axis.set_xlabel("step")
        axis.set_ylim(bottom=0)
        axis.grid(color="#e5e5e5", linewidth=0.7)
        axis.spines[["top", "right"]].set_visible(False)
    axes[1].set_xlabel("tokens seen, thousands")
    axes[0].legend(frameon=False)
    figure.savefig(PICTURE, dpi=110)


def _curves(axes, kind: str, run: dict, label: str | None) -> None:
    look = {"color": COLOURS[kind], "alpha": 0.8, "linewidth": 1.2, "label": label}
    tested = [row for row in run["rows"] if "eval_accuracy" in row]
    steps, scores = ([row[key] for row in tested] for key in ("step", "eval_accuracy"))
    axes[0].plot(steps, scores, "o-", markersize=4, **look)
    tokens = [number / 1000 for number in series(run, "num_tokens")]
    axes[1].plot(tokens, smooth(series(run, "accuracy"), 7), **look)
    axes[2].plot(smooth(series(run, "entropy"), 7), **look)
    if kind == "PPO":
        explained = series(run, "value/explained_variance")
        axes[3].plot(smooth(explained, 7), **look)


if __name__ == "__main__":
    main()
