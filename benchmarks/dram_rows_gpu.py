"""DRAM bytes of the row kernels by Nsight Compute, as multiples of the logits' own bytes.

    python benchmarks/dram_rows_gpu.py --out benchmarks/results

Runs itself under ncu: eight rows for each SM, per kernel, vocabulary and dtype. For a policy loss
in place 2.0 is the floor and means that L2 held what a row reads twice; 2.9, that it did not. Under
fp32 logits, with a bf16 gradient, the floor is 1.5.
"""

from __future__ import annotations

import argparse
import csv
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

VOCABULARIES = (32000, 128256, 151936, 262144)
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
ROWS_PER_SM = 8
METRICS = {
    "dram__bytes_read.sum": "read",
    "dram__bytes_write.sum": "written",
    "gpu__time_duration.sum": "time",
    "lts__t_sector_hit_rate.pct": "L2 hits %",
    "smsp__issue_active.avg.pct_of_peak_sustained_active": "issue active %",
    "sm__warps_active.avg.pct_of_peak_sustained_active": "warps active %",
}
UNITS = {"byte": 1, "Kbyte": 1e3, "Mbyte": 1e6, "Gbyte": 1e9}
SECONDS = {"ns": 1e-9, "us": 1e-6, "ms": 1e-3, "s": 1.0, "nsecond": 1e-9, "usecond": 1e-6}
SECONDS |= {"msecond": 1e-3, "second": 1.0}


def workload() -> Iterator[tuple[str, str, int]]:
    """(kernel, dtype, V) in the order of the launches."""
    for vocab in VOCABULARIES:
        for dtype in DTYPES:
            for kernel in ("row_stats", "row_policy_loss"):
                yield kernel, dtype, vocab


def launch_all(device: torch.device, vocabularies=VOCABULARIES, rows: int | None = None) -> None:
    """What ncu measures. In place; under fp32 logits the gradient is bf16, as in the linear op."""
    import fastpo
    from fastpo.backends import triton as rows_of
    from fastpo.backends.base import RowInputs, alias_rows

    if (reason := rows_of.unavailable(device)) is not None:
        sys.exit(f"dram_rows_gpu: {reason}")
    if rows is None:
        rows = ROWS_PER_SM * torch.cuda.get_device_properties(device).multi_processor_count
    one = torch.ones(rows, device=device)
    inputs = RowInputs(one / rows, one, None, None, None)
    for vocab in vocabularies:
        tokens = torch.randint(vocab, (rows,), device=device)
        for dtype in DTYPES.values():
            logits = torch.randn(rows, vocab, device=device).to(dtype)
            rows_of.row_stats(logits, tokens, 1.0)
            out = alias_rows(logits, torch.bfloat16)
            rows_of.row_policy_loss(logits, tokens, inputs, fastpo.dapo(), 1.0, out)
            del logits, out


def read_launches(text: str) -> list[dict[str, float]]:
    """Per launch of ncu's CSV, in order: {short metric name: bytes, seconds or percent}."""
    lines = text.splitlines()
    start = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), len(lines))
    launches: dict[str, dict[str, float]] = {}
    for row in csv.DictReader(lines[start:]):
        scale = {**UNITS, **SECONDS}.get(row["Metric Unit"], 1)
        value = float(row["Metric Value"].replace(",", "")) * scale
        launches.setdefault(row["ID"], {})[METRICS[row["Metric Name"]]] = value
    return list(launches.values())


def report(launches: list[dict[str, float]], rows: int) -> str:
    """The Markdown table."""
    head = ["kernel", "dtype", "V", "DRAM bytes / logits' bytes", "ms", *list(METRICS.values())[3:]]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for (kernel, dtype, vocab), found in zip(workload(), launches, strict=False):
        size = rows * vocab * DTYPES[dtype].itemsize
        ratio = (found["read"] + found["written"]) / size
        rest = (f"{found[name]:.0f}" for name in list(METRICS.values())[3:])
        cells = [kernel, dtype, str(vocab), f"{ratio:.2f}", f"{found['time'] * 1e3:.3f}", *rest]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> int:
    """Command line; without --launch, this file runs itself under ncu."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--launch", action="store_true", help="only launch the kernels")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("dram_rows_gpu: torch sees no GPU")
    device = torch.device("cuda", 0)
    if options.launch:
        launch_all(device)
        torch.cuda.synchronize()
        return 0
    options.out.mkdir(parents=True, exist_ok=True)
    log = options.out / "dram_rows.csv"
    command = ["ncu", "--clock-control", "none", "--cache-control", "none", "--csv"]
    command += ["-k", "regex:^_row_", "--metrics", ",".join(METRICS), "--log-file", str(log)]
    done = subprocess.run([*command, sys.executable, __file__, "--launch"])
    rows = ROWS_PER_SM * torch.cuda.get_device_properties(device).multi_processor_count
    print(report(read_launches(log.read_text()), rows), flush=True)
    return done.returncode


if __name__ == "__main__":
    sys.exit(main())
