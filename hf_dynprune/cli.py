"""The command `hf-dynprune`. Each subcommand imports what it needs when it is called, so that
`--help` is quick."""

import argparse
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import MISSING, dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from . import __version__

if TYPE_CHECKING:
    from datasets import Dataset
    from matplotlib.figure import Figure
    from torch import Tensor

    from .report import PruningReport

_EXIT_STATUS = "exit status: 0; 2 for a mistake in the arguments or files; 1 for any other failure"
_REPORT_HELP = "report.json of a run, or its folder"
_SHARES = ("eff.share", "G")  # columns of `report`, if a run has them
# More columns, if a run has rollouts.
_BILL = ("rollouts", "tokens", "reward calls", "s generating", "s training")
_LABEL_HELP = "Column of the labels; default: the only ClassLabel column, else label or fine_label."


class _Parser(argparse.ArgumentParser):
    """Says what is wrong before it shows the usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n\n{self.format_usage()}")


def _option(text: str, default: Any = None, **more: Any) -> Any:
    """A field with a help text, for HfArgumentParser."""
    return field(default=default, metadata={"help": text}, **more)


def _required(text: str, **more: Any) -> Any:
    return field(metadata={"help": text}, **more)


@dataclass
class ClassificationArguments:
    """A model for image or text classification, and its data."""

    model: str = _required("Hub id or local path of a model for image or text classification.")
    dataset: str = _required("Hub id or local path of a dataset.")
    dataset_config: str | None = _option("Configuration of a dataset that has several.")
    split: str = _option("The training split.", "train")
    image_column: str | None = _option("Column of the images; default: the only one.")
    text_column: str | None = _option("Column of the texts; default: the only one, else text.")
    label_column: str | None = _option(_LABEL_HELP)
    from_scratch: bool = _option("Start from random weights, as the papers do.", False)


@dataclass
class ScoreArguments(ClassificationArguments):
    """What is scored, and how."""

    _argument_group_name = "model, data and scores"

    method: str = _required(
        "el2n, grand, grand-last-layer, forgetting, loss, margin or entropy. High scores are hard.",
        kw_only=True,
    )
    runs: int | None = _option("Runs to combine; default: as published.")
    epochs: int | None = _option("Epochs before scoring; default: as published.")
    json: bool = _option("Print JSON: the file, and what the scores cost.", False)


@dataclass
class AdviseArguments(ClassificationArguments):
    """What to advise on, and how."""

    _argument_group_name = "model, data and advice"

    eval_split: str | None = _option(
        "Split to evaluate on, if --eval_strategy is set; default: validation, else test."
    )
    after: str | None = _option(
        "A finished run on the same data, best a short one: its report.json, its folder, or that "
        "of a checkpoint. The advice then says whether to prune, by which rule, at which ratio."
    )
    same_data: bool = _option(
        "The data are those of --after, although columns or files differ: do not compare them.",
        False,
    )
    log: str | None = _option(
        "Alone: the trainer_state.json of a run of trl's GRPOTrainer or RLOOTrainer, with any or "
        "no pruning. The advice then says what choosing prompts could save."
    )
    batches: int = _option("Batches to train at least, for at least 5 s; 4 or more.", 20)
    json: bool = _option("Print JSON: findings, measurements and predictions.", False)


# ---- score and advise ----------------------------------------------------------------------------


def score(argv: Sequence[str]) -> None:
    """Score a dataset for static pruning. Writes <output_dir>/scores.safetensors."""
    options, args = _parse_with_trainer(
        "score",
        "Scores the samples of a dataset for StaticPruning: trains on all data, then scores.\n"
        "Takes all arguments of the Trainer. `num_train_epochs` is the length of the run whose\n"
        "learning rates the scoring follows. Finished runs are kept and not repeated.",
        "hf-dynprune score --method el2n --model microsoft/resnet-18 --dataset uoft-cs/cifar10 \\\n"
        "    --from_scratch True --output_dir scores",
        ScoreArguments,
        argv,
    )
    from . import distributed
    from .data import classification
    from .files import SCORES_FILE
    from .scoring_runs import check_method, score_dataset

    check_method(options.method)
    _check_model(options.model)
    args.remove_unused_columns = False
    data, collator, model_init = classification(options)
    folder = Path(args.output_dir or ".")
    # The Trainer writes its logs to the standard output. With --json only JSON may be there.
    with redirect_stdout(sys.stderr if options.json else sys.stdout):
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
    file = str(folder / SCORES_FILE)
    if options.json:
        about = {"file": file, "method": options.method, **scores.provenance}
        _print_json(about)
    else:
        cost = f"{scores.provenance['passes']:,.0f}"
        print(f"{options.method} scores of {len(scores):,} samples. They cost {cost} passes.")
        policy = "ReferenceLoss" if options.method == "reference" else "StaticPruning"
        print(f'Use them: {policy}("{file}", keep_ratio=0.5)')


def advise(argv: Sequence[str]) -> None:
    """Should I prune, and how much? Predicts the time of a run, on all data and pruned."""
    if any(word == "--log" or word.startswith("--log=") for word in argv):
        return _advise_on_log(argv)
    options, args = _parse_with_trainer(
        "advise",
        "Should I prune, and how much? Trains and evaluates some batches. From these it predicts\n"
        "how long the whole run would take, on all data and pruned, and what takes the time.\n"
        "Takes all arguments of the Trainer: give those of the run. Nothing is written.",
        "hf-dynprune advise --model microsoft/resnet-18 --dataset uoft-cs/cifar10 \\\n"
        "    --num_train_epochs 20\n"
        "hf-dynprune advise --model microsoft/resnet-18 --dataset uoft-cs/cifar10 \\\n"
        "    --num_train_epochs 20 --after runs/short\n"
        "hf-dynprune advise --log runs/grpo/checkpoint-500/trainer_state.json\n"
        "hf-dynprune advise --model distilbert-base-uncased --dataset path/to/texts \\\n"
        "    --eval_strategy epoch --json",
        AdviseArguments,
        argv,
    )
    import tempfile

    from transformers import Trainer

    from . import distributed
    from .advice import advise as advise_on
    from .advice import finished_run
    from .data import classification

    if options.same_data and options.after is None:
        raise ValueError("--same_data is about the run of --after, and none is given.")
    _check_model(options.model)
    args.remove_unused_columns = False
    data, collator, model_init = classification(options)
    if options.same_data:
        report, _ = finished_run(options.after)
        known: Any = data
        known.pruning_fingerprint = report.provenance.get("dataset", {}).get("fingerprint")
    evaluation = None
    if args.eval_on_start or args.eval_strategy != "no":
        evaluation, _, _ = classification(replace(options, split=_evaluation_split(options)))
    with tempfile.TemporaryDirectory() as scratch:
        if not Path(args.output_dir).is_dir():  # else the Trainer would make the folder
            args.output_dir = scratch
        trainer = Trainer(
            model_init=model_init,
            args=args,
            train_dataset=data,
            eval_dataset=evaluation,
            data_collator=collator,
        )
        advice = advise_on(trainer, batches=options.batches, after=options.after)
    if distributed.world()[0] == 0:
        if options.json:
            _print_json(advice.to_dict())
        else:
            print(advice)


def _advise_on_log(argv: Sequence[str]) -> None:
    """What choosing prompts could save, from the log of a run of reinforcement learning."""
    parser = _parser(
        "advise",
        "What could choosing prompts save? Reads the log of trl's GRPOTrainer or RLOOTrainer.",
        "hf-dynprune advise --log runs/grpo/checkpoint-500/trainer_state.json",
    )
    text = "trainer_state.json of a checkpoint, or the folder of the checkpoint"
    parser.add_argument("--log", type=Path, required=True, metavar="FILE", help=text)
    _add_flag(parser, "--json", "print JSON")
    options = parser.parse_args(argv)
    from .escape import printable
    from .potential import read_rollout_log

    found = read_rollout_log(options.log)
    if options.json:
        _print_json(found.to_dict())
    else:
        print(f"{printable(options.log)}\n{found}")


def _check_model(name: str) -> None:
    """Raise OSError or ValueError unless there is such a model. Only its config is read."""
    from transformers import AutoConfig

    # A Hub id is `name` or `owner/name`. A name that looks different must be a path.
    is_path = name.startswith((".", "/", "~")) or name.count("/") > 1 or "\\" in name
    if is_path and not Path(name).expanduser().is_dir():
        raise FileNotFoundError(
            f"The model {name!r} is neither an existing folder nor a Hub id (owner/name): check "
            "the path."
        )
    try:
        AutoConfig.from_pretrained(name)
    except OSError as error:
        raise FileNotFoundError(f"The model {name!r} cannot be loaded: {error}") from error


def _evaluation_split(options: AdviseArguments) -> str:
    from .data import load_splits

    name, config = options.dataset, options.dataset_config
    _, split = load_splits(name, config, train=options.split, evaluation=options.eval_split)
    if split is None:
        raise ValueError(
            f"The dataset {name!r} has no split to evaluate on: name one with --eval_split, or "
            "leave out --eval_strategy."
        )
    return str(split.split)


def _parse_with_trainer(
    command: str, description: str, examples: str, options: type, argv: Sequence[str]
) -> tuple[Any, Any]:
    """The options and the Trainer's arguments."""
    from transformers import HfArgumentParser, TrainingArguments

    from .checks import did_you_mean

    class Parser(_Parser, HfArgumentParser):
        pass

    shown = _parser(command, description, examples)
    groups: Any = (options, TrainingArguments)
    own = [entry for entry in fields(options) if entry.init]
    needed = [entry.name for entry in own if entry.default is MISSING]
    usage = " ".join(f"--{name} {name.upper()}" for name in needed)
    parser = Parser(
        groups,
        prog=shown.prog,
        usage=f"%(prog)s {usage} [options, also the Trainer's: --help lists them]",
        description=shown.description,
        epilog=shown.epilog,
        formatter_class=shown.formatter_class,
    )
    parsed: Any = parser.parse_args_into_dataclasses(list(argv), return_remaining_strings=True)
    *found, unknown = parsed
    if unknown:
        known = [f"--{entry.name}" for group in groups for entry in fields(group)]
        near = did_you_mean(unknown[0], known).rstrip()
        parser.error(f"unknown argument {unknown[0]!r}{near and ': '}{near}")
    settings, args = found
    return settings, args


