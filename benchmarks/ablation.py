"""From GRPO to DAPO, one technique at a time: results/ablation.md and docs/ablation.png.

    python benchmarks/ablation.py [--seeds 0,1,2]

Runs recipes/ablation.toml on the CPU, one run after another; those that are complete are not run
again (delete runs/ablation to begin anew). Every rung of a seed starts from the same weights and
sees the same stream of problems, so that rungs are compared pair by pair.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from dataclasses import asdict
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

from provenance import provenance  # noqa: E402

from fastpo.trainer.data.tasks import ProblemStream, held_out, load_task  # noqa: E402
from fastpo.trainer.data.verifier import Verifier  # noqa: E402
from fastpo.trainer.loop import train  # noqa: E402
from fastpo.trainer.model.loading import make_policy, quiet_transformers  # noqa: E402
from fastpo.trainer.run import directory, recipe, report  # noqa: E402
from fastpo.trainer.warmup import warm_up  # noqa: E402

RECIPE = HERE.parent / "recipes" / "ablation.toml"
RUNS = Path("runs/ablation")
TABLE = HERE / "results" / "ablation.md"
PICTURE = HERE.parent / "docs" / "ablation.png"
CACHE = 5  # tokens of soft punishment, about a fifth of the longest answer
RUNGS = {  # each with all those above it
    "GRPO": [],
    "+ overlong filtering": ["algorithm.overlong_filter=true"],
    "+ clip-higher": ["algorithm.objective.clip_high=0.28"],
    "+ soft overlong punishment": [f"algorithm.overlong_cache={CACHE}"],
    "+ token-level loss": ["algorithm.objective.aggregation=token_mean"],
    "+ dynamic sampling = DAPO": ["algorithm.dynamic_sampling=true"],
}
COLOURS = ("#222222", "#66ccee", "#4477aa", "#228833", "#ccbb44", "#ee6677")
LAST = 5  # steps whose mean stands for the end of training
T95 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776}  # Student's t by degrees of freedom


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", default="0,1,2")
    options = parser.parse_args()
    seeds = [int(seed) for seed in options.seeds.split(",")]
    for seed in seeds:
        for rung in range(len(RUNGS)):
            train_rung(rung, seed)
    runs = [[read(run_dir(rung, seed)) for seed in seeds] for rung in range(len(RUNGS))]
    draw(runs)
    TABLE.write_text(table(runs, seeds))
    print(TABLE.read_text())


def run_dir(rung: int, seed: int) -> Path:
    """Where a run is kept."""
    return RUNS / f"rung{rung}-seed{seed}"


def techniques(rung: int) -> list[str]:
    """The settings of a rung."""
    return [option for options in list(RUNGS.values())[: rung + 1] for option in options]


def train_rung(rung: int, seed: int) -> None:
    """One run, if it is not complete."""
    config = recipe.load(
        RECIPE,
        [
            *(f"seed={seed}", f"run_dir={run_dir(rung, seed)}", f"model.path={warmed_up(seed)}"),
            *("warmup.max_steps=0", *techniques(rung)),
        ],
    )
    if not report.completed(run_dir(rung, seed), config.steps):
        train(config)


def warmed_up(seed: int) -> Path:
    """A policy after the supervised warm-up, by which every rung of the seed starts."""
    target = RUNS / f"start-seed{seed}"
    if target.exists():
        return target
    config = recipe.load(RECIPE, [f"seed={seed}"])
    torch.set_num_threads(config.threads)
    torch.manual_seed(seed)
    quiet_transformers()
    with Verifier(load_task(config.task, config.task_args), **asdict(config.verifier)) as verifier:
        policy = make_policy(
            config.model, torch.device("cpu"), alphabet=verifier.alphabet, stop=verifier.stop
        )
        exclude = [problem.prompt for problem in held_out(verifier, config.eval.problems)]
        warm_up(
            policy,
            verifier,
            ProblemStream(verifier, f"warmup-{seed}", exclude),
            config.warmup,
            config.rollout,
            torch.Generator().manual_seed(seed),
            lambda step, accuracy: print(f"warm-up step {step}: accuracy {accuracy:.2f}"),
        )
    fresh = target.with_name(f"{target.name}.new")  # a directory of that name is a whole one
    policy.save(fresh)
    fresh.rename(target)
    return target


def read(run: Path) -> dict:
    """What a run says: its summary, the metrics of every step by name, and how held-out accuracy
    went with the tokens seen."""
    found = directory.read_metrics(run)
    rows = [row for row in found if "reward" in row]
    evaluations = [row for row in found if "eval_accuracy" in row]
    tokens = {0: 0, **{row["step"]: row["num_tokens"] for row in rows}}
    return {
        **json.loads((run / directory.SUMMARY).read_text()),
        "metrics": {name: [row[name] for row in rows] for name in rows[0]},
        "held_out": [(tokens[row["step"]], row["eval_accuracy"]) for row in evaluations],
    }


def accuracy_at(run: dict, tokens: float) -> float:
    """Held-out accuracy when a run had seen so many tokens, on the line between evaluations."""
    (x, y), *rest = run["held_out"]
    for next_x, next_y in rest:
        if tokens <= next_x:
            return y + (next_y - y) * (tokens - x) / (next_x - x)
        x, y = next_x, next_y
    return math.nan


def equal_tokens(runs: list[list[dict]]) -> int:
    """What every run has seen, in thousands that are full."""
    return min(run["num_tokens"] for seeds in runs for run in seeds) // 1000 * 1000


def interval(values: list[float]) -> tuple[float, float]:
    """Mean and half the width of Student's 95 % interval."""
    spread = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return statistics.fmean(values), T95.get(len(values) - 1, 1.96) * spread


