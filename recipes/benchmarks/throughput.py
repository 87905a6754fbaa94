"""Images per second of training: recipes/cifar.py, a plain PyTorch loop, the usual stock Trainer.

    python recipes/benchmarks/throughput.py --dataset path/to/cifar10 \\
        --jpeg path/to/tiny_imagenet_20 --rounds 5 \\
        --output recipes/results/benchmarks/throughput.json

    bare loop     uint8 images in memory, the augmentation of `ImageCache`, forward, backward,
                  optimizer, learning rate; no Trainer, no accelerate, no pruning
    cifar.py      recipes/cifar.py with `--pruning full`, and with a UCB that scores and keeps all
    stock path    the stock Trainer on the encoded images of a `datasets.Dataset`, which PIL decodes
                  and torchvision transforms one by one in each epoch; without and with one worker

All train the same model on the same images with the same optimizer, in bf16 autocast (float32 if
bf16 is emulated). In each round each has a run of one epoch. On a CPU the runs take turns step by
step, except for the one with a worker. Only full batches count: the last step is left out, and so
is the first fifth of the steps (warm-up, start of the worker). The ratio is that of images per
second, to the bare loop in the same round: above 1 is faster.

Without `--dataset` the images are noise. Noise trains as fast, but is a larger PNG than a
photograph, so published figures of the stock path need `--dataset`. `--jpeg` adds rows for a
dataset of larger images of one size.

On a CPU all rows tune glibc's allocator as the recipes do (`common.keep_freed_memory`).
`--default_allocator` does not. Without the tuning, the loss varies between runs with the layout of
the heap, and would hide the differences.
"""

import argparse
import math
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import datasets
import measure
import numpy as np
import timm.optim
import torch
import torch.nn.functional as F
from torchvision import transforms
from tqdm import trange
from transformers import (
    PrinterCallback,
    Trainer,
    TrainerCallback,
    get_linear_schedule_with_warmup,
    set_seed,
)

from hf_dynprune import UCB, FullData
from hf_dynprune.data import find_column, load_splits
from hf_dynprune.vision import CIFAR_MEAN, CIFAR_STD, ImageCache

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import cifar  # of the recipes
import common

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


