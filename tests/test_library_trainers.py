"""The same promises for each trainer of another library. `library_trainers.py` has the table.

Under torchrun this file is the program of each rank.
"""

import gc
import os
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from library_trainers import ACCUMULATION, BITWISE, CASES, LAST, SCORING, saved
from programs import ROOT, torchrun
from tiny import every_checkpoint, learning_rates, same_weights

from hf_dynprune import UCB, EpochPlan, FullData, PruningPolicy
from hf_dynprune.table import Last

pytestmark = [
    # peft reads it, transformers renamed it.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),
]


@dataclass(frozen=True)
class Some(PruningPolicy):
    """A share of the rows with different weights, drawn again in each epoch."""

    share: float = 0.7

    memory = Last("loss")
    weighs = True

    def plan(self, choice):
        order = torch.randperm(choice.n, generator=choice.generator)
        indices = order[: round(self.share * choice.n)]
        return EpochPlan(indices, 0.25 + (indices * 7 % 5) / 2)


def for_ranks(case):
    """So that the last batch of the second rank has rows and copies, or copies alone."""
    return Some(0.6 if LAST in case.cannot else 0.7)


@pytest.mark.parametrize("name", CASES)
def test_each_score_is_the_loss_of_its_own_row(name, tmp_path):
    case = CASES[name]
    run = case.make(tmp_path, pruning=UCB(0.4, first=1), learning_rate=0.0, num_train_epochs=3)
    run.train()
    alone = case.alone(run)
    scores = run.pruner.table["mean"]
    torch.testing.assert_close(scores, alone, rtol=1e-4, atol=1e-6)
    n = len(run.train_dataset)
    assert len(set(scores.tolist())) == n  # each its own
    kept = [n, round(0.4 * n), round(0.4 * n)]
    assert [record.samples for record in run.pruning_report.epochs] == kept
    assert run.pruning_report.totals["forward_passes"] == sum(kept)


@pytest.mark.parametrize("name", CASES)
def test_full_data_is_the_stock_trainer(name, tmp_path):
    case = CASES[name]
    stock = case.make(tmp_path, stock=True)
    full = case.make(tmp_path, pruning=FullData())
    before = [weight.clone() for weight in full.model.parameters()]
    for run in (stock, full):
        run.train()
    assert learning_rates(full) == learning_rates(stock)
    if BITWISE in case.cannot:
        for one, other in zip(full.model.parameters(), stock.model.parameters(), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)
    else:
        assert same_weights(full.model, stock.model)
    changed = zip(full.model.parameters(), before, strict=True)
    assert any(not torch.equal(weight, old) for weight, old in changed)
    logs = [run.state.log_history[0] for run in (full, stock)]
    assert set(logs[1]) <= set(logs[0])
    assert logs[0]["loss"] == pytest.approx(logs[1]["loss"], rel=1e-4)


SMALL = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}


@pytest.mark.parametrize("name", CASES)
def test_accumulation_and_resuming(name, tmp_path):
    """Small batches that add up train as large ones. A resumed run is the uninterrupted one."""
    case = CASES[name]
    saving = {"save_strategy": "steps", "save_steps": 1}
    *_, small = every_checkpoint(
        lambda folder: case.make(folder, pruning=Some(), **SMALL, **saving), tmp_path
    )
    assert small.state.global_step == 4  # the ends of two epochs, and two within
    assert small.lr_scheduler.get_last_lr() == [0.0] * len(small.optimizer.param_groups)
    large = case.make(tmp_path / "large", pruning=Some())
    large.train()
    pairs = zip(small.model.parameters(), large.model.parameters(), strict=True)
    same = all(torch.allclose(one, other, rtol=1e-4, atol=1e-6) for one, other in pairs)
    assert same == (ACCUMULATION not in case.cannot)


