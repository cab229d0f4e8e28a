"""Rows over their kept sets, in C++ and plain torch, against the dense row with -inf elsewhere.

`test_cpp_rows.py` runs this file too at every SIMD level.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from fastpo.backends import cpp as cpp_rows
from fastpo.backends import torch as torch_rows
from fastpo.backends.base import KeptGrads, KeptHead, KeptRows, KeptSets
from fastpo.testing.budget import assert_within_budget

pytestmark = pytest.mark.usefixtures("poisoned_empty")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
FACTOR = 4.0  # sums in another order than torch's, over few rows: luck plays a part


@pytest.fixture(params=["cpp", "torch", "triton"])
def backend(request):
    if request.param == "torch":
        return torch_rows
    if request.param == "triton":  # interpreted, where there is no GPU
        return request.getfixturevalue("triton_backend")
    if (reason := cpp_rows.unavailable()) is not None:
        pytest.skip(reason)
    return cpp_rows


@dataclass(frozen=True, kw_only=True)
class KeptCase:
    """Rows of which some keep ids, a head, and row gradients."""

    hidden: Tensor  # (N, D)
    head: KeptHead
    tokens: Tensor  # (N,)
    kept: KeptSets
    temperature: float | Tensor
    c: Tensor  # (N,)
    e: Tensor | None  # (N,)

    @classmethod
    def random(
        cls, sizes, width: int, vocab: int, *, dtype=torch.float32, bias=True, capped=False
    ) -> KeptCase:
        """Row i keeps sizes[i] ids in random order, its token among them."""
        rows = len(sizes)
        chosen = [torch.randperm(vocab)[:size] for size in sizes] or [torch.empty(0).long()]
        pick = [int(torch.randint(max(size, 1), ())) for size in sizes]
        tokens = [int(ids[i]) if len(ids) else 0 for ids, i in zip(chosen, pick, strict=False)]
        return cls(
            hidden=torch.randn(rows, width).to(dtype),
            head=KeptHead(
                (2 * torch.randn(vocab, width) * width**-0.5).to(dtype),
                torch.randn(vocab).to(dtype) if bias else None,
                0.7,
                capped,
            ),
            tokens=torch.tensor(tokens, dtype=torch.int64),
            kept=KeptSets(torch.cat(chosen), torch.tensor([0, *sizes]).cumsum(0)),
            temperature=torch.linspace(0.5, 1.5, rows),
            c=torch.randn(rows),
            e=torch.randn(rows),
        )

    def run(self, backend, *, mask=None, grad_dtype=None, add_to: KeptGrads | None = None):
        """(statistics, logits, gradients); a gradient of 9 stands where none is due."""
        rows = KeptRows(self.hidden, self.head, self.tokens, self.kept, self.temperature)
        stats, logits = backend.kept_stats(rows, mask)
        dtype = grad_dtype or self.hidden.dtype
        bias = self.head.bias
        grads = add_to or KeptGrads(
            torch.full_like(self.hidden, 9, dtype=dtype),
            torch.empty_like(self.head.weight, dtype=dtype),
            None if bias is None else torch.empty_like(bias, dtype=dtype),
        )
        c, e = ((x if mask is None or x is None else x * mask) for x in (self.c, self.e))
        backend.kept_grad(rows, stats, logits, c, e, grads, add=add_to is not None)
        return stats, logits, grads

    def dense(self, dtype: torch.dtype):
        """(logprobs, entropy, KeptGrads) by autograd over rows with -inf where nothing is kept."""
        rows, temperature = len(self.tokens), torch.as_tensor(self.temperature).to(dtype)
        leaves = [self.hidden, self.head.weight, self.head.bias]
        leaves = [None if x is None else x.detach().to(dtype).requires_grad_() for x in leaves]
        hidden, weight, bias = leaves
        z = hidden @ weight.t() + (0 if bias is None else bias)
        z = self.head.gain * z
        z = z.tanh() if self.head.capped else z
        sizes = self.kept.offsets.diff()
        mask = torch.ones_like(z, dtype=torch.bool)
        mask[torch.arange(rows).repeat_interleave(sizes), self.kept.ids] = False
        table = (z / temperature.expand(rows)[:, None]).masked_fill(mask, -math.inf)
        table = torch.where(sizes[:, None] > 0, table, 0.0).log_softmax(1)
        logprobs = table.gather(1, self.tokens[:, None])[:, 0]
        entropy = -(table.exp() * table.masked_fill(mask, 0)).sum(1)
        keeps = sizes > 0
        loss = (self.c.to(dtype) * logprobs)[keeps].sum()
        if self.e is not None:
            loss = loss + (self.e.to(dtype) * entropy)[keeps].sum()
        found = iter(torch.autograd.grad(loss, [x for x in leaves if x is not None]))
        grads = KeptGrads(*(None if x is None else next(found) for x in leaves))
        keep = [x.detach().where(keeps, 0) for x in (logprobs, entropy)]
        return *keep, grads._replace(hidden=grads.hidden.where(keeps[:, None], 9))


def check(backend, case: KeptCase, grad_dtype: torch.dtype | None = None) -> None:
    """Statistics and gradients within the budget of the dense computation in fp32."""
    stats, _, grads = case.run(backend, grad_dtype=grad_dtype)
    exact, plain = case.dense(torch.float64), case.dense(torch.float32)
    for name, got, want, base in zip(("logprobs", "entropy"), stats, exact, plain, strict=False):
        assert_within_budget(got, want, base, factor=FACTOR, name=name)
    for name, got, want, base in zip(grads._fields, grads, exact[2], plain[2], strict=True):
        if got is not None:
            assert_within_budget(got, want, base.to(got.dtype), factor=FACTOR, name=name)


SIZES = [5, 1, 0, 8, 2, 30, 1, 0, 0, 3, 16, 17]


@pytest.mark.parametrize("capped", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 7, 16, 100, 192])
def test_equals_the_dense_row(backend, width, dtype, capped):
    if backend not in (cpp_rows, torch_rows):
        pytest.skip("test_triton_equals_the_dense_row: an interpreter is slow")
    case = KeptCase.random(SIZES, width, 40, dtype=dtype, capped=capped)
    check(backend, case)
    check(backend, replace(case, temperature=0.8, e=None), torch.float32)
    check(backend, replace(case, head=case.head._replace(bias=None)))


@pytest.mark.parametrize(
    ("width", "dtype", "capped"),
    [
        (7, torch.float32, False),
        (600, torch.bfloat16, True),
        pytest.param(192, torch.float16, True, marks=pytest.mark.slow),
        pytest.param(1024, torch.float32, True, marks=pytest.mark.slow),
    ],
)
def test_triton_equals_the_dense_row(triton_backend, width, dtype, capped):
    """Rows of one block of ids and of several, of one block of columns and of two."""
    case = KeptCase.random(SIZES, width, 40, dtype=dtype, capped=capped)
    check(triton_backend, case)
    plain = replace(case, temperature=0.8, e=None, head=case.head._replace(bias=None))
    check(triton_backend, plain, torch.float32)


def test_every_id_kept_is_the_whole_vocabulary(backend):
    check(backend, KeptCase.random([33] * 4, 16, 33))


def test_one_id_is_certain_and_reads_nothing(backend):
    """log p = H = 0 exactly, no gradient, whatever stands in its hidden state or weight row."""
    case = KeptCase.random([1, 4, 1], 16, 40)
    stats, logits, grads = case.run(backend)
    alone = case.kept.ids[[0, -1]]
    poisoned = case.hidden.clone()
    poisoned[::2] = math.nan
    weight = case.head.weight.clone()
    weight[alone[~torch.isin(alone, case.kept.ids[1:-1])]] = math.nan
    again = replace(case, hidden=poisoned, head=case.head._replace(weight=weight)).run(backend)
    for x, y in zip((*stats, logits, *grads), (*again[0], again[1], *again[2]), strict=True):
        assert torch.equal(x, y) and x.isfinite().all()
    assert all((x[::2] == 0).all() for x in stats) and (grads.hidden[::2] == 0).all()


def test_nan_elsewhere_changes_nothing(backend):
    """REGRESSIONS 17: rows without ids, dead rows and weight rows that nobody kept are not read."""
    case = KeptCase.random(SIZES, 16, 100)
    mask = torch.ones(len(SIZES), dtype=torch.bool)
    mask[[3, 9]] = False
    clean = case.run(backend, mask=mask)
    sizes = case.kept.offsets.diff()
    read = mask & (sizes > 1)
    ids = case.kept.ids[read.repeat_interleave(sizes)]
    unread = torch.ones(100, dtype=torch.bool)
    unread[ids] = False
    head = case.head._replace(
        weight=case.head.weight.masked_fill(unread[:, None], math.nan),
        bias=case.head.bias.masked_fill(unread, math.inf),
    )
    hidden = case.hidden.masked_fill(~read[:, None], math.nan)
    again = replace(case, hidden=hidden, head=head).run(backend, mask=mask)
    for x, y in zip((*clean[0], *clean[2]), (*again[0], *again[2]), strict=True):
        assert torch.equal(x, y) and x.isfinite().all()
    assert all((x[~mask] == 0).all() for x in clean[0])
    assert (clean[2].hidden[~mask] == 0).all() and (clean[2].weight[unread] == 0).all()


def test_nan_of_a_kept_row_stays_visible(backend):
    case = KeptCase.random([4, 5, 6], 16, 40)
    hidden = case.hidden.clone()
    hidden[1, 3] = math.nan
    stats, _, grads = replace(case, hidden=hidden).run(backend)
    assert stats.logprobs.isnan().tolist() == [False, True, False]
    assert grads.hidden.isnan().all(1).tolist() == [False, True, False]


def test_ids_at_the_edges(backend):
    """The first and the last id; one id kept by every row; a row's ids in falling order."""
    case = KeptCase.random([2, 3, 2], 16, 40)
    kept = KeptSets(torch.tensor([0, 39, 39, 5, 0, 39, 0]), case.kept.offsets)
    check(backend, replace(case, kept=kept, tokens=torch.tensor([39, 39, 0])))


