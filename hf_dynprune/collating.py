"""Which sample does row i of a batch belong to? Found out by calling the collator on a few samples.

A collator may sort its samples by length, or leave out those that it could not read. A score would
then be written to the wrong sample. There are two cures:

1. If the collator hands unknown entries of a sample on, each sample takes a tag through it
   ([`carries_tags`]). The tags of the batch say which samples it holds, in which order.
2. Otherwise the order must be kept. [`moves_rows`] replaces one sample after the other and looks at
   which rows of the batch change.

The calls see copies of the samples and of the collator, and restore all random states.
"""

import copy
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

Collator = Callable[[Any], Any]

# Enough samples to see an order; each is replaced once.
_LOOKED_AT = 6

_GENERATORS = (torch.Generator, np.random.Generator, np.random.RandomState, random.Random)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed the random numbers of Python, NumPy and torch (CPU); restore their states at the end."""
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        try:
            torch.manual_seed(seed)
            random.seed(seed)
            np.random.seed(seed)
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)


def tagged(data: Any, tag: str) -> Any:
    """Each sample with its position as the entry `tag`, or None if that is not possible."""
    if not isinstance(data, list) or any(type(row) is not dict or tag in row for row in data):
        return None
    return [{**row, tag: position} for position, row in enumerate(data)]


def positions_in(batch: Any, tag: str, size: int) -> list[int] | None:
    """The tags of a batch of at most `size` samples; None unless they are different positions."""
    tags = batch.get(tag) if isinstance(batch, Mapping) else None
    if isinstance(tags, Tensor):
        tags = tags.tolist()
    if not isinstance(tags, list) or not all(type(t) is int and 0 <= t < size for t in tags):
        return None
    return tags if len(set(tags)) == len(tags) else None


def carries_tags(collator: Collator, data: Any, tag: str) -> bool:
    """Whether tags come through the collator, and leave the rest of the batch as it is."""
    rows = tagged(_some(data), tag)
    if not rows:
        return False
    try:
        batch = _call(collator, rows)
        plain = _call(collator, _some(data))
    except Exception:  # it does not take an unknown entry, or not so few samples
        return False
    if positions_in(batch, tag, len(rows)) is None:
        return False
    rest = {name: value for name, value in batch.items() if name != tag}
    return _same(rest, {name: value for name, value in plain.items() if name != tag})


def moves_rows(collator: Collator, data: Any, blocks: int = 1) -> bool | None:
    """Whether the rows of a batch have another order than its samples. None if that is unknown.

    Row i must change if sample i is replaced by another sample. The batch holds each sample twice,
    so its width stays the same.

    Args:
        collator: Samples -> batch.
        data: A list of samples.
        blocks: Entries of B * blocks rows are looked at, too. They have a row of each sample, then
            another row of each, as the chosen and the rejected completions of B pairs.

    Cost: m + 2 calls with 2 m samples, m at most 6.
    """
    rows = _some(data)
    if not isinstance(rows, list) or len(rows) < 2:
        return None
    twice = [*rows, *rows]
    try:
        before = _call(collator, twice)
        if not isinstance(before, Mapping) or not _same(before, _call(collator, twice)):
            return None
        names = [name for k in {1, blocks} for name in rowed(before, k * len(twice))]
        for i in range(len(rows)):
            others = [*twice[:i], rows[(i + 1) % len(rows)], *twice[i + 1 :]]
            after = _call(collator, others)
            changed = [
                row % len(twice)
                for name in names
                for row in range(len(before[name]))
                if len(after[name]) != len(before[name])
                or not _same(before[name][row], after[name][row])
            ]
            if changed and i not in changed:
                return True
    except Exception:  # it does not take copies, or a sample twice
        return None
    return False if names else None


def rowed(batch: Mapping[str, Any], size: int) -> list[str]:
    """The entries of a batch that have one row for each of its `size` samples."""
    return [name for name, value in batch.items() if rows_of(value) == size]


def rows_of(value: Any) -> int | None:
    """The number of rows of an entry; None if it has none."""
    if isinstance(value, Tensor | np.ndarray):
        return len(value) if value.ndim else None
    return len(value) if isinstance(value, list) else None


def _some(data: Any) -> Any:
    return data[:_LOOKED_AT] if isinstance(data, list) else None


def _call(collator: Collator, rows: Sequence[Any]) -> Any:
    """The batch of copies of the samples, from a seed, by a copy of the collator."""
    with seeded(0):
        return _copied(collator)([copy.deepcopy(row) for row in rows])


def _copied(collator: Collator) -> Collator:
    """A shallow copy with generators of its own, so that a call leaves those of the collator."""
    if not hasattr(collator, "__dict__") or isinstance(collator, type) or _is_function(collator):
        return collator
    twin = copy.copy(collator)
    for name, value in vars(collator).items():
        if isinstance(value, torch.Generator):
            setattr(twin, name, value.clone_state())
        elif isinstance(value, _GENERATORS):
            setattr(twin, name, copy.deepcopy(value))
        elif "collat" in name and callable(value):
            setattr(twin, name, _copied(value))
    return twin


def _is_function(value: Any) -> bool:
    return hasattr(value, "__code__") or hasattr(value, "__func__")


def _same(one: Any, other: Any) -> bool:
    """Whether two entries of batches are equal; NaN equals NaN."""
    if isinstance(one, Mapping):
        return (
            isinstance(other, Mapping)
            and set(one) == set(other)
            and all(_same(one[name], other[name]) for name in one)
        )
    if isinstance(one, Tensor):
        if not isinstance(other, Tensor) or one.shape != other.shape or one.dtype != other.dtype:
            return False
        return torch.equal(one, other) or bool(((one == other) | (one != one)).all())
    if isinstance(one, np.ndarray):
        return isinstance(other, np.ndarray) and np.array_equal(one, other)
    if isinstance(one, list | tuple):
        return type(one) is type(other) and len(one) == len(other) and all(map(_same, one, other))
    return bool(one == other)
