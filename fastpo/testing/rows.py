"""Hold a backend's row primitives to the float64 specification.

The oracle is autograd through `log_softmax` and `fastpo.objective.token_loss` in float64; the
budget is a multiple of the error that the same computation in float32 by plain torch makes, after
rounding to the output's dtype. A backend is anything with the functions of
`fastpo.backends.base.Backend`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fastpo.backends.base import RowInputs, RowLosses, RowStats
from fastpo.objective import Objective
from fastpo.testing.budget import assert_within_budget, cosine

FP32_FACTOR = 4.0  # sums of V terms in another order than torch's, over few rows: luck plays a part
ROUNDED_FACTOR = 2.0  # a 2-byte gradient: rounding it is nearly all of the error
LEAST_ERROR = 2.0**-19  # relative: the last bit of a log-prob of -16 is 1e-6 of its ratio and loss
LEAST_COSINE = 0.999  # of bf16 gradients; far below it lies a wrong or missing gradient


@dataclass(frozen=True, kw_only=True)
class RowCase:
    """Inputs of the row primitives: N rows of V logits and their per-token numbers."""

    logits: Tensor  # (N, V) fp32, bf16 or fp16
    tokens: Tensor  # (N,) int64
    temperature: float | Tensor  # or (N,) fp32
    inputs: RowInputs

    @classmethod
    def random(
        cls,
        rows: int,
        vocab: int,
        objective: Objective,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        temperature: float | Tensor = 0.8,
        on_policy: bool = False,
        extras: bool = False,
        seed: int = 0,
    ) -> RowCase:
        """Realistic rows: old and reference log-probs are the true ones + N(0, 0.2).

        `extras` gives every row clip bounds and an NLL weight of its own.
        """
        generator = torch.Generator().manual_seed(seed)

        def noise(scale: float) -> Tensor:
            return scale * torch.randn(rows, generator=generator)

        logits = (3 * torch.randn(rows, vocab, generator=generator)).to(dtype)
        tokens = torch.randint(0, vocab, (rows,), generator=generator)
        logprobs = _logprobs(logits, tokens, temperature, torch.float64)[0].float()
        has_entropy = objective.entropy_coef != 0
        inputs = RowInputs(
            weight=(0.5 + torch.rand(rows, generator=generator)) / rows,
            advantages=noise(1.0),
            old_logprobs=None if on_policy else logprobs + noise(0.2),
            ref_logprobs=logprobs + noise(0.2) if objective.kl_coef else None,
            entropy_weight=torch.full((rows,), objective.entropy_coef / rows)
            if has_entropy
            else None,
        )
        if extras:
            low, high, nll = (torch.rand(rows, generator=generator) for _ in range(3))
            inputs = inputs._replace(clip_low=1 - low / 3, clip_high=1 + high / 3, nll_weight=nll)
        case = cls(logits=logits, tokens=tokens, temperature=temperature, inputs=inputs)
        return case.to(device)

    def to(self, device: torch.device | str) -> RowCase:
        """The same case on another device."""
        temperature = self.temperature
        return RowCase(
            logits=self.logits.to(device),
            tokens=self.tokens.to(device),
            temperature=temperature.to(device) if isinstance(temperature, Tensor) else temperature,
            inputs=self.inputs.map(lambda x: x.to(device)),
        )

    def with_logits(self, logits: Tensor) -> RowCase:
        """The same tokens and numbers under other logits."""
        return replace(self, logits=logits)

    def take(self, rows: Tensor | slice) -> RowCase:
        """Some of the rows."""
        temperature = self.temperature
        return RowCase(
            logits=self.logits[rows],
            tokens=self.tokens[rows],
            temperature=temperature[rows] if isinstance(temperature, Tensor) else temperature,
            inputs=self.inputs.map(lambda x: x[rows]),
        )


def _logprobs(
    logits: Tensor, tokens: Tensor, temperature: float | Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Eager log-prob and entropy of every row in `dtype`, differentiable; p = 0 adds no entropy."""
    column = temperature[:, None] if isinstance(temperature, Tensor) else temperature
    table = (logits.to(dtype) / column).log_softmax(-1)
    probs = table.exp()
    entropy = -(probs * torch.where(probs > 0, table, 0.0)).sum(-1)
    return table.gather(1, tokens[:, None])[:, 0], entropy


