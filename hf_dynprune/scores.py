"""What is known of each sample, and its file formats.

[`SampleTable`]: what a run learns, one named column of length N for each fact. [`Scores`]: one number a sample, made before
the run, for static pruning.
"""

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
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

Rows = Mapping[str, Tensor]

# So many observations are applied at a time: what is computed on the way stays in the caches.
_BLOCK = 1 << 16


class _RowsOf(Rows):
    """The values of some samples; a column is read when it is asked for, and many a rule asks for none."""

    def __init__(self, columns: Rows, samples: Tensor) -> None:
        self._columns, self._samples = columns, samples

    def __getitem__(self, name: str) -> Tensor:
        return self._columns[name].index_select(0, self._samples)

    def __iter__(self) -> Iterator[str]:
        return iter(self._columns)

    def __len__(self) -> int:
        return len(self._columns)


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
            raise ValueError(
                f"A table of {size} samples cannot be pruned: the training set must hold at least 1."
            )
        self._columns: dict[str, Tensor] = {}
        for column in (*columns, TIMES_KEPT, LAST_OBSERVED):
            if column.name in self._columns:
                raise ValueError(
                    f"Two columns are called {column.name!r}: give each column of a policy its own name."
                )
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
                samples, values = (
                    samples[finite],
                    {name: value[finite] for name, value in values.items()},
                )
            if values and len(samples):
                for name, value in update(_RowsOf(self._columns, samples), values).items():
                    column = self._own(name)
                    column.index_copy_(0, samples, value.to(column.dtype))
            self["last_observed"].index_fill_(0, observed, epoch)
        return torch.cat(rejected) if rejected else index[:0]

    def _own(self, name: str) -> Tensor:
        if name not in self._columns or name in (TIMES_KEPT.name, LAST_OBSERVED.name):
            own = [n for n in self._columns if n not in (TIMES_KEPT.name, LAST_OBSERVED.name)]
            raise ValueError(
                f"`observe` of the policy returned {name!r}; its columns are {own}. Declare it in `columns`."
            )
        return self._columns[name]

    def state_dict(self) -> dict[str, Tensor]:
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
            raise ValueError(
                f"{path} holds the columns {sorted(columns)}, not a table of `SampleTable.save`."
            )
        return table


def _rounds(index: Tensor, size: int) -> Iterator[Tensor | slice]:
    """Splits M observations into blocks in which no sample occurs twice: first all first occurrences, and so on."""
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


# ---- scores that were made before the run --------------------------------------------------------

_PARQUET = ("sample_index", "score")


