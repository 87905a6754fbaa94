"""The guards that act on any policy: max_age, exclude_hardest, max_weight and min_per_class."""

import pytest
import torch
from choosing import INF, NAN, chi_square, generator
from hypothesis import given
from hypothesis import strategies as st
from tiny import images, tiny_models, trainer

from hf_dynprune.policies import UCB, EpochPlan, EpsilonGreedy, FullData, InfoBatch, RandomPruning
from hf_dynprune.policies.guards import (
    excluded_share,
    guarded_plan,
    guarded_score,
    with_class_floor,
)
from hf_dynprune.pruner import DynamicPruner
from hf_dynprune.schedule import RunShape
from hf_dynprune.table import SampleTable


def after_full_epoch(policy, losses, n=10, epochs=6, seed=0):
    """A pruner after one epoch on all data (`first=1`), with the samples in `losses` observed."""
    pruner = DynamicPruner(policy, RunShape(n, batch_size=n, num_epochs=epochs), seed=seed)
    pruner.begin_epoch(0)
    index = torch.tensor([i if i in losses else -1 for i in range(n)])  # -1 is not observed
    values = torch.tensor([float(losses.get(i, 0)) for i in range(n)])
    pruner.observe(index, {"loss": values})
    return pruner


def trained_in(pruner, epoch):
    """Begin an epoch and observe the loss i of each sample i that it trains on; return these."""
    pruner.begin_epoch(epoch)
    samples = torch.tensor(sorted(pruner.sampler))
    pruner.observe(samples, {"loss": samples.float()})
    return samples.tolist()


RISING = {i: float(i) for i in range(10)}  # the loss of each sample


# ---- on scores -----------------------------------------------------------------------------------


def test_scores_of_a_choice_by_hand():
    policy = UCB(exclude_hardest=0.4, max_age=2)
    table = SampleTable(7, policy.memory.columns)
    #                never observed, no number, ..., of epoch 2, ...
    table["last_observed"][:] = torch.tensor([-1, 5, 5, 5, 2, 5, 5])
    score = torch.tensor([7.0, NAN, 1.0, 2.0, 3.0, INF, -INF])
    # Of the five observed ones below +inf the two hardest, 3 and 4, are barred. 4 is too old.
    guarded = guarded_score(policy, score, table, epoch=5, progress=0.5)
    assert guarded.tolist() == [INF, -INF, 1.0, -INF, INF, INF, -INF]


@pytest.mark.parametrize(
    ("progress", "share"), [(0.0, 0.0), (0.2, 0.0), (0.35, 0.1), (0.5, 0.2), (0.8, 0.4), (1.0, 0.4)]
)
def test_the_excluded_share_rises_between_two_points_of_the_run(progress, share):
    policy = UCB(exclude_hardest=0.4, exclude_ramp=(0.2, 0.8))
    assert excluded_share(policy, progress) == pytest.approx(share)
    assert excluded_share(UCB(exclude_hardest=0.4), progress) == 0.4


def test_a_ramp_in_a_run_by_hand():
    # Progress 1/6, 2/6, ... at the choices: of ten samples 0, 1, 2, 2 and 2 are barred.
    ramp = {"exclude_hardest": 0.2, "exclude_ramp": (1 / 6, 3 / 6)}
    pruner = after_full_epoch(UCB(0.5, first=1, **ramp), RISING)
    chosen = [trained_in(pruner, epoch) for epoch in range(1, 6)]
    assert chosen == [[5, 6, 7, 8, 9], [4, 5, 6, 7, 8], *[[3, 4, 5, 6, 7]] * 3]


def test_a_checkpoint_from_before_the_ramp_is_resumed():
    policy = UCB(0.5, first=1, exclude_hardest=0.2)
    pruner = after_full_epoch(policy, RISING)
    assert trained_in(pruner, 1) == [3, 4, 5, 6, 7]
    pruner.end_epoch()
    state = pruner.state_dict()
    for values in (state["metadata"]["identity"], state["metadata"]["report"]):
        del values["policy"]["exclude_ramp"]
    shape = RunShape(10, batch_size=10, num_epochs=6)
    again = DynamicPruner(policy, shape)
    assert again.load_state_dict(state) == (2, 0)
    assert trained_in(again, 2) == trained_in(pruner, 2)
    other = UCB(0.5, first=1, exclude_hardest=0.2, exclude_ramp=(0.0, 0.5))
    with pytest.raises(ValueError, match="another run"):
        DynamicPruner(other, shape).load_state_dict(state)


