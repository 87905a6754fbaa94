"""The record of a run.

This module alone knows what a pass, a cost and a spent second is. Logs, cards, plots and tables
read it.
"""

import json
import numbers
import os
import platform
import re
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from . import __version__
from . import json_fields as check
from .files import load_json, save_json, strict
from .policies import POLICIES, PruningPolicy

FORMAT_VERSION = 1
PHASES = ("training", "choosing", "scoring", "evaluation")
# The phases that only runs of reinforcement learning have, and what they count: prompts that were
# rolled out, those of them whose rewards differed (the others have no gradient), their completions,
# the tokens of these, and the completions that each reward function was called on.
ROLLOUT_PHASES = ("generation", "rewards")
ROLLOUTS = ("prompts", "effective_prompts", "completions", "tokens", "reward_calls")
KEPT = ("always", "sometimes", "never")  # the shares that `selection` holds, as tables show them
# What `provenance` says of the dataset, if it is known.
DATASET_FIELDS = ("id", "config", "split", "revision", "fingerprint", "labels")
_NO_CHOICE = np.ones(1)
_PACKAGES = ("torch", "transformers", "accelerate", "datasets", "timm", "evaluate", "numpy")
_SPEED = re.compile(r".*(runtime|_per_second|_time)")  # metrics of how fast an evaluation was
_BY_SEED = ("scores", "digest")  # fields of a policy that may differ between seeds


def passes(forward: float, backward: float, scoring: float = 0) -> float:
    """Convert sample counts to passes: (forward + 2 * backward + scoring) / 3.

    One pass is one sample forward and backward. A backward pass costs two forward passes, so a
    sample that is only scored counts as 1/3.

    Args:
        forward: samples that went forward in training.
        backward: samples that went backward.
        scoring: samples that went forward only to be scored.
    """
    return (forward + 2 * backward + scoring) / 3


