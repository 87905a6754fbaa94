"""The pruning rules, by their published names, and the contract they keep.

A policy is a small frozen dataclass of pure functions. It says which `signals` it wants of each trained sample and which
`columns` it keeps of them, how an observation changes the columns (`observe`), how a sample scores (`score`) and which
samples the next epochs train on (`plan`). Everything else (when to choose, full-data epochs, samples never seen, guards,
several ranks, checkpoints) is done once, for all policies, by [`DynamicPruner`].

To add a rule: one class here, one line in `POLICIES`, one line in the conformance table of the tests, one row in the
README.
"""

import difflib
import json
import math
import numbers
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from .scores import Column, Rows, SampleTable


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
            if not bool((self.weights.isfinite() & (self.weights > 0)).all()):
                raise ValueError("The weights of a plan must be finite and positive; leave a sample out to drop it.")
        if not (math.isfinite(self.lr_scale) and self.lr_scale > 0):
            raise ValueError(f"lr_scale={self.lr_scale} of a plan must be finite and positive.")

    def __len__(self) -> int:
        return len(self.indices)

    def check(self, n: int) -> None:
        """Raises ValueError unless the indices are unique and lie in [0, n). Cost: O(K) and n bytes."""
        low, high = int(self.indices.min()), int(self.indices.max())
        if low < 0 or high >= n:
            raise ValueError(f"A plan holds the index {low if low < 0 else high}; the training set has {n} samples.")
        seen = torch.zeros(n, dtype=torch.bool)
        seen[self.indices] = True
        if (unique := int(seen.sum())) != len(self):
            raise ValueError(f"A plan of {len(self)} indices holds only {unique} different ones; each may occur once.")


# ---- checks of fields -----------------------------------------------------------------------------------------------


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


def _check_share(name: str, value: Any) -> None:
    check_number(name, value, "a share in [0, 1]", lambda share: 0 <= share <= 1)


def _check_decay(value: Any) -> None:
    check_number("decay", value, "the weight of a new observation, in (0, 1]", lambda decay: 0 < decay <= 1)


def _check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name}={value!r} is unknown: wanted is one of {', '.join(map(repr, choices))}.")


# ---- selection ------------------------------------------------------------------------------------------------------


def keep_count(keep_ratio: float, n: int) -> int:
    """K = round(keep_ratio * n), at least 1."""
    return max(1, round(keep_ratio * n))


def top_k(score: Tensor, k: int, generator: torch.Generator) -> Tensor:
    """The indices of the k highest scores, ascending; ties at the boundary are broken at random.

    Args:
        score: (N,) float; infinities are welcome, NaN is not.
        k: how many, in [0, N].
        generator: draws which of the tied samples are taken.

    Returns:
        (k,) int64. Cost: O(N), by partition, not by a sort.
    """
    n = len(score)
    if k == 0:
        return torch.empty(0, dtype=torch.int64)
    if k >= n:
        return torch.arange(n)
    threshold = torch.kthvalue(score, n - k + 1).values
    mask = score > threshold
    tied = torch.nonzero(score == threshold).squeeze(1)
    mask[tied[torch.randperm(len(tied), generator=generator)[: k - int(mask.sum())]]] = True
    return torch.nonzero(mask).squeeze(1)


def _greedy_and_random(score: Tensor, k: int, epsilon: float, generator: torch.Generator) -> Tensor:
    """The k - r highest scores, and r = round(epsilon * k) drawn uniformly without replacement from all the rest."""
    r = round(epsilon * k)
    mask = torch.zeros(len(score), dtype=torch.bool)
    mask[top_k(score, k - r, generator)] = True
    if r:
        rest = torch.nonzero(~mask).squeeze(1)
        mask[rest[torch.randperm(len(rest), generator=generator)[:r]]] = True
    return torch.nonzero(mask).squeeze(1)


def _moving_mean(mean: Tensor, value: Tensor, decay: float) -> Tensor:
    """m <- (1 - a) m + a u, and m = u for the first observation (m is NaN until then)."""
    return torch.where(mean.isnan(), value, torch.lerp(mean, value, decay))  # exact where u = m, and for a = 1


