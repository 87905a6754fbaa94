"""Model cards: what was pruned, what it cost, what it reached, how to load and how to repeat it.

`trainer.create_model_card()` and `trainer.push_to_hub()` of a pruned run write the card of
[`card_of_trainer`]. `hf-dynprune card` writes the card of [`card_of_reports`], from reports alone.
"""

import importlib.util
import inspect
import itertools
import math
import os
import re
import shlex
import statistics
import sys
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields, replace
from enum import Enum
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2
import transformers
import yaml
from huggingface_hub import CardData, EvalResult, ModelCard, ModelCardData, RepoCard
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id, yaml_dump
from transformers import TrainingArguments
from transformers.modelcard import TrainingSummary

from .escape import (
    Markdown,
    code,
    code_cell,
    fence_of,
    hide_folders,
    is_secret,
    literal,
    markdown,
    printable,
    printable_lines,
    printable_values,
    target,
)
from .files import PICTURE_FILE, REPORT_FILE, atomic, strict
from .losses import RULES, model_class, unwrapped
from .plots import Against, plot_runs, plot_selection, save_picture
from .policies import POLICIES, FullData, PruningPolicy, make_policy
from .provenance import ARGUMENTS, hub_dataset, loaded_from, tasks_of
from .report import KEPT, ROLLOUTS, PruningReport, by_seed, changed_fields

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Private attributes of transformers that are read here, and why. Each has a test.
SEAMS = {
    "Trainer._created_lr_scheduler": "whether the Trainer made the scheduler; its arguments do not "
    "describe another one",
    "_BaseAutoModelClass._model_mapping": "which classes an Auto class makes, for the snippet "
    "that loads the model",
}

# One run, or several that differ only in their seed.
Reports = PruningReport | Sequence[PruningReport]

CARD_FILE = "README.md"
_WITH_FOLDERS = ("policy", "preparation", "provenance")  # fields of a report that may name some
_TEMPLATE = Path(__file__).with_name("model_card_template.md")

# On a command line, the option of a token, in full or as argparse lets it be shortened.
_TOKEN = re.compile(r"--(push[_-]to[_-])?hub[_-]t\w*")


@dataclass
class CardFacts:
    """What a card says beyond its reports. A trainer knows all of it. With reports alone, set what
    you know: a section without facts is left out.

    A text stands in the card as it is. If it is Markdown, wrap it in [`escape.Markdown`].
    """

    data: ModelCardData  # the metadata; the card adds its tags and the block `hf_dynprune`
    policy: PruningPolicy | None = None  # default: the policy of POLICIES that the report names
    origin: str = ""  # a sentence on what the model was trained from and on
    training: Mapping[str, str] = field(default_factory=dict)  # hyperparameters, label -> text
    full_steps: int | None = None  # optimizer steps of the full run
    loading: Mapping[str, Any] = field(default_factory=dict)  # for the snippet, see `_loading`
    repeating: Mapping[str, Any] = field(default_factory=dict)  # the same, see `_repeating`
    command: str = ""  # repeats the run; it replaces the snippet
    notes: Sequence[str] = ()  # paragraphs below the cost
    picture: str = ""  # its path, relative to the card


