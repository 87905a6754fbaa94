"""Model cards: what was pruned, what it cost, what it reached, how to load and to repeat it. A reader of the report.

`trainer.create_model_card()` and `trainer.push_to_hub()` of a pruned run write the card of [`card_of_trainer`].
"""

import inspect
import json
import math
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import fields
from enum import Enum
from pathlib import Path
from typing import Any

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
from .report import PruningReport

_TEMPLATE = Path(__file__).with_name("model_card_template.md")

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


def card_of_report(
    report: PruningReport,
    data: ModelCardData,
    *,
    policy: PruningPolicy | None = None,
    origin: str = "This model was trained from scratch.",
    training: Mapping[str, Any] | None = None,
    full_steps: int | None = None,
    loading: str = "",
    repeating: str = "",
    notes: Sequence[str] = (),
) -> ModelCard:
    """The card of a run, from its record and from what only the caller knows.

    Args:
        report: the record.
        data: the metadata; the tags `dynamic-data-pruning` (or `static-data-pruning`) and the policy's name and the block
            `hf_dynprune` are added.
        policy: what chose the samples, *optional*, defaults to the one of `POLICIES` that the report names.
        origin: a sentence: trained from scratch, or from which model and on what.
        training: hyperparameters, by the words to show.
        full_steps: optimizer steps of the full run of as many epochs, if known.
        loading: Python that loads the model; without it the section is left out.
        repeating: Python that trains it again, likewise.
        notes: paragraphs to add below the cost.
    """
    policy = make_policy(**report.policy) if policy is None else policy
    kind = "static" if isinstance(policy, StaticPruning) else "dynamic"
    data.tags = list(dict.fromkeys([*(data.tags or []), f"{kind}-data-pruning", policy.name]))
    data["hf_dynprune"] = {
        "version": report.environment.get("hf_dynprune"),
        "policy": report.policy,
        "cost_ratio": round(report.cost_ratio, 4),
        "passes": round(report.passes),
        "num_samples": report.num_samples,
        "num_epochs": report.num_epochs,
    }
    last = next((record for record in reversed(report.epochs) if record.metrics), None)
    environment, ranks = report.environment, report.environment.get("ranks", 1)
    versions = {"hf_dynprune": environment.get("hf_dynprune", "unknown"), **environment.get("versions", {})}
    # The blocks of the template stand on lines of their own, which leave no trace.
    jinja = jinja2.Environment(
        trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True, undefined=jinja2.StrictUndefined
    )
    text = jinja.from_string(_TEMPLATE.read_text(encoding="utf-8")).render(
        card_data=data.to_yaml(),
        model_name=data.get("model_name", "Model"),
        origin=origin,
        report=report,
        totals=report.totals,
        selection=report.selection,
        metrics=results_of(report),
        evaluated_epoch="" if last is None else last.epoch + 1,
        full=isinstance(policy, FullData),
        static=isinstance(policy, StaticPruning),
        full_epochs=sum(record.full_data for record in report.epochs),
        full_passes=report.num_samples * report.num_epochs,
        full_steps=full_steps,
        policy=policy,
        summary=_summary(policy),
        fields=", ".join(f"`{name}={_code(value)}`" for name, value in report.policy.items() if name != "name"),
        scored=type(policy).score is not PruningPolicy.score,
        nonfinite=report.totals["nonfinite"],
        training=training or {},
        hardware=f"{ranks} × {environment['device']}" if ranks > 1 else environment.get("device", "unknown"),
        versions=", ".join(f"{name} {version}" for name, version in versions.items()),
        loading=loading,
        repeating=repeating,
        notes=notes,
    )
    return ModelCard(text)


