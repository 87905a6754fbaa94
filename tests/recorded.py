"""What runs of the core chose, on a grid of policies, options and seeds: digests to compare with.

    python tests/recorded.py            compare with recorded.json
    python tests/recorded.py --write    record again, after an intended change of the choices

The digests were recorded at commit ebb47b8, before the core was rearranged. Since then only the
clock of a fractional last epoch has changed, and runs end when their budget is spent. They hold the
kept samples in their order, their weights, the virtual step of each optimizer step and the factor
on the learning rate. Columns of the table are noted by their sums: floats may differ in the last
bit between processors.
"""

import hashlib
import json
import sys
from itertools import product
from pathlib import Path

import torch

from hf_dynprune.policies import make_policy
from hf_dynprune.pruner import DynamicPruner
from hf_dynprune.schedule import RunShape

FILE = Path(__file__).with_suffix(".json")
SEEDS = (0, 1)
SAMPLES, CLASSES = 203, 5

POLICIES = {
    "full": ("full", {}),
    "random": ("random", {"keep_ratio": 0.3}),
    "rs2": ("random", {"keep_ratio": 0.3, "replacement": False}),
    "epsilon-greedy": ("epsilon-greedy", {"keep_ratio": 0.3}),
    "ucb": ("ucb", {"keep_ratio": 0.3}),
    "ucb, std": (
        "ucb",
        {"keep_ratio": 0.5, "bonus": "std", "c": 2.0, "decay": 0.3, "epsilon": 0.25},
    ),
    "loss-proportional": ("loss-proportional", {"keep_ratio": 0.3}),
    "loss-proportional, sharp": (
        "loss-proportional",
        {"keep_ratio": 0.5, "alpha": 2.0, "decay": 1.0},
    ),
    "orderdp": ("orderdp", {"keep_ratio": 0.3}),
    "infobatch": ("infobatch", {}),
    "infobatch, exact": ("infobatch", {"keep_ratio": 0.4}),
    "seta": ("seta", {"prune_ratio": 0.1, "groups": 5, "window": 0.6}),
    "kakurenbo": ("kakurenbo", {}),
    "kakurenbo, trained": ("kakurenbo", {"scoring": "trained", "scale_lr": False}),
    "ies": ("ies", {"threshold": 0.7}),
    "static": ("static", {"keep": "random", "keep_ratio": 0.4}),
}
# name -> (fields of every policy, fields of those with scores, arguments of the pruner)
OPTIONS = {
    "plain": ({}, {}, {"num_epochs": 9}),
    "annealed": (
        {"period": 2, "first": 1, "last": 0.25},
        {},
        {"num_epochs": 7.5, "accumulation": 3},
    ),
    "guarded": (
        {},
        {"max_age": 2, "exclude_hardest": 0.1, "max_weight": 1.5},
        {"num_epochs": 8, "drop_last": True},
    ),
    "floor": ({"first": 1, "min_per_class": 2}, {}, {"max_steps": 100, "data_seed": 5}),
    "scored": ({}, {"scoring": "all", "period": 3}, {"num_epochs": 6}),
    "dropped": (
        {},
        {"scoring": "dropped", "scoring_mode": "eval"},
        {"max_steps": 61, "accumulation": 2},
    ),
}


def signals_of(index, epoch, seed):
    """Made-up signals of the samples: losses that fall at different speeds, some of them NaN."""
    generator = torch.Generator().manual_seed(1000 * seed + epoch)
    noise = torch.rand(SAMPLES, generator=generator)
    base = torch.rand(SAMPLES, generator=torch.Generator().manual_seed(seed)) * 4
    loss = base * (0.5 + noise) / (1 + epoch * (torch.arange(SAMPLES) % 7) / 8)
    loss[(torch.arange(SAMPLES) * 7 + epoch) % 97 == 0] = float("nan")
    signals = {
        "loss": loss,
        "correct": (loss < 1.5).float(),
        "confidence": (-loss).exp().nan_to_num(0.5),
        "label": (torch.arange(SAMPLES) % CLASSES).float(),
    }
    return {name: values[index] for name, values in signals.items()}


def digest(*parts):
    content = hashlib.sha256()
    for part in parts:
        content.update(
            part.contiguous().numpy().tobytes()
            if isinstance(part, torch.Tensor)
            else repr(part).encode()
        )
    return content.hexdigest()[:8]


def run_of(policy, seed, arguments):
    """The digest of each epoch of a run, its planned length, and the final sums of the columns."""
    data_seed = arguments.get("data_seed")
    shape = RunShape(SAMPLES, 8, **{k: v for k, v in arguments.items() if k != "data_seed"})
    pruner = DynamicPruner(policy, shape, seed=seed, data_seed=data_seed)
    epochs, planned = [], [pruner.num_epochs, pruner.clock.total, pruner.clock.mean]
    for epoch in range(pruner.num_epochs):
        done = pruner.clock.start + -(-pruner.batches_done // shape.accumulation)
        if shape.budget.is_spent(epoch, done):
            break
        record = pruner.begin_epoch(
            epoch, scorer=lambda index, epoch=epoch: signals_of(index, epoch + 50, seed)
        )
        order = torch.tensor(list(pruner.sampler))
        weights = pruner.weights(order)
        for batch in order.split(shape.batch_size):
            pruner.observe(batch, signals_of(batch, epoch, seed))
        start = pruner.clock.start
        steps = [pruner.clock.virtual(start + k) for k in range(pruner.clock.length + 1)]
        rounded = [round(step, 9) for step in steps]
        epochs.append(
            digest(
                order,
                weights,
                rounded,
                pruner.lr_scale,
                pruner.clock.total_steps(),
                record.scoring_passes,
            )
        )
    pruner.end_epoch()
    table = pruner.table
    columns = {
        name: round(float(table[name].double().nan_to_num(-1).sum()), 4) for name in table.columns
    }
    return {"planned": planned, "epochs": epochs, "columns": columns}


def cases():
    """(name, policy, seed, arguments of the pruner), without what a policy does not take."""
    for (name, (kind, fields)), (option, (common, scored, arguments)) in product(
        POLICIES.items(), OPTIONS.items()
    ):
        settings = {**common, **(scored if make_policy(kind, **fields).signals else {}), **fields}
        if "min_per_class" in settings and kind == "static":
            settings["first"] = 1
        for seed in SEEDS:
            yield f"{name} | {option} | {seed}", make_policy(kind, **settings), seed, arguments


def runs():
    return {name: run_of(policy, seed, arguments) for name, policy, seed, arguments in cases()}


if __name__ == "__main__":
    found = runs()
    if "--write" in sys.argv:
        FILE.write_text(json.dumps(found, indent=0) + "\n")
    before = json.loads(FILE.read_text())
    wrong = [name for name in before if found.get(name) != before[name]]
    print(f"{len(before) - len(wrong)} of {len(before)} runs are as recorded. Others: {wrong}")
    sys.exit(bool(wrong))