# ---- report --------------------------------------------------------------------------------------


def report(argv: Sequence[str]) -> None:
    """Show the cost and the results of runs from their reports."""
    parser = _parser(
        "report",
        "Shows what a run cost, what it reached and how often it kept its samples.\n"
        "Of several runs it shows a table with one row per run. Their cost has one denominator:\n"
        "the passes of a full run with as many epochs as the longest run, or as --full.",
        "hf-dynprune report runs/ucb\n"
        "hf-dynprune report runs/short runs/ucb --full runs/full\n"
        "hf-dynprune report runs/full/report.json runs/ucb/report.json --metric eval_loss\n"
        "hf-dynprune report runs/* --json",
    )
    _add_reports(parser, "files", _REPORT_HELP)
    parser.add_argument(
        "--metric",
        help="metric of the last evaluation to show; default for several runs: eval_accuracy, else "
        "eval_reward, else eval_loss",
    )
    _add_path(parser, "--full", "report of the full run: a row of the table, with the cost 1")
    _add_flag(parser, "--json", "print a JSON list: file and report of each run, without epochs")
    options = parser.parse_args(argv)
    from .escape import printable

    files = [_report_file(path) for path in options.files]
    if options.full is not None and _report_file(options.full) not in files:
        options.files.insert(0, options.full)
        files.insert(0, _report_file(options.full))
    runs = _load(files)
    epochs, of_run = _full_epochs(options.full, files, runs)
    for file, run in zip(files, runs, strict=True):
        if options.metric is not None and options.metric not in run.metrics:
            known = ", ".join(map(repr, run.metrics)) or "none"
            raise ValueError(f"{file} has no metric {options.metric!r}; it has {known}.")
    if options.json:
        about = [
            {
                "file": str(file),
                "cost": run.cost_against(epochs),
                "cost_against_epochs": epochs,
                **run.to_dict(),
            }
            for file, run in zip(files, runs, strict=True)
        ]
        for values in about:
            del values["epochs"]
        _print_json(about)
    elif len(runs) == 1:
        print(printable(files[0]))
        for label, text in runs[0].summary(options.metric).items():
            print(f"  {label:16} {printable(text)}")
    else:
        names = [_name_of(file) for file in files]
        if len(set(names)) < len(names):
            names = [str(path) for path in options.files]
        _print_comparison(names, runs, options.metric, epochs)
        print(f"cost: passes / (N × {epochs:g}), the passes of a full run {of_run}")
        print("seconds: without evaluation; cost and seconds include charged preparation")