class Stopwatch:
    """Add wall-clock seconds to the phases of a running epoch, lap by lap."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}
        self._mark: float | None = None  # when the current lap began

    @property
    def running(self) -> bool:
        """Whether the watch was started and not stopped since."""
        return self._mark is not None

    def start(self, seconds: dict[str, float]) -> None:
        """Begin a lap. `seconds` (phase -> seconds) is the dict that the laps are added to."""
        self._seconds, self._mark = seconds, time.perf_counter()

    def lap(self, phase: str) -> None:
        """Add the time since the last lap to `phase`. Does nothing if the watch is not running."""
        if self._mark is not None:
            now = time.perf_counter()
            self._seconds[phase] += now - self._mark
            self._mark = now

    def stop(self) -> None:
        """Stop. The time since the last lap is not counted."""
        self._mark = None


@dataclass
class EpochRecord:
    """What one epoch did and cost, summed over all ranks.

    Attributes:
        epoch: counted from 0.
        full_data: whether the epoch trained on all data without a choice (`first`, `last` or
            [`FullData`]).
        samples: samples that the plan kept.
        forward_passes: samples, padding included, that went forward in training.
        backward_passes: samples, padding included, that went backward.
        scoring_passes: samples that went forward only to be scored.
        optimizer_steps: optimizer steps of the epoch.
        learning_rate: the rate for the step after the epoch's last one.
        scores: mean and quantiles of the finite scores when the plan was made; empty if there are
            no scores. From 262,144 samples on they are computed from evenly spaced samples.
        nonfinite: observations that were NaN or infinite.
        seconds: wall-clock by phase. `training` is the epoch minus the other phases, so it includes
            logging and checkpoints.
        metrics: metrics of the last evaluation in the epoch.
        rollouts: what an epoch of reinforcement learning generated, see `ROLLOUTS`; empty in
            other runs. A sample is a prompt there: it goes forward and backward once with all its
            completions, however often they are trained on.
        effective_share: [`hf_dynprune.potential.effective_share`] at the end of the epoch, by the
            last observation of each sample; None if it was not measured or is not defined.
    """

    epoch: int
    full_data: bool
    samples: int
    forward_passes: int = 0
    backward_passes: int = 0
    scoring_passes: int = 0
    optimizer_steps: int = 0
    learning_rate: float | None = None
    scores: dict[str, float] = field(default_factory=dict)
    nonfinite: int = 0
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PHASES, 0.0))
    metrics: dict[str, float] = field(default_factory=dict)
    rollouts: dict[str, int] = field(default_factory=dict)
    effective_share: float | None = None

    @property
    def passes(self) -> float:
        """The cost of the epoch in passes, see [`passes`]."""
        return passes(self.forward_passes, self.backward_passes, self.scoring_passes)

    @property
    def spent_seconds(self) -> float:
        """Seconds of all phases except evaluation."""
        return sum(seconds for phase, seconds in self.seconds.items() if phase != "evaluation")


@dataclass
class PruningReport:
    """The record of a run. `save` writes it as JSON; `docs/report.md` documents the fields.

    Attributes:
        policy: the policy's name and fields.
        num_samples: N, the samples of the training set.
        num_epochs: trained epochs; the last one may count in part.
        seed: seed of the choices.
        data_seed: seed of the order.
        epochs: one record per epoch.
        selection: how often samples were kept, see [`selection_of`].
        nonfinite_samples: indices of samples with a NaN or infinite loss: the 100 lowest.
        resumed: epoch and optimizer step of each resumption. `stock_checkpoint` marks a checkpoint
            without pruning state: earlier epochs then count as full-data epochs.
        environment: versions and hardware.
        preparation: what the scores of [`StaticPruning`] or [`ReferenceLoss`] cost before the run:
            method, file, passes, seconds, and whether they are `charged` (counted in `passes` and
            `spent_seconds`). Empty for other policies.
        best_model: `step` and `metrics`, if weights of an earlier optimizer step were loaded after
            the run (`load_best_model_at_end`) and evaluated. Empty if not.
        provenance: what was trained on what, as far as the trainer knows: `model` (Hub id, or name
            of the folder), `model_class`, `task`, `dataset` (`fingerprint`, `labels`, and for a
            dataset of the Hub `id`, `config`, `split`, `revision`) and `arguments`, the training
            arguments. `labels` is a checksum of the labels in their order. Empty in the reports of
            earlier versions.
        magnitude: what stands in for the size of a sample's gradient in `effective_share`, such as
            `1 - exp(-loss)`. Empty if nothing does.
    """

    policy: dict[str, Any]
    num_samples: int
    seed: int
    data_seed: int
    num_epochs: float = 0.0
    epochs: list[EpochRecord] = field(default_factory=list)
    selection: dict[str, Any] = field(default_factory=dict)
    nonfinite_samples: list[int] = field(default_factory=list)
    resumed: list[dict[str, int]] = field(default_factory=list)
    environment: dict[str, Any] = field(default_factory=dict)
    preparation: dict[str, Any] = field(default_factory=dict)
    best_model: dict[str, Any] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)
    magnitude: str = ""

    @property
    def totals(self) -> dict[str, Any]:
        """Sums over the epochs: passes by kind, steps, non-finite losses, seconds by phase.

        With rollouts, if there are any.
        """
        counts = (
            "forward_passes",
            "backward_passes",
            "scoring_passes",
            "optimizer_steps",
            "nonfinite",
        )
        phases = (*PHASES, *ROLLOUT_PHASES) if self.rolled_out else PHASES
        seconds = {
            phase: sum(record.seconds.get(phase, 0.0) for record in self.epochs) for phase in phases
        }
        rollouts = {
            name: sum(record.rollouts.get(name, 0) for record in self.epochs) for name in ROLLOUTS
        }
        return {
            **{name: sum(getattr(record, name) for record in self.epochs) for name in counts},
            **({"rollouts": rollouts} if self.rolled_out else {}),
            "seconds": seconds,
        }

    @property
    def rolled_out(self) -> bool:
        """Whether it is a run of reinforcement learning that rolled out prompts."""
        return any(record.rollouts for record in self.epochs)

    def _charged(self, kind: Literal["passes", "seconds"]) -> float:
        """What the preparation adds to the cost. Scores of a user may lack their seconds."""
        return self.preparation.get(kind, 0.0) if self.preparation.get("charged") else 0.0

    @property
    def passes(self) -> float:
        """The cost of the run in passes: all epochs, and the preparation if it is charged."""
        return self._charged("passes") + sum(record.passes for record in self.epochs)

    @property
    def spent_seconds(self) -> float:
        """Seconds of all phases except evaluation, and of the preparation if it is charged."""
        return self._charged("seconds") + sum(record.spent_seconds for record in self.epochs)

    def spent(self, against: Literal["passes", "seconds", "rollouts"]) -> list[float]:
        """The cost of the run up to the end of each epoch, with charged preparation.

        Args:
            against: `"passes"` for passes / N, `"seconds"` for seconds without evaluation,
                `"rollouts"` for completions that were generated.
        """
        if against == "rollouts":
            return list(accumulate(record.rollouts.get("completions", 0) for record in self.epochs))
        before = self._charged(against)
        if against == "passes":
            before /= self.num_samples
            costs = [record.passes / self.num_samples for record in self.epochs]
        else:
            costs = [record.spent_seconds for record in self.epochs]
        return list(accumulate(costs, initial=before))[1:]

    def cost_against(self, epochs: float) -> float:
        """passes / (N * epochs): the cost as a share of a full run of `epochs` epochs."""
        full = self.num_samples * epochs
        return self.passes / full if full else 0.0

    @property
    def cost_ratio(self) -> float:
        """passes / (N * num_epochs): the cost as a share of the full run with as many epochs."""
        return self.cost_against(self.num_epochs)

    @property
    def evaluated_epoch(self) -> int | None:
        """The last epoch with an evaluation, counted from 1; None if there is none."""
        return max((record.epoch + 1 for record in self.epochs if record.metrics), default=None)

    @property
    def full_data_epochs(self) -> int:
        """How many epochs trained on all data without a choice."""
        return sum(record.full_data for record in self.epochs)

    @property
    def effective_share(self) -> float | None:
        """That of the last epoch that has one; None if there is none."""
        shares = [record.effective_share for record in self.epochs]
        return next((share for share in reversed(shares) if share is not None), None)

    @property
    def gain(self) -> float | None:
        """G, the mean over the epochs of 1 / effective share; None if none was measured.

        So many times fewer samples an ideal draw would need for a gradient as exact.
        """
        shares = [record.effective_share for record in self.epochs]
        gains = [1 / share for share in shares if share is not None]
        return sum(gains) / len(gains) if gains else None

    @property
    def metrics(self) -> dict[str, float]:
        """Metrics of the last evaluation. They describe the last model, never the best one.

        `best_model` has the metrics of the best one, if it was evaluated after the run.
        """
        return next((record.metrics for record in reversed(self.epochs) if record.metrics), {})

    @property
    def results(self) -> dict[str, float]:
        """Metrics of the last evaluation without the prefix `eval_` and without those of speed."""
        return {
            name.removeprefix("eval_"): value
            for name, value in self.metrics.items()
            if not _SPEED.fullmatch(name)
        }

    def summary(self, metric: str | None = None) -> dict[str, str]:
        """The run in words, label -> text, as `hf-dynprune report` prints it.

        Args:
            metric: the one metric to show, *optional*, defaults to all metrics except those of
                speed.
        """
        totals = self.totals
        counts = ", ".join(
            f"{totals[f'{kind}_passes']:,} {kind}" for kind in ("forward", "backward", "scoring")
        )

        def shown(metrics: Mapping[str, float]) -> str:
            return ", ".join(
                f"{name} {shown_metric(name, value)}"
                for name, value in metrics.items()
                if (name == metric if metric else not _SPEED.fullmatch(name))
            )

        best = self.best_model and shown(self.best_model["metrics"])
        seconds = (f"{phase} {value:,.1f}" for phase, value in totals["seconds"].items())
        order = "" if self.data_seed == self.seed else f"; order: {self.data_seed}"
        cost = f"{self.cost_ratio:.4f} of the full run of {self.num_epochs:g} epochs"
        per_sample = f"{self.passes / self.num_samples:.2f} over {self.num_samples:,} samples"
        return {
            "policy": shown_policy(self.policy),
            "seed": f"{self.seed}{order}",
            **self._provenance_in_words(),
            "cost": cost,
            "passes": f"{self.passes:,.0f}, {per_sample} ({counts})",
            **_rollouts_in_words(totals.get("rollouts")),
            "optimizer steps": f"{totals['optimizer_steps']:,}",
            "seconds": ", ".join(seconds),
            "last metrics": shown(self.metrics) or "none",
            **({"best weights": f"step {self.best_model['step']:,}: {best}"} if best else {}),
            **self._selection_in_words(),
            **self._potential_in_words(),
            **self._events_in_words(),
            "hardware": self.hardware,
            "versions": ", ".join(f"{name} {text}" for name, text in self.versions.items()),
        }

    @property
    def hardware(self) -> str:
        """Number of ranks and name of the device, such as "2 × NVIDIA H100"."""
        ranks = self.environment.get("ranks", 1)
        return f"{ranks} × {self.environment.get('device', 'unknown')}"

    @property
    def versions(self) -> dict[str, str]:
        """Versions of hf_dynprune, Python and the packages."""
        own = self.environment.get("hf_dynprune", "unknown")
        return {"hf_dynprune": own, **self.environment.get("versions", {})}

    def _provenance_in_words(self) -> dict[str, str]:
        known = self.provenance
        model = [known[name] for name in ("model", "model_class", "task") if name in known]
        data = known.get("dataset", {})
        named = [data[name] for name in ("id", "config", "split", "fingerprint") if name in data]
        lines = {"model": ", ".join(model), "dataset": ", ".join(named)}
        return {label: text for label, text in lines.items() if text}

    def _selection_in_words(self) -> dict[str, str]:
        if not self.selection.get("choices"):
            return {}

        def shares(values: Mapping[str, float]) -> str:
            return ", ".join(f"{kind} {100 * values[kind]:.2f} %" for kind in KEPT)

        return {
            "kept": f"{shares(self.selection)} (choices: {self.selection['choices']})",
            "kept by chance": shares(self.selection["chance_shares"]),
        }

    def _potential_in_words(self) -> dict[str, str]:
        if self.effective_share is None or self.gain is None:
            return {}
        by = f"; s = {self.magnitude}" if self.magnitude else ""
        return {"effective share": f"{self.effective_share:.3f} (mean G {self.gain:.2f}{by})"}

    def _events_in_words(self) -> dict[str, str]:
        """What only some runs have: preparation, non-finite losses, resumptions."""
        lines = {}
        if self.preparation:
            charged = "charged above" if self.preparation.get("charged") else "not charged"
            spent = (
                f"{self.preparation.get('passes', 0):,.0f} passes, "
                f"{self.preparation.get('seconds', 0):,.1f} seconds"
            )
            lines["preparation"] = f"{self.preparation.get('method', 'scores')}: {spent}, {charged}"
        if nonfinite := self.totals["nonfinite"]:
            samples = ", ".join(map(str, self.nonfinite_samples[:10]))
            more = " ..." if len(self.nonfinite_samples) > 10 else ""
            lines["non-finite"] = f"{nonfinite:,} NaN or infinite losses; samples: {samples}{more}"
        if self.resumed:
            lines["resumed"] = "; ".join(
                f"in epoch {entry['epoch']} at step {entry['step']:,}"
                + (", without scores" if entry.get("stock_checkpoint") else "")
                for entry in self.resumed
            )
        return lines

    def to_dict(self) -> dict[str, Any]:
        """All attributes and the derived numbers (`passes`, `totals`, ...) as JSON values.

        JSON has no NaN and no infinities: they are the texts "NaN", "Infinity" and "-Infinity".
        """
        own = asdict(self)
        for name in ("best_model", "provenance", "magnitude"):
            if not own[name]:  # reports without them stay as they are
                del own[name]
        for record in own["epochs"]:
            if not record["rollouts"]:  # nor these
                del record["rollouts"]
            if record["effective_share"] is None:
                del record["effective_share"]
        return strict(
            {
                "format_version": FORMAT_VERSION,
                "policy": own.pop("policy"),
                "cost_ratio": self.cost_ratio,
                "passes": self.passes,
                "totals": self.totals,
                "metrics": self.metrics,
                **({} if self.gain is None else {"gain": self.gain}),
                **own,
            }
        )

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "PruningReport":
        """The inverse of `to_dict`.

        Raises:
            ValueError: If `format_version` is not the one that this version reads, or if a field is
                missing or has a wrong value. The message names the field.
        """
        if not isinstance(values, Mapping):
            raise ValueError(f"The report is a {type(values).__name__}: expected a mapping.")
        if values.get("format_version") != FORMAT_VERSION:
            raise ValueError(
                f"The report has format_version {values.get('format_version')!r}; expected "
                f"{FORMAT_VERSION}. Read it with the version of hf_dynprune that wrote it."
            )
        return cls(**check.fields(_REPORT)("", {**_ADDED, **values}))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the report as JSON, whole or not at all. Makes the folder if it is missing."""
        save_json(Path(path), self.to_dict())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "PruningReport":
        """Read what `save` wrote.

        Raises:
            ValueError: If the file is damaged, is not a report, or has another format. The message
                names it.
        """
        try:
            return cls.from_dict(load_json(path))
        except ValueError as error:
            raise ValueError(
                f"{path} is not a report of hf_dynprune, or it is damaged ({error})."
            ) from error


