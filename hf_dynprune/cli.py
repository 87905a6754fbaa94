"""The command `hf-dynprune`. Each subcommand imports what it needs when it is called, so that `--help` is quick."""

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass
class ScoreArguments:
    """What is scored, with what."""

    method: str = field(
        metadata={"help": "el2n, grand, grand-last-layer, forgetting, loss, margin or entropy; high is hard with each."}
    )
    model: str = field(metadata={"help": "Hub id or local path of a model for image or text classification."})
    dataset: str = field(metadata={"help": "Hub id or local path of a dataset."})
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a dataset that has several."})
    split: str = field(default="train", metadata={"help": "The split that is to be pruned."})
    image_column: str | None = field(default=None, metadata={"help": "Column of the images; default: the only one."})
    text_column: str | None = field(default=None, metadata={"help": "Column of the texts; default: the only one, or text."})
    label_column: str | None = field(
        default=None,
        metadata={"help": "Column of the labels; default: the only ClassLabel column, or label, or fine_label."},
    )
    from_scratch: bool = field(default=False, metadata={"help": "Start from random weights, as the papers do."})
    runs: int | None = field(default=None, metadata={"help": "Runs to combine; default: as published."})
    epochs: int | None = field(default=None, metadata={"help": "Epochs before scoring; default: as published."})


def score(argv: Sequence[str]) -> None:
    """Scores a dataset for static pruning, into <output_dir>/scores.safetensors."""
    from transformers import HfArgumentParser, TrainingArguments

    from .static import SCORES_FILE, score_dataset

    groups: Any = (ScoreArguments, TrainingArguments)
    parser = HfArgumentParser(
        groups,
        prog="hf-dynprune score",
        description="Scores the samples of a dataset for StaticPruning: trains on all data, then scores. All arguments of "
        "the Trainer are there; `num_train_epochs` is the run whose learning rates the scoring follows.",
    )
    options, args = parser.parse_args_into_dataclasses(args=list(argv))
    args.remove_unused_columns = False
    data, collator, model_init = _classification(options)
    folder = Path(args.output_dir or ".")
    scores = score_dataset(
        options.method,
        model_init,
        args,
        data,
        runs=options.runs,
        epochs=options.epochs,
        output_dir=folder,
        data_collator=collator,
    )
    from . import distributed

    if distributed.world()[0] == 0:
        print(
            f"{options.method} of {len(scores):,} samples, at the price of {scores.provenance['passes']:,.0f} passes.\n"
            f'Use it: StaticPruning("{folder / SCORES_FILE}", keep_ratio=0.5)'
        )


def _classification(options: ScoreArguments) -> tuple[Any, Any, Callable]:
    """(dataset, collator, model_init) of image or text classification, as the columns of the dataset say."""
    import datasets
    import transformers

    from .data import class_names, find_column, load_splits

    data, _ = load_splits(options.dataset, options.dataset_config, train=options.split)
    label = find_column(data.features, "label", options.label_column)
    names = class_names(data, label)
    heads = {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}
    if any(isinstance(feature, datasets.Image) for feature in data.features.values()):
        column = find_column(data.features, "image", options.image_column)
        processor = transformers.AutoImageProcessor.from_pretrained(options.model)

        def prepare(batch: dict[str, list]) -> dict[str, Any]:
            pixels = processor([image.convert("RGB") for image in batch[column]], return_tensors="pt")
            return {**pixels, "labels": batch[label]}

        auto: Any = transformers.AutoModelForImageClassification
        prepared = data.with_transform(prepare)
        collator: Any = transformers.default_data_collator
    else:
        column = find_column(data.features, "text", options.text_column)
        tokenizer = transformers.AutoTokenizer.from_pretrained(options.model)
        auto = transformers.AutoModelForSequenceClassification
        prepared = data.map(
            lambda batch: {**tokenizer(batch[column], truncation=True), "labels": batch[label]},
            batched=True,
            remove_columns=data.column_names,
            desc="Tokenizing",
        )
        collator = transformers.DataCollatorWithPadding(tokenizer)

    def model_init() -> Any:
        if options.from_scratch:
            return auto.from_config(transformers.AutoConfig.from_pretrained(options.model, **heads))
        return auto.from_pretrained(options.model, ignore_mismatched_sizes=True, **heads)

    return prepared, collator, model_init


COMMANDS: dict[str, Callable[[Sequence[str]], None]] = {"score": score}


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0, or 2 for a user's mistake, which is told without a traceback."""
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(prog="hf-dynprune", description="Dynamic data pruning for Hugging Face: tools.")
    commands = "\n".join(f"  {name:8} {command.__doc__}" for name, command in COMMANDS.items())
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = f"commands:\n{commands}\n\n`hf-dynprune COMMAND --help` explains each."
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND", help=", ".join(COMMANDS))
    command = parser.parse_args(argv[:1]).command
    try:
        COMMANDS[command](argv[1:])
    except (ValueError, TypeError, OSError) as error:
        print(f"hf-dynprune {command}: {error}", file=sys.stderr)
        return 2
    return 0
