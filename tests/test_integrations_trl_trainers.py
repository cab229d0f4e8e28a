"""TRL's trainers with fastpo against themselves without it: a few steps, everything they log."""

from __future__ import annotations

import functools

import parity_notes
import pytest
import torch
import trl_runs
from trl_runs import GENERATIONS, tiny

pytestmark = [pytest.mark.slow, pytest.mark.peer]

OFF_POLICY = {"num_iterations": 2, "gradient_accumulation_steps": 2}
CASES = {
    **{
        f"{loss}": {"loss_type": loss, **OFF_POLICY}
        for loss in ("grpo", "bnpo", "dr_grpo", "dapo", "sapo", "luspo", "vespo")
    },
    "cispo": {"loss_type": "cispo", "epsilon_high": 1.05, **OFF_POLICY},
    **{
        f"{loss}, sequence level": {
            "loss_type": loss,
            "importance_sampling_level": "sequence",
            "epsilon": 0.02,
            **OFF_POLICY,
        }
        for loss in ("grpo", "bnpo", "dr_grpo", "dapo", "luspo", "vespo")
    },
    "delta": {"loss_type": "dapo", "delta": 1.3, "epsilon": 0.05, **OFF_POLICY},
    "beta": {"loss_type": "grpo", "beta": 0.2, **OFF_POLICY},
    "bias correction of no KL": {"loss_type": "dapo", "use_bias_correction_kl": True, **OFF_POLICY},
    "beta, bias correction": {
        "loss_type": "dapo",
        "beta": 0.2,
        "use_bias_correction_kl": True,
        **OFF_POLICY,
    },
    "beta, bias correction, sequence level": {
        "loss_type": "grpo",
        "beta": 0.2,
        "use_bias_correction_kl": True,
        "importance_sampling_level": "sequence",
        **OFF_POLICY,
    },
    "entropy, sequence mean": {"loss_type": "grpo", "entropy_coef": 0.1, **OFF_POLICY},
    "entropy, token mean": {"loss_type": "dapo", "entropy_coef": 0.1, **OFF_POLICY},
    "adaptive entropy": {
        "loss_type": "dapo",
        "use_adaptive_entropy": True,
        "entropy_target": 2.6,
        "entropy_coef_delta": 0.05,
        **OFF_POLICY,
    },
    "top entropy": {"loss_type": "dapo", "top_entropy_quantile": 0.4, **OFF_POLICY},
    "off-policy mask": {"loss_type": "grpo", "off_policy_mask_threshold": 1e-3, **OFF_POLICY},
    "truncated": {"loss_type": "grpo", "mask_truncated_completions": True},
    "temperature": {"loss_type": "dapo", "temperature": 0.7, **OFF_POLICY},
    "fp32 head": {"loss_type": "dapo", "cast_lm_head_to_fp32": True},
}


def classes(mixin=None):
    trl = pytest.importorskip("trl")
    pytest.importorskip("datasets")
    from fastpo.integrations.trl import GRPOTrainer

    pair = (trl.GRPOTrainer, GRPOTrainer)
    return pair if mixin is None else tuple(type("Mixed", (mixin, base), {}) for base in pair)


def assert_the_same(folder, mixin=None, model=lambda: None, noted=None, **settings):
    """Of GRPO, stock and fastpo's."""
    pair = classes(mixin)
    from trl import GRPOConfig

    def run(trainer_class):
        return trl_runs.trained(trainer_class, GRPOConfig, folder, model=model(), **settings)

    return trl_runs.assert_the_same(run, pair, noted)


@pytest.mark.parametrize("case", CASES)
def test_five_steps_equal_stock(case, tmp_path, record_property):
    """Loss, gradient norm, all metrics and the weights, over TRL's losses and options."""
    noted = functools.partial(parity_notes.write, record_property, "TRL GRPO", case)
    rows = assert_the_same(tmp_path, noted=noted, **CASES[case])
    clips = [v for row in rows for k, v in row.items() if "clip" in k and "completions" not in k]
    if case in ("delta", "cispo") or ("sequence level" in case and "vespo" not in case):
        assert any(clip > 0 for clip in clips)  # off-policy enough for the case to mean something


class Mismatch:
    """What vLLM, tools and token-level credit put into a batch, made up on the spot."""

    def _generate_and_score_completions(self, inputs):
        out = super()._generate_and_score_completions(inputs)
        mask = out["completion_mask"]
        gen = torch.Generator().manual_seed(int(mask.sum()))
        out["tool_mask"] = (torch.rand(mask.shape, generator=gen) > 0.3).long()
        out["tool_mask"][:, 0] = 1
        ratio = 0.5 + torch.rand(mask.shape, generator=gen)
        mask = mask * out["tool_mask"] > 0
        out["importance_sampling_ratio"] = torch.where(mask, ratio, 1.0)  # as TRL's difference 0
        if self.args.vllm_importance_sampling_mode.startswith("sequence"):
            out["importance_sampling_ratio"] = ratio[:, :1]
        if self.args.loss_type == "dapo":
            tokens = torch.randn(mask.shape, generator=gen)
            out["advantages"] = out["advantages"][:, None] + 0.1 * tokens
        self.use_vllm = self.vllm_importance_sampling_correction = True  # for the loss alone
        return out

    def _generate(self, prompts):
        self.use_vllm = False
        return super()._generate(prompts)


