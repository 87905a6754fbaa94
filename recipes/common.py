"""What the recipes share: arguments, checks before the training, and what follows the training.

Arguments come from the command line or from a YAML file.
"""

import atexit
import ctypes
import gc
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, NoReturn

import datasets
import torch
import yaml
from transformers import HfArgumentParser, TrainerCallback, TrainingArguments
from transformers.trainer_utils import SaveStrategy

import hf_dynprune
from hf_dynprune import DynamicPruningTrainer, data
from hf_dynprune.advice import finished_run
from hf_dynprune.checks import did_you_mean
from hf_dynprune.files import REPORT_FILE, SCORES_FILE, TABLE_FILE
from hf_dynprune.report import shown_metric
from hf_dynprune.scoring_runs import METHODS, score_dataset


def option(default: Any, help: str) -> Any:
    """Make a command-line option: a field of a dataclass with a default and a help text."""
    return field(default=default, metadata={"help": help})


def computes_in_bf16() -> bool:
    """Whether this machine computes in bfloat16.

    If it only emulates bfloat16, as a CPU without AVX-512 does, autocast takes many times as long
    as float32. The recipes' --bf16 is off by default then.
    """
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if torch.accelerator.is_available():
        return True
    return torch.backends.cpu.get_cpu_capability() not in ("DEFAULT", "NO AVX", "AVX2")


BF16_HELP = "bfloat16 autocast; default: True if the hardware computes in it (not by emulation)."


# ---- arguments -----------------------------------------------------------------------------------


@dataclass
class DataArguments:
    """The data; a recipe sets the default of `dataset`."""

    _argument_group_name = "data"

    dataset: str = option("", "Hub id or local path of the dataset.")
    dataset_config: str | None = option(None, "Configuration of a dataset that has several.")
    train_split: str = option("train", "Split to train on, such as train or train[:10%%].")
    eval_split: str | None = option(
        None, "Split to evaluate on; default: validation, or test if there is no validation."
    )
    validation_share: float = option(
        0.0,
        "Hold out this share of the training split (the same rows in each run) and evaluate on it. "
        "The test set is not used. Set it to choose settings.",
    )

    def load_splits(self) -> tuple[datasets.Dataset, datasets.Dataset | None]:
        """Load the training split and the split to evaluate on."""
        return data.load_splits(
            self.dataset,
            self.dataset_config,
            train=self.train_split,
            evaluation=self.eval_split,
            validation_share=self.validation_share,
        )

    def load_both_splits(self) -> tuple[datasets.Dataset, datasets.Dataset]:
        """The same for a recipe that always evaluates."""
        train, evaluation = self.load_splits()
        if evaluation is None:
            raise ValueError(
                f"The dataset {self.dataset!r} has no validation or test split: name one with "
                "--eval_split, or hold out a part of the training split with --validation_share."
            )
        return train, evaluation


@dataclass
class RunArguments:
    """The run, besides the Trainer's arguments."""

    _argument_group_name = "run"

    overwrite: bool = option(False, "Write into an output folder that contains a run.")
    advise: bool = option(
        False,
        "Do not train. Train a few batches, and print how long the run would take on all data and "
        "pruned.",
    )
    after: str | None = option(
        None,
        "With --advise True: a finished run on the same data, best a short one. The advice then "
        "says whether pruning can pay.",
    )


