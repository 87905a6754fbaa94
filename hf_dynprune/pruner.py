"""DynamicPruner, the front door of the core: which samples, at which weights, at what cost.

It needs torch alone. [`DynamicPruningTrainer`] drives it inside the Trainer. In your own loop:

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

An epoch, and who holds what:

    begin_epoch ──▶ choose ──▶ plan ──▶ sampler, weights          the epoch's samples are fixed
    observe     ──▶ Observations (buffered)                       no host sync
    flush       ──▶ exchanged between ranks ──▶ SampleTable       once an epoch, and before a save
    end_epoch   ──▶ record of the report
"""

import copy
import hashlib
import math
import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, default_collate

from . import distributed
from .checks import check_count
from .files import STATE_FILE, load_tensors, save_tensors
from .observations import Observations
from .policies import Choice, EpochPlan, PruningPolicy, ScoredPolicy
from .policies.base import ADDED_FIELDS
from .policies.guards import guarded_plan, guarded_score
from .potential import Magnitude, measure
from .report import (
    FORMAT_VERSION,
    EpochRecord,
    PruningReport,
    Stopwatch,
    chance_of,
    describe_environment,
    numbers_in,
    selection_of,
)
from .sampler import IndexedCollator, IndexedDataset, PruningSampler
from .schedule import Clock, RunShape, is_choice, is_full_data
from .selection import indices_of, mask_of
from .table import Last, Memories, Memory, SampleTable

# The column and signal that a floor for each class needs.
LABEL = "label"

# Scores are described by at least this many of them: a quantile is then off by a thousandth of the
# samples.
_DESCRIBED = 1 << 17


def choice_seed(seed: int, epoch: int, purpose: str = "plan") -> int:
    """A 63-bit seed for the choice in an epoch: seed 0 epoch 1 is not seed 1 epoch 0."""
    text = f"{seed}/{epoch}/{purpose}".encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big") >> 1


