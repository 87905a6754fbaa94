"""The rules that later papers compare with, against numbers worked out by hand, and what their fields may be."""

import itertools
import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_policies import INF, NAN, by_score, chi_square, choice, epochs_of, generator, table_of

from hf_dynprune.policies import (
    IES,
    KAKURENBO,
    EpochPlan,
    InfoBatch,
    LossProportional,
    OrderDP,
    PruningPolicy,
    SeTa,
    make_policy,
)
from hf_dynprune.policies.rivals import easy_to_hard
from hf_dynprune.pruner import DynamicPruner
from hf_dynprune.scores import SampleTable


def plan_of(
    policy: PruningPolicy, scores: list[float], seed: int = 0, epoch: int = 0, progress: float = 0.0
) -> EpochPlan:
    """What the policy alone makes of these scores."""
    table = SampleTable(len(scores), policy.columns)
    plan = policy.plan(
        table, score=torch.tensor(scores), epoch=epoch, progress=progress, generator=generator(seed)
    )
    plan.check(len(scores))
    return plan


def weights_of(plan: EpochPlan) -> dict[int, float]:
    """The weight of each kept sample."""
    weights = torch.ones(len(plan)) if plan.weights is None else plan.weights
    return dict(sorted(zip(plan.indices.tolist(), weights.tolist(), strict=True)))


def kept(plan: EpochPlan) -> list[int]:
    return sorted(plan.indices.tolist())


# ---- loss-proportional ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("alpha", "keep_ratio", "probabilities"),
    [
        # One of three, losses 1, 2, 3.
        (1, 1 / 3, {(0,): 1 / 6, (1,): 2 / 6, (2,): 3 / 6}),
        (2, 1 / 3, {(0,): 1 / 14, (1,): 4 / 14, (2,): 9 / 14}),
        # Two of three, in either order: p_i p_j / (1 - p_i) + p_j p_i / (1 - p_j).
        (1, 2 / 3, {(0, 1): 1 / 15 + 1 / 12, (0, 2): 1 / 10 + 1 / 6, (1, 2): 1 / 4 + 1 / 3}),
    ],
)
def test_loss_proportional_draws_with_these_probabilities(alpha, keep_ratio, probabilities):
    assert sum(probabilities.values()) == pytest.approx(1)
    policy, draws = LossProportional(keep_ratio, alpha=alpha), 4000
    counts = dict.fromkeys(probabilities, 0)
    for seed in range(draws):
        counts[tuple(by_score(policy, [1.0, 2.0, 3.0], seed))] += 1
    deviation = sum((counts[s] - draws * p) ** 2 / (draws * p) for s, p in probabilities.items())
    assert deviation < 22  # 2 degrees of freedom: p = 2e-5


def test_loss_proportional_scores_by_the_moving_mean():
    policy = LossProportional(decay=0.8)
    table = table_of(policy, {0: [1.0, 2.0, 0.5], 1: [3.0]}, n=3)
    assert policy.score(table)[:2].tolist() == pytest.approx(
        [0.2 * (0.2 * 1.0 + 0.8 * 2.0) + 0.8 * 0.5, 3.0]
    )
    assert table["mean"][2].isnan()


def test_losses_of_0_come_last_and_without_preference():
    counts = [0] * 5
    for seed in range(600):
        samples = by_score(LossProportional(0.4), [0.0, 1e-30, 0.0, -2.0, 0.0], seed)
        assert 1 in samples
        for i in samples:
            counts[i] += 1
    assert counts[1] == 600
    assert chi_square([counts[i] for i in (0, 2, 3, 4)]) < 25  # 3 degrees of freedom: p = 2e-5


def test_losses_of_0_come_before_those_that_are_no_number():
    policy = LossProportional(2 / 3)
    assert choice(policy, table_of(policy, {0: [NAN], 1: [0.0], 2: [5.0]}, n=3)) == [1, 2]


def test_loss_proportional_takes_what_was_never_observed_before_the_highest_loss():
    policy = LossProportional(0.5)
    assert choice(policy, table_of(policy, {0: [1e30], 1: [3e38]}, n=4)) == [2, 3]