@dataclass
class CardArguments:
    """Arguments of `trainer.create_model_card` for a pruned run. The first ten are the Trainer's.

    Attributes:
        language, license: for the metadata. If `license` is None and the base model is on the Hub,
            its licence is used if the Hub answers.
        tags: more tags.
        model_name: the title, *optional*, defaults to the name of the output folder.
        finetuned_from: the base model, *optional*, defaults to where the model was loaded from.
        tasks: such as `"image-classification"`, *optional*, defaults to the task of the model's
            class.
        dataset_tags: ids of datasets on the Hub, *optional*, defaults to where the evaluation data
            were loaded from.
        dataset: the name of the dataset in words.
        dataset_args: such as the name of its configuration.
        other_seeds: reports of runs with the same settings and other seeds. The card then shows
            means and standard deviations.
        full, short: reports of the full run and of the short run to compare with, see [`facts_of`].
        library_name: `"timm"` for a repository in timm's format, *optional*, defaults to
            `"transformers"` or `"peft"`.
        repo_id: the repository, *optional*, defaults to the trainer's.
        picture: path of the picture that [`picture_of`] drew, relative to the card.
    """

    language: str | None = None
    license: str | None = None
    tags: str | Sequence[str] | None = None
    model_name: str | None = None
    finetuned_from: str | None = None
    tasks: str | Sequence[str] | None = None
    dataset_tags: str | Sequence[str] | None = None
    dataset: str | Sequence[str] | None = None
    dataset_args: str | Sequence[str] | None = None
    other_seeds: Reports = field(default=(), kw_only=True)
    full: Reports = field(default=(), kw_only=True)
    short: Reports = field(default=(), kw_only=True)
    library_name: str | None = field(default=None, kw_only=True)
    repo_id: str | None = field(default=None, kw_only=True)
    picture: str = field(default="", kw_only=True)


# ---- what the reports say ------------------------------------------------------------------------


def facts_of(reports: Reports, *, full: Reports = (), short: Reports = ()) -> dict[str, Any]:
    """What reports say of a run, as JSON values: means over its seeds, and each seed's results.

    Args:
        reports: the report of the run, or reports of runs that differ only in their seed.
        full: the same of the full run, *optional*: all data, as many epochs.
        short: the same of the short run, *optional*: all data, fewer epochs, about the same cost.

    Returns:
        `policy`, `num_samples`, `num_epochs`, `seeds`, `passes`, `cost_ratio`, `optimizer_steps`,
        `nonfinite`, `seconds` (by phase), `rollouts` (in reinforcement learning), `spent_seconds`
        (without evaluation), `results` (metric -> `mean`, `std`, `values` in the order of the
        seeds; `std` is None for one run), `selection`, `effective_share` (after the last epoch) and
        `gain` if they were measured,
        `preparation`, `environment`. `full` and `short` hold the same for those runs,
        if given. Every `cost_ratio` is passes / (N * `num_epochs` of the card's run).

    Raises:
        ValueError: If there is no report, if runs differ in more than the seed or share a seed, or
            if `full` or `short` is not a full or short run on the same number of samples.
    """
    runs = _by_seed("the run", reports)
    if not runs:
        raise ValueError("There is no report: expected at least one, of the card's run.")
    epochs = runs[0].num_epochs
    facts = _means(runs, epochs)
    for name, given in (("full", full), ("short", short)):
        if others := _by_seed(name, given):
            _check_comparable(name, others[0], runs[0])
            facts[name] = _means(others, epochs)
    return facts


def _check_comparable(name: str, other: PruningReport, run: PruningReport) -> None:
    if other.num_samples != run.num_samples:
        raise ValueError(
            f"The {name} run has {other.num_samples:,} samples, the run {run.num_samples:,}: "
            "expected runs on the same data."
        )
    is_full = name == "full"
    epochs = run.num_epochs
    fits = other.num_epochs == epochs if is_full else other.num_epochs < epochs
    if other.policy["name"] != FullData.name or not fits:
        raise ValueError(
            f"The {name} run has the policy {other.policy['name']!r} and {other.num_epochs:g} "
            f"epochs: expected {FullData.name!r} and {'' if is_full else 'fewer than '}{epochs:g}."
        )


def _by_seed(name: str, reports: Reports) -> list[PruningReport]:
    runs = by_seed(name, reports)
    for one, other in itertools.pairwise(runs):
        if one.seed == other.seed:
            raise ValueError(
                f"Two reports of {name} have the seed {one.seed}: expected one report per seed."
            )
    return runs


