"""Which dataset a run trains on: a text that two processes agree on, and that content decides.

    datasets.Dataset ──numbers whole, other columns whole or 256 rows─▶ digest ─▶ "N samples, 1f2e"
    other datasets   ──what they wrap; 8 items, if all reads agree───▶

A checkpoint and a file of scores store it. A run on other data refuses them.
"""

import os
import pickle
import random
import types
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from io import BytesIO
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
import xxhash
from torch.utils.data import ConcatDataset, IterableDataset, Subset, TensorDataset

# The private names that this file leans on. Reason for each:
SEAMS = {"Dataset._indices": "which stored rows a dataset has, and in which order"}

# The attribute by which a dataset brings its own fingerprint.
OWN = "pruning_fingerprint"

_WHOLE_BYTES = 1 << 25  # a column up to this size is read whole
_ROWS, _FEW_ROWS = 256, 16  # rows that are looked at of larger columns, and if rows are large
# Items that are read of a dataset that is not a `datasets.Dataset`, and how often. A generator that
# is made for each read is seen by what it changes alone.
_ITEMS, _READS = 8, 3
_FILES, _HEAD_BYTES = 64, 1 << 16  # files that are opened, and bytes that are read of each
_BLOCK_ROWS = 1 << 22
_DEPTH = 4  # of datasets in datasets, and of values in values


def dataset_fingerprint(dataset: Any) -> str:
    """Identify a dataset across processes, machines and folders, by its content.

    Of a dataset with the attribute `pruning_fingerprint`, that text and nothing else is compared.

    Of a `datasets.Dataset`: N and the names of the columns; columns of numbers, such as labels,
    whole; other columns whole up to 32 MiB, otherwise 256 evenly spaced rows; the names of all
    files, relative to their common folder, and size and first 64 KiB of 64 files. Formats and
    transforms are left out.

    Of other datasets: N; the datasets that they hold in attributes (of a `Subset` also all
    indices); `targets`, `labels` and `samples`, if they have them. If they hold no other dataset,
    8 evenly spaced items.

    Items are read from a copy, so that neither the dataset nor a random generator changes. They
    count only if three reads agree and none drew random numbers: random augmentation does not
    change the identity. Of images and other large arrays of numbers the shape, mean and root mean
    square count, to three digits, so that machines that round differently agree.

    Not seen: changes between the rows, files and items that are looked at; what a transform does.
    If a dataset cannot be copied or read, and if its items are random, N and what it wraps decide.

    Returns:
        `"N samples, "` and 16 hexadecimal digits; `"N samples"` if nothing but N is known.

    Raises:
        TypeError: If `pruning_fingerprint` is not a text, or is empty.

    Cost: about 1 s for a million rows of a `datasets.Dataset`, of any size. Otherwise 8 items are
    read three times.
    """
    own = getattr(dataset, OWN, None)
    if own is not None:
        if not isinstance(own, str) or not own:
            raise TypeError(
                f"{OWN}={own!r} of the {type(dataset).__name__} is not a fingerprint: expected a "
                "text that changes if the data change, such as 'cifar10, version 2'."
            )
        return own
    digest = Digest()
    known = _add_dataset(digest, dataset, _DEPTH)
    return digest.fingerprint(len(dataset)) if known else f"{len(dataset)} samples"


class Digest:
    """A hash of values, each with its kind and length in front of it."""

    def __init__(self) -> None:
        self._hash = xxhash.xxh3_64()

    def add(self, kind: str, content: Any = b"") -> None:
        """Add text, bytes or a contiguous array."""
        data = content.encode("utf-8", "replace") if isinstance(content, str) else content
        size = data.nbytes if isinstance(data, np.ndarray) else len(data)
        self._hash.update(f"{kind}:{size};".encode())
        self._hash.update(data)

    def array(self, kind: str, values: Any) -> None:
        """Add a tensor or an array: all of it, or its number of rows and 256 of them."""
        array = np.ascontiguousarray(values)
        rows = np.arange(len(array)) if array.ndim else np.arange(0)
        self.add(kind, f"{array.dtype} {array.shape}")
        if array.nbytes > _WHOLE_BYTES:
            array = np.ascontiguousarray(array[spaced(len(rows), _ROWS)])
        self.add("values", array.reshape(-1).view(np.uint8))

    def fingerprint(self, n: int) -> str:
        """The fingerprint of a dataset of n samples."""
        return f"{n} samples, {self._hash.hexdigest()}"


