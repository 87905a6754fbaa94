"""Seconds of start-up: imports, `--help`, building a trainer, and train() until the first step.

    python recipes/benchmarks/startup.py --with_transformers --rounds 3 \\
        --output recipes/results/benchmarks/startup.json

Each import and command starts a process. Trainers are built in this process, in turns:
DynamicPruningTrainer with UCB(keep_ratio=0.3), and the stock Trainer. "Build" is the constructor
and get_train_dataloader(), on data that exist already. "First step" is train() until the first
batch goes to the model.

`beyond` is the median difference to what is needed anyway, in the same round: bare Python, the
import of torch or of transformers, the stock Trainer.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import datasets
import measure
import numpy as np
import torch
import torch.nn.functional as F
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from hf_dynprune import UCB, DynamicPruningTrainer
from hf_dynprune.cli import COMMANDS  # this also compiles the module before it is timed

PYTHON, TORCH, TRAINER = "pass", "import torch", "from transformers import Trainer"
ARGUMENTS = "from transformers import HfArgumentParser, TrainingArguments"
IMPORTS = {  # what is run -> what it needs
    PYTHON: None,
    "import hf_dynprune": PYTHON,
    TORCH: None,
    "import hf_dynprune; hf_dynprune.UCB": TORCH,
    ARGUMENTS: None,
    TRAINER: None,
    "from hf_dynprune import DynamicPruningTrainer": TRAINER,
}
WITH_TRAINER = ("score", "advise")  # the commands that take the arguments of the Trainer
HELP = {"hf-dynprune --help": PYTHON}
for name in COMMANDS:
    HELP[f"hf-dynprune {name} --help"] = ARGUMENTS if name in WITH_TRAINER else PYTHON


def start(what: str) -> float:
    code = what
    if what in HELP:
        code = f"import sys; from hf_dynprune.cli import main; sys.exit(main({what.split()[1:]}))"
    begun = time.perf_counter()
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - begun


class Tiny(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(1, 10)

    def forward(self, feature: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        logits = self.layer(feature[:, None])
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


class Plain(torch.utils.data.Dataset):
    def __init__(self, features: np.ndarray, labels: np.ndarray) -> None:
        self.features, self.labels = torch.from_numpy(features), torch.from_numpy(labels)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"feature": self.features[index], "labels": self.labels[index]}


class OneStep(TrainerCallback):
    def on_step_begin(self, *args, **kwargs) -> None:
        self.reached = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs) -> None:
        control.should_training_stop = True


def build(
    pruned: bool, data: torch.utils.data.Dataset | datasets.Dataset, folder: str
) -> dict[str, float]:
    """Measure the seconds of building a trainer, and of its train() until the first step."""
    args = TrainingArguments(
        folder,
        num_train_epochs=10,
        per_device_train_batch_size=256,
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )
    step = OneStep()
    settings = {"model": Tiny(), "args": args, "train_dataset": data, "callbacks": [step]}
    marks = [time.perf_counter()]
    if pruned:
        trainer = DynamicPruningTrainer(
            **settings, pruning=UCB(keep_ratio=0.3), per_sample_loss_fn="single_label"
        )
    else:
        trainer = Trainer(**settings)
    trainer.get_train_dataloader()
    marks.append(time.perf_counter())
    trainer.remove_callback(PrinterCallback)
    marks.append(time.perf_counter())
    trainer.train()
    return {"build": marks[1] - marks[0], "first step": step.reached - marks[2]}


def measure_builds(
    samples: int, rounds: int, folder: str
) -> tuple[dict[str, list[float]], dict[str, str | None]]:
    """What was done -> its seconds in each round; what was done -> what it needs."""
    columns = {"feature": np.zeros(samples, np.float32), "labels": np.zeros(samples, np.int64)}
    kinds = {
        "datasets.Dataset": datasets.Dataset.from_dict(columns),
        "torch's Dataset": Plain(*columns.values()),
    }
    turns: dict[str, Callable[[], dict[str, float]]] = {}
    for kind, data in kinds.items():
        turns |= {
            f"{name}, {kind}": partial(build, name == "pruned", data, folder)
            for name in ("stock", "pruned")
        }
    for warm_up in turns.values():
        warm_up()
    seconds, needs = {}, {}
    for name, runs in measure.in_turns(turns, rounds, "rounds, trainers").items():
        stock = name.replace("pruned", "stock")
        for part in runs[0]:
            seconds[f"{part}: {name}"] = [run[part] for run in runs]
            needs[f"{part}: {name}"] = None if name == stock else f"{part}: {stock}"
    return seconds, needs


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--samples", type=int, default=1_280_000, help="samples of the trainers")
    parser.add_argument(
        "--with_transformers",
        action="store_true",
        help="also time what imports transformers, about 5 s per process",
    )
    parser.add_argument("--output", type=Path, help="JSON file")
    options = parser.parse_args()
    needs: dict[str, str | None] = {
        what: base
        for what, base in (IMPORTS | HELP).items()
        if options.with_transformers or not {what, base} & {TRAINER, ARGUMENTS}
    }
    seconds = measure.in_turns(
        {what: partial(start, what) for what in needs}, options.rounds, "rounds, processes"
    )
    with tempfile.TemporaryDirectory() as folder:
        built, needed = measure_builds(options.samples, options.rounds, folder)
    needs |= needed
    rows = []
    seconds |= built
    for what, values in seconds.items():
        row = {"what": what, **measure.spread(values), "needs": needs[what], "rounds": values}
        if base := needs[what]:
            pairs = zip(values, seconds[base], strict=True)
            row["beyond"] = statistics.median(a - b for a, b in pairs)
        rows.append(row)
    shown = {"what": "", **dict.fromkeys(("median", "lowest", "highest"), ".3f")}
    shown |= {"beyond": "+.3f", "needs": ""}
    title = f"Seconds of start-up; trainers on {options.samples:,d} samples"
    measure.report(title, rows, shown, options)


if __name__ == "__main__":
    main()
