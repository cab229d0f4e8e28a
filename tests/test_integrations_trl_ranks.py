"""TRL's four RL trainers with fastpo against themselves on two ranks: DDP, FSDP2 and ZeRO-3.

accelerate shards on GPUs only. Here it is told that these two processes are such ranks; what it,
TRL, torch and DeepSpeed then do, runs as on a GPU, over gloo.
"""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
import traceback
from pathlib import Path

import pytest
import torch
import trl_runs

pytestmark = [pytest.mark.slow, pytest.mark.peer]

ROOT = Path(__file__).parents[1]
RANKS = 2
OFF_POLICY = {"num_iterations": 2, "gradient_accumulation_steps": 2}
SETTINGS = {
    "GRPO": {"loss_type": "dapo", "beta": 0.1, "epsilon": 0.1, **OFF_POLICY},
    "RLOO": {"beta": 0.1, "epsilon": 0.05, **OFF_POLICY},
    "GMPO": {"beta": 0.1, "epsilon": 0.05, **OFF_POLICY},
    "AsyncGRPO": {"epsilon": 0.1, "gradient_accumulation_steps": 2},
}
ZERO3 = {
    **{"train_batch_size": "auto", "train_micro_batch_size_per_gpu": "auto"},
    **{"gradient_accumulation_steps": "auto", "gradient_clipping": "auto"},
    # 0: every parameter is partitioned, as large ones are
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
}


def sharded(strategy: str) -> dict[str, object]:
    """Settings of a TRL config with which the model is sharded over these processes."""
    if strategy == "ddp":
        return {"ddp_backend": "gloo"}
    from accelerate.state import AcceleratorState, PartialState
    from accelerate.utils import DistributedType

    if strategy == "zero3":
        import deepspeed

        # A shared-memory all-reduce, which takes a compiler and half a minute
        importlib.import_module("deepspeed.comm.torch").build_shm_op = lambda: None
        deepspeed.init_distributed("gloo", auto_mpi_discovery=False)
    AcceleratorState._reset_state(reset_partial_state=True)
    PartialState(cpu=True, backend="gloo")
    gpus = {"fsdp2": DistributedType.MULTI_GPU, "zero3": DistributedType.DEEPSPEED}
    PartialState._shared_state["distributed_type"] = gpus[strategy]
    configured = {"accelerator_config": {"use_configured_state": True}}
    if strategy == "zero3":
        return configured | {"deepspeed": ZERO3, "use_cpu": False}
    layers = {"transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]}
    return configured | {"fsdp": True, "fsdp_config": {"version": 2, **layers}}


def is_sharded(strategy: str, model: torch.nn.Module) -> bool:
    """Whether it came to that."""
    head = model.get_output_embeddings().weight
    named = {"ddp": "data", "fsdp2": "full_tensor", "zero3": "ds_id"}[strategy]
    return hasattr(head, named) and (strategy != "zero3" or head.numel() == 0)


def compared(kind: str, strategy: str, folder: Path) -> None:
    """A trainer of TRL's and fastpo's, one after the other, in this process and another."""
    import trl_async_runs

    modules = {"GMPO": "trl.experimental.gmpo", "AsyncGRPO": "trl.experimental.async_grpo"}
    module = importlib.import_module(modules.get(kind, "trl"))
    stock, config = (getattr(module, f"{kind}{end}") for end in ("Trainer", "Config"))
    ours = getattr(importlib.import_module("fastpo.integrations.trl"), f"{kind}Trainer")
    run_of = trl_runs.trained
    if kind == "AsyncGRPO":
        for place, name, value in trl_async_runs.patches():
            setattr(place, name, value)
        run_of = trl_async_runs.trained

    def run(trainer_class):
        class Watched(trainer_class):
            def train(self, *args, **kwargs):
                result = super().train(*args, **kwargs)
                assert is_sharded(strategy, self.accelerator.unwrap_model(self.model))
                return result

        return run_of(Watched, config, folder, **SETTINGS[kind], **sharded(strategy))

    rows = trl_runs.assert_the_same(run, (stock, ours))
    assert torch.distributed.get_world_size() == RANKS
    assert any(v > 0 for row in rows for k, v in row.items() if k.startswith("clip_ratio"))


@pytest.mark.parametrize("kind", SETTINGS)
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2", "zero3"])
def test_two_ranks_equal_stock(strategy, kind, tmp_path):
    """REGRESSIONS 32: the loss is made inside the wrapper's forward, its normalizer all ranks'."""
    pytest.importorskip("trl")
    pytest.importorskip("datasets")
    if strategy == "zero3":
        pytest.importorskip("deepspeed")
    processes = []
    for rank in range(RANKS):
        trl_runs.save_tiny(tmp_path / str(rank) / "model")
        environment = os.environ | {
            **{"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(RANKS)},
            **{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(29500 + os.getpid() % 1000)},
            **{"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"},
            "PYTHONPATH": os.pathsep.join(
                [str(ROOT), str(ROOT / "tools"), os.environ.get("PYTHONPATH", "")]
            ),
        }
        command = [sys.executable, __file__, kind, strategy, str(tmp_path / str(rank))]
        processes.append(
            subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
        )
    errors = [process.communicate(timeout=600)[1] for process in processes]
    for process, error in zip(processes, errors, strict=True):
        assert process.returncode == 0, error[-3000:]


if __name__ == "__main__":
    try:
        compared(*sys.argv[1:3], Path(sys.argv[3]))
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)  # as in test_distributed_linear: gloo threads outlive Python's finalization
