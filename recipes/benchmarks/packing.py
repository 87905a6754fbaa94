"""Does the saving survive packing? SFT with trl in four layouts of a batch, on all data and pruned.

    python recipes/benchmarks/packing.py --dataset path/to/gsm8k \\
        --output recipes/results/benchmarks/packing.json

    padded          each batch is padded to its longest sample
    by length       the same, in batches of samples of like length (group_by_length)
    padding-free    the samples of a batch are one row
    packed          rows of `--max_length` tokens, packed once before training (bfd)

In each round every layout trains the same texts twice: the stock SFTTrainer for one epoch on all of
them, and a UCB that keeps half of the samples for two epochs. A batch of packed rows has about as
many tokens as the other batches. Only real tokens count as tokens. The figures of a row:

    tokens_a_second   trained tokens a second, from the first step to the end of training
    padding           the share of padding in the positions that are computed
    ratio             tokens a second, to those of the stock SFTTrainer in padded batches
    epoch_ratio       seconds of an epoch, to those of an epoch on all data in the same layout
    token_ratio       the same of trained tokens; the saving survives if both are alike

Ratios are within one round. On a CPU the seconds are those of the process, which has one thread
unless OMP_NUM_THREADS says otherwise, so that other programs do not count. A CPU has no attention
for one long row of many texts: it masks what belongs to other texts, but computes it. So the
layouts without padding are slower there than on a GPU with FlashAttention. Pruned and full runs of
one layout are alike in this.

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
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import measure
import torch
from datasets.utils import disable_progress_bars
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

from hf_dynprune import UCB
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
        lengths = torch.empty(options.samples).log_normal_(4.5, 0.7, generator=generator)
        rows = [
            torch.randint(3, VOCABULARY, (int(length),), generator=generator).tolist()
            for length in lengths.clamp(8, options.max_length)
        ]
        tokenizer = GPT2Tokenizer().train_new_from_iterator(["no text"], 300)
        data = datasets.Dataset.from_dict({"input_ids": rows, "labels": rows})
    else:
        train, _ = load_splits(options.dataset, train=f"train[:{options.samples}]")
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
    """Seconds from the begin of the first step to the end of training."""

    def now(self) -> float:
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()
            return time.perf_counter()
        return time.process_time()

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self.begun = self.now()

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        self.seconds = self.now() - self.begun


def counting(cls: type[SFTTrainer]) -> type[Any]:
    """The class, which counts the tokens and the positions of the batches that it trains."""

    class Counting(cls):  # type: ignore[valid-type, misc]
        tokens = positions = 0

        def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            places = inputs["input_ids"].numel()
            mask = inputs.get("attention_mask")
            self.tokens += places if mask is None else int(mask.sum())
            self.positions += places
            return super().compute_loss(model, inputs, *args, **kwargs)

    return Counting


def run(
    layout: str,
    policy: str,
    data: datasets.Dataset,
    tokenizer: PreTrainedTokenizerBase,
    options: argparse.Namespace,
    folder: str,
) -> dict[str, float]:
    """Seconds, tokens and positions of an epoch."""
    pruned = policy != POLICIES[0]
    settings = dict(LAYOUTS[layout])
    batch, length = options.batch_size, None
    if layout == "packed":
        length = options.max_length
        tokens = batch * statistics.mean(map(len, data["input_ids"]))
        batch = max(1, round(tokens / length))
    epochs = math.ceil(1 / KEEP_RATIO) if pruned else 1
    set_seed(0)
    sizes = {"hidden_size": 128, "intermediate_size": 344, "num_hidden_layers": 4}
    model = LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=VOCABULARY, num_attention_heads=4))
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
        activation_checkpointing=False,
        **settings,
    )
    cls = counting(DynamicPruningSFTTrainer if pruned else SFTTrainer)
    own = {"pruning": UCB(KEEP_RATIO)} if pruned else {}
    trainer = cls(model, args, train_dataset=data, processing_class=tokenizer, **own)
    clock = Clock()
    trainer.add_callback(clock)
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return {
        "seconds": clock.seconds / epochs,
        "tokens": trainer.tokens / epochs,
        "positions": trainer.positions / epochs,
    }


def rows_of(layouts: list[str], rounds: dict[str, list[dict[str, float]]]) -> list[dict[str, Any]]:
    """A row for each layout and policy."""

    def values(name: str, of: str) -> list[float]:
        return [one[of] for one in rounds[name]]

    def speeds(name: str) -> list[float]:
        return [one["tokens"] / one["seconds"] for one in rounds[name]]

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
                    **found,
                    "epoch_ratio": epoch["ratio"],
                    "epoch_ratio_95": epoch["ratio_95"],
                    "token_ratio": tokens["ratio"],
                    "rounds": rounds[name],
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
    with tempfile.TemporaryDirectory() as folder:
        turns = {
            f"{layout}, {policy}": partial(run, layout, policy, data, tokenizer, options, folder)
            for layout in options.layouts
            for policy in POLICIES
        }
        next(iter(turns.values()))()  # warms up
        rounds = measure.in_turns(turns, options.rounds)
    shown = {"layout": "", "data": "", "tokens_a_second": ",.0f", "padding": ".3f"}
    shown |= dict.fromkeys(("ratio", "epoch_ratio", "token_ratio"), ".3f")
    title = "Trained tokens a second, and the seconds of an epoch"
    measure.report(title, rows_of(options.layouts, rounds), shown, options)


if __name__ == "__main__":
    main()
