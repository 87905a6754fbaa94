"""Scores: one number for each sample, made before the run."""

import json
import os
import re

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from choosing import INF, NAN

from hf_dynprune.files import save_parquet, save_tensors
from hf_dynprune.scores import Scores, fingerprints_fit
from hf_dynprune.table import SampleTable

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


def nested(depth):
    deep = []
    for _ in range(depth):
        deep = [deep]
    return deep


CIRCLE = {}
CIRCLE["again"] = CIRCLE


@pytest.mark.parametrize(
    ("settings", "error", "found"),
    [
        ({"values": None}, TypeError, "NoneType"),
        ({"values": "abc"}, TypeError, "str"),
        ({"values": ["a"]}, TypeError, "list"),
        ({"values": {1: 2}}, TypeError, "dict"),
        ({"values": [[1], [1, 2]]}, TypeError, "list"),
        ({"values": [10**400]}, TypeError, "list"),
        ({"values": [1j]}, TypeError, "list"),
        ({"values": torch.ones(2, dtype=torch.complex64)}, TypeError, "complex64"),
        ({"values": torch.ones(2, device="meta")}, TypeError, "'meta'"),
        ({"values": torch.eye(2).to_sparse()}, TypeError, "sparse"),
        ({"values": np.array([object()])}, TypeError, "ndarray"),
        ({"values": np.array(["2020-01-01"], dtype="datetime64[D]")}, TypeError, "ndarray"),
        ({"values": 5.0}, ValueError, r"\(\)"),
        ({"values": [1.0, 1e39, -1e300]}, ValueError, r"2 of 3.*sample 1, 1e\+39"),
        ({"values": np.array([1e300])}, ValueError, r"1 of 1.*sample 0, 1e\+300"),
        ({"fingerprint": 5}, TypeError, "fingerprint=5"),
        ({"fingerprint": None}, TypeError, "fingerprint=None"),
        ({"provenance": [1]}, TypeError, r"provenance=\[1\]"),
        ({"provenance": None}, TypeError, "provenance=None"),
        ({"provenance": {"loss": NAN}}, ValueError, "JSON"),
        ({"provenance": CIRCLE}, ValueError, "JSON"),
        ({"provenance": {"a": nested(50)}}, ValueError, "deep"),
        ({"provenance": {"a": nested(5000)}}, ValueError, "JSON"),
        ({"provenance": {"passes": 10**400}}, ValueError, r"\['passes'\]=1000"),
        ({"provenance": {"seconds": "1"}}, ValueError, r"\['seconds'\]='1'"),
        ({"values": [1.0, NAN, 2.0, NAN]}, ValueError, r"2 of 4.*sample 1\b"),
        ({"values": [[1.0]]}, ValueError, r"\(1, 1\)"),
        ({"values": []}, ValueError, r"\(0,\)"),
        ({"method": ""}, TypeError, "method=''"),
        ({"method": None}, TypeError, "method=None"),
        ({"provenance": {"model": object()}}, TypeError, "JSON"),
        ({"provenance": {"passes": -1}}, ValueError, r"\['passes'\]=-1"),
        ({"provenance": {"passes": "many"}}, ValueError, r"\['passes'\]='many'"),
        ({"provenance": {"passes": True}}, ValueError, r"\['passes'\]=True"),
        ({"provenance": {"passes": INF}}, ValueError, r"\['passes'\]=inf"),
    ],
)
def test_wrong_scores(settings, error, found, reliability):
    reliability("scores")
    with pytest.raises(error, match=found):
        made(**settings)


@pytest.mark.parametrize(
    ("one", "other", "fit"),
    [
        ("9 samples, ab", "9 samples, ab", True),
        ("9 samples, ab", "9 samples, cd", False),
        ("9 samples, ab", "", True),
        ("9 samples", "9 samples, ab", True),
        ("", "9 samples", True),
        ("8 samples", "9 samples, ab", False),  # not of n samples
    ],
)
def test_fingerprints_that_may_be_of_one_dataset(one, other, fit):
    assert fingerprints_fit(one, other, 9) is fit
    assert fingerprints_fit(other, one, 9) is fit


