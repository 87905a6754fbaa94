"""DynamicPruner: the clock by hand, full-data epochs, guards, budget, weights, counts, state; its own example runs."""

import copy
import itertools
import json
import math
import re
import signal
import time
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F

from hf_dynprune import pruner as module
from hf_dynprune.policies import (
    UCB,
    EpochPlan,
    EpsilonGreedy,
    FullData,
    PruningPolicy,
    RandomPruning,
)
from hf_dynprune.pruner import STATE_FILE, DynamicPruner, choice_seed
from hf_dynprune.sampler import epoch_order
from hf_dynprune.scores import Column, load_tensors

INF, NAN = math.inf, math.nan


@dataclass(frozen=True)
class Given(PruningPolicy):
    """Trains what it was told to; says nothing beforehand unless `size` is given."""

    plans: tuple[EpochPlan, ...] = ()
    size: int | None = None

    def planned_size(self, n, epoch, progress):
        return self.size

    def plan(self, table, *, score, epoch, progress, generator):
        return self.plans[epoch]

    def to_dict(self):
        return {"name": "Given"}


def plan_of(*indices, weights=None, lr_scale=1.0):
    return EpochPlan(
        torch.tensor(indices), None if weights is None else torch.tensor(weights), lr_scale
    )


def kept(pruner, epoch, losses=None, **begin):
    """Begins an epoch, and observes `losses[i]` of each sample i that it trains on; returns those, ascending."""
    pruner.begin_epoch(epoch, **begin)
    samples = list(pruner.sampler)
    for batch in torch.tensor(samples).split(pruner.batch_size):
        signals = (
            {}
            if losses is None
            else {"loss": torch.tensor([float(losses[i]) for i in batch.tolist()])}
        )
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
    scope = {
        "DynamicPruner": DynamicPruner,
        "UCB": UCB,
        "F": F,
        "dataset": dataset,
        "model": model,
        "optimizer": optimizer,
    }
    exec(code, scope)
    pruner = scope["pruner"]
    assert F.cross_entropy(model(x), (x[:, 0] > 0).long()).item() < before
    assert pruner.report.cost_ratio == pytest.approx(0.3)
    assert [record.samples for record in pruner.report.epochs] == [120] * 20
    assert [record.optimizer_steps for record in pruner.report.epochs] == [1] * 20
    assert pruner.table.observed.all()
    assert pruner.report.selection["choices"] == 20


# ---- the clock -----------------------------------------------------------------------------------


def virtual_steps(pruner, epochs):
    """The virtual step after each real step, epoch by epoch."""
    step, seen = 0, []
    for epoch in range(epochs):
        pruner.begin_epoch(epoch, step=step)
        length = pruner.clock.length
        seen.append([pruner.clock.virtual(step + k) for k in range(1, length + 1)])
        step += length
    return seen


@pytest.mark.parametrize(
    ("settings", "length"),
    [
        ({"batch_size": 10}, 3),  # 30 samples
        ({"batch_size": 8}, 4),  # 3.75
        ({"batch_size": 8, "drop_last": True}, 3),
        ({"batch_size": 4, "accumulation": 3}, 3),  # 7.5 batches: 8, in groups of 3
        ({"batch_size": 4, "accumulation": 3, "drop_last": True}, 3),  # 7 batches
        ({"batch_size": 4, "accumulation": 100}, 1),
    ],
)
def test_constant_lengths_give_exact_integers(settings, length):
    pruner = DynamicPruner(RandomPruning(0.3), 100, num_epochs=4, **settings)
    assert pruner.num_epochs == 4
    assert pruner.clock.total == pruner.total_steps() == 4 * length
    seen = list(itertools.chain(*virtual_steps(pruner, 4)))
    assert seen == list(range(1, 4 * length + 1))
    assert all(type(v) is int for v in seen)
    assert type(pruner.clock.total) is int


def test_varying_lengths_follow_the_budget():
    # 10 steps on all data, then 3 and 3: F = 16/3, T = 16.
    pruner = DynamicPruner(RandomPruning(0.3, first=1), 100, batch_size=10, num_epochs=3)
    assert pruner.clock.total == pruner.total_steps() == 16
    first, second, third = virtual_steps(pruner, 3)
    mean = 16 / 3
    assert first == pytest.approx([mean * k / 10 for k in range(1, 11)])
    assert second == pytest.approx([mean + mean * k / 3 for k in (1, 2, 3)])
    assert third == pytest.approx([2 * mean + mean * k / 3 for k in (1, 2, 3)])
    assert third[-1] == pytest.approx(16)
    assert third[-1] <= 16


def test_varying_lengths_of_a_whole_mean():
    # 10 steps on all data, then 4 and 4: F = 6, T = 18.
    pruner = DynamicPruner(RandomPruning(0.4, first=1), 100, batch_size=10, num_epochs=3)
    assert pruner.clock.total == pruner.total_steps() == 18
    seen = virtual_steps(pruner, 3)
    assert [epoch[-1] for epoch in seen] == [6, 12, 18]
    assert seen[1] == pytest.approx([6 + 1.5, 6 + 3, 6 + 4.5, 6 + 6])


