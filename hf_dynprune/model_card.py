"""Model cards: what was pruned, what it cost, what it reached, how to load and to repeat it. A reader of reports.

`trainer.create_model_card()` and `trainer.push_to_hub()` of a pruned run write the card of [`card_of_trainer`];
`hf-dynprune card` writes that of [`card_of_report`], of reports alone.
"""

import importlib.util
import inspect
import itertools
import json
import math
import re
import shlex
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any

import datasets
import jinja2
import transformers
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from transformers import TrainingArguments
from transformers.modelcard import TASK_MAPPING, TrainingSummary

from . import __all__ as public_names
from .arguments import TRAINING_SETTINGS
from .policies import POLICIES, FullData, PruningPolicy, StaticPruning, make_policy
from .report import PHASES, PruningReport, differences

if TYPE_CHECKING:
    from matplotlib.figure import Figure

REPORT_FILE = "report.json"
PICTURE_FILE = "pruning.png"
_TEMPLATE = Path(__file__).with_name("model_card_template.md")

# Of a command line: the option of a token, as it is and as far as argparse lets it be cut short; and a path that leads out
# of the working directory, also inside of JSON.
_TOKEN = re.compile(r"--(push[_-]to[_-])?hub[_-]t\w*")
_OUTSIDE = re.compile(r"""(?<![\w.:/-])(?:~|\.\.)?/(?:[^\s"',]*/)?([^\s"',/]+)/?""")

Reports = (
    PruningReport | Sequence[PruningReport]
)  # one run, or several that differ in their seed alone

# The arguments that decide what is trained: those that differ from their defaults are in "How to repeat". Evaluation is
# among them, as it draws from the random numbers that dropout draws from.
_ARGUMENTS = (
    "max_steps",
    "per_device_train_batch_size",
    *TRAINING_SETTINGS,
    "eval_strategy",
    "eval_steps",
    "seed",
    "data_seed",
)


def facts_of(reports: Reports, *, full: Reports = (), short: Reports = ()) -> dict[str, Any]:
    """What reports say of a run, as JSON values: means over its seeds, and each seed's results.

    Args:
        reports: the record of the run, or those of several runs that differ in their seed alone.
        full: of the full run, *optional*: all data, as many epochs.
        short: of the short run, *optional*: all data, fewer epochs, at about the cost of the run.

    Returns:
        `policy`, `num_samples`, `num_epochs`, `seeds`, `passes`, `cost_ratio`, `optimizer_steps`, `nonfinite`, `seconds` (by
        phase), `results` (metric -> `mean`, `std`, None for one run, and `values` in the order of the seeds), `selection`,
        `preparation`, `environment`; and under `full` and `short`, where they were given, the same of these. Each
        `cost_ratio` is passes over those of N * `num_epochs` of the run that the card is of.

    Raises:
        ValueError: without a report; for runs that differ in more than the seed, or of the same seed twice; for a full or
            short run that is none.
    """
    runs, full, short = _runs("the run", reports), _runs("full", full), _runs("short", short)
    if not runs:
        raise ValueError(
            "There is no report: wanted is at least one, of the run that the card is of."
        )
    epochs = runs[0].num_epochs
    for name, others in (("full", full), ("short", short)):
        for other in others[:1]:
            if other.num_samples != runs[0].num_samples:
                raise ValueError(
                    f"The {name} run has {other.num_samples:,} samples, the run {runs[0].num_samples:,}: wanted are runs on "
                    "the same data."
                )
            fits = other.num_epochs == epochs if name == "full" else other.num_epochs < epochs
            if other.policy["name"] != FullData().name or not fits:
                raise ValueError(
                    f"The {name} run is one of {other.policy['name']!r} and {other.num_epochs:g} epochs: wanted is "
                    f"{FullData().name!r} (all data) and {'' if name == 'full' else 'fewer than '}{epochs:g} epochs."
                )
    of = {"full": full, "short": short}
    return {
        **_facts(runs, epochs),
        **{name: _facts(others, epochs) for name, others in of.items() if others},
    }


def _runs(name: str, reports: Reports) -> list[PruningReport]:
    """The reports, by seed, of which all but the seed must be alike."""
    runs = sorted(_listed_reports(reports), key=lambda report: report.seed)
    for one, other in itertools.pairwise(runs):
        if one.seed == other.seed:
            raise ValueError(
                f"Two reports of {name} have the seed {one.seed}: wanted is one report for each seed."
            )
    if differing := differences(runs):
        raise ValueError(
            f"The reports of {name} differ in more than the seed ({differing}): wanted are runs of the same settings."
        )
    return runs


