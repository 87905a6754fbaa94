"""What holds for every policy. A new one is one line in this table."""

import copy
import json
import math
import threading
from concurrent.futures import ThreadPoolExecutor
from unittest import mock

import numpy as np
import pytest
import torch

from hf_dynprune import distributed
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
    "ucb with all options": (
        "ucb",
        {"keep_ratio": 0.4, "bonus": "std", "c": 2.0, "decay": 0.3, "epsilon": 0.25},
    ),
    "loss-proportional": ("loss-proportional", {"keep_ratio": 0.4}),
    "orderdp": ("orderdp", {"keep_ratio": 0.4}),
    "infobatch": ("infobatch", {"prune_ratio": 0.4}),
    "infobatch, exact": ("infobatch", {"keep_ratio": 0.4}),
    "seta": ("seta", {"groups": 3, "window": 0.7, "prune_ratio": 0.1, "annealing": 0.25}),
    "kakurenbo": ("kakurenbo", {"scoring": "trained"}),
    "ies": ("ies", {"threshold": 0.1, "scoring": "trained"}),
    "static, random": ("static", {"keep": "random", "keep_ratio": 0.4}),
}
# Settings with which a policy keeps everything; of the others keep_ratio=1.
KEEP_ALL = {
    "full": {},
    "infobatch": {"prune_ratio": 0.0},
    "seta": {"prune_ratio": 0.0, "window": 1.0},
    "kakurenbo": {"max_hidden": 0.0},
    "ies": {"threshold": 0.0},
}
# These draw from all samples alike, or from a part of them that was drawn before: those never observed are not all first.
DRAWN_FROM_ALL = {"infobatch, exact", "orderdp", "seta"}
# What the pruner does around a policy, for those that have scores and for all.
GUARDS = {"max_age": 2, "exclude_hardest": 0.1}
BASE = {"period": 2, "first": 1, "last": 0.2}

NAN = math.nan


def policy_of(case: str, **settings) -> PruningPolicy:
    name, own = CASES[case]
    return make_policy(name, **{**own, **settings})


def size(policy: PruningPolicy, n: int) -> int | None:
    """How many samples of n it keeps; None where that depends on the data."""
    ratio = getattr(policy, "keep_ratio", 1.0 if policy.name == "full" else None)
    return None if ratio is None else max(1, round(ratio * n))


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a.nan_to_num(-1), b.nan_to_num(-1))


def has_scores(policy: PruningPolicy) -> bool:
    return policy.score(SampleTable(1, policy.columns)) is not None


@pytest.fixture(autouse=True)
def _noted(reliability):
    reliability("conformance")


every_case = pytest.mark.parametrize("case", CASES)
score_case = pytest.mark.parametrize(
    "case", [case for case in CASES if has_scores(policy_of(case))]
)


def observed_table(policy: PruningPolicy, losses: list[float], epochs: int = 1) -> SampleTable:
    """A table after each sample was observed, `losses[i]` that of sample i; None: never."""
    table = SampleTable(len(losses), policy.columns)
    index = torch.tensor(
        [i for i, loss in enumerate(losses) if loss is not None], dtype=torch.int64
    )
    values = torch.tensor([loss for loss in losses if loss is not None], dtype=torch.float32)
    for epoch in range(epochs):
        table.observe(
            index, dict.fromkeys(policy.signals, values), update=policy.observe, epoch=epoch
        )
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
    assert all(same(column, before[name]) for name, column in table.state_dict().items())


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
    assert (
        list(pruner.sampler)
        == torch.randperm(11, generator=torch.Generator().manual_seed(5)).tolist()
    )
    assert pruner.weights(torch.arange(11)).tolist() == [1.0] * 11
    assert pruner.lr_scale == 1.0


@every_case
def test_equal_scores_prefer_nobody(case):
    policy, counts = policy_of(case), [0] * 20
    table = observed_table(policy, [0.7] * 20, epochs=2)
    for seed in range(200):
        for i in plan_of(policy, table, seed).indices.tolist():
            counts[i] += 1
    expected = sum(counts) / 20  # where all are kept there is no deviation
    assert all(
        abs(count - expected) <= 4.5 * math.sqrt(expected * (1 - expected / 200))
        for count in counts
    )


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
        assert same(table[column.name], before[column.name])


