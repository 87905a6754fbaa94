"""How close the predictions of `advise` come to the seconds that runs take.

    python recipes/benchmarks/advice.py --dataset path/to/cifar10 \\
        --output recipes/results/benchmarks/advice.json

The runs are those of recipes/quickstart.py (full, short, pruned), and of recipes/cifar.py with a
small ResNet on a part of the data (full, pruned, pruned with scoring passes). In each round, each
run is predicted by a dry run, and then its `train()` is measured. The medians of the rounds are
compared:

    error   predicted / measured - 1
    unrest  (highest - lowest) / median of the measured seconds: how much the machine varied
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from tqdm import tqdm, trange
from transformers import PrinterCallback
from transformers.utils.logging import disable_progress_bar

from hf_dynprune import UCB, DynamicPruningTrainer, FullData, PruningPolicy, advise
from hf_dynprune.files import save_json
from hf_dynprune.report import describe_environment

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import cifar  # of the recipes
import quickstart

Run = tuple[str, str, Callable[[], DynamicPruningTrainer]]  # (recipe, run, maker of its trainer)


def quickstart_runs(epochs: int, folder: Path) -> Iterator[Run]:
    torch.set_num_threads(1)  # as the recipe does
    for name, policy, trained in (
        ("full", FullData(), epochs),
        ("short", FullData(), 0.3 * epochs),
        ("ucb 0.3", UCB(keep_ratio=0.3), epochs),
    ):
        yield "quickstart", name, partial(quickstart.make_trainer, policy, trained, 0, folder)


def cifar_runs(dataset: str, split: str, epochs: int, folder: Path) -> Iterator[Run]:
    torch.set_num_threads(THREADS)
    data = cifar.DataArguments(dataset=dataset, train_split=split, eval_split="test[:2000]")
    images = cifar.load_images(data, seed=0)

    def make(policy: PruningPolicy) -> DynamicPruningTrainer:
        args = cifar.CifarTrainingArguments(
            str(folder),
            num_train_epochs=epochs,
            eval_strategy="epoch",
            seed=0,
            report_to="none",
            disable_tqdm=True,
        )
        trainer = cifar.make_trainer(
            cifar.RecipeArguments(model="resnet8_cifar"), policy, args, images
        )
        trainer.remove_callback(PrinterCallback)
        return trainer

    for name, policy in (
        ("full", FullData()),
        ("ucb 0.3", UCB(keep_ratio=0.3)),
        ("ucb 0.5, dropped are scored", UCB(keep_ratio=0.5, scoring="dropped")),
    ):
        yield "cifar", name, partial(make, policy)


THREADS = torch.get_num_threads()


def predict_and_measure(make: Callable[[], DynamicPruningTrainer]) -> dict[str, Any]:
    """Predict and measure one run. Each has its own trainer."""
    trainer = make()
    advice = advise(trainer, policies=[trainer.pruning])
    trainer = make()
    begun = time.perf_counter()
    trainer.train()
    return {
        "policy": str(trainer.pruning),
        "predicted": advice.predictions[0].total,
        "measured": time.perf_counter() - begun,
        "predicted_phases": advice.predictions[0].seconds,
        "measured_phases": trainer.pruning_report.totals["seconds"],
        "settings": advice.settings.to_dict(),
        "dry_run": asdict(advice.measured),
    }


def compared(recipe: str, run: str, rounds: list[dict[str, Any]]) -> dict[str, Any]:
    measured, predicted = ([one[what] for one in rounds] for what in ("measured", "predicted"))
    return {
        "recipe": recipe,
        "run": run,
        "measured": median(measured),
        "predicted": median(predicted),
        "error": median(predicted) / median(measured) - 1,
        "unrest": (max(measured) - min(measured)) / median(measured),
        "rounds": rounds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--dataset", help="Hub id or local path of CIFAR-10; default: only the quickstart's runs"
    )
    parser.add_argument("--train_split", default="train[:10000]", help="split of the dataset")
    parser.add_argument("--epochs", type=int, default=3, help="epochs of the runs on CIFAR-10")
    parser.add_argument(
        "--quickstart_epochs", type=int, default=20, help="epochs of the quickstart's full run"
    )
    parser.add_argument("--rounds", type=int, default=5, help="rounds; their medians are compared")
    parser.add_argument("--output", type=Path, help="JSON file")
    options = parser.parse_args()
    disable_progress_bar()
    rounds: dict[tuple[str, str], list[dict[str, Any]]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)

        def runs() -> Iterator[Run]:
            yield from quickstart_runs(options.quickstart_epochs, folder)
            if options.dataset:
                yield from cifar_runs(options.dataset, options.train_split, options.epochs, folder)

        for _ in trange(options.rounds, desc="rounds"):
            for recipe, run, make in tqdm(
                runs(), desc="runs", total=6 if options.dataset else 3, leave=False
            ):
                rounds.setdefault((recipe, run), []).append(predict_and_measure(make))
    results = [compared(*names, each) for names, each in rounds.items()]
    worst = max(results, key=lambda result: abs(result["error"]))
    if options.output:
        content = {
            "worst": {name: worst[name] for name in ("recipe", "run", "error")},
            "runs": results,
            "environment": describe_environment(ranks=1),
        }
        save_json(options.output, content)
    print(f"{'recipe':11}{'run':29}{'measured':>10}{'predicted':>11}{'error':>8}{'unrest':>9}")
    for result in results:
        print(
            f"{result['recipe']:11}{result['run']:29}{result['measured']:8.1f} s"
            f"{result['predicted']:9.1f} s{100 * result['error']:+6.1f} %"
            f"{100 * result['unrest']:7.1f} %"
        )
    print(f"worst: {worst['recipe']}, {worst['run']}: {100 * worst['error']:+.1f} %")


if __name__ == "__main__":
    main()
