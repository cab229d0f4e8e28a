"""Every wrong argument of the ops: what was got, what is expected, what to do."""

from __future__ import annotations

import pytest
import torch

import fastpo
from fastpo import backends

B, T, V = 2, 3, 11


def good(**changes):
    """Arguments of a valid call; each test breaks one of them."""
    call = {
        "logits": torch.randn(B, T, V),
        "tokens": torch.zeros(B, T, dtype=torch.long),
        "advantages": torch.ones(B),
        "objective": fastpo.dapo(),
        "mask": torch.ones(B, T, dtype=torch.bool),
        "old_logprobs": torch.zeros(B, T),
    }
    return call | changes


BAD = {
    "logits is a list": ({"logits": [[1.0]]}, TypeError, r"logits is list, expected a tensor"),
    "logits are integers": (
        {"logits": torch.zeros(B, T, V, dtype=torch.long)},
        TypeError,
        r"torch.int64, expected float32, bfloat16 or float16",
    ),
    "logits are 1-d": ({"logits": torch.zeros(V)}, ValueError, r"\[11\], expected \[N, V\]"),
    "logits without a vocabulary": (
        {"logits": torch.zeros(B, T, 0)},
        ValueError,
        r"V is 0, expected at least 1",
    ),
    "logits with a strided vocabulary": (
        {"logits": torch.randn(B, V, T).transpose(1, 2)},
        ValueError,
        r"stride 3 in its last dimension, expected 1: call .contiguous\(\)",
    ),
    "tokens not a tensor": ({"tokens": 3}, TypeError, r"tokens is int"),
    "tokens of another shape": (
        {"tokens": torch.zeros(B, T + 1, dtype=torch.long)},
        ValueError,
        r"tokens has shape \[2, 4\], expected \[2, 3\].*never shift",
    ),
    "tokens are floats": ({"tokens": torch.zeros(B, T)}, TypeError, r"expected int64 or int32"),
    "tokens outside the vocabulary": (
        {"tokens": torch.full((B, T), V)},
        ValueError,
        r"tokens\[0, 0\] is 11, expected an id in \[0, 11\)",
    ),
    "negative tokens": (
        {"tokens": torch.full((B, T), -100)},
        ValueError,
        r"is -100, expected an id in \[0, 11\): .*pass mask=tokens != -100",
    ),
    "tokens on another device": (
        {"tokens": torch.zeros(B, T, dtype=torch.long, device="meta")},
        ValueError,
        r"tokens is on meta, expected cpu",
    ),
    "advantages of a wrong shape": (
        {"advantages": torch.ones(B + 1)},
        ValueError,
        r"advantages has shape \[3\], expected one per token, \[2, 3\] or one per sequence, \[2\]",
    ),
    "advantages are integers": (
        {"advantages": torch.ones(B, dtype=torch.long)},
        TypeError,
        r"advantages has dtype torch.int64, expected a floating dtype",
    ),
    "advantages is a list": ({"advantages": [1.0, 2.0]}, TypeError, r"advantages is list"),
    "mask of floats": (
        {"mask": torch.ones(B, T)},
        TypeError,
        r"expected torch.bool: call mask.bool\(\)",
    ),
    "mask of other integers": (
        {"mask": torch.full((B, T), 2)},
        ValueError,
        r"mask holds 2, expected bool, or integers that are 0 or 1: call mask.bool\(\)",
    ),
    "mask of a wrong shape": (
        {"mask": torch.ones(B, dtype=torch.bool)},
        ValueError,
        r"mask has shape \[2\], expected \[2, 3\]",
    ),
    "old_logprobs of a wrong shape": (
        {"old_logprobs": torch.zeros(B, T - 1)},
        ValueError,
        r"old_logprobs has shape \[2, 2\]",
    ),
    "objective is a string": (
        {"objective": "dapo"},
        TypeError,
        r"objective is str, expected a fastpo.Objective, e.g. fastpo.dapo\(\)",
    ),
    "objective is a preset that was not called": (
        {"objective": fastpo.dapo},
        TypeError,
        r"objective is the preset dapo itself, .*: call it, fastpo.dapo\(\)",
    ),
    "KL without a reference": (
        {"objective": fastpo.dapo(kl_coef=0.1)},
        ValueError,
        r"kl_coef=0.1 but ref_logprobs is None: pass",
    ),
    "a reference without KL": (
        {"ref_logprobs": torch.zeros(B, T)},
        ValueError,
        r"kl_coef=0 and would ignore them",
    ),
    "temperature 0": ({"temperature": 0.0}, ValueError, r"is 0.0, expected a finite number > 0"),
    "temperature NaN": ({"temperature": float("nan")}, ValueError, r"is nan, expected a finite"),
    "temperature infinite": ({"temperature": float("inf")}, ValueError, r"is inf, expected a fin"),
    "infinite temperature of a token": (
        {"temperature": torch.tensor([[1.0, 1.0, torch.inf]] * B)},
        ValueError,
        r"not finite and positive on an unmasked row",
    ),
    "temperature of 400 digits": ({"temperature": 10**400}, ValueError, r"an integer of 1329 bits"),
    "normalizer of 400 digits": ({"normalizer": 10**400}, ValueError, r"an integer of 1329 bits"),
    "temperature is a string": ({"temperature": "hot"}, TypeError, r"temperature is str"),
    "negative temperature of a token": (
        {"temperature": torch.tensor([[1.0, 1.0, -1.0]] * B)},
        ValueError,
        r"not finite and positive on an unmasked row",
    ),
    "temperature per sequence": (
        {"temperature": torch.ones(B)},
        ValueError,
        r"temperature has shape \[2\], expected \[2, 3\] or a Python float",
    ),
    "negative normalizer": ({"normalizer": -1}, ValueError, r"expected a finite count >= 0"),
    "normalizer per sequence": (
        {"normalizer": torch.ones(B)},
        ValueError,
        r"expected a 0-d tensor or a number",
    ),
    "normalizer is a bool": ({"normalizer": True}, TypeError, r"normalizer is bool"),
    "normalizer is a bool tensor": (
        {"normalizer": torch.tensor(True)},
        TypeError,
        r"normalizer has dtype torch.bool, expected a count",
    ),
    "normalizer is a negative tensor": (
        {"normalizer": torch.tensor(-3.0)},
        ValueError,
        r"normalizer is -3.0, expected a finite count >= 0",
    ),
    "cu_seqlens on a padded batch": (
        {"cu_seqlens": torch.tensor([0, 3, 6])},
        ValueError,
        r"flatten the batch to \[N\], or leave cu_seqlens None",
    ),
    "unknown backend": ({"backend": "cudnn"}, ValueError, r"'cudnn', expected one of torch, cpp"),
    "importance weights of a wrong shape": (
        {"importance_weights": torch.ones(T)},
        ValueError,
        r"importance_weights has shape \[3\]",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_policy_loss_refuses(case):
    changes, error, message = BAD[case]
    call = good(**changes)
    with pytest.raises(error, match=message):
        fastpo.policy_loss(call.pop("logits"), call.pop("tokens"), call.pop("advantages"), **call)


SHARED = [
    case
    for case in BAD
    if case.split()[0] not in ("logits", "tokens", "negative") and "backend" not in case
]


@pytest.mark.parametrize("case", [case for case in SHARED if "temperature" not in case])
def test_policy_loss_from_logprobs_refuses_the_same(case):
    changes, error, message = BAD[case]
    call = good(**changes)
    del call["logits"], call["tokens"]
    with pytest.raises(error, match=message):
        fastpo.policy_loss_from_logprobs(torch.zeros(B, T), call.pop("advantages"), **call)


PACKED = {
    "not starting at 0": (torch.tensor([1, 3, 6]), ValueError, r"non-decreasing offsets from 0"),
    "not ending at N": (torch.tensor([0, 3, 5]), ValueError, r"to the number of rows, 6"),
    "decreasing": (torch.tensor([0, 4, 3, 6]), ValueError, r"expected non-decreasing offsets"),
    "2-d": (torch.tensor([[0, 6]]), ValueError, r"expected \(B \+ 1,\)"),
    "floats": (torch.tensor([0.0, 6.0]), TypeError, r"expected int32"),
    "a list": ([0, 6], TypeError, r"cu_seqlens is list"),
}


@pytest.mark.parametrize("case", PACKED)
def test_wrong_cu_seqlens(case):
    cu_seqlens, error, message = PACKED[case]
    with pytest.raises(error, match=message):
        fastpo.policy_loss_from_logprobs(
            torch.zeros(6), torch.ones(6), objective=fastpo.grpo(), cu_seqlens=cu_seqlens
        )


@pytest.mark.parametrize("preset", ["grpo", "dr_grpo", "gspo", "luspo", "gmpo", "vespo", "sapo"])
def test_sequences_are_needed_on_packed_rows(preset):
    """REGRESSIONS 4: never a silent guess about where sequences end."""
    with pytest.raises(ValueError, match=r"needs to know the sequences.*pass cu_seqlens"):
        fastpo.policy_loss(
            torch.randn(6, V),
            torch.zeros(6, dtype=torch.long),
            torch.ones(6),
            objective=getattr(fastpo, preset)(),
        )


def test_one_advantage_per_sequence_needs_sequences():
    with pytest.raises(
        ValueError, match=r"advantages has shape \[1\], expected one per token, \[6\]"
    ):
        fastpo.policy_loss_from_logprobs(torch.zeros(6), torch.ones(1), objective=fastpo.dapo())


def test_constant_aggregation_needs_a_length_when_packed():
    with pytest.raises(ValueError, match=r"needs Objective.max_length"):
        fastpo.policy_loss_from_logprobs(
            torch.zeros(6),
            torch.ones(2),
            objective=fastpo.dr_grpo(),
            cu_seqlens=torch.tensor([0, 2, 6]),
        )


def test_entropy_bonus_needs_entropy_and_a_token_count():
    with pytest.raises(ValueError, match="needs `entropy`"):
        fastpo.policy_loss_from_logprobs(
            torch.zeros(6), torch.ones(6), objective=fastpo.dapo(entropy_coef=0.1)
        )
    with pytest.raises(ValueError, match="entropy_coef is a token mean, but normalizer counts"):
        fastpo.policy_loss_from_logprobs(
            torch.zeros(B, T),
            torch.ones(B),
            entropy=torch.zeros(B, T),
            objective=fastpo.grpo(entropy_coef=0.1),
            normalizer=4,
        )


def test_float64_is_for_the_reference_backend():
    with pytest.raises(ValueError, match=r"float64 logits: use backend='torch'|cannot run"):
        fastpo.token_logprobs(
            torch.randn(2, V).double(), torch.zeros(2, dtype=torch.long), backend="cpp"
        )


def test_the_fastest_backend_is_the_default():
    cpu, meta = torch.device("cpu"), torch.device("meta")
    fastest = "torch" if backends.unavailable("cpp") else "cpp"
    assert backends.resolve(None, cpu, torch.bfloat16) == fastest
    assert backends.resolve(None, cpu, torch.float64) == "torch"
    assert backends.resolve(None, meta, torch.float32) == "torch"


@pytest.mark.parametrize("strides", [(0, 1), (V - 1, 1)], ids=["expanded", "overlapping"])
def test_inplace_on_rows_that_share_memory(strides):
    logits = torch.randn(4 * V).as_strided((4, V), strides)
    with pytest.raises(ValueError, match=r"expanded or overlapping logits.*clone them"):
        fastpo.policy_loss(
            logits,
            torch.zeros(4, dtype=torch.long),
            torch.ones(4),
            objective=fastpo.dapo(),
            inplace=True,
        )


def test_integer_masks_and_one_number_per_sequence_as_a_column():
    """What tokenizers and trainers hand over: an int64 mask, and [B, 1] advantages."""
    call = good(advantages=torch.tensor([0.5, -2.0]), importance_weights=torch.tensor([0.9, 1.2]))
    call["mask"][:, 2] = False
    logits, tokens = call.pop("logits"), call.pop("tokens")
    expected = fastpo.policy_loss(logits, tokens, **call).loss
    for name in ("advantages", "importance_weights"):
        call[name] = call[name][:, None]
    for dtype in (torch.int64, torch.int32, torch.uint8):
        call["mask"] = call["mask"].to(dtype)
        assert torch.equal(fastpo.policy_loss(logits, tokens, **call).loss, expected)
        scored = fastpo.token_logprobs(logits, tokens, mask=call["mask"])
        assert torch.equal(scored.logprobs != 0, call["mask"] != 0)
    hidden, weight = torch.randn(B, T, 4), torch.randn(V, 4)
    linear = [
        fastpo.linear_policy_loss(hidden, weight, tokens, **(call | {"mask": mask})).loss
        for mask in (call["mask"], call["mask"].bool())
    ]
    assert torch.equal(*linear)


def test_debug_reads_values_on_every_device():
    """Off, values of GPU tensors are not read, for that would wait for the device."""
    from fastpo.ops import checks

    elsewhere = torch.empty(1, device="meta")
    assert not checks.inspects_values(elsewhere) and checks.inspects_values(torch.empty(1))
    fastpo.set_debug(True)
    try:
        assert checks.inspects_values(elsewhere)
    finally:
        fastpo.set_debug(False)
    assert not checks.inspects_values(elsewhere)


def test_bad_values_under_a_false_mask_are_fine():
    call = good(temperature=torch.tensor([[1.0, 1.0, -1.0]] * B))
    call["mask"][:, 2] = False
    call["tokens"][:, 2] = -100
    result = fastpo.policy_loss(
        call.pop("logits"), call.pop("tokens"), call.pop("advantages"), **call
    )
    assert result.loss.isfinite()


def test_out_of_range_token_past_the_check_is_nan_in_its_row_only(monkeypatch):
    """REGRESSIONS 21: what an unchecked GPU call does: NaN in that row, never a wild read."""
    from fastpo.ops import checks

    monkeypatch.setattr(checks, "inspects_values", lambda tensor: False)
    logits = torch.randn(4, V, requires_grad=True)
    tokens = torch.tensor([0, V, -1, V - 1])
    result = fastpo.policy_loss(logits, tokens, torch.ones(4), objective=fastpo.dapo())
    assert result.logprobs.isnan().tolist() == [False, True, True, False]
    assert result.loss.isnan()
    result.loss.backward()
    assert logits.grad[[0, 3]].isfinite().all()