@pytest.mark.parametrize(
    ("keep_ratio", "length", "total"), [(0.3, 3, 8), (0.4, 4, 10)]
)  # ceil(2.5 x 3), 2.5 x 4
def test_fractional_epochs(keep_ratio, length, total):
    pruner = DynamicPruner(RandomPruning(keep_ratio), 100, batch_size=10, num_epochs=2.5)
    assert pruner.num_epochs == 3
    assert pruner.clock.total == pruner.total_steps() == total
    seen = list(itertools.chain(*virtual_steps(pruner, 3)))
    assert seen == [min(step, total) for step in range(1, 3 * length + 1)]  # clamped
    assert all(type(v) is int for v in seen)


def test_fractional_epochs_of_varying_lengths():
    # Lengths 10, 3, 3: F = 16/3. The half epoch at the end has ceil(1.5) = 2 steps.
    pruner = DynamicPruner(RandomPruning(0.3, first=1), 100, batch_size=10, num_epochs=2.5)
    assert pruner.clock.total == 14  # ceil(16/3 x 2.5)
    assert pruner.total_steps() == 10 + 3 + 2


@pytest.mark.parametrize(
    ("policy", "n", "num_epochs", "total"),
    [
        (FullData(), 250, 2.2, 55),  # 25 x 2.2 = 55.00000000000001
        (FullData(), 250, 4.4, 110),
        (FullData(), 100, 0.3, 3),
        (RandomPruning(0.8, first=1), 50, 7, 29),  # 5 + 6 x 4, and 29 / 7 x 7 = 29.000000000000004
    ],
)
def test_total_is_not_one_more_by_rounding(policy, n, num_epochs, total):
    pruner = DynamicPruner(policy, n, batch_size=10, num_epochs=num_epochs)
    assert pruner.clock.total == total
    assert pruner.num_epochs == math.ceil(num_epochs)


@pytest.mark.parametrize(
    ("policy", "max_steps", "epochs"),
    [
        (RandomPruning(0.3), 7, 3),  # 3, 6, 9
        (RandomPruning(0.3), 9, 3),
        (RandomPruning(0.3), 10, 4),
        (RandomPruning(0.3, first=1), 12, 2),  # 10, 13
        (RandomPruning(0.3, last=0.5), 30, 7),  # 3, 6, 9, 12, 15, and from there on 10 each
        (FullData(), 5, 1),
    ],
)
def test_budget_of_steps(policy, max_steps, epochs):
    pruner = DynamicPruner(policy, 100, batch_size=10, max_steps=max_steps)
    assert pruner.clock.total == pruner.total_steps() == max_steps
    assert pruner.num_epochs == epochs
    seen = list(itertools.chain(*virtual_steps(pruner, epochs)))
    assert seen[:max_steps] == list(range(1, max_steps + 1))


def test_the_schedule_says_what_each_epoch_will_be():
    pruner = DynamicPruner(UCB(0.3, first=1, period=2, last=0.25), 100, num_epochs=8)
    planned = list(pruner.schedule())
    assert [epoch.size for epoch in planned] == [100, 30, 30, 30, 30, 30, 100, 100]
    assert [epoch.full_data for epoch in planned] == [
        True,
        False,
        False,
        False,
        False,
        False,
        True,
        True,
    ]
    assert [epoch.chooses for epoch in planned] == [
        False,
        True,
        False,
        True,
        False,
        True,
        False,
        False,
    ]
    kept_before, choices = None, []
    for epoch, (size, full_data, _) in enumerate(planned):  # and so they are
        now = kept(pruner, epoch, torch.rand(100))
        assert len(now) == size
        choices.append(not full_data and now != kept_before)
        kept_before = kept_before if full_data else now
    assert choices == [epoch.chooses for epoch in planned]
    unknown = DynamicPruner(Given((plan_of(1), plan_of(2)), period=2), 100, num_epochs=4)
    assert list(unknown.schedule()) == [(None, False, True), (None, False, False)] * 2


def test_unknown_sizes_are_taken_for_all_data():
    policy = Given((plan_of(*range(20)), plan_of(*range(50)), plan_of(*range(90))))
    pruner = DynamicPruner(policy, 100, batch_size=10, num_epochs=3)
    assert pruner.clock.total == pruner.total_steps() == 30
    totals = []
    for epoch, step in enumerate((0, 2, 7)):
        pruner.begin_epoch(epoch, step=step)
        totals.append(pruner.total_steps())
    assert totals == [2 + 10 + 10, 2 + 5 + 10, 2 + 5 + 9]
    assert pruner.clock.virtual(7 + 9) == 30  # F x 3
    assert pruner.clock.virtual(7 + 3) == pytest.approx(20 + 10 * 3 / 9)