def _means(runs: Sequence[PruningReport], full_epochs: float) -> dict[str, Any]:
    first, mean = runs[0], statistics.fmean
    totals = [run.totals for run in runs]
    results = [run.results for run in runs]
    shared = [name for name in results[0] if all(name in values for values in results)]
    selection: dict[str, Any] = {
        key: first.selection[key] for key in ("choices", "chance_shares") if key in first.selection
    }
    for name in KEPT:
        if name in first.selection:
            selection[name] = mean(run.selection[name] for run in runs)
    return {
        "policy": hide_folders(first.policy),
        "num_samples": first.num_samples,
        "num_epochs": first.num_epochs,
        "seeds": [run.seed for run in runs],
        "passes": mean(run.passes for run in runs),
        "cost_ratio": mean(run.cost_against(full_epochs) for run in runs),
        "optimizer_steps": mean(total["optimizer_steps"] for total in totals),
        "nonfinite": sum(total["nonfinite"] for total in totals),
        "seconds": {
            phase: mean(total["seconds"].get(phase, 0.0) for total in totals)
            for phase in totals[0]["seconds"]
        },
        **_rollouts(totals),
        "spent_seconds": mean(run.spent_seconds for run in runs),
        "results": {name: _spread([values[name] for values in results]) for name in shared},
        "selection": selection,
        **_potential(runs),
        "preparation": hide_folders(first.preparation),
        "environment": first.environment,
    }


def _rollouts(totals: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """What was rolled out, means over the seeds; empty if a run rolled nothing out."""
    counts = [total["rollouts"] for total in totals if "rollouts" in total]
    if len(counts) < len(totals):
        return {}
    means = {name: statistics.fmean(count[name] for count in counts) for name in ROLLOUTS}
    return {"rollouts": means}


def _potential(runs: Sequence[PruningReport]) -> dict[str, float]:
    """The last effective share and G, means over the seeds; empty if a run has none."""
    shares = [(run.effective_share, run.gain) for run in runs]
    known = [(share, gain) for share, gain in shares if share is not None and gain is not None]
    if len(known) < len(runs):
        return {}
    share, gain = (statistics.fmean(values) for values in zip(*known, strict=True))
    return {"effective_share": share, "gain": gain}


def _spread(values: list[float]) -> dict[str, Any]:
    """Mean, standard deviation (n - 1) and each value. NaN where a value is NaN or infinite."""
    if len(values) == 1:
        return {"mean": values[0], "std": None, "values": values}
    if not all(map(math.isfinite, values)):  # `statistics` fails for some of these
        return {"mean": math.nan, "std": math.nan, "values": values}
    try:
        mean, std = statistics.fmean(values), statistics.stdev(values)
    except OverflowError:  # near the end of the range of floats
        mean = std = math.inf
    return {"mean": mean, "std": std, "values": values}


def metrics_of(facts: Mapping[str, Any]) -> dict[str, float]:
    """The results for the metadata: finite means, without losses."""
    means = {name: result["mean"] for name, result in facts["results"].items()}
    return {
        name: mean
        for name, mean in means.items()
        if math.isfinite(mean) and not name.endswith("loss")
    }


def eval_results(
    results: Mapping[str, float],
    task: str,
    dataset: str,
    *,
    dataset_type: str | None = None,
    **more: Any,
) -> list[EvalResult] | None:
    """The results for the `model-index` of the metadata; None if there are no results."""
    more |= {"task_type": task, "dataset_name": dataset, "dataset_type": dataset_type or dataset}
    return [
        EvalResult(metric_type=name, metric_name=name, metric_value=value, **more)
        for name, value in results.items()
    ] or None


# ---- the card ------------------------------------------------------------------------------------


def card_of_reports(
    reports: Reports, about: CardFacts, *, full: Reports = (), short: Reports = ()
) -> ModelCard:
    """The card of a run, from its report and from what only the caller knows.

    Args:
        reports, full, short: as in [`facts_of`].
        about: what the reports do not hold.

    Raises:
        ValueError: As [`facts_of`] does, and for a policy that `POLICIES` does not have and that
            `about` does not give.
    """
    facts = facts_of(reports, full=full, short=short)
    first, seeds = _listed(reports)[0], ", ".join(map(str, facts["seeds"]))
    policy = about.policy or _policy_of(facts["policy"])
    training = about.training or {"epochs": f"{facts['num_epochs']:g}"}
    if not about.training or len(facts["seeds"]) > 1:
        training = {**training, "seed": seeds}
    full_steps = about.full_steps
    if full_steps is None and "full" in facts:
        full_steps = round(facts["full"]["optimizer_steps"])
    own_tags = (f"{'static' if policy.static else 'dynamic'}-data-pruning", policy.name)
    about.data.tags = list(dict.fromkeys([*(about.data.tags or []), *own_tags]))
    about.data["hf_dynprune"] = {
        "version": facts["environment"].get("hf_dynprune"),
        "policy": strict(facts["policy"]),
        "cost_ratio": round(facts["cost_ratio"], 4),
        "passes": round(facts["passes"]),
        **({"rollouts": round(facts["rollouts"]["completions"])} if "rollouts" in facts else {}),
        **{name: facts[name] for name in ("num_samples", "num_epochs", "seeds")},
    }
    text = render(
        _TEMPLATE,
        card_data=metadata_text(about.data),
        model_name=about.data.get("model_name") or "Model",
        command=printable_lines(about.command),
        fence=fence_of(about.command),
        about=about,
        facts=facts,
        comparison=_comparison(facts),
        report=first,
        policy=policy,
        summary=Markdown(_summary(policy)),
        fields=Markdown(fields_in_words(facts["policy"])),
        is_full=isinstance(policy, FullData),
        is_scored=policy.has_scores,
        training=training,
        full_passes=facts["num_samples"] * facts["num_epochs"],
        full_steps=full_steps,
        shown=_shown,
    )
    return ModelCard(text)


def metadata_text(data: CardData) -> str:
    """The metadata as YAML."""
    values = printable_values(data.to_dict())
    return yaml_dump(values, sort_keys=False).strip()


def _policy_of(values: Mapping[str, Any]) -> PruningPolicy:
    """The policy that a report names. No file of scores is read: the card does not need it."""
    if isinstance(values.get("scores"), str):
        # Nothing can be below this path.
        nowhere = os.path.join(os.devnull, "scores.safetensors")
        values = {**values, "scores": nowhere, "digest": values.get("digest") or "unknown"}
    try:
        return make_policy(**values)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"The policy {values['name']!r} of the report cannot be made ({error}): correct the "
            "report, or give the policy, `CardFacts(policy=...)`."
        ) from error


