"""Sequences split over ranks: a rank's share of the loss, and what the shares add up to.

Against one process with the whole sequences, which the tests of the objectives compare with
closed forms.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass, replace

import pytest
import torch
import torch.distributed as dist
from ranks import run_rank, run_ranks
from torch import Tensor

import fastpo
from fastpo.objective import AGGREGATIONS
from fastpo.testing.budget import assert_within_budget
from fastpo.testing.objectives import PRESETS

V, D = 97, 16
LENGTHS = (9, 1, 0, 14, 6, 5)
MIXED, EMPTIED = 3, 4  # masked on one rank; masked on all
PER_TOKEN = ("advantages", "mask", "old_logprobs", "ref_logprobs", "importance_weights")


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Sequences packed to [N], or [B, T], or the part of them that a rank has."""

    tokens: Tensor
    hidden: Tensor  # [..., D]
    weight: Tensor  # (V, D)
    options: dict[str, object]

    @classmethod
    def random(cls, *, packed: bool, masked: bool = True, dtype=torch.float64) -> Batch:
        gen = torch.Generator().manual_seed(1)
        shape = (sum(LENGTHS),) if packed else (len(LENGTHS), 8)

        def normal(*size: int) -> Tensor:
            return torch.randn(size, generator=gen, dtype=torch.float64).to(dtype)

        hidden, weight = normal(*shape, D), normal(V, D)
        tokens = torch.randint(V, shape, generator=gen)
        logprobs = (hidden @ weight.T).log_softmax(-1).gather(-1, tokens[..., None])[..., 0]
        batch = cls(
            tokens=tokens,
            hidden=hidden,
            weight=weight,
            options={
                "advantages": normal(*shape),
                "old_logprobs": logprobs + 0.2 * normal(*shape),
                "ref_logprobs": logprobs + 0.2 * normal(*shape),
                "importance_weights": 0.5 + normal(*shape).abs(),
                "cu_seqlens": offsets_of(LENGTHS) if packed else None,
            },
        )
        if masked:
            ids, owner = batch.sequences(), batch.owners(2)
            mask = torch.rand(shape, generator=gen) > 0.3
            mask &= (ids != EMPTIED) & ~((ids == MIXED) & (owner == 0))
            batch.options["mask"] = mask
            batch.options["old_logprobs"][~mask] = math.nan
        return batch

    def sequences(self) -> Tensor:
        """[...] the sequence of every token."""
        if self.tokens.ndim == 2:
            return torch.arange(len(LENGTHS))[:, None].expand_as(self.tokens)
        return torch.arange(len(LENGTHS)).repeat_interleave(torch.tensor(LENGTHS))

    def owners(self, ranks: int) -> Tensor:
        """[...] who has the token: of 2 * ranks pieces the first and last are rank 0's, and so on,
        as causal attention is balanced."""
        ids = self.sequences()
        first = torch.arange(ids.numel()).view(ids.shape)
        first = first - torch.searchsorted(ids.reshape(-1), ids)  # position in the sequence
        length = torch.bincount(ids.reshape(-1), minlength=len(LENGTHS))[ids]
        piece = first * 2 * ranks // length
        return torch.minimum(piece, 2 * ranks - 1 - piece)

    def part(self, rank: int, ranks: int) -> tuple[Batch, Tensor]:
        """A rank's tokens, and which of all they are."""
        own = self.owners(ranks) == rank
        shape = (own.sum(),) if self.tokens.ndim == 1 else (len(LENGTHS), -1)

        def rows(x: Tensor) -> Tensor:
            return x[own].view(*shape, *x.shape[own.ndim :])

        options = {
            name: rows(x) if name in PER_TOKEN and x.shape == own.shape else x
            for name, x in self.options.items()
        }
        if self.tokens.ndim == 1:
            lengths = torch.bincount(self.sequences()[own], minlength=len(LENGTHS))
            options["cu_seqlens"] = offsets_of(lengths)
        part = replace(self, tokens=rows(self.tokens), hidden=rows(self.hidden), options=options)
        return part, own

    def arguments(self, objective: object) -> dict[str, object]:
        options = self.options | {"objective": objective}
        return options | ({} if getattr(objective, "kl_coef", 0) else {"ref_logprobs": None})

    def from_logprobs(self, objective: object, **extra: object):
        """Result, and the gradients of log-probs and entropies that are leaves here."""
        scores = (self.hidden @ self.weight.T).log_softmax(-1)
        logprobs = scores.gather(-1, self.tokens[..., None])[..., 0].clone().requires_grad_()
        entropy = -(scores.exp() * scores).sum(-1).requires_grad_()
        given = self.arguments(objective) | extra
        result = fastpo.policy_loss_from_logprobs(logprobs, entropy=entropy, **given)
        leaves = (logprobs, entropy)
        return result, torch.autograd.grad(result.loss, leaves, materialize_grads=True)

    def linear(self, objective: object, *, on_logits: bool = False, **extra: object):
        """Result, and the gradients of the hidden states and the head."""
        leaves = [x.clone().requires_grad_() for x in (self.hidden, self.weight)]
        given = self.arguments(objective) | {"tokens": self.tokens} | extra
        if on_logits:
            result = fastpo.policy_loss(leaves[0] @ leaves[1].T, **given)
        else:
            result = fastpo.linear_policy_loss(*leaves, **given)
        return result, torch.autograd.grad(result.loss, leaves)


