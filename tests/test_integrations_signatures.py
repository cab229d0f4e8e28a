"""fastpo in trainers that are on no package index: against their documented signatures.

The stand-ins below have the names, arguments and types that the trainers' sources have, and the
trainers' formulas in plain torch; none of the trainers runs here.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from types import SimpleNamespace

import pytest
import torch
from trainer_data import B, D, Data, T, V

import fastpo
from fastpo.integrations import megatron, nemo_rl, prime_rl, roll, slime, vime


@dataclass
class LossInputs:
    trainer_logprobs: torch.Tensor
    inference_logprobs: torch.Tensor
    ref_logprobs: torch.Tensor | None
    advantages: torch.Tensor
    loss_mask: torch.Tensor
    loss_weights: torch.Tensor | None = None


@dataclass
class LossOutputs:
    loss: torch.Tensor
    metrics: dict


def test_prime_rls_custom_loss_is_the_sum_over_a_sequence(stand_in):
    """REGRESSIONS 38: preset and fields are the config's; what has no place here raises."""
    stand_in("prime_rl.trainer.rl.loss", LossOutputs=LossOutputs)
    data, logprobs = Data(), Data().leaf(0)
    mask, weights = data.mask[0], torch.rand(T, dtype=torch.float64) + 0.5
    inputs = LossInputs(logprobs, data.old[0], None, data.advantages[0], mask, weights)
    out = prime_rl.policy_loss(inputs, preset="ppo", clip_low=0.2, clip_high=0.3)
    expected = (data.clipped(logprobs, 0) * weights)[mask].sum()
    torch.testing.assert_close(out.loss, expected)
    torch.testing.assert_close(
        torch.autograd.grad(out.loss, logprobs), torch.autograd.grad(expected, logprobs)
    )
    assert 0 <= out.metrics["clip_high"] <= 1
    for fields, message in (
        ({"preset": "nope"}, "preset is 'nope', expected one of"),
        ({"aggregation": "constant"}, "divides the sum over tokens itself"),
        ({"preset": "ipo"}, "loss_weights with preset 'ipo'"),
    ):
        with pytest.raises(ValueError, match=message):
            prime_rl.policy_loss(inputs, **fields)
    with pytest.raises(ValueError, match="entropy_coef != 0 needs `entropy`"):
        prime_rl.policy_loss(
            LossInputs(logprobs, data.old[0], None, data.advantages[0], mask), entropy_coef=0.1
        )


class PrimeHead(torch.nn.Linear):
    def __init__(self, in_features, out_features, chunk_size):
        super().__init__(in_features, out_features, bias=False)
        self.chunk_size = chunk_size

    def forward(self, hidden_states, labels=None, temperature=None, sampling_mask=None):
        return "prime-rl's own"


