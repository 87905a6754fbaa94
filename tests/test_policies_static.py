"""StaticPruning: what it keeps, one choice a run, what it refuses, and what it is charged."""

import json
import os
import re

import pytest
import torch
from choosing import choice_of

from hf_dynprune.policies import StaticPruning, make_policy
from hf_dynprune.pruner import DynamicPruner
from hf_dynprune.schedule import RunShape
from hf_dynprune.scores import Scores
from hf_dynprune.table import SampleTable

VALUES = [3.0, 1.0, 4.0, 1.5, 5.0, 9.0, 2.0, 6.0]  # by rank: 1, 3, 6, 0, 2, 4, 7, 5
N = len(VALUES)


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "scores.safetensors"
    Scores(VALUES, "mine", f"{N} samples", {"passes": 30, "seconds": 2.5}).save(path)
    return str(path)


def kept(policy, n=N, seed=0):
    return policy.plan(choice_of(policy, SampleTable(n), seed=seed)).indices.tolist()


def epochs_of(pruner):
    """What each epoch trains on, sorted."""
    seen = []
    for epoch in range(pruner.num_epochs):
        pruner.begin_epoch(epoch)
        order = torch.tensor(list(pruner.sampler))
        for batch in order.split(pruner.shape.batch_size):
            pruner.observe(batch)
        seen.append(sorted(order.tolist()))
    pruner.end_epoch()
    return seen


# ---- what is kept --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keep", "keep_ratio", "expected"),
    [
        ("hardest", 0.5, [2, 4, 5, 7]),
        ("easiest", 0.5, [0, 1, 3, 6]),
        ("middle", 0.5, [0, 2, 4, 6]),  # ranks 2 to 5
        ("middle", 3 / 8, [0, 2, 6]),  # ranks 2 to 4
        ("middle", 1 / 8, [0]),  # rank 3
        ("hardest", 1 / 8, [5]),
        ("easiest", 0.01, [1]),  # never none
        ("middle", 1.0, list(range(8))),
    ],
)
def test_by_hand(file, keep, keep_ratio, expected):
    assert all(
        kept(StaticPruning(file, keep_ratio, keep), seed=seed) == expected for seed in range(3)
    )


@pytest.mark.parametrize("keep", ["hardest", "easiest", "middle"])
def test_ties_are_broken_at_random(tmp_path, keep):
    Scores([1.0, 1.0, 1.0, 1.0], "mine", provenance={"passes": 0}).save(tmp_path / "s.parquet")
    policy = StaticPruning(tmp_path / "s.parquet", 0.5, keep)
    seen = {tuple(kept(policy, 4, seed)) for seed in range(100)}
    assert len(seen) == 6  # all pairs
    assert kept(policy, 4, 7) == kept(policy, 4, 7)


def test_infinite_scores_are_the_hardest(tmp_path):
    Scores([1.0, float("inf"), 2.0, -float("inf")], "mine", provenance={"passes": 0}).save(
        tmp_path / "s.safetensors"
    )
    path = tmp_path / "s.safetensors"
    assert kept(StaticPruning(path, 0.25), 4) == [1]
    assert kept(StaticPruning(path, 0.25, "easiest"), 4) == [3]
    assert kept(StaticPruning(path, 0.5, "middle"), 4) == [0, 2]


def test_random_is_drawn_once_from_the_seed():
    policy = StaticPruning(keep="random", keep_ratio=0.25)
    runs = [
        epochs_of(DynamicPruner(policy, RunShape(100, num_epochs=4), seed=seed))
        for seed in (0, 0, 1)
    ]
    assert all(epoch == run[0] for run in runs for epoch in run)
    assert len(runs[0][0]) == 25
    assert runs[0] == runs[1] != runs[2]


@pytest.mark.parametrize("keep", ["hardest", "random"])
@pytest.mark.parametrize("period", [1, 2])
def test_there_is_one_choice(file, keep, period):
    policy = StaticPruning(
        file if keep == "hardest" else None, 0.5, keep, period=period, first=1, last=0.2
    )
    pruner = DynamicPruner(policy, RunShape(N, batch_size=2, num_epochs=5))
    first, *middle, last = epochs_of(pruner)
    assert first == last == list(range(N))
    assert [len(epoch) for epoch in middle] == [4, 4, 4]
    assert middle[0] == middle[1] == middle[2]
    assert pruner.report.selection["choices"] == 1
    assert pruner.report.selection["never"] == 0.5
    assert pruner.clock.total == (4 + 2 + 2 + 2 + 4)


