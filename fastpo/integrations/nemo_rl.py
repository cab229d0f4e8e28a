"""NeMo-RL: a loss of any of fastpo's objectives, and its fused LM head.

    from fastpo.integrations import nemo_rl
    loss_fn = nemo_rl.policy_loss(fastpo.dapo())     # in place of ClippedPGLossFn(...)
    nemo_rl.install_head()                           # in every worker

The objective's numbers are those you give, so none of `loss_fn` in NeMo-RL's config is read: build
it where `ClippedPGLossFn(cfg)` is built. Token means are over `global_valid_toks`, sequence means
over `global_valid_seqs`, as NeMo-RL has them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastpo.integrations._tokens import score_head_shard
from fastpo.mismatch import rollout_correction
from fastpo.objective import Objective
from fastpo.ops.from_logprobs import policy_loss_from_logprobs


def policy_loss(objective: Objective, **correction: Any) -> Any:
    """A NeMo-RL `LossFunction` (input type LOGPROB).

    Args:
        objective: without entropy bonus, of which NeMo-RL passes none; a KL penalty reads
            `reference_policy_logprobs`.
        correction: keywords of `fastpo.rollout_correction`, of prev over generation log-probs
            (`mode="truncate", high=2.0`); none = no correction.
    """
    from nemo_rl.algorithms.loss.interfaces import LossInputType, LossType

    if objective.entropy_coef:
        raise ValueError(f"entropy_coef is {objective.entropy_coef}, expected 0: no entropy here")

    class PolicyLoss:
        input_type = LossInputType.LOGPROB
        per_token = objective.aggregation == "token_mean"
        loss_type = LossType.TOKEN_LEVEL if per_token else LossType.SEQUENCE_LEVEL

        def __call__(
            self,
            next_token_logprobs: Tensor,
            data: Any,
            global_valid_seqs: Tensor,
            global_valid_toks: Tensor,
        ) -> tuple[Tensor, dict[str, float]]:
            mask = data["token_mask"][:, 1:].bool() & data["sample_mask"][:, None].bool()
            keep = data.get("curr_logprobs_keep_mask")
            mask = mask if keep is None else mask & keep.bool()
            old, weights = data["prev_logprobs"][:, 1:], None
            if correction:
                corrected = rollout_correction(
                    old, data["generation_logprobs"][:, 1:], mask=mask, **correction
                )
                mask, weights = corrected.mask, corrected.weights
            ref = data["reference_policy_logprobs"][:, 1:] if objective.kl_coef else None
            result = policy_loss_from_logprobs(
                next_token_logprobs,
                data["advantages"][:, 1:],
                objective=objective,
                mask=mask,
                old_logprobs=old,
                ref_logprobs=ref,
                importance_weights=weights,
                normalizer=global_valid_toks if self.per_token else global_valid_seqs,
            )
            sums = dict(result.metrics)
            names, values = zip(*(sums | {"loss": result.loss.detach()}).items(), strict=True)
            host = dict(zip(names, torch.stack([x.float() for x in values]).tolist(), strict=True))
            host["num_valid_samples"] = float(data["sample_mask"].sum())
            return result.loss, host

    return PolicyLoss()


def install_head() -> None:
    """Let NeMo-RL's linear cross-entropy fusion be `linear_token_logprobs`."""
    from nemo_rl.distributed import model_utils

    model_utils.from_parallel_hidden_states_to_logprobs = from_parallel_hidden_states_to_logprobs


def from_parallel_hidden_states_to_logprobs(
    tensor_parallel_hidden_states: Tensor,
    output_weight_layer: Tensor,
    runtime_gather_output: bool,
    target: Tensor,
    vocab_start_index: int,
    vocab_end_index: int,
    tp_group: Any,
    inference_only: bool = False,
    cp_group: Any = None,
    chunk_size: int | None = None,
) -> Tensor:
    """Log-probs [B, S - 1] of hidden [S / tp, B, D], sequence first as Megatron keeps it.

    Position t scores target t + 1. The weight is this rank's [V / tp, D].

    Raises:
        ValueError: context parallelism, which NeMo-RL's own fusion lacks too.
    """
    if cp_group is not None and cp_group.size() > 1:
        raise ValueError(f"cp_group has {cp_group.size()} ranks, expected 1 with the fused head")
    group = None if tp_group is None or tp_group.size() == 1 else tp_group
    hidden = tensor_parallel_hidden_states
    hidden = (hidden if group is None else _Gather.apply(hidden, group))[:-1].transpose(0, 1)
    chunk = None if chunk_size is None else chunk_size * hidden.shape[0]
    vocabulary, tokens = (vocab_start_index, vocab_end_index), target[:, 1:]
    return score_head_shard(
        hidden, output_weight_layer, tokens, vocabulary, group, inference_only, chunk
    )


class _Gather(torch.autograd.Function):
    """The whole sequence from its shards; every rank has the whole gradient, and keeps its part."""

    @staticmethod
    def forward(ctx, shard: Tensor, group: Any) -> Tensor:
        parts = [torch.empty_like(shard) for _ in range(group.size())]
        torch.distributed.all_gather(parts, shard.contiguous(), group=group)
        ctx.part, ctx.parts = group.rank(), group.size()
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return grad.chunk(ctx.parts)[ctx.part], None