@pytest.mark.parametrize("sizes", [[], [0, 0, 0], [1, 1]])
@pytest.mark.parametrize("dtype", DTYPES)
def test_nothing_to_do(backend, sizes, dtype):
    """REGRESSIONS 43: no rows, no ids, no gradient: zeros, and a dW of zeros."""
    case = KeptCase.random(sizes, 16, 40, dtype=dtype)
    stats, _, grads = case.run(backend)
    assert all(x.shape == (len(sizes),) and not x.any() for x in stats)
    assert not grads.weight.any() and not grads.bias.any()


def test_a_token_that_is_not_kept_gives_nan(backend):
    """In its own row alone, also where one id is kept."""
    case = KeptCase.random([4, 1, 4, 1], 16, 40)
    outside = torch.tensor([i not in case.kept.ids for i in range(40)]).nonzero()[0, 0]
    tokens = case.tokens.clone()
    tokens[2:] = outside
    stats, *_ = replace(case, tokens=tokens).run(backend)
    assert stats.logprobs.isnan().tolist() == [False, False, True, True]
    assert stats.entropy.isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_adding_to_a_gradient(backend, dtype):
    """Touched rows get old + new, rounded once; the others are not written."""
    case = KeptCase.random([3, 5, 1], 16, 60, dtype=dtype)
    *_, fresh = case.run(backend, grad_dtype=torch.float32)
    before = KeptGrads(*(torch.randn(x.shape).to(dtype) for x in fresh))
    added = KeptGrads(*(x.clone() for x in before))
    case.run(backend, add_to=added)
    for got, old, new in zip(added[1:], before[1:], fresh[1:], strict=True):
        assert torch.equal(got, (old.float() + new).to(dtype))
    assert torch.equal(added.hidden, fresh.hidden.to(dtype))


