"""What the recipes share: their arguments, from the command line or a YAML file; mistakes told before anything is trained;
and what follows the training."""

import atexit
import ctypes
import difflib
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
from hf_dynprune.report import in_percent


def computes_in_bf16() -> bool:
    """Whether bfloat16 is computed in here. Where it is emulated, as by a CPU without AVX-512, autocast takes many times as
    long as float32: the recipes' --bf16 is off there, unless the user says otherwise."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.accelerator.is_available() or torch.backends.cpu.get_cpu_capability() not in (
        "DEFAULT",
        "NO AVX",
        "AVX2",
    )


BF16 = {
    "default": computes_in_bf16(),
    "metadata": {"help": "bfloat16 autocast; so where it is computed in, not emulated."},
}


@dataclass
class DataArguments:
    """The data; a recipe gives `dataset` its default."""

    _argument_group_name = "data"

    dataset: str = field(default="", metadata={"help": "Hub id or local path of the dataset."})
    dataset_config: str | None = field(
        default=None, metadata={"help": "Configuration of a dataset that has several."}
    )
    train_split: str = field(
        default="train", metadata={"help": "Split to train on, such as train or train[:10%%]."}
    )
    eval_split: str | None = field(
        default=None,
        metadata={
            "help": "Split to evaluate on; default: validation, else test, where there is one."
        },
    )
    validation_share: float = field(
        default=0.0,
        metadata={
            "help": "Evaluate on that share of the training split, which is held out for it (the same rows each time), and "
            "leave the test set alone: for whatever is chosen by trying."
        },
    )

    def load_splits(self) -> tuple[datasets.Dataset, datasets.Dataset | None]:
        """Training split, split to evaluate on."""
        return data.load_splits(
            self.dataset,
            self.dataset_config,
            train=self.train_split,
            evaluation=self.eval_split,
            validation_share=self.validation_share,
        )


@dataclass
class RunArguments:
    """The run, beside what the Trainer's arguments say of it."""

    _argument_group_name = "run"

    overwrite: bool = field(
        default=False, metadata={"help": "Write into an output folder that holds a run already."}
    )
    advise: bool = field(
        default=False,
        metadata={
            "help": "Do not train: print what the run would take, on all data and pruned, by a dry run of some batches."
        },
    )


@dataclass
class ModelArguments(RunArguments):
    """A model of text, pretrained or from scratch, and the run; a recipe gives `model` its default."""

    _argument_group_name = "model and run"

    model: str = field(
        default="",
        metadata={
            "help": "Hub id or local path of a model: of its weights, configuration and tokenizer."
        },
    )
    from_scratch: bool = field(default=False, metadata={"help": "Start from random weights."})
    model_config: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": "A model from scratch with this configuration in place of that of --model, as JSON, such as "
            '\'{"model_type": "llama", "hidden_size": 128, "num_hidden_layers": 4}\'.'
        },
    )
    tokenizer_vocabulary: int | None = field(
        default=None,
        metadata={
            "help": "Train a tokenizer (byte-level BPE) of so many tokens on the training texts, in place of that of "
            "--model; for a model from scratch."
        },
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
                    f"model_config={self.model_config!r} is no mapping with a model_type, such as "
                    '{"model_type": "llama", "hidden_size": 128}.'
                )
            self.from_scratch = True
        if self.tokenizer_vocabulary is not None and self.tokenizer_vocabulary < 1:
            raise ValueError(
                f"tokenizer_vocabulary={self.tokenizer_vocabulary} is no number of tokens, such as 8000."
            )
        if self.tokenizer_vocabulary is not None and not self.from_scratch:
            raise ValueError(
                f"tokenizer_vocabulary={self.tokenizer_vocabulary} trains a tokenizer that the pretrained weights of "
                f"{self.model} do not know: start with --from_scratch True or --model_config, or leave it out."
            )


@dataclass
class TrainerArguments(TrainingArguments):
    """The Trainer's arguments, where they run on a CPU, too; a recipe gives its own defaults."""

    _argument_group_name = "all arguments of the Trainer"

    # transformers wants to be told before it lets a CPU have bf16.
    use_cpu: bool = field(
        default=not torch.accelerator.is_available(),
        metadata={"help": "Train on the CPU; so where there is no other."},
    )
    dataloader_pin_memory: bool = field(
        default=torch.cuda.is_available(),
        metadata={"help": "Load into pinned memory, from which CUDA copies faster."},
    )
    save_strategy: SaveStrategy | str = field(
        default="no", metadata={"help": "When to write checkpoints: no, epoch, steps."}
    )


def keep_freed_memory() -> None:
    """Where a CPU trains: lets glibc keep what a step frees for the next one. It would return the activations to the system
    and have them mapped and zeroed anew in each step, page by page; recipes/benchmarks/LOG.md says what that costs."""
    if sys.platform != "linux" or torch.accelerator.is_available():
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # other C libraries have none
    if mallopt is not None:
        m_trim_threshold, m_mmap_threshold, m_arena_max = -1, -3, -8
        mallopt(m_trim_threshold, 2**31 - 1)
        mallopt(m_mmap_threshold, 2**30) or mallopt(
            m_mmap_threshold, 2**25
        )  # the most that an older glibc takes
        mallopt(
            m_arena_max, 1
        )  # the heaps of other threads are given back whatever the thresholds are