class DynamicPruner:
    """Chooses the samples of each epoch, collects what was observed, keeps time, counts the cost.

    Longer than other classes, because it is the one object with the state of a run: plan, position
    and record must be saved, restored and agreed on together.

    Args:
        policy: The rule.
        shape: Samples, batch and budget of the run. Its `ranks` is replaced by the number of ranks
            of the process group. Or N alone, with the other fields of [`RunShape`] by name.
        seed: Of the choices.
        data_seed: Of the order, *optional*, defaults to `seed`.
        fingerprint: Identifies the dataset. A checkpoint of another dataset is refused.
        memory: What is remembered besides the policy's memory, *optional*.
        magnitude: What stands in for the size of a sample's gradient, *optional*, such as
            `Magnitude("loss")`. The effective share is then measured each epoch. Its signal must be
            observed: the table keeps its last value, unless a memory does so already.
        sampler: Gives each epoch its order, *optional*, by default in batches of the shape.
        run: Fields of [`RunShape`], if `shape` is N: `batch_size=128, num_epochs=20`.

    Raises:
        TypeError, ValueError: If an argument has the wrong type or is out of range, or if
            `drop_last` is set and an epoch would not fill one batch.

    On several ranks torch.distributed must be initialised before the pruner is made. All ranks make
    the same calls; `begin_epoch`, `flush` and `save` are collective.
    """

    def __init__(
        self,
        policy: PruningPolicy,
        shape: RunShape | int,
        *,
        seed: int = 0,
        data_seed: int | None = None,
        fingerprint: str = "",
        memory: Memory | None = None,
        magnitude: Magnitude | None = None,
        sampler: PruningSampler | None = None,
        **run: Any,
    ) -> None:
        if not isinstance(policy, PruningPolicy):
            raise TypeError(
                f"policy={policy!r} is not a PruningPolicy: make one, such as UCB(keep_ratio=0.3), "
                "or by name with make_policy('ucb', keep_ratio=0.3)."
            )
        if not isinstance(shape, RunShape):
            shape = RunShape(shape, **run)
        elif run:
            raise TypeError(
                f"{', '.join(run)}: these are fields of the RunShape, which was given. Set them "
                "there, or give N in its place."
            )
        check_count("seed", seed, 0)
        if data_seed is not None:
            check_count("data_seed", data_seed, 0)
        if not isinstance(fingerprint, str):
            raise TypeError(f"fingerprint={fingerprint!r} is not a str.")
        if magnitude is not None and not isinstance(magnitude, Magnitude):
            raise TypeError(
                f"magnitude={magnitude!r} is not a Magnitude: make one, such as Magnitude('loss')."
            )
        self.rank, ranks = distributed.world()
        self.policy, self.shape = policy, replace(shape, ranks=ranks)
        self.magnitude = magnitude
        self.memory = _memory_of(policy, memory, magnitude)
        self.table = SampleTable(shape.samples, self.memory.columns)
        self.seed, self.data_seed = seed, seed if data_seed is None else data_seed
        self.fingerprint = fingerprint or f"{shape.samples} samples"
        if sampler is None:
            sampler = PruningSampler(
                shape.samples, self.shape.global_batch, ranks=ranks, drop_last=shape.drop_last
            )
        self.sampler = sampler
        self.report = PruningReport(
            policy.to_dict(),
            shape.samples,
            self.seed,
            self.data_seed,
            environment=describe_environment(ranks=ranks),
        )
        if magnitude is not None:
            self.report.magnitude = str(magnitude)
        policy.check_dataset(shape.samples, self.fingerprint)
        self.report.preparation = policy.preparation()
        self.clock = Clock.of(policy, self.shape)
        self.plan: EpochPlan | None = None  # of the last choice, also while all data are trained on
        self._sizes: list[int] = []  # what each choice kept
        self._weights: Tensor | None = None  # by sample index; None means all 1
        self._observations = Observations(shape.samples, self.memory.signals)
        self._watch = Stopwatch()
        self._batches_done = 0  # of the running epoch, on this rank
        self._next = 0  # the epoch that must begin next
        self._resumed_in: int | None = None  # the epoch in whose middle the run was resumed
        self._agreed = False  # whether the ranks compared their arguments and position
        self._over = False  # whether the epoch ended, also before its last batch
        self._trained = 0.0  # epochs trained before this one; an epoch that was stopped counts less
        self._steps_before = 0  # optimizer steps of this epoch before it was begun again

    @property
    def num_epochs(self) -> int:
        """Epochs that the run begins, as planned."""
        return self.clock.num_epochs

    def total_steps(self) -> int:
        """Optimizer steps of the whole run, as known when the running epoch began."""
        return self.clock.total_steps()

    def dataloader(
        self, dataset: Any, collate_fn: Callable[[Any], Any] | None = None, **options: Any
    ) -> DataLoader:
        """A DataLoader over the chosen samples, for one rank or for `accelerator.prepare`.

        Args:
            dataset: Map-style, of `shape.samples` samples.
            collate_fn: Must return a dict, to which `sample_index` (B,) int64 is added.
            options: Passed to the DataLoader.
        """
        if len(dataset) != len(self.table):
            raise ValueError(
                f"The dataset has {len(dataset)} samples, the pruner's shape {len(self.table)}."
            )
        collate: Any = IndexedCollator(collate_fn or default_collate)
        return DataLoader(
            IndexedDataset(dataset, self.sampler),
            batch_size=self.shape.batch_size,
            sampler=self.sampler,
            drop_last=self.shape.drop_last,
            collate_fn=collate,
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
        """Apply what was observed, choose if a choice is due, and set the sampler.

        Args:
            epoch: Counted from 0.
            step: Optimizer steps done so far, *optional*, defaults to the count that follows from
                the calls of `observe`.
            scorer: Samples (M,) int64 -> their signals, (M,) each, by forward passes without
                training. Each rank's is called with its share. Needed for policies with a `scoring`
                other than `"trained"`.

        Returns:
            The record of the epoch; `record.samples` is the number of samples it trains on.

        Raises:
            ValueError: If `epoch` is not the next one, or if the budget is spent.

        Cost: O(N) per choice, on rank 0; and the forward passes, if there are any.
        """
        self.end_epoch()
        self._weights = None  # frees the memory for the choice
        resumed = self._resumed_in == epoch
        step = self.clock.start if resumed else self._step() if step is None else step
        self._agree(epoch, step)
        self._check_order(epoch, step)
        if not resumed:
            full = is_full_data(self.policy, epoch, self.shape.budget.progress(epoch, step))
            # After a checkpoint without our state, a part of this epoch may have been trained.
            self._trained = min(self.report.num_epochs, epoch)
            self.report.epochs.append(EpochRecord(epoch, full, len(self.table)))
            self._batches_done = self._steps_before = 0
        record = self.report.epochs[-1]
        self._watch.start(record.seconds)
        if not resumed and not record.full_data:
            if is_choice(self.policy, epoch, self.plan is not None):
                self._score(scorer)
                self._choose(epoch, self.shape.budget.progress(epoch, step))
            record.samples = len(self._in_force or self.table)
        self.shape.check_size(epoch, record.samples)
        self._resumed_in, self._next, self._over = None, epoch + 1, False
        plan = self._in_force
        self._weights = _lookup(plan, len(self.table))
        kept = None if plan is None else plan.indices
        self.sampler.set_epoch_order(self.sampler.order_of(kept, self.data_seed, epoch))
        self.clock.begin_epoch(epoch, step, self.shape.steps(record.samples))
        self._watch.lap("choosing")
        return record

    def _agree(self, epoch: int, step: int) -> None:
        """Once: raise ValueError if the ranks differ in arguments or position."""
        if not self._agreed:
            position = {
                "epoch": epoch,
                "optimizer steps": step,
                "batches of the epoch done": self._batches_done,
                # A resumed run may be longer. Ranks that end at different steps would hang.
                "number of epochs": self.shape.num_epochs,
                "max_steps": self.shape.max_steps,
                "batch size": self.shape.batch_size,
            }
            distributed.check_same({**self._identity(), **position})
            self._agreed = True

    def _check_order(self, epoch: int, step: int) -> None:
        """Raise ValueError unless `epoch` is the next one and the budget is not spent."""
        check_count("epoch", epoch, 0)
        if epoch != self._next:
            raise ValueError(
                f"begin_epoch({epoch}): expected epoch {self._next}. Epochs begin one after the "
                "other, each once; to continue an earlier run, load its state first."
            )
        if self.shape.budget.is_spent(epoch, step):
            raise ValueError(
                f"begin_epoch({epoch}) at step {step}: the budget, {self.shape.budget}, is spent. "
                "End the loop there, or make the pruner for a longer run."
            )

    def _score(self, scorer: Callable[[Tensor], Mapping[str, Tensor]] | None) -> None:
        """Observe by forward passes what the policy's `scoring` asks for before a choice."""
        n, scoring = len(self.table), self.policy.scoring
        if scoring == "all":
            index = torch.arange(n)
        elif scoring == "dropped" and self.plan is not None:
            index = indices_of(~mask_of(self.plan.indices, n))
        else:  # before the first choice nothing was dropped
            return
        if len(index) == 0:
            return
        if scorer is None:
            raise ValueError(
                f"{self.policy.name} with scoring={scoring!r} needs forward passes before a "
                "choice: pass begin_epoch(..., scorer=), a function samples -> signals, or set "
                "scoring='trained'."
            )
        share = index[self.rank :: self.shape.ranks]
        self._watch.lap("choosing")
        scored = self._checked(share, scorer(share), self.scored_signals)
        self._observations.add(share, scored)
        self.report.epochs[-1].scoring_passes += len(index)
        self._watch.lap("scoring")
        self.flush()

    def _choose(self, epoch: int, progress: float) -> None:
        """Make one choice: planned on rank 0, agreed on by all ranks, and counted."""
        policy, table, record = self.policy, self.table, self.report.epochs[-1]
        score = None
        if isinstance(policy, ScoredPolicy) and policy.has_scores:
            score = policy.score(table).to(torch.float32, copy=True)
            record.scores = _describe(score, table.observed)
            score = guarded_score(policy, score, table, epoch, progress)
        planned = policy.planned_size(len(table), epoch, progress)
        choice = Choice(
            table=table,
            epoch=epoch,
            progress=progress,
            generator=torch.Generator().manual_seed(choice_seed(self.seed, epoch)),
            shape=self.shape,
            size=len(table) if planned is None else planned,
            scores=score,
        )
        self.plan = distributed.plan_on_rank_0(lambda: checked_plan(policy, choice, planned))
        table["times_kept"][self.plan.indices] += 1
        self._sizes.append(len(self.plan))

    @property
    def _in_force(self) -> EpochPlan | None:
        """The plan that the running epoch trains on; None means all data."""
        return None if not self.report.epochs or self.report.epochs[-1].full_data else self.plan

    @property
    def lr_scale(self) -> float:
        """The factor on the learning rate that the plan in force asks for."""
        return 1.0 if self._in_force is None else self._in_force.lr_scale

    @property
    def unweighted(self) -> bool:
        """Whether all weights of the running epoch are 1: the plan has none, nothing is padded."""
        return self._weights is None and self.sampler.samples == len(self.sampler)

    def weights(self, index: Tensor) -> Tensor:
        """Factors on the losses of the samples `index` (B,) int64; 0 for padding.

        Returns:
            (B,) float32 on the device of `index`.
        """
        if self._weights is None:
            return (index >= 0).to(torch.float32)
        if self._weights.device != index.device:
            self._weights = self._weights.to(index.device)
        return self._weights[index]  # -1, padding, reads the last entry: 0

    # ---- observations ----------------------------------------------------------------------------

    @property
    def scored_signals(self) -> tuple[str, ...]:
        """All signals that are observed of a sample, also by scoring passes."""
        return self.memory.signals

    @property
    def signals(self) -> tuple[str, ...]:
        """The signals that `observe` expects; none if only scoring passes observe."""
        return () if self.policy.scoring == "all" else self.scored_signals

    def observe(self, index: Tensor, signals: Mapping[str, Tensor] | None = None) -> None:
        """Note a trained batch: count its passes, and remember its signals until the next `flush`.

        Args:
            index: (B,) int64, the `sample_index` of the batch, on any device; -1 is padding.
            signals: (B,) values for each of `signals`; others are ignored.

        Raises:
            RuntimeError: If no epoch is running.
            TypeError: If the index or a signal is not a tensor of the right kind.
            ValueError: If the batch has another size than this rank's next batch of the epoch (the
                message says what can be the reason), or a signal is missing or has another shape.

        Cost: O(B). No host synchronisation, except once per 65,536 observations without a `drain`.
        """
        if not self._watch.running:
            raise RuntimeError(
                "`observe` was called while no epoch is running: call it between `begin_epoch` and "
                "`end_epoch`, once for each batch."
            )
        index = _checked_index(index)
        self._check_batch(len(index))
        checked = self._checked(index, signals or {}, self.signals)
        self._batches_done += 1
        record = self.report.epochs[-1]
        record.forward_passes += len(index) * self.shape.ranks
        record.backward_passes += len(index) * self.shape.ranks
        self._count_steps(self._step())  # a loop may end at any batch, and not say so
        if self.policy.scoring != "all":
            self._observations.add(index, checked)

    def _check_batch(self, size: int) -> None:
        """Raise ValueError unless a batch of `size` is this rank's next one of the epoch."""
        samples, shape = self.report.epochs[-1].samples, self.shape
        batches = shape.batches(samples)
        if self._batches_done >= batches:
            raise ValueError(
                f"`observe` was called {self._batches_done + 1} times in an epoch of {batches} "
                "batches: call it once for each batch of the pruner's loader, also if a batch goes "
                "through the model twice."
            )
        expected = shape.batch_size
        if shape.ranks == 1:  # the last batch is short; several ranks pad it
            expected = min(expected, len(self.sampler) - self._batches_done * shape.batch_size)
        if size != expected:
            raise ValueError(
                f"`observe` got a batch of {size} samples, expected {expected}: the loader or the "
                "collator splits, joins or drops samples (split_batches=True of accelerate does). "
                "Observe each batch of the pruner's loader whole."
            )

    def _checked(
        self, index: Tensor, signals: Mapping[str, Tensor], expected: tuple[str, ...]
    ) -> dict[str, Tensor]:
        checked = {}
        for name in expected:
            if name not in signals:
                raise ValueError(
                    f"{self.policy.name} observes {name!r}, and the signals given are "
                    f"{sorted(signals)}."
                )
            value = signals[name]
            if not isinstance(value, Tensor):
                raise TypeError(
                    f"The signal {name!r} is a {type(value).__name__}: expected a tensor of shape "
                    f"{tuple(index.shape)} (`torch.as_tensor` makes one)."
                )
            value = value.detach()
            if value.shape != index.shape:
                raise ValueError(
                    f"The signal {name!r} has shape {tuple(value.shape)}, the sample index "
                    f"{tuple(index.shape)}: expected one value for each sample."
                )
            checked[name] = value.to(torch.float32)
        return checked

    def drain(self) -> None:
        """Move what was observed from its device to the host."""
        self._observations.drain()

    def flush(self) -> None:
        """Exchange what all ranks observed, and apply it to the table in one order. Collective."""
        self._watch.lap("training")
        index, signals = self._observations.exchange()
        if len(index) == 0:
            return
        record = self.report.epochs[-1]
        rejected = self.table.observe(index, signals, memory=self.memory, epoch=record.epoch)
        record.nonfinite += len(rejected)
        # The lowest indices, in whatever order they came: a run that was saved in between, and so
        # flushed more often, notes the same.
        noted = sorted({*self.report.nonfinite_samples, *rejected.tolist()})
        self.report.nonfinite_samples = noted[:100]
        self._watch.lap("choosing")

    @property
    def batches_done(self) -> int:
        """Batches of the running epoch that this rank has trained: calls of `observe`."""
        return self._batches_done

    def _step(self) -> int:
        """Optimizer steps done, by the batches that were observed."""
        return self.clock.start + -(-self._batches_done // self.shape.accumulation)

    # ---- the record ------------------------------------------------------------------------------

    def update_record(self, *, step: int | None = None, learning_rate: float | None = None) -> None:
        """Bring the epoch's record up to date: time, optimizer steps, learning rate."""
        if not self.report.epochs:
            return
        self._watch.lap("training")
        record = self.report.epochs[-1]
        self._count_steps(self._step() if step is None else step)
        record.learning_rate = record.learning_rate if learning_rate is None else learning_rate
        chance = chance_of(size / len(self.table) for size in self._sizes)
        self.report.selection = selection_of(self.table["times_kept"].numpy(), chance)
        record.effective_share = self._effective_share()

    def _effective_share(self) -> float | None:
        """By the last observation of each sample; None if none is known. Cost: O(N)."""
        magnitude = self.magnitude
        column = None if magnitude is None else self.memory.last_of(magnitude.signal)
        if magnitude is None or column is None:
            return None
        return measure(self.table[column].float(), magnitude)

    def _count_steps(self, step: int) -> None:
        """Note the steps of the epoch, and how many epochs were trained. Cost: O(1)."""
        record, clock = self.report.epochs[-1], self.clock
        # An epoch that was interrupted while its samples were chosen has no steps.
        done = step - clock.start + self._steps_before if clock.epoch == record.epoch else 0
        record.optimizer_steps = done
        self.report.num_epochs = self._trained + min(1.0, done / clock.length)

    def end_epoch(self, *, step: int | None = None, learning_rate: float | None = None) -> None:
        """Flush observations and close the epoch's record. Collective.

        Optional between epochs: `begin_epoch` calls it.
        """
        if self._watch.running:
            self.flush()
            self.update_record(step=step, learning_rate=learning_rate)
            self._watch.stop()
            # A run that is continued with a larger budget goes on within its last epoch.
            self._over = (self._step() if step is None else step) < self.clock.total_steps()

    def interrupt(self, *, step: int | None = None, learning_rate: float | None = None) -> None:
        """Close the record of an epoch that an error or Ctrl-C ended. Not collective.

        The epoch is not over: a run that is resumed from its state trains the rest. On one rank the
        observations are applied; on several they are lost, because the others may be gone.
        """
        if self._watch.running:
            self.update_record(step=step, learning_rate=learning_rate)
            if self.shape.ranks == 1:
                with suppress(Exception):  # of a device that failed
                    self.flush()
            self._watch.stop()

    def add_evaluation(self, metrics: Mapping[str, Any], *, best_step: int | None = None) -> None:
        """Note an evaluation in the record of the epoch.

        `*_runtime` (seconds) is time that was not training. After the last epoch ended, only
        metrics that it does not have yet are added.

        Args:
            metrics: Those that are not single numbers are left out.
            best_step: If weights of an earlier optimizer step were loaded after the run and
                evaluated, that step, *optional*. The metrics are then noted in `best_model` of the
                report, because `metrics` describe the last epoch's model.
        """
        report = self.report
        if not report.epochs:
            return
        numbers, record = numbers_in(metrics), report.epochs[-1]
        numbers.pop("epoch", None)
        times = (value for name, value in numbers.items() if name.endswith("_runtime"))
        seconds = sum(value for value in times if math.isfinite(value))
        record.seconds["evaluation"] += seconds
        if best_step is not None:
            report.best_model = {
                "step": best_step,
                "metrics": {**report.best_model.get("metrics", {}), **numbers},
            }
        elif self._watch.running:
            record.seconds["training"] -= seconds
            record.metrics.update(numbers)
        else:
            record.metrics = {**numbers, **record.metrics}

    # ---- state -----------------------------------------------------------------------------------

    def _identity(self) -> dict[str, Any]:
        """What must be the same when a run is resumed."""
        return {
            "policy": self.policy.to_dict(),
            "number of samples": len(self.table),
            "dataset fingerprint": self.fingerprint,
            "global batch": self.shape.global_batch,
            "gradient accumulation": self.shape.accumulation,
            "drop_last": self.shape.drop_last,
            "seed": self.seed,
            "data seed": self.data_seed,
            **({} if self.sampler.strategy == "random" else {"order": self.sampler.strategy}),
        }

    def state_dict(
        self,
        *,
        step: int | None = None,
        learning_rate: float | None = None,
        epoch_over: bool = False,
    ) -> dict[str, Any]:
        """What the run needs to continue: `{"tensors": ..., "metadata": JSON}`. Collective.

        Args:
            step: Optimizer steps done, *optional*, as in `begin_epoch`.
            learning_rate: In force now, for the record.
            epoch_over: Whether the rest of the epoch is left out, as after `end_epoch`.
        """
        self.flush()
        self.update_record(step=step, learning_rate=learning_rate)
        tensors = {f"table.{name}": column for name, column in self.table.state_dict().items()}
        if self.plan is not None:
            tensors["plan.indices"] = self.plan.indices
            if self.plan.weights is not None:
                tensors["plan.weights"] = self.plan.weights
        clock = self.clock
        metadata = {
            "format_version": FORMAT_VERSION,
            "identity": self._identity(),
            "step": self._step() if step is None else step,
            "batches_done": self._batches_done,
            "epoch_over": epoch_over or self._over,
            "epochs_before": self._trained,
            "lr_scale": 1.0 if self.plan is None else self.plan.lr_scale,
            "sizes": list(self._sizes),
            "clock": {"epoch": clock.epoch, "start": clock.start, "length": clock.length},
            "report": self.report.to_dict(),
        }
        return {"tensors": tensors, "metadata": metadata}

    def load_state_dict(self, state: Mapping[str, Any]) -> tuple[int, int]:
        """Continue where a run of the same settings was. Nothing changes if the state does not fit.

        Returns:
            (epoch, batches of it that a rank has trained): (e, 0) between two epochs.

        Raises:
            ValueError: If the state is of another policy, dataset, batch or seed; the message has
                both values. The number of epochs or steps may differ: a run can be made longer.
        """
        tensors, metadata = state["tensors"], copy.deepcopy(state["metadata"])
        self._check_state(metadata)
        prefix = "table."
        self.table.load_state_dict(
            {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
        )
        self.plan = None
        if "plan.indices" in tensors:
            weights, lr_scale = tensors.get("plan.weights"), float(metadata["lr_scale"])
            self.plan = EpochPlan(tensors["plan.indices"], weights, lr_scale)
        self._sizes = metadata["sizes"]
        # The length of the schedule is this run's; its position is the checkpoint's.
        self.clock.begin_epoch(**metadata["clock"])
        environment = self.report.environment
        self.report = PruningReport.from_dict(metadata["report"])
        self.report.environment = environment
        self._observations.clear()
        self._watch.stop()
        self._batches_done = metadata["batches_done"]
        self._resumed_in, self._agreed = None, False
        self._over, self._trained = metadata["epoch_over"], metadata["epochs_before"]
        epoch, batch = self.clock.epoch, self._batches_done
        if self.report.epochs:
            record = self.report.epochs[-1]
            # More than 0 if the epoch was begun again after an earlier resume.
            done = metadata["step"] - self.clock.start
            self._steps_before = record.optimizer_steps - done
            if self._over or batch >= self.shape.batches(record.samples):
                epoch, batch = epoch + 1, 0
            else:
                self._resumed_in = epoch
            self._next = epoch
            self.report.resumed.append({"epoch": epoch, "step": metadata["step"]})
        return epoch, batch

    def _check_state(self, metadata: Mapping[str, Any]) -> None:
        """Raise ValueError unless the state is of this format and of a run like this one."""
        if metadata.get("format_version") != FORMAT_VERSION:
            raise ValueError(
                f"The pruning state has format_version {metadata.get('format_version')!r}; this "
                f"version reads {FORMAT_VERSION}. Resume it with the hf_dynprune that wrote it."
            )
        theirs, ours = dict(metadata["identity"]), self._identity()
        if isinstance(policy := theirs.get("policy"), Mapping):
            added = {name: v for name, v in ADDED_FIELDS.items() if name in ours["policy"]}
            theirs["policy"] = {**added, **policy}
        differing = [
            f"{key}: {theirs.get(key)!r} there, {ours.get(key)!r} here"
            for key in {**ours, **theirs}
            if ours.get(key) != theirs.get(key)
        ]
        if differing:
            sure = ""
            if theirs.get("dataset fingerprint") != self.fingerprint:
                sure = (
                    " If you are sure that the data are the same, set the dataset's attribute "
                    f"pruning_fingerprint={theirs.get('dataset fingerprint')!r}."
                )
            raise ValueError(
                f"The checkpoint belongs to another run ({'; '.join(differing)}). Resume with the "
                "settings of the checkpoint, or start a new run from its weights alone "
                f"(`from_pretrained`).{sure}"
            )

    def restart_epoch(self, step: int) -> None:
        """After `load_state_dict` in mid-epoch: train the epoch's plan again from its start."""
        if self._resumed_in is not None:
            self.clock.start, self._batches_done = step, 0
            self._steps_before = self.report.epochs[-1].optimizer_steps

    def adopt(self, epochs: float, step: int) -> tuple[int, int]:
        """Continue from a checkpoint without pruning state.

        The table starts empty. Earlier epochs are charged as full-data epochs. An interrupted epoch
        begins again.

        Args:
            epochs: Epochs that the run had trained, may be fractional.
            step: Its optimizer steps.

        Returns:
            (epoch, 0), where the run continues.
        """
        n, done = len(self.table), 0
        for epoch in range(math.ceil(round(epochs, 9))):
            end = round(step * min(epoch + 1, epochs) / epochs)
            trained = round(n * min(1.0, epochs - epoch))
            self.report.epochs.append(
                EpochRecord(
                    epoch,
                    True,
                    n,
                    forward_passes=trained,
                    backward_passes=trained,
                    optimizer_steps=end - done,
                )
            )
            done = end
        begins = math.floor(round(epochs, 9))
        self.report.num_epochs = self._trained = epochs
        self.clock.begin_epoch(begins, step, self.clock.length)
        self._next = begins
        self.report.resumed.append({"epoch": begins, "step": step, "stock_checkpoint": True})
        return begins, 0

    def save(
        self,
        folder: str | os.PathLike[str],
        *,
        step: int | None = None,
        learning_rate: float | None = None,
        epoch_over: bool = False,
    ) -> None:
        """Write `STATE_FILE` in the folder, whole or not at all. Collective; rank 0 writes."""
        state = self.state_dict(step=step, learning_rate=learning_rate, epoch_over=epoch_over)
        if self.rank == 0:
            Path(folder).mkdir(parents=True, exist_ok=True)
            save_tensors(Path(folder) / STATE_FILE, state["tensors"], state["metadata"])

    def load(self, folder: str | os.PathLike[str]) -> tuple[int, int]:
        """Read what `save` wrote, as `load_state_dict` does."""
        tensors, metadata = load_tensors(Path(folder) / STATE_FILE)
        return self.load_state_dict({"tensors": tensors, "metadata": metadata})


# ---- pure helpers --------------------------------------------------------------------------------


def checked_plan(policy: PruningPolicy, choice: Choice, planned: int | None) -> EpochPlan:
    """The policy's plan, checked against its promises, with the guards applied.

    Raises:
        ValueError: If the indices are not unique or out of range.
        RuntimeError: If the plan has another size than planned, or weights that the policy does not
            declare.
    """
    plan = policy.plan(choice)
    plan.check(choice.n)
    if planned is not None and planned != len(plan):
        raise RuntimeError(
            f"{policy.name} planned {planned} samples for epoch {choice.epoch} and chose "
            f"{len(plan)}: `planned_size` and `plan` of the policy must agree."
        )
    if plan.weights is not None and not policy.weighs:
        raise RuntimeError(
            f"The plan of {policy.name} has weights, and the policy does not say so: set "
            f"`weighs = True` in {type(policy).__name__}, so that a Trainer applies them."
        )
    labels = choice.table[LABEL] if policy.min_per_class else None
    return guarded_plan(policy, plan, labels, choice.scores, choice.generator)


def _checked_index(index: Any) -> Tensor:
    """(B,) int64; raises TypeError for anything but a tensor of int64 or int32 of that shape."""
    integers = (torch.int64, torch.int32)
    if not isinstance(index, Tensor) or index.dtype not in integers or index.ndim != 1:
        kind = type(index).__name__
        if isinstance(index, Tensor):
            kind = f"{index.dtype} tensor of shape {tuple(index.shape)}"
        raise TypeError(
            f"The sample index is a {kind}: expected an int64 tensor of shape (batch size,), the "
            "`sample_index` of the batch."
        )
    return index.to(torch.int64)


def _memory_of(policy: PruningPolicy, more: Memory | None, magnitude: Magnitude | None) -> Memory:
    """The policy's memory, the label if there is a floor for each class, and what is given.

    And the last value of the magnitude's signal, unless it is remembered already or a column of
    another meaning has its name.
    """
    parts = [policy.memory, *([] if more is None else [more])]
    names = {column.name for part in parts for column in part.columns}
    if policy.min_per_class and LABEL not in names:
        parts.append(Last(LABEL))
    if magnitude is not None:
        held = Memories(*parts).last_of(magnitude.signal) is not None
        if not held and magnitude.signal not in names:
            parts.append(Last(magnitude.signal))
    return parts[0] if len(parts) == 1 else Memories(*parts)


def _lookup(plan: EpochPlan | None, n: int) -> Tensor | None:
    """(n + 1,) weights by sample index, the last one, 0, for padding; None if all weights are 1."""
    if plan is None or plan.weights is None:
        return None
    weights = torch.ones(n + 1)
    weights.index_copy_(0, plan.indices, plan.weights)
    weights[-1] = 0.0
    return weights


def _describe(score: Tensor, observed: Tensor) -> dict[str, float]:
    """Mean and quantiles of the finite scores of observed samples; empty if there are none.

    Of many samples, evenly spaced ones are described.
    """
    step = max(1, len(score) // _DESCRIBED)
    score, observed = score[::step], observed[::step]
    scores = score.index_select(0, indices_of(observed & score.isfinite()))
    if len(scores) == 0:
        return {}
    shares = (0.05, 0.25, 0.5, 0.75, 0.95)
    # Sorted first: NumPy sorts float32 much faster than `quantile` partitions.
    # In float32 the mean, and what is between two quantiles, overflow from 1e38 on.
    quantiles = np.quantile(np.sort(scores.numpy()).astype(np.float64), shares)
    described = {f"q{100 * s:02.0f}": float(q) for s, q in zip(shares, quantiles, strict=True)}
    return {"mean": float(scores.double().mean()), **described}
