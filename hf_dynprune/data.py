"""Where the data are: the splits of a dataset, by Hub id or local path, and the columns in them.

For the recipes, the command line and `vision`, which all find the same columns, and say the same where they do not.
"""

import difflib
from pathlib import Path
from typing import Any, Literal

import datasets
import numpy as np

Kind = Literal["image", "label", "text"]

# Of several columns of a kind, the first of these names is taken. (CIFAR-100 has fine_label and coarse_label.) Of several
# columns of images none: a guess would train on the wrong pictures.
_PREFERRED: dict[str, tuple[str, ...]] = {
    "image": (),
    "label": ("label", "labels", "fine_label"),
    "text": ("text", "sentence", "content"),
}
# Validation before test: what is looked at while a run is set up should not be what is reported.
_EVALUATION = ("validation", "valid", "val", "dev", "test")


def load_splits(
    name: str,
    config: str | None = None,
    *,
    train: str = "train",
    evaluation: str | None = None,
    validation_share: float = 0.0,
) -> tuple[datasets.Dataset, datasets.Dataset | None]:
    """The training split of a dataset, and the one to evaluate on.

    Args:
        name: a Hub id, or a local path as `datasets.load_dataset` takes it: a folder of parquet, CSV or JSON files, or of
            images by class (imagefolder).
        config: of a dataset that has several.
        train: the name of the training split; slices as in `"train[:10%]"` are welcome.
        evaluation: the name of the other; *optional*, defaults to the first there is of validation, valid, val, dev, test.
        validation_share: in (0, 1): hold that share of the training split out, at random but the same rows each time, and
            return it in place of the other split, which is not read: what choices are to be made on.

    Returns:
        (training split, evaluation split); the latter is None where there is none and none was named.

    Raises:
        FileNotFoundError: no such path or dataset, or the Hub cannot be reached.
        NotADirectoryError: a file.
        ValueError: no such split or configuration; files that cannot be read; a share that leaves one of the two empty.
    """
    if not 0 <= validation_share < 1:
        raise ValueError(
            f"validation_share={validation_share} is out of range: wanted is a share of the rows, in [0, 1)."
        )
    if validation_share and evaluation:
        raise ValueError(
            f"Evaluation is to be on {evaluation!r} and on validation_share={validation_share} of the training rows: leave "
            "one of the two out."
        )
    local = Path(name).expanduser()
    # A Hub id is `name` or `owner/name`; what else looks like a path is one.
    if not local.exists() and (
        name.startswith((".", "/", "~")) or name.count("/") > 1 or "\\" in name
    ):
        raise FileNotFoundError(
            f"The dataset {name!r} is no folder here, and no Hub id (owner/name): mend the path."
        )
    if local.is_file():
        raise NotADirectoryError(
            f"The dataset {name!r} is a file: give the folder that it lies in, {str(local.parent)!r}."
        )
    source = str(local) if local.exists() else name
    try:
        known = datasets.get_dataset_split_names(source, config)
        wanted = evaluation or next((split for split in _EVALUATION if split in known), None)
        for split in (train, wanted):
            base = (split or train).partition("[")[0]
            if base not in known:
                raise ValueError(
                    f"The dataset {name!r} has no split {base!r}; it has {', '.join(map(str, known))}."
                )
        train_data = datasets.load_dataset(source, config, split=train)
        if validation_share:
            return hold_out(train_data, validation_share)
        return train_data, None if wanted is None else datasets.load_dataset(
            source, config, split=wanted
        )
    except ConnectionError as error:
        raise FileNotFoundError(
            f"The Hub could not be reached for the dataset {name!r} ({error}). Without network, give the local path of a "
            "copy; or unset HF_HUB_OFFLINE, if that was meant."
        ) from error
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"The dataset {name!r} was not found, here or on the Hub: {error}"
        ) from error
    except datasets.inspect.SplitsNotFoundError as error:  # which does not say why
        raise ValueError(
            f"The files of the dataset {name!r} cannot be read: {error.__cause__}"
        ) from error
    except ValueError as error:
        if "Config name is missing" in str(error) or "BuilderConfig" in str(error):
            raise ValueError(f"{error} Name it: --dataset_config.") from error
        raise


