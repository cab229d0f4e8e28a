"""Packed rows: every sequence attends to itself alone, whatever kernel does it, without a mask."""

import copy
import json
from functools import partial
from itertools import pairwise

import pytest
import torch
import transformers
from torch.utils._python_dispatch import TorchDispatchMode

from fastpo.trainer.config import LoraConfig, ModelConfig, OptimConfig
from fastpo.trainer.loop import train
from fastpo.trainer.microbatch import layout_of
from fastpo.trainer.model import attention, selfcheck
from fastpo.trainer.model import loading as models
from fastpo.trainer.model.attention import FLASH, OURS, Packing
from fastpo.trainer.model.loading import _wrap, character_tokenizer
from fastpo.trainer.run import recipe
from fastpo.trainer.run.errors import RecipeError

CPU = torch.device("cpu")
SIZES = torch.tensor([7, 3, 3, 1, 12])
SHAPE = {
    "vocab_size": 32,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "eos_token_id": 1,
    "pad_token_id": 0,
    "bos_token_id": None,
}
LLAMA = transformers.LlamaConfig(**SHAPE)
MISTRAL = transformers.MistralConfig(**SHAPE, sliding_window=4)
QWEN2 = transformers.Qwen2Config(
    **SHAPE, use_sliding_window=True, sliding_window=4, max_window_layers=1
)


def policy_of(config, **options):
    config = type(config).from_dict(config.to_dict())
    config._attn_implementation = attention.choose(ModelConfig(), CPU)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).double()
    tokenizer = character_tokenizer("0123456789")
    return _wrap(model, tokenizer, ModelConfig(**options), CPU, None)


def states_and_gradients(policy, forward):
    """Of all sequences, with gradients that differ by token and column."""
    policy.model.zero_grad()
    hidden = forward(policy)
    weights = torch.linspace(-1, 1, hidden.numel(), dtype=hidden.dtype).sin()
    (hidden * weights.view_as(hidden)).sum().backward()
    gradients = [p.grad.flatten() for p in policy.model.parameters() if p.grad is not None]
    return hidden.detach(), torch.cat(gradients)


def ids_of(sizes=SIZES):
    return torch.randint(2, 32, (1, int(sizes.sum())), generator=torch.Generator().manual_seed(1))


def packed(policy):
    return policy.hidden_states(ids_of(), Packing.of(SIZES, CPU))[0]


def alone(policy):
    pieces = ids_of()[0].split(SIZES.tolist())
    return torch.cat([policy.hidden_states(piece[None])[0] for piece in pieces])


def equal(policy, reference=None):
    got = states_and_gradients(policy, packed)
    expected = states_and_gradients(reference or policy, alone)
    torch.testing.assert_close(got, expected)  # of float64


def by_sequence(query, key, value, cu_seqlens, *, scale, left, grad=None):
    """Packed attention in plain torch: [T, H, d], keys of fewer heads, `left` tokens back or -1.

    With `grad` of the output: gradients of query, key and value, as a kernel's backward gives them.
    """
    groups, found = query.shape[1] // key.shape[1], []
    for start, end in pairwise(cu_seqlens.tolist()):
        q, k, v, *dout = (
            x[start:end].transpose(0, 1)
            for x in (query, key, value, grad)[: 3 + (grad is not None)]
        )
        k, v = (x.repeat_interleave(groups, 0) for x in (k, v))
        seen = torch.ones(end - start, end - start, dtype=torch.bool).tril()
        seen = seen if left < 0 else seen.triu(-left)
        p = (q @ k.mT * scale).masked_fill(~seen, -torch.inf).softmax(-1)
        if not dout:
            found.append([(p @ v).transpose(0, 1)])
            continue
        dp = dout[0] @ v.mT
        ds = scale * p * (dp - (dp * p).sum(-1, keepdim=True))
        dk, dv = (x.unflatten(0, (-1, groups)).sum(1) for x in (ds.mT @ q, p.mT @ dout[0]))
        found.append([x.transpose(0, 1) for x in (ds @ k, dk, dv)])
    return tuple(torch.cat(pieces) for pieces in zip(*found, strict=True))


@pytest.mark.parametrize("config", [LLAMA, MISTRAL, QWEN2], ids=lambda c: c.model_type)
@pytest.mark.parametrize("kept", [False, True])
def test_sequences_of_a_packed_row_are_as_if_alone(config, kept):
    """REGRESSIONS 66: also where layers run again in the backward pass, outside of `hidden_states`;
    windows are shorter than the longest sequence."""
    policy = policy_of(config, gradient_checkpointing=kept)
    assert policy.attention == OURS and policy.packs
    equal(policy)


