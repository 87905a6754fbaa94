"""The rules against numbers worked out by hand, and what their fields may be."""

import dataclasses
import itertools
import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hf_dynprune.policies import (
    POLICIES,
    UCB,
    EpochPlan,
    EpsilonGreedy,
    FullData,
    PruningPolicy,
    RandomPruning,
    keep_count,
    make_policy,
    top_k,
)
from hf_dynprune.pruner import DynamicPruner
from hf_dynprune.scores import SampleTable

NAN, INF = math.nan, math.inf


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def table_of(policy: PruningPolicy, losses: dict[int, list[float]], n: int) -> SampleTable:
    """A table after these losses of each sample, one observation an epoch."""
    table = SampleTable(n, policy.columns)
    for epoch in range(max(map(len, losses.values()), default=0)):
        seen = {i: values[epoch] for i, values in losses.items() if len(values) > epoch}
        index, loss = torch.tensor(list(seen)), torch.tensor(list(seen.values()))
        table.observe(index, {policy.signals[0]: loss}, update=policy.observe, epoch=epoch)
    return table


def epochs_of(
    policy: PruningPolicy, n: int, epochs: int, seed: int = 0, table: SampleTable | None = None
) -> list[list[int]]:
    """What a run that observes nothing trains on in each epoch, each ascending."""
    pruner = DynamicPruner(policy, n, num_epochs=epochs, seed=seed)
    if table is not None:
        pruner.table.load_state_dict(table.state_dict())
    kept = []
    for epoch in range(epochs):
        pruner.begin_epoch(epoch)
        kept.append(sorted(pruner.sampler))
    return kept


def choice(policy: PruningPolicy, table: SampleTable) -> list[int]:
    """What a run would train on next, ascending."""
    return epochs_of(policy, len(table), 1, table=table)[0]


def by_score(policy: PruningPolicy, scores: list[float], seed: int = 0) -> list[int]:
    """What the policy alone makes of these scores."""
    table = SampleTable(len(scores), policy.columns)
    plan = policy.plan(
        table, score=torch.tensor(scores), epoch=0, progress=0.0, generator=generator(seed)
    )
    return sorted(plan.indices.tolist())


def chi_square(counts: list[int]) -> float:
    expected = sum(counts) / len(counts)
    return sum((count - expected) ** 2 / expected for count in counts)


# ---- the formulas --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "policy", [EpsilonGreedy(decay=0.8), UCB(decay=0.8)], ids=["epsilon-greedy", "ucb"]
)
def test_moving_mean_by_hand(policy):
    table = table_of(policy, {0: [1.0, 2.0, 0.5], 1: [1.0, 2.0], 2: [1.0]}, n=4)
    assert table["mean"][:3].tolist() == pytest.approx(
        [
            0.2 * (0.2 * 1.0 + 0.8 * 2.0) + 0.8 * 0.5,  # 0.76
            0.2 * 1.0 + 0.8 * 2.0,  # 1.8
            1.0,
        ]
    )
    assert table["mean"][3].isnan()


def test_variance_by_hand_uses_the_old_mean():
    table = table_of(UCB(decay=0.8), {0: [1.0, 2.0, 0.5], 1: [1.0, 2.0], 2: [1.0]}, n=4)
    assert table["variance"][:3].tolist() == pytest.approx(
        [
            0.2 * (0.8 * (2.0 - 1.0) ** 2)
            + 0.8 * (0.5 - 1.8) ** 2,  # 1.512; with the new means it were 0.06048
            0.8 * (2.0 - 1.0) ** 2,  # 0.8; with the new mean it were 0.8 * (2.0 - 1.8)^2 = 0.032
            0.0,
        ]
    )


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
    # Sample 0: mean 0.76, variance 1.512. Sample 1: mean 1, variance 0. Equal at c = 0.24 / 1.512 = 0.159.
    policy = UCB(keep_ratio=0.5, c=c)
    assert choice(policy, table_of(policy, {0: [1.0, 2.0, 0.5], 1: [1.0, 1.0, 1.0]}, n=2)) == [kept]