def test_confident_and_impossible_ids(backend):
    """1 - p of a token near 1 is no difference of rounded numbers; logits of -inf have p = 0."""
    case = KeptCase.random([3, 3], 4, 10, bias=True)
    kept = KeptSets(torch.tensor([1, 2, 3, 4, 5, 6]), case.kept.offsets)
    bias = torch.zeros(10)
    bias[1], bias[5] = 16, -math.inf
    head = KeptHead(torch.zeros(10, 4), bias, 1.0, False)
    case = replace(case, kept=kept, head=head, tokens=torch.tensor([1, 4]), temperature=1.0)
    stats, _, grads = case.run(backend)
    want = case.c[0].double() * 2 / (math.exp(16) + 2)
    confident = replace(case, e=None).run(backend)[2].bias[1]
    if backend is cpp_rows:  # whose sums are in double; plain torch's in fp32 lose 1 + 1e-7
        assert abs(confident / want - 1) < 1e-5
    assert grads.bias[5] == 0 and all(x.isfinite().all() for x in (*stats, *grads))
    torch.testing.assert_close(stats.logprobs[1], torch.tensor(-math.log(2)))


@pytest.mark.parametrize("width", [16, 1000])
def test_bits_do_not_depend_on_threads(width):
    """Pairs are summed in row order, whoever sums them."""
    sizes = torch.randint(0, 9, (300,)).tolist()
    case = KeptCase.random(sizes, width, 64)  # every id in many rows
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            stats, logits, grads = case.run(cpp_rows)
            results.append([*stats, logits, *grads])
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(results[0], other, strict=True))


