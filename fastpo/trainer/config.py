"""Every setting of a run, as dataclasses: recipes are these in TOML, overrides are `key=value`.

Pydantic checks names, types and bounds. The docstring under a field is its help text
(`fastpo settings`). Lengths are in tokens, learning rates per optimizer update.
"""

from __future__ import annotations

from dataclasses import field
from functools import partial
from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt, Le, Lt
from pydantic import ConfigDict
from pydantic.dataclasses import dataclass

RULES = ConfigDict(extra="forbid", coerce_numbers_to_str=True, allow_inf_nan=False)
section = partial(dataclass, kw_only=True, config=RULES)
Count = Annotated[int, Ge(1)]
Index = Annotated[int, Ge(0)]
Positive = Annotated[float, Gt(0)]
NonNegative = Annotated[float, Ge(0)]
Rate = Annotated[float, Gt(0), Le(10)]  # of learning: more is a mistake
Share = Annotated[float, Ge(0), Lt(1)]


@section()
class LoraConfig:
    """Adapters of low rank (peft): they alone are trained, on top of the frozen model at `path`."""

    rank: Index = 0
    """Rank of the update of a matrix; 0 = no adapters, the whole model is trained."""
    alpha: Positive = 32.0
    """The update is scaled by alpha / rank."""
    target_modules: str | list[str] = "all-linear"
    """Names of the layers that get one; all-linear = every linear layer but the LM head."""


@section()
class ModelConfig:
    """The policy: a Hugging Face causal LM by path, or a small Llama from random weights."""

    path: str | None = None
    """Directory or hub id for `from_pretrained`; none = build a Llama with the sizes below."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the products (autocast); weights and optimizer are float32 either way."""
    gradient_checkpointing: bool = False
    """Keep a decoder layer's input for the backward pass, and run the layer again there."""
    attention: str | None = None
    """HF `attn_implementation`; none = flash_attention_2 or torch's varlen_attn on GPU, else sdpa,
    without a mask where rows are packed."""
    compile: bool = False
    """torch.compile of the decoder layers in updates; not with optim.share_prompts."""
    hidden_size: Count = 128
    """Width of the built model; a multiple of twice `heads`."""
    layers: Count = 2
    """Decoder layers of the built model."""
    heads: Count = 4
    """Attention heads of the built model."""
    chat: bool = False
    """Prompts go into the tokenizer's chat template as a user's message, else after BOS."""
    system_prompt: str | None = None
    """With `chat`: the system's message before every prompt that has none."""
    special_tokens: bool = False
    """Special tokens stay in the text that verifiers and samples.jsonl see, but for the last."""
    lora: LoraConfig = field(default_factory=LoraConfig)


@section()
class WarmupConfig:
    """Supervised steps on reference answers: the stand-in for a pretrained checkpoint."""

    max_steps: Index = 0
    """Optimizer updates at most; 0 = no warm-up."""
    until_accuracy: Annotated[float, Gt(0)] = 1.0
    """Stop as soon as this share of fresh problems is answered right at the rollout temperature."""
    check_every: Count = 5
    """Updates between two such checks (256 problems each)."""
    batch_size: Count = 64
    """Problems per update."""
    learning_rate: Rate = 1e-3
    """AdamW, constant."""


