"""SampleTable and the memories: observations in the order given, and what is not a number."""

import copy
import math
import os
from dataclasses import FrozenInstanceError, dataclass
from itertools import pairwise

import pytest
import torch
from choosing import INF, NAN
from hypothesis import given
from hypothesis import strategies as st

from hf_dynprune import table as module
from hf_dynprune.files import load_tensors, save_tensors
from hf_dynprune.table import (
    Column,
    Counts,
    History,
    Last,
    Memories,
    Memory,
    MovingMean,
    MovingVariance,
    SampleTable,
)


class Fold(Memory):
    """Its result depends on the order of observations; exact in float64 for whole numbers."""

    columns = (Column("fold", torch.float64, 1.0), Column("count", torch.int32, 0))
    signals = ("loss",)

    def observe(self, rows, signals):
        return {"fold": rows["fold"] / 2 + signals["loss"], "count": rows["count"] + 1}


@dataclass
class Doing(Memory):
    """Calls a function; keeps the columns that it is given."""

    update: object
    columns: tuple = Fold.columns
    signals: tuple = ("loss",)

    def observe(self, rows, signals):
        return self.update(rows, signals)


FOLDED, FOLD = Fold(), Fold.columns
MOMENTS = MovingVariance("loss", 0.8)


def observed(table, index, loss, epoch=0, memory=FOLDED):
    index, loss = torch.tensor(index, dtype=torch.int64), torch.tensor(loss, dtype=torch.float32)
    return table.observe(index, {"loss": loss}, memory=memory, epoch=epoch)


def example_table() -> SampleTable:
    table = SampleTable(7, MOMENTS.columns)
    for epoch, loss in enumerate(([0.5, 1.5, NAN, 3.0], [0.25, 1.0, 2.0, INF])):
        observed(table, [0, 2, 4, 6], loss, epoch, MOMENTS)
    table["times_kept"][1] = 3
    return table


def equal(one: SampleTable, other: SampleTable) -> bool:
    return set(one.columns) == set(other.columns) and all(
        a.dtype == other[name].dtype
        and torch.equal(a.nan_to_num(nan=-7.0), other[name].nan_to_num(nan=-7.0))
        for name, a in one.state_dict().items()
    )


# ---- columns -------------------------------------------------------------------------------------


def test_new_table_holds_initial_values():
    table = SampleTable(3, (Column("mean"), Column("seen", torch.int16, 5)))
    assert len(table) == 3
    assert table.columns == ("mean", "seen", "times_kept", "last_observed")
    assert table["mean"].isnan().all()
    assert table["mean"].dtype == torch.float32
    assert table["seen"].tolist() == [5, 5, 5]
    assert table["seen"].dtype == torch.int16
    assert table["times_kept"].tolist() == [0, 0, 0]
    assert table["last_observed"].tolist() == [-1, -1, -1]
    assert table["times_kept"].dtype == table["last_observed"].dtype == torch.int32
    assert table.observed.tolist() == [False] * 3


@pytest.mark.parametrize("size", [0, -1])
def test_empty_table_is_refused(size):
    with pytest.raises(ValueError, match=f"{size} samples"):
        SampleTable(size)


@pytest.mark.parametrize("name", ["mean", "times_kept", "last_observed"])
def test_two_columns_of_one_name_are_refused(name):
    with pytest.raises(ValueError, match=f"'{name}'"):
        SampleTable(3, (Column("mean"), Column(name)))


# ---- observations --------------------------------------------------------------------------------


def test_observations_reach_their_own_samples_alone():
    table = SampleTable(5, FOLD)
    rejected = observed(table, [3, 0], [10.0, 20.0], epoch=4)
    assert table["fold"].tolist() == [1 / 2 + 20, 1, 1, 1 / 2 + 10, 1]
    assert table["last_observed"].tolist() == [4, -1, -1, 4, -1]
    assert table.observed.tolist() == [True, False, False, True, False]
    assert table["times_kept"].tolist() == [0] * 5
    assert rejected.tolist() == []
    assert rejected.dtype == torch.int64


