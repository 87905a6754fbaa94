"""Rules for prompts, by hand: what a group of rewards changes, and which prompts come next."""

import math

import pytest
import torch
from choosing import assert_refused, choice_of, chosen, counts_of, kept, table_of

from hf_dynprune import UCB, EpsilonGreedy, LossProportional
from hf_dynprune.policies.prompts import GRESO, ThompsonPrompts
from hf_dynprune.pruner import DynamicPruner
from hf_dynprune.schedule import RunShape
from hf_dynprune.table import SampleTable


def visited(policy, groups: dict[int, list[dict]], n: int) -> SampleTable:
    """A table after the groups of each prompt, one visit an epoch; a group is its signals."""
    table = SampleTable(n, policy.memory.columns)
    for i, visits in groups.items():
        for epoch, signals in enumerate(visits):
            values = {name: torch.tensor([float(value)]) for name, value in signals.items()}
            table.observe(torch.tensor([i]), values, memory=policy.memory, epoch=epoch)
    return table


def solved(share: float, completions: int = 8) -> dict:
    return {"solved": share, "completions": completions}


def zero(is_solved: bool) -> dict:
    return {"reward_std": 0.0, "solved": float(is_solved)}


USEFUL = {"reward_std": 0.5, "solved": 0.5}


# ---- Thompson sampling ---------------------------------------------------------------------------


def test_posterior_by_hand():
    policy = ThompsonPrompts(decay=0.5)
    table = visited(policy, {0: [solved(0.25)], 1: [solved(0.25), solved(1.0, 4)]}, 3)
    assert table["alpha"][:2].tolist() == [1 + 2, 0.5 * 3 + 0.5 + 4]
    assert table["beta"][:2].tolist() == [1 + 6, 0.5 * 7 + 0.5 + 0]
    assert table["alpha"][2].isnan()
    assert policy.score(table)[:2].tolist() == pytest.approx([-0.2, -0.1])


@pytest.mark.parametrize(("decay", "alpha"), [(0.0, 1 + 2 + 8), (1.0, 1 + 8)])
def test_what_a_posterior_forgets(decay, alpha):
    table = visited(ThompsonPrompts(decay=decay), {0: [solved(0.25), solved(1.0)]}, 1)
    assert table["alpha"].tolist() == [alpha]


def test_a_posterior_without_success_returns_to_the_prior_and_no_further():
    table = visited(ThompsonPrompts(), {0: [solved(0.0)] * 60}, 1)
    assert table["alpha"].tolist() == [1.0]
    assert table["beta"].tolist() == pytest.approx([17.0])  # b = b / 2 + 1 / 2 + 8


def test_prompts_never_observed_come_first():
    policy = ThompsonPrompts(keep_ratio=0.5)
    table = visited(policy, {i: [solved(0.5)] for i in (0, 2, 4, 6)}, 8)
    assert chosen(policy, table) == [1, 3, 5, 7]


def test_prompts_near_the_target_come_next():
    rates = [0.0, 1.0, 0.5, 0.45, 0.05, 0.95, 0.55, 0.9]
    for target, expected in ((0.5, {2, 3, 6}), (1.0, {1, 5, 7})):
        policy = ThompsonPrompts(keep_ratio=3 / 8, target=target, decay=0.0)
        groups = {i: [solved(rate, 1000)] for i, rate in enumerate(rates)}
        assert set(chosen(policy, visited(policy, groups, 8))) == expected


def test_draws_are_those_of_the_posterior():
    """Of two prompts the one is chosen as often as its draw lies nearer to the target."""
    policy = ThompsonPrompts(keep_ratio=0.5)
    table = visited(policy, {0: [solved(0.5)], 1: [solved(1.0)]}, 2)
    plans = [
        kept(policy.plan(choice_of(policy, table, policy.score(table), seed=seed)))
        for seed in range(400)
    ]
    first, _ = counts_of(plans, 2)
    source = torch.distributions.Beta(table["alpha"].double(), table["beta"].double())
    torch.manual_seed(0)
    nearer = (source.sample((100_000,)) - 0.5).abs()
    expected = float((nearer[:, 0] < nearer[:, 1]).double().mean())
    assert 0.9 < expected < 0.999
    assert abs(first - 400 * expected) <= 4.5 * math.sqrt(400 * expected * (1 - expected))


def test_draws_leave_the_global_generators_alone():
    policy = ThompsonPrompts()
    table = visited(policy, {i: [solved(i / 8)] for i in range(4)}, 4)
    before = torch.get_rng_state()
    one = policy.plan(choice_of(policy, table, policy.score(table), seed=3))
    assert torch.equal(torch.get_rng_state(), before)
    assert kept(one) == kept(policy.plan(choice_of(policy, table, policy.score(table), seed=3)))


def test_a_group_without_a_reward_is_not_a_failure():
    policy = ThompsonPrompts(keep_ratio=0.5)
    table = visited(policy, {0: [solved(math.nan, 0)], 1: [solved(0.0)]}, 2)
    assert table["alpha"][0].isnan()
    assert table["last_observed"].tolist() == [0, 0]
    assert chosen(policy, table) == [1]  # nothing finite is known of the other


@pytest.mark.parametrize(
    ("cls", "name", "value", "error"),
    [
        (ThompsonPrompts, "target", 1.5, ValueError),
        (ThompsonPrompts, "decay", -0.1, ValueError),
        (ThompsonPrompts, "keep_ratio", 0.0, ValueError),
        (GRESO, "target", 1.0, ValueError),
        (GRESO, "easy_share", -1, ValueError),
        (GRESO, "floor", 2.0, ValueError),
        (GRESO, "target", "0.25", TypeError),
    ],
)
def test_values_out_of_range_are_refused(cls, name, value, error):
    assert_refused(cls, name, value, error)


