"""ClassBudget and ReferenceLoss against numbers worked out by hand."""

import json
import math

import pytest
import torch
from choosing import INF, NAN, assert_refused, choice_of, generator, kept
from hypothesis import given
from hypothesis import strategies as st

from hf_dynprune.policies import ClassBudget, ReferenceLoss, make_policy
from hf_dynprune.policies.informed import class_budget
from hf_dynprune.pruner import DynamicPruner
from hf_dynprune.schedule import RunShape
from hf_dynprune.scores import Scores
from hf_dynprune.table import SampleTable

# ---- the budget of a class -----------------------------------------------------------------------


def budget(loss, size, k):
    return class_budget(torch.tensor(loss, dtype=torch.float64), torch.tensor(size), k).tolist()


@pytest.mark.parametrize(
    ("loss", "size", "k", "expected"),
    [
        ([1.0, 1.0], [90, 10], 20, [15, 5]),  # sqrt 90 : sqrt 10 = 3 : 1
        ([1.0, 4.0], [40, 10], 10, [5, 5]),  # sqrt 40 : sqrt 40
        ([1.0, 9.0], [50, 50], 8, [2, 6]),  # 1 : 3
        ([1.0, 1.0], [90, 10], 60, [50, 10]),  # 45 : 15, and the second has only 10
        # 1 : 2 : 3 of 24 are 4, 8, 12. The last has 3; the 21 others are divided 1 : 2 in 7 and 14,
        # and the second has 10, so that the first gets 11.
        ([1 / 20, 4 / 10, 9 / 3], [20, 10, 3], 24, [11, 10, 3]),
        ([1.0, 1.0, 1.0], [9, 9, 9], 4, [2, 1, 1]),  # of equal remainders the first class
        ([4.0, 1.0, 1.0], [9, 9, 9], 5, [3, 1, 1]),  # 2.5, 1.25, 1.25
        ([0.0, 0.0], [6, 2], 4, [3, 1]),  # nothing to learn: by size
        ([0.0, 1.0, 0.0], [6, 1, 2], 5, [3, 1, 1]),  # the 4 that are over, by size
        ([1.0, 2.0], [3, 4], 7, [3, 4]),
        ([1.0, 2.0], [3, 4], 99, [3, 4]),
        ([1.0, 2.0], [3, 4], 0, [0, 0]),
        ([1.0, NAN], [3, 0], 2, [2, 0]),  # a class without samples has no mean
        ([], [], 3, []),
    ],
)
def test_class_budget_by_hand(loss, size, k, expected):
    assert budget(loss, size, k) == expected


@given(st.data())
def test_a_budget_is_met_exactly_and_never_above_the_size(data):
    size = data.draw(st.lists(st.integers(0, 50), min_size=1, max_size=8))
    losses = st.sampled_from([0.0, 1e-30, 0.1, 1.0, 2.3]) | st.floats(0, 100)
    loss = data.draw(st.lists(losses, min_size=len(size), max_size=len(size)))
    k = data.draw(st.integers(0, 300))
    found = budget(loss, size, k)
    assert sum(found) == min(k, sum(size))
    assert all(0 <= n <= most for n, most in zip(found, size, strict=True))


# ---- ClassBudget ---------------------------------------------------------------------------------


def labelled(policy, losses, labels):
    """A table after one epoch; a loss of None was never observed."""
    table = SampleTable(len(losses), policy.memory.columns)
    seen = [i for i, loss in enumerate(losses) if loss is not None]
    signals = {
        "loss": torch.tensor([losses[i] for i in seen]),
        "label": torch.tensor([float(labels[i]) for i in seen]),
    }
    table.observe(torch.tensor(seen), signals, memory=policy.memory, epoch=0)
    return table


def draws(policy, losses, labels, score=None, count=400):
    """What the policy keeps, for many seeds."""
    table = labelled(policy, losses, labels)
    if score is None:
        score = [INF if loss is None else -INF if math.isnan(loss) else loss for loss in losses]
    scores = torch.tensor(score)
    plans = (policy.plan(choice_of(policy, table, scores, seed=seed)) for seed in range(count))
    return [kept(plan) for plan in plans]


