"""How long a run is: its epochs, its steps and its clock. Pure functions of policy and run shape.

    RunShape ──planned_epochs(policy)──▶ PlannedEpoch, PlannedEpoch, ...   what is known beforehand
        └─────epoch_costs(policy)──────▶ EpochCost, EpochCost, ...         steps, samples, scored
        └─────Clock.of(policy)─────────▶ Clock                             where a schedule stands

The pruner, the trainer, the advice and the comparison tool all ask this module.
"""

import math
from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple, Protocol

from .checks import check_count, check_flag, check_number


@dataclass(frozen=True)
class Epochs:
    """A budget in epochs, may be fractional."""

    count: float

    def progress(self, epoch: int, step: int) -> float:
        """Share of the budget that is spent when `epoch` epochs and `step` steps are done."""
        return epoch / self.count

    def is_spent(self, epoch: int, step: int) -> bool:
        return epoch >= self.count


@dataclass(frozen=True)
class Steps:
    """A budget in optimizer steps: training continues until it is spent."""

    count: int

    def progress(self, epoch: int, step: int) -> float:
        """Share of the budget that is spent when `epoch` epochs and `step` steps are done."""
        return step / self.count

    def is_spent(self, epoch: int, step: int) -> bool:
        return step >= self.count


@dataclass(frozen=True)
class RunShape:
    """What the length of a run follows from, besides its policy.

    Args:
        samples: N, the number of samples in the training set.
        batch_size: Samples in a batch of one rank.
        num_epochs: Epochs of the run, may be fractional. Give this or `max_steps`.
        max_steps: Optimizer steps of the run. Training continues until they are spent.
        accumulation: Batches of a rank in one optimizer step.
        drop_last: Whether an epoch leaves out the tail that does not fill a batch of all ranks.
        ranks: Processes that train together.

    Raises:
        TypeError, ValueError: If a value has the wrong type or is out of range, or if not exactly
            one of `num_epochs` and `max_steps` is given.
    """

    samples: int
    batch_size: int = 1
    num_epochs: float | None = field(default=None, kw_only=True)
    max_steps: int | None = field(default=None, kw_only=True)
    accumulation: int = field(default=1, kw_only=True)
    drop_last: bool = field(default=False, kw_only=True)
    ranks: int = field(default=1, kw_only=True)

    def __post_init__(self) -> None:
        for name in ("samples", "batch_size", "accumulation", "ranks"):
            check_count(name, getattr(self, name), 1)
        check_flag("drop_last", self.drop_last)
        if (self.num_epochs is None) == (self.max_steps is None):
            raise ValueError(
                f"num_epochs={self.num_epochs} and max_steps={self.max_steps}: give one of the two."
            )
        if self.num_epochs is not None:
            check_number(
                "num_epochs", self.num_epochs, "a positive number", lambda value: value > 0
            )
        if self.max_steps is not None:
            check_count("max_steps", self.max_steps, 1)

    @cached_property
    def budget(self) -> Epochs | Steps:
        """`num_epochs` or `max_steps`, whichever was given."""
        if self.max_steps is not None:
            return Steps(self.max_steps)
        assert self.num_epochs is not None  # checked above
        return Epochs(self.num_epochs)

    @property
    def global_batch(self) -> int:
        """Samples in a batch of all ranks together."""
        return self.batch_size * self.ranks

    def batches(self, size: int) -> int:
        """Batches that a rank trains in an epoch of `size` samples."""
        whole, tail = divmod(size, self.global_batch)
        return whole + (tail > 0 and not self.drop_last)

    def steps(self, size: int) -> int:
        """Optimizer steps in an epoch of `size` samples. The last may accumulate fewer batches."""
        return -(-self.batches(size) // self.accumulation)

    def check_size(self, epoch: int, size: int) -> None:
        """Raise ValueError if an epoch of `size` samples would train on nothing."""
        if self.batches(size) == 0:
            raise ValueError(
                f"Epoch {epoch} keeps {size} of {self.samples} samples, less than one batch of "
                f"{self.global_batch} on all ranks together, and drop_last leaves that out: raise "
                "keep_ratio, lower the batch size, or set dataloader_drop_last=False."
            )


class Scheduled(Protocol):
    """What a schedule asks of a policy; see [`PruningPolicy`]."""

    @property
    def period(self) -> int: ...
    @property
    def first(self) -> int: ...
    @property
    def last(self) -> float: ...
    @property
    def scoring(self) -> str: ...
    @property
    def static(self) -> bool: ...
    def planned_size(self, n: int, epoch: int, progress: float) -> int | None: ...


def is_full_data(policy: Scheduled, epoch: int, progress: float) -> bool:
    """Whether an epoch trains on all data because of the policy's `first` or `last`."""
    # A limit such as 90 * 0.875 is not a whole epoch: compare with a tolerance, never for equality.
    return epoch < policy.first or (policy.last > 0 and progress >= 1 - policy.last - 1e-9)


def is_choice(policy: Scheduled, epoch: int, has_plan: bool) -> bool:
    """Whether the policy chooses when an epoch begins that does not train on all data.

    The first choice is made as soon as a plan is needed. Static pruning makes no other.
    """
    due = (epoch - policy.first) % policy.period == 0
    return not has_plan or (due and not policy.static)


class PlannedEpoch(NamedTuple):
    """What is known of an epoch before the run."""

    size: int | None  # samples that it trains on; None if that depends on the data
    full_data: bool  # whether it trains on everything because of `first` or `last`
    chooses: bool  # whether a choice is made when it begins


def planned_epochs(
    policy: Scheduled, shape: RunShape, *, share: float | None = None
) -> Iterator[PlannedEpoch]:
    """Yield the epochs of a run, as far as they are known beforehand, until the budget is spent.

    Args:
        policy: Gives the sizes.
        shape: Gives the budget.
        share: The share of the data that a choice is assumed to keep if its size depends on the
            data. *Optional*: by default such a size is None, and counts as one optimizer step of
            a budget in steps.

    Raises:
        ValueError: If `drop_last` is set and an epoch would not fill one batch.
    """
    n = shape.samples
    held: int | None = None
    epoch, spent, has_plan = 0, 0, False
    while not shape.budget.is_spent(epoch, spent):
        progress = shape.budget.progress(epoch, spent)
        full = is_full_data(policy, epoch, progress)
        chooses = not full and is_choice(policy, epoch, has_plan)
        if chooses:
            held, has_plan = policy.planned_size(n, epoch, progress), True
            if held is None and share is not None:
                held = max(1, round(share * n))
        size = n if full else held
        if size is not None:
            shape.check_size(epoch, size)
        yield PlannedEpoch(size, full, chooses)
        epoch, spent = epoch + 1, spent + (1 if size is None else shape.steps(size))


class EpochCost(NamedTuple):
    """What an epoch will train and score."""

    steps: int  # optimizer steps, fewer than a whole epoch's if the budget ends in it
    samples: float  # samples that go forward and backward
    scored: int  # samples that only go forward, before the choice


def epoch_costs(
    policy: Scheduled, shape: RunShape, *, share: float | None = None
) -> Iterator[EpochCost]:
    """Yield what each epoch of a run will train and score. Arguments as in [`planned_epochs`].

    Raises:
        ValueError: If the size of a choice depends on the data and no `share` is given, and as
            [`planned_epochs`] does.
    """
    n, held, spent = shape.samples, None, 0
    for epoch, planned in enumerate(planned_epochs(policy, shape, share=share)):
        if planned.size is None:
            raise ValueError(
                f"The size of epoch {epoch} under {policy} depends on the data: give `share`, the "
                "share of the data that a choice is assumed to keep (`policy.expected_share`)."
            )
        length = shape.steps(planned.size)
        if isinstance(shape.budget, Steps):
            steps = min(length, shape.budget.count - spent)
        else:
            steps = math.ceil(round(length * min(1.0, shape.budget.count - epoch), 9))
        scored = 0
        if planned.chooses:
            dropped = 0 if held is None else n - held
            scored = {"trained": 0, "all": n, "dropped": dropped}[policy.scoring]
            held = planned.size
        spent += steps
        yield EpochCost(steps, planned.size * steps / length, scored)


@dataclass
class Clock:
    """Maps optimizer steps to virtual steps, at which a learning-rate schedule is evaluated.

        with max_steps       v = step
        in the last epoch    v = F e + (T - F e) k / K
        else                 v = F e + F k / L

    e epochs done, k steps done of this epoch's L, F the mean planned steps of an epoch,
    T = ceil(F * num_epochs), K the steps that are trained of the last epoch (L if it is whole). A
    schedule of T steps so ends when the run does, whatever the lengths of its epochs. For epochs of
    constant length v counts the steps exactly.

    Attributes:
        budget: Of the run.
        planned: Optimizer steps planned for each epoch; those of all data if a size is unknown.
        epoch, start, length: The running epoch, the step at which it began, its steps.
        is_exact: Whether the number of steps of the run is known before it. It is not if the size
            of a choice depends on the data and the budget is in epochs.
    """

    budget: Epochs | Steps
    planned: tuple[int, ...]
    epoch: int = 0
    start: int = 0
    length: int = 1
    is_exact: bool = True

    @classmethod
    def of(cls, policy: Scheduled, shape: RunShape) -> "Clock":
        """The clock of a run before its first epoch."""
        sizes = [planned.size for planned in planned_epochs(policy, shape)]
        steps = tuple(shape.steps(shape.samples if size is None else size) for size in sizes)
        if isinstance(shape.budget, Steps):
            return cls(shape.budget, steps)
        return cls(shape.budget, steps, length=steps[0], is_exact=None not in sizes)

    @property
    def num_epochs(self) -> int:
        """Epochs that the run begins, as planned."""
        return len(self.planned)

    @cached_property
    def mean(self) -> float | None:
        """F; an int if all epochs are planned alike, so that v is exact; None with `max_steps`."""
        if isinstance(self.budget, Steps):
            return None
        total, epochs = sum(self.planned), len(self.planned)
        return total // epochs if total % epochs == 0 else total / epochs

    @cached_property
    def total(self) -> int:
        """T, or `max_steps`: the length of the schedule."""
        if isinstance(self.budget, Steps):
            return self.budget.count
        assert self.mean is not None  # only a budget in steps has none
        return math.ceil(round(self.mean * self.budget.count, 9))

    def begin_epoch(self, epoch: int, start: int, length: int) -> None:
        """Say that `epoch`, of `length` optimizer steps, begins at step `start`."""
        self.epoch, self.start, self.length = epoch, start, length

    def virtual(self, step: int) -> float:
        """The virtual step of `step`, counted from the run's start; an int for constant lengths."""
        if self.mean is None:
            return step
        # An epoch of `steps` steps covers `span` virtual ones. The last epoch covers what is left
        # of the schedule, so that it ends with the run also if `num_epochs` is fractional.
        begun, steps, span = self.mean * self.epoch, self.length, self.mean
        if self.epoch >= self.num_epochs - 1:
            steps, span = self._last_steps(self.length), self.total - begun
        done = step - self.start
        return min(begun + (done if steps == span else span * done / steps), self.total)

    def next_step(self, step: int, share: float) -> int:
        """The first step after `step` at which a multiple of `share` of the schedule is done.

        Args:
            step: Of the running epoch.
            share: In (0, 1].

        Returns:
            A step of the running epoch; the one after its last if it reaches no such multiple.
        """
        part = share * self.total
        # Virtual steps are fractions: compare with a tolerance, never for equality.
        target = (math.floor(self.virtual(step) / part + 1e-9) + 1) * part - 1e-9
        ahead = range(step + 1, self.start + self.length + 1)
        return step + 1 + bisect_left(ahead, target, key=self.virtual)

    def _last_steps(self, length: int) -> int:
        """Steps of the last epoch that are trained, of the `length` that it would have whole."""
        share = self.budget.count - (self.num_epochs - 1)
        return math.ceil(round(length * share, 9))

    def total_steps(self) -> int:
        """Optimizer steps of the whole run, as known when the running epoch began.

        Exact if the policy knows its sizes beforehand. Otherwise later epochs are assumed to train
        on everything.
        """
        if isinstance(self.budget, Steps):
            return self.budget.count
        if self.epoch >= self.num_epochs:
            return self.start
        *whole, last = [self.length, *self.planned[self.epoch + 1 :]]
        return self.start + sum(whole) + self._last_steps(last)
