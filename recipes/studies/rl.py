"""A study of choosing prompts before the rollout: sums, and a small Llama that was taught a little.

    python -m recipes.studies.rl                     carries out what is left
    python -m recipes.studies.rl --seeds 0 1 2 3 4   the same with more seeds; see --help
    python -m recipes.studies.rl_results             draws the picture of the finished runs

The task is that of recipes/grpo.py: a reward of 1 for a right answer, 0 otherwise. The first model
knows sums of one digit and does not know those of three. It has seen two-digit sums with right
answers, and then many with wrong ones, so that it finds the right one now and then. The shares of
the three kinds set the effective share of a uniform run.

All runs of a seed train on the same prompts, for the same number of rollouts. The learning rate is
constant. So the first half of a uniform run is the uniform run with half of the steps. One method
lets the rate fall to 0 within these; another one has half of the batch. "filter" is the dynamic
sampling of DAPO: it drops groups without a gradient after the rollout, and rolls out more prompts
until the batch is full. Dropped rollouts count. Batch and learning rate are tuned for the uniform
run on held-out prompts, which are not those of the results. The other methods have the same.

The accuracy is that of two-digit sums: the mean probability, over held-out ones, that a completion
is right. It is read off the model, not drawn. It moves from step to step, so each value is the mean
over an eighth of the run.

Each finished run is written to rl_sums.json at once, so the command can be stopped and started
again. The first model is kept in --folder.
"""

import argparse
import itertools
import math
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import torch
from transformers import (
    AutoModelForCausalLM,
    LlamaForCausalLM,
    PrinterCallback,
    TrainerCallback,
)
from trl import GRPOConfig

from hf_dynprune import (
    GRESO,
    UCB,
    EpsilonGreedy,
    FullData,
    LossProportional,
    PruningPolicy,
    ThompsonPrompts,
)
from hf_dynprune.files import load_json, save_json
from hf_dynprune.grpo import DynamicPruningGRPOTrainer
from hf_dynprune.report import describe_environment

from . import rl_results
from .rl_results import FEWER, FILE, FILTER, SMALLER, TUNING_SEED, UNIFORM, last_accuracy

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import grpo  # of the recipes
from common import keep_freed_memory

# ---- what is run ---------------------------------------------------------------------------------

# Effective share of the uniform run, roughly -> shares of the sums with 1, 2 and 3 digits.
LEVELS = {0.2: (0.15, 0.2, 0.65), 0.4: (0.15, 0.45, 0.4), 0.1: (0.15, 0.09, 0.76)}
PROMPTS, GENERATIONS = 240, 8
ROLLOUTS = 24_000  # each prompt has 12.5 visits in the uniform run
POINTS = 40  # of a curve
HELD_OUT = (24, 400, 76)  # prompts of each level; half for tuning, half for the results
TAUGHT = grpo.TaskArguments(level_shares=[0.5, 0.5], warm_steps=900, width=64, layers=2)
SPOILED = replace(TAUGHT, warm_steps=200, warm_learning_rate=1e-3)
WRONG = (0.0, 0.7)  # shares of the wrong answers of each level in the second part of the teaching

HALVED_THOMPSON = "ThompsonPrompts, half of the batch"
KEEP = 0.1  # a choice for each tenth of a uniform epoch
METHODS: dict[str, Callable[[], PruningPolicy]] = {
    UNIFORM: FullData,
    "ThompsonPrompts": lambda: ThompsonPrompts(KEEP),
    "LossProportional": lambda: LossProportional(KEEP, signal="reward_std"),
    "GRESO": GRESO,
    FILTER: FullData,
    SMALLER: FullData,
    FEWER: FullData,
    "EpsilonGreedy": lambda: EpsilonGreedy(KEEP, signal="reward_std"),
    "UCB": lambda: UCB(KEEP, signal="reward_std"),
    # Added when the two rules that do not explore were seen to stay with few prompts.
    "LossProportional, max_age=40": lambda: LossProportional(KEEP, signal="reward_std", max_age=40),
    # Added when twice as many groups with a gradient were seen not to help at the same batch.
    HALVED_THOMPSON: lambda: ThompsonPrompts(KEEP),
}
FIRST = 5  # methods that are run with all seeds before the others are
# (prompts of a step, learning rate), tried with the uniform run at the first share.
TRIED = ((8, 1e-4), (8, 3e-5), (8, 3e-4), (4, 1e-4), (16, 3e-4))
TUNING_SHARE = 0.2


class Key(NamedTuple):
    """A run. Those of the seed `TUNING_SEED` are the tuning runs."""

    share: float
    method: str
    seed: int
    prompts: int
    rate: float


def planned(
    shares: Iterable[float],
    seeds: Sequence[int],
    methods: Iterable[str],
    chosen: Callable[[], tuple[int, float]],
) -> Iterator[Key]:
    """All runs in their order. `chosen` is asked after the tuning runs."""
    for setting in TRIED:
        yield Key(TUNING_SHARE, UNIFORM, TUNING_SEED, *setting)
    names, wanted = list(METHODS), set(methods)
    for share in shares:
        for group in (names[:FIRST], names[FIRST:]):
            for seed, method in itertools.product(seeds, filter(wanted.__contains__, group)):
                prompts, rate = chosen()
                prompts //= 2 if method in (SMALLER, HALVED_THOMPSON) else 1
                yield Key(share, method, seed, prompts, rate)


