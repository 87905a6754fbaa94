"""What a run trained on what: the part of its report by which it is traced and checked."""

import re
from collections.abc import Sequence
from contextlib import suppress
from enum import Enum
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
import xxhash
from transformers.modelcard import TASK_MAPPING

from .arguments import TRAINING_SETTINGS
from .losses import model_class, unwrapped

# The private names that this file leans on. Reason for each:
SEAMS = {
    "PreTrainedConfig._name_or_path": "where the model was loaded from",
    "Parameter._is_hf_initialized": "whether weights were loaded; a loaded config has a name "
    "even if the model made from it has random weights",
}

# The arguments of the Trainer that decide what is trained. Evaluation is included because it draws
# from the same random numbers as dropout.
ARGUMENTS = (
    "max_steps",
    "per_device_train_batch_size",
    *TRAINING_SETTINGS,
    "eval_strategy",
    "eval_steps",
    "seed",
    "data_seed",
)
_LABELS = ("labels", "label")  # columns of a training set, the first that there is
_LABEL_ATTRIBUTES = ("labels", "targets")  # of other datasets


def provenance_of(trainer: Any, fingerprint: str) -> dict[str, Any]:
    """The `provenance` of the report of a trainer's run, see [`PruningReport`].

    Args:
        trainer: With `model`, `train_dataset` and `args`.
        fingerprint: Of the training set, by [`dataset_fingerprint`].
    """
    model, data = unwrapped(trainer.model), trainer.train_dataset
    source = loaded_from(model)
    if source is not None and Path(source).is_dir():  # the path is private
        source = Path(source).resolve().name
    labels = labels_of(data)
    found = {
        "model": source,
        "model_class": model_class(model).__name__,
        "task": next(iter(tasks_of(model_class(model).__name__)), None),
        "dataset": {
            **hub_dataset(data),
            "fingerprint": fingerprint,
            **({} if labels is None else {"labels": labels_checksum(labels)}),
        },
        "arguments": {
            name: _json_value(getattr(trainer.args, name))
            for name in ARGUMENTS
            if hasattr(trainer.args, name)
        },
    }
    return {name: value for name, value in found.items() if value}


def _json_value(value: Any) -> Any:
    value = value.value if isinstance(value, Enum) else value
    if isinstance(value, dict):
        return {str(key): _json_value(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_json_value(inner) for inner in value]
    return value if isinstance(value, str | bool | int | float | None) else str(value)


# ---- model ---------------------------------------------------------------------------------------


def loaded_from(model: Any) -> str | None:
    """Where the weights of a model were loaded from; None if they are random or it is unknown."""
    loaded = any(getattr(weight, "_is_hf_initialized", False) for weight in model.parameters())
    config = getattr(model, "config", None)
    return (getattr(config, "_name_or_path", None) or None) if loaded else None


def tasks_of(class_name: str) -> list[str]:
    """The Hub's tasks of a model class. transformers maps a task to names or tuples of names."""
    found = []
    classes: Any
    for task, classes in TASK_MAPPING.items():
        names = []
        for value in classes.values():
            names += [value] if isinstance(value, str) else list(value)
        if class_name in names:
            found.append(task)
    return found


# ---- dataset -------------------------------------------------------------------------------------


def hub_dataset(dataset: Any) -> dict[str, str]:
    """Id, revision, config and split of a `datasets.Dataset` on the Hub; empty if unknown."""
    if not isinstance(dataset, datasets.Dataset):
        return {}
    urls = map(str, dataset.info.download_checksums or {})
    matches = [re.match(r"hf://datasets/([^@]+)@(\w+)/", url) for url in urls]
    found = {match.groups() for match in matches if match}
    if len(found) != 1:
        return {}
    ((name, revision),) = found
    split = str(dataset.split)
    return {"id": name, "revision": revision, "config": dataset.info.config_name, "split": split}


def labels_of(dataset: Any) -> np.ndarray | None:
    """The labels of a training set, (N,) int64 in its order; None unless it has one per sample."""
    if isinstance(dataset, datasets.Dataset):
        names = [name for name in _LABELS if name in dataset.features]
        return _integers_in(dataset, names[0]) if names else None
    for name in _LABEL_ATTRIBUTES:
        values = getattr(dataset, name, None)
        if isinstance(values, torch.Tensor | np.ndarray | Sequence) and not isinstance(values, str):
            with suppress(TypeError, ValueError, RuntimeError):  # of a foreign class
                labels = np.asarray(values.cpu() if isinstance(values, torch.Tensor) else values)
                if np.issubdtype(labels.dtype, np.integer) and labels.shape == (len(dataset),):
                    return labels.astype(np.int64)
    return None


def has_labels(dataset: datasets.Dataset, checksum: str) -> bool:
    """Whether a column of the dataset holds the labels with this checksum, in this order."""
    columns = (_integers_in(dataset, name) for name in dataset.column_names)
    return any(column is not None and labels_checksum(column) == checksum for column in columns)


def labels_checksum(labels: np.ndarray) -> str:
    """The checksum of labels (N,) int64, as 16 hexadecimal digits."""
    return xxhash.xxh3_64(np.ascontiguousarray(labels, "<i8").data).hexdigest()


def _integers_in(dataset: datasets.Dataset, column: str) -> np.ndarray | None:
    """A column as (N,) int64, in the dataset's order; None if it is not one of integers."""
    if not str(getattr(dataset.features[column], "dtype", "")).startswith(("int", "uint")):
        return None
    values = dataset.select_columns([column]).with_format("arrow")[:].column(0)
    return None if values.null_count else values.to_numpy().astype(np.int64)
