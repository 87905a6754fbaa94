"""What holds for every policy. A new one is one line in this table."""

import copy
import json
import math

import pytest
import torch

from hf_dynprune.policies import POLICIES, EpochPlan, PruningPolicy, make_policy
from hf_dynprune.pruner import DynamicPruner
from hf_dynprune.scores import SampleTable

# case -> (name in POLICIES, settings)
CASES = {
    "full": ("full", {}),
    "random": ("random", {"keep_ratio": 0.4}),
    "rs2": ("random", {"keep_ratio": 0.4, "replacement": False}),
    "epsilon-greedy": ("epsilon-greedy", {"keep_ratio": 0.4}),
    "ucb": ("ucb", {"keep_ratio": 0.4}),
    "ucb with all options": ("ucb", {"keep_ratio": 0.4, "bonus": "std", "c": 2.0, "decay": 0.3, "epsilon": 0.25}),
}
# What the pruner does around a policy, for those that have scores and for all.
GUARDS = {"max_age": 2, "exclude_hardest": 0.1}
BASE = {"period": 2, "first": 1, "last": 0.2}

NAN = math.nan


def policy_of(case: str, **settings) -> PruningPolicy:
    name, own = CASES[case]
    return make_policy(name, **{**own, **settings})


def ratio(policy: PruningPolicy) -> float:
    return getattr(policy, "keep_ratio", 1.0)


def has_scores(policy: PruningPolicy) -> bool:
    return policy.score(SampleTable(1, policy.columns)) is not None


every_case = pytest.mark.parametrize("case", CASES)
score_case = pytest.mark.parametrize("case", [case for case in CASES if has_scores(policy_of(case))])


def observed_table(policy: PruningPolicy, losses: list[float], epochs: int = 1) -> SampleTable:
    """A table after each sample was observed, `losses[i]` that of sample i; None: never."""
    table = SampleTable(len(losses), policy.columns)
    index = torch.tensor([i for i, loss in enumerate(losses) if loss is not None], dtype=torch.int64)
    values = torch.tensor([loss for loss in losses if loss is not None], dtype=torch.float32)
    for epoch in range(epochs):
        table.observe(index, dict.fromkeys(policy.signals, values), update=policy.observe, epoch=epoch)
    return table


def plan_of(policy: PruningPolicy, table: SampleTable, seed: int = 0) -> EpochPlan:
    """As the pruner asks for it, without guards."""
    score = policy.score(table)
    if score is not None:
        score = score.nan_to_num(nan=-math.inf, posinf=math.inf, neginf=-math.inf)
        score[~table.observed] = math.inf
    generator = torch.Generator().manual_seed(seed)
    return policy.plan(table, score=score, epoch=1, progress=0.5, generator=generator)


def begun(policy: PruningPolicy, table: SampleTable, seed: int = 0) -> DynamicPruner:
    """A pruner in its first epoch, with that table."""
    pruner = DynamicPruner(policy, len(table), num_epochs=2, seed=seed)
    pruner.table.load_state_dict(table.state_dict())
    pruner.begin_epoch(0)
    return pruner


LOSSES = [0.5, 3.0, 0.1, 2.0, 2.0, 0.7, 0.0, 9.0, 1.5, 2.5, 0.3]


def test_table_names_every_policy():
    assert {name for name, _ in CASES.values()} == set(POLICIES)
    assert all(type(policy_of(case)) is POLICIES[CASES[case][0]] for case in CASES)


@every_case
def test_plan_is_pure(case):
    policy = policy_of(case)
    table = observed_table(policy, LOSSES)
    before = copy.deepcopy(table.state_dict())
    one, two = plan_of(policy, table), plan_of(policy, table)
    assert torch.equal(one.indices, two.indices)
    assert (one.weights is None) == (two.weights is None)
    assert one.weights is None or torch.equal(one.weights, two.weights)
    assert one.lr_scale == two.lr_scale
    assert all(torch.equal(column, before[name]) for name, column in table.state_dict().items())