def render(template: Path, **values: Any) -> str:
    """Fill a template of a card. Statements on lines of their own leave no trace in the text.

    Each text that an expression yields is escaped, so that it shows as it is, unless it is
    [`escape.Markdown`]. The template marks metadata and code with filters: `raw`, `code`,
    `code_cell`, `literal`, `target`.
    """
    return _template(template.read_text(encoding="utf-8")).render(**values)


@cache  # compiling takes longer than filling, and trl writes a card at each checkpoint
def _template(text: str) -> jinja2.Template:
    jinja = jinja2.Environment(
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        undefined=jinja2.StrictUndefined,
        finalize=_finalize,
    )
    filters = {"raw": Markdown, "code": code, "code_cell": code_cell}
    jinja.filters.update(filters, literal=literal, target=target)
    return jinja.from_string(text)


def _finalize(value: Any) -> Any:
    """What an expression of a template yields, as the card shows it."""
    if isinstance(value, list):
        return markdown(", ".join(map(str, value)))
    return value if isinstance(value, int | float | jinja2.Undefined) else markdown(value)


def fields_in_words(policy: Mapping[str, Any]) -> str:
    """The fields of a policy that are not at their defaults, as a card lists them."""
    shown = (f"{name}={_code(value)}" for name, value in changed_fields(policy).items())
    return ", ".join(map(code, shown)) or "its defaults"


def _shown(value: Mapping[str, Any]) -> str:
    """A mean, with its standard deviation if there is one."""
    return f"{value['mean']:.4g}" + ("" if value["std"] is None else f" ± {value['std']:.2g}")


