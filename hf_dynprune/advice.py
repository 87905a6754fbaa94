"""Should I prune, and how much? A short dry run of the Trainer predicts the seconds of whole runs.

    Trainer ──dry run──▶ Measured ──predict(policy, settings)──▶ Prediction, ... ──▶ Advice
    report of a short run ──effective share──▶ Potential ─────────────────────────────▶

[`advise`] measures on this machine, with the run's model, loader and arguments. It answers in
words, as a table and as JSON. [`predict`] is the arithmetic behind it, a pure function. What
pruning does to the result follows from no dry run: a short run tells it, see [`Potential`].
"""

import copy
import math
import os
import random
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Subset
from transformers import Trainer, TrainerCallback
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import (
    CallbackHandler,
    DefaultFlowCallback,
    TrainerControl,
    TrainerState,
)
from transformers.trainer_utils import IntervalStrategy, SaveStrategy

from .checks import check_count
from .data_side import orders_of, run_shape
from .escape import printable
from .files import REPORT_FILE, STATE_FILE, load_tensors
from .identity import OWN, dataset_fingerprint
from .policies import UCB, FullData, InfoBatch, LossProportional, PruningPolicy, RandomPruning
from .potential import LEAST_LOST, STUDIES, Saving, predicted_saving
from .provenance import provenance_of
from .pruner import LABEL, DynamicPruner
from .report import PHASES, PruningReport, passes
from .schedule import RunShape, epoch_costs, planned_epochs
from .selection import keep_count

# A finding is reported if its share of the seconds of the run, or of a step, is above this.
_NOTABLE = 0.3
# The dry run lasts at least this long on one rank: small models make their steps in bursts.
_LEAST_SECONDS = 5.0
# Steps that are not timed: memory is allocated, kernels are chosen, caches fill.
_WARM_UP = 3
_SCORING: tuple[Literal["dropped", "all"], ...] = ("dropped", "all")
# Below this factor a predicted saving is not worth a trial.
_WORTH = 1.05


# ---- what a run is, and what it takes ------------------------------------------------------------


@dataclass(frozen=True)
class Settings:
    """What the seconds of a run follow from, besides its policy; see the TrainingArguments.

    Attributes:
        shape: Samples, batch and budget.
        workers: Processes of the training loader.
        persistent_workers: Whether they are kept from epoch to epoch.
        eval_strategy, eval_steps, eval_delay, eval_on_start: When the Trainer evaluates.
        save_strategy, save_steps: When it writes checkpoints.
    """

    shape: RunShape
    persistent_workers: bool = False
    workers: int = 0
    eval_strategy: str = "no"
    eval_steps: float = 1
    eval_delay: float = 0
    eval_on_start: bool = False
    save_strategy: str = "no"
    save_steps: float = 1

    @classmethod
    def of(cls, trainer: Trainer) -> "Settings":
        """Read the settings of a Trainer whose training dataset has a length."""
        args: Any = trainer.args
        dataset: Any = trainer.train_dataset
        evaluates = trainer.eval_dataset is not None
        return cls(
            run_shape(args, len(dataset)),
            persistent_workers=args.dataloader_persistent_workers,
            workers=args.dataloader_num_workers,
            eval_strategy=args.eval_strategy.value if evaluates else "no",
            eval_steps=args.eval_steps or 1,
            eval_delay=args.eval_delay or 0,
            eval_on_start=args.eval_on_start and evaluates,
            save_strategy=args.save_strategy.value,
            save_steps=args.save_steps,
        )

    def evaluations(self, steps: int, epochs: int) -> int:
        """The number of evaluations in a run of `steps` optimizer steps and `epochs` epochs."""
        return self.eval_on_start + _how_often(
            self.eval_strategy, self.eval_steps, self.eval_delay, steps, epochs
        )

    def checkpoints(self, steps: int, epochs: int) -> int:
        """The number of checkpoints; with `save_strategy="best"` the largest possible number."""
        if self.save_strategy == "best":
            return self.evaluations(steps, epochs) - self.eval_on_start
        return _how_often(self.save_strategy, self.save_steps, 0, steps, epochs)

    def to_dict(self) -> dict[str, Any]:
        """JSON values, those of the shape beside the others."""
        own = asdict(self)
        shape = own.pop("shape")
        return {"num_samples": shape.pop("samples"), **shape, **own}


def _how_often(strategy: str, every: float, delay: float, steps: int, epochs: int) -> int:
    """Count the epochs, or the steps, at whose end the Trainer evaluates or saves."""
    if strategy == "epoch":
        return sum(epoch >= delay for epoch in range(1, epochs + 1))
    if strategy == "steps":
        every = max(1, int(every) if every >= 1 else math.ceil(steps * every))
        return sum(step >= delay for step in {*range(every, steps + 1, every), steps})
    return 0


