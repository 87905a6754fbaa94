"""DynamicPruner: epochs, choices, weights, counts and state; and the example in its docstring."""

import copy
import json
import re
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from cases import outcome
from choosing import INF, NAN
from threads import on_ranks

from hf_dynprune import distributed
from hf_dynprune import pruner as module
from hf_dynprune import report as report_module
from hf_dynprune.files import STATE_FILE, load_tensors
from hf_dynprune.policies import (
    UCB,
    EpochPlan,
    EpsilonGreedy,
    FullData,
    PruningPolicy,
    RandomPruning,
)
from hf_dynprune.pruner import DynamicPruner, choice_seed
from hf_dynprune.sampler import epoch_order
from hf_dynprune.schedule import RunShape, planned_epochs
from hf_dynprune.table import Column, Counts, Last, Memories, Memory, MovingMean


@dataclass(frozen=True)
class Given(PruningPolicy):
    """Trains the given plans; says nothing of their sizes beforehand unless `size` is given."""

    plans: tuple[EpochPlan, ...] = ()
    size: int | None = None

    weighs = True

    def planned_size(self, n, epoch, progress):
        return self.size

    def plan(self, choice):
        return self.plans[choice.epoch]

    def to_dict(self):
        return {"name": "Given"}


def plan_of(*indices, weights=None, lr_scale=1.0):
    return EpochPlan(
        torch.tensor(indices), None if weights is None else torch.tensor(weights), lr_scale
    )


def kept(pruner, epoch, losses=None, **begin):
    """Begin an epoch and observe `losses[i]` of each sample i that it trains on; return these."""
    pruner.begin_epoch(epoch, **begin)
    samples = list(pruner.sampler)
    for batch in torch.tensor(samples).split(pruner.shape.batch_size):
        signals = {}
        if losses is not None:
            signals["loss"] = torch.tensor([float(losses[i]) for i in batch.tolist()])
        pruner.observe(batch, signals)
    return sorted(samples)


# ---- the example in the docstring ----------------------------------------------------------------


