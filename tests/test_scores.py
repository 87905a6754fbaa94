"""SampleTable: observations in the order given, what is not a number, and a file that is whole or not at all."""

import json
import math
import os
import re
import struct

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hf_dynprune.policies import UCB
from hf_dynprune.scores import Column, SampleTable, Scores, load_tensors, save_tensors

NAN, INF = math.nan, math.inf

# A rule whose result depends on the order of the observations, exact in float64 for small whole numbers.
FOLD = (Column("fold", torch.float64, 1.0), Column("count", torch.int32, 0))


def fold(rows, signals):
    return {"fold": rows["fold"] / 2 + signals["loss"], "count": rows["count"] + 1}


def observed(table, index, loss, epoch=0, update=fold):
    index, loss = torch.tensor(index, dtype=torch.int64), torch.tensor(loss, dtype=torch.float32)
    return table.observe(index, {"loss": loss}, update=update, epoch=epoch)


def example_table() -> SampleTable:
    table = SampleTable(7, UCB.columns)
    for epoch, loss in enumerate(([0.5, 1.5, NAN, 3.0], [0.25, 1.0, 2.0, INF])):
        observed(table, [0, 2, 4, 6], loss, epoch, UCB().observe)
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
    with pytest.raises(ValueError, match=f"{size} samples.*at least 1"):
        SampleTable(size)


@pytest.mark.parametrize("name", ["mean", "times_kept", "last_observed"])
def test_two_columns_of_one_name_are_refused(name):
    with pytest.raises(ValueError, match=f"Two columns are called '{name}'"):
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
        monkeypatch.setattr("hf_dynprune.scores._BLOCK", block)
        tables.append(SampleTable(60, FOLD))
        observed(tables[-1], index.tolist(), loss.tolist())
    assert equal(*tables)


def test_a_column_is_read_when_it_is_asked_for():
    table, seen = SampleTable(4, FOLD), {}

    def look(rows, signals):
        seen.update(rows)
        return {}

    observed(table, [3, 1], [1.0, 2.0], epoch=2, update=look)
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
    rejected = table.observe(
        torch.arange(3), signals, update=lambda rows, s: {"sum": s["loss"] + s["margin"]}, epoch=0
    )
    assert sorted(rejected.tolist()) == [1, 2]
    assert table["sum"][0] == 2
    assert table["sum"][1:].isnan().all()


def test_first_observation_that_is_nan_counts_as_observed_and_the_next_as_the_first():
    policy, table = UCB(), SampleTable(1, UCB.columns)
    observed(table, [0], [NAN], 0, policy.observe)
    assert table.observed.tolist() == [True]
    assert table["mean"].isnan().all()
    observed(table, [0], [2.0], 1, policy.observe)
    assert table["mean"].tolist() == [2.0]
    assert table["variance"].tolist() == [0.0]


def test_without_signals_only_last_observed_changes():
    table = SampleTable(3)
    rejected = table.observe(torch.tensor([2]), {}, update=lambda rows, signals: {}, epoch=1)
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
def test_policy_may_write_its_own_columns_only(name):
    table = SampleTable(2, (Column("mean"),))
    with pytest.raises(ValueError, match=f"returned '{name}'.*\\['mean'\\].*Declare"):
        observed(table, [0], [1.0], update=lambda rows, signals: {name: signals["loss"]})


def test_update_gets_the_rows_before_the_observation():
    seen = []
    table = SampleTable(4, FOLD)
    observed(table, [2], [1.0])

    def update(rows, signals):
        seen.append({name: row.tolist() for name, row in rows.items()})
        return fold(rows, signals)

    observed(table, [3, 2], [0.0, 0.0], epoch=1, update=update)
    assert seen == [
        {"fold": [1.0, 1.5], "count": [0, 1], "times_kept": [0, 0], "last_observed": [-1, 0]}
    ]


# ---- state and files -----------------------------------------------------------------------------


