"""RunShape, the planned epochs of a policy, what they cost, and the clock by hand."""

import itertools
import math
from dataclasses import dataclass, replace

import pytest
from choosing import INF, NAN

from hf_dynprune.policies import (
    UCB,
    FullData,
    InfoBatch,
    PruningPolicy,
    RandomPruning,
    StaticPruning,
)
from hf_dynprune.schedule import (
    Clock,
    RunShape,
    epoch_costs,
    is_choice,
    is_full_data,
    planned_epochs,
)

# ---- run shapes ----------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", [{}, {"num_epochs": 3, "max_steps": 5}])
def test_one_budget_is_given(budget):
    values = {"num_epochs": None, "max_steps": None, **budget}
    found = ".*".join(f"{name}={value}" for name, value in values.items())
    with pytest.raises(ValueError, match=found):
        RunShape(10, **budget)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("samples", 0),
        ("samples", -3),
        ("samples", 2.0),
        ("batch_size", 0),
        ("batch_size", -4),
        ("batch_size", 2.5),
        ("accumulation", 0),
        ("accumulation", -1),
        ("ranks", 0),
        ("ranks", True),
        ("drop_last", 1),
        ("drop_last", None),
        ("max_steps", 0),
        ("max_steps", 2.5),
        ("num_epochs", 0),
        ("num_epochs", -1.5),
        ("num_epochs", "3"),
        ("num_epochs", NAN),
        ("num_epochs", INF),
    ],
)
def test_value_out_of_range_is_named(name, value):
    budget = {} if name in ("num_epochs", "max_steps") else {"num_epochs": 2}
    with pytest.raises((TypeError, ValueError), match=f"{name}={value!r}"):
        RunShape(**{"samples": 100, **budget, name: value})


def test_budget_and_options_are_keyword_only():
    with pytest.raises(TypeError):
        RunShape(100, 8, 3)


def test_a_shape_is_a_value():
    shape = RunShape(100, 8, num_epochs=3)
    assert shape == RunShape(samples=100, batch_size=8, num_epochs=3)
    assert shape != replace(shape, ranks=2)
    assert hash(shape) == hash(RunShape(100, 8, num_epochs=3))


@pytest.mark.parametrize(
    ("settings", "size", "batches", "steps"),
    [
        ({"batch_size": 10}, 30, 3, 3),
        ({"batch_size": 8}, 30, 4, 4),  # 3.75
        ({"batch_size": 8, "drop_last": True}, 30, 3, 3),
        ({"batch_size": 4, "accumulation": 3}, 30, 8, 3),
        ({"batch_size": 4, "accumulation": 3, "drop_last": True}, 30, 7, 3),
        ({"batch_size": 4, "accumulation": 100}, 30, 8, 1),
        ({"batch_size": 4, "ranks": 3}, 30, 3, 3),  # 2.5 global batches of 12
        ({"batch_size": 4, "ranks": 3, "drop_last": True, "accumulation": 2}, 30, 2, 1),
    ],
)
def test_batches_and_steps_of_an_epoch(settings, size, batches, steps):
    shape = RunShape(100, num_epochs=1, **settings)
    assert shape.global_batch == settings["batch_size"] * settings.get("ranks", 1)
    assert (shape.batches(size), shape.steps(size)) == (batches, steps)


def test_a_budget_says_what_is_spent():
    epochs, steps = RunShape(10, num_epochs=2.5), RunShape(10, max_steps=20)
    assert epochs.budget.progress(1, 99) == 0.4
    assert steps.budget.progress(1, 5) == 0.25
    assert [epochs.budget.is_spent(epoch, 0) for epoch in (2, 3)] == [False, True]
    assert [steps.budget.is_spent(0, step) for step in (19, 20)] == [False, True]


def test_an_epoch_that_would_train_on_nothing_is_refused():
    shape = RunShape(10, 4, num_epochs=1, drop_last=True)
    shape.check_size(0, 4)
    with pytest.raises(ValueError, match=r"Epoch 7 .*\b3 of 10.*\b4\b"):
        shape.check_size(7, 3)
    replace(shape, drop_last=False).check_size(0, 1)


# ---- planned epochs ------------------------------------------------------------------------------


@dataclass(frozen=True)
class OfUnknownSize(PruningPolicy):
    """Its sizes depend on the data."""

    def plan(self, choice):
        raise AssertionError("a schedule makes no choice")


