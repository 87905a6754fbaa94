"""Scores made before the run: one number for each sample, for static pruning."""

import json
import math
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .files import checksum, load_parquet, load_tensors, save_parquet, save_tensors

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
    """One score for each sample of a dataset, made before the run. [`StaticPruning`] chooses by it.

    [`score_dataset`] makes them. Your own scores need `values`, a name and what they cost.

    Args:
        values: (N,) numbers, that of sample i at position i; high is hard. Kept as float32 on the
            CPU. May hold infinities.
        method: What they are, such as `"el2n"`.
        fingerprint: Of the dataset that was scored, [`hf_dynprune.data_side.dataset_fingerprint`].
            `""` or `"N samples"` compares only N with the dataset that is pruned.
        provenance: JSON values that say how they were made. `passes` is their cost: a sample once
            through forward and backward is 1, forward alone 1/3; 0 if they were free.
            [`score_dataset`] also notes `forward_passes`, `backward_passes`, `scoring_passes`,
            `seconds`, `runs`, `epochs`, `seeds`, `model`, `settings`, `environment`.

    Attributes:
        path: The file that they were last saved to or read from; None before.

    Raises:
        TypeError, ValueError: If the shape is not (N,), if scores are NaN (the message says how
            many and the first one), or if the provenance is not JSON.
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
                f"The scores have shape {tuple(values.shape)}: expected (N,), one for each sample."
            )
        nan = torch.nonzero(values.isnan()).squeeze(1)
        if len(nan):
            raise ValueError(
                f"{len(nan)} of {len(values)} scores are NaN, the first that of sample "
                f"{int(nan[0])}: give each a score, such as float('inf') to keep it as the hardest."
            )
        if not isinstance(self.method, str) or not self.method:
            raise TypeError(f"method={self.method!r} is not a name: expected a str such as 'el2n'.")
        self.values = values.to(torch.float32)
        try:
            self.provenance = json.loads(json.dumps(self.provenance))
        except TypeError as error:
            raise TypeError(f"The provenance of scores must be JSON: {error}.") from error
        cost = self.provenance.get("passes", 0)
        if isinstance(cost, bool) or not isinstance(cost, int | float) or not 0 <= cost < math.inf:
            raise ValueError(
                f"provenance['passes']={cost!r} is not a number of passes: expected what the "
                "scores cost, 0 or more."
            )

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
        scores = cls(columns["score"], *(metadata[name] for name in _METADATA))
        scores.path = str(path)
        return scores


def _is_parquet(path: Path) -> bool:
    if path.suffix not in _SUFFIXES:
        raise ValueError(
            f"{path} has the suffix {path.suffix!r}: scores are kept as .safetensors or .parquet."
        )
    return path.suffix == ".parquet"
