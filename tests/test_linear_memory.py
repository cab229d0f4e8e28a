"""`fastpo plan` says what a step takes, and a step takes it."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

from fastpo import cli, plan, plan_buffers

ROOT = Path(__file__).resolve().parents[1]
SHAPE = {"vocab": 151936, "hidden": 4096, "tokens": 8192}
linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")


def memory_curve():
    """benchmarks/memory_curve.py as a module."""
    spec = importlib.util.spec_from_file_location(
        "memory_curve", ROOT / "benchmarks" / "memory_curve.py"
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@linux
@pytest.mark.slow
@pytest.mark.parametrize(
    ("path", "tokens"), [("fastpo", 1024), ("fastpo", 3000), ("materialized", 1024)]
)
def test_planned_peak_is_the_measured_one(path, tokens):
    """Within 10 %: growth of the resident set of a process of its own."""
    point = memory_curve().measure_apart(path, tokens, 64, 60000)
    assert point["peak_bytes"] == pytest.approx(point["planned_peak_bytes"], rel=0.10)


@linux
@pytest.mark.slow
def test_extra_memory_does_not_grow_with_the_context():
    """Beyond inputs and gradients, from N = 4k on, within 5 %."""
    points = [memory_curve().measure_apart("fastpo", tokens, 16, 50000) for tokens in (4096, 16384)]
    extra = [point["peak_bytes"] - point["results_bytes"] for point in points]
    assert extra[1] == pytest.approx(extra[0], rel=0.05)


def test_chunk_and_bytes_of_every_path():
    """The figures one can work out by hand, at TRL's own benchmark shape in bf16."""
    plans = {path: plan.plan(path=path, **SHAPE) for path in plan.PATHS}
    logits = 8192 * 151936
    head = 4096 * 151936
    states = 4096 * 8192
    assert plans["materialized"].peak_bytes == 3 * 4 * logits + 32 * 8192
    assert plans["materialized"].chunk_tokens is None
    ours = plans["fastpo"]
    assert ours.chunk_tokens == 1024
    waiting = 2 * logits + 2 * states  # 2 D = N: one product, straight to bf16
    sweep = 2 * states + waiting + 4 * 1024 * 151936
    assert ours.peak_bytes == max(sweep, 2 * states + waiting + 2 * head) + 32 * 8192
    longer = plan.plan(**(SHAPE | {"tokens": 16384}))
    assert longer.peak_bytes == sweep + 2 * states + 4 * head + 32 * 16384
    short = plan.plan(**(SHAPE | {"tokens": 2048}))
    assert short.peak_bytes == 2 * 4096 * 2048 + 4 * 2048 * 151936 + 2 * head + 32 * 2048
    odd = plan.plan(**(SHAPE | {"tokens": 2048, "vocab": 50257}))
    assert odd.buffers[2].bytes == 4 * 2048 * 50272  # whole tiles of 32 columns
    tile = 2 * 4096 * 32768
    assert plans["chunked_recompute"].peak_bytes == 6 * (states + head) + tile + 32 * 8192
    assert ours.peak_bytes < plans["chunked_recompute"].peak_bytes


def test_bytes_of_exponentials():
    """2 D rows of E and one bf16 dW; from N = 2 D on flat, with an fp32 sum; kept, N rows of E."""
    head, states = 2 * 4096 * 151936, 2 * 4096 * 8192
    whole = plan.plan(path="triton-exp", **SHAPE)
    assert whole.chunk_tokens == 8192
    e, sums = 2 * 8192 * 151936, max(2 * 1187 * 8192 * 4, 6 * 4096 * 8192)
    assert whole.peak_bytes == e + sums + head + states + 32 * 8192
    longer, kept = (plan.plan(path=path, **(SHAPE | {"tokens": 32768})) for path in plan.EXP_PATHS)
    assert longer.peak_bytes == e + sums + 2 * head + 4 * states + 32 * 32768
    assert kept.peak_bytes - longer.peak_bytes == 3 * e
    assert plan.plan(path="triton-exp", vocab=50257, hidden=64, tokens=128).peak_bytes > 0


