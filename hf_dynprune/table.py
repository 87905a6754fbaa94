"""What is known of each sample: the table, and the memories that say how it is kept.

A memory is a value: the columns it keeps, the signals it asks for, and a pure function from old
columns and an observation to new columns. Any rule, and any run that only scores, can use any one.
"""

import math
import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .files import load_tensors, save_tensors


class Column(NamedTuple):
    """A fact about every sample: its name, its dtype and its value before any observation.

    The default value, NaN, means "nothing known yet".
    """

    name: str
    dtype: torch.dtype = torch.float32
    initial: float = math.nan


# Columns of every table. 32 bits hold two billion epochs.
TIMES_KEPT = Column("times_kept", torch.int32, 0)
LAST_OBSERVED = Column("last_observed", torch.int32, -1)
_EVERY = (TIMES_KEPT.name, LAST_OBSERVED.name)

Rows = Mapping[str, Tensor]


# ---- memories ------------------------------------------------------------------------------------


class Memory(ABC):
    """What is remembered of a sample, and how an observation changes it."""

    @property
    @abstractmethod
    def columns(self) -> tuple[Column, ...]:
        """The columns of the [`SampleTable`] that `observe` reads and writes."""

    @property
    @abstractmethod
    def signals(self) -> tuple[str, ...]:
        """What is observed of a sample: a name of [`hf_dynprune.losses.SIGNALS`], such as
        `"loss"`, or one that the caller of [`DynamicPruner.observe`] provides."""

    def last_of(self, signal: str) -> str | None:
        """The column that holds the last observation of a signal; None if none is known to."""
        return None

    @abstractmethod
    def observe(self, rows: Rows, signals: Rows) -> Rows:
        """New values of the columns of M different samples. Pure.

        Args:
            rows: For each column (M,) values before the observation, read on demand.
            signals: For each of `signals` (M,) finite float32.

        Returns:
            (M,) values for each column that changes.
        """


@dataclass(frozen=True)
class Memories(Memory):
    """Several memories side by side: `Memories(MovingMean("loss", 0.8), Last("label"))`.

    Without any, `Memories()`, nothing is observed. Their columns must have different names.
    """

    parts: tuple[Memory, ...]

    def __init__(self, *parts: Memory) -> None:
        object.__setattr__(self, "parts", parts)

    def __repr__(self) -> str:
        return f"Memories({', '.join(map(repr, self.parts))})"

    @property
    def columns(self) -> tuple[Column, ...]:
        return tuple(column for part in self.parts for column in part.columns)

    @cached_property  # asked for at every optimizer step
    def signals(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(name for part in self.parts for name in part.signals))

    def last_of(self, signal: str) -> str | None:
        found = (part.last_of(signal) for part in self.parts)
        return next((column for column in found if column is not None), None)

    def observe(self, rows: Rows, signals: Rows) -> Rows:
        changed: dict[str, Tensor] = {}
        for part in self.parts:
            changed.update(part.observe(rows, signals))
        return changed


@dataclass(frozen=True)
class Last(Memory):
    """The last value of each signal, in a column of that name: `Last("loss", "correct")`."""

    names: tuple[str, ...]

    def __init__(self, *names: str) -> None:
        object.__setattr__(self, "names", names)

    def __repr__(self) -> str:
        return f"Last({', '.join(map(repr, self.names))})"

    @property
    def columns(self) -> tuple[Column, ...]:
        return tuple(Column(name) for name in self.names)

    @property
    def signals(self) -> tuple[str, ...]:
        return self.names

    def last_of(self, signal: str) -> str | None:
        return signal if signal in self.names else None

    def observe(self, rows: Rows, signals: Rows) -> Rows:
        return {name: signals[name] for name in self.names}


@dataclass(frozen=True)
class MovingMean(Memory):
    """The column `mean`, m: an exponential moving mean of a signal u.

    m <- (1 - a) m + a u,    a = decay;    the first observation sets m = u
    """

    signal: str
    decay: float

    @property
    def columns(self) -> tuple[Column, ...]:
        return (Column("mean"),)

    @property
    def signals(self) -> tuple[str, ...]:
        return (self.signal,)

    def last_of(self, signal: str) -> str | None:
        return "mean" if signal == self.signal and self.decay == 1 else None

    def observe(self, rows: Rows, signals: Rows) -> Rows:
        mean, value = rows["mean"], signals[self.signal]
        # lerp is exact for u = m and for a = 1.
        return {"mean": torch.where(mean.isnan(), value, torch.lerp(mean, value, self.decay))}


