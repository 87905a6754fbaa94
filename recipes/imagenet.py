"""ImageNet, or any folder of images by class, with a timm ResNet, on all data or on a part that changes.

    python recipes/imagenet.py --pruning ucb --keep_ratio 0.3 --output_dir runs/ucb
    accelerate launch recipes/imagenet.py recipes/configs/imagenet_pruned.yaml --output_dir runs/ucb
    torchrun --nproc_per_node 8 recipes/imagenet.py --pruning full --num_train_epochs 27 --output_dir runs/short

`--dataset` is a Hub id or a local path: a folder of images (train/ and val/, a folder for each class) or of parquet files.
The short run, the baseline to beat, is `--pruning full` with fewer epochs. Writes report.json, the model and its card to
`--output_dir`, and a checkpoint after each epoch, from which `--resume_from_checkpoint True` continues the identical run:
how a sample is augmented is a function of seed, epoch and sample alone.

The defaults are the common recipe for a ResNet-50 from scratch at 224 pixels, tuned for no pruning rule: 90 epochs of SGD
with Nesterov momentum 0.9, a learning rate of 0.1 for each 256 samples of the global batch behind 5 epochs of warm-up
(Goyal et al. 2017), then half a cosine (Loshchilov & Hutter 2017), weight decay 1e-4 but not on norms and biases, label
smoothing 0.1 (He et al. 2019), random-resized crops of 8 to 100 % of an image and mirroring; evaluation on the centre crop
of 224 pixels from a short side of 256. `--auto_augment`, `--random_erasing` and `--ema_decay` are for longer runs. It was
tried on 20 classes of Tiny-ImageNet at 64 pixels (recipes/results/tiny_imagenet); on ImageNet itself we have not run it.

With `--ema_decay` there are two models and two results: the last weights, in `--output_dir` and `eval_*`, and their moving
average, in `--output_dir`/ema and `eval_ema_*`.
"""

import os
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import common
import datasets
import numpy as np
import timm.data
import timm.optim
import timm.utils
import torch
from metrics import accuracy_of, best_classes
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from transformers import SchedulerType, Trainer, TrainerCallback, set_seed
from transformers.trainer_utils import IntervalStrategy, SaveStrategy

from hf_dynprune import DynamicPruningTrainer, FullData, PruningArguments
from hf_dynprune.data import class_names, find_column
from hf_dynprune.vision import create_timm_model


@dataclass
class DataArguments(common.DataArguments):
    dataset: str = field(
        default="ILSVRC/imagenet-1k",
        metadata={
            "help": "Hub id or local path of the dataset: images by class in train/ and val/, or parquet files."
        },
    )
    image_column: str | None = field(
        default=None, metadata={"help": "Name of the image column; default: the only one."}
    )
    label_column: str | None = field(
        default=None, metadata={"help": "Name of the label column; default: label."}
    )


@dataclass
class RecipeArguments(common.RunArguments):
    """Model, images and run."""

    _argument_group_name = "model, images and run"

    model: str = field(
        default="resnet50", metadata={"help": "Any timm architecture, such as resnet18, 34, 50."}
    )
    image_size: int = field(default=224, metadata={"help": "Side of a training image in pixels."})
    eval_image_size: int | None = field(
        default=None,
        metadata={
            "help": "Side of an evaluation image in pixels; default: that of a training image."
        },
    )
    crop_pct: float = field(
        default=0.875,
        metadata={
            "help": "Evaluation: the crop's part of the short side; 0.875 scales that to 256 for a crop of 224."
        },
    )
    min_crop: float = field(
        default=0.08,
        metadata={"help": "Training: the least share of an image's area that a random crop takes."},
    )
    auto_augment: str | None = field(
        default=None,
        metadata={
            "help": "timm's name of a policy, such as rand-m7-mstd0.5 (RandAugment); default: none."
        },
    )
    color_jitter: float = field(
        default=0.0,
        metadata={
            "help": "Largest change of brightness, contrast, saturation; timm's usual is 0.4."
        },
    )
    random_erasing: float = field(
        default=0.0, metadata={"help": "Probability to erase a random part of an image."}
    )
    base_learning_rate: float = field(
        default=0.1,
        metadata={
            "help": "learning_rate = base_learning_rate × global batch / 256, unless --learning_rate is given."
        },
    )
    momentum: float = field(default=0.9, metadata={"help": "Nesterov momentum of SGD."})
    ema_decay: float = field(
        default=0.0,
        metadata={
            "help": "Decay of a moving average of the weights, such as 0.9999 (approached from 0, as 1 - steps^(-2/3)); it "
            "is evaluated and saved beside the last weights. 0: none."
        },
    )

    def __post_init__(self) -> None:
        if not 0 <= self.ema_decay < 1:
            raise ValueError(
                f"ema_decay must be in [0, 1), such as 0.9999, or 0 for no average, got {self.ema_decay}."
            )
        if not 0 < self.min_crop <= 1:
            raise ValueError(
                f"min_crop must be a share of the image's area, in (0, 1], got {self.min_crop}."
            )
        if self.auto_augment and self.color_jitter:
            raise ValueError(
                f"timm lets auto_augment={self.auto_augment!r} replace color_jitter={self.color_jitter}: leave one out."
            )