@dataclass(eq=False)
class Scores:
    """One score for each sample of a dataset, made before the run: what [`StaticPruning`] keeps or drops by.

    [`score_dataset`] makes them; scores of one's own need `values`, a name and what they cost.

    Args:
        values: (N,) numbers, that of sample i at place i; high is hard. Kept as float32 on the CPU. Infinities are welcome.
        method: what they are, such as `"el2n"`.
        fingerprint: of the dataset that was scored, [`hf_dynprune.trainer.dataset_fingerprint`]; `""` or `"N samples"`, and
            N alone is compared with the dataset that is pruned.
        provenance: JSON values that say how they were made. `passes` is what they cost: a sample once through forward and
            backward is 1, forward alone 1/3; 0 if they were free. [`score_dataset`] also notes `forward_passes`,
            `backward_passes`, `scoring_passes`, `seconds`, `runs`, `epochs`, `seeds`, `model`, `settings`, `environment`.

    Attributes:
        path: the file that they were saved to or read from last; None before.

    Raises:
        TypeError, ValueError: for another shape, for NaN (how many, and the first), and for what is no JSON.
    """

    values: Tensor
    method: str
    fingerprint: str = ""
    provenance: dict[str, Any] = field(default_factory=dict)
    path: str | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        values = torch.as_tensor(self.values).detach().cpu()
        if values.ndim != 1 or len(values) == 0:
            raise ValueError(
                f"The scores have shape {tuple(values.shape)}: wanted is (N,), one score for each sample."
            )
        nan = torch.nonzero(values.isnan()).squeeze(1)
        if len(nan):
            raise ValueError(
                f"{len(nan)} of {len(values)} scores are NaN, the first that of sample {int(nan[0])}: give these samples a "
                "score, such as float('inf') to keep them as the hardest."
            )
        if not isinstance(self.method, str) or not self.method:
            raise TypeError(
                f"method={self.method!r} is no name of a method: wanted is a str such as 'el2n'."
            )
        self.values = values.to(torch.float32)
        try:
            self.provenance = json.loads(json.dumps(self.provenance))
        except TypeError as error:
            raise TypeError(f"The provenance of scores must be JSON: {error}.") from error
        passes = self.provenance.get("passes", 0)
        if (
            isinstance(passes, bool)
            or not isinstance(passes, int | float)
            or not 0 <= passes < math.inf
        ):
            raise ValueError(
                f"provenance['passes']={passes!r} is no number of passes: wanted is what the scores cost, 0 or more."
            )

    def __len__(self) -> int:
        return len(self.values)

    @property
    def digest(self) -> str:
        """Of what is scored and how: 16 hexadecimal digits; the provenance, which holds seconds, is left out."""
        return _checksum({"score": self.values}, json.dumps([self.method, self.fingerprint]))[:16]

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the scores, whole or not at all, and notes `path`.

        `.safetensors` holds the tensor `score`; `.parquet` (with pyarrow) the columns `sample_index`, int64, and `score`,
        float32. Either has a checksum, and method, fingerprint and provenance as metadata. The folder is made if need be.
        """
        path = Path(path)
        metadata = {
            "method": self.method,
            "fingerprint": self.fingerprint,
            "provenance": self.provenance,
        }
        parquet = _is_parquet(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        if parquet:
            _save_parquet(path, self.values, json.dumps(metadata, sort_keys=True))
        else:
            save_tensors(path, {"score": self.values}, metadata)
        self.path = str(path)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Scores":
        """Reads what `save` wrote; the rows of a parquet file may be in any order.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: if it is no file of scores or is damaged, and, for parquet, where a sample index occurs twice or is
                missing; the message names the path and the samples.
        """
        path = Path(path)
        if not path.is_file():
            if path.suffix in (".safetensors", ".parquet"):
                raise FileNotFoundError(
                    f"{path} does not exist: make the scores with `score_dataset`, or mend the path."
                )
            _is_parquet(path)
        if _is_parquet(path):
            values, metadata = _load_parquet(path)
        else:
            tensors, metadata = load_tensors(path)
            if set(tensors) != {"score"} or not metadata.keys() >= {
                "method",
                "fingerprint",
                "provenance",
            }:
                raise ValueError(
                    f"{path} holds {sorted(tensors)}, not the scores of `Scores.save`."
                )
            values = tensors["score"]
        scores = cls(values, metadata["method"], metadata["fingerprint"], metadata["provenance"])
        scores.path = str(path)
        return scores


def _is_parquet(path: Path) -> bool:
    if path.suffix not in (".safetensors", ".parquet"):
        raise ValueError(
            f"{path} has the suffix {path.suffix!r}: scores are kept as .safetensors or .parquet."
        )
    return path.suffix == ".parquet"


def _save_parquet(path: Path, values: Tensor, metadata: str) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    fields = [
        pa.field(name, kind, nullable=False)
        for name, kind in zip(_PARQUET, (pa.int64(), pa.float32()), strict=True)
    ]
    columns = [torch.arange(len(values)).numpy(), values.numpy()]
    about = {"hf_dynprune": metadata, "sha256": _checksum({"score": values}, metadata)}
    table = pa.table(columns, schema=pa.schema(fields, metadata=about))
    with _whole_or_not(path) as temporary:
        pq.write_table(table, temporary)


def _load_parquet(path: Path) -> tuple[Tensor, dict[str, Any]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(path)
        if tuple(sorted(table.column_names)) != tuple(sorted(_PARQUET)):
            raise ValueError(f"its columns are {table.column_names}, wanted are {list(_PARQUET)}")
        if any(table[name].null_count for name in _PARQUET):
            raise ValueError("it has rows without a value")
        # Copies: what arrow lends cannot be written to.
        index = torch.tensor(table["sample_index"].cast(pa.int64()).to_numpy())
        values = torch.tensor(table["score"].cast(pa.float32()).to_numpy())
        about = {
            name.decode(): value.decode() for name, value in (table.schema.metadata or {}).items()
        }
        text, checksum = about["hf_dynprune"], about["sha256"]
        metadata = json.loads(text)
    except (pa.ArrowException, OSError, KeyError, ValueError) as error:
        raise ValueError(
            f"{path} is not a file of scores of hf_dynprune, or is damaged ({error})."
        ) from error
    ordered = values.clone()
    ordered[_each_once(index, path)] = values
    if checksum != _checksum({"score": ordered}, text):
        raise ValueError(
            f"{path} is damaged: its checksum does not match. Make the scores again with `score_dataset`."
        )
    return ordered, metadata


def _each_once(index: Tensor, path: Path) -> Tensor:
    """The (N,) indices, if each of 0, ..., N - 1 occurs once; ValueError with those that do not."""
    n = len(index)
    inside = index[(index >= 0) & (index < n)]
    counts = torch.bincount(inside, minlength=n)
    wrong = {
        "twice or more": torch.nonzero(counts > 1).squeeze(1),
        f"outside [0, {n})": index[(index < 0) | (index >= n)],
        "not at all": torch.nonzero(counts == 0).squeeze(1),
    }
    if len(wrong["not at all"]):  # as many as are too many elsewhere
        found = "; ".join(
            f"{what}: {_some(samples)}" for what, samples in wrong.items() if len(samples)
        )
        raise ValueError(
            f"{path} has {n} rows, in which each sample index must occur once. {found}."
        )
    return index


def _some(samples: Tensor) -> str:
    more = f" and {len(samples) - 5} more" if len(samples) > 5 else ""
    return ", ".join(map(str, samples[:5].tolist())) + more


# ---- the file format: safetensors, written whole or not at all, with a checksum ------------------


def _checksum(tensors: Mapping[str, Tensor], metadata: str) -> str:
    digest = hashlib.sha256(metadata.encode())
    for name in sorted(tensors):
        digest.update(f"{name}:{tensors[name].dtype}:{tuple(tensors[name].shape)}".encode())
        digest.update(tensors[name].contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def save_tensors(
    path: str | os.PathLike[str], tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]
) -> None:
    """Writes CPU tensors and JSON metadata to one safetensors file.

    The file is written beside its place, flushed to the disk and renamed: a reader, or a process killed at any moment,
    sees the old file or the new one, never a part.
    """
    from safetensors.torch import save_file

    text = json.dumps(metadata, sort_keys=True)
    stored = {name: tensor.contiguous() for name, tensor in tensors.items()}
    with _whole_or_not(Path(path)) as temporary:
        save_file(
            stored, temporary, metadata={"hf_dynprune": text, "sha256": _checksum(stored, text)}
        )


@contextmanager
def _whole_or_not(path: Path) -> Iterator[Path]:
    """Yields the place beside `path` to write to; afterwards it is flushed to the disk and renamed."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def load_tensors(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, Any]]:
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
        raise ValueError(
            f"{path} is damaged: its checksum does not match. Use an older checkpoint, or start anew."
        )
    return tensors, metadata
