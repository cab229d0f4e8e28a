"""The loss in a wrapped model's forward: what wraps it stays in the path. Against one process."""

from __future__ import annotations

import os
import subprocess
import sys
import traceback
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import fastpo
from fastpo.integrations.transformers import attach, causal_lm_policy_loss, detach, innermost

B, T, RANKS = 4, 9, 2


def tiny(adapters=False, **options):
    """A Llama, equal on every rank; with LoRA on attention and head if asked."""
    import transformers

    torch.manual_seed(0)
    sizes = {"vocab_size": 61, "hidden_size": 16, "intermediate_size": 32, "pad_token_id": 0}
    config = transformers.LlamaConfig(
        **sizes, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2, **options
    )
    model = transformers.LlamaForCausalLM(config)
    if not adapters:
        return model
    import peft

    lora = peft.LoraConfig(r=4, target_modules=["q_proj", "lm_head"], init_lora_weights=False)
    return peft.get_peft_model(model, lora)


def batch(part=slice(None)):
    gen = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 61, (B, T), generator=gen)
    mask = torch.arange(T).expand(B, T) >= torch.tensor([[4], [2], [6], [3]])
    old = -4 + 0.3 * torch.randn(B, T - 1, generator=gen)
    request = {
        "advantages": torch.tensor([1.0, -0.5, 0.3, 2.0])[part],
        "completion_mask": mask[part],
        "old_logprobs": old[part],
        "objective": fastpo.dapo(),
        "normalizer": int(mask[:, 1:].sum()) / (1 if part == slice(None) else RANKS),
    }
    return ids[part], request


def gradients(model):
    return {
        name.replace("module.", "").replace("_orig_mod.", ""): parameter.grad
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }


def one_process(**options):
    """Loss and gradients of the whole batch on the bare model."""
    model = tiny(**options)
    ids, request = batch()
    result = causal_lm_policy_loss(innermost(model), ids, **request)
    result.loss.backward()
    return result, gradients(model)


def assert_equal(grads, truth, rtol=1e-5):
    assert grads.keys() == truth.keys()
    for name, grad in truth.items():
        assert (grads[name] - grad).norm() <= rtol * grad.norm(), name


