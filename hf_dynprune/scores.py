"""Scores made before the run: one number for each sample, for static pruning or a reference."""

import json
import os
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .files import checksum, load_parquet, load_tensors, parse_json, save_parquet, save_tensors
from .json_fields import any_json

_SUFFIXES = (".safetensors", ".parquet")
_METADATA = ("method", "fingerprint", "provenance")


def fingerprints_fit(one: str, other: str, n: int) -> bool:
    """Whether two fingerprints can be of the same dataset of n samples.

    `""` and `"N samples"` say nothing of the content, so they fit every dataset of that size.
    """
    says_nothing = ("", f"{n} samples")
    return one == other or one in says_nothing or other in says_nothing


@dataclass(eq=False)
class Scores:
    """One score for each sample of a dataset, made before the run.

    [`StaticPruning`] chooses by it. For [`ReferenceLoss`] it is a loss.

    [`score_dataset`] makes them. Your own scores need `values`, a name and what they cost.

    Args:
        values: (N,) numbers, that of sample i at position i; high is hard. Kept as float32 on the
            CPU. May hold infinities.
        method: What they are, such as `"el2n"`.
        fingerprint: Of the dataset that was scored, [`hf_dynprune.identity.dataset_fingerprint`].
            `""` or `"N samples"` compares only N with the dataset that is pruned.
        provenance: JSON values that say how they were made. `passes` is their cost: a sample once
            through forward and backward is 1, forward alone 1/3; 0 if they were free.
            [`score_dataset`] also notes `forward_passes`, `backward_passes`, `scoring_passes`,
            `seconds`, `runs`, `epochs`, `seeds`, `model`, `settings`, `environment`.

    Attributes:
        path: The file that they were last saved to or read from; None before.

    Raises:
        TypeError, ValueError: If the values are no real numbers, if the shape is not (N,), if
            scores are NaN or too large for float32 (the message says how many and the first one),
            or if the provenance is not a mapping of JSON values.
    """

    values: Tensor
    method: str
    fingerprint: str = ""
    provenance: dict[str, Any] = field(default_factory=dict)
    path: str | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        self.values = _checked_values(self.values)
        for name in ("method", "fingerprint"):
            value = getattr(self, name)
            if not isinstance(value, str) or (name == "method" and not value):
                expected = "a str such as 'el2n'" if name == "method" else "a str, '' if unknown"
                raise TypeError(f"{name}={value!r}: expected {expected}.")
        self.provenance = _checked_provenance(self.provenance)

    def __len__(self) -> int:
        return len(self.values)

    @property
    def digest(self) -> str:
        """16 hexadecimal digits of the values, the method and the fingerprint.

        The provenance is left out, because it holds seconds.
        """
        return checksum({"score": self.values}, json.dumps([self.method, self.fingerprint]))[:16]

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the scores, whole or not at all, and note `path`. The folder is made if need be.

        `.safetensors` holds the tensor `score`. `.parquet` (needs pyarrow) holds the columns
        `sample_index`, int64, and `score`, float32. Both have a checksum, and method, fingerprint
        and provenance as metadata.
        """
        path = Path(path)
        write = save_parquet if _is_parquet(path) else save_tensors
        path.parent.mkdir(parents=True, exist_ok=True)
        write(path, {"score": self.values}, {name: getattr(self, name) for name in _METADATA})
        self.path = str(path)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Scores":
        """Read what `save` wrote. The rows of a parquet file may be in any order.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If it is not a file of scores, or is damaged. In a parquet file also if a
                sample index is missing or occurs twice; the message names the samples.
        """
        path = Path(path)
        parquet = _is_parquet(path)
        if not path.is_file():
            raise FileNotFoundError(
                f"{path} does not exist: make the scores with `score_dataset`, or correct the path."
            )
        columns, metadata = load_parquet(path) if parquet else load_tensors(path)
        if set(columns) != {"score"} or not metadata.keys() >= set(_METADATA):
            raise ValueError(f"{path} holds {sorted(columns)}, not the scores of `Scores.save`.")
        try:
            scores = cls(columns["score"], *(metadata[name] for name in _METADATA))
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path} does not hold scores of `Scores.save` ({error})") from error
        scores.path = str(path)
        return scores


def _checked_values(given: Any) -> Tensor:
    """(N,) float32 on the CPU. TypeError or ValueError if the values are not N scores."""
    expected = "(N,) real numbers, one for each sample"
    try:
        # torch would read a list of Python's numbers as float32.
        dtype = None if hasattr(given, "dtype") else torch.float64
        values = torch.as_tensor(given, dtype=dtype).detach()
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise TypeError(
            f"The scores are a {type(given).__name__} ({error}): expected {expected}."
        ) from error
    if values.is_complex() or values.is_quantized or values.layout != torch.strided:
        raise TypeError(f"The scores are {values.dtype}, {values.layout}: expected {expected}.")
    if values.is_meta:
        raise TypeError(
            f"The scores are on the device 'meta' and have no values: expected {expected}."
        )
    if values.ndim != 1 or len(values) == 0:
        raise ValueError(f"The scores have shape {tuple(values.shape)}: expected {expected}.")
    values = values.cpu()
    kept, values = values.to(torch.float32), values.double()
    for wrong, what, way_out in (
        (
            values.isnan(),
            "NaN",
            "give each a score, such as float('inf') to keep it as the hardest",
        ),
        (kept.isinf() & ~values.isinf(), "beyond float32", "scale them; only their order matters"),
    ):
        found = torch.nonzero(wrong).squeeze(1)
        if len(found):
            raise ValueError(
                f"{len(found)} of {len(values)} scores are {what}, the first that of sample "
                f"{int(found[0])}, {values[found[0]].item()}: {way_out}."
            )
    return kept


def _checked_provenance(given: Any) -> dict[str, Any]:
    """A copy. TypeError or ValueError if it is not a mapping of JSON values with a valid cost."""
    if not isinstance(given, Mapping):
        raise TypeError(
            f"provenance={reprlib.repr(given)}: expected a dict, such as {{'passes': 0}}."
        )
    for name in ("passes", "seconds"):  # of these the report counts
        cost = given.get(name, 0)
        is_number = isinstance(cost, int | float) and not isinstance(cost, bool)
        if not (is_number and 0 <= cost < 2**63):
            raise ValueError(
                f"provenance[{name!r}]={reprlib.repr(cost)} is not a number of {name}: expected "
                "what the scores cost, 0 or more."
            )
    try:
        provenance = parse_json(json.dumps(dict(given), allow_nan=False))
        any_json("provenance", provenance)
    except (TypeError, ValueError, RecursionError) as error:
        kind = TypeError if isinstance(error, TypeError) else ValueError
        raise kind(f"The provenance of scores must be JSON ({error}).") from error
    return provenance


def _is_parquet(path: Path) -> bool:
    if path.suffix not in _SUFFIXES:
        raise ValueError(
            f"{path} has the suffix {path.suffix!r}: scores are kept as .safetensors or .parquet."
        )
    return path.suffix == ".parquet"
