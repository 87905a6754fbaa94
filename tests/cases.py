"""The table of policies that the conformance tests and the invariants go through.

A new policy is one line in `CASES`.
"""

import math

import pytest
import torch

from hf_dynprune.policies import PruningPolicy, make_policy
from hf_dynprune.pruner import DynamicPruner

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
    "effective share": ("effective-share", {"least": 0.2, "most": 0.9}),
    "orderdp": ("orderdp", {"keep_ratio": 0.4}),
    "infobatch": ("infobatch", {"prune_ratio": 0.4}),
    "infobatch, exact": ("infobatch", {"keep_ratio": 0.4}),
    "seta": ("seta", {"groups": 3, "window": 0.7, "prune_ratio": 0.1, "annealing": 0.25}),
    "kakurenbo": ("kakurenbo", {"scoring": "trained"}),
    "ies": ("ies", {"threshold": 0.1, "scoring": "trained"}),
    "thompson prompts": ("thompson-prompts", {"keep_ratio": 0.4}),
    "greso": ("greso", {}),
    "static, random": ("static", {"keep": "random", "keep_ratio": 0.4}),
    "random, small losses": ("random", {"keep_ratio": 0.4, "exclude_hardest": 0.1}),
    "class budget": ("class-budget", {"keep_ratio": 0.4}),
    "reference loss, control": ("reference-loss", {"scores": None, "keep_ratio": 0.4}),
}
# Settings with which a policy keeps everything. For the others that is keep_ratio=1.
KEEP_ALL = {
    "full": {},
    "infobatch": {"prune_ratio": 0.0},
    "seta": {"prune_ratio": 0.0, "window": 1.0},
    "kakurenbo": {"max_hidden": 0.0},
    "ies": {"threshold": 0.0},
    "greso": {"floor": 1.0},
    "effective share": {"least": 1.0, "most": 1.0},
}
# These draw from all samples alike, or from a part of them that was drawn before, so a sample that
# was never observed does not always come first.
DRAWN_FROM_ALL = {
    "infobatch, exact",
    "orderdp",
    "seta",
    "thompson prompts",
    "random, small losses",
    "reference loss, control",
}
# What the pruner does around a policy: for those that have scores, and for all.
GUARDS = {"max_age": 2, "exclude_hardest": 0.1}
BASE = {"period": 2, "first": 1, "last": 0.2}

NAN = math.nan


def policy_of(case: str, **settings) -> PruningPolicy:
    name, own = CASES[case]
    return make_policy(name, **{**own, **settings})


def size(policy: PruningPolicy, n: int) -> int | None:
    """How many samples of n it keeps; None if that depends on the data."""
    ratio = getattr(policy, "keep_ratio", 1.0 if policy.name == "full" else None)
    return None if ratio is None else max(1, round(ratio * n))


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a.nan_to_num(-1), b.nan_to_num(-1))


def has_scores(policy: PruningPolicy) -> bool:
    return policy.has_scores


every_case = pytest.mark.parametrize("case", CASES)


score_case = pytest.mark.parametrize(
    "case", [case for case in CASES if has_scores(policy_of(case))]
)


# ---- a fake model --------------------------------------------------------------------------------


def loss_of(i: int, epoch: int) -> float:
    """The loss of a sample in an epoch; one of 37 is not a number."""
    mixed = (i * 7919 + epoch * 104729 + i * epoch * 31) % 37
    return NAN if mixed == 5 else mixed / 8


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
