"""What holds for every policy. A new one is one line in the table of cases.py."""

import copy
import json
import math
from itertools import islice

import numpy as np
import pytest
import torch
from cases import (
    BASE,
    CASES,
    DRAWN_FROM_ALL,
    GUARDS,
    KEEP_ALL,
    NAN,
    every_case,
    has_scores,
    loss_of,
    outcome,
    policy_of,
    same,
    score_case,
    size,
)
from choosing import choice_of, pruner_with
from threads import on_ranks

from hf_dynprune import distributed, policies
from hf_dynprune.policies import (
    GRESO,
    IES,
    KAKURENBO,
    POLICIES,
    EffectiveShare,
    EpochPlan,
    InfoBatch,
    PruningPolicy,
    SeTa,
    make_policy,
)
from hf_dynprune.pruner import DynamicPruner
from hf_dynprune.sampler import PruningSampler
from hf_dynprune.schedule import RunShape
from hf_dynprune.table import SampleTable


@pytest.fixture(autouse=True)
def _noted(reliability):
    reliability("conformance")


def observed_table(policy: PruningPolicy, losses: list, epochs: int = 1) -> SampleTable:
    """A table after sample i was observed with `losses[i]` in each epoch; None means never."""
    table = SampleTable(len(losses), policy.memory.columns)
    observed = [i for i, loss in enumerate(losses) if loss is not None]
    index = torch.tensor(observed, dtype=torch.int64)
    values = torch.tensor([losses[i] for i in observed], dtype=torch.float32)
    signals = dict.fromkeys(policy.signals, values)
    for epoch in range(epochs):
        table.observe(index, signals, memory=policy.memory, epoch=epoch)
    return table


def plan_of(policy: PruningPolicy, table: SampleTable, seed: int = 0) -> EpochPlan:
    """What the policy plans, without guards."""
    scores = None
    if has_scores(policy):
        scores = policy.score(table).nan_to_num(nan=-math.inf, posinf=math.inf, neginf=-math.inf)
        scores[~table.observed] = math.inf
    return policy.plan(choice_of(policy, table, scores, epoch=1, progress=0.5, seed=seed))


def begun(policy: PruningPolicy, table: SampleTable, seed: int = 0) -> DynamicPruner:
    """A pruner in its first epoch, with that table."""
    pruner = pruner_with(policy, table, epochs=2, seed=seed)
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
    assert all(same(column, before[name]) for name, column in table.state_dict().items())


@every_case
@pytest.mark.parametrize("n", [2, 5, 11, 100])
@pytest.mark.parametrize("losses", ["different", "equal", "never", "half", "nan", "half nan"])
def test_number_of_samples_kept(case, n, losses):
    values = {
        "different": [float(i * 7 % n) for i in range(n)],
        "equal": [0.7] * n,  # in float32 their mean is not 0.7
        "never": [None] * n,
        "half": [1.0 if i % 2 else None for i in range(n)],
        "nan": [NAN] * n,
        "half nan": [1.0 if i % 2 else NAN for i in range(n)],
    }[losses]
    policy = policy_of(case)
    pruner = begun(policy, observed_table(policy, values, epochs=3))
    samples = sorted(pruner.sampler)
    assert len(samples) == len(set(samples)) >= 1
    assert policy.planned_size(n, 0, 0.0) == size(policy, n)
    assert len(samples) == (size(policy, n) or len(samples))
    assert (pruner.weights(torch.tensor(samples)) > 0).all()


@every_case
def test_one_sample(case):
    policy = policy_of(case)
    for loss in (1.0, NAN, None):
        assert list(begun(policy, observed_table(policy, [loss])).sampler) == [0]


@every_case
def test_keep_all_is_the_stock_order_without_weights(case):
    policy = policy_of(case, **KEEP_ALL.get(case, {"keep_ratio": 1.0}))
    pruner = begun(policy, observed_table(policy, LOSSES), seed=5)
    stock = torch.randperm(11, generator=torch.Generator().manual_seed(5))
    assert list(pruner.sampler) == stock.tolist()
    assert pruner.weights(torch.arange(11)).tolist() == [1.0] * 11
    assert pruner.lr_scale == 1.0


@every_case
def test_equal_scores_prefer_nobody(case):
    policy, counts = policy_of(case), [0] * 20
    table = observed_table(policy, [0.7] * 20, epochs=2)
    for seed in range(200):
        for i in plan_of(policy, table, seed).indices.tolist():
            counts[i] += 1
    expected = sum(counts) / 20
    # If all are kept, the deviation is 0.
    limit = 4.5 * math.sqrt(expected * (1 - expected / 200))
    assert all(abs(count - expected) <= limit for count in counts)


