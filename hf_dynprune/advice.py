"""Should I prune, and how much? A short dry run of the Trainer, and from it the seconds of the whole run under each policy.

[`advise`] measures, on this machine and with the run's own model, loader and arguments, and says the answer in words, as a
table and as JSON. [`predict`] is the arithmetic behind it: a pure function of what was measured.
"""

import copy
import math
import random
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from statistics import fmean
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Subset
from transformers import Trainer, TrainerCallback
from transformers.trainer_callback import CallbackHandler, DefaultFlowCallback, TrainerControl
from transformers.trainer_utils import IntervalStrategy, SaveStrategy

from .policies import (
    IES,
    KAKURENBO,
    UCB,
    EpochPlan,
    FullData,
    InfoBatch,
    PruningPolicy,
    RandomPruning,
    SeTa,
    check_count,
    keep_count,
)
from .pruner import LABEL, DynamicPruner
from .report import PHASES
from .trainer import looks_once

# Of a share of the run's, or a step's, seconds that is worth a word.
_NOTABLE = 0.3
# The dry run trains for as many batches as it is told, and for so many seconds: small models make their steps in bursts.
_LEAST_SECONDS = 5.0
# Steps that are left out: memory is allocated, kernels are chosen, caches fill.
_WARM_UP = 3
_SCORING: tuple[Literal["trained", "dropped", "all"], ...] = ("trained", "dropped", "all")


# ---- what a run is, and what it takes ------------------------------------------------------------


@dataclass(frozen=True)
class Settings:
    """What the length of a run follows from: the arguments of [`DynamicPruner`]; when the Trainer evaluates and saves."""

    num_samples: int
    batch_size: int
    num_epochs: float | None
    max_steps: int | None = None
    accumulation: int = 1
    drop_last: bool = False
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
        args: Any = trainer.args
        evaluates = trainer.eval_dataset is not None
        return cls(
            num_samples=len(trainer.train_dataset),  # type: ignore[arg-type]  # `_check` has seen that it has a length
            batch_size=args.train_batch_size,
            num_epochs=None if args.max_steps > 0 else args.num_train_epochs,
            max_steps=args.max_steps if args.max_steps > 0 else None,
            accumulation=args.gradient_accumulation_steps,
            drop_last=args.dataloader_drop_last,
            persistent_workers=args.dataloader_persistent_workers,
            workers=args.dataloader_num_workers,
            eval_strategy=args.eval_strategy.value if evaluates else "no",
            eval_steps=args.eval_steps or 1,
            eval_delay=args.eval_delay or 0,
            eval_on_start=args.eval_on_start and evaluates,
            save_strategy=args.save_strategy.value,
            save_steps=args.save_steps,
        )

    def pruner(self, policy: PruningPolicy) -> DynamicPruner:
        return DynamicPruner(
            policy,
            self.num_samples,
            batch_size=self.batch_size,
            num_epochs=self.num_epochs,
            max_steps=self.max_steps,
            accumulation=self.accumulation,
            drop_last=self.drop_last,
        )

    def evaluations(self, steps: int, epochs: int) -> int:
        return self.eval_on_start + _how_often(
            self.eval_strategy, self.eval_steps, self.eval_delay, steps, epochs
        )

    def checkpoints(self, steps: int, epochs: int) -> int:
        if self.save_strategy == "best":  # at the most: wherever it evaluates
            return self.evaluations(steps, epochs) - self.eval_on_start
        return _how_often(self.save_strategy, self.save_steps, 0, steps, epochs)


def _how_often(strategy: str, every: float, delay: float, steps: int, epochs: int) -> int:
    """How often the Trainer does what it does at each epoch's end, or every so many steps and at the last."""
    if strategy == "epoch":
        return sum(epoch >= delay for epoch in range(1, epochs + 1))
    if strategy == "steps":
        every = max(1, int(every) if every >= 1 else math.ceil(steps * every))
        return sum(step >= delay for step in {*range(every, steps + 1, every), steps})
    return 0