def test_steps_are_told_by_the_calls_of_observe():
    pruner = DynamicPruner(RandomPruning(0.3), 100, batch_size=4, accumulation=3, num_epochs=2)
    kept(pruner, 0)  # 8 batches, 3 steps
    assert pruner.batches_done == 8
    pruner.begin_epoch(1)
    assert pruner.clock.start == 3
    assert pruner.batches_done == 0


# ---- full-data epochs ----------------------------------------------------------------------------


def full_epochs(policy, num_epochs, n=10):
    pruner = DynamicPruner(policy, n, num_epochs=num_epochs)
    records = [pruner.begin_epoch(epoch) for epoch in range(pruner.num_epochs)]
    assert all(r.samples == (n if r.full_data else 5) for r in records)
    return [r.epoch for r in records if r.full_data]


@pytest.mark.parametrize(
    ("settings", "num_epochs", "expected"),
    [
        ({}, 3, []),
        ({"first": 1}, 3, [0]),
        ({"first": 5}, 3, [0, 1, 2]),
        ({"last": 0.125}, 90, list(range(79, 90))),  # from 78.75 on
        ({"last": 0.125}, 100, list(range(88, 100))),  # from 87.5 on
        ({"last": 0.125}, 3, []),  # the last epoch begins at 0.667
        ({"last": 1 / 3}, 3, [2]),
        ({"last": 0.34}, 3, [2]),
        ({"last": 0.3}, 10, [7, 8, 9]),  # 1 - 0.3 is not 0.7
        ({"last": 0.1}, 10, [9]),
        ({"last": 1.0}, 3, [0, 1, 2]),
        ({"first": 1, "last": 0.5}, 4, [0, 2, 3]),
        ({"last": 0.4}, 2.5, [2]),  # 1.5 to 2.5 of 2.5: the third begins at 0.8
        ({"last": 0.6}, 2.5, [1, 2]),
    ],
)
def test_full_data_epochs(settings, num_epochs, expected):
    assert full_epochs(RandomPruning(0.5, **settings), num_epochs) == expected


@pytest.mark.parametrize("num_epochs", [3, 7, 10, 30, 90])
def test_share_of_whole_epochs_gives_that_many(num_epochs):
    for epochs in range(num_epochs + 1):
        pruner = DynamicPruner(
            RandomPruning(0.5, last=epochs / num_epochs), 10, num_epochs=num_epochs
        )
        assert pruner.total_steps() == 10 * epochs + 5 * (num_epochs - epochs)


def test_last_is_a_share_of_the_steps_where_steps_are_the_budget():
    pruner = DynamicPruner(RandomPruning(0.3, last=0.5), 100, batch_size=10, max_steps=30)
    for epoch in range(pruner.num_epochs):
        kept(pruner, epoch)
    assert [r.samples for r in pruner.report.epochs] == [30] * 5 + [100] * 2


def test_full_data_epoch_trains_all_in_the_stock_order_and_is_no_choice():
    pruner = DynamicPruner(RandomPruning(0.5, first=1, last=0.25), 10, num_epochs=4, seed=3)
    for epoch in range(4):
        pruner.begin_epoch(epoch)
        if epoch in (0, 3):
            assert (
                list(pruner.sampler)
                == torch.randperm(10, generator=torch.Generator().manual_seed(3 + epoch)).tolist()
            )
    assert int(pruner.table["times_kept"].sum()) == 2 * 5
    pruner.end_epoch()
    assert pruner.report.selection["choices"] == 2


# ---- choices -------------------------------------------------------------------------------------


def test_period_holds_the_plan():
    pruner = DynamicPruner(RandomPruning(0.5, period=3, first=1), 40, num_epochs=8)
    epochs, orders = [], []
    for epoch in range(8):
        epochs.append(kept(pruner, epoch))
        orders.append(list(pruner.sampler))
    pruner.end_epoch()
    assert epochs[0] == list(range(40))
    assert epochs[1] == epochs[2] == epochs[3] != epochs[4]
    assert epochs[4] == epochs[5] == epochs[6] != epochs[7]
    assert orders[1] != orders[2]  # shuffled anew
    assert pruner.report.selection["choices"] == 3
    counts = [sum(i in epochs[e] for e in (1, 4, 7)) for i in range(40)]
    assert pruner.table["times_kept"].tolist() == counts


def test_order_follows_the_data_seed_and_the_choice_the_seed():
    def run(**seeds):
        pruner = DynamicPruner(RandomPruning(0.5), 30, num_epochs=2, **seeds)
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
    pruner = DynamicPruner(policy(keep_ratio), n, batch_size=8, num_epochs=6)
    for epoch in range(6):
        samples = kept(pruner, epoch, losses=range(n))
        assert len(samples) == len(set(samples)) == max(1, round(keep_ratio * n))
        assert pruner.report.epochs[-1].samples == len(samples)
    pruner.end_epoch()
    assert pruner.report.cost_ratio == pytest.approx(max(1, round(keep_ratio * n)) / n)


