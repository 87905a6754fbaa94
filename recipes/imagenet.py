"""ImageNet, or any folder of images by class, with a timm ResNet, on all data or a changing subset.

    python recipes/imagenet.py --pruning ucb --keep_ratio 0.3 --output_dir runs/ucb
    accelerate launch recipes/imagenet.py recipes/configs/imagenet_pruned.yaml --output_dir runs/ucb
    torchrun --nproc_per_node 8 recipes/imagenet.py --pruning full --num_train_epochs 27 \\
        --output_dir runs/short

`--dataset` is a Hub id or a local path: a folder of images (train/ and val/, one folder per class)
or of parquet files. The short run, the baseline to beat, is `--pruning full` with fewer epochs.
Writes report.json, the model and its card to `--output_dir`, and a checkpoint after each epoch.
`--resume_from_checkpoint True` continues the identical run from it, because the augmentation of a
sample is a function of seed, epoch and sample alone.

The defaults are the usual recipe for a ResNet-50 from scratch at 224 pixels. They are not tuned for
any pruning policy.

- 90 epochs of SGD with Nesterov momentum 0.9 and weight decay 1e-4, but not on norms and biases.
- A learning rate of 0.1 per 256 samples of the global batch, after 5 epochs of warm-up (Goyal et
  al. 2017), then half a cosine (Loshchilov & Hutter 2017).
- Label smoothing 0.1 (He et al. 2019), random-resized crops of 8 to 100 % of an image, mirroring.
- Evaluation on the central 224 pixels of an image whose short side is scaled to 256.

`--auto_augment`, `--random_erasing` and `--ema_decay` are for longer runs. We ran the recipe on 20
classes of Tiny-ImageNet at 64 pixels (recipes/results/tiny_imagenet), not on ImageNet itself.

With `--ema_decay` there are two models and two results: the last weights (`--output_dir`, `eval_*`)
and their moving average (`--output_dir`/ema, `eval_ema_*`).
"""

import os
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
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

from hf_dynprune import DynamicPruningTrainer, FullData, PruningArguments, PruningPolicy
from hf_dynprune.data import class_names, find_column
from hf_dynprune.vision import create_timm_model


@dataclass
class DataArguments(common.DataArguments):
    dataset: str = common.option(
        "ILSVRC/imagenet-1k",
        "Hub id or local path of the dataset: images by class in train/ and val/, or parquet "
        "files.",
    )
    image_column: str | None = common.option(
        None, "Name of the image column; default: the only one."
    )
    label_column: str | None = common.option(None, "Name of the label column; default: label.")


@dataclass
class RecipeArguments(common.RunArguments):
    """Model, images and run."""

    _argument_group_name = "model, images and run"

    model: str = common.option("resnet50", "Any timm architecture, such as resnet18, 34, 50.")
    image_size: int = common.option(224, "Side of a training image in pixels.")
    eval_image_size: int | None = common.option(
        None, "Side of an evaluation image in pixels; default: that of a training image."
    )
    crop_pct: float = common.option(
        0.875,
        "Evaluation: the share of the short side that the crop keeps. 0.875 scales the short side "
        "to 256 for a crop of 224.",
    )
    min_crop: float = common.option(
        0.08, "Training: the smallest share of an image's area that a random crop keeps."
    )
    auto_augment: str | None = common.option(
        None,
        "timm's name of an augmentation, such as rand-m7-mstd0.5 (RandAugment); default: none.",
    )
    color_jitter: float = common.option(
        0.0, "Largest change of brightness, contrast and saturation; timm usually takes 0.4."
    )
    random_erasing: float = common.option(0.0, "Probability to erase a random part of an image.")
    base_learning_rate: float = common.option(
        0.1,
        "learning_rate = base_learning_rate × global batch / 256, unless --learning_rate is given.",
    )
    momentum: float = common.option(0.9, "Nesterov momentum of SGD.")
    ema_decay: float = common.option(
        0.0,
        "Decay of a moving average of the weights, such as 0.9999 (it starts at 0 and follows 1 - "
        "steps^(-2/3)). The average is evaluated and saved beside the last weights. 0: no average.",
    )

    def __post_init__(self) -> None:
        if not 0 <= self.ema_decay < 1:
            raise ValueError(
                f"ema_decay={self.ema_decay} is out of range: expected [0, 1), such as 0.9999, or "
                "0 for no average."
            )
        if not 0 < self.min_crop <= 1:
            raise ValueError(
                f"min_crop={self.min_crop} is out of range: expected a share of the image's area "
                "in (0, 1]."
            )
        if self.auto_augment and self.color_jitter:
            raise ValueError(
                f"auto_augment={self.auto_augment!r} and color_jitter={self.color_jitter} exclude "
                "each other in timm: give one of the two."
            )