def _comparison(facts: Mapping[str, Any]) -> dict[str, Any]:
    """The table of the run beside the full and the short run; empty without them."""
    others = [name for name in ("full", "short") if name in facts]
    if not others:
        return {}
    runs = [facts, *(facts[name] for name in others)]
    rows = {
        "epochs": [f"{run['num_epochs']:g}" for run in runs],
        "seeds": [", ".join(map(str, run["seeds"])) for run in runs],
        "cost": [f"{run['cost_ratio']:.3f}" for run in runs],
        "optimizer steps": [f"{run['optimizer_steps']:,.0f}" for run in runs],
        **_rollouts_of(runs),
        "seconds": [f"{run['spent_seconds']:,.1f}" for run in runs],
    }
    for name in facts["results"]:
        if all(name in run["results"] for run in runs):
            rows[name] = [_shown(run["results"][name]) for run in runs]
    return {"runs": ["this run", *(f"{name} run" for name in others)], "rows": rows}


def _rollouts_of(runs: Sequence[Mapping[str, Any]]) -> dict[str, list[str]]:
    """Rows of the comparison; none unless all runs rolled prompts out."""
    if not all("rollouts" in run for run in runs):
        return {}
    return {
        label: [f"{run['rollouts'][name]:,.0f}" for run in runs]
        for label, name in (("rollouts", "completions"), ("generated tokens", "tokens"))
    }


def _summary(policy: PruningPolicy) -> str:
    """The first sentence of the policy's docstring; empty if it has none."""
    text = inspect.cleandoc(type(policy).__doc__ or "").partition("\n\n")[0].replace("\n", " ")
    # A dataclass without a docstring has its signature as one.
    return "" if text.startswith(f"{type(policy).__name__}(") else re.split(r"(?<=\.)\s", text)[0]


def picture_of(reports: Reports, *, full: Reports = (), short: Reports = ()) -> "Figure | None":
    """Draw what the run reached against its cost, beside the full and the short run.

    Without these, draw how often the run kept its samples.

    Returns:
        The figure; None if there is nothing to draw.

    Raises:
        ImportError: Without matplotlib.
        ValueError: As [`facts_of`] does.
    """
    facts = facts_of(reports, full=full, short=short)
    name = facts["policy"]["name"]
    if full or short:
        given = {name: reports, "full run": full, "short run": short}
        runs = {label: _listed(group) for label, group in given.items() if group}
        every = [set(run.metrics) for group in runs.values() for run in group]
        shared = set.intersection(*every)
        metrics = [f"eval_{metric}" for metric in metrics_of(facts) if f"eval_{metric}" in shared]
        against: Against = "passes"
        if all(run.rolled_out for group in runs.values() for run in group):
            against = "rollouts"
            # trl logs many other numbers of an evaluation.
            metrics.sort(key=lambda metric: metric != "eval_reward")
        return plot_runs(runs, metrics[0], against=against) if metrics else None
    if facts["selection"].get("choices") and facts["selection"]["always"] < 1:
        return plot_selection({name: reports})
    return None


# ---- what a trainer knows ------------------------------------------------------------------------


def write_card(trainer: Any, folder: Path, *args: Any, **settings: Any) -> None:
    """Write `README.md`, `report.json` and, if matplotlib is installed, the picture.

    The card is that of [`card_of_trainer`]. There is no picture during a run: trl's trainers write
    a card with each checkpoint.
    """
    report = trainer.pruning_report
    published(report).save(folder / REPORT_FILE)
    given = CardArguments(*args, **settings)
    figure = None
    if not trainer.is_in_train and importlib.util.find_spec("matplotlib") is not None:
        runs = [report, *_listed(given.other_seeds)]
        figure = picture_of(runs, full=given.full, short=given.short)
    if figure is not None:
        save_picture(figure, folder / PICTURE_FILE)
        given.picture = PICTURE_FILE
    save_card(card_of_trainer(trainer, given), folder / CARD_FILE)


def published(report: PruningReport) -> PruningReport:
    """The report without what is private: folders of this machine."""
    hidden = {name: hide_folders(getattr(report, name)) for name in _WITH_FOLDERS}
    return replace(report, **hidden)


def save_card(card: RepoCard, path: Path) -> None:
    """Write a card, whole or not at all."""
    with atomic(path) as temporary:
        temporary.write_text(str(card), encoding="utf-8")