def hold_out(data: datasets.Dataset, share: float) -> tuple[datasets.Dataset, datasets.Dataset]:
    """(the rest, that share of the rows, in (0, 1)): at random, but the same rows each time, both in their order.

    Raises:
        ValueError: a share that leaves one of the two empty.
    """
    count = round(share * len(data))
    if not 0 < count < len(data):
        raise ValueError(
            f"validation_share={share} of {len(data)} rows leaves nothing to train or to evaluate on."
        )
    order = np.random.default_rng(0).permutation(len(data))
    return data.select(np.sort(order[count:])), data.select(np.sort(order[:count]))


def find_column(
    features: Any, kind: Kind, name: str | None = None, *, argument: str | None = None
) -> str:
    """The column of the images, labels or texts.

    Args:
        features: of the dataset.
        kind: `"image"` (Image), `"label"` (ClassLabel, or integers in a column called label or labels), `"text"` (strings).
        name: the column, if it is known; a label may then be any column.
        argument: what the caller calls `name`, for the messages; *optional*, defaults to `image_column` and so on.

    Returns:
        `name`; else the only column of the kind, or of several that with the usual name.

    Raises:
        ValueError: there is no such column, or several; the message lists all of them with their kinds.
    """
    argument = argument or f"{kind}_column"
    found = [column for column, feature in features.items() if _is(kind, feature)]
    columns = ", ".join(f"{column} ({_kind_of(feature)})" for column, feature in features.items())
    if name is not None:
        if name not in features:
            close = difflib.get_close_matches(name, list(features), n=1, cutoff=0.3)
            meant = f"; did you mean {close[0]!r}?" if close else "."
            raise ValueError(
                f"There is no column {name!r} among {columns}: {argument}= must name one{meant}"
            )
        if kind != "label" and name not in found:
            raise ValueError(
                f"The column {name!r} among {columns} holds no {kind}s: name another {argument}=, or make it one by "
                "dataset.cast_column()."
            )
        return name
    preferred = [column for column in _PREFERRED[kind] if column in found]
    if not found and kind == "label":
        preferred = [
            c
            for c in _PREFERRED[kind]
            if c in features and str(getattr(features[c], "dtype", "")).startswith("int")
        ]
    if len(found) == 1 or preferred:
        return preferred[0] if preferred else found[0]
    raise ValueError(
        f"Found {len(found)} {kind} columns among {columns}: say which, {argument}= (--{argument} on a command line)."
    )


def class_names(data: datasets.Dataset, label_column: str) -> list[str]:
    """The names of the classes: of a ClassLabel its own, of integers 0, 1, ... up to the highest there is.

    Raises:
        ValueError: labels that are not 0, 1, ...
    """
    names = getattr(data.features[label_column], "names", None)
    if names:
        return list(names)
    labels = data.unique(label_column)
    if not labels or not all(isinstance(label, int) and label >= 0 for label in labels):
        raise ValueError(
            f"The labels in {label_column!r} are {labels[:5]}: wanted are classes 0, 1, ...; "
            f"dataset.class_encode_column({label_column!r}) makes them."
        )
    return [str(label) for label in range(max(labels) + 1)]


def _is(kind: Kind, feature: Any) -> bool:
    if kind == "text":
        return isinstance(feature, datasets.Value) and feature.dtype in ("string", "large_string")
    return isinstance(feature, datasets.Image if kind == "image" else datasets.ClassLabel)


def _kind_of(feature: Any) -> str:
    return feature.dtype if isinstance(feature, datasets.Value) else type(feature).__name__