def results_of(report: PruningReport) -> dict[str, float]:
    """The metrics of the last evaluation, without `eval_`, and without what tells of speed."""
    aside = re.compile(r".*(runtime|_per_second|_time)")
    return {name.removeprefix("eval_"): value for name, value in report.metrics.items() if not aside.fullmatch(name)}


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
) -> ModelCard:
    """The card of a trainer's last run; the arguments are those of `Trainer.create_model_card`.

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
    """
    report, policy, model = trainer.pruning_report, trainer.pruning, _base_of(trainer.model)
    hub = _hub_dataset(trainer.eval_dataset if trainer.eval_dataset is not None else trainer.train_dataset)
    dataset_ids = _listed(dataset_tags) or _listed(hub.get("id"))
    dataset_names = _listed(dataset) or dataset_ids
    task_names = _listed(tasks) or [
        task for task, classes in TASK_MAPPING.items() if type(model).__name__ in _names(classes)
    ]
    base, words = _base_model(model, finetuned_from)
    if license is None and base is not None:
        license = TrainingSummary(model_name=base, finetuned_from=base).license  # asks the Hub
    name = model_name or Path(trainer.args.output_dir).name or base or type(model).__name__
    existing = _existing_card(Path(trainer.args.output_dir) / "README.md")  # PEFT writes one when it saves
    old_tags = [tag for tag in _listed(existing.get("tags")) if tag not in POLICIES]
    library = existing.get("library_name") or ("peft" if model is not trainer.model else "transformers")
    results = {
        metric: value for metric, value in results_of(report).items() if math.isfinite(value) and not metric.endswith("loss")
    }
    data = ModelCardData(
        library_name=library,
        language=language,
        license=license,
        base_model=base,
        pipeline_tag=task_names[0] if task_names else None,
        tags=list(dict.fromkeys(["generated_from_trainer", *_listed(tags), *old_tags])),
        datasets=dataset_ids or None,
        metrics=list(results) or None,
        model_name=name,
    )
    if task_names and len(dataset_names) == 1:  # of several data sets it is not known which one the results are of
        data.eval_results = [
            EvalResult(
                task_type=task_names[0],
                dataset_type=dataset_ids[0] if dataset_ids else dataset_names[0],
                dataset_name=dataset_names[0],
                dataset_config=hub.get("config"),
                dataset_split=hub.get("split"),
                dataset_revision=hub.get("revision"),
                dataset_args=(_listed(dataset_args) or [None])[0],
                metric_type=metric,
                metric_name=metric,
                metric_value=value,
            )
            for metric, value in results.items()
        ] or None
    on = f" on {' and '.join(dataset_names)}" if dataset_names else ""
    pruner = trainer.pruner
    return card_of_report(
        report,
        data,
        policy=policy,
        origin=f"This model was {words}{on}.",
        training=_hyperparameters(trainer),
        full_steps=math.ceil(round(pruner.steps(report.num_samples) * report.num_epochs, 9)),
        loading=_loading(trainer),
        repeating=_repeating(trainer),
        notes=_notes(trainer),
    )


# ---- facts ----------------------------------------------------------------------------------------------------------


def _listed(value: str | Sequence[str] | None) -> list[Any]:
    return [] if value is None else [value] if isinstance(value, str) else list(value)


def _names(classes: Any) -> set[str]:
    """The class names of a mapping of transformers, whose values are names or tuples of names."""
    return {name for value in classes.values() for name in ([value] if isinstance(value, str) else value)}


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
        loaded = any(getattr(parameter, "_is_hf_initialized", False) for parameter in model.parameters())
        finetuned_from = getattr(getattr(model, "config", None), "_name_or_path", None) if loaded else None
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
    return finetuned_from, f"fine-tuned from [{finetuned_from}](https://huggingface.co/{finetuned_from})"


def _hub_dataset(dataset: Any) -> dict[str, str]:
    """Where on the Hub a `datasets.Dataset` was loaded from: id, revision, config and split, as far as it knows."""
    if not isinstance(dataset, datasets.Dataset):
        return {}
    urls = dataset.info.download_checksums or {}
    found = {match.groups() for url in urls if (match := re.match(r"hf://datasets/([^@]+)@(\w+)/", str(url)))}
    if len(found) != 1:
        return {}
    ((name, revision),) = found
    return {"id": name, "revision": revision, "config": dataset.info.config_name, "split": str(dataset.split)}


def _existing_card(path: Path) -> ModelCardData:
    return ModelCard.load(path, ignore_metadata_errors=True).data if path.exists() else ModelCardData()


