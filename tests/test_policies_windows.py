"""SeTa and its groups."""

import itertools

import pytest
import torch
from choosing import (
    INF,
    NAN,
    assert_refused,
    chi_square,
    counts_of,
    epochs_of,
    generator,
    kept,
    plan_of,
)
from hypothesis import given
from hypothesis import strategies as st

from hf_dynprune.policies import SeTa
from hf_dynprune.policies.windows import easy_to_hard

# ---- groups from easy to hard --------------------------------------------------------------------


def squares(values: list[float], groups: list[int]) -> float:
    """Sum of the squared distances to the means of the groups."""
    total = 0.0
    for group in set(groups):
        members = [value for value, g in zip(values, groups, strict=True) if g == group]
        total += sum((value - sum(members) / len(members)) ** 2 for value in members)
    return total


def least_squares(values: list[float], k: int) -> float:
    """The least such sum, by trying all divisions of the sorted values."""
    values = sorted(values)
    return min(
        squares(values, [sum(i >= cut for cut in cuts) for i in range(len(values))])
        for cuts in itertools.combinations(range(1, len(values)), k - 1)
    )


def test_groups_by_hand():
    losses = torch.tensor([5.0, 0.2, 9.0, 0.0, 5.1, 0.1])
    assert easy_to_hard(losses, 3).tolist() == [1, 0, 2, 0, 1, 0]
    assert easy_to_hard(losses, 1).tolist() == [0] * 6
    losses = torch.tensor([0.0, 0.0, 1.0, 0.0, 2.0, 2.0])
    assert easy_to_hard(losses, 3).tolist() == [0, 0, 1, 0, 2, 2]
    most = easy_to_hard(torch.arange(2000.0), 512)  # as many groups as are allowed
    assert most.unique().tolist() == list(range(512))


def test_groups_of_fewer_losses_than_groups_are_of_equal_size():
    assert easy_to_hard(torch.full((6,), 0.7), 3).tolist() == [0, 0, 1, 1, 2, 2]
    assert easy_to_hard(torch.tensor([9.0, 0.0, 9.0, 0.0]), 4).tolist() == [2, 0, 3, 1]
    assert easy_to_hard(torch.tensor([3.0]), 5).tolist() == [0]
    assert easy_to_hard(torch.empty(0), 5).tolist() == []


@given(values=st.lists(st.floats(0, 1e4, width=32), min_size=1, max_size=9), k=st.integers(1, 4))
def test_groups_are_the_best_division(values, k):
    groups = easy_to_hard(torch.tensor(values), k).tolist()
    order = sorted(range(len(values)), key=values.__getitem__)
    assert [groups[i] for i in order] == sorted(groups)
    if len(set(values)) >= k:
        assert set(groups) == set(range(k))
        assert (
            squares(values, groups)
            <= least_squares(values, k) * (1 + 1e-6) + 1e-6 * max(values) ** 2
        )
        assert all(groups[i] == groups[j] for i in order for j in order if values[i] == values[j])


@pytest.mark.parametrize("shape", ["uniform", "lognormal", "heavy tail"])
@pytest.mark.parametrize("k", [2, 5, 10])
def test_groups_of_many_losses_are_as_good_as_those_of_scikit_learn(shape, k):
    cluster = pytest.importorskip("sklearn.cluster")
    uniform, normal = (
        torch.rand(20_000, generator=generator()),
        torch.randn(20_000, generator=generator()),
    )
    losses = {
        "uniform": uniform,
        "lognormal": normal.exp(),
        "heavy tail": uniform.clamp(min=1e-6) ** -0.7,
    }[shape]
    theirs = cluster.KMeans(k, n_init=3, random_state=0).fit(losses[:, None].numpy())
    groups = easy_to_hard(losses, k)
    sums = torch.zeros(k, dtype=torch.float64).index_add_(0, groups, losses.double())
    means = sums / groups.bincount(minlength=k)
    assert bool((means.diff() > 0).all())
    assert float(((losses.double() - means[groups]) ** 2).sum()) <= theirs.inertia_ * 1.002


# ---- the window ----------------------------------------------------------------------------------


