"""What scoring passes cost: seconds per sample, beside those of training and of bare inference.

    python recipes/benchmarks/scoring.py --dataset path/to/cifar10 \\
        --models resnet8_cifar bert causal_lm --samples 3000 --rounds 3 \\
        --output recipes/results/benchmarks/scoring.json

A run of DynamicPruningTrainer scores all samples, `UCB(keep_ratio=0.5, scoring="all")`, and trains
on half of them for one epoch. Its report has the seconds of both. Forward is a third of forward and
backward, so scoring / training is close to 1/3 if computing dominates, and less if the optimizer
step is expensive.

Then the same model makes a bare pass over the same batches in `torch.inference_mode()`. The batches
have labels, so that it computes its loss as scoring does: scoring / inference is the overhead of
scoring. Runs with scoring batches of the training batch size and runs with larger ones take turns.

The ResNets train in bf16 (float32 if bf16 is emulated) on augmented images and score plain ones, as
recipes/cifar.py does. The text models are those of overhead.py, in float32.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import measure
import overhead
import torch
from torch.utils.data import DataLoader
from transformers import PrinterCallback, set_seed
from transformers.utils.logging import disable_progress_bar

from hf_dynprune import UCB, DynamicPruningTrainer
from hf_dynprune.vision import CIFAR_MEAN, CIFAR_STD, ImageCache

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import cifar  # of the recipes
import common


class Model(NamedTuple):
    make: Callable | None  # samples -> (model, dataset); None: a timm model on images
    batch: int  # of training
    large: int  # of scoring; for images the recipe's
    fewer: int = 1  # this many times fewer samples than --samples, as they cost more


MODELS = {
    "resnet8_cifar": Model(None, 256, 1000),
    "resnet20_cifar": Model(None, 256, 1000),
    "bert": Model(overhead.bert, 16, 64, fewer=5),
    "causal_lm": Model(overhead.causal_lm, 8, 32, fewer=50),
}


def load_images(dataset: str | None, samples: int) -> cifar.Images:
    if dataset:
        return cifar.load_images(
            cifar.DataArguments(dataset=dataset, train_split=f"train[:{samples}]"), seed=0
        )
    pixels = torch.randint(0, 256, (samples, 3, 32, 32), dtype=torch.uint8)
    labels, names = torch.randint(0, 10, (samples,)), list("0123456789")
    options: dict[str, Any] = {"mean": CIFAR_MEAN, "std": CIFAR_STD, "label_names": names}
    plain = ImageCache(pixels, labels, **options)
    return cifar.Images(ImageCache(pixels, labels, augment=True, **options), plain, plain)


def make_trainer(
    name: str, batch: int, options: argparse.Namespace, images: cifar.Images, folder: str
) -> DynamicPruningTrainer:
    """A trainer for one epoch that scores in batches of size `batch`."""
    settings: dict[str, Any] = {
        "num_train_epochs": 1,
        "per_device_train_batch_size": MODELS[name].batch,
        "per_device_eval_batch_size": batch,
        "logging_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }
    policy, make = UCB(keep_ratio=0.5, scoring="all", scoring_mode=options.mode), MODELS[name].make
    if make is None:
        args = cifar.CifarTrainingArguments(folder, **settings)
        return cifar.make_trainer(cifar.RecipeArguments(model=name), policy, args, images)
    set_seed(0)
    model, data = make(-(-options.samples // MODELS[name].fewer))
    args = common.TrainerArguments(folder, **settings)
    return DynamicPruningTrainer(model, args, train_dataset=data, pruning=policy)


@torch.inference_mode()
def infer(trainer: DynamicPruningTrainer, mode: str) -> float:
    """Seconds per sample of the model alone, over the batches that were scored."""
    args, model = trainer.args, trainer.model
    data = trainer.train_dataset if trainer.scoring_dataset is None else trainer.scoring_dataset
    loader = DataLoader(
        data,
        args.eval_batch_size,
        collate_fn=trainer.data_collator,
        pin_memory=args.dataloader_pin_memory,
    )
    model.train(mode == "train")
    begun = time.perf_counter()
    with torch.autocast(args.device.type, torch.bfloat16, enabled=args.bf16):
        for batch in loader:
            model(
                **{key: values.to(args.device, non_blocking=True) for key, values in batch.items()}
            )
    if args.device.type == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - begun) / len(data)


def run(
    name: str, batch: int, options: argparse.Namespace, images: cifar.Images, folder: str
) -> dict[str, float]:
    """Seconds per sample of scoring, of training and of bare inference."""
    trainer = make_trainer(name, batch, options, images, folder)
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    epoch = trainer.pruning_report.epochs[0]
    return {
        "training": epoch.seconds["training"] / epoch.forward_passes,
        "scoring": epoch.seconds["scoring"] / epoch.scoring_passes,
        "inference": infer(trainer, options.mode),
    }


def rows_of(
    name: str, options: argparse.Namespace, images: cifar.Images, folder: str
) -> list[dict[str, Any]]:
    """A row for each size of scoring batches."""
    sizes = [MODELS[name].batch, MODELS[name].large]
    turns = {str(size): partial(run, name, size, options, images, folder) for size in sizes}
    for warm_up in turns.values():
        warm_up()
    rounds, rows = measure.in_turns(turns, options.rounds, f"rounds, {name}"), []
    small = [one["scoring"] for one in rounds[str(sizes[0])]]
    for size, runs in zip(sizes, rounds.values(), strict=True):
        seconds = {what: [one[what] for one in runs] for what in runs[0]}
        row: dict[str, Any] = {"model": name, "batch": MODELS[name].batch, "scoring_batch": size}
        row |= {f"{what}_ms": 1000 * statistics.median(values) for what, values in seconds.items()}
        for other in ("training", "inference"):
            found = measure.ratio(seconds["scoring"], seconds[other])
            row |= {f"of_{other}": found["ratio"], f"of_{other}_95": found["ratio_95"]}
        to_small = measure.ratio(seconds["scoring"], small)["ratio"]
        row["of_small_batch"] = None if size == sizes[0] else to_small
        row["seconds"] = {what: measure.spread(values) for what, values in seconds.items()}
        rows.append({**row, "rounds": runs})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    fewer = ", ".join(
        f"{model.fewer} times fewer of {name}" for name, model in MODELS.items() if model.fewer > 1
    )
    parser.add_argument("--samples", type=int, default=10_000, help=f"samples to score; {fewer}")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument(
        "--mode",
        choices=("eval", "train"),
        default="eval",
        help="mode of the model in scoring and inference",
    )
    parser.add_argument(
        "--dataset", help="Hub id or local path of CIFAR-10; default: noise of its shape"
    )
    parser.add_argument("--output", type=Path, help="JSON file")
    parser.set_defaults(bf16=common.computes_in_bf16())  # noted with the results
    options = parser.parse_args()
    disable_progress_bar()
    common.keep_freed_memory()  # as the recipes do
    images = load_images(options.dataset, options.samples)
    with tempfile.TemporaryDirectory() as folder:
        rows = [row for name in options.models for row in rows_of(name, options, images, folder)]
    shown = {"model": "", "batch": "d", "scoring_batch": "d"}
    shown |= dict.fromkeys(("training_ms", "scoring_ms", "inference_ms"), ".3f")
    shown |= dict.fromkeys(("of_training", "of_inference", "of_small_batch"), ".3f")
    measure.report("Milliseconds per sample, and ratios of scoring", rows, shown, options)


if __name__ == "__main__":
    main()