@dataclass
class ImageNetTrainingArguments(common.TrainerArguments):
    """The Trainer's arguments, with the defaults of an ImageNet run."""

    output_dir: str = field(default="runs/imagenet", metadata={"help": "Where to write."})
    num_train_epochs: float = field(default=90.0, metadata={"help": "Epochs."})
    per_device_train_batch_size: int = field(
        default=256, metadata={"help": "Training batch of one rank."}
    )
    per_device_eval_batch_size: int = field(
        default=256, metadata={"help": "Evaluation batch of one rank."}
    )
    learning_rate: float | None = field(
        default=None,
        metadata={
            "help": "Peak learning rate of SGD; default: --base_learning_rate × global batch / 256."
        },
    )
    weight_decay: float = field(
        default=1e-4, metadata={"help": "Weight decay, not on norms and biases."}
    )
    label_smoothing_factor: float = field(default=0.1, metadata={"help": "Label smoothing."})
    warmup_steps: float = field(
        default=0.055, metadata={"help": "LR warm-up: a share below 1, or steps."}
    )
    lr_scheduler_type: SchedulerType | str = field(
        default="cosine", metadata={"help": "Schedule behind the warm-up."}
    )
    max_grad_norm: float = field(default=0.0, metadata={"help": "Gradient clipping; 0 is none."})
    bf16: bool = field(**common.BF16)
    dataloader_num_workers: int = field(
        default=min(8, os.cpu_count() or 1),
        metadata={"help": "Processes of one rank that load and augment images."},
    )
    dataloader_persistent_workers: bool = field(
        default=True, metadata={"help": "Keep them from epoch to epoch."}
    )
    eval_strategy: IntervalStrategy | str = field(
        default="epoch", metadata={"help": "When to evaluate: no, epoch, steps."}
    )
    save_strategy: SaveStrategy | str = field(
        default="epoch", metadata={"help": "When to write checkpoints: no, epoch, steps."}
    )
    save_total_limit: int | None = field(default=2, metadata={"help": "Checkpoints to keep."})
    logging_steps: float = field(default=100, metadata={"help": "Log every so many steps."})
    logging_nan_inf_filter: bool = field(
        default=False, metadata={"help": "Costs a device synchronisation a step."}
    )
    ddp_find_unused_parameters: bool | None = field(
        default=False,
        metadata={"help": "Several ranks: look for weights that a step does not use; costs time."},
    )


class LabelledImages(torch.utils.data.Dataset):
    """The images of a split through a transform, with their labels: {"pixel_values": as transformed, "labels": int}.

    What a transform draws from the global random states, as timm's and torchvision's do, is a pure function of
    (seed, epoch, sample index): it does not depend on batch, workers, ranks or a resume, and the states stay as they were.
    Call `set_epoch` before an epoch's iterator is made; running workers see it, too.

    Args:
        split: with an `Image` column.
        image_column, label_column: of the split.
        num_labels: labels are 0, ..., num_labels - 1.
        transform: of a PIL image, which is RGB whatever the file is.
        seed: of the transform.

    Raises:
        ValueError: for labels that are no classes, such as the -1 of a test split whose labels are kept secret.
    """

    def __init__(
        self,
        split: datasets.Dataset,
        image_column: str,
        label_column: str,
        num_labels: int,
        transform: Callable[[Any], Any],
        seed: int,
    ) -> None:
        wrong = sorted(set(split.unique(label_column)) - set(range(num_labels)), key=str)
        if wrong:
            raise ValueError(
                f"The split {str(split.split)!r} has labels that are no classes, {wrong[:5]}, where 0 to {num_labels - 1} "
                "are wanted: choose another split."
            )
        self.rows = split.cast_column(image_column, datasets.Image(mode="RGB"))
        self.image_column, self.label_column = image_column, label_column
        self.transform, self.seed = transform, seed
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    def set_epoch(self, epoch: int) -> None:
        self._epoch.fill_(epoch)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = self.rows[index]
        with random_states(self.seed, int(self._epoch), index):
            pixels = self.transform(row[self.image_column])
        return {"pixel_values": pixels, "labels": row[self.label_column]}


@contextmanager
def random_states(*entropy: int) -> Iterator[None]:
    """Within, the global random states of Python, NumPy and torch (on the CPU) follow from the numbers; afterwards they are
    as before."""
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()
    seeds = np.random.SeedSequence(entropy).generate_state(3).tolist()
    random.seed(seeds[0])
    np.random.seed(seeds[1])
    torch.default_generator.manual_seed(seeds[2])  # torch.manual_seed would seed the GPU, too
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
        torch.set_rng_state(before[2])


