"""The buffers of each path of `fastpo.plan`: names, bytes, and when they are alive."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from fastpo.ops import linear_chunks
from fastpo.ops.head import COLUMNS_MULTIPLE, HEAD_BLOCK

TRL_TILE = (4096, 32768)
"""Tokens x columns of a tile of TRL 1.16's `ChunkedLogProbFunction`."""
PHASES = ("sweep", "product", "finish")
"""While logits are worked on; while the last gradients of them are multiplied; while the sums that
they were added to become results."""
_EXP_PAD = 8  # columns that rows of exponentials are padded to
_EXP_TILES = (128, 64)  # columns of the narrowest tile of their GEMM, two partial sums each; and
#                         where the width of the hidden states is no multiple of 16
_TRL_TEMPORARIES = 7
_FP16 = torch.float16
_FP32 = 4
_PER_KEPT_ID = 48  # logit, slope; where its pairs stand, sorted by id
_PER_TOKEN = 32  # loss, log-probs, entropy, flags; weights, advantages, indices of unmasked rows


@dataclass(frozen=True, kw_only=True)
class Buffer:
    """One allocation."""

    name: str
    bytes: int
    formula: str
    phases: tuple[str, ...] = PHASES
    """When it is alive."""
    is_result: bool = False
    """A gradient handed to the caller, which any method has to make."""


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
        phases=PHASES[2:] if two else PHASES,
        is_result=True,
    )
    total = Buffer(name=f"fp32 sum of {name}", bytes=rows * hidden * _FP32, formula=f"{formula} 4")
    return [result, total] if two else [result]


