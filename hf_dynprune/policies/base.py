"""The contract that every rule keeps, and what rules are made of: plans, checks of fields, selection by score."""

import json
import math
import numbers
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from ..scores import Column, Rows, SampleTable

# The rules by their published names; `hf_dynprune.policies` fills it.
POLICIES: "dict[str, type[PruningPolicy]]" = {}


@dataclass(frozen=True, eq=False)
class EpochPlan:
    """What is trained on until the next choice.

    Args:
        indices: (K,) int64, unique sample indices in [0, N), K >= 1, in any order.
        weights: (K,) float32, factor on each sample's loss, finite and positive; None for all 1.
        lr_scale: factor on the learning rate while the plan is in force.

    Raises:
        TypeError, ValueError: at construction for wrong shapes, dtypes or values; `check(n)` tests range and uniqueness.
    """

    indices: Tensor
    weights: Tensor | None = None
    lr_scale: float = 1.0

    def __post_init__(self) -> None:
        if self.indices.dtype != torch.int64 or self.indices.ndim != 1:
            raise TypeError(
                f"The indices of a plan are a {self.indices.dtype} tensor of shape {tuple(self.indices.shape)}; "
                "wanted is int64 of shape (K,)."
            )
        if len(self.indices) == 0:
            raise ValueError("A plan keeps no sample at all; it must keep at least 1.")
        if self.weights is not None:
            if self.weights.shape != self.indices.shape or self.weights.dtype != torch.float32:
                raise ValueError(
                    f"The weights of a plan are {self.weights.dtype} of shape {tuple(self.weights.shape)}; wanted is "
                    f"float32 of shape {tuple(self.indices.shape)}, one for each index."
                )
            if not bool(((self.weights > 0) & (self.weights < math.inf)).all()):
                raise ValueError(
                    "The weights of a plan must be finite and positive; leave a sample out to drop it."
                )
        if not (math.isfinite(self.lr_scale) and self.lr_scale > 0):
            raise ValueError(f"lr_scale={self.lr_scale} of a plan must be finite and positive.")

    def __len__(self) -> int:
        return len(self.indices)

    def check(self, n: int) -> None:
        """Raises ValueError unless the indices are unique and lie in [0, n). Cost: O(K) and n bytes."""
        low, high = int(self.indices.min()), int(self.indices.max())
        if low < 0 or high >= n:
            raise ValueError(
                f"A plan holds the index {low if low < 0 else high}; the training set has {n} samples."
            )
        if bool(
            (self.indices[1:] > self.indices[:-1]).all()
        ):  # ascending, as most policies give them
            return
        if (unique := int(torch.count_nonzero(mask_of(self.indices, n)))) != len(self):
            raise ValueError(
                f"A plan of {len(self)} indices holds only {unique} different ones; each may occur once."
            )


# ---- checks of fields ----------------------------------------------------------------------------