@every_case
def test_losses_that_are_not_numbers_leave_the_columns(case):
    policy = policy_of(case)
    table = observed_table(policy, LOSSES)
    before = copy.deepcopy(table.state_dict())
    if policy.signals:
        for bad in (NAN, math.inf, -math.inf):
            signals = dict.fromkeys(policy.signals, torch.full((11,), bad))
            rejected = table.observe(torch.arange(11), signals, memory=policy.memory, epoch=4)
            assert rejected.tolist() == list(range(11))
        assert table["last_observed"].tolist() == [4] * 11
    for column in policy.memory.columns:
        assert same(table[column.name], before[column.name])


@score_case
def test_never_observed_come_first_and_nan_last(case):
    policy = policy_of(case, **({"epsilon": 0.0} if hasattr(policy_of(case), "epsilon") else {}))
    table = observed_table(policy, [1e9, None, NAN, 5.0, None, 1.0, None, NAN, 2.0, 3.0])
    samples = set(begun(policy, table).sampler)
    assert samples >= {1, 4, 6} or case in DRAWN_FROM_ALL
    assert not samples & {2, 7}
    clipped = case == "class budget"  # the highest losses are alike
    if size(policy, 10) == 4 and case not in DRAWN_FROM_ALL and not clipped:
        assert samples == {0, 1, 4, 6}
    table = observed_table(policy, [NAN, 1.0, NAN, 5.0, 4.0, 1.0, NAN, NAN, NAN, 3.0])
    samples = set(begun(policy, table).sampler)
    assert samples <= {1, 3, 4, 5, 9} or samples > {1, 3, 4, 5, 9}
    if case in ("epsilon-greedy", "ucb", "ucb with all options"):
        assert samples > {3, 4, 9}
        assert len(samples & {1, 5}) == 1


@score_case
def test_the_memory_takes_any_number_of_rows(case):
    memory = policy_of(case).memory
    for rows in (0, 1, 3):
        columns = {c.name: torch.full((rows,), c.initial, dtype=c.dtype) for c in memory.columns}
        for _ in memory.columns:  # a history is full after as many observations
            changed = memory.observe(columns, dict.fromkeys(memory.signals, torch.ones(rows)))
            assert set(changed) <= set(columns)
            columns.update(changed)
        assert all(value.shape == (rows,) and value.isfinite().all() for value in columns.values())


@every_case
def test_settings_survive_json(case):
    settings = {**BASE, **(GUARDS if has_scores(policy_of(case)) else {})}
    policy = policy_of(case, **settings)
    again = make_policy(**json.loads(json.dumps(policy.to_dict())))
    assert again == policy
    assert type(again) is type(policy)
    given = {**CASES[case][1], **settings, "name": CASES[case][0]}
    assert policy.to_dict().items() >= given.items()


@every_case
def test_a_policy_is_a_value(case):
    policy = policy_of(case, **BASE)
    assert policy == policy_of(case, **BASE) != policy_of(case)
    assert hash(policy) == hash(policy_of(case, **BASE))
    assert eval(str(policy), vars(policies).copy()) == policy
    assert policy.memory == policy.memory


@every_case
def test_what_a_policy_declares(case):
    policy = policy_of(case)
    names = [column.name for column in policy.memory.columns]
    assert len(names) == len(set(names))
    assert isinstance(policy.signals, tuple)
    assert bool(names) == bool(policy.signals)
    assert policy.needs_loss == bool(policy.signals or policy.weighs)
    for column in policy.memory.columns:
        assert column.dtype.is_floating_point or not math.isnan(column.initial)


@every_case
@pytest.mark.parametrize("n", [1, 7, 1000])
def test_expected_share_is_a_range_of_shares(case, n):
    least, most = policy_of(case).expected_share(n)
    assert 0 < least <= most <= 1


# ---- a run that learns ---------------------------------------------------------------------------