def chosen_setting(rows: Sequence[Mapping[str, Any]]) -> tuple[int, float]:
    """The batch and the rate with the best accuracy on the held-out prompts for tuning."""
    tuning = [row for row in rows if row["seed"] == TUNING_SEED]
    best = max(tuning, key=lambda row: last_accuracy(row, "validation"))
    return best["prompts"], best["rate"]


# ---- the task ------------------------------------------------------------------------------------


class HeldOut(NamedTuple):
    """Held-out sums with their answers: ids (M, T), labels (M, T) of the answers, levels (M,)."""

    ids: torch.Tensor
    labels: torch.Tensor
    levels: torch.Tensor

    @torch.no_grad()
    def accuracy(self, model: LlamaForCausalLM) -> list[float]:
        """For each level the mean probability that a completion is right."""
        logs = model(input_ids=self.ids).logits[:, :-1].log_softmax(-1)
        labels = self.labels[:, 1:]
        each = logs.gather(-1, labels.clamp(min=0)[..., None])[..., 0]
        right = each.where(labels != -100, 0).sum(1).exp()
        return [float(right[self.levels == level].mean()) for level in range(1, len(HELD_OUT) + 1)]


def held_out(tokenizer: Any) -> tuple[dict[str, HeldOut], set[str]]:
    """The sums for tuning and for the results, and the prompts of both."""
    taken: set[str] = set()
    shares = [n / sum(HELD_OUT) for n in HELD_OUT]
    task = grpo.TaskArguments(level_shares=shares)
    rows = grpo.different_sums(task, sum(HELD_OUT), taken).to_list()
    parts = {}
    for i, name in enumerate(("validation", "test")):
        own = rows[i::2]
        ids, labels = grpo.examples(own, tokenizer)
        parts[name] = HeldOut(ids, labels, torch.tensor([row["level"] for row in own]))
    return parts, taken


def train_prompts(share: float, seed: int, taken: set[str], tokenizer: Any) -> datasets.Dataset:
    """The prompts of a seed, with the ids of the right completion."""
    task = grpo.TaskArguments(level_shares=list(LEVELS[share]), task_seed=seed)
    found = grpo.different_sums(task, PROMPTS, set(taken))
    expected = [[*tokenizer(text).input_ids, tokenizer.eos_token_id] for text in found["answer"]]
    return found.add_column("expected", expected)


def first_model(folder: Path, tokenizer: Any, taken: set[str]) -> LlamaForCausalLM:
    """The model that all runs start from. It is made once."""
    if not (folder / "config.json").exists():
        model = grpo.warm_model(TAUGHT, tokenizer, taken)
        generator = torch.Generator().manual_seed(2)
        grpo.teach(model, SPOILED, tokenizer, taken, generator, WRONG)
        model.save_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(folder)


def right(completion_ids: list[list[int]], expected: list[list[int]], **columns: Any) -> list:
    """The reward: 1 for the answer and nothing else, 0 otherwise."""
    return [float(own == ids) for own, ids in zip(completion_ids, expected, strict=True)]


# ---- a run ---------------------------------------------------------------------------------------


class FilteringTrainer(DynamicPruningGRPOTrainer):
    """Fills each batch with groups that have a gradient, as DAPO's dynamic sampling does.

    Further prompts are those of an endless shuffled stream. Rollouts beyond the batch are dropped.
    """

    rollouts_left: Callable[[], int]

    def further_rows(self) -> Iterator[list[dict[str, Any]]]:
        data: Any = self.train_dataset
        generator = torch.Generator().manual_seed(self.args.seed + 1)
        size = self.args.per_device_train_batch_size // GENERATIONS
        while True:
            for part in torch.randperm(len(data), generator=generator).split(size):
                rows = [{**data[i], "sample_index": i} for i in part.tolist()]
                yield [dict(row) for row in rows for _ in range(GENERATIONS)]

    def _generate_and_score_completions(self, inputs: Any) -> Any:
        if not hasattr(self, "_further"):
            self._further = self.further_rows()
        wanted, parts, found = len(inputs), [], 0
        while True:
            part = super()._generate_and_score_completions(inputs)
            useful = (part["advantages"].view(-1, GENERATIONS) != 0).any(1)
            rows = useful.repeat_interleave(GENERATIONS)
            parts.append({name: value[rows] for name, value in part.items() if value.ndim})
            found += int(rows.sum())
            if found >= wanted or self.rollouts_left() <= 0:
                break
            inputs = next(self._further)
        if not found:  # the rollouts are used up; a step without a gradient
            return part
        return joined(parts, wanted, self.processing_class.pad_token_id)