def test_plan_of_another_size_than_planned_is_an_error():
    pruner = DynamicPruner(Given((plan_of(0, 1, 2),), size=4), 10, num_epochs=1)
    with pytest.raises(
        RuntimeError,
        match=r"Given planned 4 samples for epoch 0 and chose 3: `planned_size` and `plan`",
    ):
        pruner.begin_epoch(0)


@pytest.mark.parametrize(
    ("plan", "message"), [(plan_of(1, 1), "only 1 different"), (plan_of(3, 10), "index 10")]
)
def test_plan_is_checked(plan, message):
    with pytest.raises(ValueError, match=message):
        DynamicPruner(Given((plan,)), 10, num_epochs=1).begin_epoch(0)


@pytest.mark.parametrize(
    "policy", [RandomPruning(0.3), RandomPruning(0.3, first=1), UCB(0.3, last=0.5)]
)
def test_plan_smaller_than_a_batch_is_refused_at_construction_with_drop_last(policy):
    with pytest.raises(
        ValueError,
        match=r"keeps 3 of 10 samples, less than one batch of 4 .*raise keep_ratio, lower the batch",
    ):
        DynamicPruner(policy, 10, batch_size=4, num_epochs=3, drop_last=True)
    assert (
        len(kept(DynamicPruner(policy, 10, batch_size=4, num_epochs=3), 1, losses=range(10))) == 3
    )


def test_plan_smaller_than_a_batch_is_refused_when_chosen_where_it_is_not_known_before():
    pruner = DynamicPruner(Given((plan_of(1, 2),)), 10, batch_size=4, num_epochs=1, drop_last=True)
    with pytest.raises(ValueError, match="Epoch 0 keeps 2 samples, less than one batch of 4"):
        pruner.begin_epoch(0)


# ---- guards --------------------------------------------------------------------------------------


def after_full_epoch(policy, losses, n=10, epochs=6):
    """A pruner after one epoch on all data (`first=1`), with the samples in `losses` observed."""
    pruner = DynamicPruner(policy, n, num_epochs=epochs)
    pruner.begin_epoch(0)
    pruner.observe(
        torch.tensor(list(losses)),
        {"loss": torch.tensor(list(losses.values()), dtype=torch.float32)},
    )
    return pruner


@pytest.mark.parametrize("cls", [UCB, EpsilonGreedy])
@pytest.mark.parametrize(
    ("share", "keep_ratio", "expected"),
    [
        (0.0, 0.5, {5, 6, 7, 8, 9}),
        (0.2, 0.5, {3, 4, 5, 6, 7}),
        (0.1, 0.5, {4, 5, 6, 7, 8}),
        (0.04, 0.5, {5, 6, 7, 8, 9}),  # 0.4 of a sample
        (0.2, 0.8, {0, 1, 2, 3, 4, 5, 6, 7}),
        (0.9, 0.1, {0}),
    ],
)
def test_the_hardest_are_kept_last(cls, share, keep_ratio, expected):
    settings = {"epsilon": 0.0, "first": 1, "exclude_hardest": share}
    pruner = after_full_epoch(cls(keep_ratio, **settings), {i: float(i) for i in range(10)})
    assert set(kept(pruner, 1, losses=range(10))) == expected


def test_the_hardest_are_kept_where_all_others_are():
    pruner = after_full_epoch(
        UCB(0.9, first=1, exclude_hardest=0.2), {i: float(i) for i in range(10)}
    )
    samples = set(kept(pruner, 1, losses=range(10)))
    assert samples > {0, 1, 2, 3, 4, 5, 6, 7}
    assert len(samples & {8, 9}) == 1


def test_never_observed_come_first_beside_excluded_ones():
    # Of the seven observed the two hardest (5, 6) are left out; 7, 8 and 9 were never observed.
    pruner = after_full_epoch(
        UCB(0.5, first=1, exclude_hardest=0.3), {i: float(i) for i in range(7)}
    )
    assert set(kept(pruner, 1, losses=range(10))) == {7, 8, 9, 4, 3}


def test_nan_is_not_among_the_hardest():
    losses = {i: float(i) for i in range(10)} | {0: NAN}
    pruner = after_full_epoch(UCB(0.8, first=1, exclude_hardest=0.1), losses)
    assert set(kept(pruner, 1, losses=range(10))) == {1, 2, 3, 4, 5, 6, 7, 8}


def test_max_age_shows_a_sample_again():
    # Losses never change: without the guard 5, ..., 9 are trained for ever.
    low, high = [0, 1, 2, 3, 4], [5, 6, 7, 8, 9]

    def choices(**settings):
        pruner = after_full_epoch(
            UCB(0.5, first=1, **settings), {i: float(i) for i in range(10)}, epochs=8
        )
        return [kept(pruner, epoch, losses=range(10)) for epoch in range(1, 8)]

    assert choices() == [high] * 7
    # Observed in epoch 0, not in the choices of epochs 1 and 2: shown in epoch 3; then again in epoch 6.
    assert choices(max_age=2) == [high, high, low, high, high, low, high]
    assert choices(max_age=1) == [high, low, high, low, high, low, high]
    # Choices in epochs 1, 3, 5, 7; not observed in that of epoch 1.
    assert choices(max_age=1, period=2) == [high, high, low, low, high, high, low]
    assert choices(max_age=2, period=2) == [high, high, high, high, low, low, high]
    assert choices(max_age=7) == [high] * 7


