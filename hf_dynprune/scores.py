"""SampleTable: what is known of each sample, one named column of length N for each fact, and its file format."""

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Column(NamedTuple):
    """A fact that a policy keeps of every sample: its name, its dtype and its value before the first observation.

    The default, NaN, reads "nothing known yet"; [`PruningPolicy.observe`] can test for it with `isnan`.
    """

    name: str
    dtype: torch.dtype = torch.float32
    initial: float = math.nan


# Columns that every table has, whatever the policy. 32 bits hold two billion epochs.
TIMES_KEPT = Column("times_kept", torch.int32, 0)
LAST_OBSERVED = Column("last_observed", torch.int32, -1)

Rows = dict[str, Tensor]


class SampleTable:
    """Columns of length N, on the CPU; `table["mean"]` is a column, `len(table)` is N.

    Besides the policy's own columns it holds `times_kept` (int32, the number of choices that kept the sample) and
    `last_observed` (int32, the epoch of the last observation, -1 before the first).

    Args:
        size: N, the number of samples in the training set.
        columns: the policy's columns.

    Raises:
        ValueError: if the table would be empty, or two columns share a name.
    """

    def __init__(self, size: int, columns: Iterable[Column] = ()) -> None:
        if size < 1:
            raise ValueError(f"A table of {size} samples cannot be pruned: the training set must hold at least 1.")
        self._columns: Rows = {}
        for column in (*columns, TIMES_KEPT, LAST_OBSERVED):
            if column.name in self._columns:
                raise ValueError(f"Two columns are called {column.name!r}: give each column of a policy its own name.")
            self._columns[column.name] = torch.full((size,), column.initial, dtype=column.dtype)

    def __len__(self) -> int:
        return len(self._columns[TIMES_KEPT.name])

    def __getitem__(self, name: str) -> Tensor:
        return self._columns[name]

    @property
    def columns(self) -> tuple[str, ...]:
        return tuple(self._columns)

    @property
    def observed(self) -> Tensor:
        """Which samples were observed at least once: (N,) bool."""
        return self["last_observed"] >= 0

    def observe(
        self,
        index: Tensor,
        signals: Mapping[str, Tensor],
        *,
        update: Callable[[Rows, Rows], Mapping[str, Tensor]],
        epoch: int,
    ) -> Tensor:
        """Applies observations in the order given, a sample seen twice twice.

        Args:
            index: (M,) int64, the samples observed, each in [0, N).
            signals: for each signal (M,) values.
            update: the policy's `observe(rows, signals) -> rows`; it gets and returns a value for each sample.
            epoch: written to `last_observed`.

        Returns:
            The samples (int64) that had a NaN or infinite signal. Such an observation changes nothing but
            `last_observed`.

        Cost: O(M), and N bytes for the test that no sample occurs twice.
        """
        rejected = []
        for rows in _rounds(index, len(self)):
            samples, values = index[rows], {name: signal[rows] for name, signal in signals.items()}
            finite = torch.ones(len(samples), dtype=torch.bool)
            for value in values.values():
                finite &= value.isfinite()
            observed = samples
            if not finite.all():
                rejected.append(samples[~finite])
                samples, values = samples[finite], {name: value[finite] for name, value in values.items()}
            if values and len(samples):
                for name, value in update({n: c[samples] for n, c in self._columns.items()}, values).items():
                    column = self._own(name)
                    column[samples] = value.to(column.dtype)
            self["last_observed"][observed] = epoch
        return torch.cat(rejected) if rejected else index[:0]

    def _own(self, name: str) -> Tensor:
        if name not in self._columns or name in (TIMES_KEPT.name, LAST_OBSERVED.name):
            own = [n for n in self._columns if n not in (TIMES_KEPT.name, LAST_OBSERVED.name)]
            raise ValueError(f"`observe` of the policy returned {name!r}; its columns are {own}. Declare it in `columns`.")
        return self._columns[name]

    def state_dict(self) -> Rows:
        """The columns, not copied."""
        return dict(self._columns)

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Takes over the columns of another table of the same size and columns; nothing changes if they differ."""
        ours = {name: (tuple(c.shape), c.dtype) for name, c in self._columns.items()}
        theirs = {name: (tuple(c.shape), c.dtype) for name, c in state.items()}
        if ours != theirs:
            raise ValueError(f"The saved table has the columns {theirs}, this run's has {ours}.")
        for name, column in state.items():
            self._columns[name] = column.clone()

    def save(self, path: str | os.PathLike[str], metadata: Mapping[str, Any] | None = None) -> None:
        """Writes the table to a safetensors file, whole or not at all."""
        save_tensors(path, self._columns, dict(metadata or {}))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "SampleTable":
        """Reads a table that [`SampleTable.save`] wrote; ValueError if the file is not whole."""
        columns, _ = load_tensors(path)
        table = cls.__new__(cls)
        table._columns = columns
        if TIMES_KEPT.name not in columns or LAST_OBSERVED.name not in columns:
            raise ValueError(f"{path} holds the columns {sorted(columns)}, not a table of `SampleTable.save`.")
        return table


def _rounds(index: Tensor, size: int) -> Iterator[Tensor | slice]:
    """Splits M observations into rounds in which no sample occurs twice: first all first occurrences, and so on."""
    seen = torch.zeros(size, dtype=torch.bool)
    seen[index] = True
    if int(seen.sum()) == len(index):
        yield slice(None)
        return
    order = torch.argsort(index, stable=True)
    position = torch.arange(len(index))
    is_first = torch.ones(len(index), dtype=torch.bool)
    is_first[1:] = index[order][1:] != index[order][:-1]
    occurrence = position - torch.cummax(torch.where(is_first, position, 0), 0).values
    for number in range(int(occurrence.max()) + 1):
        yield order[occurrence == number]


# ---- the file format: safetensors, written whole or not at all, with a checksum ----------------------------------


def _checksum(tensors: Mapping[str, Tensor], metadata: str) -> str:
    digest = hashlib.sha256(metadata.encode())
    for name in sorted(tensors):
        digest.update(f"{name}:{tensors[name].dtype}:{tuple(tensors[name].shape)}".encode())
        digest.update(tensors[name].contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def save_tensors(path: str | os.PathLike[str], tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> None:
    """Writes CPU tensors and JSON metadata to one safetensors file.

    The file is written beside its place, flushed to the disk and renamed: a reader, or a process killed at any moment,
    sees the old file or the new one, never a part.
    """
    from safetensors.torch import save_file

    text = json.dumps(metadata, sort_keys=True)
    stored = {name: tensor.contiguous() for name, tensor in tensors.items()}
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        save_file(stored, temporary, metadata={"hf_dynprune": text, "sha256": _checksum(stored, text)})
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def load_tensors(path: str | os.PathLike[str]) -> tuple[Rows, dict[str, Any]]:
    """Reads what [`save_tensors`] wrote.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is truncated, altered or not one of ours; the message names the path.
    """
    from safetensors import SafetensorError, safe_open

    if not Path(path).is_file():
        raise FileNotFoundError(f"{path} does not exist.")
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
        text = header["hf_dynprune"]
        whole = header["sha256"] == _checksum(tensors, text)
        metadata = json.loads(text)
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        raise ValueError(
            f"{path} is not a file of hf_dynprune, or is damaged ({error}). Use an older checkpoint, or start anew."
        ) from error
    if not whole:
        raise ValueError(f"{path} is damaged: its checksum does not match. Use an older checkpoint, or start anew.")
    return tensors, metadata