class Clock(TrainerCallback):
    """Images per second, from the end of the first fifth of the steps to the last step but one.

    The turns of other runs are left out. So is the last step, because Accelerate loads each batch
    one step early: it would train a batch and load none.
    """

    def __init__(self, samples: int, batch_size: int, pass_on: Callable[[], None]) -> None:
        steps = math.ceil(samples / batch_size)
        self.batch_size, self.pass_on = batch_size, pass_on
        self.first, self.last = max(2, steps // 5), steps - 1
        self.step, self.begun, self.seconds = 0, 0.0, 0.0

    def tick(self) -> None:
        """Call at the end of each optimizer step."""
        self.step += 1
        if self.step in (self.first, self.last) and DEVICE.type == "cuda":
            torch.cuda.synchronize()
        if self.first < self.step <= self.last:
            self.seconds += time.perf_counter() - self.begun
        self.pass_on()
        self.begun = time.perf_counter()

    def on_step_end(self, *args, **kwargs) -> None:
        self.tick()

    @property
    def images_per_second(self) -> float:
        return (self.last - self.first) * self.batch_size / self.seconds


def noise(samples: int) -> datasets.Dataset:
    rng = np.random.default_rng(0)
    images = list(rng.integers(0, 256, (samples, 32, 32, 3), dtype=np.uint8))
    labels = rng.integers(0, 10, samples).tolist()
    features = datasets.Features(img=datasets.Image(), label=datasets.ClassLabel(10))
    return datasets.Dataset.from_dict({"img": images, "label": labels}, features=features)


def decoded(data: datasets.Dataset) -> cifar.Images:
    """Images as cifar.load_images returns them. Nothing is evaluated here."""
    options = {"mean": CIFAR_MEAN, "std": CIFAR_STD}
    train = ImageCache.from_dataset(data, augment=True, **options)
    plain = ImageCache(train.images, train.labels, **options)
    return cifar.Images(train, plain, plain)


def make_arguments(
    options: argparse.Namespace, folder: str, **more
) -> cifar.CifarTrainingArguments:
    return cifar.CifarTrainingArguments(
        folder,
        num_train_epochs=1,
        per_device_train_batch_size=options.batch_size,
        torch_compile=options.compile,
        logging_strategy="no",
        log_level="error",
        report_to="none",
        disable_tqdm=True,
        **more,
    )


def make_model(
    images: cifar.Images, args: cifar.CifarTrainingArguments, options: argparse.Namespace
) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    """Model and optimizer as cifar.make_trainer makes them."""
    set_seed(args.seed)
    recipe = cifar.RecipeArguments(model=options.model)
    model = cifar.make_model(recipe, images).to(DEVICE, memory_format=torch.channels_last)
    groups = timm.optim.param_groups_weight_decay(model, args.weight_decay)
    return model, torch.optim.SGD(
        groups, lr=args.learning_rate, momentum=recipe.momentum, nesterov=True
    )


def bare_loop(
    images: cifar.Images,
    args: cifar.CifarTrainingArguments,
    options: argparse.Namespace,
    folder: str,
    pass_on: Callable[[], None],
) -> float:
    """Train without a Trainer.

    `args` must exist already: making TrainingArguments resets the state of accelerate, also for the
    Trainers that take turns with this loop.
    """
    data = images.train
    clock = Clock(len(data), options.batch_size, pass_on)
    wrapped, optimizer = make_model(images, args, options)
    model = wrapped.timm_model.train()  # without the wrapper of transformers
    if options.compile:
        model = torch.compile(model)
    steps = math.ceil(len(data) / options.batch_size)
    schedule = get_linear_schedule_with_warmup(optimizer, args.get_warmup_steps(steps), steps)
    pass_on()
    for indices in torch.randperm(len(data)).split(options.batch_size):
        batch = data.__getitems__(indices)
        if DEVICE.type == "cuda":
            batch = {
                name: (values if values.is_cuda else values.pin_memory()).to(
                    DEVICE, non_blocking=True
                )
                for name, values in batch.items()
            }
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=args.bf16):
            loss = F.cross_entropy(model(batch["pixel_values"]), batch["labels"])
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        clock.tick()
    return clock.images_per_second


def timed(trainer: Trainer, clock: Clock) -> float:
    trainer.add_callback(clock)
    trainer.remove_callback(PrinterCallback)
    clock.pass_on()  # if runs take turns, all are made before the first one trains
    trainer.train()
    return clock.images_per_second


def recipe_run(
    images: cifar.Images,
    make_policy: Callable,
    options: argparse.Namespace,
    folder: str,
    pass_on: Callable[[], None],
    **more,
) -> float:
    args = make_arguments(options, folder, **more)
    trainer = cifar.make_trainer(
        cifar.RecipeArguments(model=options.model), make_policy(), args, images
    )
    return timed(trainer, Clock(len(images.train), options.batch_size, pass_on))


def stock_run(
    data: datasets.Dataset | ImageCache,
    images: cifar.Images,
    options: argparse.Namespace,
    folder: str,
    pass_on: Callable[[], None],
    data_collator: Callable | None = None,
    **more,
) -> float:
    """Train the recipe's model for `images` on `data` with the stock Trainer."""
    args = make_arguments(options, folder, **more)
    model, optimizer = make_model(images, args, options)
    trainer = Trainer(model, args, data_collator, train_dataset=data, optimizers=(optimizer, None))
    return timed(trainer, Clock(len(data), options.batch_size, pass_on))


def stock_path(
    data: datasets.Dataset,
    images: cifar.Images,
    workers: int,
    options: argparse.Namespace,
    folder: str,
    pass_on: Callable[[], None],
) -> float:
    image, label = find_column(data.features, "image"), find_column(data.features, "label")
    transform = transforms.Compose(
        [
            transforms.RandomCrop(images.train.images.shape[-1], padding=4),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize(CIFAR_MEAN, CIFAR_STD),
        ]
    )

    def transformed(rows: dict[str, list]) -> dict[str, list]:
        return {
            "pixel_values": [transform(one.convert("RGB")) for one in rows[image]],
            "labels": rows[label],
        }

    more = {"dataloader_num_workers": workers}
    return stock_run(data.with_transform(transformed), images, options, folder, pass_on, **more)