@pytest.fixture
def varlen(monkeypatch):
    """`varlen_attn` of this torch, in float64 on a CPU: the kernels below it are plain torch."""
    if not attention.KERNEL:
        pytest.skip("a torch whose varlen_attn knows no windows")
    calls = []

    def forward(q, k, v, cu_q, cu_k, max_q, max_k, dropout_p, is_causal, _, **options):
        left, right = options["window_size_left"], options["window_size_right"]
        assert right == 0 and is_causal == (left < 0) and not dropout_p
        assert torch.equal(cu_q, cu_k) and cu_q.dtype == torch.int32
        assert max_q == max_k == cu_q.diff().max()
        calls.append(left)
        [out] = by_sequence(q, k, v, cu_q, scale=options["scale"], left=left)
        none = q.new_zeros(0)
        return out, q.new_zeros(q.shape[1], q.shape[0], dtype=torch.float32), none, none, none

    def backward(grad, q, k, v, out, lse, cu_q, *_, scale, window_size_left, window_size_right):
        calls.append(window_size_left)
        return by_sequence(q, k, v, cu_q, scale=scale, left=window_size_left, grad=grad)

    library = torch.library.Library("aten", "IMPL")
    library.impl("_flash_attention_forward", forward, "CPU")
    library.impl("_flash_attention_backward", backward, "CPU")
    monkeypatch.setattr(attention, "_has_kernel", lambda device, dtype: True)
    yield calls
    library._destroy()


@pytest.mark.parametrize("config", [LLAMA, MISTRAL, QWEN2], ids=lambda c: c.model_type)
def test_torchs_kernel_gets_what_it_takes(config, varlen):
    policy = policy_of(config)
    assert policy.kernel == "varlen_attn" and policy.packs
    equal(policy)
    windows = {"llama": [-1, -1], "mistral": [3, 3], "qwen2": [-1, 3]}[config.model_type]
    assert varlen == [*windows, *windows[::-1]]  # forward, backward


def test_flash_attention_is_told_the_lengths(monkeypatch):
    """Not left to find them in the positions, which stops a GPU in every layer."""
    from transformers import modeling_flash_attention_utils as flash

    def varlen(
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        dropout_p=0.0,
        softmax_scale=None,
        causal=False,
        window_size=(-1, -1),
        softcap=0.0,
        alibi_slopes=None,
        deterministic=False,
        return_attn_probs=False,
        block_table=None,
    ):  # as flash-attn 2.8 has it
        assert causal and max_seqlen_q == max_seqlen_k == int(SIZES.max()) and not dropout_p
        assert cu_seqlens_q is cu_seqlens_k and cu_seqlens_q.dtype == torch.int32
        [out] = by_sequence(q, k, v, cu_seqlens_q, scale=softmax_scale, left=window_size[0])
        return out

    reference, policy = policy_of(MISTRAL), policy_of(MISTRAL)
    monkeypatch.setattr(flash, "_loaded_implementation", None)
    monkeypatch.setattr(flash, "_lazy_imports", lambda *_, **__: (None, varlen, None, None, None))
    monkeypatch.setattr(flash, "_is_packed_sequence", None)
    policy.model.config._attn_implementation_internal = FLASH
    assert policy.packs and policy.kernel == FLASH
    equal(policy, reference)


class Largest(TorchDispatchMode):
    """The most elements of any tensor that was made."""

    most = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self.most = max(self.most, tensor.numel())
        return out


@pytest.mark.parametrize("implementation", [OURS, "sdpa"])
def test_no_mask_of_all_tokens_by_all_is_made(implementation):
    """REGRESSIONS 66: at 20 k tokens it is 400 MB, and 16 times the work for 16 sequences."""
    policy = policy_of(LLAMA)
    policy.model.set_attn_implementation(implementation)
    sizes = torch.tensor([96] * 8)
    with Largest() as seen:
        policy.hidden_states(ids_of(sizes), Packing.of(sizes, CPU)).sum().backward()
    assert (seen.most >= int(sizes.sum()) ** 2) == (implementation == "sdpa")


def test_what_packed_rows_cannot_do_is_refused():
    attend = partial(attention.attend, torch.nn.Module(), *torch.ones(3, 1, 2, 4, 8), None)
    lengths = {"cu_seq_lens_q": torch.tensor([0, 1, 4]), "max_length_q": 3}
    for option, name in (
        ({"softcap": 30.0}, "softcap"),
        ({"s_aux": torch.ones(2)}, "s_aux"),
        ({"is_causal": False}, "causal"),
    ):
        with pytest.raises(ValueError, match=name):
            attend(**lengths, **option)


def test_a_model_whose_sequences_mix_gets_rows_unless_asked_to_pack():
    """REGRESSIONS 67: a convolution before attention; the choice is the run's, and is recorded."""
    config = transformers.Lfm2Config(
        **{k: v for k, v in SHAPE.items() if k != "head_dim"},
        layer_types=["conv", "full_attention"],
    )
    policy = policy_of(config)
    policy.model.float()
    assert layout_of(policy, OptimConfig())["packed"]
    selfcheck.check(policy, OptimConfig())
    assert not layout_of(policy, OptimConfig())["packed"] and policy.kernel == "sdpa"
    with pytest.raises(RecipeError, match=r"optim\.packing = true: hidden states"):
        selfcheck.check(policy, OptimConfig(packing=True))


