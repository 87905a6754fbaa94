"""Guards that act on any plan."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import images, trainer

from hf_dynprune import UCB, EpochPlan, RandomPruning
from hf_dynprune.policies import indices_of, mask_of, permutation, top_k, with_class_floor
from hf_dynprune.policies.base import draw, kth_highest
from hf_dynprune.pruner import DynamicPruner

NAN = math.nan


def floored(kept, labels, least, score, weights=None, seed=0):
    plan = EpochPlan(torch.tensor(kept), None if weights is None else torch.tensor(weights))
    scores = None if score is None else torch.tensor(score)
    return with_class_floor(
        plan, torch.tensor(labels), least, scores, torch.Generator().manual_seed(seed)
    )


LABELS = [0.0, 0.0, 0.0, 0.0, 1.0, 1.0, 1.0, 2.0]
SCORE = [9.0, 8.0, 7.0, 6.0, 1.0, 3.0, 2.0, 0.0]


@pytest.mark.parametrize(
    ("kept", "least", "expected"),
    [
        ([0, 1, 2, 3], 0, [0, 1, 2, 3]),
        (
            [0, 1, 2, 3],
            1,
            [0, 1, 5, 7],
        ),  # the best of class 1, the one of class 2, for the two lowest of class 0
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
    with pytest.raises(
        ValueError, match="min_per_class=2 needs 5 samples of 3 classes, and the plan keeps 4"
    ):
        floored([0, 1, 2, 3], LABELS, 2, SCORE)


@given(st.data())
def test_floor_over_random_plans(data):
    n = data.draw(st.integers(1, 40))
    labels = torch.tensor(
        data.draw(st.lists(st.sampled_from([0.0, 1.0, 2.0, NAN]), min_size=n, max_size=n))
    )
    kept = sorted(data.draw(st.sets(st.integers(0, n - 1), min_size=1)))
    least = data.draw(st.integers(0, 5))
    score = data.draw(
        st.none()
        | st.lists(st.sampled_from([0.0, 1.0, 2.5, math.inf, -math.inf]), min_size=n, max_size=n)
    )
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


@pytest.mark.parametrize(
    "policy", [UCB(0.4, first=1, min_per_class=3), RandomPruning(0.4, first=1, min_per_class=3)]
)
def test_floor_in_a_run(policy, tmp_path):
    data = images(40)
    rare = [i for i, label in enumerate(data["labels"]) if label == 3]
    data = data.select([i for i in range(40) if i not in rare[3:]])
    labels = torch.as_tensor(data["labels"][:])
    run = trainer(tmp_path, data=data, pruning=policy, num_train_epochs=4)
    run.train()
    assert torch.equal(run.pruner.table["label"].long(), labels)
    assert (
        run.pruner.table["times_kept"][labels == 3] == 3
    ).all()  # three choices, and it has three samples
    assert [record.samples for record in run.pruning_report.epochs][1:] == [
        round(0.4 * len(data))
    ] * 3


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


# ---- what selections are made of -----------------------------------------------------------------


@pytest.mark.parametrize("n", [0, 1, 2, 1000, 70_001])
def test_the_permutation_is_torchs_in_half_the_bytes(n):
    ours = permutation(n, torch.Generator().manual_seed(n))
    assert ours.dtype == torch.int32
    assert ours.tolist() == torch.randperm(n, generator=torch.Generator().manual_seed(n)).tolist()


@given(st.lists(st.booleans(), max_size=30))
def test_masks_and_indices(values):
    mask = torch.tensor(values, dtype=torch.bool)
    indices = indices_of(mask)
    assert indices.dtype == torch.int64
    assert indices.tolist() == [i for i, value in enumerate(values) if value]
    assert torch.equal(mask_of(indices.flip(0), len(values)), mask)
    assert torch.equal(mask_of(indices.int(), len(values)), mask)


@given(st.data(), st.sampled_from([torch.float32, torch.float64, torch.int32]))
def test_the_kth_highest_is_that_of_a_sort(data, dtype):
    value = (
        st.integers(-5, 5)
        if dtype == torch.int32
        else st.sampled_from([-math.inf, -1.5, 0.0, 2.0, 2.5, math.inf])
    )
    values = data.draw(st.lists(value, min_size=1, max_size=20))
    k = data.draw(st.integers(1, len(values)))
    scores = torch.tensor(values, dtype=dtype)
    found = kth_highest(scores, k)
    assert found.item() == sorted(values, reverse=True)[k - 1]
    assert scores.tolist() == values  # not touched


@given(st.lists(st.booleans(), min_size=1, max_size=30), st.integers(0, 30), st.integers(0, 5))
def test_a_draw_is_of_the_pool(values, k, seed):
    pool = torch.tensor(values)
    drawn = draw(pool, k, torch.Generator().manual_seed(seed))
    assert not bool((drawn & ~pool).any())
    assert int(drawn.sum()) == min(k, sum(values))
    # The k that come first of a permutation of the pool.
    first = torch.randperm(sum(values), generator=torch.Generator().manual_seed(seed))[:k]
    assert indices_of(drawn).tolist() == indices_of(pool)[first].sort().values.tolist()


def test_a_draw_is_uniform():
    pool = torch.tensor([True] * 6 + [False] * 3)
    generator = torch.Generator().manual_seed(0)
    times = sum(draw(pool, 2, generator).int() for _ in range(3000))
    assert times[6:].tolist() == [0, 0, 0]
    assert (times[:6] - 1000).abs().max() < 120  # 4.6 standard deviations


def test_a_plan_in_any_order_is_checked():
    EpochPlan(torch.tensor([3, 0, 2])).check(4)
    EpochPlan(torch.tensor([0, 2, 3])).check(4)
    for wrong in ([0, 2, 2], [2, 0, 2]):
        with pytest.raises(ValueError, match="only 2 different ones"):
            EpochPlan(torch.tensor(wrong)).check(4)


def test_top_k_of_none_and_of_all():
    generator = torch.Generator().manual_seed(0)
    assert top_k(torch.ones(3), 0, generator).tolist() == []
    assert top_k(torch.ones(3), 3, generator).tolist() == [0, 1, 2]