@dataclass
class ModelArguments(RunArguments):
    """A text model, pretrained or not, and the run; a recipe sets the default of `model`."""

    _argument_group_name = "model and run"

    model: str = option(
        "", "Hub id or local path of a model; gives weights, configuration and tokenizer."
    )
    from_scratch: bool = option(False, "Start from random weights.")
    model_config: dict[str, Any] | str | None = option(
        None,
        "Train a model from scratch with this configuration instead of that of --model. JSON, such "
        'as \'{"model_type": "llama", "hidden_size": 128, "num_hidden_layers": 4}\'.',
    )
    tokenizer_vocabulary: int | None = option(
        None,
        "Train a tokenizer (byte-level BPE) with this many tokens on the training texts, instead "
        "of using that of --model. Only for a model from scratch.",
    )
    attn_implementation: str | None = option(
        None,
        "The model's attention, such as sdpa, eager or flash_attention_2; default: the model's.",
    )

    def __post_init__(self) -> None:
        if isinstance(self.model_config, str):
            try:
                self.model_config = json.loads(self.model_config)
            except json.JSONDecodeError as error:
                raise ValueError(
                    f"model_config={self.model_config!r} is not JSON ({error})."
                ) from error
        if self.model_config is not None:
            if not isinstance(self.model_config, dict) or "model_type" not in self.model_config:
                raise ValueError(
                    f"model_config={self.model_config!r} is not a mapping with a model_type: "
                    'expected one such as {"model_type": "llama", "hidden_size": 128}.'
                )
            self.from_scratch = True
        if self.tokenizer_vocabulary is not None and self.tokenizer_vocabulary < 1:
            raise ValueError(
                f"tokenizer_vocabulary={self.tokenizer_vocabulary} is out of range: expected a "
                "number of tokens, such as 8000."
            )
        if self.tokenizer_vocabulary is not None and not self.from_scratch:
            raise ValueError(
                f"tokenizer_vocabulary={self.tokenizer_vocabulary} trains a new tokenizer, which "
                f"does not match the pretrained weights of {self.model}: set --from_scratch True "
                "or --model_config, or leave it out."
            )


@dataclass
class ScoringArguments:
    """Scores made before a run, for static pruning or a reference."""

    score: str | None = option(
        None,
        "Do not train a model. Score the training samples into <output_dir>/scores.safetensors, by "
        f"{', '.join(METHODS)}. All but reference are for static pruning. reference is for the "
        "policy reference-loss: by a model trained on the samples set aside for it, or without "
        "such samples by two models, each trained on the half that it does not score.",
    )
    score_runs: int | None = option(None, "Runs to combine; default: as published.")
    score_epochs: int | None = option(None, "Epochs before scoring; default: as published.")


@dataclass
class CPUDefaults:
    """Defaults of a trainer's arguments that also work on a CPU. Put it before their class."""

    # transformers allows bf16 on a CPU only if this is set.
    use_cpu: bool = option(
        not torch.accelerator.is_available(),
        "Train on the CPU; default: True if there is no accelerator.",
    )
    dataloader_pin_memory: bool = option(
        torch.cuda.is_available(), "Load into pinned memory, from which CUDA copies faster."
    )
    save_strategy: SaveStrategy | str = option(
        "no", "When to write checkpoints: no, epoch or steps."
    )


@dataclass
class TrainerArguments(CPUDefaults, TrainingArguments):
    """The Trainer's arguments, with defaults that also work on a CPU."""

    _argument_group_name = "all arguments of the Trainer"


def keep_freed_memory() -> None:
    """On a CPU, let glibc keep the memory that a step frees for the next step.

    By default it returns the activations to the system, which maps and zeroes them again in each
    step, page by page. recipes/benchmarks/LOG.md says what that costs.
    """
    if sys.platform != "linux" or torch.accelerator.is_available():
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # other C libraries have none
    if mallopt is not None:
        m_trim_threshold, m_mmap_threshold, m_arena_max = -1, -3, -8
        mallopt(m_trim_threshold, 2**31 - 1)
        if not mallopt(m_mmap_threshold, 2**30):
            mallopt(m_mmap_threshold, 2**25)  # the most that an older glibc takes
        # The memory of other threads' arenas is returned whatever the thresholds are.
        mallopt(m_arena_max, 1)