def test_state_dict_round_trip():
    table, other = example_table(), SampleTable(7, UCB.columns)
    other.load_state_dict(table.state_dict())
    assert equal(table, other)
    observed(other, [0], [9.0], 5, UCB().observe)  # a copy: the first table stays
    assert table["last_observed"][0] == 1


@pytest.mark.parametrize(
    ("size", "columns"),
    [
        (8, UCB.columns),
        (7, ()),
        (7, (Column("mean"), *FOLD)),
        (7, (Column("mean"), Column("variance", torch.float64))),
    ],
)
def test_load_state_dict_refuses_another_table_and_changes_nothing(size, columns):
    table, before = SampleTable(size, columns), SampleTable(size, columns)
    with pytest.raises(
        ValueError, match=r"saved table has the columns .*'mean': \(\(7,\), torch.float32\)"
    ):
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


@pytest.mark.parametrize(
    "dtype", [torch.int64, torch.float16, torch.bool, torch.uint8, torch.float64]
)
def test_other_dtypes_round_trip(tmp_path, dtype):
    tensors = {
        "a": torch.tensor([0, 1, 1]).to(dtype),
        "transposed": torch.arange(6).view(2, 3).T,
        "empty": torch.empty(0),
    }
    save_tensors(tmp_path / "x", tensors, {})
    again, _ = load_tensors(tmp_path / "x")
    assert all(
        torch.equal(tensors[name], again[name]) and again[name].dtype == tensors[name].dtype
        for name in tensors
    )


def test_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.safetensors does not exist"):
        SampleTable.load(tmp_path / "none.safetensors")


def damaged(path, content: bytes) -> None:
    path.write_bytes(content)
    with pytest.raises(ValueError, match=re.escape(str(path))) as caught:
        SampleTable.load(path)
    assert "Use an older checkpoint" in str(caught.value)


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "table.safetensors"
    example_table().save(path, {"epoch": 3})
    return path


def test_truncated_at_every_length(saved):
    whole = saved.read_bytes()
    for length in range(len(whole)):
        damaged(saved, whole[:length])


def test_any_flipped_bit_is_noticed(saved):
    whole = saved.read_bytes()
    header = 8 + struct.unpack("<Q", whole[:8])[0]
    assert header < len(whole) - 7 * 4 * 3  # data behind the header: both are walked through
    for offset in range(len(whole)):
        flipped = bytearray(whole)
        flipped[offset] ^= 1 << (offset % 8)
        damaged(saved, bytes(flipped))


def test_bytes_added_are_noticed(saved):
    damaged(saved, saved.read_bytes() + b"\0")


@pytest.mark.parametrize(
    "content", [b"", b"{}", b"\0" * 8, b"\xff" * 200, json.dumps({"a": 1}).encode()]
)
def test_foreign_bytes_are_refused(tmp_path, content):
    damaged(tmp_path / "foreign", content)


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}, {"hf_dynprune": "{}"}])
def test_foreign_safetensors_file_is_refused(tmp_path, metadata):
    from safetensors.torch import save_file

    save_file(
        {"w": torch.zeros(3), "b": torch.zeros(2, dtype=torch.bfloat16)},
        tmp_path / "model.safetensors",
        metadata,
    )
    damaged(tmp_path / "model.safetensors", (tmp_path / "model.safetensors").read_bytes())


def test_file_of_ours_that_is_no_table_is_refused(tmp_path):
    save_tensors(tmp_path / "plan", {"indices": torch.arange(3)}, {})
    with pytest.raises(ValueError, match=r"plan holds the columns \['indices'\], not a table"):
        SampleTable.load(tmp_path / "plan")


def test_second_save_replaces_the_first(saved):
    table = SampleTable(2)
    table.save(saved)
    assert len(SampleTable.load(saved)) == 2
    assert load_tensors(saved)[1] == {}