def _rollouts_in_words(rollouts: Mapping[str, int] | None) -> dict[str, str]:
    if not rollouts:
        return {}
    share = rollouts["effective_prompts"] / max(1, rollouts["prompts"])
    return {
        "rollouts": f"{rollouts['completions']:,} of {rollouts['prompts']:,} prompts, "
        f"{100 * share:.1f} % of the prompts with a gradient",
        "generated tokens": f"{rollouts['tokens']:,}",
        "reward calls": f"{rollouts['reward_calls']:,}",
    }


# ---- reading -------------------------------------------------------------------------------------


def _selection(place: str, value: Any) -> dict[str, Any]:
    shares = dict.fromkeys(KEPT, check.share)
    counts = {"histogram": check.list_of(check.count), "chance": check.list_of(check.finite)}
    checks = {
        "choices": check.count,
        **shares,
        "chance_shares": check.open_fields(shares),
        **counts,
    }
    found = check.open_fields(checks)(place, value)
    for name in counts:
        if len(found[name]) != found["choices"] + 1:
            expected = f"choices + 1 = {found['choices'] + 1}"
            raise ValueError(f"{place}.{name} has {len(found[name])} numbers: expected {expected}")
    return found


def _record(place: str, value: Any) -> EpochRecord:
    given = {"rollouts": {}, "effective_share": None, **value} if isinstance(value, dict) else value
    return EpochRecord(**check.fields(_RECORD)(place, given))


