"""Files that are written whole or not at all, with a checksum."""

import json
import os
import re
import struct

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import save_file

from hf_dynprune.files import (
    atomic,
    checksum,
    load_json,
    load_parquet,
    load_tensors,
    number,
    save_json,
    save_parquet,
    save_tensors,
    strict,
)

# ---- tensors -------------------------------------------------------------------------------------

TENSORS = {
    "mean": torch.tensor([0.5, float("nan"), 2.0, float("inf"), 1.0, 3.0, 0.0]),
    "variance": torch.arange(7.0),
    "times_kept": torch.arange(7, dtype=torch.int32),
}


def same(one, other):
    return set(one) == set(other) and all(
        one[name].dtype == other[name].dtype
        and torch.equal(one[name].nan_to_num(-7), other[name].nan_to_num(-7))
        for name in one
    )


def test_tensors_and_metadata_come_back(tmp_path):
    metadata = {"note": "ε × 3", "list": [1, None, 2.5]}
    save_tensors(tmp_path / "x", TENSORS, metadata)
    tensors, again = load_tensors(str(tmp_path / "x"))
    assert same(tensors, TENSORS)
    assert again == metadata
    assert os.listdir(tmp_path) == ["x"]


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


def damaged(path, content: bytes) -> None:
    path.write_bytes(content)
    with pytest.raises(ValueError, match=re.escape(str(path))):
        load_tensors(path)


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "table.safetensors"
    save_tensors(path, TENSORS, {"epoch": 3})
    return path


def test_truncated_at_every_length(saved):
    whole = saved.read_bytes()
    for length in range(len(whole)):
        damaged(saved, whole[:length])


def test_any_flipped_bit_is_noticed(saved):
    whole = saved.read_bytes()
    header = 8 + struct.unpack("<Q", whole[:8])[0]
    assert header == len(whole) - 7 * 4 * 3  # the data are behind the header
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
    save_file(
        {"w": torch.zeros(3), "b": torch.zeros(2, dtype=torch.bfloat16)},
        tmp_path / "model.safetensors",
        metadata,
    )
    damaged(tmp_path / "model.safetensors", (tmp_path / "model.safetensors").read_bytes())


def test_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.safetensors"):
        load_tensors(tmp_path / "none.safetensors")


def test_second_save_replaces_the_first(saved):
    save_tensors(saved, {"a": torch.ones(2)}, {})
    tensors, metadata = load_tensors(saved)
    assert same(tensors, {"a": torch.ones(2)})
    assert metadata == {}


def test_the_checksum_is_of_names_dtypes_shapes_values_and_text():
    one = {"a": torch.tensor([1.0, 2.0])}
    others = [
        ({"b": one["a"]}, "text"),
        ({"a": one["a"].double()}, "text"),
        ({"a": one["a"][None]}, "text"),
        ({"a": torch.tensor([1.0, 3.0])}, "text"),
        (one, "other text"),
        ({**one, "b": one["a"]}, "text"),
    ]
    assert len({checksum(*other) for other in [(one, "text"), *others]}) == 7
    both = {"a": one["a"], "b": torch.zeros(1)}
    assert checksum(both, "") == checksum(dict(reversed(both.items())), "")


# ---- parquet -------------------------------------------------------------------------------------


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


def renamed(*names):
    return lambda table: table.rename_columns(names).replace_schema_metadata(table.schema.metadata)


def without_a_value(table):
    scores = pa.array([1.0, None, 3.0, 4.0], pa.float32())
    return table.drop_columns("score").append_column("score", scores)


@pytest.fixture
def parquet(tmp_path):
    path = tmp_path / "scores.parquet"
    columns = {"score": torch.tensor([1.0, 2.0, 3.0, 4.0]), "kept": torch.tensor([0, 1, 1, 0])}
    save_parquet(path, columns, {"method": "el2n"})
    return path


def test_parquet_is_what_others_read(parquet):
    table = pq.read_table(parquet)
    assert table.to_pydict() == {
        "sample_index": [0, 1, 2, 3],
        "score": [1.0, 2.0, 3.0, 4.0],
        "kept": [0, 1, 1, 0],
    }
    assert [str(field.type) for field in table.schema] == ["int64", "float", "int64"]
    assert not any(field.nullable for field in table.schema)
    assert json.loads(table.schema.metadata[b"hf_dynprune"]) == {"method": "el2n"}
    assert os.listdir(parquet.parent) == [parquet.name]


def test_rows_of_parquet_may_be_in_any_order(parquet):
    rewritten(parquet, lambda table: table.take([2, 0, 3, 1]))
    columns, metadata = load_parquet(parquet)
    assert columns["score"].tolist() == [1.0, 2.0, 3.0, 4.0]
    assert columns["kept"].tolist() == [0, 1, 1, 0]
    assert list(columns) == ["score", "kept"]
    assert metadata == {"method": "el2n"}


def test_parquet_that_was_read_can_be_changed(parquet):
    columns, _ = load_parquet(parquet)
    columns["score"][0] = 9.0
    assert columns["score"].dtype == torch.float32


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (replaced("sample_index", [0, 1, 1, 3]), r"4 rows.*: 1;.*: 2\."),
        (replaced("sample_index", [0, 1, 2, 7]), r"4 rows.*\[0, 4\): 7;.*: 3\."),
        (lambda table: table.take([0, 1, 3]), r"3 rows.*\[0, 3\): 3;.*: 2\."),
        (replaced("score", [1.0, 2.0, 3.0, 5.0]), "checksum"),
        (lambda table: table.slice(0, 3), "checksum"),
        (renamed("id", "score", "kept"), "sample_index"),
        (renamed("sample_index", "other", "kept"), "checksum"),
        (lambda table: table.replace_schema_metadata(None), "hf_dynprune"),
        (without_a_value, "damaged"),
        (
            lambda table: table.set_column(0, "sample_index", pa.array([0.0, 1.0, 2.0, 3.0])),
            "float64",
        ),
    ],
)
def test_parquet_that_was_changed(parquet, change, found):
    rewritten(parquet, change)
    with pytest.raises(ValueError, match=found) as caught:
        load_parquet(parquet)
    assert str(parquet) in str(caught.value)