def shares_of(policy: PruningPolicy, n: int = 300, epochs: int = 30) -> list[float]:
    """The share of the data of each epoch with a choice. Losses fall, at different rates."""
    source = torch.Generator().manual_seed(0)
    rate = 0.05 + 0.6 * torch.rand(n, generator=source)
    noise = 1 + 0.1 * torch.randn(epochs, n, generator=source)
    pruner = DynamicPruner(policy, RunShape(n, batch_size=n, num_epochs=epochs), seed=1)
    for epoch in range(epochs):
        loss = 3 * (-rate * epoch).exp() * noise[epoch]
        correct = (loss < 1.5).float()
        signals = {"loss": loss, "correct": correct, "confidence": (-loss).exp()}
        signals |= {"solved": correct, "reward_std": loss * ((loss > 0.3) & (loss < 1.5))}

        def observed(index, signals=signals):
            return {name: values[index] for name, values in signals.items()}

        pruner.begin_epoch(epoch, scorer=observed)
        index = torch.tensor(list(pruner.sampler))
        pruner.observe(index, observed(index))
    return [record.samples / n for record in pruner.report.epochs if not record.full_data]


DATA_DEPENDENT = [
    InfoBatch(),
    InfoBatch(prune_ratio=0.3),
    SeTa(),
    SeTa.paper_like(),
    KAKURENBO(),
    IES(),
    GRESO(),
    EffectiveShare(),
    EffectiveShare(least=0.2, most=0.4),
]


def test_all_policies_whose_size_depends_on_the_data_are_tried():
    named = {policy_of(case).name for case in CASES if size(policy_of(case), 100) is None}
    assert {policy.name for policy in DATA_DEPENDENT} == named


@pytest.mark.parametrize("policy", DATA_DEPENDENT, ids=str)
def test_a_run_keeps_the_share_that_is_expected(policy):
    shares = shares_of(policy)
    least, most = policy.expected_share(300)
    assert least <= sum(shares) / len(shares) <= most
    assert len(set(shares)) > 3


def test_kakurenbo_never_keeps_less_than_expected():
    least, _ = KAKURENBO().expected_share(300)
    assert min(shares_of(KAKURENBO())) >= least


# ---- an interrupted run ends as the uninterrupted one --------------------------------------------


N, BATCH = 23, 3


def make_pruner(policy: PruningPolicy, budget: dict, batch: int = BATCH) -> DynamicPruner:
    shape = RunShape(N, batch_size=batch, accumulation=2, **budget)
    return DynamicPruner(policy, shape, seed=3, data_seed=4)


