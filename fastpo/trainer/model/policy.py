"""The policy: any Hugging Face causal LM with its tokenizer, split into trunk and LM head.

The trunk gives hidden states; the head's weight, bias, scale and softcap go to fastpo's linear ops,
so that logits of a whole batch never exist.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastpo.integrations.transformers import lm_head
from fastpo.trainer.config import ModelConfig
from fastpo.trainer.data.tasks import Problem
from fastpo.trainer.model import distributed
from fastpo.trainer.model.attention import FLASH, OURS, VARLEN, Packing, kernel
from fastpo.trainer.run.errors import RecipeError, TrainerError


@dataclass(kw_only=True)
class Policy:
    """A causal LM in eval mode (dropout off, so that old and new log-probs are of one network).

    What is trained is float32 whatever `config.dtype` says: a step of AdamW is about lr per weight,
    far below half an ulp of a bfloat16 weight of 1 (4e-3), where it would be rounded away.
    """

    model: nn.Module
    tokenizer: Any
    device: torch.device
    config: ModelConfig
    stop: str | None  # completions end here, too
    stop_ids: Tensor  # (S,) every token id that ends a completion
    root: nn.Module | None = None  # of FSDP2, where the model is sharded
    adapted: bool = True  # False: its adapters are off
    engine: Any = None  # a `rollout.Rollout` that samples in place of `rollout.sample`

    @property
    def dtype(self) -> torch.dtype:
        """Type of hidden states and of the products of the model."""
        return getattr(torch, self.config.dtype)

    @contextmanager
    def forward_pass(self) -> Iterator[None]:
        """Around a forward pass; a weight is cast once in it, however often it is used."""
        # transformers checkpoints layers in training mode: they alone are, not what drops out
        # inside of them, and not where a cache is filled.
        asked = self.config.gradient_checkpointing and torch.is_grad_enabled()
        modules = self.model.modules() if asked else ()
        layers = [m for m in modules if getattr(m, "gradient_checkpointing", False)]
        for layer in layers:
            layer.training = True
        low = self.dtype != torch.float32
        try:
            with torch.autocast(self.device.type, self.dtype) if low else nullcontext():
                yield
        finally:
            for layer in layers:
                layer.training = False

    def inside(self, work: Callable[[], Any]) -> Any:
        """What `work` returns, done in the forward of what is sharded: there `head` is whole."""
        if not self.adapted:
            self.model.disable_adapters()
        try:
            return work() if self.root is None else self.root(work)
        finally:
            if not self.adapted:
                self.model.enable_adapters()

    def without_adapters(self) -> Policy:
        """The model that adapters were put on; its weights are not copied. Used by `inside`."""
        return replace(self, adapted=False)

    def hidden_states(self, ids: Tensor, packing: Packing | None = None) -> Tensor:
        """Last hidden states [B, T, D] of right-padded ids [B, T], or of one packed row [1, T].

        Rows have no attention mask: under causal attention, padding on the right changes nothing on
        its left.
        """
        inputs = {} if packing is None else packing.inputs(self.attention)
        with self.forward_pass():
            output = self.model.base_model(input_ids=ids, use_cache=False, **inputs)
        return output.last_hidden_state

    def head(self) -> dict[str, Any]:
        """The LM head in `dtype`, as fastpo's linear ops take it."""
        return {
            name: value.to(self.dtype) if isinstance(value, Tensor) else value
            for name, value in lm_head(self.model).items()
        }

    @property
    def attention(self) -> str:
        """What attends, by transformers' name for it."""
        return self.model.config._attn_implementation

    @property
    def kernel(self) -> str:
        """What attends in packed rows."""
        return kernel(self.attention, self.device, self.dtype)

    @property
    def packs(self) -> bool:
        """Whether a packed row costs no attention between its sequences, nor a graph of its own."""
        kernels = self.kernel in (FLASH, VARLEN)
        return kernels or (self.attention == OURS and not self.config.compile)

    def encode(self, prompt: str | list[dict[str, str]]) -> list[int]:
        """Token ids of a prompt: text, or messages for the tokenizer's chat template.

        Text is encoded as the tokenizer does it by itself, with its BOS token if it has that
        habit, but without an end token: what comes next is to go on from here.
        """
        if self.config.chat or not isinstance(prompt, str):
            ids = self._encode_chat(prompt)
        else:
            ids = self.tokenizer(prompt)["input_ids"]
            ends = (self.tokenizer.eos_token_id, self.tokenizer.sep_token_id)
            ids = ids[:-1] if len(ids) > 1 and ids[-1] in ends else ids
        return self._known(ids, prompt)

    def encode_answer(self, answer: str) -> list[int]:
        """Token ids of a reference answer with the end token."""
        ids = self._known(self.tokenizer(answer, add_special_tokens=False)["input_ids"], answer)
        end = self.tokenizer.eos_token_id
        return ids if end is None else [*ids, end]

    def _known(self, ids: list[int], text: Any) -> list[int]:
        tokenizer, unknown = self.tokenizer, self.tokenizer.unk_token_id
        others = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
        if ids and (unknown not in ids or unknown in others):  # GPT-2's is BOS and EOS, too
            return ids
        raise TrainerError(
            f"prompt {text!r} is empty or has characters outside the tokenizer's vocabulary; "
            "a task's `alphabet` must name every character of its prompts and answers"
        )

    def _encode_chat(self, prompt: str | list[dict[str, str]]) -> list[int]:
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        if self.config.system_prompt and messages[0].get("role") != "system":
            messages = [{"role": "system", "content": self.config.system_prompt}, *messages]
        try:
            text = self.tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, tokenize=False
            )
        except Exception as error:  # no template, or whatever a template raises
            reason = str(error).strip().split("\n")[0]
            raise RecipeError(f"the tokenizer's chat template cannot be used: {reason}") from None
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def encode_all(self, problems: list[Problem], new_tokens: int) -> list[list[int]]:
        """Token ids of every problem's prompt.

        Raises:
            RecipeError: the model has no positions for one of them and `new_tokens` more.
        """
        prompts = [self.encode(problem.messages or problem.prompt) for problem in problems]
        longest = max(map(len, prompts), default=0)
        context = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        if context is not None and longest + new_tokens > context:
            raise RecipeError(
                f"a prompt of {longest} tokens and {new_tokens} new ones exceed the {context} "
                f"positions of {type(self.model).__name__}: lower rollout.max_new_tokens, or skip "
                "long prompts by rollout.max_prompt_tokens"
            )
        return prompts

    def fits(self, max_tokens: int | None) -> Callable[[Problem], bool]:
        """Whether a problem's prompt is of at most so many tokens; none = any is."""
        if max_tokens is None:
            return lambda problem: True
        return lambda problem: len(self.encode(problem.messages or problem.prompt)) <= max_tokens

    def decode(self, ids: list[int]) -> str:
        """The text of a completion, up to the stop string and without its end token.

        Other special tokens are in it with `config.special_tokens` only.
        """
        text = self._text(ids)
        return text.split(self.stop, 1)[0] if self.stop else text

    def _text(self, ids: list[int]) -> str:
        if ids and ids[-1] == self.tokenizer.eos_token_id:
            ids = ids[:-1]
        return self.tokenizer.decode(ids, skip_special_tokens=not self.config.special_tokens)

    @property
    def stop_spans_tokens(self) -> bool:
        """Whether the stop string may be spread over tokens, so that text has to be searched."""
        return self.stop is not None and (len(self.stop) > 1 or not self.stop.isascii())

    def length_to_stop(self, ids: list[int]) -> int | None:
        """How many tokens it takes until the text holds the stop string; None = it does not."""
        if self.stop not in self._text(ids):
            return None
        prefixes = range(1, len(ids))
        return 1 + bisect_left(prefixes, True, key=lambda n: self.stop in self._text(ids[:n]))

    def snapshot(self) -> Snapshot:
        """What there is to save; all ranks take part, rank 0 gets the weights."""
        weights = self.model.state_dict(keep_vars=True)  # so that tied ones are the same object
        if self.config.lora.rank:
            weights = {name: weight for name, weight in weights.items() if ".lora_" in name}
        return Snapshot(self.model, self.tokenizer, distributed.full(weights))

    def save(self, directory: Path) -> None:
        """Write a directory that `AutoModelForCausalLM.from_pretrained` loads."""
        snapshot = self.snapshot()
        distributed.first(lambda: snapshot.save(directory))


class Snapshot(NamedTuple):
    """A model and its tokenizer to be saved."""

    model: nn.Module
    tokenizer: Any
    weights: dict[str, Tensor]  # whole, whatever the model's are

    @property
    def is_finite(self) -> bool:
        """Whether there is no NaN or inf among the weights."""
        return all(bool(weight.isfinite().all()) for weight in self.weights.values())

    def save(self, directory: Path) -> None:
        """Write a directory that `AutoModelForCausalLM.from_pretrained` loads.

        Of a model with adapters, these alone, and the name of the model that they are for.
        """
        self.model.save_pretrained(directory, state_dict=self.weights)
        self.tokenizer.save_pretrained(directory)
