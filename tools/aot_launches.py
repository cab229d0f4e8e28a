"""One launch of every Triton kernel, as the backends make it: what triton_aot.py compiles.

Nothing runs, so tensors are empty, and those of the exponentials have no storage.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Launches = dict[str, Callable[[], object]]
ROWS = 8192  # of the exponentials' GEMM


def row_launches(vocab: int, dtype: torch.dtype) -> Launches:
    """{label: launch} of every kernel on one row of `vocab` logits.

    "all options" has KL, entropy bonus, bounds, NLL weights and temperatures per token; the others
    what DAPO needs.
    """
    from fastpo.backends.base import ObjectiveParams
    from fastpo.kernels import row_grad, row_policy_loss, row_stats, scale
    from fastpo.objective import Objective

    logits = torch.empty(1, vocab, dtype=dtype)
    token = torch.zeros(1, dtype=torch.int64)
    x = torch.zeros(1)
    mask = torch.ones(1, dtype=torch.bool)
    dapo = ObjectiveParams.from_objective(Objective(clip_high=0.28))
    everything = ObjectiveParams.from_objective(Objective(kl_coef=0.1, kl_ratio_weighted=True))
    gate = Objective(surrogate="gate", gate="kl", kl_coef=0.1, old_kl_coef=0.1)
    gated = ObjectiveParams.from_objective(gate)
    in_place = logits
    calls: Launches = {
        "row_stats": lambda: row_stats.row_stats(logits, token, 1.0, None, mask),
        "row_stats, details": lambda: row_stats.row_stats(
            logits, token, 1.0, x, mask, details=True
        ),
        "row_grad": lambda: row_grad.row_grad(logits, token, x, x, x, x, None, 1.0, None, in_place),
        "row_grad, all options": lambda: row_grad.row_grad(
            logits, token, x, x, x, x, x, 1.0, x, in_place
        ),
        "scale": lambda: scale.scale_(logits, x[0]),
    }

    def policy_losses(out: Tensor, suffix: str) -> None:
        few = (x, x, x, *[None] * 5)  # weight, advantages, old log-probs; nothing optional
        calls[f"row_policy_loss{suffix}"] = lambda: row_policy_loss.row_policy_loss(
            logits, token, few, 1.0, None, out, dapo
        )
        calls[f"row_policy_loss{suffix}, all options"] = lambda: row_policy_loss.row_policy_loss(
            logits, token, [x] * 8, 1.0, x, out, everything
        )

    policy_losses(in_place, "")
    calls["row_policy_loss, gated"] = lambda: row_policy_loss.row_policy_loss(
        logits, token, [x] * 8, 1.0, x, in_place, gated
    )
    if dtype == torch.float32:
        policy_losses(logits.view(torch.bfloat16)[:, vocab:], " fp32 -> bf16")
    return calls


def kept_launches(vocab: int, width: int) -> Launches:
    """Of the kernels on rows with ids, of a head (vocab, width) in bf16; the gradient is two."""
    from fastpo.kernels import kept_rows

    hidden, weight = (torch.empty(rows, width).bfloat16() for rows in (4, vocab))
    head = (torch.zeros(4).long(), torch.arange(32), torch.arange(0, 33, 8), 1.0)
    row, bias = torch.ones(4), torch.zeros(vocab).bfloat16()
    stats, logits = [row] * 4, torch.zeros(32)
    outs = (torch.empty_like(hidden), torch.empty_like(weight), bias)
    return {
        "kept_stats": lambda: kept_rows.kept_stats(
            hidden, weight, bias, *head, row, 1.0, True, row.bool()
        ),
        "kept_grad": lambda: kept_rows.kept_grad(
            hidden, weight, *head, row, 1.0, True, logits, stats, row, row, *outs, False
        ),
    }


def exp_launches(vocab: int, width: int) -> Launches:
    """Of the kernels that make and take E = exp(u - o), of a head (vocab, width) in bf16."""
    from fastpo import dapo
    from fastpo.backends.base import ObjectiveParams
    from fastpo.kernels import (
        exp_entropy_grad,
        exp_row_grad,
        exp_row_policy_loss,
        exp_row_stats,
        exp_sums,
        exp_targets,
    )

    low = torch.bfloat16
    hidden, weight, bias = (_meta(*s, dtype=low) for s in ((ROWS, width), (vocab, width), (vocab,)))
    e, x, totals = (
        _meta(ROWS, vocab + -vocab % 8, dtype=low)[:, :vocab],
        _meta(ROWS),
        _meta(2, ROWS),
    )
    tokens, rows = _meta(ROWS, dtype=torch.int64), _meta(ROWS, dtype=torch.int32)
    wild, clipped = _meta(ROWS, dtype=torch.bool), _meta(ROWS, dtype=torch.uint8)
    count, numbers = _meta(1, dtype=torch.int32), (totals, x, x, x)
    losses = ((x,) * 8, (x, x, x, clipped), x, x)
    params = ObjectiveParams.from_objective(dapo(kl_coef=0.1, kl_ratio_weighted=True))
    calls: Launches = {}
    for name, one_bias, softcap in (
        ("", None, False),
        (", bias", bias, False),
        (", softcap", None, True),
        (", bias and softcap", bias, True),
    ):
        calls |= _exp_gemms(name, hidden, weight, e, one_bias, softcap, (x, rows, count))
    return calls | {
        "exp_targets": lambda: exp_targets.exp_targets(
            hidden, weight, tokens, bias, x, softcap=True
        ),
        "exp_sums": lambda: exp_sums.exp_sums(_meta(2, 594, ROWS), totals),
        "wild_rows": lambda: exp_sums.wild_rows(totals, x, wild, rows, count),
        "exp_row_stats": lambda: exp_row_stats.exp_row_stats(*numbers, x, x),
        "exp_row_grad": lambda: exp_row_grad.exp_row_grad(e, tokens, *numbers, x, x, softcap=True),
        "exp_row_policy_loss": lambda: exp_row_policy_loss.exp_row_policy_loss(
            e, tokens, *numbers, *losses, params, V=vocab, softcap=True
        ),
        "exp_entropy_grad": lambda: exp_entropy_grad.exp_entropy_grad(
            e, tokens, *numbers, x, x, x, softcap=True
        ),
    }


def _exp_gemms(
    name: str,
    hidden: Tensor,
    weight: Tensor,
    e: Tensor,
    bias: Tensor | None,
    softcap: bool,
    vectors: tuple[Tensor, Tensor, Tensor],
) -> Launches:
    """The logits GEMM of all rows, of the rows to redo, and of their maxima."""
    from fastpo.kernels import _exp_tiles, exp_logits

    x, rows, count = vectors
    tile = _exp_tiles.exp_tile(hidden, weight, bias, softcap)
    options = {"softcap": softcap, "tanh_gradient": softcap, "inner": 0.1}
    operands = (hidden, weight, e, bias, x, x, _meta(2, tile.tiles(len(weight)), ROWS))
    redo = {"rows": rows, "count": count, "tile": _exp_tiles.redo_tile(tile), **options}
    return {
        f"exp_logits{name}": lambda: exp_logits.exp_logits(*operands, tile, **options),
        f"exp_logits, redo{name}": lambda: exp_logits.exp_logits(*operands, **redo),
        f"exp_logits, maxima{name}": lambda: exp_logits.exp_logits(*operands, maxima=True, **redo),
    }


def _meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")
