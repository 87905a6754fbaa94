"""Does reading from a disk eat what pruning saves? Rows a second of an Arrow dataset, by order.

    python recipes/benchmarks/reading.py --output recipes/results/benchmarks/reading.json

The dataset is a file of `--rows` rows with `--tokens` token ids each, which `datasets` maps into
memory. Each order is read by the loader of the Trainer, batch by batch, from the middle of an
epoch:

    all, random      the order of the stock Trainer
    kept, random     the kept samples in that order, as pruning trains them by default
    kept, in order   the kept samples in the order of the dataset (train_sampling_strategy
                     "sequential"), here with pruning
    all, in order    the whole dataset so

    plain            the dataset as it lies in its file
    indices          the same after `Dataset.shuffle`, which reads through a list of indices

Before each reading `on disk` drops the pages of the file from the memory of the system. The rows
then come from the disk, until its read-ahead has brought the file back. `in memory` has read the
file before. The first batches, which start
the workers, do not count. The figures of a row:

    rows_a_second    median over the rounds
    ratio            rows a second, to those of the random order of all samples
    epoch            seconds to read an epoch, to those of that order. Pruning saves what its share
                     of the samples says as long as this is about the share of the rows.

All orders take turns. Needs Linux, and room for the file: 4 bytes a token.
"""

import argparse
import os
import shutil
import statistics
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import measure
import numpy as np
import pyarrow
import torch
from datasets.arrow_writer import ArrowWriter
from datasets.utils import disable_progress_bars
from torch.utils.data import DataLoader
from tqdm import trange
from transformers import default_data_collator

from hf_dynprune.sampler import IndexedCollator, IndexedDataset, PruningSampler

KEEP_RATIO = 0.3
ORDERS = ("all, random", "kept, random", "kept, in order", "all, in order")
LAYOUTS = ("plain", "indices")
WHERE = ("in memory", "on disk")
_BLOCK = 1 << 16
_VOCABULARY = 30_000


def write_rows(path: Path, rows: int, tokens: int) -> None:
    """Write an Arrow file of rows with random `input_ids` and one `label`."""
    generator = np.random.default_rng(0)
    features = datasets.Features(
        {"input_ids": datasets.List(datasets.Value("int32")), "label": datasets.Value("int64")}
    )
    with ArrowWriter(path=str(path), features=features) as writer:
        for begin in trange(0, rows, _BLOCK, desc="writing", unit_scale=_BLOCK):
            size = min(_BLOCK, rows - begin)
            ids = generator.integers(0, _VOCABULARY, size * tokens, dtype=np.int32)
            offsets = np.arange(0, size * tokens + 1, tokens, dtype=np.int32)
            columns = {
                "input_ids": pyarrow.ListArray.from_arrays(offsets, ids),
                "label": generator.integers(0, 10, size),
            }
            writer.write_table(pyarrow.table(columns))


def fits(size: int) -> bool:
    """Whether a file of `size` bytes stays in memory once it was read."""
    return size < 0.5 * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def settle(path: Path, where: str) -> None:
    """Read the whole file, which ends its read-ahead; then keep its pages in memory or drop them.

    The system keeps the pages that a program has mapped and read. So each reading maps the file
    anew. A file that does not fit into memory is not read first.
    """
    with path.open("rb") as file:
        while fits(path.stat().st_size) and file.read(1 << 24):
            pass
        if where == "on disk":
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def orders(rows: int) -> dict[str, torch.Tensor]:
    """The orders of an epoch, (K,) each."""
    generator = torch.Generator().manual_seed(0)
    every = torch.arange(rows)
    kept = torch.randperm(rows, generator=generator)[: int(KEEP_RATIO * rows)].sort().values
    sampler = PruningSampler(rows)
    random = {
        name: sampler.order_of(which, 0, 0) for name, which in (("all", None), ("kept", kept))
    }
    return dict(zip(ORDERS, (random["all"], random["kept"], kept, every), strict=True))


def read(
    path: Path, order: torch.Tensor, layout: str, where: str, workers: int, options: Any
) -> float:
    """Rows a second of a loader, after its first batches."""
    data = datasets.Dataset.from_file(str(path))
    if layout == "indices":
        data = data.shuffle(seed=0, keep_in_memory=True)
    first = 2 * workers + 1  # batches that the workers have loaded before one is asked for
    half = len(order) // 2
    sampler = PruningSampler(len(data))
    sampler.set_epoch_order(order[half : half + options.batch_size * (first + options.batches)])
    loader = DataLoader(
        IndexedDataset(data),
        batch_size=options.batch_size,
        sampler=sampler,
        collate_fn=IndexedCollator(default_data_collator),
        num_workers=workers,
    )
    settle(path, where)
    batches = iter(loader)
    for _ in range(first):
        next(batches)
    begun = time.perf_counter()
    rows = sum(len(batch["labels"]) for batch in batches)
    return rows / (time.perf_counter() - begun)


def measure_rows(path: Path, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Read in every order, layout, place and number of workers."""
    known, rows = orders(options.rows), []
    for layout in options.layouts:
        for where in options.where:
            for workers in options.workers:
                found = measure.in_turns(
                    {
                        name: partial(read, path, order, layout, where, workers, options)
                        for name, order in known.items()
                    },
                    options.rounds,
                    f"{layout}, {where}, {workers} workers",
                )
                base = found[ORDERS[0]]
                for name, order in known.items():
                    share = len(order) / options.rows
                    seconds = [share / speed for speed in found[name]]
                    against = measure.ratio(found[name], base)
                    epoch = measure.ratio(seconds, [1 / speed for speed in base])
                    rows.append(
                        {
                            "layout": layout,
                            "where": where,
                            "workers": workers,
                            "order": name,
                            "rows_a_second": statistics.median(found[name]),
                            **against,
                            "epoch": epoch["ratio"],
                            "epoch_95": epoch["ratio_95"],
                        }
                    )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=10_000_000, help="Rows of the dataset.")
    parser.add_argument("--tokens", type=int, default=64, help="Token ids of a row.")
    parser.add_argument("--batch_size", type=int, default=32, help="Rows of a batch.")
    parser.add_argument("--batches", type=int, default=100, help="Batches of a reading.")
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 4], help="Of the loader.")
    parser.add_argument("--layouts", nargs="+", choices=LAYOUTS, default=LAYOUTS)
    parser.add_argument("--where", nargs="+", choices=WHERE, default=WHERE)
    parser.add_argument("--rounds", type=int, default=5, help="Readings of each kind.")
    parser.add_argument("--folder", help="Where to put the file; default: a temporary folder.")
    parser.add_argument("--output", help="JSON file to write.")
    options = parser.parse_args()
    disable_progress_bars()
    size = 4 * options.rows * options.tokens
    if "in memory" in options.where and not fits(size):
        parser.error(f"{size:,} bytes do not stay in memory: add --where 'on disk'.")
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        path = Path(folder) / "rows.arrow"
        free = shutil.disk_usage(folder).free
        if free < 1.2 * size:
            parser.error(
                f"The file takes {size:,} bytes, {free:,} are free: name another --folder, or set "
                "fewer --rows."
            )
        write_rows(path, options.rows, options.tokens)
        rows = measure_rows(path, options)
    shown = {"layout": "", "where": "", "workers": "d", "order": "", "rows_a_second": ",.0f"}
    options.folder = None  # of no use to others
    measure.report(
        f"Reading {options.rows:,} rows of {options.tokens} tokens from an Arrow file",
        rows,
        {**shown, "ratio": ".2f", "epoch": ".2f"},
        options,
    )


if __name__ == "__main__":
    main()