@dataclass
class ImageNetTrainingArguments(common.TrainerArguments):
    """The Trainer's arguments, with defaults for ImageNet."""

    output_dir: str = common.option("runs/imagenet", "Output folder.")
    num_train_epochs: float = common.option(90.0, "Number of epochs.")
    per_device_train_batch_size: int = common.option(256, "Training batch size per rank.")
    per_device_eval_batch_size: int = common.option(256, "Evaluation batch size per rank.")
    learning_rate: float | None = common.option(
        None, "Peak learning rate of SGD; default: --base_learning_rate × global batch / 256."
    )
    weight_decay: float = common.option(1e-4, "Weight decay, not on norms and biases.")
    label_smoothing_factor: float = common.option(0.1, "Label smoothing.")
    warmup_steps: float = common.option(
        0.055, "Learning-rate warm-up: a share of the run if below 1, else steps."
    )
    lr_scheduler_type: SchedulerType | str = common.option("cosine", "Schedule after the warm-up.")
    max_grad_norm: float = common.option(0.0, "Gradient clipping; 0 is none.")
    bf16: bool = common.option(common.computes_in_bf16(), common.BF16_HELP)
    dataloader_num_workers: int = common.option(
        min(8, os.cpu_count() or 1), "Processes per rank that load and augment images."
    )
    dataloader_persistent_workers: bool = common.option(True, "Keep them from epoch to epoch.")
    eval_strategy: IntervalStrategy | str = common.option(
        "epoch", "When to evaluate: no, epoch or steps."
    )
    save_strategy: SaveStrategy | str = common.option(
        "epoch", "When to write checkpoints: no, epoch or steps."
    )
    save_total_limit: int | None = common.option(2, "Checkpoints to keep.")
    logging_steps: float = common.option(100, "Steps between two log entries.")
    logging_nan_inf_filter: bool = common.option(
        False, "Filter NaN and infinite losses in logs; synchronises the device in each step."
    )
    ddp_find_unused_parameters: bool | None = common.option(
        False, "Several ranks: search for weights that a step does not use; costs time."
    )