def no_room(path):
    """The disk is full after 500 bytes."""
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500, hard))
    try:
        SampleTable(10_000).save(path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def no_json(path):
    SampleTable(3).save(path, {"policy": object()})


def unwritable_tensor(path):
    save_tensors(path, {"a": torch.zeros(3, device="meta")}, {})


@pytest.mark.parametrize(
    ("fail", "message"), [(no_room, "too large"), (no_json, "JSON"), (unwritable_tensor, "meta")]
)
def test_write_that_fails_leaves_the_previous_file(saved, fail, message):
    before = saved.read_bytes()
    with pytest.raises(Exception, match=message):
        fail(saved)
    assert saved.read_bytes() == before
    assert os.listdir(saved.parent) == [saved.name]


def test_place_that_cannot_be_replaced_leaves_no_temporary_file(tmp_path):
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError, match="folder"):
        SampleTable(3).save(tmp_path / "folder")
    assert os.listdir(tmp_path) == ["folder"]


def test_missing_folder_is_an_error(tmp_path):
    with pytest.raises(Exception, match="none"):
        SampleTable(3).save(tmp_path / "none" / "table")


# ---- Scores: one number a sample, made before the run --------------------------------------------

SUFFIXES = pytest.mark.parametrize("suffix", [".safetensors", ".parquet"])


def made(**settings):
    return Scores(
        **{
            "values": torch.tensor([0.5, 2.0, INF]),
            "method": "el2n",
            "fingerprint": "3 samples, ab",
            **settings,
        }
    )


@SUFFIXES
def test_scores_come_back(tmp_path, suffix):
    scores = made(provenance={"passes": 12.5, "seeds": [1, 2], "settings": {"learning_rate": 0.1}})
    path = tmp_path / "new" / f"scores{suffix}"
    assert scores.path is None
    scores.save(path)
    again = Scores.load(path)
    assert scores.path == again.path == str(path)
    assert torch.equal(again.values, scores.values)
    assert again.values.dtype == torch.float32
    assert (again.method, again.fingerprint, again.provenance) == (
        "el2n",
        "3 samples, ab",
        scores.provenance,
    )
    assert again.digest == scores.digest
    assert len(again) == 3
    assert os.listdir(path.parent) == [path.name]


def test_scores_take_any_numbers():
    for values in (
        [1, 2],
        np.array([1.0, 2.0]),
        torch.tensor([1.0, 2.0], dtype=torch.float64, requires_grad=True),
    ):
        scores = made(values=values)
        assert scores.values.tolist() == [1.0, 2.0]
        assert (scores.values.dtype, scores.values.requires_grad) == (torch.float32, False)


def test_digest_is_of_the_content():
    assert made().digest == made(provenance={"seconds": 3}).digest
    others = [made(values=[0.5, 2.0, 1.0]), made(method="grand"), made(fingerprint="3 samples, cd")]
    assert len({scores.digest for scores in (made(), *others)}) == 4


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        (
            {"values": [1.0, NAN, 2.0, NAN]},
            ValueError,
            "2 of 4 scores are NaN, the first that of sample 1: give",
        ),
        ({"values": [[1.0]]}, ValueError, r"shape \(1, 1\): wanted is \(N,\)"),
        ({"values": []}, ValueError, r"shape \(0,\)"),
        ({"method": ""}, TypeError, "method='' is no name"),
        ({"method": None}, TypeError, "method=None is no name"),
        ({"provenance": {"model": object()}}, TypeError, "must be JSON"),
        ({"provenance": {"passes": -1}}, ValueError, r"provenance\['passes'\]=-1"),
        ({"provenance": {"passes": "many"}}, ValueError, r"provenance\['passes'\]='many'"),
    ],
)
def test_wrong_scores(settings, error, message):
    with pytest.raises(error, match=message):
        made(**settings)


def rewritten(path, change):
    """The parquet file after another program changed its table."""
    table = change(pq.read_table(path))
    pq.write_table(table, path)


