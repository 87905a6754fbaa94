"""The contract that every policy keeps: what it is given (`Choice`) and returns (`EpochPlan`)."""

import json
import math
import numbers
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor

from ..checks import check_choice, check_count, check_number, check_share
from ..schedule import RunShape
from ..selection import keep_count, mask_of
from ..table import Memories, Memory, SampleTable

# Fields of every policy that checkpoints of earlier versions lack, with what was in force then.
ADDED_FIELDS: dict[str, Any] = {"exclude_ramp": None}


@dataclass(frozen=True, eq=False)
class EpochPlan:
    """What is trained on until the next choice.

    Args:
        indices: (K,) int64, unique sample indices in [0, N), K >= 1, in any order.
        weights: (K,) float32, the factor on each sample's loss, finite and positive; None means 1.
        lr_scale: Factor on the learning rate while the plan is in force.

    Raises:
        TypeError, ValueError: If a shape, dtype or value is wrong. `check(n)` tests range and
            uniqueness.
    """

    indices: Tensor
    weights: Tensor | None = None
    lr_scale: float = 1.0

    def __post_init__(self) -> None:
        if self.indices.dtype != torch.int64 or self.indices.ndim != 1:
            raise TypeError(
                f"The indices of a plan are a {self.indices.dtype} tensor of shape "
                f"{tuple(self.indices.shape)}: expected int64 of shape (K,)."
            )
        if len(self.indices) == 0:
            raise ValueError("A plan keeps 0 samples: it must keep at least 1.")
        if self.weights is not None:
            if self.weights.shape != self.indices.shape or self.weights.dtype != torch.float32:
                raise ValueError(
                    f"The weights of a plan are {self.weights.dtype} of shape "
                    f"{tuple(self.weights.shape)}: expected float32 of shape "
                    f"{tuple(self.indices.shape)}, one for each index."
                )
            if not bool(((self.weights > 0) & (self.weights < math.inf)).all()):
                raise ValueError(
                    "The weights of a plan must be finite and positive. Leave a sample out of the "
                    "indices to drop it."
                )
        if not (math.isfinite(self.lr_scale) and self.lr_scale > 0):
            raise ValueError(f"lr_scale={self.lr_scale} of a plan must be finite and positive.")

    def __len__(self) -> int:
        return len(self.indices)

    def check(self, n: int) -> None:
        """Raise ValueError unless the indices are unique and lie in [0, n).

        Cost: O(K) and n bytes.
        """
        low, high = int(self.indices.min()), int(self.indices.max())
        if low < 0 or high >= n:
            wrong = low if low < 0 else high
            raise ValueError(f"A plan holds the index {wrong}; the training set has {n} samples.")
        if bool((self.indices[1:] > self.indices[:-1]).all()):  # ascending, as most policies do
            return
        unique = int(torch.count_nonzero(mask_of(self.indices, n)))
        if unique != len(self):
            raise ValueError(
                f"A plan of {len(self)} indices holds only {unique} different ones; each may occur "
                "once."
            )


@dataclass(frozen=True, eq=False)
class Choice:
    """What a policy knows when it chooses.

    Attributes:
        table: What is known of the samples.
        epoch: The epoch that begins, counted from 0.
        progress: Share of the run's budget that is spent, in [0, 1].
        generator: The only source of randomness.
        shape: The length, batch and budget of the run.
        size: How many samples the policy planned to keep (`planned_size`); N if that depends on
            the data.
        scores: (N,) float32 for a [`ScoredPolicy`], else None; read `score`.
    """

    table: SampleTable
    epoch: int
    progress: float
    generator: torch.Generator
    shape: RunShape
    size: int
    scores: Tensor | None = None

    @property
    def n(self) -> int:
        """N, the number of samples."""
        return len(self.table)

    @property
    def score(self) -> Tensor:
        """(N,) float32, higher is kept first: what `ScoredPolicy.score` returned, with guards.

        +inf for samples never observed, -inf for samples that gave no finite observation or that a
        guard bars. Never NaN.
        """
        if self.scores is None:
            raise RuntimeError("The policy has no scores: derive it from ScoredPolicy to get some.")
        return self.scores