# ---- GRESO ---------------------------------------------------------------------------------------


def test_streak_by_hand():
    groups = {
        0: [zero(True), zero(True)],
        1: [zero(False), USEFUL],
        2: [USEFUL, zero(False)],
    }
    table = visited(GRESO(), groups, 4)
    assert table["streak"].tolist() == [2, 0, 1, 0]
    assert table["solved"][:3].tolist() == [1.0, 0.5, 0.0]


def test_everything_is_kept_in_the_first_epoch():
    policy = GRESO()
    assert chosen(policy, SampleTable(9, policy.memory.columns)) == list(range(9))


def test_rates_fill_the_target_share_by_hand():
    """6 useful prompts and a target of 0.4, so 4 others: 1 solved, and 3 not."""
    policy = GRESO(target=0.4, easy_share=0.25, floor=0.0)
    groups = {i: [USEFUL] for i in range(6)}
    groups |= {i: [zero(True)] for i in range(6, 10)}  # p = 1 / 4
    groups |= {i: [zero(False)] * 2 for i in range(10, 14)}  # p^2 = 3 / 4
    chances = policy.chances(visited(policy, groups, 14))
    assert chances[:6].tolist() == [1.0] * 6
    assert chances[6:10].tolist() == pytest.approx([0.25] * 4)
    assert chances[10:].tolist() == pytest.approx([0.75] * 4)


def test_longer_streaks_are_skipped_more_often_down_to_the_floor():
    policy = GRESO(target=0.3, easy_share=1.0, floor=0.1)
    groups = {0: [USEFUL], **{i: [zero(True)] * i for i in range(1, 9)}}
    one, *others = policy.chances(visited(policy, groups, 9)).tolist()
    assert one == 1.0
    assert others == sorted(others, reverse=True)
    assert others[-1] == 0.1


@pytest.mark.parametrize(("useful", "rate"), [(0, 0.05), (1000, 0.95)])
def test_rates_stay_within_the_limits(useful, rate):
    policy = GRESO(floor=0.0)
    groups = {0: [zero(True)], 1: [zero(False)]}
    table = visited(policy, groups, 2 + useful)
    assert policy.chances(table)[:2].tolist() == pytest.approx([rate, rate])


def test_prompts_are_kept_as_often_as_their_chances():
    policy = GRESO(floor=0.2)
    groups = {0: [USEFUL], 1: [zero(True)], 2: [zero(False)] * 3}
    table = visited(policy, groups, 4)
    plans = [kept(policy.plan(choice_of(policy, table, seed=seed))) for seed in range(500)]
    counts, chances = counts_of(plans, 4), policy.chances(table).tolist()
    for count, chance in zip(counts, chances, strict=True):
        assert abs(count - 500 * chance) <= 4.5 * math.sqrt(500 * chance * (1 - chance))


def test_one_batch_is_kept_at_least():
    policy = GRESO(floor=0.0)
    pruner = DynamicPruner(policy, RunShape(30, batch_size=4, num_epochs=2, drop_last=True))
    values = {"reward_std": torch.zeros(30), "solved": torch.zeros(30)}
    for epoch in range(50):
        pruner.table.observe(torch.arange(30), values, memory=policy.memory, epoch=epoch)
    pruner.begin_epoch(0)
    assert len(pruner.sampler) == 4


# ---- the rules of losses, by reward_std ----------------------------------------------------------


@pytest.mark.parametrize("cls", [UCB, EpsilonGreedy, LossProportional])
def test_rules_of_losses_choose_by_reward_std(cls):
    policy = cls(keep_ratio=0.3, signal="reward_std")
    assert policy.signals == ("reward_std",)
    assert "signal='reward_std'" in str(policy)
    spread = {i: [0.0 if i % 2 else 0.5] for i in range(20)}
    assert not {i for i in chosen(policy, table_of(policy, spread, 20)) if i % 2} or cls is (
        EpsilonGreedy
    )


def test_loss_proportional_never_prefers_a_prompt_that_taught_nothing():
    policy = LossProportional(keep_ratio=0.5, signal="reward_std")
    table = table_of(policy, {i: [0.0 if i < 6 else 0.1 * i] for i in range(10)}, 10)
    plans = [chosen_by(policy, table, seed) for seed in range(50)]
    assert all({6, 7, 8, 9} < set(plan) for plan in plans)
    assert len(set(map(tuple, plans))) > 3  # what is left over is filled at random


def chosen_by(policy, table, seed):
    return kept(policy.plan(choice_of(policy, table, policy.score(table), seed=seed)))


@pytest.mark.parametrize("rule", [UCB, LossProportional])
def test_prompts_of_equal_rewards_return_only_with_max_age(rule):
    equal = torch.arange(16) % 2 == 0

    def times_kept(**settings):
        policy = rule(0.25, signal="reward_std", **settings)
        pruner = DynamicPruner(policy, RunShape(16, batch_size=4, num_epochs=20))
        for epoch in range(20):
            pruner.begin_epoch(epoch)
            index = torch.tensor(list(pruner.sampler))
            pruner.observe(index, {"reward_std": (~equal[index]).float()})
        pruner.end_epoch()
        return pruner.table["times_kept"]

    assert times_kept()[equal].tolist() == [1] * 8
    assert times_kept(max_age=6)[equal].min() > 1
