"""Every bad argument of the linear ops: what was got, what is expected, what to do."""

from __future__ import annotations

import pytest
import torch

import fastpo

N, D, V = 6, 4, 11
META = torch.device("meta")


def arguments(**changes):
    """A good call, changed; the positional ones by name too."""
    good = {
        "hidden": torch.randn(N, D),
        "weight": torch.randn(V, D),
        "tokens": torch.arange(N),
        "advantages": torch.randn(N),
        "objective": fastpo.dapo(),
    }
    return good | changes


BAD = {
    "hidden_list": ({"hidden": [1.0]}, TypeError, "hidden is list, expected a tensor"),
    "hidden_int": ({"hidden": torch.ones(N, D, dtype=torch.int64)}, TypeError, "hidden has dtype"),
    "hidden_1d": ({"hidden": torch.randn(D)}, ValueError, r"hidden has shape \[4\]"),
    "hidden_4d": ({"hidden": torch.randn(1, 1, N, D)}, ValueError, "hidden has shape"),
    "hidden_stride": (
        {"hidden": torch.randn(D, N).t()},
        ValueError,
        r"hidden has stride 6 .* call \.contiguous\(\)",
    ),
    "hidden_width_0": ({"hidden": torch.randn(N, 0)}, ValueError, "D is 0"),
    "weight_transposed": (
        {"weight": torch.randn(D, V)},
        ValueError,
        r"weight has shape \[4, 11\], expected \[V, 4\].*transposed.*t\(\)\.contiguous\(\)",
    ),
    "weight_transposed_view": (
        {"weight": torch.randn(V, D).t()},
        ValueError,
        r"weight has shape \[4, 11\], expected \[V, 4\].*transposed, pass weight\.t\(\),",
    ),
    "weight_none": ({"weight": None}, TypeError, r"expected a tensor \[V, D\]"),
    "weight_3d": ({"weight": torch.randn(2, V, D)}, ValueError, r"expected \[V, D\]"),
    "weight_partitioned": (
        {"weight": torch.empty(0)},
        ValueError,
        "no elements: .*ZeRO-3.*GatheredParameters",
    ),
    "weight_stride": ({"weight": torch.randn(D, V).t()}, ValueError, "weight has stride"),
    "weight_dtype": (
        {"weight": torch.randn(V, D).bfloat16()},
        TypeError,
        "weight has dtype torch.bfloat16, expected torch.float32 .*autocast",
    ),
    "weight_device": (
        {"weight": torch.randn(V, D, device=META)},
        ValueError,
        "weight is on meta, expected cpu",
    ),
    "bias_shape": ({"bias": torch.randn(D)}, ValueError, r"bias has shape \[4\], expected \[11\]"),
    "bias_number": ({"bias": 1.0}, TypeError, "bias is float, expected a tensor"),
    "bias_dtype": ({"bias": torch.randn(V).double()}, TypeError, "bias has dtype"),
    "tokens_shape": ({"tokens": torch.arange(N + 1)}, ValueError, "tokens has shape .*never shift"),
    "tokens_dtype": ({"tokens": torch.ones(N)}, TypeError, "expected int64 or int32"),
    "tokens_range": (
        {"tokens": torch.tensor([0, 1, V, 3, 4, 5])},
        ValueError,
        r"tokens\[2\] is 11, expected an id in \[0, 11\)",
    ),
    "weight_module": (
        {"weight": torch.nn.Linear(D, V)},
        TypeError,
        "weight is a module, Linear, expected a tensor .*: pass its weight",
    ),
    "tokens_ignored": (
        {"tokens": torch.full((N,), -100)},
        ValueError,
        r"tokens\[0\] is -100, .*-100 marks ignored labels .*pass mask=tokens != -100",
    ),
    "advantages_shape": ({"advantages": torch.randn(3)}, ValueError, "advantages has shape"),
    "mask_dtype": ({"mask": torch.ones(N)}, TypeError, r"expected torch.bool: call mask.bool\(\)"),
    "mask_shape": ({"mask": torch.ones(3, dtype=torch.bool)}, ValueError, "mask has shape"),
    "objective": ({"objective": "dapo"}, TypeError, "objective is str"),
    "objective_sequences": ({"objective": fastpo.gspo()}, ValueError, "pass cu_seqlens"),
    "ref_missing": ({"objective": fastpo.dapo(kl_coef=0.1)}, ValueError, "ref_logprobs is None"),
    "ref_ignored": ({"ref_logprobs": torch.randn(N)}, ValueError, "would ignore them"),
    "old_shape": ({"old_logprobs": torch.randn(N, 1)}, ValueError, "old_logprobs has shape"),
    "temperature_0": ({"temperature": 0.0}, ValueError, "temperature is 0.0"),
    "temperature_nan": ({"temperature": float("nan")}, ValueError, "temperature is nan"),
    "temperature_rows": ({"temperature": -torch.ones(N)}, ValueError, "not finite and positive"),
    "temperature_text": ({"temperature": "hot"}, TypeError, "temperature is str"),
    "normalizer": ({"normalizer": -1}, ValueError, "normalizer is -1"),
    "backend_unknown": ({"backend": "fast"}, ValueError, "backend is 'fast', expected one of"),
    "scale_0": ({"logit_scale": 0.0}, ValueError, "logit_scale is 0.0, expected a finite"),
    "scale_tensor": ({"logit_scale": torch.ones(())}, TypeError, "logit_scale is Tensor"),
    "softcap_negative": ({"softcap": -30.0}, ValueError, "softcap is -30.0"),
    "softcap_inf": ({"softcap": float("inf")}, ValueError, "softcap is inf"),
    "logits_fp16": ({"logits_dtype": torch.float16}, ValueError, "logits_dtype is torch.float16"),
    "logits_bf16": (
        {"logits_dtype": torch.bfloat16},
        ValueError,
        "logits_dtype is torch.bfloat16 for torch.float32 operands",
    ),
    "chunk_0": ({"chunk_tokens": 0}, ValueError, "chunk_tokens is 0, expected at least 1"),
    "chunk_float": ({"chunk_tokens": 2.5}, TypeError, "chunk_tokens is float"),
    "group": ({"tp_group": "world"}, TypeError, "tp_group is str, expected .*ProcessGroup"),
    "live_without_mask": ({"live_rows": 3}, ValueError, "live_rows is given without mask"),
    "live_count": (
        {"live_rows": 3, "mask": torch.ones(N, dtype=torch.bool)},
        ValueError,
        "live_rows is 3, expected 6, the number of True in mask",
    ),
    "live_negative": (
        {"live_rows": -3, "mask": torch.ones(N, dtype=torch.bool)},
        ValueError,
        "live_rows is -3",
    ),
    "live_mask": (
        {"live_rows": torch.ones(N, dtype=torch.bool), "mask": torch.ones(N, dtype=torch.bool)},
        ValueError,
        "live_rows is Tensor, expected an int, the number of True in mask",
    ),
}
LOSS_ONLY = ("advantages", "objective", "ref", "old", "normalizer")


