"""fastpo inside TRL's fused LM head: what `install()` replaces, and what then reaches fastpo."""

from __future__ import annotations

import contextlib
import types

import pytest
import torch

from fastpo.integrations import trl as integration
from fastpo.testing.budget import assert_within_budget

pytestmark = pytest.mark.peer
utils = None  # trl.trainer.utils, which takes seconds to import

FIELDS = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
N, D, V, TEMPERATURE, SCALE = 20, 16, 61, 0.7, 1.3


@pytest.fixture(autouse=True, scope="module")
def trl_utils():
    global utils
    utils = pytest.importorskip("trl.trainer.utils")


@pytest.fixture
def installed():
    integration.install()
    yield utils._ChunkedLogProbFunction
    integration.uninstall()


def operands(dtype=torch.float32):
    gen = torch.Generator().manual_seed(2)
    hidden, weight = torch.randn(N, D, generator=gen), torch.randn(V, D, generator=gen)
    bias = torch.randn(V, generator=gen)
    labels = torch.randint(0, V, (N,), generator=gen)
    labels[:4] = (hidden[:4] @ weight.t() + bias).argmax(1)
    leaves = [x.to(dtype, copy=True).requires_grad_() for x in (hidden, weight, bias)]
    return *leaves, labels


def eager(softcap, dtype=torch.float32):
    """The fields and the gradients from whole logits, in plain torch."""
    hidden, weight, bias, labels = operands(dtype)
    logits = SCALE * (hidden @ weight.t() + bias)
    logits = (logits if softcap is None else softcap * torch.tanh(logits / softcap)) / TEMPERATURE
    logp = logits.log_softmax(1)
    fields = [
        logp.gather(1, labels[:, None])[:, 0],
        -(logp.exp() * logp).sum(1),
        (2 * logp).logsumexp(1),
        logits.mean(1),
        logits.argmax(1) == labels,
    ]
    (fields[0].sum() + 0.1 * fields[1].sum()).backward()
    return [x.detach() for x in fields] + [x.grad for x in (hidden, weight, bias)]


def through_trl(softcap, outputs=FIELDS):
    """The same by the function that TRL calls."""
    hidden, weight, bias, labels = operands()
    arguments = (labels, TEMPERATURE, 8, softcap, SCALE, outputs)
    fields = utils._ChunkedLogProbFunction.apply(hidden, weight, bias, *arguments)
    loss = fields[0].sum()
    (loss + 0.1 * fields[1].sum() if fields[1] is not None else loss).backward()
    detached = [None if x is None else x.detach() for x in fields]
    return detached + [x.grad for x in (hidden, weight, bias)]


@pytest.mark.parametrize("softcap", [None, 5.0])
def test_trl_scores_the_same_through_fastpo(softcap, installed):
    """Every field and gradient against fp64 in plain torch, not against fastpo itself."""
    ours = through_trl(softcap)
    for mine, truth, other in zip(ours, eager(softcap, torch.float64), eager(softcap), strict=True):
        if truth.dtype == torch.bool:
            assert torch.equal(mine.bool(), truth) and 0 < truth.sum() < N
        else:
            assert_within_budget(mine, truth, other)
    integration.uninstall()
    theirs = through_trl(softcap)
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other.to(mine.dtype), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("outputs", [("log_probs",), ("log_probs", "is_top1"), FIELDS])
def test_only_what_was_asked_for_comes_back(outputs, installed):
    """And log-probs are the same bits whatever else is asked for: policy and reference agree."""
    fields = through_trl(None, outputs)[:5]
    assert [name for name, x in zip(FIELDS, fields, strict=True) if x is not None] == list(outputs)
    assert torch.equal(fields[0], through_trl(None)[0])
    assert integration.calls() == 2


def test_an_fp32_head_under_bf16_hidden_states_is_cast(installed):
    hidden, weight, bias, labels = operands()
    arguments = (labels, 1.0, 8, None, 1.0, ("log_probs",))
    fields = installed.apply(hidden.bfloat16(), weight, bias, *arguments)
    fields[0].sum().backward()
    assert weight.grad.dtype == torch.float32 and weight.grad.norm() > 0