@dataclass(frozen=True)
class Measured:
    """Wall-clock seconds, measured in a dry run.

    Attributes:
        steps: The number of optimizer steps that were timed.
        waiting: Per step, the time spent waiting for its batches because the loader is slower than
            the model. Without workers, all of `loading` and what the loop does between steps.
        forward, backward, optimizer: Per step. `backward` includes the loss and gradient clipping,
            `optimizer` includes logging.
        loading: Per step, the time to load its batches if the loader never waits for the model.
        loading_in_order: The same if the samples are read in the order of the dataset. Measured if
            the loader is slow and its order is random, otherwise 0.
        epoch_start: Per epoch, the time to start and stop the loader and its workers.
        run_start: `train()` before its first epoch, and the extra time of its first steps.
        scoring: Per sample of a scoring pass.
        scoring_start: A scoring pass beside its samples.
        evaluation: One evaluation, on all evaluation data.
        checkpoint: One checkpoint.
    """

    steps: int
    waiting: float
    forward: float
    backward: float
    optimizer: float
    loading: float = 0.0
    loading_in_order: float = 0.0
    epoch_start: float = 0.0
    run_start: float = 0.0
    scoring: float = 0.0
    scoring_start: float = 0.0
    evaluation: float = 0.0
    checkpoint: float = 0.0

    @property
    def behind(self) -> float:
        """Seconds per step that a loader as fast as the model would save."""
        return min(self.waiting, self.loading)

    @property
    def loader_is_slow(self) -> bool:
        """Whether a step waits for the loader for a notable share of its time."""
        return self.behind > _NOTABLE * self.step

    @property
    def step(self) -> float:
        """Seconds per optimizer step, waiting included."""
        return self.waiting + self.forward + self.backward + self.optimizer


# ---- prediction ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Prediction:
    """The cost of a run under a policy.

    Attributes:
        policy: The policy.
        epochs: The number of epochs that begin.
        steps: Optimizer steps.
        passes: Samples through forward and backward. A sample that is only scored counts as 1/3.
        seconds: By the phases of a [`PruningReport`]. `training` includes start-up and checkpoints.
        assumed: If the size of a choice depends on the data, the least and the most that a choice
            is expected to keep, as shares. All other attributes then assume the most. Else None.
        least_seconds: Total seconds with the least kept; None if `assumed` is.
        acts: False if scores should decide and cannot, see [`PruningPolicy.looks_once`].
    """

    policy: PruningPolicy
    epochs: int
    steps: int
    passes: float
    seconds: dict[str, float]
    assumed: tuple[float, float] | None = None
    least_seconds: float | None = None
    acts: bool = True

    @property
    def total(self) -> float:
        """Seconds of all phases."""
        return sum(self.seconds.values())


def predict(
    policy: PruningPolicy, settings: Settings, measured: Measured, *, choosing: float = 0.0
) -> Prediction:
    """Predict the seconds and the cost of a whole run under a policy. Pure.

        training    run_start + samples / samples per step * (waiting + forward + backward)
                    + steps * optimizer + epochs * epoch_start + checkpoints * checkpoint
        scoring     for each choice that scores: scoring_start + samples * scoring
        choosing    epochs * choosing
        evaluation  evaluations * evaluation

    [`epoch_costs`] gives steps, samples and scored samples, with full-data epochs, period and a
    partial last epoch. With persistent workers there is one epoch_start. If the size of a choice
    depends on the data, the two ends of `policy.expected_share` are predicted.

    Args:
        policy: The policy to predict.
        settings: The settings of the run.
        measured: The seconds of its parts.
        choosing: Seconds per choice.

    Raises:
        ValueError: If the policy does not fit the run, such as a choice that does not fill a batch
            with `drop_last`, or scores of another dataset.
    """
    shape = settings.shape
    policy.check_dataset(shape.samples, "")  # the content is not checked here
    if all(epoch.size is not None for epoch in planned_epochs(policy, shape)):
        return _predict(policy, settings, measured, choosing, share=None)
    assumed = policy.expected_share(shape.samples)
    least, most = (_predict(policy, settings, measured, choosing, share=share) for share in assumed)
    return replace(most, assumed=assumed, least_seconds=least.total)


def _predict(
    policy: PruningPolicy,
    settings: Settings,
    measured: Measured,
    choosing: float,
    *,
    share: float | None,
) -> Prediction:
    """Predict. Choices whose size depends on the data keep `share` of the samples."""
    shape = settings.shape
    costs = list(epoch_costs(policy, shape, share=share))
    epochs, steps = len(costs), sum(cost.steps for cost in costs)
    trained = sum(cost.samples for cost in costs)
    scored = [cost.scored for cost in costs if cost.scored]
    starts = 1 if settings.persistent_workers else epochs
    full_steps = trained / (shape.global_batch * shape.accumulation)
    before = policy.preparation()
    charged = before["passes"] if before.get("charged") else 0.0
    return Prediction(
        policy,
        epochs,
        steps,
        charged + passes(trained, trained, sum(scored)),
        {
            "training": measured.run_start
            + full_steps * (measured.step - measured.optimizer)
            + steps * measured.optimizer
            + starts * measured.epoch_start
            + settings.checkpoints(steps, epochs) * measured.checkpoint,
            "scoring": len(scored) * measured.scoring_start + sum(scored) * measured.scoring,
            "choosing": epochs * choosing,
            "evaluation": settings.evaluations(steps, epochs) * measured.evaluation,
        },
        acts=not policy.looks_once(shape, epochs),
    )


# ---- what a finished run tells -------------------------------------------------------------------