# ---- the contract ---------------------------------------------------------------------------------------------------


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
            dropped samples are those of the epoch in which they were last trained.
        max_age: a sample not observed in the last `max_age` choices scores +inf, so that it is seen again.
        exclude_hardest: share of the observed samples, those with the highest scores, that is kept last of all (a guard
            against wrong labels and outliers); in [0, 1). `max_age`, if set, brings them back now and then.
        max_weight: upper limit on the weights of a plan.
    """

    period: int = field(default=1, kw_only=True)
    first: int = field(default=0, kw_only=True)
    last: float = field(default=0.0, kw_only=True)
    scoring: Literal["trained"] = field(default="trained", kw_only=True)
    max_age: int | None = field(default=None, kw_only=True)
    exclude_hardest: float = field(default=0.0, kw_only=True)
    max_weight: float | None = field(default=None, kw_only=True)

    # Columns of the SampleTable that `observe` reads and writes.
    columns: ClassVar[tuple[Column, ...]] = ()

    def __post_init__(self) -> None:
        for f in fields(self):  # NumPy's numbers would not go into JSON
            value = getattr(self, f.name)
            if isinstance(value, numbers.Number) and hasattr(value, "item"):
                object.__setattr__(self, f.name, value.item())
        if hasattr(self, "keep_ratio"):
            wanted = "the share of the data to train on in an epoch, a number in (0, 1], such as 0.3 for 30 %"
            check_number("keep_ratio", self.keep_ratio, wanted, lambda ratio: 0 < ratio <= 1)
        check_count("period", self.period, 1)
        check_count("first", self.first, 0)
        _check_share("last", self.last)
        _check_choice("scoring", self.scoring, ("trained",))
        if self.max_age is not None:
            check_count("max_age", self.max_age, 1)
        check_number("exclude_hardest", self.exclude_hardest, "a share in [0, 1)", lambda share: 0 <= share < 1)
        if self.max_weight is not None:
            check_number("max_weight", self.max_weight, "a positive number", lambda weight: weight > 0)
        has_scores = type(self).score is not PruningPolicy.score
        for guard in ("max_age", "exclude_hardest"):
            if getattr(self, guard) and not has_scores:
                raise ValueError(f"{guard}={getattr(self, guard)} acts on scores, and {type(self).__name__} has none.")

    @property
    def signals(self) -> tuple[str, ...]:
        """What is observed of each trained sample: names of [`hf_dynprune.losses.SIGNALS`], `"loss"` above all."""
        return ()

    def observe(self, rows: Rows, signals: Rows) -> Mapping[str, Tensor]:
        """New values of the columns of M different samples, from their old ones and this observation. Pure.

        Args:
            rows: for each column of the table (M,) values before the observation.
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
        self, table: SampleTable, *, score: Tensor | None, epoch: int, progress: float, generator: torch.Generator
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
        return next((name for name, cls in POLICIES.items() if cls is type(self)), type(self).__name__)

    def to_dict(self) -> dict[str, Any]:
        """`name` and all fields, as JSON has them (a tuple becomes a list)."""
        return json.loads(json.dumps({"name": self.name, **{f.name: getattr(self, f.name) for f in fields(self)}}))

    @classmethod
    def paper_like(cls, **settings: Any) -> "PruningPolicy":
        """The policy as Raju et al. seem to have run it: a new choice every 10 epochs. Reconstructed."""
        return cls(**{"period": 10, **settings})


# ---- the rules ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FullData(PruningPolicy):
    """Keeps everything: the full run, counted and reported as the pruned runs are.

    Trains the samples of the stock Trainer in its order. Cost 1.
    """

    def planned_size(self, n: int, epoch: int, progress: float) -> int:
        return n

    def plan(
        self, table: SampleTable, *, score: Tensor | None, epoch: int, progress: float, generator: torch.Generator
    ) -> EpochPlan:
        return EpochPlan(torch.arange(len(table)))