def spaced(n: int, count: int) -> list[int]:
    """Up to `count` evenly spaced positions of n, with the first and the last."""
    if n <= count:
        return list(range(n))
    return [i * (n - 1) // (count - 1) for i in range(count)]


# ---- datasets ------------------------------------------------------------------------------------


def _add_dataset(digest: Digest, dataset: Any, depth: int) -> bool:
    """Add what is known of a dataset besides its length; return whether there is anything."""
    if (own := getattr(dataset, OWN, None)) is not None:
        digest.add("own", str(own))
        return True
    if isinstance(dataset, datasets.Dataset):
        _add_rows(digest, dataset)
        return True
    if isinstance(dataset, TensorDataset):
        for tensor in dataset.tensors:
            digest.array("tensor", _on_cpu(tensor))
        return True
    known = False
    if isinstance(dataset, Subset):
        digest.array("indices", np.asarray(dataset.indices, dtype=np.int64))
        known = True
    inner = _wrapped(dataset) if depth > 0 else []
    for other in inner:
        digest.add("wrapped", str(len(other)))
        known = _add_dataset(digest, other, depth - 1) or known
    known = _add_labels(digest, dataset) or known
    if not inner and (items := _items_of(dataset)) is not None:
        digest.add("items", items)
        known = True
    return known


def _wrapped(dataset: Any) -> list[Any]:
    """The map-style datasets that another one holds in its attributes, in the order of names."""
    if isinstance(dataset, Subset):
        return [dataset.dataset]
    if isinstance(dataset, ConcatDataset):
        return list(dataset.datasets)
    kinds = (datasets.Dataset, torch.utils.data.Dataset)
    held = sorted(getattr(dataset, "__dict__", {}).items())
    return [
        value
        for _, value in held
        if isinstance(value, kinds)
        and not isinstance(value, IterableDataset)
        and hasattr(value, "__len__")
    ]


def _add_labels(digest: Digest, dataset: Any) -> bool:
    """Add the labels and file names that datasets keep by convention, as torchvision's do."""
    known, n = False, len(dataset)
    for name in ("targets", "labels", "samples"):
        values = getattr(dataset, "__dict__", {}).get(name)
        if not isinstance(values, list | tuple | np.ndarray | torch.Tensor) or len(values) != n:
            continue
        with suppress(TypeError, ValueError, RuntimeError, OverflowError, pa.ArrowException):
            if name == "samples":  # (path, class)
                _add_arrow(digest, name, pa.array([str(path) for path, _ in values]))
            else:
                array = np.asarray(_on_cpu(values))
                if array.dtype.kind not in "biuf":
                    continue
                digest.array(name, array)
            known = True
    return known


def _on_cpu(values: Any) -> Any:
    if not isinstance(values, torch.Tensor):
        return values
    values = values.detach().cpu()
    return values.float() if values.dtype == torch.bfloat16 else values


# ---- rows of Arrow -------------------------------------------------------------------------------


def _add_rows(digest: Digest, dataset: datasets.Dataset) -> None:
    """Add the rows of a `datasets.Dataset` as they are stored, whatever their order and format."""
    n, names, stored = len(dataset), sorted(dataset.column_names), dataset.data.table
    digest.add("columns", "\n".join(names))
    row_bytes = {name: stored.column(name).nbytes / max(1, len(stored)) for name in names}
    sampled = []
    for name in names:
        column = stored.column(name)
        if pa.types.is_primitive(column.type):
            for start in range(0, n, _BLOCK_ROWS):
                _add_arrow(digest, name, _rows_of(dataset, column, start, start + _BLOCK_ROWS))
        elif n * row_bytes[name] <= _WHOLE_BYTES:
            _add_arrow(digest, name, _rows_of(dataset, column, 0, n))
        else:
            sampled.append(name)
            if _is_file(column.type):
                paths = stored.select([name]).flatten().column(f"{name}.path")
                _add_arrow(digest, name, _rows_of(dataset, paths, 0, n))
    size = sum(row_bytes[name] for name in sampled)
    count = int(min(_ROWS, max(_FEW_ROWS, _WHOLE_BYTES // max(1, size))))
    positions = pa.array(spaced(n, count), pa.int64())
    if dataset._indices is not None:
        positions = dataset._indices.column(0).take(positions)
    for name in sampled:
        _add_arrow(digest, name, stored.column(name).take(positions))


def _rows_of(
    dataset: datasets.Dataset, column: pa.ChunkedArray, start: int, stop: int
) -> pa.ChunkedArray:
    """Rows of a stored column in the order of the dataset, which may be shuffled or selected.

    Reading them through the dataset would take half a minute for a million shuffled rows.
    """
    if dataset._indices is None:
        return column.slice(start, stop - start)
    return column.take(dataset._indices.column(0).slice(start, stop - start))


def _is_file(kind: pa.DataType) -> bool:
    """Whether a column holds files as `datasets` does: their bytes, or where they lie."""
    return pa.types.is_struct(kind) and {kind.field(i).name for i in range(kind.num_fields)} == {
        "bytes",
        "path",
    }


def _add_arrow(digest: Digest, name: str, column: pa.Array | pa.ChunkedArray) -> None:
    """Add the values of an array, which do not depend on its chunks, offsets and buffers."""
    array = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    if isinstance(array, pa.ChunkedArray):  # of no chunk, or too large for one
        array = pa.concat_arrays(array.chunks) if array.num_chunks else pa.array([], array.type)
    if isinstance(array, pa.ExtensionArray):
        array = array.storage
    kind = array.type
    if pa.types.is_dictionary(kind):
        array, kind = array.dictionary_decode(), kind.value_type
    if array.null_count:
        digest.add("nulls", array.is_null().to_numpy(zero_copy_only=False).tobytes())
    if _is_file(kind):
        content, paths = array.field("bytes"), array.field("path")
        _add_arrow(digest, f"{name}.bytes", content)
        _add_arrow(digest, f"{name}.path", paths)
    elif pa.types.is_struct(kind):
        for i in range(kind.num_fields):
            _add_arrow(digest, f"{name}.{kind.field(i).name}", array.field(i))
    elif pa.types.is_list(kind) or pa.types.is_large_list(kind):
        lengths = pc.list_value_length(array).fill_null(-1)
        digest.add(name, lengths.cast(pa.int64()).to_numpy().tobytes())
        _add_arrow(digest, f"{name}[]", array.flatten())
    elif pa.types.is_fixed_size_list(kind):
        digest.add(name, str(kind.list_size))
        _add_arrow(digest, f"{name}[]", array.flatten())
    elif pa.types.is_string(kind) or pa.types.is_large_string(kind):
        _add_texts(digest, name, array)
    elif pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
        _add_bytes(digest, name, array)
    elif pa.types.is_boolean(kind) or pa.types.is_integer(kind) or pa.types.is_floating(kind):
        digest.add(name, array.to_numpy(zero_copy_only=False).tobytes())
    else:  # dates, decimals and the like
        digest.add(name, repr(array.to_pylist()))


def _add_texts(digest: Digest, name: str, array: pa.Array) -> None:
    """Add texts; if all are absolute paths, relative to their common folder, with their files."""
    ends = pc.min_max(array).as_py()
    if ends["min"] is None or not (os.path.isabs(ends["min"]) and os.path.isabs(ends["max"])):
        return _add_bytes(digest, name, array)
    # All texts lie between the two, so they begin alike.
    shared = os.path.commonpath([os.path.dirname(path) for path in ends.values()])
    _add_bytes(digest, name, pc.utf8_slice_codeunits(array, len(shared)))
    for i in spaced(len(array), _FILES):
        path = array[i].as_py()
        with suppress(OSError, ValueError):
            if path is not None and os.path.isfile(path):
                with open(path, "rb") as file:
                    digest.add(str(os.path.getsize(path)), file.read(_HEAD_BYTES))


def _add_bytes(digest: Digest, name: str, array: pa.Array) -> None:
    large = array.cast(pa.large_binary()).fill_null(b"")
    lengths = pc.binary_length(large).cast(pa.int64()).to_numpy()
    digest.add(name, lengths.tobytes())
    _, offsets, content = large.buffers()
    if content is None or len(large) == 0:
        return
    first = np.frombuffer(offsets, np.int64)[large.offset]
    digest.add("texts", memoryview(content)[first : first + int(lengths.sum())])


# ---- items ---------------------------------------------------------------------------------------


def _items_of(dataset: Any) -> bytes | None:
    """A hash of some items; None if they cannot be read, or differ from read to read."""
    try:
        dataset, generators = _copied(dataset)
        if hasattr(dataset, "set_epoch"):
            dataset.set_epoch(0)  # an earlier run may have left another epoch
        with _random_states_kept():
            before = _random_states(generators)
            reads = [_read(dataset) for _ in range(_READS)]
            drew = _random_states(generators) != before
    except Exception:  # of a foreign class: any
        return None
    return None if drew or len(set(reads)) > 1 else reads[0]


def _read(dataset: Any) -> bytes:
    digest, indices = Digest(), spaced(len(dataset), _ITEMS)
    if hasattr(dataset, "__getitems__"):
        _add_value(digest, dataset.__getitems__(indices), _DEPTH)
    else:
        for i in indices:
            _add_value(digest, dataset[i], _DEPTH)
    return digest.fingerprint(0).encode()


def _add_value(digest: Digest, value: Any, depth: int) -> None:
    """Add an item or a part of it, by its content."""
    if depth < 0:
        return
    if isinstance(value, Mapping):
        digest.add("mapping", str(len(value)))
        for key in sorted(value, key=str):
            digest.add("key", str(key))
            _add_value(digest, value[key], depth - 1)
    elif isinstance(value, str | bytes):
        digest.add("text", value)
    elif isinstance(value, bool | int | None):
        digest.add("int", repr(value))
    elif isinstance(value, float):
        digest.add("float", f"{value:.3g}")
    elif isinstance(value, torch.Tensor | np.ndarray | np.generic):
        _add_numbers(digest, np.asarray(_on_cpu(value)), depth)
    elif hasattr(value, "__array_interface__"):  # an image of PIL
        _add_numbers(digest, np.asarray(value), depth)
    elif isinstance(value, Sequence):
        digest.add("sequence", str(len(value)))
        for part in value:
            _add_value(digest, part, depth - 1)
    elif vars_of := getattr(value, "__dict__", None):
        digest.add("object", type(value).__name__)
        _add_value(digest, vars_of, depth - 1)
    else:
        digest.add("object", type(value).__name__)


def _add_numbers(digest: Digest, array: np.ndarray, depth: int) -> None:
    """Add integers as they are; images and fractions by their shape and two moments."""
    if array.dtype == object:
        return _add_value(digest, array.tolist(), depth - 1)
    digest.add("array", f"{array.dtype.kind} {array.shape}")
    image = array.dtype == np.uint8 and array.ndim >= 2
    if array.size and (array.dtype.kind in "fc" or image):
        values = np.abs(array) if array.dtype.kind == "c" else array
        values = values.astype(np.float64)
        with np.errstate(all="ignore"):
            moments = f"{values.mean():.3g} {np.sqrt((values**2).mean()):.3g}"
        digest.add("moments", moments)
    else:
        digest.add("values", np.ascontiguousarray(array).reshape(-1).tobytes())


# ---- a copy --------------------------------------------------------------------------------------

_GENERATORS = (random.Random, np.random.Generator, np.random.RandomState, torch.Generator)
_SMALL, _FEW = 1 << 16, 1000
_BY_NAME = (type, types.FunctionType, types.BuiltinFunctionType, types.ModuleType)
# What reading does not change.
_CONSTANT = {"datasets", "pandas", "pyarrow", "PIL", "h5py", "tokenizers", "transformers"}


class _Copier(pickle.Pickler):
    """Pickles an object without what is large, or does not change when items are read."""

    def __init__(self, file: BytesIO) -> None:
        super().__init__(file, protocol=5)
        self.shared: list[Any] = []
        self.generators: list[Any] = []

    def persistent_id(self, value: Any) -> int | None:
        if isinstance(value, _GENERATORS):
            self.generators.append(value)
        if not _is_shared(value):
            return None
        self.shared.append(value)
        return len(self.shared) - 1


class _Reader(pickle.Unpickler):
    def __init__(self, file: BytesIO, shared: list[Any]) -> None:
        super().__init__(file)
        self.shared = shared

    def persistent_load(self, position: int) -> Any:
        return self.shared[position]


def _is_shared(value: Any) -> bool:
    if isinstance(value, torch.Tensor):
        return value.device.type != "cpu" or value.nbytes > _SMALL
    if isinstance(value, np.ndarray):
        return value.nbytes > _SMALL
    if isinstance(value, list | tuple | dict | set):
        return len(value) > _FEW
    if isinstance(value, str | bytes):
        return len(value) > _SMALL
    module = (getattr(type(value), "__module__", None) or "").partition(".")[0]
    return isinstance(value, _BY_NAME) or module in _CONSTANT


def _copied(dataset: Any) -> tuple[Any, list[Any]]:
    """A copy that shares the large parts, and the random generators in it."""
    file = BytesIO()
    copier = _Copier(file)
    copier.dump(dataset)
    file.seek(0)
    copied = _Reader(file, copier.shared).load()
    walk = _Copier(BytesIO())
    walk.dump(copied)
    return copied, walk.generators


def _random_states(generators: list[Any]) -> list[bytes]:
    """The states of the global random generators and of others, for comparison."""
    states = [
        pickle.dumps(random.getstate()),
        pickle.dumps(np.random.get_state()),
        torch.get_rng_state().numpy().tobytes(),
        *map(_state_of, generators),
    ]
    if torch.cuda.is_initialized():
        states += [state.numpy().tobytes() for state in torch.cuda.get_rng_state_all()]
    return states


def _state_of(generator: Any) -> bytes:
    if isinstance(generator, torch.Generator):  # its pickles differ by an address
        return generator.get_state().cpu().numpy().tobytes()
    return pickle.dumps(generator)


@contextmanager
def _random_states_kept() -> Iterator[None]:
    """Leave the global random generators as they are."""
    python, numpy = random.getstate(), np.random.get_state()
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