def test_max_weight_limits_the_weights():
    plan = plan_of(2, 0, 1, weights=[0.5, 5.0, 3.0])
    pruner = DynamicPruner(Given((plan,), max_weight=3.0), 4, num_epochs=1)
    pruner.begin_epoch(0)
    assert pruner.weights(torch.tensor([2, 0, 1])).tolist() == [0.5, 3.0, 3.0]
    assert plan.weights.tolist() == [0.5, 5.0, 3.0]


# ---- weights and learning rate -------------------------------------------------------------------


def test_weights_of_the_plan():
    pruner = DynamicPruner(
        Given((plan_of(3, 1, weights=[2.5, 0.5]), plan_of(0, 1))), 4, num_epochs=2
    )
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
    pruner = DynamicPruner(policy, 4, num_epochs=3)
    for epoch, (weights, lr_scale) in enumerate(
        [([1.0, 1.0], 1.0), ([0.5, 2.5], 0.5), ([1.0, 1.0], 1.0)]
    ):
        pruner.begin_epoch(epoch)
        assert pruner.weights(torch.tensor([1, 3])).tolist() == weights
        assert pruner.lr_scale == lr_scale


# ---- what is counted -----------------------------------------------------------------------------


def test_passes_steps_and_cost():
    pruner = DynamicPruner(RandomPruning(0.5), 20, batch_size=4, num_epochs=2, accumulation=2)
    for epoch in range(2):
        kept(pruner, epoch)
    pruner.end_epoch(learning_rate=0.25)
    first, second = pruner.report.epochs
    assert (first.samples, first.forward_passes, first.backward_passes, first.optimizer_steps) == (
        10,
        10,
        10,
        2,
    )
    assert (first.learning_rate, second.learning_rate) == (None, 0.25)
    assert first.scoring_passes == first.nonfinite == 0
    assert pruner.report.num_epochs == 2.0
    assert pruner.report.cost_ratio == pytest.approx(0.5)


def test_cost_of_a_part_of_an_epoch():
    pruner = DynamicPruner(RandomPruning(0.5), 20, batch_size=2, num_epochs=2)
    kept(pruner, 0)
    pruner.begin_epoch(1)
    for batch in list(torch.tensor(list(pruner.sampler)).split(2))[:2]:  # 2 of 5 steps
        pruner.observe(batch)
    pruner.update_record()
    assert pruner.report.num_epochs == pytest.approx(1.4)
    assert pruner.report.passes == 14
    assert pruner.report.cost_ratio == pytest.approx(14 / (20 * 1.4))


def test_nonfinite_losses_are_counted_and_listed():
    pruner = DynamicPruner(UCB(1.0), 6, batch_size=2, num_epochs=2)
    kept(pruner, 0, losses=[1, NAN, 1, INF, 1, -INF])
    kept(pruner, 1, losses=[1, NAN, 1, 1, NAN, 1])
    pruner.end_epoch()
    assert [r.nonfinite for r in pruner.report.epochs] == [3, 2]
    assert pruner.report.nonfinite_samples == [1, 3, 4, 5]
    assert pruner.report.totals["nonfinite"] == 5
    assert pruner.table.observed.all()
    assert pruner.table["mean"].isnan().tolist() == [False, True, False, False, False, False]


def test_at_most_100_nonfinite_samples_are_listed():
    pruner = DynamicPruner(UCB(1.0), 300, batch_size=50, num_epochs=2)
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
    whole = (
        after_full_epoch(UCB(0.5, first=1), {i: float(i) for i in range(n)}, n=n)
        .begin_epoch(1)
        .scores
    )
    monkeypatch.setattr("hf_dynprune.pruner._DESCRIBED", 100)
    some = (
        after_full_epoch(UCB(0.5, first=1), {i: float(i) for i in range(n)}, n=n)
        .begin_epoch(1)
        .scores
    )
    assert list(some.values()) == pytest.approx(
        [4.5 * 110, 0.05 * 990, 0.25 * 990, 0.5 * 990, 0.75 * 990, 0.95 * 990]
    )
    assert list(some.values()) == pytest.approx(list(whole.values()), abs=0.01 * n)


@pytest.mark.parametrize("policy", [UCB(0.5), RandomPruning(0.5)])
def test_no_scores_to_describe(policy):
    assert DynamicPruner(policy, 6, num_epochs=1).begin_epoch(0).scores == {}


def test_seconds_by_phase():
    pruner = DynamicPruner(UCB(0.5), 20, batch_size=10, num_epochs=1)
    began = time.perf_counter()
    pruner.begin_epoch(0)
    time.sleep(0.03)
    pruner.observe(torch.tensor(list(pruner.sampler)), {"loss": torch.ones(10)})
    pruner.end_epoch()
    whole = time.perf_counter() - began
    time.sleep(0.03)  # between two epochs: of no phase
    pruner.end_epoch()
    seconds = pruner.report.epochs[0].seconds
    assert seconds["training"] >= 0.03
    assert seconds["choosing"] > 0
    assert sum(seconds.values()) <= whole


