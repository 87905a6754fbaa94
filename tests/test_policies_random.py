"""FullData and RandomPruning."""

import itertools

import pytest
from choosing import assert_refused, chi_square, chosen, counts_of, epochs_of
from hypothesis import given
from hypothesis import strategies as st

from hf_dynprune.policies import FullData, RandomPruning
from hf_dynprune.selection import keep_count
from hf_dynprune.table import SampleTable


def test_full_data_keeps_everything():
    policy = FullData()
    assert chosen(policy, SampleTable(7)) == list(range(7))
    assert policy.planned_size(7, 0, 0.0) == 7
    assert policy.signals == ()
    assert policy.memory.columns == ()
    assert not policy.needs_loss


def test_random_pruning_is_uniform_and_independent_between_choices():
    n, epochs = 12, 900
    kept = epochs_of(RandomPruning(keep_ratio=0.25), n, epochs)
    assert all(len(set(k)) == 3 for k in kept)
    assert chi_square(counts_of(kept, n)) < 42  # 11 degrees of freedom: p = 2e-5
    overlap = sum(len(set(a) & set(b)) for a, b in itertools.pairwise(kept)) / (epochs - 1)
    assert overlap == pytest.approx(3 * 3 / 12, abs=0.1)  # standard error 0.02


def test_two_seeds_give_two_subsets_and_one_seed_one():
    policy = RandomPruning(keep_ratio=0.5)
    assert epochs_of(policy, 100, 3, seed=0) != epochs_of(policy, 100, 3, seed=1)
    assert epochs_of(policy, 100, 3, seed=0) == epochs_of(policy, 100, 3, seed=0)
    # seed + epoch would make seed 0 epoch 1 the same as seed 1 epoch 0
    assert epochs_of(policy, 100, 2, seed=0)[1] != epochs_of(policy, 100, 1, seed=1)[0]


@given(
    n=st.integers(1, 30),
    keep_ratio=st.floats(0.01, 1),
    epochs=st.integers(1, 8),
    seed=st.integers(0, 9),
)
def test_rs2_keeps_all_once_before_any_twice(n, keep_ratio, epochs, seed):
    policy = RandomPruning(keep_ratio=keep_ratio, replacement=False)
    k, counts = keep_count(keep_ratio, n), [0] * n
    for kept in epochs_of(policy, n, epochs, seed):
        assert len(set(kept)) == len(kept) == k
        for i in kept:
            counts[i] += 1
        assert max(counts) - min(counts) <= 1


def test_rs2_is_not_always_the_same():
    policy = RandomPruning(keep_ratio=0.5, replacement=False)
    first = [epochs_of(policy, 20, 2, seed) for seed in range(3)]
    assert first[0] != first[1] != first[2]
    assert all(sorted(a + b) == list(range(20)) for a, b in first)


@pytest.mark.parametrize("value", [1, 0, "no", None])
def test_replacement_is_a_flag(value):
    assert_refused(RandomPruning, "replacement", value, TypeError)
