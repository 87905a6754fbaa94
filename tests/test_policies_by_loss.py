"""EpsilonGreedy, UCB, LossProportional and OrderDP against numbers worked out by hand."""

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
    generator,
    table_of,
)

from hf_dynprune.policies import (
    UCB,
    EpsilonGreedy,
    LossProportional,
    OrderDP,
    RandomPruning,
)
from hf_dynprune.selection import keep_count
from hf_dynprune.table import SampleTable

# ---- the formulas of the bandits -----------------------------------------------------------------


@pytest.mark.parametrize(
    "policy", [EpsilonGreedy(decay=0.8), UCB(decay=0.8)], ids=["epsilon-greedy", "ucb"]
)
def test_moving_mean_by_hand(policy):
    table = table_of(policy, {0: [1.0, 2.0, 0.5], 1: [1.0, 2.0], 2: [1.0]}, n=4)
    assert table["mean"][:3].tolist() == pytest.approx(
        [0.2 * 1.8 + 0.8 * 0.5, 0.2 * 1.0 + 0.8 * 2.0, 1.0]  # 0.76, 1.8, 1
    )
    assert table["mean"][3].isnan()


def test_variance_by_hand_uses_the_old_mean():
    table = table_of(UCB(decay=0.8), {0: [1.0, 2.0, 0.5], 1: [1.0, 2.0], 2: [1.0]}, n=4)
    first = 0.8 * (2.0 - 1.0) ** 2  # 0.8; the new mean would give 0.8 * (2.0 - 1.8)^2 = 0.032
    second = 0.2 * first + 0.8 * (0.5 - 1.8) ** 2  # 1.512; the new means would give 0.06048
    assert table["variance"][:3].tolist() == pytest.approx([second, first, 0.0])


def test_decay_is_the_weight_of_the_new_observation():
    losses = {0: [4.0, 8.0, 0.0]}
    table = table_of(UCB(decay=0.25), losses, n=1)
    assert table["mean"].item() == pytest.approx(0.75 * (0.75 * 4 + 0.25 * 8) + 0.25 * 0)  # 3.75
    assert table["variance"].item() == pytest.approx(
        0.75 * (0.25 * (8 - 4) ** 2) + 0.25 * (0 - 5) ** 2
    )  # 9.25
    table = table_of(UCB(decay=1.0), losses, n=1)  # the last loss alone
    assert (table["mean"].item(), table["variance"].item()) == (0.0, 64.0)


@pytest.mark.parametrize(
    ("settings", "score"),
    [
        ({}, 0.76 + 1.0 * 1.512),
        ({"c": 0.5}, 0.76 + 0.5 * 1.512),
        ({"c": 0.0}, 0.76),
        ({"bonus": "std"}, 0.76 + 1.0 * 1.512**0.5),
        ({"bonus": "std", "c": 2.0}, 0.76 + 2.0 * 1.512**0.5),
    ],
)
def test_ucb_score_by_hand(settings, score):
    policy = UCB(**settings)
    assert policy.score(table_of(policy, {0: [1.0, 2.0, 0.5]}, n=1)).item() == pytest.approx(score)


@pytest.mark.parametrize("bonus", ["variance", "std"])
def test_one_huge_loss_does_not_bar_a_sample_for_ever(bonus):
    policy = UCB(bonus=bonus)
    assert policy.score(table_of(policy, {0: [1.0, 1e20, 1.0, 1.0]}, n=1)).isfinite().all()


def test_epsilon_greedy_score_is_the_mean():
    policy = EpsilonGreedy()
    assert policy.score(table_of(policy, {0: [1.0, 2.0, 0.5]}, n=1)).item() == pytest.approx(0.76)


@pytest.mark.parametrize(("c", "kept"), [(0.0, 1), (0.1, 1), (1.0, 0)])
def test_uncertainty_decides_with_its_weight(c, kept):
    # Sample 0: mean 0.76, variance 1.512. Sample 1: mean 1, variance 0.
    # They are equal at c = 0.24 / 1.512 = 0.159.
    policy = UCB(keep_ratio=0.5, c=c)
    assert chosen(policy, table_of(policy, {0: [1.0, 2.0, 0.5], 1: [1.0, 1.0, 1.0]}, n=2)) == [kept]


@pytest.mark.parametrize("cls", [EpsilonGreedy, UCB])
def test_signal_is_a_field(cls):
    policy = cls(signal="el2n")
    assert policy.signals == ("el2n",)
    assert cls().signals == ("loss",)
    assert table_of(policy, {0: [0.5]}, n=1)["mean"].tolist() == [0.5]


# ---- how many, and which -------------------------------------------------------------------------


