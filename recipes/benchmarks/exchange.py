"""What it costs the ranks to tell each other what they observed in an epoch: seconds, and the bytes that were really sent.

We exchange once an epoch; beside it, an all-gather of indices and losses in every training step, as other libraries do. The
least is 12 bytes (an int64 index, a float32 loss) for each observation and each other rank. The InfoBatch package sends the
index as float32, 8 bytes together, and takes samples above 2^24 for others. Only `flush` writes to a table as well.

    python recipes/benchmarks/exchange.py --rounds 2 --output recipes/results/benchmarks/exchange.json

The ranks are processes on this machine that talk by gloo, over TCP. The bytes are those that the kernel counts on all its
interfaces, headers and acknowledgements included: nothing else should use the network meanwhile, not even the loopback.
Seconds are rank 0's between two barriers; on fewer cores than ranks they are more than on a cluster.
"""

import argparse
import contextlib
import datetime
import io
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

from hf_dynprune import UCB
from hf_dynprune.distributed import gather_observations, plan_on_rank_0
from hf_dynprune.policies import EpochPlan
from hf_dynprune.pruner import DynamicPruner

KEEP_RATIO = 0.3
ONCE, FLUSH = "once an epoch (hf_dynprune)", "once an epoch, and into the table (flush)"
EVERY_STEP, PACKED = "in every step (all_gather)", "in every step (all_gather, float32 indices)"
CHOICE, NOTHING = "choice broadcast", "barriers alone"
NO_COUNTERS = "the kernel's counters of the network do not move here"

# way -> the least bytes for each observation (choice: kept sample) and each other rank
LEAST = {ONCE: 12, FLUSH: 12, EVERY_STEP: 12, PACKED: 8, CHOICE: 8}


def sent_bytes() -> int:
    """What this machine has sent since it was started, by the kernel's counters; 0 where there are none."""
    try:
        lines = Path("/proc/net/dev").read_text().splitlines()[2:]
    except OSError:
        return 0
    return sum(int(line.split(":")[1].split()[8]) for line in lines)


def measured(
    work: Callable[[], Any], prepare: Callable[[], None] = lambda: None
) -> Callable[[], tuple[float, int]]:
    """A function that does the work on all ranks and returns its seconds and bytes, two barriers' bytes included."""

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
    """As `InfoBatch.update` of the InfoBatch package does: `cat` makes the indices float32."""
    for index, losses in batches:
        all_gather(torch.cat([index.view(1, -1), losses.view(1, -1)]), ranks)


def ways(
    samples: int, batch_size: int, rank: int, ranks: int
) -> tuple[dict[str, Callable[[], tuple[float, int]]], int, int]:
    """What is measured, the observations of all ranks, the steps."""
    kept = (
        int(KEEP_RATIO * samples) // ranks * ranks
    )  # shares of one size, for the all-gather in every step
    plan = EpochPlan(torch.randperm(samples, generator=torch.Generator().manual_seed(0))[:kept])
    index = plan.indices[rank::ranks].clone()
    losses = torch.rand(len(index))
    batches = list(zip(index.split(batch_size), losses.split(batch_size), strict=True))
    # One epoch of two, in which what is observed is exchanged again and again.
    pruner = DynamicPruner(UCB(keep_ratio=KEEP_RATIO), samples, batch_size=batch_size, num_epochs=2)
    pruner.begin_epoch(0)

    def observe() -> None:
        for samples_of_batch, of_batch in batches:
            pruner.observe(samples_of_batch, {"loss": of_batch})

    def exchange() -> None:
        everywhere, signals = gather_observations(index, {"loss": losses})
        if not len(everywhere) == len(signals["loss"]) == kept:
            raise RuntimeError(f"{len(everywhere)} observations came back, {kept} were made.")

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
    # One rank's progress bar is enough; errors do not go this way.
    with contextlib.nullcontext() if rank == 0 else contextlib.redirect_stderr(io.StringIO()):
        results = measure.in_turns(functions, options.rounds, f"{ranks} ranks, {samples:,} samples")
    seconds = {way: [took for took, _ in pairs] for way, pairs in results.items()}
    barriers = {
        "seconds": statistics.median(seconds[NOTHING]),
        "bytes": statistics.median(sent for _, sent in results[NOTHING]),
    }
    rows = []
    for way, least in LEAST.items():
        sent = [total - barriers["bytes"] for _, total in results[way]]
        moved = statistics.median(sent) > 0
        row = {
            "way": way,
            "ranks": ranks,
            "samples": samples,
            "observations": observations,
            "steps": steps,
            "seconds": measure.spread(seconds[way]),
            "ms_an_epoch": 1e3 * statistics.median(seconds[way]),
            "us_a_step": 1e6 * statistics.median(seconds[way]) / steps,
            **measure.ratio(seconds[way], seconds[ONCE]),
            "bytes": measure.spread(sent) if moved else None,
            "bytes_per_observation": statistics.median(sent) / (observations * (ranks - 1))
            if moved
            else None,
            "least": least,
            "barriers": barriers,
        }
        rows.append(row if moved else {**row, "why_no_bytes": NO_COUNTERS})
    return rows


def work(rank: int, ranks: int, options: argparse.Namespace, folder: str) -> None:
    """What each process does; rank 0 writes the rows."""
    torch.set_num_threads(1)
    rendezvous = (
        f"file://{folder}/rendezvous{ranks}"  # no port: several runs at a time do not collide
    )
    timeout = datetime.timedelta(minutes=10)
    dist.init_process_group(
        "gloo", init_method=rendezvous, rank=rank, world_size=ranks, timeout=timeout
    )
    if dist.get_world_size() != ranks:
        raise RuntimeError(f"{dist.get_world_size()} ranks found each other, wanted were {ranks}.")
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
        help="samples, of which 0.3 are kept",
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch_size", type=int, default=256, help="of a rank")
    parser.add_argument("--output", type=Path, help="JSON file")
    options = parser.parse_args()
    if min(options.ranks) < 2:
        parser.error("--ranks: one rank has nobody to tell.")
    os.environ["OMP_NUM_THREADS"] = "1"  # of the ranks: they share the cores
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for ranks in options.ranks:
            torch.multiprocessing.spawn(work, (ranks, options, folder), nprocs=ranks)
            rows += json.loads(Path(folder, f"rows{ranks}.json").read_text())
    shown = {
        "way": "",
        "ranks": "d",
        "samples": ",d",
        "observations": ",d",
        "steps": ",d",
        "ms_an_epoch": ",.1f",
    }
    shown |= {"us_a_step": ",.1f", "ratio": ".2f", "bytes_per_observation": ".2f", "least": "d"}
    title = f"An epoch's exchange, median of {options.rounds} rounds; ratio: of seconds, to those of {ONCE!r}"
    measure.report(title, rows, shown, options)
    if any("why_no_bytes" in row for row in rows):
        print(f"No bytes: {NO_COUNTERS}.")


if __name__ == "__main__":
    main()
