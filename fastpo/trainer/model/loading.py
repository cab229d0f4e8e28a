"""Where a policy comes from: a Hugging Face directory or hub id, or a small Llama made here.

Adapters and gradient checkpointing are put on here; `distributed.shard` comes after the self-check.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import MethodType
from typing import Any

import torch
from torch import nn

from fastpo.trainer import hub
from fastpo.trainer.config import LoraConfig, ModelConfig
from fastpo.trainer.model import attention, distributed
from fastpo.trainer.model.policy import Policy
from fastpo.trainer.run.errors import RecipeError, reason_of

PAD, EOS, UNKNOWN = "<pad>", "<eos>", "<unk>"


def make_policy(
    config: ModelConfig, device: torch.device, *, alphabet: str | None, stop: str | None
) -> Policy:
    """Load the model at `config.path`, or build a small Llama over the characters of `alphabet`.

    Raises:
        RecipeError: nothing loadable there, no alphabet, or a head that fastpo cannot express.
    """
    if config.path is not None:
        base_of(config)
        return load_policy(config.path, config, device, stop=stop)
    model, tokenizer = _small_llama(config, alphabet, device)
    return _wrap(model.to(device), tokenizer, config, device, stop)


def outline(config: ModelConfig, *, alphabet: str | None, stop: str | None) -> Policy:
    """What `make_policy` makes, on the device `meta`: shapes without weights.

    Nothing but the model's config and the tokenizer is read.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    meta = torch.device("meta")
    with meta:
        if config.path is None:
            model, tokenizer = _small_llama(config, alphabet, meta)
        else:
            with _loading(config.path):
                tokenizer = AutoTokenizer.from_pretrained(config.path, trust_remote_code=False)
                shape = AutoConfig.from_pretrained(base_of(config), trust_remote_code=False)
                model = AutoModelForCausalLM.from_config(
                    shape, dtype=_weight_dtype(config), attn_implementation="sdpa"
                )
        return _wrap(model, tokenizer, config, meta, stop)


def _small_llama(
    config: ModelConfig, alphabet: str | None, device: torch.device
) -> tuple[nn.Module, Any]:
    """A Llama of the config's sizes with random weights, and its tokenizer."""
    from transformers import LlamaConfig, LlamaForCausalLM

    if alphabet is None:
        raise RecipeError(
            "this task names no characters for a model built from nothing: set model.path, or the "
            "task's alphabet (task_args.alphabet of jsonl and datasets)"
        )
    tokenizer = character_tokenizer(alphabet)
    if config.hidden_size % (2 * config.heads):  # rotary embeddings turn pairs of columns
        raise RecipeError(
            f"model.hidden_size is {config.hidden_size}, expected a multiple of twice "
            f"model.heads = {config.heads}"
        )
    try:
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=len(tokenizer),
                hidden_size=config.hidden_size,
                intermediate_size=4 * config.hidden_size,
                num_hidden_layers=config.layers,
                num_attention_heads=config.heads,
                num_key_value_heads=config.heads,
                max_position_embeddings=1024,
                tie_word_embeddings=True,
                pad_token_id=tokenizer.pad_token_id,
                bos_token_id=None,
                eos_token_id=tokenizer.eos_token_id,
                attn_implementation=attention.choose(config, device),
            )
        )
    except Exception as error:  # transformers raises many kinds
        given = f"model.attention={config.attention}" if config.attention else "these sizes"
        raise RecipeError(f"cannot build a model with {given}: {reason_of(error)}") from error
    return model, tokenizer