def test_files_without_scores(tmp_path):
    SampleTable(3).save(tmp_path / "table.safetensors")
    with pytest.raises(ValueError, match=r"\['last_observed', 'times_kept'\]"):
        Scores.load(tmp_path / "table.safetensors")
    save_parquet(tmp_path / "others.parquet", {"values": torch.ones(3)}, {})
    with pytest.raises(ValueError, match=r"\['values'\]"):
        Scores.load(tmp_path / "others.parquet")
    for suffix in (".safetensors", ".parquet"):
        with pytest.raises(FileNotFoundError, match=f"none{suffix}"):
            Scores.load(tmp_path / f"none{suffix}")
        (tmp_path / f"x{suffix}").write_bytes(b"nothing of ours")
        with pytest.raises(ValueError, match=f"x{suffix}"):
            Scores.load(tmp_path / f"x{suffix}")
    for use in (lambda path: made().save(path), Scores.load):
        with pytest.raises(ValueError, match=r"'\.csv'.*\.safetensors.*\.parquet"):
            use(tmp_path / "scores.csv")


GOOD = {"method": "el2n", "fingerprint": "", "provenance": {}}


@SUFFIXES
@pytest.mark.parametrize(
    ("values", "metadata"),
    [
        (torch.ones(3), [GOOD]),
        (torch.ones(3), "text"),
        (torch.ones(3), None),
        (torch.ones(3), {"method": "el2n", "provenance": {}}),
        (torch.ones(3), {**GOOD, "method": ["el2n"]}),
        (torch.ones(3), {**GOOD, "method": ""}),
        (torch.ones(3), {**GOOD, "fingerprint": 3}),
        (torch.ones(3), {**GOOD, "provenance": [1]}),
        (torch.ones(3), {**GOOD, "provenance": None}),
        (torch.ones(3), {**GOOD, "provenance": {"passes": "many"}}),
        (torch.ones(3), {**GOOD, "provenance": {"a": nested(100)}}),
        (torch.tensor([1.0, NAN]), GOOD),
        (torch.tensor([1e300], dtype=torch.float64), GOOD),
        (torch.ones(0), GOOD),
    ],
)
def test_files_with_wrong_scores(values, metadata, suffix, tmp_path, reliability):
    reliability("scores")
    path = tmp_path / f"scores{suffix}"
    (save_parquet if suffix == ".parquet" else save_tensors)(path, {"score": values}, metadata)
    with pytest.raises(ValueError, match=re.escape(str(path))):
        Scores.load(path)


@SUFFIXES
@pytest.mark.parametrize("text", ["[" * 100_000, "{", "NaN", "1" * 5000])
def test_files_whose_metadata_is_no_mapping(text, suffix, tmp_path, reliability, monkeypatch):
    reliability("scores")
    path = tmp_path / f"scores{suffix}"
    with monkeypatch.context() as patch:
        patch.setattr("hf_dynprune.files.json_text", lambda value, **settings: text)
        made().save(path)
    with pytest.raises(ValueError, match=re.escape(str(path))):
        Scores.load(path)


def test_scores_of_a_folder_that_looks_like_a_partition(tmp_path):
    path = tmp_path / "keep_ratio=0.3" / "seed=1" / "scores.parquet"
    made().save(path)
    assert torch.equal(Scores.load(path).values, made().values)


def test_parquet_of_scores_is_what_others_read(tmp_path):
    made().save(tmp_path / "scores.parquet")
    table = pq.read_table(tmp_path / "scores.parquet")
    assert table.to_pydict() == {"sample_index": [0, 1, 2], "score": [0.5, 2.0, INF]}
    assert json.loads(table.schema.metadata[b"hf_dynprune"])["method"] == "el2n"


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