def test_very_small_and_large_losses_keep_their_proportions():
    for scale in (1e-30, 1e30):
        counts = [0, 0]
        for seed in range(2000):
            counts[by_score(LossProportional(0.5), [scale, 3 * scale], seed)[0]] += 1
        assert counts[1] / 2000 == pytest.approx(3 / 4, abs=0.045)  # standard error 0.01


# ---- OrderDP -------------------------------------------------------------------------------------


def test_order_dp_keeps_by_rank_within_a_draw():
    n, draws = 10, 3000  # 3 kept of 6 drawn of 10
    counts = [0] * n
    for seed in range(draws):
        for i in by_score(OrderDP(0.3, draw_ratio=0.6), [float(i) for i in range(n)], seed):
            counts[i] += 1
    # Of rank j: it is drawn (0.6), and of the other 5 drawn at most 2 are of the j - 1 higher ones.
    expected = [
        0.6
        * sum(math.comb(j - 1, a) * math.comb(10 - j, 5 - a) for a in range(3))
        / math.comb(9, 5)
        for j in range(1, 11)
    ]
    assert expected[:3] == pytest.approx([0.6] * 3)
    assert expected[6] == pytest.approx(0.6 * 15 / 126)
    assert sum(expected) == pytest.approx(3)
    for count, share in zip(counts, reversed(expected), strict=True):
        assert abs(count - draws * share) <= 4.5 * math.sqrt(draws * share * (1 - share))


def test_order_dp_at_its_limits_is_the_top_and_random_pruning():
    scores = [float(i * 7 % 20) for i in range(20)]
    top = sorted(range(20), key=scores.__getitem__)[-8:]
    assert by_score(OrderDP(0.4, draw_ratio=1.0), scores) == sorted(top)
    counts = [0] * 20
    for seed in range(500):
        for i in by_score(OrderDP(0.4, draw_ratio=0.4), scores, seed):
            counts[i] += 1
    assert chi_square(counts) < 55  # 19 degrees of freedom: p = 2e-5


def test_order_dp_leaves_out_what_is_barred():
    for seed in range(20):
        assert set(
            by_score(OrderDP(0.4), [-INF, 1.0, -INF, 2.0, 3.0, 4.0, 5.0, -INF, 6.0, -INF], seed)
        ) <= {
            1,
            3,
            4,
            5,
            6,
            8,
        }
        # Fewer than wanted are left: the barred fill up.
        assert set(by_score(OrderDP(0.4), [-INF] * 7 + [1.0, 2.0, 3.0], seed)) > {7, 8, 9}


def test_order_dp_draws_three_quarters_unless_told():
    assert OrderDP().draw_ratio == 0.75
    assert OrderDP(0.9).draw_ratio == 0.9
    assert OrderDP.paper_like() == OrderDP(0.3, draw_ratio=0.8)
    with pytest.raises(
        ValueError,
        match=r"draw_ratio=0.2 is out of range: wanted is a share in \[keep_ratio, 1\] = \[0.5, 1\]",
    ):
        OrderDP(0.5, draw_ratio=0.2)


# ---- InfoBatch as published ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prune_ratio", "drawn", "weight"),
    [(0.5, 1, 2.0), (0.25, 2, 4 / 3), (0.0, 3, 1.0), (0.9, 0, None)],
)
def test_info_batch_by_hand(prune_ratio, drawn, weight):
    # Mean 4: below it 3 samples, of which floor((1 - r) 3) are kept. The one that equals the mean is not below.
    samples = weights_of(plan_of(InfoBatch(prune_ratio=prune_ratio), [3.0, 10.0, 1.0, 4.0, 2.0]))
    assert {i: w for i, w in samples.items() if i in (1, 3)} == {1: 1.0, 3: 1.0}
    assert len(samples) == 2 + drawn
    assert all(w == pytest.approx(weight) for i, w in samples.items() if i not in (1, 3))


def test_info_batch_floors_what_it_means():
    # (1 - 0.9) * 10 is 0.9999999999999998 in a computer.
    assert sorted(
        weights_of(plan_of(InfoBatch(prune_ratio=0.9), [0.0] * 10 + [100.0])).values()
    ) == [1.0, 10.0]


