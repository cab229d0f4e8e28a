"""The policy: any Hugging Face causal LM with its tokenizer, split into trunk and LM head.

The trunk gives hidden states; the head's weight, bias, scale and softcap go to fastpo's linear ops,
so that logits of a whole batch never exist.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastpo.trainer.config import ModelConfig
from fastpo.trainer.run.errors import RecipeError, TrainerError

PAD, EOS, UNKNOWN = "<pad>", "<eos>", "<unk>"


@dataclass(kw_only=True)
class Policy:
    """A causal LM in eval mode (dropout off, so that old and new log-probs are of one network)."""

    model: nn.Module
    tokenizer: Any
    device: torch.device
    stop: str | None  # completions end here, too
    stop_ids: Tensor  # (S,) every token id that ends a completion

    def hidden_states(self, ids: Tensor, positions: Tensor | None = None) -> Tensor:
        """Last hidden states [B, T, D] of right-padded ids [B, T], or of one packed row [1, T].

        No attention mask: under causal attention, padding on the right changes nothing on its left,
        and transformers tells packed sequences apart by `positions` [1, T] that start anew from 0.
        """
        output = self.model.base_model(input_ids=ids, position_ids=positions, use_cache=False)
        return output.last_hidden_state

    @property
    def packs(self) -> bool:
        """Whether a packed row costs no attention between its sequences."""
        return self.model.config._attn_implementation == "flash_attention_2"

    def head(self) -> dict[str, Any]:
        """`weight`, `bias`, `logit_scale` and `softcap` for fastpo's linear ops."""
        head = self.model.get_output_embeddings()
        config = self.model.config.get_text_config()
        scale = getattr(config, "logit_scale", None) or 1.0  # Cohere
        scale /= getattr(config, "logits_scaling", None) or 1.0  # Granite
        return {
            "weight": head.weight,
            "bias": head.bias,
            "logit_scale": scale,
            "softcap": getattr(config, "final_logit_softcapping", None),  # Gemma
        }

    def encode(self, prompt: str) -> list[int]:
        """Token ids of a prompt."""
        ids = self.tokenizer(prompt, add_special_tokens=False)["input_ids"]
        unknown = self.tokenizer.unk_token_id
        if not ids or (unknown is not None and unknown in ids):
            raise TrainerError(
                f"prompt {prompt!r} is empty or has characters outside the tokenizer's vocabulary; "
                "a task's `alphabet` must name every character of its prompts and answers"
            )
        return ids

    def encode_answer(self, answer: str) -> list[int]:
        """Token ids of a reference answer with the end token."""
        return [*self.encode(answer), self.tokenizer.eos_token_id]

    def decode(self, ids: list[int]) -> str:
        """The text of a completion, without special tokens, up to the stop string."""
        text = self.tokenizer.decode(ids, skip_special_tokens=True)
        return text.split(self.stop, 1)[0] if self.stop else text

    def save(self, directory: Path) -> None:
        """Write a directory that `AutoModelForCausalLM.from_pretrained` loads."""
        self.model.save_pretrained(directory)
        self.tokenizer.save_pretrained(directory)


def make_policy(
    config: ModelConfig, device: torch.device, *, alphabet: str | None, stop: str | None
) -> Policy:
    """Load the model at `config.path`, or build a small Llama over the characters of `alphabet`.

    Raises:
        RecipeError: nothing loadable there, no alphabet, or a head that fastpo cannot express.
    """
    if config.path is not None:
        return load_policy(config.path, config, device, stop=stop)
    if alphabet is None:
        raise RecipeError("this task needs a real tokenizer: set model.path")
    tokenizer = character_tokenizer(alphabet)
    if config.hidden_size % (2 * config.heads):  # rotary embeddings turn pairs of columns
        raise RecipeError(
            f"model.hidden_size is {config.hidden_size}, expected a multiple of twice "
            f"model.heads = {config.heads}"
        )
    try:
        model = _small_llama(config, tokenizer)
    except Exception as error:  # transformers raises many kinds
        reason = str(error).strip().split("\n")[0]
        raise RecipeError(f"cannot build a model from these sizes: {reason}") from error
    return _wrap(model, tokenizer, device, stop)


