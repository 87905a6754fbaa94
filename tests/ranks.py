"""What the real processes of test_distributed.py do under torchrun, each on its rank: `torchrun ... tests/ranks.py FOLDER`.

Each scenario returns what its rank saw; of one that fails the text of its error is noted. In a process alone it is one rank.
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

GLOBAL_BATCH = 12
RANK, RANKS = (
    int(os.environ.get("RANK", 0)),
    int(os.environ.get("WORLD_SIZE", 1)),
)  # as torchrun says


def same_run(folder, accumulation, scoring="trained"):
    """A run whose global batches are those of any number of ranks."""
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
    """Of each optimizer step, for six kinds of model, with and without sample weights."""
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
            seen[name, weighted] = [gradient for _, gradient, _ in steps], run.pruner.table["last"]
    return seen


def resume_anywhere(folder):
    """Resumes from every checkpoint of a run on all ranks; their number."""
    data, resumed = images(26), 0
    workers = {"dataloader_num_workers": 2}
    for number, (accumulation, loader) in enumerate(
        product((1, 3), ({}, workers, {**workers, "dataloader_persistent_workers": True}))
    ):

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
    """Rank 0 looks for it: one with a broken file of another rank is refused, and passed over, on all."""
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
    """What cannot go well on several ranks."""
    options = ("dispatch_batches", "split_batches")
    errors = {
        name: error_of(
            lambda name=name: trainer(folder, pruning=UCB(0.5), accelerator_config={name: True})
        )
        for name in options
    }
    shard = images(40).shard(RANKS, RANK)  # its own part of the data on each rank
    errors["shard"] = error_of(lambda: trainer(folder, data=shard, pruning=UCB(0.5)))
    errors["seed"] = error_of(lambda: trainer(folder, pruning=UCB(0.5), seed=RANK))
    return errors


def full_data(folder):
    """The stock Trainer and FullData, where N is a multiple of the global batch."""
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
    """The core in a loop of one's own, the model under torch's fully_shard (FSDP2). Through the Trainer this cannot be had
    on CPUs: accelerate has FSDP for accelerators only."""
    torch.manual_seed(0)
    x, y = torch.randn(45, 8), torch.randint(0, 4, (45,))
    model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4))
    if RANKS > 1:
        mesh = init_device_mesh("cpu", (RANKS,))
        for part in (model[0], model):
            fully_shard(part, mesh=mesh)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    pruner = DynamicPruner(UCB(0.6, first=1), 45, batch_size=8 // RANKS, num_epochs=4)
    for epoch in range(pruner.num_epochs):
        pruner.begin_epoch(epoch)
        for number, batch in enumerate(
            list(BatchSampler(pruner.sampler, pruner.batch_size, False))[RANK::RANKS]
        ):
            index = torch.tensor([i if i >= 0 else -1 for i in batch])
            rows = [i if i >= 0 else ~i for i in batch]
            losses = torch.nn.functional.cross_entropy(model(x[rows]), y[rows], reduction="none")
            loss = (
                (losses * pruner.weights(index)).sum()
                * RANKS
                / pruner.sampler.samples_in(number, 1)
            )
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
    os._exit(
        0
    )  # past the interpreter's teardown, in which gloo's threads abort the process now and then (pytorch)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