def at_the_end(run: dict, metric: str) -> float:
    """Mean of a metric over the last steps."""
    return statistics.fmean(run["metrics"][metric][-LAST:])


def table(runs: list[list[dict]], seeds: list[int]) -> str:
    """results/ablation.md"""
    first, budget = runs[0][0], equal_tokens(runs)
    before = interval([run["before"]["accuracy"] for run in runs[0]])
    lines = [
        "# From GRPO to DAPO, one technique at a time",
        "",
        "| | held-out accuracy | against the line above | greedy | tokens an answer | cut off "
        "| entropy | tokens seen | seconds |",
        "|---|---|---|---|---|---|---|---|---|",
        *(_row(rung, runs) for rung in range(len(runs))),
        "",
        f"Means over seeds {', '.join(map(str, seeds))} +- Student's 95 % interval; differences "
        "are taken seed by seed. Task: `benchmarks/worked_sort.py`, answers cut off at 22 tokens. "
        f"Accuracy of {first['held_out_problems']} held-out problems sampled at temperature 1, "
        f"{before[0]:.3f} +- {before[1]:.3f} before, after the same supervised warm-up for every "
        f"rung of a seed; {first['steps']} steps of 32 x 8 completions, 4 updates each. Tokens an "
        f"answer, share cut off and entropy (nats per token): of the last {LAST} steps. Tokens "
        "seen: prompts and completions, those that dynamic sampling discarded included. Seconds: "
        "wall time of a run, beside whatever else the machine ran.",
        "",
        f"## At equal tokens: when every run has seen {budget:,}",
        "",
        "| | held-out accuracy | against the line above | against GRPO | after steps |",
        "|---|---|---|---|---|",
        *(_row_at(rung, runs, budget) for rung in range(len(runs))),
        "",
        "From the same runs, evaluated every five steps; between two evaluations on the line. The "
        "learning rate is constant, so that a run up to there is one of so many steps.",
        "",
        "![Accuracy and lengths along the ladder](../../docs/ablation.png)",
        "",
        provenance("make ablation"),
    ]
    return "\n".join(lines) + "\n"


def _row(rung: int, runs: list[list[dict]]) -> str:
    after = [[run["after"]["accuracy"] for run in seeds] for seeds in runs]
    change = against(after, rung, rung - 1)
    mean, half = interval(after[rung])
    greedy, width = interval([run["after"]["greedy_accuracy"] for run in runs[rung]])
    ends = {
        name: statistics.fmean(at_the_end(run, name) for run in runs[rung])
        for name in ("completions/mean_length", "completions/clipped_ratio", "entropy")
    }
    cells = (
        *(list(RUNGS)[rung], f"{mean:.3f} +- {half:.3f}", change, f"{greedy:.3f} +- {width:.3f}"),
        f"{ends['completions/mean_length']:.1f}",
        *(f"{ends['completions/clipped_ratio']:.1%}", f"{ends['entropy']:.3f}"),
        f"{statistics.fmean(run['num_tokens'] for run in runs[rung]):,.0f}",
        f"{statistics.fmean(run['seconds'] for run in runs[rung]):.0f}",
    )
    return f"| {' | '.join(cells)} |"


