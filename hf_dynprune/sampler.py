"""In which order samples are trained, and the wrappers by which a batch knows its samples.

    PruningSampler ──index──▶ IndexedDataset ──(data, index)──▶ IndexedCollator ──▶ batch
                                                                              + sample_index

The index travels with the data, through any worker, prefetching or rank. Nothing is inferred from
what a sampler yielded.

A negative index i is padding: a copy of sample ~i that fills a global batch and counts for nothing.
It reaches the batch with `sample_index` -1. With 10 kept samples, batches of 4 and 2 ranks:

    order of the sampler     3 1 4 0 5 9 2 6 | 8 7 ~3 ~1 ~4 ~0 ~5 ~9
    batches of rank 0        3 1 4 0         | 8 7 -1 -1
    batches of rank 1                5 9 2 6 |           -1 -1 -1 -1
"""

import copy
from collections.abc import Callable, Iterator, MutableMapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset, Sampler, get_worker_info

from .collating import carries_tags, moves_rows, positions_in, tagged
from .selection import index_dtype, indices_of, mask_of, permutation

SAMPLE_INDEX = "sample_index"

# The way out for a collator that reorders or drops samples.
_HAND_ON = (
    f"Or let its batch say which sample a row is: `if '{SAMPLE_INDEX}' in rows[0]: "
    f"batch['{SAMPLE_INDEX}'] = torch.tensor([row['{SAMPLE_INDEX}'] for row in rows])`, for "
    "samples that are dicts, in the order of its rows."
)


def epoch_order(n: int, kept: Tensor | None, seed: int, epoch: int) -> Tensor:
    """The kept samples in the order of the stock Trainer's permutation of all n samples.

    Pure. A mask changes which samples are shown, not the sequence of the rest.

    Args:
        n: Number of samples.
        kept: (K,) int64, or None for all.
        seed: The run's data seed. The permutation is drawn with seed + epoch, as accelerate does.
        epoch: Counted from 0.

    Returns:
        (K,) int32, or int64 from 2^31 samples on. Cost: O(n).
    """
    return _kept_of(permutation(n, torch.Generator().manual_seed(seed + epoch)), kept)


def _kept_of(order: Tensor, kept: Tensor | None) -> Tensor:
    """The kept samples in the order of all n; all of them if `kept` is None."""
    n = len(order)
    if kept is None or len(kept) == n:
        return order
    return order.index_select(0, indices_of(mask_of(kept, n).index_select(0, order)))