# ---- what it costs -------------------------------------------------------------------------------


@pytest.mark.parametrize("charge", [True, False])
def test_scores_are_charged_or_shown(file, charge):
    pruner = DynamicPruner(StaticPruning(file, 0.5, charge=charge), RunShape(N, num_epochs=3))
    assert pruner.report.cost_ratio == 0  # of no epoch yet
    epochs_of(pruner)
    report = pruner.report
    assert report.passes == 12 + (30 if charge else 0)
    assert report.cost_ratio == report.passes / (3 * N)
    digest = Scores.load(file).digest
    expected = {
        "method": "mine",
        "scores": file,
        "digest": digest,
        "charged": charge,
        "passes": 30,
        "seconds": 2.5,
    }
    assert report.preparation == expected
    assert report.totals["forward_passes"] == 12  # of the epochs


def test_random_costs_nothing():
    pruner = DynamicPruner(StaticPruning(keep="random", keep_ratio=0.5), RunShape(N, num_epochs=2))
    epochs_of(pruner)
    assert pruner.report.preparation == {}
    assert pruner.report.cost_ratio == 0.5


def test_unknown_cost_cannot_be_charged(tmp_path):
    path = tmp_path / "s.safetensors"
    Scores(VALUES, "mine").save(path)
    with pytest.raises(ValueError, match=r"s\.safetensors.*charge=False"):
        StaticPruning(path)
    pruner = DynamicPruner(StaticPruning(path, charge=False), RunShape(N, num_epochs=1))
    epochs_of(pruner)
    assert pruner.report.passes == 4


# ---- fields --------------------------------------------------------------------------------------


def test_fields_survive_json(file):
    policy = StaticPruning(file, 0.3, "middle", charge=False, first=2)
    values = json.loads(json.dumps(policy.to_dict()))
    assert (
        values.items()
        >= {"name": "static", "scores": file, "keep": "middle", "charge": False, "first": 2}.items()
    )
    assert make_policy(**values) == policy
    assert values["digest"] == Scores.load(file).digest


def test_scores_path_and_string_are_the_same(file, tmp_path):
    scores = Scores.load(file)
    assert (
        StaticPruning(scores)
        == StaticPruning(tmp_path / "scores.safetensors")
        == StaticPruning(file)
    )
    with pytest.raises(ValueError, match=r"scores\.save"):
        StaticPruning(Scores(VALUES, "mine"))


def test_policies_are_equal_by_the_content_of_their_scores(file, tmp_path):
    policy = StaticPruning(file)
    assert hash(policy) == hash(StaticPruning(file))
    assert policy != StaticPruning(file, keep="easiest")
    other = Scores(VALUES[::-1], "mine", f"{N} samples", {"passes": 30})
    other.save(tmp_path / "other.safetensors")
    assert policy != StaticPruning(other)


@pytest.mark.parametrize(
    ("settings", "error", "found"),
    [
        ({"keep": "best"}, ValueError, r"keep='best'.*'hardest', 'easiest', 'middle', 'random'"),
        ({"keep_ratio": 0.0}, ValueError, r"keep_ratio=0\.0"),
        ({"keep_ratio": "half"}, TypeError, "keep_ratio='half'"),
        ({"charge": 1}, TypeError, "charge=1"),
        ({"scores": None}, ValueError, "scores=None.*keep='hardest'"),
        ({"keep": "random"}, ValueError, "keep='random'"),
        ({"scores": 3}, TypeError, "scores=int"),
        ({"scores": "none.safetensors"}, FileNotFoundError, r"none\.safetensors"),
        ({"scores": "none.csv"}, ValueError, r"'\.csv'.*\.safetensors.*\.parquet"),
        ({"max_age": 1}, ValueError, "max_age=1"),
        ({"scoring": "all"}, ValueError, "scoring='all'"),
        ({"min_per_class": 1}, ValueError, "min_per_class=1.*first=0"),
    ],
)
def test_wrong_fields(file, settings, error, found):
    with pytest.raises(error, match=found):
        StaticPruning(**{"scores": file, **settings})