@pytest.mark.parametrize("name", CASES)
def test_scoring_passes_leave_the_logs_of_the_library_alone(name, tmp_path):
    case = CASES[name]
    settings = {"learning_rate": 0.0, "num_train_epochs": 1}
    run = case.make(tmp_path, pruning=UCB(1.0, scoring="all"), **settings)
    run.train()
    torch.testing.assert_close(run.pruner.table["mean"], case.alone(run), rtol=1e-4, atol=1e-6)
    assert run.pruning_report.totals["scoring_passes"] == len(run.train_dataset)
    stock = case.make(tmp_path, stock=True, **settings)
    stock.train()
    speed = ("runtime", "second", "pruning")
    for ours, theirs in zip(run.state.log_history[:-1], stock.state.log_history[:-1], strict=True):
        own = {k: v for k, v in ours.items() if not any(word in k for word in speed)}
        assert own == pytest.approx(theirs, rel=1e-4)


@pytest.mark.parametrize("name", CASES)
def test_a_collator_that_reorders_is_refused_or_followed(name, tmp_path):
    case = CASES[name]
    run = case.make(tmp_path, pruning=UCB(1.0), learning_rate=0.0, num_train_epochs=1)
    plain = type(run.data_collator)
    run.data_collator.__class__ = type(
        plain.__name__, (plain,), {"__call__": lambda self, rows: plain.__call__(self, rows[::-1])}
    )
    if name in ("orpo", "cpo", "cross-encoder"):  # its batch says which samples it holds
        run.train()
        scores = run.pruner.table["mean"]
        torch.testing.assert_close(scores, case.alone(run), rtol=1e-4, atol=1e-6)
        return
    with pytest.raises((ValueError, RuntimeError), match="sample"):
        run.train()
    assert run.state.global_step == 0


def test_two_ranks_train_as_one(tmp_path, monkeypatch):
    monkeypatch.setenv("TINY_BERT", saved())
    leaves = ("embedding", "preference_experimental", "sft")
    imports = ("peft", *(f"hf_dynprune.{leaf}" for leaf in leaves))
    done = torchrun(__file__, tmp_path, ranks=2, imports=imports)
    assert done.returncode == 0, done.stdout + done.stderr
    for name, case in CASES.items():
        # Two ranks have the same small batches as one rank that accumulates.
        by_tokens = ACCUMULATION in case.cannot
        shape = SMALL if by_tokens else {"dataloader_drop_last": LAST in case.cannot}
        one = case.make(tmp_path, pruning=for_ranks(case), **shape)
        one.train()
        for rank in range(2):
            seen = torch.load(tmp_path / f"{name}{rank}.pt")
            assert seen["world"] == 2
            torch.testing.assert_close(
                seen["table"], one.pruner.table["loss"], rtol=1e-4, atol=1e-6, equal_nan=True
            )
            for weight, other in zip(seen["weights"], one.model.parameters(), strict=True):
                torch.testing.assert_close(weight, other.detach(), rtol=1e-4, atol=1e-6)
            assert ("scoring='all'" in seen["refused"]) == (SCORING in case.cannot)


def test_the_documentation_says_what_does_not_hold():
    shown = (ROOT / "docs" / "preference.md").read_text().splitlines()
    reasons = {fact for case in CASES.values() for fact in case.cannot.items()}
    for promise, why in reasons:
        cases = [case for case in CASES.values() if case.cannot.get(promise) == why]
        without = [case.label or case.stock.__name__ for case in cases]
        assert f"| {promise} | {', '.join(without)} | {why} |" in shown


if __name__ == "__main__":
    gc.freeze()  # as conftest.py does
    folder, rank = Path(sys.argv[1]), int(os.environ["RANK"])
    for name, case in CASES.items():
        # Of a cross-encoder on several ranks, sentence-transformers itself trains with False only.
        unused = {"ddp_find_unused_parameters": name != "cross-encoder"}
        settings = {"per_device_train_batch_size": 4, **unused}
        run = case.make(folder, pruning=for_ranks(case), **settings)
        run.train()
        refused = ""
        try:
            case.make(folder, pruning=UCB(0.5, scoring="all"), **settings)
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