def load_policy(
    path: str | Path, config: ModelConfig, device: torch.device, *, stop: str | None
) -> Policy:
    """Load a model and its tokenizer from a Hugging Face directory or hub id."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with _loading(path):
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
        model, found = AutoModelForCausalLM.from_pretrained(
            path,
            dtype=_weight_dtype(config),
            attn_implementation=attention.choose(config, device),
            output_loading_info=True,
            trust_remote_code=False,  # None would ask on the terminal
        )
    if found["missing_keys"]:  # transformers would go on with random weights
        missing = ", ".join(sorted(found["missing_keys"])[:3])
        raise RecipeError(f"the model at {str(path)!r} is incomplete: no weights for {missing}")
    for parameter in model.parameters():
        # safetensors maps files at any offset, and CPU GEMMs round differently on memory that is
        # not 64-byte aligned (seen: 2e-8): a resumed run would not be bit-exact without a copy.
        parameter.data = parameter.data.clone()
    return _wrap(model.to(device), tokenizer, config, device, stop)


def base_of(config: ModelConfig) -> str:
    """The model at `config.path`, or the one that adapters there are put on.

    Raises:
        RecipeError: adapters that are not those of `config.lora`.
    """
    from transformers.utils import find_adapter_config_file

    with _loading(config.path):
        file = find_adapter_config_file(config.path)
        saved = file and json.loads(Path(file).read_text(encoding="utf-8"))
    if not saved:
        return config.path
    if saved["peft_type"] != "LORA":
        raise RecipeError(
            f"the adapters at {config.path!r} are {saved['peft_type']}, expected LORA: merge them "
            "into their model"
        )
    lora, base = config.lora, saved["base_model_name_or_path"]
    rank, alpha, layers = (saved[key] for key in ("r", "lora_alpha", "target_modules"))
    if (lora.rank, lora.alpha) != (rank, alpha):
        raise RecipeError(
            f"the adapters at {config.path!r} have rank {rank} and alpha {alpha:g}, got "
            f"model.lora.rank={lora.rank} and alpha={lora.alpha:g}: set model.lora.rank={rank} and "
            f"model.lora.alpha={alpha:g} to train them, or merge them into their model"
        )
    if _adapted_layers(base, lora) != _adapted_layers(base, replace(lora, target_modules=layers)):
        raise RecipeError(
            f"the adapters at {config.path!r} are of other layers than model.lora.target_modules = "
            f"{lora.target_modules!r}: expected {str(layers)[:100]}"
        )
    return base


def _adapted_layers(base: str, lora: LoraConfig) -> list[str]:
    """Names of the layers of a model that get adapters."""
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"), _loading(base):
        shape = AutoConfig.from_pretrained(base, trust_remote_code=False)
        model = AutoModelForCausalLM.from_config(shape)
    with torch.device("meta"):
        add_adapters(model, lora)
    return [name for name, module in model.named_modules() if hasattr(module, "lora_A")]


@contextmanager
def _loading(path: str | Path) -> Iterator[None]:
    if _is_local(str(path)) and not Path(path).exists():
        raise RecipeError(
            f"cannot load a model from {str(path)!r}: no such folder (a recipe that comes with "
            "fastpo says in its first lines what fetches it)"
        )
    try:
        with hub.asked_once(path):
            yield
    except RecipeError:
        raise
    except Exception as error:  # transformers and safetensors raise many kinds
        raise RecipeError(f"cannot load a model from {str(path)!r}: {reason_of(error)}") from error


def _is_local(path: str) -> bool:
    """Whether a path can be no hub id, which is `name` or `owner/name`."""
    return path.startswith((".", "/", "~")) or path.count("/") > 1


def _weight_dtype(config: ModelConfig) -> torch.dtype:
    """Of weights as they are loaded: float32 where they are trained."""
    return getattr(torch, config.dtype) if config.lora.rank else torch.float32


def add_adapters(model: nn.Module, config: LoraConfig) -> None:
    """Put adapters on a model that has none yet; these alone are trained from now on.

    Raises:
        RecipeError: there are no such layers.
    """
    try:
        import peft

        if not getattr(model, "peft_config", None):
            shape = {"r": config.rank, "lora_alpha": config.alpha, "task_type": "CAUSAL_LM"}
            model.add_adapter(peft.LoraConfig(**shape, target_modules=config.target_modules))
        model.set_adapter("default")  # loaded ones are frozen
    except ImportError:
        raise RecipeError("model.lora.rank needs peft: pip install 'fastpo[lora]'") from None
    except ValueError as error:
        raise RecipeError(f"model.lora: {reason_of(error)}") from error


def character_tokenizer(alphabet: str) -> Any:
    """A Hugging Face tokenizer with one token per character of `alphabet`."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    symbols = [PAD, EOS, UNKNOWN, *sorted(set(alphabet))]
    vocabulary = {symbol: index for index, symbol in enumerate(symbols)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=EOS,
        unk_token=UNKNOWN,
        clean_up_tokenization_spaces=False,
    )