def replaced(column, values):
    def change(table):
        place = table.column_names.index(column)
        return table.set_column(
            place, table.schema.field(column), pa.array(values, table.schema.field(column).type)
        )

    return change


@pytest.fixture
def parquet(tmp_path):
    path = tmp_path / "scores.parquet"
    made(values=[1.0, 2.0, 3.0, 4.0]).save(path)
    return path


def test_parquet_is_what_others_read(parquet):
    table = pq.read_table(parquet)
    assert table.to_pydict() == {"sample_index": [0, 1, 2, 3], "score": [1.0, 2.0, 3.0, 4.0]}
    assert [str(field.type) for field in table.schema] == ["int64", "float"]
    assert not any(field.nullable for field in table.schema)
    assert json.loads(table.schema.metadata[b"hf_dynprune"])["method"] == "el2n"


def test_rows_of_parquet_may_be_in_any_order(parquet):
    rewritten(parquet, lambda table: table.take([2, 0, 3, 1]))
    assert Scores.load(parquet).values.tolist() == [1.0, 2.0, 3.0, 4.0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            replaced("sample_index", [0, 1, 1, 3]),
            r"4 rows, .* once. twice or more: 1; not at all: 2\.",
        ),
        (replaced("sample_index", [0, 1, 2, 7]), r"outside \[0, 4\): 7; not at all: 3\."),
        (lambda table: table.take([0, 1, 3]), r"3 rows, .* outside \[0, 3\): 3; not at all: 2\."),
        (replaced("score", [1.0, 2.0, 3.0, 5.0]), "is damaged: its checksum does not match"),
        (lambda table: table.slice(0, 3), "is damaged: its checksum does not match"),
        (
            lambda table: table.rename_columns(["id", "score"]),
            r"its columns are \['id', 'score'\], wanted are",
        ),
        (
            lambda table: table.replace_schema_metadata(None),
            "is not a file of scores of hf_dynprune",
        ),
    ],
)
def test_parquet_that_was_changed(parquet, change, message):
    rewritten(parquet, change)
    with pytest.raises(ValueError, match=message) as caught:
        Scores.load(parquet)
    assert str(parquet) in str(caught.value)


def test_many_wrong_indices_are_not_all_named(tmp_path):
    made(values=list(range(100))).save(tmp_path / "s.parquet")
    rewritten(tmp_path / "s.parquet", replaced("sample_index", [0] * 100))
    with pytest.raises(
        ValueError, match=r"twice or more: 0; not at all: 1, 2, 3, 4, 5 and 94 more\."
    ):
        Scores.load(tmp_path / "s.parquet")


def test_files_that_are_no_scores(tmp_path):
    SampleTable(3).save(tmp_path / "table.safetensors")
    with pytest.raises(
        ValueError, match=r"holds \['last_observed', 'times_kept'\], not the scores"
    ):
        Scores.load(tmp_path / "table.safetensors")
    for suffix in (".safetensors", ".parquet"):
        with pytest.raises(FileNotFoundError, match="does not exist: make the scores"):
            Scores.load(tmp_path / f"none{suffix}")
        (tmp_path / f"x{suffix}").write_bytes(b"nothing of ours")
        with pytest.raises(ValueError, match=f"x{suffix} is not a file of"):
            Scores.load(tmp_path / f"x{suffix}")
    for use in (lambda path: made().save(path), Scores.load):
        with pytest.raises(
            ValueError, match=r"'\.csv': scores are kept as \.safetensors or \.parquet"
        ):
            use(tmp_path / "scores.csv")


@SUFFIXES
def test_scores_are_written_whole_or_not_at_all(tmp_path, suffix):
    resource = pytest.importorskip("resource")
    path = tmp_path / f"scores{suffix}"
    made().save(path)
    before = path.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500, hard))
    try:
        with pytest.raises(Exception, match="too large"):
            made(values=torch.rand(10_000)).save(path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == [path.name]
