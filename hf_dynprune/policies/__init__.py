"""The pruning rules, by their published names, and the contract they keep.

A policy is a small frozen dataclass of pure functions. It says which `signals` it wants of each trained sample and which
`columns` it keeps of them, how an observation changes the columns (`observe`), how a sample scores (`score`) and which
samples the next epochs train on (`plan`). Everything else (when to choose, full-data epochs, samples never seen, guards,
several ranks, checkpoints) is done once, for all policies, by [`DynamicPruner`].

`base` has the contract, `bandits` the rules of the central paper and the baselines, `rivals` those that later papers
compare with, `static` the one that chooses once, by scores made before the run. To add a rule: one class there, one line in
`POLICIES`, one line in the conformance table of the tests, one row in the README.
"""

import difflib
from dataclasses import fields
from typing import Any

from .bandits import UCB, EpsilonGreedy, FullData, RandomPruning
from .base import (
    POLICIES,
    EpochPlan,
    PruningPolicy,
    check_count,
    check_number,
    indices_of,
    keep_count,
    mask_of,
    permutation,
    top_k,
    with_class_floor,
)
from .rivals import IES, KAKURENBO, InfoBatch, LossProportional, OrderDP, SeTa
from .static import StaticPruning

__all__ = [
    "IES",
    "KAKURENBO",
    "POLICIES",
    "UCB",
    "EpochPlan",
    "EpsilonGreedy",
    "FullData",
    "InfoBatch",
    "LossProportional",
    "OrderDP",
    "PruningPolicy",
    "RandomPruning",
    "SeTa",
    "StaticPruning",
    "check_count",
    "check_number",
    "indices_of",
    "keep_count",
    "make_policy",
    "mask_of",
    "permutation",
    "top_k",
    "with_class_floor",
]

POLICIES.update(
    {
        "full": FullData,
        "random": RandomPruning,
        "epsilon-greedy": EpsilonGreedy,
        "ucb": UCB,
        "loss-proportional": LossProportional,
        "infobatch": InfoBatch,
        "seta": SeTa,
        "orderdp": OrderDP,
        "kakurenbo": KAKURENBO,
        "ies": IES,
        "static": StaticPruning,
    }
)


def make_policy(name: str, **settings: Any) -> PruningPolicy:
    """The policy of that name in `POLICIES` (case, `-` and `_` do not matter) with these fields.

    Raises:
        ValueError: for an unknown name or field, naming the near ones, and for values out of range.
    """
    if not isinstance(name, str):
        raise TypeError(
            f"{name!r} is no name of a policy; the names are {', '.join(map(repr, POLICIES))}."
        )
    key = name.lower().replace("_", "-")
    if key not in POLICIES:
        near = difflib.get_close_matches(key, POLICIES, n=2, cutoff=0.4)
        hint = f"did you mean {' or '.join(map(repr, near))}? " if near else ""
        raise ValueError(
            f"There is no policy {name!r}: {hint}The names are {', '.join(map(repr, POLICIES))}."
        )
    cls = POLICIES[key]
    known = [f.name for f in fields(cls)]
    for setting in settings:
        if setting not in known:
            near = difflib.get_close_matches(setting, known, n=2, cutoff=0.4)
            hint = f"did you mean {' or '.join(map(repr, near))}? " if near else ""
            raise ValueError(
                f"Policy {key!r} has no field {setting!r}: {hint}Its fields are {', '.join(known)}."
            )
    return cls(**settings)