def check_number(name: str, value: Any, wanted: str, ok: Callable[[Any], bool]) -> None:
    """TypeError unless `value` is a real number, ValueError unless it is finite and `ok`."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name}={value!r} is not a number: wanted is {wanted}.")
    if not (math.isfinite(value) and ok(value)):
        raise ValueError(f"{name}={value!r} is out of range: wanted is {wanted}.")


def check_count(name: str, value: Any, least: int) -> None:
    """TypeError unless `value` is a whole number, ValueError if it is less than `least`."""
    wanted = f"a whole number of at least {least}"
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{name}={value!r} is not a whole number: wanted is {wanted}.")
    if value < least:
        raise ValueError(f"{name}={value!r} is out of range: wanted is {wanted}.")


def check_share(name: str, value: Any) -> None:
    check_number(name, value, "a share in [0, 1]", lambda share: 0 <= share <= 1)


def check_decay(value: Any) -> None:
    check_number(
        "decay", value, "the weight of a new observation, in (0, 1]", lambda decay: 0 < decay <= 1
    )


def check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(
            f"{name}={value!r} is unknown: wanted is one of {', '.join(map(repr, choices))}."
        )


# ---- selection -----------------------------------------------------------------------------------


def keep_count(keep_ratio: float, n: int) -> int:
    """K = round(keep_ratio * n), at least 1."""
    return max(1, round(keep_ratio * n))


def floor_share(share: float, n: int) -> int:
    """floor(share * n), where a product such as (1 - 0.9) * 10 = 0.9999... is the whole number that it stands for."""
    return math.floor(share * n + 1e-6)


# Of the ways to say the same these are the quickest on a CPU: NumPy lists the places of a mask ten times as fast as torch
# and partitions three times as fast; `index_select` reads three times as fast as `[]`; `count_nonzero` counts twenty
# times as fast as `sum`; int32 misses the caches less.


def permutation(n: int, generator: torch.Generator) -> Tensor:
    """(n,) int32, or int64 where int32 cannot hold it: the numbers of `torch.randperm(n, generator=generator)`."""
    return torch.randperm(n, generator=generator, dtype=torch.int32 if n < 1 << 31 else torch.int64)


def indices_of(mask: Tensor) -> Tensor:
    """The indices at which an (N,) bool mask is true: (K,) int64, ascending."""
    return torch.from_numpy(np.flatnonzero(mask.numpy()))


def mask_of(indices: Tensor, n: int) -> Tensor:
    """Which of 0, ..., n - 1 are among the (K,) indices: (n,) bool."""
    return torch.zeros(n, dtype=torch.bool).index_fill_(0, indices.long(), True)


def kth_highest(score: Tensor, k: int) -> Tensor:
    """The k-th highest of (N,) scores without NaN, k in [1, N]: a scalar. Cost: O(N), a copy of the scores."""
    place = len(score) - k
    return torch.from_numpy(np.partition(score.numpy(), place)[place : place + 1])[0].clone()


def top_k(score: Tensor, k: int, generator: torch.Generator) -> Tensor:
    """The indices of the k highest scores, ascending; ties at the boundary are broken at random.

    Args:
        score: (N,) float; infinities are welcome, NaN is not.
        k: how many, in [0, N].
        generator: draws which of the tied samples are taken.

    Returns:
        (k,) int64. Cost: O(N), by partition, not by a sort.
    """
    return indices_of(top_mask(score, k, generator))


def top_mask(score: Tensor, k: int, generator: torch.Generator) -> Tensor:
    """What `top_k` says, as an (N,) bool mask."""
    n = len(score)
    if not 0 < k < n:
        return torch.full((n,), k >= n)
    threshold = kth_highest(score, k)
    mask = score > threshold
    return mask | draw(score == threshold, k - int(torch.count_nonzero(mask)), generator)


def with_class_floor(
    plan: EpochPlan, labels: Tensor, least: int, score: Tensor | None, generator: torch.Generator
) -> EpochPlan:
    """The plan with at least `least` samples of each class (or all that it has), and as many samples as before.

    Of a class below the floor the highest scores are added, with weight 1; removed are the lowest scores of what the other
    classes have above it. Where there are no scores, random numbers are in their place.

    Args:
        plan: as the policy made it.
        labels: (N,) float32, NaN where not known yet: such samples are of no class.
        least: the floor.
        score: (N,) float32 without NaN, or None.
        generator: breaks ties.

    Raises:
        ValueError: if the floors of all classes together need more samples than the plan keeps.

    Cost: O(N log N), only where a class is below the floor.
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
            f"min_per_class={least} needs {int(floor.sum())} samples of {len(classes)} classes, and the plan keeps "
            f"{len(plan)}: lower min_per_class or raise keep_ratio."
        )
    if bool((have >= floor).all()):
        return plan
    # By class, in each the kept ones first, in each of these the highest scores first: what stands among the first of its
    # class, up to the floor, stays or comes in.
    order = torch.randperm(len(known), generator=generator)
    if score is not None:
        order = order[torch.argsort(score[known][order], descending=True, stable=True)]
    rank = torch.empty_like(order)
    rank[order] = torch.arange(len(order))
    order = order[torch.argsort(~kept[known][order], stable=True)]
    order = order[torch.argsort(which[order], stable=True)]
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


def draw(pool: Tensor, k: int, generator: torch.Generator) -> Tensor:
    """Of the places at which an (N,) mask is true k, uniformly without replacement, or all where there are fewer: (N,)
    bool."""
    m = int(torch.count_nonzero(pool))
    drawn = torch.zeros_like(pool)
    drawn.numpy()[pool.numpy()] = mask_of(permutation(m, generator)[:k], m).numpy()
    return drawn