def test_many_wrong_indices_are_not_all_named(tmp_path):
    save_parquet(tmp_path / "s.parquet", {"score": torch.arange(100)}, {})
    rewritten(tmp_path / "s.parquet", replaced("sample_index", [0] * 100))
    with pytest.raises(ValueError, match=r": 0;.*: 1, 2, 3, 4, 5 .*\b94\b"):
        load_parquet(tmp_path / "s.parquet")


# ---- json ----------------------------------------------------------------------------------------


def test_json_comes_back_and_the_folder_is_made(tmp_path):
    value = {"b": [1, None, 2.5], "a": "ε"}
    save_json(tmp_path / "new" / "x.json", value)
    text = (tmp_path / "new" / "x.json").read_text()
    assert json.loads(text) == value
    assert text.endswith("}\n")
    assert list(json.loads(text)) == ["b", "a"]
    assert os.listdir(tmp_path / "new") == ["x.json"]


def test_json_has_no_constants_that_json_does_not_have(tmp_path):
    nan, inf = float("nan"), float("inf")
    value = {
        "a": [nan, (inf, -inf)],
        "b": {"c": 1.5, "d": "NaN"},
        nan: True,
        "numpy": np.float64(nan),
    }

    def refuse(name):
        raise ValueError(name)

    save_json(tmp_path / "x.json", value)
    text = (tmp_path / "x.json").read_text()
    assert json.loads(text, parse_constant=refuse) == {
        "a": ["NaN", ["Infinity", "-Infinity"]],
        "b": {"c": 1.5, "d": "NaN"},
        "NaN": True,
        "numpy": "NaN",
    }
    assert [number(strict(x)) for x in (inf, -inf, 1, None, "x", 2.5)] == [
        inf,
        -inf,
        1,
        None,
        "x",
        2.5,
    ]
    assert np.isnan(number(strict(nan)))


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 100_000, "", "{", "1" * 5000])
def test_json_that_cannot_be_read(text, tmp_path):
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(ValueError, match=r"\w"):
        load_json(tmp_path / "x.json")


@pytest.mark.parametrize("metadata", [[], [1], None, "x", 3])
@pytest.mark.parametrize(
    ("save", "load"), [(save_tensors, load_tensors), (save_parquet, load_parquet)]
)
def test_metadata_is_a_mapping(metadata, save, load, tmp_path):
    save(tmp_path / "x", {"a": torch.ones(2)}, metadata)
    with pytest.raises(ValueError, match=type(metadata).__name__):
        load(tmp_path / "x")


# ---- atomic --------------------------------------------------------------------------------------


def test_the_place_to_write_to_becomes_the_file(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    with atomic(path) as temporary:
        temporary.write_text("new")
        assert path.read_text() == "old"
        assert temporary.parent == path.parent  # one file system: a rename is atomic
    assert path.read_text() == "new"
    assert os.listdir(tmp_path) == ["file"]


def test_two_that_write_the_same_file_do_not_meet(tmp_path):
    path = tmp_path / "file"
    with atomic(path) as one, atomic(path) as other:
        assert one != other
        one.write_text("one")
        other.write_text("other")
    assert path.read_text() == "one"
    assert os.listdir(tmp_path) == ["file"]


def test_a_link_in_the_place_is_replaced_and_not_followed(tmp_path):
    (tmp_path / "other").write_text("of somebody")
    (tmp_path / "link").symlink_to(tmp_path / "other")
    save_json(tmp_path / "link", 1)
    assert (tmp_path / "other").read_text() == "of somebody"
    assert not (tmp_path / "link").is_symlink()


def test_a_long_name(tmp_path):
    save_json(tmp_path / ("x" * 250), 1)
    assert os.listdir(tmp_path) == ["x" * 250]


def test_an_error_leaves_the_file_as_it_was(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")

    def fail():
        with atomic(path) as temporary:
            temporary.write_text("half of the n")
            raise KeyError("an error")

    with pytest.raises(KeyError):
        fail()
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["file"]


# ---- what fails ----------------------------------------------------------------------------------


def no_room(path, save=lambda path: save_tensors(path, {"a": torch.rand(10_000)}, {})):
    """Save to a disk that is full after 500 bytes."""
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500, hard))
    try:
        save(path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def no_json(path):
    save_tensors(path, TENSORS, {"policy": object()})


def unwritable_tensor(path):
    save_tensors(path, {"a": torch.zeros(3, device="meta")}, {})


def no_room_for_parquet(path):
    no_room(path, lambda path: save_parquet(path, {"a": torch.rand(10_000)}, {}))


def no_room_for_json(path):
    no_room(path, lambda path: save_json(path, list(range(1000))))


def no_value_of_json(path):
    save_json(path, {"policy": object()})


@pytest.mark.parametrize(
    ("fail", "message"),
    [
        (no_room, "too large"),
        (no_room_for_parquet, "too large"),
        (no_room_for_json, "too large"),
        (no_json, "JSON"),
        (no_value_of_json, "JSON"),
        (unwritable_tensor, "meta"),
    ],
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
        save_tensors(tmp_path / "folder", TENSORS, {})
    assert os.listdir(tmp_path) == ["folder"]


def test_missing_folder_is_an_error(tmp_path):
    with pytest.raises(Exception, match="none"):
        save_tensors(tmp_path / "none" / "table", TENSORS, {})