def test_no_subnormal_leaves(backend):
    """REGRESSIONS 49."""
    case = KeptCase.random([3] * 4, 16, 40)
    tiny = replace(case, c=case.c * 1e-36, e=None)
    for grad in tiny.run(backend)[2]:
        assert not ((grad != 0) & (grad.abs() < torch.finfo(torch.float32).tiny)).any()


def test_wild_reads_are_refused():
    """The last line: the operators check ids and offsets before they read."""
    case = KeptCase.random([3, 2], 16, 40)
    ids, offsets = case.kept
    for kept, words in (
        (KeptSets(ids.clone().fill_(40), offsets), "ids must lie in"),
        (KeptSets(-ids - 1, offsets), "ids must lie in"),
        (KeptSets(ids, torch.tensor([0, 4, 3])), "offsets must rise"),
        (KeptSets(ids, torch.tensor([0, 3, 4])), "offsets must rise"),
        (KeptSets(ids, torch.tensor([1, 3, 5])), "offsets must rise"),
        (KeptSets(ids.int(), offsets), "ids must be"),
    ):
        with pytest.raises(RuntimeError, match=words):
            replace(case, kept=kept).run(cpp_rows)


def test_operators_pass_opcheck():
    case = KeptCase.random([3, 1, 0], 16, 40)
    rows = (case.tokens, *case.kept, 0.8, None)
    ops, head = torch.ops.fastpo, case.head
    arguments = (case.hidden, head.weight, head.bias, *rows, 1.0, True, None)
    torch.library.opcheck(ops.cpp_kept_stats.default, arguments)
    *stats, logits = ops.cpp_kept_stats(*arguments)
    grads = (torch.zeros(3, 16), torch.zeros(40, 16), torch.zeros(40, 1))
    arguments = (case.hidden, head.weight, *rows, 1.0, True, logits, *stats, case.c, case.e, *grads)
    torch.library.opcheck(ops.cpp_kept_grad.default, (*arguments, False))
