"""fastpo inside verl 0.9: its registries, its config, its fused heads, compared with verl's own."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import parity_notes
import pytest
import torch

import fastpo
from fastpo.integrations import verl as integration

pytestmark = pytest.mark.peer

B, T = 6, 9
OWN = {  # ours: verl's
    "fastpo_dapo": "vanilla",
    "fastpo_sapo": "sapo",
    "fastpo_gpg": "gpg",
    "fastpo_gmpo": "geo_mean",
    "fastpo_gspo": "gspo",
    "fastpo_cispo": "cispo",
    "fastpo_dppo": "dppo_tv",
    "fastpo_dppo_kl": "dppo_kl",
    "fastpo_dro": "dro",
}
MODES = list(integration.AGGREGATIONS)
COUNTS = {
    "local": {},
    "global": {"batch_num_tokens": 40, "global_batch_size": 12, "dp_size": 2},
}


@pytest.fixture(scope="module")
def installed(verl):
    integration.install()
    return verl


class Data:
    """What verl's actor hands over: some tokens masked, one sequence without any, weights."""

    def __init__(self):
        gen = torch.Generator().manual_seed(3)
        self.logprobs = -2 * torch.rand(B, T, generator=gen, dtype=torch.float64)
        self.old = self.logprobs + 0.6 * torch.randn(B, T, generator=gen, dtype=torch.float64)
        self.advantages = torch.randn(B, T, generator=gen, dtype=torch.float64)
        self.weights = torch.rand(B, T, generator=gen, dtype=torch.float64) + 0.5
        self.mask = (torch.rand(B, T, generator=gen) > 0.3).double()
        self.mask[2] = 0

    def call(self, core, name: str, config, mode: str | None = None):
        """(loss, its gradient), metrics."""
        logp = self.logprobs.clone().requires_grad_()
        loss, metrics = core.get_policy_loss_fn(name)(
            old_log_prob=self.old,
            log_prob=logp,
            advantages=self.advantages,
            response_mask=self.mask,
            config=config,
            rollout_is_weights=self.weights,
            **({} if mode is None else {"loss_agg_mode": mode}),
        )
        return (loss.detach(), *torch.autograd.grad(loss, logp)), metrics


def actor(config_class, counts="local", **settings):
    settings = {"clip_ratio_low": 0.2, "clip_ratio_high": 0.28, "clip_ratio_c": 1.9} | settings
    from verl.workers.config.actor import PolicyLossConfig

    settings["policy_loss"] = PolicyLossConfig(dro_beta=0.3)
    config = config_class(strategy="fsdp", rollout_n=1, use_dynamic_bsz=True, **settings)
    config.global_batch_info.update(COUNTS[counts])
    return config


@pytest.mark.parametrize("counts", COUNTS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", OWN)
def test_a_preset_is_verls_own_loss_with_every_setting_of_its_config(
    installed, name, mode, counts, record_property
):
    """REGRESSIONS 38: clips, tau, aggregation and counts are the config's; metrics too."""
    core, config_class = installed
    settings = {"loss_scale_factor": 7} if mode.endswith("norm") and counts == "global" else {}
    config = actor(config_class, counts, tau_pos=1.3, tau_neg=1.7, **settings)
    if settings:
        config.global_batch_info["loss_scale_factor"] = 7
    data = Data()
    if name == "fastpo_dro":
        with pytest.raises(ValueError, match=r"rollout_is_weights with objective 'dro'"):
            data.call(core, name, config, mode)
        data.weights = None
    ours, metrics = data.call(core, name, config, mode)
    theirs, expected = data.call(core, OWN[name], config, mode)
    parity_notes.note(record_property, "verl", f"{name}, verl's {OWN[name]}", ours, theirs)
    torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=1e-9)  # verl adds 1e-8 to counts
    assert {key: metrics[key] for key in expected} == pytest.approx(expected, rel=1e-6)