@pytest.mark.parametrize("case", BAD)
def test_policy_loss_says_what_is_wrong(case):
    changes, error, message = BAD[case]
    with pytest.raises(error, match=message) as caught:
        fastpo.linear_policy_loss(**arguments(**changes))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("case", [name for name in BAD if not name.startswith(LOSS_ONLY)])
def test_token_logprobs_say_the_same(case):
    changes, error, message = BAD[case]
    given = arguments(**changes)
    del given["advantages"], given["objective"]
    with pytest.raises(error, match=message):
        fastpo.linear_token_logprobs(**given)


def test_masked_rows_may_hold_any_token():
    """REGRESSIONS 21: ids outside the vocabulary are refused only where they count."""
    tokens = torch.tensor([0, -100, V + 5, 3, 4, 5])
    mask = (tokens >= 0) & (tokens < V)
    result = fastpo.linear_policy_loss(**arguments(tokens=tokens, mask=mask))
    assert result.loss.isfinite()


def test_token_outside_on_a_device_without_checks_is_nan_in_its_row_only(monkeypatch):
    """What a GPU does, where the range is not checked."""
    monkeypatch.setattr(fastpo.ops.checks, "inspects_values", lambda tensor: False)
    given = arguments(tokens=torch.tensor([0, 1, V, 3, -2, 5]))
    logprobs = fastpo.linear_policy_loss(**given).logprobs
    assert logprobs.isnan().tolist() == [False, False, True, False, True, False]