GROUPED = [0.0, 0.01, 1.0, 1.01, 2.0, 2.01, 3.0, 3.01, 4.0, 4.01]  # five pairs


@pytest.mark.parametrize(
    ("epoch", "samples"),
    [
        (0, [0, 1, 2, 3]),
        (1, [2, 3, 4, 5]),
        (2, [4, 5, 6, 7]),
        (3, [6, 7, 8, 9]),
        (4, [0, 1, 2, 3]),
        (7, [6, 7, 8, 9]),
    ],
)
def test_window_slides_from_easy_to_hard(epoch, samples):
    policy = SeTa(groups=5, window=0.4)  # 2 groups wide, 4 places
    assert kept(plan_of(policy, GROUPED, epoch=epoch)) == samples
    # By choices, so that no place is left out.
    later = SeTa(groups=5, window=0.4, period=4, first=3)
    assert kept(plan_of(later, GROUPED, epoch=3 + 4 * epoch)) == samples


def test_first_epoch_of_seta_trains_on_its_draw():
    assert epochs_of(SeTa(), 12, 1) == [list(range(12))]
    policy = SeTa(prune_ratio=0.3)
    draws = [epochs_of(policy, 10, 1, seed)[0] for seed in range(300)]
    assert {len(draw) for draw in draws} == {7}
    assert chi_square(counts_of(draws, 10)) < 38  # 9 degrees of freedom: p = 2e-5


def test_seta_keeps_what_was_never_observed_and_not_what_gave_no_number():
    scores = [*GROUPED, INF, INF, -INF]
    assert kept(plan_of(SeTa(groups=5, window=0.4), scores, epoch=1)) == [2, 3, 4, 5, 10, 11]
    assert kept(plan_of(SeTa(), [-INF, -INF])) == [0, 1]  # nothing else is left


def test_end_of_seta_is_a_uniform_draw():
    policy = SeTa(prune_ratio=0.3, groups=5, window=0.4, annealing=0.2)
    assert policy.planned_size(10, 7, 0.79) is None
    for progress in (0.8, 1 - 0.2, 0.95):
        assert policy.planned_size(10, 8, progress) == 7
        draws = [
            kept(plan_of(policy, GROUPED, seed=seed, epoch=8, progress=progress))
            for seed in range(100)
        ]
        assert {len(draw) for draw in draws} == {7}
        assert len(set(map(tuple, draws))) > 40  # of 120
    assert len(kept(plan_of(policy, GROUPED, epoch=8, progress=0.79))) <= 4
    assert len(kept(plan_of(SeTa(groups=5, window=0.4, annealing=0.0), GROUPED, progress=1.0))) == 4


def test_seta_divides_the_draw_only():
    policy = SeTa(prune_ratio=0.5, groups=5, window=0.2)
    for seed in range(30):
        assert (
            len(kept(plan_of(policy, [float(i) for i in range(10)], seed=seed, epoch=seed))) == 1
        )  # 5 drawn, each its group


def test_width_of_the_window_is_rounded_and_not_0():
    with pytest.raises(ValueError, match=r"window=0\.1 .*groups=4"):
        SeTa(groups=4, window=0.1)
    assert SeTa.paper_like() == SeTa(prune_ratio=0.1, groups=5, window=0.9)
    assert (
        len(kept(plan_of(SeTa.paper_like(prune_ratio=0.0), GROUPED))) == 8
    )  # round(4.5) = 4 groups


# ---- fields --------------------------------------------------------------------------------------


BAD = [
    *[("prune_ratio", v, ValueError) for v in (-0.1, 0.91, 1, NAN)],
    *[("prune_ratio", v, TypeError) for v in ("0.5", True, None)],
    *[("groups", v, ValueError) for v in (0, -1, 513)],
    *[("groups", v, TypeError) for v in (2.5, "5", None, True)],
    *[("window", v, ValueError) for v in (0, 1.1, NAN)],
    *[("window", v, TypeError) for v in ("0.5", None, True)],
    *[("annealing", v, ValueError) for v in (-0.1, 1.1)],
]


@pytest.mark.parametrize(("name", "value", "error"), BAD)
def test_bad_value_is_named(name, value, error):
    assert_refused(SeTa, name, value, error)