class LabelledImages(torch.utils.data.Dataset):
    """The transformed images of a split: {"pixel_values": transform(image), "labels": int}.

    A transform may draw from the global random states, as those of timm and torchvision do. What it
    draws is a pure function of (seed, epoch, sample index): it does not depend on batch, workers,
    ranks or a resume, and the random states are restored. Call `set_epoch` before you create the
    iterator of an epoch; running workers see the change.

    Args:
        split: Has a column of images.
        image_column, label_column: Names of its columns.
        num_labels: The number of classes; labels are 0, ..., num_labels - 1.
        transform: Takes a PIL image, which is always RGB.
        seed: Seed of the transform.

    Raises:
        ValueError: If a label is not a class, such as -1 in a test split whose labels are secret.
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
                f"The split {str(split.split)!r} has the labels {wrong[:5]}: expected 0 to "
                f"{num_labels - 1}. Choose another split."
            )
        self.rows = split.cast_column(image_column, datasets.Image(mode="RGB"))
        self.image_column, self.label_column = image_column, label_column
        self.transform, self.seed = transform, seed
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    def set_epoch(self, epoch: int) -> None:
        """Use the augmentation of `epoch` from now on, in running workers, too."""
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
    """Seed the global random states of Python, NumPy and torch (CPU); restore them at the end."""
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
    """Make timm's transforms for training and for evaluation.

    `config` is the model's, so the evaluation transform equals the model's image processor.
    """
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
            f"timm {timm.__version__} cannot read auto_augment={recipe.auto_augment!r} ({error}): "
            "expected a name such as rand-m7-mstd0.5, or leave it out."
        ) from error
    return training, timm.data.create_transform(**evaluation)


class WeightAverage(TrainerCallback):
    """A moving average of the weights and statistics, updated after each optimizer step.

    It is stored in the optimizer's state, which the Trainer saves and loads. So a resumed run has
    the same average, bit for bit.
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
                "The checkpoint has no average of the weights: resume with --ema_decay 0, as the "
                "run was started."
            )
        self.average.module.load_state_dict(state["ema"])

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.average.update(self.model, step=state.global_step)

    def evaluate(self, trainer: DynamicPruningTrainer) -> None:
        """Evaluate the average as `eval_ema_*` and save it in `ema/`. The model is not changed."""
        folder = Path(trainer.args.output_dir) / "ema"
        if trainer.args.world_size > 1:
            timm.utils.distribute_bn(self.average.module, trainer.args.world_size)
        last = {name: tensor.clone() for name, tensor in self.model.state_dict().items()}
        self.model.load_state_dict(self.average.module.state_dict())
        metrics = trainer.evaluate(metric_key_prefix="eval_ema")
        self.model.load_state_dict(last)
        if trainer.is_world_process_zero():
            self.average.module.save_pretrained(folder)
            accuracy = 100 * metrics["eval_ema_accuracy"]
            print(f"average of the weights: accuracy {accuracy:.2f} %. Written to {folder}.")


@dataclass
class Images:
    """The images of a run: augmented for training, plain for scoring, and those to evaluate on."""

    train: LabelledImages
    scoring: LabelledImages
    test: LabelledImages


def make_model_and_images(
    data: DataArguments, recipe: RecipeArguments, seed: int
) -> tuple[torch.nn.Module, Images]:
    """Load the splits; make a model for their classes and transforms for its images."""
    train_split, eval_split = data.load_both_splits()
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

    def images(split: datasets.Dataset, transform: Callable[[Any], Any]) -> LabelledImages:
        return LabelledImages(split, image_column, label_column, len(names), transform, seed)

    return model, Images(
        train=images(train_split, augmented),
        scoring=images(train_split, plain),
        test=images(eval_split, plain),
    )


def make_trainer(
    recipe: RecipeArguments,
    policy: PruningPolicy,
    args: ImageNetTrainingArguments,
    model: torch.nn.Module,
    images: Images,
) -> DynamicPruningTrainer:
    """Make optimizer and trainer."""
    # A quarter faster in bf16 on a CPU, and on tensor cores.
    model.to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(
        timm.optim.param_groups_weight_decay(model, args.weight_decay),
        lr=args.learning_rate,
        momentum=recipe.momentum,
        nesterov=True,
    )
    return DynamicPruningTrainer(
        model=model,
        args=args,
        train_dataset=images.train,
        eval_dataset=images.test,
        compute_metrics=accuracy_of(1, 5),
        preprocess_logits_for_metrics=best_classes,
        optimizers=(optimizer, None),
        callbacks=[common.SharedStatistics()],
        pruning=policy,
        scoring_dataset=images.scoring,
    )


def main() -> None:
    data, recipe, pruning, args = common.parse(
        __doc__, DataArguments, RecipeArguments, PruningArguments, ImageNetTrainingArguments
    )
    if args.dataloader_num_workers == 0:
        args.dataloader_persistent_workers = False
    if args.learning_rate is None:
        global_batch = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        args.learning_rate = recipe.base_learning_rate * global_batch / 256
    set_seed(args.seed)
    with common.user_mistakes(), args.main_process_first(desc="finding the data"):
        policy = pruning.policy() or FullData()
        common.check_output(args, recipe)
        model, images = make_model_and_images(data, recipe, args.seed)
    trainer = make_trainer(recipe, policy, args, model, images)
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
        after=recipe.after,
    )


if __name__ == "__main__":
    main()
