"""Where, when and with what a table was made."""

from __future__ import annotations

import datetime
import os
import platform
from pathlib import Path

import torch


def provenance(command: str) -> str:
    """One line for the foot of a table: date, processor, versions, the command that repeats it."""
    return (
        f"{datetime.date.today()}; {_processor()}, {os.cpu_count()} cores; torch "
        f"{torch.__version__}, Python {platform.python_version()}. `{command}`"
    )


def _processor() -> str:
    """The processor's model name and widest vector extension, where the system tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()
    facts = dict(line.split(":", 1) for line in lines if ":" in line)
    facts = {key.strip(): value.strip() for key, value in facts.items()}
    flags = facts.get("flags", "").split()
    vector = next((f for f in ("avx512f", "avx2") if f in flags), platform.machine())
    return f"{facts.get('model name', platform.machine())} ({vector})"
