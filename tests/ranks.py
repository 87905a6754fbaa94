"""What the processes of test_distributed.py do, each on its rank.

    torchrun ... tests/ranks.py FOLDER

Each scenario returns what its rank saw. If it fails, the text of its error is noted instead. In a
single process there is one rank.
"""

import gc
import os
import sys
import traceback
from itertools import product
from pathlib import Path

import torch
from test_checkpoints import CHANGING, GRID
from test_tasks import Some, train
from tiny import (
    assert_same_run,
    every_checkpoint,
    images,
    learning_rates,
    tiny_models,
    trainer,
    vit,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils.data import BatchSampler
from transformers import Trainer

from hf_dynprune import UCB, FullData
from hf_dynprune.distributed import world
from hf_dynprune.pruner import DynamicPruner
from hf_dynprune.schedule import RunShape

GLOBAL_BATCH = 12
# As torchrun sets them.
RANK, RANKS = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def same_run(folder, accumulation, scoring="trained"):
    """A run whose global batches do not depend on the number of ranks."""
    run = trainer(
        folder,
        data=images(45),
        pruning=UCB(keep_ratio=0.6, first=1, scoring=scoring),
        per_device_train_batch_size=GLOBAL_BATCH // RANKS,
        gradient_accumulation_steps=accumulation,
        num_train_epochs=4,
        ddp_find_unused_parameters=False,
        optim="sgd",
        learning_rate=0.5,
    )
    run.train()
    records = run.pruning_report.epochs
    return {
        "world": (world(), run.args.world_size),
        "weights": run.model.state_dict(),
        "table": run.pruner.table.state_dict(),
        "learning rates": learning_rates(run),
        "steps": [record.optimizer_steps for record in records],
        "samples": [record.samples for record in records],
        "passes": [record.forward_passes for record in records],
        "scored": [record.scoring_passes for record in records],
        "loss": [entry["loss"] for entry in run.state.log_history if "loss" in entry],
    }


def plain(folder):
    return same_run(folder, 1)


def accumulated(folder):
    return same_run(folder, 2)


def dropped_scored(folder):
    return same_run(folder, 1, scoring="dropped")


def gradients(folder):
    """The gradient of each optimizer step, for six models, with and without sample weights."""
    seen = {}
    for name in tiny_models():
        for weighted in (False, True):
            batch = 8 // RANKS
            run, steps = train(
                name,
                folder,
                batch,
                2,
                pruning=Some(weighted=weighted),
                ddp_find_unused_parameters=False,
            )
            seen[name, weighted] = [gradient for _, gradient, _ in steps], run.pruner.table["loss"]
    return seen


def resume_anywhere(folder):
    """Resume from every checkpoint of a run on all ranks. Returns how many there were."""
    data, resumed = images(26), 0
    workers = {"dataloader_num_workers": 2}
    loaders = {}, workers, {**workers, "dataloader_persistent_workers": True}
    for number, (accumulation, loader) in enumerate(product((1, 3), loaders)):

        def make(place, accumulation=accumulation, loader=loader):
            settings = {
                **GRID,
                **loader,
                "gradient_accumulation_steps": accumulation,
                "ddp_find_unused_parameters": False,
            }
            settings["per_device_train_batch_size"] = 4 if loader else 3
            return trainer(place, model=vit(dropout=0.1), data=data, pruning=CHANGING, **settings)

        resumed += len(list(every_checkpoint(make, folder / str(number))))
    return resumed


def newest_checkpoint(folder):
    """A checkpoint with a broken file of another rank is refused or skipped on all ranks."""
    settings = {
        **GRID,
        "per_device_train_batch_size": 2,
        "num_train_epochs": 2,
        "ddp_find_unused_parameters": False,
    }
    make = lambda: trainer(folder, data=images(26), pruning=CHANGING, **settings)  # noqa: E731
    run = make()
    run.train()
    last = folder / f"checkpoint-{run.state.global_step}"
    if RANK == 0:
        (last / f"rng_state_{RANKS - 1}.pth").write_bytes(b"")
    run.accelerator.wait_for_everyone()
    error = error_of(make, resume_from_checkpoint=str(last))
    again = make()
    again.train(resume_from_checkpoint=True)
    assert_same_run(again, run)
    return error, run.state.global_step - again.pruning_report.resumed[-1]["step"]


def error_of(make, **settings):
    try:
        make().train(**settings)
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def refused(folder):
    """The errors of what several ranks cannot do."""
    options = ("dispatch_batches", "split_batches")
    errors = {}
    for name in options:
        config = {name: True}
        errors[name] = error_of(
            lambda config=config: trainer(folder, pruning=UCB(0.5), accelerator_config=config)
        )
    shard = images(40).shard(RANKS, RANK)  # each rank has a part of the data
    errors["shard"] = error_of(lambda: trainer(folder, data=shard, pruning=UCB(0.5)))
    errors["seed"] = error_of(lambda: trainer(folder, pruning=UCB(0.5), seed=RANK))
    return errors


def full_data(folder):
    """The stock Trainer and FullData; N is a multiple of the global batch."""
    runs = []
    for kind in ({"cls": Trainer}, {"pruning": FullData()}):
        settings = {
            "per_device_train_batch_size": 5,
            "ddp_find_unused_parameters": False,
            "optim": "sgd",
            "learning_rate": 0.5,
        }
        run = trainer(folder, data=images(40), **settings, **kind)
        run.train()
        runs.append((run.model.state_dict(), learning_rates(run)))
    return runs


def sharded(folder):
    """The core in a plain loop, the model under torch's fully_shard (FSDP2).

    The Trainer cannot do this on CPUs: accelerate has FSDP for accelerators only.
    """
    torch.manual_seed(0)
    x, y = torch.randn(45, 8), torch.randint(0, 4, (45,))
    model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4))
    if RANKS > 1:
        mesh = init_device_mesh("cpu", (RANKS,))
        for part in (model[0], model):
            fully_shard(part, mesh=mesh)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    pruner = DynamicPruner(UCB(0.6, first=1), RunShape(45, batch_size=8 // RANKS, num_epochs=4))
    for epoch in range(pruner.num_epochs):
        pruner.begin_epoch(epoch)
        batches = list(BatchSampler(pruner.sampler, pruner.shape.batch_size, False))[RANK::RANKS]
        for number, batch in enumerate(batches):
            index = torch.tensor([i if i >= 0 else -1 for i in batch])
            rows = [i if i >= 0 else ~i for i in batch]
            losses = torch.nn.functional.cross_entropy(model(x[rows]), y[rows], reduction="none")
            real = pruner.sampler.samples_in(number, 1)  # on all ranks together
            loss = (losses * pruner.weights(index)).sum() * RANKS / real
            optimizer.zero_grad()
            loss.backward()
            pruner.observe(index, {"loss": losses})
            optimizer.step()
    pruner.end_epoch()
    weights = [p.full_tensor() if hasattr(p, "full_tensor") else p for p in model.parameters()]
    return type(model).__name__, [weight.detach() for weight in weights], pruner.table["mean"]


SCENARIOS = {
    1: (plain, accumulated, dropped_scored, sharded),
    2: (
        plain,
        accumulated,
        dropped_scored,
        sharded,
        gradients,
        resume_anywhere,
        newest_checkpoint,
        refused,
        full_data,
    ),
    3: (plain, accumulated, dropped_scored, newest_checkpoint),
}


def main(folder):
    gc.freeze()  # as conftest.py does
    seen = {}
    for scenario in SCENARIOS[RANKS]:
        try:
            seen[scenario.__name__] = scenario(folder / scenario.__name__)
        except Exception:
            seen[scenario.__name__] = traceback.format_exc()
        torch.save(seen, folder / f"rank{RANK}.pt")
        torch.distributed.barrier()
    sys.stdout.flush()
    # Skip the interpreter's teardown, in which gloo's threads now and then abort the process.
    os._exit(0)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
