"""DynamicPruner, the front door of the core: which samples, with which weights, at which learning rate, at what cost.

It needs torch alone. [`DynamicPruningTrainer`] drives it inside the Trainer; in a loop of your own:

```python
pruner = DynamicPruner(UCB(keep_ratio=0.3), len(dataset), batch_size=128, num_epochs=20)
loader = pruner.dataloader(dataset)                       # batches carry "sample_index"
for epoch in range(pruner.num_epochs):
    pruner.begin_epoch(epoch)                             # chooses; the loader follows
    for batch in loader:
        index = batch.pop("sample_index")
        losses = F.cross_entropy(model(batch["x"]), batch["y"], reduction="none")
        (losses * pruner.weights(index)).mean().backward()
        pruner.observe(index, {"loss": losses})
        optimizer.step()
pruner.end_epoch()                                        # the last epoch's observations
```
"""

import copy
import hashlib
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, default_collate

from . import distributed
from .policies import (
    EpochPlan,
    PruningPolicy,
    check_count,
    check_number,
    indices_of,
    mask_of,
    with_class_floor,
)
from .report import (
    FORMAT_VERSION,
    EpochRecord,
    PruningReport,
    chance_of,
    describe_environment,
    selection_of,
)
from .sampler import IndexedCollator, IndexedDataset, PruningSampler, epoch_order
from .scores import Column, Rows, SampleTable, load_tensors, save_tensors

STATE_FILE = "pruning_state.safetensors"

# What a floor for each class needs to know.
LABEL = Column("label")

# Scores are described by so many of them, at the least: so far a quantile is off by a thousandth of the samples.
_DESCRIBED = 1 << 17

# Observations wait on their device; beyond this many they move to the host even if no logging step comes by.
_BUFFERED = 1 << 16


def choice_seed(seed: int, epoch: int, purpose: str = "plan") -> int:
    """A 63-bit seed of the choice in an epoch; seed 0 epoch 1 is not seed 1 epoch 0."""
    return (
        int.from_bytes(
            hashlib.blake2b(f"{seed}/{epoch}/{purpose}".encode(), digest_size=8).digest(), "big"
        )
        >> 1
    )


@dataclass
class Clock:
    """Maps optimizer steps to virtual steps, at which a schedule is evaluated so that it follows the budget.

        with max_steps       v = step
        else                 v = F e + (k if L == F else F k / L), at the most T

    e epochs done, k steps done of this epoch's L, F the mean planned steps of an epoch, T = ceil(F * num_epochs).

    Attributes:
        total: T, or max_steps: the length of the schedule.
        mean: F; an int where all epochs are planned alike, so that v is exact; None with max_steps.
    """

    total: int
    mean: float | None
    epoch: int = 0
    start: int = 0
    length: int = 1

    def begin_epoch(self, epoch: int, start: int, length: int) -> None:
        self.epoch, self.start, self.length = epoch, start, length

    def virtual(self, step: int) -> float:
        """The virtual step of `step`, counted from the start of the run; an int where lengths are constant."""
        if self.mean is None:
            return step
        done = step - self.start
        v = self.mean * self.epoch + (
            done if self.length == self.mean else self.mean * done / self.length
        )
        return min(v, self.total)


class PlannedEpoch(NamedTuple):
    """What is known of an epoch before the run: `size`, the samples it trains on, None where that depends on the data;
    `full_data`, whether it trains on everything by `first` or `last`; `chooses`, whether a choice is made when it begins."""

    size: int | None
    full_data: bool
    chooses: bool