def _facts(runs: Sequence[PruningReport], full_epochs: float) -> dict[str, Any]:
    first, totals, results = (
        runs[0],
        [run.totals for run in runs],
        [results_of(run) for run in runs],
    )
    shares = [key for key in ("always", "sometimes", "never") if key in first.selection]
    passes = statistics.fmean(run.passes for run in runs)
    return {
        "policy": {name: _public(value) for name, value in first.policy.items()},
        "num_samples": first.num_samples,
        "num_epochs": first.num_epochs,
        "seeds": [run.seed for run in runs],
        "passes": passes,
        "cost_ratio": passes / (first.num_samples * full_epochs) if full_epochs else 0.0,
        "optimizer_steps": statistics.fmean(total["optimizer_steps"] for total in totals),
        "nonfinite": sum(total["nonfinite"] for total in totals),
        "seconds": {
            phase: statistics.fmean(total["seconds"][phase] for total in totals) for phase in PHASES
        },
        "results": {
            name: _spread([of[name] for of in results])
            for name in results[0]
            if all(name in of for of in results)
        },
        "selection": {
            **{
                key: first.selection[key]
                for key in ("choices", "chance_shares")
                if key in first.selection
            },
            **{key: statistics.fmean(run.selection[key] for run in runs) for key in shares},
        },
        "preparation": first.preparation,
        "environment": first.environment,
    }


def _spread(values: list[float]) -> dict[str, Any]:
    """Mean, standard deviation (n - 1) and each value."""
    std = statistics.stdev(values) if len(values) > 1 else None
    return {"mean": statistics.fmean(values), "std": std, "values": values}


def _shown(value: Mapping[str, Any]) -> str:
    """A mean, with its standard deviation where there is one."""
    return f"{value['mean']:.4g}" + ("" if value["std"] is None else f" ± {value['std']:.2g}")


def _comparison(facts: Mapping[str, Any]) -> dict[str, Any]:
    """The table of the run beside the full and the short run; empty without these."""
    columns = {
        "this run": facts,
        **{f"{name} run": facts[name] for name in ("full", "short") if name in facts},
    }
    if len(columns) == 1:
        return {}
    runs = columns.values()
    seconds = [
        sum(value for phase, value in of["seconds"].items() if phase != "evaluation") for of in runs
    ]
    return {
        "runs": list(columns),
        "rows": {
            "epochs": [f"{of['num_epochs']:g}" for of in runs],
            "seeds": [", ".join(map(str, of["seeds"])) for of in runs],
            "cost": [f"{of['cost_ratio']:.3f}" for of in runs],
            "optimizer steps": [f"{of['optimizer_steps']:,.0f}" for of in runs],
            "seconds": [f"{value:,.1f}" for value in seconds],
            **{
                name: [_shown(of["results"][name]) for of in runs]
                for name in facts["results"]
                if all(name in of["results"] for of in runs)
            },
        },
    }


