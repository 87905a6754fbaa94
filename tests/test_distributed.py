"""Two real processes that talk by gloo.

All scenarios run in one pair of processes. Each test reads what both ranks saw.
"""

import copy
import datetime
import os
import sys
import traceback
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from programs import torchrun
from ranks import SCENARIOS as WHOLE_RUNS
from test_tasks import Some, assert_same_gradient, train
from tiny import PATIENCE
from torch.utils.data import BatchSampler

from hf_dynprune import distributed
from hf_dynprune.files import STATE_FILE
from hf_dynprune.policies import UCB, EpochPlan, RandomPruning
from hf_dynprune.pruner import DynamicPruner
from hf_dynprune.schedule import RunShape

RANKS = 2
BIG = 2**24  # float32 does not know BIG + 1
IMPORTS = ("optuna", "pytest", "torch.distributed.fsdp")
N, BATCH = 21, 2
POLICY = UCB(keep_ratio=0.45, first=1)  # 21 samples: 5.25 global batches; then 9: 2.25

# ---- what each rank does -------------------------------------------------------------------------


def seen_world(rank, folder):
    return distributed.world(), dist.get_backend()


def plan(rank, folder):
    made = []

    def make():
        made.append(rank)
        return EpochPlan(torch.tensor([BIG + 3, BIG + 1, 5]))

    agreed = distributed.plan_on_rank_0(make)
    return agreed.indices, agreed.weights, agreed.lr_scale, made


def weighted_plan(rank, folder):
    weights = torch.tensor([0.1, 2.0, 1 / 3])
    agreed = distributed.plan_on_rank_0(lambda: EpochPlan(torch.tensor([2, 0, 1]), weights, 0.3))
    return agreed.indices, agreed.weights, agreed.lr_scale


def failing_plan(rank, folder):
    def fail():
        raise KeyError("no such column")

    try:
        distributed.plan_on_rank_0(fail)
        error = None
    except Exception as caught:
        error = (type(caught).__name__, str(caught))
    # The ranks are still in step.
    after = distributed.plan_on_rank_0(lambda: EpochPlan(torch.tensor([7])))
    return error, after.indices.tolist()


def gather_unequal(rank, folder):
    index = torch.tensor([[BIG + 1, BIG + 3, 2], [BIG + 2]][rank])
    loss = torch.tensor([[0.1, 0.2, 0.3], [1e-30]][rank])
    margin = torch.tensor([[1.0, 2.0, 3.0], [-1.0]][rank])
    return distributed.gather_observations(index, {"loss": loss, "margin": margin})


def gather_from_one_rank_alone(rank, folder):
    index = torch.tensor([[], [4, 4]][rank], dtype=torch.int64)
    return distributed.gather_observations(index, {"loss": torch.tensor([[], [1.0, 2.0]][rank])})


def gather_nothing(rank, folder):
    return distributed.gather_observations(
        torch.empty(0, dtype=torch.int64), {"loss": torch.empty(0)}
    )


def gather_without_signals(rank, folder):
    return distributed.gather_observations(torch.tensor([rank, 5]), {})


def sums(rank, folder):
    value = torch.tensor(BIG + rank)
    share = torch.tensor(0.5 + rank, requires_grad=True)
    total, shares = distributed.sum_over_ranks(value), distributed.sum_over_ranks(share)
    return total, value, shares.detach(), shares.requires_grad, share.detach()


def loss_of(i, epoch):
    value = (i * 13 + epoch * 29) % 11 / 4
    return float("nan") if (i, epoch) == (3, 0) else value


def my_batches(pruner):
    """The batches of this rank: accelerate gives each rank every n-th."""
    shape = pruner.shape
    batches = list(BatchSampler(pruner.sampler, shape.batch_size, shape.drop_last))
    return batches[pruner.rank :: shape.ranks]


def train_epoch(pruner, epoch, first_batch=0, last_batch=None):
    pruner.begin_epoch(epoch)
    seen = []
    for batch in my_batches(pruner)[first_batch:last_batch]:
        index = torch.tensor([i if i >= 0 else -1 for i in batch])
        seen.append((index.tolist(), pruner.weights(index).tolist()))
        losses = [loss_of(i, epoch) if i >= 0 else 1e9 for i in index.tolist()]
        pruner.observe(index, {"loss": torch.tensor(losses)})
    return seen


