"""CIFAR-10 or CIFAR-100 with a timm ResNet, on all data or on a changing subset.

    python recipes/cifar.py --pruning ucb --keep_ratio 0.3 --num_train_epochs 20 \\
        --output_dir runs/ucb
    python recipes/cifar.py --dataset uoft-cs/cifar100 --model resnet18_cifar --pruning random \\
        --keep_ratio 0.5
    accelerate launch recipes/cifar.py --dataset path/to/cifar10 --model resnet8_cifar \\
        --pruning full --num_train_epochs 6
    python recipes/cifar.py --train_labels path/to/cifar10n --train_label_column worse_label
    python recipes/cifar.py --imbalance 100 --pruning class-budget --keep_ratio 0.5
    python recipes/cifar.py --model resnet8_cifar --pretrained runs/cifar100 --learning_rate 0.1

`--dataset` is a Hub id or a local path that `datasets.load_dataset` understands. The short run, the
baseline to beat, is `--pruning full` with fewer epochs. The fourth command trains on the noisy
labels of human annotators. The fifth one trains on a long tail: the last class keeps a hundredth of
what the first one keeps. A fair baseline there also samples the classes evenly, `--balanced True`.
The last one continues from the weights of another run, with a new classifier.
The report has the fingerprint of what was trained. The optimizer is SGD with Nesterov momentum,
without weight decay on norms and biases; the learning rate warms up, then falls linearly to zero.
Writes report.json, the model and its card to `--output_dir`.
"""

from dataclasses import dataclass, replace
from functools import partial

import common
import numpy as np
import timm.optim
import torch
from metrics import accuracy_and_balance, best_classes
from transformers import AutoModelForImageClassification, SchedulerType, set_seed

from hf_dynprune import (
    DynamicPruningTrainer,
    FullData,
    PruningArguments,
    PruningPolicy,
)
from hf_dynprune.checks import check_count, check_number
from hf_dynprune.data import find_column, integer_labels
from hf_dynprune.selection import keep_count, mask_of
from hf_dynprune.vision import CIFAR_MEAN, CIFAR_STD, ImageCache, batch_collator, create_timm_model


@dataclass
class DataArguments(common.DataArguments):
    dataset: str = common.option(
        "uoft-cs/cifar10",
        "Hub id or local path of the dataset, such as uoft-cs/cifar10 or uoft-cs/cifar100.",
    )
    label_column: str | None = common.option(
        None, "Name of the label column; default: label, or fine_label (CIFAR-100)."
    )
    image_size: int | None = common.option(
        None, "Scale the images to this side. For quick studies: 16 needs a quarter of the time."
    )
    train_labels: str | None = common.option(
        None,
        "Hub id or local path of a dataset with other labels for the training images, row by row, "
        "such as the human labels of CIFAR-10N. The test set keeps its labels. The report says how "
        "many of the kept samples have a label that differs from the original one.",
    )
    train_label_column: str | None = common.option(
        None, "Column of these labels, such as worse_label; default: label."
    )
    clean_share: float = common.option(
        0.0,
        "With --train_labels: this share of the training images, the same in each run, keeps the "
        "original labels. --score reference trains on these images alone.",
    )
    clean_only: bool = common.option(
        False, "Train on the images of --clean_share alone, and leave out the others."
    )
    imbalance: float = common.option(
        1.0,
        "Train on a long tail: class c of C keeps r^(-c / (C - 1)) times the size of the largest "
        "class, r being this number; 1 keeps all.",
    )
    max_train_samples: int | None = common.option(
        None, "Train on this many images, drawn at random after --imbalance."
    )
    copies: int = common.option(
        1, "Repeat each training image so many times: redundant data. Each copy is a sample."
    )
    subset_seed: int = common.option(0, "Seed of --imbalance and --max_train_samples.")
    augment: bool = common.option(True, "Shift and mirror the training images at random.")
    balanced: bool = common.option(
        False,
        "Sample the classes evenly: an epoch has as many samples as without it, and as many of "
        "each class. Other images of a class in each epoch. Only without scores: none, full, "
        "random.",
    )

    def __post_init__(self) -> None:
        expected = "a share of the training images in [0, 1)"
        check_number("clean_share", self.clean_share, expected, lambda share: 0 <= share < 1)
        if self.clean_share and self.train_labels is None:
            raise ValueError(
                f"clean_share={self.clean_share} without train_labels: all labels are the original "
                "ones. Give --train_labels, or leave it out."
            )
        if self.clean_only and not self.clean_share:
            raise ValueError(
                "clean_only=True without clean_share: there are no images to train on. Give "
                "--clean_share, or leave it out."
            )
        expected = "the largest class over the smallest, 1 or more"
        check_number("imbalance", self.imbalance, expected, lambda ratio: ratio >= 1)
        if self.max_train_samples is not None:
            check_count("max_train_samples", self.max_train_samples, 1)
        check_count("copies", self.copies, 1)
        check_count("subset_seed", self.subset_seed, 0)
        if self.balanced and self.train_labels is not None:
            raise ValueError(
                "balanced=True with train_labels: the report could not say how many of the kept "
                "samples have another label. Leave one of the two out."
            )


