"""In which order samples are trained, and the wrappers by which a batch knows its samples.

    PruningSampler ──index──▶ IndexedDataset ──(data, index)──▶ IndexedCollator ──▶ batch + sample_index

The index travels with the data, through any worker, prefetching or rank: nothing is inferred from what a sampler yielded.
A negative index i is padding: a copy of sample ~i that fills a global batch and counts for nothing; it reaches the batch
with `sample_index` -1.
"""

from collections.abc import Callable, Iterator, MutableMapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset, Sampler

from .policies import indices_of, mask_of, permutation

SAMPLE_INDEX = "sample_index"


def epoch_order(n: int, kept: Tensor | None, seed: int, epoch: int) -> Tensor:
    """The kept samples in the order of the stock Trainer's permutation of all n samples in this epoch.

    A pure function: a mask changes which samples are shown, not the sequence of the rest.

    Args:
        n: number of samples.
        kept: (K,) int64, or None for all.
        seed: the run's data seed; the permutation is drawn with seed + epoch, as accelerate draws it.
        epoch: counted from 0.

    Returns:
        (K,) int32, int64 from 2^31 samples on. Cost: O(n).
    """
    order = permutation(n, torch.Generator().manual_seed(seed + epoch))
    if kept is not None and len(kept) < n:
        order = order.index_select(0, indices_of(mask_of(kept, n).index_select(0, order)))
    return order


def fit_to_batches(order: Tensor, global_batch: int, *, ranks: int, drop_last: bool) -> Tensor:
    """Makes the order fill whole global batches where that is needed, so that all ranks have the same number of steps.

    `drop_last`: the tail that does not fill a global batch is left out. Otherwise, on one rank the last batch is short; on
    several, padding (~i, a copy of sample i that counts for nothing) fills it.
    """
    tail = len(order) % global_batch
    if tail == 0:
        return order
    if drop_last:
        return order[: len(order) - tail]
    if ranks == 1:
        return order
    missing = global_batch - tail
    return torch.cat([order, ~order.repeat(-(-missing // len(order)))[:missing]])


class PruningSampler(Sampler[int]):
    """Yields the indices of an epoch, the same on all ranks; `set_epoch_order` gives it the next epoch's.

    Deliberately no subclass of torch's RandomSampler (accelerate replaces those by its own over all data), and without
    `set_epoch` (accelerate calls it at the wrong times after a resume).

    Args:
        n: number of samples; until an order is set the sampler goes through all of them, in sequence.
        global_batch: samples in a batch of all ranks together.
        ranks: number of ranks.
        drop_last: whether the tail that does not fill a global batch is left out.
    """

    def __init__(
        self, n: int, global_batch: int = 1, *, ranks: int = 1, drop_last: bool = False
    ) -> None:
        self.global_batch, self.ranks, self.drop_last = global_batch, ranks, drop_last
        self.set_epoch_order(torch.arange(n, dtype=torch.int32 if n < 1 << 31 else torch.int64))

    def set_epoch_order(self, order: Tensor) -> None:
        """Sets what the next epoch yields: (K,) integers."""
        self._real = len(order)
        self._order = fit_to_batches(
            order, self.global_batch, ranks=self.ranks, drop_last=self.drop_last
        )

    def __iter__(self) -> Iterator[int]:
        for block in self._order.split(1 << 16):
            yield from block.tolist()

    def __len__(self) -> int:
        return len(self._order)

    def samples_in(self, batch: int, batches: int) -> int:
        """How many real samples, padding apart, the global batches `batch`, ..., `batch + batches - 1` hold."""
        end = min(self._real, len(self._order))
        return max(0, min(end, (batch + batches) * self.global_batch) - batch * self.global_batch)


class _Indexed(NamedTuple):
    data: Any
    indices: list[int]


class IndexedDataset(Dataset):
    """A map-style dataset whose batches know the indices they were asked for. Nothing is copied.

    `__getitems__` of the dataset is used where it exists, and may return whatever its collator understands.

    Raises:
        TypeError: at construction, for a dataset without `__len__` and `__getitem__`.
    """

    def __init__(self, dataset: Any) -> None:
        is_map = hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__")
        if not is_map or isinstance(
            dataset, IterableDataset
        ):  # which inherits a `__getitem__` that raises
            raise TypeError(
                f"A {type(dataset).__name__} has no length and no index, so nothing in it can be pruned. Use a map-style "
                "dataset, such as `datasets.load_dataset(..., streaming=False)`."
            )
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> _Indexed:
        return self.__getitems__([index])

    def __getitems__(self, indices: Sequence[int]) -> _Indexed:
        wanted = [i if i >= 0 else ~i for i in indices]
        batched = getattr(self.dataset, "__getitems__", None)
        data = batched(wanted) if batched is not None else [self.dataset[i] for i in wanted]
        return _Indexed(data, [i if i >= 0 else -1 for i in indices])


class IndexedCollator:
    """Calls the user's collator on the samples, and adds `sample_index` (B,) int64 to the batch it makes.

    Raises:
        TypeError: at the first batch, if the collator does not return a dict, or made a batch that has the key already.
    """

    def __init__(self, collator: Callable[[Any], Any]) -> None:
        self.collator = collator

    def __call__(self, indexed: _Indexed) -> Any:
        batch = self.collator(indexed.data)
        if not isinstance(batch, MutableMapping):
            raise TypeError(
                f"The data collator returned a {type(batch).__name__}. Wanted is a dict (of tensors), so that the batch "
                f"can carry its {SAMPLE_INDEX!r}."
            )
        if SAMPLE_INDEX in batch:
            raise TypeError(
                f"The batch has an entry {SAMPLE_INDEX!r} of its own: rename or remove that column of the dataset."
            )
        batch[SAMPLE_INDEX] = torch.tensor(indexed.indices, dtype=torch.int64)
        return batch
