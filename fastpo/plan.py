"""How many bytes each way of computing a policy loss takes, before it runs: `fastpo plan`.

With N tokens, width D, vocabulary V: what a step allocates beyond its inputs (hidden states, head,
token numbers), buffer by buffer, and in which phase each is alive. `materialized` is eager PyTorch
over all logits; `chunked_recompute` is TRL 1.16's `ChunkedLogProbFunction`, a tile of logits at a
time, forward and again backward; `fastpo` is `linear_policy_loss` with a token-level objective.
`triton-exp` is the same on that backend (docs/exponentials.md), `triton-exp-kept` is
`linear_token_logprobs` with any loss on it: bf16 operands on CUDA.
"""

from __future__ import annotations

import argparse
import re
from dataclasses import dataclass, replace

import torch

from fastpo.ops import linear_chunks
from fastpo.ops.head import COLUMNS_MULTIPLE

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
TRL_TILE = (4096, 32768)
"""Tokens x columns of a tile of TRL 1.16's `ChunkedLogProbFunction`."""
PATHS = ("materialized", "chunked_recompute", "fastpo")
EXP_PATHS = ("triton-exp", "triton-exp-kept")
_EXP_PAD = 8  # columns that rows of exponentials are padded to
_EXP_TILES = (128, 64)  # columns of the narrowest tile of their GEMM, two partial sums each; and
#                         where the width of the hidden states is no multiple of 16
_TRL_TEMPORARIES = 7
_FP32 = 4
_PER_TOKEN = 32  # loss, log-probs, entropy, flags; weights, advantages, indices of unmasked rows


@dataclass(frozen=True, kw_only=True)
class Buffer:
    """One allocation."""

    name: str
    bytes: int
    formula: str
    phases: tuple[str, ...] = ("sweep", "finish")
    """When it is alive: while the logits are worked on, and while the results are finished."""
    is_result: bool = False
    """A gradient handed to the caller, which any method has to make."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The buffers of one path for one shape. Bytes; N, D, V as in the module's docstring."""

    path: str
    tokens: int
    hidden: int
    vocab: int
    dtype: torch.dtype
    chunk_tokens: int | None
    buffers: tuple[Buffer, ...]

    @property
    def peak_bytes(self) -> int:
        """Bytes beyond the inputs when most are allocated, results included."""
        return max(
            sum(buffer.bytes for buffer in self.buffers if phase in buffer.phases)
            for phase in ("sweep", "finish")
        )

    @property
    def extra_bytes(self) -> int:
        """The peak less the resulting gradients."""
        results = sum(buffer.bytes for buffer in self.buffers if buffer.is_result)
        return max(self.peak_bytes - results, 0)


def plan(
    *,
    vocab: int,
    hidden: int,
    tokens: int,
    dtype: torch.dtype = torch.bfloat16,
    path: str = "fastpo",
    budget: int | None = None,
    device: str = "cuda",
) -> Plan:
    """The buffers of forward + backward for a trainable head and trainable hidden states.

    Args:
        vocab, hidden, tokens: V, D and N, each at least 1.
        dtype: of hidden states and head: torch.float32, bfloat16 or float16.
        path: one of PATHS or, for bf16 on CUDA, of EXP_PATHS.
        budget: bytes of fastpo's chunk buffers; None = its default on `device`, not read from one.
        device: "cuda" or "cpu": where low-precision gradients are multiplied without widening.

    Raises:
        ValueError: an unknown path, dtype or device, a number below 1, or one of EXP_PATHS for
            another dtype or device than it runs with.
    """
    for name, value in (("vocab", vocab), ("hidden", hidden), ("tokens", tokens)):
        if value < 1:
            raise ValueError(f"{name} is {value}, expected at least 1")
    if dtype not in DTYPES.values():
        raise ValueError(f"dtype is {dtype}, expected one of {', '.join(DTYPES)}")
    if device not in ("cuda", "cpu"):
        raise ValueError(f"device is {device!r}, expected 'cuda' or 'cpu'")
    if budget is not None and budget < 1:
        raise ValueError(f"budget is {budget} bytes, expected at least 1")
    if path not in PATHS + EXP_PATHS:
        raise ValueError(f"path is {path!r}, expected one of {', '.join(PATHS + EXP_PATHS)}")
    if path in EXP_PATHS and not _has_exponentials(dtype, device):
        raise ValueError(
            f"path {path!r} for {dtype} on {device!r}, but exponentials are of bfloat16 operands "
            "on 'cuda': use path='fastpo'"
        )
    chunk = None
    if path == "fastpo":
        gathers = device == "cuda" and dtype.itemsize == 2
        chunk = _chunk(vocab, tokens, budget, device, share=1)
        if gathers and chunk < tokens:
            chunk = _chunk(vocab, tokens, budget, device, share=2)
        buffers = _fastpo(vocab, hidden, tokens, dtype, chunk, device)
    elif path in EXP_PATHS:
        chunk = linear_chunks.chunk_rows(tokens, 1, linear_chunks.gathered_rows(hidden))
        buffers = _exponentials(vocab, hidden, tokens, chunk, kept=path == "triton-exp-kept")
    elif path == "chunked_recompute":
        chunk = min(TRL_TILE[0], tokens)
        buffers = _chunked_recompute(vocab, hidden, tokens, dtype, device)
    else:
        buffers = _materialized(vocab, hidden, tokens, dtype)
    return Plan(
        path=path,
        tokens=tokens,
        hidden=hidden,
        vocab=vocab,
        dtype=dtype,
        chunk_tokens=chunk,
        buffers=tuple(buffers),
    )