def joined(parts: Sequence[Mapping[str, Any]], most: int, pad: int) -> dict[str, torch.Tensor]:
    """Batches of trl as one, padded as trl pads: prompts on the left, completions on the right."""
    made = {}
    for name in parts[0]:
        each = [part[name] for part in parts]
        if each[0].ndim == 2:
            width = max(value.shape[1] for value in each)
            filler = pad if name.endswith("_ids") else 0
            missing = [width - value.shape[1] for value in each]
            ends = [(n, 0) if name.startswith("prompt") else (0, n) for n in missing]
            each = [
                torch.nn.functional.pad(value, end, value=filler)
                for value, end in zip(each, ends, strict=True)
            ]
        made[name] = torch.cat(each)[:most]
    return {**made, "num_items_in_batch": made["completion_mask"].sum()}


class Curve(TrainerCallback):
    """Notes the held-out accuracy at even distances in rollouts, and ends the run in time."""

    def __init__(self, parts: Mapping[str, HeldOut], budget: int) -> None:
        self.parts, self.budget = parts, budget
        self.points: list[dict[str, Any]] = []
        self.spent: Callable[[], int] = int

    def on_train_begin(self, args, state, control, model=None, **kwargs) -> None:
        self.note(model)

    def on_step_end(self, args, state, control, model=None, **kwargs) -> None:
        if self.spent() >= ROLLOUTS / POINTS * len(self.points) or self.spent() >= self.budget:
            self.note(model)
        control.should_training_stop |= self.spent() >= self.budget

    def note(self, model: Any) -> None:
        found = {name: part.accuracy(model) for name, part in self.parts.items()}
        self.points.append({"rollouts": self.spent(), **found})


def carry_out(
    key: Key, model: LlamaForCausalLM, tokenizer: Any, parts: Mapping, taken: set[str]
) -> dict[str, Any]:
    """Train, and return the row of the run."""
    budget = ROLLOUTS // 2 if key.method == FEWER else ROLLOUTS
    curve = Curve(parts, budget)
    with tempfile.TemporaryDirectory() as folder:
        args = GRPOConfig(
            folder,
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            max_steps=math.ceil(budget / (key.prompts * GENERATIONS)),
            per_device_train_batch_size=key.prompts * GENERATIONS,
            num_generations=GENERATIONS,
            max_completion_length=len(HELD_OUT) + 1,
            learning_rate=key.rate,
            lr_scheduler_type="linear" if key.method == FEWER else "constant",
            logging_steps=50,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            dataloader_pin_memory=False,
            seed=key.seed,
        )
        trainer = (FilteringTrainer if key.method == FILTER else DynamicPruningGRPOTrainer)(
            model,
            right,
            args,
            train_dataset=train_prompts(key.share, key.seed, taken, tokenizer),
            processing_class=tokenizer,
            pruning=METHODS[key.method](),
            callbacks=[curve],
        )
        trainer.remove_callback(PrinterCallback)

        def spent() -> int:
            records = trainer.pruning_report.epochs if trainer.pruner else ()
            return sum(record.rollouts.get("completions", 0) for record in records)

        curve.spent = spent
        trainer.rollouts_left = lambda: budget - spent()
        trainer.train()
    totals = trainer.pruning_report.totals
    return {
        **key._asdict(),
        "policy": trainer.pruning_report.policy,
        "rollouts": totals["rollouts"],
        "optimizer_steps": totals["optimizer_steps"],
        "seconds": {name: round(value, 2) for name, value in totals["seconds"].items()},
        "curve": curve.points,
    }


def study(file: Path, folder: Path, keys: Callable[..., Iterable[Key]]) -> None:
    """Carry out the runs that are not in the file.

    Args:
        file: Where the finished runs are.
        folder: Where the first model is.
        keys: Gives the runs, see [`planned`], from a function that gives batch and rate.
    """
    torch.set_num_threads(1)  # two threads are slower with so small a model
    keep_freed_memory()
    tokenizer = grpo.make_tokenizer()
    parts, taken = held_out(tokenizer)
    stored = load_json(file) if file.exists() else {"runs": []}
    rows = stored["runs"]
    done = {Key(*(row[name] for name in Key._fields)) for row in rows}
    model = first_model(folder, tokenizer, taken)
    for key in keys(lambda: chosen_setting(rows)):
        if key in done:
            continue
        row = carry_out(key, first_model(folder, tokenizer, taken), tokenizer, parts, taken)
        rows.append(row)
        save_json(
            file,
            {
                "written_by": "python -m recipes.studies.rl",
                "first_model": {name: part.accuracy(model) for name, part in parts.items()},
                "environment": describe_environment(),
                "runs": rows,
            },
            indent=None,  # thousands of points: indented, they take twice the bytes
        )
        print(f"{key}: {last_accuracy(row):.4f}, {sum(row['seconds'].values()):.0f} s", flush=True)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shares", type=float, nargs="+", choices=LEVELS, default=list(LEVELS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--file", type=Path, default=FILE, help="where the finished runs are")
    parser.add_argument("--folder", type=Path, default=Path("runs/rl_sums"), help="first model")
    options = parser.parse_args(argv)
    keys = partial(planned, options.shares, options.seeds, options.methods)
    study(options.file, options.folder, keys)
    if options.file == FILE:
        rl_results.main()


if __name__ == "__main__":
    main()