@dataclass(frozen=True)
class MovingVariance(MovingMean):
    """The columns `mean`, m, and `variance`, v: exponential moving moments of a signal u.

    v <- (1 - a) v + a (u - m)^2    with the old m;    the first observation sets v = 0
    m <- (1 - a) m + a u,           a = decay;         the first observation sets m = u
    """

    @property
    def columns(self) -> tuple[Column, ...]:
        return (Column("mean"), Column("variance"))

    def observe(self, rows: Rows, signals: Rows) -> Rows:
        mean, value = rows["mean"], signals[self.signal]
        # The square of a loss above 1e19 exceeds float32. Without the limit the variance would be
        # infinite, and NaN from then on.
        surprise = ((value - mean) ** 2).clamp(max=torch.finfo(value.dtype).max)
        moved = torch.lerp(rows["variance"], surprise, self.decay)
        return {**super().observe(rows, signals), "variance": torch.where(mean.isnan(), 0.0, moved)}


@dataclass(frozen=True)
class History(Memory):
    """The last `length` values of a signal: columns `loss_0` (the last one), `loss_1`, ..."""

    signal: str
    length: int

    @property
    def columns(self) -> tuple[Column, ...]:
        return tuple(Column(f"{self.signal}_{age}") for age in range(self.length))

    @property
    def signals(self) -> tuple[str, ...]:
        return (self.signal,)

    def last_of(self, signal: str) -> str | None:
        return self.columns[0].name if signal == self.signal else None

    def observe(self, rows: Rows, signals: Rows) -> Rows:
        names = [column.name for column in self.columns]
        older = {name: rows[younger] for younger, name in pairwise(names)}
        return {names[0]: signals[self.signal], **older}


@dataclass(frozen=True)
class Counts(Memory):
    """Counts of forgetting events: how often a sample went from right to wrong.

    With acc(t) in {0, 1} at the t-th presentation, an event is acc(t - 1) = 1, acc(t) = 0.

    Paper: Toneva et al., ICLR 2019, arXiv 1812.05159.
    """

    signal: str = "correct"

    @property
    def columns(self) -> tuple[Column, ...]:
        return (
            Column(self.signal),  # at the last presentation
            Column("learned", torch.bool, 0),
            Column("forgotten", torch.int32, 0),
            Column("presented", torch.int32, 0),
        )

    @property
    def signals(self) -> tuple[str, ...]:
        return (self.signal,)

    def observe(self, rows: Rows, signals: Rows) -> Rows:
        correct = signals[self.signal]
        return {
            self.signal: correct,
            "learned": rows["learned"] | (correct == 1),
            "forgotten": rows["forgotten"] + ((rows[self.signal] == 1) & (correct == 0)),
            "presented": rows["presented"] + 1,
        }

    @staticmethod
    def forgetting_events(table: "SampleTable") -> Tensor:
        """(N,) float32: the events of a run; the number of presentations if never learned.

        As published, the latter is one number for all samples. A sample that `drop_last` left out
        now and then so does not count less.
        """
        presentations = table["presented"].max()
        return torch.where(table["learned"], table["forgotten"], presentations).float()


# ---- the table -----------------------------------------------------------------------------------

# Observations are applied in blocks of this size, so that intermediate results stay in the caches.
_BLOCK = 1 << 16


class _RowsOf(Rows):
    """The values of some samples. A column is read on demand, since many rules read none."""

    def __init__(self, columns: Rows, samples: Tensor) -> None:
        self._columns, self._samples = columns, samples

    def __getitem__(self, name: str) -> Tensor:
        return self._columns[name].index_select(0, self._samples)

    def __iter__(self) -> Iterator[str]:
        return iter(self._columns)

    def __len__(self) -> int:
        return len(self._columns)