# ---- other data, other scores --------------------------------------------------------------------


def test_scores_of_another_length(file):
    with pytest.raises(ValueError, match=r"\b8\b.*\b9\b"):
        DynamicPruner(StaticPruning(file), RunShape(9, num_epochs=1))


def test_scores_of_another_dataset(tmp_path):
    path = tmp_path / "s.safetensors"
    Scores(VALUES, "mine", "8 samples, aaaa", {"passes": 0}).save(path)
    policy = StaticPruning(path)
    with pytest.raises(ValueError, match=r"'8 samples, aaaa'.*'8 samples, bbbb'"):
        DynamicPruner(policy, RunShape(N, num_epochs=1), fingerprint="8 samples, bbbb")
    DynamicPruner(policy, RunShape(N, num_epochs=1), fingerprint="8 samples, aaaa")
    DynamicPruner(policy, RunShape(N, num_epochs=1))  # only N is compared


def test_scores_that_know_n_alone(file):
    DynamicPruner(StaticPruning(file), RunShape(N, num_epochs=1), fingerprint="8 samples, bbbb")


def test_a_file_with_other_content_is_refused(file):
    policy = StaticPruning(file)
    before = policy.digest
    Scores(VALUES[::-1], "mine", f"{N} samples", {"passes": 30}).save(file)
    now = Scores.load(file).digest
    with pytest.raises(ValueError, match=rf"{now}.*{before}"):
        make_policy(**policy.to_dict())
    assert StaticPruning(file).digest == now


def test_policy_of_a_report_needs_no_file(file):
    """A model card reads the policy back, and does not use it."""
    policy = StaticPruning(file)
    os.remove(file)
    again = make_policy(**policy.to_dict())
    assert again == policy
    assert again.to_dict() == policy.to_dict()
    with pytest.raises(FileNotFoundError, match=re.escape(file)):
        DynamicPruner(again, RunShape(N, num_epochs=1))


# ---- the file is read once -----------------------------------------------------------------------


@pytest.fixture
def reads(monkeypatch):
    """The paths that `Scores.load` was called with."""
    seen, load = [], Scores.load.__func__

    def counted(cls, path):
        seen.append(str(path))
        return load(cls, path)

    monkeypatch.setattr(Scores, "load", classmethod(counted))
    return seen


def test_the_file_is_read_once(file, reads, tmp_path):
    policy = StaticPruning(file, 0.5)
    assert reads == [file]
    pruner = DynamicPruner(policy, RunShape(N, num_epochs=3))
    epochs_of(pruner)
    pruner.save(tmp_path)
    pruner.load(tmp_path)
    str(policy), policy.to_dict(), policy.given, policy.preparation()
    assert reads == [file]


def test_scores_that_were_loaded_are_not_read_again(file, reads):
    scores = Scores.load(file)
    policy = StaticPruning(scores, 0.5)
    assert kept(policy) == [2, 4, 5, 7]
    assert reads == [file]
    assert policy.digest == scores.digest


def test_a_run_does_not_depend_on_the_file_once_it_was_read(file):
    policy = StaticPruning(file, 0.5)
    os.remove(file)
    pruner = DynamicPruner(policy, RunShape(N, num_epochs=2))
    assert epochs_of(pruner) == [[2, 4, 5, 7]] * 2
    assert pruner.report.preparation["scores"] == file


def test_the_path_stands_for_the_scores(file):
    policy = StaticPruning(file, 0.3)
    assert policy.settings()["scores"] == policy.to_dict()["scores"] == file
    assert repr(file) in str(policy)


def test_run_is_not_resumed_with_other_scores(file, tmp_path):
    pruner = DynamicPruner(StaticPruning(file), RunShape(N, num_epochs=2))
    pruner.begin_epoch(0)
    pruner.save(tmp_path)
    again = DynamicPruner(StaticPruning(file), RunShape(N, num_epochs=2))
    again.load(tmp_path)
    assert again.report.preparation["passes"] == 30
    Scores(VALUES[::-1], "mine", f"{N} samples", {"passes": 30}).save(file)
    with pytest.raises(ValueError, match="digest"):
        DynamicPruner(StaticPruning(file), RunShape(N, num_epochs=2)).load(tmp_path)
