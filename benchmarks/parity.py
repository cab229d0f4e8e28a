"""How far fastpo is from each trainer's own loss on the same inputs.

    python benchmarks/parity.py

Runs the tests that compare an adapter with the trainer's own code (installed, or its wheel of
tools/peer_wheels.txt), and writes what they noted: per trainer and feature the largest relative
difference of the loss and of its gradient, over all settings that were tried.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from importlib import metadata
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path[:0] = [str(HERE), str(ROOT), str(ROOT / "tools")]

import parity_notes  # noqa: E402
from peer_wheels import PEERS  # noqa: E402
from provenance import provenance  # noqa: E402

TESTS = {  # files, and which of their tests note what they compare
    "verl": "own_loss",
    "wheels": "every_setting",
    "swift": "its_losses",
    "trl_async": "equal_stock",
    "trl_sequence": "equals_stock",
    "trl_trainers": "five_steps",
}
PACKAGES = ("trl", "verl", "skyrl", "openrlhf", "areal", "ms_swift")
TABLE = HERE / "results" / "parity.md"

Worst = dict[tuple[str, str], tuple[float, float, int]]


def main() -> None:
    if "--help" in sys.argv or "-h" in sys.argv:
        print(__doc__)
        return
    found: Worst = {}
    for name, tests in TESTS.items():
        found |= compared(f"tests/test_integrations_{name}.py", tests)
        TABLE.write_text(table(found))  # what is there stays, should a later file fail
    print(TABLE.read_text())


def compared(file: str, tests: str) -> Worst:
    """Run tests of one file, and read what they noted."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-q", "-m", "", "-k", tests]
        command += [f"--junitxml={report}", file]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        if run.returncode:
            raise SystemExit(run.stdout[-3000:])
        return worst(report)


def worst(report: Path) -> Worst:
    """(trainer, feature) -> the largest differences of loss and gradient, of how many settings."""
    found: Worst = {}
    for each in ElementTree.parse(report).iter("property"):
        if each.get("name") == parity_notes.PROPERTY:
            trainer, feature, loss, gradient = json.loads(each.get("value", ""))
            before = found.get((trainer, feature), (0.0, 0.0, 0))
            found[trainer, feature] = (
                max(loss, before[0]),
                max(gradient, before[1]),
                before[2] + 1,
            )
    return found


def table(found: Worst) -> str:
    """The differences as Markdown."""
    lines = [
        "# How far fastpo is from each trainer's own loss",
        "",
        f"{versions()}. Relative to the trainer's own, the largest of the settings tried: norms of "
        "differences over norms. verl, SkyRL, OpenRLHF and AReaL: their own function in fp64 on "
        "the same log-probs, gradient in these. ms-swift: its own loss in fp32 through a two-layer "
        "Llama, gradient in all weights. TRL: losses and gradient norms of five steps of training "
        "in fp32, each on its own weights; SkyRL's dppo has another value of the same gradient."
        " On-policy cases of TRL (no num_iterations) have a loss of 0 up to rounding: a ratio "
        "there says nothing.",
        "",
        "| trainer | feature | settings | loss | gradient |",
        "|---|---|---|---|---|",
    ]
    for (trainer, feature), (loss, gradient, count) in found.items():
        shown = (f"{x:.0e}" if x else "0" for x in (loss, gradient))
        lines.append(f"| {trainer} | {feature} | {count} | {' | '.join(shown)} |")
    return "\n".join([*lines, "", provenance("python benchmarks/parity.py")]) + "\n"


def versions() -> str:
    """The packages compared with, as installed or as wheels."""
    wheels = {x.name: x.version for x in metadata.distributions(path=[str(PEERS)])}
    known = [f"{name} {wheels.get(name) or metadata.version(name)}" for name in PACKAGES]
    return ", ".join(known).replace("ms_swift", "ms-swift")


if __name__ == "__main__":
    main()
