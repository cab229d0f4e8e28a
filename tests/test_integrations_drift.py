"""Every name of another trainer that an integration hooks or calls, pinned: where it is, and what
it takes. A release that moves one fails here, by name, before anybody trains with it."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path
from types import EllipsisType
from typing import Any

import peer_wheels
import pytest

pytestmark = pytest.mark.peer

# module: name -> its arguments or fields; with ... at the end the first of them
LOSS = ("old_log_prob", "log_prob", "advantages", "response_mask", "loss_agg_mode", "config")
HOOKS = {
    "trl": {
        "trl.trainer.utils": {
            "add_fused_lm_head": ("model", "temperature", "cast_lm_head_to_fp32", "outputs"),
            "_ChunkedLogProbFunction": (),
            "maybe_gather_lm_head_ctx": ...,
        },
        "trl.kernels.chunked_logprob": {
            "ChunkedLogProbFunction.forward": (
                *("ctx", "hidden", "weight", "bias", "targets"),
                *("temperature", "chunk_size", "final_logit_softcapping", "logit_scale", "outputs"),
            ),
        },
        "trl.trainer.grpo_trainer": {
            "GRPOTrainer._compute_loss": ("self", "model", "inputs"),
            "GRPOTrainer._get_per_token_logps_and_entropies": (
                *("self", "model", "input_ids", "attention_mask", "logits_to_keep", ...),
            ),
        },
        "trl.trainer.rloo_trainer": {
            "RLOOTrainer._compute_loss": ("self", "model", "inputs"),
            "RLOOTrainer._get_per_token_logps_and_entropies": (
                *("self", "model", "input_ids", "attention_mask", "logits_to_keep", ...),
            ),
        },
        "trl.experimental.gmpo.gmpo_trainer": {
            "GMPOTrainer._compute_loss": ("self", "model", "inputs"),
        },
        "trl.experimental.async_grpo.async_grpo_trainer": {
            "AsyncGRPOTrainer.compute_loss": (
                *("self", "model", "inputs", "return_outputs", "num_items_in_batch"),
            ),
        },
        "trl.experimental.async_grpo.packing": {"TreeRow.pack": ("self",)},
    },
    "verl": {
        "verl.trainer.ppo.core_algos": {
            "register_policy_loss": ("name",),
            "get_policy_loss_fn": ("name",),
            "register_adv_est": ("name_or_enum",),
            "ADV_ESTIMATOR_REGISTRY": (),
            "compute_policy_loss_vanilla": (*LOSS, "rollout_is_weights"),
        },
        "verl.models.transformers.monkey_patch": {
            "patch_forward_with_backends": ("model", "use_fused_kernels", "fused_kernels_backend"),
        },
        "verl.utils.experimental.torch_functional": {
            "FusedLinearForPPO.__init__": ("self", "chunk_size", "impl_backend"),
            "FusedLinearForPPO.forward": (
                *("self", "hidden_states", "vocab_weights", "input_ids", "temperature"),
            ),
        },
        "verl.models.transformers.dense_common": {
            "CausalLMOutputForPPO": ("log_probs", "entropy"),
            "forward_base_model": ("self", "input_ids", ...),
            "forward_with_torch_backend": ("self", "input_ids", ...),
        },
        "verl.utils.kernel.linear_cross_entropy": {"linear_cross_entropy": ()},
        "verl.models.mcore.model_forward_fused": {"linear_cross_entropy": ()},
        "verl.models.mcore.model_forward_1f1b_overlap": {"linear_cross_entropy": ()},
    },
    "skyrl": {
        "skyrl.backends.skyrl_train.utils.ppo_utils": {
            "register_policy_loss": ("name",),
            "PolicyLossRegistry": ...,
            "ppo_policy_loss": (
                *("log_probs", "old_log_probs", "advantages", "config", "loss_mask"),
                "rollout_logprobs",
            ),
        },
        "skyrl.backends.skyrl_train.utils.off_policy_correction_utils": {
            "apply_off_policy_correction": (
                *("loss", "old_log_probs", "rollout_logprobs", "loss_mask"),
                "off_policy_correction",
            ),
        },
        "skyrl.backends.skyrl_train.distributed.megatron.model_utils": {
            "_fused_lm_head_logprob_apply": (
                *("backend", "hidden", "weight", "target", "vocab_start_index"),
                *("vocab_end_index", "chunk_size", "tp_group", "inference_only"),
            ),
        },
    },
    "openrlhf": {
        "openrlhf.models.loss": {
            "aggregate_loss": (
                *("loss", "loss_mask", "token_level_loss", "dp_size", "batch_num_tokens"),
                "global_batch_size",
            ),
            "PolicyLoss.__init__": (
                *("self", "clip_eps_low", "clip_eps_high", "dual_clip", "token_level_loss"),
                *("policy_loss_type", "is_correction_level", "is_correction_mode"),
                *("is_correction_gating", "is_correction_threshold"),
            ),
            "PolicyLoss.forward": (
                *("self", "log_probs", "old_log_probs", "advantages", "action_mask"),
                *("rollout_log_probs", "dp_size", "batch_num_tokens", "global_batch_size"),
            ),
        },
        "openrlhf.trainer.ray.ppo_actor": {"PolicyLoss": ()},
    },
    "areal": {
        "areal.utils.functional.functional": {
            "ppo_actor_loss_fn": (
                *("logprobs", "proximal_logprobs", "old_logprobs", "advantages", "eps_clip"),
                *("loss_mask", "eps_clip_higher", "c_clip", "rejection_sampling"),
                *("importance_sampling_level", "cu_seqlens"),
            ),
            "apply_rejection_sampling": (
                *("proximal_logprobs", "old_logprobs", "loss_mask", "cu_seqlens", "config"),
            ),
        },
        "areal.trainer.ppo.actor": {"ppo_actor_loss_fn": ()},
    },
    "ms_swift": {
        "swift.rlhf_trainers.grpo_trainer": {
            "GRPOTrainer._get_logps_via_local_forward": (
                *("self", "model", "model_inputs", "logits_to_keep", "input_ids"),
                "compute_entropy",
            ),
        },
    },
}


def installed(package: str) -> tuple[Path, str]:
    """Where a package is, as a wheel or in this environment, and its version."""
    for distributions in (metadata.distributions(path=[str(peer_wheels.PEERS)]), None):
        if distributions is None:
            break
        for distribution in distributions:
            if distribution.name == package:
                return peer_wheels.PEERS, distribution.version
    try:
        distribution = metadata.distribution(package)
    except metadata.PackageNotFoundError:
        pytest.skip(f"needs {package}")
    return Path(distribution.locate_file("")), distribution.version


def moved(package: str) -> list[str]:
    """What is not where it was, as sentences."""
    root, version = installed(package)
    found = []
    for module, names in HOOKS[package].items():
        outline = peer_wheels.outline(root, module)
        for name, wanted in names.items():
            got = outline.get(name)
            if got is None:
                found.append(f"{package} {version} moved {module}.{name}")
            elif not _agree(got, wanted):
                found.append(f"{package} {version}: {module}.{name} takes {got}, not {wanted}")
    return found


def _agree(got: tuple[str, ...], wanted: tuple[Any, ...] | EllipsisType) -> bool:
    if wanted is ...:
        return True
    open_ended = wanted[-1:] == (...,)
    return got[: len(wanted) - 1] == wanted[:-1] if open_ended else got == wanted


@pytest.mark.parametrize("package", HOOKS)
def test_the_hooked_names_are_where_they_were(package):
    assert moved(package) == []


def test_a_moved_name_is_told_with_the_version(monkeypatch):
    version = installed("verl")[1]
    names = {"register_policy_loss": ("label",), "register_loss": ()}
    monkeypatch.setitem(HOOKS, "verl", {"verl.trainer.ppo.core_algos": names})
    assert moved("verl") == [
        f"verl {version}: verl.trainer.ppo.core_algos.register_policy_loss takes ('name',), "
        "not ('label',)",
        f"verl {version} moved verl.trainer.ppo.core_algos.register_loss",
    ]