def moving_mean(mean: Tensor, value: Tensor, decay: float) -> Tensor:
    """m <- (1 - a) m + a u, and m = u for the first observation (m is NaN until then)."""
    return torch.where(
        mean.isnan(), value, torch.lerp(mean, value, decay)
    )  # exact where u = m, and for a = 1


# ---- the contract --------------------------------------------------------------------------------


@dataclass(frozen=True)
class PruningPolicy(ABC):
    """A rule that says which samples are trained on.

    A subclass is a frozen dataclass whose fields are its settings: they are what is saved, printed, compared on resume
    and put on the model card. It implements `plan`, and, where it looks at the samples, `observe` and `score`.

    The fields below belong to every policy and are applied by [`DynamicPruner`], never by the policy.

    Args:
        period: epochs between two choices (the paper's T_p); the plan is held in between.
        first: full-data epochs before the first choice.
        last: share of the run, at its end, that is trained on all data (annealing); in [0, 1].
        scoring: which samples are scored. `"trained"`: every training loss is an observation, at no cost; the scores of
            dropped samples are those of the epoch in which they were last trained. `"dropped"`: training losses for the
            kept samples, forward passes before each choice for the rest. `"all"`: forward passes over all samples before
            each choice, and these alone. A forward pass counts as a third of a pass. Fresh scores are not better by that:
            the stale ones are what makes the kept set rotate.
        scoring_mode: of the model in these forward passes, `"eval"` or `"train"` (dropout, and BatchNorm by the batch);
            None is `"train"` with `scoring="dropped"`, so that all scores are of one kind, and `"eval"` with `"all"`.
        max_age: a sample not observed in the last `max_age` choices scores +inf, so that it is seen again.
        exclude_hardest: share of the observed samples, those with the highest scores, that is kept last of all (a guard
            against wrong labels and outliers); in [0, 1). `max_age`, if set, brings them back now and then.
        max_weight: upper limit on the weights of a plan.
        min_per_class: samples of each class that every plan holds at least (or all that the class has), in place of the
            lowest scores of other classes; 0 is no floor. For single-label classification; the label of a sample is known
            from its first observation on.
    """

    period: int = field(default=1, kw_only=True)
    first: int = field(default=0, kw_only=True)
    last: float = field(default=0.0, kw_only=True)
    scoring: Literal["trained", "all", "dropped"] = field(default="trained", kw_only=True)
    scoring_mode: Literal["eval", "train"] | None = field(default=None, kw_only=True)
    max_age: int | None = field(default=None, kw_only=True)
    exclude_hardest: float = field(default=0.0, kw_only=True)
    max_weight: float | None = field(default=None, kw_only=True)
    min_per_class: int = field(default=0, kw_only=True)

    # Columns of the SampleTable that `observe` reads and writes.
    columns: ClassVar[tuple[Column, ...]] = ()
    # Whether the first choice holds for the whole run.
    static: ClassVar[bool] = False
    # Where the authors' own runs differ from the defaults.
    paper_settings: ClassVar[Mapping[str, Any]] = {}

    def __post_init__(self) -> None:
        for f in fields(self):  # NumPy's numbers would not go into JSON
            value = getattr(self, f.name)
            if isinstance(value, numbers.Number) and hasattr(value, "item"):
                object.__setattr__(self, f.name, value.item())
        optional = any(f.name == "keep_ratio" and f.default is None for f in fields(self))
        if hasattr(self, "keep_ratio") and not (self.keep_ratio is None and optional):
            wanted = "the share of the data to train on in an epoch, a number in (0, 1], such as 0.3 for 30 %"
            check_number("keep_ratio", self.keep_ratio, wanted, lambda ratio: 0 < ratio <= 1)
        check_count("period", self.period, 1)
        check_count("first", self.first, 0)
        check_share("last", self.last)
        check_choice("scoring", self.scoring, ("trained", "all", "dropped"))
        if self.scoring_mode is not None:
            check_choice("scoring_mode", self.scoring_mode, ("eval", "train"))
        if self.scoring != "trained" and not self.signals:
            raise ValueError(
                f"scoring={self.scoring!r} scores samples, and {type(self).__name__} has no use for scores."
            )
        if self.max_age is not None:
            check_count("max_age", self.max_age, 1)
        check_number(
            "exclude_hardest",
            self.exclude_hardest,
            "a share in [0, 1)",
            lambda share: 0 <= share < 1,
        )
        if self.max_weight is not None:
            check_number(
                "max_weight", self.max_weight, "a positive number", lambda weight: weight > 0
            )
        check_count("min_per_class", self.min_per_class, 0)
        has_scores = type(self).score is not PruningPolicy.score
        for guard in ("max_age", "exclude_hardest"):
            if getattr(self, guard) and not has_scores:
                raise ValueError(
                    f"{guard}={getattr(self, guard)} acts on scores, and {type(self).__name__} has none."
                )

    def check_dataset(self, n: int, fingerprint: str) -> None:  # noqa: B027  # most policies fit any dataset
        """Raises ValueError where the policy does not fit the dataset; called when the pruner is made."""

    def preparation(self) -> dict[str, Any]:
        """What was spent before the run, for the report; empty where nothing was."""
        return {}

    @property
    def signals(self) -> tuple[str, ...]:
        """What is observed of each trained sample: names of [`hf_dynprune.losses.SIGNALS`], `"loss"` above all."""
        return ()

    def observe(self, rows: Rows, signals: Rows) -> Mapping[str, Tensor]:
        """New values of the columns of M different samples, from their old ones and this observation. Pure.

        Args:
            rows: for each column of the table (M,) values before the observation, read when they are asked for.
            signals: for each of `signals` (M,) finite float32.

        Returns:
            For each of the policy's columns that changes (M,) values.
        """
        return {}

    def score(self, table: SampleTable) -> Tensor | None:
        """(N,) float, higher is kept first; None where the policy has no scores.

        The score of a sample never observed does not matter: it becomes +inf. NaN (nothing finite was ever observed)
        becomes -inf.
        """
        return None

    def planned_size(self, n: int, epoch: int, progress: float) -> int | None:
        """How many samples of n a choice will keep; None where that depends on the data."""
        keep_ratio = getattr(self, "keep_ratio", None)
        return None if keep_ratio is None else keep_count(keep_ratio, n)

    @abstractmethod
    def plan(
        self,
        table: SampleTable,
        *,
        score: Tensor | None,
        epoch: int,
        progress: float,
        generator: torch.Generator,
    ) -> EpochPlan:
        """Chooses. Pure, but for what it draws from `generator`.

        Args:
            table: what is known of the samples.
            score: (N,) what `score` returned, +inf for samples never observed, guards applied; never NaN.
            epoch: the epoch that begins.
            progress: share of the run's budget that is spent, in [0, 1].
            generator: the only source of randomness.
        """

    @property
    def name(self) -> str:
        """The name in `POLICIES`, or the name of the class for a policy that is not listed there."""
        return next(
            (name for name, cls in POLICIES.items() if cls is type(self)), type(self).__name__
        )

    @property
    def given(self) -> dict[str, Any]:
        """The fields that tell it from others of its class: those that are not the default, and `keep_ratio`."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        told = {
            f.name for f in fields(self) if values[f.name] != f.default or f.name == "keep_ratio"
        }
        return {
            name: value
            for name, value in values.items()
            if name in told and (name, value) != ("keep_ratio", None)
        }

    def __str__(self) -> str:
        """As one writes it, such as `UCB(keep_ratio=0.3)`."""
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in self.given.items())})"

    def to_dict(self) -> dict[str, Any]:
        """`name` and all fields, as JSON has them (a tuple becomes a list)."""
        return json.loads(
            json.dumps({"name": self.name, **{f.name: getattr(self, f.name) for f in fields(self)}})
        )

    @classmethod
    def paper_like(cls, **settings: Any) -> "PruningPolicy":
        """The policy with the settings of its paper's or its authors' runs; see the class for where they differ."""
        return cls(**{**cls.paper_settings, **settings})


@dataclass(frozen=True)
class LastLoss(PruningPolicy):
    """A policy that remembers the last loss of each sample, and scores by it."""

    columns: ClassVar[tuple[Column, ...]] = (Column("loss"),)

    @property
    def signals(self) -> tuple[str, ...]:
        return ("loss",)

    def observe(self, rows: Rows, signals: Rows) -> Mapping[str, Tensor]:
        return {name: signals[name] for name in self.signals}

    def score(self, table: SampleTable) -> Tensor:
        return table["loss"]
