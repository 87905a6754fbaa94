"""The pruning rules, by their published names, and the contract they keep.

A policy is a small frozen dataclass of pure functions: a `memory` (what is remembered of a sample),
a `score` (for a `ScoredPolicy`) and a `plan` (which samples the next epochs train on). Everything
else (when to choose, full-data epochs, samples never seen, guards, several ranks, checkpoints) is
done once, for all policies, by [`DynamicPruner`].

`base` has the contract and `guards` what the pruner applies around it. `random` has the baselines,
`by_loss` the rules of the central paper and the draws by loss, `effective` the draw whose size
follows the data, `reweighted` InfoBatch, `windows` SeTa, `hidden` KAKURENBO and IES, `static` the
choice made once, `informed` the rules that know the classes or a reference model, `prompts` the
rules for rewards.

To add a rule, write one class with its `name`, list it below, and add one line to the conformance
table of the tests and one row to the docs.
"""

from dataclasses import fields
from typing import Any

from ..checks import did_you_mean
from ..selection import top_k
from .base import Choice, EpochPlan, KeepsShare, PruningPolicy, ScoredPolicy
from .by_loss import UCB, EpsilonGreedy, LossProportional, OrderDP
from .effective import EffectiveShare
from .hidden import IES, KAKURENBO
from .informed import ClassBudget, ReferenceLoss
from .prompts import GRESO, ThompsonPrompts
from .random import FullData, RandomPruning
from .reweighted import InfoBatch
from .static import StaticPruning
from .windows import SeTa

__all__ = [
    "GRESO",
    "IES",
    "KAKURENBO",
    "POLICIES",
    "UCB",
    "Choice",
    "ClassBudget",
    "EffectiveShare",
    "EpochPlan",
    "EpsilonGreedy",
    "FullData",
    "InfoBatch",
    "KeepsShare",
    "LossProportional",
    "OrderDP",
    "PruningPolicy",
    "RandomPruning",
    "ReferenceLoss",
    "ScoredPolicy",
    "SeTa",
    "StaticPruning",
    "ThompsonPrompts",
    "make_policy",
    "top_k",
]

# The rules by their published names.
POLICIES: dict[str, type[PruningPolicy]] = {
    policy.name: policy
    for policy in (
        FullData,
        RandomPruning,
        EpsilonGreedy,
        UCB,
        LossProportional,
        EffectiveShare,
        InfoBatch,
        SeTa,
        OrderDP,
        KAKURENBO,
        IES,
        StaticPruning,
        ClassBudget,
        ReferenceLoss,
        ThompsonPrompts,
        GRESO,
    )
}


def make_policy(name: str, **settings: Any) -> PruningPolicy:
    """The policy of that name in `POLICIES`, with these fields. Case, `-` and `_` do not matter.

    Raises:
        TypeError: If the name is not a str.
        ValueError: If the name or a field is unknown (the message suggests close ones), or a value
            is out of range.
    """
    known = ", ".join(map(repr, POLICIES))
    if not isinstance(name, str):
        raise TypeError(f"{name!r} is not the name of a policy; the names are {known}.")
    key = name.lower().replace("_", "-")
    if key not in POLICIES:
        raise ValueError(
            f"There is no policy {name!r}: {did_you_mean(key, POLICIES)}The names are {known}."
        )
    cls = POLICIES[key]
    names = [entry.name for entry in fields(cls)]
    for setting in settings:
        if setting not in names:
            raise ValueError(
                f"Policy {key!r} has no field {setting!r}: {did_you_mean(setting, names)}"
                f"Its fields are {', '.join(names)}."
            )
    return cls(**settings)