def card_of_report(
    report: Reports,
    data: ModelCardData,
    *,
    full: Reports = (),
    short: Reports = (),
    policy: PruningPolicy | None = None,
    origin: str = "",
    training: Mapping[str, Any] | None = None,
    full_steps: int | None = None,
    loading: str = "",
    repeating: str = "",
    command: str = "",
    notes: Sequence[str] = (),
    picture: str = "",
) -> ModelCard:
    """The card of a run, from its record and from what only the caller knows.

    Args:
        report: the record, or those of several runs that differ in their seed alone.
        data: the metadata; the tags `dynamic-data-pruning` (or `static-data-pruning`) and the policy's name and the block
            `hf_dynprune` are added.
        full, short: the records of the full and of the short run to compare with, see [`facts_of`].
        policy: what chose the samples, *optional*, defaults to the one of `POLICIES` that the report names.
        origin: a sentence: trained from scratch, or from which model and on what.
        training: hyperparameters, by the words to show.
        full_steps: optimizer steps of the full run of as many epochs, if known.
        loading: Python that loads the model; without it the section is left out.
        repeating: Python that trains it again, likewise; or
        command: the command line that does.
        notes: paragraphs to add below the cost.
        picture: the file that [`picture_of`] was saved to, as seen from the card.

    Raises:
        ValueError: as [`facts_of`] does, and for a policy that is not of this package and was not given.
    """
    facts = facts_of(report, full=full, short=short)
    policy = make_policy(**facts["policy"]) if policy is None else policy
    if full_steps is None and "full" in facts:
        full_steps = round(facts["full"]["optimizer_steps"])
    seed = {"seed": ", ".join(map(str, facts["seeds"]))}
    training = training or {"epochs": f"{facts['num_epochs']:g}", **seed}
    if len(facts["seeds"]) > 1:
        training = {**training, **seed}
    runs = _listed_reports(report)
    static = isinstance(policy, StaticPruning)
    data.tags = list(
        dict.fromkeys(
            [*(data.tags or []), f"{'static' if static else 'dynamic'}-data-pruning", policy.name]
        )
    )
    data["hf_dynprune"] = {
        "version": facts["environment"].get("hf_dynprune"),
        "policy": facts["policy"],
        "cost_ratio": round(facts["cost_ratio"], 4),
        "passes": round(facts["passes"]),
        "num_samples": facts["num_samples"],
        "num_epochs": facts["num_epochs"],
        "seeds": facts["seeds"],
    }
    last = next((record for record in reversed(runs[0].epochs) if record.metrics), None)
    environment, ranks = facts["environment"], facts["environment"].get("ranks", 1)
    versions = {
        "hf_dynprune": environment.get("hf_dynprune", "unknown"),
        **environment.get("versions", {}),
    }
    # The blocks of the template stand on lines of their own, which leave no trace.
    jinja = jinja2.Environment(
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        undefined=jinja2.StrictUndefined,
    )
    text = jinja.from_string(_TEMPLATE.read_text(encoding="utf-8")).render(
        card_data=data.to_yaml(),
        model_name=data.get("model_name", "Model"),
        origin=origin,
        facts=facts,
        comparison=_comparison(facts),
        shown=_shown,
        each=lambda value: ", ".join(f"{number:.4g}" for number in value["values"]),
        evaluated_epoch="" if last is None else last.epoch + 1,
        full=isinstance(policy, FullData),
        static=static,
        full_epochs=sum(record.full_data for record in runs[0].epochs),
        epochs=len(runs[0].epochs),
        full_passes=facts["num_samples"] * facts["num_epochs"],
        full_steps=full_steps,
        policy=policy,
        summary=_summary(policy),
        fields=", ".join(
            f"`{name}={_code(value)}`" for name, value in facts["policy"].items() if name != "name"
        ),
        scored=type(policy).score is not PruningPolicy.score,
        training=training,
        hardware=f"{ranks} × {environment['device']}"
        if ranks > 1
        else environment.get("device", "unknown"),
        versions=", ".join(f"{name} {version}" for name, version in versions.items()),
        loading=loading,
        repeating=repeating,
        command=command,
        notes=notes,
        picture=picture,
    )
    return ModelCard(text)


def results_of(report: PruningReport) -> dict[str, float]:
    """The metrics of the last evaluation, without `eval_`, and without what tells of speed."""
    aside = re.compile(r".*(runtime|_per_second|_time)")
    return {
        name.removeprefix("eval_"): value
        for name, value in report.metrics.items()
        if not aside.fullmatch(name)
    }