def offsets_of(lengths) -> Tensor:
    return torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)


def summed(share: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    total = share.detach().clone()
    dist.all_reduce(total, group=group)
    return total


def close(actual: Tensor, expected: Tensor, what: str) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-13, msg=what)


def same_sums(part, whole, what: str) -> None:
    """Loss and metrics of the shares add up to those of one process."""
    close(summed(part.loss), whole.loss.detach(), what)
    assert part.metrics.keys() == whole.metrics.keys()
    for name, value in whole.metrics.items():
        close(summed(part.metrics[name]), value, f"{what}: {name}")


def aggregated(objective: fastpo.Objective, aggregation: str) -> fastpo.Objective:
    most = 64 if aggregation == "constant" else None
    return replace(objective, aggregation=aggregation, max_length=most)


def every_preset(rank: int, ranks: int, *, packed: bool = True, masked: bool = True) -> None:
    whole = Batch.random(packed=packed, masked=masked)
    part, own = whole.part(rank, ranks)
    for name, preset in PRESETS.items():
        for aggregation in AGGREGATIONS:
            objective, what = aggregated(preset, aggregation), f"{name}, {aggregation}"
            expected, want = whole.from_logprobs(objective)
            result, got = part.from_logprobs(objective, cp_group=dist.group.WORLD)
            same_sums(result, expected, what)
            for x, y in zip(got, want, strict=True):
                close(x.reshape(-1), y[own], what)


def other_layouts(rank: int, ranks: int) -> None:
    every_preset(rank, ranks, packed=False)
    every_preset(rank, ranks, masked=False)


@pytest.mark.slow
def test_every_preset_padded_and_unmasked_on_two_ranks(tmp_path):
    """REGRESSIONS 72."""
    run_ranks(tmp_path, 2, other_layouts)


SEQUENCE_LEVEL = {
    name: PRESETS[name] for name in ("gspo", "luspo", "gspo_token", "gmpo", "vespo", "grpo_kl")
} | {
    "gspo_kl": fastpo.gspo(kl_coef=0.1, kl_ratio_weighted=True, ratio_max=1.5),
    "rule": fastpo.loss_rule(aggregation="sequence_mean")(
        lambda logprobs, entropy, tokens: -tokens.advantages * logprobs - 0.1 * entropy
    ),
}


def every_option(rank: int, ranks: int) -> None:
    group = {"cp_group": dist.group.WORLD}
    whole = Batch.random(packed=True)
    weights = torch.tensor([[1.5], [0.5], [1.0], [0.7], [math.nan], [1.2]], dtype=torch.float64)
    per_sequence = {"advantages": 1.3 - weights.nan_to_num(), "importance_weights": weights}
    for given in ({}, per_sequence, {"normalizer": 11}):
        batch = replace(whole, options=whole.options | given)
        part, own = batch.part(rank, ranks)
        for name, objective in SEQUENCE_LEVEL.items():
            if "normalizer" in given and name not in ("gspo", "grpo_kl"):
                continue
            expected, want = batch.linear(objective, backend="torch")
            for on_logits in (False, True):
                result, got = part.linear(objective, on_logits=on_logits, backend="torch", **group)
                what = f"{name}, {list(given)}, on logits {on_logits}"
                same_sums(result, expected, what)
                close(got[0], want[0][own], what)
                close(summed(got[1]), want[1], what)