def _hyperparameters(trainer: Any) -> dict[str, str]:
    args, pruner = trainer.args, trainer.pruner
    batch = (pruner.batch_size, pruner.accumulation, pruner.ranks)
    optimizer = getattr(trainer.optimizer, "optimizer", trainer.optimizer)
    group = optimizer.param_groups[0] if optimizer is not None else {}
    settings = [f"{key} {group[key]}" for key in ("momentum", "nesterov", "betas", "eps", "weight_decay") if group.get(key)]
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
        "precision": precision or str(next(trainer.model.parameters()).dtype).removeprefix("torch."),
        "seed": f"{pruner.seed}" + (f", of the order {pruner.data_seed}" if pruner.data_seed != pruner.seed else ""),
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


def _loading(trainer: Any) -> str:
    """Python that loads the model: by the Auto class that gives its class, else by the class itself."""
    model = _base_of(trainer.model)
    cls, config = type(model), getattr(model, "config", None)
    if getattr(transformers, cls.__name__, None) is not cls:
        return ""
    autos = [name for name in dir(transformers) if re.fullmatch("AutoModelFor(?!PreTraining).+", name)]
    loader = next((name for name in autos if cls in _loads(getattr(transformers, name), type(config))), cls.__name__)
    processor = _processor(trainer)
    lines = []
    vision = sys.modules.get("hf_dynprune.vision")
    architecture = getattr(config, "architecture", None)
    if vision is not None and architecture in vision.__all__:
        lines += [f"import hf_dynprune.vision  # makes {architecture} known to timm: pip install hf-dynprune[recipes]"]
    lines += [f"from transformers import {', '.join(sorted(filter(None, [processor, loader])))}"]
    source = trainer.hub_model_id or trainer.args.hub_model_id
    lines += ["", f'name = "{source}"' if source else 'name = "."  # the folder of this card']
    lines += [f"model = {loader}.from_pretrained(name)"]
    if processor:
        lines += [f"processor = {processor}.from_pretrained(name)"]
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
        return "AutoImageProcessor" if type(_base_of(trainer.model)).__name__.startswith("TimmWrapper") else None
    return "AutoProcessor"


def _repeating(trainer: Any) -> str:
    """Python that trains the same: the arguments that differ from their defaults, and the policy."""
    args, policy, cls = trainer.args, trainer.pruning, type(trainer)
    defaults = {field.name: field.default for field in fields(TrainingArguments)}
    names = [name for name in _ARGUMENTS if name == "seed" or getattr(args, name, None) != defaults.get(name)]
    arguments = [f"    {name}={_code(getattr(args, name))}," for name in names if hasattr(args, name)]
    own = [name for name in (cls.__name__, type(policy).__name__) if name in public_names]
    given = {
        "eval_dataset": args.eval_strategy != "no",
        "compute_metrics": trainer.compute_metrics is not None,
        "per_sample_loss_fn": trainer._loss_rule.name == "custom",
    }
    return "\n".join(
        [
            "from transformers import TrainingArguments",
            "",
            *([f"from hf_dynprune import {', '.join(sorted(own))}", ""] if own else []),
            "args = TrainingArguments(",
            '    output_dir="...",',
            *arguments,
            ")",
            f"trainer = {cls.__name__}(",
            "    model=model,",
            "    args=args,",
            "    train_dataset=train_dataset,",
            *[f"    {name}={name}," for name, is_given in given.items() if is_given],
            f"    pruning={_call(policy)},",
            ")",
            "trainer.train()",
        ]
    )


def _call(policy: PruningPolicy) -> str:
    """The shortest call that makes the policy: fields with their default values are left out."""
    settings = [
        f"{field.name}={_code(getattr(policy, field.name))}"
        for field in fields(policy)
        if getattr(policy, field.name) != field.default
    ]
    return f"{type(policy).__name__}({', '.join(settings)})"


def _code(value: Any) -> str:
    """The value as Python: an enum's as its value, a string in double quotes."""
    value = value.value if isinstance(value, Enum) else value
    return json.dumps(value, ensure_ascii=False) if isinstance(value, str) else repr(value)