def test_each_class_gets_its_budget():
    # Two classes of 90 and 10 samples, all losses ln 2 or above: 15 and 5 of 20.
    labels = [int(i >= 90) for i in range(100)]
    for losses in ([0.7] * 100, [0.7 + i % 7 for i in range(100)]):
        for samples in draws(ClassBudget(0.2), losses, labels, count=20):
            assert sum(labels[i] for i in samples) == 5
            assert len(samples) == 20
    # The rare class is four times as hard, below ln 2: sqrt(90 * 0.1) to sqrt(10 * 0.4) = 3 to 2.
    losses = [0.4 if label else 0.1 for label in labels]
    for samples in draws(ClassBudget(0.1), losses, labels, count=20):
        assert sum(labels[i] for i in samples) == 4


def test_within_a_class_the_draw_is_by_the_exponential_of_the_clipped_loss():
    # One of two, of each of two classes. With beta 0.5 the odds are exp(2 (u_1 - u_2)).
    losses, labels = [0.0, 0.5, 0.1, 50.0], [0, 0, 1, 1]
    samples = draws(ClassBudget(0.5, beta=0.5), losses, labels, count=2000)
    assert all(len({labels[i] for i in kept}) == 2 for kept in samples)
    for first, second in ((0, 1), (2, 3)):
        higher = min(losses[second], math.log(2))
        odds = math.exp((higher - losses[first]) / 0.5)
        share = sum(second in kept for kept in samples) / 2000
        assert share == pytest.approx(odds / (1 + odds), abs=0.047)  # 4.5 standard errors


def test_never_observed_come_first_and_the_budget_divides_the_rest():
    losses, labels = [None, None, 0.7, 0.7, 0.7, 0.7, NAN, 0.7], [0, 1, 0, 0, 0, 1, 0, 1]
    for samples in draws(ClassBudget(0.5), losses, labels, count=30):
        assert {0, 1} < set(samples)
        assert sorted(labels[i] for i in samples if i > 1) == [0, 1]
        assert 6 not in samples
    assert {i for samples in draws(ClassBudget(1 / 8), losses, labels) for i in samples} == {0, 1}
    # Samples without a loss fill up at last.
    assert draws(ClassBudget(1.0), losses, labels, count=1) == [list(range(8))]
    for samples in draws(ClassBudget(7 / 8), losses, labels, count=30):
        assert samples == [0, 1, 2, 3, 4, 5, 7]


def test_barred_samples_count_in_no_class():
    labels = [0, 0, 0, 0, 1, 1, 1, 1]
    score = [0.7] * 4 + [-INF] * 4
    for samples in draws(ClassBudget(0.5), [0.7] * 8, labels, score, count=20):
        assert samples == [0, 1, 2, 3]
    for samples in draws(ClassBudget(5 / 8), [0.7] * 8, labels, score, count=20):
        assert set(samples) > {0, 1, 2, 3}


def test_an_unusual_label_is_a_class():
    """Labels are compared, not counted up to: they need not be 0, ..., C - 1."""
    labels = [1000, 7, 7, 7]
    for samples in draws(ClassBudget(0.5), [0.5] * 4, labels, count=20):
        assert 0 in samples  # sqrt 1 : sqrt 3 of 2 is 0.73 : 1.27


BAD = [
    *[(ClassBudget, "beta", v, ValueError) for v in (0, -1.0, NAN, INF)],
    *[(ClassBudget, "beta", v, TypeError) for v in ("1", None, True)],
    *[(ClassBudget, "keep_ratio", v, ValueError) for v in (0, 1.5)],
]


@pytest.mark.parametrize(("cls", "name", "value", "error"), BAD)
def test_bad_value_is_named(cls, name, value, error):
    assert_refused(cls, name, value, error)


# ---- ReferenceLoss -------------------------------------------------------------------------------

REFERENCE = [0.0, 3.0, 1.0, 0.5, 2.0, 0.1]


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "reference.safetensors"
    Scores(REFERENCE, "reference", "6 samples", {"passes": 12, "seconds": 2.5}).save(path)
    return str(path)


def mean_table(policy, means):
    table = SampleTable(len(means), policy.memory.columns)
    signals = {"loss": torch.tensor(means)}
    table.observe(torch.arange(len(means)), signals, memory=policy.memory, epoch=0)
    return table


def test_score_is_the_mean_loss_above_the_reference(file):
    policy = ReferenceLoss(file, decay=0.25)
    table = mean_table(policy, [1.0, 4.0, 1.0, 2.5, 0.0, 0.2])
    table.observe(torch.tensor([3]), {"loss": torch.tensor([0.5])}, memory=policy.memory, epoch=1)
    expected = [1.0, 1.0, 0.0, 0.75 * 2.5 + 0.25 * 0.5 - 0.5, -2.0, 0.1]
    assert policy.score(table).tolist() == pytest.approx(expected)
    control = ReferenceLoss(None)
    assert control.score(table).tolist() == table["mean"].tolist()


