"""Rollouts by vLLM in the same process, on the GPU of each rank: `rollout.engine = "vllm"`.

Written against vLLM 0.33 (`LLM.generate`, `apply_model`, `return_sampling_mask`) and tested against
its signatures; it has not been run. Completions, the log-probs they were sampled at and kept sets
are vLLM's; weights are copied into its model when they have changed.
"""

from __future__ import annotations

import math
import os
from itertools import accumulate
from types import ModuleType
from typing import Any

import torch

from fastpo.trainer.config import RolloutConfig
from fastpo.trainer.model import distributed
from fastpo.trainer.model.policy import Policy
from fastpo.trainer.rollout import Completion, Sampling
from fastpo.trainer.run.errors import RecipeError, TrainerError, reason_of

SEEDS = 2**31  # of requests: one per prompt, drawn alike on all ranks


def installed() -> ModuleType:
    """The package `vllm`.

    Raises:
        RecipeError: there is none.
    """
    try:
        import vllm
    except ImportError:
        raise RecipeError("rollout.engine=vllm needs vllm: pip install vllm") from None
    return vllm


class VllmRollout:
    """An engine beside the policy that has its architecture; see `rollout.Rollout`.

    Args:
        policy: loaded from a directory or hub id, which vLLM reads, too.
        config: `engine_args` are keyword arguments of `vllm.LLM`.

    Raises:
        RecipeError: vLLM is not installed, or refuses the model or an argument.
    """

    def __init__(self, policy: Policy, config: RolloutConfig):
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # weights are handed over
        vllm = installed()
        options: dict[str, Any] = {
            "model": policy.config.path,
            "dtype": policy.config.dtype,
            "logprobs_mode": "processed_logprobs",  # under the temperature, over what is kept
            "return_sampling_mask": bool(Sampling.of(config).filter),
            "enable_sleep_mode": True,
            "gpu_memory_utilization": 0.3,
        }
        if distributed.size() > 1:
            options["distributed_executor_backend"] = "external_launcher"  # torchrun
        self._parameters = vllm.SamplingParams
        try:
            self.llm = vllm.LLM(**options | config.engine_args)
        except (TypeError, ValueError, RuntimeError) as error:
            raise RecipeError(f"vLLM cannot start: {reason_of(error)}") from error
        self._sleeps = (options | config.engine_args)["enable_sleep_mode"]
        self._pushed: list[tuple[int, int]] = []

    def __call__(
        self,
        policy: Policy,
        prompts: list[list[int]],
        sampling: Sampling,
        generator: torch.Generator,
        share: slice = slice(None),
    ) -> list[Completion]:
        """As `rollout.sample`."""
        seeds = torch.randint(SEEDS, (len(prompts),), generator=generator)[share].tolist()
        if self._sleeps and self._pushed:
            self.llm.wake_up()
        self._push(policy)
        outputs = self.llm.generate(
            [{"prompt_token_ids": prompt} for prompt in prompts[share]],
            [self._request(policy, sampling, seed) for seed in seeds],
            use_tqdm=False,
        )
        if self._sleeps:
            self.llm.sleep(level=1)
        return [_completion(done, sampling) for output in outputs for done in output.outputs]

    def _request(self, policy: Policy, sampling: Sampling, seed: int) -> Any:
        text = policy.stop_spans_tokens
        return self._parameters(
            n=sampling.group_size,
            temperature=sampling.temperature,
            top_k=sampling.top_k,
            top_p=sampling.top_p,
            min_p=sampling.min_p,
            max_tokens=sampling.max_new_tokens,
            seed=seed,
            logprobs=0,  # the sampled token's alone
            stop_token_ids=policy.stop_ids.tolist(),
            stop=policy.stop if text else None,
            detokenize=text,
        )

    def _push(self, policy: Policy) -> None:
        """Copy the weights into vLLM's model, under their names, if one has changed."""
        parameters = dict(policy.model.named_parameters())  # tied ones once, as vLLM has them
        # Two models take turns where batches are drawn ahead: a version alone says too little.
        versions = [(id(parameter), parameter._version) for parameter in parameters.values()]
        if versions == self._pushed:
            return
        for name, parameter in parameters.items():
            weight = distributed.full_tensor(parameter.detach()).to(policy.dtype)
            taken = self.llm.apply_model(lambda model, w=(name, weight): model.load_weights([w]))
            if not all(taken):
                raise TrainerError(f"vLLM's model has no weight {name}: use rollout.engine=own")
        self.llm.reset_prefix_cache()  # keys of the old weights
        self._pushed = versions


def _completion(done: Any, sampling: Sampling) -> Completion:
    """From vLLM's `CompletionOutput`."""
    tokens = list(done.token_ids)
    logprobs = [at[token].logprob for token, at in zip(tokens, done.logprobs, strict=True)]
    if not all(map(math.isfinite, logprobs)):
        raise TrainerError("the policy's logits are not finite; lower optim.learning_rate")
    found = Completion(tokens=tokens, logprobs=logprobs, finished=done.finish_reason == "stop")
    if sampling.filter and sampling.temperature:
        sets = done.sampling_mask.token_ids
        found.kept_tokens = [token for kept in sets for token in sorted(kept)]
        found.kept_offsets = list(accumulate(map(len, sets), initial=0))
    return found
