"""Choosing among N samples: counts, masks, permutations, draws and the top K."""

import math

import pytest
import torch
from choosing import INF, chi_square, counts_of, generator
from hypothesis import given
from hypothesis import strategies as st

from hf_dynprune.selection import (
    draw,
    floor_share,
    indices_of,
    keep_count,
    kth_highest,
    mask_of,
    permutation,
    top_k,
    top_mask,
)

# ---- counts --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keep_ratio", "n", "k"),
    [
        (0.3, 10, 3),
        (0.3, 7, 2),  # 2.1
        (0.3, 9, 3),  # 2.7
        (0.29, 100, 29),  # 28.999999999999996
        (0.7, 5_000, 3_500),
        (1, 7, 7),
        (1.0, 7, 7),
        (0.999, 10, 10),
        (0.001, 10, 1),  # at least one
    ],
)
def test_number_kept(keep_ratio, n, k):
    assert keep_count(keep_ratio, n) == k


@pytest.mark.parametrize(
    ("share", "n", "expected"),
    [(0.25, 10, 2), (1 - 0.9, 10, 1), (0.3, 10, 3), (0.0, 10, 0), (1.0, 7, 7), (0.5, 1, 0)],
)
def test_a_share_rounds_down(share, n, expected):
    assert floor_share(share, n) == expected


@given(part=st.integers(0, 200), n=st.integers(1, 200))
def test_a_share_of_whole_samples_is_that_many(part, n):
    part = min(part, n)
    assert floor_share(part / n, n) == part
    assert floor_share(1 - (n - part) / n, n) == part


# ---- masks and permutations ----------------------------------------------------------------------


@pytest.mark.parametrize("n", [0, 1, 2, 1000, 70_001])
def test_the_permutation_is_torchs_in_half_the_bytes(n):
    ours = permutation(n, generator(n))
    assert ours.dtype == torch.int32
    assert ours.tolist() == torch.randperm(n, generator=generator(n)).tolist()


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


# ---- draws ---------------------------------------------------------------------------------------


@given(st.lists(st.booleans(), min_size=1, max_size=30), st.integers(0, 30), st.integers(0, 5))
def test_a_draw_is_of_the_pool(values, k, seed):
    pool = torch.tensor(values)
    drawn = draw(pool, k, generator(seed))
    assert not bool((drawn & ~pool).any())
    assert int(drawn.sum()) == min(k, sum(values))
    # The k that come first of a permutation of the pool.
    first = torch.randperm(sum(values), generator=generator(seed))[:k]
    assert indices_of(drawn).tolist() == indices_of(pool)[first].sort().values.tolist()


def test_a_draw_is_uniform():
    pool = torch.tensor([True] * 6 + [False] * 3)
    source = generator()
    times = sum(draw(pool, 2, source).int() for _ in range(3000))
    assert times[6:].tolist() == [0, 0, 0]
    assert (times[:6] - 1000).abs().max() < 120  # 4.6 standard deviations


# ---- the top K -----------------------------------------------------------------------------------


SCORES = st.one_of(
    st.lists(st.floats(allow_nan=False, width=32), min_size=1, max_size=40),
    st.lists(st.sampled_from([-INF, -1.0, 0.0, 1.0, INF]), min_size=1, max_size=40),
    st.tuples(st.floats(allow_nan=False, width=32), st.integers(1, 40)).map(
        lambda x: [x[0]] * x[1]
    ),
)


@given(scores=SCORES, data=st.data())
def test_top_k_equals_a_full_sort(scores, data):
    k, seed = data.draw(st.integers(0, len(scores))), data.draw(st.integers(0, 5))
    chosen = top_k(torch.tensor(scores), k, generator(seed))
    assert chosen.dtype == torch.int64
    kept = chosen.tolist()
    assert kept == sorted(set(kept))
    assert [scores[i] for i in sorted(kept, key=scores.__getitem__, reverse=True)] == sorted(
        scores, reverse=True
    )[:k]
    assert torch.equal(chosen, top_k(torch.tensor(scores), k, generator(seed)))
    assert torch.equal(chosen, indices_of(top_mask(torch.tensor(scores), k, generator(seed))))


def test_top_k_of_whole_numbers():
    scores = torch.tensor([-3, 0, -1, 0, -2], dtype=torch.int32)
    assert top_k(scores, 3, generator()).tolist() == [1, 2, 3]


def test_top_k_draws_among_the_ties_at_the_boundary_only():
    scores = torch.tensor([0.0, 5.0, 1.0, 1.0, 1.0, 1.0, 0.0])
    counts = counts_of((top_k(scores, 3, generator(seed)).tolist() for seed in range(400)), 7)
    assert counts[1] == 400
    assert counts[0] == counts[6] == 0
    assert sum(counts[2:6]) == 800
    assert chi_square(counts[2:6]) < 25  # 3 degrees of freedom: p = 2e-5


def test_top_k_of_none_and_of_all():
    assert top_k(torch.ones(3), 0, generator()).tolist() == []
    assert top_k(torch.ones(3), 3, generator()).tolist() == [0, 1, 2]