def pruner_of(ranks=RANKS, **settings):
    shape = RunShape(N, batch_size=BATCH * RANKS // ranks, num_epochs=3)
    return DynamicPruner(POLICY, shape, **settings)


def outcome(pruner):
    report = pruner.report.to_dict()
    for part in (report["totals"], *report["epochs"]):
        part.pop("seconds")
    report.pop("environment")
    report.pop("resumed")
    table = {name: c.nan_to_num(-1).tolist() for name, c in pruner.table.state_dict().items()}
    return table, report


def whole_run(rank, folder):
    pruner = pruner_of()
    epochs = [train_epoch(pruner, epoch) for epoch in range(3)]
    pruner.end_epoch()
    shape = pruner.shape
    return (pruner.rank, shape.ranks, shape.global_batch), epochs, outcome(pruner)


def interrupted_run(rank, folder):
    first = pruner_of()
    epochs = [train_epoch(first, 0), train_epoch(first, 1, last_batch=1)]
    first.save(folder / "state")
    written = sorted(path.name for path in (folder / "state").iterdir()) if rank == 0 else None
    dist.barrier()  # rank 0 has written
    second = pruner_of()
    place = second.load(folder / "state")
    epochs[1] += train_epoch(second, 1, first_batch=1)
    epochs.append(train_epoch(second, 2))
    second.end_epoch()
    return place, written, epochs, outcome(second)


def rank_0_decides(rank, folder):
    """The ranks' tables differ, as sums of floats do on unlike machines."""
    pruner = DynamicPruner(UCB(0.5), RunShape(10, num_epochs=1))
    pruner.table["mean"][:] = torch.arange(10.0) * (1 if rank == 0 else -1)
    pruner.table["variance"].zero_()
    pruner.table["last_observed"].zero_()
    pruner.begin_epoch(0)
    return sorted(i for i in pruner.sampler if i >= 0)


def policy_without_signals(rank, folder):
    pruner = DynamicPruner(RandomPruning(0.5), RunShape(10, batch_size=2, num_epochs=2))
    for epoch in range(2):
        pruner.begin_epoch(epoch)
        for batch in my_batches(pruner):
            pruner.observe(torch.tensor([i if i >= 0 else -1 for i in batch]))
    pruner.end_epoch()
    return pruner.table["last_observed"].tolist(), pruner.report.cost_ratio


def empty_epoch(rank, folder):
    pruner = pruner_of()
    pruner.begin_epoch(0)
    pruner.end_epoch()
    return pruner.table.observed.any().item()


def tail_dropped(rank, folder):
    shape = RunShape(11, batch_size=2, num_epochs=1, drop_last=True)
    pruner = DynamicPruner(RandomPruning(1.0), shape)
    pruner.begin_epoch(0)
    return my_batches(pruner), pruner.clock.length


SCENARIOS = [
    seen_world,
    plan,
    weighted_plan,
    failing_plan,
    gather_unequal,
    gather_from_one_rank_alone,
    gather_nothing,
    gather_without_signals,
    sums,
    whole_run,
    interrupted_run,
    rank_0_decides,
    policy_without_signals,
    empty_epoch,
    tail_dropped,
]


def work(folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=PATIENCE))
    rank, seen = dist.get_rank(), {}
    for scenario in SCENARIOS:
        try:
            seen[scenario.__name__] = scenario(rank, folder)
        except Exception:
            seen[scenario.__name__] = traceback.format_exc()
        torch.save(seen, folder / f"rank{rank}.pt")
        dist.barrier()
    sys.stdout.flush()
    # Skip the interpreter's teardown, in which gloo's threads now and then abort the process.
    os._exit(0)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """name -> (what rank 0 saw, what rank 1 saw)"""
    folder = tmp_path_factory.mktemp("ranks")
    done = torchrun(__file__, folder, ranks=RANKS, imports=IMPORTS)
    assert done.returncode == 0, done.stdout + done.stderr
    both = [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in range(RANKS)]

    def results(name):
        values = [seen[name] for seen in both]
        for rank, value in enumerate(values):
            if isinstance(value, str):
                pytest.fail(f"rank {rank}:\n{value}")
        return values

    results.folder = folder
    return results


