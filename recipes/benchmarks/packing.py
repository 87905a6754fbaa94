"""Does the saving survive packing? SFT with trl in four layouts of a batch, on all data and pruned.

    python recipes/benchmarks/packing.py --dataset path/to/gsm8k \\
        --output recipes/results/benchmarks/packing.json

    padded          each batch is padded to its longest sample
    by length       the same, in batches of samples of like length (group_by_length)
    padding-free    the samples of a batch are one row
    packed          rows of `--max_length` tokens, packed once before training (bfd)

In each round every layout trains the same texts twice: the stock SFTTrainer for one epoch on all of
them, and a UCB that keeps half of the samples for two epochs. A batch of packed rows has about as
many tokens as the other batches. All runs of a round take turns step by step, so that disturbances
of the machine affect all. Only real tokens count as tokens. The figures of a row:

    tokens_a_second   trained tokens a second, from the first step to the end of training
    padding           the share of padding in the positions that are computed
    padding_all       the same for all texts of the dataset, or a random half, which are collated
                      and not trained: groups by length need many texts
    ratio             tokens a second, to those of the stock SFTTrainer in padded batches
    epoch_ratio       seconds of an epoch, to those of an epoch on all data in the same layout
    token_ratio       the same of trained tokens; the saving survives if both are alike

Ratios are within one round. On a CPU the seconds are those of the run's thread, so that other
programs do not count. A CPU has no attention for one long row of many texts: it masks what belongs
to other texts, but computes it. So the layouts without padding are slower there than on a GPU with
FlashAttention. Pruned and full runs of one layout are alike in this.

Without `--dataset` the texts are random tokens. Their lengths are spread as those of conversations
(log-normal).
"""

import argparse
import math
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import measure
import torch
from datasets.utils import disable_progress_bars
from tqdm import trange
from transformers import (
    GPT2Tokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerBase,
    PrinterCallback,
    TrainerCallback,
    set_seed,
)
from transformers.utils import logging
from trl import SFTConfig, SFTTrainer

from hf_dynprune import UCB, FullData
from hf_dynprune.data import load_splits
from hf_dynprune.sft import DynamicPruningSFTTrainer

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import common  # of the recipes
import sft

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
KEEP_RATIO = 0.5
VOCABULARY = 4000
FREE = {"padding_free": True}
LAYOUTS: dict[str, dict[str, Any]] = {
    "padded": {},
    "by length": {"train_sampling_strategy": "group_by_length"},
    "padding-free": FREE,
    "packed": {"packing": True},
}
POLICIES = ("all data", "UCB, half")


def load_texts(options: argparse.Namespace) -> tuple[datasets.Dataset, PreTrainedTokenizerBase]:
    """Tokenized texts, and their tokenizer. Only completions are trained, if there are prompts."""
    if not options.dataset:
        generator = torch.Generator().manual_seed(0)
        lengths = torch.empty(10 * options.samples).log_normal_(4.5, 0.7, generator=generator)
        rows = [
            torch.randint(3, VOCABULARY, (int(length),), generator=generator).tolist()
            for length in lengths.clamp(8, options.max_length)
        ]
        tokenizer = GPT2Tokenizer().train_new_from_iterator(["no text"], 300)
        data = datasets.Dataset.from_dict({"input_ids": rows, "labels": rows})
    else:
        train, _ = load_splits(options.dataset)
        texts = sft.prompts(train)
        names = [name for name in ("prompt", "completion", "text") if name in texts.column_names]
        words = (row[name] for row in texts for name in names)
        tokenizer = GPT2Tokenizer().train_new_from_iterator(words, VOCABULARY)

        def tokenize(row: dict[str, str]) -> dict[str, list[int]]:
            parts = [tokenizer(row[name])["input_ids"] for name in names]
            ids = [token for part in parts for token in part][: options.max_length]
            ignored = len(parts[0]) if len(parts) > 1 else 0
            return {"input_ids": ids, "labels": [*[-100] * ignored, *ids[ignored:]][: len(ids)]}

        data = texts.map(tokenize, remove_columns=texts.column_names)
    tokenizer.pad_token = tokenizer.eos_token
    return data, tokenizer


class Clock(TrainerCallback):
    """Seconds of a run, from its first step to the end of training, without the others' turns."""

    def __init__(self, pass_on: Callable[[], None]) -> None:
        self.pass_on, self.seconds = pass_on, 0.0

    def now(self) -> float:
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()
            return time.perf_counter()
        return time.thread_time()

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self.begun = self.now()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.seconds += self.now() - self.begun
        self.pass_on()
        self.begun = self.now()

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        self.seconds += self.now() - self.begun


def counting(cls: type[SFTTrainer]) -> type[Any]:
    """The class, which counts the tokens and the positions of the batches that it trains."""

    class Counting(cls):  # type: ignore[valid-type, misc]
        tokens = positions = 0

        def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            tokens, positions = sizes(inputs)
            self.tokens += tokens
            self.positions += positions
            return super().compute_loss(model, inputs, *args, **kwargs)

    return Counting


def sizes(batch: Mapping[str, Any]) -> tuple[int, int]:
    """The tokens and the positions of a batch."""
    positions, mask = batch["input_ids"].numel(), batch.get("attention_mask")
    return positions if mask is None else int(mask.sum()), positions