def test_evaluation_is_noted():
    pruner = DynamicPruner(RandomPruning(0.5), 10, num_epochs=2)
    pruner.add_evaluation(
        {"eval_loss": 9.0}
    )  # before the first epoch: of no model that was trained
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


# ---- observe -------------------------------------------------------------------------------------


def test_padding_is_counted_as_passes_and_not_observed():
    pruner = DynamicPruner(UCB(1.0), 4, batch_size=4, num_epochs=1)
    pruner.begin_epoch(0)
    pruner.observe(torch.tensor([2, 0, -1, -1]), {"loss": torch.tensor([5.0, 6.0, 7.0, NAN])})
    pruner.end_epoch()
    assert pruner.table["mean"].nan_to_num(-1).tolist() == [6.0, -1.0, 5.0, -1.0]
    assert pruner.table.observed.tolist() == [True, False, True, False]
    assert pruner.report.epochs[0].forward_passes == 4
    assert pruner.report.epochs[0].nonfinite == 0


def test_signals_are_detached_and_half_precision_is_fine():
    pruner = DynamicPruner(UCB(1.0), 4, batch_size=2, num_epochs=1)
    pruner.begin_epoch(0)
    losses = torch.tensor([1.0, 2.0], dtype=torch.bfloat16, requires_grad=True)
    pruner.observe(torch.tensor([0, 1]), {"loss": losses * 2, "not wanted": torch.zeros(9)})
    pruner.observe(torch.tensor([2, 3]), {"loss": torch.tensor([1.0, 2.0], dtype=torch.float64)})
    pruner.end_epoch()
    assert pruner.table["mean"].tolist() == [2.0, 4.0, 1.0, 2.0]
    assert not pruner.table["mean"].requires_grad


def test_same_table_whatever_the_draining():
    def run(drain):
        pruner = DynamicPruner(UCB(1.0), 50, batch_size=5, num_epochs=3)
        for epoch in range(3):
            pruner.begin_epoch(epoch)
            for number, batch in enumerate(torch.tensor(list(pruner.sampler)).split(5)):
                pruner.observe(batch, {"loss": (batch.float() + epoch) % 7})
                if number in drain:
                    pruner.drain()
                if number in drain and epoch == 1:
                    pruner.flush()
        pruner.end_epoch()
        return pruner.table.state_dict()

    base, drained = run(()), run((0, 1, 4, 9))
    assert all(torch.equal(base[name], drained[name]) for name in base)


def test_buffer_is_bounded():
    n = 1 << 16
    pruner = DynamicPruner(UCB(1.0), n, batch_size=1 << 14, num_epochs=1)
    pruner.begin_epoch(0)
    waiting = []
    for batch in torch.arange(n).split(1 << 14):
        pruner.observe(batch, {"loss": batch.float()})
        waiting.append(sum(len(index) for index, _ in pruner._buffer))
    assert waiting == [1 << 14, 2 << 14, 3 << 14, 0]
    pruner.end_epoch()
    assert torch.equal(pruner.table["mean"], torch.arange(n).float())


def test_signals_must_be_there_and_fit():
    pruner = DynamicPruner(UCB(0.5, signal="el2n"), 10, num_epochs=1)
    pruner.begin_epoch(0)
    with pytest.raises(ValueError, match=r"ucb observes 'el2n'; given were \['loss'\]"):
        pruner.observe(torch.tensor([0, 1]), {"loss": torch.ones(2)})
    with pytest.raises(ValueError, match=r"ucb observes 'el2n'; given were \[\]"):
        pruner.observe(torch.tensor([0, 1]))
    for value in (torch.ones(()), torch.ones(3), torch.ones(2, 1)):
        shape = re.escape(str(tuple(value.shape)))
        with pytest.raises(
            ValueError,
            match=rf"'el2n' has shape {shape}, the sample index \(2,\): one value for each",
        ):
            pruner.observe(torch.tensor([0, 1]), {"el2n": value})
    assert pruner.batches_done == 0
    assert pruner.report.epochs[0].forward_passes == 0


# ---- scoring passes ------------------------------------------------------------------------------


def scored_run(scoring, epochs=4, **settings):
    """What a scorer was asked for before each epoch; the loss of a sample is 10 e + i when it is scored, i when trained."""
    policy = UCB(keep_ratio=0.5, decay=1.0, scoring=scoring, **settings)
    pruner, asked = DynamicPruner(policy, 6, batch_size=2, num_epochs=epochs), []
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
    assert all((r.seconds["scoring"] > 0) == (r.scoring_passes > 0) for r in report.epochs)


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
    pruner = DynamicPruner(UCB(0.5, scoring="all"), 6, num_epochs=2)
    with pytest.raises(ValueError, match=r"ucb with scoring='all' takes forward passes .* scorer="):
        pruner.begin_epoch(0)