def compare(
    ways: dict[str, Callable[..., float]], options: argparse.Namespace, folder: str
) -> list[dict[str, object]]:
    """A row for each way. The others are compared with the first."""
    ways = {name: partial(way, options=options, folder=folder) for name, way in ways.items()}
    speeds: dict[str, list[float]] = {name: [] for name in ways}
    for number in trange(options.rounds, desc="rounds"):
        order = list(ways) if number % 2 == 0 else list(reversed(ways))
        # Some runs take no turns: a worker would load meanwhile, and a GPU would wait at each step.
        alone = [name for name in order if DEVICE.type == "cuda" or "worker" in name]
        in_turns = [name for name in order if name not in alone]
        found = measure.step_by_step(
            {name: lambda pass_on, name=name: ways[name](pass_on=pass_on) for name in in_turns}
        )
        for name in alone:
            # A process compiles only so many models. Later ones would run uncompiled.
            torch.compiler.reset()
            found[name] = ways[name](pass_on=lambda: None)
        for name, speed in found.items():
            speeds[name].append(speed)
    bare, rows = next(iter(ways)), []
    for name, values in speeds.items():
        spread = measure.spread(values)
        row = {"path": name, "images_per_second": spread.pop("median"), **spread}
        row |= {"rounds": values, "compared_with": bare}
        rows.append(row if name == bare else row | measure.ratio(values, speeds[bare]))
    return rows


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--dataset", help="Hub id or local path of CIFAR-10; default: noise of its shape"
    )
    parser.add_argument("--jpeg", help="Hub id or local path of JPEG images of one size")
    parser.add_argument(
        "--samples", type=int, default=10_000, help="first samples of the training split"
    )
    parser.add_argument("--batch_size", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--model", default="resnet8_cifar")
    parser.add_argument(
        "--compile", action="store_true", help="torch.compile in all runs; useful only on a GPU"
    )
    parser.add_argument(
        "--default_allocator", action="store_true", help="without common.keep_freed_memory"
    )
    parser.add_argument("--output", type=Path, help="JSON file")
    parser.set_defaults(bf16=common.computes_in_bf16())  # noted with the results
    options = parser.parse_args()
    if math.ceil(options.samples / options.batch_size) < 4:
        parser.error(
            f"--samples {options.samples} is too small: expected 4 steps of --batch_size "
            f"{options.batch_size}"
        )
    return options


def main() -> None:
    options = parse()
    if not options.default_allocator:
        common.keep_freed_memory()
    datasets.disable_progress_bars()
    with tempfile.TemporaryDirectory() as folder:
        split = f"train[:{options.samples}]"
        data = (
            load_splits(options.dataset, train=split)[0]
            if options.dataset
            else noise(options.samples)
        )
        images, args = decoded(data), make_arguments(options, folder)
        ways = {
            "bare loop": partial(bare_loop, images, args),
            "cifar.py, Trainer": partial(recipe_run, images, FullData),
            "cifar.py, UCB that keeps everything": partial(
                recipe_run, images, partial(UCB, keep_ratio=1.0)
            ),
            "stock path (PIL)": partial(stock_path, data, images, 0),
            "stock path (PIL), 1 worker": partial(stock_path, data, images, 1),
        }
        rows = compare(ways, options, folder)
        if options.jpeg:
            data = load_splits(options.jpeg, train=split)[0]
            images = decoded(data)
            ways = {
                "JPEG: bare loop on decoded tensors": partial(bare_loop, images, args),
                "JPEG: stock path (PIL)": partial(stock_path, data, images, 0),
                "JPEG: ImageCache, Trainer": partial(recipe_run, images, FullData),
            }
            rows += compare(ways, options, folder)
    speeds = dict.fromkeys(("images_per_second", "lowest", "highest"), ",.0f")
    shown = {"path": "", **speeds, "ratio": ".3f"}
    measure.report("Images per second of training", rows, shown, options)


if __name__ == "__main__":
    main()
