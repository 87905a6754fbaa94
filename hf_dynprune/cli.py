"""The command `hf-dynprune`. Each subcommand imports what it needs when it is called, so that `--help` is quick."""

import argparse
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from torch import Tensor

    from .report import PruningReport

_EXIT_STATUS = "exit status: 0; 2 for a mistake in the arguments or files; 1 for any other failure"
_TABLE_FILE = "table.safetensors"  # as the recipes call it
_KEPT = ("always", "sometimes", "never")


@dataclass
class ClassificationArguments:
    """A model for image or text classification, and its data."""

    model: str = field(
        metadata={"help": "Hub id or local path of a model for image or text classification."}
    )
    dataset: str = field(metadata={"help": "Hub id or local path of a dataset."})
    dataset_config: str | None = field(
        default=None, metadata={"help": "Configuration of a dataset that has several."}
    )
    split: str = field(default="train", metadata={"help": "The split that is to be pruned."})
    image_column: str | None = field(
        default=None, metadata={"help": "Column of the images; default: the only one."}
    )
    text_column: str | None = field(
        default=None, metadata={"help": "Column of the texts; default: the only one, or text."}
    )
    label_column: str | None = field(
        default=None,
        metadata={
            "help": "Column of the labels; default: the only ClassLabel column, or label, or fine_label."
        },
    )
    from_scratch: bool = field(
        default=False, metadata={"help": "Start from random weights, as the papers do."}
    )


@dataclass
class ScoreArguments(ClassificationArguments):
    """What is scored, with what."""

    _argument_group_name = "model, data and scores"

    method: str = field(
        kw_only=True,
        metadata={
            "help": "el2n, grand, grand-last-layer, forgetting, loss, margin or entropy; high is hard with each."
        },
    )
    runs: int | None = field(
        default=None, metadata={"help": "Runs to combine; default: as published."}
    )
    epochs: int | None = field(
        default=None, metadata={"help": "Epochs before scoring; default: as published."}
    )
    json: bool = field(
        default=False, metadata={"help": "Print JSON: the file, and what the scores cost."}
    )


def score(argv: Sequence[str]) -> None:
    """Scores a dataset for static pruning, into <output_dir>/scores.safetensors."""
    options, args = _parse_with_trainer(
        "score",
        "Scores the samples of a dataset for StaticPruning: trains on all data, then scores. All arguments of the Trainer\n"
        "are there; `num_train_epochs` is the run whose learning rates the scoring follows. Finished runs are kept.",
        "hf-dynprune score --method el2n --model microsoft/resnet-18 --dataset uoft-cs/cifar10 --from_scratch True \\\n"
        "    --output_dir scores",
        ScoreArguments,
        argv,
    )
    from . import distributed
    from .static import SCORES_FILE, score_dataset

    args.remove_unused_columns = False
    data, collator, model_init = _classification(options)
    folder = Path(args.output_dir or ".")
    with redirect_stdout(
        sys.stderr if options.json else sys.stdout
    ):  # where the Trainer writes its logs
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
    if distributed.world()[0] != 0:
        return
    if options.json:
        print(
            json.dumps(
                {"file": str(folder / SCORES_FILE), "method": options.method, **scores.provenance},
                indent=2,
            )
        )
    else:
        print(
            f"{options.method} of {len(scores):,} samples, at the price of {scores.provenance['passes']:,.0f} passes.\n"
            f'Use it: StaticPruning("{folder / SCORES_FILE}", keep_ratio=0.5)'
        )


def _parse_with_trainer(
    command: str, description: str, examples: str, options: type, argv: Sequence[str]
) -> tuple[Any, Any]:
    """The options and the Trainer's arguments."""
    from transformers import HfArgumentParser, TrainingArguments

    shown = _parser(command, description, examples)
    groups: Any = (options, TrainingArguments)
    parser = HfArgumentParser(
        groups,
        prog=shown.prog,
        description=shown.description,
        epilog=shown.epilog,
        formatter_class=shown.formatter_class,
    )
    return parser.parse_args_into_dataclasses(args=list(argv))  # type: ignore[return-value]