def _effective_share(place: str, value: Any) -> float:
    if check.share(place, value) <= 0:
        raise check.wrong(place, value, "a share above 0")
    return value


_METRICS = check.mapping_of(check.real)
# Each field of a record, and of a report.
_RECORD: dict[str, check.Check] = {
    "epoch": check.count,
    "full_data": check.flag,
    "samples": check.count,
    "forward_passes": check.count,
    "backward_passes": check.count,
    "scoring_passes": check.count,
    "optimizer_steps": check.count,
    "learning_rate": check.or_none(check.real),
    "scores": _METRICS,
    "nonfinite": check.count,
    "seconds": check.open_fields(dict.fromkeys(PHASES, check.finite)),
    "metrics": _METRICS,
    "rollouts": check.or_empty(check.open_fields(dict.fromkeys(ROLLOUTS, check.count))),
    "effective_share": check.or_none(_effective_share),
}
_REPORT: dict[str, check.Check] = {
    "policy": check.open_fields({"name": check.text}),
    "num_samples": check.size,
    "seed": check.whole,
    "data_seed": check.whole,
    "num_epochs": check.spent,
    "epochs": check.list_of(_record),
    "selection": check.or_empty(_selection),
    "nonfinite_samples": check.list_of(check.count),
    "resumed": check.list_of(
        check.open_fields(
            {"epoch": check.count, "step": check.count}, {"stock_checkpoint": check.flag}
        )
    ),
    "environment": check.open_fields(
        {},
        {
            "hf_dynprune": check.text,
            "device": check.text,
            "ranks": check.size,
            "versions": check.mapping_of(check.text),
        },
    ),
    "preparation": check.or_empty(
        check.open_fields(
            {"charged": check.flag},
            {"method": check.text, "passes": check.spent, "seconds": check.spent},
        )
    ),
    "best_model": check.or_empty(check.open_fields({"step": check.count, "metrics": _METRICS})),
    "magnitude": lambda place, value: "" if value == "" else check.text(place, value),
    "provenance": check.open_fields(
        {},
        {
            **dict.fromkeys(("model", "model_class", "task"), check.text),
            "dataset": check.open_fields({}, dict.fromkeys(DATASET_FIELDS, check.text)),
            "arguments": check.open_fields({}),
        },
    ),
}
# What reports of earlier versions lack.
_ADDED: dict[str, Any] = {
    "preparation": {},
    "best_model": {},
    "provenance": {},
    "magnitude": "",
}