# ---- what they must have seen --------------------------------------------------------------------


def test_there_are_two_ranks(ranks):
    assert ranks("seen_world") == [((0, 2), "gloo"), ((1, 2), "gloo")]


def test_plan_of_rank_0_reaches_all(ranks):
    for rank, (indices, weights, lr_scale, made) in enumerate(ranks("plan")):
        assert indices.tolist() == [BIG + 3, BIG + 1, 5]
        assert indices.dtype == torch.int64
        assert weights is None
        assert lr_scale == 1.0
        assert made == ([0] if rank == 0 else [])


def test_weights_of_rank_0_reach_all_exactly(ranks):
    for indices, weights, lr_scale in ranks("weighted_plan"):
        assert indices.tolist() == [2, 0, 1]
        assert torch.equal(weights, torch.tensor([0.1, 2.0, 1 / 3]))
        assert lr_scale == 0.3


def test_error_of_rank_0_is_raised_on_all(ranks):
    first, second = ranks("failing_plan")
    assert first == (("KeyError", "'no such column'"), [7])
    (kind, message), after = second
    assert (kind, after) == ("RuntimeError", [7])
    assert message.startswith("Rank 0")


def test_observations_of_unequal_length(ranks):
    for index, signals in ranks("gather_unequal"):
        assert index.tolist() == [BIG + 1, BIG + 3, 2, BIG + 2]
        assert torch.equal(signals["loss"], torch.tensor([0.1, 0.2, 0.3, 1e-30]))
        assert signals["margin"].tolist() == [1.0, 2.0, 3.0, -1.0]
        assert list(signals) == ["loss", "margin"]


def test_observations_of_one_rank_alone(ranks):
    for index, signals in ranks("gather_from_one_rank_alone"):
        assert index.tolist() == [4, 4]
        assert signals["loss"].tolist() == [1.0, 2.0]


def test_no_observations(ranks):
    for index, signals in ranks("gather_nothing"):
        assert index.tolist() == signals["loss"].tolist() == []
        assert index.dtype == torch.int64
    assert ranks("empty_epoch") == [False, False]


def test_observations_without_signals(ranks):
    for index, signals in ranks("gather_without_signals"):
        assert index.tolist() == [0, 5, 1, 5]
        assert signals == {}


def test_sum_over_ranks(ranks):
    for rank, (total, value, share, requires_grad, own) in enumerate(ranks("sums")):
        assert int(total) == 2 * BIG + 1
        assert int(value) == BIG + rank  # left as it was
        assert float(share) == 0.5 + 1.5
        assert not requires_grad
        assert float(own) == 0.5 + rank


