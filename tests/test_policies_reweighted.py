"""InfoBatch against numbers worked out by hand."""

import math

import pytest
import torch
from choosing import (
    INF,
    NAN,
    assert_refused,
    by_score,
    chi_square,
    chosen,
    counts_of,
    epochs_of,
    kept,
    plan_of,
    pruner_with,
    table_of,
    weights_of,
)
from hypothesis import given
from hypothesis import strategies as st

from hf_dynprune.policies import InfoBatch

# ---- as published --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prune_ratio", "drawn", "weight"),
    [(0.5, 1, 2.0), (0.25, 2, 4 / 3), (0.0, 3, 1.0), (0.9, 0, None)],
)
def test_info_batch_by_hand(prune_ratio, drawn, weight):
    # Mean 4. Below it are 3 samples, of which floor((1 - r) 3) are kept; 4 itself is not below.
    samples = weights_of(plan_of(InfoBatch(prune_ratio=prune_ratio), [3.0, 10.0, 1.0, 4.0, 2.0]))
    assert {i: w for i, w in samples.items() if i in (1, 3)} == {1: 1.0, 3: 1.0}
    assert len(samples) == 2 + drawn
    assert all(w == pytest.approx(weight) for i, w in samples.items() if i not in (1, 3))


def test_info_batch_floors_what_it_means():
    # (1 - 0.9) * 10 is 0.9999999999999998 in a computer.
    plan = plan_of(InfoBatch(prune_ratio=0.9), [0.0] * 10 + [100.0])
    assert sorted(weights_of(plan).values()) == [1.0, 10.0]


def test_mean_of_info_batch_is_that_of_observed_samples():
    policy = InfoBatch()
    # Mean 2. Below it is one sample, which is not kept. Zeros for the others would make it 0.4.
    assert chosen(policy, table_of(policy, {0: [1.0], 1: [3.0]}, n=10)) == list(range(1, 10))
    # Sample 2 was observed and gave nothing: left out.
    assert chosen(policy, table_of(policy, {0: [1.0], 1: [3.0], 2: [NAN]}, n=5)) == [1, 3, 4]


@pytest.mark.parametrize(
    "losses", [{}, {i: [0.7] for i in range(24)}, {i: [NAN] for i in range(24)}]
)
def test_info_batch_keeps_all_where_it_cannot_tell(losses):
    policy, n = InfoBatch(), 24
    assert torch.full((n,), 0.7).mean() > 0.7  # in float32 all are below their mean
    pruner = pruner_with(policy, table_of(policy, losses, n))
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


# ---- with an exact number ------------------------------------------------------------------------


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
    losses = [float(i + 1) for i in range(10)]
    for seed in range(5):
        samples = weights_of(plan_of(policy, losses, seed=seed))
        assert len(samples) == round(10 * keep_ratio)
        assert [i for i, w in samples.items() if w == 1.0] == list(range(10 - whole, 10))
        assert all(w == pytest.approx(weight) for i, w in samples.items() if i < 10 - whole)


def test_exact_info_batch_tells_no_equal_losses_apart():
    # h would be 3 of the 5 equal highest: chance would give one weight 1 and the next 3.5.
    samples = weights_of(plan_of(InfoBatch(keep_ratio=0.5), [1.0] * 5 + [9.0] * 5))
    assert list(samples.values()) == [2.0] * 5


def test_never_observed_samples_in_an_exact_info_batch():
    policy = InfoBatch(keep_ratio=0.5)
    # Two of ten: they and the highest loss weigh 1; 2 of the other 7 are drawn.
    table = table_of(policy, {i: [i + 1.0] for i in range(8)}, n=10)
    for seed in range(5):
        pruner = pruner_with(policy, table, epochs=10, seed=seed)
        pruner.begin_epoch(0)
        samples = {i: pruner.weights(torch.tensor([i])).item() for i in pruner.sampler}
        assert {i for i, w in samples.items() if w == 1.0} == {7, 8, 9}
        assert sorted(samples.values()) == [1.0, 1.0, 1.0, 3.5, 3.5]
    # Four of ten are more than the 3 that may weigh 1; so are all ten.
    for known in (6, 0):
        table = table_of(policy, {i: [i + 1.0] for i in range(known)}, n=10)
        pruner = pruner_with(policy, table, epochs=10)
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
    plan = plan_of(InfoBatch(keep_ratio=keep_ratio, max_rescale=max_rescale), scores, seed=seed)
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