def test_mean_of_info_batch_is_that_of_observed_samples():
    policy = InfoBatch()
    # Mean 2, below it one sample, of which none is kept. Losses of 0 for the others would make the mean 0.4.
    assert choice(policy, table_of(policy, {0: [1.0], 1: [3.0]}, n=10)) == list(range(1, 10))
    # Sample 2 was observed and gave nothing: left out.
    assert choice(policy, table_of(policy, {0: [1.0], 1: [3.0], 2: [NAN]}, n=5)) == [1, 3, 4]


@pytest.mark.parametrize(
    "losses", [{}, {i: [0.7] for i in range(24)}, {i: [NAN] for i in range(24)}]
)
def test_info_batch_keeps_all_where_it_cannot_tell(losses):
    policy, n = InfoBatch(), 24
    assert torch.full((n,), 0.7).mean() > 0.7  # in float32 all are below their mean
    pruner = DynamicPruner(policy, n, num_epochs=1)
    pruner.table.load_state_dict(table_of(policy, losses, n).state_dict())
    pruner.begin_epoch(0)
    assert sorted(pruner.sampler) == list(range(n))
    assert pruner.weights(torch.arange(n)).tolist() == [1.0] * n


def test_info_batch_scores_by_the_last_loss():
    policy = InfoBatch()
    assert policy.score(table_of(policy, {0: [5.0, 2.0, 3.0]}, n=1)).tolist() == [3.0]


def test_last_eighth_of_info_batch_is_full():
    policy = InfoBatch()
    table = table_of(policy, {i: [float(i)] for i in range(10)}, n=10)
    assert [len(epoch) for epoch in epochs_of(policy, 10, 16, table=table)] == [7] * 14 + [10] * 2
    assert {len(epoch) for epoch in epochs_of(InfoBatch(last=0.0), 10, 16, table=table)} == {7}


def test_size_of_info_batch_depends_on_the_data_unless_it_is_given():
    assert InfoBatch().planned_size(10, 0, 0.0) is None
    assert InfoBatch(keep_ratio=0.3).planned_size(10, 0, 0.0) == 3


# ---- InfoBatch with an exact number --------------------------------------------------------------


@pytest.mark.parametrize(
    ("keep_ratio", "max_rescale", "whole", "weight"),
    [
        # Losses 1 to 10, mean 5.5: 5 above.
        (0.5, 4.0, 3, 7 / 2),  # floor((5 * 4 - 10) / 3) = 3
        (0.5, 2.0, 0, 10 / 5),  # floor((5 * 2 - 10) / 1) = 0: all weigh 1 / keep_ratio
        (0.5, 8.0, 4, 6 / 1),  # floor((5 * 8 - 10) / 7) = 4
        (0.5, 100.0, 4, 6 / 1),  # floor((5 * 100 - 10) / 99) = 4
        (0.9, 4.0, 5, 5 / 4),  # floor((9 * 4 - 10) / 3) = 8, but only 5 are above the mean
        (0.3, 4.0, 0, 10 / 3),  # floor((3 * 4 - 10) / 3) = 0
        (0.4, 4.0, 2, 8 / 2),  # floor((4 * 4 - 10) / 3) = 2
    ],
)
def test_exact_info_batch_by_hand(keep_ratio, max_rescale, whole, weight):
    policy = InfoBatch(keep_ratio=keep_ratio, max_rescale=max_rescale)
    for seed in range(5):
        samples = weights_of(plan_of(policy, [float(i + 1) for i in range(10)], seed))
        assert len(samples) == round(10 * keep_ratio)
        assert [i for i, w in samples.items() if w == 1.0] == list(range(10 - whole, 10))
        assert all(w == pytest.approx(weight) for i, w in samples.items() if i < 10 - whole)


def test_exact_info_batch_tells_no_equal_losses_apart():
    # h would be 3 of the 5 equal highest: chance would give one of them weight 1 and the next 3.5.
    samples = weights_of(plan_of(InfoBatch(keep_ratio=0.5), [1.0] * 5 + [9.0] * 5))
    assert list(samples.values()) == [2.0] * 5


