"""KAKURENBO and instance-dependent early stopping."""

import json

import pytest
import torch
from choosing import INF, NAN, assert_refused, chi_square, choice_of, chosen, counts_of, table_of

from hf_dynprune.policies import IES, KAKURENBO, PruningPolicy, make_policy
from hf_dynprune.pruner import DynamicPruner
from hf_dynprune.schedule import RunShape
from hf_dynprune.table import SampleTable

# ---- KAKURENBO -----------------------------------------------------------------------------------


def observed(policy: PruningPolicy, loss: list, correct: list, confidence: list) -> SampleTable:
    table = SampleTable(len(loss), policy.memory.columns)
    values = {"loss": loss, "correct": correct, "confidence": confidence}
    signals = {name: torch.tensor(column, dtype=torch.float32) for name, column in values.items()}
    table.observe(torch.arange(len(loss)), signals, memory=policy.memory, epoch=0)
    return table


def hidden_of(
    policy: KAKURENBO, table: SampleTable, progress: float = 0.0, seed: int = 0
) -> set[int]:
    scores = policy.score(table).nan_to_num(nan=INF)
    plan = policy.plan(choice_of(policy, table, scores, progress=progress, seed=seed))
    assert plan.lr_scale == pytest.approx(len(table) / len(plan))
    return set(range(len(table))) - set(plan.indices.tolist())


EASY_FIRST = [i / 10 for i in range(10)]


def test_kakurenbo_by_hand():
    policy = KAKURENBO()  # the 3 lowest are candidates
    assert hidden_of(policy, observed(policy, EASY_FIRST, [1] * 10, [0.9] * 10)) == {0, 1, 2}
    # Sample 1 was misclassified, sample 2 is not confident, sample 0 is just confident enough.
    # No other sample takes the place of 1 and 2.
    table = observed(policy, EASY_FIRST, [1, 0, 1, *[1] * 7], [0.7, 0.9, 0.69, *[1.0] * 7])
    assert hidden_of(policy, table) == {0}
    choice = choice_of(policy, table, policy.score(table))
    plan = policy.plan(choice)
    assert plan.lr_scale == pytest.approx(10 / 9)  # 1 / (1 - 0.1), not 1 / (1 - 0.3)
    assert plan.weights is None
    assert KAKURENBO(scale_lr=False).plan(choice).lr_scale == 1.0


@pytest.mark.parametrize(
    ("progress", "count"),
    # 0.3 * 100 * (1, 0.8, 0.6, 0.4). CIFAR-100 has steps at epochs 60, 120, 160 of 200.
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
    # A share that a float misses by a little counts as reached.
    assert len(hidden_of(policy, table, 0.3 - 1e-12)) == 24


def test_kakurenbo_hides_nothing_that_it_does_not_know():
    policy = KAKURENBO(scoring="trained")
    assert chosen(policy, SampleTable(10, policy.memory.columns)) == list(range(10))
    # Sample 0 gave no number, so it is hidden first at any confidence. Sample 1 is due (max_age).
    table = observed(policy, EASY_FIRST, [1] * 10, [1.0] * 10)
    score = policy.score(table).clone()
    score[0], score[1] = -INF, INF
    table["confidence"][0] = NAN
    plan = policy.plan(choice_of(policy, table, score))
    assert set(range(10)) - set(plan.indices.tolist()) == {0, 2, 3}
    score.fill_(INF)
    assert len(policy.plan(choice_of(policy, table, score))) == 10


def test_ties_of_the_lowest_losses_are_hidden_at_random():
    policy = KAKURENBO()
    table = observed(policy, [0.0] * 10, [1] * 10, [1.0] * 10)
    counts = counts_of((hidden_of(policy, table, seed=seed) for seed in range(400)), 10)
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
    # Second differences of sample 0, the newest first: 1 - 2 + 1, 1 - 2 + 2, 1 - 4 + 4.
    # The rule waits for the loss 8 and does not use it.
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
    assert chosen(policy, table) == [1, 2, 3, 6]  # sample 2 scores 0.5, which is not below
    assert chosen(IES(threshold=0.51, scoring="trained"), table) == [1, 3, 6]
    forward_pass = {"loss": torch.tensor([9.0])}
    table.observe(torch.tensor([0]), forward_pass, memory=policy.memory, epoch=6)
    assert chosen(policy, table) == [0, 1, 2, 3, 6]


def test_ies_keeps_one_where_all_are_mastered():
    policy = IES(scoring="trained")
    table = table_of(policy, {i: [1.0] * 5 + [1.0 + i * 1e-4] for i in range(4)}, n=4)
    assert chosen(policy, table) == [3]
    assert chosen(IES(threshold=0.0, scoring="trained"), table) == [0, 1, 2, 3]


def test_first_six_epochs_of_ies_train_on_everything():
    policy = IES(scoring="trained", threshold=1e9)
    pruner = DynamicPruner(policy, RunShape(4, batch_size=4, num_epochs=8))
    sizes = []
    for epoch in range(8):
        pruner.begin_epoch(epoch)
        sizes.append(len(pruner.sampler))
        index = torch.tensor(list(pruner.sampler))
        pruner.observe(index, {"loss": index.float() ** 2 + epoch**2})
    assert sizes == [4] * 6 + [1, 1]


# ---- fields --------------------------------------------------------------------------------------


BAD = [
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
    *[(cls, "scoring", v, ValueError) for cls in (KAKURENBO, IES) for v in ("some", None)],
]


@pytest.mark.parametrize(("cls", "name", "value", "error"), BAD)
def test_bad_value_is_named(cls, name, value, error):
    assert_refused(cls, name, value, error)


@pytest.mark.parametrize(
    ("schedule", "value"),
    [
        (((0, 1.5),), "1.5"),
        (((0, -0.1),), "-0.1"),
        (((0, 1), (1.5, 1)), "1.5"),
        (((0, "all"),), "'all'"),
    ],
)
def test_bad_share_of_a_schedule_is_named(schedule, value):
    with pytest.raises((ValueError, TypeError), match=rf"schedule.*={value}"):
        KAKURENBO(schedule=schedule)