def parse(description: str, *groups: Any) -> tuple[Any, ...]:
    """An object of each dataclass, from `script.py [config.yaml] [--option value ...]`; options override the file.

    A mistake ends the program with status 2 and a message, before anything heavy happens.
    """
    parser = HfArgumentParser(
        groups,
        usage="%(prog)s [config.yaml] [--option value ...]",
        description=description.partition("\n\n")[0].replace("\n", " "),
        epilog="Options override those of the YAML file, which is a mapping of the same names.",
    )
    keep_freed_memory()
    arguments = sys.argv[1:]
    if arguments and arguments[0].endswith((".yaml", ".yml")):
        parser.set_defaults(**_settings(parser, arguments.pop(0), groups))
    with user_mistakes(parser):
        return parser.parse_args_into_dataclasses(args=arguments)


def _settings(parser: HfArgumentParser, file: str, groups: tuple[Any, ...]) -> dict[str, Any]:
    known = [field.name for group in groups for field in fields(group) if field.init]
    try:
        settings = yaml.safe_load(Path(file).read_text())
    except (OSError, yaml.YAMLError) as error:
        parser.error(f"the configuration {file} cannot be read: {error}")
    if not isinstance(settings, dict):
        parser.error(
            f"the configuration {file} is no mapping of names to values, such as `keep_ratio: 0.3`."
        )
    for name in settings:
        if name not in known:
            close = difflib.get_close_matches(str(name), known, n=1)
            meant = f"did you mean {close[0]!r}?" if close else "--help lists them."
            parser.error(f"{file} has the unknown field {name!r}; {meant}")
    return settings


@contextmanager
def user_mistakes(parser: HfArgumentParser | None = None) -> Iterator[None]:
    """What is wrong with arguments, paths or columns: a message and status 2, not a traceback. Never around the training."""
    try:
        yield
    except (ValueError, TypeError, OSError) as error:
        _fail(f"{Path(sys.argv[0]).name}: error: {error}") if parser is None else parser.error(
            str(error)
        )


def _fail(message: str) -> NoReturn:
    print(message, file=sys.stderr)
    raise SystemExit(2)


def check_output(args: Any, run: RunArguments) -> None:
    """An output folder that holds a run is written to only if that is continued, or if the user says so.

    `args` have `output_dir`, and `resume_from_checkpoint` where a run can be continued.
    """
    if run.advise and not isinstance(args, TrainingArguments):
        raise ValueError(
            "--advise True lets a Trainer train some batches, and this recipe has none: leave it out."
        )
    folder, can_resume = Path(args.output_dir), hasattr(args, "resume_from_checkpoint")
    found = [
        path.name
        for pattern in ("report.json", "checkpoint-*")
        for path in sorted(folder.glob(pattern))
    ]
    if can_resume and args.resume_from_checkpoint in (
        "True",
        "true",
    ):  # the Trainer's way to say: the newest
        args.resume_from_checkpoint = True
    if (
        found
        and not run.overwrite
        and not run.advise
        and not (can_resume and args.resume_from_checkpoint)
    ):
        way_on = "continue it with --resume_from_checkpoint True, " if can_resume else ""
        raise FileExistsError(
            f"{folder} holds a run already ({', '.join(found[:3])}): choose another --output_dir, {way_on}"
            "or write over it with --overwrite True."
        )


class SharedStatistics(TrainerCallback):
    """Before a model is evaluated or saved all ranks get the BatchNorm statistics of rank 0, which are saved: so they
    evaluate what is saved. (Each rank updates its own; the next training step would share them as well.)"""

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
) -> None:
    """Trains, evaluates at the end if the last epoch was not, and writes model, card, report.json and
    table.safetensors (what is known of each sample); pushes if told to.

    `evaluate_also` is called after that evaluation: what it adds to the report is in all that is written. With `advise`
    nothing is trained or written, but what the run would take is printed.
    """
    args = trainer.args
    if advise:
        advice = hf_dynprune.advise(trainer)
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
        report.save(Path(args.output_dir) / "report.json")
        trainer.pruner.table.save(Path(args.output_dir) / "table.safetensors")
    trainer.save_model()
    # On the card a path of this machine would be of no use to others.
    words = {
        "dataset": Path(dataset).resolve().name if Path(dataset).exists() else dataset,
        "tasks": task,
    }
    trainer.create_model_card(**words)
    if trainer.is_world_process_zero():
        seconds = report.totals["seconds"]
        value = report.metrics.get(f"eval_{metric}")
        reached = ""
        if value is not None:
            shown = f"{100 * value:.2f} %" if in_percent(metric, [value]) else f"{value:.4f}"
            reached = f"{metric} {shown} (last epoch), "
        print(
            f"{report.policy['name']}: {reached}cost {report.cost_ratio:.4f} of the full run of {report.num_epochs:g} "
            f"epochs, {report.totals['optimizer_steps']} steps, {seconds['training']:.1f} s training, "
            f"{seconds['choosing']:.2f} s choosing. Written to {args.output_dir}."
        )
    if args.push_to_hub:
        trainer.push_to_hub(**words)
    leave_together()


def leave_together() -> None:
    """To be called when a run is done: at the program's end its ranks wait for each other, then close their group.

    A rank that leaves while another one still talks can be aborted. Not before the end, when `main`'s variables are gone:
    where the group is closed first, it goes with the last model in DDP, which waits for gloo's threads and holds the GIL.
    A thread that needs the GIL to drop a tensor then waits for ever (pytorch).
    """
    if torch.distributed.is_initialized():
        atexit.register(_close_group)


def _close_group() -> None:
    gc.collect()  # models in reference cycles
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