def parse(description: str, *groups: Any) -> tuple[Any, ...]:
    """Parse `script.py [config.yaml] [--option value ...]` into an object of each dataclass.

    Options override the file. A mistake ends the program with status 2 and a message, before
    anything expensive happens.
    """
    parser = HfArgumentParser(
        groups,
        usage="%(prog)s [config.yaml] [--option value ...]",
        description=description.partition("\n\n")[0].replace("\n", " "),
        epilog="The YAML file maps names of options to values. Options override it.",
    )
    keep_freed_memory()
    arguments = sys.argv[1:]
    if arguments and arguments[0].endswith((".yaml", ".yml")):
        parser.set_defaults(**_settings(parser, arguments.pop(0), groups))
    with user_mistakes(parser):
        return parser.parse_args_into_dataclasses(args=arguments)


def _settings(parser: HfArgumentParser, file: str, groups: tuple[Any, ...]) -> dict[str, Any]:
    """Read a YAML file of options."""
    known = [field.name for group in groups for field in fields(group) if field.init]
    try:
        settings = yaml.safe_load(Path(file).read_text())
    except (OSError, yaml.YAMLError) as error:
        parser.error(f"the configuration {file} cannot be read: {error}")
    if not isinstance(settings, dict):
        parser.error(
            f"the configuration {file} is not a mapping of names to values, such as "
            "`keep_ratio: 0.3`."
        )
    for name in settings:
        if name not in known:
            meant = did_you_mean(name, known) or "--help lists the known ones."
            parser.error(f"{file} has the unknown field {name!r}: {meant}")
    return settings


# ---- checks --------------------------------------------------------------------------------------


@contextmanager
def user_mistakes(parser: HfArgumentParser | None = None) -> Iterator[None]:
    """End the program with a message and status 2 if arguments, paths or columns are wrong.

    Do not use it around the training: an error there needs its traceback.
    """
    try:
        yield
    except (ValueError, TypeError, OSError) as error:
        if parser is not None:
            parser.error(str(error))
        _fail(f"{Path(sys.argv[0]).name}: error: {error}")


def _fail(message: str) -> NoReturn:
    print(message, file=sys.stderr)
    raise SystemExit(2)


def check_output(args: Any, run: RunArguments) -> None:
    """Raise FileExistsError if the output folder contains a run that would be overwritten.

    It may be resumed, or overwritten with --overwrite. With --advise nothing is written; the run of
    --after must exist, which is known here before a model is made.

    Args:
        args: Has `output_dir`, and `resume_from_checkpoint` if the recipe can resume.
        run: The recipe's options.
    """
    if run.advise and not isinstance(args, TrainingArguments):
        raise ValueError("--advise True needs a Trainer, and this recipe has none: leave it out.")
    if run.after is not None and not run.advise:
        raise ValueError(f"--after {run.after} is for the advice: add --advise True.")
    if run.after is not None:
        finished_run(run.after)
    folder, can_resume = Path(args.output_dir), hasattr(args, "resume_from_checkpoint")
    # The Trainer takes True for the newest checkpoint; the command line gives a string.
    if can_resume and args.resume_from_checkpoint in ("True", "true"):
        args.resume_from_checkpoint = True
    if run.overwrite or run.advise or (can_resume and args.resume_from_checkpoint):
        return
    found = [*sorted(folder.glob(REPORT_FILE)), *sorted(folder.glob("checkpoint-*"))]
    if found:
        resume = "resume it with --resume_from_checkpoint True, " if can_resume else ""
        raise FileExistsError(
            f"{folder} contains a run ({', '.join(path.name for path in found[:3])}): choose "
            f"another --output_dir, {resume}or overwrite it with --overwrite True."
        )


# ---- training ------------------------------------------------------------------------------------


class SharedStatistics(TrainerCallback):
    """Give all ranks the BatchNorm statistics of rank 0 before the model is evaluated or saved.

    Each rank updates its own statistics, and those of rank 0 are saved. So the ranks evaluate what
    is saved. DDP shares the same statistics in the next training step anyway.
    """

    def on_step_end(
        self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any
    ) -> None:
        if control.should_evaluate or control.should_save:
            self.on_epoch_end(args, state, control, model)

    def on_epoch_end(
        self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any
    ) -> None:
        if args.world_size > 1:
            from timm.utils import distribute_bn

            distribute_bn(model, args.world_size)