@pytest.mark.parametrize("cls", [RandomPruning, EpsilonGreedy, UCB, LossProportional, OrderDP])
@pytest.mark.parametrize(("keep_ratio", "n"), [(0.3, 10), (0.29, 100), (1, 7), (0.001, 10)])
def test_number_kept_is_planned(cls, keep_ratio, n):
    policy, k = cls(keep_ratio=keep_ratio), keep_count(keep_ratio, n)
    assert policy.planned_size(n, 3, 0.5) == k
    assert len(chosen(policy, SampleTable(n, policy.memory.columns))) == k


@pytest.mark.parametrize("epsilon", [0.0, 0.1, 0.25, 0.5, 1.0])
@pytest.mark.parametrize("cls", [EpsilonGreedy, UCB])
@pytest.mark.parametrize("n", [10, 101])
def test_random_share_is_exact_and_the_rest_is_the_top(cls, epsilon, n):
    policy = cls(keep_ratio=0.4, epsilon=epsilon)
    scores = torch.randperm(n, generator=generator(5)).tolist()  # all different: one top
    k = {10: 4, 101: 40}[n]
    greedy = k - {0.0: 0, 0.1: round(k * 0.1), 0.25: k // 4, 0.5: k // 2, 1.0: k}[epsilon]
    kept = by_score(policy, [float(s) for s in scores])
    assert len(kept) == len(set(kept)) == k
    ranks = sorted(n - 1 - scores[i] for i in kept)  # 0: the highest
    assert ranks[:greedy] == list(range(greedy))


@pytest.mark.parametrize(
    "policy", [EpsilonGreedy(keep_ratio=0.5, epsilon=0.4), UCB(keep_ratio=0.5, epsilon=0.4)]
)
def test_random_share_is_uniform_over_the_rest(policy):
    n, draws = 20, 700  # 6 of the top, 4 of the other 14
    scores = [float(n - i) for i in range(n)]
    counts = counts_of((by_score(policy, scores, seed) for seed in range(draws)), n)
    assert counts[:6] == [draws] * 6
    assert sum(counts[6:]) == 4 * draws
    assert chi_square(counts[6:]) < 45  # 13 degrees of freedom: p = 2e-5


def test_default_epsilon_differs():
    assert EpsilonGreedy().epsilon == 0.1
    assert UCB().epsilon == 0.0


# ---- samples never observed, ties ----------------------------------------------------------------


@pytest.mark.parametrize("policy", [EpsilonGreedy(keep_ratio=0.5, epsilon=0), UCB(keep_ratio=0.5)])
def test_never_observed_come_first(policy):
    table = table_of(policy, {i: [1e6 + i] for i in range(7)}, n=10)
    assert chosen(policy, table) == [5, 6, 7, 8, 9]  # three never observed, and the two highest


@pytest.mark.parametrize("policy", [EpsilonGreedy(keep_ratio=0.3, epsilon=0), UCB(keep_ratio=0.3)])
@pytest.mark.parametrize(
    "losses", [{}, {i: [2.0] for i in range(10)}], ids=["never observed", "all equal"]
)
def test_ties_are_broken_by_the_generator(policy, losses):
    table = table_of(policy, losses, n=10)
    kept = epochs_of(policy, 10, 300, table=table)
    repeated = kept == epochs_of(policy, 10, 300, table=table)
    assert repeated  # a name, because pytest takes minutes to show how long lists differ
    assert kept != epochs_of(policy, 10, 300, seed=1, table=table)
    assert len(set(map(tuple, kept))) > 60  # of 120 possible
    assert chi_square(counts_of(kept, 10)) < 38  # 9 degrees of freedom: p = 2e-5


@pytest.mark.parametrize("policy", [EpsilonGreedy(keep_ratio=0.5, epsilon=0), UCB(keep_ratio=0.5)])
def test_nan_observed_comes_last(policy):
    table = table_of(policy, {0: [NAN], 1: [NAN], 2: [-5.0], 3: [0.1]}, n=4)
    assert chosen(policy, table) == [2, 3]


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
    losses = [0.0, 1e-30, 0.0, -2.0, 0.0]
    counts = counts_of((by_score(LossProportional(0.4), losses, seed) for seed in range(600)), 5)
    assert counts[1] == 600
    assert chi_square([counts[i] for i in (0, 2, 3, 4)]) < 25  # 3 degrees of freedom: p = 2e-5


def test_losses_of_0_come_before_those_that_are_no_number():
    policy = LossProportional(2 / 3)
    assert chosen(policy, table_of(policy, {0: [NAN], 1: [0.0], 2: [5.0]}, n=3)) == [1, 2]


def test_loss_proportional_takes_what_was_never_observed_before_the_highest_loss():
    policy = LossProportional(0.5)
    assert chosen(policy, table_of(policy, {0: [1e30], 1: [3e38]}, n=4)) == [2, 3]


def test_very_small_and_large_losses_keep_their_proportions():
    for scale in (1e-30, 1e30):
        losses = [scale, 3 * scale]
        draws = (by_score(LossProportional(0.5), losses, seed) for seed in range(2000))
        share = counts_of(draws, 2)[1] / 2000
        assert share == pytest.approx(3 / 4, abs=0.045)  # standard error 0.01


# ---- OrderDP -------------------------------------------------------------------------------------


def test_order_dp_keeps_by_rank_within_a_draw():
    n, draws = 10, 3000  # 3 kept of 6 drawn of 10
    policy, scores = OrderDP(0.3, draw_ratio=0.6), [float(i) for i in range(n)]
    counts = counts_of((by_score(policy, scores, seed) for seed in range(draws)), n)

    def probability(rank):
        """It is drawn (0.6), and at most 2 of the other 5 drawn are among the higher ones."""
        ways = sum(math.comb(rank - 1, a) * math.comb(10 - rank, 5 - a) for a in range(3))
        return 0.6 * ways / math.comb(9, 5)

    expected = [probability(rank) for rank in range(1, 11)]
    assert expected[:3] == pytest.approx([0.6] * 3)
    assert expected[6] == pytest.approx(0.6 * 15 / 126)
    assert sum(expected) == pytest.approx(3)
    for count, share in zip(counts, reversed(expected), strict=True):
        assert abs(count - draws * share) <= 4.5 * math.sqrt(draws * share * (1 - share))


def test_order_dp_at_its_limits_is_the_top_and_random_pruning():
    scores = [float(i * 7 % 20) for i in range(20)]
    top = sorted(range(20), key=scores.__getitem__)[-8:]
    assert by_score(OrderDP(0.4, draw_ratio=1.0), scores) == sorted(top)
    policy = OrderDP(0.4, draw_ratio=0.4)
    counts = counts_of((by_score(policy, scores, seed) for seed in range(500)), 20)
    assert chi_square(counts) < 55  # 19 degrees of freedom: p = 2e-5


def test_order_dp_leaves_out_what_is_barred():
    scores = [-INF, 1.0, -INF, 2.0, 3.0, 4.0, 5.0, -INF, 6.0, -INF]
    for seed in range(20):
        assert set(by_score(OrderDP(0.4), scores, seed)) <= {1, 3, 4, 5, 6, 8}
        # Fewer than K are left: barred samples fill up.
        assert set(by_score(OrderDP(0.4), [-INF] * 7 + [1.0, 2.0, 3.0], seed)) > {7, 8, 9}


def test_order_dp_draws_three_quarters_unless_told():
    assert OrderDP().draw_ratio == 0.75
    assert OrderDP(0.9).draw_ratio == 0.9
    assert OrderDP.paper_like() == OrderDP(0.3, draw_ratio=0.8)
    with pytest.raises(ValueError, match=r"draw_ratio=0\.2.*\[0\.5, 1\]"):
        OrderDP(0.5, draw_ratio=0.2)


# ---- fields --------------------------------------------------------------------------------------


BAD = [
    *[
        (cls, "keep_ratio", v, ValueError)
        for cls in (UCB, LossProportional, OrderDP)
        for v in (0, 0.0, -0.1, 1.5, NAN, INF)
    ],
    *[
        (cls, "keep_ratio", v, TypeError)
        for cls in (EpsilonGreedy, UCB, LossProportional, OrderDP)
        for v in ("0.3", True, None, [0.3], 1j)
    ],
    *[(cls, "epsilon", v, ValueError) for cls in (EpsilonGreedy, UCB) for v in (-0.1, 1.1, NAN)],
    *[(cls, "epsilon", v, TypeError) for cls in (EpsilonGreedy, UCB) for v in ("0.1", None, True)],
    *[
        (cls, "decay", v, ValueError)
        for cls in (EpsilonGreedy, UCB, LossProportional)
        for v in (0, 0.0, -0.5, 1.1, NAN)
    ],
    *[
        (cls, "decay", v, TypeError)
        for cls in (EpsilonGreedy, UCB, LossProportional)
        for v in ("0.8", None, True)
    ],
    *[(UCB, "c", v, ValueError) for v in (-1, -0.001, NAN, INF)],
    *[(UCB, "c", v, TypeError) for v in ("1", None, True)],
    *[(UCB, "bonus", v, ValueError) for v in ("var", "", None, 1)],
    *[(LossProportional, "alpha", v, ValueError) for v in (0, -1.0, NAN, INF)],
    *[(LossProportional, "alpha", v, TypeError) for v in ("1", None, True)],
    *[(OrderDP, "draw_ratio", v, ValueError) for v in (0.1, 1.1, NAN)],
    *[(OrderDP, "draw_ratio", v, TypeError) for v in ("0.5", True)],
]


@pytest.mark.parametrize(("cls", "name", "value", "error"), BAD)
def test_bad_value_is_named(cls, name, value, error):
    assert_refused(cls, name, value, error)