def _wrap(
    model: nn.Module, tokenizer: Any, config: ModelConfig, device: torch.device, stop: str | None
) -> Policy:
    """A policy of a model, with adapters and layers checkpointed as the recipe says."""
    ids = stop_ids(model, tokenizer, stop)
    if config.lora.rank:
        add_adapters(model, config.lora)
    attention.settle(model, config)
    if config.gradient_checkpointing:
        checkpoint_layers(model)
    if config.compile and device.type != "meta":
        compile_layers(model)
    return Policy(
        model=model.eval(),
        tokenizer=tokenizer,
        device=device,
        config=config,
        stop=stop,
        stop_ids=torch.tensor(ids, dtype=torch.long, device=device),
    )


def checkpoint_layers(model: nn.Module) -> None:
    """Transformers' own gradient checkpointing; `Policy.forward_pass` switches it on."""
    enable = getattr(model, "activation_checkpointing_enable", None)  # from 5.20 or so on
    try:
        (enable or model.gradient_checkpointing_enable)({"use_reentrant": False})
    except ValueError as error:
        raise RecipeError(f"model.gradient_checkpointing: {reason_of(error)}") from error


def compile_layers(model: nn.Module) -> None:
    """`torch.compile` of every decoder layer, in the passes that fill no cache.

    Layers that are alike share a graph of any length, and FSDP2 gathers them as before.
    """
    layers = distributed.units(model)
    if not layers:
        raise RecipeError(f"model.compile: {type(model).__name__} does not name its layers")
    for layer in layers:
        layer.forward = MethodType(_forward, layer)  # which a copy of the model binds to its own


def _forward(layer: nn.Module, *inputs: Any, **named: Any) -> Any:
    from transformers import Cache

    caches = any(isinstance(value, Cache) for value in (*inputs, *named.values()))
    return (_plain_forward if caches else _compiled_forward())(layer, *inputs, **named)


def _plain_forward(layer: nn.Module, *inputs: Any, **named: Any) -> Any:
    return type(layer).forward(layer, *inputs, **named)


@cache
def _compiled_forward() -> Callable:
    return torch.compile(_plain_forward, dynamic=True)


def stop_ids(model: nn.Module, tokenizer: Any, stop: str | None) -> list[int]:
    """Every id that ends a completion: EOS ids of tokenizer and model, tokens that hold `stop`."""
    declared = model.generation_config.eos_token_id
    ids = set(declared if isinstance(declared, list) else [declared])
    ids.add(tokenizer.eos_token_id)
    if stop:
        pieces = tokenizer.batch_decode([[index] for index in range(len(tokenizer))])
        ids.update(index for index, piece in enumerate(pieces) if stop in piece)
    ids.discard(None)
    if not ids and not stop:
        raise RecipeError("neither tokenizer nor model has an end token, nor the task a `stop`")
    return sorted(ids)


def quiet_transformers() -> None:
    """Switch off the bars transformers draws when it reads and writes weights: we draw our own."""
    from transformers.utils import logging

    logging.disable_progress_bar()


def default_device(name: str | None) -> torch.device:
    """The device called `name`; None = cuda where there is one, else cpu.

    Raises:
        RecipeError: there is no such device here.
    """
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        probe = torch.zeros(1, device=name)
        probe.item()  # the device `meta` makes tensors, but holds nothing
        return probe.device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).split("\n")[0]
        raise RecipeError(
            f"device {name!r} cannot be used ({reason}); none = the best here"
        ) from None