def train(pruner: DynamicPruner, start=(0, 0), stop_after=None):
    """Train from (epoch, batch) on, until the end or for `stop_after` batches.

    Returns:
        For each batch its samples, their weights, the virtual step and the factor on the rate.
    """
    seen = []
    for epoch in range(start[0], pruner.num_epochs):
        step = pruner.clock.start + -(-pruner.batches_done // 2)
        spent = (epoch, 0) >= start and pruner.shape.budget.is_spent(epoch, step)
        if stop_after == 0 or spent:
            return seen
        pruner.begin_epoch(epoch)
        order = torch.tensor(list(pruner.sampler))
        batches = order.where(order >= 0, -1).split(pruner.shape.batch_size)  # -1 is padding
        batches = batches[pruner.rank :: pruner.shape.ranks]
        for batch in batches[start[1] if epoch == start[0] else 0 :]:
            if stop_after is not None and len(seen) == stop_after:
                return seen
            step = pruner.clock.start + pruner.batches_done // 2
            weights, virtual = pruner.weights(batch).tolist(), pruner.clock.virtual(step)
            seen.append((batch.tolist(), weights, virtual, pruner.lr_scale))
            losses = torch.tensor([loss_of(i, epoch) for i in batch.tolist()])
            pruner.observe(batch, dict.fromkeys(pruner.policy.signals, losses))
        pruner.end_epoch()
    return seen


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
        ends.append((ends[-1] if ends else 0) + whole.shape.batches(record.samples))
    # Before the first batch, in an epoch on all data, at its end, in a chosen one, in one that
    # holds the plan, and so on.
    stops = {0, 1, ends[0], ends[0] + 2, ends[1], ends[1] + 1, ends[2], ends[-1] - 1, ends[-1]}
    for stop in sorted(stops):
        broken = make_pruner(policy, budget)
        before = train(broken, stop_after=stop)
        broken.save(tmp_path)
        resumed = make_pruner(policy, budget)
        start = resumed.load(tmp_path)
        assert before + train(resumed, start) == everything
        assert outcome(resumed) == expected


# ---- several ranks -------------------------------------------------------------------------------


@every_case
@pytest.mark.parametrize("ranks", [2, 3])
def test_several_ranks_train_what_one_trains(case, ranks):
    policy = policy_of(case, **BASE, **(GUARDS if has_scores(policy_of(case)) else {}))

    def whole_run():
        pruner = make_pruner(policy, {"num_epochs": 5}, 6 // distributed.world()[1])
        return train(pruner), outcome(pruner)

    (alone, expected), *_ = on_ranks(1, whole_run)
    shares, outcomes = zip(*on_ranks(ranks, whole_run), strict=True)
    assert all(result == outcomes[0] for result in outcomes)
    assert outcomes[0]["table"] == expected["table"]
    assert outcomes[0]["selection"] == expected["selection"]
    for one, *parts in zip(alone, *shares, strict=True):  # a global batch
        samples = []
        for indices, weights, *_ in parts:
            samples += zip(indices, weights, strict=True)
        assert [pair for pair in samples if pair[0] >= 0] == list(zip(*one[:2], strict=True))
        assert {weight for i, weight in samples if i < 0} <= {0.0}
        assert all(part[2:] == one[2:] for part in parts)
        assert len(samples) == 6


def test_ranks_out_of_step_are_found_out():
    def rank_1_is_missing():
        if distributed.world()[0] == 0:
            distributed.sum_over_ranks(torch.ones(()))

    with pytest.raises(AssertionError, match=r"'reduce'.*'end'"):
        on_ranks(2, rank_1_is_missing)


# ---- beyond 2^24, where float32 cannot tell two numbers apart ------------------------------------


def yielded_by(sampler: PruningSampler, whole: bool) -> np.ndarray:
    """What a sampler yields: int64. If not the whole, its beginning is compared with its order."""
    order = sampler._order.numpy().astype(np.int64)
    some = len(order) if whole else min(len(order), 3 << 16)  # three blocks
    begin = np.fromiter(islice(sampler, some), np.int64, some)
    assert (begin == order[:some]).all()
    assert len(sampler) == len(order)
    return order


@pytest.mark.large
@every_case
def test_indices_above_2_to_the_24_are_exact(case):
    n = 2**24 + 3
    hard = [2**24 - 1, 2**24, 2**24 + 1, 2**24 + 2]
    settings = {"keep_ratio": 4 / n, "epsilon": 0.0, "max_rescale": n}
    given = {
        name: value
        for name, value in settings.items()
        if getattr(policy_of(case), name, None) is not None
    }
    policy = policy_of(case, **given)
    pruner = DynamicPruner(policy, RunShape(n, batch_size=4, num_epochs=2))
    table = pruner.table
    small = observed_table(policy, [0.0] * 5)  # of the first sample and those four
    for name, column in small.state_dict().items():
        table[name].fill_(column[0].item())  # all had a loss of 0
    losses = torch.tensor([1.0, 2.0, 3.0, 4.0])
    for rows, index in ((table, [hard[2], hard[0], hard[3], hard[1]]), (small, [3, 1, 4, 2])):
        signals = dict.fromkeys(policy.signals, losses)
        rows.observe(torch.tensor(index), signals, memory=policy.memory, epoch=0)
    for column in policy.memory.columns:
        here, there = table[column.name], small[column.name]
        assert same(here[hard], there[1:])
        others = here[: hard[0]]
        as_before = others.isnan() if there[0].isnan() else others == there[0]
        assert int(torch.count_nonzero(as_before)) == hard[0]

    table["times_kept"].fill_(1)
    table["times_kept"][hard] = 0  # those are due
    pruner.adopt(1, 1)  # the first epoch is over
    pruner.begin_epoch(1)
    samples = yielded_by(pruner.sampler, whole=case == "full")
    kept = torch.zeros(n, dtype=torch.bool)
    kept[torch.from_numpy(samples)] = True
    assert int(torch.count_nonzero(kept)) == len(samples) == (size(policy, n) or len(samples))
    informed = has_scores(policy) and policy.score(small)[1:].min() > policy.score(small)[0]
    if case == "rs2" or (informed and size(policy, n) == 4 and case not in DRAWN_FROM_ALL):
        assert sorted(samples) == hard
    due = torch.ones(n, dtype=torch.int32)
    due[hard] = 0
    assert torch.equal(table["times_kept"] - due, kept.int())
    del due

    batch = torch.from_numpy(samples[-4:])
    assert (pruner.weights(batch) > 0).all()
    pruner.observe(batch, dict.fromkeys(policy.signals, losses))
    pruner.end_epoch()
    observed = torch.nonzero(table["last_observed"]).squeeze(1)
    assert sorted(observed.tolist()) == sorted(batch.tolist())