class DynamicPruner:
    """Chooses the samples of each epoch, collects what was observed of them, keeps time, counts the cost.

    Args:
        policy: the rule.
        num_samples: N, the number of samples in the training set.
        batch_size: samples in a batch of one rank.
        num_epochs: epochs of the run, may be fractional; or
        max_steps: its optimizer steps, a budget: training goes on until it is spent.
        accumulation: batches of a rank in one optimizer step.
        drop_last: whether the tail of an epoch that does not fill a batch of all ranks is left out.
        seed: of the choices.
        data_seed: of the order, *optional*, defaults to `seed`.
        fingerprint: identifies the dataset; a checkpoint of another one is refused.

    Raises:
        TypeError, ValueError: for what is out of range, and where with `drop_last` a plan does not fill one batch.

    On several ranks (torch.distributed is initialised before the pruner is made) all ranks make the same calls;
    `begin_epoch`, `flush`, `save` are collective.
    """

    def __init__(
        self,
        policy: PruningPolicy,
        num_samples: int,
        *,
        batch_size: int = 1,
        num_epochs: float | None = None,
        max_steps: int | None = None,
        accumulation: int = 1,
        drop_last: bool = False,
        seed: int = 0,
        data_seed: int | None = None,
        fingerprint: str = "",
    ) -> None:
        if not isinstance(policy, PruningPolicy):
            raise TypeError(
                f"policy={policy!r} is no PruningPolicy: make one, such as UCB(keep_ratio=0.3), or by name with "
                "make_policy('ucb', keep_ratio=0.3)."
            )
        if (num_epochs is None) == (max_steps is None):
            raise ValueError(
                f"num_epochs={num_epochs} and max_steps={max_steps}: give one of the two."
            )
        if num_epochs is not None:
            check_number("num_epochs", num_epochs, "a positive number", lambda value: value > 0)
        for name, count in (
            ("batch_size", batch_size),
            ("accumulation", accumulation),
            ("max_steps", max_steps),
        ):
            if count is not None:
                check_count(name, count, 1)
        self.policy = policy
        self.table = SampleTable(
            num_samples, (*policy.columns, *([LABEL] if policy.min_per_class else []))
        )
        self.rank, self.ranks = distributed.world()
        self.batch_size, self.accumulation, self.drop_last = batch_size, accumulation, drop_last
        self.max_steps, self._epochs = max_steps, num_epochs
        self.seed, self.data_seed = seed, seed if data_seed is None else data_seed
        self.fingerprint = fingerprint or f"{num_samples} samples"
        self.sampler = PruningSampler(
            num_samples, batch_size * self.ranks, ranks=self.ranks, drop_last=drop_last
        )
        self.report = PruningReport(
            policy.to_dict(),
            num_samples,
            self.seed,
            self.data_seed,
            environment=describe_environment(ranks=self.ranks),
        )
        policy.check_dataset(num_samples, self.fingerprint)
        self.report.preparation = policy.preparation()
        # The plan of the last choice, held meanwhile where an epoch trains on all data.
        self._plan: EpochPlan | None = None
        self._full_data = True
        self._sizes: list[int] = []  # what each choice kept
        self._chance = chance_of(())
        self._weights: Tensor | None = None
        self._buffer: list[tuple[Tensor, dict[str, Tensor]]] = []
        self._buffered = 0
        self._drained: list[tuple[Tensor, dict[str, Tensor]]] = []
        self._mark: float | None = None  # when the phase that is being timed began
        self._batches_done = 0  # of the running epoch, on this rank
        self._resumed_in: int | None = None  # the epoch in whose middle the run was resumed
        self._agreed = False  # whether the ranks compared what they were told
        self.clock = self._make_clock()

    # ---- sizes -----------------------------------------------------------------------------------

    @property
    def global_batch(self) -> int:
        """Samples in a batch of all ranks together."""
        return self.batch_size * self.ranks

    def batches(self, size: int) -> int:
        """Batches that a rank trains in an epoch of `size` samples."""
        whole, tail = divmod(size, self.global_batch)
        return whole + (tail > 0 and not self.drop_last)

    def steps(self, size: int) -> int:
        """Optimizer steps in an epoch of `size` samples; the last may accumulate fewer batches."""
        return -(-self.batches(size) // self.accumulation)

    def _is_full(self, epoch: int, progress: float) -> bool:
        # A limit such as 90 * 0.875 is no whole epoch: compare with a tolerance, never for equality.
        last = self.policy.last
        return epoch < self.policy.first or (last > 0 and progress >= 1 - last - 1e-9)

    def _is_choice(self, epoch: int) -> bool:
        # The first choice is made where there is no plan yet; static pruning makes no other.
        return not self.policy.static and (epoch - self.policy.first) % self.policy.period == 0

    def schedule(self) -> Iterator[PlannedEpoch]:
        """The epochs of the run in turn, as far as they are known beforehand, until the budget is spent.

        Raises:
            ValueError: at an epoch that is less than one batch, with `drop_last`.
        """
        held: int | None = None
        epoch, spent, has_plan = 0, 0, False
        while epoch < self._epochs if self._epochs is not None else spent < self.max_steps:  # type: ignore[operator]
            progress = epoch / self._epochs if self._epochs is not None else spent / self.max_steps  # type: ignore
            full = self._is_full(epoch, progress)
            chooses = not full and (not has_plan or self._is_choice(epoch))
            if chooses:
                held, has_plan = self.policy.planned_size(len(self.table), epoch, progress), True
            size = len(self.table) if full else held
            if size is not None and self.batches(size) == 0:
                raise ValueError(
                    f"Epoch {epoch} keeps {size} of {len(self.table)} samples, less than one batch of "
                    f"{self.global_batch} on all ranks together, and drop_last leaves that out: raise keep_ratio, lower "
                    "the batch size, or set dataloader_drop_last=False."
                )
            yield PlannedEpoch(size, full, chooses)
            epoch, spent = epoch + 1, spent + (self.steps(size) if size is not None else 1)

    def _make_clock(self) -> Clock:
        if self.max_steps is not None:
            self.num_epochs = sum(1 for _ in self.schedule())
            return Clock(self.max_steps, None)
        self._steps = steps = [
            self.steps(len(self.table) if size is None else size) for size, *_ in self.schedule()
        ]
        self.num_epochs = len(steps)
        mean = sum(steps) // len(steps) if sum(steps) % len(steps) == 0 else sum(steps) / len(steps)
        return Clock(math.ceil(round(mean * self._epochs, 9)), mean, length=steps[0])  # type: ignore[operator]

    def total_steps(self) -> int:
        """Optimizer steps of the whole run, as known when the running epoch began.

        Exact where the policy knows its sizes beforehand; else later epochs are taken to train on everything.
        """
        if self.max_steps is not None:
            return self.max_steps
        if self.clock.epoch >= self.num_epochs:
            return self.clock.start
        *whole, last = [self.clock.length, *self._steps[self.clock.epoch + 1 :]]
        share = self._epochs - (self.num_epochs - 1)  # type: ignore[operator]  # of the last epoch
        return self.clock.start + sum(whole) + math.ceil(round(last * share, 9))

    # ---- data ------------------------------------------------------------------------------------

    def dataloader(
        self, dataset: Any, collate_fn: Callable[[Any], Any] | None = None, **options: Any
    ) -> DataLoader:
        """A DataLoader over the samples that the pruner chooses, for one rank or for `accelerator.prepare`.

        Args:
            dataset: map-style, of `num_samples` samples.
            collate_fn: must return a dict, to which `sample_index` (B,) int64 is added.
            options: passed to the DataLoader.
        """
        if len(dataset) != len(self.table):
            raise ValueError(
                f"The dataset has {len(dataset)} samples, the pruner was made for {len(self.table)}."
            )
        return DataLoader(
            IndexedDataset(dataset),
            batch_size=self.batch_size,
            sampler=self.sampler,
            drop_last=self.drop_last,
            collate_fn=IndexedCollator(collate_fn or default_collate),  # type: ignore[arg-type]  # not a list: `_Indexed`
            **options,
        )

    # ---- an epoch --------------------------------------------------------------------------------

    def begin_epoch(
        self,
        epoch: int,
        *,
        step: int | None = None,
        scorer: Callable[[Tensor], Mapping[str, Tensor]] | None = None,
    ) -> EpochRecord:
        """Applies what was observed, chooses where a choice is due, and sets the sampler.

        Args:
            epoch: counted from 0.
            step: optimizer steps done so far, *optional*, defaults to those that the calls of `observe` tell of.
            scorer: samples (M,) int64 -> the policy's signals of them, (M,) each, by forward passes without training; each
                rank's is called with its share. Needed for policies with a `scoring` other than `"trained"`.

        Returns:
            The record of the epoch; `record.samples` is the number of samples it trains on.

        Cost: O(N) a choice, on rank 0; and the forward passes, if there are any.
        """
        self.end_epoch()
        self._weights = None  # a choice needs the room
        self._mark = time.perf_counter()
        resumed = self._resumed_in == epoch
        step = self.clock.start if resumed else self._step() if step is None else step
        if not self._agreed:
            position = {
                "epoch": epoch,
                "optimizer steps": step,
                "batches of the epoch done": self._batches_done,
            }
            distributed.check_same({**self._identity(), **position})
            self._agreed = True
        if not resumed:
            progress = epoch / self._epochs if self._epochs is not None else step / self.max_steps  # type: ignore
            self._full_data = self._is_full(epoch, progress)
            record = EpochRecord(epoch, self._full_data, len(self.table))
            self.report.epochs.append(record)
            if not self._full_data and (self._plan is None or self._is_choice(epoch)):
                self._score(self._to_score(), scorer)
                self._plan, record.scores = self._choose(epoch, progress)
            record.samples = len(self.table) if self._in_force is None else len(self._in_force)
            self._batches_done = 0
        plan, size = self._in_force, self.report.epochs[-1].samples
        if self.batches(size) == 0:
            raise ValueError(
                f"Epoch {epoch} keeps {size} samples, less than one batch of {self.global_batch} on all ranks together, "
                "and drop_last leaves that out: lower the batch size, or set dataloader_drop_last=False."
            )
        self._resumed_in = None
        self._weights = _lookup(plan, len(self.table))
        self.sampler.set_epoch_order(
            epoch_order(
                len(self.table), None if plan is None else plan.indices, self.data_seed, epoch
            )
        )
        self.clock.begin_epoch(epoch, step, self.steps(size))
        self._lap("choosing")
        return self.report.epochs[-1]

    def _to_score(self) -> Tensor:
        """The samples that are scored by forward passes before a choice: all; or those that the last choice dropped. Before
        the first choice there are none of these: nothing was trained, or everything."""
        if self.policy.scoring == "all":
            return torch.arange(len(self.table))
        if self.policy.scoring == "dropped" and self._plan is not None:
            return indices_of(~mask_of(self._plan.indices, len(self.table)))
        return torch.empty(0, dtype=torch.int64)

    def _score(
        self, index: Tensor, scorer: Callable[[Tensor], Mapping[str, Tensor]] | None
    ) -> None:
        if len(index) == 0:
            return
        if scorer is None:
            raise ValueError(
                f"{self.policy.name} with scoring={self.policy.scoring!r} takes forward passes before a choice: pass "
                "begin_epoch(..., scorer=), a function samples -> signals, or set scoring='trained'."
            )
        share = index[self.rank :: self.ranks]
        self._lap("choosing")
        self._buffer.append((share, self._checked(share, scorer(share), self.scored_signals)))
        self.report.epochs[-1].scoring_passes += len(index)
        self._lap("scoring")
        self.flush()

    def _choose(self, epoch: int, progress: float) -> tuple[EpochPlan, dict[str, float]]:
        """One choice: the policy's plan, checked, agreed on by all ranks, and counted."""
        n, policy = len(self.table), self.policy
        score = policy.score(self.table)
        scores: dict[str, float] = {}
        if score is not None:
            score = score.to(torch.float32, copy=True)
            observed = self.table.observed
            scores = _describe(score, observed)
            score.nan_to_num_(nan=-math.inf, posinf=math.inf, neginf=-math.inf)
            if policy.exclude_hardest:
                # An observed sample that scores +inf is one that its policy keeps whatever its loss is.
                candidates = indices_of(observed & (score < math.inf))
                excluded = round(policy.exclude_hardest * len(candidates))
                if excluded:
                    score[candidates[torch.topk(score[candidates], excluded).indices]] = -math.inf
            if policy.max_age is not None:
                score[self.table["last_observed"] < epoch - policy.max_age * policy.period] = (
                    math.inf
                )
            score[~observed] = math.inf
        generator = torch.Generator().manual_seed(choice_seed(self.seed, epoch))

        def make() -> EpochPlan:
            plan = policy.plan(
                self.table, score=score, epoch=epoch, progress=progress, generator=generator
            )
            plan.check(n)
            planned = policy.planned_size(n, epoch, progress)
            if planned is not None and planned != len(plan):
                raise RuntimeError(
                    f"{policy.name} planned {planned} samples for epoch {epoch} and chose {len(plan)}: `planned_size` and "
                    "`plan` of the policy must agree."
                )
            if policy.min_per_class:
                plan = with_class_floor(
                    plan, self.table[LABEL.name], policy.min_per_class, score, generator
                )
            if plan.weights is not None and policy.max_weight is not None:
                return EpochPlan(
                    plan.indices, plan.weights.clamp(max=policy.max_weight), plan.lr_scale
                )
            return plan

        plan = distributed.plan_on_rank_0(make)
        self.table["times_kept"][plan.indices] += 1
        self._sizes.append(len(plan))
        self._chance = chance_of([len(plan) / n], self._chance)
        return plan, scores

    @property
    def _in_force(self) -> EpochPlan | None:
        """The plan that the running epoch trains on; None for all data."""
        return None if self._full_data else self._plan

    @property
    def lr_scale(self) -> float:
        """The factor on the learning rate that the plan in force asks for."""
        return 1.0 if self._in_force is None else self._in_force.lr_scale

    def weights(self, index: Tensor) -> Tensor:
        """Factors on the losses of the samples `index` (B,) int64: (B,) float32 on the device of `index`; 0 for padding."""
        if self._weights is None:
            return (index >= 0).to(torch.float32)
        if self._weights.device != index.device:
            self._weights = self._weights.to(index.device)
        return self._weights[index]  # -1, padding, is the last entry: 0

    def observe(self, index: Tensor, signals: Mapping[str, Tensor] | None = None) -> None:
        """Notes a trained batch: counts its passes and remembers its signals until the next `flush`.

        Args:
            index: (B,) int64, the `sample_index` of the batch, on any device; -1 is padding.
            signals: (B,) values of each of the policy's signals; others are ignored.

        Raises:
            ValueError: if a signal is missing or has another shape.

        Cost: no host synchronisation (but for one in 65,536 observations where no `drain` comes by), O(B).
        """
        if not self.report.epochs:
            raise RuntimeError("`observe` was called before `begin_epoch`: no epoch is running.")
        checked = self._checked(index, signals or {}, self.signals)
        self._batches_done += 1
        record = self.report.epochs[-1]
        record.forward_passes += len(index) * self.ranks
        record.backward_passes += len(index) * self.ranks
        if self.policy.scoring == "all":
            return
        self._buffer.append((index.detach(), checked))
        self._buffered += len(index)
        if self._buffered >= _BUFFERED:
            self.drain()

    @property
    def scored_signals(self) -> tuple[str, ...]:
        """The signals that are observed of a sample: the policy's, and the label where there is a floor for each class."""
        extra = (
            (LABEL.name,)
            if self.policy.min_per_class and LABEL.name not in self.policy.signals
            else ()
        )
        return self.policy.signals + extra

    @property
    def signals(self) -> tuple[str, ...]:
        """The signals that `observe` wants of a trained batch: none where only forward passes observe."""
        return () if self.policy.scoring == "all" else self.scored_signals

    def _update(self, rows: Rows, signals: Rows) -> Mapping[str, Tensor]:
        """The policy's columns, and the label."""
        changed = dict(self.policy.observe(rows, signals)) if self.policy.signals else {}
        if self.policy.min_per_class:
            changed[LABEL.name] = signals[LABEL.name]
        return changed

    def _checked(
        self, index: Tensor, signals: Mapping[str, Tensor], wanted: tuple[str, ...]
    ) -> dict[str, Tensor]:
        checked = {}
        for name in wanted:
            if name not in signals:
                raise ValueError(
                    f"{self.policy.name} observes {name!r}; given were {sorted(signals)}."
                )
            value = signals[name].detach()
            if value.shape != index.shape:
                raise ValueError(
                    f"The signal {name!r} has shape {tuple(value.shape)}, the sample index {tuple(index.shape)}: one value "
                    "for each sample is wanted."
                )
            checked[name] = value.to(torch.float32)
        return checked

    def drain(self) -> None:
        """Moves what was observed from its device to the host, padding left out."""
        if not self._buffer:
            return
        index = torch.cat([index for index, _ in self._buffer]).cpu()
        lowest, highest = (int(index.min()), int(index.max())) if len(index) else (0, 0)
        if not -1 <= lowest <= highest < len(self.table):
            raise ValueError(
                f"A sample index lies in [{lowest}, {highest}]; wanted is [0, {len(self.table)}), or -1 for padding."
            )
        signals = {
            name: torch.cat([signals[name] for _, signals in self._buffer]).cpu()
            for name in self.scored_signals
        }
        self._buffer, self._buffered = [], 0
        if lowest < 0:
            real = indices_of(index >= 0)
            index, signals = index[real], {name: values[real] for name, values in signals.items()}
        self._drained.append((index, signals))

    def flush(self) -> None:
        """Exchanges what all ranks observed and applies it to the table in one agreed order. Collective."""
        self._lap("training")
        self.drain()
        index = torch.cat(
            [index for index, _ in self._drained] or [torch.empty(0, dtype=torch.int64)]
        )
        signals: Rows = {
            name: torch.cat([signals[name] for _, signals in self._drained] or [torch.empty(0)])
            for name in self.scored_signals
        }
        self._drained = []
        index, signals = distributed.gather_observations(index, signals)
        if len(index) == 0:
            return
        record = self.report.epochs[-1]
        rejected = self.table.observe(index, signals, update=self._update, epoch=record.epoch)
        record.nonfinite += len(rejected)
        # The lowest indices, whatever the order in which they came: a run that was saved in between notes the same.
        noted = sorted({*self.report.nonfinite_samples, *rejected.tolist()})
        self.report.nonfinite_samples = noted[:100]
        self._lap("choosing")

    @property
    def batches_done(self) -> int:
        """Batches of the running epoch that this rank has trained: calls of `observe`."""
        return self._batches_done

    def _step(self) -> int:
        """Optimizer steps done, by the batches that were observed."""
        return self.clock.start + -(-self._batches_done // self.accumulation)

    def update_record(self, *, step: int | None = None, learning_rate: float | None = None) -> None:
        """Brings the record of the running epoch up to date: time so far, optimizer steps, learning rate."""
        if not self.report.epochs:
            return
        self._lap("training")
        record = self.report.epochs[-1]
        record.optimizer_steps = (self._step() if step is None else step) - self.clock.start
        record.learning_rate = learning_rate if learning_rate is not None else record.learning_rate
        self.report.num_epochs = record.epoch + min(1.0, record.optimizer_steps / self.clock.length)
        self.report.selection = selection_of(self.table["times_kept"].numpy(), self._chance)

    def end_epoch(self, *, step: int | None = None, learning_rate: float | None = None) -> None:
        """Flushes, and closes the record of the running epoch. Collective; `begin_epoch` makes up for it if left out."""
        if self._mark is not None:
            self.flush()
            self.update_record(step=step, learning_rate=learning_rate)
            self._mark = None

    def add_evaluation(self, metrics: Mapping[str, Any]) -> None:
        """Notes an evaluation in the record of the epoch; `*_runtime` (seconds) is time that was not training.

        After the last epoch ended only metrics that it does not have yet are taken: the report tells of the last epoch's
        model, not of the best one that may have been loaded since.
        """
        if not self.report.epochs:
            return
        record = self.report.epochs[-1]
        numbers = {
            k: float(v)
            for k, v in metrics.items()
            if k != "epoch" and isinstance(v, int | float | np.number)
        }
        seconds = sum(value for name, value in numbers.items() if name.endswith("_runtime"))
        record.seconds["evaluation"] += seconds
        if self._mark is not None:
            record.seconds["training"] -= seconds
            record.metrics.update(numbers)
        else:
            record.metrics = {**numbers, **record.metrics}

    def _lap(self, phase: str) -> None:
        """Adds the time since the last lap to a phase of the running epoch."""
        if self._mark is not None:
            now = time.perf_counter()
            self.report.epochs[-1].seconds[phase] += now - self._mark
            self._mark = now

    # ---- state -----------------------------------------------------------------------------------

    def _identity(self) -> dict[str, Any]:
        """What must be the same when a run is resumed."""
        return {
            "policy": self.policy.to_dict(),
            "number of samples": len(self.table),
            "dataset fingerprint": self.fingerprint,
            "global batch": self.global_batch,
            "gradient accumulation": self.accumulation,
            "drop_last": self.drop_last,
            "seed": self.seed,
            "data seed": self.data_seed,
        }

    def state_dict(
        self, *, step: int | None = None, learning_rate: float | None = None
    ) -> dict[str, Any]:
        """All that the run needs to go on: `{"tensors": ..., "metadata": ...}`, the latter of JSON values. Collective.

        Args:
            step: optimizer steps done, *optional*, as in `begin_epoch`.
            learning_rate: in force now, for the record.
        """
        self.flush()
        self.update_record(step=step, learning_rate=learning_rate)
        tensors = {f"table.{name}": column for name, column in self.table.state_dict().items()}
        if self._plan is not None:
            tensors["plan.indices"] = self._plan.indices
            if self._plan.weights is not None:
                tensors["plan.weights"] = self._plan.weights
        metadata = {
            "format_version": FORMAT_VERSION,
            "identity": self._identity(),
            "step": self._step() if step is None else step,
            "batches_done": self._batches_done,
            "full_data": self._full_data,
            "lr_scale": 1.0 if self._plan is None else self._plan.lr_scale,
            "sizes": list(self._sizes),
            "clock": asdict(self.clock),
            "report": self.report.to_dict(),
        }
        return {"tensors": tensors, "metadata": metadata}

    def load_state_dict(self, state: Mapping[str, Any]) -> tuple[int, int]:
        """Goes on where a run of the same settings was; nothing changes if the state does not fit.

        Returns:
            (epoch, batches of it that a rank has trained): (e, 0) between two epochs.

        Raises:
            ValueError: if the state is of another policy, dataset, batch or seed, with both values. The number of epochs
                or steps may differ: a run can be made longer.
        """
        tensors, metadata = state["tensors"], copy.deepcopy(state["metadata"])
        if metadata.get("format_version") != FORMAT_VERSION:
            raise ValueError(
                f"The pruning state has format_version {metadata.get('format_version')!r}; this version reads "
                f"{FORMAT_VERSION}. Resume it with the hf_dynprune that wrote it."
            )
        theirs, ours = metadata["identity"], self._identity()
        differing = [
            f"{key}: {theirs.get(key)!r} there, {ours[key]!r} here"
            for key in ours
            if ours[key] != theirs.get(key)
        ]
        if differing:
            raise ValueError(
                f"The checkpoint belongs to another run ({'; '.join(differing)}). Resume with the settings of the "
                "checkpoint, or start a new run from its weights alone (`from_pretrained`)."
            )
        self.table.load_state_dict(
            {k.removeprefix("table."): v for k, v in tensors.items() if k.startswith("table.")}
        )
        indices = tensors.get("plan.indices")
        self._plan = (
            None
            if indices is None
            else EpochPlan(indices, tensors.get("plan.weights"), float(metadata["lr_scale"]))
        )
        self._full_data = metadata["full_data"]
        self._sizes = metadata["sizes"]
        self._chance = chance_of(size / len(self.table) for size in self._sizes)
        clock = metadata[
            "clock"
        ]  # the length of the schedule is this run's, where it stands is the checkpoint's
        self.clock.begin_epoch(clock["epoch"], clock["start"], clock["length"])
        environment = self.report.environment
        self.report = PruningReport.from_dict(metadata["report"])
        self.report.environment = environment
        self._buffer, self._buffered, self._drained, self._mark = [], 0, [], None
        self._batches_done, self._resumed_in, self._agreed = metadata["batches_done"], None, False
        epoch, batch = self.clock.epoch, self._batches_done
        if self.report.epochs:
            if batch >= self.batches(self.report.epochs[-1].samples):
                epoch, batch = epoch + 1, 0
            else:
                self._resumed_in = epoch
            self.report.resumed.append({"epoch": epoch, "step": metadata["step"]})
        return epoch, batch

    def restart_epoch(self, step: int) -> None:
        """After `load_state_dict` in mid-epoch: train the epoch's plan from its first batch again."""
        if self._resumed_in is not None:
            self.clock.start, self._batches_done = step, 0

    def adopt(self, epochs: float, step: int) -> tuple[int, int]:
        """Goes on from a run that left no state of ours: nothing is known of any sample, all data are taken to have been
        trained on, and that is charged. An epoch that was interrupted begins anew.

        Args:
            epochs: that the run had trained, may be fractional.
            step: its optimizer steps.

        Returns:
            (epoch, 0), where the run goes on.
        """
        n, done = len(self.table), 0
        for epoch in range(math.ceil(round(epochs, 9))):
            end = round(step * min(epoch + 1, epochs) / epochs)
            passes = round(n * min(1.0, epochs - epoch))
            self.report.epochs.append(
                EpochRecord(
                    epoch,
                    True,
                    n,
                    forward_passes=passes,
                    backward_passes=passes,
                    optimizer_steps=end - done,
                )
            )
            done = end
        begins = math.floor(round(epochs, 9))
        self.clock.begin_epoch(begins, step, self.clock.length)
        self.report.resumed.append({"epoch": begins, "step": step, "stock_checkpoint": True})
        return begins, 0

    def save(
        self,
        folder: str | os.PathLike[str],
        *,
        step: int | None = None,
        learning_rate: float | None = None,
    ) -> None:
        """Writes `STATE_FILE` in the folder, whole or not at all. Collective; rank 0 writes."""
        state = self.state_dict(step=step, learning_rate=learning_rate)
        if self.rank == 0:
            Path(folder).mkdir(parents=True, exist_ok=True)
            save_tensors(Path(folder) / STATE_FILE, state["tensors"], state["metadata"])

    def load(self, folder: str | os.PathLike[str]) -> tuple[int, int]:
        """Reads what `save` wrote, as `load_state_dict` does."""
        tensors, metadata = load_tensors(Path(folder) / STATE_FILE)
        return self.load_state_dict({"tensors": tensors, "metadata": metadata})


def _lookup(plan: EpochPlan | None, n: int) -> Tensor | None:
    """(n + 1,) weights by sample index, the last one, 0, for padding; None where all weights are 1."""
    if plan is None or plan.weights is None:
        return None
    weights = torch.ones(n + 1)
    weights.index_copy_(0, plan.indices, plan.weights)
    weights[-1] = 0.0
    return weights


def _describe(score: Tensor, observed: Tensor) -> dict[str, float]:
    """Mean and quantiles of the finite scores of observed samples, of evenly spaced ones where there are many; empty where
    there are none."""
    step = max(1, len(score) // _DESCRIBED)
    scores = score[::step][observed[::step]]
    scores = scores[scores.isfinite()]
    if len(scores) == 0:
        return {}
    shares = (0.05, 0.25, 0.5, 0.75, 0.95)
    quantiles = np.quantile(scores.numpy(), shares)
    return {
        "mean": float(scores.mean()),
        **{f"q{100 * s:02.0f}": float(q) for s, q in zip(shares, quantiles, strict=True)},
    }