@pytest.mark.parametrize("cls", [EpsilonGreedy, UCB])
def test_signal_is_a_field(cls):
    policy = cls(signal="el2n")
    assert policy.signals == ("el2n",)
    assert cls().signals == ("loss",)
    assert table_of(policy, {0: [0.5]}, n=1)["mean"].tolist() == [0.5]


@pytest.mark.parametrize("policy", [EpsilonGreedy(), UCB()])
def test_observe_is_pure(policy):
    rows = {c.name: torch.tensor([NAN, 1.0]) for c in policy.columns}
    before = {name: row.clone() for name, row in rows.items()}
    signals = {"loss": torch.tensor([2.0, 3.0])}
    one, two = policy.observe(rows, signals), policy.observe(rows, signals)
    assert set(one) == {c.name for c in policy.columns}
    for name, row in rows.items():
        assert torch.equal(row.nan_to_num(-1), before[name].nan_to_num(-1))
        assert torch.equal(one[name], two[name])
    assert signals["loss"].tolist() == [2.0, 3.0]


# ---- how many ------------------------------------------------------------------------------------


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
    for cls in (RandomPruning, EpsilonGreedy, UCB):
        policy = cls(keep_ratio=keep_ratio)
        assert policy.planned_size(n, 3, 0.5) == k
        assert len(choice(policy, SampleTable(n, policy.columns))) == k


@pytest.mark.parametrize("epsilon", [0.0, 0.1, 0.25, 0.5, 1.0])
@pytest.mark.parametrize("cls", [EpsilonGreedy, UCB])
@pytest.mark.parametrize("n", [10, 101])
def test_random_share_is_exact_and_the_rest_is_the_top(cls, epsilon, n):
    policy = cls(keep_ratio=0.4, epsilon=epsilon)
    scores = torch.randperm(
        n, generator=generator(5)
    ).tolist()  # different, so that the top is unique
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
    counts = [0] * n
    for seed in range(draws):
        for i in by_score(policy, [float(n - i) for i in range(n)], seed):
            counts[i] += 1
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
    assert choice(policy, table) == [5, 6, 7, 8, 9]  # three never observed, and the two highest


@pytest.mark.parametrize("policy", [EpsilonGreedy(keep_ratio=0.3, epsilon=0), UCB(keep_ratio=0.3)])
@pytest.mark.parametrize(
    "losses", [{}, {i: [2.0] for i in range(10)}], ids=["never observed", "all equal"]
)
def test_ties_are_broken_by_the_generator(policy, losses):
    table = table_of(policy, losses, n=10)
    kept = epochs_of(policy, 10, 300, table=table)
    repeated = kept == epochs_of(policy, 10, 300, table=table)
    assert repeated  # of a name: the difference of long lists takes pytest minutes
    assert kept != epochs_of(policy, 10, 300, seed=1, table=table)
    assert len(set(map(tuple, kept))) > 60  # of 120 possible
    assert (
        chi_square([sum(i in k for k in kept) for i in range(10)]) < 38
    )  # 9 degrees of freedom: p = 2e-5


@pytest.mark.parametrize("policy", [EpsilonGreedy(keep_ratio=0.5, epsilon=0), UCB(keep_ratio=0.5)])
def test_nan_observed_comes_last(policy):
    table = table_of(policy, {0: [NAN], 1: [NAN], 2: [-5.0], 3: [0.1]}, n=4)
    assert choice(policy, table) == [2, 3]


# ---- random pruning ------------------------------------------------------------------------------


def test_random_pruning_is_uniform_and_independent_between_choices():
    n, epochs = 12, 900
    kept = epochs_of(RandomPruning(keep_ratio=0.25), n, epochs)
    assert all(len(set(k)) == 3 for k in kept)
    counts = [sum(i in k for k in kept) for i in range(n)]
    assert chi_square(counts) < 42  # 11 degrees of freedom: p = 2e-5
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


def test_full_data_keeps_everything():
    policy = FullData()
    assert choice(policy, SampleTable(7)) == list(range(7))
    assert policy.planned_size(7, 0, 0.0) == 7
    assert policy.signals == ()
    assert policy.columns == ()