@dataclass(frozen=True)
class Potential:
    """What the effective share of a finished run lets expect of pruning.

    Attributes:
        name: The run, in words.
        gain: G, the mean over its epochs of 1 / effective share.
        keep_ratio: What the advised policy keeps: at it the run costs what the finished one did. If
            that was not shorter than the full run, 1 / G.
        saving: The factor by which a short run with the same result is predicted to cost more.
        same_data: False if the report does not say which data it is of.
        acts: False if the policy sees too few epochs to choose by scores.
    """

    name: str
    gain: float
    keep_ratio: float
    saving: Saving
    same_data: bool = True
    acts: bool = True

    @classmethod
    def of(cls, report: PruningReport, shape: RunShape, name: str) -> "Potential":
        """From the report of a finished run on the same data.

        Args:
            report: Of the finished run.
            shape: Of the run to advise on.
            name: Of the finished run.

        Raises:
            ValueError: If the report is of another number of samples, or has no effective share.
        """
        if report.num_samples != shape.samples:
            raise ValueError(
                f"{name} trained on {report.num_samples:,} samples, and this run has "
                f"{shape.samples:,}: expected a run on the same data."
            )
        gain = report.gain
        if gain is None:
            raise ValueError(
                f"The report of {name} has no effective share: train a short run with this "
                "version, of a model whose loss of one sample is known (pruning=FullData())."
            )
        cost = 1.0 if shape.num_epochs is None else report.cost_against(shape.num_epochs)
        ratio = cost if 0.01 <= cost <= 0.95 else min(0.95, max(0.05, 1 / gain))
        found = cls(
            name,
            gain,
            round(ratio, 2),
            predicted_saving(gain),
            same_data="fingerprint" in report.provenance.get("dataset", {}),
        )
        epochs = len(list(planned_epochs(found.policy, shape)))
        return replace(found, acts=not found.policy.looks_once(shape, epochs))

    @property
    def policy(self) -> PruningPolicy:
        """The policy that is advised."""
        return LossProportional(self.keep_ratio)

    @property
    def prunes(self) -> bool | None:
        """True if all of the interval saves, False if the middle hardly does, else None."""
        if self.saving.factor < _WORTH:
            return False
        return True if self.saving.low > 1 else None

    def __str__(self) -> str:
        """Prune or not, which rule, which ratio: two sentences."""
        costs = [f"{100 / factor:.0f}" for factor in self.saving]
        middle, most, least = costs
        beyond = ""
        if self.gain > STUDIES.highest:
            beyond = f"; G is above the {STUDIES.highest:.2f} of these, at which the line ends"
        predicted = (
            f"{self.policy} is predicted to need {middle} % of the cost of a short run with the "
            f"same result (95 % interval {least} to {most} %, from {STUDIES.studies} of our "
            f"studies{beyond})"
        )
        begin = {True: "Prune", False: "Do not prune", None: "Pruning may pay"}[self.prunes]
        first = f"{begin}: the samples of {self.name} have a mean G of {self.gain:.2f}, so "
        if self.prunes is False:
            second = (
                "Take the short run: all data, fewer epochs; the predicted saving is too little to "
                "count on."
            )
        else:
            what = "That holds" if self.prunes else "Compare it with the short run"
            second = (
                f"{what} if the full run is ahead of the short run by {LEAST_LOST} points or more; "
                "otherwise take the short run."
            )
        notes = ""
        if self.prunes is not False and not self.acts:
            notes += (
                f" In this run {self.policy} is random: it sees most samples at most once. Plan "
                "more epochs, or take the short run."
            )
        if not self.same_data:
            notes += f" {self.name} does not say which data it is of: make sure that it is these."
        return f"{first}{predicted}. {second}{notes}"

    def to_dict(self) -> dict[str, Any]:
        """JSON values. `cost` is the share of a short run's cost, `interval` that of 95 %."""
        middle, low, high = self.saving
        return {
            "run": self.name,
            "gain": self.gain,
            "prune": self.prunes,
            "acts": self.acts,
            "same_data": self.same_data,
            "policy": self.policy.to_dict(),
            "keep_ratio": self.keep_ratio,
            "cost": 1 / middle,
            "interval": [1 / high, 1 / low],
            "studies": STUDIES.studies,
        }


After = PruningReport | str | os.PathLike[str]


def finished_run(after: After) -> tuple[PruningReport, str]:
    """The report of a finished run and its name.

    Args:
        after: A report, its file, the folder of the run, or that of a checkpoint.
    """
    if isinstance(after, PruningReport):
        return after, "the given run"
    path = Path(after)
    found = [path / name for name in (REPORT_FILE, STATE_FILE)] if path.is_dir() else [path]
    file = next((file for file in found if file.is_file()), None)
    if file is None:
        raise FileNotFoundError(
            f"{path} is not a finished run: expected a {REPORT_FILE}, its folder, or the folder of "
            "a checkpoint."
        )
    if file.name != STATE_FILE:
        return PruningReport.load(file), printable(path)
    state = file.parent / TRAINER_STATE_NAME
    if state.is_file():
        at = TrainerState.load_from_json(str(state))
        # A run whose policy sets its own cost ends before max_steps.
        if at.global_step < at.max_steps and (at.epoch or 0) < at.num_train_epochs:
            raise ValueError(
                f"{printable(path)} is of epoch {at.epoch:g} of {at.num_train_epochs}: expected a "
                "finished run. A run that goes on has another cost, and other losses when its "
                f"learning rate has come down. Give its last checkpoint, or its {REPORT_FILE}."
            )
    _, metadata = load_tensors(file)
    return PruningReport.from_dict(metadata.get("report", {})), printable(path)


def _check_same(report: PruningReport, trainer: Trainer, name: str) -> None:
    """Raise ValueError if a finished run had another task, or other data of the same length.

    Fingerprints decide. Id and labels, compared before, only make the error clearer.
    """
    there = report.provenance
    here = provenance_of(trainer, dataset_fingerprint(trainer.train_dataset))

    def differ(what: str, theirs: Any, ours: Any, way_out: str) -> None:
        if None not in (theirs, ours) and theirs != ours:
            raise ValueError(
                f"The {what} of {name} is {printable(theirs)!r}, of this run {ours!r}: {way_out}"
            )

    same = "expected a run of the same task on the same training set, in its order."
    differ("task", there.get("task"), here.get("task"), same)
    theirs, ours = there.get("dataset", {}), here.get("dataset", {})
    if theirs.get("fingerprint") == ours["fingerprint"]:
        return
    for part, what in (("id", "dataset"), ("labels", "checksum of the labels")):
        differ(what, theirs.get(part), ours.get(part), same)
    own = printable(theirs.get("fingerprint", ""))
    differ(
        "fingerprint of the training set",
        theirs.get("fingerprint"),
        ours["fingerprint"],
        "expected a run on the same columns and rows. If you are sure that the data are the same, "
        f"set the dataset's attribute {OWN}={own!r}; on the command line add --same_data.",
    )