def test_loop_in_the_docstring_runs_as_written():
    (code,) = re.findall(r"```python\n(.*?)```", module.__doc__, re.DOTALL)
    torch.manual_seed(0)
    x = torch.randn(400, 5)
    dataset = [{"x": a, "y": b} for a, b in zip(x, (x[:, 0] > 0).long(), strict=True)]
    model = torch.nn.Linear(5, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    before = F.cross_entropy(model(x), (x[:, 0] > 0).long()).item()
    names = {"DynamicPruner": DynamicPruner, "RunShape": RunShape, "UCB": UCB, "F": F}
    scope = {**names, "dataset": dataset, "model": model, "optimizer": optimizer}
    exec(code, scope)
    pruner = scope["pruner"]
    assert F.cross_entropy(model(x), (x[:, 0] > 0).long()).item() < before
    assert pruner.report.cost_ratio == pytest.approx(0.3)
    assert [record.samples for record in pruner.report.epochs] == [120] * 20
    assert [record.optimizer_steps for record in pruner.report.epochs] == [1] * 20
    assert pruner.table.observed.all()
    assert pruner.report.selection["choices"] == 20


# ---- the schedule --------------------------------------------------------------------------------


def test_epochs_are_as_planned():
    pruner = DynamicPruner(UCB(0.3, first=1, period=2, last=0.25), RunShape(100, num_epochs=8))
    planned = list(planned_epochs(pruner.policy, pruner.shape))
    kept_before, choices = None, []
    for epoch, (size, full_data, _) in enumerate(planned):
        now = kept(pruner, epoch, torch.rand(100))
        assert len(now) == size
        assert pruner.report.epochs[-1].full_data == full_data
        choices.append(not full_data and now != kept_before)
        kept_before = kept_before if full_data else now
    assert choices == [epoch.chooses for epoch in planned]


def test_steps_of_a_run_of_unknown_sizes_become_known():
    policy = Given((plan_of(*range(20)), plan_of(*range(50)), plan_of(*range(90))))
    pruner = DynamicPruner(policy, RunShape(100, batch_size=10, num_epochs=3))
    assert pruner.clock.total == pruner.clock.total_steps() == 30
    totals = []
    for epoch, step in enumerate((0, 2, 7)):
        pruner.begin_epoch(epoch, step=step)
        totals.append(pruner.clock.total_steps())
    assert totals == [2 + 10 + 10, 2 + 5 + 10, 2 + 5 + 9]


def test_steps_are_counted_by_the_calls_of_observe():
    shape = RunShape(100, batch_size=4, accumulation=3, num_epochs=2)
    pruner = DynamicPruner(RandomPruning(0.3), shape)
    kept(pruner, 0)  # 8 batches, 3 steps
    assert pruner.batches_done == 8
    pruner.begin_epoch(1)
    assert pruner.clock.start == 3
    assert pruner.batches_done == 0


# ---- full-data epochs ----------------------------------------------------------------------------


def test_last_is_a_share_of_the_steps_if_steps_are_the_budget():
    pruner = DynamicPruner(RandomPruning(0.3, last=0.5), RunShape(100, batch_size=10, max_steps=30))
    for epoch in range(pruner.num_epochs):
        kept(pruner, epoch)
    assert [r.samples for r in pruner.report.epochs] == [30] * 5 + [100] * 2


def test_full_data_epoch_trains_all_in_the_stock_order_and_is_no_choice():
    policy = RandomPruning(0.5, first=1, last=0.25)
    pruner = DynamicPruner(policy, RunShape(10, num_epochs=4), seed=3)
    for epoch in range(4):
        pruner.begin_epoch(epoch)
        if epoch in (0, 3):
            assert list(pruner.sampler) == epoch_order(10, None, 3, epoch).tolist()
    assert int(pruner.table["times_kept"].sum()) == 2 * 5
    pruner.end_epoch()
    assert pruner.report.selection["choices"] == 2


# ---- choices -------------------------------------------------------------------------------------


def test_period_holds_the_plan():
    pruner = DynamicPruner(RandomPruning(0.5, period=3, first=1), RunShape(40, num_epochs=8))
    epochs, orders = [], []
    for epoch in range(8):
        epochs.append(kept(pruner, epoch))
        orders.append(list(pruner.sampler))
    pruner.end_epoch()
    assert epochs[0] == list(range(40))
    assert epochs[1] == epochs[2] == epochs[3] != epochs[4]
    assert epochs[4] == epochs[5] == epochs[6] != epochs[7]
    assert orders[1] != orders[2]  # shuffled in each epoch
    assert pruner.report.selection["choices"] == 3
    counts = [sum(i in epochs[e] for e in (1, 4, 7)) for i in range(40)]
    assert pruner.table["times_kept"].tolist() == counts


def test_order_follows_the_data_seed_and_the_choice_the_seed():
    def run(**seeds):
        pruner = DynamicPruner(RandomPruning(0.5), RunShape(30, num_epochs=2), **seeds)
        pruner.begin_epoch(0)
        pruner.begin_epoch(1)
        return list(pruner.sampler)

    base, other_order, other_choice = (
        run(seed=1),
        run(seed=1, data_seed=2),
        run(seed=2, data_seed=1),
    )
    assert base == run(seed=1, data_seed=1) == epoch_order(30, torch.tensor(base), 1, 1).tolist()
    assert sorted(other_order) == sorted(base)
    assert other_order != base
    assert sorted(other_choice) != sorted(base)
    assert run(seed=0, data_seed=0) == run(seed=0)
    assert run(seed=5, data_seed=0) != run(seed=5)  # 0 is a seed


def test_choice_seeds_differ():
    seeds = {choice_seed(seed, epoch) for seed in range(120) for epoch in range(120)}
    assert len(seeds) == 120 * 120
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert choice_seed(0, 1) == choice_seed(0, 1)
    assert choice_seed(1, 11) != choice_seed(11, 1)


@pytest.mark.parametrize("keep_ratio", [0.01, 0.3, 0.5, 0.77, 1.0])
@pytest.mark.parametrize(
    "policy",
    [
        RandomPruning,
        lambda k: RandomPruning(k, replacement=False),
        EpsilonGreedy,
        UCB,
        lambda k: UCB(k, epsilon=0.3),
    ],
)
def test_budget_is_kept_at_every_choice(policy, keep_ratio):
    n = 57
    pruner = DynamicPruner(policy(keep_ratio), RunShape(n, batch_size=8, num_epochs=6))
    for epoch in range(6):
        samples = kept(pruner, epoch, losses=range(n))
        assert len(samples) == len(set(samples)) == max(1, round(keep_ratio * n))
        assert pruner.report.epochs[-1].samples == len(samples)
    pruner.end_epoch()
    assert pruner.report.cost_ratio == pytest.approx(max(1, round(keep_ratio * n)) / n)


def test_plan_of_another_size_than_planned_is_an_error():
    pruner = DynamicPruner(Given((plan_of(0, 1, 2),), size=4), RunShape(10, num_epochs=1))
    with pytest.raises(RuntimeError, match=r"Given planned 4 .*epoch 0 .* 3"):
        pruner.begin_epoch(0)


@pytest.mark.parametrize(("plan", "wrong"), [(plan_of(1, 1), "2 .* 1 "), (plan_of(3, 10), "10")])
def test_plan_is_checked(plan, wrong):
    with pytest.raises(ValueError, match=wrong):
        DynamicPruner(Given((plan,)), RunShape(10, num_epochs=1)).begin_epoch(0)


def test_weights_that_the_policy_does_not_declare_are_refused():
    class Silent(Given):
        weighs = False

    weighted = plan_of(1, 2, weights=[1.0, 2.0])
    with pytest.raises(RuntimeError, match="Silent"):
        DynamicPruner(Silent((weighted,)), RunShape(10, num_epochs=1)).begin_epoch(0)
    DynamicPruner(Silent((plan_of(1, 2),)), RunShape(10, num_epochs=1)).begin_epoch(0)


def test_what_a_policy_is_given_to_choose_by():
    seen = []

    @dataclass(frozen=True)
    class Looking(FullData):
        memory = MovingMean("loss", 0.5)

        def plan(self, choice):
            seen.append(choice)
            return super().plan(choice)

    pruner = DynamicPruner(Looking(first=1), RunShape(10, 4, num_epochs=4))
    kept(pruner, 0, losses=range(10))
    kept(pruner, 1, losses=range(10))
    (choice,) = seen
    assert (choice.epoch, choice.progress, choice.n, choice.size) == (1, 0.25, 10, 10)
    assert choice.table is pruner.table
    assert choice.shape == pruner.shape
    assert choice.scores is None
    first = choice.generator.initial_seed()
    assert first == choice_seed(0, 1)


def test_progress_of_a_budget_in_steps_is_that_of_the_steps():
    seen = []

    @dataclass(frozen=True)
    class Looking(FullData):
        def plan(self, choice):
            seen.append(choice.progress)
            return super().plan(choice)

    pruner = DynamicPruner(Looking(), RunShape(10, 5, max_steps=8))
    for epoch in range(4):
        kept(pruner, epoch)
    assert seen == [0, 0.25, 0.5, 0.75]


def test_plan_below_a_batch_is_refused_with_drop_last():
    shape = RunShape(10, batch_size=4, num_epochs=3, drop_last=True)
    with pytest.raises(ValueError, match=r"\b3 of 10.*\b4\b"):
        DynamicPruner(RandomPruning(0.3), shape)
    pruner = DynamicPruner(Given((plan_of(1, 2),)), shape)  # its size is not known beforehand
    with pytest.raises(ValueError, match=r"Epoch 0 .*\b2 of 10.*\b4\b"):
        pruner.begin_epoch(0)


def after_full_epoch(policy, losses, n=10, epochs=6):
    """A pruner after one epoch on all data (`first=1`), with the samples in `losses` observed."""
    pruner = DynamicPruner(policy, RunShape(n, batch_size=n, num_epochs=epochs))
    pruner.begin_epoch(0)
    index = torch.tensor([i if i in losses else -1 for i in range(n)])  # -1 is not observed
    values = torch.tensor([float(losses.get(i, 0)) for i in range(n)])
    pruner.observe(index, {"loss": values})
    return pruner


def test_max_weight_limits_the_weights():
    plan = plan_of(2, 0, 1, weights=[0.5, 5.0, 3.0])
    pruner = DynamicPruner(Given((plan,), max_weight=3.0), RunShape(4, num_epochs=1))
    pruner.begin_epoch(0)
    assert pruner.weights(torch.tensor([2, 0, 1])).tolist() == [0.5, 3.0, 3.0]
    assert plan.weights.tolist() == [0.5, 5.0, 3.0]


# ---- weights and learning rate -------------------------------------------------------------------


def test_weights_of_the_plan():
    plans = plan_of(3, 1, weights=[2.5, 0.5]), plan_of(0, 1)
    pruner = DynamicPruner(Given(plans), RunShape(4, num_epochs=2))
    pruner.begin_epoch(0)
    weights = pruner.weights(torch.tensor([1, 3, 3, -1]))
    assert weights.tolist() == [0.5, 2.5, 2.5, 0.0]
    assert weights.dtype == torch.float32
    pruner.begin_epoch(1)
    assert pruner.weights(torch.tensor([1, 0, -1])).tolist() == [1.0, 1.0, 0.0]


def test_weights_are_1_on_full_data():
    policy = Given(
        (plan_of(0), plan_of(3, 1, weights=[2.5, 0.5], lr_scale=0.5), plan_of(0)),
        first=1,
        last=1 / 3,
    )
    pruner = DynamicPruner(policy, RunShape(4, num_epochs=3))
    for epoch, (weights, lr_scale) in enumerate(
        [([1.0, 1.0], 1.0), ([0.5, 2.5], 0.5), ([1.0, 1.0], 1.0)]
    ):
        pruner.begin_epoch(epoch)
        assert pruner.weights(torch.tensor([1, 3])).tolist() == weights
        assert pruner.lr_scale == lr_scale


@pytest.mark.parametrize(
    ("weights", "ranks", "fills_one", "expected"),
    [
        (None, 1, False, True),
        ([2.0, 1.0, 1.0], 1, False, False),
        (None, 2, False, False),  # a copy fills the last batch
        (None, 1, True, False),  # so it does for a BatchNorm
    ],
)
def test_unweighted_only_if_every_weight_is_1(weights, ranks, fills_one, expected):
    def found():
        shape = RunShape(4, batch_size=2 // ranks, num_epochs=1, ranks=ranks)
        pruner = DynamicPruner(Given((plan_of(3, 1, 0, weights=weights),)), shape)
        pruner.sampler.fills_one = fills_one
        pruner.begin_epoch(0)
        index = torch.tensor(list(pruner.sampler)).clamp(min=-1)
        return pruner.unweighted, bool((pruner.weights(index) == 1).all())

    assert on_ranks(ranks, found) == [(expected, expected)] * ranks


# ---- what is counted -----------------------------------------------------------------------------


def test_passes_steps_and_cost():
    shape = RunShape(20, batch_size=4, num_epochs=2, accumulation=2)
    pruner = DynamicPruner(RandomPruning(0.5), shape)
    for epoch in range(2):
        kept(pruner, epoch)
    pruner.end_epoch(learning_rate=0.25)
    first, second = pruner.report.epochs
    assert (first.samples, first.optimizer_steps) == (10, 2)
    assert first.forward_passes == first.backward_passes == 10
    assert (first.learning_rate, second.learning_rate) == (None, 0.25)
    assert first.scoring_passes == first.nonfinite == 0
    assert pruner.report.num_epochs == 2.0
    assert pruner.report.cost_ratio == pytest.approx(0.5)


def test_cost_of_a_part_of_an_epoch():
    pruner = DynamicPruner(RandomPruning(0.5), RunShape(20, batch_size=2, num_epochs=2))
    kept(pruner, 0)
    pruner.begin_epoch(1)
    for batch in list(torch.tensor(list(pruner.sampler)).split(2))[:2]:  # 2 of 5 steps
        pruner.observe(batch)
    pruner.update_record()
    assert pruner.report.num_epochs == pytest.approx(1.4)
    assert pruner.report.passes == 14
    assert pruner.report.cost_ratio == pytest.approx(14 / (20 * 1.4))


def test_nonfinite_losses_are_counted_and_listed():
    pruner = DynamicPruner(UCB(1.0), RunShape(6, batch_size=2, num_epochs=2))
    kept(pruner, 0, losses=[1, NAN, 1, INF, 1, -INF])
    kept(pruner, 1, losses=[1, NAN, 1, 1, NAN, 1])
    pruner.end_epoch()
    assert [r.nonfinite for r in pruner.report.epochs] == [3, 2]
    assert pruner.report.nonfinite_samples == [1, 3, 4, 5]
    assert pruner.report.totals["nonfinite"] == 5
    assert pruner.table.observed.all()
    assert pruner.table["mean"].isnan().tolist() == [False, True, False, False, False, False]


def test_at_most_100_nonfinite_samples_are_listed():
    pruner = DynamicPruner(UCB(1.0), RunShape(300, batch_size=50, num_epochs=2))
    for epoch in range(2):
        kept(pruner, epoch, losses=[NAN] * 300)
    pruner.end_epoch()
    assert pruner.report.nonfinite_samples == list(range(100))
    assert pruner.report.totals["nonfinite"] == 600


def test_scores_are_described():
    pruner = after_full_epoch(
        UCB(0.5, first=1), {i: float(i + 1) for i in range(5)}, n=6
    )  # 1, 2, 3, 4, 5
    scores = pruner.begin_epoch(1).scores
    assert list(scores) == ["mean", "q05", "q25", "q50", "q75", "q95"]
    assert list(scores.values()) == pytest.approx([3.0, 1.2, 2.0, 3.0, 4.0, 4.8])
    assert pruner.report.epochs[0].scores == {}


def test_many_scores_are_described_by_some(monkeypatch):
    n = 1000

    def described():
        losses = {i: float(i) for i in range(n)}
        return after_full_epoch(UCB(0.5, first=1), losses, n=n).begin_epoch(1).scores

    whole = described()
    monkeypatch.setattr(module, "_DESCRIBED", 100)
    some = described()
    assert list(some.values()) == pytest.approx(
        [4.5 * 110, 0.05 * 990, 0.25 * 990, 0.5 * 990, 0.75 * 990, 0.95 * 990]
    )
    assert list(some.values()) == pytest.approx(list(whole.values()), abs=0.01 * n)


@pytest.mark.parametrize("policy", [UCB(0.5), RandomPruning(0.5)])
def test_no_scores_to_describe(policy):
    assert DynamicPruner(policy, RunShape(6, num_epochs=1)).begin_epoch(0).scores == {}


def test_seconds_by_phase(monkeypatch):
    now = 0.0
    monkeypatch.setattr(report_module.time, "perf_counter", lambda: now)

    @dataclass(frozen=True)
    class Slow(FullData):
        def plan(self, choice):
            nonlocal now
            now += 2  # to choose takes 2 s
            return super().plan(choice)

    pruner = DynamicPruner(Slow(), RunShape(20, batch_size=10, num_epochs=1))
    now = 5.0  # before the run
    pruner.begin_epoch(0)
    for batch in torch.tensor(list(pruner.sampler)).split(10):
        now += 30  # to train a batch takes 30 s
        pruner.observe(batch)
    pruner.add_evaluation({"eval_runtime": 7.0})
    now += 7
    pruner.end_epoch()
    now += 100  # after the epoch
    pruner.end_epoch()
    seconds = pruner.report.epochs[0].seconds
    assert seconds == {"training": 60.0, "choosing": 2.0, "scoring": 0.0, "evaluation": 7.0}


def test_seconds_of_scoring(monkeypatch):
    now = 0.0
    monkeypatch.setattr(report_module.time, "perf_counter", lambda: now)

    def scorer(index):
        nonlocal now
        now += 4
        return {"loss": torch.ones(len(index))}

    pruner = DynamicPruner(UCB(0.5, scoring="all"), RunShape(20, batch_size=10, num_epochs=1))
    pruner.begin_epoch(0, scorer=scorer)
    pruner.end_epoch()
    seconds = pruner.report.epochs[0].seconds
    assert seconds == {"training": 0.0, "choosing": 0.0, "scoring": 4.0, "evaluation": 0.0}


def test_evaluation_is_noted():
    pruner = DynamicPruner(RandomPruning(0.5), RunShape(10, num_epochs=2))
    pruner.add_evaluation({"eval_loss": 9.0})  # before the first epoch: no model was trained
    kept(pruner, 0)
    pruner.add_evaluation(
        {"eval_loss": 2.0, "eval_accuracy": 0.5, "eval_runtime": 0.25, "epoch": 1.0, "name": "x"}
    )
    pruner.add_evaluation({"eval_loss": 1.5})
    kept(pruner, 1)
    pruner.end_epoch()
    pruner.add_evaluation({"eval_loss": 1.0})
    pruner.add_evaluation({"eval_loss": 0.5, "test_loss": 3})  # of the best model, after the run
    first, second = pruner.report.epochs
    assert first.metrics == {"eval_loss": 1.5, "eval_accuracy": 0.5, "eval_runtime": 0.25}
    assert second.metrics == {"eval_loss": 1.0, "test_loss": 3.0}
    assert first.seconds["evaluation"] == 0.25
    assert pruner.report.metrics == second.metrics


def test_evaluations_of_the_best_model_are_not_the_last_epochs():
    pruner = DynamicPruner(RandomPruning(0.5), RunShape(10, num_epochs=1))
    kept(pruner, 0)
    pruner.add_evaluation({"eval_loss": 1.0})
    pruner.end_epoch()
    pruner.add_evaluation({"eval_loss": 0.5, "eval_runtime": 2.0}, best_step=3)
    pruner.add_evaluation({"test_loss": 0.6}, best_step=3)
    assert pruner.report.metrics == {"eval_loss": 1.0}
    best = {"eval_loss": 0.5, "eval_runtime": 2.0, "test_loss": 0.6}
    assert pruner.report.best_model == {"step": 3, "metrics": best}
    assert pruner.report.epochs[0].seconds["evaluation"] == 2.0


def test_scores_at_the_end_of_float32_are_described():
    pruner = DynamicPruner(UCB(1.0), RunShape(4, batch_size=4, num_epochs=2))
    pruner.begin_epoch(0)
    pruner.observe(torch.arange(4), {"loss": torch.tensor([3e38, -3e38, 3e38, -3e38])})
    pruner.begin_epoch(1)
    scores = pruner.report.epochs[1].scores
    assert scores["mean"] == 0
    assert scores["q05"] < scores["q50"] == 0 < scores["q95"] < INF


# ---- observe -------------------------------------------------------------------------------------


def test_padding_is_counted_as_passes_and_not_observed():
    pruner = DynamicPruner(UCB(1.0), RunShape(4, batch_size=4, num_epochs=1))
    pruner.begin_epoch(0)
    pruner.observe(torch.tensor([2, 0, -1, -1]), {"loss": torch.tensor([5.0, 6.0, 7.0, NAN])})
    pruner.end_epoch()
    assert pruner.table["mean"].nan_to_num(-1).tolist() == [6.0, -1.0, 5.0, -1.0]
    assert pruner.table.observed.tolist() == [True, False, True, False]
    assert pruner.report.epochs[0].forward_passes == 4
    assert pruner.report.epochs[0].nonfinite == 0


def test_signals_are_detached_and_half_precision_is_fine():
    pruner = DynamicPruner(UCB(1.0), RunShape(4, batch_size=2, num_epochs=1))
    pruner.begin_epoch(0)
    losses = torch.tensor([1.0, 2.0], dtype=torch.bfloat16, requires_grad=True)
    pruner.observe(torch.tensor([0, 1]), {"loss": losses * 2, "not wanted": torch.zeros(9)})
    pruner.observe(torch.tensor([2, 3]), {"loss": torch.tensor([1.0, 2.0], dtype=torch.float64)})
    pruner.end_epoch()
    assert pruner.table["mean"].tolist() == [2.0, 4.0, 1.0, 2.0]
    assert not pruner.table["mean"].requires_grad


def test_many_observations_of_one_epoch():
    n = 1 << 17  # twice what is buffered on the device
    pruner = DynamicPruner(UCB(1.0), RunShape(n, batch_size=1 << 14, num_epochs=1))
    pruner.begin_epoch(0)
    for batch in torch.arange(n).split(1 << 14):
        pruner.observe(batch, {"loss": batch.float()})
    pruner.end_epoch()
    assert torch.equal(pruner.table["mean"], torch.arange(n).float())


def test_signals_must_be_there_and_fit():
    pruner = DynamicPruner(UCB(0.5, signal="el2n"), RunShape(10, 2, num_epochs=1))
    pruner.begin_epoch(0)
    with pytest.raises(ValueError, match=r"ucb.*'el2n'.*\['loss'\]"):
        pruner.observe(torch.tensor([0, 1]), {"loss": torch.ones(2)})
    with pytest.raises(ValueError, match=r"ucb.*'el2n'.*\[\]"):
        pruner.observe(torch.tensor([0, 1]))
    for value in (torch.ones(()), torch.ones(3), torch.ones(2, 1)):
        shape = re.escape(str(tuple(value.shape)))
        with pytest.raises(ValueError, match=rf"'el2n'.*{shape}.*\(2,\)"):
            pruner.observe(torch.tensor([0, 1]), {"el2n": value})
    assert pruner.batches_done == 0
    assert pruner.report.epochs[0].forward_passes == 0


# ---- memories besides the policy's ---------------------------------------------------------------


def test_more_can_be_remembered_than_the_policy_asks_for():
    counts = Counts()
    pruner = DynamicPruner(FullData(), RunShape(4, batch_size=4, num_epochs=3), memory=counts)
    assert pruner.signals == pruner.scored_signals == ("correct",)
    for epoch, right in enumerate(
        [[1.0, 0.0, 1.0, 1.0], [0.0, 0.0, 1.0, 0.0], [1.0, 0.0, 0.0, 0.0]]
    ):
        pruner.begin_epoch(epoch)
        pruner.observe(torch.arange(4), {"correct": torch.tensor(right)})
    pruner.end_epoch()
    assert Counts.forgetting_events(pruner.table).tolist() == [1.0, 3.0, 1.0, 1.0]


def test_two_memories_share_what_is_observed():
    more = Last("loss", "label")
    pruner = DynamicPruner(UCB(0.5), RunShape(4, batch_size=4, num_epochs=1), memory=more)
    assert pruner.signals == ("loss", "label")
    assert {"mean", "variance", "loss", "label"} < set(pruner.table.columns)
    pruner.begin_epoch(0)
    signals = {"loss": torch.tensor([1.0, 2.0]), "label": torch.tensor([0.0, 3.0])}
    pruner.observe(torch.tensor([2, 0]), signals)
    pruner.end_epoch()
    for name in ("mean", "loss"):
        assert pruner.table[name].nan_to_num(-1).tolist() == [2.0, -1.0, 1.0, -1.0]
    assert pruner.table["label"].nan_to_num(-1).tolist() == [3.0, -1.0, 0.0, -1.0]


def test_more_that_is_remembered_changes_no_choice():
    def run(memory):
        pruner = DynamicPruner(UCB(0.5), RunShape(20, num_epochs=4), seed=3, memory=memory)
        return [kept(pruner, epoch, losses=range(20)) for epoch in range(4)]

    assert run(None) == run(Last("loss")) == run(Memories())


def test_a_column_that_the_policy_has_already_is_refused():
    with pytest.raises(ValueError, match="'mean'"):
        DynamicPruner(UCB(), RunShape(4, num_epochs=1), memory=MovingMean("loss", 0.5))


def test_the_label_is_remembered_once():
    policy, shape = UCB(0.5, min_per_class=1), RunShape(4, num_epochs=1)
    assert DynamicPruner(policy, shape).signals == ("loss", "label")
    assert DynamicPruner(policy, shape, memory=Last("label")).signals == ("loss", "label")


def test_more_is_remembered_by_scoring_passes_too():
    policy, shape = UCB(0.5, scoring="all"), RunShape(4, batch_size=4, num_epochs=1)
    pruner = DynamicPruner(policy, shape, memory=Last("margin"))
    assert pruner.signals == ()
    assert pruner.scored_signals == ("loss", "margin")
    scores = {"loss": torch.arange(4.0), "margin": torch.arange(4.0) + 10}
    pruner.begin_epoch(0, scorer=lambda index: scores)
    assert pruner.table["margin"].tolist() == [10.0, 11.0, 12.0, 13.0]


# ---- scoring passes ------------------------------------------------------------------------------


def scored_run(scoring, epochs=4, **settings):
    """What a scorer was asked for before each epoch.

    The loss of a sample i is 10 * epoch + i when it is scored, i when it is trained.
    """
    policy = UCB(keep_ratio=0.5, decay=1.0, scoring=scoring, **settings)
    pruner, asked = DynamicPruner(policy, RunShape(6, batch_size=2, num_epochs=epochs)), []
    for epoch in range(epochs):
        seen = []

        def scorer(index, epoch=epoch, seen=seen):
            seen += index.tolist()
            return {"loss": 10.0 * epoch + index}

        pruner.begin_epoch(epoch, scorer=scorer)
        trained = sorted(pruner.sampler)
        asked.append((seen, trained, pruner.table["mean"].nan_to_num(-1).tolist()))
        for batch in torch.tensor(list(pruner.sampler)).split(2):
            pruner.observe(batch, {} if scoring == "all" else {"loss": batch.float()})
    pruner.end_epoch()
    return pruner, asked


def test_all_are_scored_before_each_choice_and_training_is_not_observed():
    pruner, asked = scored_run("all", period=2, first=1)
    assert [seen for seen, _, _ in asked] == [[], [0, 1, 2, 3, 4, 5], [], [0, 1, 2, 3, 4, 5]]
    assert asked[1][2] == [10.0, 11.0, 12.0, 13.0, 14.0, 15.0]
    assert asked[1][1] == asked[2][1] == asked[3][1] == [3, 4, 5]
    assert pruner.table["mean"].tolist() == [30.0, 31.0, 32.0, 33.0, 34.0, 35.0]
    assert pruner.table["last_observed"].tolist() == [3] * 6
    report = pruner.report
    assert [r.scoring_passes for r in report.epochs] == [0, 6, 0, 6]
    assert [r.forward_passes for r in report.epochs] == [6, 3, 3, 3]
    assert report.passes == pytest.approx(6 + 3 * 3 + 12 / 3)


def test_the_dropped_are_scored_before_each_choice_and_the_kept_observed_in_training():
    pruner, asked = scored_run("dropped")
    assert asked[0][0] == []  # nothing was trained yet: the first choice is of never observed ones
    for epoch in (1, 2, 3):
        kept_before = asked[epoch - 1][1]
        assert asked[epoch][0] == [i for i in range(6) if i not in kept_before]
        expected = [float(i) if i in kept_before else 10.0 * epoch + i for i in range(6)]
        assert asked[epoch][2] == expected
    assert [r.scoring_passes for r in pruner.report.epochs] == [0, 3, 3, 3]


def test_the_dropped_of_a_period_are_those_that_it_did_not_train():
    _, asked = scored_run("dropped", epochs=5, period=2, first=1)
    assert asked[1][0] == []  # all were trained in the full-data epoch
    assert asked[2][0] == []  # no choice
    assert asked[3][0] == [i for i in range(6) if i not in asked[1][1]]


def test_a_scorer_is_asked_for_by_name():
    pruner = DynamicPruner(UCB(0.5, scoring="all"), RunShape(6, num_epochs=2))
    with pytest.raises(ValueError, match=r"ucb.*scoring='all'.*scorer="):
        pruner.begin_epoch(0)


def test_a_scorer_must_give_one_value_a_sample():
    pruner = DynamicPruner(UCB(0.5, scoring="all"), RunShape(6, num_epochs=2))
    with pytest.raises(ValueError, match=r"'loss'.*\(1,\).*\(6,\)"):
        pruner.begin_epoch(0, scorer=lambda index: {"loss": torch.ones(1)})


def test_observe_before_the_first_epoch_says_what_is_missing():
    pruner = DynamicPruner(RandomPruning(0.5), RunShape(10, num_epochs=1))
    with pytest.raises(RuntimeError, match="begin_epoch"):
        pruner.observe(torch.tensor([0, 1]))


def test_epoch_is_ended_once():
    pruner = DynamicPruner(UCB(1.0), RunShape(4, batch_size=4, num_epochs=2))
    kept(pruner, 0, losses=[1, 2, 3, 4])
    assert not pruner.table.observed.any()  # until the epoch ends
    pruner.end_epoch(learning_rate=0.5)
    pruner.end_epoch()
    pruner.begin_epoch(1)
    assert pruner.table["mean"].tolist() == [1, 2, 3, 4]
    assert pruner.report.epochs[0].optimizer_steps == 1
    assert pruner.report.epochs[0].learning_rate == 0.5


def test_begin_epoch_makes_up_for_a_missing_end():
    pruner = DynamicPruner(UCB(1.0), RunShape(4, batch_size=4, num_epochs=2))
    kept(pruner, 0, losses=[1, 2, 3, 4])
    pruner.begin_epoch(1)
    assert pruner.table["mean"].tolist() == [1, 2, 3, 4]
    assert pruner.table["last_observed"].tolist() == [0] * 4
    assert pruner.report.epochs[0].optimizer_steps == 1


# ---- construction --------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["ucb", UCB, None])
def test_policy_must_be_one(policy):
    with pytest.raises(TypeError, match=re.escape(f"policy={policy!r}")):
        DynamicPruner(policy, RunShape(10, num_epochs=1))


def test_magnitude_must_be_one():
    with pytest.raises(TypeError, match="magnitude='loss'"):
        DynamicPruner(UCB(0.5), RunShape(10, num_epochs=1), magnitude="loss")


@pytest.mark.parametrize("shape", ["10", None, {"samples": 10}])
def test_shape_must_be_one(shape):
    with pytest.raises(TypeError, match=re.escape(f"samples={shape!r}")):
        DynamicPruner(UCB(), shape, num_epochs=1)


def test_ranks_are_those_of_the_process_group():
    pruner = DynamicPruner(UCB(), RunShape(10, 2, num_epochs=1, ranks=4))
    assert pruner.shape == RunShape(10, 2, num_epochs=1, ranks=1)


def test_dataset_of_another_length_is_refused():
    pruner = DynamicPruner(UCB(), RunShape(10, num_epochs=1))
    with pytest.raises(ValueError, match=r"\b11\b.*\b10\b"):
        pruner.dataloader(list(range(11)))


def test_options_reach_the_dataloader():
    pruner = DynamicPruner(UCB(), RunShape(10, batch_size=3, num_epochs=1, drop_last=True))
    loader = pruner.dataloader([{"x": 1}] * 10, timeout=0, pin_memory=False)
    assert loader.batch_size == 3
    assert loader.drop_last
    assert loader.sampler is pruner.sampler


# ---- state (test_conformance.py tests that a resumed run is the uninterrupted one) ---------------


def states_equal(one, other):
    return one["metadata"] == other["metadata"] and all(
        torch.equal(one["tensors"][name].nan_to_num(-1), other["tensors"][name].nan_to_num(-1))
        for name in one["tensors"]
    )


def some_pruner(policy=None, num_samples=20, **settings):
    identity = {name: settings.pop(name) for name in ("seed", "data_seed") if name in settings}
    fingerprint = settings.pop("fingerprint", "cifar")
    shape = RunShape(num_samples, **{"batch_size": 4, "num_epochs": 3, **settings})
    return DynamicPruner(policy or UCB(0.5), shape, fingerprint=fingerprint, **identity)


def trained(**settings):
    pruner = some_pruner(**settings)
    kept(pruner, 0, losses=range(100))
    pruner.begin_epoch(1)
    for batch in list(torch.tensor(list(pruner.sampler)).split(4))[:2]:
        pruner.observe(batch, {"loss": batch.float()})
    return pruner


@pytest.mark.parametrize(
    ("settings", "theirs", "ours"),
    [
        ({"policy": EpsilonGreedy(0.5, epsilon=0.0)}, "'name': 'ucb'", "'name': 'epsilon-greedy'"),
        ({"policy": UCB(0.5, c=2.0)}, "'c': 1.0", "'c': 2.0"),
        ({"policy": UCB(0.5, period=2)}, "'period': 1", "'period': 2"),
        ({"num_samples": 21}, "number of samples: 20", "21"),
        ({"fingerprint": "imagenet"}, "dataset fingerprint: 'cifar'", "'imagenet'"),
        ({"batch_size": 5}, "global batch: 4", "5"),
        ({"accumulation": 2}, "gradient accumulation: 1", "2"),
        ({"drop_last": True}, "drop_last: False", "True"),
        ({"seed": 1, "data_seed": 0}, "(seed: 0", "1"),
        ({"data_seed": 7}, "(data seed: 0", "7"),
    ],
)
@pytest.mark.parametrize("by_file", [False, True])
def test_state_of_another_run_is_refused_and_nothing_changes(
    tmp_path, settings, theirs, ours, by_file
):
    source, target = trained(), some_pruner(**settings)
    target.begin_epoch(0)
    batch = torch.tensor(list(target.sampler)[: target.shape.batch_size])
    target.observe(batch, {"loss": torch.ones(len(batch))})
    before = copy.deepcopy(target.state_dict())
    source.save(tmp_path)
    state, load = source.state_dict(), target.load_state_dict
    if by_file:
        state, load = tmp_path, target.load
    with pytest.raises(ValueError, match=rf"{re.escape(theirs)}.*{re.escape(ours)}"):
        load(state)
    after = copy.deepcopy(target.state_dict())
    for state in (before, after):
        state["metadata"]["report"].pop("totals")
        for record in state["metadata"]["report"]["epochs"]:
            record.pop("seconds")
    assert states_equal(before, after)


def test_state_of_another_format_is_refused():
    state = trained().state_dict()
    state["metadata"]["format_version"] = 99
    with pytest.raises(ValueError, match=r"\b99\b.*\b1\b"):
        some_pruner().load_state_dict(state)


def test_longer_run_may_be_resumed():
    source, target = trained(), some_pruner(num_epochs=9)
    assert target.load_state_dict(source.state_dict()) == (1, 2)
    assert target.clock.total == 9 * 3


def test_place_where_a_run_continues():
    source = some_pruner()
    places = []
    for epoch in range(3):
        source.begin_epoch(epoch)
        for batch in torch.tensor(list(source.sampler)).split(4):
            places.append(some_pruner().load_state_dict(copy.deepcopy(source.state_dict())))
            source.observe(batch, {"loss": batch.float()})
        places.append(some_pruner().load_state_dict(copy.deepcopy(source.state_dict())))
        source.end_epoch()
        assert some_pruner().load_state_dict(copy.deepcopy(source.state_dict())) == places[-1]
    batches = [(epoch, batch) for epoch in range(3) for batch in range(3)]
    ends = [(1, 0), (2, 0), (3, 0)]
    assert places == sorted(batches + ends)


def test_state_before_the_first_epoch():
    source, target = some_pruner(), some_pruner()
    assert target.load_state_dict(source.state_dict()) == (0, 0)
    assert kept(source, 0, losses=range(20)) == kept(target, 0, losses=range(20))
    assert target.report.resumed == []


def test_resume_is_noted():
    target = some_pruner()
    target.load_state_dict(trained().state_dict())
    assert target.report.resumed == [{"epoch": 1, "step": 5}]
    assert target.batches_done == 2
    target.begin_epoch(1)
    assert target.clock.start == 3
    assert len(target.report.epochs) == 2


def test_epoch_may_be_trained_again_from_its_start():
    source, target = trained(), some_pruner()
    state = copy.deepcopy(source.state_dict())
    target.load_state_dict(state)
    target.restart_epoch(step=5)
    target.begin_epoch(1)
    assert list(target.sampler) == list(source.sampler)
    assert target.batches_done == 0
    assert target.clock.start == 5


def test_metadata_are_json_values():
    metadata = trained().state_dict()["metadata"]
    assert json.loads(json.dumps(metadata)) == metadata


def test_save_and_load(tmp_path):
    source, target = trained(), some_pruner()
    source.save(tmp_path / "checkpoint-5", step=5, learning_rate=0.125)
    assert [p.name for p in (tmp_path / "checkpoint-5").iterdir()] == [STATE_FILE]
    tensors, metadata = load_tensors(tmp_path / "checkpoint-5" / STATE_FILE)
    columns = {f"table.{name}" for name in ("mean", "variance", "times_kept", "last_observed")}
    assert set(tensors) == {*columns, "plan.indices"}
    assert metadata["report"]["epochs"][1]["learning_rate"] == 0.125
    assert target.load(tmp_path / "checkpoint-5") == (1, 2)
    assert all(
        torch.equal(column.nan_to_num(-1), target.table[name].nan_to_num(-1))
        for name, column in source.table.state_dict().items()
    )


def test_weights_and_learning_rate_are_resumed(tmp_path):
    policy = Given((plan_of(3, 1, weights=[2.5, 0.5], lr_scale=0.25),), period=5)
    source, target = (DynamicPruner(policy, RunShape(4, num_epochs=2)) for _ in range(2))
    source.begin_epoch(0)
    source.observe(torch.tensor([3]))
    source.save(tmp_path)
    assert target.load(tmp_path) == (0, 1)
    target.begin_epoch(0)
    assert target.weights(torch.tensor([3, 1, -1])).tolist() == [2.5, 0.5, 0.0]
    assert target.lr_scale == 0.25
    target.begin_epoch(1)  # the plan is held; there is no second one
    assert sorted(target.sampler) == [1, 3]
    assert target.lr_scale == 0.25


@pytest.mark.parametrize(
    ("epochs", "step", "expected"),
    [
        (2, 6, [(0, 3, 7), (1, 3, 7)]),
        (1.5, 5, [(0, 3, 7), (1, 2, 4)]),  # 5 / 1.5 = 3.3 steps an epoch; half of 7 samples
        (0, 0, []),
    ],
)
def test_run_without_our_state_is_charged_as_full_data(epochs, step, expected):
    pruner = DynamicPruner(UCB(0.4), RunShape(7, batch_size=2, num_epochs=4))
    assert pruner.adopt(epochs, step) == (int(epochs), 0)
    records = [(r.epoch, r.optimizer_steps, r.forward_passes) for r in pruner.report.epochs]
    assert records == expected
    assert all(r.full_data and r.backward_passes == r.forward_passes for r in pruner.report.epochs)
    for epoch in range(int(epochs), 4):
        pruner.begin_epoch(epoch, step=step)
        assert pruner.clock.virtual(step) == 2 * epoch  # 2 planned steps an epoch
        for batch in torch.tensor(list(pruner.sampler)).split(2):
            pruner.observe(batch, {"loss": torch.ones(len(batch))})
        step += pruner.clock.length
    pruner.end_epoch()
    own = (4 - int(epochs)) * 3
    assert pruner.report.totals["forward_passes"] == sum(passes for _, _, passes in expected) + own
    assert pruner.report.num_epochs == 4
    assert pruner.report.resumed == [
        {"epoch": int(epochs), "step": sum(s for _, s, _ in expected), "stock_checkpoint": True}
    ]


def test_missing_state_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=STATE_FILE):
        some_pruner().load(tmp_path)


def test_loaded_table_is_a_copy():
    source, target = trained(), some_pruner()
    state = source.state_dict()
    target.load_state_dict(state)
    target.table["mean"].fill_(77.0)
    assert not (source.table["mean"] == 77.0).any()


def test_loading_leaves_the_state_as_it_was():
    state = trained().state_dict()
    before = copy.deepcopy(state)
    for _ in range(2):
        target = some_pruner()
        target.load_state_dict(state)
        assert target.report.resumed == [{"epoch": 1, "step": 5}]
        target.begin_epoch(1)
        target.add_evaluation({"eval_loss": 1.0})
        target.observe(torch.tensor(list(target.sampler))[8:], {"loss": torch.full((2,), NAN)})
        target.begin_epoch(2)
    assert states_equal(state, before)


def test_metadata_of_a_state_are_those_of_its_moment():
    pruner = trained()
    state = pruner.state_dict()
    before = copy.deepcopy(state["metadata"])
    pruner.begin_epoch(2)
    assert state["metadata"] == before


def test_columns_of_a_users_memory_are_saved(tmp_path):
    class Counting(Memory):
        columns = (Column("seen", torch.int16, 0),)
        signals = ("loss",)

        def observe(self, rows, signals):
            return {"seen": rows["seen"] + 1}

    @dataclass(frozen=True)
    class Sliding(PruningPolicy):
        memory = Counting()

        def plan(self, choice):
            assert choice.scores is None
            return EpochPlan(torch.arange(4) + choice.epoch)

    source, target = some_pruner(policy=Sliding()), some_pruner(policy=Sliding())
    for epoch in range(3):
        kept(source, epoch, losses=range(20))
    source.save(tmp_path)
    target.load(tmp_path)
    assert target.table["seen"].tolist() == [1, 2, 3, 3, 2, 1] + [0] * 14
    assert target.table["seen"].dtype == torch.int16


# ---- loops that end early ------------------------------------------------------------------------


def observe_all(pruner, batches=None):
    """Observe some batches of the epoch that was begun, or all of them."""
    order = torch.tensor(list(pruner.sampler))
    for batch in order.split(pruner.shape.batch_size)[:batches]:
        pruner.observe(batch, {"loss": batch + 1.0})


def test_the_report_is_right_after_each_batch():
    """A loop may be broken off anywhere, without a call that says so."""
    pruner = DynamicPruner(UCB(0.5), RunShape(40, 4, num_epochs=3, accumulation=2))
    pruner.begin_epoch(0)
    observe_all(pruner)
    pruner.begin_epoch(1)
    observe_all(pruner, 3)
    report = pruner.report
    assert report.totals["optimizer_steps"] == 3 + 2
    assert report.num_epochs == pytest.approx(1 + 2 / 3)
    assert report.totals["forward_passes"] == 20 + 12


def test_epochs_that_end_early_count_in_part_and_are_not_continued():
    def begun():
        return DynamicPruner(UCB(0.5), RunShape(40, 4, num_epochs=3))

    pruner = begun()
    for epoch in range(2):
        pruner.begin_epoch(epoch)
        observe_all(pruner, 2)
    pruner.end_epoch()
    assert pruner.report.num_epochs == pytest.approx(0.8)
    assert pruner.report.cost_ratio == pytest.approx(0.5)
    again = begun()
    assert again.load_state_dict(pruner.state_dict()) == (2, 0)
    assert again.load_state_dict(again.state_dict()) == (2, 0)
    for one in (pruner, again):
        one.begin_epoch(2)
        observe_all(one)
        one.end_epoch()
    assert outcome(again) == outcome(pruner)
    assert again.report.num_epochs == pytest.approx(1.8)


def test_the_last_epoch_of_a_run_is_continued_by_a_longer_one():
    def of(steps):
        return DynamicPruner(UCB(0.5), RunShape(40, 4, max_steps=steps))

    short, long = of(7), of(12)  # of 5 steps an epoch
    for pruner in (short, long):
        pruner.begin_epoch(0)
        observe_all(pruner)
        pruner.begin_epoch(1)
        observe_all(pruner, 2)
    short.end_epoch()
    again = of(12)
    assert again.load_state_dict(short.state_dict()) == (1, 2)


def test_an_interrupted_epoch_is_recorded_and_continued():
    pruner = DynamicPruner(UCB(0.5), RunShape(40, 4, num_epochs=3))
    pruner.begin_epoch(0)
    observe_all(pruner, 2)
    pruner.interrupt(step=1)
    assert pruner.report.totals["optimizer_steps"] == 1
    assert pruner.table.observed.sum() == 8
    assert pruner.report.epochs[0].seconds["training"] > 0
    again = DynamicPruner(UCB(0.5), RunShape(40, 4, num_epochs=3))
    assert again.load_state_dict(pruner.state_dict()) == (0, 2)
    pruner.interrupt()  # no epoch is running


def test_an_error_of_the_device_does_not_hide_the_first_one(monkeypatch):
    pruner = DynamicPruner(UCB(0.5), RunShape(40, 4, num_epochs=3))
    pruner.begin_epoch(0)
    observe_all(pruner, 2)

    def failing():
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(pruner, "flush", failing)
    pruner.interrupt(step=2)
    assert pruner.report.totals["optimizer_steps"] == 2


@pytest.mark.parametrize(
    ("differing", "name"),
    [
        (lambda rank: {"num_epochs": 2 + rank}, "number of epochs"),
        (lambda rank: {"max_steps": 5 + rank}, "max_steps"),
        (lambda rank: {"num_epochs": 2, "batch_size": 2 + rank}, "global batch"),
    ],
)
def test_ranks_of_different_runs_fail_before_they_train(differing, name):
    """They would wait for each other where the shorter one ends."""

    def begin():
        rank = distributed.world()[0]
        shape = RunShape(40, **{"batch_size": 2, **differing(rank)})
        DynamicPruner(RandomPruning(0.5), shape).begin_epoch(0)

    with pytest.raises(ValueError, match=rf"'{name}': rank 0 has .*rank 1 has "):
        on_ranks(2, begin)