@dataclass
class RecipeArguments(common.RunArguments, common.ScoringArguments):
    """Model and run."""

    _argument_group_name = "model and run"

    model: str = common.option(
        "resnet18_cifar",
        "Any timm architecture. With a CIFAR stem: resnet8_cifar, 20, 56, 18, 34, 50.",
    )
    pretrained: str | None = common.option(
        None,
        "Hub id or local path of a trained model of this architecture. The run starts from its "
        "weights, with a new classifier. Scores of --score are made from them, too.",
    )
    augmented_scoring: bool = common.option(
        False, "Augment the images in scoring passes, as in training."
    )
    momentum: float = common.option(0.9, "Nesterov momentum of SGD.")
    eval_every: float = common.option(
        0.0,
        "Evaluate whenever this many times N samples were trained (N: samples in the training "
        "set), and at the end; 0: only at the end. An evaluation costs more than a short epoch.",
    )


@dataclass
class CifarTrainingArguments(common.TrainerArguments):
    """The Trainer's arguments, with defaults for CIFAR."""

    output_dir: str = common.option("runs/cifar", "Output folder.")
    num_train_epochs: float = common.option(20.0, "Number of epochs.")
    per_device_train_batch_size: int = common.option(256, "Training batch size per rank.")
    per_device_eval_batch_size: int = common.option(1000, "Evaluation batch size per rank.")
    learning_rate: float = common.option(0.4, "Peak learning rate of SGD.")
    weight_decay: float = common.option(5e-4, "Weight decay, not on norms and biases.")
    warmup_steps: float = common.option(
        0.15, "Learning-rate warm-up: a share of the run if below 1, else steps."
    )
    lr_scheduler_type: SchedulerType | str = common.option("linear", "Schedule after the warm-up.")
    max_grad_norm: float = common.option(0.0, "Gradient clipping; 0 is none.")
    bf16: bool = common.option(common.computes_in_bf16(), common.BF16_HELP)
    logging_steps: float = common.option(100, "Steps between two log entries.")
    logging_nan_inf_filter: bool = common.option(
        False, "Filter NaN and infinite losses in logs; synchronises the device in each step."
    )
    # The cache makes whole batches, so there are no columns to remove.
    remove_unused_columns: bool = common.option(False, "Must be False here.")


@dataclass
class Images:
    """The images of a run.

    Attributes:
        train: Training images, augmented unless the arguments say no.
        plain: The training images without augmentation.
        test: Images to evaluate on.
        relabelled: (N,) bool, True for training images whose label differs from the original one;
            None if the labels are the original ones.
        clean: (N,) bool, True for the images of `clean_share`; None without it.
    """

    train: ImageCache
    plain: ImageCache
    test: ImageCache
    relabelled: torch.Tensor | None = None
    clean: torch.Tensor | None = None

    def holdout(self) -> ImageCache | None:
        """The images of `clean_share`, augmented as the training images; None without it."""
        if self.clean is None:
            return None
        train = self.train
        return ImageCache(
            train.images[self.clean],
            train.labels[self.clean],
            mean=train.mean,
            std=train.std,
            augment=train.augment,
            shift=train.shift,
            seed=train.seed,
        )