def chunk_tokens(
    row_bytes: int, hidden: int, tokens: int, budget: int, longest: int, *, waits: bool
) -> int:
    """Tokens of a chunk: `LinearCall.gradient_chunk_rows`, and of a sequence that fits the budget
    at least as many."""
    whole, half = (linear_chunks.chunk_rows(tokens, row_bytes, budget // n) for n in (1, 2))
    chunk = whole
    if waits and whole < tokens:
        chunk = linear_chunks.chunk_beside_waiting(tokens, whole, half, hidden)
    return max(chunk, longest) if longest <= whole else chunk


def fastpo(
    vocab: int,
    hidden: int,
    tokens: int,
    dtype: torch.dtype,
    chunk: int,
    device: str,
    *,
    softcap: bool,
) -> list[Buffer]:
    """`linear_policy_loss` and `linear_token_logprobs`, chunk by chunk."""
    narrow = is_narrow(dtype, device)
    multiple = COLUMNS_MULTIPLE if narrow else linear_chunks.PAD_MULTIPLE
    sizes = linear_chunks.padded_sizes(tokens, chunk, multiple)
    most = linear_chunks.gathered_rows(hidden) if narrow else 0
    groups = [sum(sizes[n] for n in g) for g in linear_chunks.grouped(sizes, most)]
    waits, one = len(groups) < len(sizes), len(groups) == 1
    widened = dtype.itemsize == 2 and not narrow
    logits = max(sizes) * linear_chunks.padded(vocab, COLUMNS_MULTIPLE) * _FP32
    head = _gradient("dW", vocab, hidden, dtype, wide=not one or not narrow or dtype == _FP16)
    return [
        *_gradient("dH", tokens, hidden, dtype, wide=dtype == _FP16),
        *(replace(x, phases=PHASES[1:]) if one and "sweep" in x.phases else x for x in head),
        Buffer(
            name="logits of a chunk, then their gradient",
            bytes=logits,
            formula="chunk V 4",
            phases=PHASES[:1] if waits else PHASES[:2],
        ),
        Buffer(
            name="their tanh",
            bytes=logits if softcap else 0,
            formula="chunk V 4",
            phases=PHASES[:1],
        ),
        *_waiting(max(groups) if waits else 0, vocab, hidden, dtype, one=one),
        *_part_of_dh(sizes, groups, tokens, hidden, dtype, narrow=narrow, widened=widened),
        *_widened(vocab, hidden, max(sizes), dtype, device),
        _per_token(tokens),
    ]


def _waiting(rows: int, vocab: int, hidden: int, dtype: torch.dtype, *, one: bool) -> list[Buffer]:
    """Narrow gradients of a group of chunks, until their product; `one`: there is one group."""
    return [
        Buffer(
            name="2-byte gradients that wait for a product",
            bytes=rows * linear_chunks.padded(vocab, COLUMNS_MULTIPLE) * dtype.itemsize,
            formula="min(N, 2 D) V 2",
            phases=PHASES[:2],
        ),
        Buffer(
            name="their hidden states",
            bytes=rows * hidden * dtype.itemsize,
            formula="min(N, 2 D) D 2",
            phases=PHASES[1:2] if one else PHASES[:2],
        ),
    ]


def _part_of_dh(
    sizes: list[int],
    groups: list[int],
    tokens: int,
    hidden: int,
    dtype: torch.dtype,
    *,
    narrow: bool,
    widened: bool,
) -> list[Buffer]:
    """What a product leaves that dH has no room for: rows of padding, or sums of another dtype."""
    ragged, scaled = sum(sizes) > tokens, narrow and dtype == _FP16
    rows = max(groups) if scaled else groups[-1] if ragged and not widened else 0
    when = {1: (), 2: PHASES[1:2]}.get(len(groups), PHASES[:2])  # it is gone before the first dW
    return [
        Buffer(
            name="the last chunk's hidden states, padded",
            bytes=sizes[-1] * hidden * dtype.itemsize if ragged else 0,
            formula="chunk D itemsize",
            phases=PHASES[:2],
        ),
        Buffer(
            name="dH of a product, padded or in fp32",
            bytes=rows * hidden * (_FP32 if scaled else dtype.itemsize),
            formula="min(N, 2 D) D itemsize",
            phases=when if scaled or len(groups) == 1 else PHASES[1:2],
        ),
    ]


def kept_sets(vocab: int, hidden: int, tokens: int, dtype: torch.dtype, kept: int) -> list[Buffer]:
    """Rows that meet `kept` ids each: the results and numbers of these ids, no chunk of logits."""
    return [
        *_gradient("dH", tokens, hidden, dtype, wide=False),
        *_gradient("dW", vocab, hidden, dtype, wide=False),
        Buffer(
            name="numbers of the kept ids",
            bytes=tokens * kept * _PER_KEPT_ID,
            formula=f"N {kept} {_PER_KEPT_ID}",
        ),
        _per_token(tokens),
    ]


def is_narrow(dtype: torch.dtype, device: str) -> bool:
    """Whether gradients of logits are narrower than they are: see `LinearCall.grad_dtype`."""
    return device == "cuda" and dtype.itemsize == 2


def _widened(vocab: int, hidden: int, rows: int, dtype: torch.dtype, device: str) -> list[Buffer]:
    """A CPU's low-precision products: hidden states, or a product with them, and blocks of W."""
    wide = hidden * _FP32 if dtype != torch.float32 and device == "cpu" else 0
    return [
        Buffer(
            name="hidden states of a chunk, widened",
            bytes=rows * wide,
            formula="chunk D 4",
            phases=PHASES[:2],
        ),
        Buffer(
            name="a block of the head, widened",
            bytes=min(vocab, HEAD_BLOCK) * wide,
            formula=f"{HEAD_BLOCK} D 4",
            phases=PHASES[:1],
        ),
    ]


def has_exponentials(dtype: torch.dtype, device: str) -> bool:
    """Whether the exponentials of EXP_PATHS are made of such operands there."""
    return dtype == torch.bfloat16 and device == "cuda"


def exponentials(vocab: int, hidden: int, tokens: int, chunk: int, *, kept: bool) -> list[Buffer]:
    """The first product stores exponentials: a chunk's, or all tokens', `kept` for backward."""
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


def chunked_recompute(
    vocab: int, hidden: int, tokens: int, dtype: torch.dtype, device: str
) -> list[Buffer]:
    """TRL's way: tiles of logits, made once forward and again backward, beside fp32 sums."""
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


def materialized(vocab: int, hidden: int, tokens: int, dtype: torch.dtype) -> list[Buffer]:
    """Plain PyTorch: logits of all tokens as fp32 log-probs, with their gradients."""
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