def test_a_token_far_off_policy_counts_20_nats_in_the_kl(installed):
    """As in verl, whose log-ratio is clamped before its mean."""
    core, config_class = installed
    data = Data()
    data.mask[0, 0] = 1
    data.old[0, 0] = data.logprobs[0, 0] + 50
    config = actor(config_class)
    (_, ours), (_, theirs) = (
        data.call(core, n, config, MODES[0]) for n in ("fastpo_dapo", "vanilla")
    )
    assert ours["actor/ppo_kl"] == pytest.approx(theirs["actor/ppo_kl"], rel=1e-6)


def test_the_configs_numbers_reach_the_loss(installed):
    """Each of them changes it: a comparison with verl alone could pass with both ignored."""
    core, config_class = installed
    data = Data()
    base, _ = data.call(core, "fastpo_dapo", actor(config_class))
    for change in ({"clip_ratio_low": 0.1}, {"clip_ratio_high": 0.5}, {"clip_ratio_c": 1.4}):
        assert data.call(core, "fastpo_dapo", actor(config_class, **change))[0][0] != base[0]
    sapo, _ = data.call(core, "fastpo_sapo", actor(config_class))
    assert data.call(core, "fastpo_sapo", actor(config_class, tau_neg=2.0))[0][0] != sapo[0]


def test_an_objective_of_ones_own_meets_a_config_that_says_otherwise(installed):
    """REGRESSIONS 38: one of the two would be ignored, so it raises; alike, it is verl's own."""
    core, config_class = installed
    integration.register("mine", fastpo.dapo(ratio_max=1.9))
    data = Data()
    ours, _ = data.call(core, "mine", actor(config_class), "token-mean")
    theirs, _ = data.call(core, "vanilla", actor(config_class), "token-mean")
    torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=1e-9)
    with pytest.raises(ValueError, match=r"gives clip_high=0.3, but .* has clip_high=0.28"):
        data.call(core, "mine", actor(config_class, clip_ratio_high=0.3))
    with pytest.raises(ValueError, match=r"gives aggregation=sequence_mean, but"):
        data.call(core, "mine", actor(config_class), "seq-mean-token-mean")
    with pytest.raises(ValueError, match="loss_agg_mode is 'token_mean', expected one of"):
        data.call(core, "fastpo_dapo", actor(config_class), "token_mean")
    with pytest.raises(ValueError, match=r"kl_coef=0.1 .* expected 0: verl adds"):
        integration.register("fastpo_kl", fastpo.dapo(kl_coef=0.1))
    with pytest.raises(ValueError, match=r"ratio_level='sequence', but verl hands over one"):
        integration.register("fastpo_gspo", fastpo.gspo())


@pytest.mark.parametrize("name", ["grpo", "dr_grpo", "rloo", "opo"])
def test_an_estimator_is_verls_own(installed, name):
    """Groups by uid in any order and of any size. verl gives a group of one its raw reward."""
    core, _ = installed
    gen = torch.Generator().manual_seed(5)
    rewards = torch.zeros(7, T).scatter_(1, torch.full((7, 1), T - 2), torch.rand(7, 1))
    mask = (torch.rand(7, T, generator=gen) > 0.2).float()
    index = np.array(["b", "a", "b", "a", "b", "c", "c"], dtype=object)
    keys = {"grpo": "grpo", "dr_grpo": "grpo", "rloo": "rloo", "opo": "opo"}
    options = {"norm_adv_by_std_in_grpo": False} if name == "dr_grpo" else {}
    arguments = {"token_level_rewards": rewards, "response_mask": mask, "index": index}
    theirs = core.get_adv_estimator_fn(keys[name])(**arguments, **options)
    ours = core.get_adv_estimator_fn(f"fastpo_{name}")(**arguments, config={})
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    if name == "dr_grpo":
        config = {"norm_adv_by_std_in_grpo": False}
        by_config = core.get_adv_estimator_fn("fastpo_grpo")(**arguments, config=config)
        torch.testing.assert_close(by_config, theirs, rtol=1e-5, atol=1e-6)