@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "vespo"])
@pytest.mark.parametrize("mode", ["token_truncate", "sequence_truncate"])
def test_ratios_tools_and_token_advantages_equal_stock(loss_type, mode, tmp_path):
    settings = {"loss_type": loss_type, "vllm_importance_sampling_mode": mode, **OFF_POLICY}
    assert_the_same(tmp_path, Mismatch, **settings)


def test_lora_and_its_reference_equal_stock(tmp_path):
    """Adapters on attention; the reference policy is the model with them off."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    assert_the_same(tmp_path, peft_config=config, beta=0.1, loss_type="dapo", **OFF_POLICY)


def test_router_loss_equals_stock(tmp_path):
    mixture = {"num_local_experts": 4, "output_router_logits": True, "router_aux_loss_coef": 0.5}
    assert_the_same(tmp_path, model=lambda: tiny("Mixtral", **mixture), loss_type="dapo")


def test_what_is_not_covered_is_refused(tmp_path):
    """One line when made; and a loss that TRL's code values otherwise stops training."""
    from trl import GRPOConfig

    ours = classes()[1]
    both = {"top_entropy_quantile": 0.5, "entropy_coef": 0.1}
    with pytest.raises(ValueError, match="top_entropy_quantile < 1 with an entropy bonus"):
        trl_runs.trained(ours, GRPOConfig, tmp_path, **both)

    doubled = {"get_gamma_weights": staticmethod(lambda **_: torch.full((GENERATIONS, 1), 2.0))}
    with pytest.raises(RuntimeError, match=r"fastpo's loss is .* this configuration"):
        doubled_class = type("Doubled", (ours,), doubled)
        trl_runs.trained(doubled_class, GRPOConfig, tmp_path, loss_type="vespo")


PREFERENCES = {
    "prompt": ["12", "3a4b", "5", "678c"],
    "chosen": ["45", "6", "abc", "9"],
    "rejected": ["78", "9a0", "1", "d2"],
}
DATA = {
    "DPO": PREFERENCES,
    "KTO": {
        "prompt": PREFERENCES["prompt"] * 2,
        "completion": PREFERENCES["chosen"] + PREFERENCES["rejected"],
        "label": [True] * 4 + [False] * 4,
    },
    "SFT": {"prompt": PREFERENCES["prompt"], "completion": PREFERENCES["chosen"]},
    "RLOO": {"prompt": PREFERENCES["prompt"]},
}


@pytest.mark.parametrize("kind", DATA)
def test_two_steps_of_the_trainers_that_install_serves(kind, tmp_path):
    """REGRESSIONS 36, 37: policies reach fastpo, log the same as stock, start at the reference."""
    datasets, trl = pytest.importorskip("datasets"), pytest.importorskip("trl")
    transformers = pytest.importorskip("transformers")
    from fastpo.integrations import trl as integration

    tiny().save_pretrained(tmp_path / "model")
    more = {"num_generations": 4, "max_completion_length": 6} if kind == "RLOO" else {}

    def logged():
        transformers.set_seed(1)
        arguments = getattr(trl, f"{kind}Config")(
            output_dir=str(tmp_path / "run"),
            per_device_train_batch_size=4,
            max_steps=2,
            learning_rate=1e-2,
            adam_epsilon=1e-4,
            logging_steps=1,
            report_to=[],
            save_strategy="no",
            use_cpu=True,
            bf16=False,
            disable_tqdm=True,
            **more,
        )
        trainer = getattr(trl, f"{kind}Trainer")(
            model=transformers.LlamaForCausalLM.from_pretrained(tmp_path / "model"),
            args=arguments,
            train_dataset=datasets.Dataset.from_dict(DATA[kind]),
            processing_class=trl_runs.tokenizer(),
            **({"reward_funcs": trl_runs.reward} if kind == "RLOO" else {}),
        )
        trainer.train()
        return trainer.state.log_history

    theirs = logged()
    integration.install()
    try:
        ours = logged()
        assert integration.calls() >= 2
    finally:
        integration.uninstall()
    for expected, actual in zip(theirs, ours, strict=True):
        numbers = {k: v for k, v in expected.items() if isinstance(v, float) and "time" not in k}
        numbers = {k: v for k, v in numbers.items() if "per_second" not in k}
        got = {k: actual[k] for k in numbers}
        assert got == pytest.approx(numbers, rel=1e-4, abs=1e-5, nan_ok=True)
    if kind == "DPO":
        assert ours[0]["rewards/margins"] == 0 == ours[0]["rewards/accuracies"]