def test_never_observed_samples_in_an_exact_info_batch():
    policy = InfoBatch(keep_ratio=0.5)
    # Two of ten: they and the highest loss weigh 1; 2 of the other 7 are drawn.
    table = table_of(policy, {i: [i + 1.0] for i in range(8)}, n=10)
    for seed in range(5):
        pruner = DynamicPruner(policy, 10, num_epochs=10, seed=seed)
        pruner.table.load_state_dict(table.state_dict())
        pruner.begin_epoch(0)
        samples = {i: pruner.weights(torch.tensor([i])).item() for i in pruner.sampler}
        assert {i for i, w in samples.items() if w == 1.0} == {7, 8, 9}
        assert sorted(samples.values()) == [1.0, 1.0, 1.0, 3.5, 3.5]
    # Four of ten are more than the 3 that may weigh 1; so are all ten.
    for known in (6, 0):
        table = table_of(policy, {i: [i + 1.0] for i in range(known)}, n=10)
        pruner = DynamicPruner(policy, 10, num_epochs=10)
        pruner.table.load_state_dict(table.state_dict())
        pruner.begin_epoch(0)
        assert len(pruner.sampler) == 5
        assert pruner.weights(torch.tensor(list(pruner.sampler))).tolist() == [2.0] * 5


LOSSES = st.one_of(
    st.lists(st.floats(0, 100, width=32), min_size=1, max_size=40),
    st.lists(st.sampled_from([-INF, 0.0, 1.0, 2.0, INF]), min_size=1, max_size=40),
)


@given(
    scores=LOSSES,
    keep_ratio=st.floats(0.25, 1),
    max_rescale=st.floats(4.0, 50),
    seed=st.integers(0, 9),
)
def test_exact_info_batch_is_exact(scores, keep_ratio, max_rescale, seed):
    n = len(scores)
    plan = plan_of(InfoBatch(keep_ratio=keep_ratio, max_rescale=max_rescale), scores, seed)
    samples, k = weights_of(plan), max(1, round(keep_ratio * n))
    assert len(samples) == k
    usable = [i for i, score in enumerate(scores) if score > -INF]
    if len(usable) <= k:
        assert set(samples.values()) == {1.0}
    else:
        assert set(samples) <= set(usable)
        # The weights sum to the number of samples; beyond the cap only by the rounding of K.
        assert sum(samples.values()) == pytest.approx(len(usable), rel=1e-5)
        assert max(samples.values()) <= max(max_rescale, len(usable) / k) * (1 + 1e-6)
        assert len({w for w in samples.values() if w != 1.0}) <= 1


@pytest.mark.parametrize(
    "policy",
    [
        InfoBatch(),
        InfoBatch(prune_ratio=0.75),
        InfoBatch(keep_ratio=0.5),
        InfoBatch(keep_ratio=0.3),
    ],
)
def test_weighted_sum_of_info_batch_is_unbiased(policy):
    scores = [
        0.1,
        0.2,
        0.4,
        0.8,
        0.3,
        0.5,
        0.6,
        0.7,
        9.0,
        7.0,
        3.0,
        5.0,
    ]  # mean 2.3: 8 below, of which 2 or 4 are whole
    other = [
        1.0,
        -4.0,
        2.0,
        8.0,
        0.0,
        3.0,
        5.0,
        -1.0,
        2.0,
        6.0,
        -7.0,
        1.0,
    ]  # such as a gradient: known to no one
    sums = torch.empty(3000, dtype=torch.float64)
    for seed in range(len(sums)):
        sums[seed] = sum(other[i] * w for i, w in weights_of(plan_of(policy, scores, seed)).items())
    assert abs(sums.mean() - sum(other)) <= 4.5 * sums.std() / math.sqrt(len(sums))
    assert sums.std() > 0.5


@pytest.mark.parametrize("policy", [InfoBatch(), InfoBatch(keep_ratio=0.5)])
def test_draw_of_info_batch_is_uniform(policy):
    counts = [0] * 12
    for seed in range(600):
        for i in kept(
            plan_of(policy, [float(i) for i in range(8)] + [90.0, 91.0, 92.0, 93.0], seed)
        ):
            counts[i] += 1
    assert counts[8 if policy.keep_ratio is None else 9] == 600
    assert chi_square(counts[:8]) < 35  # 7 degrees of freedom: p = 1e-5


