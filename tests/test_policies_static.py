"""StaticPruning: what it keeps by hand, one choice a run, what it refuses, and what it is charged."""

import json
import os

import pytest
import torch

from hf_dynprune import DynamicPruner, SampleTable, Scores, StaticPruning, make_policy

VALUES = [3.0, 1.0, 4.0, 1.5, 5.0, 9.0, 2.0, 6.0]  # by rank: 1, 3, 6, 0, 2, 4, 7, 5
N = len(VALUES)


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "scores.safetensors"
    Scores(VALUES, "mine", f"{N} samples", {"passes": 30, "seconds": 2.5}).save(path)
    return str(path)


def kept(policy, n=N, seed=0):
    generator = torch.Generator().manual_seed(seed)
    plan = policy.plan(
        SampleTable(n, policy.columns), score=None, epoch=0, progress=0.0, generator=generator
    )
    return plan.indices.tolist()


def epochs_of(pruner):
    """What each epoch trains on, sorted."""
    seen = []
    for epoch in range(pruner.num_epochs):
        pruner.begin_epoch(epoch)
        order = torch.tensor(list(pruner.sampler))
        for batch in order.split(pruner.batch_size):
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
    runs = [epochs_of(DynamicPruner(policy, 100, num_epochs=4, seed=seed)) for seed in (0, 0, 1)]
    assert all(epoch == run[0] for run in runs for epoch in run)
    assert len(runs[0][0]) == 25
    assert runs[0] == runs[1] != runs[2]


@pytest.mark.parametrize("keep", ["hardest", "random"])
@pytest.mark.parametrize("period", [1, 2])
def test_there_is_one_choice(file, keep, period):
    policy = StaticPruning(
        file if keep == "hardest" else None, 0.5, keep, period=period, first=1, last=0.2
    )
    pruner = DynamicPruner(policy, N, batch_size=2, num_epochs=5)
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
    pruner = DynamicPruner(StaticPruning(file, 0.5, charge=charge), N, num_epochs=3)
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
    pruner = DynamicPruner(StaticPruning(keep="random", keep_ratio=0.5), N, num_epochs=2)
    epochs_of(pruner)
    assert pruner.report.preparation == {}
    assert pruner.report.cost_ratio == 0.5


def test_unknown_cost_cannot_be_charged(tmp_path):
    path = tmp_path / "s.safetensors"
    Scores(VALUES, "mine").save(path)
    with pytest.raises(
        ValueError, match=r"does not say what its scores cost.*0 for free ones, or set charge=False"
    ):
        StaticPruning(path)
    pruner = DynamicPruner(StaticPruning(path, charge=False), N, num_epochs=1)
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
    with pytest.raises(ValueError, match="have no file yet: save them first"):
        StaticPruning(Scores(VALUES, "mine"))


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        (
            {"keep": "best"},
            ValueError,
            "keep='best' is unknown: wanted is one of 'hardest', 'easiest', 'middle', 'random'",
        ),
        ({"keep_ratio": 0.0}, ValueError, "keep_ratio=0.0 is out of range"),
        ({"charge": 1}, TypeError, "charge=1 must be True or False"),
        ({"scores": None}, ValueError, "scores=None with keep='hardest'"),
        ({"keep": "random"}, ValueError, "keep='random' takes no scores"),
        ({"scores": 3}, TypeError, "scores=int: wanted is the path"),
        (
            {"scores": "none.safetensors"},
            FileNotFoundError,
            "none.safetensors does not exist: make the scores with",
        ),
        ({"scores": "none.csv"}, ValueError, "'.csv': scores are kept as .safetensors or .parquet"),
        ({"max_age": 1}, ValueError, "max_age=1 acts on scores"),
        ({"scoring": "all"}, ValueError, "has no use for scores"),
        ({"min_per_class": 1}, ValueError, "min_per_class=1 with first=0: .* Set first=1"),
    ],
)
def test_wrong_fields(file, settings, error, message):
    with pytest.raises(error, match=message):
        StaticPruning(**{"scores": file, **settings})


# ---- other data, other scores --------------------------------------------------------------------


def test_scores_of_another_length(file):
    with pytest.raises(ValueError, match=r"has the scores of 8 samples, the training set has 9"):
        DynamicPruner(StaticPruning(file), 9, num_epochs=1)


def test_scores_of_another_dataset(tmp_path):
    path = tmp_path / "s.safetensors"
    Scores(VALUES, "mine", "8 samples, aaaa", {"passes": 0}).save(path)
    policy = StaticPruning(path)
    with pytest.raises(
        ValueError, match=r"of the dataset '8 samples, aaaa', the training set is '8 samples, bbbb'"
    ):
        DynamicPruner(policy, N, num_epochs=1, fingerprint="8 samples, bbbb")
    DynamicPruner(policy, N, num_epochs=1, fingerprint="8 samples, aaaa")
    DynamicPruner(policy, N, num_epochs=1)  # a loop of one's own knows N alone


def test_scores_that_know_n_alone(file):
    DynamicPruner(StaticPruning(file), N, num_epochs=1, fingerprint="8 samples, bbbb")


def test_file_that_was_made_anew_is_another_one(file):
    policy = StaticPruning(file)
    Scores(VALUES[::-1], "mine", f"{N} samples", {"passes": 30}).save(file)
    for use in (
        lambda: make_policy(**policy.to_dict()),
        lambda: DynamicPruner(policy, N, num_epochs=1),
    ):
        with pytest.raises(
            ValueError, match=r"has the digest \w+, wanted is \w+: the scores were made anew since"
        ):
            use()


def test_policy_of_a_report_needs_no_file(file):
    policy = StaticPruning(file)
    os.remove(file)
    again = make_policy(**policy.to_dict())  # as the model card does
    assert again == policy
    with pytest.raises(FileNotFoundError, match="does not exist"):
        DynamicPruner(again, N, num_epochs=1)


def test_run_is_not_resumed_with_other_scores(file, tmp_path):
    pruner = DynamicPruner(StaticPruning(file), N, num_epochs=2)
    pruner.begin_epoch(0)
    pruner.save(tmp_path)
    again = DynamicPruner(StaticPruning(file), N, num_epochs=2)
    again.load(tmp_path)
    assert again.report.preparation["passes"] == 30
    Scores(VALUES[::-1], "mine", f"{N} samples", {"passes": 30}).save(file)
    with pytest.raises(ValueError, match=r"belongs to another run \(policy: .*digest"):
        DynamicPruner(StaticPruning(file), N, num_epochs=2).load(tmp_path)