# ---- top_k ---------------------------------------------------------------------------------------

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


def test_top_k_of_whole_numbers():
    assert top_k(torch.tensor([-3, 0, -1, 0, -2], dtype=torch.int32), 3, generator()).tolist() == [
        1,
        2,
        3,
    ]


def test_top_k_draws_among_the_ties_at_the_boundary_only():
    scores = torch.tensor([0.0, 5.0, 1.0, 1.0, 1.0, 1.0, 0.0])
    counts = [0] * 7
    for seed in range(400):
        for i in top_k(scores, 3, generator(seed)).tolist():
            counts[i] += 1
    assert counts[1] == 400
    assert counts[0] == counts[6] == 0
    assert sum(counts[2:6]) == 800
    assert chi_square(counts[2:6]) < 25  # 3 degrees of freedom: p = 2e-5


# ---- fields --------------------------------------------------------------------------------------

BAD = [
    *[
        (cls, "keep_ratio", v, ValueError)
        for cls in (RandomPruning, UCB)
        for v in (0, 0.0, -0.1, 1.5, NAN, INF)
    ],
    *[
        (cls, "keep_ratio", v, TypeError)
        for cls in (EpsilonGreedy, UCB)
        for v in ("0.3", True, None, [0.3], 1j)
    ],
    *[(UCB, "period", v, ValueError) for v in (0, -1)],
    *[(UCB, "period", v, TypeError) for v in (1.5, 2.0, True, "2", None)],
    *[(FullData, "first", v, ValueError) for v in (-1,)],
    *[(UCB, "first", v, TypeError) for v in (0.5, False, None)],
    *[(RandomPruning, "last", v, ValueError) for v in (-0.1, 1.1, NAN, INF, 10)],
    *[(UCB, "last", v, TypeError) for v in ("0.1", None, True)],
    *[(UCB, "max_age", v, ValueError) for v in (0, -1)],
    *[(UCB, "max_age", v, TypeError) for v in (1.5, True, "3")],
    *[(UCB, "exclude_hardest", v, ValueError) for v in (1, 1.0, -0.1, NAN, INF)],
    *[(UCB, "exclude_hardest", v, TypeError) for v in (None, "0.1", True)],
    *[(UCB, "max_weight", v, ValueError) for v in (0, -1.0, NAN, INF)],
    *[(UCB, "max_weight", v, TypeError) for v in ("2", True)],
    *[(UCB, "scoring", v, ValueError) for v in ("some", None, 1)],
    *[(cls, "epsilon", v, ValueError) for cls in (EpsilonGreedy, UCB) for v in (-0.1, 1.1, NAN)],
    *[(cls, "epsilon", v, TypeError) for cls in (EpsilonGreedy, UCB) for v in ("0.1", None, True)],
    *[
        (cls, "decay", v, ValueError)
        for cls in (EpsilonGreedy, UCB)
        for v in (0, 0.0, -0.5, 1.1, NAN)
    ],
    *[(cls, "decay", v, TypeError) for cls in (EpsilonGreedy, UCB) for v in ("0.8", None, True)],
    *[(UCB, "c", v, ValueError) for v in (-1, -0.001, NAN, INF)],
    *[(UCB, "c", v, TypeError) for v in ("1", None, True)],
    *[(UCB, "bonus", v, ValueError) for v in ("var", "", None, 1)],
    *[(RandomPruning, "replacement", v, TypeError) for v in (1, 0, "no", None)],
]


@pytest.mark.parametrize(("cls", "name", "value", "error"), BAD)
def test_bad_value_is_named(cls, name, value, error):
    with pytest.raises(error) as caught:
        cls(**{name: value})
    message = str(caught.value)
    assert f"{name}={value}" in message or f"{name}={value!r}" in message
    assert "wanted is" in message or "must be" in message