def _classification(options: ClassificationArguments) -> tuple[Any, Any, Callable]:
    """(dataset, collator, model_init) of image or text classification, as the columns of the dataset say."""
    import datasets
    import transformers

    from .data import class_names, find_column, load_splits

    data, _ = load_splits(options.dataset, options.dataset_config, train=options.split)
    label = find_column(data.features, "label", options.label_column)
    names = class_names(data, label)
    heads = {
        "id2label": dict(enumerate(names)),
        "label2id": {name: i for i, name in enumerate(names)},
    }
    if any(isinstance(feature, datasets.Image) for feature in data.features.values()):
        column = find_column(data.features, "image", options.image_column)
        processor = transformers.AutoImageProcessor.from_pretrained(options.model)

        def prepare(batch: dict[str, list]) -> dict[str, Any]:
            pixels = processor(
                [image.convert("RGB") for image in batch[column]], return_tensors="pt"
            )
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


@dataclass
class AdviseArguments(ClassificationArguments):
    """What is advised on, and how."""

    _argument_group_name = "model, data and advice"

    eval_split: str | None = field(
        default=None,
        metadata={
            "help": "The split that the run evaluates on, with --eval_strategy; default: validation, else test."
        },
    )
    batches: int = field(
        default=20, metadata={"help": "Train so many batches, or more, for 5 s; at least 4."}
    )
    json: bool = field(
        default=False,
        metadata={"help": "Print JSON: findings, what was measured, and the predictions."},
    )


def advise(argv: Sequence[str]) -> None:
    """Should I prune, and how much? Predicts what a run would take, on all data and pruned."""
    options, args = _parse_with_trainer(
        "advise",
        "Should I prune, and how much? Trains and evaluates some batches, and predicts from these what the whole run would\n"
        "take, on all data and pruned, and where its time would go. All arguments of the Trainer are there: give those of\n"
        "the run. Nothing is written.",
        "hf-dynprune advise --model microsoft/resnet-18 --dataset uoft-cs/cifar10 --num_train_epochs 20\n"
        "hf-dynprune advise --model distilbert-base-uncased --dataset path/to/texts --eval_strategy epoch --json",
        AdviseArguments,
        argv,
    )
    import tempfile

    from transformers import Trainer

    from . import distributed
    from .advice import advise as advise_on
    from .data import load_splits

    args.remove_unused_columns = False
    data, collator, model_init = _classification(options)
    evaluation = None
    if args.eval_on_start or args.eval_strategy != "no":
        _, split = load_splits(
            options.dataset,
            options.dataset_config,
            train=options.split,
            evaluation=options.eval_split,
        )
        if split is None:
            raise ValueError(
                f"The dataset {options.dataset!r} has no split to evaluate on: name one (--eval_split), or leave "
                "--eval_strategy out."
            )
        evaluation, _, _ = _classification(replace(options, split=str(split.split)))
    with tempfile.TemporaryDirectory() as scratch:
        if not Path(args.output_dir).is_dir():  # the Trainer would make it
            args.output_dir = scratch
        advice = advise_on(
            Trainer(
                model_init=model_init,
                args=args,
                train_dataset=data,
                eval_dataset=evaluation,
                data_collator=collator,
            ),
            batches=options.batches,
        )
    if distributed.world()[0] == 0:
        print(json.dumps(advice.to_dict(), indent=2) if options.json else advice)


def report(argv: Sequence[str]) -> None:
    """Shows what runs cost and reached, from their report.json: one in full, several side by side."""
    parser = _parser(
        "report",
        "Shows what a run cost, what it reached and how often it kept its samples; of several runs a table, a row each.",
        "hf-dynprune report runs/ucb\n"
        "hf-dynprune report runs/full/report.json runs/ucb/report.json --metric eval_loss\n"
        "hf-dynprune report runs/* --json",
    )
    parser.add_argument(
        "files",
        nargs="+",
        type=Path,
        metavar="FILE",
        help="report.json of a run, or the folder it is in",
    )
    parser.add_argument(
        "--metric",
        help="what is shown of the last evaluation; default of several runs: eval_accuracy, else eval_loss",
    )
    parser.add_argument(
        "--json",
        action="store_true",
        help="print JSON: a list with the file and the report of each run, without its epochs",
    )
    options = parser.parse_args(argv)
    from .report import PruningReport

    files = [_report_file(path) for path in options.files]
    runs = [PruningReport.load(file) for file in files]
    for file, run in zip(files, runs, strict=True):
        if options.metric is not None and options.metric not in run.metrics:
            raise ValueError(
                f"{file} has no metric {options.metric!r}; it has {', '.join(run.metrics) or 'none'}."
            )
    if options.json:
        about = [{k: v for k, v in run.to_dict().items() if k != "epochs"} for run in runs]
        print(
            json.dumps(
                [{"file": str(file), **of} for file, of in zip(files, about, strict=True)], indent=2
            )
        )
    elif len(runs) == 1:
        _print_summary(files[0], runs[0], options.metric)
    else:
        default = next(
            (m for m in ("eval_accuracy", "eval_loss") if all(m in run.metrics for run in runs)),
            None,
        )
        names = [_name_of(file) for file in files]
        if len(set(names)) < len(names):
            names = [str(path) for path in options.files]
        _print_comparison(names, runs, options.metric or default)


