"""What it costs the ranks to exchange the observations of an epoch: seconds and bytes sent.

    python recipes/benchmarks/exchange.py --rounds 2 \\
        --output recipes/results/benchmarks/exchange.json

hf_dynprune exchanges once an epoch. It is compared with an all-gather of indices and losses in
every training step, as other libraries do it. At least 12 bytes (an int64 index and a float32
loss) must be sent for each observation to each other rank. The InfoBatch package sends the index as
float32, 8 bytes together, which confuses samples above 2^24. Only `flush` also writes to a table.

The ranks are processes on this machine that talk by gloo over TCP. The kernel counts the bytes on
all its interfaces, with headers and acknowledgements. Nothing else should use the network
meanwhile, not even the loopback. Seconds are those of rank 0 between two barriers. With fewer cores
than ranks they are higher than on a cluster.
"""

import argparse
import contextlib
import datetime
import io
import itertools
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import measure
import torch
import torch.distributed as dist
import torch.multiprocessing
from torch import Tensor

from hf_dynprune import UCB, RunShape
from hf_dynprune.distributed import gather_observations, plan_on_rank_0
from hf_dynprune.policies import EpochPlan
from hf_dynprune.pruner import DynamicPruner

KEEP_RATIO = 0.3
ONCE, FLUSH = "once an epoch (hf_dynprune)", "once an epoch, and into the table (flush)"
EVERY_STEP, PACKED = "in every step (all_gather)", "in every step (all_gather, float32 indices)"
CHOICE, NOTHING = "choice broadcast", "barriers alone"
NO_COUNTERS = "the kernel's network counters do not move here"

# The least bytes for each observation (for a choice: each kept sample) and each other rank.
LEAST = {ONCE: 12, FLUSH: 12, EVERY_STEP: 12, PACKED: 8, CHOICE: 8}


def sent_bytes() -> int:
    """Bytes that this machine has sent since its start, by the kernel; 0 without counters."""
    try:
        lines = Path("/proc/net/dev").read_text().splitlines()[2:]
    except OSError:
        return 0
    return sum(int(line.split(":")[1].split()[8]) for line in lines)


def measured(
    work: Callable[[], Any], prepare: Callable[[], None] = lambda: None
) -> Callable[[], tuple[float, int]]:
    """A function that does the work on all ranks and returns its seconds and bytes.

    The bytes include those of two barriers.
    """

    def once() -> tuple[float, int]:
        prepare()
        dist.barrier()
        sent = sent_bytes()
        dist.barrier()  # no rank begins before rank 0 has read the counters
        start = time.perf_counter()
        work()
        dist.barrier()
        return time.perf_counter() - start, sent_bytes() - sent

    return once


def all_gather(values: Tensor, ranks: int) -> Tensor:
    everywhere = [torch.empty_like(values) for _ in range(ranks)]
    dist.all_gather(everywhere, values)
    return torch.cat(everywhere, dim=-1)


def gather_each(batches: Sequence[tuple[Tensor, Tensor]], ranks: int) -> None:
    for index, losses in batches:
        all_gather(index, ranks), all_gather(losses, ranks)


def gather_each_packed(batches: Sequence[tuple[Tensor, Tensor]], ranks: int) -> None:
    """As `InfoBatch.update` of the InfoBatch package does it: `cat` makes the indices float32."""
    for index, losses in batches:
        all_gather(torch.cat([index.view(1, -1), losses.view(1, -1)]), ranks)


def ways(
    samples: int, batch_size: int, rank: int, ranks: int
) -> tuple[dict[str, Callable[[], tuple[float, int]]], int, int]:
    """What is measured, the number of observations of all ranks, and the number of steps."""
    # All ranks have the same number, because the all-gather in every step needs that.
    kept = int(KEEP_RATIO * samples) // ranks * ranks
    plan = EpochPlan(torch.randperm(samples, generator=torch.Generator().manual_seed(0))[:kept])
    index = plan.indices[rank::ranks].clone()
    losses = torch.rand(len(index))
    batches = list(zip(index.split(batch_size), losses.split(batch_size), strict=True))
    shape = RunShape(samples, batch_size, num_epochs=10_000, ranks=ranks)
    pruner = DynamicPruner(UCB(keep_ratio=KEEP_RATIO), shape)
    epochs = itertools.count()

    def observe() -> None:
        """Observe this rank's batches of the next epoch."""
        pruner.begin_epoch(next(epochs))
        order = torch.tensor(list(pruner.sampler)).clamp(min=-1)  # less than 0: filled
        order = order.view(-1, ranks, batch_size)
        for batch in order[:, rank]:
            pruner.observe(batch, {"loss": torch.rand(batch_size)})

    def exchange() -> None:
        everywhere, signals = gather_observations(index, {"loss": losses})
        if not len(everywhere) == len(signals["loss"]) == kept:
            raise RuntimeError(f"{len(everywhere)} observations came back, expected {kept}.")

    functions = {
        NOTHING: measured(lambda: None),
        ONCE: measured(exchange),
        FLUSH: measured(pruner.flush, prepare=observe),
        EVERY_STEP: measured(lambda: gather_each(batches, ranks)),
        PACKED: measured(lambda: gather_each_packed(batches, ranks)),
        CHOICE: measured(lambda: plan_on_rank_0(lambda: plan)),
    }
    return functions, kept, len(batches)


