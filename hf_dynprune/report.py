"""PruningReport: the record of a run. Logs, model cards, plots and tables are readers of it."""

import json
import os
import platform
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch

FORMAT_VERSION = 1
_NO_CHOICE = np.ones(1)
PHASES = ("training", "choosing", "scoring", "evaluation")
_PACKAGES = ("torch", "transformers", "accelerate", "datasets", "timm", "evaluate", "numpy")


@dataclass
class EpochRecord:
    """What one epoch was and cost, over all ranks.

    Attributes:
        epoch: counted from 0.
        full_data: whether it trained on everything by `first`, `last` or [`FullData`], not by a choice.
        samples: samples that the plan kept.
        forward_passes: samples (padding included) that went forward in training.
        backward_passes: those that went backward.
        scoring_passes: forward passes made only to score.
        optimizer_steps: steps made in the epoch.
        learning_rate: in force when the epoch ended, that is, for the step after its last.
        scores: mean and quantiles of the finite scores when the plan was made, from 262,144 samples on of evenly spaced ones
            alone; empty where there are none.
        nonfinite: observations that were NaN or infinite.
        seconds: wall-clock by phase; `training` is the epoch less the others, so it holds logging and checkpoints.
        metrics: of the last evaluation in the epoch.
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

    @property
    def passes(self) -> float:
        """A sample once through forward and backward is 1, forward alone (scoring) 1/3."""
        return (self.forward_passes + 2 * self.backward_passes + self.scoring_passes) / 3


@dataclass
class PruningReport:
    """The record of a run. `save` writes it as JSON; the README documents the fields.

    Attributes:
        policy: name and fields.
        num_samples: N.
        num_epochs: epochs that were trained, with the part of the last one.
        seed: of choices; `data_seed`: of the order.
        epochs: a record for each epoch.
        selection: how often samples were kept, see [`selection_of`].
        nonfinite_samples: the samples (of lowest index, 100 at the most) that had a NaN or infinite loss.
        resumed: where the run was resumed: epoch and optimizer step; `stock_checkpoint` where it went on from a checkpoint
            without scores, before which all data are taken to have been trained on.
        environment: versions and hardware.
        preparation: what was spent before the run, for the scores of [`StaticPruning`]: method, file, passes, seconds, and
            whether they are `charged`, that is, counted in `passes`; empty for all other policies.
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

    @property
    def totals(self) -> dict[str, Any]:
        """Sums over the epochs: passes, optimizer steps, seconds by phase."""
        counts = (
            "forward_passes",
            "backward_passes",
            "scoring_passes",
            "optimizer_steps",
            "nonfinite",
        )
        return {
            **{name: sum(getattr(record, name) for record in self.epochs) for name in counts},
            "seconds": {
                phase: sum(record.seconds[phase] for record in self.epochs) for phase in PHASES
            },
        }

    @property
    def passes(self) -> float:
        """Of all epochs, see [`EpochRecord.passes`], and of the preparation, where that is charged."""
        before = self.preparation["passes"] if self.preparation.get("charged") else 0.0
        return before + sum(record.passes for record in self.epochs)

    @property
    def cost_ratio(self) -> float:
        """passes / (num_samples * num_epochs): what was spent, over what the full run of the same epochs spends."""
        full = self.num_samples * self.num_epochs
        return self.passes / full if full else 0.0

    @property
    def metrics(self) -> dict[str, float]:
        """Of the last evaluation: the last epoch's, never the best one's."""
        return next((record.metrics for record in reversed(self.epochs) if record.metrics), {})

    def to_dict(self) -> dict[str, Any]:
        """JSON values: all attributes, and `format_version`, `cost_ratio`, `passes`, `totals`, `metrics`."""
        own = asdict(self)
        head = {
            "format_version": FORMAT_VERSION,
            "policy": own.pop("policy"),
            "cost_ratio": self.cost_ratio,
        }
        return {
            **head,
            "passes": self.passes,
            "totals": self.totals,
            "metrics": self.metrics,
            **own,
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "PruningReport":
        """The inverse of `to_dict`; ValueError for another format."""
        if values.get("format_version") != FORMAT_VERSION:
            raise ValueError(
                f"The report has format_version {values.get('format_version')!r}; this hf_dynprune reads {FORMAT_VERSION}."
            )
        values = {"preparation": {}, **values}  # which reports of version 0.1.0 do not have
        own = {name: values[name] for name in cls.__dataclass_fields__}
        return cls(**{**own, "epochs": [EpochRecord(**record) for record in own["epochs"]]})

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the report as JSON, making the folder if need be."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.tmp")  # so that no reader meets a part
        temporary.write_text(json.dumps(self.to_dict(), indent=2) + "\n")
        os.replace(temporary, path)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "PruningReport":
        """Reads what `save` wrote; ValueError, which names the file, for another format, another file or a damaged one."""
        try:
            return cls.from_dict(json.loads(Path(path).read_text()))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            reason = f"it has no {error}" if isinstance(error, KeyError) else error
            raise ValueError(
                f"{path} is no report of hf_dynprune, or is damaged ({reason})."
            ) from error