def test_duplicates_are_applied_one_after_the_other():
    table = SampleTable(3, FOLD)
    observed(table, [1, 2, 1, 1], [8.0, 5.0, 4.0, 2.0])
    one = ((1 / 2 + 8) / 2 + 4) / 2 + 2
    assert table["fold"].tolist() == [1, one, 1 / 2 + 5]
    assert table["count"].tolist() == [0, 3, 1]


@given(st.data())
def test_observations_equal_a_slow_reference(data):
    n = data.draw(st.integers(1, 6))
    value = st.one_of(st.integers(-4, 4).map(float), st.sampled_from([NAN, INF, -INF]))
    calls = data.draw(
        st.lists(st.lists(st.tuples(st.integers(0, n - 1), value), max_size=12), max_size=4)
    )
    table = SampleTable(n, FOLD)
    folds, counts, last = [1.0] * n, [0] * n, [-1] * n
    for epoch, call in enumerate(calls):
        bad = []
        for i, u in call:
            last[i] = epoch
            if math.isfinite(u):
                folds[i], counts[i] = folds[i] / 2 + u, counts[i] + 1
            else:
                bad.append(i)
        rejected = observed(table, [i for i, _ in call], [u for _, u in call], epoch)
        assert sorted(rejected.tolist()) == sorted(bad)
    assert table["fold"].tolist() == folds
    assert table["count"].tolist() == counts
    assert table["last_observed"].tolist() == last