def own_part(rank):
    ids, request = batch(slice(rank * B // RANKS, (rank + 1) * B // RANKS))
    return ids, request


def ddp(rank, adapters=False):
    """Ranks hold different samples; all-reduced gradients are those of the whole batch."""
    truth = one_process(adapters=adapters)[1]
    model = torch.nn.parallel.DistributedDataParallel(attach(tiny(adapters=adapters)))
    ids, request = own_part(rank)
    for _ in range(2):  # the first call compares the head, the second does not
        model.zero_grad()
        result = model(input_ids=ids, policy_loss=request)
        result.loss.backward()
        assert_equal(gradients(model), truth)
    assert result.logprobs.shape == (B // RANKS, T - 1)


def peft_in_ddp(rank):
    ddp(rank, adapters=True)


def fsdp2(rank):
    """Sharded weights, the head a unit of its own or not; attached before or after sharding."""
    from torch.distributed.fsdp import fully_shard

    truth = one_process()[1]
    ids, request = own_part(rank)
    for alone, first in ((True, True), (False, False)):
        model = attach(tiny()) if first else tiny()
        for layer in model.model.layers:
            fully_shard(layer)
        if alone:
            fully_shard(model.lm_head)
        fully_shard(model)
        model = attach(model)
        # GSPO at one token a chunk and own log-probs read the weight again in backward
        for options in (
            {},
            {},
            {"objective": fastpo.gspo(), "chunk_tokens": 3, "normalizer": None},
        ):
            model.zero_grad()
            model(input_ids=ids, policy_loss={**request, **options}).loss.backward()
            if not options:
                full = {n: g.full_tensor() for n, g in gradients(model).items()}
                assert_equal(full, truth)
        with pytest.raises(TypeError, match=r"FSDPLlamaForCausalLM, expected a bare .*attach"):
            causal_lm_policy_loss(model, ids, **request)


def fsdp2_casts(rank):
    """bf16 compute: old log-probs stay fp32 where attach came last, and are refused else."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    ids, request = own_part(rank)
    late = attach(fully_shard(tiny(), mp_policy=policy))
    result = late(input_ids=ids, policy_loss=request)
    exact = {k: v.double() if k == "old_logprobs" else v for k, v in request.items()}
    again = late(input_ids=ids, policy_loss=exact)
    torch.testing.assert_close(result.metrics["ratio"], again.metrics["ratio"])
    early = fully_shard(attach(tiny()), mp_policy=policy)
    with pytest.raises(TypeError, match=r"advantages arrived as torch.bfloat16"):
        early(input_ids=ids, policy_loss=request)


def run_rank(target: str, rendezvous: str, rank: str) -> None:
    """One process of `test_ranks_equal_one_process`."""
    init = f"file://{rendezvous}"
    dist.init_process_group("gloo", init_method=init, rank=int(rank), world_size=RANKS)
    try:
        globals()[target](int(rank))
        dist.barrier()
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)  # as in test_distributed_linear: gloo threads outlive Python's finalization


@pytest.mark.slow
@pytest.mark.parametrize("target", ["ddp", "fsdp2", "fsdp2_casts", "peft_in_ddp"])
def test_ranks_equal_one_process(target, tmp_path):
    """REGRESSIONS 26, 32: two gloo ranks, each with half the batch, against the whole batch."""
    pytest.importorskip("transformers")
    if target == "peft_in_ddp":
        pytest.importorskip("peft")
    command = [sys.executable, __file__, target, str(tmp_path / "rendezvous")]
    root = str(Path(__file__).parents[1])
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": root}
    processes = [
        subprocess.Popen([*command, str(rank)], env=environment, stderr=subprocess.PIPE, text=True)
        for rank in range(RANKS)
    ]
    errors = [process.communicate(timeout=200)[1] for process in processes]
    for process, error in zip(processes, errors, strict=True):
        assert process.returncode == 0, error


@pytest.mark.slow
def test_accelerate_casts_as_it_does_without_us():
    """REGRESSIONS 32: under mixed_precision="bf16" the trunk runs in bf16 and the loss is fp32."""
    accelerate = pytest.importorskip("accelerate")
    # A process has one accelerator state: a trainer of another test may have made it without bf16.
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    pytest.importorskip("transformers")
    ids, request = batch()
    plain = tiny()
    with torch.autocast("cpu", torch.bfloat16):
        logits = plain(input_ids=ids).logits
        assert logits.dtype == torch.bfloat16
        logits = logits.float()
    accelerator = accelerate.Accelerator(mixed_precision="bf16", cpu=True)
    model = accelerator.prepare(attach(tiny()))
    result = model(input_ids=ids, policy_loss=request)
    accelerator.backward(result.loss)
    assert result.loss.dtype == torch.float32
    own = logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
    mask = request["completion_mask"][:, 1:]
    rounding = torch.finfo(torch.bfloat16).eps * logits.abs().max()  # stock rounds its logits
    assert (result.logprobs - own)[mask].abs().max() <= rounding
    exact = one_process()[0]
    assert (result.logprobs - exact.logprobs)[mask].abs().max() > 1e-4  # autocast was on
    with pytest.raises(TypeError, match="prepared by accelerate, expected a bare"):
        causal_lm_policy_loss(model, ids, **request)
    with pytest.raises(ValueError, match="forward has been replaced since attach"):
        detach(model)
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.slow
@pytest.mark.parametrize("in_place", [False, True])
def test_the_trunk_runs_compiled(in_place):
    """REGRESSIONS 32: torch.compile sees the trunk, compiles it once, and the numbers stay."""
    pytest.importorskip("transformers")
    from torch._dynamo.testing import CompileCounter

    expected, truth = one_process()
    ids, request = batch()
    counter = CompileCounter()
    model = attach(tiny())
    if in_place:
        model.compile(backend=counter)
        compiled = model
    else:
        compiled = torch.compile(model, backend=counter)
    for calls in range(4):
        model.zero_grad()
        result = compiled(input_ids=ids, policy_loss=request)
        result.loss.backward()
        assert_equal(gradients(model), truth)
        if calls == 1:
            frames = counter.frame_count
    torch.testing.assert_close(result.loss, expected.loss)
    assert counter.op_count > 100  # the layers' operations, not a stray one
    assert counter.frame_count == frames
    with pytest.raises(TypeError, match=r"(OptimizedModule|compiled in place), expected a bare"):
        causal_lm_policy_loss(compiled, ids, **request)


def test_gradient_checkpointing_gives_the_same_gradients():
    """REGRESSIONS 32: layers recomputed in backward, the head once."""
    pytest.importorskip("transformers")
    truth = one_process()[1]
    ids, request = batch()
    model = attach(tiny()).train()
    model.gradient_checkpointing_enable()
    model(input_ids=ids, policy_loss=request).loss.backward()
    assert_equal(gradients(model), truth)


if __name__ == "__main__":
    run_rank(*sys.argv[1:])