@dataclass(frozen=True)
class RandomPruning(PruningPolicy):
    """Uniform random dynamic pruning: K = round(keep_ratio * N) samples, drawn anew at each choice.

        replacement=True    S = K of N, uniform without replacement within a choice, independent between choices
        replacement=False   S = the K samples kept least often so far, ties at random (RS2): all samples are kept once
                            before any is kept twice

    Cost: keep_ratio; no scores, nothing to store but counts. The baseline that score-guided rules must beat.

    Args:
        keep_ratio: share of the samples trained in an epoch, in (0, 1].
        replacement: whether a sample may come back before all others had their turn.

    Papers: Raju, Daruwalla, Lipasti 2021, arXiv 2111.12621 (dynamic random); Okanovic et al., ICLR 2024, arXiv
    2305.18424 (RS2; code PatrikOkanovic/RS2).
    """

    keep_ratio: float = 0.5
    replacement: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.replacement, bool):
            raise TypeError(f"replacement={self.replacement!r} must be True or False.")

    def plan(
        self, table: SampleTable, *, score: Tensor | None, epoch: int, progress: float, generator: torch.Generator
    ) -> EpochPlan:
        n, k = len(table), keep_count(self.keep_ratio, len(table))
        if self.replacement:
            return EpochPlan(torch.randperm(n, generator=generator)[:k].sort().values)
        return EpochPlan(top_k(-table["times_kept"], k, generator))


@dataclass(frozen=True)
class EpsilonGreedy(PruningPolicy):
    """ε-greedy dynamic pruning: mostly the samples of highest loss, and a random share of the others.

        on each observation u_i of a sample     m_i <- (1 - a) m_i + a u_i;     the first sets m_i = u_i
        at each choice, K = round(keep_ratio * N), R = round(epsilon * K)
            S = the K - R samples of highest m_i  ∪  R drawn uniformly without replacement from the rest
        never observed = +inf: such samples come first, ties broken at random

    Reconstructed: the paper's full text was not at hand; the formula and the defaults of `epsilon` and `decay` follow a
    third party's code (sodabori/dataset_pruning, where they are never called), the optimistic start is ours.

    Cost: keep_ratio (training losses are free); one float a sample; O(N) a choice.

    Args:
        keep_ratio: share of the samples trained in an epoch, in (0, 1].
        epsilon: share of the kept samples that is drawn at random, in [0, 1].
        decay: a, the weight of a new observation in the moving mean, in (0, 1]; 1 is the last loss alone.
        signal: what is observed, `"loss"`, or another name of [`hf_dynprune.losses.SIGNALS`].

    Paper: Raju, Daruwalla, Lipasti 2021, arXiv 2111.12621.
    """

    keep_ratio: float = 0.5
    epsilon: float = 0.1
    decay: float = 0.8
    signal: str = "loss"

    columns = (Column("mean"),)

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_share("epsilon", self.epsilon)
        _check_decay(self.decay)

    @property
    def signals(self) -> tuple[str, ...]:
        return (self.signal,)

    def observe(self, rows: Rows, signals: Rows) -> Mapping[str, Tensor]:
        return {"mean": _moving_mean(rows["mean"], signals[self.signal], self.decay)}

    def score(self, table: SampleTable) -> Tensor:
        return table["mean"]

    def plan(
        self, table: SampleTable, *, score: Tensor | None, epoch: int, progress: float, generator: torch.Generator
    ) -> EpochPlan:
        assert score is not None
        return EpochPlan(_greedy_and_random(score, keep_count(self.keep_ratio, len(table)), self.epsilon, generator))