def card_of_trainer(trainer: Any, given: CardArguments | None = None) -> ModelCard:
    """The card of a trainer's last run.

    It differs from the stock card in three places where that was measured to be wrong. A model is a
    fine-tuned version only of a model that was loaded. The results are those of the last
    evaluation, wherever it is in the log. `dataset` (a name) is enough for results in the metadata.
    """
    given = given or CardArguments()
    shape, report = trainer.pruner.shape, trainer.pruning_report
    evaluated = trainer.eval_dataset is not None
    source = hub_dataset(trainer.eval_dataset if evaluated else trainer.train_dataset)
    names = _listed(given.dataset) or _listed(given.dataset_tags) or _listed(source.get("id"))
    base, origin = _origin(trainer, given.finetuned_from)
    reports = [report, *_listed(given.other_seeds)]
    data = _metadata(trainer, given, base, source, names, metrics_of(facts_of(reports)))
    on = f" on {' and '.join(map(markdown, names))}" if names else ""
    repository = given.repo_id or trainer.hub_model_id or trainer.args.hub_model_id
    about = CardFacts(
        data,
        policy=trainer.pruning,
        origin=Markdown(f"This model was {origin}{on}."),
        training=_hyperparameters(trainer),
        # Rounded, because a share of an epoch is not exact in binary.
        full_steps=math.ceil(round(shape.steps(report.num_samples) * report.num_epochs, 9)),
        loading=_loading(trainer, data["library_name"] == "timm", repository),
        repeating=_repeating(trainer),
        command=command_of(sys.argv, shape.ranks),
        notes=_notes(trainer),
        picture=given.picture,
    )
    return card_of_reports(reports, about, full=given.full, short=given.short)


def _metadata(
    trainer: Any,
    given: CardArguments,
    base: str | None,
    source: Mapping[str, str],
    dataset_names: Sequence[str],
    results: Mapping[str, float],
) -> ModelCardData:
    model, folder = unwrapped(trainer.model), Path(trainer.args.output_dir)
    ids = _listed(given.dataset_tags) or _listed(source.get("id"))
    tasks = _listed(given.tasks) or tasks_of(model_class(model).__name__)
    license = given.license
    if license is None and base is not None:
        # This asks the Hub.
        license = TrainingSummary(model_name=base, finetuned_from=base).license
    # PEFT writes a card when it saves. It tags its base model, even if that is a local path.
    old = _old_metadata(folder / CARD_FILE)
    tags, old_library = old.get("tags"), old.get("library_name")
    old_tags = [
        tag
        for tag in (tags if isinstance(tags, list) else [])
        if str(tag) not in POLICIES and not (base is None and str(tag).startswith("base_model:"))
    ]
    library = "transformers" if model is trainer.model else "peft"
    data = ModelCardData(
        library_name=given.library_name or old_library or library,
        language=given.language,
        license=license,
        base_model=base,
        pipeline_tag=tasks[0] if tasks else None,
        tags=list(dict.fromkeys(["generated_from_trainer", *_listed(given.tags), *old_tags])),
        datasets=ids or None,
        metrics=list(results) or None,
        model_name=given.model_name or folder.name or base or model_class(model).__name__,
    )
    # With several datasets it is unknown which one the results are for.
    if tasks and len(dataset_names) == 1:
        data.eval_results = eval_results(
            results,
            tasks[0],
            dataset_names[0],
            dataset_type=ids[0] if ids else None,
            dataset_config=source.get("config"),
            dataset_split=source.get("split"),
            dataset_revision=source.get("revision"),
            dataset_args=next(iter(_listed(given.dataset_args)), None),
        )
    return data


def _old_metadata(path: Path) -> Mapping[str, Any]:
    """The metadata of a card; empty if there is none, or if it is not one."""
    if not path.is_file():
        return {}
    try:
        card = ModelCard.load(path, ignore_metadata_errors=True)
    except (OSError, ValueError, TypeError, yaml.YAMLError) as error:
        warnings.warn(f"{path} is replaced; its metadata cannot be read ({error}).", stacklevel=2)
        return {}
    return card.data.to_dict()