@pytest.mark.parametrize(
    ("cls", "settings"),
    [
        (UCB, {"keep_ratio": 1}),
        (
            UCB,
            {
                "keep_ratio": 1.0,
                "c": 0,
                "decay": 1,
                "epsilon": 1,
                "last": 1,
                "first": 0,
                "period": 1,
            },
        ),
        (
            EpsilonGreedy,
            {
                "epsilon": 0,
                "decay": 1e-3,
                "last": 0,
                "exclude_hardest": 0,
                "max_age": 1,
                "max_weight": 1e-3,
            },
        ),
        (
            RandomPruning,
            {
                "keep_ratio": 1e-9,
                "first": 100,
                "period": 1000,
                "max_age": None,
                "exclude_hardest": 0.0,
            },
        ),
        (FullData, {"last": 1.0, "max_weight": 2}),
    ],
)
def test_values_at_the_limits_are_fine(cls, settings):
    assert dataclasses.asdict(cls(**settings)).items() >= settings.items()


@pytest.mark.parametrize("cls", [RandomPruning, FullData])
@pytest.mark.parametrize(("guard", "value"), [("max_age", 3), ("exclude_hardest", 0.1)])
def test_guards_of_scores_need_scores(cls, guard, value):
    with pytest.raises(
        ValueError, match=f"{guard}={value} acts on scores, and {cls.__name__} has none"
    ):
        cls(**{guard: value})


def test_policy_is_frozen_and_equal_by_value():
    policy = UCB(keep_ratio=0.3)
    assert policy == UCB(keep_ratio=0.3)
    assert policy != UCB(keep_ratio=0.3, period=2)
    assert hash(policy) == hash(UCB(keep_ratio=0.3))
    with pytest.raises(dataclasses.FrozenInstanceError):
        policy.keep_ratio = 0.5


def test_base_fields_are_keyword_only():
    assert UCB(0.3).keep_ratio == 0.3
    assert RandomPruning(0.3, False).replacement is False
    with pytest.raises(TypeError):
        FullData(2)


def test_abstract_policy_cannot_be_made():
    with pytest.raises(TypeError, match="abstract"):
        PruningPolicy()


@pytest.mark.parametrize("cls", [RandomPruning, EpsilonGreedy, UCB, FullData])
def test_paper_like_has_period_10(cls):
    assert cls.paper_like() == cls(period=10)
    assert cls.paper_like(period=3, last=0.5) == cls(period=3, last=0.5)


@pytest.mark.parametrize(
    ("name", "value"),
    [("keep_ratio", np.float32(0.5)), ("keep_ratio", np.float64(0.5)), ("period", np.int64(2))],
)
def test_numbers_of_numpy_are_refused_at_once_or_can_be_saved(name, value):
    try:
        policy = UCB(**{name: value})
    except TypeError:
        return
    assert make_policy(**json.loads(json.dumps(policy.to_dict()))) == policy


# ---- names ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "policy"),
    [
        ("full", FullData()),
        ("random", RandomPruning()),
        ("epsilon-greedy", EpsilonGreedy()),
        ("epsilon_greedy", EpsilonGreedy()),
        ("Epsilon-Greedy", EpsilonGreedy()),
        ("ucb", UCB()),
        ("UCB", UCB()),
    ],
)
def test_make_policy(name, policy):
    assert make_policy(name) == policy


def test_make_policy_takes_fields():
    assert make_policy("ucb", keep_ratio=0.3, last=0.1) == UCB(keep_ratio=0.3, last=0.1)
    with pytest.raises(ValueError, match="keep_ratio=3 is out of range"):
        make_policy("ucb", keep_ratio=3)


@pytest.mark.parametrize(
    ("name", "near"),
    [("ucbb", "ucb"), ("UBC", "ucb"), ("epsilon", "epsilon-greedy"), ("ramdom", "random")],
)
def test_unknown_policy_suggests_the_near_ones(name, near):
    with pytest.raises(
        ValueError,
        match=f"no policy '{name}': did you mean .*'{near}'.*\\? The names are 'full', 'random'",
    ):
        make_policy(name)


def test_unknown_policy_far_from_all_lists_the_names():
    with pytest.raises(
        ValueError, match="no policy 'xyz': The names are 'full', 'random', 'epsilon-greedy', 'ucb'"
    ):
        make_policy("xyz")