def make_trainer(
    cls: type[Any],
    layout: str,
    data: datasets.Dataset,
    tokenizer: PreTrainedTokenizerBase,
    options: argparse.Namespace,
    folder: str,
    epochs: int = 1,
    **own: Any,
) -> Any:
    batch, length = options.batch_size, None
    if layout == "packed":
        length = options.max_length
        tokens = batch * statistics.mean(map(len, data["input_ids"]))
        batch = max(1, round(tokens / length))
    set_seed(0)
    shape = {"hidden_size": 128, "intermediate_size": 344, "num_hidden_layers": 4}
    model = LlamaForCausalLM(LlamaConfig(**shape, vocab_size=VOCABULARY, num_attention_heads=4))
    args = SFTConfig(
        folder,
        num_train_epochs=epochs,
        per_device_train_batch_size=batch,
        max_length=length,
        learning_rate=1e-3,
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=DEVICE.type == "cpu",
        bf16=options.bf16,
        dataloader_pin_memory=DEVICE.type == "cuda",
        **LAYOUTS[layout],
    )
    # Two names of one option: transformers has renamed it, and trl sets it.
    args.activation_checkpointing = args.gradient_checkpointing = False
    trainer = cls(model, args, train_dataset=data, processing_class=tokenizer, **own)
    trainer.remove_callback(PrinterCallback)
    return trainer


def run(
    make: Callable[..., Any], layout: str, policy: str, pass_on: Callable[[], None]
) -> dict[str, float]:
    """Seconds, tokens and positions of an epoch."""
    pruned = policy != POLICIES[0]
    epochs = math.ceil(1 / KEEP_RATIO) if pruned else 1
    cls = counting(DynamicPruningSFTTrainer if pruned else SFTTrainer)
    own = {"pruning": UCB(KEEP_RATIO)} if pruned else {}
    trainer, clock = make(cls, layout, epochs=epochs, **own), Clock(pass_on)
    trainer.add_callback(clock)
    # All are made before the first one trains: making a Trainer resets the state of accelerate.
    pass_on()
    trainer.train()
    return {
        "seconds": clock.seconds / epochs,
        "tokens": trainer.tokens / epochs,
        "positions": trainer.positions / epochs,
    }


def padding_of(trainer: Any) -> float:
    """The share of padding in an epoch of a trainer, whose batches are only collated."""
    found = [sizes(batch) for batch in trainer.get_train_dataloader()]
    return 1 - sum(tokens for tokens, _ in found) / sum(positions for _, positions in found)


def rows_of(
    layouts: list[str], rounds: list[dict[str, dict[str, float]]], padding_all: dict[str, float]
) -> list[dict[str, Any]]:
    """A row for each layout and policy."""

    def values(name: str, of: str) -> list[float]:
        return [one[name][of] for one in rounds]

    def speeds(name: str) -> list[float]:
        return [one[name]["tokens"] / one[name]["seconds"] for one in rounds]

    base, rows = f"{layouts[0]}, {POLICIES[0]}", []
    for layout in layouts:
        full = f"{layout}, {POLICIES[0]}"
        for policy in POLICIES:
            name = f"{layout}, {policy}"
            found = measure.ratio(speeds(name), speeds(base))
            epoch = measure.ratio(values(name, "seconds"), values(full, "seconds"))
            tokens = measure.ratio(values(name, "tokens"), values(full, "tokens"))
            padding = 1 - sum(values(name, "tokens")) / sum(values(name, "positions"))
            rows.append(
                {
                    "layout": layout,
                    "data": policy,
                    "tokens_a_second": statistics.median(speeds(name)),
                    "padding": padding,
                    "padding_all": padding_all[name],
                    **found,
                    "epoch_ratio": epoch["ratio"],
                    "epoch_ratio_95": epoch["ratio_95"],
                    "token_ratio": tokens["ratio"],
                    "rounds": [one[name] for one in rounds],
                }
            )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--dataset", help="Hub id or local path of texts, as recipes/sft.py takes them"
    )
    parser.add_argument(
        "--layouts",
        nargs="+",
        choices=LAYOUTS,
        default=list(LAYOUTS),
        help="`ratio` compares with the first",
    )
    parser.add_argument("--samples", type=int, default=192)
    parser.add_argument("--batch_size", type=int, default=8, help="samples in a batch")
    parser.add_argument("--max_length", type=int, default=512, help="tokens of a packed row")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--output", type=Path, help="JSON file")
    parser.set_defaults(bf16=common.computes_in_bf16())  # noted with the results
    options = parser.parse_args()
    logging.set_verbosity_error()
    disable_progress_bars()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    common.keep_freed_memory()  # as the recipes do
    data, tokenizer = load_texts(options)
    half = data.shuffle(seed=0).select(range(round(KEEP_RATIO * len(data))))
    names = {
        f"{layout}, {policy}": (layout, policy) for layout in options.layouts for policy in POLICIES
    }
    with tempfile.TemporaryDirectory() as folder:
        few = data.select(range(min(options.samples, len(data))))
        more = {"tokenizer": tokenizer, "options": options, "folder": folder}
        make = partial(make_trainer, data=few, **more)
        turns = {name: partial(run, make, *which) for name, which in names.items()}
        rounds = []
        for number in trange(options.rounds, desc="rounds"):
            order = list(turns) if number % 2 == 0 else list(reversed(turns))
            rounds.append(measure.step_by_step({name: turns[name] for name in order}))
        padding_all = {}
        for name, (layout, policy) in names.items():
            texts = data if policy == POLICIES[0] else half
            trainer = make_trainer(
                DynamicPruningSFTTrainer, layout, data=texts, pruning=FullData(), **more
            )
            padding_all[name] = padding_of(trainer)
    shown = {"layout": "", "data": "", "tokens_a_second": ",.0f"}
    shown |= dict.fromkeys(("padding", "padding_all", "ratio", "epoch_ratio", "token_ratio"), ".3f")
    title = "Trained tokens a second, and the seconds of an epoch"
    measure.report(title, rows_of(options.layouts, rounds, padding_all), shown, options)


if __name__ == "__main__":
    main()