def fit_to_batches(
    order: Tensor, global_batch: int, *, ranks: int, drop_last: bool, fills_one: bool = False
) -> Tensor:
    """Make the order fill whole global batches if needed, so that all ranks have as many steps.

    With `drop_last`, the tail that does not fill a global batch is left out. Otherwise the last
    batch is short on one rank; on several ranks it is filled with padding (~i, a copy of sample i
    that counts for nothing). With `fills_one`, a tail of one sample on one rank gets one such copy.
    """
    tail = len(order) % global_batch
    if tail == 0:
        return order
    if drop_last:
        return order[: len(order) - tail]
    if ranks == 1:
        return torch.cat([order, ~order[-1:]]) if fills_one and tail == 1 else order
    missing = global_batch - tail
    copies = -(-missing // len(order))  # a plan may hold fewer samples than are missing
    return torch.cat([order, ~order.repeat(copies)[:missing]])


class PruningSampler(Sampler[int]):
    """Yields the indices of an epoch, the same on all ranks. `set_epoch_order` sets the next epoch.

    It is deliberately not a subclass of torch's RandomSampler, which accelerate replaces by a
    sampler over all data. It has no `set_epoch`, which accelerate calls at the wrong times after a
    resume.

    Args:
        n: Number of samples. Until an order is set the sampler yields all of them, in sequence.
        global_batch: Samples in a batch of all ranks together.
        ranks: Number of ranks.
        drop_last: Whether the tail that does not fill a global batch is left out.

    Attributes:
        fills_one: Whether a last batch of one chosen sample is filled with a copy that counts for
            nothing, since a BatchNorm has no statistics of one sample. An epoch over all data stays
            as it is.
        strategy: "random", or the name of another order, which a resumed run must share.
        arrange: (the kept samples (K,), ascending; generator) -> their order, such as one by
            length. None is the random order of `epoch_order`.
    """

    fills_one = False
    strategy = "random"
    arrange: Callable[[Tensor, torch.Generator], Tensor] | None = None

    def __init__(
        self, n: int, global_batch: int = 1, *, ranks: int = 1, drop_last: bool = False
    ) -> None:
        self.n, self.global_batch, self.ranks, self.drop_last = n, global_batch, ranks, drop_last
        self.set_epoch_order(torch.arange(n, dtype=index_dtype(n)))

    def order_of(self, kept: Tensor | None, seed: int, epoch: int) -> Tensor:
        """The order of the kept samples in an epoch; see `epoch_order` and `arrange`."""
        if self.arrange is None:
            return epoch_order(self.n, kept, seed, epoch)
        every = torch.arange(self.n, dtype=index_dtype(self.n))
        return self.arrange(_kept_of(every, kept), torch.Generator().manual_seed(seed + epoch))

    def set_epoch_order(self, order: Tensor) -> None:
        """Set what the next epoch yields: (K,) integers."""
        self._real = len(order)
        self._order = fit_to_batches(
            order,
            self.global_batch,
            ranks=self.ranks,
            drop_last=self.drop_last,
            fills_one=self.fills_one and len(order) < self.n,
        )

    def __iter__(self) -> Iterator[int]:
        # In blocks: as one list, the indices of a large dataset take five times their bytes.
        for block in self._order.split(1 << 16):
            yield from block.tolist()

    def __len__(self) -> int:
        return len(self._order)

    @property
    def samples(self) -> int:
        """The number of real samples, without padding, that an epoch yields."""
        return min(self._real, len(self._order))

    def samples_in(self, batch: int, batches: int) -> int:
        """The number of real samples, without padding, in `batches` global batches from `batch`."""
        begin = batch * self.global_batch
        return max(0, min(self.samples, begin + batches * self.global_batch) - begin)


class RepeatingSampler(PruningSampler):
    """Yields prompts as trl's RepeatSampler does: a batch holds whole groups of completions.

    P prompts, each G times in a row, and that R times; then the next P. A tail of fewer than P is
    left out. With P = 2, G = 3, R = 2 and the order 5 1 4 0 2:

        5 5 5 1 1 1   5 5 5 1 1 1   4 4 4 0 0 0   4 4 4 0 0 0

    One generator gives the permutations of all epochs, as trl's does: the epoch e takes the
    (e + 1)-th. A run that trl resumes begins with the first one again. This one does not.

    Args:
        n: Number of prompts in the training set.
        prompts: P, prompts of one generation on all ranks together.
        generations: G, completions of a prompt.
        repeats: R, how often a generation is trained on, in batches.
        shuffle: Whether the order is random. Otherwise it is that of the dataset.
    """

    def __init__(
        self, n: int, prompts: int, *, generations: int, repeats: int, shuffle: bool = True
    ) -> None:
        self.generations, self.repeats, self.shuffle = generations, repeats, shuffle
        # The permutations drawn last: (seed, number of them, generator).
        self._stream: tuple[int, int, torch.Generator] | None = None
        super().__init__(n, prompts, drop_last=True)

    def order_of(self, kept: Tensor | None, seed: int, epoch: int) -> Tensor:
        """The order of the kept prompts in an epoch. Cost: O(n), after a resume O(n * epoch)."""
        if not self.shuffle:
            return _kept_of(torch.arange(self.n, dtype=index_dtype(self.n)), kept)
        if self._stream is None or self._stream[:2] != (seed, epoch):
            self._stream = seed, 0, torch.Generator().manual_seed(seed)
        _, drawn, generator = self._stream
        for _ in range(drawn, epoch + 1):
            order = permutation(self.n, generator)
        self._stream = seed, epoch + 1, generator
        return _kept_of(order, kept)

    def __iter__(self) -> Iterator[int]:
        for prompts in self._order.split(self.global_batch):
            batch = prompts.repeat_interleave(self.generations).tolist()
            for _ in range(self.repeats):
                yield from batch

    def __len__(self) -> int:
        return len(self._order) * self.generations * self.repeats


class _Indexed(NamedTuple):
    data: Any
    indices: list[int]


class IndexedDataset(Dataset):
    """A map-style dataset whose batches know the indices they were asked for. Nothing is copied.

    `__getitems__` of the dataset is used if it exists. It may return anything that its collator
    understands.

    Args:
        dataset: Map-style.
        sampler: What the loader draws from, *optional*. accelerate's `gather_for_metrics` cuts the
            last batch by `total_dataset_length`, here that of the epoch.

    Raises:
        TypeError: At construction, if the dataset lacks `__len__` or `__getitem__`.
    """

    def __init__(self, dataset: Any, sampler: PruningSampler | None = None) -> None:
        is_map = hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__")
        if not is_map or isinstance(dataset, IterableDataset):  # it inherits a `__getitem__`
            raise TypeError(
                f"A {type(dataset).__name__} has no length or no index, so it cannot be pruned. "
                "Use a map-style dataset, such as `datasets.load_dataset(..., streaming=False)`."
            )
        self.dataset, self._sampler = dataset, sampler

    def __len__(self) -> int:
        return len(self.dataset)

    @property
    def total_dataset_length(self) -> int:
        """How many samples an epoch of the loader has."""
        return len(self.dataset) if self._sampler is None else self._sampler.samples

    def __getitem__(self, index: int) -> _Indexed:
        return self.__getitems__([index])

    def __getitems__(self, indices: Sequence[int]) -> _Indexed:
        padded = min(indices, default=0) < 0
        rows = [i if i >= 0 else ~i for i in indices] if padded else indices
        batched = getattr(self.dataset, "__getitems__", None)
        data = batched(rows) if batched is not None else [self.dataset[i] for i in rows]
        return _Indexed(data, [max(i, -1) for i in indices] if padded else list(indices))


def _tensor_of(indices: list[int]) -> Tensor:
    """(B,) int64. NumPy reads a list in a third of torch's time (B = 32 to 1,000, timeit)."""
    return torch.from_numpy(np.array(indices, dtype=np.int64))


class IndexedRows:
    """Calls the user's collator on the samples, and adds `sample_index` to each row of its batch.

    For trainers whose batches are lists of rows, as those of trl's reinforcement learning.
    """

    def __init__(self, collator: Callable[[Any], Any], *, any_order: bool = False) -> None:
        self.collator, self.marks = collator, True
        self._any_order = any_order

    def __call__(self, indexed: _Indexed) -> list[dict[str, Any]]:
        rows = self.collator(indexed.data)
        if not self.marks:
            return rows
        return [{**row, SAMPLE_INDEX: i} for row, i in zip(rows, indexed.indices, strict=True)]


class IndexedCollator:
    """Calls the user's collator on the samples, and adds `sample_index` (B,) int64 to its batch.

    A collator that hands unknown entries of a sample on may reorder its samples: their indices go
    through it. Any other must keep the order, see `hf_dynprune/collating.py`.

    Args:
        collator: Samples -> batch.
        any_order: Whether nobody asks which sample a row is, so that the order does not matter.

    Raises:
        TypeError: At the first batch, if the collator does not return a dict, or if its batch has
            an entry of that name already.
        ValueError: If the collator reorders or drops samples, and does not hand their indices on.

    Attributes:
        marks: Whether it adds `sample_index`; if not, it is the user's collator. Set it before the
            workers of the loader start.
        blocks: How many rows of its batch belong to a sample, see `collating.moves_rows`.
    """

    blocks = 1

    def __init__(self, collator: Callable[[Any], Any], *, any_order: bool = False) -> None:
        self.collator, self.marks = collator, True
        self._any_order = any_order
        self._takes_tags = collator
        columns = getattr(collator, "signature_columns", None)
        if isinstance(columns, list):  # transformers' RemoveColumnsCollator would remove the tag
            self._takes_tags = copy.copy(collator)
            self._takes_tags.signature_columns = [*columns, SAMPLE_INDEX]  # type: ignore[attr-defined]
        self._carries: bool | None = None  # whether tags come through; known at the first batch
        self._batches = 0

    def __call__(self, indexed: _Indexed) -> Any:
        if not self.marks:
            return self.collator(indexed.data)
        size = len(indexed.indices)
        if self._carries is None:
            self._carries = carries_tags(self._takes_tags, indexed.data, SAMPLE_INDEX)
        rows = tagged(indexed.data, SAMPLE_INDEX) if self._carries else None
        if rows is not None:
            batch = self._takes_tags(rows)
            positions = positions_in(batch, SAMPLE_INDEX, size)
            if positions is None:
                raise ValueError(
                    f"The data collator returned {SAMPLE_INDEX}={batch.get(SAMPLE_INDEX)!r:.200}: "
                    f"expected the {SAMPLE_INDEX!r} of its samples, each once."
                )
            indices = [indexed.indices[position] for position in positions]
            batch[SAMPLE_INDEX] = _tensor_of(indices)
            return batch
        if not self._any_order:
            self._check_order(indexed.data)
        batch = self.collator(indexed.data)
        self._check_batch(batch)
        batch[SAMPLE_INDEX] = _tensor_of(indexed.indices)
        return batch

    def _check_order(self, data: Any) -> None:
        """Raise ValueError if the collator reorders: at batches 1, 2, 4, ..., in one process."""
        self._batches += 1
        worker = get_worker_info()
        power = self._batches & (self._batches - 1) == 0
        if not power or (worker is not None and worker.id != 0):
            return
        if moves_rows(self.collator, data, self.blocks):
            raise ValueError(
                "The data collator changes the order of its samples, so a row of the batch would "
                f"be taken for another sample: let it keep the order. {_HAND_ON}"
            )

    def _check_batch(self, batch: Any) -> None:
        if not isinstance(batch, MutableMapping):
            raise TypeError(
                f"The data collator returned a {type(batch).__name__}: expected a dict (of "
                f"tensors), so that the batch can carry its {SAMPLE_INDEX!r}."
            )
        if SAMPLE_INDEX in batch:
            raise TypeError(
                f"The batch already has an entry {SAMPLE_INDEX!r}: rename or remove that column of "
                "the dataset."
            )