# ---- advice --------------------------------------------------------------------------------------

_UNKNOWN = (
    "Whether pruning can pay is not known yet: it depends on the effective share of your data, "
    "which fresh weights cannot show. Train a short run with pruning=FullData(), save its report, "
    "and ask again with it (after=report; hf-dynprune advise --after runs/short)."
)


@dataclass(frozen=True)
class Advice:
    """What [`advise`] found. `str` gives a table and the findings, `to_dict` the same as JSON.

    Attributes:
        settings: The settings of the run.
        measured: The seconds measured in the dry run.
        full: The run on all data.
        predictions: The other runs.
        potential: What a finished run lets expect; None if none was given.
        findings: Topic -> finding in words. `"potential"` comes first, then the `"answer"` about
            seconds; `"short run"` is last.
    """

    settings: Settings
    measured: Measured
    full: Prediction
    predictions: list[Prediction]
    potential: Potential | None = None
    findings: dict[str, str] = field(init=False)

    def __post_init__(self) -> None:
        found = {
            "potential": _UNKNOWN if self.potential is None else str(self.potential),
            "answer": _answer(self),
            "estimates": _estimates(self),
            "first looks": _first_looks(self),
            "loader": _loader(self),
            "epoch starts": _epoch_starts(self),
            **{phase: _eaten(self, phase) for phase in _WAYS_OUT},
            "short run": _SHORT_RUN,
        }
        found = {topic: text for topic, text in found.items() if text}
        object.__setattr__(self, "findings", found)

    @property
    def acting(self) -> list[Prediction]:
        """The predictions that need no assumption and in which scores can act."""
        return [row for row in self.predictions if row.acts and row.assumed is None]

    @property
    def best(self) -> Prediction | None:
        """The quickest of the acting predictions; None if there is none."""
        return min(self.acting, key=lambda row: row.total, default=None)

    def saved(self, prediction: Prediction) -> float:
        """The share of the full run's seconds that is saved; negative if the run takes longer."""
        return 1 - prediction.total / self.full.total

    def short_epochs(self, prediction: Prediction) -> float:
        """Epochs on all data that take as long: those of the short run, the baseline to beat."""
        start, epochs = self.measured.run_start, self.full.passes / self.settings.shape.samples
        return (prediction.total - start) / (self.full.total - start) * epochs

    def to_dict(self) -> dict[str, Any]:
        """Findings, settings, measured seconds and predictions as JSON values."""
        return {
            "findings": self.findings,
            "potential": None if self.potential is None else self.potential.to_dict(),
            "settings": self.settings.to_dict(),
            "measured": {**asdict(self.measured), "step": self.measured.step},
            "predictions": [self._row(row) for row in (self.full, *self.predictions)],
        }

    def _row(self, row: Prediction) -> dict[str, Any]:
        estimate = None
        if row.assumed is not None:
            estimate = {"kept": list(row.assumed), "least_seconds": row.least_seconds}
        return {
            "policy": row.policy.to_dict(),
            "label": str(row.policy),
            "keep_ratio": getattr(row.policy, "keep_ratio", None),
            "total_seconds": row.total,
            "seconds": row.seconds,
            "saved_seconds": self.full.total - row.total,
            "saved": self.saved(row),
            "cost": row.passes / self.full.passes,
            "epochs": row.epochs,
            "steps": row.steps,
            "short_run_epochs": self.short_epochs(row),
            "acts": row.acts,
            "estimate": estimate,
        }

    def __str__(self) -> str:
        rows = [["policy", "cost", *PHASES, "total", "saved", "same time: all data for"]]
        for row in (self.full, *self.predictions):
            rows.append(
                [
                    ("~ " if row.assumed else "") + str(row.policy),
                    f"{row.passes / self.full.passes:.3f}",
                    *(_duration(row.seconds[phase]) for phase in PHASES),
                    _duration(row.total),
                    "" if row is self.full else _percent(self.saved(row)),
                    f"{self.short_epochs(row):.1f} epochs",
                ]
            )
        m = self.measured
        parts = ", ".join(
            f"{part} {_duration(getattr(m, part))}"
            for part in ("waiting", "forward", "backward", "optimizer")
        )
        step = f"A step takes {_duration(m.step)} ({parts}; {m.steps} steps timed)."
        first, *others = self.findings.values()
        return "\n".join([first, "", *_table(rows), "", step, *others])