def exact_logprobs(case: RowCase) -> Tensor:
    """The log-prob of every row's token in float64, (N,)."""
    return _logprobs(case.logits, case.tokens, case.temperature, torch.float64)[0]


def expected_policy_loss(
    case: RowCase, objective: Objective, dtype: torch.dtype = torch.float64
) -> tuple[RowLosses, Tensor]:
    """Row losses and the gradient (N, V) by autograd in `dtype`; masked rows give exact zeros."""
    inputs = case.inputs.map(lambda x: x.to(dtype))
    weight, entropy_weight = inputs.weight, inputs.entropy_weight
    mask = inputs.mask
    leaf = case.logits.to(dtype).where(mask[:, None], 0).requires_grad_()
    logprobs, entropy = _logprobs(leaf, case.tokens, case.temperature, dtype)
    logprobs, entropy = logprobs.where(mask, 0), entropy.where(mask, 0)
    terms = inputs.token_loss(objective, logprobs, mask)
    loss = weight.where(mask, 0) * terms.loss
    if entropy_weight is not None:
        loss = loss - entropy_weight.where(mask, 0) * entropy
    (grad,) = torch.autograd.grad(loss.sum(), leaf)
    rows = RowLosses(loss.detach(), logprobs.detach(), entropy.detach(), terms.clipped)
    return rows, grad


def run_policy_loss(
    backend, case: RowCase, objective: Objective, *, inplace: bool = False
) -> tuple[RowLosses, Tensor]:
    """Row losses and gradient of `backend`; in place on a copy of the logits, or out of place."""
    logits = case.logits.clone() if inplace else case.logits
    out = logits if inplace else torch.empty_like(logits)
    rows = backend.row_policy_loss(
        logits, case.tokens, case.inputs, objective, case.temperature, out
    )
    return rows, out


def check_policy_loss(
    backend, case: RowCase, objective: Objective, *, inplace: bool = False
) -> None:
    """`row_policy_loss` against the specification: losses, statistics, clip bits and gradient.

    Raises:
        AssertionError: names what is off, by how much and where.
    """
    exact, exact_grad = expected_policy_loss(case, objective)
    plain, plain_grad = expected_policy_loss(case, objective, torch.float32)
    rows, grad = run_policy_loss(backend, case, objective, inplace=inplace)
    for name in ("loss", "logprobs", "entropy"):
        _check_statistic(name, *(getattr(x, name) for x in (rows, exact, plain)))
    if not torch.equal(rows.clipped, exact.clipped):
        raise AssertionError(f"clipped: got {rows.clipped}, expected {exact.clipped}")
    _check_gradient(grad, exact_grad, plain_grad)
    if cosine(grad, exact_grad) < LEAST_COSINE:
        raise AssertionError(f"gradient: cosine {cosine(grad, exact_grad)} to the exact one")


def check_stats_and_grad(backend, case: RowCase) -> None:
    """`row_stats`, then `row_grad` with random c and e, against autograd in float64.

    Raises:
        AssertionError: names what is off, by how much and where.
    """
    generator = torch.Generator().manual_seed(1)
    c, e = (
        torch.randn(len(case.tokens), generator=generator).to(case.logits.device) for _ in range(2)
    )

    def differentiate(dtype: torch.dtype):
        leaf = case.logits.to(dtype).requires_grad_()
        logprobs, entropy = _logprobs(leaf, case.tokens, case.temperature, dtype)
        (grad,) = torch.autograd.grad((c * logprobs + e * entropy).sum(), leaf)
        return logprobs.detach(), entropy.detach(), grad

    exact, plain = differentiate(torch.float64), differentiate(torch.float32)
    stats: RowStats = backend.row_stats(case.logits, case.tokens, case.temperature)
    out = torch.empty_like(case.logits)
    backend.row_grad(case.logits, case.tokens, stats, c, e, case.temperature, out)
    for name, got, want, base in zip(("logprobs", "entropy"), stats, exact, plain, strict=False):
        _check_statistic(name, got, want, base)
    _check_gradient(out, exact[2], plain[2])