def rows_of(
    samples: int, options: argparse.Namespace, rank: int, ranks: int
) -> list[dict[str, Any]]:
    functions, observations, steps = ways(samples, options.batch_size, rank, ranks)
    functions[ONCE](), functions[CHOICE]()  # connections and buffers are made at the first call
    # Only rank 0 shows its progress bar. Exceptions do not go through stderr.
    with contextlib.nullcontext() if rank == 0 else contextlib.redirect_stderr(io.StringIO()):
        results = measure.in_turns(functions, options.rounds, f"{ranks} ranks, {samples:,} samples")
    seconds = {way: [took for took, _ in pairs] for way, pairs in results.items()}
    barriers = {
        "seconds": statistics.median(seconds[NOTHING]),
        "bytes": statistics.median(sent for _, sent in results[NOTHING]),
    }
    sizes = {"ranks": ranks, "samples": samples, "observations": observations, "steps": steps}
    rows = []
    for way, least in LEAST.items():
        sent = [total - barriers["bytes"] for _, total in results[way]]
        took, total = statistics.median(seconds[way]), statistics.median(sent)
        row = {"way": way, **sizes, "seconds": measure.spread(seconds[way])}
        row |= {"ms_an_epoch": 1e3 * took, "us_a_step": 1e6 * took / steps}
        row |= measure.ratio(seconds[way], seconds[ONCE])
        row |= {"bytes": None, "bytes_per_observation": None, "least": least, "barriers": barriers}
        if total > 0:
            row["bytes"] = measure.spread(sent)
            row["bytes_per_observation"] = total / (observations * (ranks - 1))
        else:
            row["why_no_bytes"] = NO_COUNTERS
        rows.append(row)
    return rows


def join(rank: int, ranks: int, folder: str) -> None:
    """Join the processes that talk by gloo, each with one thread."""
    torch.set_num_threads(1)
    # A file instead of a port: several runs at a time do not collide.
    rendezvous = f"file://{folder}/rendezvous{ranks}"
    timeout = datetime.timedelta(minutes=10)
    dist.init_process_group(
        "gloo", init_method=rendezvous, rank=rank, world_size=ranks, timeout=timeout
    )
    if dist.get_world_size() != ranks:
        raise RuntimeError(f"{dist.get_world_size()} ranks found each other, expected {ranks}.")


def work(rank: int, ranks: int, options: argparse.Namespace, folder: str) -> None:
    """What each process does. Rank 0 writes the rows."""
    join(rank, ranks, folder)
    rows = [row for samples in options.sizes for row in rows_of(int(samples), options, rank, ranks)]
    if rank == 0:
        Path(folder, f"rows{ranks}.json").write_text(json.dumps(rows))
    dist.barrier()
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4], help="processes, 2 or more")
    parser.add_argument(
        "--sizes",
        type=float,
        nargs="+",
        default=[1.28e6, 1e7],
        help="numbers of samples, of which 0.3 are kept",
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch_size", type=int, default=256, help="batch size of a rank")
    parser.add_argument("--output", type=Path, help="JSON file")
    options = parser.parse_args()
    if min(options.ranks) < 2:
        parser.error(f"--ranks {min(options.ranks)}: expected at least 2.")
    os.environ["OMP_NUM_THREADS"] = "1"  # the ranks share the cores
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for ranks in options.ranks:
            torch.multiprocessing.spawn(work, (ranks, options, folder), nprocs=ranks)
            rows += json.loads(Path(folder, f"rows{ranks}.json").read_text())
    shown = {"way": "", "ranks": "d", "samples": ",d", "observations": ",d", "steps": ",d"}
    shown |= {"ms_an_epoch": ",.1f", "us_a_step": ",.1f", "ratio": ".2f"}
    shown |= {"bytes_per_observation": ".2f", "least": "d"}
    title = (
        f"The exchange of an epoch, median of {options.rounds} rounds; ratio: seconds to {ONCE!r}"
    )
    measure.report(title, rows, shown, options)
    if any("why_no_bytes" in row for row in rows):
        print(f"No bytes: {NO_COUNTERS}.")


if __name__ == "__main__":
    main()