def every_way(rank: int, ranks: int) -> None:
    """Kept sets in all or some rows, which is for each rank to see; fp32 within its budget."""
    for dtype, dense in ((torch.float64, True), (torch.float64, False), (torch.float32, None)):
        whole = Batch.random(packed=True, dtype=dtype)
        part, own = whole.part(rank, ranks)
        sets = [[], []]  # every rank's own
        if dense is not None:
            sets = kept_sets(whole, torch.ones_like(own), dense), kept_sets(whole, own, dense)
        for name in ("gspo", "gmpo", "vespo"):
            objective = SEQUENCE_LEVEL[name]
            alone, want = whole.linear(objective, **dict(sets[0]))
            result, got = part.linear(objective, cp_group=dist.group.WORLD, **dict(sets[1]))
            if dtype == torch.float64:
                same_sums(result, alone, f"{name}, kept, dense {dense}")
                close(got[0], want[0][own], name)
                close(summed(got[1]), want[1], name)
                continue
            exact, true = Batch.random(packed=True).linear(objective, backend="torch")
            torch.testing.assert_close(summed(result.loss), exact.loss.float().detach())
            assert_within_budget(got[0], true[0][own], want[0][own], factor=4, name=name)
            assert_within_budget(summed(got[1]), true[1], want[1], factor=4, name=name)


def kept_sets(whole: Batch, own: Tensor, dense: bool) -> dict[str, Tensor]:
    """The token's own id and the 8 after it, for the tokens that `own` marks; with `dense`, every
    third token of rank 0's kept nothing."""
    ids = (whole.tokens[:, None] + torch.arange(9)) % V
    sizes = torch.full_like(whole.tokens, 9)
    if dense:
        sizes[(torch.arange(len(sizes)) % 3 == 0) & (whole.owners(2) == 0)] = 0
    ids, sizes = ids[own & (sizes > 0)], sizes[own]
    return {"kept_tokens": ids.reshape(-1), "kept_offsets": offsets_of(sizes.tolist())}


CORRECTIONS = (
    {"level": "token", "mode": "truncate", "high": 1.2, "normalize": True},
    {"level": "sequence", "mode": "mask", "low": 0.8, "high": 1.3, "normalize": True},
    {"level": "geometric", "mode": "reject", "low": 0.95, "high": 1.05},
    {"level": "token", "mode": "none", "reject": {"seq_max_k2": 0.05, "seq_sum_k1": (0.5, 2.0)}},
    {"level": "token", "mode": "none", "reject": {"seq_mean_k3": 0.02, "token_k2": 0.1}},
    {"level": "sequence", "mode": "truncate", "off_policy_threshold": 0.02},
)


def corrections(rank: int, ranks: int) -> None:
    """Weights and masks are of a rank's tokens, metrics of all."""
    whole = Batch.random(packed=True)
    part, own = whole.part(rank, ranks)
    for settings in CORRECTIONS:
        results = []
        for batch, group in ((whole, None), (part, dist.group.WORLD)):
            given = {name: batch.options[name] for name in ("mask", "cu_seqlens")}
            if "off_policy_threshold" in settings:
                given["advantages"] = batch.options["advantages"]
            pair = (batch.options["old_logprobs"], batch.options["ref_logprobs"])
            results.append(fastpo.rollout_correction(*pair, cp_group=group, **given, **settings))
        alone, result = results
        close(result.weights, alone.weights[own], str(settings))
        assert torch.equal(result.mask, alone.mask[own])
        assert 0 < alone.metrics["cut"] < 1
        for name, value in alone.metrics.items():
            close(result.metrics[name], value, f"{settings}: {name}")


def nothing_at_all(rank: int) -> None:
    """One rank has all the tokens: the other makes the same collectives, and none per token."""
    whole = Batch.random(packed=True)
    none = torch.zeros_like(whole.tokens, dtype=torch.bool)
    empty = {n: x[none] for n, x in whole.options.items() if n in PER_TOKEN}
    empty["cu_seqlens"] = torch.zeros_like(whole.options["cu_seqlens"])
    options = whole.options if rank == 1 else empty
    part = replace(whole, options=options)
    if rank == 0:
        part = replace(part, tokens=whole.tokens[none], hidden=whole.hidden[none])
    for name, objective in SEQUENCE_LEVEL.items():
        expected, want = whole.linear(objective, backend="torch")
        calls = []
        all_reduce, dist.all_reduce = dist.all_reduce, counted(dist.all_reduce, calls)
        result, got = part.linear(objective, backend="torch", cp_group=dist.group.WORLD)
        dist.all_reduce = all_reduce
        if name == "gspo":  # the check on CPU; lengths; (sum d, count); what is made of the ratio
            assert calls == [(2,), (6,), (2, 6), (2, 6)]
        same_sums(result, expected, name)
        close(summed(got[1]), want[1], name)
        if rank == 1:
            close(got[0], want[0], name)


