"""The promises of the core over whole runs with random settings, on one rank or several.

The model is a fake one. Ranks are threads here; test_distributed.py has real processes.
"""

import json
import math
import random
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import chain, pairwise, product
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from accelerate.data_loader import BatchSamplerShard
from cases import (
    CASES,
    every_case,
    has_scores,
    loss_of,
    outcome,
    policy_of,
    score_case,
)
from cases import size as kept
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from threads import on_ranks
from torch.utils.data import BatchSampler

from hf_dynprune.policies import PruningPolicy, RandomPruning
from hf_dynprune.pruner import DynamicPruner, choice_seed
from hf_dynprune.schedule import Clock, RunShape, epoch_costs, planned_epochs

# ---- runs ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """The settings of a run, the same on each rank."""

    policy: PruningPolicy
    shape: RunShape
    seed: int

    @property
    def n(self) -> int:
        return self.shape.samples

    @property
    def ranks(self) -> int:
        return self.shape.ranks

    @property
    def global_batch(self) -> int:
        return self.shape.global_batch

    def on(self, ranks: int) -> "Run":
        """The same run, with the same global batch, on another number of ranks."""
        batch = self.global_batch // ranks
        return replace(self, shape=replace(self.shape, ranks=ranks, batch_size=batch))

    def pruner(self) -> DynamicPruner:
        pruner = DynamicPruner(self.policy, self.shape, seed=self.seed, data_seed=self.seed + 1)
        assert pruner.shape == self.shape
        return pruner


class Batch(NamedTuple):
    """What a rank trained, and where it was then."""

    epoch: int
    step: int  # of the run
    index: list[int]
    weights: list[float]
    virtual: float
    lr_scale: float
    total_steps: int  # as the pruner saw it
    samples: int  # in the batches of all ranks

    @property
    def place(self) -> tuple:
        return self.epoch, self.step, self.virtual, self.lr_scale, self.total_steps, self.samples


def batches_of(pruner: DynamicPruner) -> Any:
    """The batches of this rank, as accelerate deals them out; -1 is padding."""
    shape = pruner.shape
    batches = BatchSampler(pruner.sampler, shape.batch_size, shape.drop_last)
    if shape.ranks > 1:
        batches = BatchSamplerShard(batches, shape.ranks, pruner.rank)
    return ([max(i, -1) for i in batch] for batch in batches)


class Seen(list[Batch]):
    """What a rank trained, and what it scored before choices: (epoch, samples)."""

    def __init__(self):
        super().__init__()
        self.scored: list[tuple[int, list[int]]] = []


def signals_of(names, index, epoch, losses=loss_of) -> dict[str, torch.Tensor]:
    """Signals of a fake model. What it says of padding must not matter."""
    loss = torch.tensor([losses(i, epoch) if i >= 0 else 1e9 for i in index])
    return {name: torch.tensor(index) % 2 if name == "label" else loss for name in names}


