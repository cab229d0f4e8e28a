"""Write additions.jsonl and additions-test.jsonl: rows for an example that runs offline.

Run: `python tools/make_additions.py DIRECTORY`. Every sum of two numbers below 30 with a carry or
not, `{"prompt": "17+8=", "answer": "25"}`, in an order drawn by a fixed seed; a fifth is the test.
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

LARGEST = 30


def rows() -> list[dict[str, str]]:
    """All of them, shuffled."""
    made = [
        {"prompt": f"{a}+{b}=", "answer": str(a + b)}
        for a in range(LARGEST)
        for b in range(LARGEST)
    ]
    random.Random(0).shuffle(made)
    return made


def main(directory: Path) -> None:
    """Write both files."""
    directory.mkdir(parents=True, exist_ok=True)
    made = rows()
    cut = len(made) // 5
    for name, part in (("additions-test", made[:cut]), ("additions", made[cut:])):
        text = "".join(json.dumps(row) + "\n" for row in part)
        (directory / f"{name}.jsonl").write_text(text, encoding="utf-8")
    print(f"{len(made) - cut} rows and {cut} held out in {directory}")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "data"))