@dataclass(frozen=True)
class PruningPolicy(ABC):
    """A rule that says which samples are trained on.

    A subclass is a frozen dataclass. Its fields are its settings: they are saved, printed, compared
    on resume and shown on the model card. It has a `name` and implements `plan`. If it looks at the
    samples it has a `memory`, and derives from [`ScoredPolicy`] if it orders them by a score.

    The fields below belong to every policy. [`DynamicPruner`] applies them; no policy reads them.

    Args:
        period: Epochs between two choices (the paper's T_p). The plan is held in between.
        first: Full-data epochs before the first choice.
        last: Share of the run, at its end, that trains on all data (annealing); in [0, 1].
        scoring: Which samples are scored. `"trained"`: every training loss is an observation, at no
            cost; the score of a dropped sample is from the epoch in which it was last trained.
            `"dropped"`: training losses for the kept samples, and forward passes before each choice
            for the rest. `"all"`: only forward passes over all samples before each choice. A
            forward pass counts as a third of a pass. Fresh scores are not better for that: stale
            scores are why the selected set keeps changing.
        scoring_mode: Mode of the model in these forward passes, `"eval"` or `"train"` (dropout, and
            BatchNorm by the batch). None means `"train"` with `scoring="dropped"`, so that all
            scores are of one kind, and `"eval"` with `"all"`.
        max_age: A sample not observed in the last `max_age` choices scores +inf, so that it is seen
            again.
        exclude_hardest: Share of the observed samples, those with the highest scores, that is kept
            last of all (a guard against wrong labels and outliers); in [0, 1). If `max_age` is set,
            it brings them back from time to time.
        exclude_ramp: (begin, end), shares of the run between which the excluded share rises from 0
            to `exclude_hardest`; 0 <= begin < end <= 1. None excludes the same share at each
            choice.
        max_weight: Upper limit on the weights of a plan.
        min_per_class: Samples of each class that every plan holds at least (or all that the class
            has), in place of the lowest scores of other classes; 0 means no floor. For single-label
            classification. The label of a sample is known from its first observation on.
    """

    period: int = field(default=1, kw_only=True)
    first: int = field(default=0, kw_only=True)
    last: float = field(default=0.0, kw_only=True)
    scoring: Literal["trained", "all", "dropped"] = field(default="trained", kw_only=True)
    scoring_mode: Literal["eval", "train"] | None = field(default=None, kw_only=True)
    max_age: int | None = field(default=None, kw_only=True)
    exclude_hardest: float = field(default=0.0, kw_only=True)
    exclude_ramp: tuple[float, float] | None = field(default=None, kw_only=True)
    max_weight: float | None = field(default=None, kw_only=True)
    min_per_class: int = field(default=0, kw_only=True)

    # The published name. A class without one is called by the name of the class.
    name: ClassVar[str] = ""
    # Whether its plans may hold weights.
    weighs: ClassVar[bool] = False
    # Whether the first choice holds for the whole run.
    static: ClassVar[bool] = False
    # Settings of the authors' own runs that differ from the defaults.
    paper_settings: ClassVar[Mapping[str, Any]] = {}
    # Fields that `str` shows even at their defaults.
    always_shown: ClassVar[tuple[str, ...]] = ()

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "name" not in vars(cls):
            cls.name = cls.__name__

    def __post_init__(self) -> None:
        for entry in fields(self):  # NumPy's numbers would not go into JSON
            value = getattr(self, entry.name)
            if isinstance(value, numbers.Number) and hasattr(value, "item"):
                object.__setattr__(self, entry.name, value.item())
        check_count("period", self.period, 1)
        check_count("first", self.first, 0)
        check_share("last", self.last)
        check_choice("scoring", self.scoring, ("trained", "all", "dropped"))
        if self.scoring_mode is not None:
            check_choice("scoring_mode", self.scoring_mode, ("eval", "train"))
        if self.scoring != "trained" and not self.signals:
            raise ValueError(
                f"scoring={self.scoring!r} scores samples, and {type(self).__name__} uses no "
                "scores."
            )
        if self.max_age is not None:
            check_count("max_age", self.max_age, 1)
        check_number("exclude_hardest", self.exclude_hardest, "a share in [0, 1)", _below_1)
        if self.exclude_ramp is not None:  # JSON has lists
            object.__setattr__(self, "exclude_ramp", _checked_ramp(self.exclude_ramp))
            if not self.exclude_hardest:
                raise ValueError(
                    f"exclude_ramp={self.exclude_ramp} with exclude_hardest=0 excludes nothing: "
                    "set the share to which it rises, such as exclude_hardest=0.2."
                )
        if self.max_weight is not None:
            check_number("max_weight", self.max_weight, "a positive number", lambda w: w > 0)
        check_count("min_per_class", self.min_per_class, 0)
        for guard in ("max_age", "exclude_hardest"):
            if getattr(self, guard) and not self.has_scores:
                raise ValueError(
                    f"{guard}={getattr(self, guard)} acts on scores, and {type(self).__name__} has "
                    "none."
                )

    # ---- what an author writes ----

    @property
    def memory(self) -> Memory:
        """What is remembered of each sample; nothing by default."""
        return Memories()

    @abstractmethod
    def plan(self, choice: Choice) -> EpochPlan:
        """Choose. Pure, except for what it draws from `choice.generator`."""

    def planned_size(self, n: int, epoch: int, progress: float) -> int | None:
        """How many samples of n a choice will keep; None if that depends on the data."""
        return None

    def expected_share(self, n: int) -> tuple[float, float]:
        """The least and the most, as shares of n samples, that a choice is expected to keep.

        Only asked if `planned_size` is None: then it is an assumption, and its source belongs in
        the docstring. By default from one sample to all.
        """
        return 1 / n, 1.0

    def check_dataset(self, n: int, fingerprint: str) -> None:  # noqa: B027  # most fit any dataset
        """Raise ValueError if the policy does not fit the dataset. Called when a pruner is made."""

    def preparation(self) -> dict[str, Any]:
        """What was spent before the run, for the report; empty if nothing was."""
        return {}

    # ---- what follows ----

    @property
    def signals(self) -> tuple[str, ...]:
        """What the memory observes of each sample."""
        return self.memory.signals

    @property
    def needs_loss(self) -> bool:
        """Whether it needs the loss of single samples: to observe them or to weigh them."""
        return bool(self.signals) or self.weighs or self.min_per_class > 0

    @property
    def has_scores(self) -> bool:
        """Whether a choice has scores: always for a [`ScoredPolicy`], unless it says otherwise."""
        return False

    @property
    def mode_of_scoring(self) -> Literal["eval", "train"]:
        """The mode of the model in scoring passes; see `scoring_mode`."""
        if self.scoring_mode is not None:
            return self.scoring_mode
        return "train" if self.scoring == "dropped" else "eval"

    def looks_once(self, shape: RunShape, num_epochs: int) -> bool:
        """Whether a policy that chooses by scores has none to choose by in a run of that length."""
        return False

    def settings(self) -> dict[str, Any]:
        """The fields, by name."""
        return {entry.name: getattr(self, entry.name) for entry in fields(self)}

    @property
    def given(self) -> dict[str, Any]:
        """The fields that are not at their defaults, and those that are always shown."""
        defaults = {entry.name: entry.default for entry in fields(self)}
        return {
            name: value
            for name, value in self.settings().items()
            if name in self.always_shown or value != defaults[name]
        }

    def __str__(self) -> str:
        """As one writes it, such as `UCB(keep_ratio=0.3)`."""
        shown = ", ".join(f"{name}={value!r}" for name, value in self.given.items())
        return f"{type(self).__name__}({shown})"

    def to_dict(self) -> dict[str, Any]:
        """`name` and all fields, as JSON has them (a tuple becomes a list)."""
        return json.loads(json.dumps({"name": self.name, **self.settings()}))

    @classmethod
    def paper_like(cls, **settings: Any) -> Self:
        """The policy with the settings of the authors' runs; the class says where they differ."""
        return cls(**{**cls.paper_settings, **settings})