def _per_token(tokens: int) -> Buffer:
    size = tokens * _PER_TOKEN
    return Buffer(name="per-token numbers", bytes=size, formula=f"N {_PER_TOKEN}")


def _gradient(name: str, rows: int, hidden: int, dtype: torch.dtype, *, wide: bool) -> list[Buffer]:
    """A result (rows, D), and below fp32 the fp32 sum it is rounded from if `wide`."""
    formula = f"{'N' if name == 'dH' else 'V'} D"
    two = wide and dtype != torch.float32
    result = Buffer(
        name=name,
        bytes=rows * hidden * dtype.itemsize,
        formula=f"{formula} itemsize",
        phases=("finish",) if two else ("sweep", "finish"),
        is_result=True,
    )
    total = Buffer(name=f"fp32 sum of {name}", bytes=rows * hidden * _FP32, formula=f"{formula} 4")
    return [result, total] if two else [result]


def _chunk(vocab: int, tokens: int, budget: int | None, device: str, *, share: int) -> int:
    """Tokens of a chunk: within `budget`, or within a `share`-th of the default one."""
    default = linear_chunks.GPU_BUDGET if device == "cuda" else linear_chunks.CPU_BUDGET
    return linear_chunks.chunk_rows(tokens, vocab * _FP32, budget or default // share)


def _fastpo(
    vocab: int, hidden: int, tokens: int, dtype: torch.dtype, chunk: int, device: str
) -> list[Buffer]:
    rows = linear_chunks.padded(chunk)
    columns = linear_chunks.padded(vocab, COLUMNS_MULTIPLE)
    narrow = dtype.itemsize == 2 and device == "cuda"
    waiting = min(tokens, linear_chunks.gathered_rows(hidden)) if narrow and chunk < tokens else 0
    one = narrow and (chunk >= tokens or waiting >= tokens)
    single = one and dtype == torch.bfloat16  # one product makes dW; fp16 sums are scaled
    widened = 0
    if dtype != torch.float32 and device == "cpu":
        widened = 2 * rows * hidden * _FP32 + min(vocab, 4096) * hidden * _FP32
    head = _gradient("dW", vocab, hidden, dtype, wide=not single)
    if single:  # made when the chunk is done, from the gradient that still stands
        head = [replace(buffer, phases=("finish",)) for buffer in head]
    return [
        *_gradient("dH", tokens, hidden, dtype, wide=dtype == torch.float16),
        *head,
        Buffer(
            name="logits of a chunk, then their gradient",
            bytes=rows * columns * _FP32,
            formula="chunk V 4",
            phases=("sweep", "finish") if single and not waiting else ("sweep",),
        ),
        Buffer(
            name="2-byte gradients that wait for a product",
            bytes=waiting * (columns + hidden) * dtype.itemsize,
            formula="min(N, 2 D) (V + D) 2",
            phases=("sweep", "finish") if single else ("sweep",),
        ),
        Buffer(
            name="operands widened in blocks",
            bytes=widened,
            formula="2 chunk D 4 + 4096 D 4",
            phases=("sweep",),
        ),
        _per_token(tokens),
    ]


def _has_exponentials(dtype: torch.dtype, device: str) -> bool:
    return dtype == torch.bfloat16 and device == "cuda"


def _exponentials(vocab: int, hidden: int, tokens: int, chunk: int, *, kept: bool) -> list[Buffer]:
    columns = linear_chunks.padded(vocab, _EXP_PAD)
    tile = _EXP_TILES[hidden % 16 != 0]
    tiles = linear_chunks.padded(vocab, tile) // tile
    rows = tokens if kept else chunk
    two = torch.bfloat16.itemsize
    return [
        *_gradient("dH", tokens, hidden, torch.bfloat16, wide=False),
        *_gradient("dW", vocab, hidden, torch.bfloat16, wide=chunk < tokens),
        Buffer(
            name="exponentials" + (", kept for the backward" if kept else " of a chunk"),
            bytes=rows * columns * two,
            formula="N V 2" if kept else "min(N, 2 D) V 2",
            phases=("sweep",),
        ),
        Buffer(
            name="partial sums, then the chunk's dH in fp32",
            bytes=max(2 * tiles * chunk * _FP32, chunk * hidden * (_FP32 + two)),
            formula="max(2 V / 128 4, D (4 + 2)) chunk",
            phases=("sweep",),
        ),
        _per_token(tokens),
    ]


def _chunked_recompute(
    vocab: int, hidden: int, tokens: int, dtype: torch.dtype, device: str
) -> list[Buffer]:
    tile = min(tokens, TRL_TILE[0]) * min(vocab, TRL_TILE[1])
    temporaries = _TRL_TEMPORARIES * tile * _FP32 if device == "cpu" else 0
    return [
        *_gradient("dH", tokens, hidden, dtype, wide=True),
        *_gradient("dW", vocab, hidden, dtype, wide=True),
        Buffer(name="a tile of logits", bytes=tile * dtype.itemsize, formula="4096 32768 itemsize"),
        Buffer(
            name="a tile's temporaries, without Triton",
            bytes=temporaries,
            formula=f"{_TRL_TEMPORARIES} 4096 32768 4",
            phases=("sweep",),
        ),
        _per_token(tokens),
    ]


def _materialized(vocab: int, hidden: int, tokens: int, dtype: torch.dtype) -> list[Buffer]:
    logits = tokens * vocab
    names = ("log-probs", "gradient of the log-probs", "gradient of the logits")
    softmax = [
        Buffer(name=name, bytes=logits * _FP32, formula="N V 4", phases=("sweep",))
        for name in names
    ]
    narrow = Buffer(
        name="gradient of the logits, in their dtype",
        bytes=logits * dtype.itemsize,
        formula="N V itemsize",
        phases=("finish",),
    )
    results = [
        replace(buffer, phases=("finish",))
        for name, rows in (("dH", tokens), ("dW", vocab))
        for buffer in _gradient(name, rows, hidden, dtype, wide=False)
    ]
    return [*softmax, narrow, *results, _per_token(tokens)]


def plan_table(
    *,
    vocab: int,
    hidden: int,
    tokens: int,
    dtype: torch.dtype = torch.bfloat16,
    budget: int | None = None,
    device: str = "cuda",
) -> str:
    """Every buffer of every path as text; arguments and errors as in `plan`."""
    plans = [
        plan(
            vocab=vocab,
            hidden=hidden,
            tokens=tokens,
            dtype=dtype,
            path=path,
            budget=budget,
            device=device,
        )
        for path in PATHS + (EXP_PATHS if _has_exponentials(dtype, device) else ())
    ]
    name = next(key for key, value in DTYPES.items() if value == dtype)
    inputs = (tokens + vocab) * hidden * dtype.itemsize
    lines = [
        f"{tokens} tokens, hidden {hidden}, vocabulary {vocab}, {name}: forward + backward",
        f"inputs (hidden states and head): {human(inputs)}",
    ]
    for each in plans:
        chunk = "" if each.chunk_tokens is None else f", {each.chunk_tokens} tokens at a time"
        lines += ["", f"{each.path}{chunk}"]
        for buffer in each.buffers:
            if buffer.bytes:
                lines.append(f"  {buffer.name:<40} {human(buffer.bytes):>11}   {buffer.formula}")
        lines.append(f"  {'peak beyond the inputs':<40} {human(each.peak_bytes):>11}")
        lines.append(f"  {'of which not results':<40} {human(each.extra_bytes):>11}")
    return "\n".join(lines)


def human(count: float) -> str:
    """A number of bytes with its unit."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.4g} {unit}"
        count /= 1024
    return f"{count:,.2f} GiB"


def parse_bytes(text: str) -> int:
    """A number of bytes such as 1280MiB, 1.5GB or 200000000.

    Raises:
        ValueError: not a positive number followed by nothing, KB, MB, GB, KiB, MiB or GiB.
    """
    units = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}
    units |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMG]I?B)?\s*", text.upper())
    count = int(float(match[1]) * units[match[2] or ""]) if match else 0
    if count < 1:
        raise ValueError(f"{text!r} is no number of bytes, expected for example 1280MiB or 1.5GB")
    return count


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `fastpo plan`."""
    parser.add_argument("--vocab", type=int, required=True, help="V, columns of the LM head")
    parser.add_argument("--hidden", type=int, required=True, help="D, width of the hidden states")
    parser.add_argument("--tokens", type=int, required=True, help="N, tokens of a micro-batch")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--budget", help="bytes of a chunk, e.g. 1280MiB")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")


def run(arguments: argparse.Namespace) -> int:
    """Print the table that `arguments` (see `add_arguments`) ask for; 0.

    Raises:
        ValueError: as in `plan` and `parse_bytes`.
    """
    budget = arguments.budget
    print(
        plan_table(
            vocab=arguments.vocab,
            hidden=arguments.hidden,
            tokens=arguments.tokens,
            dtype=DTYPES[arguments.dtype],
            budget=None if budget is None else parse_bytes(budget),
            device=arguments.device,
        )
    )
    return 0
