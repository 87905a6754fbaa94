"""The guards of a choice, which every policy has as fields. Pure; the pruner calls them."""

import math

import torch
from torch import Tensor

from ..selection import indices_of, mask_of
from ..table import SampleTable
from .base import EpochPlan, PruningPolicy


def excluded_share(policy: PruningPolicy, progress: float) -> float:
    """The share of the observed samples that is excluded at a point of the run, in [0, 1).

        share = exclude_hardest * min(1, max(0, (progress - begin) / (end - begin)))

    with (begin, end) = `exclude_ramp`; without a ramp it is `exclude_hardest`.
    """
    if policy.exclude_ramp is None:
        return policy.exclude_hardest
    begin, end = policy.exclude_ramp
    return policy.exclude_hardest * min(1.0, max(0.0, (progress - begin) / (end - begin)))


def guarded_score(
    policy: PruningPolicy, score: Tensor, table: SampleTable, epoch: int, progress: float
) -> Tensor:
    """The score as a choice is given it: `exclude_hardest`, `max_age` and the first look applied.

    Args:
        policy: Has the guards as fields.
        score: (N,) float32 of the policy, not guarded; changed in place.
        table: Says which samples were observed, and when.
        epoch: The epoch that begins.
        progress: Share of the run's budget that is spent, in [0, 1].

    Returns:
        (N,) float32 without NaN: +inf for samples never observed or too long ago, -inf for samples
        without a finite observation and for the hardest that are excluded.
    """
    observed = table.observed
    score.nan_to_num_(nan=-math.inf, posinf=math.inf, neginf=-math.inf)
    share = excluded_share(policy, progress)
    if share:
        # If an observed sample scores +inf, its policy keeps it whatever its loss is.
        candidates = indices_of(observed & (score < math.inf))
        excluded = round(share * len(candidates))
        if excluded:
            hardest = torch.topk(score[candidates], excluded).indices
            score[candidates[hardest]] = -math.inf
    if policy.max_age is not None:
        score[table["last_observed"] < epoch - policy.max_age * policy.period] = math.inf
    score[~observed] = math.inf
    return score


def guarded_plan(
    policy: PruningPolicy,
    plan: EpochPlan,
    labels: Tensor | None,
    score: Tensor | None,
    generator: torch.Generator,
) -> EpochPlan:
    """The plan with the floor for each class and the limit on weights applied."""
    if labels is not None:
        plan = with_class_floor(plan, labels, policy.min_per_class, score, generator)
    if plan.weights is not None and policy.max_weight is not None:
        return EpochPlan(plan.indices, plan.weights.clamp(max=policy.max_weight), plan.lr_scale)
    return plan


def with_class_floor(
    plan: EpochPlan, labels: Tensor, least: int, score: Tensor | None, generator: torch.Generator
) -> EpochPlan:
    """The plan with at least `least` samples of each class, and as many samples as before.

    A class below the floor gains its highest scores, with weight 1 (all its samples, if it has
    fewer than `least`). The other classes lose their lowest scores, down to the floor. Without
    scores, random numbers decide.

    Args:
        plan: As the policy made it.
        labels: (N,) float32. NaN means not known yet: such a sample belongs to no class.
        least: The floor.
        score: (N,) float32 without NaN, or None.
        generator: Breaks ties.

    Raises:
        ValueError: If the floors of all classes together need more samples than the plan keeps.

    Cost: O(N log N), only if a class is below the floor.
    """
    n = len(labels)
    kept = mask_of(plan.indices, n)
    known = indices_of(labels.isfinite())
    if len(known) == 0:
        return plan
    classes, which = torch.unique(labels[known], return_inverse=True)
    size = torch.bincount(which, minlength=len(classes))
    have = torch.bincount(which[kept[known]], minlength=len(classes))
    floor = size.clamp(max=least)
    if int(floor.sum()) > len(plan):
        raise ValueError(
            f"min_per_class={least} needs {int(floor.sum())} samples of {len(classes)} classes, "
            f"and the plan keeps {len(plan)}: lower min_per_class or raise keep_ratio."
        )
    if bool((have >= floor).all()):
        return plan
    order, rank = _by_class(which, kept[known], None if score is None else score[known], generator)
    # The samples in the first places of their class, up to the floor, stay or come in.
    begins = torch.cumsum(size, 0) - size
    place = torch.arange(len(order)) - begins[which[order]]
    secured = torch.zeros(len(known), dtype=torch.bool)
    secured[order] = place < floor[which[order]]
    added = known[secured & ~kept[known]]
    spare = indices_of(kept[known] & ~secured)
    spare = spare[torch.argsort(rank[spare], descending=True)]  # the lowest scores first
    unknown = indices_of(kept & ~labels.isfinite())
    removed = torch.cat([known[spare], unknown])[: len(added)]
    kept[removed] = False
    kept[added] = True
    indices = indices_of(kept)
    if plan.weights is None:
        return EpochPlan(indices, None, plan.lr_scale)
    weights = torch.ones(n)
    weights[plan.indices] = plan.weights
    return EpochPlan(indices, weights[indices], plan.lr_scale)


def _by_class(
    which: Tensor, kept: Tensor, score: Tensor | None, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Order M samples by class; within a class kept ones first; within these highest scores first.

    Returns:
        order: (M,) int64, that order.
        rank: (M,) int64, the place of each sample by score alone, 0 for the highest.
    """
    order = torch.randperm(len(which), generator=generator)
    if score is not None:
        order = order[torch.argsort(score[order], descending=True, stable=True)]
    rank = torch.empty_like(order)
    rank[order] = torch.arange(len(order))
    order = order[torch.argsort(~kept[order], stable=True)]
    return order[torch.argsort(which[order], stable=True)], rank
