"""The same promises for each trainer of another library. `library_trainers.py` has the table.

Under torchrun this file is the program of each rank.
"""

import os
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from library_trainers import CASES, N, saved
from programs import torchrun
from tiny import assert_same_run, learning_rates, same_weights

from hf_dynprune import UCB, EpochPlan, FullData, PruningPolicy
from hf_dynprune.table import Last

KEPT = 12

pytestmark = [
    # peft reads it, transformers renamed it.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),
]


@dataclass(frozen=True)
class Some(PruningPolicy):
    """A fixed number of rows with different weights, drawn again in each epoch."""

    memory = Last("loss")
    weighs = True

    def plan(self, choice):
        indices = torch.randperm(choice.n, generator=choice.generator)[:KEPT]
        return EpochPlan(indices, 0.25 + (indices * 7 % 5) / 2)


@pytest.mark.parametrize("name", CASES)
def test_each_score_is_the_loss_of_its_own_row(name, tmp_path):
    case = CASES[name]
    run = case.make(tmp_path, pruning=UCB(0.4, first=1), learning_rate=0.0, num_train_epochs=3)
    run.train()
    alone = case.alone(run)
    scores = run.pruner.table["mean"]
    torch.testing.assert_close(scores, alone, rtol=1e-4, atol=1e-6)
    assert len(set(scores.tolist())) == N  # each its own
    records = run.pruning_report.epochs
    assert [record.samples for record in records] == [N, 8, 8]
    assert run.pruning_report.totals["forward_passes"] == N + 16


@pytest.mark.parametrize("name", CASES)
def test_full_data_is_the_stock_trainer(name, tmp_path):
    case = CASES[name]
    stock = case.make(tmp_path, stock=True)
    full = case.make(tmp_path, pruning=FullData())
    before = [weight.clone() for weight in full.model.parameters()]
    for run in (stock, full):
        run.train()
    assert learning_rates(full) == learning_rates(stock)
    if case.rounds:
        for one, other in zip(full.model.parameters(), stock.model.parameters(), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)
    else:
        assert same_weights(full.model, stock.model)
    changed = zip(full.model.parameters(), before, strict=True)
    assert any(not torch.equal(weight, old) for weight, old in changed)
    logs = [run.state.log_history[0] for run in (full, stock)]
    assert set(logs[1]) <= set(logs[0])
    assert logs[0]["loss"] == pytest.approx(logs[1]["loss"], rel=1e-4)


@pytest.mark.parametrize("name", CASES)
def test_accumulation_and_resuming(name, tmp_path):
    """Small batches that add up train as large ones. A resumed run is the uninterrupted one."""
    case = CASES[name]
    whole = case.make(
        tmp_path / "whole",
        pruning=Some(),
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        save_strategy="steps",
        save_steps=3,  # in the middle of the second epoch
    )
    whole.train()
    assert whole.state.global_step == 4
    assert whole.lr_scheduler.get_last_lr() == [0.0] * len(whole.optimizer.param_groups)
    if not case.by_tokens:  # trl divides by the tokens of each small batch
        large = case.make(tmp_path / "large", pruning=Some())
        large.train()
        for one, other in zip(whole.model.parameters(), large.model.parameters(), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
    part = case.make(
        tmp_path / "part",
        pruning=Some(),
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
    )
    part.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    assert_same_run(part, whole)


@pytest.mark.parametrize("name", CASES)
def test_scoring_passes_leave_the_logs_of_the_library_alone(name, tmp_path):
    case = CASES[name]
    settings = {"learning_rate": 0.0, "num_train_epochs": 1}
    run = case.make(tmp_path, pruning=UCB(1.0, scoring="all"), **settings)
    run.train()
    torch.testing.assert_close(run.pruner.table["mean"], case.alone(run), rtol=1e-4, atol=1e-6)
    assert run.pruning_report.totals["scoring_passes"] == N
    stock = case.make(tmp_path, stock=True, **settings)
    stock.train()
    speed = ("runtime", "second", "pruning")
    for ours, theirs in zip(run.state.log_history[:-1], stock.state.log_history[:-1], strict=True):
        own = {k: v for k, v in ours.items() if not any(word in k for word in speed)}
        assert own == pytest.approx(theirs, rel=1e-4)


def test_two_ranks_train_as_one(tmp_path, monkeypatch):
    monkeypatch.setenv("TINY_BERT", saved())
    done = torchrun(__file__, tmp_path, ranks=2)
    assert done.returncode == 0, done.stdout + done.stderr
    for name in RANKED:
        one = CASES[name].make(tmp_path, pruning=Some(), dataloader_drop_last=name in DROPPING)
        one.train()
        for rank in range(2):
            seen = torch.load(tmp_path / f"{name}{rank}.pt")
            assert seen["world"] == 2
            torch.testing.assert_close(
                seen["table"], one.pruner.table["loss"], rtol=1e-4, atol=1e-6, equal_nan=True
            )
            for weight, other in zip(seen["weights"], one.model.parameters(), strict=True):
                torch.testing.assert_close(weight, other.detach(), rtol=1e-4, atol=1e-6)
            assert seen["refused"] is not None
            assert "scoring='all'" in seen["refused"]


RANKED = ("dpo", "kto", "sentences", "cross-encoder")
# sentence-transformers sets dataloader_drop_last on several ranks.
DROPPING = ("sentences", "cross-encoder")

if __name__ == "__main__":
    folder, rank = Path(sys.argv[1]), int(os.environ["RANK"])
    for name in RANKED:
        # Of a cross-encoder on several ranks, sentence-transformers itself trains with False only.
        unused = {"ddp_find_unused_parameters": name != "cross-encoder"}
        settings = {"per_device_train_batch_size": 4, **unused}
        run = CASES[name].make(folder, pruning=Some(), **settings)
        run.train()
        refused = None
        try:
            CASES[name].make(folder, pruning=UCB(0.5, scoring="all"), **settings)
        except ValueError as error:
            refused = str(error)
        seen = {
            "world": run.args.world_size,
            "table": run.pruner.table["loss"],
            "weights": [weight.detach() for weight in run.model.parameters()],
            "refused": refused,
        }
        torch.save(seen, folder / f"{name}{rank}.pt")
    torch.distributed.barrier()
    os._exit(0)  # as ranks.py does
