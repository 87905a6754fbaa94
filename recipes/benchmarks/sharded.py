"""What a choice in shards would cost, in which each rank chooses among its own rows only.

    python recipes/benchmarks/sharded.py --output recipes/results/benchmarks/sharded.json

hf_dynprune does not choose like that: rank 0 chooses, and each rank permutes all samples, as in the
stock Trainer. In shards, a rank would hold the scores of N / ranks rows:

    threshold   the K-th highest score of all ranks, exactly, by two histograms of 65,536 buckets
                that the ranks add up: of the upper and of the lower half of an integer that has the
                order of the float32 score
    choice      its rows above the threshold, and its share of the rows at the threshold
    order       its kept rows, shuffled, and filled with copies up to the most that a rank keeps

At a small size the program compares this with `top_k`, with and without ties. Measured beside it,
in turns, while the other ranks wait: the choice among all N rows and their order on rank 0
(`top_k`, `epoch_order`), and what the stock sampler does before the first batch: it lists a
permutation of all N, on each rank. More than 30 million rows are measured once.

The ranks are processes on this machine that talk by gloo, see exchange.py. Seconds are those that
the slowest rank used the processor, because other programs share the cores; the waits for each
other are in `wall` alone, from barrier to barrier. The peak is the resident memory, with the
scores, of the rank that needs most, minus what it had before. `sent` is in bytes a rank, with
headers and barriers. `filled` is the share of copies in an epoch.

Extrapolated is one rank of many. Its part of a choice in shards is measured at the number of rows
that it would hold. To this are added two all-reduces in a ring, 2 (ranks - 1) hops each, with the
latency and the bandwidth of the options. What is done to all N rows is linear in N, from the
largest size. `rate` is the number of samples that all ranks train in a second together if the
choice takes 5 % as long as the training of the epoch.
"""

import argparse
import contextlib
import io
import json
import math
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import choosing
import exchange
import measure
import torch
import torch.distributed as dist
import torch.multiprocessing
from torch import Tensor
from torch.utils.data import RandomSampler

from hf_dynprune import distributed
from hf_dynprune.sampler import epoch_order, fit_to_batches
from hf_dynprune.selection import draw, indices_of, keep_count, permutation, top_k

KEEP_RATIO, BUCKETS = 0.3, 1 << 16
SHARDS, TODAY, STOCK = "in shards", "on rank 0 (hf_dynprune)", "the stock sampler, all samples"
PHASES = ("threshold", "choice", "order")


def key_of(score: Tensor) -> Tensor:
    """(n,) int32 with the order of (n,) float32 scores without NaN; 0 and -0 have one key."""
    bits = (score + 0.0).view(torch.int32)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


def kth_highest_digit(digit: Tensor, k: int) -> tuple[int, int]:
    """The k-th highest digit of all ranks, and which of the rows with that digit it is, from 1."""
    counts = torch.bincount(digit, minlength=BUCKETS)
    dist.all_reduce(counts)
    counts = counts.flip(0)
    so_far = counts.cumsum(0)
    place = int(torch.searchsorted(so_far, k))
    return BUCKETS - 1 - place, k - int(so_far[place] - counts[place])