def load_policy(
    path: str | Path, config: ModelConfig, device: torch.device, *, stop: str | None
) -> Policy:
    """Load a model and its tokenizer from a Hugging Face directory or hub id."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
        model, found = AutoModelForCausalLM.from_pretrained(
            path,
            dtype=getattr(torch, config.dtype),
            attn_implementation=config.attention or _default_attention(device),
            output_loading_info=True,
        )
    except Exception as error:  # transformers and safetensors raise many kinds
        reason = str(error).strip().split("\n")[0]
        raise RecipeError(f"cannot load a model from {str(path)!r}: {reason}") from error
    if found["missing_keys"]:  # transformers would go on with random weights
        missing = ", ".join(sorted(found["missing_keys"])[:3])
        raise RecipeError(f"the model at {str(path)!r} is incomplete: no weights for {missing}")
    for parameter in model.parameters():
        # safetensors maps files at any offset, and CPU GEMMs round differently on memory that is
        # not 64-byte aligned (seen: 2e-8): a resumed run would not be bit-exact without a copy.
        parameter.data = parameter.data.clone()
    return _wrap(model, tokenizer, device, stop)


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


def _small_llama(config: ModelConfig, tokenizer: Any) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
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
            attn_implementation=config.attention,
        )
    ).to(getattr(torch, config.dtype))


def _wrap(model: nn.Module, tokenizer: Any, device: torch.device, stop: str | None) -> Policy:
    """The one place where a model becomes a policy: placement (and, later, sharding) goes here."""
    ids = stop_ids(model, tokenizer, stop)
    policy = Policy(
        model=model.to(device).eval(),
        tokenizer=tokenizer,
        device=device,
        stop=stop,
        stop_ids=torch.tensor(ids, device=device),
    )
    _check_head(policy)
    return policy


def stop_ids(model: nn.Module, tokenizer: Any, stop: str | None) -> list[int]:
    """Every id that ends a completion: EOS ids of tokenizer and model, tokens that hold `stop`."""
    declared = model.generation_config.eos_token_id
    ids = set(declared if isinstance(declared, list) else [declared])
    ids.add(tokenizer.eos_token_id)
    if stop:
        pieces = tokenizer.batch_decode([[index] for index in range(len(tokenizer))])
        ids.update(index for index, piece in enumerate(pieces) if stop in piece)
    ids.discard(None)
    if not ids:
        raise RecipeError("neither tokenizer nor model has an end token, nor the task a `stop`")
    return sorted(ids)


@torch.no_grad()
def _check_head(policy: Policy) -> None:
    """Logits recomputed from hidden states must be the model's own: heads may hold surprises."""
    ids = torch.tensor([[0, 1]], device=policy.device)
    expected = policy.model(input_ids=ids).logits.float()
    head = policy.head()
    logits = nn.functional.linear(policy.hidden_states(ids), head["weight"], head["bias"]).float()
    logits = logits * head["logit_scale"]
    if head["softcap"]:
        logits = head["softcap"] * torch.tanh(logits / head["softcap"])
    error = (logits - expected).abs().max().item()
    if not error <= 0.02 * max(1.0, expected.abs().max().item()):
        raise RecipeError(
            f"{type(policy.model).__name__} does more in its LM head than a bias, a scale and a "
            f"softcap (logits differ by {error:.3g}): this trainer cannot express it"
        )


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


def _default_attention(device: torch.device) -> str | None:
    from transformers.utils import is_flash_attn_2_available

    if device.type == "cuda" and is_flash_attn_2_available():
        return "flash_attention_2"
    return None  # transformers takes sdpa where the architecture has it
