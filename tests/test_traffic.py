"""Bytes that the kernels ask of memory, counted exactly: the traffic floor, and the peers'."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl

from fastpo.backends import triton as triton_rows
from fastpo.backends.base import RowInputs
from fastpo.objective import Objective
from fastpo.testing.rows import RowCase, run_policy_loss
from fastpo.testing.traffic import count_traffic

pytestmark = [
    pytest.mark.usefixtures("triton_backend"),
    pytest.mark.skipif(isinstance(tl.sum, triton.JITFunction), reason="counts interpreted kernels"),
]

DTYPES = [torch.bfloat16, torch.float32]
V = 32768
EVERYTHING = Objective(kl_coef=0.1, entropy_coef=0.05)
H100_SMS, H100_L2 = 132, 50 << 20


def random_case(vocab: int, dtype: torch.dtype, rows: int = 2) -> RowCase:
    return RowCase.random(rows, vocab, EVERYTHING, dtype=dtype)


@triton.jit
def _copy_twice_kernel(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i, mask=i < n)
    again = tl.load(x_ptr + i, mask=i < n)
    tl.store(y_ptr + i, x + again, mask=i < n)
    tl.atomic_add(y_ptr + i, x, mask=i < n)


def test_the_counter_counts():
    """A kernel of known traffic: two loads, one store, one atomic of n floats; no masked lane."""
    n = 200
    storage = torch.zeros(n + 64)
    x = storage[(-storage.data_ptr() // 4) % 16 :][:n]  # at a sector's beginning
    with count_traffic() as traffic:
        _copy_twice_kernel[(2,)](x, torch.zeros(n), n, BLOCK=128)
    kernel = traffic.kernels["_copy_twice_kernel"]
    assert (kernel.launches, kernel.load_bytes, kernel.store_bytes) == (1, 8 * n, 4 * n)
    assert kernel.atomic_bytes == 8 * n
    assert (kernel.reread_bytes, kernel.reuse_window) == (4 * n, 0)
    assert traffic.total_bytes == 20 * n and traffic.dram_bytes == 16 * n
    assert "total 5.0000" in traffic.report(unit=4 * n)
    _copy_twice_kernel[(2,)](x, torch.zeros(n), n, BLOCK=128)
    assert kernel.launches == 1  # nothing counts outside


@pytest.mark.parametrize("dtype", DTYPES)
def test_row_stats_reads_once(dtype):
    case = random_case(V, dtype)
    with count_traffic() as traffic:
        triton_rows.row_stats(case.logits, case.tokens, 1.0)
    assert traffic.total_bytes <= 1.01 * case.logits.nbytes


@pytest.mark.parametrize("dtype", DTYPES)
def test_row_grad_reads_once_and_writes_once(dtype):
    case = random_case(V, dtype)
    stats = triton_rows.row_stats(case.logits, case.tokens, 1.0)
    c, e = case.inputs.advantages, case.inputs.weight
    with count_traffic() as traffic:
        triton_rows.row_grad(case.logits, case.tokens, stats, c, e, 1.0, case.logits)
    assert traffic.total_bytes <= 2.01 * case.logits.nbytes


@pytest.mark.parametrize("inplace", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_policy_loss_at_32768(dtype, inplace):
    """One launch. The whole row is kept in registers: what it costs is the floor."""
    case = random_case(V, dtype)
    with count_traffic() as traffic:
        run_policy_loss(triton_rows, case, EVERYTHING, inplace=inplace)
    (kernel,) = traffic.kernels.values()
    size = case.logits.nbytes
    assert kernel.launches == 1
    assert kernel.dram_bytes <= kernel.total_bytes <= 2.01 * size
    assert H100_SMS * kernel.reuse_window <= H100_L2


@pytest.mark.parametrize(
    ("vocab", "dtype", "factor"),
    [
        (151936, torch.bfloat16, 2.76),
        pytest.param(151936, torch.float32, 2.81, marks=pytest.mark.slow),
        pytest.param(128256, torch.bfloat16, 2.64, marks=pytest.mark.slow),
        pytest.param(50257, torch.bfloat16, 2.82, marks=pytest.mark.slow),
    ],
)
def test_policy_loss_of_long_rows(vocab, dtype, factor):
    """All but the tail is read twice; what is, one row per SM, fits an H100's L2 in bf16."""
    case = random_case(vocab, dtype, rows=1)
    with count_traffic() as traffic:
        run_policy_loss(triton_rows, case, EVERYTHING, inplace=True)
    (kernel,) = traffic.kernels.values()
    assert kernel.total_bytes <= factor * case.logits.nbytes
    assert kernel.dram_bytes <= 2.01 * case.logits.nbytes
    if dtype == torch.bfloat16:
        assert H100_SMS * kernel.reuse_window <= H100_L2