def test_prime_rls_head_has_a_temperature_per_token_and_sampling_masks(stand_in):
    module = stand_in("prime_rl.trainer.models.layers.lm_head", FusedOutputLinear=PrimeHead)
    prime_rl.install_head()
    prime_rl.install_head()
    assert module.FusedOutputLinear.__mro__[1] is PrimeHead
    data = Data()
    head = module.FusedOutputLinear(D, V, 4)
    head.weight.data = data.weight
    temperature = torch.rand(B, T, generator=torch.Generator().manual_seed(1)) + 0.5
    out = head(data.hidden, data.labels, temperature)
    logprobs, entropy = data.scored(temperature[..., None])
    torch.testing.assert_close(out["logprobs"], logprobs, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(out["entropy"], entropy, rtol=1e-5, atol=1e-5)

    ids = torch.stack([data.labels, (data.labels + 1) % V, torch.full((B, T), -1)], dim=-1)
    ids[0, 0] = -1  # nothing kept
    ids[0, 1, 0] = (data.labels[0, 1] + 5) % V  # the label is not among them
    replayed = head(data.hidden, data.labels, temperature, ids.int())
    logits = data.hidden @ data.weight.t() / temperature[..., None]
    expected = logits.gather(-1, ids[..., :2].clamp(0)).log_softmax(-1)[..., 0]
    expected[0, :2] = logprobs[0, :2]
    torch.testing.assert_close(replayed["logprobs"], expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(replayed["entropy"], entropy, rtol=1e-5, atol=1e-5)
    assert head(data.hidden, data.labels) == "prime-rl's own"
    head.return_mask_logprobs = True
    with pytest.raises(ValueError, match="return_mask_logprobs"):
        head(data.hidden, data.labels, temperature, ids)


@pytest.mark.parametrize("packed", [False, True])
def test_megatrons_grpo_loss_per_token(packed, stand_in):
    data, logprobs = Data(), Data().leaf()
    advantages = data.advantages[:, 0]
    data.advantages = advantages[:, None].expand(B, T).clone()
    inference = data.old + 0.2
    extra = {"inference_logprobs": inference, "is_truncation_coef": 0.7}
    tensors = [logprobs, data.old, data.ref]
    weights = (data.old - inference).exp().clamp(max=0.7)
    expected = data.clipped(logprobs) * weights
    if packed:
        tensors = [x.reshape(1, -1) for x in tensors]
        extra = {"inference_logprobs": inference.reshape(1, -1), "is_truncation_coef": 0.7}
        starts = [index * T for index in range(B)]
        extra |= {"seq_starts": starts, "seq_lengths": [T] * B}
        expected = expected.clone()
        expected[:, -1] = 0  # a sequence scores one token less than it has
    to_ref = data.ref - logprobs
    kl, entropy = to_ref.exp() - to_ref - 1, logprobs.exp() * logprobs
    expected = expected + 0.1 * kl + 0.05 * entropy
    module = stand_in("megatron.rl.rl_utils")
    megatron.install()
    out = module.calculate_grpo_loss(*tensors, advantages, 0.2, 0.3, 0.1, 0.05, **extra)
    assert out[0].shape == tensors[0].shape
    torch.testing.assert_close(out[0].reshape(B, T), expected)
    torch.testing.assert_close(
        torch.autograd.grad(out[0].sum(), logprobs), torch.autograd.grad(expected.sum(), logprobs)
    )
    ratio = (data.logprobs - data.old).exp()
    for mine, truth in zip(out[1:], (kl, ratio, entropy, ratio > 1.3, ratio < 0.8), strict=True):
        torch.testing.assert_close(mine.detach().reshape(B, T), truth.detach())


def test_slimes_loss_on_log_probs_and_a_surrogate_of_fastpo(stand_in):
    """REGRESSIONS 52: its own loss around the two functions; what it passes them counts."""
    data = Data()
    data.old = data.scored()[0].double() + 0.8 * data.advantages.sign() * torch.rand(B, T)
    keep = torch.rand(B, T, V) > 0.2
    keep.scatter_(-1, data.labels[..., None], True)

    def policy_loss_function(args, batch, logits, sum_of_sample_mean):
        scored = [
            module.calculate_log_probs_and_entropy(
                rows, tokens, None, with_entropy=True, log_prob_keep_mask=kept
            )
            for rows, tokens, kept in zip(logits, data.labels, keep, strict=True)
        ]
        logprobs = torch.cat([each[0].squeeze(-1) for each in scored])
        pg_loss, clipped = module.compute_policy_loss(
            torch.cat(batch["log_probs"]) - logprobs,
            torch.cat(batch["advantages"]),
            args.eps_clip,
            args.eps_clip_high,
            eps_clip_c=args.eps_clip_c,
        )
        entropy = sum_of_sample_mean(torch.cat([each[1] for each in scored]))
        return sum_of_sample_mean(pg_loss) - 0.01 * entropy, {"clip": sum_of_sample_mean(clipped)}

    module = stand_in(
        "slime.backends.megatron_utils.loss", policy_loss_function=policy_loss_function
    )
    logits = (data.hidden @ data.weight.t()).double().requires_grad_()
    batch = {"advantages": list(data.advantages), "log_probs": list(data.old)}
    args = SimpleNamespace(eps_clip=0.2, eps_clip_high=0.3, eps_clip_c=1.4)
    loss, metrics = slime.policy_loss(args, batch, logits, lambda x: x.sum() / 3)

    whole = torch.distributions.Categorical(logits=logits)
    kept = torch.distributions.Categorical(logits=logits.masked_fill(~keep, -torch.inf))
    logprobs = kept.log_prob(data.labels)
    expected = (data.clipped(logprobs, dual=1.4) - 0.01 * whole.entropy()).sum() / 3
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    grads = [torch.autograd.grad(x, logits)[0] for x in (loss, expected)]
    torch.testing.assert_close(*grads, rtol=1e-5, atol=1e-6)
    assert metrics["clip"] > 0


def vime_request(data, **changes):
    """vime's LinearLogpRequest, its own checks aside."""
    hidden, rows = data.hidden.reshape(-1, D).requires_grad_(), B * T
    context = SimpleNamespace(
        hidden=hidden,
        projection=SimpleNamespace(weight=data.weight, bias=None),
        vocab_partition=SimpleNamespace(local_start=0, local_size=V, real_size=V, padded_size=V),
    )
    fields = {
        "logits": (hidden @ data.weight.t()) / 0.7,
        "target_ids": data.labels.reshape(rows),
        "tensor_parallel_group": None,
        "with_entropy": True,
        "with_entropy_grad": False,
        "chunk_size": -1,
        "log_prob_keep_mask": None,
        "context": context,
        "temperature": 0.7,
    }
    return SimpleNamespace(**fields | changes)


def test_vimes_provider_from_hidden_states_and_from_logits():
    data = Data()
    logprobs, entropy = (x.reshape(-1) for x in data.scored(0.7))
    for changes, source in (({}, "hidden"), ({"context": None, "temperature": None}, "logits")):
        result = vime.provider(vime_request(data, **changes))
        assert result.keys() == {"logp", "entropy", "backend_id", "contract_id", "provenance"}
        assert result["provenance"]["source"] == source
        torch.testing.assert_close(result["logp"][:, 0], logprobs, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(result["entropy"], entropy, rtol=1e-5, atol=1e-5)
        assert result["logp"].requires_grad and not result["entropy"].requires_grad
    assert vime.provider(vime_request(data, with_entropy=False))["entropy"] is None

    padded = vime_request(data)
    padded.context.vocab_partition.real_size = V - 2
    assert vime.provider(padded)["provenance"]["source"] == "logits"
    keep = torch.zeros(B * T, V, dtype=torch.bool).scatter_(1, data.labels.reshape(-1, 1), True)
    kept = vime.provider(vime_request(data, log_prob_keep_mask=keep))
    torch.testing.assert_close(kept["logp"], torch.zeros(B * T, 1))
    torch.testing.assert_close(kept["entropy"], entropy, rtol=1e-5, atol=1e-5)


def test_nemo_rls_loss_and_head(stand_in):
    stand_in(
        "nemo_rl.algorithms.loss.interfaces",
        LossType=Enum("LossType", "TOKEN_LEVEL SEQUENCE_LEVEL"),
        LossInputType=Enum("LossInputType", "LOGIT LOGPROB"),
    )
    module = stand_in("nemo_rl.distributed.model_utils")
    data, logprobs = Data(), Data().leaf()
    pad = torch.zeros(B, 1, dtype=torch.float64)  # NeMo-RL's tensors have the first token too
    batch = {
        "advantages": torch.cat([pad, data.advantages], 1),
        "prev_logprobs": torch.cat([pad, data.old], 1),
        "generation_logprobs": torch.cat([pad, data.old - 0.2], 1),
        "token_mask": torch.cat([pad, data.mask], 1),
        "sample_mask": torch.tensor([1.0, 0.0, 1.0]),
        "curr_logprobs_keep_mask": torch.ones(B, T),  # 0 where NeMo-RL's filter took the token
    }
    batch["curr_logprobs_keep_mask"][0, data.mask[0].nonzero()[0]] = 0
    loss_fn = nemo_rl.policy_loss(fastpo.ppo(clip_high=0.3), high=1.1)
    assert loss_fn.loss_type.name == "TOKEN_LEVEL" and loss_fn.input_type.name == "LOGPROB"
    loss, metrics = loss_fn(logprobs, batch, torch.tensor(5.0), torch.tensor(40.0))
    mask = data.mask & torch.tensor([True, False, True])[:, None]
    mask = mask & batch["curr_logprobs_keep_mask"].bool()
    expected = (1.1 * data.clipped(logprobs))[mask].sum() / 40
    torch.testing.assert_close(loss, expected)
    assert metrics["num_valid_samples"] == 2 and metrics["tokens"] == mask.sum()
    grpo = nemo_rl.policy_loss(fastpo.grpo(kl_coef=0.1))
    with pytest.raises(KeyError, match="reference_policy_logprobs"):
        grpo(logprobs, batch, torch.tensor(5.0), torch.tensor(40.0))
    with pytest.raises(ValueError, match=r"entropy_coef is 0.1, expected 0"):
        nemo_rl.policy_loss(fastpo.ppo(entropy_coef=0.1))

    nemo_rl.install_head()
    head = module.from_parallel_hidden_states_to_logprobs
    arguments = (data.hidden.transpose(0, 1), data.weight, False, data.labels, 0, V, None)
    logits = data.hidden[:, :-1] @ data.weight.t()
    truth = logits.log_softmax(-1).gather(-1, data.labels[:, 1:, None])[..., 0]
    torch.testing.assert_close(head(*arguments, chunk_size=3), truth, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match=f"has {V} rows, expected those of the ids from 0 to 7"):
        head(data.hidden, data.weight, False, data.labels, 0, 7, None)
    with pytest.raises(ValueError, match="cp_group has 2 ranks"):
        head(*arguments, cp_group=SimpleNamespace(size=lambda: 2))


ROLL = {
    "pg_clip": 0.2,
    "pg_clip_low": 0.1,
    "pg_clip_high": 0.3,
    "use_pg_clip_range": True,
    "dual_clip_loss": True,
    "importance_sampling": "token",
    "loss_agg_mode": "token-mean",
    "use_kl_loss": True,
    "kl_loss_coef": 0.1,
    "rl_loss_coef": 0.5,
    "entropy_loss_coef": 0,
}


def test_rolls_worker_computes_its_loss_by_fastpo(stand_in):
    """REGRESSIONS 38: each setting shows in the loss, or raises."""

    def agg_loss(loss_mat, loss_mask, loss_agg_mode):
        assert loss_agg_mode == "token-mean"
        return (loss_mat * loss_mask).sum() / loss_mask.sum()

    stand_in("roll.pipeline.rlvr.actor_worker", ActorWorker=object)
    stand_in("roll.utils.functionals", agg_loss=agg_loss)
    data, logprobs = Data(), Data().leaf()
    worker = roll.actor_worker()()
    worker.strategy = SimpleNamespace(op_compute_log_probs=lambda **_: logprobs)
    worker.worker_config = SimpleNamespace(use_dynamic_batching_in_train=False)
    whole = torch.cat([torch.zeros(B, 1, dtype=torch.bool), data.mask], 1)
    names = {"old_log_probs": data.old, "ref_log_probs": data.ref, "advantages": data.advantages}
    batch = SimpleNamespace(batch=names | {"response_mask": whole, "input_ids": None})
    worker.pipeline_config = SimpleNamespace(**ROLL)
    loss, metrics = worker.loss_func(batch, None)
    to_ref = data.ref - logprobs
    per_token = data.clipped(logprobs, low=0.1, dual=1.4) + 0.1 * (to_ref.exp() - to_ref - 1)
    torch.testing.assert_close(loss, 0.5 * per_token[data.mask].mean())
    assert metrics["actor/total_loss"] == pytest.approx(loss.item())
    for change in ({"entropy_loss_coef": 0.1}, {"train_infer_ratio_mask": True}):
        worker.pipeline_config = SimpleNamespace(**ROLL | change)
        with pytest.raises(ValueError, match=f"ROLL sets {next(iter(change))}="):
            worker.loss_func(batch, None)
    worker.pipeline_config = SimpleNamespace(**ROLL | {"importance_sampling": "word"})
    with pytest.raises(ValueError, match="importance_sampling is 'word', expected one of"):
        worker.loss_func(batch, None)
