"""Bytes that the kernels of kept sets ask of memory, counted exactly and split by what they are.

The floor is one read of a row's hidden state and of the head's rows that it kept, and one write of
each gradient. What lies above it comes from L1 or L2 (`dram_bytes`), but for numbers per id.
"""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl

from fastpo.backends import triton as triton_rows
from fastpo.backends.base import KeptGrads, KeptHead, KeptRows, KeptSets
from fastpo.testing.traffic import KernelTraffic, count_traffic

pytestmark = [
    pytest.mark.usefixtures("triton_backend"),
    pytest.mark.skipif(isinstance(tl.sum, triton.JITFunction), reason="counts interpreted kernels"),
]

D, V, IDS, COLUMNS = 1024, 96, 8, 512  # the last two: what a program reads at a time
KEPT = 24  # ids of a row, a multiple of IDS
SIZES = [KEPT, 1, KEPT, 0, KEPT]  # of five rows, of which the last is masked
READ = 2  # rows that are read
ROW = 2 * D  # bytes of a hidden state, or of a row of the head


def bf16(*shape: int) -> torch.Tensor:
    """At the beginning of a sector, as torch's GPU allocator leaves them."""
    count = torch.Size(shape).numel()
    storage = torch.randn(count + 16).bfloat16()
    return storage[-(storage.data_ptr() // 2) % 16 :][:count].view(shape)


@pytest.fixture
def counts(triton_backend) -> dict[str, KernelTraffic]:
    """{kernel: its traffic} of a forward and a backward pass."""
    hidden, weight = bf16(len(SIZES), D), bf16(V, D)
    weight.mul_(D**-0.5)  # no p underflows: a slope of 0 reads nothing
    ids = torch.cat([torch.randperm(V)[:size] for size in SIZES])
    offsets = torch.tensor([0, *torch.tensor(SIZES).cumsum(0)])
    tokens = torch.tensor([int(ids[start]) if start < len(ids) else 0 for start in offsets[:-1]])
    mask = torch.tensor([True, True, True, True, False])
    head = KeptHead(weight, None, 1.0, False)
    rows = KeptRows(hidden, head, tokens, KeptSets(ids, offsets), 1.0)
    c = torch.ones(len(SIZES)) * mask
    grads = KeptGrads(bf16(len(SIZES), D), bf16(V, D), None)
    with count_traffic() as traffic:
        stats, logits = triton_rows.kept_stats(rows, mask)
        triton_rows.kept_grad(rows, stats, logits, c, None, grads)
    assert all(kernel.launches == 1 for kernel in traffic.kernels.values())
    return traffic.kernels


def check(kernel: KernelTraffic, floor: int, again: int, numbers: int) -> None:
    """Exactly `floor`, what the same program asks for `again`, and numbers of rows and ids."""
    assert kernel.total_bytes == floor + again + numbers
    assert floor <= kernel.dram_bytes <= floor + numbers


def test_statistics_read_a_row_and_what_it_kept(counts):
    """(k + k / 8) / (k + 1) of the floor; rows of one id and masked ones cost their numbers."""
    rows = 8 + 16 + 1 + 16  # token, two offsets, mask; four statistics
    ids = READ * KEPT * 8 + 8 + 4 * sum(SIZES)  # int64 ids in, fp32 logits out
    floor = READ * (1 + KEPT) * ROW
    again = READ * (KEPT // IDS - 1) * ROW  # the hidden state, for the next 8 ids
    check(counts["_kept_stats_kernel"], floor, again, len(SIZES) * rows + ids)


def test_the_gradient_of_hidden_states_reads_what_was_kept_once(counts):
    rows = 8 + 16 + 4 + 16  # token, two offsets, c, four statistics
    ids = (8 + 4 + 4) * sum(SIZES)  # ids and logits in, slopes out
    again = D // COLUMNS * (8 + 4) * sum(SIZES)  # ids and slopes, for every piece of columns
    written = sum(size > 0 for size in SIZES)
    floor = READ * KEPT * ROW + written * ROW
    check(counts["_kept_hidden_grad_kernel"], floor, 0, len(SIZES) * rows + ids + again)


def test_the_gradient_of_the_head_writes_each_row_once(counts):
    """And reads a hidden state for every id that its row kept."""
    pairs = D // COLUMNS * (8 + 4 + 8) * sum(SIZES)  # its place, slope and row, for every piece
    floor = READ * KEPT * ROW + V * ROW
    check(counts["_kept_weight_grad_kernel"], floor, 0, V * 16 + pairs)