def test_exact_info_batch_leaves_out_what_is_barred():
    # 6 are usable, K = 4: h = min(2 above the mean, floor((16 - 6) / 3) = 3); 2 of the other 4 weigh 2.
    scores = [-INF, 1.0, -INF, 2.0, 3.0, 4.0, 50.0, -INF, 60.0, -INF]
    for seed in range(10):
        samples = weights_of(plan_of(InfoBatch(keep_ratio=0.4), scores, seed))
        assert samples.pop(6) == samples.pop(8) == 1.0
        assert list(samples.values()) == [2.0, 2.0]
        assert set(samples) < {1, 3, 4, 5}
    assert set(kept(plan_of(InfoBatch(keep_ratio=0.8), scores))) > {1, 3, 4, 5, 6, 8}


def test_forms_of_info_batch():
    assert InfoBatch() == InfoBatch(prune_ratio=0.5) == InfoBatch.paper_like()
    assert (InfoBatch().prune_ratio, InfoBatch().keep_ratio, InfoBatch().last) == (0.5, None, 0.125)
    assert InfoBatch(keep_ratio=0.5).prune_ratio is None
    with pytest.raises(
        ValueError,
        match=r"prune_ratio=0.5 and keep_ratio=0.3 are two forms of InfoBatch: wanted is one\. pru",
    ):
        InfoBatch(prune_ratio=0.5, keep_ratio=0.3)
    with pytest.raises(TypeError):
        InfoBatch(0.3)  # which of the two?


def test_info_batch_refuses_what_its_cap_cannot_keep():
    with pytest.raises(
        ValueError,
        match=r"keep_ratio=0.2 is out of range for max_rescale=4.0: .* weigh 1 / keep_ratio = 5 ",
    ) as e:
        InfoBatch(keep_ratio=0.2)
    assert (
        "keep_ratio >= 1 / max_rescale = 0.25: raise keep_ratio or max_rescale, or take RandomPruning"
        in str(e.value)
    )
    for keep_ratio, max_rescale in (
        (0.25, 4),
        (0.2, 5),
        (0.1, 10),
        (0.3, 1 / 0.3),
        (1 / 3, 3),
        (1, 1.001),
    ):
        InfoBatch(keep_ratio=keep_ratio, max_rescale=max_rescale)


# ---- SeTa ----------------------------------------------------------------------------------------


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
    assert easy_to_hard(torch.tensor([5.0, 0.2, 9.0, 0.0, 5.1, 0.1]), 3).tolist() == [
        1,
        0,
        2,
        0,
        1,
        0,
    ]
    assert easy_to_hard(torch.tensor([5.0, 0.2, 9.0, 0.0, 5.1, 0.1]), 1).tolist() == [0] * 6
    assert easy_to_hard(torch.tensor([0.0, 0.0, 1.0, 0.0, 2.0, 2.0]), 3).tolist() == [
        0,
        0,
        1,
        0,
        2,
        2,
    ]
    assert easy_to_hard(torch.arange(2000.0), 512).unique().tolist() == list(
        range(512)
    )  # as many as are allowed


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
    assert (
        chi_square([sum(i in draw for draw in draws) for i in range(10)]) < 38
    )  # 9 degrees of freedom: p = 2e-5


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
            kept(plan_of(policy, GROUPED, seed, epoch=8, progress=progress)) for seed in range(100)
        ]
        assert {len(draw) for draw in draws} == {7}
        assert len(set(map(tuple, draws))) > 40  # of 120
    assert len(kept(plan_of(policy, GROUPED, epoch=8, progress=0.79))) <= 4
    assert len(kept(plan_of(SeTa(groups=5, window=0.4, annealing=0.0), GROUPED, progress=1.0))) == 4


def test_seta_divides_the_draw_only():
    policy = SeTa(prune_ratio=0.5, groups=5, window=0.2)
    for seed in range(30):
        assert (
            len(kept(plan_of(policy, [float(i) for i in range(10)], seed, epoch=seed))) == 1
        )  # 5 drawn, each its group