def _origin(trainer: Any, finetuned_from: str | None) -> tuple[str | None, str]:
    """The Hub id of the base model, if it has one, and where the weights come from in words."""
    model = unwrapped(trainer.model)
    if finetuned_from is None:
        finetuned_from = loaded_from(model)
    if not finetuned_from:
        return None, "trained from scratch"
    try:
        validate_repo_id(finetuned_from)
        local = Path(finetuned_from).is_dir()
    except HFValidationError:
        local = True
    if local:  # only its name: the path is private and useless to others
        name = code(Path(finetuned_from).resolve().name)
        return None, f"fine-tuned from the local checkpoint {name}"
    link = f"[{finetuned_from}](https://huggingface.co/{finetuned_from})"
    return finetuned_from, f"fine-tuned from {link}"


def _hyperparameters(trainer: Any) -> dict[str, str]:
    args, pruner = trainer.args, trainer.pruner
    shape = pruner.shape
    batch = (shape.batch_size, shape.accumulation, shape.ranks)
    product = f"{' × '.join(map(str, batch))} = {math.prod(batch)}"
    optimizer = getattr(trainer.optimizer, "optimizer", trainer.optimizer)  # below Accelerate's
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
    dtype = str(next(trainer.model.parameters()).dtype).removeprefix("torch.")
    order = "" if pruner.data_seed == pruner.seed else f"; order: {pruner.data_seed}"
    smoothing = args.label_smoothing_factor
    return {
        "learning rate": f"{args.learning_rate:g}",
        "schedule": schedule,
        "batch": f"{product} (per device × accumulation × ranks)",
        "epochs": f"{trainer.pruning_report.num_epochs:g}",
        **({"max_steps": f"{args.max_steps}"} if args.max_steps > 0 else {}),
        "optimizer": ", ".join([type(optimizer).__name__, *settings]),
        "precision": precision or dtype,
        "seed": f"{pruner.seed}{order}",
        **({"label smoothing": f"{smoothing:g}"} if smoothing else {}),
    }


def _notes(trainer: Any) -> list[Markdown]:
    notes = []
    if resumed := trainer.pruning_report.resumed:
        steps = ", ".join(f"{entry['step']:,}" for entry in resumed)
        notes.append(f"The run was interrupted and resumed at optimizer step {steps}.")
    state, args = trainer.state, trainer.args
    if args.load_best_model_at_end and state.best_model_checkpoint:
        notes.append(
            f"**The weights are not the last ones.** They are those of optimizer step "
            f"{state.best_global_step:,}, where {code(args.metric_for_best_model)} was best "
            f"({state.best_metric:.4g}). The results below are those of the end of the run."
        )
    return list(map(Markdown, notes))


# ---- snippets ------------------------------------------------------------------------------------


def _loading(trainer: Any, is_timm: bool, source: str | None) -> dict[str, Any]:
    """What the loading snippet names; empty for a model class that transformers does not have."""
    model = unwrapped(trainer.model)
    cls, config = model_class(model), getattr(model, "config", None)
    if getattr(transformers, cls.__name__, None) is not cls:
        return {}
    vision = sys.modules.get("hf_dynprune.vision")
    architecture = getattr(config, "architecture", None)
    return {
        "model": next((name for name in _autos() if cls in _made_by(name, config)), cls.__name__),
        "processor": _processor(trainer.processing_class, cls),
        "source": source,  # the repository, or None for the card's folder
        "is_timm": is_timm,
        # An architecture of ours, which timm knows only after an import.
        "architecture": architecture if architecture in getattr(vision, "__all__", ()) else None,
    }


@cache
def _autos() -> list[str]:
    """The names of transformers' Auto classes of models with a head."""
    every: list[str] = vars(transformers)["__all__"]  # dir(transformers) takes a tenth of a second
    return sorted(name for name in every if re.fullmatch("AutoModelFor(?!PreTraining).+", name))