@dataclass(frozen=True)
class UCB(PruningPolicy):
    """Upper-confidence-bound dynamic pruning: the samples whose loss is high, or uncertain.

        on each observation u_i of a sample     v_i <- (1 - a) v_i + a (u_i - m_i)^2    with the old m_i, then
                                                m_i <- (1 - a) m_i + a u_i;     the first sets m_i = u_i, v_i = 0
        at each choice, K = round(keep_ratio * N)
            S = the K samples of highest m_i + c v_i      (with epsilon > 0, a share of S at random, as in ε-greedy)
        never observed = +inf: such samples come first, ties broken at random

    Reconstructed: the paper's full text was not at hand; the updates and the defaults of `decay` and `c` follow a third
    party's code (sodabori/dataset_pruning, where they are never called). That code also keeps epsilon = 0.1 at random
    under this name; the textbook rule, and our default, is the plain top K.

    Cost: keep_ratio (training losses are free); two floats a sample; O(N) a choice.

    Args:
        keep_ratio: share of the samples trained in an epoch, in (0, 1].
        c: weight of the uncertainty, >= 0.
        decay: a, the weight of a new observation, in (0, 1].
        bonus: `"variance"` for m + c v, `"std"` for m + c sqrt(v).
        epsilon: share of the kept samples that is drawn at random, in [0, 1].
        signal: what is observed, `"loss"`, or another name of [`hf_dynprune.losses.SIGNALS`].

    Paper: Raju, Daruwalla, Lipasti 2021, arXiv 2111.12621.
    """

    keep_ratio: float = 0.5
    c: float = 1.0
    decay: float = 0.8
    bonus: Literal["variance", "std"] = "variance"
    epsilon: float = 0.0
    signal: str = "loss"

    columns = (Column("mean"), Column("variance"))

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("c", self.c, "a number of at least 0", lambda c: c >= 0)
        _check_decay(self.decay)
        _check_choice("bonus", self.bonus, ("variance", "std"))
        _check_share("epsilon", self.epsilon)

    @property
    def signals(self) -> tuple[str, ...]:
        return (self.signal,)

    def observe(self, rows: Rows, signals: Rows) -> Mapping[str, Tensor]:
        mean, value = rows["mean"], signals[self.signal]
        # A loss above 1e19 has a square beyond float32: without the limit the variance would be infinite, then NaN for good.
        surprise = ((value - mean) ** 2).clamp(max=torch.finfo(value.dtype).max)
        variance = torch.where(mean.isnan(), 0.0, torch.lerp(rows["variance"], surprise, self.decay))
        return {"mean": _moving_mean(mean, value, self.decay), "variance": variance}

    def score(self, table: SampleTable) -> Tensor:
        spread = table["variance"] if self.bonus == "variance" else table["variance"].sqrt()
        return table["mean"] + self.c * spread

    def plan(
        self, table: SampleTable, *, score: Tensor | None, epoch: int, progress: float, generator: torch.Generator
    ) -> EpochPlan:
        assert score is not None
        return EpochPlan(_greedy_and_random(score, keep_count(self.keep_ratio, len(table)), self.epsilon, generator))


# ---- names ----------------------------------------------------------------------------------------------------------

POLICIES: dict[str, type[PruningPolicy]] = {
    "full": FullData,
    "random": RandomPruning,
    "epsilon-greedy": EpsilonGreedy,
    "ucb": UCB,
}


def make_policy(name: str, **settings: Any) -> PruningPolicy:
    """The policy of that name in `POLICIES` (case, `-` and `_` do not matter) with these fields.

    Raises:
        ValueError: for an unknown name or field, naming the near ones, and for values out of range.
    """
    if not isinstance(name, str):
        raise TypeError(f"{name!r} is no name of a policy; the names are {', '.join(map(repr, POLICIES))}.")
    key = name.lower().replace("_", "-")
    if key not in POLICIES:
        near = difflib.get_close_matches(key, POLICIES, n=2, cutoff=0.4)
        hint = f"did you mean {' or '.join(map(repr, near))}? " if near else ""
        raise ValueError(f"There is no policy {name!r}: {hint}The names are {', '.join(map(repr, POLICIES))}.")
    cls = POLICIES[key]
    known = [f.name for f in fields(cls)]
    for setting in settings:
        if setting not in known:
            near = difflib.get_close_matches(setting, known, n=2, cutoff=0.4)
            hint = f"did you mean {' or '.join(map(repr, near))}? " if near else ""
            raise ValueError(f"Policy {key!r} has no field {setting!r}: {hint}Its fields are {', '.join(known)}.")
    return cls(**settings)