def _tiny(kind: str):
    import transformers

    torch.manual_seed(0)
    sizes = {
        "vocab_size": 61,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
    }
    extra = {
        "Llama": {},
        "Gemma2": {"head_dim": 8, "final_logit_softcapping": 0.5},
        "Granite": {"logits_scaling": 3.0},
        "Cohere": {"logit_scale": 0.4},
    }[kind]
    config = getattr(transformers, f"{kind}Config")(**sizes, **extra)
    return getattr(transformers, f"{kind}ForCausalLM")(config).eval()


@pytest.mark.parametrize("kind", ["Llama", "Gemma2", "Granite", "Cohere"])
def test_the_fused_head_of_an_fsdp_model_is_the_models_own(installed, kind):
    """Softcap and scale included, where verl's own fused head is off by up to 29 %."""
    from verl.models.transformers import monkey_patch

    model = _tiny(kind)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(20)
    ids = torch.randint(3, 61, (2, 12), generator=torch.Generator().manual_seed(1))
    logits = model(input_ids=ids).logits.double() / 0.9
    labels = ids.roll(-1, dims=-1)
    expected = logits.log_softmax(-1).gather(-1, labels[..., None])[..., 0]
    forward = type(model).forward
    try:
        monkey_patch.patch_forward_with_backends(model, True, "fastpo")
        out = model(input_ids=ids, temperature=0.9, return_dict=True, use_cache=False)
    finally:
        type(model).forward = forward
    torch.testing.assert_close(out.log_probs.double(), expected, rtol=1e-5, atol=1e-5)
    entropy = torch.distributions.Categorical(logits=logits).entropy()
    torch.testing.assert_close(out.entropy.double(), entropy, rtol=1e-5, atol=1e-5)
    (out.log_probs.sum() + out.entropy.sum()).backward()
    assert model.get_output_embeddings().weight.grad.abs().sum() > 0


def test_the_head_of_multimodal_models_and_of_megatron(installed):
    """FusedLinearForPPO with impl_backend="fastpo", and linear_cross_entropy, are verl's torch."""
    from verl.utils.experimental import torch_functional

    from fastpo.integrations import verl_head

    gen = torch.Generator().manual_seed(2)
    hidden, weight = torch.randn(2, 5, 8, generator=gen), torch.randn(31, 8, generator=gen)
    labels = torch.randint(0, 31, (2, 5), generator=gen)
    results = []
    for backend in ("torch", "fastpo"):
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        head = torch_functional.FusedLinearForPPO(impl_backend=backend)
        logprobs, entropy = head(h, w, labels, temperature=0.7)
        (logprobs.sum() + 0.1 * entropy.sum()).backward()
        results.append((logprobs.detach(), entropy.detach(), h.grad, w.grad))
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-5)
    flat = verl_head.linear_cross_entropy(hidden, weight, labels, 0.7, "none", None)
    torch.testing.assert_close(flat[0], results[0][0].flatten(), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="reduction is 'mean', expected 'none'"):
        verl_head.linear_cross_entropy(hidden, weight, labels, 0.7, "mean")
    with pytest.raises(ValueError, match="Unsupported FusedLinearForPPO backend: bogus"):
        torch_functional.FusedLinearForPPO(impl_backend="bogus")


@pytest.mark.slow
def test_a_worker_process_finds_the_losses_by_importing_verl_alone():
    """REGRESSIONS 36: a registry entry that Ray's workers never see."""
    pytest.importorskip("ray", reason="`import verl` needs ray")
    code = (
        "import verl; from verl.trainer.ppo import core_algos as c; "
        "print(c.get_policy_loss_fn('fastpo_dapo').__module__, "
        "callable(c.get_adv_estimator_fn('fastpo_rloo')))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.split()[-2:] == ["fastpo.integrations.verl", "True"], done.stderr[-2000:]