@every_case
@pytest.mark.parametrize("n", [2, 5, 11, 100])
@pytest.mark.parametrize("losses", ["different", "equal", "never", "half", "nan", "half nan"])
def test_number_of_samples_kept(case, n, losses):
    values = {
        "different": [float(i * 7 % n) for i in range(n)],
        "equal": [0.7] * n,  # in float32 not its own mean
        "never": [None] * n,
        "half": [1.0 if i % 2 else None for i in range(n)],
        "nan": [NAN] * n,
        "half nan": [1.0 if i % 2 else NAN for i in range(n)],
    }[losses]
    policy = policy_of(case)
    pruner = begun(policy, observed_table(policy, values, epochs=3))
    samples = sorted(pruner.sampler)
    assert len(samples) == len(set(samples)) == max(1, round(ratio(policy) * n))
    assert policy.planned_size(n, 0, 0.0) in (None, len(samples))
    assert (pruner.weights(torch.tensor(samples)) > 0).all()


@every_case
def test_one_sample(case):
    policy = policy_of(case)
    for loss in (1.0, NAN, None):
        assert list(begun(policy, observed_table(policy, [loss])).sampler) == [0]


@every_case
def test_keep_all_is_the_stock_order_without_weights(case):
    policy = policy_of(case, **({} if case == "full" else {"keep_ratio": 1.0}))
    pruner = begun(policy, observed_table(policy, LOSSES), seed=5)
    assert list(pruner.sampler) == torch.randperm(11, generator=torch.Generator().manual_seed(5)).tolist()
    assert pruner.weights(torch.arange(11)).tolist() == [1.0] * 11
    assert pruner.lr_scale == 1.0


@every_case
def test_equal_scores_prefer_nobody(case):
    policy, counts = policy_of(case), [0] * 20
    table = observed_table(policy, [0.7] * 20, epochs=2)
    for seed in range(200):
        for i in plan_of(policy, table, seed).indices.tolist():
            counts[i] += 1
    expected = 200 * ratio(policy)
    assert all(abs(count - expected) <= 4.5 * math.sqrt(200 * 0.4 * 0.6) for count in counts)


@every_case
def test_losses_that_are_no_numbers_leave_the_columns(case):
    policy = policy_of(case)
    table = observed_table(policy, LOSSES)
    before = copy.deepcopy(table.state_dict())
    if policy.signals:
        for bad in (NAN, math.inf, -math.inf):
            signals = dict.fromkeys(policy.signals, torch.full((11,), bad))
            rejected = table.observe(torch.arange(11), signals, update=policy.observe, epoch=4)
            assert rejected.tolist() == list(range(11))
        assert table["last_observed"].tolist() == [4] * 11
    for column in policy.columns:
        assert torch.equal(table[column.name], before[column.name])


@score_case
def test_never_observed_come_first_and_nan_last(case):
    policy = policy_of(case, epsilon=0.0)
    table = observed_table(policy, [1e9, None, NAN, 5.0, None, 1.0, None, NAN, 2.0, 3.0])
    assert sorted(begun(policy, table).sampler) == [0, 1, 4, 6]
    table = observed_table(policy, [NAN, 1.0, NAN, 5.0, 4.0, 1.0, NAN, NAN, NAN, 3.0])
    samples = set(begun(policy, table).sampler)
    assert samples > {3, 4, 9}
    assert len(samples & {1, 5}) == 1


@score_case
def test_observe_of_the_policy_takes_any_number_of_rows(case):
    policy = policy_of(case)
    for rows in (0, 1, 3):
        columns = {c.name: torch.full((rows,), c.initial, dtype=c.dtype) for c in policy.columns}
        changed = policy.observe(columns, dict.fromkeys(policy.signals, torch.ones(rows)))
        assert set(changed) <= set(columns)
        assert all(value.shape == (rows,) and value.isfinite().all() for value in changed.values())


@every_case
def test_settings_survive_json(case):
    settings = {**BASE, **(GUARDS if has_scores(policy_of(case)) else {})}
    policy = policy_of(case, **settings)
    again = make_policy(**json.loads(json.dumps(policy.to_dict())))
    assert again == policy
    assert type(again) is type(policy)
    assert policy.to_dict().items() >= {**CASES[case][1], **settings, "name": CASES[case][0]}.items()


@every_case
def test_signals_and_columns_are_declared(case):
    policy = policy_of(case)
    names = [column.name for column in policy.columns]
    assert len(names) == len(set(names))
    assert isinstance(policy.signals, tuple)
    assert bool(names) == bool(policy.signals)
    for column in policy.columns:
        assert column.dtype.is_floating_point or not math.isnan(column.initial)


# ---- a run that was interrupted goes on as if it had not been -------------------------------------------------------

N, BATCH = 23, 3