def test_shared_prompts_are_no_longer_ignored_where_rows_are_packed():
    """REGRESSIONS 68: flash attention packed, whatever optim.share_prompts said."""
    policy = policy_of(LLAMA)
    assert layout_of(policy, OptimConfig()) == {"packed": True, "share": False}
    assert layout_of(policy, OptimConfig(share_prompts=True)) == {"packed": False, "share": True}
    for other in ("optim.packing", "model.compile"):
        with pytest.raises(RecipeError, match=other) as caught:
            recipe.load(None, ["optim.share_prompts=true", f"{other}=true"])
        assert "\n" not in str(caught.value)


@pytest.fixture
def graphs(monkeypatch):
    """Layers compiled without code being made: how many graphs there are, and breaks in them."""
    from torch._dynamo.utils import counters

    real = torch.compile
    torch._dynamo.reset()
    counters.clear()
    models._compiled_forward.cache_clear()
    monkeypatch.setattr(torch, "compile", partial(real, backend="aot_eager"))
    yield lambda: (counters["stats"]["unique_graphs"], sum(counters["graph_break"].values()))
    models._compiled_forward.cache_clear()
    torch._dynamo.reset()


def same(policy, plain, ids, packing=None):
    """Hidden states of both, which are equal, as are their gradients."""

    def forward(policy):
        return policy.hidden_states(ids, packing)

    got, expected = (states_and_gradients(each, forward) for each in (policy, plain))
    torch.testing.assert_close(got, expected)
    return got[0]


@pytest.mark.slow
@pytest.mark.parametrize("kept", [False, True])
def test_compiled_layers_are_one_graph_whatever_the_lengths(kept, varlen, graphs):
    """All layers share it, in packed rows and padded ones; where layers run again, too."""
    options = {"gradient_checkpointing": kept}
    policy, plain = policy_of(LLAMA, compile=True, **options), policy_of(LLAMA, **options)
    assert policy.packs
    for sizes in ([7, 3, 3], [40, 2, 9], [5, 5, 5, 30], [64]):
        sizes = torch.tensor(sizes)
        same(policy, plain, ids_of(sizes), Packing.of(sizes, CPU))
    packed, breaks = graphs()
    assert breaks == 0 and packed <= 1 + kept
    for shape in ((4, 9), (3, 17), (8, 33), (2, 64)):
        same(policy, plain, torch.randint(2, 32, shape))
    total, breaks = graphs()
    assert breaks == 0 and total - packed <= 1 + kept
    copied = copy.deepcopy(policy.model.base_model.layers[0])
    assert copied.forward.__self__ is copied  # of a critic, not of the policy


@pytest.mark.slow
def test_compiled_layers_have_adapters_on_and_off(graphs):
    lora = LoraConfig(rank=2, target_modules=["q_proj", "up_proj"])
    policy, plain = (policy_of(LLAMA, lora=lora, compile=c) for c in (True, False))
    for each in (policy, plain):
        torch.manual_seed(2)
        for name, weight in each.model.named_parameters():
            if "lora_B" in name:
                weight.data.normal_()
    for ids in (torch.randint(2, 32, shape) for shape in ((4, 9), (3, 17), (8, 33))):
        hidden = same(policy, plain, ids)
        below = policy.without_adapters()
        with torch.no_grad():
            off = below.inside(lambda: below.hidden_states(ids))  # noqa: B023
            torch.testing.assert_close(off, policy_of(LLAMA).hidden_states(ids))
        assert (off - hidden).abs().max() > 0.01
    count, breaks = graphs()
    assert breaks == 0 and count <= 3  # the first layer's input has no gradient


@pytest.mark.slow
def test_a_compiled_run_has_the_curve_of_one_that_is_not(tmp_path):
    """With code made by inductor; the self-check has layers as they are beside compiled ones."""
    curves = []
    for compiled in ("true", "false"):
        run = tmp_path / compiled
        overrides = (
            *("task=sort", "task_args.digits=3", "steps=3", "threads=1", "verifier.workers=1"),
            *("model.hidden_size=32", "model.heads=2", "warmup.max_steps=4", "eval.problems=20"),
            *("rollout.prompts=8", "rollout.group_size=4", "rollout.max_new_tokens=5"),
            *("algorithm.dynamic_sampling_by=reward", "algorithm.objective.kl_coef=0.05"),
            *("optim.updates_per_batch=2", "optim.learning_rate=2e-3", "log.tensorboard=false"),
            *("optim.packing=false", f"model.compile={compiled}", f"run_dir={run}"),
        )
        summary = train(recipe.load(None, list(overrides)))
        assert summary["attention"] == "sdpa, a sequence at a time"
        curves.append([json.loads(line) for line in (run / "metrics.jsonl").open()])
    for row, right in zip(*curves, strict=True):
        for name, value in right.items():
            if not any(part in name for part in ("time", "per_second", "memory")):
                assert row[name] == pytest.approx(value, abs=1e-5, rel=1e-5), (row["step"], name)
