"""How many bytes each way of computing a policy loss takes, before it runs: `fastpo plan`.

With N tokens, width D, vocabulary V: what a step allocates beyond its inputs (hidden states, head,
token numbers), buffer by buffer, and in which phase each is alive. `materialized` is eager PyTorch
over all logits; `chunked_recompute` is TRL 1.16's `ChunkedLogProbFunction`, a tile of logits at a
time, forward and again backward; `fastpo` is `linear_policy_loss` with a token-level objective.
`triton-exp` is the same on that backend (docs/exponentials.md), `triton-exp-kept` is
`linear_token_logprobs` with any loss on it: bf16 operands on CUDA. `kept-sets` is `fastpo` where
every token was sampled from a set of kept ids.

tests/test_plan_peak.py compares these with what is allocated, for each of them and every option.
"""

from __future__ import annotations

import argparse
import re
from dataclasses import dataclass

import torch

from fastpo import plan_buffers
from fastpo.ops import linear_chunks
from fastpo.plan_buffers import PHASES, Buffer

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
PATHS = ("materialized", "chunked_recompute", "fastpo")
EXP_PATHS = ("triton-exp", "triton-exp-kept")
KEPT_PATH = "kept-sets"


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
            for phase in PHASES
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
    softcap: bool = False,
    longest: int = 1,
    kept: int = 0,
) -> Plan:
    """The buffers of forward + backward for a trainable head and trainable hidden states.

    Args:
        vocab, hidden, tokens: V, D and N, each at least 1.
        dtype: of hidden states and head: torch.float32, bfloat16 or float16.
        path: one of PATHS or, for bf16 on CUDA, of EXP_PATHS; or, with `kept`, KEPT_PATH.
        budget: bytes of fastpo's chunk buffers; None = its default on `device`, not read from one.
        device: "cuda" or "cpu": where low-precision gradients are multiplied without widening.
        softcap: whether fastpo's head has one: the tanh stays beside the gradient.
        longest: tokens of the longest sequence, for a sequence-level objective, whose chunks are of
            whole sequences; what does not fit a chunk is computed as if it were token-level.
        kept: ids that each token was sampled from, on average; 0 = the whole vocabulary.

    Raises:
        ValueError: an unknown path, dtype or device, a number below 1, `kept` below 0 or above
            V, or one of EXP_PATHS for another dtype or device than it runs with.
    """
    _check(vocab=vocab, hidden=hidden, tokens=tokens, longest=longest)
    _check_way(path, vocab, dtype, budget, device, kept)
    sizes = (vocab, hidden, tokens)
    chunk = None
    if path == "fastpo":
        chunk = _fastpo_chunk(*sizes, dtype, budget, device, softcap, longest)
        buffers = plan_buffers.fastpo(*sizes, dtype, chunk, device, softcap=softcap)
    elif path == KEPT_PATH:
        buffers = plan_buffers.kept_sets(*sizes, dtype, kept)
    elif path in EXP_PATHS:
        chunk = linear_chunks.chunk_rows(tokens, 1, linear_chunks.gathered_rows(hidden))
        buffers = plan_buffers.exponentials(*sizes, chunk, kept=path == "triton-exp-kept")
    elif path == "chunked_recompute":
        chunk = min(plan_buffers.TRL_TILE[0], tokens)
        buffers = plan_buffers.chunked_recompute(*sizes, dtype, device)
    else:
        buffers = plan_buffers.materialized(*sizes, dtype)
    return Plan(
        path=path,
        tokens=tokens,
        hidden=hidden,
        vocab=vocab,
        dtype=dtype,
        chunk_tokens=chunk,
        buffers=tuple(buffers),
    )


def _check_way(
    path: str, vocab: int, dtype: torch.dtype, budget: int | None, device: str, kept: int
) -> None:
    if not 0 <= kept <= vocab:
        raise ValueError(
            f"kept is {kept}, expected the ids of {vocab} that a token was sampled from, or 0 for "
            "all of them"
        )
    if dtype not in DTYPES.values():
        raise ValueError(f"dtype is {dtype}, expected one of {', '.join(DTYPES)}")
    if device not in ("cuda", "cpu"):
        raise ValueError(f"device is {device!r}, expected 'cuda' or 'cpu'")
    if budget is not None and budget < 1:
        raise ValueError(f"budget is {budget} bytes, expected at least 1")
    paths = PATHS + EXP_PATHS + ((KEPT_PATH,) if kept > 0 else ())
    if path not in paths:
        raise ValueError(f"path is {path!r}, expected one of {', '.join(paths)}")
    if path in EXP_PATHS and not plan_buffers.has_exponentials(dtype, device):
        raise ValueError(
            f"path {path!r} for {dtype} on {device!r}, but exponentials are of bfloat16 operands "
            "on 'cuda': use path='fastpo'"
        )


def _fastpo_chunk(
    vocab: int,
    hidden: int,
    tokens: int,
    dtype: torch.dtype,
    budget: int | None,
    device: str,
    softcap: bool,
    longest: int,
) -> int:
    """Tokens of a chunk, as the linear ops cut them."""
    default = linear_chunks.GPU_BUDGET if device == "cuda" else linear_chunks.CPU_BUDGET
    waits = budget is None and plan_buffers.is_narrow(dtype, device)
    row = vocab * torch.float32.itemsize * (2 if softcap else 1)
    return plan_buffers.chunk_tokens(row, hidden, tokens, budget or default, longest, waits=waits)


def _check(**numbers: int) -> None:
    for name, value in numbers.items():
        if value < 1:
            raise ValueError(f"{name} is {value}, expected at least 1")


def plan_table(**shape) -> str:
    """Every buffer of every path as text; arguments and errors as in `plan`, without `path`."""
    paths = PATHS + ((KEPT_PATH,) if shape.get("kept", 0) > 0 else ())
    first = plan(path=PATHS[0], **shape)
    vocab, hidden, tokens, dtype = first.vocab, first.hidden, first.tokens, first.dtype
    if plan_buffers.has_exponentials(dtype, shape.get("device", "cuda")):
        paths += EXP_PATHS
    plans = [plan(path=path, **shape) for path in paths]
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
    parser.add_argument("--softcap", action="store_true", help="the head has one (Gemma)")
    parser.add_argument(
        "--longest", type=int, default=1, help="tokens of the longest sequence, for GSPO and kin"
    )
    parser.add_argument(
        "--kept", type=int, default=0, help="ids that a token was sampled from (top-k, top-p)"
    )


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
            softcap=arguments.softcap,
            longest=arguments.longest,
            kept=arguments.kept,
        )
    )
    return 0