def test_unknown_field_suggests_the_near_ones():
    with pytest.raises(
        ValueError,
        match=r"Policy 'ucb' has no field 'keepratio': did you mean 'keep_ratio'.*period",
    ):
        make_policy("ucb", keepratio=0.3)
    with pytest.raises(ValueError, match="Policy 'full' has no field 'keep_ratio'"):
        make_policy("full", keep_ratio=0.3)


@pytest.mark.parametrize(
    "policy",
    [
        FullData(first=2),
        RandomPruning(0.3, replacement=False, period=10),
        EpsilonGreedy(0.7, epsilon=0.2, max_age=3, exclude_hardest=0.01, max_weight=4.0),
        UCB(0.1, c=0.5, bonus="std", signal="margin", last=0.125),
    ],
)
def test_to_dict_is_json_and_comes_back(policy):
    text = json.dumps(policy.to_dict())
    assert json.loads(text) == policy.to_dict()
    assert make_policy(**json.loads(text)) == policy
    assert policy.to_dict()["name"] == policy.name
    assert POLICIES[policy.name] is type(policy)


def test_policy_of_ones_own_is_named_by_its_class():
    @dataclasses.dataclass(frozen=True)
    class Mine(FullData):
        pass

    assert Mine().name == "Mine"
    assert Mine().to_dict()["name"] == "Mine"


# ---- plans ---------------------------------------------------------------------------------------


def test_plan_holds_what_it_was_given():
    plan = EpochPlan(torch.tensor([4, 1]), torch.tensor([1.0, 2.0]), 0.5)
    plan.check(5)
    assert len(plan) == 2
    assert plan.indices.tolist() == [4, 1]
    assert EpochPlan(torch.tensor([0])).weights is None
    assert EpochPlan(torch.tensor([0])).lr_scale == 1.0
    with pytest.raises(dataclasses.FrozenInstanceError):
        plan.lr_scale = 1.0


@pytest.mark.parametrize(
    ("indices", "message"),
    [
        (torch.tensor([0, 1], dtype=torch.int32), "torch.int32 tensor of shape"),
        (torch.tensor([0.0, 1.0]), "torch.float32 tensor of shape"),
        (torch.tensor([True, False]), "torch.bool tensor of shape"),
        (torch.tensor([[0, 1]]), r"shape \(1, 2\); wanted is int64 of shape \(K,\)"),
        (torch.tensor(3), r"shape \(\)"),
    ],
)
def test_plan_refuses_other_indices(indices, message):
    with pytest.raises(TypeError, match=message):
        EpochPlan(indices)


def test_plan_refuses_to_keep_nothing():
    with pytest.raises(ValueError, match="at least 1"):
        EpochPlan(torch.empty(0, dtype=torch.int64))


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (torch.ones(3), r"shape \(3,\); wanted is float32 of shape \(2,\)"),
        (torch.ones(2, 1), r"shape \(2, 1\)"),
        (torch.ones(2, dtype=torch.float64), "torch.float64"),
        *[(torch.tensor([1.0, bad]), "finite and positive") for bad in (0.0, -1.0, NAN, INF)],
    ],
)
def test_plan_refuses_other_weights(weights, message):
    with pytest.raises(ValueError, match=message):
        EpochPlan(torch.tensor([0, 1]), weights)


@pytest.mark.parametrize("lr_scale", [0.0, -1.0, NAN, INF])
def test_plan_refuses_other_lr_scale(lr_scale):
    with pytest.raises(ValueError, match=f"lr_scale={lr_scale}"):
        EpochPlan(torch.tensor([0]), lr_scale=lr_scale)


@pytest.mark.parametrize(
    ("indices", "message"),
    [
        ([0, 5], "index 5; the training set has 5"),
        ([-1, 0], "index -1; the training set has 5"),
        ([-1, 7], "index -1"),
        ([0, 3, 3], "3 indices holds only 2 different"),
    ],
)
def test_check_of_a_plan(indices, message):
    with pytest.raises(ValueError, match=message):
        EpochPlan(torch.tensor(indices)).check(5)