def test_a_trl_that_does_not_read_the_name_is_refused(monkeypatch):
    """REGRESSIONS 36: TRL 1.14 has the name, and nothing in its fused head looks it up."""

    def reads_nothing(model):
        return model

    monkeypatch.setattr(utils, "add_fused_lm_head", reads_nothing)
    with pytest.raises(ImportError, match=r"nothing would reach fastpo, expected trl 1\.15 or"):
        integration.install()
    monkeypatch.delattr(utils, "add_fused_lm_head")
    with pytest.raises(ImportError, match="nothing would reach fastpo"):
        integration.install()
    assert not isinstance(utils._ChunkedLogProbFunction, integration._FastpoLogProbs)
    with pytest.raises(RuntimeError, match="call install"):
        integration.calls()


def test_a_partitioned_head_is_gathered_for_backward(monkeypatch, installed):
    """ZeRO-3: between forward and backward the weight is an empty tensor."""
    from transformers.integrations import deepspeed

    truth = eager(None)[5:]
    monkeypatch.setattr(deepspeed, "is_deepspeed_zero3_enabled", lambda: True)
    hidden, weight, bias, labels = operands()
    full = weight.detach().clone()
    gathered = []

    @contextlib.contextmanager
    def gather(*parameters):
        weight.data = full.clone()
        gathered.append(parameters)
        yield
        weight.data = torch.empty(0)

    monkeypatch.setattr(utils, "maybe_gather_lm_head_ctx", gather)
    with gather():
        arguments = (labels, TEMPERATURE, 8, None, SCALE, FIELDS)
        fields = installed.apply(hidden, weight, bias, *arguments)
    assert weight.numel() == 0
    loss = fields[0].sum() + 0.1 * fields[1].sum()
    grads = torch.autograd.grad(loss, (hidden, bias))
    torch.testing.assert_close(grads, (truth[0], truth[2]), rtol=1e-5, atol=1e-5)
    assert gathered[1:] == [(weight, bias)] and weight.numel() == 0


def tiny_llama():
    import transformers

    torch.manual_seed(0)
    sizes = {"vocab_size": 61, "hidden_size": 16, "intermediate_size": 32, "pad_token_id": 0}
    config = transformers.LlamaConfig(**sizes, num_hidden_layers=1, num_attention_heads=2)
    return transformers.LlamaForCausalLM(config)


def test_trl_model_forward_through_fastpo(installed):
    """A model patched by TRL itself: model(..., fused_lm_head=True) now runs on fastpo."""
    ids = torch.randint(3, 61, (3, 9))
    labels = ids.masked_fill(torch.arange(9) < 4, -100)
    model = tiny_llama()
    utils.add_fused_lm_head(model, temperature=0.9, outputs=FIELDS)
    ours = model(input_ids=ids, labels=labels, fused_lm_head=True)
    assert integration.calls() == 1
    integration.uninstall()
    theirs = model(input_ids=ids, labels=labels, fused_lm_head=True)
    for name in FIELDS:
        mine, other = getattr(ours, name), getattr(theirs, name)
        torch.testing.assert_close(mine, other.to(mine.dtype), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_policy_and_reference_agree_at_step_0(dtype, installed):
    """REGRESSIONS 37: DPO's policy asks for more fields than its reference; margins are 0."""
    ids = torch.randint(3, 61, (4, 9))
    labels = ids.masked_fill(torch.arange(9) < 4, -100)
    scores = []
    for outputs in (("log_probs", "entropy", "mean_logits", "is_top1"), ("log_probs",)):
        model = tiny_llama().to(dtype)
        utils.add_fused_lm_head(model, outputs=outputs)
        scores.append(model(input_ids=ids, labels=labels, fused_lm_head=True).log_probs.sum(1))
    assert torch.equal(*scores)
    assert integration.calls() == 2


def test_the_reader_is_found_inside_nested_functions():
    def outer():
        def inner():
            return _not_a_global_here  # noqa: F821

        return inner

    assert integration._reads(outer, "_not_a_global_here")
    assert not integration._reads(outer, "elsewhere")
    assert not integration._reads(types.SimpleNamespace(), "elsewhere")