def _parser(command: str, description: str, examples: str) -> argparse.ArgumentParser:
    indented = "\n".join(f"  {line}" for line in examples.splitlines())
    return argparse.ArgumentParser(
        prog=f"hf-dynprune {command}",
        description=description,
        epilog=f"examples:\n{indented}\n\n{_EXIT_STATUS}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def _report_file(path: Path) -> Path:
    file = path / "report.json" if path.is_dir() else path
    if not file.is_file():
        raise FileNotFoundError(
            f"{file} does not exist: wanted is the report.json of a run, or the folder that it is in."
        )
    return file


def _name_of(path: Path) -> str:
    """The file's name, or that of the folder where the file is called report.json, as those of all runs are."""
    path = path.resolve()
    return path.parent.name if path.name == "report.json" else path.name.removesuffix(".json")


def _print_summary(file: Path, run: "PruningReport", metric: str | None) -> None:
    totals, selection, environment = run.totals, run.selection, run.environment
    counts = ", ".join(
        f"{totals[f'{kind}_passes']:,} {kind}" for kind in ("forward", "backward", "scoring")
    )
    speed = ("_runtime", "_per_second", "_time")
    metrics = [
        name for name in run.metrics if (name == metric if metric else not name.endswith(speed))
    ]
    versions = {
        "hf_dynprune": environment.get("hf_dynprune", "unknown"),
        **environment.get("versions", {}),
    }
    lines = {
        "policy": _policy(run.policy),
        "seed": f"{run.seed}"
        + (f", of the order {run.data_seed}" if run.data_seed != run.seed else ""),
        "cost": f"{run.cost_ratio:.4f} of the full run of {run.num_epochs:g} epochs",
        "passes": f"{run.passes:,.0f}, {run.passes / run.num_samples:.2f} over {run.num_samples:,} samples ({counts})",
        "optimizer steps": f"{totals['optimizer_steps']:,}",
        "seconds": ", ".join(
            f"{phase} {seconds:,.1f}" for phase, seconds in totals["seconds"].items()
        ),
        "last metrics": ", ".join(f"{name} {_metric(name, run.metrics[name])}" for name in metrics)
        or "none",
    }
    if selection.get("choices"):
        kept, chance = (
            ", ".join(f"{kind} {100 * shares[kind]:.2f} %" for kind in _KEPT)
            for shares in (selection, selection["chance_shares"])
        )
        lines["kept"] = f"{kept} (choices: {selection['choices']})"
        lines["kept by chance"] = chance
    if run.preparation:
        charged = "charged above" if run.preparation.get("charged") else "not charged"
        spent = f"{run.preparation.get('passes', 0):,.0f} passes, {run.preparation.get('seconds', 0):,.1f} seconds"
        lines["preparation"] = f"{run.preparation.get('method', 'scores')}: {spent}, {charged}"
    if totals["nonfinite"]:
        samples = ", ".join(map(str, run.nonfinite_samples[:10])) + (
            " ..." if len(run.nonfinite_samples) > 10 else ""
        )
        lines["non-finite"] = (
            f"{totals['nonfinite']:,} losses were NaN or infinite, of the samples {samples}"
        )
    if run.resumed:
        lines["resumed"] = "; ".join(
            f"in epoch {at['epoch']} at step {at['step']:,}"
            + (", without scores" if at.get("stock_checkpoint") else "")
            for at in run.resumed
        )
    lines["hardware"] = f"{environment.get('ranks', 1)} × {environment.get('device', 'unknown')}"
    lines["versions"] = ", ".join(f"{package} {version}" for package, version in versions.items())
    print(file)
    for label, text in lines.items():
        print(f"  {label:16} {text}")


def _print_comparison(
    names: Sequence[str], runs: Sequence["PruningReport"], metric: str | None
) -> None:
    from .plots import spent

    header = [
        "run",
        metric or "metric",
        "cost",
        "passes/N",
        "epochs",
        "steps",
        "seconds",
        *_KEPT,
        "policy",
    ]
    rows = [header]
    for name, run in zip(names, runs, strict=True):
        shares = [
            f"{100 * run.selection[kind]:.1f} %" if run.selection.get("choices") else "-"
            for kind in _KEPT
        ]
        rows.append(
            [
                name,
                _metric(metric, run.metrics[metric]) if metric else "-",
                f"{run.cost_ratio:.3f}",
                f"{run.passes / run.num_samples:.2f}",
                f"{run.num_epochs:g}",
                f"{run.totals['optimizer_steps']:,}",
                f"{spent(run, 'seconds')[-1]:,.1f}" if run.epochs else "-",
                *shares,
                _policy(run.policy),
            ]
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for name, *numbers, policy in rows:
        right = (number.rjust(width) for number, width in zip(numbers, widths[1:-1], strict=True))
        print("  ".join([name.ljust(widths[0]), *right, policy]))
    print(
        "cost: against the full run of the same epochs; seconds: without evaluation; both with charged preparation"
    )


def _policy(fields_of: Mapping[str, Any]) -> str:
    """Name and fields of a policy; without the fields at their defaults, where these are known, but for keep_ratio."""
    from .policies import POLICIES, PruningPolicy

    defaults = {f.name: f.default for f in fields(POLICIES.get(fields_of["name"], PruningPolicy))}
    shown = {
        name: value
        for name, value in fields_of.items()
        if name not in ("name", "digest")
        and (
            json.dumps(value) != json.dumps(defaults.get(name), default=str)
            or (name == "keep_ratio" and value)
        )
    }
    settings = ", ".join(f"{name}={value!r}" for name, value in shown.items())
    return f"{fields_of['name']}({settings})" if settings else fields_of["name"]


def _metric(name: str, value: float) -> str:
    from .report import in_percent

    return f"{100 * value:.2f} %" if in_percent(name, [value]) else f"{value:.4g}"


def plot(argv: Sequence[str]) -> None:
    """Draws runs from their report.json, and the samples that a run kept from its table."""
    options = _plot_parser().parse_args(argv)
    file = options.output or Path(f"{options.kind}.png")
    if file.suffix not in (".png", ".pdf", ".svg"):
        raise ValueError(f"--output {file}: wanted is a file that ends in .png, .pdf or .svg.")
    from . import plots

    if options.kind == "runs":
        figure = plots.plot_runs(
            _by_name(options.files, options.name), options.metric, options.against
        )
    elif options.kind == "selection":
        figure = plots.plot_selection(_by_name(options.files, options.name))
    elif options.kind == "scores":
        figure = plots.plot_scores(plots.PruningReport.load(_report_file(options.file)))
    else:
        figure = _plot_data(options)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=150)
    print(f"Written to {file}.")


def _plot_parser() -> argparse.ArgumentParser:
    parser = _parser(
        "plot", "Draws runs, and which samples they kept.", "hf-dynprune plot runs --help"
    )
    output = argparse.ArgumentParser(add_help=False)
    output.add_argument(
        "--output",
        type=Path,
        metavar="FILE",
        help=".png, .pdf or .svg; default: KIND.png; overwritten",
    )
    several = argparse.ArgumentParser(add_help=False)
    several.add_argument(
        "files",
        nargs="+",
        type=Path,
        metavar="FILE",
        help="report.json of a run, or the folder it is in",
    )
    several.add_argument(
        "--name",
        nargs="+",
        help="names for the legend, as many as files; default: those of the files, or of the folders of a report.json. "
        "Runs of one name, which must differ in the seed alone, are drawn as one: their mean, lowest and highest",
    )
    data = argparse.ArgumentParser(add_help=False)
    data.add_argument(
        "run",
        type=Path,
        metavar="RUN",
        help=f"folder of a run with {_TABLE_FILE} and report.json, or a checkpoint of it, or the file in one of them. The "
        f'recipes write the table; else: trainer.pruner.table.save("{_TABLE_FILE}"), beside report.json',
    )
    data.add_argument(
        "--dataset", required=True, help="Hub id or local path of the dataset that was trained on"
    )
    data.add_argument("--dataset_config", help="configuration of a dataset that has several")
    data.add_argument(
        "--split",
        default="train",
        help="what was trained on, in that order, such as train or train[:20%%]",
    )
    data.add_argument(
        "--label_column", help="default: the only ClassLabel column, or label, or fine_label"
    )
    kinds = parser.add_subparsers(dest="kind", required=True, metavar="KIND", title="kinds")

    def kind(
        name: str, summary: str, *parents: argparse.ArgumentParser, example: str
    ) -> argparse.ArgumentParser:
        return kinds.add_parser(
            name,
            help=summary,
            description=f"Draws {summary}.",
            parents=[*parents, output],
            epilog=f"example:\n  hf-dynprune plot {name} {example}\n\n{_EXIT_STATUS}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )

    runs = kind(
        "runs",
        "what runs reached against what they had cost until then",
        several,
        example="runs/full runs/ucb --name full UCB --output comparison.png",
    )
    runs.add_argument("--metric", default="eval_accuracy", help="default: eval_accuracy")
    runs.add_argument(
        "--against",
        nargs="+",
        choices=["passes", "seconds"],
        default=["passes", "seconds"],
        help="a panel each",
    )
    kind(
        "selection",
        "how often samples were kept, beside chance",
        several,
        example="runs/random runs/ucb",
    )
    scores = kind(
        "scores", "how the scores of a run were spread, epoch by epoch", example="runs/ucb"
    )
    scores.add_argument(
        "file", type=Path, metavar="FILE", help="report.json of a run, or the folder it is in"
    )
    kind(
        "classes",
        "the share that a run kept of each class",
        data,
        example="runs/ucb --dataset uoft-cs/cifar10",
    )
    samples = kind(
        "samples",
        "images that a run kept always, sometimes and never",
        data,
        example="runs/ucb/checkpoint-1000 --dataset uoft-cs/cifar10 --output samples.pdf",
    )
    samples.add_argument("--image_column", help="default: the only one")
    return parser


def _by_name(
    paths: Sequence[Path], names: Sequence[str] | None
) -> dict[str, list["PruningReport"]]:
    from .report import PruningReport

    files = [_report_file(path) for path in paths]
    names = [_name_of(file) for file in files] if names is None else names
    if len(names) != len(files):
        raise ValueError(
            f"--name gives {len(names)} names for {len(files)} files: wanted is one for each, in their order."
        )
    runs: dict[str, list[PruningReport]] = {}
    for name, file in zip(names, files, strict=True):
        runs.setdefault(name, []).append(PruningReport.load(file))
    return runs


def _plot_data(options: argparse.Namespace) -> "Figure":
    from . import plots
    from .data import class_names, find_column, load_splits

    times, choices = _times_kept(options.run)
    data, _ = load_splits(options.dataset, options.dataset_config, train=options.split)
    label = find_column(data.features, "label", options.label_column)
    if options.kind == "classes":
        return plots.plot_classes(times, choices, data[label][:], class_names(data, label))
    return plots.plot_samples(
        times, choices, data, image_column=options.image_column, label_column=label
    )


def _times_kept(path: Path) -> tuple["Tensor", int]:
    """Of each sample how often it was kept, and the number of choices."""
    from .pruner import STATE_FILE
    from .report import PruningReport
    from .scores import SampleTable, load_tensors

    if path.is_dir():
        found = [path / name for name in (_TABLE_FILE, STATE_FILE) if (path / name).is_file()]
        if not found:
            raise FileNotFoundError(
                f"{path} holds neither {_TABLE_FILE} nor {STATE_FILE}: wanted is the folder of a run that has its table, "
                "or of a checkpoint."
            )
        path = found[0]
    if path.name == STATE_FILE:
        tensors, metadata = load_tensors(path)
        return tensors["table.times_kept"], len(metadata["sizes"])
    times, file = SampleTable.load(path)["times_kept"], _report_file(path.parent)
    selection = PruningReport.load(file).selection
    if times.bincount(minlength=selection["choices"] + 1).tolist() != selection["histogram"]:
        raise ValueError(
            f"{path} and {file} are not of the same run: save the table of the run that the report tells of."
        )
    return times, selection["choices"]


def card(argv: Sequence[str]) -> None:
    """Writes the model card of a run from its report.json, or from those of several seeds."""
    parser = _parser(
        "card",
        "Writes the model card of a run from its report alone; of several seeds with the spread of the results.",
        "hf-dynprune card runs/ucb/report.json --output README.md\n"
        "hf-dynprune card runs/seed_*/ucb.json --full runs/seed_*/full.json --short runs/seed_*/short.json \\\n"
        "    --dataset uoft-cs/cifar10 --task image-classification --output README.md --picture pruning.png\n"
        "hf-dynprune card runs/ucb --full runs/full --json",
    )
    reports: dict[str, Any] = {"nargs": "+", "type": Path, "metavar": "FILE"}
    parser.add_argument(
        "files",
        **reports,
        help="report.json of the run, or the folder it is in; of each of its seeds",
    )
    parser.add_argument("--full", default=[], **reports, help="of the full run, to compare with")
    parser.add_argument(
        "--short",
        default=[],
        **reports,
        help="of the short run, to compare with: all data, fewer epochs",
    )
    parser.add_argument(
        "--output", type=Path, metavar="FILE", help="where the card goes; default: it is printed"
    )
    parser.add_argument(
        "--picture",
        type=Path,
        metavar="FILE",
        help="draw a picture to this file, and show it in the card",
    )
    parser.add_argument(
        "--name",
        help="the title; default: that of the first file, or of the folder of a report.json",
    )
    parser.add_argument(
        "--dataset",
        help="id on the Hub, or name in words; with a task the results are in the metadata",
    )
    parser.add_argument("--task", help="such as image-classification")
    parser.add_argument(
        "--library", help="that loads the model, for the Hub's snippets: transformers, timm or peft"
    )
    parser.add_argument("--command", help="the command line that trains it, for the card")
    parser.add_argument(
        "--json",
        action="store_true",
        help="print what the card would tell as JSON, and write no card",
    )
    options = parser.parse_args(argv)
    from huggingface_hub import ModelCardData

    from .model_card import card_of_report, eval_results, facts_of, metrics_of, picture_of
    from .report import PruningReport

    runs, full, short = (
        [PruningReport.load(_report_file(path)) for path in paths]
        for paths in (options.files, options.full, options.short)
    )
    facts = facts_of(runs, full=full, short=short)
    if options.json:
        print(json.dumps(facts, indent=2))
        return
    metrics = metrics_of(facts["results"])
    data = ModelCardData(
        model_name=options.name or _name_of(options.files[0]),
        library_name=options.library,
        pipeline_tag=options.task,
        datasets=[options.dataset] if options.dataset and options.dataset.count("/") == 1 else None,
        metrics=list(metrics) or None,
        eval_results=eval_results(metrics, options.task, options.dataset)
        if options.task and options.dataset
        else None,
    )
    figure = picture_of(runs, full=full, short=short) if options.picture else None
    if options.picture and figure is None:
        raise ValueError(
            "There is nothing to draw for --picture: the run left no samples out, and no metric to compare by is in all of "
            "the reports. Leave it out."
        )
    text = card_of_report(
        runs,
        data,
        full=full,
        short=short,
        origin=f"This model was trained on {options.dataset}." if options.dataset else "",
        command=options.command or "",
        picture=Path(os.path.relpath(options.picture, (options.output or Path()).parent)).as_posix()
        if figure
        else "",
    )
    if figure is not None:
        figure.savefig(options.picture, dpi=100)
    if options.output:
        text.save(options.output)
    else:
        print(text)


COMMANDS: dict[str, Callable[[Sequence[str]], None]] = {
    "score": score,
    "advise": advise,
    "report": report,
    "plot": plot,
    "card": card,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0; 2 for a user's mistake, and 1 for a package that is missing, told without a traceback.

    What else is raised is a failure, with its traceback. As usual, 130 after Ctrl-C, 141 where nobody reads what is printed.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(
        prog="hf-dynprune", description="Dynamic data pruning for Hugging Face: tools."
    )
    commands = "\n".join(f"  {name:8} {command.__doc__}" for name, command in COMMANDS.items())
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = (
        f"commands:\n{commands}\n\n`hf-dynprune COMMAND --help` explains each.\n\n{_EXIT_STATUS}"
    )
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND", help=", ".join(COMMANDS))
    command = parser.parse_args(argv[:1]).command
    try:
        COMMANDS[command](argv[1:])
        sys.stdout.flush()  # here, not at Python's end, where an error would be printed
    except BrokenPipeError:  # as with `| head`
        os.dup2(
            os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno()
        )  # for what is still to be flushed
        return 141
    except KeyboardInterrupt:
        print(f"hf-dynprune {command}: interrupted", file=sys.stderr)
        return 130
    except ImportError as error:
        print(f"hf-dynprune {command}: {error}", file=sys.stderr)
        return 1
    except (ValueError, TypeError, OSError) as error:
        print(f"hf-dynprune {command}: {error}", file=sys.stderr)
        return 2
    return 0