def train(pruner: DynamicPruner, start=(0, 0), stop_after=None) -> Seen:
    """Train from (epoch, batch) on, until all steps are done or for `stop_after` batches."""
    seen = Seen()

    def score(samples):
        seen.scored.append((epoch, samples.tolist()))
        return signals_of(pruner.scored_signals, samples.tolist(), epoch)

    for epoch in range(start[0], pruner.num_epochs):
        done = pruner.clock.start + -(-pruner.batches_done // pruner.shape.accumulation)
        if (epoch, 0) >= start and done == pruner.shape.max_steps:
            break
        if len(seen) == stop_after:
            return seen
        pruner.begin_epoch(epoch, scorer=score)
        total = pruner.clock.total_steps()
        for number, index in enumerate(batches_of(pruner)):
            step = pruner.clock.start + number // pruner.shape.accumulation
            if (epoch, number) < start:
                continue
            if step == total:
                break
            if len(seen) == stop_after:
                return seen
            batch = torch.tensor(index)
            weights, samples = pruner.weights(batch).tolist(), pruner.sampler.samples_in(number, 1)
            place = epoch, step, index, weights, pruner.clock.virtual(step), pruner.lr_scale
            seen.append(Batch(*place, total, samples))
            pruner.observe(batch, signals_of(pruner.signals, index, epoch))
    pruner.end_epoch()
    return seen


def whole(run: Run) -> list[tuple[DynamicPruner, Seen]]:
    """The pruner of each rank, and what the rank trained."""

    def work():
        pruner = run.pruner()
        return pruner, train(pruner)

    return on_ranks(run.ranks, work)


def global_batches(run: Run, shares: list[list[Batch]]) -> list[tuple[int, list[int]]]:
    """(epoch, sample indices) of each batch of all ranks together."""
    together = []
    for parts in zip(*shares, strict=True):
        samples = chain.from_iterable(part.index for part in parts)
        together.append((parts[0].epoch, list(samples)))
    return together


def without_padding(batches: list[tuple[int, list[int]]]) -> list[tuple[int, list[int]]]:
    return [(epoch, [i for i in index if i >= 0]) for epoch, index in batches]


class Expected(NamedTuple):
    """An epoch, by its definition."""

    full: bool
    size: int
    length: int  # optimizer steps of the whole of it
    steps: int  # made: the last epoch may be cut


def expected_epochs(run: Run) -> list[Expected]:
    """The epochs of a policy whose sizes are known, computed in exact fractions."""
    shape, policy = run.shape, run.policy
    in_steps = shape.max_steps is not None
    last, total = Fraction(str(policy.last)), Fraction(str(shape.max_steps or shape.num_epochs))
    epochs: list[Expected] = []
    spent = 0
    while (spent if in_steps else len(epochs)) < total:
        epoch = len(epochs)
        progress = (spent if in_steps else epoch) / total
        full = epoch < policy.first or (last > 0 and progress >= 1 - last)
        size = run.n if full else kept(policy, run.n)
        batches = -(-size // shape.global_batch)
        if shape.drop_last:
            batches = size // shape.global_batch
        length = -(-batches // shape.accumulation)
        if in_steps:
            steps = min(length, total - spent)
        else:
            steps = math.ceil(length * min(1, total - epoch))
        epochs.append(Expected(full, size, length, int(steps)))
        spent += epochs[-1].steps
    return epochs


@st.composite
def policies(draw: Any, case: str, scoring: bool = True) -> PruningPolicy:
    """The policy of the table with random fields of the base class.

    Args:
        scoring: Whether these fields may be among them: forward passes before choices.
    """
    plain = policy_of(case)
    fields: dict[str, Any] = {
        "period": draw(st.integers(1, 3)),
        "first": draw(st.sampled_from([0, 0, 1, 2])),
        "last": draw(st.sampled_from([0.0, 0.0, 0.0, 0.2, 0.5, 1.0])),
    }
    if getattr(plain, "keep_ratio", None) is not None:
        least = 1 / getattr(plain, "max_rescale", 100)  # of a policy that limits its weights
        fields["keep_ratio"] = draw(st.integers(math.ceil(100 * least), 100)) / 100
    if has_scores(plain):
        fields["max_age"] = draw(st.sampled_from([None, 1, 2]))
        # Some have scores only if this guard is set.
        shares = [0.1, 0.6] if plain.exclude_hardest else [0.0, 0.1, 0.6]
        fields["exclude_hardest"] = draw(st.sampled_from(shares))
        if fields["exclude_hardest"]:
            fields["exclude_ramp"] = draw(st.sampled_from([None, (0.0, 0.5), (0.3, 1.0)]))
    if plain.signals and scoring:
        fields["scoring"] = draw(st.sampled_from(["trained", "trained", "dropped", "all"]))
    return policy_of(case, **fields)


@st.composite
def runs(draw: Any, case: str, scoring: bool = True) -> Run:
    policy = draw(policies(case, scoring))
    n = draw(st.integers(1, 9) | st.integers(10, 200))
    size = kept(policy, n)
    if policy.signals and size is not None and size >= 4:  # two classes
        policy = replace(policy, min_per_class=draw(st.integers(0, 2)))
    drop_last = size is not None and draw(st.booleans())
    # An epoch that would drop all its samples is an error; that is tested below.
    whole = size if drop_last else 64
    ranks = draw(st.integers(1, min(4, whole)))
    epochs = draw(
        st.none() | st.sampled_from([2, 3, 5, 1]) | st.integers(30, 400).map(lambda x: x / 100)
    )
    shape = RunShape(
        n,
        draw(st.integers(1, min(16, whole // ranks))),
        num_epochs=epochs,
        max_steps=draw(st.integers(1, 40)) if epochs is None else None,
        accumulation=draw(st.integers(1, 4)),
        drop_last=drop_last,
        ranks=ranks,
    )
    return Run(policy, shape, draw(st.integers(0, 2**31)))


@pytest.fixture
def tried(reliability):
    """Call it once for each example."""
    examples = []
    yield lambda: examples.append(None)
    reliability("properties", len(examples))


# A few examples for each policy: many for one test are mostly variations of each other. The fixture
# is shared by all examples of a test.
examples = settings(max_examples=10, suppress_health_check=[HealthCheck.function_scoped_fixture])
known_case = pytest.mark.parametrize(
    "case", [case for case in CASES if kept(policy_of(case), 1) is not None]
)


# ---- sizes, order, ranks -------------------------------------------------------------------------


@every_case
@examples
@given(data=st.data())
def test_an_epoch_trains_each_kept_sample_once_in_the_stock_order(tried, case, data):
    tried()
    run = data.draw(runs(case))
    pruners, shares = zip(*whole(run), strict=True)
    batches = global_batches(run, shares)  # an error unless each rank has as many
    places = [[batch.place for batch in share] for share in shares]
    assert all(of_rank == places[0] for of_rank in places)
    real_samples = [len(index) for _, index in without_padding(batches)]
    assert real_samples == [batch.samples for batch in shares[0]]
    if run.ranks > 1:
        assert {len(batch.index) for share in shares for batch in share} == {run.shape.batch_size}
    for record in pruners[0].report.epochs:
        mine = [index for epoch, index in batches if epoch == record.epoch]
        yielded = list(chain(*mine))
        real, padding = [i for i in yielded if i >= 0], [i for i in yielded if i < 0]
        assert yielded == real + padding  # all padding is at the end
        assert len(set(real)) == len(real)
        stock = torch.Generator().manual_seed(run.seed + 1 + record.epoch)
        order = torch.randperm(run.n, generator=stock).tolist()
        assert real == [i for i in order if i in set(real)]
        tail = record.samples % run.global_batch
        length = run.shape.steps(record.samples)
        if record.optimizer_steps < length:  # the run ended inside the epoch
            assert len(mine) == record.optimizer_steps * run.shape.accumulation
            assert record == pruners[0].report.epochs[-1]
        elif run.shape.drop_last:
            assert len(real) == record.samples - tail
        else:
            assert len(real) == record.samples
            assert len(padding) == (-tail % run.global_batch if run.ranks > 1 else 0)
        if run.shape.drop_last or run.ranks == 1:
            assert not padding
    for batch in chain(*shares):
        assert [weight > 0 for weight in batch.weights] == [i >= 0 for i in batch.index]


@known_case
@examples
@given(data=st.data())
def test_sizes_and_steps_are_those_of_the_definition(tried, case, data):
    tried()
    run = data.draw(runs(case))
    expected = expected_epochs(run)
    total = sum(epoch.steps for epoch in expected)

    def work():
        pruner = run.pruner()
        return pruner, pruner.clock.total_steps(), train(pruner)

    for pruner, foretold, seen in on_ranks(run.ranks, work):
        records = pruner.report.epochs
        found = [
            (r.full_data, r.samples, run.shape.steps(r.samples), r.optimizer_steps) for r in records
        ]
        assert found == expected
        assert len({batch.step for batch in seen}) == seen[-1].step + 1 == total
        assert {foretold, *(batch.total_steps for batch in seen)} == {total}


@known_case
@examples
@given(data=st.data())
def test_epochs_and_their_costs_are_known_before_the_run(tried, case, data):
    """The schedule asks the policy alone. A pruner then trains and scores what it said."""
    tried()
    run = data.draw(runs(case))
    planned = list(planned_epochs(run.policy, run.shape))
    costs = list(epoch_costs(run.policy, run.shape))
    clock = Clock.of(run.policy, run.shape)
    for pruner, seen in whole(run):
        records = pruner.report.epochs
        assert pruner.num_epochs == clock.num_epochs == len(planned) == len(costs)
        assert [epoch.size for epoch in planned[: len(records)]] == [r.samples for r in records]
        full = [epoch.full_data for epoch in planned[: len(records)]]
        assert full == [record.full_data for record in records]
        chosen = sum(epoch.chooses for epoch in planned[: len(records)])
        assert pruner.report.selection["choices"] == chosen
        assert clock.total_steps() == sum(cost.steps for cost in costs) == seen[-1].step + 1
        for record, cost in zip(records, costs, strict=True):
            assert (record.optimizer_steps, record.scoring_passes) == (cost.steps, cost.scored)
            batches = [batch for batch in seen if batch.epoch == record.epoch]
            trained = sum(batch.samples for batch in batches)
            if cost.steps == run.shape.steps(record.samples) and not run.shape.drop_last:
                assert trained == cost.samples
            else:  # the samples of a step are spread evenly over the epoch's steps
                step = run.shape.accumulation * run.global_batch
                assert abs(trained - cost.samples) < step


@known_case
@examples
@given(data=st.data(), n=st.integers(1, 60), batch=st.integers(1, 70), epochs=st.integers(1, 4))
def test_dropping_a_whole_epoch_is_an_error_at_construction(tried, case, data, n, batch, epochs):
    tried()
    shape = RunShape(n, batch, num_epochs=epochs, drop_last=True)
    run = Run(data.draw(policies(case)), shape, 0)
    if all(epoch.length for epoch in expected_epochs(run)):
        assert train(run.pruner())
    else:
        for ask in (run.pruner, lambda: list(epoch_costs(run.policy, shape))):
            with pytest.raises(ValueError, match=rf"of {n} samples.*\b{batch}\b"):
                ask()


@every_case
@examples
@given(data=st.data())
def test_several_ranks_train_what_one_trains(tried, case, data):
    tried()
    run = data.draw(runs(case))
    pruners, shares = zip(*whole(run), strict=True)
    ((alone, seen),) = whole(run.on(1))
    together = without_padding(global_batches(run, shares))
    assert together == [(batch.epoch, batch.index) for batch in seen]
    expected = outcome(alone)
    for pruner, share in zip(pruners, shares, strict=True):
        theirs = outcome(pruner)
        for part in ("table", "selection", "num_epochs", "nonfinite_samples"):
            assert theirs[part] == expected[part]
        assert theirs == {**outcome(pruners[0]), "environment": theirs["environment"]}
        assert [batch.place for batch in share] == [batch.place for batch in seen]


# ---- clock and report ----------------------------------------------------------------------------


@every_case
@examples
@given(data=st.data())
def test_the_clock_runs_from_0_to_the_end_and_never_back(tried, case, data):
    tried()
    run = data.draw(runs(case))
    for pruner, seen in whole(run):
        times = [batch.virtual for batch in seen]
        steps = seen[-1].step + 1
        end = pruner.clock.virtual(steps)
        assert times[0] == 0
        # A step takes time, an accumulated batch takes none.
        for (before, after), (one, two) in zip(pairwise(seen), pairwise(times), strict=True):
            assert (one < two) if after.step > before.step else (one == two)
        assert times[-1] < end
        assert seen[-1].total_steps == steps  # exact when the last epoch began
        if run.shape.max_steps is not None:
            assert times == [batch.step for batch in seen]
            assert end == pruner.clock.total == run.shape.max_steps == steps
        elif run.shape.num_epochs == int(run.shape.num_epochs):
            assert end == pytest.approx(pruner.clock.total, rel=1e-12)
        else:
            assert pruner.clock.total - 1 < end <= pruner.clock.total
        lengths = {run.shape.steps(record.samples) for record in pruner.report.epochs}
        if len(lengths) == 1 and kept(run.policy, run.n):
            assert times == [batch.step for batch in seen]
            assert all(type(time) is int for time in times)  # the schedule is exact
            assert pruner.clock.total == steps


@every_case
@examples
@given(data=st.data())
def test_the_report_counts_what_was_trained(tried, case, data):
    tried()
    run = data.draw(runs(case))
    pruners, shares = zip(*whole(run), strict=True)
    batches = global_batches(run, shares)
    steps = {(batch.epoch, batch.step) for batch in shares[0]}
    for pruner in pruners:
        report = pruner.report
        held = None  # the number of samples that the last choice kept
        last_observed = torch.full((run.n,), -1, dtype=torch.int32)
        for record in report.epochs:
            mine = [index for epoch, index in batches if epoch == record.epoch]
            yielded = list(chain(*mine))
            assert record.forward_passes == record.backward_passes == len(yielded)
            made = [step for epoch, step in steps if epoch == record.epoch]
            assert record.optimizer_steps == len(made)
            scored = []
            for epoch, index in chain(*(share.scored for share in shares)):
                scored += index if epoch == record.epoch else []
            assert len(set(scored)) == len(scored) == record.scoring_passes
            choice = held is None or (record.epoch - run.policy.first) % run.policy.period == 0
            if record.full_data or not choice or run.policy.scoring == "trained":
                assert not scored
            else:
                dropped = run.n - (held or run.n)
                assert len(scored) == {"all": run.n, "dropped": dropped}[run.policy.scoring]
            assert record.passes == pytest.approx(len(yielded) + len(scored) / 3)
            if not record.full_data:
                held = record.samples
            trained = [i for i in yielded if i >= 0] if run.policy.scoring != "all" else []
            last_observed[scored + trained] = record.epoch
            bad = [i for i in scored + trained if not math.isfinite(loss_of(i, record.epoch))]
            assert record.nonfinite == (len(bad) if run.policy.signals else 0)
            noted = set(report.nonfinite_samples)
            assert len(noted) == 100 or not run.policy.signals or noted.issuperset(bad)
        assert torch.equal(pruner.table["last_observed"], last_observed)
        assert report.totals["optimizer_steps"] == len(steps)
        last = report.epochs[-1]
        epochs = last.epoch + last.optimizer_steps / run.shape.steps(last.samples)
        assert report.num_epochs == pytest.approx(epochs)
        passes = sum(len(index) for _, index in batches) + report.totals["scoring_passes"] / 3
        assert report.cost_ratio == pytest.approx(passes / (run.n * epochs))
        assert sum(report.selection["histogram"]) == run.n


# ---- randomness ----------------------------------------------------------------------------------


def global_states():
    return (
        torch.random.get_rng_state().tolist(),
        repr(np.random.get_state(legacy=False)),
        random.getstate(),
    )


@every_case
@examples
@given(data=st.data(), other=st.integers(0, 99))
def test_a_run_follows_from_its_settings_and_leaves_the_global_random_states_alone(
    tried, case, data, other
):
    tried()
    run = data.draw(runs(case))
    before = global_states()
    one = whole(run)
    assert global_states() == before
    torch.manual_seed(other)  # nor is it read
    np.random.seed(other)
    random.seed(other)
    for (pruner, seen), (again, seen_again) in zip(one, whole(run), strict=True):
        assert seen == seen_again
        assert outcome(pruner) == outcome(again)


def test_no_two_choices_share_a_seed():
    seeds = {
        choice_seed(*choice) for choice in product(range(400), range(400), ("plan", "scoring"))
    }
    assert len(seeds) == 400 * 400 * 2
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert sum(seed >= 2**62 for seed in seeds) / len(seeds) == pytest.approx(0.5, abs=0.01)


def test_no_two_runs_share_a_plan_and_no_two_epochs():
    plans = set()
    for seed in range(40):
        pruner = DynamicPruner(RandomPruning(0.5), RunShape(100, num_epochs=40), seed=seed)
        for epoch in range(40):
            pruner.begin_epoch(epoch)
            plans.add(frozenset(pruner.sampler))
    assert len(plans) == 40 * 40


# ---- scores --------------------------------------------------------------------------------------


def bits(column: torch.Tensor) -> torch.Tensor:
    """(N, bytes): NaN equals NaN, and 0 is not -0."""
    return column.clone().view(torch.uint8).reshape(len(column), -1)


@score_case
@examples
@given(
    data=st.data(),
    epoch=st.integers(0, 3),
    value=st.sampled_from([0.0, 0.3, 7.0, 1e30, math.nan, math.inf]),
)
def test_a_score_changes_by_its_own_observations_alone(tried, case, data, epoch, value):
    tried()
    run = data.draw(runs(case, scoring=False))
    alone = run.on(1)
    run = replace(alone, shape=replace(alone.shape, num_epochs=4, max_steps=None))
    start = run.pruner()
    train(start, stop_after=len([batch for batch in train(run.pruner()) if batch.epoch < epoch]))
    state = start.state_dict()

    def table_after(losses):
        """The columns after that one epoch, and the samples that it trained."""
        pruner = run.pruner()
        assert pruner.load_state_dict(state) == (epoch, 0)
        pruner.begin_epoch(epoch)
        trained = []
        for index in batches_of(pruner):
            pruner.observe(torch.tensor(index), signals_of(pruner.signals, index, epoch, losses))
            trained += index
        pruner.end_epoch()
        return {name: bits(column) for name, column in pruner.table.state_dict().items()}, trained

    plain, trained = table_after(loss_of)
    odd = data.draw(st.sampled_from(trained) | st.integers(0, run.n - 1))
    perturbed, same = table_after(lambda i, epoch: value if i == odd else loss_of(i, epoch))
    assert trained == same
    others, unseen = torch.arange(run.n) != odd, torch.ones(run.n, dtype=torch.bool)
    unseen[trained] = False
    before = {name: bits(column) for name, column in start.table.state_dict().items()}
    for name in plain:
        assert torch.equal(plain[name][others], perturbed[name][others])
        if name != "times_kept":  # the choice counts
            assert torch.equal(plain[name][unseen], before[name][unseen])
            assert torch.equal(perturbed[name][unseen], before[name][unseen])


# ---- resume --------------------------------------------------------------------------------------


@every_case
@examples
@given(data=st.data(), place=st.floats(0, 1))
def test_a_run_resumed_anywhere_is_the_uninterrupted_one(tried, case, data, place):
    """Also with the same global batch on another number of ranks."""
    tried()
    run = data.draw(runs(case))
    pruners, shares = zip(*whole(run), strict=True)
    stop = round(place * len(shares[0]))

    def interrupted():
        pruner = run.pruner()
        return train(pruner, stop_after=stop), pruner.state_dict()

    before, states = zip(*on_ranks(run.ranks, interrupted), strict=True)
    state = {
        "tensors": states[0]["tensors"],
        "metadata": json.loads(json.dumps(states[0]["metadata"])),
    }
    ranks = data.draw(st.sampled_from([r for r in (1, 2, 3, 4) if run.global_batch % r == 0]))
    other = run.on(ranks)

    def resumed():
        pruner = other.pruner()
        return train(pruner, pruner.load_state_dict(state)), pruner

    after, again = zip(*on_ranks(ranks, resumed), strict=True)
    if ranks == run.ranks:
        assert [a + b for a, b in zip(before, after, strict=True)] == list(shares)
        for one, two in zip(pruners, again, strict=True):
            assert outcome(one) == outcome(two)
    parts = global_batches(run, before) + global_batches(other, after)
    assert without_padding(parts) == without_padding(global_batches(run, shares))
    assert all(outcome(pruner)["table"] == outcome(pruners[0])["table"] for pruner in again)