@pytest.mark.parametrize("twice", [False, True])
def test_many_observations_are_applied_in_blocks_alike(twice, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    index = torch.randperm(50, generator=generator)
    index = torch.cat([index, index[:7]]) if twice else index
    loss = torch.randint(9, (len(index),), generator=generator).float()
    tables = []
    for block in (3, 1 << 16):
        monkeypatch.setattr(module, "_BLOCK", block)
        tables.append(SampleTable(60, FOLD))
        observed(tables[-1], index.tolist(), loss.tolist())
    assert equal(*tables)


def test_a_column_is_read_when_it_is_asked_for():
    table, seen = SampleTable(4, FOLD), {}

    def look(rows, signals):
        seen.update(rows)
        return {}

    observed(table, [3, 1], [1.0, 2.0], epoch=2, memory=Doing(look))
    assert set(seen) == set(table.columns)
    assert seen["last_observed"].tolist() == [-1, -1]
    assert seen["fold"].tolist() == [1, 1]


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_what_is_not_finite_changes_nothing_but_last_observed(bad):
    table = SampleTable(4, FOLD)
    observed(table, [0, 1, 2], [3.0, 3.0, 3.0], epoch=0)
    rejected = observed(table, [0, 1, 3], [5.0, bad, bad], epoch=2)
    assert rejected.tolist() == [1, 3]
    assert table["fold"].tolist() == [(1 / 2 + 3) / 2 + 5, 1 / 2 + 3, 1 / 2 + 3, 1]
    assert table["count"].tolist() == [2, 1, 1, 0]
    assert table["last_observed"].tolist() == [2, 2, 0, 2]


def test_one_bad_signal_of_two_rejects_the_observation():
    table = SampleTable(3, (Column("sum"),))
    signals = {"loss": torch.tensor([1.0, 2.0, NAN]), "margin": torch.tensor([1.0, INF, 1.0])}
    both = Doing(lambda rows, s: {"sum": s["loss"] + s["margin"]}, table.columns, tuple(signals))
    rejected = table.observe(torch.arange(3), signals, memory=both, epoch=0)
    assert sorted(rejected.tolist()) == [1, 2]
    assert table["sum"][0] == 2
    assert table["sum"][1:].isnan().all()


def test_first_observation_that_is_nan_counts_as_observed_and_the_next_as_the_first():
    table = SampleTable(1, MOMENTS.columns)
    observed(table, [0], [NAN], 0, MOMENTS)
    assert table.observed.tolist() == [True]
    assert table["mean"].isnan().all()
    observed(table, [0], [2.0], 1, MOMENTS)
    assert table["mean"].tolist() == [2.0]
    assert table["variance"].tolist() == [0.0]


def test_without_signals_only_last_observed_changes():
    table = SampleTable(3)
    rejected = table.observe(torch.tensor([2]), {}, memory=Memories(), epoch=1)
    assert table["last_observed"].tolist() == [-1, -1, 1]
    assert len(rejected) == 0


def test_no_observation_at_all():
    table = SampleTable(3, FOLD)
    assert observed(table, [], []).tolist() == []
    assert table["last_observed"].tolist() == [-1] * 3


def test_index_out_of_range_is_refused():
    with pytest.raises(IndexError):
        observed(SampleTable(3, FOLD), [3], [1.0])


@pytest.mark.parametrize("name", ["median", "times_kept", "last_observed"])
def test_a_memory_writes_the_columns_that_it_declares(name):
    table = SampleTable(2, (Column("mean"),))
    undeclared = Doing(lambda rows, signals: {name: signals["loss"]}, (Column("mean"),))
    with pytest.raises(ValueError, match=rf"'{name}'.*\['mean'\]"):
        observed(table, [0], [1.0], memory=undeclared)


def test_a_memory_gets_the_rows_before_the_observation():
    seen = []
    table = SampleTable(4, FOLD)
    observed(table, [2], [1.0])

    def update(rows, signals):
        seen.append({name: row.tolist() for name, row in rows.items()})
        return Fold().observe(rows, signals)

    observed(table, [3, 2], [0.0, 0.0], epoch=1, memory=Doing(update))
    assert seen == [
        {"fold": [1.0, 1.5], "count": [0, 1], "times_kept": [0, 0], "last_observed": [-1, 0]}
    ]


# ---- memories ------------------------------------------------------------------------------------


MEMORIES = [
    Memories(),
    Last("loss"),
    Last("loss", "margin"),
    MovingMean("loss", 0.8),
    MovingVariance("margin", 0.3),
    History("loss", 3),
    Counts(),
    Memories(MovingMean("loss", 0.8), Last("label")),
]
every_memory = pytest.mark.parametrize("memory", MEMORIES, ids=repr)


@every_memory
def test_a_memory_is_a_value(memory):
    again = copy.deepcopy(memory)
    assert again == memory
    assert hash(again) == hash(memory)
    assert all(again != other for other in MEMORIES if other is not memory)
    name = next(iter(memory.__dataclass_fields__))
    with pytest.raises(FrozenInstanceError):
        setattr(memory, name, 1)


@every_memory
def test_observe_is_pure(memory):
    rows = {c.name: torch.tensor([c.initial, 1.0]).to(c.dtype) for c in memory.columns}
    before = {name: row.clone() for name, row in rows.items()}
    signals = {name: torch.tensor([2.0, 3.0]) for name in memory.signals}
    one, two = memory.observe(rows, signals), memory.observe(rows, signals)
    assert set(one) == set(rows)
    for name, row in rows.items():
        assert torch.equal(row.nan_to_num(-1), before[name].nan_to_num(-1))
        assert torch.equal(one[name].nan_to_num(-1), two[name].nan_to_num(-1))
    assert all(values.tolist() == [2.0, 3.0] for values in signals.values())


@every_memory
def test_a_table_keeps_a_memory(memory):
    table = SampleTable(3, memory.columns)
    for epoch in range(2):
        signals = {name: torch.tensor([float(epoch), 1.0]) for name in memory.signals}
        table.observe(torch.tensor([2, 0]), signals, memory=memory, epoch=epoch)
    new = SampleTable(3, memory.columns)
    for column in memory.columns:
        assert torch.equal(
            table[column.name][1:2].nan_to_num(-1), new[column.name][1:2].nan_to_num(-1)
        )
        assert table[column.name].dtype == column.dtype


def observations(memory, *rounds):
    """The table of samples that were observed in these rounds; a round has a value for each."""
    table = SampleTable(len(rounds[0]), memory.columns)
    for epoch, values in enumerate(rounds):
        signals = {name: torch.tensor(values) for name in memory.signals}
        table.observe(torch.arange(len(values)), signals, memory=memory, epoch=epoch)
    return table


def test_last_by_hand():
    table = observations(Last("loss", "margin"), [1.0, 2.0], [3.0, NAN])
    assert table["loss"].tolist() == table["margin"].tolist() == [3.0, 2.0]


def test_moving_mean_by_hand():
    table = observations(MovingMean("loss", 0.25), [4.0, 1.0], [8.0, 1.0], [0.0, NAN])
    assert table["mean"].tolist() == [3.75, 1.0]  # 0.75 * (0.75 * 4 + 0.25 * 8)


def test_the_moving_mean_of_one_value_is_that_value():
    table = observations(MovingMean("loss", 0.3), *[[0.7, 0.1]] * 9)
    assert torch.equal(table["mean"], torch.tensor([0.7, 0.1]))


def test_moving_variance_by_hand():
    table = observations(MovingVariance("loss", 0.25), [4.0], [8.0], [0.0])
    assert table["mean"].tolist() == [3.75]
    # 0.75 * (0.25 * (8 - 4)^2) + 0.25 * (0 - 5)^2, with the means before each observation.
    assert table["variance"].tolist() == [9.25]


def test_history_by_hand():
    table = observations(History("loss", 3), *([float(value)] for value in (1, 2, 3, 4)))
    assert [table[f"loss_{age}"].item() for age in range(3)] == [4.0, 3.0, 2.0]
    table = observations(History("margin", 3), [1.0], [NAN], [2.0])
    assert [table[f"margin_{age}"].nan_to_num(-1).item() for age in range(3)] == [2.0, 1.0, -1.0]


def test_counts_by_hand():
    rounds = [
        [1.0, 0.0, 0.0, 1.0],
        [0.0, 0.0, 1.0, 1.0],
        [1.0, 0.0, 0.0, NAN],
        [0.0, 0.0, 1.0, 0.0],
    ]
    table = observations(Counts(), *rounds)
    assert table["learned"].tolist() == [True, False, True, True]
    assert table["forgotten"].tolist() == [2, 0, 1, 1]
    assert table["presented"].tolist() == [4, 4, 4, 3]
    # Sample 1 was never learned: it counts the presentations of a run.
    events = Counts.forgetting_events(table)
    assert events.tolist() == [2.0, 4.0, 1.0, 1.0]
    assert events.dtype == torch.float32


@given(st.lists(st.lists(st.booleans(), min_size=3, max_size=3), min_size=1, max_size=8))
def test_counts_equal_a_slow_reference(rounds):
    table = observations(Counts(), *([float(right) for right in values] for values in rounds))
    for sample in range(3):
        right = [values[sample] for values in rounds]
        falls = sum(one and not two for one, two in pairwise(right))
        expected = falls if any(right) else len(rounds)
        assert Counts.forgetting_events(table)[sample] == expected


def test_memories_side_by_side():
    memory = Memories(MovingMean("loss", 0.8), Last("label"), History("loss", 2))
    assert memory.signals == ("loss", "label")  # each once
    assert [column.name for column in memory.columns] == ["mean", "label", "loss_0", "loss_1"]
    table = SampleTable(2, memory.columns)
    signals = {"loss": torch.tensor([1.0, 2.0]), "label": torch.tensor([3.0, 0.0])}
    table.observe(torch.tensor([1, 0]), signals, memory=memory, epoch=0)
    assert table["mean"].tolist() == table["loss_0"].tolist() == [2.0, 1.0]
    assert table["label"].tolist() == [0.0, 3.0]
    assert Memories(Memories(), memory).columns == memory.columns


def test_two_memories_that_share_a_column_are_refused():
    both = Memories(MovingMean("loss", 0.8), MovingVariance("margin", 0.8))
    with pytest.raises(ValueError, match="'mean'"):
        SampleTable(3, both.columns)


def test_memories_without_any_part():
    assert Memories().columns == Memories().signals == ()


# ---- state and files -----------------------------------------------------------------------------


def test_state_dict_round_trip():
    table, other = example_table(), SampleTable(7, MOMENTS.columns)
    other.load_state_dict(table.state_dict())
    assert equal(table, other)
    observed(other, [0], [9.0], 5, MOMENTS)  # a copy: the first table stays
    assert table["last_observed"][0] == 1


@pytest.mark.parametrize(
    ("size", "columns"),
    [
        (8, MOMENTS.columns),
        (7, ()),
        (7, (Column("mean"), *FOLD)),
        (7, (Column("mean"), Column("variance", torch.float64))),
    ],
)
def test_load_state_dict_refuses_another_table_and_changes_nothing(size, columns):
    table, before = SampleTable(size, columns), SampleTable(size, columns)
    with pytest.raises(ValueError, match=r"'mean': \(\(7,\), torch.float32\)"):
        table.load_state_dict(example_table().state_dict())
    assert equal(table, before)


def test_save_and_load_round_trip(tmp_path):
    table = example_table()
    table.save(tmp_path / "table.safetensors", {"note": "ε × 3", "list": [1, None, 2.5]})
    again = SampleTable.load(str(tmp_path / "table.safetensors"))
    assert equal(table, again)
    assert len(again) == 7
    _, metadata = load_tensors(tmp_path / "table.safetensors")
    assert metadata == {"note": "ε × 3", "list": [1, None, 2.5]}
    assert os.listdir(tmp_path) == ["table.safetensors"]


def test_file_of_ours_that_is_no_table_is_refused(tmp_path):
    save_tensors(tmp_path / "plan", {"indices": torch.arange(3)}, {})
    with pytest.raises(ValueError, match=r"plan.*\['indices'\]"):
        SampleTable.load(tmp_path / "plan")


def test_a_table_of_given_columns():
    columns = SampleTable(3, FOLD).state_dict()
    table = SampleTable.from_columns(columns)
    assert equal(table, SampleTable(3, FOLD))
    del columns["times_kept"]
    with pytest.raises(ValueError, match=r"times_kept"):
        SampleTable.from_columns(columns)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"times_kept": torch.ones(3)}, r"'times_kept'.*float32.*int32"),
        ({"last_observed": torch.ones(3, dtype=torch.bool)}, r"'last_observed'.*bool.*int32"),
        ({"times_kept": torch.ones(3, 1, dtype=torch.int32)}, r"'times_kept'.*\(3, 1\)"),
        ({"loss": torch.ones(2)}, r"'loss'.*\(2,\)"),
        ({"loss": torch.ones(())}, r"'loss'.*\(\)"),
        ({"times_kept": torch.tensor([0, -1, 0], dtype=torch.int32)}, "'times_kept'.*negative"),
    ],
)
def test_columns_that_are_no_table(changes, message, tmp_path):
    table = SampleTable(3, (Column("loss"),))
    columns = {**table.state_dict(), **changes}
    with pytest.raises(ValueError, match=message):
        SampleTable.from_columns(columns)
    save_tensors(tmp_path / "t.safetensors", columns, {})
    with pytest.raises(ValueError, match=rf"t\.safetensors.*{message}"):
        SampleTable.load(tmp_path / "t.safetensors")


def test_missing_table_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.safetensors"):
        SampleTable.load(tmp_path / "none.safetensors")