def load_images(data: DataArguments, seed: int) -> Images:
    """Decode the images and replace their labels if the arguments say so."""
    train_split, test_split = data.load_both_splits()
    statistics = {"mean": CIFAR_MEAN, "std": CIFAR_STD}
    options = {**statistics, "label_column": data.label_column, "image_size": data.image_size}
    labels = original = torch.tensor(integer_labels(train_split, data.label_column))
    clean = held_out = None
    if data.train_labels is not None:
        labels, held_out = other_labels(data, original)
        if data.clean_share:
            # Another generator than that of `subset_of`, which would draw the same images.
            drawn = np.random.default_rng(data.subset_seed).permutation(len(labels))
            count = keep_count(data.clean_share, len(labels))
            clean = mask_of(torch.from_numpy(drawn[:count]), len(labels))
            labels = labels.where(~clean, original)
    relabelled = None if data.train_labels is None else labels != original
    chosen = subset_of(labels, data)
    if data.clean_only:
        chosen = chosen[clean[chosen]]
    if len(chosen) < len(labels):  # the others are not decoded
        train_split = train_split.select(chosen.numpy())
    shift = 4 if data.image_size is None else data.image_size // 8  # 4 of 32 pixels
    kind = BalancedImages if data.balanced else ImageCache
    train = kind.from_dataset(train_split, augment=data.augment, shift=shift, seed=seed, **options)
    if data.copies > 1:
        train.images = train.images.repeat_interleave(data.copies, 0)
        chosen = chosen.repeat_interleave(data.copies)
    train.labels, relabelled, clean = (
        None if each is None else each[chosen] for each in (labels, relabelled, clean)
    )
    test = ImageCache.from_dataset(test_split, **options)
    if held_out is not None and data.validation_share:
        test.labels = held_out
    plain = ImageCache(train.images, train.labels, **statistics)  # shares the images
    return Images(train, plain, test, relabelled, clean)


def subset_of(labels: torch.Tensor, data: DataArguments) -> torch.Tensor:
    """Choose the images to train on.

    Args:
        labels: (N,) int64.
        data: Says what to leave out.

    Returns:
        (K,) int64, their indices in ascending order.
    """
    generator = torch.Generator().manual_seed(data.subset_seed)
    chosen = torch.arange(len(labels))
    if data.imbalance > 1:
        sizes = long_tail(torch.bincount(labels), data.imbalance)
        order = torch.randperm(len(labels), generator=generator)
        of_class = [order[labels[order] == c][:size] for c, size in enumerate(sizes.tolist())]
        chosen = torch.cat(of_class).sort().values
    if data.max_train_samples is not None:
        if data.max_train_samples > len(chosen):
            raise ValueError(
                f"max_train_samples={data.max_train_samples} is out of range: there are "
                f"{len(chosen)} training images."
            )
        drawn = torch.randperm(len(chosen), generator=generator)[: data.max_train_samples]
        chosen = chosen[drawn.sort().values]
    return chosen


def long_tail(sizes: torch.Tensor, ratio: float) -> torch.Tensor:
    """How many samples each class keeps, (C,) int64: an exponential profile over the classes.

        n_c = floor(n_max ratio^(-c / (C - 1))),    at least 1, at most the size of the class

    Args:
        sizes: (C,) int64; n_max is the largest.
        ratio: n_0 / n_(C - 1), at least 1.
    """
    place = torch.linspace(0, 1, len(sizes), dtype=torch.float64)
    # A tolerance, because 5000 / 100 comes out a little below 50.
    kept = (int(sizes.max()) * ratio**-place + 1e-6).floor().long()
    return torch.minimum(kept.clamp(min=1), sizes)