def train(
    trainer: DynamicPruningTrainer,
    *,
    dataset: str,
    task: str,
    metric: str,
    evaluate_also: Callable[[], None] | None = None,
    advise: bool = False,
    after: str | None = None,
) -> None:
    """Train, evaluate, and write the model, its card, report.json and table.safetensors.

    The table contains what is known of each sample. The model is pushed to the Hub if the
    arguments say so.

    Args:
        trainer: The trainer. Its arguments say where to write and what to resume.
        dataset: Hub id or local path, for the card.
        task: For the card, such as `"image-classification"`.
        metric: The metric to print, without `eval_`.
        evaluate_also: Called after the last evaluation. What it adds to the report is in all files.
        advise: Train and write nothing, but print how long the run would take.
        after: A finished run, for the advice.
    """
    args = trainer.args
    if advise:
        advice = hf_dynprune.advise(trainer, after=after)
        if trainer.is_world_process_zero():
            print(advice)
        return
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    report = trainer.pruning_report
    if trainer.eval_dataset is not None and not report.epochs[-1].metrics:
        trainer.evaluate()
    if evaluate_also is not None:
        evaluate_also()
    if trainer.is_world_process_zero():
        report.save(Path(args.output_dir) / REPORT_FILE)
        trainer.pruner.table.save(Path(args.output_dir) / TABLE_FILE)
    trainer.save_model()
    # A local path would be of no use to readers of the card.
    name = Path(dataset).resolve().name if Path(dataset).exists() else dataset
    about = {"dataset": name, "tasks": task}
    trainer.create_model_card(**about)
    if trainer.is_world_process_zero():
        print(f"{_in_a_line(report, metric)} Written to {args.output_dir}.")
    if args.push_to_hub:
        trainer.push_to_hub(**about)
    leave_together()


def score(
    options: ScoringArguments, args: TrainingArguments, *, holdout: Any = None, **arguments: Any
) -> None:
    """Score the training samples, write the scores, and print what they cost.

    Args:
        options: Names the method.
        args: Of the runs that make the scores.
        holdout: The samples that a reference trains on. Other methods do not use it.
        arguments: More arguments of `score_dataset`.
    """
    scores = score_dataset(
        options.score,
        args=args,
        holdout=holdout if options.score == "reference" else None,
        runs=options.score_runs,
        epochs=options.score_epochs,
        output_dir=args.output_dir,
        **arguments,
    )
    print(
        f"{options.score}: {scores.provenance['passes']:,.0f} passes. Written to "
        f"{args.output_dir}/{SCORES_FILE}."
    )


def _in_a_line(report: hf_dynprune.PruningReport, metric: str) -> str:
    """Describe a run in one sentence."""
    value = report.metrics.get(f"eval_{metric}")
    reached = ""
    if value is not None:
        reached = f"{metric} {shown_metric(metric, value)} (last epoch), "
    seconds = report.totals["seconds"]
    return (
        f"{report.policy['name']}: {reached}cost {report.cost_ratio:.4f} of the full run of "
        f"{report.num_epochs:g} epochs, {report.totals['optimizer_steps']} steps, "
        f"{seconds['training']:.1f} s training, {seconds['choosing']:.2f} s choosing."
    )


def leave_together() -> None:
    """At the end of the program, let the ranks wait for each other and then close their group.

    Call it when a run is done. A rank that leaves while another one still communicates can be
    aborted. The group must not be closed before the variables of `main` are gone: it would end with
    the last model in DDP, which waits for gloo's threads and holds the GIL. A thread of gloo that
    needs the GIL to drop a tensor would then wait forever (seen in PyTorch).
    """
    if torch.distributed.is_initialized():
        atexit.register(_close_group)


def _close_group() -> None:
    gc.collect()  # models in reference cycles
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