def counted(all_reduce, calls: list):
    def counting(tensor: Tensor, *args, **kwargs):
        calls.append(tuple(tensor.shape))
        return all_reduce(tensor, *args, **kwargs)

    return counting


def refusals(rank: int) -> None:
    group = {"cp_group": dist.group.WORLD}
    part, _ = Batch.random(packed=True).part(rank, 2)
    padded, _ = Batch.random(packed=False).part(rank, 2)
    offsets = part.options["cu_seqlens"]
    if rank == 1:  # leaves out the sequence of which it has nothing
        offsets = torch.cat([offsets[:1], offsets[2:]])
    for objective in (fastpo.gspo(), fastpo.grpo()):
        with pytest.raises(ValueError, match=r"ranks of cp_group have \[6, 5\] sequences, .*empty"):
            part.linear(objective, cu_seqlens=offsets, **group)
    part.linear(fastpo.dapo(), cu_seqlens=offsets, **group)  # does not ask
    for batch, shape, wanted in ((part, [6], r"\[6, 1\]"), (padded, [6, 1], r"\[6\]")):
        with pytest.raises(ValueError, match=rf"advantages has shape .* per sequence as {wanted}"):
            batch.from_logprobs(fastpo.gspo(), advantages=torch.ones(shape), **group)
    with pytest.raises(ValueError, match=r"'constant' on a rank's part .* needs Objective.max_l"):
        padded.from_logprobs(fastpo.dr_grpo(), **group)
    with pytest.raises(ValueError, match=r"ranks of cp_group have \[6, 5\] sequences"):
        old = part.options["old_logprobs"]
        fastpo.rollout_correction(old, old, level="sequence", cu_seqlens=offsets, **group)
    rule = fastpo.loss_rule(couples_sequences=True)(lambda logprobs, entropy, tokens: logprobs)
    with pytest.raises(ValueError, match="cp_group with the rule <lambda>, which couples"):
        part.linear(rule, **group)


def all_on_two(rank: int, ranks: int) -> None:
    every_preset(rank, ranks)
    every_option(rank, ranks)
    every_way(rank, ranks)
    corrections(rank, ranks)
    nothing_at_all(rank)
    refusals(rank)


def test_every_preset_aggregation_and_op_on_two_ranks(tmp_path):
    """REGRESSIONS 72: a sequence with no token on a rank, masked on one, masked on all; gradients
    of log-probs, entropies, hidden states and head; kept sets; a rank without any token."""
    run_ranks(tmp_path, 2, all_on_two)


def both_groups(rank: int, ranks: int) -> None:
    """A head sharded over neighbours, sequences over every second rank."""
    mesh = dist.device_mesh.init_device_mesh("cpu", (2, 2), mesh_dim_names=("cp", "tp"))
    cp, tp = mesh["cp"].get_group(), mesh["tp"].get_group()
    columns = slice(0, 40) if tp.rank() == 0 else slice(40, V)
    whole = Batch.random(packed=True)
    part, own = whole.part(cp.rank(), 2)
    part = replace(part, weight=whole.weight[columns].clone())
    for name, objective in SEQUENCE_LEVEL.items():
        expected, want = whole.linear(objective, backend="torch")
        groups = {"cp_group": cp, "tp_group": tp, "backend": "torch"}
        result, got = part.linear(objective, **groups)
        close(summed(result.loss, cp), expected.loss.detach(), name)
        close(got[0], want[0][own], name)
        close(summed(got[1], cp), want[1][columns], name)


@pytest.mark.slow
def test_with_a_sharded_head_on_four_ranks(tmp_path):
    """REGRESSIONS 72."""
    run_ranks(tmp_path, 4, both_groups)


def test_a_group_that_is_none():
    with pytest.raises(TypeError, match=r"cp_group is str, .* tokens of every sequence are split"):
        Batch.random(packed=True).from_logprobs(fastpo.gspo(), cp_group="cp")


if __name__ == "__main__":
    run_rank(*sys.argv[1:], globals())