def _full_epochs(
    full: Path | None, files: Sequence[Path], runs: Sequence["PruningReport"]
) -> tuple[float, str]:
    """The epochs of the full run that costs are shares of, and which run they are of, in words.

    Raises:
        ValueError: If the run of `--full` is not a full run, or if another one has other data.
    """
    if full is None:
        return max(run.num_epochs for run in runs), "as long as the longest of these runs"
    given = runs[files.index(_report_file(full))]
    if given.policy["name"] != "full":
        raise ValueError(
            f"--full {full}: its policy is {given.policy['name']!r}, expected 'full', a run on all "
            "data."
        )
    for file, run in zip(files, runs, strict=True):
        if run.num_samples != given.num_samples:
            raise ValueError(
                f"{file} has {run.num_samples:,} samples, --full {full} has "
                f"{given.num_samples:,}: expected runs on the same data."
            )
    return given.num_epochs, "as long as --full"


def _print_comparison(
    names: Sequence[str], runs: Sequence["PruningReport"], metric: str | None, epochs: float
) -> None:
    from .escape import printable
    from .report import KEPT, shown_metric, shown_policy

    metric = metric or _usual_metric(runs)
    numbers = ["cost", "passes/N", "epochs", "steps", "seconds"]
    measured = _SHARES if any(run.effective_share is not None for run in runs) else ()
    bill = _BILL if any(run.rolled_out for run in runs) else ()
    rows = [["run", metric or "metric", *numbers, *bill, *KEPT, *measured, "policy"]]
    for name, run in zip(names, runs, strict=True):
        chose = run.selection.get("choices")
        rows.append(
            [
                name,
                shown_metric(metric, run.metrics[metric]) if metric else "-",
                f"{run.cost_against(epochs):.3f}",
                f"{run.passes / run.num_samples:.2f}",
                f"{run.num_epochs:g}",
                f"{run.totals['optimizer_steps']:,}",
                f"{run.spent_seconds:,.1f}" if run.epochs else "-",
                *(_bill(run) if bill else ()),
                *(f"{100 * run.selection[kind]:.1f} %" if chose else "-" for kind in KEPT),
                *(_shares(run) if measured else ()),
                shown_policy(run.policy),
            ]
        )
    rows = [[printable(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for first, *middle, last in rows:
        right = [text.rjust(width) for text, width in zip(middle, widths[1:-1], strict=True)]
        print("  ".join([first.ljust(widths[0]), *right, last]))
    if measured:
        print("eff.share: effective share of the data, last measured; G: mean of 1 / eff.share")


def _usual_metric(runs: Sequence["PruningReport"]) -> str | None:
    """The first usual metric that all runs have."""
    usual = ("eval_accuracy", "eval_reward", "eval_loss")
    return next((name for name in usual if all(name in run.metrics for run in runs)), None)


def _bill(run: "PruningReport") -> tuple[str, ...]:
    """The cells under `_BILL`."""
    totals = run.totals
    if "rollouts" not in totals:
        return ("-",) * len(_BILL)
    counts = (totals["rollouts"][name] for name in ("completions", "tokens", "reward_calls"))
    seconds = (totals["seconds"][name] for name in ("generation", "training"))
    return (*(f"{count:,}" for count in counts), *(f"{value:,.1f}" for value in seconds))


def _shares(run: "PruningReport") -> tuple[str, ...]:
    """The cells under `_SHARES`."""
    if run.effective_share is None or run.gain is None:  # older than the number, or without losses
        return ("-", "-")
    return (f"{run.effective_share:.3f}", f"{run.gain:.2f}")


# ---- plot ----------------------------------------------------------------------------------------


def plot(argv: Sequence[str]) -> None:
    """Draw runs from their reports, or the samples that a run kept from its table."""
    options = _plot_parser().parse_args(argv)
    file = options.output or Path(f"{options.kind}.png")
    if file.suffix not in (".png", ".pdf", ".svg"):
        raise ValueError(f"--output {file}: expected a file that ends in .png, .pdf or .svg.")
    from . import plots

    if options.kind == "runs":
        runs = _by_name(options.files, options.name)
        usual = _usual_metric([run for seeds in runs.values() for run in seeds])
        metric = options.metric or ("eval_reward" if usual == "eval_reward" else "eval_accuracy")
        figure = plots.plot_runs(runs, metric, options.against)
    elif options.kind == "selection":
        figure = plots.plot_selection(_by_name(options.files, options.name))
    elif options.kind == "potential":
        figure = plots.plot_potential(_by_name(options.files, options.name))
    elif options.kind == "scores":
        figure = plots.plot_scores(*_load([options.file]))
    else:
        figure = _plot_data(options)
    file.parent.mkdir(parents=True, exist_ok=True)
    plots.save_picture(figure, file, dpi=150)
    print(f"Wrote {file}.")


def _plot_parser() -> argparse.ArgumentParser:
    parser = _parser(
        "plot", "Draws runs and the samples they kept.", "hf-dynprune plot runs --help"
    )
    several = argparse.ArgumentParser(add_help=False)
    _add_reports(several, "files", _REPORT_HELP)
    several.add_argument(
        "--name",
        nargs="+",
        help="one name per file, for the legend; default: the name of the file, or of the folder "
        "of a report.json. Runs with the same name must differ only in their seed. They are "
        "drawn as one: mean, lowest and highest",
    )
    data = argparse.ArgumentParser(add_help=False)
    data.add_argument(
        "run",
        type=Path,
        metavar="RUN",
        help="folder of a run with table.safetensors and report.json, or a checkpoint, or the file "
        "with the table. The recipes write the table. Elsewhere save it beside the report with "
        'trainer.pruner.table.save("table.safetensors")',
    )
    data.add_argument("--dataset", required=True, help="Hub id or local path of the training data")
    data.add_argument("--dataset_config", help="configuration of a dataset that has several")
    data.add_argument(
        "--split", default="train", help="the training rows in order, such as train or train[:20%%]"
    )
    data.add_argument("--label_column", help=_LABEL_HELP)
    _add_flag(
        data,
        "--other_labels",
        "draw even if no column of the dataset has the labels that the run trained on",
    )
    kinds = parser.add_subparsers(dest="kind", required=True, metavar="KIND", title="kinds")

    def kind(
        name: str, summary: str, example: str, *parents: argparse.ArgumentParser
    ) -> argparse.ArgumentParser:
        added = kinds.add_parser(
            name,
            help=summary,
            description=f"Draws {summary}.",
            parents=parents,
            epilog=f"example:\n  hf-dynprune plot {name} {example}\n\n{_EXIT_STATUS}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        _add_path(added, "--output", f".png, .pdf or .svg; default: {name}.png; overwritten")
        return added

    example = "runs/full runs/ucb --name full UCB --output comparison.png"
    runs = kind("runs", "the results of runs against their cost so far", example, several)
    text = "default: eval_accuracy, else eval_reward"
    runs.add_argument("--metric", help=text)
    costs = ["passes", "seconds", "rollouts"]
    text = "one panel each; default: passes and seconds, or rollouts and seconds of runs of RL"
    runs.add_argument("--against", nargs="+", choices=costs, help=text)
    summary = "how often samples were kept, and what chance would give"
    kind("selection", summary, "runs/random runs/ucb", several)
    summary = "the part of the data that still matters, by epoch"
    kind("potential", summary, "runs/short runs/pruned", several)
    scores = kind("scores", "the distribution of a run's scores by epoch", "runs/ucb")
    scores.add_argument("file", type=_report_file, metavar="FILE", help=_REPORT_HELP)
    example = "runs/ucb --dataset uoft-cs/cifar10"
    kind("classes", "the share of each class that a run kept", example, data)
    example = "runs/ucb/checkpoint-1000 --dataset uoft-cs/cifar10 --output samples.pdf"
    samples = kind("samples", "images that a run always, sometimes and never kept", example, data)
    samples.add_argument("--image_column", help="default: the only one")
    return parser


def _by_name(
    paths: Sequence[Path], names: Sequence[str] | None
) -> Mapping[str, Sequence["PruningReport"]]:
    files = [_report_file(path) for path in paths]
    names = [_name_of(file) for file in files] if names is None else names
    if len(names) != len(files):
        raise ValueError(
            f"--name gives {len(names)} names for {len(files)} files: expected one name per file."
        )
    runs: dict[str, list[PruningReport]] = {}
    for name, run in zip(names, _load(files), strict=True):
        runs.setdefault(name, []).append(run)
    return runs


def _plot_data(options: argparse.Namespace) -> "Figure":
    from . import plots
    from .data import class_names, find_column, load_splits

    times, choices, provenance = _times_kept(options.run)
    data, _ = load_splits(options.dataset, options.dataset_config, train=options.split)
    if len(data) == len(times) and not options.other_labels:  # other lengths are refused below
        _check_same_data(options, data, provenance.get("dataset", {}))
    label = find_column(data.features, "label", options.label_column)
    if options.kind == "classes":
        return plots.plot_classes(times, choices, data[label][:], class_names(data, label))
    return plots.plot_samples(
        times, choices, data, image_column=options.image_column, label_column=label
    )


def _check_same_data(
    options: argparse.Namespace, data: "Dataset", trained_on: Mapping[str, str]
) -> None:
    """Raise ValueError if the run trained on other labels, as far as its report tells."""
    from .identity import dataset_fingerprint
    from .provenance import has_labels

    checksum = trained_on.get("labels")
    if checksum is None or has_labels(data, checksum):
        return
    if dataset_fingerprint(data) == trained_on.get("fingerprint"):
        return
    known = (trained_on.get(name) for name in ("id", "config", "split", "fingerprint"))
    raise ValueError(
        f"The dataset {options.dataset!r} (split {options.split!r}) is not the one that "
        f"{options.run} trained on, which was {', '.join(filter(None, known))}: no column has its "
        f"labels (checksum {checksum}). Give the run's data in their order. If the run trained "
        "on labels that the dataset does not have, add --other_labels."
    )


def _times_kept(path: Path) -> tuple["Tensor", int, Mapping[str, Any]]:
    """(how often each sample was kept, number of choices, provenance) of a run or a checkpoint."""
    from .files import STATE_FILE, TABLE_FILE, load_tensors
    from .table import SampleTable

    if path.is_dir():
        names = [name for name in (TABLE_FILE, STATE_FILE) if (path / name).is_file()]
        if not names:
            raise FileNotFoundError(
                f"{path} holds neither {TABLE_FILE} nor {STATE_FILE}: expected the folder of a run "
                "that saved its table, or of a checkpoint."
            )
        path = path / names[0]
    if path.name == STATE_FILE:
        tensors, metadata = load_tensors(path)
        if "table.times_kept" not in tensors or not isinstance(metadata.get("sizes"), list):
            raise ValueError(f"{path} is not the pruning state of a checkpoint.")
        provenance = metadata.get("report", {}).get("provenance", {})
        return tensors["table.times_kept"], len(metadata["sizes"]), provenance
    times, file = SampleTable.load(path)["times_kept"], _report_file(path.parent)
    report = _load([file])[0]
    selection = report.selection
    if not selection:
        raise ValueError(f"{file} has no selection: its run made no choice.")
    choices = selection["choices"]
    fits = int(times.max()) <= choices
    if not fits or times.bincount(minlength=choices + 1).tolist() != selection["histogram"]:
        raise ValueError(
            f"{path} and {file} are not of the same run: save the table of the run in the report."
        )
    return times, choices, report.provenance


# ---- card ----------------------------------------------------------------------------------------


def card(argv: Sequence[str]) -> None:
    """Write the model card of a run from its report, or from the reports of several seeds."""
    options = _card_parser().parse_args(argv)
    _check_places(options)
    from huggingface_hub import ModelCardData

    from .model_card import (
        CardFacts,
        card_of_reports,
        eval_results,
        facts_of,
        metrics_of,
        picture_of,
        save_card,
    )
    from .plots import save_picture

    runs = _load(options.files)
    others = {"full": _load(options.full), "short": _load(options.short)}
    facts = facts_of(runs, **others)
    if options.json:
        _print_json(facts)
        return
    known, metrics = runs[0].provenance, metrics_of(facts)
    task = options.task or known.get("task")
    dataset = options.dataset or known.get("dataset", {}).get("id")
    data = ModelCardData(
        model_name=options.name or _name_of(options.files[0]),
        library_name=options.library,
        pipeline_tag=task,
        datasets=[dataset] if dataset and dataset.count("/") == 1 else None,
        metrics=list(metrics) or None,
        eval_results=eval_results(metrics, task, dataset) if task and dataset else None,
    )
    about = CardFacts(data, command=options.command or "")
    if dataset:
        about.origin = f"This model was trained on {dataset}."
    figure = picture_of(runs, **others) if options.picture else None
    if options.picture:
        if figure is None:
            raise ValueError(
                f"--picture {options.picture}: there is nothing to draw, because the run kept all "
                "samples and the reports share no metric. Leave it out."
            )
        folder = (options.output or Path()).parent
        about.picture = Path(os.path.relpath(options.picture, folder)).as_posix()
    try:
        text = card_of_reports(runs, about, **others)
    except ValueError as error:
        raise ValueError(f"{options.files[0]}: {error}") from error
    if figure is not None:
        save_picture(figure, options.picture)
    if not options.output:
        print(text)
        return
    save_card(text, options.output)
    print(f"Wrote {' and '.join(str(path) for path in (options.output, options.picture) if path)}.")


def _check_places(options: argparse.Namespace) -> None:
    """Raise ValueError or FileNotFoundError unless card and picture can be written."""
    suffixes = (".png", ".svg", ".jpg")
    if options.picture and options.picture.suffix not in suffixes:
        raise ValueError(
            f"--picture {options.picture}: expected a file that ends in {', '.join(suffixes)}."
        )
    given = (*options.files, *options.full, *options.short)
    read = [_report_file(path).resolve() for path in given]
    for name in ("output", "picture"):
        path = getattr(options, name)
        if path is None:
            continue
        if not path.parent.is_dir():  # perhaps a typing error
            raise FileNotFoundError(
                f"--{name} {path}: the folder {path.parent} does not exist. Make it first."
            )
        if path.is_dir() or path.resolve() in read:
            what = "a folder" if path.is_dir() else "one of the reports"
            raise ValueError(f"--{name} {path} is {what}: expected another file.")


def _card_parser() -> argparse.ArgumentParser:
    parser = _parser(
        "card",
        "Writes the model card of a run from its report alone. The reports of several seeds give\n"
        "results with their standard deviation.",
        "hf-dynprune card runs/ucb/report.json --output README.md\n"
        "hf-dynprune card runs/seed_*/ucb.json --full runs/seed_*/full.json \\\n"
        "    --short runs/seed_*/short.json --dataset uoft-cs/cifar10 \\\n"
        "    --task image-classification --output README.md --picture pruning.png\n"
        "hf-dynprune card runs/ucb --full runs/full --json",
    )
    _add_reports(parser, "files", f"{_REPORT_HELP}; one for each seed")
    _add_reports(parser, "--full", "the same of the full run: all data, as many epochs")
    _add_reports(parser, "--short", "the same of the short run: all data, fewer epochs")
    _add_path(parser, "--output", "where to write the card; default: print it")
    _add_path(parser, "--picture", "draw a picture to this file and show it in the card")
    for name, text in {
        "--name": "title; default: name of the first file, or of the folder of a report.json",
        "--dataset": "id on the Hub, or a name; with --task the metadata holds the results; "
        "default: that of the report",
        "--task": "such as image-classification; default: that of the report",
        "--library": "library that loads the model: transformers, timm or peft",
        "--command": "command line that repeats the run",
    }.items():
        parser.add_argument(name, help=text)
    _add_flag(parser, "--json", "print the facts of the card as JSON and write no card")
    return parser


# ---- shared --------------------------------------------------------------------------------------


def _parser(command: str, description: str, examples: str) -> argparse.ArgumentParser:
    indented = "\n".join(f"  {line}" for line in examples.splitlines())
    return _Parser(
        prog=f"hf-dynprune {command}",
        description=description,
        epilog=f"examples:\n{indented}\n\n{_EXIT_STATUS}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def _add_reports(parser: argparse.ArgumentParser, name: str, text: str) -> None:
    default: dict[str, Any] = {"default": []} if name.startswith("--") else {}
    parser.add_argument(name, nargs="+", type=Path, metavar="FILE", help=text, **default)


def _add_path(parser: argparse.ArgumentParser, name: str, text: str) -> None:
    parser.add_argument(name, type=Path, metavar="FILE", help=text)


def _add_flag(parser: argparse.ArgumentParser, name: str, text: str) -> None:
    parser.add_argument(name, action="store_true", help=text)


def _print_json(value: Any) -> None:
    from .files import json_text

    print(json_text(value, indent=2))


def _load(paths: Sequence[Path]) -> list["PruningReport"]:
    from .report import PruningReport

    return [PruningReport.load(_report_file(path)) for path in paths]


def _report_file(path: str | Path) -> Path:
    from .files import REPORT_FILE

    path = Path(path)
    file = path / REPORT_FILE if path.is_dir() else path
    if not file.is_file():
        raise FileNotFoundError(
            f"{file} does not exist: expected the {REPORT_FILE} of a run, or its folder."
        )
    return file


def _name_of(path: Path) -> str:
    """The name of the file. Of a report.json, as all runs have one, the name of its folder."""
    from .files import REPORT_FILE

    path = path.resolve()
    return path.parent.name if path.name == REPORT_FILE else path.name.removesuffix(".json")


COMMANDS: dict[str, Callable[[Sequence[str]], None]] = {
    "score": score,
    "advise": advise,
    "report": report,
    "plot": plot,
    "card": card,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return the exit status.

    0; 2 for a user's mistake and 1 for a missing package, both reported without a traceback. Other
    exceptions keep theirs. As is usual, 130 after Ctrl-C and 141 if nobody reads the output.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    commands = "\n".join(f"  {name:8} {command.__doc__}" for name, command in COMMANDS.items())
    parser = _Parser(
        prog="hf-dynprune",
        description="Tools for dynamic data pruning.",
        epilog=f"commands:\n{commands}\n\n`hf-dynprune COMMAND --help` explains each.\n\n"
        f"{_EXIT_STATUS}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"hf-dynprune {__version__}")
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND", help=", ".join(COMMANDS))
    command = parser.parse_args(argv[:1]).command
    if hasattr(sys.stdout, "reconfigure"):  # a terminal that has no "×" is no reason to fail
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        COMMANDS[command](argv[1:])
        sys.stdout.flush()  # here, because at Python's end a failure would be printed
    except BrokenPipeError:  # as with `| head`
        # What is still to be flushed goes nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except KeyboardInterrupt:
        print(f"hf-dynprune {command}: interrupted", file=sys.stderr)
        return 130
    except ImportError as error:
        return _fail(command, error, 1)
    except (ValueError, TypeError, OSError) as error:
        return _fail(command, error, 2)
    return 0


def _fail(command: str, error: Exception, status: int) -> int:
    from .escape import printable_lines

    print(f"hf-dynprune {command}: {printable_lines(error)}", file=sys.stderr)
    return status