def make_transforms(recipe: RecipeArguments, config: dict[str, Any]) -> tuple[Callable, Callable]:
    """timm's transforms for training and for evaluation; `config` is the model's, so the latter is its image processor's."""
    evaluation = timm.data.resolve_data_config(config)
    try:
        training = timm.data.create_transform(
            **{**evaluation, "input_size": recipe.image_size},
            is_training=True,
            scale=(recipe.min_crop, 1.0),
            auto_augment=recipe.auto_augment,
            color_jitter=recipe.color_jitter or None,
            re_prob=recipe.random_erasing,
            re_mode="pixel",
        )
    except (AssertionError, KeyError) as error:
        raise ValueError(
            f"timm {timm.__version__} cannot read auto_augment={recipe.auto_augment!r} ({error}): give one such as "
            "rand-m7-mstd0.5, or leave it out."
        ) from error
    return training, timm.data.create_transform(**evaluation)


class WeightAverage(TrainerCallback):
    """A moving average of the weights and statistics, updated after each optimizer step.

    It travels in the optimizer's state, with which the Trainer writes and reads it: a run that resumes has it to the bit.
    """

    def __init__(self, trainer: Trainer, decay: float) -> None:
        self.model = trainer.model
        self.average = timm.utils.ModelEmaV3(self.model, decay=decay, use_warmup=True)
        trainer.optimizer.register_state_dict_post_hook(self._add_to)
        trainer.optimizer.register_load_state_dict_pre_hook(self._take_from)

    def _add_to(self, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
        state["ema"] = self.average.module.state_dict()

    def _take_from(self, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
        if "ema" not in state:
            raise ValueError(
                "The checkpoint has no average of the weights: resume with --ema_decay 0, as the run began."
            )
        self.average.module.load_state_dict(state["ema"])

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.average.update(self.model, step=state.global_step)

    def evaluate(self, trainer: DynamicPruningTrainer) -> None:
        """Evaluates the average as `eval_ema_*`, and saves it in `ema/`; the model keeps its own weights."""
        folder = Path(trainer.args.output_dir) / "ema"
        if trainer.args.world_size > 1:
            timm.utils.distribute_bn(self.average.module, trainer.args.world_size)
        last = {name: tensor.clone() for name, tensor in self.model.state_dict().items()}
        self.model.load_state_dict(self.average.module.state_dict())
        metrics = trainer.evaluate(metric_key_prefix="eval_ema")
        self.model.load_state_dict(last)
        if trainer.is_world_process_zero():
            self.average.module.save_pretrained(folder)
            print(
                f"average of the weights: accuracy {100 * metrics['eval_ema_accuracy']:.2f} %. Written to {folder}."
            )


def main() -> None:
    data, recipe, pruning, args = common.parse(
        __doc__, DataArguments, RecipeArguments, PruningArguments, ImageNetTrainingArguments
    )
    args.dataloader_persistent_workers = (
        args.dataloader_persistent_workers and args.dataloader_num_workers > 0
    )
    if args.learning_rate is None:
        global_batch = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        args.learning_rate = recipe.base_learning_rate * global_batch / 256
    set_seed(args.seed)
    with common.user_mistakes(), args.main_process_first(desc="finding the data"):
        policy = pruning.policy() or FullData()
        common.check_output(args, recipe)
        train_split, eval_split = data.load_splits()
        if eval_split is None:
            raise ValueError(
                f"The dataset {data.dataset!r} has no validation or test split: name one with --eval_split."
            )
        image_column = find_column(train_split.features, "image", data.image_column)
        label_column = find_column(train_split.features, "label", data.label_column)
        names = class_names(train_split, label_column)
        model = create_timm_model(
            recipe.model,
            label_names=names,
            image_size=recipe.eval_image_size or recipe.image_size,
            mean=IMAGENET_DEFAULT_MEAN,
            std=IMAGENET_DEFAULT_STD,
            crop_pct=recipe.crop_pct,
        )
        augmented, plain = make_transforms(recipe, model.config.pretrained_cfg)
        train, scoring, test = (
            LabelledImages(split, image_column, label_column, len(names), transform, args.seed)
            for split, transform in (
                (train_split, augmented),
                (train_split, plain),
                (eval_split, plain),
            )
        )
    model.to(
        memory_format=torch.channels_last
    )  # a quarter faster in bf16 on a CPU, and on tensor cores
    optimizer = torch.optim.SGD(
        timm.optim.param_groups_weight_decay(model, args.weight_decay),
        lr=args.learning_rate,
        momentum=recipe.momentum,
        nesterov=True,
    )
    trainer = DynamicPruningTrainer(
        model=model,
        args=args,
        train_dataset=train,
        eval_dataset=test,
        compute_metrics=accuracy_of(1, 5),
        preprocess_logits_for_metrics=best_classes,
        optimizers=(optimizer, None),
        callbacks=[common.SharedStatistics()],
        pruning=policy,
        scoring_dataset=scoring,
    )
    evaluate_also = None
    if recipe.ema_decay:
        average = WeightAverage(trainer, recipe.ema_decay)
        trainer.add_callback(average)
        evaluate_also = partial(average.evaluate, trainer)
    common.train(
        trainer,
        dataset=data.dataset,
        task="image-classification",
        metric="accuracy",
        evaluate_also=evaluate_also,
        advise=recipe.advise,
    )


if __name__ == "__main__":
    main()