def test_width_of_the_window_is_rounded_and_not_0():
    with pytest.raises(
        ValueError,
        match=r"window=0.1 of groups=4 is no group at all: wanted is window \* groups > 0.5; raise",
    ):
        SeTa(groups=4, window=0.1)
    assert SeTa.paper_like() == SeTa(prune_ratio=0.1, groups=5, window=0.9)
    assert (
        len(kept(plan_of(SeTa.paper_like(prune_ratio=0.0), GROUPED))) == 8
    )  # round(4.5) = 4 groups


# ---- KAKURENBO -----------------------------------------------------------------------------------


def observed(policy: PruningPolicy, loss: list, correct: list, confidence: list) -> SampleTable:
    table = SampleTable(len(loss), policy.columns)
    values = {"loss": loss, "correct": correct, "confidence": confidence}
    signals = {name: torch.tensor(column, dtype=torch.float32) for name, column in values.items()}
    table.observe(torch.arange(len(loss)), signals, update=policy.observe, epoch=0)
    return table


def hidden_of(
    policy: KAKURENBO, table: SampleTable, progress: float = 0.0, seed: int = 0
) -> set[int]:
    score = policy.score(table).nan_to_num(nan=INF)
    plan = policy.plan(table, score=score, epoch=1, progress=progress, generator=generator(seed))
    assert plan.lr_scale == pytest.approx(len(table) / len(plan))
    return set(range(len(table))) - set(plan.indices.tolist())


EASY_FIRST = [i / 10 for i in range(10)]


def test_kakurenbo_by_hand():
    policy = KAKURENBO()  # the 3 lowest are candidates
    assert hidden_of(policy, observed(policy, EASY_FIRST, [1] * 10, [0.9] * 10)) == {0, 1, 2}
    # Sample 1 was misclassified, sample 2 is not sure; sample 0 is just sure enough. Nobody takes their place.
    table = observed(policy, EASY_FIRST, [1, 0, 1, *[1] * 7], [0.7, 0.9, 0.69, *[1.0] * 7])
    assert hidden_of(policy, table) == {0}
    plan = policy.plan(
        table, score=policy.score(table), epoch=1, progress=0.0, generator=generator()
    )
    assert plan.lr_scale == pytest.approx(10 / 9)  # 1 / (1 - 0.1), not 1 / (1 - 0.3)
    assert plan.weights is None
    unscaled = KAKURENBO(scale_lr=False)
    assert (
        unscaled.plan(
            table, score=policy.score(table), epoch=1, progress=0.0, generator=generator()
        ).lr_scale
        == 1.0
    )


@pytest.mark.parametrize(
    ("progress", "count"),
    # 0.3 * 100 * (1, 0.8, 0.6, 0.4): CIFAR-100 has steps at epochs 60, 120, 160 of 200.
    [
        (0.0, 30),
        (59 / 200, 30),
        (60 / 200, 24),
        (119 / 200, 24),
        (120 / 200, 18),
        (159 / 200, 18),
        (160 / 200, 12),
        (1.0, 12),
    ],
)
def test_share_hidden_goes_down_in_steps(progress, count):
    policy = KAKURENBO()
    table = observed(policy, [float(i) for i in range(100)], [1] * 100, [1.0] * 100)
    assert hidden_of(policy, table, progress) == set(range(count))
    assert hidden_of(KAKURENBO(schedule=[[0, 0.5]]), table, progress) == set(range(15))
    assert (
        len(hidden_of(policy, table, 0.3 - 1e-12)) == 24
    )  # a share that a float misses by a little is meant


def test_kakurenbo_hides_nothing_that_it_does_not_know():
    policy = KAKURENBO(scoring="trained")
    assert choice(policy, SampleTable(10, policy.columns)) == list(range(10))
    # Sample 0 gave no number: it is hidden first, whatever its confidence. Sample 1 is due again (max_age).
    table = observed(policy, EASY_FIRST, [1] * 10, [1.0] * 10)
    score = policy.score(table).clone()
    score[0], score[1] = -INF, INF
    table["confidence"][0] = NAN
    plan = policy.plan(table, score=score, epoch=1, progress=0.0, generator=generator())
    assert set(range(10)) - set(plan.indices.tolist()) == {0, 2, 3}
    score.fill_(INF)
    assert len(policy.plan(table, score=score, epoch=1, progress=0.0, generator=generator())) == 10