class ScoredPolicy(PruningPolicy):
    """A policy that orders the samples by a score, computed from its memory."""

    @abstractmethod
    def score(self, table: SampleTable) -> Tensor:
        """(N,) float, higher is kept first.

        The score of a sample never observed does not matter: it becomes +inf. NaN (nothing finite
        was ever observed) becomes -inf.
        """

    @property
    def has_scores(self) -> bool:
        """True. A policy that needs scores with some settings only overrides it."""
        return True

    def looks_once(self, shape: RunShape, num_epochs: int) -> bool:
        """Whether each choice would be a first look, so that scores decide next to nothing.

            choices * K <= N,    choices = ceil(num_epochs / period)

        Never observed samples come first, so such a run chooses as [`RandomPruning`] without
        replacement does. Not so if forward passes score what was not trained, nor after full-data
        epochs.
        """
        size = self.planned_size(shape.samples, 0, 0.0)
        if size is None or self.scoring != "trained" or self.first > 0:
            return False
        return math.ceil(num_epochs / self.period) * size <= shape.samples


@dataclass(frozen=True)
class KeepsShare(PruningPolicy):
    """A policy whose choices keep K = round(keep_ratio * N) samples.

    Args:
        keep_ratio: Share of the samples trained in an epoch, in (0, 1].
    """

    keep_ratio: float = 0.5

    always_shown: ClassVar[tuple[str, ...]] = ("keep_ratio",)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_keep_ratio(self.keep_ratio)

    def planned_size(self, n: int, epoch: int, progress: float) -> int | None:
        return keep_count(self.keep_ratio, n)


def check_keep_ratio(value: Any) -> None:
    """Raise TypeError or ValueError unless `keep_ratio` is a number in (0, 1]."""
    expected = "the share of the data to train on in an epoch, in (0, 1], such as 0.3 for 30 %"
    check_number("keep_ratio", value, expected, lambda ratio: 0 < ratio <= 1)


def _below_1(share: float) -> bool:
    return 0 <= share < 1


def _checked_ramp(value: Any) -> tuple[float, float]:
    """(begin, end) of `exclude_ramp`. TypeError or ValueError unless 0 <= begin < end <= 1."""
    expected = "two shares of the run, (begin, end) with 0 <= begin < end <= 1, such as (0.2, 0.6)"
    if not isinstance(value, tuple | list) or len(value) != 2:
        raise TypeError(f"exclude_ramp={value!r}: expected {expected}.")
    for share in value:
        if isinstance(share, bool) or not isinstance(share, numbers.Real):
            raise TypeError(f"exclude_ramp={value!r}: expected {expected}.")
    begin, end = map(float, value)
    if not 0 <= begin < end <= 1:
        raise ValueError(f"exclude_ramp={value!r} is out of range: expected {expected}.")
    return begin, end


def usable(score: Tensor) -> Tensor:
    """Which samples may be drawn: those with a finite loss that no guard bars. (N,) bool."""
    return score > -math.inf