@dataclass(frozen=True)
class Measured:
    """Seconds of wall-clock, from a dry run.

    Attributes:
        steps: optimizer steps that were timed.
        waiting: of a step, for its batches: what the loader is behind the model; without workers all of `loading`, and what
            the loop does between two steps.
        forward, backward, optimizer: of a step; with the loss and gradient clipping in `backward`, logging in `optimizer`.
        loading: of the batches of a step, when the loader has nothing to wait for.
        epoch_start: starting and stopping the loader, with its workers.
        run_start: of `train()` before its first epoch, and what the first steps take longer.
        scoring: of a sample in a pass that scores; `scoring_start` of such a pass beside its samples.
        evaluation: once, on all evaluation data.
        checkpoint: once.
    """

    steps: int
    waiting: float
    forward: float
    backward: float
    optimizer: float
    loading: float = 0.0
    epoch_start: float = 0.0
    run_start: float = 0.0
    scoring: float = 0.0
    scoring_start: float = 0.0
    evaluation: float = 0.0
    checkpoint: float = 0.0

    @property
    def behind(self) -> float:
        """Of a step: what a loader that keeps up would save."""
        return min(self.waiting, self.loading)

    @property
    def step(self) -> float:
        """Of an optimizer step, waiting included."""
        return self.waiting + self.forward + self.backward + self.optimizer