def test_a_sample_that_the_reference_finds_hard_is_not_kept(file):
    means = [0.2, 2.9, 1.3, 0.9, 2.0, 0.7]  # above the reference: 0.2, -0.1, 0.3, 0.4, 0, 0.6
    for cls_scores, expected in ((file, [2, 3, 5]), (None, [1, 2, 4])):
        policy = ReferenceLoss(cls_scores, 0.5, draw_ratio=1.0)
        table = mean_table(policy, means)
        assert kept(policy.plan(choice_of(policy, table, policy.score(table)))) == expected


def test_it_keeps_the_highest_of_a_draw(file):
    policy = ReferenceLoss(file, 1 / 3, draw_ratio=2 / 3)
    table = mean_table(policy, [value + i for i, value in enumerate(REFERENCE)])
    score = policy.score(table)  # 0, ..., 5
    counts = [0] * 6
    for seed in range(1500):
        for i in kept(policy.plan(choice_of(policy, table, score, seed=seed))):
            counts[i] += 1
    # 2 of 4 drawn of 6: sample i is drawn (4/6) with at most one of the i higher ones' remaining 3.
    for i, count in enumerate(counts):
        above = 5 - i
        ways = sum(math.comb(above, a) * math.comb(i, 3 - a) for a in (0, 1))
        share = 4 / 6 * ways / math.comb(5, 3)
        assert abs(count - 1500 * share) <= 4.5 * math.sqrt(1500 * share * (1 - share)) + 1e-9


def test_reference_losses_are_charged(file):
    def report_of(policy):
        pruner = DynamicPruner(policy, RunShape(6, batch_size=2, num_epochs=2))
        for epoch in range(2):
            pruner.begin_epoch(epoch)
            for batch in torch.tensor(list(pruner.sampler)).split(2):
                pruner.observe(batch, {"loss": torch.rand(len(batch), generator=generator())})
        pruner.end_epoch()
        return pruner.report

    assert report_of(ReferenceLoss(file, 0.5)).passes == 6 + 12
    assert report_of(ReferenceLoss(file, 0.5, charge=False)).passes == 6
    preparation = report_of(ReferenceLoss(file, 0.5)).preparation
    assert preparation["method"] == "reference"
    assert preparation["passes"] == 12
    control = report_of(ReferenceLoss(None, 0.5))
    assert (control.passes, control.preparation) == (6, {})


def test_reference_loss_is_a_value(file):
    policy = ReferenceLoss(file, 0.3, draw_ratio=0.6, charge=False, first=1)
    again = make_policy(**json.loads(json.dumps(policy.to_dict())))
    assert again == policy
    assert hash(again) == hash(policy)
    assert policy.digest == Scores.load(file).digest
    assert policy != ReferenceLoss(None, 0.3, draw_ratio=0.6, charge=False, first=1)
    assert policy.planned_size(10, 0, 0.0) == 3
    assert ReferenceLoss(None).draw_ratio == 0.75
    assert ReferenceLoss(None, 0.9).draw_ratio == 0.9


def test_what_reference_loss_refuses(file, tmp_path):
    with pytest.raises(TypeError, match="scores"):  # the control must be asked for
        ReferenceLoss(keep_ratio=0.5)
    with pytest.raises(TypeError, match="scores=int"):
        ReferenceLoss(3)
    with pytest.raises(ValueError, match=r"draw_ratio=0\.2.*\[0\.5, 1\]"):
        ReferenceLoss(file, 0.5, draw_ratio=0.2)
    with pytest.raises(ValueError, match=r"decay=0\.0"):
        ReferenceLoss(file, decay=0.0)
    with pytest.raises(FileNotFoundError, match=r"none\.safetensors"):
        ReferenceLoss(tmp_path / "none.safetensors")
    with pytest.raises(ValueError, match=r"\b6\b.*\b9\b"):
        DynamicPruner(ReferenceLoss(file), RunShape(9, num_epochs=1))
    Scores(REFERENCE, "mine").save(tmp_path / "free.safetensors")
    with pytest.raises(ValueError, match=r"free\.safetensors.*charge=False"):
        ReferenceLoss(tmp_path / "free.safetensors")