# ---- in words ------------------------------------------------------------------------------------


def numbers_in(metrics: Mapping[str, Any]) -> dict[str, float]:
    """The metrics that are single numbers, as floats. Lists and texts are left out."""
    found = {}
    for name, value in metrics.items():
        if getattr(value, "ndim", None) == 0:  # of NumPy or torch
            value = value.item()
        if isinstance(value, numbers.Real):
            with suppress(OverflowError):  # a whole number with hundreds of digits
                found[str(name)] = float(value)
    return found


def in_percent(metric: str, values: Iterable[float]) -> bool:
    """Whether to show the values of a metric in per cent: an accuracy in [0, 1] is shown so."""
    return metric.endswith("accuracy") and all(0 <= value <= 1 for value in values)


def shown_metric(name: str, value: float) -> str:
    """One value of a metric as text."""
    return f"{100 * value:.2f} %" if in_percent(name, [value]) else f"{value:.4g}"


def changed_fields(policy: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a policy that are not at their defaults, and those that it always shows.

    Policies of other packages show all fields. The digest of a file of scores is left out.
    """
    known = POLICIES.get(policy["name"], PruningPolicy)
    defaults = {entry.name: json.dumps(entry.default, default=str) for entry in fields(known)}
    return {
        name: value
        for name, value in policy.items()
        if name not in ("name", "digest")
        and (json.dumps(value) != defaults.get(name, "null") or name in known.always_shown)
    }


def shown_policy(values: Mapping[str, Any]) -> str:
    """A policy's name and its [`changed_fields`], such as "ucb(keep_ratio=0.3)"."""
    shown = [f"{name}={value!r}" for name, value in changed_fields(values).items()]
    return f"{values['name']}({', '.join(shown)})" if shown else values["name"]


def differences(reports: Sequence[PruningReport]) -> str:
    """Describe the settings, other than the seed, in which runs differ.

    Files of static scores may differ, since each seed may have its own.

    Returns:
        Text such as "keep_ratio: 0.3 and 0.5"; empty if the settings are the same.
    """

    def settings(report: PruningReport) -> dict[str, Any]:
        own = {name: report.policy[name] for name in report.policy if name not in _BY_SEED}
        return {
            **own,
            "samples": report.num_samples,
            "num_epochs": report.num_epochs,
            "epochs": len(report.epochs),
            "choices": report.selection.get("choices"),
        }

    every = [settings(report) for report in reports]
    found = []
    for name in dict.fromkeys(name for one in every for name in one):
        first = every[0].get(name)
        others = [one.get(name) for one in every[1:]]
        found += [f"{name}: {first} and {other}" for other in others if other != first]
    return "; ".join(found)


def by_seed(name: str, reports: PruningReport | Sequence[PruningReport]) -> list[PruningReport]:
    """The reports of runs that differ only in their seed, in the order of the seeds.

    Raises:
        ValueError: If the runs differ in more. `name` says what they are, for the message.
    """
    given = [reports] if isinstance(reports, PruningReport) else reports
    runs = sorted(given, key=lambda report: report.seed)
    if differing := differences(runs):
        raise ValueError(
            f"The reports of {name} differ in more than the seed ({differing}): expected runs with "
            "the same settings."
        )
    return runs


def chance_of(kept_shares: Iterable[float], before: np.ndarray = _NO_CHOICE) -> np.ndarray:
    """Probabilities that chance alone keeps a sample 0, ..., C times.

    Each of the C choices draws its samples uniformly and independently of the others. The
    distribution is the binomial; the Poisson-binomial if the choices differ in size.

    Args:
        kept_shares: the share of the samples that each choice keeps.
        before: the result for earlier choices, *optional*; one more choice then costs O(C).

    Returns:
        (C + 1,) float64.
    """
    for share in kept_shares:
        before = np.convolve(before, [1 - share, share])
    return before


def selection_of(times_kept: np.ndarray, chance: np.ndarray) -> dict[str, Any]:
    """How often samples were kept, and what chance alone would give.

    Args:
        times_kept: (N,) number of choices that kept the sample.
        chance: (C + 1,) result of [`chance_of`] for the C choices.

    Returns:
        JSON values: `choices` (C); `histogram` (C + 1,), samples that were kept 0, ..., C times;
        `chance` (C + 1,), the same expected by chance; `always`, `sometimes`, `never`, shares of
        the samples; `chance_shares`, the same expected by chance.

    Cost: O(N + C).
    """
    n, choices = len(times_kept), len(chance) - 1
    # torch counts int32 as it is; NumPy's bincount would copy it to int64 first.
    histogram = torch.bincount(torch.as_tensor(times_kept), minlength=choices + 1).numpy()

    def shares(counts: np.ndarray) -> dict[str, float]:
        never, always = (counts[0], counts[-1]) if choices else (0.0, counts[0])
        total = counts.sum()
        values = (always / total, (total - always - never) / total, never / total)
        return {name: max(0.0, float(value)) for name, value in zip(KEPT, values, strict=True)}

    return {
        "choices": choices,
        **shares(histogram),
        "chance_shares": shares(chance),
        "histogram": histogram.tolist(),
        "chance": (chance * n).tolist(),
    }


def describe_environment(**more: Any) -> dict[str, Any]:
    """Versions and hardware of this process, and what the caller adds."""
    cuda = torch.cuda.is_available()
    return {
        "hf_dynprune": __version__,
        "versions": dict(_versions()),
        "platform": f"{platform.system()} {platform.machine()}",  # more of it can name the host
        "device": torch.cuda.get_device_name() if cuda else _cpu_name(),
        "cpu_threads": torch.get_num_threads(),
        **more,
    }


@cache  # the look-up on the disk takes longer than making a pruner
def _versions() -> dict[str, str]:
    """Versions of Python and of the installed packages."""
    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
        with suppress(PackageNotFoundError):
            versions[package] = version(package)
    # The metadata of CUDA wheels leave out the build, such as +cu130.
    return {**versions, "torch": str(torch.__version__)}


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())