def test_a_scorer_must_give_one_value_a_sample():
    pruner = DynamicPruner(UCB(0.5, scoring="all"), 6, num_epochs=2)
    with pytest.raises(ValueError, match=r"'loss' has shape \(1,\), the sample index \(6,\)"):
        pruner.begin_epoch(0, scorer=lambda index: {"loss": torch.ones(1)})


def test_observe_before_the_first_epoch_says_what_is_missing():
    pruner = DynamicPruner(RandomPruning(0.5), 10, num_epochs=1)
    with pytest.raises(RuntimeError, match="begin_epoch"):
        pruner.observe(torch.tensor([0, 1]))


def test_epoch_is_ended_once():
    pruner = DynamicPruner(UCB(1.0), 4, batch_size=4, num_epochs=2)
    kept(pruner, 0, losses=[1, 2, 3, 4])
    assert not pruner.table.observed.any()  # until the epoch ends
    pruner.end_epoch(learning_rate=0.5)
    pruner.end_epoch()
    pruner.begin_epoch(1)
    assert pruner.table["mean"].tolist() == [1, 2, 3, 4]
    assert pruner.report.epochs[0].optimizer_steps == 1
    assert pruner.report.epochs[0].learning_rate == 0.5


def test_begin_epoch_makes_up_for_a_missing_end():
    pruner = DynamicPruner(UCB(1.0), 4, batch_size=4, num_epochs=2)
    kept(pruner, 0, losses=[1, 2, 3, 4])
    pruner.begin_epoch(1)
    assert pruner.table["mean"].tolist() == [1, 2, 3, 4]
    assert pruner.table["last_observed"].tolist() == [0] * 4
    assert pruner.report.epochs[0].optimizer_steps == 1


# ---- construction --------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["ucb", UCB, None])
def test_policy_must_be_one(policy):
    with pytest.raises(
        TypeError, match=r"is no PruningPolicy: make one, such as UCB\(keep_ratio=0.3\)"
    ):
        DynamicPruner(policy, 10, num_epochs=1)


@pytest.mark.parametrize("budget", [{}, {"num_epochs": 3, "max_steps": 5}])
def test_one_budget_is_given(budget):
    with pytest.raises(ValueError, match="give one of the two"):
        DynamicPruner(UCB(), 10, **budget)


@pytest.mark.parametrize(
    "budget", [{"num_epochs": 0}, {"num_epochs": -1.5}, {"num_epochs": NAN}, {"max_steps": 0}]
)
def test_budget_must_be_positive(budget):
    ((name, value),) = budget.items()
    with pytest.raises(ValueError, match=f"{name}={value}"):
        DynamicPruner(UCB(), 10, **budget)


@pytest.mark.parametrize("num_samples", [0, -3])
def test_data_must_not_be_empty(num_samples):
    with pytest.raises(ValueError, match=f"{num_samples} samples"):
        DynamicPruner(UCB(), num_samples, num_epochs=1)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("batch_size", 0),
        ("batch_size", -4),
        ("batch_size", 2.5),
        ("accumulation", 0),
        ("accumulation", -1),
        ("max_steps", 2.5),
        ("num_epochs", "3"),
        ("num_epochs", INF),
    ],
)
def test_numbers_out_of_range_are_named(name, value):
    def hangs(*_):
        raise TimeoutError

    budget = {} if name in ("num_epochs", "max_steps") else {"num_epochs": 2}
    before = signal.signal(signal.SIGALRM, hangs)
    signal.setitimer(signal.ITIMER_REAL, 1.0)
    try:
        with pytest.raises((TypeError, ValueError), match=f"{name}={value!r}"):
            DynamicPruner(RandomPruning(0.5), 100, **budget, **{name: value})
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def test_dataset_of_another_length_is_refused():
    pruner = DynamicPruner(UCB(), 10, num_epochs=1)
    with pytest.raises(ValueError, match="dataset has 11 samples, the pruner was made for 10"):
        pruner.dataloader(list(range(11)))


def test_options_reach_the_dataloader():
    pruner = DynamicPruner(UCB(), 10, batch_size=3, num_epochs=1, drop_last=True)
    loader = pruner.dataloader([{"x": 1}] * 10, timeout=0, pin_memory=False)
    assert loader.batch_size == 3
    assert loader.drop_last
    assert loader.sampler is pruner.sampler


# ---- state (that a run goes on as if never interrupted is in test_conformance.py) ----------------


def states_equal(one, other):
    return one["metadata"] == other["metadata"] and all(
        torch.equal(one["tensors"][name].nan_to_num(-1), other["tensors"][name].nan_to_num(-1))
        for name in one["tensors"]
    )


