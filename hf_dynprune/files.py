"""Files that are written whole or not at all, with a checksum.

A file is written beside its place, flushed to the disk and renamed. A reader, or a process that is
killed at any moment, sees the old file or the new one, never a part.
"""

import hashlib
import json
import math
import os
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

# The names of the files that a run leaves.
STATE_FILE = "pruning_state.safetensors"  # in a checkpoint
REPORT_FILE = "report.json"
TABLE_FILE = "table.safetensors"
PICTURE_FILE = "pruning.png"
SCORES_FILE = "scores.safetensors"

# The column of a parquet file that says which sample a row is about.
INDEX_COLUMN = "sample_index"


@contextmanager
def atomic(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a place beside `path` to write to; on success flush it to the disk and rename it."""
    path = Path(path)
    # A name that nobody can guess: two threads may write the same file, and in a shared folder
    # somebody may have put a link in the place of a name that is known beforehand.
    temporary = path.with_name(f".{path.name[:100]}.{secrets.token_hex(8)}.tmp")
    try:
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def checksum(tensors: Mapping[str, Tensor], text: str) -> str:
    """SHA-256 of the text and of the names, dtypes, shapes and values of CPU tensors."""
    digest = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        digest.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


# ---- JSON ----------------------------------------------------------------------------------------

# JSON has no NaN and no infinities. Protocol buffers write them so, too.
_NOT_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


def strict(value: Any) -> Any:
    """A copy of a JSON value in which numbers that JSON does not have are texts.

    These are `"NaN"`, `"Infinity"` and `"-Infinity"`. [`number`] reads them.
    """
    if isinstance(value, dict):
        return {strict(key): strict(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [strict(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value


def number(value: Any) -> Any:
    """The number that a text of [`strict`] stands for. Other values are returned as they are."""
    return _NOT_FINITE.get(value, value) if isinstance(value, str) else value


def json_text(value: Any, **settings: Any) -> str:
    """The value as JSON that every program reads, with NaN and infinities as [`strict`] has them.

    Args:
        value: A JSON value.
        settings: As in `json.dumps`.

    Raises:
        TypeError: If it is not a JSON value.
    """
    return json.dumps(strict(value), allow_nan=False, **settings)


def parse_json(text: str) -> Any:
    """The value of a JSON text.

    Raises:
        ValueError: If the text is not JSON, or is nested too deeply.
    """
    try:
        return json.loads(text)
    except RecursionError:  # hides its thousands of frames
        raise ValueError("its JSON is nested too deeply") from None


def save_json(path: str | os.PathLike[str], value: Any, *, indent: int | None = 2) -> None:
    """Write a JSON value, indented or (None) on one line. The folder is made if need be."""
    text = json_text(value, indent=indent) + "\n"
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with atomic(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def load_json(path: str | os.PathLike[str]) -> Any:
    """Read a JSON value.

    Raises:
        OSError: If the file cannot be read.
        ValueError: If it is not JSON. The message does not name the path.
    """
    return parse_json(Path(path).read_text(encoding="utf-8"))


# ---- safetensors ---------------------------------------------------------------------------------


def _metadata(text: str) -> dict[str, Any]:
    """The metadata of a file of ours. ValueError if it is not a mapping."""
    metadata = parse_json(text)
    if not isinstance(metadata, dict):
        raise ValueError(f"its metadata is a {type(metadata).__name__}, expected a mapping")
    return metadata


def save_tensors(
    path: str | os.PathLike[str], tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]
) -> None:
    """Write CPU tensors and JSON metadata to one safetensors file."""
    from safetensors.torch import save_file

    text = json_text(metadata, sort_keys=True)
    stored = {name: tensor.contiguous() for name, tensor in tensors.items()}
    header = {"hf_dynprune": text, "sha256": checksum(stored, text)}
    with atomic(path) as temporary:
        save_file(stored, temporary, metadata=header)


def load_tensors(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read the tensors and the metadata that [`save_tensors`] wrote.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is truncated, altered or not one of ours. The message names the
            path.
    """
    from safetensors import SafetensorError, safe_open

    if not Path(path).is_file():
        raise FileNotFoundError(f"{path} does not exist.")
    way_out = "Use an older checkpoint, or start a new run."
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        text = header["hf_dynprune"]
        intact = header["sha256"] == checksum(tensors, text)
        metadata = _metadata(text)
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        raise ValueError(
            f"{path} is not a file of hf_dynprune, or is damaged ({error}). {way_out}"
        ) from error
    if not intact:
        raise ValueError(f"{path} is damaged: its checksum does not match. {way_out}")
    return tensors, metadata


# ---- parquet -------------------------------------------------------------------------------------


def save_parquet(
    path: str | os.PathLike[str], columns: Mapping[str, Tensor], metadata: Mapping[str, Any]
) -> None:
    """Write columns of N values each, with a column `sample_index` in front, and JSON metadata."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    text = json_text(metadata, sort_keys=True)
    n = len(next(iter(columns.values())))
    arrays = {INDEX_COLUMN: pa.array(torch.arange(n).numpy())}
    arrays.update({name: pa.array(column.numpy()) for name, column in columns.items()})
    fields = [pa.field(name, array.type, nullable=False) for name, array in arrays.items()]
    header = {"hf_dynprune": text, "sha256": checksum(columns, text)}
    table = pa.table(list(arrays.values()), schema=pa.schema(fields, metadata=header))
    with atomic(path) as temporary:
        pq.write_table(table, temporary)


def load_parquet(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what [`save_parquet`] wrote. The rows may be in any order.

    Returns:
        The columns, ordered by sample index, without `sample_index`; and the metadata.

    Raises:
        ValueError: If the file is damaged or not one of ours, or if a sample index is missing or
            occurs twice. The message names the path and the samples.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(path)
        if any(table[name].null_count for name in table.column_names):
            raise ValueError("it has rows without a value")
        # Copies, because the memory that arrow lends is read-only.
        columns = {name: torch.tensor(table[name].to_numpy()) for name in table.column_names}
        header = {k.decode(): v.decode() for k, v in (table.schema.metadata or {}).items()}
        text, expected = header["hf_dynprune"], header["sha256"]
        metadata = _metadata(text)
        index = columns.pop(INDEX_COLUMN)
        if index.dtype != torch.int64:
            raise ValueError(f"its {INDEX_COLUMN} is {index.dtype}, expected int64")
    except (pa.ArrowException, OSError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path} is not a parquet file of hf_dynprune, or is damaged ({error})."
        ) from error
    _check_each_once(index, path)
    order = index.argsort()
    columns = {name: column[order] for name, column in columns.items()}
    if expected != checksum(columns, text):
        raise ValueError(
            f"{path} is damaged: its checksum does not match. Write it again, or use another copy."
        )
    return columns, metadata


def _check_each_once(index: Tensor, path: str | os.PathLike[str]) -> None:
    """Raise ValueError unless each of 0, ..., N - 1 occurs once among the (N,) indices."""
    n = len(index)
    inside = (index >= 0) & (index < n)
    counts = torch.bincount(index[inside], minlength=n)
    missing = torch.nonzero(counts == 0).squeeze(1)
    if len(missing) == 0:
        return
    wrong = {
        "twice or more": torch.nonzero(counts > 1).squeeze(1),
        f"outside [0, {n})": index[~inside],
        "missing": missing,
    }
    found = "; ".join(
        f"{what}: {_first(samples)}" for what, samples in wrong.items() if len(samples)
    )
    raise ValueError(f"{path} has {n} rows. Each sample index must occur once. {found}.")


def _first(samples: Tensor) -> str:
    more = f" and {len(samples) - 5} more" if len(samples) > 5 else ""
    return ", ".join(map(str, samples[:5].tolist())) + more