@pytest.mark.parametrize("dtype", DTYPES)
def test_dead_and_clipped_rows_cost_their_zeros_only(dtype):
    """Masked rows: the zero-fill. Unmasked rows with c = 0: one read and the zero-fill."""
    case = random_case(V, dtype)
    dead = RowInputs(*(torch.zeros(2) if x is None else x for x in case.inputs))
    dead = dead._replace(weight=torch.zeros(2), entropy_weight=torch.zeros(2))
    clipped = RowInputs(torch.ones(2), torch.zeros(2), None, None, None)
    plain = Objective()
    for inputs, objective, expected in ((dead, EVERYTHING, 1), (clipped, plain, 2)):
        with count_traffic() as traffic:
            arguments = (case.logits, case.tokens, inputs, objective, 1.0)
            triton_rows.row_policy_loss(*arguments, torch.empty_like(case.logits))
        (kernel,) = traffic.kernels.values()
        assert abs(kernel.total_bytes / case.logits.nbytes - expected) < 0.01
    mask = torch.zeros(2, dtype=torch.bool)
    with count_traffic() as traffic:
        triton_rows.row_stats(case.logits, case.tokens, 1.0, mask)
    assert traffic.total_bytes < 200


@pytest.mark.parametrize("factor", [1.0, 0.5])
def test_scaling_by_one_touches_nothing(factor):
    grad = torch.randn(2, V)
    with count_traffic() as traffic:
        triton_rows.scale_(grad, torch.tensor(factor))
    assert traffic.total_bytes == 8 + (0 if factor == 1 else 2 * grad.nbytes)


def liger_grpo(logits, tokens, old, advantages):
    """Forward and backward of Liger's Triton GRPO loss; it takes one position more than tokens."""
    from liger_kernel.ops.grpo_loss import GrpoLossFunction

    padded = torch.cat([logits, logits[:, -1:]], 1).requires_grad_()
    clips_and_inplace = (0.2, 0.2, True)
    loss, *_ = GrpoLossFunction.apply(
        *(padded, old, None, tokens, advantages, torch.ones_like(tokens)),
        *(1.0, 0.0, *clips_and_inplace, "grpo", None, False),
    )
    loss.sum().backward()


def trl_logprobs(logits, tokens, old, advantages):
    """Forward and backward of TRL's log-prob and entropy kernels under a clipped loss."""
    from trl.kernels.logprob_entropy import selective_log_softmax_and_entropy

    leaf = logits.detach().requires_grad_()
    logprobs, _ = selective_log_softmax_and_entropy(leaf, tokens)
    ratio = (logprobs - old).exp()
    advantages = advantages[:, None]
    loss = -torch.min(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages)
    loss.sum().backward()


@pytest.mark.peer
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("peer", [liger_grpo, trl_logprobs])
def test_peers_ask_for_more(peer, dtype, capsys):
    """The same counter on Liger's and TRL's kernels: 3 N V where fastpo needs 2."""
    pytest.importorskip("liger_kernel" if peer is liger_grpo else "trl")
    case = random_case(V, dtype)
    with count_traffic() as ours:
        run_policy_loss(triton_rows, case, EVERYTHING, inplace=True)
    batch = (case.logits[None], case.tokens[None], case.inputs.old_logprobs[None])
    with count_traffic() as theirs:
        peer(*batch, case.inputs.advantages[:1])
    with capsys.disabled():
        for name, traffic in (("fastpo", ours), (peer.__name__, theirs)):
            print(f"\n{name} {dtype}, V = {V}:\n{traffic.report(case.logits.nbytes)}")
    assert ours.total_bytes <= 2.01 * case.logits.nbytes
    assert theirs.total_bytes >= 2.99 * case.logits.nbytes