class SampleTable:
    """Columns of length N on the CPU: `table["mean"]` is a column, `len(table)` is N.

    Every table also holds `times_kept` (int32, the number of choices that kept the sample) and
    `last_observed` (int32, the epoch of the last observation, -1 before the first).

    Args:
        size: N, the number of samples in the training set.
        columns: Those of the memory.

    Raises:
        ValueError: If the table would be empty, or if two columns share a name.
    """

    def __init__(self, size: int, columns: Iterable[Column] = ()) -> None:
        if size < 1:
            raise ValueError(
                f"A table of {size} samples cannot be pruned: the training set must hold at least "
                "1."
            )
        self._columns: dict[str, Tensor] = {}
        for column in (*columns, TIMES_KEPT, LAST_OBSERVED):
            if column.name in self._columns:
                raise ValueError(
                    f"Two columns are called {column.name!r}: each column needs a different name."
                )
            self._columns[column.name] = torch.full((size,), column.initial, dtype=column.dtype)

    def __len__(self) -> int:
        return len(self._columns[TIMES_KEPT.name])

    def __getitem__(self, name: str) -> Tensor:
        return self._columns[name]

    @property
    def columns(self) -> tuple[str, ...]:
        """The names of the columns."""
        return tuple(self._columns)

    @property
    def observed(self) -> Tensor:
        """Which samples were observed at least once: (N,) bool."""
        return self["last_observed"] >= 0

    def observe(
        self, index: Tensor, signals: Mapping[str, Tensor], *, memory: Memory, epoch: int
    ) -> Tensor:
        """Apply observations in order. A sample that occurs twice is updated twice.

        Args:
            index: (M,) int64, the samples observed, each in [0, N).
            signals: (M,) values for each signal.
            memory: How an observation changes the columns.
            epoch: Written to `last_observed`.

        Returns:
            The samples (int64) that had a NaN or infinite signal. Such an observation changes
            nothing but `last_observed`.

        Raises:
            ValueError: If the memory returns a column that it does not declare.

        Cost: O(M), and N bytes for the test that no sample occurs twice.
        """
        rejected = []
        for rows in _rounds(index, len(self)):
            samples = index[rows]
            values = {name: signal[rows] for name, signal in signals.items()}
            finite = torch.ones(len(samples), dtype=torch.bool)
            for value in values.values():
                finite &= value.isfinite()
            observed = samples
            if not finite.all():
                rejected.append(samples[~finite])
                samples = samples[finite]
                values = {name: value[finite] for name, value in values.items()}
            if values and len(samples):
                changed = memory.observe(_RowsOf(self._columns, samples), values)
                for name, value in changed.items():
                    column = self._own(name)
                    column.index_copy_(0, samples, value.to(column.dtype))
            self["last_observed"].index_fill_(0, observed, epoch)
        return torch.cat(rejected) if rejected else index[:0]

    def _own(self, name: str) -> Tensor:
        if name not in self._columns or name in _EVERY:
            own = [known for known in self._columns if known not in _EVERY]
            raise ValueError(
                f"`observe` returned the column {name!r}; the columns are {own}. Declare it in "
                "`columns` of the memory."
            )
        return self._columns[name]

    def state_dict(self) -> dict[str, Tensor]:
        """The columns, not copied."""
        return dict(self._columns)

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take over the columns of a table of the same size and columns.

        Raises:
            ValueError: If they differ. Nothing changes then.
        """
        ours = {name: (tuple(c.shape), c.dtype) for name, c in self._columns.items()}
        theirs = {name: (tuple(c.shape), c.dtype) for name, c in state.items()}
        if ours != theirs:
            raise ValueError(f"The saved table has the columns {theirs}, this run's has {ours}.")
        for name, column in state.items():
            self._columns[name] = column.clone()

    def save(self, path: str | os.PathLike[str], metadata: Mapping[str, Any] | None = None) -> None:
        """Write the table to a safetensors file, whole or not at all."""
        save_tensors(path, self._columns, dict(metadata or {}))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "SampleTable":
        """Read a table that [`SampleTable.save`] wrote; ValueError if the file is damaged."""
        columns, _ = load_tensors(path)
        try:
            return cls.from_columns(columns)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error

    @classmethod
    def from_columns(cls, columns: Mapping[str, Tensor]) -> "SampleTable":
        """The table with these columns; ValueError if they are not those of a table."""
        if not all(name in columns for name in _EVERY):
            raise ValueError(
                f"the columns {sorted(columns)} are not those of a table of samples; expected are "
                f"{' and '.join(_EVERY)} among them."
            )
        n = columns[TIMES_KEPT.name].numel()
        for name, column in columns.items():
            counts = name in _EVERY and column.dtype != torch.int32
            if counts or column.shape != (n,) or n == 0:
                raise ValueError(
                    f"the column {name!r} is {column.dtype} {tuple(column.shape)}: expected "
                    f"{'int32' if counts else 'a value for each sample'} in shape (N,)."
                )
        if columns[TIMES_KEPT.name].min() < 0:
            raise ValueError(f"the column {TIMES_KEPT.name!r} has negative counts.")
        table = cls.__new__(cls)
        table._columns = dict(columns)
        return table


def _rounds(index: Tensor, size: int) -> Iterator[Tensor | slice]:
    """Split M observations into blocks without a repeated sample: first occurrences come first."""
    seen = torch.zeros(size, dtype=torch.bool).index_fill_(0, index, True)
    if int(torch.count_nonzero(seen)) == len(index):
        yield from (slice(begin, begin + _BLOCK) for begin in range(0, len(index), _BLOCK))
        return
    order = torch.argsort(index, stable=True)
    position = torch.arange(len(index))
    is_first = torch.ones(len(index), dtype=torch.bool)
    is_first[1:] = index[order][1:] != index[order][:-1]
    occurrence = position - torch.cummax(torch.where(is_first, position, 0), 0).values
    for number in range(int(occurrence.max()) + 1):
        yield from order[occurrence == number].split(_BLOCK)