@score_case
def test_never_observed_come_first_and_nan_last(case):
    policy = policy_of(case, **({"epsilon": 0.0} if hasattr(policy_of(case), "epsilon") else {}))
    table = observed_table(policy, [1e9, None, NAN, 5.0, None, 1.0, None, NAN, 2.0, 3.0])
    samples = set(begun(policy, table).sampler)
    assert samples >= {1, 4, 6} or case in DRAWN_FROM_ALL
    assert not samples & {2, 7}
    if size(policy, 10) == 4 and case not in DRAWN_FROM_ALL:
        assert samples == {0, 1, 4, 6}
    table = observed_table(policy, [NAN, 1.0, NAN, 5.0, 4.0, 1.0, NAN, NAN, NAN, 3.0])
    samples = set(begun(policy, table).sampler)
    assert samples <= {1, 3, 4, 5, 9} or samples > {1, 3, 4, 5, 9}
    if case in ("epsilon-greedy", "ucb", "ucb with all options"):
        assert samples > {3, 4, 9}
        assert len(samples & {1, 5}) == 1


@score_case
def test_observe_of_the_policy_takes_any_number_of_rows(case):
    policy = policy_of(case)
    for rows in (0, 1, 3):
        columns = {c.name: torch.full((rows,), c.initial, dtype=c.dtype) for c in policy.columns}
        for _ in policy.columns:  # a history is full after as many observations
            changed = policy.observe(columns, dict.fromkeys(policy.signals, torch.ones(rows)))
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
    assert (
        policy.to_dict().items() >= {**CASES[case][1], **settings, "name": CASES[case][0]}.items()
    )


@every_case
def test_signals_and_columns_are_declared(case):
    policy = policy_of(case)
    names = [column.name for column in policy.columns]
    assert len(names) == len(set(names))
    assert isinstance(policy.signals, tuple)
    assert bool(names) == bool(policy.signals)
    for column in policy.columns:
        assert column.dtype.is_floating_point or not math.isnan(column.initial)


# ---- a run that was interrupted goes on as if it had not been ------------------------------------

N, BATCH = 23, 3


def loss_of(i: int, epoch: int) -> float:
    """Of a fake model; one of 37 is not a number."""
    mixed = (i * 7919 + epoch * 104729 + i * epoch * 31) % 37
    return NAN if mixed == 5 else mixed / 8


def make_pruner(policy: PruningPolicy, budget: dict, batch: int = BATCH) -> DynamicPruner:
    return DynamicPruner(policy, N, batch_size=batch, accumulation=2, seed=3, data_seed=4, **budget)


def train(pruner: DynamicPruner, start=(0, 0), stop_after=None):
    """Goes through the epochs of a run from (epoch, batch) on; leaves after that many batches. Returns what it trained."""
    seen = []
    for epoch in range(start[0], pruner.num_epochs):
        if stop_after == 0:
            return seen
        pruner.begin_epoch(epoch)
        order = torch.tensor(list(pruner.sampler))
        batches = order.where(order >= 0, -1).split(pruner.batch_size)[
            pruner.rank :: pruner.ranks
        ]  # -1 is padding
        for batch in batches[start[1] if epoch == start[0] else 0 :]:
            if stop_after is not None and len(seen) == stop_after:
                return seen
            step = pruner.clock.start + pruner.batches_done // 2
            seen.append(
                (
                    batch.tolist(),
                    pruner.weights(batch).tolist(),
                    pruner.clock.virtual(step),
                    pruner.lr_scale,
                )
            )
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
    return {
        "table": {n: c.nan_to_num(-1).tolist() for n, c in pruner.table.state_dict().items()},
        **report,
    }


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
    for stop in sorted(
        {0, 1, ends[0], ends[0] + 2, ends[1], ends[1] + 1, ends[2], ends[-1] - 1, ends[-1]}
    ):
        broken = make_pruner(policy, budget)
        before = train(broken, stop_after=stop)
        broken.save(tmp_path)
        resumed = make_pruner(policy, budget)
        start = resumed.load(tmp_path)
        assert before + train(resumed, start) == everything
        assert outcome(resumed) == expected


# ---- several ranks -------------------------------------------------------------------------------