def test_ties_of_the_lowest_losses_are_hidden_at_random():
    policy = KAKURENBO()
    table = observed(policy, [0.0] * 10, [1] * 10, [1.0] * 10)
    counts = [0] * 10
    for seed in range(400):
        for i in hidden_of(policy, table, seed=seed):
            counts[i] += 1
    assert sum(counts) == 1200
    assert chi_square(counts) < 38  # 9 degrees of freedom: p = 2e-5


def test_schedule_survives_json():
    policy = KAKURENBO(schedule=((0, 1), (0.5, 0.25)))
    again = make_policy(**json.loads(json.dumps(policy.to_dict())))
    assert again == policy
    assert hash(again) == hash(policy)
    assert again.schedule == ((0.0, 1.0), (0.5, 0.25))


# ---- IES -----------------------------------------------------------------------------------------


def test_ies_score_by_hand():
    policy = IES()
    losses = {
        0: [8.0, 4.0, 2.0, 1.0, 1.0, 1.0],
        1: [9.0, 6.0, 5.0, 4.0, 3.0, 2.0],
        2: [5.0, 4.0, 2.0, 1.0, 1.0],
        3: [NAN],
    }
    score = policy.score(table_of(policy, losses, n=5))
    # Second differences of sample 0, the newest first: 1 - 2 + 1, 1 - 2 + 2, 1 - 4 + 4. The loss 8 is only waited for.
    assert score[0].item() == pytest.approx((0 + 1 + 1) / 3)
    assert score[1].item() == 0.0  # falls evenly
    assert score[2].item() == INF  # five losses
    assert score[3:].isnan().all()


def test_ies_leaves_out_what_stopped_bending():
    policy = IES(threshold=0.5, scoring="trained")
    straight, bent, edge = (
        [3.0, 3.0, 3.0, 3.0, 3.0, 3.0],
        [3.0, 3.0, 3.0, 5.0, 3.0, 3.0],
        [0.0, 0.0, 0.0, 0.0, 0.0, 1.5],
    )
    table = table_of(
        policy, {0: straight, 1: bent, 2: edge, 3: straight[:5], 4: straight, 5: [NAN]}, n=7
    )
    assert choice(policy, table) == [1, 2, 3, 6]  # sample 2 scores 0.5, which is not below
    assert choice(IES(threshold=0.51, scoring="trained"), table) == [1, 3, 6]
    table.observe(
        torch.tensor([0]), {"loss": torch.tensor([9.0])}, update=policy.observe, epoch=6
    )  # of a forward pass
    assert choice(policy, table) == [0, 1, 2, 3, 6]


def test_ies_keeps_one_where_all_are_mastered():
    policy = IES(scoring="trained")
    table = table_of(policy, {i: [1.0] * 5 + [1.0 + i * 1e-4] for i in range(4)}, n=4)
    assert choice(policy, table) == [3]
    assert choice(IES(threshold=0.0, scoring="trained"), table) == [0, 1, 2, 3]


def test_first_six_epochs_of_ies_train_on_everything():
    policy = IES(scoring="trained", threshold=1e9)
    pruner = DynamicPruner(policy, 4, num_epochs=8)
    sizes = []
    for epoch in range(8):
        pruner.begin_epoch(epoch)
        sizes.append(len(pruner.sampler))
        index = torch.tensor(list(pruner.sampler))
        pruner.observe(index, {"loss": index.float() ** 2 + epoch**2})
    assert sizes == [4] * 6 + [1, 1]


# ---- fields --------------------------------------------------------------------------------------