class Shard:
    """The rows of one rank, and what it does in a choice of K of all rows."""

    def __init__(self, score: Tensor, k: int) -> None:
        self.score, self.k, self.ranks = score, k, dist.get_world_size()
        self.generator = torch.Generator().manual_seed(dist.get_rank())

    def threshold(self) -> None:
        self.key = key_of(self.score)
        upper = (self.key >> 16) + BUCKETS // 2
        highest, k = kth_highest_digit(upper, self.k)
        inside = self.key.index_select(0, indices_of(upper == highest))
        lowest, self.tied = kth_highest_digit(inside & (BUCKETS - 1), k)
        self.limit = (highest - BUCKETS // 2) * BUCKETS + lowest

    def choice(self) -> None:
        at = self.key == self.limit
        own = torch.count_nonzero(at)
        everywhere = [torch.empty_like(own) for _ in range(self.ranks)]
        dist.all_gather(everywhere, own)
        # In proportion: all rows tie in a first choice, and then each rank must keep its share.
        ends = [0, *torch.stack(everywhere).cumsum(0).tolist()]
        begin, end = (ends[dist.get_rank() + i] * self.tied // ends[-1] for i in (0, 1))
        self.kept = indices_of((self.key > self.limit) | draw(at, end - begin, self.generator))

    def order(self) -> None:
        order = self.kept.index_select(0, permutation(len(self.kept), self.generator))
        most = distributed.most(len(order))
        self.filled = fit_to_batches(order, most, ranks=self.ranks, drop_last=False)


def check(rank: int, ranks: int) -> None:
    """Raise RuntimeError unless shards choose what `top_k` chooses among all rows."""
    rows, generator = 5003, torch.Generator().manual_seed(0)
    plain = torch.randn(rows * ranks, generator=generator)
    tied = (2 * plain).round()  # holds -0, too
    tied[::5], tied[1::5] = torch.inf, -torch.inf
    for score in (plain, tied, torch.full_like(plain, torch.inf)):
        for k in (1, rows, keep_count(KEEP_RATIO, len(score)), len(score)):
            shard = Shard(score[rank * rows : (rank + 1) * rows], k)
            for phase in PHASES:
                getattr(shard, phase)()
            kept, _ = distributed.gather_observations(shard.kept + rank * rows, {})
            expected = top_k(score, k, generator)
            same = torch.equal(kept, expected) if score is plain else len(kept.unique()) == k
            if not same or not torch.equal(score[kept].sort()[0], score[expected].sort()[0]):
                raise RuntimeError(f"The {k} highest of {len(score)} differ: {kept} {expected}")


class Whole:
    """All rows on one rank, as the package chooses among them."""

    def __init__(self, samples: int, k: int) -> None:
        self.score, self.k = torch.rand(samples), k
        self.generator = torch.Generator().manual_seed(0)

    def choice(self) -> None:
        self.plan = top_k(self.score, self.k, self.generator)

    def order(self) -> None:
        epoch_order(len(self.score), self.plan, seed=0, epoch=0)


def rows_of(samples: int, rank: int, ranks: int, rounds: int) -> list[dict[str, Any]]:
    """Measure one size. In the first round, what needs less memory comes first."""
    before, k = choosing.peak_bytes(), keep_count(KEEP_RATIO, samples)
    shard = Shard(torch.rand(samples // ranks, generator=torch.Generator().manual_seed(rank)), k)

    def timed(phases: Mapping[str, Callable[[], Any]]) -> dict[str, float]:
        run = dict.fromkeys((*PHASES, "wall", "sent"), 0.0)
        for phase, work in phases.items():
            begun = time.process_time()
            wall, sent = exchange.measured(work)()
            run[phase] = distributed.most(int(1e6 * (time.process_time() - begun))) / 1e6
            run["wall"], run["sent"] = run["wall"] + wall, run["sent"] + sent / ranks
        return {**run, "peak": distributed.most(choosing.peak_bytes() - before)}

    def today() -> dict[str, float]:
        whole = Whole(samples, k) if rank == 0 else None
        return timed({name: getattr(whole, name, lambda: None) for name in ("choice", "order")})

    def stock() -> dict[str, float]:
        return timed({"order": lambda: rank or next(iter(RandomSampler(range(samples))))})

    ways = {SHARDS: lambda: timed({phase: getattr(shard, phase) for phase in PHASES})}
    ways |= {TODAY: today, STOCK: stock}
    # Only rank 0 shows its progress bar. Exceptions do not go through stderr.
    with contextlib.nullcontext() if rank == 0 else contextlib.redirect_stderr(io.StringIO()):
        results = measure.in_turns(ways, rounds, f"{ranks} ranks, {samples:,} samples")
    total = {way: [sum(run[phase] for phase in PHASES) for run in results[way]] for way in ways}
    rows = []
    for way, runs in results.items():
        held = samples // ranks if way == SHARDS else samples
        row = {"way": way, "ranks": ranks, "samples": samples, "held": held, "measured": True}
        for name in (*PHASES, "wall", "sent"):
            row[name] = statistics.median(run[name] for run in runs)
        row |= {"total": statistics.median(total[way]), **measure.ratio(total[way], total[TODAY])}
        row |= {"GB": runs[0]["peak"] / 1e9, "bytes_a_row": runs[0]["peak"] / held, "filled": None}
        rows.append(row)
    kept, most = (torch.tensor(f(len(shard.kept))) for f in (int, distributed.most))
    rows[0]["filled"] = 1 - int(distributed.sum_over_ranks(kept)) / (ranks * int(most))
    return rows


def work(rank: int, ranks: int, samples: int, rounds: int, folder: str) -> None:
    """What each process does. Rank 0 writes the rows."""
    exchange.join(rank, ranks, folder)
    check(rank, ranks)
    rows = rows_of(samples, rank, ranks, rounds)
    if rank == 0:
        Path(folder, "rows.json").write_text(json.dumps(rows))
    dist.barrier()
    dist.destroy_process_group()


def extrapolated(rows: list[dict[str, Any]], options: argparse.Namespace) -> list[dict[str, Any]]:
    """One rank of `options.of`. The last rows are those of the share that such a rank holds."""
    of, largest = options.of, max(row["samples"] for row in rows)
    sent = 2 * 2 * (of - 1) / of * 8 * BUCKETS
    network = 2 * 2 * (of - 1) * options.latency + sent / options.bandwidth
    result = []
    for way, share in zip((SHARDS, TODAY, STOCK), rows[-3:], strict=True):
        whole = next(row for row in rows if (row["way"], row["samples"]) == (way, largest))
        row, times = (share, 1.0) if way == SHARDS else (whole, options.extrapolate / largest)
        scaled = {name: row[name] * times for name in (*PHASES, "total", "GB")}
        size = {"ranks": of, "samples": int(options.extrapolate), "measured": False}
        row = {**row, **scaled, **size, "sent": 0.0, "wall": None, "filled": None}
        if way == SHARDS:
            row |= {"threshold": row["threshold"] + network, "total": row["total"] + network}
            row |= {"sent": sent, "network": network}
        result.append(row)
    return [{**row, "ratio": row["total"] / result[1]["total"], "ratio_95": None} for row in result]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4], help="processes, 2 or more")
    parser.add_argument("--sizes", type=float, nargs="*", default=[1e7, 1e8], help="rows in all")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--extrapolate", type=float, default=1e9, help="rows in all")
    parser.add_argument("--of", type=int, default=1024, help="ranks of the extrapolation")
    parser.add_argument("--latency", type=float, default=5e-5, help="seconds a hop, assumed")
    parser.add_argument("--bandwidth", type=float, default=1e9, help="bytes a second, assumed")
    parser.add_argument("--output", type=Path, help="JSON file")
    options = parser.parse_args()
    if min(options.ranks) < 2:
        parser.error(f"--ranks {min(options.ranks)}: expected at least 2.")
    os.environ["OMP_NUM_THREADS"] = "1"  # the ranks share the cores
    share, rows = math.ceil(options.extrapolate / options.of), []
    for ranks in options.ranks:
        for samples in [*(int(size) // ranks * ranks for size in options.sizes), share * ranks]:
            rounds = options.rounds if samples <= 3e7 else 1
            with tempfile.TemporaryDirectory() as folder:  # processes with peaks of their own
                task = (ranks, samples, rounds, folder)
                torch.multiprocessing.spawn(work, task, nprocs=ranks)
                rows += json.loads(Path(folder, "rows.json").read_text())
    rows += extrapolated(rows, options)
    for row in rows:
        trained = row["samples"] * (1 if row["way"] == STOCK else KEEP_RATIO)
        row["rate"] = 0.05 * trained / row["total"]
    shown = {"way": "", "ranks": ",d", "samples": ",d", "measured": ""}
    shown |= {**dict.fromkeys(PHASES, ".3f"), "total": ".3f", "ratio": ".3f", "GB": ".3f"}
    shown |= {"bytes_a_row": ".1f", "sent": ",.0f", "filled": ".4f", "rate": ",.0f"}
    measure.report("Choosing in shards, seconds of an epoch", rows, shown, options)


if __name__ == "__main__":
    main()
