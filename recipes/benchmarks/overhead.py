"""What DynamicPruningTrainer adds to an optimizer step of the stock Trainer: seconds and memory.

    results=recipes/results/benchmarks
    python recipes/benchmarks/overhead.py --models resnet8_cifar bert \\
        --output $results/overhead.json
    python recipes/benchmarks/overhead.py --models bert --pairs 12 \\
        --output $results/overhead_bert.json

Both trainers train the same model on the same batches. The policy keeps and scores all data (UCB
with keep_ratio=1). The two runs take turns step by step, so that disturbances of the machine affect
both. Each step, with the loading of its batch, is compared with the other run's step. The figure is
the median of these ratios.

The order of the two runs, and where in memory their tensors lie, also affect the steps. Therefore a
pair is four runs in a fresh process, two in each order, and its figure is the geometric mean. Runs
use one thread, unless OMP_NUM_THREADS says otherwise, because idle threads spin.

`causal_lm` is a small Llama with a vocabulary of 32,000, in which the loss is the most expensive
part of a step. `bert` and `resnet8_cifar` are small, so that the overhead shows. `resnet8_cifar`
trains as in recipes/cifar.py, in bf16 (float32 if bf16 is emulated) on images of CIFAR's shape.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import measure
import torch
from tqdm import trange
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)
from transformers.utils import logging

from hf_dynprune import UCB, DynamicPruningTrainer, PruningPolicy
from hf_dynprune.vision import CIFAR_MEAN, CIFAR_STD, ImageCache, batch_collator, create_timm_model

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import common  # of the recipes


def causal_lm(samples: int) -> tuple[PreTrainedModel, datasets.Dataset]:
    config = LlamaConfig(
        vocab_size=32_000,
        hidden_size=256,
        intermediate_size=688,
        num_hidden_layers=4,
        num_attention_heads=4,
    )
    tokens = torch.randint(0, 32_000, (samples, 128)).tolist()
    return LlamaForCausalLM(config), datasets.Dataset.from_dict(
        {"input_ids": tokens, "labels": tokens}
    )


def bert(samples: int) -> tuple[PreTrainedModel, datasets.Dataset]:
    config = BertConfig(
        hidden_size=128, num_hidden_layers=2, num_attention_heads=2, intermediate_size=512
    )
    data = {
        "input_ids": torch.randint(0, config.vocab_size, (samples, 64)).tolist(),
        "labels": torch.randint(0, 2, (samples,)).tolist(),
    }
    return BertForSequenceClassification(config), datasets.Dataset.from_dict(data)


def resnet8_cifar(samples: int) -> tuple[PreTrainedModel, ImageCache]:
    statistics = {"mean": CIFAR_MEAN, "std": CIFAR_STD}
    model = create_timm_model("resnet8_cifar", num_labels=10, image_size=32, **statistics)
    pixels = torch.randint(0, 256, (samples, 3, 32, 32), dtype=torch.uint8)
    data = ImageCache(pixels, torch.randint(0, 10, (samples,)), augment=True, **statistics)
    return model.to(memory_format=torch.channels_last), data


class Model(NamedTuple):
    make: Callable[[int], tuple[PreTrainedModel, Any]]  # number of samples -> model and data
    batch: int
    steps: int  # of a run
    settings: dict[str, Any]  # TrainingArguments, and the collator


IMAGES = {
    "bf16": common.computes_in_bf16(),
    "remove_unused_columns": False,
    "logging_nan_inf_filter": False,
    "data_collator": batch_collator,
}
MODELS = {
    "causal_lm": Model(causal_lm, 8, 6, {}),
    "bert": Model(bert, 16, 60, {}),
    "resnet8_cifar": Model(resnet8_cifar, 256, 25, IMAGES),
}


class Steps(TrainerCallback):
    """Seconds of each optimizer step, with the loading of its batch.

    The other run has its turn after each step.
    """

    def __init__(self, pass_on: Callable[[], None]) -> None:
        self.pass_on, self.seconds = pass_on, []

    def on_epoch_begin(self, *args, **kwargs) -> None:
        self.begun = time.perf_counter()

    def on_step_end(self, *args, **kwargs) -> None:
        self.seconds.append(time.perf_counter() - self.begun)
        self.pass_on()
        self.begun = time.perf_counter()


def make_run(
    kind: str,
    name: str,
    steps: int,
    folder: str,
    pruning: PruningPolicy | None = None,
    **more: Any,
) -> Trainer:
    """Make the stock Trainer or ours. Ours keeps and scores all data, unless `pruning` is given."""
    make, batch, _, settings = MODELS[name]
    set_seed(0)
    model, data = make(batch * steps)
    own = {"data_collator": settings["data_collator"]} if "data_collator" in settings else {}
    arguments = TrainingArguments(
        folder,
        per_device_train_batch_size=batch,
        save_strategy="no",
        logging_steps=500,
        report_to="none",
        disable_tqdm=True,
        use_cpu=not torch.cuda.is_available(),
        **{name: value for name, value in settings.items() if name not in own},
        **{"num_train_epochs": 1, **more},
    )
    own |= {"model": model, "args": arguments, "train_dataset": data}
    run = (
        Trainer(**own)
        if kind == "stock"
        else DynamicPruningTrainer(**own, pruning=pruning or UCB(keep_ratio=1.0))
    )
    run.remove_callback(PrinterCallback)
    return run


def steps_of(
    kind: str, name: str, steps: int, folder: str, pass_on: Callable[[], None]
) -> list[float]:
    """Seconds of each step, without the first fifth of the steps."""
    run, clock = make_run(kind, name, steps, folder), Steps(pass_on)
    run.add_callback(clock)
    # Both are made before the first one trains: making a Trainer resets the state of accelerate.
    pass_on()
    run.train()
    return clock.seconds[steps // 5 :]


def pair(name: str, steps: int, folder: str) -> dict[str, float]:
    """The ratio of the steps of both runs, and the median step of the stock Trainer in seconds."""
    prepare()
    ratios, stock = [], []
    for order in (("stock", "pruned"), ("pruned", "stock")):
        runs = measure.step_by_step(
            {kind: partial(steps_of, kind, name, steps, folder) for kind in order}
        )
        ratios.append(
            statistics.median(a / b for a, b in zip(runs["pruned"], runs["stock"], strict=True))
        )
        stock += runs["stock"]
    return {"ratio": statistics.geometric_mean(ratios), "stock": statistics.median(stock)}


def prepare() -> None:
    logging.set_verbosity_error()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    common.keep_freed_memory()  # as the recipes do; otherwise page faults dominate the noise


def peak(kind: str, name: str, folder: str) -> int:
    """The peak of tensor bytes in three steps, minus those before, as torch counts them."""
    with torch.profiler.profile(profile_memory=True) as profile:
        make_run(kind, name, 3, folder).train()
    trace = Path(folder) / "trace.json"
    profile.export_chrome_trace(str(trace))
    events = json.loads(trace.read_text())["traceEvents"]
    allocated = [
        event["args"]["Total Allocated"] for event in events if event.get("name") == "[memory]"
    ]
    return max(allocated) - allocated[0]


def row(name: str, steps: int, pairs: int, folder: str) -> dict[str, Any]:
    memory = {kind: peak(kind, name, folder) for kind in ("stock", "pruned")}
    found = [measure.apart(pair, name, steps, folder) for _ in trange(pairs, desc=f"pairs, {name}")]
    compared = measure.ratio([one["ratio"] for one in found], [1.0] * pairs)
    return {
        "model": name,
        "steps": steps,
        "pairs": pairs,
        "stock_ms": 1000 * statistics.median(one["stock"] for one in found),
        **compared,
        "low": compared["ratio_95"][0],
        "high": compared["ratio_95"][1],
        "memory_ratio": memory["pruned"] / memory["stock"],
        "memory_MB": memory["stock"] / 1e6,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--pairs", type=int, default=7, help="pairs of runs, at least 2")
    parser.add_argument(
        "--steps",
        type=int,
        help="steps of a run, the first fifth is not counted; default: by model",
    )
    parser.add_argument("--output", type=Path, help="JSON file")
    parser.set_defaults(bf16=common.computes_in_bf16())  # noted with the results
    options = parser.parse_args()
    prepare()
    with tempfile.TemporaryDirectory() as folder:
        rows = [
            row(name, options.steps or MODELS[name].steps, options.pairs, folder)
            for name in options.models
        ]
    shown = {"model": "", "steps": "d", "stock_ms": ".1f", "ratio": ".3f", "low": ".3f"}
    shown |= {"high": ".3f", "memory_ratio": ".4f", "memory_MB": ",.0f"}
    title = "Pruned / stock, an optimizer step: seconds (95 %), and peak of memory"
    measure.report(title, rows, shown, options)


if __name__ == "__main__":
    main()