BAD = [
    *[(LossProportional, "alpha", v, ValueError) for v in (0, -1.0, NAN, INF)],
    *[(LossProportional, "alpha", v, TypeError) for v in ("1", None, True)],
    *[(LossProportional, "decay", v, ValueError) for v in (0, 1.1)],
    *[
        (cls, "keep_ratio", v, ValueError)
        for cls in (LossProportional, OrderDP, InfoBatch)
        for v in (0, 1.5, NAN)
    ],
    *[
        (cls, "keep_ratio", v, TypeError)
        for cls in (LossProportional, OrderDP)
        for v in ("0.3", True, None)
    ],
    *[(OrderDP, "draw_ratio", v, ValueError) for v in (0.1, 1.1, NAN)],
    *[(OrderDP, "draw_ratio", v, TypeError) for v in ("0.5", True)],
    *[(InfoBatch, "keep_ratio", v, TypeError) for v in ("0.3", True)],
    *[
        (cls, "prune_ratio", v, ValueError)
        for cls in (InfoBatch, SeTa)
        for v in (-0.1, 0.91, 1, NAN)
    ],
    *[(cls, "prune_ratio", v, TypeError) for cls in (InfoBatch, SeTa) for v in ("0.5", True)],
    *[(InfoBatch, "max_rescale", v, ValueError) for v in (1, 0.5, -4, INF, NAN)],
    *[(InfoBatch, "max_rescale", v, TypeError) for v in ("4", None, True)],
    (SeTa, "prune_ratio", None, TypeError),
    *[(SeTa, "groups", v, ValueError) for v in (0, -1, 513)],
    *[(SeTa, "groups", v, TypeError) for v in (2.5, "5", None, True)],
    *[(SeTa, "window", v, ValueError) for v in (0, 1.1, NAN)],
    *[(SeTa, "window", v, TypeError) for v in ("0.5", None, True)],
    *[(SeTa, "annealing", v, ValueError) for v in (-0.1, 1.1)],
    *[(KAKURENBO, "max_hidden", v, ValueError) for v in (-0.1, 1, 1.0, NAN)],
    *[(KAKURENBO, "max_hidden", v, TypeError) for v in ("0.3", None, True)],
    *[(KAKURENBO, "min_confidence", v, ValueError) for v in (-0.1, 1.1)],
    *[(KAKURENBO, "scale_lr", v, TypeError) for v in (1, None, "yes")],
    *[
        (KAKURENBO, "schedule", v, TypeError)
        for v in (1.0, None, "all", [0, 1], [[0, 1, 2]], [(0,)])
    ],
    *[
        (KAKURENBO, "schedule", v, ValueError)
        for v in ((), ((0.1, 1),), ((0, 1), (0.5, 1), (0.2, 1)), ((0, 1), (0, 0.5)))
    ],
    *[(IES, "threshold", v, ValueError) for v in (-1e-3, NAN, INF)],
    *[(IES, "threshold", v, TypeError) for v in ("1e-3", None, True)],
    *[
        (cls, "scoring", v, ValueError)
        for cls in (KAKURENBO, IES, InfoBatch)
        for v in ("some", None)
    ],
]


@pytest.mark.parametrize(("cls", "name", "value", "error"), BAD)
def test_bad_value_is_named(cls, name, value, error):
    with pytest.raises(error) as caught:
        cls(**{name: value})
    message = str(caught.value)
    assert f"{name}={value}" in message or f"{name}={value!r}" in message
    assert "wanted is" in message or "must be" in message


@pytest.mark.parametrize("schedule", [((0, 1.5),), ((0, -0.1),), ((0, 1), (1.5, 1))])
def test_bad_share_of_a_schedule_is_named(schedule):
    with pytest.raises(
        ValueError,
        match=r"schedule: the (share|factor)=(1.5|-0.1) is out of range: wanted is a share in \[0, 1\]",
    ):
        KAKURENBO(schedule=schedule)
    with pytest.raises(TypeError, match="schedule: the factor='all' is not a number"):
        KAKURENBO(schedule=((0, "all"),))


@pytest.mark.parametrize(
    "policy",
    [
        LossProportional(0.3, alpha=0.5, decay=1),
        OrderDP(0.3),
        InfoBatch(),
        InfoBatch(keep_ratio=0.3, last=0.0),
        SeTa(0.1, groups=5, window=0.9, annealing=0),
        KAKURENBO(0.4, scoring="all"),
        IES(2e-3, scoring="dropped", max_age=3),
    ],
)
def test_to_dict_is_json_and_comes_back(policy):
    again = make_policy(**json.loads(json.dumps(policy.to_dict())))
    assert again == policy
    assert hash(again) == hash(policy)


@pytest.mark.parametrize("cls", [LossProportional, InfoBatch, KAKURENBO, IES])
def test_what_the_authors_ran_is_the_default(cls):
    assert cls.paper_like() == cls()
    assert cls.paper_like(period=3) == cls(period=3)