@pytest.mark.parametrize("replacement", [True, False])
def test_random_draws_leave_the_hardest_out(replacement):
    policy = RandomPruning(0.5, replacement, first=1, exclude_hardest=0.2, exclude_ramp=(0.0, 0.5))
    seen = [set() for _ in range(7)]
    for seed in range(40):
        pruner = after_full_epoch(policy, RISING, epochs=8, seed=seed)
        for epoch in range(1, 8):
            samples = trained_in(pruner, epoch)
            assert len(samples) == 5
            seen[epoch - 1].update(samples)
    # 0.2 * 1/4 of ten samples rounds to 0, and 0.2 * 2/4 to 1; from the middle of the run it is 2.
    assert seen[0] == set(range(10))
    assert seen[1] == set(range(9))
    assert all(samples == set(range(8)) for samples in seen[3:])


def test_random_draws_are_uniform_over_what_is_not_excluded():
    counts = [0] * 10
    for seed in range(700):
        policy = RandomPruning(0.3, first=1, exclude_hardest=0.2)
        pruner = after_full_epoch(policy, {**RISING, 0: NAN}, seed=seed)
        for i in trained_in(pruner, 1):
            counts[i] += 1
    assert [counts[i] for i in (0, 8, 9)] == [0, 0, 0]
    assert chi_square(counts[1:8]) < 31  # 6 degrees of freedom: p = 2e-5


def test_random_draws_take_excluded_samples_if_all_others_are_kept():
    for replacement in (True, False):
        policy = RandomPruning(0.9, replacement, first=1, exclude_hardest=0.2)
        samples = set(trained_in(after_full_epoch(policy, RISING), 1))
        assert samples > set(range(8))
        assert len(samples) == 9


def test_random_draws_remember_losses_only_to_exclude():
    plain, small = RandomPruning(0.5), RandomPruning(0.5, exclude_hardest=0.2, max_age=2)
    assert (plain.signals, plain.needs_loss, plain.has_scores) == ((), False, False)
    assert (small.signals, small.needs_loss, small.has_scores) == (("loss",), True, True)


@pytest.mark.parametrize("cls", [UCB, EpsilonGreedy])
@pytest.mark.parametrize(
    ("share", "keep_ratio", "expected"),
    [
        (0.0, 0.5, {5, 6, 7, 8, 9}),
        (0.2, 0.5, {3, 4, 5, 6, 7}),
        (0.1, 0.5, {4, 5, 6, 7, 8}),
        (0.04, 0.5, {5, 6, 7, 8, 9}),  # 0.4 of a sample
        (0.2, 0.8, {0, 1, 2, 3, 4, 5, 6, 7}),
        (0.9, 0.1, {0}),
    ],
)
def test_the_hardest_are_kept_last(cls, share, keep_ratio, expected):
    settings = {"epsilon": 0.0, "first": 1, "exclude_hardest": share}
    pruner = after_full_epoch(cls(keep_ratio, **settings), RISING)
    assert set(trained_in(pruner, 1)) == expected


def test_the_hardest_are_kept_if_all_others_are():
    pruner = after_full_epoch(UCB(0.9, first=1, exclude_hardest=0.2), RISING)
    samples = set(trained_in(pruner, 1))
    assert samples > {0, 1, 2, 3, 4, 5, 6, 7}
    assert len(samples & {8, 9}) == 1


def test_never_observed_come_first_beside_excluded_ones():
    # Seven were observed. The two hardest of them, 5 and 6, are left out.
    pruner = after_full_epoch(
        UCB(0.5, first=1, exclude_hardest=0.3), {i: float(i) for i in range(7)}
    )
    assert set(trained_in(pruner, 1)) == {7, 8, 9, 4, 3}


def test_nan_is_not_among_the_hardest():
    losses = RISING | {0: NAN}
    pruner = after_full_epoch(UCB(0.8, first=1, exclude_hardest=0.1), losses)
    assert set(trained_in(pruner, 1)) == {1, 2, 3, 4, 5, 6, 7, 8}