@section()
class RolloutConfig:
    """How completions are sampled."""

    engine: Literal["own", "vllm"] = "own"
    """What samples; vllm, in the same process on each GPU, brings algorithm.correction with it."""
    engine_args: dict[str, Any] = field(default_factory=dict)
    """Keyword arguments of vllm.LLM: gpu_memory_utilization (0.3 here), max_model_len, ..."""
    prompts: Count = 32
    """Prompts per step, after dynamic sampling."""
    group_size: Annotated[int, Ge(2)] = 8
    """Completions per prompt."""
    max_new_tokens: Count = 16
    """Longest completion, end token included."""
    max_prompt_tokens: Count | None = None
    """Problems with a longer prompt are skipped; none = every prompt must fit the context."""
    temperature: Positive = 1.0
    """Sampling temperature; log-probs of old and new policy are taken under it, too."""
    top_k: Index = 0
    """Only the k likeliest tokens are drawn; 0 = all."""
    top_p: Annotated[float, Gt(0), Le(1)] = 1.0
    """Only the likeliest tokens that together hold this share are drawn, as for `top_k`."""
    min_p: Share = 0.0
    """Only tokens of at least this share of the likeliest one's probability are drawn, likewise."""
    kept_sets: bool = True
    """Log-probs are over what top_k, top_p and min_p leave; no = of the whole vocabulary, where the
    ratio carries the share that they left."""
    batch_size: Count = 1024
    """Completions decoded side by side: bounds the KV cache."""
    ahead: bool = False
    """Draw the next step's batch while this one learns, by a copy of the policy as it was before:
    one step off-policy."""


@section()
class AlgorithmConfig:
    """The objective and the four DAPO techniques. `none` = what the preset says."""

    preset: str = "dapo"
    """dapo, grpo, dr_grpo, gspo, cispo, ...: only dapo switches its techniques on by itself."""
    critic: bool | None = None
    """Advantages of every token from a critic, by GAE, in place of the group's (ppo: yes)."""
    objective: dict[str, Any] = field(default_factory=dict)
    """Fields of fastpo.Objective in place of the preset's: clip_high, ...; none = no bound here."""
    dynamic_sampling: bool | None = None
    """Refill the batch until every group can teach something."""
    dynamic_sampling_by: Literal["correct", "reward"] = "correct"
    """A group can if some answers are right and some wrong, or if its rewards differ at all."""
    overlong_cache: Index | None = None
    """Soft overlong penalty over the last so many tokens before max_new_tokens (dapo: a fifth)."""
    overlong_filter: bool | None = None
    """Completions cut off by max_new_tokens carry no loss."""
    max_gen_batches: Count = 8
    """Dynamic sampling gives up after so many rounds of sampling in one step."""
    estimator: str = "grpo"
    """Of the advantages: grpo, dr_grpo, rloo, opo, passk, reinforce_pp, maxrl."""
    carry_surplus: bool = False
    """Groups that dynamic sampling drew and this step has no room for are used in the next one, at
    the log-probs they were sampled at."""
    correction: dict[str, Any] = field(default_factory=dict)
    """Arguments of fastpo.rollout_correction, for a sampler that is not the policy which learns:
    mode="truncate", high=2 (TIS), mode="mask" (MIS), ...; old log-probs are recomputed then."""
    sync_reference_every: Index = 0
    """Steps after which the reference of the KL penalty becomes the policy; 0 = never."""


@section()
class OptimConfig:
    """AdamW and how a batch becomes updates."""

    learning_rate: Rate = 1e-6
    """Peak learning rate."""
    warmup_steps: Index = 0
    """Updates over which the learning rate rises linearly from 0."""
    decay: Literal["constant", "linear", "cosine"] = "constant"
    """How it falls to 0 at the end of `steps`; resumed with more steps, it takes that curve."""
    weight_decay: NonNegative = 0.0
    """Decoupled weight decay."""
    beta1: Share = 0.9
    """Decay of the first moment."""
    beta2: Share = 0.95
    """Decay of the second moment."""
    name: Literal["adamw", "adamw_fused", "adamw_8bit"] = "adamw"
    """adamw_fused: one kernel per step, faster, rounds otherwise; adamw_8bit: moments of 8 bits
    (torchao)."""
    max_grad_norm: Positive = 1.0
    """Gradients are clipped to this norm."""
    updates_per_batch: Count = 1
    """Disjoint mini-batches per step: more than 1 makes the later ones off-policy."""
    epochs: Count = 1
    """Passes over every batch."""
    old_logprobs: Literal["sampler", "recompute"] = "sampler"
    """Of off-policy updates: as sampled, or as the update computes them (better in bf16)."""
    token_budget: Count = 16384
    """Tokens per micro-batch, with padding: bounds the memory of the forward and backward pass."""
    packing: bool | None = None
    """A micro-batch is one row without padding; none = yes, where that needs no mask."""
    share_prompts: bool = False
    """Run a prompt once for all its completions: pays where these are short; not with packing."""