def test_exact_info_batch_leaves_out_what_is_barred():
    # 6 are usable and K = 4, so h = min(2 above the mean, floor((16 - 6) / 3) = 3) = 2.
    # 2 of the other 4 are drawn and weigh 2.
    scores = [-INF, 1.0, -INF, 2.0, 3.0, 4.0, 50.0, -INF, 60.0, -INF]
    for seed in range(10):
        samples = weights_of(plan_of(InfoBatch(keep_ratio=0.4), scores, seed=seed))
        assert samples.pop(6) == samples.pop(8) == 1.0
        assert list(samples.values()) == [2.0, 2.0]
        assert set(samples) < {1, 3, 4, 5}
    assert set(kept(plan_of(InfoBatch(keep_ratio=0.8), scores))) > {1, 3, 4, 5, 6, 8}


# ---- both forms ----------------------------------------------------------------------------------


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
    # Mean 2.3: 8 are below it, 2 or 4 are whole.
    scores = [0.1, 0.2, 0.4, 0.8, 0.3, 0.5, 0.6, 0.7, 9.0, 7.0, 3.0, 5.0]
    # What a gradient might be: unknown to the policy.
    other = [1.0, -4.0, 2.0, 8.0, 0.0, 3.0, 5.0, -1.0, 2.0, 6.0, -7.0, 1.0]
    sums = torch.empty(3000, dtype=torch.float64)
    for seed in range(len(sums)):
        weights = weights_of(plan_of(policy, scores, seed=seed))
        sums[seed] = sum(other[i] * weight for i, weight in weights.items())
    assert abs(sums.mean() - sum(other)) <= 4.5 * sums.std() / math.sqrt(len(sums))
    assert sums.std() > 0.5


@pytest.mark.parametrize("policy", [InfoBatch(), InfoBatch(keep_ratio=0.5)])
def test_draw_of_info_batch_is_uniform(policy):
    scores = [float(i) for i in range(8)] + [90.0, 91.0, 92.0, 93.0]
    counts = counts_of((by_score(policy, scores, seed) for seed in range(600)), 12)
    assert counts[8 if policy.keep_ratio is None else 9] == 600
    assert chi_square(counts[:8]) < 35  # 7 degrees of freedom: p = 1e-5


# ---- fields --------------------------------------------------------------------------------------


def test_forms_of_info_batch():
    assert InfoBatch() == InfoBatch(prune_ratio=0.5) == InfoBatch.paper_like()
    assert (InfoBatch().prune_ratio, InfoBatch().keep_ratio, InfoBatch().last) == (0.5, None, 0.125)
    assert InfoBatch(keep_ratio=0.5).prune_ratio is None
    with pytest.raises(ValueError, match=r"prune_ratio=0\.5 .*keep_ratio=0\.3"):
        InfoBatch(prune_ratio=0.5, keep_ratio=0.3)
    with pytest.raises(TypeError):  # which of the two?
        InfoBatch(0.3)


def test_info_batch_refuses_what_its_cap_cannot_keep():
    with pytest.raises(ValueError, match=r"keep_ratio=0\.2 .*max_rescale=4\.0.* 0\.25"):
        InfoBatch(keep_ratio=0.2)
    for keep_ratio, max_rescale in (
        (0.25, 4),
        (0.2, 5),
        (0.1, 10),
        (0.3, 1 / 0.3),
        (1 / 3, 3),
        (1, 1.001),
    ):
        InfoBatch(keep_ratio=keep_ratio, max_rescale=max_rescale)


BAD = [
    *[("keep_ratio", v, ValueError) for v in (0, 1.5, NAN)],
    *[("keep_ratio", v, TypeError) for v in ("0.3", True)],
    *[("prune_ratio", v, ValueError) for v in (-0.1, 0.91, 1, NAN)],
    *[("prune_ratio", v, TypeError) for v in ("0.5", True)],
    *[("max_rescale", v, ValueError) for v in (1, 0.5, -4, INF, NAN)],
    *[("max_rescale", v, TypeError) for v in ("4", None, True)],
]


@pytest.mark.parametrize(("name", "value", "error"), BAD)
def test_bad_value_is_named(name, value, error):
    assert_refused(InfoBatch, name, value, error)
