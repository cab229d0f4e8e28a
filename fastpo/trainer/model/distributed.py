"""Several ranks under torchrun: whose share is what, FSDP2, and what the ranks tell each other.

Every rank runs the same program on the same random numbers and samples its share of the prompts.
All ranks then learn all completions, so that whatever follows from them (dynamic sampling,
advantages, normalizers, whose a micro-batch is) needs no further message: it is computed alike
everywhere. On one process nothing here does anything.

A checkpoint is that of one process: rank 0 gathers weights and moments, tensor by tensor, into
its memory (12 bytes per parameter) and writes the usual files. torch.distributed.checkpoint would
write them in parallel, but a second format, with a second manifest and a conversion before
`from_pretrained` reads it; this takes two functions (`full`, `place_like`) and resumes on any
number of ranks. All ranks need the same file system.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from datetime import timedelta
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils._pytree import tree_map

from fastpo.trainer.run.errors import RecipeError, TrainerError

if TYPE_CHECKING:
    from fastpo.trainer.config import Config
    from fastpo.trainer.model.policy import Policy

Result = TypeVar("Result")
_own = threading.local()  # `group`: of a thread whose messages must not meet those of the others
HOW_MANY = "torchrun's --nproc-per-node and --nnodes, or --ranks of a plan"
PATIENCE = timedelta(hours=2)  # for the slowest rank; torchrun itself sees those that have died


class Failure(NamedTuple):
    """An error of a rank, as the others hear of it."""

    message: str
    exit_code: int


def rank() -> int:
    """Number of this process, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def size() -> int:
    """How many processes train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def launched() -> bool:
    """Whether torchrun has started this process as one of several."""
    return dist.is_torchelastic_launched() and int(os.environ["WORLD_SIZE"]) > 1


@contextmanager
def ranks() -> Iterator[Callable[[], None]]:
    """Around a run of which torchrun has started every rank; the function given joins them.

    The first rank that fails says why. The others fail of it sooner or later, and say nothing.
    """
    if not launched():
        yield lambda: None
        return
    store, number, count = next(dist.rendezvous("env://"))
    try:
        yield lambda: _join(store, number, count)
    except BaseException as error:
        with suppress(RuntimeError):  # a store that has gone with torchrun
            if store.add("fastpo/failed", 1) > 1:
                sys.stderr = open(os.devnull, "w")  # noqa: SIM115
        if number and not dist.is_initialized() and isinstance(error, TrainerError):
            error.args = (f"rank {number}: {error}",)  # its own, as far as can be known
        if _is_loss(error):
            raise TrainerError(
                "another rank has gone, and the run ends; the last checkpoint, if any, is intact, "
                "and the same command with --resume goes on from it, on any number of ranks"
            ) from error
        raise


def _join(store: dist.Store, number: int, count: int) -> None:
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, store=store, rank=number, world_size=count, timeout=PATIENCE)


def _is_loss(error: BaseException | None) -> bool:
    """Whether the loss of a rank is behind it; torchrun's SIGTERM may have come on top of that."""
    if isinstance(error, RuntimeError) and "gloo" in str(error).lower():
        return True
    return error is not None and (isinstance(error, dist.DistError) or _is_loss(error.__context__))


def raised_by_all(error: Exception) -> bool:
    """Whether every rank is at this error, so that they can still do something together."""
    return size() == 1 or isinstance(error, TrainerError)


def check(settings: dict[str, Any]) -> None:
    """Refuse what several ranks cannot do.

    Raises:
        RecipeError: ranks that differ in a setting; or what `check_size` raises.
    """
    for other, theirs in enumerate(everyones(lambda: settings)):
        for key, value in theirs.items():
            if value != settings[key]:
                first, second = sorted([(rank(), settings[key]), (other, value)])
                raise RecipeError(
                    f"{key} is {first[1]!r} on rank {first[0]} and {second[1]!r} on rank "
                    f"{second[0]}: start all ranks by the same command and recipe"
                )
    check_size(settings, size())


def check_size(settings: dict[str, Any], ranks: int) -> None:
    """Refuse a recipe that so many ranks cannot share.

    Raises:
        RecipeError: prompts or replicas that do not divide evenly; nothing to offload.
    """
    prompts, replicas = settings["rollout.prompts"], settings["replicas"]
    if prompts % ranks:
        raise RecipeError(
            f"rollout.prompts is {prompts}, expected a multiple of the {ranks} ranks: change it, "
            f"or that number: {HOW_MANY}"
        )
    if ranks % replicas:
        raise RecipeError(
            f"replicas is {replicas}, expected a divisor of the number of ranks, {ranks}: change "
            f"it, or that number: {HOW_MANY}"
        )
    if settings["offload"] and ranks == 1:
        raise RecipeError(
            "offload=true is for the shards of several ranks, and there is one: start with "
            "torchrun, or set offload=false"
        )


def own_group() -> dist.ProcessGroup | None:
    """A group of all ranks, made by all of them, for the messages of one thread of each."""
    return dist.new_group(backend="gloo", timeout=PATIENCE) if size() > 1 else None


def speak_in(group: dist.ProcessGroup | None) -> None:
    """What this thread says from now on (`everyones` and what is made of it) stays in `group`."""
    _own.group = group


def share() -> slice:
    """Which of the prompts this rank samples."""
    return slice(rank(), None, size())