def test_planned_epochs_by_hand():
    policy = UCB(0.3, first=1, period=2, last=0.25)
    planned = list(planned_epochs(policy, RunShape(100, num_epochs=8)))
    assert [epoch.size for epoch in planned] == [100, *[30] * 5, 100, 100]
    assert [epoch.full_data for epoch in planned] == [True, *[False] * 5, True, True]
    chooses = [False, True, False, True, False, True, False, False]
    assert [epoch.chooses for epoch in planned] == chooses


def test_planned_epochs_of_unknown_size():
    shape = RunShape(100, num_epochs=4)
    planned = list(planned_epochs(OfUnknownSize(period=2), shape))
    assert planned == [(None, False, True), (None, False, False)] * 2
    assumed = list(planned_epochs(OfUnknownSize(period=2), shape, share=0.25))
    assert assumed == [(25, False, True), (25, False, False)] * 2
    assert next(planned_epochs(OfUnknownSize(), shape, share=1e-9)).size == 1


def test_an_assumed_share_changes_no_size_that_is_known():
    shape = RunShape(100, num_epochs=4)
    policy = RandomPruning(0.3, first=1)
    assert list(planned_epochs(policy, shape, share=0.9)) == list(planned_epochs(policy, shape))


def test_an_epoch_of_unknown_size_counts_as_one_step():
    assert len(list(planned_epochs(OfUnknownSize(), RunShape(100, max_steps=7)))) == 7


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
        ({"last": 0.3}, 10, [7, 8, 9]),  # in floats 1 - 0.3 is not 0.7
        ({"last": 0.1}, 10, [9]),
        ({"last": 1.0}, 3, [0, 1, 2]),
        ({"first": 1, "last": 0.5}, 4, [0, 2, 3]),
        ({"last": 0.4}, 2.5, [2]),  # 1.5 to 2.5 of 2.5: the third begins at 0.8
        ({"last": 0.6}, 2.5, [1, 2]),
    ],
)
def test_full_data_epochs(settings, num_epochs, expected):
    policy = RandomPruning(0.5, **settings)
    planned = list(planned_epochs(policy, RunShape(10, num_epochs=num_epochs)))
    assert [number for number, epoch in enumerate(planned) if epoch.full_data] == expected
    assert all(epoch.size == (10 if epoch.full_data else 5) for epoch in planned)
    for number, epoch in enumerate(planned):
        assert is_full_data(policy, number, number / num_epochs) == epoch.full_data


@pytest.mark.parametrize("num_epochs", [3, 7, 10, 30, 90])
def test_share_of_whole_epochs_gives_that_many(num_epochs):
    shape = RunShape(10, num_epochs=num_epochs)
    for epochs in range(num_epochs + 1):
        planned = planned_epochs(RandomPruning(0.5, last=epochs / num_epochs), shape)
        assert sum(epoch.full_data for epoch in planned) == epochs


def test_last_is_a_share_of_the_steps_if_steps_are_the_budget():
    shape = RunShape(100, batch_size=10, max_steps=30)
    sizes = [epoch.size for epoch in planned_epochs(RandomPruning(0.3, last=0.5), shape)]
    assert sizes == [30] * 5 + [100] * 2


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        (RandomPruning(), [True, True, True, True]),
        (RandomPruning(period=3), [True, False, False, True]),
        (RandomPruning(period=3, first=2), [False, False, True, False]),
        (StaticPruning(keep="random"), [False, False, False, False]),
    ],
)
def test_a_choice_is_due_by_period(policy, expected):
    assert [is_choice(policy, epoch, has_plan=True) for epoch in range(4)] == expected
    assert all(is_choice(policy, epoch, has_plan=False) for epoch in range(4))


@pytest.mark.parametrize(
    "policy", [RandomPruning(0.3), RandomPruning(0.3, first=1), UCB(0.3, last=0.5)]
)
def test_size_below_a_batch_is_refused_with_drop_last(policy):
    shape = RunShape(10, batch_size=4, num_epochs=3, drop_last=True)
    for ask in (planned_epochs, epoch_costs):
        with pytest.raises(ValueError, match=r"\b3 of 10.*\b4\b"):
            list(ask(policy, shape))
    with pytest.raises(ValueError, match=r"\b3 of 10"):
        Clock.of(policy, shape)
    assert Clock.of(policy, replace(shape, drop_last=False)).num_epochs == 3


# ---- costs ---------------------------------------------------------------------------------------