class Threads:
    """Stands for torch.distributed in `hf_dynprune.distributed`: each rank is a thread of this process.

    A rank that makes another call than the others, or none, is an error at once, where processes would hang.
    """

    def __init__(self, ranks):
        self.ranks, self._own = ranks, threading.local()
        self._meeting, self._calls = threading.Barrier(ranks, timeout=60), [None] * ranks

    def is_available(self):
        return True

    is_initialized = is_available

    def get_backend(self):
        return "threads"

    def get_rank(self):
        return self._own.rank

    def get_world_size(self):
        return self.ranks

    def broadcast(self, tensor, source):
        tensor.copy_(
            self._exchange(("broadcast", source, tensor.shape, tensor.dtype), tensor.clone())[
                source
            ]
        )

    def all_gather(self, parts, tensor):
        for part, value in zip(
            parts,
            self._exchange(("gather", tensor.shape, tensor.dtype), tensor.clone()),
            strict=True,
        ):
            part.copy_(value)

    def all_reduce(self, tensor):
        tensor.copy_(sum(self._exchange(("reduce", tensor.shape, tensor.dtype), tensor.clone())))

    def broadcast_object_list(self, objects, source):
        objects[:] = copy.deepcopy(
            self._exchange(("broadcast", source, len(objects)), objects)[source]
        )

    def all_gather_object(self, objects, value):
        objects[:] = copy.deepcopy(self._exchange("gather objects", value))

    def _exchange(self, call, value):
        self._calls[self.get_rank()] = (call, value)
        self._meeting.wait()
        calls = list(self._calls)
        self._meeting.wait()  # all have read it
        assert all(theirs == call for theirs, _ in calls), (
            f"The ranks are out of step: {[theirs for theirs, _ in calls]}"
        )
        return [value for _, value in calls]

    def run(self, function):
        """What `function()` returns on each rank."""

        def work(rank):
            self._own.rank = rank
            try:
                result = function()
                self._exchange("end", None)
                return result
            except BaseException:
                self._meeting.abort()  # nobody waits for this one
                raise

        with mock.patch.object(distributed, "dist", self), ThreadPoolExecutor(self.ranks) as pool:
            futures = [pool.submit(work, rank) for rank in range(self.ranks)]
            errors = [future.exception() for future in futures]
        for error in sorted(
            filter(None, errors), key=lambda error: isinstance(error, threading.BrokenBarrierError)
        ):
            raise error  # the cause before its consequences
        return [future.result() for future in futures]


def on_ranks(ranks, function):
    """What `function()` returns on each of so many ranks."""
    return [function()] if ranks == 1 else Threads(ranks).run(function)


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
        samples = [
            pair for indices, weights, *_ in parts for pair in zip(indices, weights, strict=True)
        ]
        assert [pair for pair in samples if pair[0] >= 0] == list(zip(*one[:2], strict=True))
        assert {weight for i, weight in samples if i < 0} <= {0.0}
        assert all(part[2:] == one[2:] for part in parts)
        assert len(samples) == 6


def test_ranks_out_of_step_are_found_out():
    def rank_1_is_missing():
        if distributed.world()[0] == 0:
            distributed.sum_over_ranks(torch.ones(()))

    with pytest.raises(AssertionError, match=r"out of step: .*'reduce'.*'end'"):
        on_ranks(2, rank_1_is_missing)


# ---- beyond 2^24, where float32 no longer tells two numbers apart --------------------------------


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
    pruner = DynamicPruner(policy, n, batch_size=4, num_epochs=2)
    table = pruner.table
    small = observed_table(policy, [0.0] * 5)  # of the first sample and those four
    for name, column in small.state_dict().items():
        table[name].fill_(column[0].item())  # all had a loss of 0
    losses = torch.tensor([1.0, 2.0, 3.0, 4.0])
    for rows, index in ((table, [hard[2], hard[0], hard[3], hard[1]]), (small, [3, 1, 4, 2])):
        rows.observe(
            torch.tensor(index),
            dict.fromkeys(policy.signals, losses),
            update=policy.observe,
            epoch=0,
        )
    for column in policy.columns:
        here, there = table[column.name], small[column.name]
        assert same(here[hard], there[1:])
        everywhere_else = same(here[: hard[0]], there[0].expand(hard[0]))
        assert everywhere_else  # of a name: pytest would print the tensors

    table["times_kept"].fill_(1)
    table["times_kept"][hard] = 0  # those are due
    pruner.begin_epoch(1)
    samples = np.fromiter(pruner.sampler, np.int64, len(pruner.sampler))
    kept = torch.zeros(n, dtype=torch.bool)
    kept[torch.from_numpy(samples)] = True
    assert int(kept.sum()) == len(samples) == (size(policy, n) or len(samples))
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
    assert sorted(torch.nonzero(table["last_observed"]).squeeze(1).tolist()) == sorted(
        batch.tolist()
    )
