"""The only file that talks to other ranks. On one rank every function returns its input.

Collectives run on the device of the backend (NCCL takes no CPU tensors). What comes back lies on
the CPU. Indices stay int64, apart from scores: in float32 an index above 2^24 names another sample.
"""

import sys
from collections.abc import Callable, Mapping
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from .policies import EpochPlan
from .table import Rows

T = TypeVar("T")


def world() -> tuple[int, int]:
    """(rank, number of ranks)."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def _device() -> torch.device:
    if dist.get_backend() == "nccl":
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def plan_on_rank_0(make: Callable[[], EpochPlan]) -> EpochPlan:
    """Make the plan on rank 0 and broadcast it. An error of rank 0 is raised on all ranks.

    Only one rank chooses, because float reductions differ between unlike machines, and one sample
    more on one rank is a hang. Cost: 8 to 12 bytes per kept sample.
    """
    rank, ranks = world()
    if ranks == 1:
        return make()
    device = _device()
    plan, error = None, None
    if rank == 0:
        try:
            plan = make()
        except Exception as caught:
            error = caught
    header = torch.zeros(3, dtype=torch.float64, device=device)
    if plan is not None:
        header = torch.tensor(
            [len(plan), plan.weights is not None, plan.lr_scale], dtype=torch.float64, device=device
        )
    dist.broadcast(header, 0)
    size, weighted, lr_scale = header.tolist()
    if size == 0:
        raise error or RuntimeError("Rank 0 could not make a plan: see its error message.")
    indices = (
        plan.indices.to(device)
        if plan
        else torch.empty(int(size), dtype=torch.int64, device=device)
    )
    dist.broadcast(indices, 0)
    weights = None
    if weighted:
        weights = torch.empty(int(size), dtype=torch.float32, device=device)
        if plan is not None and plan.weights is not None:
            weights.copy_(plan.weights)
        dist.broadcast(weights, 0)
        weights = weights.cpu()
    return EpochPlan(indices.cpu(), weights, lr_scale)


def from_rank_0(make: Callable[[], T]) -> T:
    """Call `make` on rank 0 and return its result on all ranks, or raise its error on all.

    For small values: they are pickled.
    """
    rank, ranks = world()
    if ranks == 1:
        return make()
    made: list = [None, None]
    error: Exception | None = None
    if rank == 0:
        try:
            made[0] = make()
        except Exception as caught:
            error, made[1] = caught, f"{type(caught).__name__}: {caught}"
    dist.broadcast_object_list(made, 0)
    if made[1] is not None:
        raise error or RuntimeError(f"Rank 0 failed: {made[1]}")
    return made[0]


def check_same(values: Mapping[str, object]) -> None:
    """Raise ValueError on all ranks if a value differs between ranks.

    Ranks that disagree would wait for each other forever.
    """
    _, ranks = world()
    if ranks == 1:
        return
    everywhere: list = [None] * ranks
    dist.all_gather_object(everywhere, dict(values))
    for name in values:
        seen = [theirs[name] for theirs in everywhere]
        if any(value != seen[0] for value in seen):
            each = ", ".join(f"rank {i} has {value!r}" for i, value in enumerate(seen))
            raise ValueError(
                f"The ranks differ in {name!r}: {each}. Give all ranks the same arguments and the "
                "whole dataset: each rank trains its share of every batch."
            )


def gather_observations(index: Tensor, signals: Rows) -> tuple[Tensor, Rows]:
    """What all ranks observed: rank 0's observations first, each rank's in its order.

    Args:
        index: (M,) int64 on the CPU. M may differ between ranks.
        signals: For each signal (M,) float32 on the CPU.

    Cost: 12 bytes per observation with one signal, times the number of ranks.
    """
    if world()[1] == 1:
        return index, signals
    device = _device()
    count = torch.tensor([len(index)], dtype=torch.int64, device=device)
    counts = [torch.zeros_like(count) for _ in range(world()[1])]
    dist.all_gather(counts, count)
    sizes = [int(c) for c in counts]

    def gather(values: Tensor) -> Tensor:
        padded = torch.zeros(max(sizes), dtype=values.dtype, device=device)
        padded[: len(values)] = values.to(device)
        parts = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(parts, padded)
        return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)]).cpu()

    return gather(index), {name: gather(values) for name, values in signals.items()}


def sharded_classes() -> tuple[type, ...]:
    """The class that torch's `fully_shard` (FSDP2) adds to the modules that it splits.

    Empty as long as nobody imported it: then nothing was split.
    """
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return () if fsdp is None else (fsdp.FSDPModule,)


def is_fully_sharded(model: object) -> bool:
    """Whether `fully_shard` has split the model or a part of it."""
    split = sharded_classes()
    if not split or not isinstance(model, torch.nn.Module):
        return False
    return any(isinstance(module, split) for module in model.modules())


def most(count: int) -> int:
    """The largest of the numbers that the ranks have."""
    if world()[1] == 1:
        return count
    largest = torch.tensor(count, dtype=torch.int64, device=_device())
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    return int(largest)


def sum_over_ranks(value: Tensor) -> Tensor:
    """The sum of a scalar tensor over all ranks, on its device."""
    if world()[1] == 1:
        return value
    total = value.detach().clone()
    dist.all_reduce(total)
    return total