@section()
class CriticConfig:
    """The critic of PPO, where the algorithm has one."""

    learning_rate: Rate = 1e-5
    """AdamW, constant."""
    gamma: Annotated[float, Ge(0), Le(1)] = 1.0
    """Discount per token."""
    lam: Annotated[float, Ge(0), Le(1)] = 0.95
    """Of GAE: 1 = the whole return, 0 = one step."""
    clip: Positive | None = 0.5
    """How far a value may move from the old one before its loss is clipped; none = any way."""
    warmup_steps: Index = 0
    """Steps in which the critic learns and the policy does not."""


@section()
class VerifierConfig:
    """The task's code, which runs in processes of its own."""

    workers: Index = 0
    """Processes that judge completions side by side; 0 = one per core, at most 8."""
    seconds: Positive = 10.0
    """Longest call of the task's `reward` or `problem`; a longer one ends the run and is named."""


@section()
class EvalConfig:
    """Accuracy on held-out problems, never trained on and the same for every seed."""

    problems: Count = 256
    """Number of held-out problems; of test rows, the first so many."""
    every: Index = 0
    """Steps between evaluations; 0 = only before and after."""
    temperature: NonNegative = 0.0
    """0 = greedy."""
    samples: Count = 1
    """Completions per problem, averaged; greedy ones are all the same, so one is drawn."""


@section()
class LogConfig:
    """What a run leaves behind."""

    samples: Index = 4
    """Groups per step whose first completion is written to samples.jsonl."""
    tensorboard: bool = True
    """Write TensorBoard events where tensorboard is installed."""
    wandb: str | None = None
    """Project of Weights & Biases to log to as well; none = do not."""
    print_every: Count = 10
    """Steps between two lines of output where there is no terminal for a progress bar."""


@section()
class Config:
    """A whole run."""

    task: str = "sort"
    """A task of fastpo.trainer.data.tasks, or your own: `module:attribute`."""
    task_args: dict[str, Any] = field(default_factory=dict)
    """Keyword arguments of the task."""
    run_dir: str = "runs/{task}-seed{seed}"
    """Where everything is written; {task} and {seed} are filled in."""
    existing: Literal["refuse", "move_aside"] = "refuse"
    """If run_dir exists: stop, or rename the old one to run_dir.1, .2, ..."""
    seed: Annotated[int, Ge(0), Lt(2**32)] = 0
    """Seeds weights, problems and sampling."""
    steps: Count = 100
    """Rollout batches to train on."""
    replicas: Count = 1
    """Of the weights over all ranks: one per machine keeps gathers inside of it (HYBRID_SHARD)."""
    offload: bool = False
    """Shards of weights, gradients and moments wait in host memory: room for slower steps."""
    device: str | None = None
    """none = cuda where there is one, else cpu."""
    threads: Annotated[int, Ge(0), Le(1024)] = 0
    """Torch threads; 0 = leave as is. 1 is fastest for tiny models."""
    checkpoint_every: Index = 0
    """Steps between checkpoints; 0 = by the clock, at the end and on Ctrl-C."""
    checkpoint_minutes: NonNegative = 10.0
    """Minutes between checkpoints, whatever the steps; 0 = never by the clock."""
    model: ModelConfig = field(default_factory=ModelConfig)
    warmup: WarmupConfig = field(default_factory=WarmupConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    algorithm: AlgorithmConfig = field(default_factory=AlgorithmConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    critic: CriticConfig = field(default_factory=CriticConfig)
    verifier: VerifierConfig = field(default_factory=VerifierConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    log: LogConfig = field(default_factory=LogConfig)
