"""CIFAR-10 or CIFAR-100 with a timm ResNet, on all data or on a part that changes.

    python recipes/cifar.py --pruning ucb --keep_ratio 0.3 --num_train_epochs 20 --output_dir runs/ucb
    python recipes/cifar.py --dataset uoft-cs/cifar100 --model resnet18_cifar --pruning random --keep_ratio 0.5
    accelerate launch recipes/cifar.py --dataset path/to/cifar10 --model resnet8_cifar --pruning full --num_train_epochs 6
    python recipes/cifar.py --train_labels path/to/cifar10n --train_label_column worse_label   # human label noise

`--dataset` is a Hub id or a local path that `datasets.load_dataset` understands. The short run, the baseline to beat, is
`--pruning full` with fewer epochs. SGD with Nesterov momentum, no weight decay on norms and biases, LR warm-up, then
linear to zero. Writes report.json, the model and its card to `--output_dir`.
"""

from dataclasses import dataclass, field, replace
from functools import partial

import common
import timm.optim
import torch
from metrics import accuracy_of, best_classes
from transformers import SchedulerType, set_seed

from hf_dynprune import (
    DynamicPruningTrainer,
    FullData,
    PruningArguments,
    PruningPolicy,
    score_dataset,
)
from hf_dynprune.data import find_column
from hf_dynprune.vision import CIFAR_MEAN, CIFAR_STD, ImageCache, batch_collator, create_timm_model


@dataclass
class DataArguments(common.DataArguments):
    dataset: str = field(
        default="uoft-cs/cifar10",
        metadata={
            "help": "Hub id or local path of the dataset, such as uoft-cs/cifar10 or uoft-cs/cifar100."
        },
    )
    label_column: str | None = field(
        default=None,
        metadata={"help": "Name of the label column; default: label, or fine_label (CIFAR-100)."},
    )
    image_size: int | None = field(
        default=None,
        metadata={
            "help": "Scale the images to that side, for quick studies: 16 takes a quarter of the time of 32."
        },
    )
    train_labels: str | None = field(
        default=None,
        metadata={
            "help": "Hub id or local path of a dataset with other labels for the training images, row by row, such as the "
            "human ones of CIFAR-10N. The test set keeps its own; the report tells how many of the samples that were kept "
            "have another label than their own."
        },
    )
    train_label_column: str | None = field(
        default=None,
        metadata={"help": "Column of these labels, such as worse_label; default: label."},
    )


@dataclass
class RecipeArguments(common.RunArguments):
    """Model and run."""

    _argument_group_name = "model and run"

    model: str = field(
        default="resnet18_cifar",
        metadata={
            "help": "Any timm architecture; with a CIFAR stem: resnet8_cifar, 20, 56, 18, 34, 50."
        },
    )
    augmented_scoring: bool = field(
        default=False,
        metadata={"help": "Let scoring passes see augmented images, as training does."},
    )
    score: str | None = field(
        default=None,
        metadata={
            "help": "Do not train a model, but score the training samples for static pruning (el2n, grand, forgetting, "
            "grand-last-layer, loss, margin, entropy) into <output_dir>/scores.safetensors."
        },
    )
    score_runs: int | None = field(
        default=None, metadata={"help": "Runs to combine; default: as published."}
    )
    score_epochs: int | None = field(
        default=None, metadata={"help": "Epochs before scoring; default: as published."}
    )
    momentum: float = field(default=0.9, metadata={"help": "Nesterov momentum of SGD."})
    eval_every: float = field(
        default=0.0,
        metadata={
            "help": "Evaluate after so many full-epoch equivalents of training (passes over as many samples as the "
            "training set has), and at the end; 0: at the end alone. An evaluation costs more than a short epoch."
        },
    )


@dataclass
class CifarTrainingArguments(common.TrainerArguments):
    """The Trainer's arguments, with the defaults of a CIFAR run."""

    output_dir: str = field(default="runs/cifar", metadata={"help": "Where to write."})
    num_train_epochs: float = field(default=20.0, metadata={"help": "Epochs."})
    per_device_train_batch_size: int = field(
        default=256, metadata={"help": "Training batch of one rank."}
    )
    per_device_eval_batch_size: int = field(
        default=1000, metadata={"help": "Evaluation batch of one rank."}
    )
    learning_rate: float = field(default=0.4, metadata={"help": "Peak learning rate of SGD."})
    weight_decay: float = field(
        default=5e-4, metadata={"help": "Weight decay, not on norms and biases."}
    )
    warmup_steps: float = field(
        default=0.15, metadata={"help": "LR warm-up: a share below 1, or steps."}
    )
    lr_scheduler_type: SchedulerType | str = field(
        default="linear", metadata={"help": "Schedule behind the warm-up."}
    )
    max_grad_norm: float = field(default=0.0, metadata={"help": "Gradient clipping; 0 is none."})
    bf16: bool = field(**common.BF16)
    logging_steps: float = field(default=100, metadata={"help": "Log every so many steps."})
    logging_nan_inf_filter: bool = field(
        default=False, metadata={"help": "Costs a device synchronisation a step."}
    )
    # A batch is made at once from the cache; unused columns do not exist.
    remove_unused_columns: bool = field(default=False, metadata={"help": "Must be False here."})