def test_exponentials_are_planned_as_they_are_made():
    """Rows of E, tiles and chunk, from the code that allocates them."""
    pytest.importorskip("triton")
    from fastpo.backends import triton_exp
    from fastpo.kernels import _exp_tiles

    vocab, width, tokens = 50257, 64, 256
    weight = torch.zeros(vocab, width, dtype=torch.bfloat16)
    planned = plan.plan(path="triton-exp", vocab=vocab, hidden=width, tokens=tokens)
    found = {buffer.name: buffer.bytes for buffer in planned.buffers}
    e = triton_exp.empty_e(planned.chunk_tokens, weight)
    assert found["exponentials of a chunk"] == e.untyped_storage().nbytes()
    narrowest = min(tile.N for tile in (_exp_tiles._BY_POINTERS, *_exp_tiles._BY_TMA.values()))
    assert (narrowest, _exp_tiles._RAGGED.N) == plan_buffers._EXP_TILES
    assert plan_buffers._EXP_PAD == _exp_tiles.PAD_COLUMNS


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_planned_extra_is_flat_in_tokens(dtype, device):
    few, many = (
        plan.plan(vocab=151936, hidden=512, tokens=n, dtype=dtype, device=device)
        for n in (4096, 131072)
    )
    assert many.extra_bytes - few.extra_bytes == 32 * (131072 - 4096)
    assert many.extra_bytes < 1.05 * few.extra_bytes


def test_a_budget_sets_the_chunk():
    chunks = [plan.plan(budget=budget, **SHAPE).chunk_tokens for budget in (1, 2**28, 2**30, 2**34)]
    assert chunks == [256, 256, 1536, 8192]


@pytest.mark.parametrize(
    ("text", "count"),
    [("1280MiB", 1280 * 2**20), ("1.5GB", 15 * 10**8), ("3kib", 3072), (" 200 ", 200)],
)
def test_bytes_as_people_write_them(text, count):
    assert plan.parse_bytes(text) == count


@pytest.mark.parametrize("text", ["", "0", "lots", "-3MB", "3 MB MB", "1e9"])
def test_bytes_that_are_none_are_refused(text):
    with pytest.raises(ValueError, match="is no number of bytes"):
        plan.parse_bytes(text)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokens": 0}, "tokens is 0, expected at least 1"),
        ({"path": "magic"}, "path is 'magic', expected one of materialized"),
        ({"dtype": torch.int8}, "dtype is torch.int8"),
        ({"device": "tpu"}, "device is 'tpu', expected 'cuda' or 'cpu'"),
        ({"budget": 0}, "budget is 0 bytes"),
        (
            {"path": "triton-exp", "device": "cpu"},
            "of bfloat16 operands on 'cuda'",
        ),
        ({"path": "triton-exp-kept", "dtype": torch.float16}, "torch.float16 on 'cuda'"),
    ],
)
def test_bad_shapes_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        plan.plan(**(SHAPE | change))


def test_command_prints_every_buffer(capsys):
    given = "plan --vocab 151936 --hidden 4096 --tokens 8192 --dtype bfloat16 --budget 1.25GiB"
    assert cli.main(given.split()) == 0
    text = capsys.readouterr().out
    for path in plan.PATHS + plan.EXP_PATHS:
        assert f"\n{path}" in text
        for buffer in plan.plan(path=path, **SHAPE).buffers:
            assert (buffer.name in text) == (buffer.bytes > 0)
    assert "fastpo, 2048 tokens at a time" in text
    assert "triton-exp, 8192 tokens at a time" in text
    for option in (["--dtype", "float16"], ["--device", "cpu"]):  # exponentials do not run there
        assert cli.main([*given.split(), *option]) == 0
        assert "triton-exp" not in capsys.readouterr().out


def test_command_refuses_what_cannot_be_in_one_line(capsys):
    assert cli.main(["plan", "--vocab", "0", "--hidden", "4096", "--tokens", "8192"]) == 2
    assert "vocab is 0, expected at least 1" in capsys.readouterr().err
    shape = ["--vocab", "9", "--hidden", "9", "--tokens", "9"]
    for kept in ("-3", "10"):
        assert cli.main(["plan", *shape, "--kept", kept]) == 2
        assert f"kept is {kept}, expected the ids of 9 " in capsys.readouterr().err
    assert cli.main(["plan", *shape, "--budget", "lots"]) == 2
    assert "'lots' is no number of bytes, expected for example 1280MiB" in capsys.readouterr().err