def everyones(work: Callable[[], Result]) -> list[Result]:
    """What `work` returns on every rank.

    Raises:
        TrainerError: on all ranks, if it raises on one.
    """
    if size() == 1:
        return [work()]
    try:
        mine: Any = work()
    except Exception as error:
        if not isinstance(error, TrainerError) and _is_loss(error):
            raise
        mine = Failure(str(error) or type(error).__name__, getattr(error, "exit_code", 1))
    found: list[Any] = [None] * size()
    dist.all_gather_object(found, mine, group=getattr(_own, "group", None))
    for number, theirs in enumerate(found):
        if isinstance(theirs, Failure):
            failed = TrainerError(f"rank {number}: {theirs.message}" if number else theirs.message)
            failed.exit_code = theirs.exit_code
            raise failed
    return found


def gather(work: Callable[[], list[Result]]) -> list[Result]:
    """What `work` makes of every rank's `share`, put together in the order of the whole."""
    parts = everyones(work)
    return [parts[i % len(parts)][i // len(parts)] for i in range(sum(map(len, parts)))]


def first(work: Callable[[], Result]) -> Result:
    """What `work` returns on rank 0, where alone it is done."""
    return everyones(work if rank() == 0 else lambda: None)[0]


def agree(value: int) -> int:
    """The largest of all ranks' values."""
    return max(everyones(lambda: value))


def total(values: dict[str, Tensor | float]) -> dict[str, float]:
    """Sums over the ranks of values that have the same names on all of them: one all-reduce."""
    numbers = {name: float(value) for name, value in values.items()}
    if size() == 1 or not numbers:
        return numbers
    sums = torch.tensor(list(numbers.values()), dtype=torch.float64)
    dist.all_reduce(sums)
    return dict(zip(numbers, sums.tolist(), strict=True))


class Inside(nn.Module):
    """The root that FSDP2 wraps: whatever runs in its forward has the head's weight at hand."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, work: Callable[[], Result]) -> Result:
        """Just do it."""
        return work()


def units(model: nn.Module) -> list[nn.Module]:
    """The decoder layers, each of which is gathered as one; the rest belongs to the root."""
    layers = model._no_split_modules or ()
    return [module for module in model.modules() if type(module).__name__ in layers]


def shard(policy: Policy, config: Config, exact: nn.Module | None = None) -> Policy:
    """Spread a policy over the ranks: float32 shards, products in `policy.dtype`, `exact` in fp32.

    Every decoder layer is a unit; embeddings and the head, tied or not, belong to the root. With
    `config.replicas`, ranks next to each other hold one of them; with `config.offload`, shards wait
    in host memory, where they are updated.
    """
    if size() == 1:
        return policy
    from torch.distributed import fsdp
    from torch.distributed.device_mesh import init_device_mesh

    replicas, kind = config.replicas, policy.device.type
    dry = kind == "meta"  # a dry run, of shapes
    shape, names = (replicas, size() // replicas), ("replicate", "shard")
    mesh = init_device_mesh("cpu" if dry else kind, shape, mesh_dim_names=names)
    options: dict[str, Any] = {"mesh": mesh if replicas > 1 else mesh["shard"]}
    if config.offload:
        options["offload_policy"] = fsdp.CPUOffloadPolicy(pin_memory=kind == "cuda")
    root = Inside(policy.model)
    if exact:
        fsdp.fully_shard(exact, **options)
    options["mp_policy"] = fsdp.MixedPrecisionPolicy(policy.dtype, torch.float32)
    for unit in (*units(policy.model), root):
        fsdp.fully_shard(unit, reshard_after_forward=True, **options)
    if not dry:
        root(lambda: None)  # FSDP2 takes the first module that runs for the root
    return replace(policy, root=root)


@contextmanager
def whole(root: nn.Module | None) -> Iterator[None]:
    """In here every rank holds all weights (in the type of the products): decoding is local.

    Ranks decode different numbers of tokens, and a gather per token would cost more than it.
    """
    from torch.distributed.fsdp import FSDPModule

    units = [] if root is None else [m for m in root.modules() if isinstance(m, FSDPModule)]
    for unit in units:
        unit.set_reshard_after_forward(False, recurse=False)
        unit.unshard()
    try:
        yield
    finally:
        for unit in units:
            unit.reshard()
            unit.set_reshard_after_forward(True, recurse=False)


def full_tensor(value: Tensor) -> Tensor:
    """A tensor put together from all ranks' shards, if it is sharded."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def full(tree: Any) -> Any:
    """`tree` with its sharded tensors put together on the CPU of rank 0; elsewhere without them."""
    seen: dict[int, Tensor | None] = {}  # tied weights stay one

    def put_together(value: Any) -> Any:
        if not isinstance(value, DTensor):
            return value
        if id(value) not in seen:
            tensor = full_tensor(value.detach())
            seen[id(value)] = tensor.cpu() if rank() == 0 else None
        return seen[id(value)]

    return tree_map(put_together, tree)


def place_like(value: Any, parameter: Tensor) -> Any:
    """`value`, sharded as a parameter of its shape is, if that is."""
    if not isinstance(parameter, DTensor) or value.shape != parameter.shape:
        return value
    value = value.to(parameter.device)
    return distribute_tensor(value, parameter.device_mesh, parameter.placements)


@torch.no_grad()
def assign(parameters: Iterable[Tensor], values: Iterable[Tensor]) -> None:
    """Give parameters the values, of which every rank takes what it holds."""
    for parameter, value in zip(parameters, values, strict=True):
        parameter.copy_(place_like(value, parameter))