def metrics_of(results: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """Of the results what goes into the metadata: finite means, and no losses."""
    means = {name: value["mean"] for name, value in results.items()}
    return {
        name: mean
        for name, mean in means.items()
        if math.isfinite(mean) and not name.endswith("loss")
    }


def picture_of(reports: Reports, *, full: Reports = (), short: Reports = ()) -> "Figure | None":
    """What the run reached against what it cost, beside the full and the short run; without these, how often it kept its
    samples. None where there is neither.

    Raises:
        ImportError: without matplotlib.
        ValueError: as [`facts_of`] does.
    """
    from .plots import plot_runs, plot_selection

    facts = facts_of(reports, full=full, short=short)
    of = {facts["policy"]["name"]: reports, "full run": full, "short run": short}
    if full or short:
        runs = {name: _listed_reports(given) for name, given in of.items() if given}
        shared = set.intersection(*(set(run.metrics) for given in runs.values() for run in given))
        metrics = [
            f"eval_{name}" for name in metrics_of(facts["results"]) if f"eval_{name}" in shared
        ]
        return plot_runs(runs, metrics[0], against="passes") if metrics else None
    if facts["selection"].get("choices") and facts["selection"]["always"] < 1:
        return plot_selection({facts["policy"]["name"]: reports})
    return None


def card_of_trainer(
    trainer: Any,
    language: str | None = None,
    license: str | None = None,
    tags: str | Sequence[str] | None = None,
    model_name: str | None = None,
    finetuned_from: str | None = None,
    tasks: str | Sequence[str] | None = None,
    dataset_tags: str | Sequence[str] | None = None,
    dataset: str | Sequence[str] | None = None,
    dataset_args: str | Sequence[str] | None = None,
    *,
    other_seeds: Reports = (),
    full: Reports = (),
    short: Reports = (),
    library_name: str | None = None,
    repo_id: str | None = None,
    picture: str = "",
) -> ModelCard:
    """The card of a trainer's last run; the first arguments are those of `Trainer.create_model_card`.

    Differs from the stock card where that was measured to be wrong: a model is a fine-tuned version only of one that was
    loaded, the results are those of the last evaluation wherever it is in the log, and `dataset` alone (a name) is enough
    for them to be in the metadata.

    Args:
        language, license: as in the metadata; the licence of a base model on the Hub is taken over if the Hub answers.
        tags: further tags.
        model_name: the title, *optional*, defaults to the name of the output folder.
        finetuned_from: the base model, *optional*, defaults to where the model was loaded from.
        tasks: such as `"image-classification"`, *optional*, defaults to what the model's class is for.
        dataset_tags: dataset ids on the Hub, *optional*, default to where the data were loaded from.
        dataset: its name in words.
        dataset_args: such as the name of its configuration.
        other_seeds: records of runs of the same settings with other seeds: the results are then told with their spread.
        full, short: records of the full run and of the short run to compare with, see [`facts_of`].
        library_name: `"timm"` for a repository in timm's format, *optional*, defaults to `"transformers"` or `"peft"`.
        repo_id: the repository, *optional*, defaults to the trainer's.
        picture: the file that [`picture_of`] was saved to, as seen from the card.
    """
    report, policy, model = trainer.pruning_report, trainer.pruning, _base_of(trainer.model)
    hub = hub_dataset(
        trainer.eval_dataset if trainer.eval_dataset is not None else trainer.train_dataset
    )
    dataset_ids = _listed(dataset_tags) or _listed(hub.get("id"))
    dataset_names = _listed(dataset) or dataset_ids
    task_names = _listed(tasks) or [
        task for task, classes in TASK_MAPPING.items() if type(model).__name__ in _names(classes)
    ]
    base, words = _base_model(model, finetuned_from)
    if license is None and base is not None:
        license = TrainingSummary(model_name=base, finetuned_from=base).license  # asks the Hub
    name = model_name or Path(trainer.args.output_dir).name or base or type(model).__name__
    existing = _existing_card(
        Path(trainer.args.output_dir) / "README.md"
    )  # PEFT writes one when it saves
    # PEFT tags its base model, be it a path.
    old_tags = [
        tag
        for tag in _listed(existing.get("tags"))
        if tag not in POLICIES and not (base is None and str(tag).startswith("base_model:"))
    ]
    library = existing.get("library_name") or (
        "peft" if model is not trainer.model else "transformers"
    )
    reports = [report, *_listed_reports(other_seeds)]
    results = metrics_of(facts_of(reports)["results"])
    data = ModelCardData(
        library_name=library_name or library,
        language=language,
        license=license,
        base_model=base,
        pipeline_tag=task_names[0] if task_names else None,
        tags=list(dict.fromkeys(["generated_from_trainer", *_listed(tags), *old_tags])),
        datasets=dataset_ids or None,
        metrics=list(results) or None,
        model_name=name,
    )
    if (
        task_names and len(dataset_names) == 1
    ):  # of several data sets it is not known which one the results are of
        data.eval_results = eval_results(
            results,
            task_names[0],
            dataset_names[0],
            dataset_type=dataset_ids[0] if dataset_ids else None,
            dataset_config=hub.get("config"),
            dataset_split=hub.get("split"),
            dataset_revision=hub.get("revision"),
            dataset_args=(_listed(dataset_args) or [None])[0],
        )
    on = f" on {' and '.join(dataset_names)}" if dataset_names else ""
    pruner = trainer.pruner
    return card_of_report(
        reports,
        data,
        full=full,
        short=short,
        policy=policy,
        origin=f"This model was {words}{on}.",
        training=_hyperparameters(trainer),
        full_steps=math.ceil(round(pruner.steps(report.num_samples) * report.num_epochs, 9)),
        loading=_loading(
            trainer,
            library_name or library,
            repo_id or trainer.hub_model_id or trainer.args.hub_model_id,
        ),
        repeating=_repeating(trainer),
        command=command_of(sys.argv, pruner.ranks),
        notes=_notes(trainer),
        picture=picture,
    )


def write_card(trainer: Any, folder: Path, *args: Any, **settings: Any) -> None:
    """Writes the card of [`card_of_trainer`] as `README.md`, and beside it the record and, where matplotlib is installed
    and there is something to see, the picture; no picture in mid-run, where trl's trainers write a card with each
    checkpoint."""
    report = trainer.pruning_report
    report.save(folder / REPORT_FILE)
    compared = {name: settings[name] for name in ("full", "short") if name in settings}
    figure = None
    if not trainer.is_in_train and importlib.util.find_spec("matplotlib") is not None:
        figure = picture_of([report, *_listed_reports(settings.get("other_seeds", ()))], **compared)
    if figure is not None:
        figure.savefig(folder / PICTURE_FILE, dpi=100)
        settings["picture"] = PICTURE_FILE
    card_of_trainer(trainer, *args, **settings).save(folder / "README.md")


def eval_results(
    results: Mapping[str, float],
    task: str,
    dataset: str,
    *,
    dataset_type: str | None = None,
    **more: Any,
) -> list[EvalResult] | None:
    """The results for the `model-index` of the metadata; None without any."""
    about = {
        "task_type": task,
        "dataset_name": dataset,
        "dataset_type": dataset_type or dataset,
        **more,
    }
    return [
        EvalResult(metric_type=name, metric_name=name, metric_value=value, **about)
        for name, value in results.items()
    ] or None


# ---- facts ---------------------------------------------------------------------------------------


def _listed(value: str | Sequence[str] | None) -> list[Any]:
    return [] if value is None else [value] if isinstance(value, str) else list(value)


def _listed_reports(reports: Reports) -> list[PruningReport]:
    return [reports] if isinstance(reports, PruningReport) else list(reports)


def _names(classes: Any) -> set[str]:
    """The class names of a mapping of transformers, whose values are names or tuples of names."""
    return {
        name
        for value in classes.values()
        for name in ([value] if isinstance(value, str) else value)
    }


def _summary(policy: PruningPolicy) -> str:
    """The first sentence of the policy's docstring; nothing where it has none (a dataclass then shows its signature)."""
    text = inspect.cleandoc(type(policy).__doc__ or "").partition("\n\n")[0].replace("\n", " ")
    return "" if text.startswith(f"{type(policy).__name__}(") else re.split(r"(?<=\.)\s", text)[0]


def _base_of(model: Any) -> Any:
    """The model below PEFT's wrapper, if there is one."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _base_model(model: Any, finetuned_from: str | None) -> tuple[str | None, str]:
    """The id of the model that this one was fine-tuned from, if it has one, and that in words."""
    if finetuned_from is None:
        # A config that was loaded has a name, too: only loaded parameters carry this mark.
        loaded = any(
            getattr(parameter, "_is_hf_initialized", False) for parameter in model.parameters()
        )
        finetuned_from = (
            getattr(getattr(model, "config", None), "_name_or_path", None) if loaded else None
        )
    if not finetuned_from:
        return None, "trained from scratch"
    try:
        validate_repo_id(finetuned_from)
    except HFValidationError:
        local = True
    else:
        local = Path(finetuned_from).is_dir()
    if local:  # whose path is of no use to others, and none of their business
        return None, f"fine-tuned from the local checkpoint `{Path(finetuned_from).resolve().name}`"
    return (
        finetuned_from,
        f"fine-tuned from [{finetuned_from}](https://huggingface.co/{finetuned_from})",
    )


def hub_dataset(dataset: Any) -> dict[str, str]:
    """Where on the Hub a `datasets.Dataset` was loaded from: id, revision, config and split, as far as it knows."""
    if not isinstance(dataset, datasets.Dataset):
        return {}
    urls = dataset.info.download_checksums or {}
    found = {
        match.groups()
        for url in urls
        if (match := re.match(r"hf://datasets/([^@]+)@(\w+)/", str(url)))
    }
    if len(found) != 1:
        return {}
    ((name, revision),) = found
    return {
        "id": name,
        "revision": revision,
        "config": dataset.info.config_name,
        "split": str(dataset.split),
    }


def _existing_card(path: Path) -> ModelCardData:
    return (
        ModelCard.load(path, ignore_metadata_errors=True).data if path.exists() else ModelCardData()
    )


def _hyperparameters(trainer: Any) -> dict[str, str]:
    args, pruner = trainer.args, trainer.pruner
    batch = (pruner.batch_size, pruner.accumulation, pruner.ranks)
    optimizer = getattr(trainer.optimizer, "optimizer", trainer.optimizer)
    group = optimizer.param_groups[0] if optimizer is not None else {}
    settings = [
        f"{key} {group[key]}"
        for key in ("momentum", "nesterov", "betas", "eps", "weight_decay")
        if group.get(key)
    ]
    if getattr(trainer, "_created_lr_scheduler", False):
        warm_up = args.get_warmup_steps(pruner.clock.total)
        schedule = f"{args.lr_scheduler_type.value}, {warm_up} steps of LR warm-up"
    else:
        scheduler = getattr(trainer.lr_scheduler, "scheduler", trainer.lr_scheduler)
        schedule = f"{type(scheduler).__name__}, made outside the Trainer"
    precision = "bf16, mixed" if args.bf16 else "fp16, mixed" if args.fp16 else None
    budget = {"max_steps": args.max_steps} if args.max_steps > 0 else {}
    rows = {
        "learning rate": f"{args.learning_rate:g}",
        "schedule": schedule,
        "batch": f"{' × '.join(map(str, batch))} = {math.prod(batch)} (per device × accumulation × ranks)",
        "epochs": f"{trainer.pruning_report.num_epochs:g}",
        **budget,
        "optimizer": ", ".join([type(optimizer).__name__, *settings]),
        "precision": precision
        or str(next(trainer.model.parameters()).dtype).removeprefix("torch."),
        "seed": f"{pruner.seed}"
        + (f", of the order {pruner.data_seed}" if pruner.data_seed != pruner.seed else ""),
    }
    if args.label_smoothing_factor:
        rows["label smoothing"] = f"{args.label_smoothing_factor:g}"
    return rows


def _notes(trainer: Any) -> list[str]:
    notes = []
    resumed = trainer.pruning_report.resumed
    if resumed:
        steps = ", ".join(f"{entry['step']:,}" for entry in resumed)
        notes.append(f"The run was interrupted and resumed at optimizer step {steps}.")
    if trainer.args.load_best_model_at_end and trainer.state.best_model_checkpoint:
        notes.append(
            f"**The weights are not the last ones**: they are of optimizer step {trainer.state.best_global_step:,}, where "
            f"`{trainer.args.metric_for_best_model}` was best ({trainer.state.best_metric:.4g}). The results below are of "
            "the end of the run."
        )
    return notes


def _loading(trainer: Any, library: str, source: str | None) -> str:
    """Python that loads the model: by the Auto class that gives its class, else by the class itself; by timm too, from a
    repository in its format."""
    model = _base_of(trainer.model)
    cls, config = type(model), getattr(model, "config", None)
    if getattr(transformers, cls.__name__, None) is not cls:
        return ""
    autos = [
        name for name in dir(transformers) if re.fullmatch("AutoModelFor(?!PreTraining).+", name)
    ]
    loader = next(
        (name for name in autos if cls in _loads(getattr(transformers, name), type(config))),
        cls.__name__,
    )
    processor = _processor(trainer)
    lines = []
    vision = sys.modules.get("hf_dynprune.vision")
    architecture = getattr(config, "architecture", None)
    if vision is not None and architecture in vision.__all__:
        lines += [
            f"import hf_dynprune.vision  # makes {architecture} known to timm: pip install hf-dynprune[recipes]"
        ]
    lines += [f"from transformers import {', '.join(sorted(filter(None, [processor, loader])))}"]
    lines += ["", f'name = "{source}"' if source else 'name = "."  # the folder of this card']
    lines += [f"model = {loader}.from_pretrained(name)"]
    if processor:
        lines += [f"processor = {processor}.from_pretrained(name)"]
    if library == "timm":
        lines += ["", "import timm  # the same model, as timm's own", ""]
        lines += [
            f'model = timm.create_model("{f"hf-hub:{source}" if source else "local-dir:."}", pretrained=True).eval()'
        ]
        lines += [
            "transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))"
        ]
    return "\n".join(lines)


def _loads(auto: Any, config_class: type) -> Sequence[type]:
    """The classes that an Auto class makes of a config."""
    mapping = getattr(auto, "_model_mapping", {})
    found = mapping.get(config_class, ())
    return found if isinstance(found, tuple) else (found,)


def _processor(trainer: Any) -> str | None:
    """The Auto class of what prepares the inputs; timm's wrapper has its image processor in config.json."""
    processing = trainer.processing_class
    if isinstance(processing, transformers.PreTrainedTokenizerBase):
        return "AutoTokenizer"
    if isinstance(processing, transformers.ImageProcessingMixin):
        return "AutoImageProcessor"
    if processing is None:
        return (
            "AutoImageProcessor"
            if type(_base_of(trainer.model)).__name__.startswith("TimmWrapper")
            else None
        )
    return "AutoProcessor"


def _repeating(trainer: Any) -> str:
    """Python that trains the same: the arguments that differ from their defaults, and the policy."""
    args, policy, cls = trainer.args, trainer.pruning, type(trainer)
    config = type(args)
    library = config.__module__.partition(".")[0]
    if getattr(sys.modules[library], config.__name__, None) is not config:  # of the user's script
        config, library = TrainingArguments, "transformers"
    more = {field.name for field in fields(config)} - {
        field.name for field in fields(TrainingArguments)
    }
    defaults = {
        field.name: field.default if field.default_factory is MISSING else field.default_factory()
        for field in fields(config)
    }
    settings = (*_ARGUMENTS, *sorted(more))
    names = [
        name
        for name in settings
        if name == "seed" or getattr(args, name, None) != defaults.get(name)
    ]
    arguments = [
        f"    {name}={_code(getattr(args, name))}," for name in names if hasattr(args, name)
    ]
    given_fields = ", ".join(f"{name}={_code(value)}" for name, value in policy.given.items())
    imports: dict[str, list[str]] = {}
    for name, module in (
        (cls.__name__, cls.__module__),
        (type(policy).__name__, type(policy).__module__),
    ):
        if name in public_names or module.startswith("hf_dynprune."):
            imports.setdefault("hf_dynprune" if name in public_names else module, []).append(name)
    given = {
        "eval_dataset": args.eval_strategy != "no",
        "compute_metrics": trainer.compute_metrics is not None,
        "per_sample_loss_fn": trainer._loss_rule.name == "custom",
    }
    return "\n".join(
        [
            f"from {library} import {config.__name__}",
            "",
            *(
                f"from {module} import {', '.join(sorted(names))}"
                for module, names in sorted(imports.items())
            ),
            *([""] if imports else []),
            f"args = {config.__name__}(",
            '    output_dir="...",',
            *arguments,
            ")",
            f"trainer = {cls.__name__}(",
            "    model=model,",
            "    args=args,",
            "    train_dataset=train_dataset,",
            *[f"    {name}={name}," for name, is_given in given.items() if is_given],
            f"    pruning={type(policy).__name__}({given_fields}),",
            ")",
            "trainer.train()",
        ]
    )


def command_of(argv: Sequence[str], ranks: int = 1) -> str:
    """The command line of a script in a folder called `recipes`, as others can use it; empty for all other programs.

    Tokens are left out, and of a path that leads out of the working directory all but its last part.
    """
    script, *arguments = argv or [""]
    if Path(script).parent.name != "recipes":
        return ""
    shown, is_token = [], False
    for argument in arguments:
        option, _, value = argument.partition("=")
        names_token = _TOKEN.fullmatch(option) is not None
        if not (names_token or is_token):
            shown.append(_public(argument))
        is_token = names_token and not value  # then it is the next argument
    launcher = f"torchrun --nproc_per_node {ranks}" if ranks > 1 else "python"
    return f"{launcher} {shlex.join([f'recipes/{Path(script).name}', *shown])}"


def _code(value: Any) -> str:
    """The value as Python: an enum's as its value, a string in double quotes."""
    value = _public(value.value if isinstance(value, Enum) else value)
    return json.dumps(value, ensure_ascii=False) if isinstance(value, str) else repr(value)


def _public(value: Any) -> Any:
    """Of a path that leads out of the working directory the last part: the rest is none of the readers' business."""
    return _OUTSIDE.sub(r"path/to/\1", value) if isinstance(value, str) else value
