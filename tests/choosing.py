"""What the tests of the policies share: tables, choices and runs made by hand."""

import math
import re

import pytest
import torch

from hf_dynprune.policies import Choice, EpochPlan, PruningPolicy
from hf_dynprune.pruner import DynamicPruner
from hf_dynprune.schedule import RunShape
from hf_dynprune.table import SampleTable

NAN, INF = math.nan, math.inf


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def table_of(policy: PruningPolicy, losses: dict[int, list[float]], n: int) -> SampleTable:
    """A table of n samples after these losses of each, one observation an epoch."""
    table = SampleTable(n, policy.memory.columns)
    for epoch in range(max(map(len, losses.values()), default=0)):
        seen = {i: values[epoch] for i, values in losses.items() if len(values) > epoch}
        index, loss = torch.tensor(list(seen)), torch.tensor(list(seen.values()))
        table.observe(index, {policy.signals[0]: loss}, memory=policy.memory, epoch=epoch)
    return table


def choice_of(
    policy: PruningPolicy,
    table: SampleTable,
    scores: torch.Tensor | None = None,
    *,
    epoch: int = 0,
    progress: float = 0.0,
    seed: int = 0,
) -> Choice:
    """A choice as the pruner makes it; with the scores as they are, no guards."""
    n = len(table)
    planned = policy.planned_size(n, epoch, progress)
    return Choice(
        table=table,
        epoch=epoch,
        progress=progress,
        generator=generator(seed),
        shape=RunShape(n, num_epochs=10),
        size=n if planned is None else planned,
        scores=scores,
    )


def plan_of(policy: PruningPolicy, scores: list[float], **settings) -> EpochPlan:
    """What the policy alone makes of these scores; `settings` are those of `choice_of`."""
    table = SampleTable(len(scores), policy.memory.columns)
    plan = policy.plan(choice_of(policy, table, torch.tensor(scores), **settings))
    plan.check(len(scores))
    return plan


def by_score(policy: PruningPolicy, scores: list[float], seed: int = 0) -> list[int]:
    """The samples that the policy alone keeps by these scores, ascending."""
    return kept(plan_of(policy, scores, seed=seed))


def kept(plan: EpochPlan) -> list[int]:
    return sorted(plan.indices.tolist())


def weights_of(plan: EpochPlan) -> dict[int, float]:
    """The weight of each kept sample."""
    weights = torch.ones(len(plan)) if plan.weights is None else plan.weights
    return dict(sorted(zip(plan.indices.tolist(), weights.tolist(), strict=True)))


def pruner_with(policy: PruningPolicy, table: SampleTable, *, epochs: int = 1, seed: int = 0):
    """A pruner before its first epoch, with that table."""
    pruner = DynamicPruner(policy, RunShape(len(table), num_epochs=epochs), seed=seed)
    pruner.table.load_state_dict(table.state_dict())
    return pruner


def epochs_of(
    policy: PruningPolicy, n: int, epochs: int, seed: int = 0, table: SampleTable | None = None
) -> list[list[int]]:
    """What a run that observes nothing trains on in each epoch, each ascending."""
    if table is None:
        table = SampleTable(n, policy.memory.columns)
    pruner = pruner_with(policy, table, epochs=epochs, seed=seed)
    trained = []
    for epoch in range(epochs):
        pruner.begin_epoch(epoch)
        trained.append(sorted(pruner.sampler))
    return trained


def chosen(policy: PruningPolicy, table: SampleTable) -> list[int]:
    """What a run with that table trains on in its first epoch, ascending."""
    return epochs_of(policy, len(table), 1, table=table)[0]


def chi_square(counts: list[int]) -> float:
    expected = sum(counts) / len(counts)
    return sum((count - expected) ** 2 / expected for count in counts)


def counts_of(draws, n: int) -> list[int]:
    """How many of the draws hold each of n samples."""
    counts = [0] * n
    for draw in draws:
        for i in draw:
            counts[i] += 1
    return counts


def assert_refused(cls, name: str, value, error: type[Exception]) -> None:
    """The class refuses the value, and its message has the field with that value."""
    with pytest.raises(error, match=re.escape(f"{name}={value!r}")):
        cls(**{name: value})