# That a pruner trains these numbers, for every policy, is tested in test_invariants.py.


def test_costs_by_hand():
    shape = RunShape(100, batch_size=8, num_epochs=4.5)
    costs = list(epoch_costs(RandomPruning(0.3, first=1), shape))
    # 30 samples are 4 batches, the last one of 6. Half an epoch is 2 of its 4 steps.
    assert costs == [(13, 100, 0), (4, 30, 0), (4, 30, 0), (4, 30, 0), (2, 15, 0)]


def test_costs_of_a_budget_in_steps():
    shape = RunShape(100, batch_size=10, max_steps=12)
    assert list(epoch_costs(RandomPruning(0.3, first=1), shape)) == [(10, 100, 0), (2, 20, 0)]


@pytest.mark.parametrize(
    ("settings", "scored"),
    [
        ({"scoring": "trained"}, [0, 0, 0, 0, 0]),
        ({"scoring": "all"}, [100, 100, 100, 100, 100]),
        ({"scoring": "all", "first": 1, "period": 2}, [0, 100, 0, 100, 0]),
        ({"scoring": "dropped"}, [0, 70, 70, 70, 70]),
        ({"scoring": "dropped", "first": 1, "period": 2}, [0, 0, 0, 70, 0]),
    ],
)
def test_scoring_passes_are_foretold(settings, scored):
    costs = epoch_costs(UCB(0.3, **settings), RunShape(100, 10, num_epochs=5))
    assert [cost.scored for cost in costs] == scored


def test_costs_of_unknown_sizes_need_a_share():
    shape = RunShape(100, 10, num_epochs=2)
    with pytest.raises(ValueError, match=r"epoch 0.*InfoBatch"):
        list(epoch_costs(InfoBatch(), shape))
    costs = list(epoch_costs(InfoBatch(last=0.0), shape, share=0.75))
    assert costs == [(8, 75, 0), (8, 75, 0)]


# ---- the clock -----------------------------------------------------------------------------------


def virtual_steps(policy, shape):
    """The virtual step after each optimizer step, epoch by epoch, if all sizes are known."""
    clock, step, seen = Clock.of(policy, shape), 0, []
    for epoch, planned in enumerate(planned_epochs(policy, shape)):
        length = shape.steps(planned.size)
        clock.begin_epoch(epoch, step, length)
        seen.append([clock.virtual(step + k) for k in range(1, length + 1)])
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
    policy, shape = RandomPruning(0.3), RunShape(100, num_epochs=4, **settings)
    clock = Clock.of(policy, shape)
    assert clock.num_epochs == 4
    assert clock.total == clock.total_steps() == 4 * length
    seen = list(itertools.chain(*virtual_steps(policy, shape)))
    assert seen == list(range(1, 4 * length + 1))
    assert all(type(v) is int for v in seen)
    assert type(clock.total) is int


def test_varying_lengths_follow_the_budget():
    # 10 steps on all data, then 3 and 3: F = 16/3, T = 16.
    policy, shape = RandomPruning(0.3, first=1), RunShape(100, batch_size=10, num_epochs=3)
    clock = Clock.of(policy, shape)
    assert clock.total == clock.total_steps() == 16
    first, second, third = virtual_steps(policy, shape)
    mean = clock.mean
    assert mean == 16 / 3
    assert first == pytest.approx([mean * k / 10 for k in range(1, 11)])
    assert second == pytest.approx([mean + mean * k / 3 for k in (1, 2, 3)])
    assert third == pytest.approx([2 * mean + mean * k / 3 for k in (1, 2, 3)])
    assert third[-1] == pytest.approx(16)
    assert third[-1] <= 16


def test_varying_lengths_of_a_whole_mean():
    # 10 steps on all data, then 4 and 4: F = 6, T = 18.
    policy, shape = RandomPruning(0.4, first=1), RunShape(100, batch_size=10, num_epochs=3)
    clock = Clock.of(policy, shape)
    assert clock.total == clock.total_steps() == 18
    seen = virtual_steps(policy, shape)
    assert [epoch[-1] for epoch in seen] == [6, 12, 18]
    assert seen[1] == pytest.approx([6 + 1.5, 6 + 3, 6 + 4.5, 6 + 6])