def some_pruner(policy=None, num_samples=20, **settings):
    settings = {"batch_size": 4, "num_epochs": 3, "fingerprint": "cifar", **settings}
    return DynamicPruner(policy or UCB(0.5), num_samples, **settings)


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
        ({"num_samples": 21}, "number of samples: 20 there", "21 here"),
        ({"fingerprint": "imagenet"}, "dataset fingerprint: 'cifar' there", "'imagenet' here"),
        ({"batch_size": 5}, "global batch: 4 there", "5 here"),
        ({"accumulation": 2}, "gradient accumulation: 1 there", "2 here"),
        ({"drop_last": True}, "drop_last: False there", "True here"),
        ({"seed": 1, "data_seed": 0}, "(seed: 0 there", "1 here)"),
        ({"data_seed": 7}, "(data seed: 0 there", "7 here)"),
    ],
)
@pytest.mark.parametrize("by_file", [False, True])
def test_state_of_another_run_is_refused_and_nothing_changes(
    tmp_path, settings, theirs, ours, by_file
):
    source, target = trained(), some_pruner(**settings)
    target.begin_epoch(0)
    target.observe(torch.arange(4), {"loss": torch.ones(4)})
    before = copy.deepcopy(target.state_dict())
    source.save(tmp_path)
    load = (
        (lambda: target.load(tmp_path))
        if by_file
        else (lambda: target.load_state_dict(source.state_dict()))
    )
    with pytest.raises(
        ValueError, match=r"belongs to another run \(.*\)\. Resume with the settings of the"
    ) as caught:
        load()
    assert theirs in str(caught.value)
    assert ours in str(caught.value)
    after = copy.deepcopy(target.state_dict())
    for state in (before, after):
        state["metadata"]["report"].pop("totals")
        for record in state["metadata"]["report"]["epochs"]:
            record.pop("seconds")
    assert states_equal(before, after)


def test_state_of_another_format_is_refused():
    state = trained().state_dict()
    state["metadata"]["format_version"] = 99
    with pytest.raises(ValueError, match="format_version 99; this version reads 1"):
        some_pruner().load_state_dict(state)


def test_longer_run_may_be_resumed():
    source, target = trained(), some_pruner(num_epochs=9)
    assert target.load_state_dict(source.state_dict()) == (1, 2)
    assert target.clock.total == 9 * 3


def test_place_where_a_run_goes_on():
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
    assert places == [
        (0, 0),
        (0, 1),
        (0, 2),
        (1, 0),
        (1, 0),
        (1, 1),
        (1, 2),
        (2, 0),
        (2, 0),
        (2, 1),
        (2, 2),
        (3, 0),
    ]


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
    assert set(tensors) == {
        "table.mean",
        "table.variance",
        "table.times_kept",
        "table.last_observed",
        "plan.indices",
    }
    assert metadata["report"]["epochs"][1]["learning_rate"] == 0.125
    assert target.load(tmp_path / "checkpoint-5") == (1, 2)
    assert all(
        torch.equal(column.nan_to_num(-1), target.table[name].nan_to_num(-1))
        for name, column in source.table.state_dict().items()
    )


def test_weights_and_learning_rate_are_resumed(tmp_path):
    policy = Given((plan_of(3, 1, weights=[2.5, 0.5], lr_scale=0.25),), period=5)
    source, target = DynamicPruner(policy, 4, num_epochs=2), DynamicPruner(policy, 4, num_epochs=2)
    source.begin_epoch(0)
    source.observe(torch.tensor([3]))
    source.save(tmp_path)
    assert target.load(tmp_path) == (0, 1)
    target.begin_epoch(0)
    assert target.weights(torch.tensor([3, 1, -1])).tolist() == [2.5, 0.5, 0.0]
    assert target.lr_scale == 0.25
    target.begin_epoch(1)  # held: `plans` has no second
    assert sorted(target.sampler) == [1, 3]
    assert target.lr_scale == 0.25


@pytest.mark.parametrize(
    ("epochs", "step", "expected"),
    [
        (2, 6, [(0, 3, 7), (1, 3, 7)]),
        (1.5, 5, [(0, 3, 7), (1, 2, 4)]),  # 5 of 1.5 epochs: 3 1/3, and half of 7 samples
        (0, 0, []),
    ],
)
def test_run_without_our_state_is_charged_as_full_data(epochs, step, expected):
    pruner = DynamicPruner(UCB(0.4), 7, batch_size=2, num_epochs=4)
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


def test_a_policys_own_columns_are_saved(tmp_path):
    @dataclass(frozen=True)
    class Counting(PruningPolicy):
        columns = (Column("seen", torch.int16, 0),)

        @property
        def signals(self):
            return ("loss",)

        def observe(self, rows, signals):
            return {"seen": rows["seen"] + 1}

        def plan(self, table, *, score, epoch, progress, generator):
            assert score is None
            return EpochPlan(torch.arange(4) + epoch)

    source, target = some_pruner(policy=Counting()), some_pruner(policy=Counting())
    for epoch in range(3):
        kept(source, epoch, losses=range(20))
    source.save(tmp_path)
    target.load(tmp_path)
    assert target.table["seen"].tolist() == [1, 2, 3, 3, 2, 1] + [0] * 14
    assert target.table["seen"].dtype == torch.int16
