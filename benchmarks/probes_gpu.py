"""What the other numbers of a GPU run hang on, in seconds: versions, GEMMs, bits, copy speed.

python benchmarks/probes_gpu.py

One line each. docs/gpu.md says what each decides.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

V, D = 151936, 4096


def machine() -> str:
    """The card and the versions."""
    import triton

    p = torch.cuda.get_device_properties(0)
    return (
        f"{p.name}, {p.multi_processor_count} SMs, {p.L2_cache_size >> 20} MiB L2, "
        f"{p.total_memory >> 30} GiB; torch {torch.__version__}, triton {triton.__version__}"
    )


def wide_gemms() -> str:
    """GEMMs of 2-byte operands with fp32 results, which the linear op's speed hangs on."""
    from fastpo.ops.head import wide_gemm

    device = torch.device("cuda", 0)
    found = {str(t): wide_gemm(device, t) for t in (torch.bfloat16, torch.float16)}
    return f"out_dtype=float32 by {found}; None means GEMMs in fp32, 12 times slower"


def bits_of_chunks() -> str:
    """Whether cuBLAS gives a row the same bits in a GEMM of 2048 rows and in one of 256."""
    from fastpo.ops.head import add_matmul_

    hidden = torch.randn(2048, D, device="cuda", dtype=torch.bfloat16)
    weight = torch.randn(V, D, device="cuda", dtype=torch.bfloat16) / 64
    full = torch.zeros(2048, V, device="cuda")
    part = torch.zeros(256, V, device="cuda")
    add_matmul_(full, hidden, weight.t())
    add_matmul_(part, hidden[:256], weight.t())
    again = torch.zeros(2048, V, device="cuda")
    add_matmul_(again, hidden, weight.t())
    same = torch.equal(full[:256], part)
    return f"logits: same bits for 256 and 2048 rows: {same}; run to run: {full.equal(again)}"


def copy_bandwidth() -> str:
    """Of a 2 GiB copy, read and written bytes counted: the floor of the logits op."""
    a = torch.empty(2 << 30, dtype=torch.uint8, device="cuda")
    b = torch.empty_like(a)
    times = []
    for _ in range(8):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        b.copy_(a)
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return f"copy: {2 * a.numel() / min(times) / 1e6:.0f} GB/s"


PROBES: tuple[Callable[[], str], ...] = (machine, wide_gemms, copy_bandwidth, bits_of_chunks)


def main() -> int:
    """Run all; 1 when one failed."""
    if not torch.cuda.is_available():
        sys.exit("probes_gpu: torch sees no GPU")
    failed = 0
    for probe in PROBES:
        start = time.monotonic()
        try:
            line = probe()
        except Exception as error:  # a failed probe is an answer; the next ones still run
            line, failed = f"{type(error).__name__}: {error}".splitlines()[0], 1
        print(f"{probe.__name__}: {line} ({time.monotonic() - start:.1f} s)", flush=True)
        torch.cuda.empty_cache()
    return failed


if __name__ == "__main__":
    sys.exit(main())