@pytest.mark.parametrize(
    ("keep_ratio", "length", "total"),
    [(0.3, 3, 8), (0.4, 4, 10)],  # ceil(2.5 * 3), 2.5 * 4
)
def test_fractional_epochs(keep_ratio, length, total):
    policy, shape = RandomPruning(keep_ratio), RunShape(100, batch_size=10, num_epochs=2.5)
    clock = Clock.of(policy, shape)
    assert clock.num_epochs == 3
    assert clock.total == clock.total_steps() == total
    seen = list(itertools.chain(*virtual_steps(policy, shape)))
    assert seen == [min(step, total) for step in range(1, 3 * length + 1)]  # clamped
    assert all(type(v) is int for v in seen)


def test_fractional_epochs_of_varying_lengths():
    # Lengths 10, 3, 3: F = 16/3. The half epoch at the end has ceil(1.5) = 2 steps.
    shape = RunShape(100, batch_size=10, num_epochs=2.5)
    clock = Clock.of(RandomPruning(0.3, first=1), shape)
    assert clock.total == 14  # ceil(16/3 * 2.5)
    assert clock.total_steps() == 10 + 3 + 2


@pytest.mark.parametrize(
    ("policy", "n", "num_epochs", "total"),
    [
        (FullData(), 250, 2.2, 55),  # in floats 25 * 2.2 = 55.00000000000001
        (FullData(), 250, 4.4, 110),
        (FullData(), 100, 0.3, 3),
        (RandomPruning(0.8, first=1), 50, 7, 29),  # 5 + 6 * 4; 29 / 7 * 7 = 29.000000000000004
    ],
)
def test_total_is_not_one_more_by_rounding(policy, n, num_epochs, total):
    clock = Clock.of(policy, RunShape(n, batch_size=10, num_epochs=num_epochs))
    assert clock.total == total
    assert clock.num_epochs == math.ceil(num_epochs)


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
    shape = RunShape(100, batch_size=10, max_steps=max_steps)
    clock = Clock.of(policy, shape)
    assert clock.total == clock.total_steps() == max_steps
    assert clock.mean is None
    assert clock.num_epochs == epochs
    seen = list(itertools.chain(*virtual_steps(policy, shape)))
    assert seen[:max_steps] == list(range(1, max_steps + 1))


def test_unknown_sizes_are_assumed_to_be_all_data():
    shape = RunShape(100, batch_size=10, num_epochs=3)
    clock = Clock.of(OfUnknownSize(), shape)
    assert clock.total == clock.total_steps() == 30
    totals = []
    for epoch, (step, size) in enumerate([(0, 20), (2, 50), (7, 90)]):
        clock.begin_epoch(epoch, step, shape.steps(size))
        totals.append(clock.total_steps())
    assert totals == [2 + 10 + 10, 2 + 5 + 10, 2 + 5 + 9]
    assert clock.virtual(7 + 9) == 30  # F * 3
    assert clock.virtual(7 + 3) == pytest.approx(20 + 10 * 3 / 9)


def test_a_clock_past_its_last_epoch_has_no_more_steps():
    clock = Clock.of(FullData(), RunShape(100, batch_size=10, num_epochs=2))
    clock.begin_epoch(2, 20, 10)
    assert clock.total_steps() == 20
    assert clock.virtual(20) == 20


# ---- shares of a run -----------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.1, 0.25, 0.3, 1.0])
@pytest.mark.parametrize("lengths", [(10, 5, 3, 8), (1, 1, 1, 1), (7, 7, 7, 7)])
def test_each_share_of_a_run_has_one_step(share, lengths):
    clock = Clock.of(RandomPruning(0.5), RunShape(80, 8, num_epochs=len(lengths)))
    start, found = 0, []
    for epoch, length in enumerate(lengths):
        clock.begin_epoch(epoch, start, length)
        step = start
        while (step := clock.next_step(step, share)) <= start + length:
            done, before = clock.virtual(step) / clock.total, clock.virtual(step - 1) / clock.total
            assert math.floor(done / share + 1e-6) > math.floor(before / share + 1e-6)
            found.append(step)
        assert step == start + length + 1
        start += length
    if sum(lengths) > 10:
        assert len(found) == math.floor(1 / share + 1e-9)


def test_a_clock_knows_whether_its_steps_are_known():
    known, unknown = RandomPruning(0.5), InfoBatch()
    assert Clock.of(known, RunShape(80, 8, num_epochs=4)).is_exact
    assert not Clock.of(unknown, RunShape(80, 8, num_epochs=4)).is_exact
    assert Clock.of(unknown, RunShape(80, 8, max_steps=40)).is_exact
