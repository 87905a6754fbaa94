"""EffectiveShare against numbers worked out by hand."""

import math

import pytest
import torch
from choosing import INF, choice_of, table_of

from hf_dynprune.policies import EffectiveShare
from hf_dynprune.potential import effective_share
from hf_dynprune.pruner import DynamicPruner
from hf_dynprune.schedule import RunShape


def kept(policy, scores, seed=0, **shape):
    table = table_of(policy, {}, n=len(scores))
    choice = choice_of(policy, table, torch.tensor(scores), seed=seed, **shape)
    return sorted(policy.plan(choice).indices.tolist())


def sizes(policy, scores):
    return len(kept(policy, scores))


# ---- how many ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scores", "expected"),
    [
        ([0.5] * 10, 10),  # all alike: share 1
        ([0.5] * 5 + [0.0] * 5, 5),  # half of them
        ([0.0] * 9 + [0.7], 1),  # one has all: 1 / N
        ([3.0, 1.0], 2),  # (3 + 1)^2 / (2 * 10) = 0.8
        ([1.0, 0.1, 0.1, 0.1], 2),  # 1.69 / (4 * 1.03) = 0.41
        ([0.0] * 10, 1),  # nothing left to learn: the least
        ([INF] * 4, 4),  # nothing known: the most
        ([INF, INF, 0.5, 0.5], 4),
        ([-INF, -INF, 0.5, 0.5], 2),  # samples that cannot be drawn are not counted
        ([-INF] * 4, 4),  # no finite observation: nothing known
    ],
)
def test_size_by_hand(scores, expected):
    assert sizes(EffectiveShare(least=0.05), scores) == expected


def test_size_is_kept_between_the_limits():
    few, all_alike = [0.0] * 9 + [0.7], [0.5] * 10
    assert sizes(EffectiveShare(least=0.3), few) == 3
    assert sizes(EffectiveShare(most=0.6), all_alike) == 6
    assert sizes(EffectiveShare(least=0.4, most=0.4), all_alike) == 4
    assert EffectiveShare().planned_size(10, 0, 0.0) is None
    assert EffectiveShare(least=0.7, most=0.8).expected_share(10) == (0.7, 0.8)


# ---- which ---------------------------------------------------------------------------------------


def test_never_observed_samples_come_first_and_barred_ones_last():
    scores = [0.5, INF, 0.01, -INF, INF, 0.5]
    policy = EffectiveShare(least=0.3, most=0.4)  # 2 of 6
    assert all(kept(policy, scores, seed=seed) == [1, 4] for seed in range(5))
    three = EffectiveShare(least=0.8, most=0.9)  # 5 of 6
    assert all(3 not in kept(three, scores, seed=seed) for seed in range(5))


def test_draw_is_in_proportion_to_s():
    scores = [0.6, 0.3, 0.1]
    policy = EffectiveShare(least=0.34, most=0.34)  # one of three
    drawn = torch.tensor([kept(policy, scores, seed=seed)[0] for seed in range(3000)])
    shares = drawn.bincount(minlength=3) / 3000
    # the standard deviation of the first share is sqrt(0.6 * 0.4 / 3000) = 0.009
    assert shares.tolist() == pytest.approx(scores, abs=0.04)


def test_score_by_hand():
    policy = EffectiveShare()
    table = table_of(policy, {0: [math.log(2)], 1: [0.0], 2: [5.0, math.log(4)], 3: [-1.0]}, n=5)
    assert policy.score(table)[:4].tolist() == pytest.approx([0.5, 0.0, 0.75, 0.0])
    assert policy.score(table)[4].isnan()
    errors = EffectiveShare(kind="error")
    assert errors.score(table_of(errors, {0: [4.0]}, n=1)).tolist() == [2.0]


def test_a_run_trains_on_less_as_samples_are_learned():
    pruner = DynamicPruner(EffectiveShare(least=0.1), 100, batch_size=10, num_epochs=6)
    losses, counts = torch.linspace(0.5, 4, 100), []
    for epoch in range(6):
        counts.append(pruner.begin_epoch(epoch).samples)
        for index in torch.tensor(list(pruner.sampler)).split(10):
            # every other sample is learned
            left = losses[index] * torch.where(index % 2 == 0, 0.01**epoch, 1.0)
            pruner.observe(index, {"loss": left})
    assert counts[0] == 100  # never observed
    s = 1 - (-losses.double()).exp()
    assert counts[1] == round(100 * effective_share(s))
    assert 50 <= counts[-1] < counts[1]


@pytest.mark.parametrize(("values", "sizes"), [(math.nan, [8, 8]), (INF, [8, 8]), (0.0, [8, 1])])
def test_a_run_without_a_usable_loss(values, sizes):
    """Nothing known: all data. All losses 0: nothing is left to learn."""
    pruner = DynamicPruner(EffectiveShare(), 8, batch_size=2, num_epochs=2)
    trained = []
    for epoch in range(2):
        trained.append(pruner.begin_epoch(epoch).samples)
        for index in torch.tensor(list(pruner.sampler)).split(2):
            pruner.observe(index, {"loss": torch.full((len(index),), values)})
    assert trained == sizes


def test_losses_without_a_positive_one_are_refused():
    policy = EffectiveShare()
    with pytest.raises(ValueError, match=r"'loss' is positive, the lowest is -2.*kind="):
        policy.score(table_of(policy, {0: [-2.0], 1: [0.0]}, n=3))


def test_drop_last_keeps_a_batch():
    shape = RunShape(10, 4, num_epochs=2, drop_last=True)
    pruner = DynamicPruner(EffectiveShare(least=0.1), shape)
    pruner.begin_epoch(0)
    for index in torch.tensor(list(pruner.sampler))[:8].split(4):
        pruner.observe(index, {"loss": (index == 3).float()})
    assert pruner.begin_epoch(1).samples >= 4


# ---- fields --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "value"),
    [
        ({"least": 0}, "least=0"),
        ({"least": 1.5}, r"least=1\.5"),
        ({"least": 0.5, "most": 0.4}, r"most=0\.4"),
        ({"most": 1.1}, r"most=1\.1"),
        ({"kind": "gradient"}, "'gradient'"),
    ],
)
def test_fields_out_of_range(settings, value):
    with pytest.raises(ValueError, match=value):
        EffectiveShare(**settings)