def test_max_age_shows_a_sample_again():
    # Losses never change, so without the guard 5, ..., 9 are trained in every epoch.
    low, high = [0, 1, 2, 3, 4], [5, 6, 7, 8, 9]

    def choices(**settings):
        pruner = after_full_epoch(UCB(0.5, first=1, **settings), RISING, epochs=8)
        return [trained_in(pruner, epoch) for epoch in range(1, 8)]

    assert choices() == [high] * 7
    # Observed in epoch 0, not in the choices of epochs 1 and 2: shown in epoch 3, then in 6.
    assert choices(max_age=2) == [high, high, low, high, high, low, high]
    assert choices(max_age=1) == [high, low, high, low, high, low, high]
    # Choices in epochs 1, 3, 5, 7. The low ones are not observed in that of epoch 1.
    assert choices(max_age=1, period=2) == [high, high, low, low, high, high, low]
    assert choices(max_age=2, period=2) == [high, high, high, high, low, low, high]
    assert choices(max_age=7) == [high] * 7


# ---- on weights ----------------------------------------------------------------------------------


def test_max_weight_limits_the_weights():
    plan = EpochPlan(torch.tensor([2, 0, 1]), torch.tensor([0.5, 5.0, 3.0]))
    limited = guarded_plan(FullData(max_weight=3.0), plan, None, None, generator())
    assert limited.weights.tolist() == [0.5, 3.0, 3.0]
    assert plan.weights.tolist() == [0.5, 5.0, 3.0]
    assert guarded_plan(FullData(), plan, None, None, generator()) is plan


def test_max_weight_in_a_run():
    pruner = after_full_epoch(InfoBatch(prune_ratio=0.75, max_weight=2.5, first=1), RISING)
    pruner.begin_epoch(1)
    weights = pruner.weights(torch.tensor(list(pruner.sampler)))
    assert sorted(set(weights.tolist())) == [1.0, 2.5]  # not 1 / (1 - 0.75) = 4


# ---- on classes ----------------------------------------------------------------------------------


def floored(kept, labels, least, score, weights=None, seed=0):
    plan = EpochPlan(torch.tensor(kept), None if weights is None else torch.tensor(weights))
    scores = None if score is None else torch.tensor(score)
    return with_class_floor(plan, torch.tensor(labels), least, scores, generator(seed))


LABELS = [0.0, 0.0, 0.0, 0.0, 1.0, 1.0, 1.0, 2.0]


SCORE = [9.0, 8.0, 7.0, 6.0, 1.0, 3.0, 2.0, 0.0]


@pytest.mark.parametrize(
    ("kept", "least", "expected"),
    [
        ([0, 1, 2, 3], 0, [0, 1, 2, 3]),
        # The best of class 1 and the only one of class 2, for the two lowest of class 0.
        ([0, 1, 2, 3], 1, [0, 1, 5, 7]),
        ([0, 1, 2, 3, 5], 2, [0, 1, 5, 6, 7]),  # class 2 has only one
        ([0, 3, 4, 7], 1, [0, 3, 4, 7]),  # all floors are met: nothing changes
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
    plan = floored([0, 1, 2], labels, 1, [1.0, 2.0, INF, INF, 0.0])
    assert plan.indices.tolist() == [1, 2, 4]
    plan = floored([0, 2, 3], labels, 1, [1.0, 2.0, INF, INF, 0.0])
    assert len(plan) == 3
    assert {0, 4} < set(plan.indices.tolist())  # one of the unknown ones makes room
    assert floored([2, 3], [NAN] * 5, 3, None).indices.tolist() == [2, 3]


def test_floor_that_cannot_be_met_is_an_error_with_both_numbers():
    with pytest.raises(ValueError, match=r"min_per_class=2.* 5 .* 3 .* 4\b"):
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
        st.none() | st.lists(st.sampled_from([0.0, 1.0, 2.5, INF, -INF]), min_size=n, max_size=n)
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
    # It has three samples, and there are three choices.
    assert (run.pruner.table["times_kept"][labels == 3] == 3).all()
    assert [record.samples for record in run.pruning_report.epochs][1:] == [
        round(0.4 * len(data))
    ] * 3


def test_floor_of_a_task_without_labels_is_an_error_at_construction(tmp_path):
    make, data = tiny_models()["llama causal"]
    with pytest.raises(ValueError, match="'label'"):
        trainer(tmp_path, model=make(), data=data, pruning=UCB(0.4, min_per_class=3))


def test_labels_are_kept_for_a_floor_alone():
    assert "label" not in DynamicPruner(UCB(0.4), RunShape(10, num_epochs=1)).table.columns