def loss_of(i: int, epoch: int) -> float:
    """Of a fake model; one of 37 is not a number."""
    mixed = (i * 7919 + epoch * 104729 + i * epoch * 31) % 37
    return NAN if mixed == 5 else mixed / 8


def make_pruner(policy: PruningPolicy, budget: dict) -> DynamicPruner:
    return DynamicPruner(policy, N, batch_size=BATCH, accumulation=2, seed=3, data_seed=4, **budget)


def train(pruner: DynamicPruner, start=(0, 0), stop_after=None):
    """Goes through the epochs of a run from (epoch, batch) on; leaves after that many batches. Returns what it trained."""
    seen = []
    for epoch in range(start[0], pruner.num_epochs):
        if stop_after == 0:
            return seen
        pruner.begin_epoch(epoch)
        batches = torch.tensor(list(pruner.sampler)).split(BATCH)
        for batch in batches[start[1] if epoch == start[0] else 0 :]:
            if stop_after is not None and len(seen) == stop_after:
                return seen
            step = pruner.clock.start + pruner.batches_done // 2
            seen.append((batch.tolist(), pruner.weights(batch).tolist(), pruner.clock.virtual(step), pruner.lr_scale))
            losses = torch.tensor([loss_of(i, epoch) for i in batch.tolist()])
            pruner.observe(batch, dict.fromkeys(pruner.policy.signals, losses))
        pruner.end_epoch()
    return seen


def outcome(pruner: DynamicPruner) -> dict:
    """Table and report, without seconds and the note of the resume."""
    report = pruner.report.to_dict()
    for part in (report["totals"], *report["epochs"]):
        part.pop("seconds")
    report.pop("resumed")
    return {"table": {n: c.nan_to_num(-1).tolist() for n, c in pruner.table.state_dict().items()}, **report}


@every_case
@pytest.mark.parametrize("budget", [{"num_epochs": 5}, {"num_epochs": 4.5}, {"max_steps": 14}])
def test_resumed_run_equals_the_uninterrupted_one(case, budget, tmp_path):
    settings = {**BASE, **(GUARDS if has_scores(policy_of(case)) else {})}
    policy = policy_of(case, **settings)
    whole = make_pruner(policy, budget)
    everything = train(whole)
    expected = outcome(whole)
    assert len(everything) > 20
    ends = []  # batches done when each epoch ends
    for record in whole.report.epochs:
        ends.append((ends[-1] if ends else 0) + whole.batches(record.samples))
    # before the first batch, in an epoch on all data, at its end, in a chosen one, in one that holds the plan, and so on
    for stop in sorted({0, 1, ends[0], ends[0] + 2, ends[1], ends[1] + 1, ends[2], ends[-1] - 1, ends[-1]}):
        broken = make_pruner(policy, budget)
        before = train(broken, stop_after=stop)
        broken.save(tmp_path)
        resumed = make_pruner(policy, budget)
        start = resumed.load(tmp_path)
        assert before + train(resumed, start) == everything
        assert outcome(resumed) == expected


# ---- beyond 2^24, where float32 no longer tells two numbers apart ---------------------------------------------------


@pytest.mark.parametrize("case", ["ucb", "random"])
def test_indices_above_2_to_the_24_are_exact(case):
    n = 2**24 + 3
    hard = [2**24 - 1, 2**24, 2**24 + 1, 2**24 + 2]
    policy = policy_of(case, keep_ratio=4 / n)
    pruner = DynamicPruner(policy, n, batch_size=4, num_epochs=1)
    for name in ("last_observed", *(column.name for column in policy.columns)):
        pruner.table[name].zero_()  # as if all samples had had a loss of 0
    signals = {"loss": torch.tensor([1.0, 2.0, 3.0, 4.0])} if policy.signals else {}
    index = torch.tensor([2**24 + 1, 2**24 - 1, 2**24 + 2, 2**24])
    pruner.table.observe(index, signals, update=policy.observe, epoch=0)
    pruner.begin_epoch(0)
    samples = sorted(pruner.sampler)
    if case == "ucb":
        assert samples == hard
        assert pruner.table["mean"][hard].tolist() == pytest.approx([0.8 * 2, 0.8 * 4, 0.8 * 1, 0.8 * 3])
        assert pruner.table["mean"].count_nonzero() == 4
    assert len(samples) == len(set(samples)) == 4
    assert torch.nonzero(pruner.table["times_kept"]).squeeze(1).tolist() == samples
