"""Guards that act on any plan."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import images, trainer

from hf_dynprune import UCB, EpochPlan, RandomPruning
from hf_dynprune.policies import with_class_floor
from hf_dynprune.pruner import DynamicPruner

NAN = math.nan


def floored(kept, labels, least, score, weights=None, seed=0):
    plan = EpochPlan(torch.tensor(kept), None if weights is None else torch.tensor(weights))
    scores = None if score is None else torch.tensor(score)
    return with_class_floor(plan, torch.tensor(labels), least, scores, torch.Generator().manual_seed(seed))


LABELS = [0.0, 0.0, 0.0, 0.0, 1.0, 1.0, 1.0, 2.0]
SCORE = [9.0, 8.0, 7.0, 6.0, 1.0, 3.0, 2.0, 0.0]


@pytest.mark.parametrize(
    ("kept", "least", "expected"),
    [
        ([0, 1, 2, 3], 0, [0, 1, 2, 3]),
        ([0, 1, 2, 3], 1, [0, 1, 5, 7]),  # the best of class 1, the one of class 2, for the two lowest of class 0
        ([0, 1, 2, 3, 5], 2, [0, 1, 5, 6, 7]),  # class 2 has but one
        ([0, 3, 4, 7], 1, [0, 3, 4, 7]),  # all floors are met: nothing is bettered
        ([0, 1, 2, 4], 1, [0, 1, 4, 7]),  # what class 1 keeps is below its best, and stays
    ],
)
def test_floor_by_hand(kept, least, expected):
    assert floored(kept, LABELS, least, SCORE).indices.tolist() == expected


def test_floor_adds_weights_of_1_and_leaves_the_others():
    plan = floored([0, 1, 2, 3], LABELS, 1, SCORE, weights=[2.0, 3.0, 4.0, 5.0])
    assert plan.indices.tolist() == [0, 1, 5, 7]
    assert plan.weights.tolist() == [2.0, 3.0, 1.0, 1.0]


def test_floor_knows_no_class_of_a_sample_without_label():
    labels = [0.0, 0.0, NAN, NAN, 1.0]
    assert floored([0, 1, 2, 3], labels, 0, None).indices.tolist() == [0, 1, 2, 3]
    plan = floored([0, 1, 2], labels, 1, [1.0, 2.0, math.inf, math.inf, 0.0])
    assert plan.indices.tolist() == [1, 2, 4]
    plan = floored([0, 2, 3], labels, 1, [1.0, 2.0, math.inf, math.inf, 0.0])
    assert len(plan) == 3
    assert {0, 4} < set(plan.indices.tolist())  # one of the unknown ones makes room
    assert floored([2, 3], [NAN] * 5, 3, None).indices.tolist() == [2, 3]


def test_floor_that_cannot_be_met_is_an_error_with_both_numbers():
    with pytest.raises(ValueError, match="min_per_class=2 needs 5 samples of 3 classes, and the plan keeps 4"):
        floored([0, 1, 2, 3], LABELS, 2, SCORE)


@given(st.data())
def test_floor_over_random_plans(data):
    n = data.draw(st.integers(1, 40))
    labels = torch.tensor(data.draw(st.lists(st.sampled_from([0.0, 1.0, 2.0, NAN]), min_size=n, max_size=n)))
    kept = sorted(data.draw(st.sets(st.integers(0, n - 1), min_size=1)))
    least = data.draw(st.integers(0, 5))
    score = data.draw(st.none() | st.lists(st.sampled_from([0.0, 1.0, 2.5, math.inf, -math.inf]), min_size=n, max_size=n))
    counts = {c: int((labels == c).sum()) for c in (0.0, 1.0, 2.0)}
    needed = sum(min(count, least) for count in counts.values())
    if needed > len(kept):
        with pytest.raises(ValueError, match="min_per_class"):
            floored(kept, labels.tolist(), least, score)
        return
    plan = floored(kept, labels.tolist(), least, score)
    plan.check(n)
    assert len(plan) == len(kept)
    now, before = labels[plan.indices], labels[torch.tensor(kept)]
    for c, count in counts.items():
        have, had = int((now == c).sum()), int((before == c).sum())
        assert have >= min(count, least)
        assert have >= min(had, least)
        if had < min(count, least):  # those that were in stay in
            assert {i for i in kept if labels[i] == c} <= set(plan.indices.tolist())


@pytest.mark.parametrize("policy", [UCB(0.4, first=1, min_per_class=3), RandomPruning(0.4, first=1, min_per_class=3)])
def test_floor_in_a_run(policy, tmp_path):
    data = images(40)
    rare = [i for i, label in enumerate(data["labels"]) if label == 3]
    data = data.select([i for i in range(40) if i not in rare[3:]])
    labels = torch.as_tensor(data["labels"][:])
    run = trainer(tmp_path, data=data, pruning=policy, num_train_epochs=4)
    run.train()
    assert torch.equal(run.pruner.table["label"].long(), labels)
    assert (run.pruner.table["times_kept"][labels == 3] == 3).all()  # three choices, and it has three samples
    assert [record.samples for record in run.pruning_report.epochs][1:] == [round(0.4 * len(data))] * 3


def test_floor_of_a_task_without_labels_is_an_error_at_construction(tmp_path):
    from tiny import tiny_models

    make, data = tiny_models()["llama causal"]
    with pytest.raises(ValueError, match="'label' is defined for single-label classification"):
        trainer(tmp_path, model=make(), data=data, pruning=UCB(0.4, min_per_class=3))


def test_floor_is_counted_in_whole_samples():
    for value in (-1, 0.5):
        with pytest.raises((ValueError, TypeError), match="min_per_class"):
            UCB(0.4, min_per_class=value)
    assert "label" not in DynamicPruner(UCB(0.4), 10, num_epochs=1).table.columns
