"""What DynamicPruningTrainer adds to an optimizer step of the stock Trainer: its seconds, and the peak of its memory.

Both train the same model on the same batches; the policy keeps all data and scores it (UCB with keep_ratio=1). Pairs of
runs, in turns, in one process; the figure is the ratio of a pair's median steps.

    python recipes/benchmarks/overhead.py --model causal_lm --output recipes/results/benchmarks/overhead_causal_lm.json

`causal_lm` is a small Llama with a vocabulary of 32,000, where the loss is the dearest part of a step; `bert` and `resnet`
are small, so that what we add to each step weighs the most.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import datasets
import torch
from scipy import stats
from tqdm import tqdm
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PrinterCallback,
    ResNetConfig,
    ResNetForImageClassification,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from hf_dynprune import UCB, DynamicPruningTrainer
from hf_dynprune.report import describe_environment


def causal_lm(samples: int) -> tuple[PreTrainedModel, datasets.Dataset]:
    config = LlamaConfig(
        vocab_size=32_000, hidden_size=256, intermediate_size=688, num_hidden_layers=4, num_attention_heads=4
    )
    tokens = torch.randint(0, 32_000, (samples, 128)).tolist()
    return LlamaForCausalLM(config), datasets.Dataset.from_dict({"input_ids": tokens, "labels": tokens})


def bert(samples: int) -> tuple[PreTrainedModel, datasets.Dataset]:
    config = BertConfig(hidden_size=128, num_hidden_layers=2, num_attention_heads=2, intermediate_size=512)
    data = {
        "input_ids": torch.randint(0, config.vocab_size, (samples, 64)).tolist(),
        "labels": torch.randint(0, 2, (samples,)).tolist(),
    }
    return BertForSequenceClassification(config), datasets.Dataset.from_dict(data)


def resnet(samples: int) -> tuple[PreTrainedModel, datasets.Dataset]:
    config = ResNetConfig(embedding_size=16, hidden_sizes=[16, 32, 64], depths=[1, 1, 1], layer_type="basic", num_labels=10)
    data = {
        "pixel_values": torch.randn(samples, 3, 32, 32).numpy(),
        "labels": torch.randint(0, 10, (samples,)).tolist(),
    }
    return ResNetForImageClassification(config), datasets.Dataset.from_dict(data).with_format("torch")


MODELS: dict[str, tuple[Callable, int]] = {"causal_lm": (causal_lm, 8), "bert": (bert, 16), "resnet": (resnet, 64)}


class Steps(TrainerCallback):
    """Seconds of each optimizer step, the loading of its batch included."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_epoch_begin(self, *args, **kwargs) -> None:
        self.last = time.perf_counter()

    def on_step_end(self, *args, **kwargs) -> None:
        now = time.perf_counter()
        self.seconds.append(now - self.last)
        self.last = now


def train(kind: str, options: argparse.Namespace, folder: str) -> list[float]:
    make, batch = MODELS[options.model]
    set_seed(0)
    model, data = make(batch * options.steps)
    arguments = TrainingArguments(
        folder,
        num_train_epochs=1,
        per_device_train_batch_size=batch,
        save_strategy="no",
        logging_steps=500,
        report_to="none",
        disable_tqdm=True,
        bf16=options.bf16,
        use_cpu=not torch.cuda.is_available(),
    )
    steps = Steps()
    settings = {"model": model, "args": arguments, "train_dataset": data, "callbacks": [steps]}
    run = Trainer(**settings) if kind == "stock" else DynamicPruningTrainer(**settings, pruning=UCB(keep_ratio=1.0))
    run.remove_callback(PrinterCallback)
    run.train()
    return steps.seconds


def peak(kind: str, options: argparse.Namespace, folder: str) -> int:
    """The most bytes of tensors at a time in three steps, beyond those before, by torch's own count."""
    few = argparse.Namespace(**{**vars(options), "steps": 3})
    with torch.profiler.profile(profile_memory=True) as profile:
        train(kind, few, folder)
    trace = Path(folder) / "trace.json"
    profile.export_chrome_trace(str(trace))
    events = json.loads(trace.read_text())["traceEvents"]
    allocated = [event["args"]["Total Allocated"] for event in events if event.get("name") == "[memory]"]
    return max(allocated) - allocated[0]


def interval(values: list[float]) -> tuple[float, float]:
    """95 % confidence interval of the mean, by Student's t."""
    half = stats.t.ppf(0.975, len(values) - 1) * statistics.stdev(values) / len(values) ** 0.5
    return statistics.mean(values) - half, statistics.mean(values) + half


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="causal_lm")
    parser.add_argument("--pairs", type=int, default=7, help="runs of each kind")
    parser.add_argument("--steps", type=int, default=30, help="optimizer steps of a run; the first fifth is not counted")
    parser.add_argument("--bf16", action="store_true", help="autocast")
    parser.add_argument("--output", type=Path, help="JSON file")
    options = parser.parse_args()
    pairs = []
    with tempfile.TemporaryDirectory() as folder:
        memory = {kind: peak(kind, options, folder) for kind in ("stock", "pruned")}
        for number in tqdm(range(options.pairs), desc="pairs"):
            order = ("stock", "pruned") if number % 2 == 0 else ("pruned", "stock")
            seconds = {kind: train(kind, options, folder)[options.steps // 5 :] for kind in order}
            pairs.append({kind: statistics.median(seconds[kind]) for kind in ("stock", "pruned")})
    ratios = [pair["pruned"] / pair["stock"] for pair in pairs]
    low, high = interval(ratios)
    result = {
        "model": options.model,
        "bf16": options.bf16,
        "steps": options.steps,
        "step_ratio": statistics.mean(ratios),
        "step_ratio_95": [low, high],
        "memory_ratio": memory["pruned"] / memory["stock"],
        "memory": memory,
        "pairs": pairs,
        "environment": describe_environment(ranks=1),
    }
    if options.output:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(result, indent=2) + "\n")
    print(f"{options.model}: pruned / stock, {options.pairs} pairs of {options.steps} steps")
    print(f"  seconds a step  {result['step_ratio']:.3f}  (95 %: {low:.3f} to {high:.3f})")
    print(f"  peak of memory  {result['memory_ratio']:.3f}  ({memory['stock'] / 1e6:.0f} MB in the stock Trainer)")


if __name__ == "__main__":
    main()
