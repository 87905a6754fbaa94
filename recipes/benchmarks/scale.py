"""One rank of 1,024 at sizes that fit on this machine, extrapolated to a billion samples.

    python recipes/benchmarks/scale.py --sizes 1e7 3e7 \\
        --output recipes/results/benchmarks/scale.json

Measured are its memory, the bytes it receives and its seconds per epoch. This process plays one
rank: rank 0, which chooses, or another one. The code of the pruner runs. A stand-in for
torch.distributed hands it tensors of the sizes that the other ranks would send, and counts the
bytes. The seconds contain no network. With K = keep_ratio * N kept samples, UCB and int32 orders,
the bytes should be:

    table         16 per sample on each rank: two columns, times_kept, last_observed
    plan, order   8 and 4 per kept sample
    a choice      on rank 0: table + old order 4 + score 4 + permutation 4 + masks 4 per sample,
                  and 8 per kept sample. The first choice is the peak, because all samples tie.
    an order      on each rank: table + plan + old order + permutation 4 + masks 2 per sample, and
                  12 per kept sample
    an exchange   12 per kept sample from the other ranks and 8 for the plan, twice while they are
                  put together
    simulation    4 per kept sample, for who observed what

The extrapolation is linear in N, from the largest size. The measured sizes show whether bytes and
nanoseconds per sample are constant.
"""

import argparse
import time
from pathlib import Path
from typing import Any

import choosing
import measure
import torch
from accelerate.data_loader import BatchSamplerShard
from torch import Tensor
from torch.utils.data import BatchSampler

from hf_dynprune import UCB, DynamicPruner, RunShape, distributed

KEEP_RATIO, BATCH = 0.3, 256
PHASES = ("choose and order", "iterate", "exchange and apply")


class World:
    """Stands in for torch.distributed in `hf_dynprune.distributed`, for one rank of many."""

    def __init__(self, rank: int, ranks: int, kept: int) -> None:
        self.rank, self.ranks, self.kept, self.received = rank, ranks, kept, 0
        self.shares: list[Tensor] = []  # the sample indices that each rank observed
        self.is_available = self.is_initialized = lambda: True
        self.get_rank, self.get_world_size = (lambda: rank), (lambda: ranks)
        self.get_backend = lambda: "gloo"

    def broadcast(self, tensor: Tensor, source: int) -> None:
        if self.rank == source:
            return
        self.received += tensor.nbytes
        if tensor.dtype == torch.float64:  # the head of a plan: size, has weights, lr_scale
            tensor.copy_(torch.tensor([self.kept, 0, 1], dtype=torch.float64))
        else:
            torch.arange(len(tensor), out=tensor)

    def all_gather(self, parts: list[Tensor], own: Tensor) -> None:
        self.received += own.nbytes * (self.ranks - 1)
        for part, share in zip(parts, self.shares, strict=True):
            if part.ndim == 0 or part.shape == (1,):
                part.fill_(len(share))
            elif part.dtype == torch.int64:
                part[: len(share)] = share
            else:
                part.fill_(1.0)

    def all_gather_object(self, everywhere: list, own: object) -> None:
        everywhere[:] = [own] * self.ranks


def play(rank: int, ranks: int, n: int, epochs: int) -> dict[str, Any]:
    """Run some epochs of one rank in this process. The seconds are those of the last one."""
    torch.set_num_threads(1)
    world = World(rank, ranks, round(KEEP_RATIO * n))
    before, distributed.dist = choosing.peak_bytes(), world
    shape = RunShape(n, BATCH, num_epochs=epochs)
    pruner = DynamicPruner(UCB(keep_ratio=KEEP_RATIO), shape)
    seconds: dict[str, float] = {}
    for epoch in range(epochs):
        world.received, marks = 0, [time.perf_counter()]
        pruner.begin_epoch(epoch)
        marks.append(time.perf_counter())
        # As in Accelerate, each rank goes through the batches of all ranks and takes its own.
        shard = BatchSamplerShard(BatchSampler(pruner.sampler, BATCH, False), ranks, rank)
        own = [index for batch in shard for index in batch]
        marks.append(time.perf_counter())
        # What the others observe meanwhile. Negative indices are padding.
        order = pruner.sampler._order.view(-1, ranks, BATCH)
        shares = (order[:, other].flatten() for other in range(ranks))
        world.shares = [share[share >= 0] for share in shares]
        for index in torch.tensor(own).split(BATCH):
            pruner.observe(index, {"loss": torch.rand(len(index))})
        marks.append(time.perf_counter())
        pruner.end_epoch()
        marks.append(time.perf_counter())
        world.shares = []
        begun, ordered, iterated, observed, ended = marks
        spent = (ordered - begun, iterated - ordered, ended - observed)
        seconds = dict(zip(PHASES, spent, strict=True))
    return {"seconds": seconds, "peak": choosing.peak_bytes() - before, "received": world.received}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--sizes", type=float, nargs="+", default=[1e7, 3e7, 1e8], help="numbers of samples"
    )
    parser.add_argument("--ranks", type=int, default=1024)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--extrapolate", type=float, default=1e9, help="number of samples")
    parser.add_argument("--output", type=Path, help="JSON file")
    options = parser.parse_args()
    rows = []
    for role, rank in (("rank 0, which chooses", 0), ("another rank", 1)):
        for n in map(int, options.sizes):
            found = measure.apart(play, rank, options.ranks, n, options.epochs)
            kept = round(KEEP_RATIO * n)
            peak, received, seconds = found["peak"], found["received"], found["seconds"]
            row = {"role": role, "samples": n, "bytes_a_sample": peak / n, "GB": peak / 1e9}
            row |= {"received_a_kept_sample": received / kept, "received_GB": received / 1e9}
            row |= {**seconds, "total": sum(seconds.values()), "measured": True}
            rows.append(row)
        times = options.extrapolate / rows[-1]["samples"]
        scaled = {name: rows[-1][name] * times for name in ("GB", "received_GB", *PHASES, "total")}
        size = {"samples": int(options.extrapolate), "measured": False}
        rows.append({**rows[-1], **scaled, **size})
    shown = {"role": "", "samples": ",d", "measured": "", "bytes_a_sample": ".1f", "GB": ".2f"}
    shown |= dict.fromkeys(("received_a_kept_sample", "received_GB", *PHASES, "total"), ".2f")
    measure.report(f"One of {options.ranks} ranks, an epoch", rows, shown, options)


if __name__ == "__main__":
    main()