def _made_by(auto_name: str, config: Any) -> tuple[type, ...]:
    """The classes that an Auto class makes of a config."""
    mapping = getattr(getattr(transformers, auto_name), "_model_mapping", {})
    found = mapping.get(type(config), ())
    return found if isinstance(found, tuple) else (found,)


def _processor(processing: Any, model_class: type) -> str | None:
    """The Auto class of what prepares the inputs."""
    if isinstance(processing, transformers.PreTrainedTokenizerBase):
        return "AutoTokenizer"
    if isinstance(processing, transformers.ImageProcessingMixin):
        return "AutoImageProcessor"
    if processing is not None:
        return "AutoProcessor"
    # timm's wrapper has its image processor in config.json.
    return "AutoImageProcessor" if model_class.__name__.startswith("TimmWrapper") else None


def _repeating(trainer: Any) -> dict[str, Any]:
    """What the training snippet names: the policy, and arguments that are not at their defaults."""
    args, policy = trainer.args, trainer.pruning
    config = type(args) if _module_of(type(args)) else TrainingArguments
    defaults = {
        entry.name: entry.default if entry.default_factory is MISSING else entry.default_factory()
        for entry in fields(config)
    }
    more = sorted(set(defaults) - {entry.name for entry in fields(TrainingArguments)})
    arguments = {
        name: _code(getattr(args, name))
        for name in (*ARGUMENTS, *more)
        if hasattr(args, name)
        and (name == "seed" or getattr(args, name) != defaults.get(name))
        and not is_secret(name)
    }
    imports: dict[str, list[str]] = {}
    for cls in (type(trainer), type(policy)):
        if module := _module_of(cls):
            imports.setdefault(module, []).append(cls.__name__)
    rule, given_loss = getattr(trainer, "loss_rule", None), getattr(trainer, "_given_loss", None)
    given = {
        "eval_dataset": args.eval_strategy != "no",
        "loss": hasattr(trainer, "loss"),  # of sentence-transformers
        "compute_metrics": trainer.compute_metrics is not None,
        # Not a rule that the trainer derived.
        "per_sample_loss_fn": given_loss is not None
        and rule is not None
        and rule.name not in RULES,
    }
    settings = ", ".join(f"{name}={_code(value)}" for name, value in policy.given.items())
    return {
        "config": config.__name__,
        "config_module": _module_of(config),
        "imports": {module: sorted(imports[module]) for module in sorted(imports)},
        "arguments": arguments,  # name -> Python
        "trainer": type(trainer).__name__,
        "given": [name for name, is_given in given.items() if is_given],  # to the trainer
        "policy": f"{type(policy).__name__}({settings})",
    }


def _module_of(cls: type) -> str:
    """The module that a reader imports a class from; empty for a class of the user's script."""
    top = cls.__module__.partition(".")[0]
    package = sys.modules[top]  # not imported: no module depends on our table of contents
    if hasattr(package, "__path__") and getattr(package, cls.__name__, None) is cls:
        return top
    return cls.__module__ if top == "hf_dynprune" else ""


def command_of(argv: Sequence[str], ranks: int = 1) -> str:
    """The command line of a script in a folder called `recipes`; empty for other programs.

    Tokens are left out. Of a path that leads out of the working directory only the last part stays.
    """
    script, *arguments = argv or [""]
    if Path(script).parent.name != "recipes":
        return ""
    shown, is_token = [], False
    for argument in map(printable, arguments):
        option, _, value = argument.partition("=")
        names_token = _TOKEN.fullmatch(option) is not None
        if not (names_token or is_token):
            shown.append(hide_folders(argument))
        is_token = names_token and not value  # then the next argument is the token
    launcher = f"torchrun --nproc_per_node {ranks}" if ranks > 1 else "python"
    return f"{launcher} {shlex.join([f'recipes/{Path(script).name}', *shown])}"


def _code(value: Any) -> str:
    """The value as Python, without what is private."""
    return literal(hide_folders(value.value if isinstance(value, Enum) else value))


def _listed(value: Any) -> list[Any]:
    """A list of one value, of several, or of none."""
    if value is None:
        return []
    return [value] if isinstance(value, str | PruningReport) else list(value)
