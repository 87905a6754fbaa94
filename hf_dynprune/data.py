"""Find the data: the splits of a dataset, by Hub id or local path, and the columns in them.

The recipes, the command line and `vision` share these functions, so that they find the same columns
and raise the same errors.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any, Literal, Protocol

import datasets
import numpy as np

from .checks import did_you_mean

Kind = Literal["image", "label", "text"]

# If several columns have the right kind, the first of these names is used. (CIFAR-100 has
# fine_label and coarse_label.) There is no such list for images: a guess would train on the wrong
# ones.
_PREFERRED: dict[str, tuple[str, ...]] = {
    "image": (),
    "label": ("label", "labels", "fine_label"),
    "text": ("text", "sentence", "content"),
}
# Validation before test: choices that are made while a run is set up should not see the test data.
_EVALUATION = ("validation", "valid", "val", "dev", "test")


# ---- splits --------------------------------------------------------------------------------------


def load_splits(
    name: str,
    config: str | None = None,
    *,
    train: str = "train",
    evaluation: str | None = None,
    validation_share: float = 0.0,
) -> tuple[datasets.Dataset, datasets.Dataset | None]:
    """Load the training split of a dataset and the split to evaluate on.

    Args:
        name: A Hub id, or a local path as `datasets.load_dataset` takes it: a folder of parquet,
            CSV or JSON files, or of images by class (imagefolder).
        config: The configuration of a dataset that has several.
        train: The name of the training split, a slice such as `"train[:10%]"`, or several joined
            by `+`, such as `"train+extra"`.
        evaluation: The name or a slice of the evaluation split. *Optional*, defaults to the first
            existing split of validation, valid, val, dev and test.
        validation_share: If positive, hold out this share of the training split and return it in
            place of the evaluation split, which is not read. The rows are drawn at random, but
            every call draws the same rows. Use it to choose settings. In [0, 1).

    Returns:
        (training split, evaluation split). The evaluation split is None if the dataset has none and
        none was named.

    Raises:
        FileNotFoundError: If the path or dataset does not exist, or if the Hub cannot be reached.
        NotADirectoryError: If the path is a file.
        ValueError: If the split or configuration does not exist, if files cannot be read, or if
            validation_share leaves one of the two splits empty.
    """
    if not 0 <= validation_share < 1:
        raise ValueError(
            f"validation_share={validation_share} is out of range: expected a share of the rows in "
            "[0, 1)."
        )
    if validation_share and evaluation:
        raise ValueError(
            f"evaluation={evaluation!r} and validation_share={validation_share} both name the data "
            "to evaluate on: give one of the two."
        )
    source = _source(name)
    with _explained(name):
        known = datasets.get_dataset_split_names(source, config)
        if evaluation is None:
            evaluation = next((split for split in _EVALUATION if split in known), None)
        for split in chain(*(name.split("+") for name in (train, evaluation) if name)):
            base = split.partition("[")[0]
            if base not in known:
                raise ValueError(
                    f"The dataset {name!r} has no split {base!r}: expected one of "
                    f"{', '.join(map(str, known))}."
                )
        train_data = datasets.load_dataset(source, config, split=train)
        if validation_share:
            return hold_out(train_data, validation_share)
        if evaluation is None:
            return train_data, None
        return train_data, datasets.load_dataset(source, config, split=evaluation)


def hold_out(data: datasets.Dataset, share: float) -> tuple[datasets.Dataset, datasets.Dataset]:
    """Split off a share of the rows, in (0, 1), at random.

    Every call draws the same rows.

    Returns:
        (the other rows, the share), both in the order of `data`.

    Raises:
        ValueError: If one of the two would be empty.
    """
    count = round(share * len(data))
    if not 0 < count < len(data):
        raise ValueError(
            f"validation_share={share} of {len(data)} rows is {count} rows: at least one row must "
            "be left to train on and one to evaluate on."
        )
    order = np.random.default_rng(0).permutation(len(data))
    return data.select(np.sort(order[count:])), data.select(np.sort(order[:count]))


def _source(name: str) -> str:
    """Return what `load_dataset` takes: an existing local path, or a Hub id."""
    local = Path(name).expanduser()
    if local.is_file():
        raise NotADirectoryError(
            f"The dataset {name!r} is a file: give its folder, {str(local.parent)!r}."
        )
    if local.exists():
        return str(local)
    # A Hub id is `name` or `owner/name`. A name that looks different must be a path.
    if name.startswith((".", "/", "~")) or name.count("/") > 1 or "\\" in name:
        raise FileNotFoundError(
            f"The dataset {name!r} is neither an existing folder nor a Hub id (owner/name): check "
            "the path."
        )
    return name


@contextmanager
def _explained(name: str) -> Iterator[None]:
    """Raise the errors of `datasets` about this dataset with a message that says what to do."""
    try:
        yield
    except ConnectionError as error:
        raise FileNotFoundError(
            f"The Hub could not be reached for the dataset {name!r} ({error}). Without network, "
            "give the local path of a copy. If HF_HUB_OFFLINE is set by mistake, unset it."
        ) from error
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"The dataset {name!r} was not found, neither here nor on the Hub: {error}"
        ) from error
    except datasets.inspect.SplitsNotFoundError as error:  # only its cause names the reason
        raise ValueError(
            f"The files of the dataset {name!r} cannot be read: {error.__cause__}"
        ) from error
    except ValueError as error:
        if "Config name is missing" in str(error) or "BuilderConfig" in str(error):
            raise ValueError(f"{error} Name the configuration: --dataset_config.") from error
        raise


# ---- columns -------------------------------------------------------------------------------------


def find_column(
    features: Any, kind: Kind, name: str | None = None, *, argument: str | None = None
) -> str:
    """Find the column of the images, labels or texts.

    Args:
        features: The features of the dataset.
        kind: `"image"` (Image), `"label"` (ClassLabel, or integers in a column that is called
            label, labels or fine_label) or `"text"` (strings).
        name: The column, if it is known. A label column that is named may have any type.
        argument: The caller's name for `name`, used in error messages. *Optional*, defaults to
            `image_column`, `label_column` or `text_column`.

    Returns:
        `name` if it is given. Otherwise the only column of the kind, or the one with the usual name
        if there are several.

    Raises:
        ValueError: If there is no such column, or if several fit. The message lists all columns
            with their types.
    """
    argument = argument or f"{kind}_column"
    found = [column for column, feature in features.items() if _is(kind, feature)]
    columns = ", ".join(f"{column} ({_type_of(feature)})" for column, feature in features.items())
    if name is None:
        candidates = found
        if kind == "label" and not found:
            candidates = [column for column, feature in features.items() if _is_integer(feature)]
        preferred = [column for column in _PREFERRED[kind] if column in candidates]
        if preferred:
            return preferred[0]
        if len(found) == 1:
            return found[0]
        raise ValueError(
            f"Found {len(found)} {kind} columns among {columns}: name one, {argument}= "
            f"(--{argument} on the command line)."
        )
    if name not in features:
        raise ValueError(
            f"There is no column {name!r} among {columns}: {did_you_mean(name, features)}"
            f"Set {argument}= to one of them."
        )
    if kind != "label" and name not in found:
        raise ValueError(
            f"The column {name!r} among {columns} does not contain {kind}s: set {argument}= to "
            "another one, or convert it with dataset.cast_column()."
        )
    return name


def integer_labels(data: datasets.Dataset, label_column: str | None = None) -> list[int]:
    """Return the label of each row.

    Args:
        data: A split. Its format and its transform are ignored.
        label_column: Found by [`find_column`] if not given.

    Raises:
        TypeError: If a label is not an integer.
    """
    label_column = find_column(data.features, "label", label_column)
    labels = data.with_format(None)[label_column][:]
    if not all(isinstance(label, int) for label in labels):
        raise TypeError(
            f"label_column={label_column!r} must contain integers, got "
            f"{data.features[label_column]}: see class_encode_column()."
        )
    return labels


def class_names(data: datasets.Dataset, label_column: str) -> list[str]:
    """Return the names of the classes: those of a ClassLabel, or "0", "1", ... for integers.

    Raises:
        ValueError: If the labels are not integers of 0 or more.
    """
    names = getattr(data.features[label_column], "names", None)
    if names:
        return list(names)
    labels = data.unique(label_column)
    if not labels or not all(isinstance(label, int) and label >= 0 for label in labels):
        raise ValueError(
            f"The labels in {label_column!r} are {labels[:5]}: expected integers of 0 or more. "
            f"dataset.class_encode_column({label_column!r}) makes them."
        )
    return [str(label) for label in range(max(labels) + 1)]


def _is(kind: Kind, feature: Any) -> bool:
    if kind == "text":
        return isinstance(feature, datasets.Value) and feature.dtype in ("string", "large_string")
    return isinstance(feature, datasets.Image if kind == "image" else datasets.ClassLabel)


def _is_integer(feature: Any) -> bool:
    return str(getattr(feature, "dtype", "")).startswith("int")


def _type_of(feature: Any) -> str:
    return feature.dtype if isinstance(feature, datasets.Value) else type(feature).__name__


# ---- classification ------------------------------------------------------------------------------


class ClassificationOptions(Protocol):
    """A model for image or text classification and its data: options of the command line."""

    model: str
    dataset: str
    dataset_config: str | None
    split: str
    image_column: str | None
    text_column: str | None
    label_column: str | None
    from_scratch: bool


def classification(
    options: ClassificationOptions,
) -> tuple[datasets.Dataset, Callable, Callable[[], Any]]:
    """Prepare image or text classification: images if the dataset has a column of images.

    Args:
        options: Model, data and columns. Columns that are None are found by [`find_column`].

    Returns:
        (dataset, collator, model_init). The dataset is the split `options.split`, and its samples
        have the model's inputs and `labels`. `model_init()` makes a model with a head for the
        classes of the dataset, with random weights if `from_scratch` is set.

    Raises:
        FileNotFoundError, NotADirectoryError, ValueError: As [`load_splits`], [`find_column`] and
            [`class_names`] do.
        OSError: If there is no such model.
    """
    import transformers  # finding columns does not need it

    data, _ = load_splits(options.dataset, options.dataset_config, train=options.split)
    label = find_column(data.features, "label", options.label_column)
    names = class_names(data, label)
    auto: Any
    if any(isinstance(feature, datasets.Image) for feature in data.features.values()):
        auto = transformers.AutoModelForImageClassification
        prepared, collator = _prepared_images(data, label, options)
    else:
        auto = transformers.AutoModelForSequenceClassification
        prepared, collator = _prepared_texts(data, label, options)
    heads = {
        "id2label": dict(enumerate(names)),
        "label2id": {name: i for i, name in enumerate(names)},
    }

    def model_init() -> Any:
        if options.from_scratch:
            return auto.from_config(transformers.AutoConfig.from_pretrained(options.model, **heads))
        return auto.from_pretrained(options.model, ignore_mismatched_sizes=True, **heads)

    return prepared, collator, model_init


def _prepared_images(
    data: datasets.Dataset, label: str, options: ClassificationOptions
) -> tuple[datasets.Dataset, Callable]:
    """Images go through the model's processor when they are read, and are collated by stacking."""
    import transformers

    column = find_column(data.features, "image", options.image_column)
    processor = transformers.AutoImageProcessor.from_pretrained(options.model)

    def prepare(batch: dict[str, list]) -> dict[str, Any]:
        images = [image.convert("RGB") for image in batch[column]]
        return {**processor(images, return_tensors="pt"), "labels": batch[label]}

    return data.with_transform(prepare), transformers.default_data_collator


def _prepared_texts(
    data: datasets.Dataset, label: str, options: ClassificationOptions
) -> tuple[datasets.Dataset, Callable]:
    """Texts are tokenized at once, and padded in the collator."""
    import transformers

    column = find_column(data.features, "text", options.text_column)
    tokenizer = transformers.AutoTokenizer.from_pretrained(options.model)

    def tokenize(batch: dict[str, list]) -> dict[str, Any]:
        return {**tokenizer(batch[column], truncation=True), "labels": batch[label]}

    tokenized = data.map(
        tokenize, batched=True, remove_columns=data.column_names, desc="Tokenizing"
    )
    return tokenized, transformers.DataCollatorWithPadding(tokenizer)
