"""Short runs of TRL's trainers on a CPU, and the comparison of two of them in all that they log."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from parity_notes import relative

STEPS, GENERATIONS = 5, 4
RTOL = 1e-4  # in fp32, after five steps of either
ATOL = 1e-5  # of log-ratios: differences of sums of about 20 nats, whose last bit is 2e-6
TIMES = ("time", "runtime", "per_second", "perf/")
LOGGED = ("loss", "grad_norm")
CHARACTERS = "0123456789abcdefghij"
PROMPTS = ("12", "3a4b", "5", "678c9", "ab", "0d1")


def tokenizer() -> Any:
    """One token per character."""
    import transformers
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    words = {word: i for i, word in enumerate(["<pad>", "<eos>", "<unk>", *CHARACTERS])}
    made = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    made.decoder = decoders.Fuse()
    names = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, padding_side="left", **names)


def tiny(name: str = "Llama", **options: Any) -> Any:
    """A causal LM of two layers whose weights are large enough to have opinions."""
    import transformers

    torch.manual_seed(0)
    sizes = {
        "vocab_size": 23,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "bos_token_id": None,
    }
    config = getattr(transformers, f"{name}Config")(**sizes, **options)
    model = getattr(transformers, f"{name}ForCausalLM")(config)
    for parameter in model.parameters():
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=0.2)
    return model


def save_tiny(folder: Path) -> None:
    """`tiny()` as a checkpoint, unless it is there: a rank of several may be unable to save."""
    if not folder.is_dir():
        tiny().save_pretrained(folder)


def reward(completions: list[str], **_: Any) -> list[float]:
    """More for small digits and for length."""
    return [sum(c in "01234" for c in text) / 3 + 0.1 * len(text) for text in completions]


SETTINGS = {
    "per_device_train_batch_size": GENERATIONS,
    "max_steps": STEPS,
    "learning_rate": 1e-2,
    "adam_epsilon": 1e-4,  # at 1e-8 Adam turns the sign of a rounding error into a whole step
    "lr_scheduler_type": "constant",
    "logging_steps": 1,
    "report_to": [],
    "save_strategy": "no",
    "use_cpu": True,
    "bf16": False,
    "disable_tqdm": True,
    "seed": 1,
}


def trained(
    trainer_class: type,
    config_class: type,
    folder: Path,
    *,
    model: Any = None,
    peft_config: Any = None,
    **settings: Any,
) -> tuple[list[dict[str, float]], dict[str, torch.Tensor]]:
    """Logged rows and final parameters of a short run of an online trainer."""
    import datasets
    import transformers

    save_tiny(folder / "model")  # TRL loads the reference policy from there
    if model is None:
        model = transformers.LlamaForCausalLM.from_pretrained(folder / "model")
    transformers.set_seed(1)
    lengths = {"num_generations": GENERATIONS, "max_completion_length": 8}
    trainer = trainer_class(
        model=model,
        reward_funcs=reward,
        args=config_class(output_dir=str(folder), **SETTINGS | lengths | settings),
        train_dataset=datasets.Dataset.from_dict({"prompt": list(PROMPTS) * 4}),
        processing_class=tokenizer(),
        peft_config=peft_config,
    )
    trainer.train()
    return trainer.state.log_history, weights(trainer)


def weights(trainer: Any) -> dict[str, torch.Tensor]:
    """Copies of a trainer's parameters, whole where they are sharded."""
    return {n: _whole(p.detach()).clone() for n, p in trainer.model.named_parameters()}


def _whole(parameter: torch.Tensor) -> torch.Tensor:
    if hasattr(parameter, "full_tensor"):  # FSDP2
        return parameter.full_tensor()
    if not hasattr(parameter, "ds_id"):
        return parameter
    import deepspeed

    with deepspeed.zero.GatheredParameters([parameter]):
        return parameter.clone()


def assert_the_same(
    run: Any, classes: tuple[type, type], noted: Any = None
) -> list[dict[str, float]]:
    """Every logged number of every step, and every weight, of stock and of fastpo.

    `run(trainer_class)` gives what `trained` does. Returns the rows of the first class. `noted`
    gets how far losses and gradient norms are apart, relative to those of all steps.
    """
    (theirs, before), (ours, after) = (run(trainer_class) for trainer_class in classes)
    assert len(theirs) == len(ours) == STEPS + 1
    for expected, actual in zip(theirs, ours, strict=True):
        assert expected.keys() == actual.keys()
        for name, value in expected.items():
            if isinstance(value, float) and not any(time in name for time in TIMES):
                close = math.isclose(value, actual[name], rel_tol=RTOL, abs_tol=ATOL)
                assert close or (math.isnan(value) and math.isnan(actual[name])), (
                    name,
                    value,
                    actual[name],
                )
    if noted is not None:
        steps = [[row[name] for row in rows[:-1]] for name in LOGGED for rows in (ours, theirs)]
        noted(relative(*steps[:2]), relative(*steps[2:]))
    for name, weight in before.items():
        torch.testing.assert_close(after[name], weight, rtol=0, atol=RTOL, msg=name)
    assert any(row.get("grad_norm", 0) > 1e-3 for row in theirs)
    return theirs