class BalancedImages(ImageCache):
    """As many samples as there are images, and of each class as many: class-balanced sampling.

    Sample i shows an image of the class i mod C, of the C classes that have images. In an epoch all
    images of a class are shown before any is shown again. Which sample shows which is a pure
    function of (seed, epoch). Two samples that show one image are augmented differently.
    """

    _shown: tuple[int, np.ndarray] | None = None

    def images_of(self, index: np.ndarray) -> np.ndarray:
        if self._shown is None or self._shown[0] != self.epoch:
            self._shown = self.epoch, self._drawn()
        return self._shown[1][index]

    def _drawn(self) -> np.ndarray:
        """(N,) int64: the image that each sample shows in this epoch."""
        generator = np.random.default_rng([self.seed, self.epoch])
        labels, n = self.labels.numpy(), len(self)
        shown = np.empty(n, dtype=np.int64)
        classes = np.unique(labels)
        for place, c in enumerate(classes):
            members, slots = np.flatnonzero(labels == c), np.arange(place, n, len(classes))
            rounds = -(-len(slots) // len(members))
            order = [generator.permutation(members) for _ in range(rounds)]
            shown[slots] = generator.permutation(np.concatenate(order)[: len(slots)])
        return shown

    @property
    def pruning_fingerprint(self) -> str:
        return f"{super().pruning_fingerprint}, balanced"


def check_balanced(recipe: RecipeArguments, policy: PruningPolicy) -> None:
    """Raise ValueError if samples are remembered, since each shows another image in each epoch."""
    if recipe.score or policy.signals:
        what = f"--score {recipe.score}" if recipe.score else str(policy)
        raise ValueError(
            f"balanced=True shows another image for each sample in each epoch, and {what} scores "
            "samples: use --pruning full or random."
        )


def other_labels(data: DataArguments, original: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Load the labels in `train_labels`.

    Args:
        data: Says where they are.
        original: (N,) int64, the labels of the training images that they replace.

    Returns:
        (labels of the training images, labels of the images held out).
    """
    places = replace(data, dataset=data.train_labels, dataset_config=None, eval_split=None)
    splits = places.load_splits()
    column = find_column(
        splits[0].features, "label", data.train_label_column, argument="train_label_column"
    )
    labels, held_out = (torch.tensor([] if split is None else split[column][:]) for split in splits)
    classes, (low, high) = int(original.max()) + 1, labels.aminmax()
    if len(labels) != len(original) or labels.is_floating_point() or low < 0 or high >= classes:
        raise ValueError(
            f"{data.train_labels!r} has {len(labels)} labels from {low} to {high} in its column "
            f"{column!r}: expected one label in [0, {classes}) for each of {len(original)} images, "
            "in their order."
        )
    return labels, held_out


def note_relabelled(trainer: DynamicPruningTrainer, relabelled: torch.Tensor) -> None:
    """Add the share of the kept samples that are relabelled to the report."""
    kept = trainer.pruner.table["times_kept"]
    share = float(kept[relabelled].sum() / kept.sum())
    trainer.pruner.add_evaluation({"train_relabelled_share": share})


def make_model(recipe: RecipeArguments, images: Images) -> torch.nn.Module:
    """Make a model for the images: untrained, or with the weights of `pretrained`."""
    size, names = images.train.images.shape[-1], images.train.label_names
    model = create_timm_model(
        recipe.model, label_names=names, image_size=size, mean=CIFAR_MEAN, std=CIFAR_STD
    )
    if recipe.pretrained is not None:
        trained = AutoModelForImageClassification.from_pretrained(recipe.pretrained)
        found = trained.config.architecture
        if found != recipe.model:
            raise ValueError(
                f"pretrained={recipe.pretrained!r} is a {found}: expected a {recipe.model}. "
                f"Give --model {found}."
            )
        trained.timm_model.reset_classifier(model.config.num_labels)
        model.timm_model.load_state_dict(trained.timm_model.state_dict())
    return model


def make_trainer(
    recipe: RecipeArguments, policy: PruningPolicy, args: CifarTrainingArguments, images: Images
) -> DynamicPruningTrainer:
    """Make model, optimizer and trainer."""
    set_seed(args.seed)
    model = make_model(recipe, images)
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
        data_collator=batch_collator,
        compute_metrics=accuracy_and_balance(1, 5),
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
        if data.balanced:
            check_balanced(recipe, policy)
        if not recipe.score:
            common.check_output(args, recipe)
        images = load_images(data, args.seed)
    if recipe.eval_every:
        per_step = args.train_batch_size * args.world_size * args.gradient_accumulation_steps
        steps = round(recipe.eval_every * (len(images.train) / per_step))
        args.eval_strategy, args.eval_steps = "steps", max(1, steps)
    if recipe.score:
        optimizer = {"lr": args.learning_rate, "momentum": recipe.momentum, "nesterov": True}
        return common.score(
            recipe,
            args,
            model_init=partial(make_model, recipe, images),
            train_dataset=images.train,
            holdout=images.holdout(),
            data_collator=batch_collator,
            scoring_dataset=images.plain,
            optimizer_cls_and_kwargs=(torch.optim.SGD, optimizer),
        )
    with common.user_mistakes():
        trainer = make_trainer(recipe, policy, args, images)
    evaluate_also = None
    if images.relabelled is not None:
        evaluate_also = partial(note_relabelled, trainer, images.relabelled)
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