def _row_at(rung: int, runs: list[list[dict]], budget: int) -> str:
    found = [[accuracy_at(run, budget) for run in seeds] for seeds in runs]
    mean, half = interval(found[rung])
    step = statistics.fmean(
        sum(tokens <= budget for tokens in run["metrics"]["num_tokens"]) for run in runs[rung]
    )
    changes = [against(found, rung, other) for other in (rung - 1, 0)]
    cells = (list(RUNGS)[rung], f"{mean:.3f} +- {half:.3f}", *changes, f"{step:.0f}")
    return f"| {' | '.join(cells)} |"


def against(found: list[list[float]], rung: int, other: int) -> str:
    """Mean difference of two rungs, seed by seed, and its interval."""
    if not rung:
        return "-"
    pairs = zip(found[rung], found[other], strict=True)
    mean, half = interval([new - old for new, old in pairs])
    return f"{mean:+.3f} +- {half:.3f}"


def draw(runs: list[list[dict]]) -> None:
    """docs/ablation.png: accuracy at the end, and curves of training, means over the seeds."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 4, figsize=(16, 4.2), layout="constrained")
    ladder(axes[0], runs)
    by_tokens(axes[1], runs)
    panels = {
        "completions/clipped_ratio": "Answers cut off, share",
        "entropy": "Entropy, nats per token",
    }
    for axis, (metric, title) in zip(axes[2:], panels.items(), strict=True):
        for name, colour, seeds in zip(RUNGS, COLOURS, runs, strict=True):
            curves = torch.tensor([run["metrics"][metric] for run in seeds]).mean(0)
            smooth = torch.nn.functional.avg_pool1d(curves[None], 5, 1)[0]
            axis.plot(range(3, 3 + len(smooth)), smooth, color=colour, label=name)
        axis.set_title(title, loc="left", fontsize=10.5)
        axis.set_xlabel("step")
        axis.set_ylim(bottom=0)
    axes[1].legend(frameon=False, fontsize=8)
    for axis in axes:
        axis.grid(color="#e5e5e5", linewidth=0.7)
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(PICTURE, dpi=110)


def by_tokens(axis, runs: list[list[dict]]) -> None:
    """Held-out accuracy against the tokens seen, means over seeds as far as all of them went."""
    for name, colour, seeds in zip(RUNGS, COLOURS, runs, strict=True):
        most = min(run["num_tokens"] for run in seeds)
        xs = [most * i / 40 for i in range(41)]
        ys = [statistics.fmean(accuracy_at(run, x) for run in seeds) for x in xs]
        axis.plot([x / 1000 for x in xs], ys, color=colour, label=name)
    axis.axvline(equal_tokens(runs) / 1000, color="#999999", linestyle=":", linewidth=1)
    axis.set_title("Held-out accuracy by tokens seen", loc="left", fontsize=10.5)
    axis.set_xlabel("thousands of tokens")
    axis.set_ylim(bottom=0)


def ladder(axis, runs: list[list[dict]]) -> None:
    """Accuracy at the end by rung: a point per seed, the mean and its interval."""
    for place, (colour, seeds) in enumerate(zip(COLOURS, runs, strict=True)):
        values = [run["after"]["accuracy"] for run in seeds]
        mean, half = interval(values)
        axis.errorbar(mean, -place, xerr=half, fmt="o", color=colour, capsize=3)
        axis.plot(values, [-place + 0.2] * len(values), ".", color="#999999", markersize=5)
    axis.set_yticks([-place for place in range(len(runs))], list(RUNGS))
    axis.set_title("Held-out accuracy after 40 steps, mean and 95 %", loc="left", fontsize=10.5)


if __name__ == "__main__":
    main()
