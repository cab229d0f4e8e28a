"""The sums over tokens that a policy loss reports, in one launch beside torch's last sum.

Every program adds up a block of tokens into partial results of its own, which are added in a fixed
order: no atomics, so the same numbers give the same bits in every run.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._exp_tiles import on_device
from ._token_loss import ABS, K1, K2, MAX_LOG_RATIO

SUMS = 8
_TOKENS = 1024  # of a program
_INPUTS = ["logprobs_ptr", "entropy_ptr", "clipped_ptr", "mask_ptr", "old_logprobs_ptr"]
_OPTIONAL = ["ref_logprobs_ptr", "ratio_ptr", "ref_kl_ptr"]


@triton.jit
def _excess(x):
    """exp(x) - 1 - x >= 0, by its series where the difference would be rounding error."""
    series = 1.0 / 3628800
    series = 1.0 / 362880 + x * series
    series = 1.0 / 40320 + x * series
    series = 1.0 / 5040 + x * series
    series = 1.0 / 720 + x * series
    series = 1.0 / 120 + x * series
    series = 1.0 / 24 + x * series
    series = 1.0 / 6 + x * series
    series = 0.5 + x * series
    return tl.where(tl.abs(x) < 1.0, x * x * series, tl.exp(x) - 1.0 - x)


@triton.jit
def _at_most(x, bound):
    return tl.minimum(x, bound, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _kl(log_ratio, KL: tl.constexpr):
    """The estimate of KL(policy || reference) from k = logp - ref."""
    if KL == K1:
        return log_ratio
    elif KL == K2:
        return 0.5 * log_ratio * log_ratio
    elif KL == ABS:
        return tl.abs(log_ratio)
    else:
        return _excess(_at_most(-log_ratio, MAX_LOG_RATIO))


@triton.jit(
    do_not_specialize=["n"],
    do_not_specialize_on_alignment=[*_INPUTS, *_OPTIONAL, "partials_ptr"],
)
def _metric_sums_kernel(
    logprobs_ptr,  # (n,)
    entropy_ptr,  # (n,) or None
    clipped_ptr,  # (n,) uint8
    mask_ptr,  # (n,) bool or None
    old_logprobs_ptr,  # (n,) or None
    ref_logprobs_ptr,  # (n,) or None
    ratio_ptr,  # (n,) or None
    ref_kl_ptr,  # (n,) or None
    partials_ptr,  # (SUMS, programs)
    n,
    KL: tl.constexpr,
    KL_RATIO_WEIGHTED: tl.constexpr,
    TOKENS: tl.constexpr,
):
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    counts = token < n
    if mask_ptr is not None:
        counts &= tl.load(mask_ptr + token, mask=counts, other=False).to(tl.int1)
    # What stands in a masked slot is never read: it may be NaN.
    logprob = tl.load(logprobs_ptr + token, mask=counts, other=0.0)
    old_logprob = logprob
    if old_logprobs_ptr is not None:
        old_logprob = tl.load(old_logprobs_ptr + token, mask=counts, other=0.0)
    flags = tl.load(clipped_ptr + token, mask=counts, other=0).to(tl.int32)
    log_ratio = _at_most(logprob - old_logprob, MAX_LOG_RATIO)
    log_ratio = -_at_most(-log_ratio, MAX_LOG_RATIO)
    if ratio_ptr is None:
        ratio = tl.exp(log_ratio)
    else:
        ratio = tl.load(ratio_ptr + token, mask=counts, other=0.0)

    to = partials_ptr + tl.program_id(0)
    programs = tl.num_programs(0)
    tl.store(to, tl.sum(counts.to(tl.float32), 0))
    tl.store(to + programs, tl.sum(tl.where(counts, ratio, 0.0), 0))
    tl.store(to + 2 * programs, tl.sum(_excess(log_ratio), 0))  # 0 where nothing counts
    for bit in tl.static_range(3):
        hits = tl.sum(((flags >> bit) & 1).to(tl.float32), 0)
        tl.store(to + (3 + bit) * programs, hits)
    if entropy_ptr is not None:
        entropy = tl.load(entropy_ptr + token, mask=counts, other=0.0)
        tl.store(to + 6 * programs, tl.sum(entropy, 0))
    if ref_kl_ptr is not None:
        ref_kl = tl.load(ref_kl_ptr + token, mask=counts, other=0.0)
        tl.store(to + 7 * programs, tl.sum(ref_kl, 0))
    elif ref_logprobs_ptr is not None:
        ref_logprob = tl.load(ref_logprobs_ptr + token, mask=counts, other=0.0)
        ref_kl = _kl(logprob - ref_logprob, KL)
        if KL_RATIO_WEIGHTED:
            ref_kl *= ratio
        tl.store(to + 7 * programs, tl.sum(ref_kl, 0))


def metric_sums(
    logprobs: Tensor,
    entropy: Tensor | None,
    clipped: Tensor,
    mask: Tensor | None,
    old_logprobs: Tensor | None,
    ref_logprobs: Tensor | None,
    ratio: Tensor | None,
    ref_kl: Tensor | None,
    *,
    kl: int,
    kl_ratio_weighted: bool,
) -> Tensor:
    """(SUMS,) fp32: tokens, ratio, old_kl, clip flags low, high and max, entropy, ref_kl.

    Inputs (n,) fp32, clipped uint8 bits, mask bool; sums of what is not given are undefined.
    `ratio` and `ref_kl` replace those that follow from the log-probs. `kl` is the number of the
    estimator of ref_kl, as `fastpo.backends.base.ObjectiveParams.kl`, one without "+".
    """
    n = logprobs.shape[0]
    if n == 0:
        return torch.zeros(SUMS, device=logprobs.device)
    programs = triton.cdiv(n, _TOKENS)
    partials = torch.empty(SUMS, programs, dtype=torch.float32, device=logprobs.device)
    with on_device(logprobs):
        _metric_sums_kernel[(programs,)](
            logprobs,
            entropy,
            clipped,
            mask,
            old_logprobs,
            ref_logprobs,
            ratio,
            ref_kl,
            partials,
            n,
            KL=kl,
            KL_RATIO_WEIGHTED=kl_ratio_weighted,
            TOKENS=_TOKENS,
            num_warps=4,
            enable_fp_fusion=False,
        )
    return partials.sum(1)
