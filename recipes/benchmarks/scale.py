"""One rank of many, at sizes that fit here: its memory, the bytes it gets and its seconds an epoch, and what follows for a
billion samples on 1,024 ranks.

    python recipes/benchmarks/scale.py --sizes 1e7 3e7 --output recipes/results/benchmarks/scale.json

This process plays one rank (0, which chooses, or another one): the pruner's own code runs, and in place of torch.distributed
stands a world that hands it what the others would send, in tensors of the sizes that would arrive, and counts the bytes. No
network is in the seconds. Per sample, with K = keep_ratio * N, UCB and int32 orders, the arithmetic says:

    table         16 bytes: two columns, times_kept, last_observed, on each rank
    plan, order   8 and 4 bytes a kept sample
    a choice      on rank 0, at the most in the first one, in which all samples tie: table + old order 4 + score 4 +
                  permutation 4 + masks 4 + 8 a kept sample
    an order      on each rank: table + plan + old order + permutation 4 + masks 2 + 12 a kept sample
    an exchange   12 bytes a kept sample from the other ranks, 8 for the plan; held twice while they are put together
    (and 4 a kept sample that are the simulation's own: who observed what)

What is extrapolated is linear in N, from the largest size; that bytes a sample and nanoseconds a sample stay what they are
over the sizes measured is what the simulation checks.
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

from hf_dynprune import UCB, DynamicPruner, distributed

KEEP_RATIO, BATCH = 0.3, 256


class World:
    """What `hf_dynprune.distributed` asks of torch.distributed, for one rank of many."""

    def __init__(self, rank: int, ranks: int, kept: int) -> None:
        self.rank, self.ranks, self.kept, self.received = rank, ranks, kept, 0
        self.shares: list[Tensor] = []  # the sample indices that each rank observed
        self.is_available = self.is_initialized = lambda: True
        self.get_rank, self.get_world_size, self.get_backend = (
            (lambda: rank),
            (lambda: ranks),
            (lambda: "gloo"),
        )

    def broadcast(self, tensor: Tensor, source: int) -> None:
        if self.rank == source:
            return
        self.received += tensor.nbytes
        if (
            tensor.dtype == torch.float64
        ):  # the plan's head: size, weights or none, factor on the learning rate
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
    """Some epochs of one rank in this process; seconds are those of the last."""
    torch.set_num_threads(1)
    world = World(rank, ranks, round(KEEP_RATIO * n))
    before, distributed.dist = choosing.peak_bytes(), world
    pruner = DynamicPruner(UCB(keep_ratio=KEEP_RATIO), n, batch_size=BATCH, num_epochs=epochs)
    seconds: dict[str, float] = {}
    for epoch in range(epochs):
        world.received, marks = 0, [time.perf_counter()]
        pruner.begin_epoch(epoch)
        marks.append(time.perf_counter())
        # Each rank goes through the batches of all, and takes its own, as Accelerate does it.
        shard = BatchSamplerShard(BatchSampler(pruner.sampler, BATCH, False), ranks, rank)
        own = [index for batch in shard for index in batch]
        marks.append(time.perf_counter())
        order = pruner.sampler._order.view(-1, ranks, BATCH)  # what the others observe meanwhile
        world.shares = [order[:, other].flatten() for other in range(ranks)]
        world.shares = [share[share >= 0] for share in world.shares]
        for index in torch.tensor(own).split(BATCH):
            pruner.observe(index, {"loss": torch.rand(len(index))})
        marks.append(time.perf_counter())
        pruner.end_epoch()
        marks.append(time.perf_counter())
        world.shares = []
        names = ("choose and order", "iterate", "", "exchange and apply")
        seconds = {name: b - a for name, a, b in zip(names, marks, marks[1:], strict=False) if name}
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
    parser.add_argument("--wanted", type=float, default=1e9, help="samples to extrapolate to")
    parser.add_argument("--output", type=Path, help="JSON file")
    options = parser.parse_args()
    rows = []
    for role, rank in (("rank 0, which chooses", 0), ("another rank", 1)):
        for n in map(int, options.sizes):
            found = measure.apart(play, rank, options.ranks, n, options.epochs)
            kept = round(KEEP_RATIO * n)
            row = {
                "role": role,
                "samples": n,
                "bytes_a_sample": found["peak"] / n,
                "GB": found["peak"] / 1e9,
            }
            row |= {
                "received_a_kept_sample": found["received"] / kept,
                "received_GB": found["received"] / 1e9,
            }
            rows.append(
                row | found["seconds"] | {"total": sum(found["seconds"].values()), "measured": True}
            )
        times = options.wanted / rows[-1]["samples"]
        scaled = ("GB", "received_GB", "choose and order", "iterate", "exchange and apply", "total")
        rows.append(rows[-1] | {name: rows[-1][name] * times for name in scaled})
        rows[-1] |= {"samples": int(options.wanted), "measured": False}
    shown = {"role": "", "samples": ",d", "measured": "", "bytes_a_sample": ".1f", "GB": ".2f"}
    shown |= {
        "received_a_kept_sample": ".2f",
        "received_GB": ".2f",
        "choose and order": ".2f",
        "iterate": ".2f",
    }
    shown |= {"exchange and apply": ".2f", "total": ".2f"}
    measure.report(f"One of {options.ranks} ranks, an epoch", rows, shown, options)


if __name__ == "__main__":
    main()