def in_percent(metric: str, values: Iterable[float]) -> bool:
    """Whether a person is shown these values of a metric in per cent: an accuracy in [0, 1] is."""
    return metric.endswith("accuracy") and all(0 <= value <= 1 for value in values)


def differences(reports: Sequence[PruningReport]) -> str:
    """In what runs differ that are to differ in their seed alone: "keep_ratio: 0.3 and 0.5"; "" where in nothing. Static
    scores may be other ones for each seed."""

    def settings(report: PruningReport) -> dict[str, Any]:
        policy = {
            name: value for name, value in report.policy.items() if name not in ("scores", "digest")
        }
        counts = {
            "num_epochs": report.num_epochs,
            "epochs": len(report.epochs),
            "choices": report.selection.get("choices"),
        }
        return {**policy, "samples": report.num_samples, **counts}

    all_of = [settings(report) for report in reports]
    names = dict.fromkeys(name for of in all_of for name in of)
    return "; ".join(
        f"{name}: {all_of[0].get(name)} and {of.get(name)}"
        for name in names
        for of in all_of[1:]
        if of.get(name) != all_of[0].get(name)
    )


def chance_of(kept_shares: Iterable[float], before: np.ndarray = _NO_CHOICE) -> np.ndarray:
    """Probabilities (C + 1,) that a sample is kept 0, ..., C times, if each of C choices draws its samples uniformly and
    independently: the binomial; the Poisson-binomial where choices differ in size. `before` are those of earlier choices,
    so that one more choice costs O(C)."""
    for share in kept_shares:
        before = np.convolve(before, [1 - share, share])
    return before


def selection_of(times_kept: np.ndarray, chance: np.ndarray) -> dict[str, Any]:
    """How often samples were kept, beside what chance alone would give.

    Args:
        times_kept: (N,) number of choices that kept the sample.
        chance: (C + 1,) what [`chance_of`] gives for the C choices.

    Returns:
        `choices`: their number C; `histogram`: (C + 1,) how many samples were kept 0, ..., C times; `chance`: the number
        expected by chance; `always`, `sometimes`, `never`: shares of the samples, and the same under `chance_shares`.

    Cost: O(N + C).
    """
    n, choices = len(times_kept), len(chance) - 1
    histogram = torch.bincount(
        torch.as_tensor(times_kept), minlength=choices + 1
    ).numpy()  # NumPy's copies int32 first

    def shares(counts: np.ndarray) -> dict[str, float]:
        never, always = (counts[0], counts[-1]) if choices else (0.0, counts[0])
        total = counts.sum()
        shares = {
            "always": always / total,
            "sometimes": (total - always - never) / total,
            "never": never / total,
        }
        return {name: max(0.0, float(share)) for name, share in shares.items()}

    return {
        "choices": choices,
        **shares(histogram),
        "chance_shares": shares(chance),
        "histogram": histogram.tolist(),
        "chance": (chance * n).tolist(),
    }


def describe_environment(**more: Any) -> dict[str, Any]:
    """Versions and hardware of this process."""
    from . import __version__

    cuda = torch.cuda.is_available()
    return {
        "hf_dynprune": __version__,
        "versions": dict(_versions()),
        "platform": f"{platform.system()} {platform.machine()}",  # the rest of it can name the host
        "device": torch.cuda.get_device_name() if cuda else _cpu_name(),
        "cpu_threads": torch.get_num_threads(),
        **more,
    }


@cache
def _versions() -> dict[str, str]:
    """Of Python and of the packages that are installed; to look them up on the disk takes longer than to make a pruner."""
    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
        with suppress(PackageNotFoundError):
            versions[package] = version(package)
    return versions


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())