def _table(rows: list[list[str]]) -> list[str]:
    """Align the first column to the left and the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for first, *others in rows:
        cells = [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
        lines.append("  ".join([first.ljust(widths[0]), *cells]))
    return lines


def _duration(seconds: float) -> str:
    for unit, size in (("h", 3600.0), ("min", 60.0), ("s", 1.0)):
        if abs(seconds) >= 2 * size or (unit == "s" and abs(seconds) >= 0.1):
            return f"{seconds / size:.1f} {unit}"
    return f"{1000 * seconds:.1f} ms" if seconds else "0"


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"


# ---- findings: each in words, or "" if there is nothing to say -----------------------------------

_WAYS_OUT = {
    "evaluation": "It costs the same however much is kept: evaluate less often (eval_strategy, "
    "eval_steps), or on less data.",
    "scoring": "Score by training losses (scoring='trained', at no cost), or choose less often "
    "(period).",
}
_SHORT_RUN = (
    "Compare with the short run: all data, for the epochs in the last column. It takes the same "
    "time, and its learning rate reaches zero, too. If its result is as good, take the short run."
)


def _answer(advice: Advice) -> str:
    max_steps, best = advice.settings.shape.max_steps, advice.best
    if max_steps is not None:
        return (
            f"In seconds: pruning saves nothing here. max_steps={max_steps} is a budget that every "
            "run spends: a pruned run trains more epochs, of fewer samples, in the same time. To "
            "save time, set num_train_epochs instead."
        )
    if best is None or advice.saved(best) < 0.1:
        return "In seconds: no policy in the table that can act saves 10 % of the full run."
    quickest: dict[str, Prediction] = {}  # the last row of a keep_ratio, which is its quickest
    for row in sorted(advice.acting, key=lambda row: row.total, reverse=True):
        if advice.saved(row) > 0:
            keep_ratio = getattr(row.policy, "keep_ratio", None)
            how = str(row.policy) if keep_ratio is None else f"keep_ratio={keep_ratio:g}"
            quickest[how] = row
    savings = ", ".join(
        f"{how} takes {_duration(row.total)} ({_percent(advice.saved(row))} less)"
        for how, row in sorted(quickest.items(), key=lambda item: item[1].total)
    )
    return (
        f"In seconds: the full run takes {_duration(advice.full.total)}; {savings}. Only a run "
        "shows what pruning does to the result."
    )


def _estimates(advice: Advice) -> str:
    ranges = [
        f"{row.policy} keeps {row.assumed[0]:.2f} to {row.assumed[1]:.2f} and takes "
        f"{_duration(row.least_seconds)} to {_duration(row.total)}"
        for row in advice.predictions
        if row.assumed is not None and row.least_seconds is not None
    ]
    if not ranges:
        return ""
    return (
        "~ Estimates: how much these policies keep depends on the data. The table shows the upper "
        f"end of what is assumed: {'; '.join(ranges)}."
    )


def _first_looks(advice: Advice) -> str:
    idle = [str(row.policy) for row in advice.predictions if not row.acts]
    if not idle:
        return ""
    return (
        f"Cannot act: {', '.join(idle)}. Samples that were never observed come first, and the run "
        "is too short to observe all samples and then choose by their scores (epochs: "
        f"{advice.full.epochs}). The choice is as random as RandomPruning's. Use more epochs or a "
        "larger keep_ratio, or set first=1 (start with a full-data epoch). Forward passes that "
        "score all samples (scoring='all') let scores decide, too; in our study they cost 14 to 28 "
        "points."
    )


def _loader(advice: Advice) -> str:
    m, full = advice.measured, advice.full
    if not m.loader_is_slow:
        return ""
    return (
        f"The data loader is the bottleneck: {_percent(m.behind / m.step)} of a step is waiting "
        "for data. Pruning saves that time, too, because it loads only what it keeps; scoring "
        "passes do not. "
        "With a loader as fast as the model the full run would take "
        f"{_duration(full.total - full.steps * m.behind)} instead of {_duration(full.total)}: use "
        f"more workers (dataloader_num_workers={advice.settings.workers} now), or decode the "
        f"samples once (vision.ImageCache).{_in_order(m)}"
    )


def _in_order(measured: Measured) -> str:
    """What the order of the dataset would save, as a sentence; empty if it saves little."""
    before, after = measured.loading, measured.loading_in_order
    if not 0 < after < (1 - _NOTABLE) * before:
        return ""
    return (
        f" In the order of the dataset a batch is loaded in {_percent(after / before)} of the "
        "time: shuffle the dataset once on disk (shuffle, flatten_indices, save_to_disk) and set "
        "train_sampling_strategy='sequential'. Pruning goes with it."
    )


def _epoch_starts(advice: Advice) -> str:
    settings, best = advice.settings, advice.best
    each = advice.measured.epoch_start
    starts = advice.full.epochs * each
    if best is None or not settings.workers or settings.persistent_workers:
        return ""
    if starts <= _NOTABLE * best.total:
        return ""
    return (
        f"Starting the loader takes {_duration(each)} per epoch, however much is kept: "
        f"{_duration(starts)} of the {_duration(best.total)} of {best.policy}. Set "
        "dataloader_persistent_workers=True, or use fewer workers."
    )


def _eaten(advice: Advice, phase: str) -> str:
    eaten = [
        (row.seconds[phase] / row.total, str(row.policy))
        for row in advice.predictions
        if row.seconds[phase] > _NOTABLE * row.total
    ]
    if not eaten:
        return ""
    share, policy = max(eaten)
    others = ""
    if len(eaten) > 1:
        plural = "s" if len(eaten) > 2 else ""
        others = f", and more than {_percent(_NOTABLE)} of {len(eaten) - 1} other run{plural}"
    return (
        f"{phase.capitalize()} eats the gain: it takes {_percent(share)} of {policy}{others}. "
        f"{_WAYS_OUT[phase]}"
    )


# ---- the dry run ---------------------------------------------------------------------------------


def advise(
    trainer: Trainer,
    *,
    policies: Sequence[PruningPolicy] | None = None,
    batches: int = 20,
    after: After | None = None,
) -> Advice:
    """Predict whether pruning pays for a run, and how much, before the run is paid for.

    The seconds come from a dry run. Whether pruning can be as good as a short run of the same cost
    depends on the effective share of the data, see `hf_dynprune.potential`, which only a trained
    model shows: give a finished short run, `after`.

    A copy of the trainer, with a copy of its model and optimizer, trains some batches with the
    Trainer's own `train()`. Then its loaders, its evaluation, a scoring pass and a choice of each
    policy are timed. Weights, optimizer, random states, output folder and the trainer are not
    changed. Callbacks do not run, except for the Trainer's own flow: their time is not in the
    prediction. A later run in the same process may be quicker to start than `run_start` says,
    because kernels were chosen and graphs compiled in the dry run.

    Args:
        trainer: A Trainer that was not trained yet, or an instance of a subclass, with or without
            pruning. Without pruning, steps are assumed to take as long as with it; we measured this
            for several models.
        policies: The policies to predict. *Optional*, defaults to the trainer's policy,
            LossProportional, RandomPruning and UCB at several keep ratios, UCB with forward passes
            that score, and InfoBatch.
        batches: The least number of batches to train, at least 4. On one rank the training lasts at
            least 5 s. A quarter as many batches are evaluated.
        after: A finished run on the same data, best a short run with `FullData()`: its report, the
            file or folder of it, or the folder of a checkpoint. *Optional*; without it `potential`
            is None.

    Returns:
        The [`Advice`]: print it.

    Raises:
        TypeError: If it is not a Trainer.
        ValueError: If its training data have no length, if a policy does not fit the run, or if the
            finished run had other data or another task, or has no effective share.
        FileNotFoundError: If `after` is not a finished run.

    Cost: the batches, and the memory of a second model. If there are several ranks, all of them
    must call it; each measures for itself.
    """
    _check(trainer, batches)
    settings = Settings.of(trainer)
    potential = None
    if after is not None:
        report, name = finished_run(after)
        potential = Potential.of(report, settings.shape, name)
        _check_same(report, trainer, name)
    if policies is None:
        own, policies = getattr(trainer, "pruning", None), _usual(settings.shape)
        if own is not None and not isinstance(own, FullData):
            policies = [own, *(policy for policy in policies if policy != own)]
    for policy in policies:  # raises for a policy that does not fit, before anything is measured
        predict(policy, settings, Measured(0, 0.0, 0.0, 0.0, 0.0))
    scores = any(policy.scoring != "trained" for policy in policies)
    watch = _Watch(
        trainer.args.device,
        warm_up=_WARM_UP + math.ceil(_ahead(trainer.args) / settings.shape.accumulation),
        least=math.ceil(batches / settings.shape.accumulation),
        save=settings.save_strategy != "no",
    )
    with _dry_run(trainer, watch) as dry:
        measured = _measure(dry, watch, settings, batches, scores=scores)
    full, *others = (
        predict(policy, settings, measured, choosing=_time_choosing(policy, settings.shape))
        for policy in (FullData(), *policies)
    )
    return Advice(settings, measured, full, others, potential)


def _check(trainer: Any, batches: int) -> None:
    if not isinstance(trainer, Trainer):
        raise TypeError(
            f"trainer={trainer!r} is not a transformers Trainer: pass one that was made and not "
            "trained yet."
        )
    check_count("batches", batches, 4)
    dataset: Any = trainer.train_dataset
    if not hasattr(dataset, "__len__") or len(dataset) == 0:
        raise ValueError(
            f"The training dataset is a {type(dataset).__name__} without samples or without a "
            "length, which cannot be pruned: pass a map-style dataset (`load_dataset(..., "
            "streaming=False)`)."
        )


def _usual(shape: RunShape) -> list[PruningPolicy]:
    least = shape.global_batch if shape.drop_last else 1
    ratios = [ratio for ratio in (0.1, 0.3, 0.5, 0.7) if keep_count(ratio, shape.samples) >= least]
    scored = [UCB(0.3, scoring=scoring) for scoring in _SCORING if 0.3 in ratios]
    drawn = [rule(ratio) for rule in (LossProportional, RandomPruning, UCB) for ratio in ratios]
    return [*drawn, *scored, InfoBatch()]


def _now(device: torch.device) -> float:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter()


def _ends(part: str) -> Callable[..., None]:
    """Make an event handler at which a part of the step ends."""
    return lambda self, *args, **kwargs: self.lap(part)


class _Watch(TrainerCallback):
    """Times the parts of each optimizer step, and stops the training when it has timed enough.

        end of the step before ─waiting─▶ on_step_begin ─backward─▶ before the forward pass
        ─forward─▶ after it ─backward─▶ on_substep_end or on_pre_optimizer_step
        ─optimizer─▶ on_step_end ─optimizer─▶ on_log ─▶ on_save

    Args:
        device: The device that is synchronised before each reading.
        warm_up: Steps that are not timed.
        least: The least number of steps to time.
        save: Whether to write a checkpoint at the end.
    """

    def __init__(self, device: torch.device, *, warm_up: int, least: int, save: bool) -> None:
        self.device, self.warm_up, self.least, self.save = device, warm_up, least, save
        self.steps: list[Mapping[str, float]] = []  # seconds by part
        self.first_in_epoch: set[int] = set()  # positions in `steps`
        self.first_epoch = math.inf  # when it began
        self.checkpoint = 0.0
        self.predicted: list[float] = []  # when each evaluation batch was done
        self.mark = 0.0
        self.step: dict[str, float] = defaultdict(float)

    def lap(self, part: str) -> None:
        """Add the time since the last lap to a part of the step."""
        before, self.mark = self.mark, _now(self.device)
        self.step[part] += self.mark - before

    def on_train_begin(self, *args: Any, model: Any = None, **kwargs: Any) -> None:
        self.hooks = [
            model.register_forward_pre_hook(lambda *_: self.lap("backward")),
            model.register_forward_hook(lambda *_: self.lap("forward")),
        ]

    def on_epoch_begin(self, *args: Any, **kwargs: Any) -> None:
        self.lap("epoch")
        self.first_epoch = min(self.first_epoch, self.mark)
        self.first_in_epoch.add(len(self.steps))

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self.step = defaultdict(float)
        self.steps.append(self.step)
        self.lap("waiting")

    on_substep_end = _ends("backward")
    on_pre_optimizer_step = _ends("backward")
    on_log = _ends("optimizer")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.lap("optimizer")
        timed = len(self.steps) - self.warm_up
        if timed == 0:
            self.since = self.mark
        # All ranks must stop at the same step, and their clocks differ.
        enough = timed >= self.least and (
            args.world_size > 1 or self.mark - self.since >= _LEAST_SECONDS
        )
        if enough or state.global_step >= state.max_steps:
            control.should_training_stop, control.should_save = True, self.save

    def on_save(self, *args: Any, **kwargs: Any) -> None:
        self.step = defaultdict(float)  # a checkpoint belongs to no step
        self.lap("checkpoint")
        self.checkpoint = self.step["checkpoint"]

    def on_epoch_end(self, *args: Any, **kwargs: Any) -> None:
        self.step = defaultdict(float)  # nor does what follows

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        for hook in self.hooks:
            hook.remove()

    def on_prediction_step(self, *args: Any, **kwargs: Any) -> None:
        self.predicted.append(_now(self.device))


def _typical_step(
    steps: Sequence[Mapping[str, float]],
    first_in_epoch: Collection[int],
    *,
    warm_up: int,
    workers: bool,
) -> tuple[dict[str, float], float]:
    """Average the steps that `_Watch` timed. Pure.

    The tenth of the steps that computes the longest and the tenth that computes the shortest are
    left out. Waiting for workers comes in bursts, so its mean is over all steps. The first step of
    an epoch waits for the loader to start, so it is left out of the waiting.

    Returns:
        Mean seconds of a step by part, and the extra seconds of the steps before those that count.
    """
    first = min(warm_up, len(steps) - 1)
    compute = [sum(step.values()) - step["waiting"] for step in steps]
    timed = range(first, len(steps))
    cut = len(timed) // 10
    kept = sorted(timed, key=lambda i: compute[i])[cut : len(timed) - cut]
    means = {
        part: fmean(steps[i].get(part, 0.0) for i in kept)
        for part in ("forward", "backward", "optimizer")
    }
    extra = sum(compute[:first]) - first * sum(means.values())
    waits = [steps[i]["waiting"] for i in (timed if workers else kept) if i not in first_in_epoch]
    return {**means, "waiting": fmean(waits) if waits else 0.0}, max(0.0, extra)


@contextmanager
def _dry_run(trainer: Trainer, watch: _Watch) -> Iterator[Any]:
    """Yield a copy of the trainer to train; afterwards random states and disk are as before."""
    device, output = trainer.args.device, Path(trainer.args.output_dir or ".")
    python, numpy = random.getstate(), np.random.get_state()
    disk = output if output.is_dir() else None  # where a checkpoint takes as long as in the run
    with (
        torch.random.fork_rng([device] if device.type == "cuda" else []),
        tempfile.TemporaryDirectory(dir=disk) as scratch,
    ):
        try:
            yield _dry_copy(trainer, watch, scratch)
        finally:
            trainer.accelerator.free_memory()  # shared: it holds what the copy prepared
            random.setstate(python)
            np.random.set_state(numpy)


def _dry_copy(trainer: Trainer, watch: _Watch, folder: str) -> Any:
    """Copy a trainer, so that training the copy leaves the trainer as it was.

    This function alone depends on what a Trainer holds. What is not replaced is shared with the
    trainer: datasets, collator, metrics and accelerator.
    """
    # Together, so that the optimizer holds the parameters of the copy.
    model, optimizer = copy.deepcopy((trainer.model, trainer.optimizer))
    args = copy.copy(trainer.args)  # a new object would set up the devices again
    vars(args).update(
        output_dir=folder,  # the checkpoint goes there
        push_to_hub=False,  # it must not be uploaded
        disable_tqdm=True,  # the dry run is not shown
        eval_strategy=IntervalStrategy.NO,  # evaluation is timed by itself
        eval_on_start=False,  # likewise
        save_strategy=SaveStrategy.NO,  # `_Watch` asks for the checkpoint
        load_best_model_at_end=False,  # needs evaluations
    )
    dry: Any = copy.copy(trainer)
    vars(dry).update(
        args=args,
        model=model,  # its weights change
        model_wrapped=model,  # the Trainer trains this one
        optimizer=optimizer,  # its state changes
        lr_scheduler=None,  # one that was passed in would move on
        control=TrainerControl(),  # `_Watch` stops the training by it
        # The user's callbacks might write or log.
        callback_handler=CallbackHandler(
            [DefaultFlowCallback(), watch], model, trainer.processing_class, optimizer, None
        ),
    )
    if getattr(trainer, "pruning", None) is not None:  # train on everything, and observe it
        observes = getattr(trainer, "loss_rule", None) is not None
        dry.pruning = UCB(keep_ratio=1.0) if observes else FullData()
    return dry


def _measure(
    dry: Any, watch: _Watch, settings: Settings, batches: int, *, scores: bool
) -> Measured:
    """Train, load, evaluate and score with a dry copy.

    Args:
        dry: The copy, which `watch` watches.
        watch: Times its training.
        settings: Of the run.
        batches: As for [`advise`].
        scores: Whether to time a scoring pass.
    """
    args = dry.args
    begun = _now(args.device)
    dry.train()
    step, extra = _typical_step(
        watch.steps,
        watch.first_in_epoch,
        warm_up=watch.warm_up,
        workers=settings.workers > 0,
    )
    # The loaders and evaluations below need no pruning, and no workers that stay.
    dry.pruning, args.dataloader_persistent_workers = None, False
    loading, epoch_start = _time_loader(dry, max(batches, 8 * settings.workers))
    evaluation = scoring = scoring_start = 0.0
    if settings.eval_on_start or settings.eval_strategy != "no":
        datasets = dry.eval_dataset
        for dataset in datasets.values() if isinstance(datasets, dict) else [datasets]:
            evaluation += _time_evaluation(dry, watch, dataset, batches // 4)[0]
    if scores:
        dry.compute_metrics = None  # a scoring pass computes none
        dataset = getattr(dry, "scoring_dataset", None)
        dataset = dry.train_dataset if dataset is None else dataset
        whole, batch = _time_evaluation(dry, watch, dataset, batches // 4)
        scoring = batch / (args.eval_batch_size * args.world_size)
        scoring_start = max(0.0, whole - settings.shape.samples * scoring)
    measured = Measured(
        steps=max(1, len(watch.steps) - watch.warm_up),
        **step,
        loading=loading * settings.shape.accumulation,
        epoch_start=epoch_start,
        run_start=watch.first_epoch - begun + extra,
        scoring=scoring,
        scoring_start=scoring_start,
        evaluation=evaluation,
        checkpoint=watch.checkpoint,
    )
    in_order = "sequential"
    may_change = args.train_sampling_strategy == "random" and in_order in orders_of(dry)[1]
    if not (may_change and measured.loader_is_slow):
        return measured
    args.train_sampling_strategy = in_order
    each, _ = _time_loader(dry, max(batches, 8 * settings.workers))
    return replace(measured, loading_in_order=each * settings.shape.accumulation)


def _ahead(args: Any) -> int:
    """The number of batches that the workers have loaded before the model asks for one."""
    return args.dataloader_num_workers * (args.dataloader_prefetch_factor or 2)


def _time_loader(dry: Trainer, batches: int) -> tuple[float, float]:
    """Return seconds per batch of a running loader, and seconds to start and stop the loader."""
    ahead = _ahead(dry.args)
    begun = time.perf_counter()
    loading = iter(dry.get_train_dataloader())
    loaded: list[float] = []  # when each batch was there
    while len(loaded) <= ahead + batches and next(loading, None) is not None:
        loaded.append(time.perf_counter())
    ended = time.perf_counter()
    del loading  # stops the workers
    stopping = time.perf_counter() - ended
    if len(loaded) == 1:
        return loaded[0] - begun, stopping
    first = min(ahead, len(loaded) - 2)
    each = (loaded[-1] - loaded[first]) / (len(loaded) - 1 - first)
    return each, max(0.0, loaded[0] - begun - each) + stopping


def _time_evaluation(
    dry: Trainer, watch: _Watch, dataset: Any, batches: int
) -> tuple[float, float]:
    """Evaluate some batches; return the seconds of the whole dataset and of a batch.

    A dataset without a length is evaluated as a whole.
    """
    size, device = dry.args.eval_batch_size * dry.args.world_size, dry.args.device
    some, all_batches = dataset, 0
    if hasattr(dataset, "__len__"):
        dry.evaluate(_evenly(dataset, 2 * size))  # warm-up
        some, all_batches = _evenly(dataset, batches * size), math.ceil(len(dataset) / size)
    watch.predicted.clear()
    begun = _now(device)
    dry.evaluate(some)
    whole, done = _now(device) - begun, watch.predicted
    each = (done[-1] - done[0]) / (len(done) - 1) if len(done) > 1 else whole
    return whole + max(0, all_batches - len(done)) * each, each


def _evenly(dataset: Any, size: int) -> Any:
    """Return `size` evenly spaced samples, or the dataset if it has no more."""
    n = len(dataset)
    if n <= size:
        return dataset
    index = [i * n // size for i in range(size)]
    return dataset.select(index) if hasattr(dataset, "select") else Subset(dataset, index)


def _time_choosing(policy: PruningPolicy, shape: RunShape) -> float:
    """Return the seconds of a choice: apply an epoch's observations, choose, make the order."""
    n, epochs = shape.samples, policy.first + 2
    # Every epoch after the first full-data ones chooses, and trains on one batch.
    pruner = DynamicPruner(replace(policy, period=1, last=0.0), RunShape(n, n, num_epochs=epochs))
    generator = torch.Generator().manual_seed(0)

    def observed(index: Tensor) -> dict[str, Tensor]:
        signals = {
            name: torch.rand(len(index), generator=generator) for name in pruner.scored_signals
        }
        if policy.min_per_class:
            signals[LABEL] = torch.zeros(len(index))
        return signals

    for epoch in range(epochs - 1):
        pruner.begin_epoch(epoch, scorer=observed)
        index = torch.tensor(list(pruner.sampler))[:n].clamp(min=-1)  # negative: padding
        pruner.observe(index, observed(index))
    begun = time.perf_counter()
    pruner.begin_epoch(epochs - 1, scorer=observed)
    return time.perf_counter() - begun
