"""Count what linear calls allocate, and compare `fastpo plan`: exact, and without a GPU.

    TRITON_INTERPRET=1 python tools/plan_peaks.py --page benchmarks/results/plan.md

The GPU's way runs on meta tensors, which have sizes and no bytes, so at the sizes that GPUs train:
what decides by the device is told that there is one, products and kernels are left out, and every
tensor in between is made as it is there. Not counted: what cuBLAS and a sort take to work in, and
what the allocator rounds up.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import torch
from peak_bytes import peak_bytes

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # this checkout, not another one that is installed

import fastpo  # noqa: E402
from fastpo import plan  # noqa: E402
from fastpo.ops import head, linear, linear_checks, linear_chunks  # noqa: E402

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
SHAPES = {  # N, D, V
    "one chunk": (2048, 4096, 151936),
    "one super-chunk": (8192, 4096, 151936),  # N = 2 D: one product with the head
    "two": (16384, 4096, 151936),
    "many": (65536, 4096, 151936),
    "narrow": (8192, 576, 49152),  # 2 D is less than a chunk: none waits
    "uneven": (20000, 2880, 128256),
    "ragged": (2001, 8192, 32000),
}
OPTIONS = {
    "bias": {"bias": True},
    "softcap": {"softcap": 30.0},
    "entropy": {"objective": fastpo.dapo(entropy_coef=0.01)},
    "mask": {"mask": True},
    "log-probs": {"op": "linear_token_logprobs"},
    "gspo": {"objective": fastpo.gspo(), "length": 512},
    "gspo, long": {"objective": fastpo.gspo(), "length": 2048},
    "kept": {"kept": 50},
}


def _addmm(total, a, b, *, alpha=1, beta=1, out_dtype=None, out):
    assert total is out and out.shape == (len(a), b.shape[1]) and a.shape[1] == len(b)
    assert a.dtype == b.dtype and out.dtype == (out_dtype or a.dtype)
    return out


def interpreted() -> bool:
    """Whether Triton was imported to interpret."""
    import triton

    return not isinstance(triton.language.sum, triton.JITFunction)


@contextlib.contextmanager
def as_on_a_gpu() -> Iterator[None]:
    """Inside, meta tensors take the way of CUDA ones.

    Raises:
        RuntimeError: Triton compiles here, for a GPU or because TRITON_INTERPRET is not set.
    """
    import triton.runtime.interpreter as interpreter

    if not interpreted():
        raise RuntimeError("set TRITON_INTERPRET=1 at start: nothing may be launched on meta")

    from fastpo.backends import _triton_ops, triton, triton_exp  # noqa: F401 - loads the kernels

    replaced = [
        (torch, "addmm", _addmm),
        (linear_chunks, "budget_bytes", lambda device: linear_chunks.GPU_BUDGET),
        (interpreter.GridExecutor, "__call__", lambda *arguments, **options: None),
    ]
    wide = lambda device, dtype: "addmm" if dtype.itemsize == 2 else None  # noqa: E731
    replaced += [(module, "wide_gemm", wide) for module in (head, linear_chunks)]
    replaced += [(m, "autocasts", lambda hidden: False) for m in (linear, linear_checks)]
    replaced += [(m, "unavailable", lambda device=None: None) for m in (triton, triton_exp)]
    with contextlib.ExitStack() as stack:
        for owner, name, value in replaced:
            stack.enter_context(mock.patch.object(owner, name, value))
        yield


def counted(
    shape,
    dtype,
    backend="triton",
    *,
    op="linear_policy_loss",
    objective=None,
    bias=False,
    mask=False,
    kept=0,
    length=None,
    softcap=None,
    device="meta",
) -> int:
    """Bytes beyond the inputs of forward and backward."""
    tokens, width, vocabulary = shape
    rows = (tokens,) if length is None else (tokens // length, length)

    def new(*size, dtype=FP32, **options):
        there.append(torch.ones(size, dtype=dtype, device=device, **options))
        return there[-1]

    there = []
    trained = {"dtype": dtype, "requires_grad": True}
    operands = [new(*rows, width, **trained), new(vocabulary, width, **trained)]
    operands.append(new(*rows, dtype=torch.int64))
    options = {"backend": backend, "softcap": softcap}
    if bias:
        options["bias"] = new(vocabulary, **trained)
    if mask:
        options["mask"] = new(*rows, dtype=torch.bool)
    if kept:
        ids, offsets = new(tokens * kept, dtype=torch.int64), new(tokens + 1, dtype=torch.int64)
        options |= {"kept_tokens": ids, "kept_offsets": offsets, "dense_rows": 0}
    if op == "linear_policy_loss":
        operands.append(new(*rows))
        options |= {"objective": objective or fastpo.dapo(), "old_logprobs": new(*rows)}

    def work():
        result = getattr(fastpo, op)(*operands, **options)
        (result.loss if op == "linear_policy_loss" else result.logprobs.sum()).backward()

    return peak_bytes(work, there) - sum(x.untyped_storage().nbytes() for x in there)


def planned(shape, dtype, path="fastpo", **options) -> int:
    tokens, hidden, vocab = shape
    return plan.plan(
        vocab=vocab, hidden=hidden, tokens=tokens, dtype=dtype, path=path, **options
    ).peak_bytes


def planned_option(name: str, shape: tuple[int, int, int], dtype: torch.dtype) -> int:
    """What the plan says of one of OPTIONS."""
    options = OPTIONS[name]
    told = {"softcap": "softcap" in options, "kept": options.get("kept", 0)}
    told["longest"] = options.get("length", 1)
    return planned(shape, dtype, plan.KEPT_PATH if "kept" in options else "fastpo", **told)


def rows() -> Iterator[tuple[str, str, tuple[int, int, int], int, int]]:
    """(what, dtype, shape, planned, counted) of every shape, way and option."""
    for shape in SHAPES.values():
        for dtype in (BF16, FP16, FP32):
            yield "", str(dtype), shape, planned(shape, dtype), counted(shape, dtype)
        for path in plan.EXP_PATHS:
            op = "linear_token_logprobs" if path.endswith("kept") else "linear_policy_loss"
            found = counted(shape, BF16, path, op=op)
            yield path, str(BF16), shape, planned(shape, BF16, path), found
    for name, options in OPTIONS.items():
        for shape in (SHAPES["one super-chunk"], SHAPES["two"]):
            for dtype in (BF16, FP16, FP32):
                found = counted(shape, dtype, **options)
                yield name, str(dtype), shape, planned_option(name, shape, dtype), found


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--page", type=Path, required=True)
    page = parser.parse_args().page
    lines = ["| | dtype | N | D | V | planned, MiB | counted, MiB | off |"]
    lines.append("|---|---|---|---|---|---|---|---|")
    worst = 0.0
    with as_on_a_gpu():
        for what, dtype, shape, told, found in rows():
            cells = (
                what,
                dtype.removeprefix("torch."),
                *shape,
                *(f"{x / 2**20:,.1f}" for x in (told, found)),
            )
            lines.append(
                "| " + " | ".join(map(str, cells)) + f" | {100 * (told / found - 1):+.2f} % |"
            )
            worst = max(worst, abs(told / found - 1))
    heading = f"""# `fastpo plan` against what is allocated

Bytes beyond the inputs at the peak of forward and backward on a GPU, every tensor counted, at most
{100 * worst:.1f} % apart. Ways and options as in tools/plan_peaks.py; without a name a token-level
loss.
`TRITON_INTERPRET=1 python tools/plan_peaks.py --page benchmarks/results/plan.md` makes this page.
"""
    page.write_text("\n".join([heading, *lines, ""]))


if __name__ == "__main__":
    main()