def test_whole_run_on_two_ranks(ranks):
    results = ranks("whole_run")
    assert [place for place, _, _ in results] == [(0, 2, 4), (1, 2, 4)]
    (_, first, (table, report)), (_, second, other) = results
    assert other == (table, report)  # same table, same report
    kept = [21, 9, 9]
    for epoch in range(3):
        assert len(first[epoch]) == len(second[epoch]) == -(-kept[epoch] // 4)
        batches = [*first[epoch], *second[epoch]]
        assert all(len(index) == len(weights) == 2 for index, weights in batches)
        trained = sorted(i for index, _ in batches for i in index if i >= 0)
        assert len(trained) == len(set(trained)) == kept[epoch]
        assert sum(i < 0 for index, _ in batches for i in index) == -kept[epoch] % 4
        for index, weights in batches:
            assert [weight == 0.0 for weight in weights] == [i < 0 for i in index]
    assert [e["forward_passes"] for e in report["epochs"]] == [24, 12, 12]  # padding is counted
    assert [e["optimizer_steps"] for e in report["epochs"]] == [6, 3, 3]
    assert [e["nonfinite"] for e in report["epochs"]] == [1, 0, 0]
    assert report["nonfinite_samples"] == [3]


def test_scores_of_two_ranks_are_those_of_one(ranks):
    (_, epochs, (table, report)), (_, others, _) = ranks("whole_run")
    alone = pruner_of(ranks=1)
    for epoch in range(3):
        seen = train_epoch(alone, epoch)
        paired = []
        for pair in zip(epochs[epoch], others[epoch], strict=True):
            for index, _ in pair:
                paired += [i for i in index if i >= 0]
        # The global batches are the same.
        assert paired == [i for index, _ in seen for i in index]
    alone.end_epoch()
    own, own_report = outcome(alone)
    assert own == table
    assert own_report["selection"] == report["selection"]


def test_interrupted_run_ends_as_the_uninterrupted_one(ranks):
    expected = ranks("whole_run")
    for rank, (place, written, epochs, result) in enumerate(ranks("interrupted_run")):
        assert place == (1, 1)
        assert written == ([STATE_FILE] if rank == 0 else None)
        assert epochs == expected[rank][1]
        assert result == expected[rank][2]


def test_run_of_two_ranks_continues_on_one(ranks):
    (_, _, (table, _)), _ = ranks("whole_run")
    ranks("interrupted_run")
    alone = pruner_of(ranks=1)
    assert alone.load(ranks.folder / "state") == (1, 1)
    train_epoch(alone, 1, first_batch=1)
    train_epoch(alone, 2)
    alone.end_epoch()
    assert outcome(alone)[0] == table


def test_rank_0_decides(ranks):
    assert ranks("rank_0_decides") == [[5, 6, 7, 8, 9]] * 2


def test_policy_without_signals(ranks):
    first, second = ranks("policy_without_signals")
    assert first == second
    assert sorted(set(first[0])) in ([0, 1], [-1, 0, 1])
    assert first[1] == pytest.approx(8 / 10)  # 5 samples, 3 of padding


def test_tail_is_dropped_on_all_ranks_alike(ranks):
    (first, length), (second, other) = ranks("tail_dropped")
    assert length == other == len(first) == len(second) == 2
    trained = [i for batches in (first, second) for batch in batches for i in batch]
    assert len(set(trained)) == 8
    assert min(trained) >= 0


# ---- one rank ------------------------------------------------------------------------------------


def test_one_rank_gets_back_what_it_gave():
    assert distributed.world() == (0, 1)
    plan, index, value = EpochPlan(torch.tensor([1])), torch.tensor([3]), torch.tensor(2.0)
    signals = {"loss": torch.ones(1)}
    assert distributed.plan_on_rank_0(lambda: plan) is plan
    gathered = distributed.gather_observations(index, signals)
    assert gathered[0] is index
    assert gathered[1] is signals
    assert distributed.sum_over_ranks(value) is value


def test_states_of_one_rank_and_two_have_one_identity():
    state = copy.deepcopy(pruner_of(ranks=1).state_dict())
    assert state["metadata"]["identity"]["global batch"] == 4
    other = pruner_of(ranks=2).state_dict()  # batches of 2 on one rank
    with pytest.raises(ValueError, match=r"global batch: 2\b.*\b4\b"):
        pruner_of(ranks=1).load_state_dict(other)


# ---- whole runs: tests/ranks.py under torchrun ---------------------------------------------------


@pytest.fixture(scope="module")
def launched(tmp_path_factory):
    """A function (number of ranks, scenario) -> what each rank saw.

    Each number of ranks is launched once, a single rank in this process.
    """
    seen = {}

    def launch(ranks, folder):
        if ranks == 1:
            return [{one.__name__: one(folder / one.__name__) for one in WHOLE_RUNS[1]}]
        program = Path(__file__).parent / "ranks.py"
        done = torchrun(program, folder, ranks=ranks, imports=IMPORTS)
        assert done.returncode == 0, done.stdout + done.stderr
        return [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in range(ranks)]

    def results(ranks, scenario):
        if ranks not in seen:
            seen[ranks] = launch(ranks, tmp_path_factory.mktemp(f"launched{ranks}"))
        values = [of_rank[scenario] for of_rank in seen[ranks]]
        for rank, value in enumerate(values):
            if isinstance(value, str):
                pytest.fail(f"rank {rank}:\n{value}")
        return values

    return results


@pytest.mark.parametrize("scenario", ["plain", "accumulated", "dropped_scored"])
@pytest.mark.parametrize("count", [2, 3])
def test_several_ranks_train_what_one_rank_trains_with_the_larger_batch(
    count, scenario, launched, reliability
):
    """In the same optimizer steps, also if the last global batch is padded (45, 27 samples)."""
    (one,), several = launched(1, scenario), launched(count, scenario)
    assert one["world"] == ((0, 1), 1)
    assert one["samples"] == one["passes"] == [45, 27, 27, 27]
    for rank, other in enumerate(several):
        assert other["world"] == ((rank, count), count)
        assert other["steps"] == one["steps"]
        assert other["samples"] == one["samples"]
        scored = [0, 0, 18, 18] if scenario == "dropped_scored" else [0] * 4
        assert other["scored"] == one["scored"] == scored
        assert other["passes"] == [48, 36, 36, 36]  # padding is counted as cost
        assert other["learning rates"] == several[0]["learning rates"]
        for name in ("times_kept", "last_observed"):
            assert torch.equal(one["table"][name], other["table"][name])
        for name, column in several[0]["table"].items():
            assert torch.equal(column, other["table"][name])  # on all ranks bit for bit
        torch.testing.assert_close(
            one["table"]["mean"], other["table"]["mean"], rtol=1e-4, atol=1e-5
        )
        for name, weight in one["weights"].items():
            torch.testing.assert_close(weight, other["weights"][name], rtol=1e-4, atol=1e-5)
    assert several[0]["learning rates"] == one["learning rates"]
    # The logged loss is the mean over the ranks.
    assert several[0]["loss"] == pytest.approx(one["loss"], rel=1e-3)
    reliability("ranks", sum(one["steps"]))


def test_gradients_of_two_ranks_are_those_of_one(launched, tmp_path, reliability):
    for (name, weighted), (steps, last) in launched(2, "gradients")[0].items():
        run, expected = train(name, tmp_path, 8, 2, pruning=Some(weighted=weighted))
        assert len(steps) == len(expected) == 4
        for gradient, (_, wanted, _) in zip(steps, expected, strict=True):
            assert_same_gradient(gradient, wanted)
        torch.testing.assert_close(
            last, run.pruner.table["loss"], rtol=1e-4, atol=1e-5, equal_nan=True
        )
        reliability("accumulation", len(steps))


def test_two_ranks_resume_from_every_checkpoint_bit_for_bit(launched, reliability):
    first, second = launched(2, "resume_anywhere")
    assert first == second >= 45  # accumulation 1 and 3; no workers, workers, lasting ones
    reliability("resume ranks", first)


@pytest.mark.parametrize("count", [2, 3])
def test_all_ranks_resume_from_the_same_complete_checkpoint(count, launched, reliability):
    for rank, (error, steps_again) in enumerate(launched(count, "newest_checkpoint")):
        kind = "ValueError" if rank == 0 else "RuntimeError: Rank 0 failed: ValueError"
        assert error.startswith(kind)
        assert f"rng_state_{count - 1}.pth" in error
        assert steps_again == 1
        reliability("files")


def test_what_several_ranks_cannot_do_is_refused_on_all(launched):
    for errors in launched(2, "refused"):
        for option in ("dispatch_batches", "split_batches"):
            assert f"{option}=True" in errors[option]
        assert "rank 0 has '20 samples, " in errors["shard"]
        assert "'seed': rank 0 has 0, rank 1 has 1" in errors["seed"]


def test_full_data_is_the_stock_run_on_two_ranks(launched):
    for (stock, stock_rates), (ours, rates) in launched(2, "full_data"):
        assert rates == stock_rates
        for name, weight in stock.items():
            torch.testing.assert_close(weight, ours[name], rtol=1e-4, atol=1e-5)


def test_a_sharded_model_trains_the_same_in_a_plain_loop(launched, reliability):
    ((_, weights, scores),), several = launched(1, "sharded"), launched(2, "sharded")
    for kind, others, their_scores in several:
        assert kind.startswith("FSDP")
        for weight, other in zip(weights, others, strict=True):
            torch.testing.assert_close(weight, other, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(scores, their_scores, rtol=1e-4, atol=1e-5)
    reliability("ranks", 4 * 6)


if __name__ == "__main__":
    work(Path(sys.argv[1]))