@dataclass
class Images:
    """Training images as training sees them, the same ones unchanged, and those to evaluate on; which of the first have
    another label than their own, where they have labels of others."""

    train: ImageCache
    plain: ImageCache
    test: ImageCache
    relabelled: torch.Tensor | None = None


def load_images(data: DataArguments, seed: int) -> Images:
    train_split, test_split = data.load_splits()
    options = {
        "mean": CIFAR_MEAN,
        "std": CIFAR_STD,
        "label_column": data.label_column,
        "image_size": data.image_size,
    }
    shift = 4 if data.image_size is None else data.image_size // 8  # 4 of 32 pixels
    train = ImageCache.from_dataset(train_split, augment=True, shift=shift, seed=seed, **options)
    test = ImageCache.from_dataset(test_split, **options)
    relabelled = None
    if data.train_labels is not None:
        own = train.labels
        train.labels, held_out = other_labels(data, train)
        relabelled = train.labels != own
        if data.validation_share:
            test.labels = held_out
    plain = ImageCache(
        train.images, train.labels, mean=CIFAR_MEAN, std=CIFAR_STD
    )  # the same images, not copied
    return Images(train, plain, test, relabelled)


def other_labels(data: DataArguments, train: ImageCache) -> tuple[torch.Tensor, torch.Tensor]:
    """Of the training images, and of those that are held out of them."""
    splits = replace(
        data, dataset=data.train_labels, dataset_config=None, eval_split=None
    ).load_splits()
    column = find_column(
        splits[0].features, "label", data.train_label_column, argument="train_label_column"
    )
    labels = [torch.tensor([] if split is None else split[column][:]) for split in splits]
    classes = int(train.labels.max()) + 1
    if (
        len(labels[0]) != len(train)
        or labels[0].is_floating_point()
        or not 0 <= labels[0].min() <= labels[0].max() < classes
    ):
        raise ValueError(
            f"{data.train_labels!r} has {len(labels[0])} labels from {labels[0].min()} to {labels[0].max()} in its column "
            f"{column!r}: wanted is one of {classes} classes for each of {len(train)} images, in their order."
        )
    return labels[0], labels[1]


def note_relabelled(trainer: DynamicPruningTrainer, relabelled: torch.Tensor) -> None:
    """Into the report: the share of all that the choices kept that has another label than its own."""
    kept = trainer.pruner.table["times_kept"]
    trainer.pruner.add_evaluation(
        {"train_relabelled_share": float(kept[relabelled].sum() / kept.sum())}
    )


def make_model(recipe: RecipeArguments, images: Images) -> torch.nn.Module:
    size, names = images.train.images.shape[-1], images.train.label_names
    return create_timm_model(
        recipe.model, label_names=names, image_size=size, mean=CIFAR_MEAN, std=CIFAR_STD
    )


def make_trainer(
    recipe: RecipeArguments, policy: PruningPolicy, args: CifarTrainingArguments, images: Images
) -> DynamicPruningTrainer:
    set_seed(args.seed)
    model = make_model(recipe, images)
    model.to(
        memory_format=torch.channels_last
    )  # a quarter faster in bf16 on a CPU, and on tensor cores
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
        data_collator=batch_collator,
        compute_metrics=accuracy_of(1, 5),
        preprocess_logits_for_metrics=best_classes,
        optimizers=(optimizer, None),
        callbacks=[common.SharedStatistics()],
        pruning=policy,
        scoring_dataset=None if recipe.augmented_scoring else images.plain,
    )


def main() -> None:
    data, recipe, pruning, args = common.parse(
        __doc__, DataArguments, RecipeArguments, PruningArguments, CifarTrainingArguments
    )
    with common.user_mistakes(), args.main_process_first(desc="decoding images"):
        policy = pruning.policy() or FullData()
        if not recipe.score:
            common.check_output(args, recipe)
        images = load_images(data, args.seed)

    if recipe.eval_every:
        full_epoch = len(images.train) / (
            args.train_batch_size * args.world_size * args.gradient_accumulation_steps
        )
        args.eval_strategy, args.eval_steps = "steps", max(1, round(recipe.eval_every * full_epoch))

    if recipe.score:
        momentum = {"momentum": recipe.momentum, "nesterov": True}
        scores = score_dataset(
            recipe.score,
            lambda: make_model(recipe, images),
            args,
            images.train,
            runs=recipe.score_runs,
            epochs=recipe.score_epochs,
            output_dir=args.output_dir,
            data_collator=batch_collator,
            scoring_dataset=images.plain,
            optimizer_cls_and_kwargs=(torch.optim.SGD, {"lr": args.learning_rate, **momentum}),
        )
        print(
            f"{recipe.score}: {scores.provenance['passes']:,.0f} passes. Written to {args.output_dir}/scores.safetensors."
        )
        return

    trainer = make_trainer(recipe, policy, args, images)
    common.train(
        trainer,
        dataset=data.dataset,
        task="image-classification",
        metric="accuracy",
        evaluate_also=None
        if images.relabelled is None
        else partial(note_relabelled, trainer, images.relabelled),
        advise=recipe.advise,
    )


if __name__ == "__main__":
    main()