# ---- prediction ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Prediction:
    """What a run would take.

    Attributes:
        policy: its rule.
        epochs: that it begins; `steps`: its optimizer steps.
        passes: samples through forward and backward; one that is only scored counts as a third.
        seconds: by the phases of a [`PruningReport`]; `training` holds start-ups and checkpoints.
        assumed: None; or, where how much is kept depends on the data, the least and the most that is taken to be kept. The
            other attributes are then those of the most.
        least_seconds: in all, with the least kept; None where nothing is assumed.
        acts: False where scores are to decide and cannot, see [`hf_dynprune.trainer.looks_once`].
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
        return sum(self.seconds.values())


def predict(
    policy: PruningPolicy, settings: Settings, measured: Measured, *, choosing: float = 0.0
) -> Prediction:
    """The seconds and the cost of a whole run under a policy. Pure.

        training    start of the run + samples / samples of a step * (waiting + forward + backward) + steps * optimizer
                    + epochs * start of an epoch + checkpoints
        scoring     for each choice that scores: start of a pass + samples * sample
        choosing    epochs * `choosing`
        evaluation  evaluations * evaluation

    Steps, samples and scored samples of each epoch are those that [`DynamicPruner`] plans, with full-data epochs, period
    and a last epoch that is cut. Where the size of a choice depends on the data it is a range, which is an assumption:
    what the policy's authors and others found, see `assumed_share`.

    Raises:
        ValueError: what DynamicPruner raises, such as for a plan that does not fill a batch with `drop_last`.
    """
    if all(planned.size is not None for planned in settings.pruner(policy).schedule()):
        return _predict(policy, policy, settings, measured, choosing)
    assumed = assumed_share(policy, settings.num_samples)
    common = {
        f.name: getattr(policy, f.name)
        for f in fields(_OfShare)
        if f.name in ("period", "first", "last", "scoring")
    }
    least, most = (
        _predict(policy, _OfShare(share, **common), settings, measured, choosing)
        for share in assumed
    )
    return replace(most, assumed=assumed, least_seconds=least.total)


def assumed_share(policy: PruningPolicy, n: int) -> tuple[float, float]:
    """The least and the most that a choice of a policy is taken to keep whose choices depend on the data.

    `InfoBatch`: 20 to 80 % of the losses are below their mean, which is a cost of 0.6 to 0.9 at its prune_ratio of 0.5;
    `SeTa`: 0.45 to 0.75 of what it draws; `KAKURENBO`: all but `max_hidden`, to all; `IES`: 0.54 to 0.88, as measured on
    CIFAR-10 and CIFAR-100. Any other policy: one sample, to all.
    """
    match policy:
        case InfoBatch(prune_ratio=float() | int() as r):
            return 1 - 0.8 * r, 1 - 0.2 * r
        case SeTa(prune_ratio=r):
            return 0.45 * (1 - r), 0.75 * (1 - r)
        case KAKURENBO(max_hidden=hidden):
            return 1 - hidden, 1.0
        case IES():
            return 0.54, 0.88
    return 1 / n, 1.0


@dataclass(frozen=True)
class _OfShare(PruningPolicy):
    """Stands for a policy whose choices keep this share; it is asked for sizes alone."""

    keep_ratio: float = 1.0

    signals: ClassVar[tuple[str, ...]] = ("loss",)  # without it there are no scoring passes

    def plan(self, *args: Any, **kwargs: Any) -> EpochPlan:
        raise NotImplementedError


def _predict(
    policy: PruningPolicy,
    sized: PruningPolicy,
    settings: Settings,
    measured: Measured,
    choosing: float,
) -> Prediction:
    """`sized` has the sizes of the choices of `policy`."""
    pruner = settings.pruner(sized)
    epochs = list(_epochs(pruner, settings.num_epochs))
    steps, trained = sum(epoch.steps for epoch in epochs), sum(epoch.samples for epoch in epochs)
    starts = 1 if settings.persistent_workers else len(epochs)
    scored = [epoch.scored for epoch in epochs if epoch.scored]
    before = pruner.report.preparation
    return Prediction(
        policy,
        len(epochs),
        steps,
        trained + sum(scored) / 3 + (before["passes"] if before.get("charged") else 0),
        {
            "training": measured.run_start
            + trained
            / (pruner.global_batch * settings.accumulation)
            * (measured.step - measured.optimizer)
            + steps * measured.optimizer
            + starts * measured.epoch_start
            + settings.checkpoints(steps, len(epochs)) * measured.checkpoint,
            "scoring": len(scored) * measured.scoring_start + sum(scored) * measured.scoring,
            "choosing": len(epochs) * choosing,
            "evaluation": settings.evaluations(steps, len(epochs)) * measured.evaluation,
        },
        acts=not looks_once(policy, len(epochs)),
    )


@dataclass(frozen=True)
class _Epoch:
    steps: int
    samples: float
    scored: int


def _epochs(pruner: DynamicPruner, num_epochs: float | None) -> Iterator[_Epoch]:
    """What each epoch of a run trains and scores."""
    n, scoring = len(pruner.table), pruner.policy.scoring
    held: int | None = None
    spent = 0
    for epoch, (size, _, chooses) in enumerate(pruner.schedule()):
        assert size is not None  # `predict` gives a share to what has no size of its own
        length = pruner.steps(size)
        if num_epochs is not None:
            steps = math.ceil(round(length * min(1.0, num_epochs - epoch), 9))
        else:
            assert pruner.max_steps is not None
            steps = min(length, pruner.max_steps - spent)
        scored = 0
        if chooses:
            scored = {"trained": 0, "all": n, "dropped": 0 if held is None else n - held}[scoring]
            held = size
        spent += steps
        yield _Epoch(steps, size * steps / length, scored)


# ---- advice --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Advice:
    """What [`advise`] found. `str` is a table and the findings in words, `to_dict` the same as JSON values.

    Attributes:
        settings: of the run.
        measured: in the dry run.
        full: the run on all data.
        predictions: the other runs.
        findings: about what -> what was found, in words; `"answer"` comes first, `"short run"` last.
    """

    settings: Settings
    measured: Measured
    full: Prediction
    predictions: list[Prediction]
    findings: dict[str, str] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "findings", _findings(self))

    def saved(self, prediction: Prediction) -> float:
        """Seconds less than the full run takes, as a share of these; negative where it takes longer."""
        return 1 - prediction.total / self.full.total

    def short_epochs(self, prediction: Prediction) -> float:
        """Epochs on all data that take as long: those of the short run, the baseline to beat."""
        start, epochs = self.measured.run_start, self.full.passes / self.settings.num_samples
        return (prediction.total - start) / (self.full.total - start) * epochs

    def to_dict(self) -> dict[str, Any]:
        return {
            "findings": self.findings,
            "settings": asdict(self.settings),
            "measured": {**asdict(self.measured), "step": self.measured.step},
            "predictions": [
                {
                    "policy": prediction.policy.to_dict(),
                    "label": str(prediction.policy),
                    "keep_ratio": getattr(prediction.policy, "keep_ratio", None),
                    "total_seconds": prediction.total,
                    "seconds": prediction.seconds,
                    "saved_seconds": self.full.total - prediction.total,
                    "saved": self.saved(prediction),
                    "cost": prediction.passes / self.full.passes,
                    "epochs": prediction.epochs,
                    "steps": prediction.steps,
                    "short_run_epochs": self.short_epochs(prediction),
                    "acts": prediction.acts,
                    "estimate": None
                    if prediction.assumed is None
                    else {
                        "kept": list(prediction.assumed),
                        "least_seconds": prediction.least_seconds,
                    },
                }
                for prediction in (self.full, *self.predictions)
            ],
        }

    def __str__(self) -> str:
        head = ["policy", "cost", *PHASES, "total", "saved", "as long: all data for"]
        rows = [
            [
                ("~ " if p.assumed else "") + str(p.policy),
                f"{p.passes / self.full.passes:.3f}",
                *(_duration(p.seconds[phase]) for phase in PHASES),
                _duration(p.total),
                "" if p is self.full else _percent(self.saved(p)),
                f"{self.short_epochs(p):.1f} epochs",
            ]
            for p in (self.full, *self.predictions)
        ]
        widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
        lines = [
            "  ".join(
                [
                    row[0].ljust(widths[0]),
                    *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)),
                ]
            )
            for row in (head, *rows)
        ]
        m = self.measured
        step = ", ".join(
            f"{name} {_duration(getattr(m, name))}"
            for name in ("waiting", "forward", "backward", "optimizer")
        )
        measured = f"A step takes {_duration(m.step)} ({step}; {m.steps} steps timed)."
        return "\n".join([*lines, "", measured, *(text for text in self.findings.values())])


def _duration(seconds: float) -> str:
    for unit, size in (("h", 3600.0), ("min", 60.0), ("s", 1.0)):
        if abs(seconds) >= 2 * size or (unit == "s" and abs(seconds) >= 0.1):
            return f"{seconds / size:.1f} {unit}"
    return f"{1000 * seconds:.1f} ms" if seconds else "0"


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def _findings(advice: Advice) -> dict[str, str]:
    settings, m, full, rows = advice.settings, advice.measured, advice.full, advice.predictions
    found: dict[str, str] = {}
    acting = [row for row in rows if row.acts and row.assumed is None]
    best = min(acting, key=lambda row: row.total, default=None)
    if settings.max_steps is not None:
        found["answer"] = (
            f"Answer: not to save time. max_steps={settings.max_steps} is a budget that every run spends: a pruned one "
            "trains more epochs, of fewer samples, in as long. To save time set num_train_epochs instead."
        )
    elif best is None or advice.saved(best) < 0.1:
        found["answer"] = (
            "Answer: no. Nothing in the table that can act saves a tenth of the full run or more."
        )
    else:
        quickest: dict[str, Prediction] = {}
        for row in sorted(
            (row for row in acting if advice.saved(row) > 0),
            key=lambda row: row.total,
            reverse=True,
        ):
            keep_ratio = getattr(row.policy, "keep_ratio", None)
            quickest[str(row.policy) if keep_ratio is None else f"keep_ratio={keep_ratio:g}"] = row
        found["answer"] = (
            f"Answer: it can pay. All data take {_duration(full.total)}; "
            + ", ".join(
                f"{how} {_duration(row.total)} ({_percent(advice.saved(row))} less)"
                for how, row in quickest.items()
            )
            + ". What that does to the result only a run tells."
        )
    ranges = [
        f"{row.policy} keeps {row.assumed[0]:.2f} to {row.assumed[1]:.2f}, {_duration(row.least_seconds)} to "
        f"{_duration(row.total)}"
        for row in rows
        if row.assumed is not None and row.least_seconds is not None
    ]
    if ranges:
        found["estimates"] = (
            "~ Estimates: how much these keep depends on the data. Assumed, with the most in the table: "
            f"{'; '.join(ranges)}."
        )
    idle = [str(row.policy) for row in rows if not row.acts]
    if idle:
        found["first looks"] = (
            f"Cannot act: {', '.join(idle)}. Choices x keep_ratio is at most 1 in {full.epochs} epochs, and samples never "
            "observed come first: scores decide next to nothing, as in RandomPruning. Ways out: scoring='all', first=1 "
            "(full-data epochs at the start), more epochs or a larger keep_ratio."
        )
    waiting = m.behind / m.step
    if waiting > _NOTABLE:
        fast = full.total - full.steps * m.behind
        more = f"more workers (dataloader_num_workers={settings.workers} now), or samples decoded once (vision.ImageCache)"
        found["loader"] = (
            f"The data loader is the limit: {_percent(waiting)} of a step is waiting for data. Pruning loads only what it "
            "keeps, so it saves that, too, but scoring passes pay it. With a loader that keeps up the full run would take "
            f"{_duration(fast)} instead of {_duration(full.total)}: {more}."
        )
    starts = full.epochs * m.epoch_start
    if (
        settings.workers
        and not settings.persistent_workers
        and best is not None
        and starts > _NOTABLE * best.total
    ):
        found["epoch starts"] = (
            f"Starting the loader takes {_duration(m.epoch_start)} an epoch, {_duration(starts)} of {_duration(best.total)} "
            f"({best.policy}), whatever is kept: set dataloader_persistent_workers=True, or fewer workers."
        )
    for phase, way_out in (
        (
            "evaluation",
            "It does not shrink with the data: evaluate less often (eval_strategy, eval_steps), or on less.",
        ),
        (
            "scoring",
            "Score by training losses (scoring='trained', at no cost), or choose less often (period).",
        ),
    ):
        eaten = [
            (row.seconds[phase] / row.total, str(row.policy))
            for row in rows
            if row.seconds[phase] > _NOTABLE * row.total
        ]
        if eaten:
            share, label = max(eaten)
            others = (
                f", and more than {_percent(_NOTABLE)} of {len(eaten) - 1} others"
                if len(eaten) > 1
                else ""
            )
            found[phase] = (
                f"{phase.capitalize()} eats the gain: {_percent(share)} of {label}{others}. {way_out}"
            )
    found["short run"] = (
        "Compare with the short run: all data for as many epochs as the last column says takes as long, and its learning "
        "rate reaches zero as well. Where it is as good, take the short run."
    )
    return found


def advise(
    trainer: Trainer, *, policies: Sequence[PruningPolicy] | None = None, batches: int = 20
) -> Advice:
    """Whether pruning pays for this run, and how much of it: measured in a dry run, before the run is paid for.

    A copy of the trainer, with a copy of its model and optimizer, trains some batches by the Trainer's own `train()`; then
    its loaders, its evaluation, a scoring pass and each policy's choice are timed. Weights, optimizer, random states,
    output folder and the trainer itself are afterwards as they were. Callbacks other than the Trainer's own flow do not run:
    what they take is not in the prediction. What `run_start` holds (kernels that are chosen, graphs that are compiled) a run
    in the same process may find done.

    Args:
        trainer: a Trainer, or one of its subclasses, that was made and not trained; with pruning or without. Of a stock one
            the steps are taken to be as long with pruning, which is what was measured elsewhere.
        policies: to predict; *optional*, defaults to what the trainer prunes by, and to random choices, UCB with each
            `scoring` at several keep ratios, and InfoBatch.
        batches: at least so many are trained, on one rank for 5 s at the least, and a quarter as many evaluated; at least 4.

    Returns:
        The [`Advice`]: print it.

    Raises:
        TypeError, ValueError: for what is no Trainer, or has no training data with a length; and what DynamicPruner raises
            for a policy that does not fit the run.

    Cost: the batches, and the memory of another model. On several ranks all of them call it; each measures for itself.
    """
    _check(trainer, batches)
    settings = Settings.of(trainer)
    if policies is None:
        own, policies = getattr(trainer, "pruning", None), _usual(settings)
        if own is not None and not isinstance(own, FullData):
            policies = [own, *(policy for policy in policies if policy != own)]
    for policy in policies:  # what does not fit is told before anything is measured
        predict(policy, settings, _NOTHING)
    with _dry_run(trainer) as dry:
        measured = _measure(
            dry, settings, batches, scores=any(policy.scoring != "trained" for policy in policies)
        )
    full, *others = (
        predict(policy, settings, measured, choosing=_time_choosing(policy, settings))
        for policy in (FullData(), *policies)
    )
    return Advice(settings, measured, full, others)


_NOTHING = Measured(0, 0.0, 0.0, 0.0, 0.0)


def _check(trainer: Any, batches: int) -> None:
    if not isinstance(trainer, Trainer):
        raise TypeError(
            f"trainer={trainer!r} is no transformers Trainer: wanted is one that was made and not trained yet."
        )
    check_count("batches", batches, 4)
    dataset: Any = trainer.train_dataset
    if not hasattr(dataset, "__len__") or len(dataset) == 0:
        raise ValueError(
            f"The training dataset is a {type(dataset).__name__} without samples or without a length: wanted is a map-style "
            "one (`load_dataset(..., streaming=False)`), as nothing else can be pruned."
        )


def _usual(settings: Settings) -> list[PruningPolicy]:
    least = settings.pruner(FullData()).global_batch if settings.drop_last else 1
    ratios = [
        ratio for ratio in (0.1, 0.3, 0.5, 0.7) if keep_count(ratio, settings.num_samples) >= least
    ]
    scored = [UCB(ratio, scoring=scoring) for scoring in _SCORING for ratio in ratios]
    return [*map(RandomPruning, ratios), *scored, InfoBatch()]


# ---- the dry run ---------------------------------------------------------------------------------


class _Watch(TrainerCallback):
    """Notes when what happens in the loop, and ends it when enough was seen."""

    def __init__(self, *, warm_up: int, wanted: int, workers: int, save: bool) -> None:
        self.warm_up, self.wanted, self.workers, self.save = warm_up, wanted, workers, save
        self.first_epoch = math.inf  # when it began
        self.steps: list[dict[str, float]] = []
        self.mark, self.step = 0.0, _no_step()
        self.first_in_epoch: set[int] = set()
        self.checkpoint = 0.0
        self.predicted: list[float] = []  # when each evaluation batch was done

    def on_train_begin(
        self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any
    ) -> None:
        self.device = args.device
        self.hooks = [
            model.register_forward_pre_hook(lambda *_: self._add("backward")),
            model.register_forward_hook(lambda *_: self._add("forward")),
        ]

    def _add(self, part: str) -> None:
        """What passed since the last mark belongs to that part of the step."""
        before, self.mark = self.mark, _now(self.device)
        self.step[part] += self.mark - before

    def on_epoch_begin(self, *args: Any, **kwargs: Any) -> None:
        self.mark, self.step = _now(self.device), _no_step()
        self.first_epoch = min(self.first_epoch, self.mark)
        self.first_in_epoch.add(len(self.steps))

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self.step = _no_step()
        self.steps.append(self.step)
        self._add("waiting")

    def on_substep_end(self, *args: Any, **kwargs: Any) -> None:
        self._add("backward")

    def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        self._add("backward")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._add("optimizer")
        timed = len(self.steps) - self.warm_up
        if timed == 0:
            self.since = self.mark
        # Ranks must end at the same step, and their clocks differ.
        enough = timed >= self.wanted and (
            args.world_size > 1 or self.mark - self.since >= _LEAST_SECONDS
        )
        if enough or state.global_step >= state.max_steps:
            control.should_training_stop, control.should_save = True, self.save

    def on_log(self, *args: Any, **kwargs: Any) -> None:
        self._add("optimizer")

    def on_save(self, *args: Any, **kwargs: Any) -> None:
        self.step = _no_step()
        self._add("optimizer")
        self.checkpoint = self.step["optimizer"]

    def on_epoch_end(self, *args: Any, **kwargs: Any) -> None:
        self.step = _no_step()  # what follows is of no step

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        for hook in self.hooks:
            hook.remove()

    def on_prediction_step(self, *args: Any, **kwargs: Any) -> None:
        self.predicted.append(_now(self.device))

    def seconds(self) -> dict[str, float]:
        """Of a step, by its parts; and `extra`, by how much the steps before those that count were longer in all.

        Of the steps that count the tenth that computes the longest and the tenth that computes the shortest are left out.
        Waiting for workers comes in bursts: its mean is that of all steps, but the first of an epoch.
        """
        first = min(self.warm_up, len(self.steps) - 1)
        timed = list(range(first, len(self.steps)))
        compute = [sum(step.values()) - step["waiting"] for step in self.steps]
        cut = len(timed) // 10
        kept = sorted(timed, key=lambda i: compute[i])[cut : len(timed) - cut]
        parts = {
            part: fmean(self.steps[i][part] for i in kept)
            for part in ("forward", "backward", "optimizer")
        }
        waited = [
            self.steps[i]["waiting"]
            for i in (timed if self.workers else kept)
            if i not in self.first_in_epoch
        ]
        extra = sum(compute[:first]) - first * sum(parts.values())
        return {
            **parts,
            "waiting": fmean(waited) if waited else 0.0,
            "extra": max(0.0, extra),
            "steps": len(timed),
        }


def _no_step() -> dict[str, float]:
    return dict.fromkeys(("waiting", "forward", "backward", "optimizer"), 0.0)


def _now(device: torch.device) -> float:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter()


@contextmanager
def _dry_run(trainer: Trainer) -> Iterator[Any]:
    """A copy of the trainer that may be trained: model, optimizer, arguments, flow and folder are its own, and random states
    are afterwards what they were."""
    device, folder = trainer.args.device, trainer.args.output_dir or "."
    python, numpy = random.getstate(), np.random.get_state()
    with (
        torch.random.fork_rng(devices=[device] if device.type == "cuda" else []),
        tempfile.TemporaryDirectory(
            dir=folder if Path(folder).is_dir() else None
        ) as scratch,  # on the disk of the run
    ):
        dry: Any = copy.copy(trainer)
        dry.model, dry.optimizer = copy.deepcopy((trainer.model, trainer.optimizer))
        dry.model_wrapped, dry.lr_scheduler = dry.model, None
        dry.args = copy.copy(trainer.args)  # not made anew: that would set up the devices again
        dry.args.output_dir, dry.args.push_to_hub, dry.args.disable_tqdm = scratch, False, True
        dry.args.eval_strategy, dry.args.eval_on_start = IntervalStrategy.NO, False
        dry.args.save_strategy, dry.args.load_best_model_at_end = SaveStrategy.NO, False
        dry.control = TrainerControl()
        try:
            yield dry
        finally:
            trainer.accelerator.free_memory()
            random.setstate(python)
            np.random.set_state(numpy)


def _measure(dry: Any, settings: Settings, batches: int, *, scores: bool) -> Measured:
    args = dry.args
    ahead = settings.workers * (
        args.dataloader_prefetch_factor or 2
    )  # batches that are there before they are waited for
    watch = _Watch(
        warm_up=_WARM_UP + math.ceil(ahead / settings.accumulation),
        wanted=math.ceil(batches / settings.accumulation),
        workers=settings.workers,
        save=settings.save_strategy != "no",
    )
    dry.callback_handler = CallbackHandler(
        [DefaultFlowCallback(), watch], dry.model, dry.processing_class, dry.optimizer, None
    )
    if getattr(dry, "pruning", None) is not None:
        dry.pruning = UCB(keep_ratio=1.0)  # trains on all, and observes it
    begun = _now(args.device)
    dry.train()
    step = watch.seconds()
    # What follows needs no pruning, and no workers that stay.
    dry.pruning, args.dataloader_persistent_workers = None, False
    loading, epoch_start = _time_loader(dry, ahead, max(batches, 8 * settings.workers))
    evaluation = scoring = scoring_start = 0.0
    if settings.eval_on_start or settings.eval_strategy != "no":
        sets = (
            dry.eval_dataset.values() if isinstance(dry.eval_dataset, dict) else [dry.eval_dataset]
        )
        evaluation = sum(_time_evaluation(dry, watch, each, batches // 4)[0] for each in sets)
    if scores:
        dataset = getattr(dry, "scoring_dataset", None)
        dry.compute_metrics = None
        dataset = dry.train_dataset if dataset is None else dataset
        whole, batch = _time_evaluation(dry, watch, dataset, batches // 4)
        scoring = batch / (args.eval_batch_size * args.world_size)
        scoring_start = max(0.0, whole - settings.num_samples * scoring)
    return Measured(
        steps=int(step["steps"]),
        waiting=step["waiting"],
        forward=step["forward"],
        backward=step["backward"],
        optimizer=step["optimizer"],
        loading=loading * settings.accumulation,
        epoch_start=epoch_start,
        run_start=watch.first_epoch - begun + step["extra"],
        scoring=scoring,
        scoring_start=scoring_start,
        evaluation=evaluation,
        checkpoint=watch.checkpoint,
    )


def _time_loader(dry: Trainer, ahead: int, batches: int) -> tuple[float, float]:
    """Seconds of a batch, once the workers are at it; and those of starting and stopping them."""
    begun = time.perf_counter()
    loading = iter(dry.get_train_dataloader())
    loaded: list[float] = []
    while len(loaded) <= ahead + batches and next(loading, None) is not None:
        loaded.append(time.perf_counter())
    ended = time.perf_counter()
    del loading  # and with it the workers
    stopping = time.perf_counter() - ended
    first = max(0, min(ahead, len(loaded) - 2))
    each = (
        (loaded[-1] - loaded[first]) / (len(loaded) - 1 - first)
        if len(loaded) > 1
        else loaded[0] - begun
    )
    return each, max(0.0, loaded[0] - begun - each) + stopping


def _time_evaluation(
    dry: Trainer, watch: _Watch, dataset: Any, batches: int
) -> tuple[float, float]:
    """Seconds of an evaluation of all of a dataset, and of a batch in it, from an evaluation of some batches."""
    size, device = dry.args.eval_batch_size * dry.args.world_size, dry.args.device
    if hasattr(dataset, "__len__"):
        dry.evaluate(_evenly(dataset, 2 * size))  # warm-up
        some, all_batches = _evenly(dataset, batches * size), math.ceil(len(dataset) / size)
    else:
        some, all_batches = dataset, 0
    watch.predicted.clear()
    begun = _now(device)
    dry.evaluate(some)
    whole, done = _now(device) - begun, watch.predicted
    each = (done[-1] - done[0]) / (len(done) - 1) if len(done) > 1 else whole
    return whole + max(0, all_batches - len(done)) * each, each


def _evenly(dataset: Any, size: int) -> Any:
    """So many of its samples, evenly spaced; all of them where there are no more."""
    n = len(dataset)
    if n <= size:
        return dataset
    index = [i * n // size for i in range(size)]
    return dataset.select(index) if hasattr(dataset, "select") else Subset(dataset, index)


def _time_choosing(policy: PruningPolicy, settings: Settings) -> float:
    """Seconds of a choice: what was observed of all samples is applied, the policy chooses, the order is made."""
    pruner, n = settings.pruner(policy), settings.num_samples
    generator = torch.Generator().manual_seed(0)

    def observed(index: Tensor) -> dict[str, Tensor]:
        values = {
            name: torch.rand(len(index), generator=generator) for name in pruner.scored_signals
        }
        return {**values, **({LABEL.name: torch.zeros(len(index))} if policy.min_per_class else {})}

    everything = torch.arange(n)
    pruner.begin_epoch(policy.first, scorer=observed)
    pruner.observe(everything, observed(everything))
    begun = time.perf_counter()
    pruner.begin_epoch(policy.first + policy.period, scorer=observed)
    return time.perf_counter() - begun