def check_details(backend, case: RowCase) -> None:
    """`row_details` against float64, and its statistics against those of `row_stats`, bit by bit.

    Raises:
        AssertionError: names what is off, by how much and where.
    """

    def details(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        column = case.temperature
        column = column[:, None] if isinstance(column, Tensor) else column
        scaled = case.logits.to(dtype) / column
        return (2 * scaled.log_softmax(1)).logsumexp(1), scaled.mean(1)

    stats, got = backend.row_details(case.logits, case.tokens, case.temperature)
    alone = backend.row_stats(case.logits, case.tokens, case.temperature)
    for name, x, y in zip(stats._fields, stats, alone, strict=True):
        if not torch.equal(x.nan_to_num(7.0), y.nan_to_num(7.0)):
            raise AssertionError(f"{name}: row_details {x}, row_stats {y}")
    exact, plain = details(torch.float64), details(torch.float32)
    for name, x, want, base in zip(got._fields, got, exact, plain, strict=False):
        infinite = want.isinf()
        if not torch.equal(x[infinite].double(), want[infinite]):
            raise AssertionError(f"{name}: got {x}, expected {want}")
        if not infinite.all():
            _check_statistic(name, x[~infinite], want[~infinite], base[~infinite])
    first = case.logits.double().argmax(1) == case.tokens
    if got.is_top1.dtype != torch.bool or not torch.equal(got.is_top1, first):
        raise AssertionError(f"is_top1: got {got.is_top1}, expected {first}")


def check_details_of_hostile_rows(backend, device: torch.device | str = "cpu") -> None:
    """Ties in every order, equal logits, -inf, one finite logit, NaN, masked rows, wild tokens."""
    vocab, far = 9000, 8000  # the second is in another block than 0 on the CPU
    rows = torch.randn(12, vocab, generator=torch.Generator().manual_seed(0))
    tokens = torch.tensor([5, far, far, 5, 0, 7, 5, far, far, far, 3, 4])
    for row, columns in enumerate(
        [(5,), (far,), (5, far), (5, far), (), (), (5, 6), (far - 1, far)]
    ):
        rows[row, list(columns)] = 50.0  # the token is the first of these, or not
    rows[4:6] = 1.25
    rows[8, :far] = rows[9, far + 1 :] = -torch.inf
    rows[8, far] = rows[9, far] = 60.0
    rows[10] = -torch.inf
    rows[10, 3] = 2.0
    rows[11] = -1e4
    rows[11, :4] = -torch.inf
    case = RowCase.random(12, vocab, Objective(), temperature=0.7)
    case = replace(case, logits=rows, tokens=tokens).to(device)
    check_details(backend, case)
    if not 3 <= case.logits.double().argmax(1).eq(case.tokens).sum() <= 9:
        raise AssertionError("both answers must occur")
    rows = case.logits.clone()
    rows[0, 5], rows[1, 0], rows[2] = torch.nan, torch.nan, torch.nan
    mask = torch.arange(12, device=device) != 2
    wild = case.tokens.masked_fill(torch.arange(12, device=device) == 3, vocab)
    _, got = backend.row_details(rows, wild, 0.7, mask)
    if got.is_top1[:4].any() or any(x[2] != 0 for x in got):
        raise AssertionError(f"NaN, a masked row or a token outside the vocabulary: {got}")


def check_confident_tokens(backend, device: torch.device | str = "cpu") -> None:
    """1 - p of a token with log-prob -1e-3 to -1e-7, where p - 1 in fp32 would be all rounding.

    Raises:
        AssertionError: a token's own gradient is further than 1e-5 of its size off.
    """
    heights = torch.linspace(9, 18, 6, dtype=torch.float64, device=device)[:, None]
    logits = torch.zeros(6, 8, dtype=torch.float64, device=device)
    logits[:, 3:4] = heights
    table = logits.log_softmax(1)
    log_sum = logits.logsumexp(1) - heights[:, 0]
    entropy = -(table.exp() * table).sum(1)
    stats = RowStats(*(x.float() for x in (table[:, 3], entropy, heights[:, 0], log_sum)))
    grad, c = torch.empty(6, 8, device=device), torch.full((6,), 0.5, device=device)
    tokens = torch.full((6,), 3, device=device)
    backend.row_grad(logits.float(), tokens, stats, c, None, 1.0, grad)
    error = (grad[:, 3] / (-0.5 * torch.expm1(table[:, 3])) - 1).abs().max()
    if not error < 1e-5:
        raise AssertionError(f"gradient of a confident token: relative error {error:.1e}")


def check_no_subnormal_leaves(
    backend, dtype: torch.dtype, device: torch.device | str = "cpu"
) -> None:
    """Rows whose gradient spans every exponent, through all that writes one, of fp32 or bf16.

    Raises:
        AssertionError: a subnormal number was written, or a normal one was not.
    """
    objective = Objective(surrogate="reinforce", entropy_coef=0.01)
    case = RowCase.random(4, 2000, objective, device=device, temperature=1.0)
    logits = torch.linspace(-110, 0, 2000, device=device).expand(4, -1).contiguous().to(dtype)
    case = case.with_logits(logits)
    plain = replace(case, inputs=case.inputs._replace(entropy_weight=None))
    for some in (case, plain):
        places = [torch.empty_like(logits)]
        if dtype == torch.float32:
            places.append(torch.empty_like(logits, dtype=torch.bfloat16))
        for out in places:
            arguments = (some.tokens, some.inputs, objective, some.temperature, out)
            backend.row_policy_loss(logits, *arguments)
            _check_normal(out, expected_policy_loss(some, objective)[1], "row_policy_loss")
            stats = backend.row_stats(logits, some.tokens, some.temperature)
            c, e = -some.inputs.weight * some.inputs.advantages, some.inputs.entropy_weight
            e = None if e is None else -e
            backend.row_grad(logits, some.tokens, stats, c, e, some.temperature, out)
            _check_normal(out, expected_policy_loss(some, objective)[1], "row_grad")
    factor = torch.tensor(1e-3, device=device)
    want = out.double() * factor.double()
    backend.scale_(out, factor)
    _check_normal(out, want, "scale_")


def _check_normal(grad: Tensor, exact: Tensor, name: str) -> None:
    """Zero below the smallest normal number, and only there; 1 % around it is not looked at."""
    smallest, size = torch.finfo(torch.float32).tiny, grad.double().abs()
    if ((size > 0) & (size < smallest)).any():
        raise AssertionError(f"{name}: subnormal numbers in a gradient of {grad.dtype}")
    if (size[exact.abs() > 1.01 * smallest] == 0).any():
        raise AssertionError(f"{name}: normal numbers are 0 in a gradient of {grad.dtype}")
    if (size[exact.abs() < 0.99 * smallest] != 0).any():
        raise AssertionError(f"{name}: what is 0 by contract is not in a gradient of {grad.dtype}")


def _check_statistic(name: str, got: Tensor, exact: Tensor, plain: Tensor) -> None:
    scale = exact.abs().max().clamp(min=1)
    if not (got - exact).abs().max() <= LEAST_ERROR * scale:
        assert_within_budget(got, exact, plain, factor=FP32_FACTOR, name=name)


def _check_gradient(grad: Tensor, exact: Tensor, plain: Tensor) -> None:
    factor = FP32_FACTOR if grad.dtype == torch.float32 else ROUNDED_FACTOR
    assert_within_budget(grad, exact, plain.to(grad.dtype), factor=factor, name="gradient")
