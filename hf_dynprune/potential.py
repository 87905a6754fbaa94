"""Can pruning pay? The effective share of the data, and the saving that it lets expect.

    last loss of each sample ──Magnitude──▶ s (N,) ──effective_share──▶ (sum s)^2 / (N sum s^2)
                                                                           │
                                                     G = 1 / effective share ──predict──▶ saving

s stands in for the size of a sample's gradient. If all samples matter alike, the effective share is
1, and no choice of samples can be better than another. If few samples matter, it is small.
"""

import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from . import json_fields as check
from .checks import check_choice
from .files import load_json

Kind = Literal["likelihood", "error", "signal"]

_FORMULAS: dict[str, str] = {
    "likelihood": "1 - exp(-{})",
    "error": "sqrt({})",
    "signal": "{}",
}


def effective_share(magnitudes: Tensor) -> float:
    """Kish's effective sample size over the number of samples.

        effective share = (sum_i s_i)^2 / (M sum_i s_i^2),    in [1 / M, 1]

    It is 1 if all s are equal, and 1 / M if one sample has all of it. Without samples that do not
    matter (s = 0) it does not change by scale.

    Args:
        magnitudes: (N,) floating point, s of each sample, finite and at least 0. NaN marks a sample
            that was never observed; it is left out. M is the number of the others.

    Raises:
        TypeError: If it is not a tensor of floating point.
        ValueError: If it has another shape, if no s is known, if one is negative or infinite, or if
            all are 0.

    Cost: O(N), in float64.

    Paper: Kish, Survey Sampling, 1965.
    """
    if not isinstance(magnitudes, Tensor) or not magnitudes.is_floating_point():
        kind = magnitudes.dtype if isinstance(magnitudes, Tensor) else type(magnitudes).__name__
        raise TypeError(f"The magnitudes are {kind}: expected a tensor of floating point.")
    if magnitudes.ndim != 1:
        raise ValueError(
            f"The magnitudes have shape {tuple(magnitudes.shape)}: expected (N,), one per sample."
        )
    known = magnitudes[~magnitudes.isnan()].double()
    if len(known) == 0:
        raise ValueError(
            f"Of {len(magnitudes)} samples none has a magnitude: expected at least one observation."
        )
    low, high = float(known.min()), float(known.max())
    if low < 0 or high == math.inf:
        wrong = low if low < 0 else high
        raise ValueError(f"A magnitude is {wrong}: expected finite numbers of at least 0.")
    if high == 0:
        raise ValueError(
            f"The magnitudes of all {len(known)} samples are 0, so they have no effective share: "
            "nothing is left to learn, or the signal is not one of the gradient."
        )
    scaled = known / high  # squares of very large or small numbers leave the range of float64
    share = float(scaled.sum() ** 2 / (len(known) * (scaled**2).sum()))
    return min(share, 1.0)  # rounding may give more


@dataclass(frozen=True)
class Magnitude:
    """What stands in for the size of a sample's gradient, s.

        likelihood    s = 1 - exp(-u)    u is a loss, read as a negative log-likelihood. For one
                                         label exp(-u) is its probability p, and s = 1 - p.
        error         s = sqrt(u)        u is a squared error, so s is the error's size.
        signal        s = u              such as the spread of a prompt's rewards, `"reward_std"`

    The gradient itself would cost one more backward pass per sample. 1 - p is the gradient of the
    cross-entropy with respect to the label's logit, and the error is that of half the squared error
    with respect to the output. What the layers below add is left out.

    Args:
        signal: What is observed, such as `"loss"`.
        kind: How s follows from it.
    """

    signal: str = "loss"
    kind: Kind = "likelihood"

    def __post_init__(self) -> None:
        if not isinstance(self.signal, str) or not self.signal:
            raise TypeError(f"signal={self.signal!r} is not the name of a signal, such as 'loss'.")
        check_choice("kind", self.kind, tuple(_FORMULAS))

    def __str__(self) -> str:
        """The formula, such as `1 - exp(-loss)`."""
        return _FORMULAS[self.kind].format(self.signal)

    def of(self, last: Tensor) -> Tensor:
        """s of each sample, float64, from the last observation u of each; both (N,). NaN stays."""
        values = last.double()
        if self.kind == "likelihood":
            return -torch.expm1(-values)  # exact near 0
        return values.sqrt() if self.kind == "error" else values


def measure(last: Tensor, magnitude: Magnitude) -> float | None:
    """The effective share by the last observation of each sample; None if it is not defined.

    So it is before the first observation, and if a value is negative or all are 0.

    Args:
        last: (N,) floating point, NaN for samples never observed.
        magnitude: How s follows from it.
    """
    if bool((last < 0).any()):  # not a likelihood, an error or a spread
        return None
    try:
        return effective_share(magnitude.of(last))
    except ValueError:
        return None


def magnitude_of_rule(name: str, config: Any = None) -> Magnitude | None:
    """The magnitude for a rule of [`hf_dynprune.losses`]; None if no loss of a sample is known.

    Args:
        name: The rule's. A loss of your own is read as a negative log-likelihood.
        config: The model's. It tells a regression from a classification.
    """
    if name == "batch_mean":
        return None
    problem = getattr(config, "problem_type", None)
    single = problem is None and getattr(config, "num_labels", None) == 1
    regression = name == "classification" and (problem == "regression" or single)
    return Magnitude("loss", "error" if regression else "likelihood")


# ---- the saving that our studies let expect ------------------------------------------------------


class Fit(NamedTuple):
    """A line through studies, log saving = intercept + slope * log G, and what its interval needs.

    Attributes:
        intercept, slope: By least squares.
        deviation: Of the residuals, with studies - 2 degrees of freedom.
        quantile: The 97.5 % quantile of Student's t with as many degrees of freedom.
        studies: Number of studies and costs.
        center, spread: Mean of log G, and the sum of squared distances to it.
        lowest, highest: The range of G in the studies.
    """

    intercept: float
    slope: float
    deviation: float
    quantile: float
    studies: int
    center: float
    spread: float
    lowest: float
    highest: float


class Saving(NamedTuple):
    """How much cheaper a pruned run is predicted to be than the short run with the same result.

    Each is a factor: the cost of the short run over that of the pruned run. 1 saves nothing.
    """

    factor: float
    low: float
    high: float

    @property
    def shares(self) -> tuple[float, float, float]:
        """The shares of the short run's cost that are saved, 1 - 1 / factor: (middle, low, high).

        A negative share costs more.
        """
        return tuple(1 - 1 / factor for factor in self)  # type: ignore[return-value]


def fit_line(gains: Sequence[float], savings: Sequence[float], quantile: float) -> Fit:
    """Fit log saving = intercept + slope * log G by least squares.

    Args:
        gains: G of each study, at least three, not all equal.
        savings: The measured factor of each.
        quantile: See [`Fit`].
    """
    if len(gains) != len(savings) or len(gains) < 3 or len(set(gains)) == 1:
        raise ValueError(
            f"There are {len(gains)} gains and {len(savings)} savings: expected as many of both, "
            "at least three, with different gains."
        )
    x, y = [math.log(gain) for gain in gains], [math.log(saving) for saving in savings]
    n = len(x)
    center, middle = sum(x) / n, sum(y) / n
    spread = sum((each - center) ** 2 for each in x)
    slope = sum((a - center) * (b - middle) for a, b in zip(x, y, strict=True)) / spread
    intercept = middle - slope * center
    residuals = [b - intercept - slope * a for a, b in zip(x, y, strict=True)]
    deviation = math.sqrt(sum(each**2 for each in residuals) / (n - 2))
    return Fit(intercept, slope, deviation, quantile, n, center, spread, min(gains), max(gains))


def predicted_saving(gain: float, fit: Fit | None = None) -> Saving:
    """The saving of a new study with this G, and its 95 % prediction interval.

    Of a G above those of the studies it is the saving at the highest of them: the line is not
    continued to where nothing was measured.

    Args:
        gain: G, at least 1.
        fit: The line, by default the one through our studies.
    """
    if not (isinstance(gain, int | float) and 1 <= gain < math.inf):
        raise ValueError(f"gain={gain!r} is not G = 1 / effective share: expected at least 1.")
    fit = STUDIES if fit is None else fit
    x = math.log(min(gain, fit.highest))
    middle = fit.intercept + fit.slope * x
    leverage = 1 + 1 / fit.studies + (x - fit.center) ** 2 / fit.spread
    half = fit.quantile * fit.deviation * math.sqrt(leverage)
    return Saving(math.exp(middle), math.exp(middle - half), math.exp(middle + half))


# recipes/results/potential.json, written by `python -m recipes.studies.potential` from the reports
# of all settings; a test compares. A long run whose short run lost less than two points is left
# out: its G was 1.36, and it saved nothing.
STUDIES = Fit(
    intercept=0.0369012,
    slope=0.5680519,
    deviation=0.1868738,
    quantile=2.1603687,
    studies=15,
    center=0.1390462,
    spread=0.2464797,
    lowest=1.0000437,
    highest=1.6045989,
)
# The least that the full run must be ahead of the short run, in points of accuracy: below it there
# is next to nothing to win back.
LEAST_LOST = 2


# ---- anybody's log of reinforcement learning -----------------------------------------------------

TRAINER_STATE = "trainer_state.json"
ZERO_STD = "frac_reward_zero_std"  # under this name trl logs the share of groups without a gradient
# With fewer visits a rule knows next to nothing of a prompt: with 2 to 3 no rule won anything.
LEAST_VISITS = 10


@dataclass(frozen=True)
class RolloutLog:
    """What a log of trl's GRPOTrainer or RLOOTrainer says about choosing prompts.

        effective share = mean over the steps of 1 - frac_reward_zero_std

    It is the share of the prompts that were rolled out whose rewards differed. The others had no
    gradient. A choice that knew them beforehand would have needed this share of the rollouts, so
    `gain`, G = 1 / effective share, is an upper bound: no rule knows them beforehand, and each rule
    must look at every prompt from time to time.

    Attributes:
        effective_share: Over the run, in [0, 1].
        first, last: The same over the first and the last quarter of the steps.
        steps: Steps that the entries tell of.
        entries: Entries of the log with the number.
        visits: Epochs at the last entry: how often the run rolled out each prompt. None if the log
            does not tell, or if prompts were chosen.
    """

    effective_share: float
    first: float
    last: float
    steps: int
    entries: int
    visits: float | None

    @property
    def gain(self) -> float:
        """G, at least 1; infinite if no prompt had a gradient."""
        return 1 / self.effective_share if self.effective_share else math.inf

    def to_dict(self) -> dict[str, Any]:
        """The attributes and `gain` as JSON values."""
        return {**asdict(self), "gain": self.gain}

    def __str__(self) -> str:
        """The answer in lines, for a terminal."""
        share = f"{100 * self.effective_share:.0f} %"
        quarters = f"first quarter {100 * self.first:.0f} %, last quarter {100 * self.last:.0f} %"
        bound = f"G = {self.gain:.1f}" if self.effective_share else "no prompt had a gradient"
        lines = [
            f"effective share: {share} of the prompts rolled out had a gradient ({quarters}; "
            f"{self.entries:,} entries over {self.steps:,} steps).",
            f"Upper bound: a choice before the rollout needs at least {share} of the rollouts "
            f"({bound}). A rule must look at prompts to know them, so expect less.",
        ]
        if self.visits is None:
            lines.append(
                "Visits: unknown. A rule learns about a prompt from its own rollouts, in about "
                f"{LEAST_VISITS} visits or more."
            )
        elif self.visits < LEAST_VISITS:
            lines.append(
                f"Visits: {self.visits:.1f} per prompt, too few. A rule learns about a prompt from "
                f"its own rollouts, in about {LEAST_VISITS} visits or more. Expect no saving."
            )
        else:
            lines.append(f"Visits: {self.visits:.1f} per prompt, enough for a rule to learn from.")
        lines.append("Try a smaller batch first: it uses fewer rollouts in each step, too.")
        return "\n".join(lines)


_ENTRY = check.open_fields(
    {}, {ZERO_STD: check.share, "step": check.count, "epoch": check.or_none(check.spent)}
)


def read_rollout_log(path: str | os.PathLike[str]) -> RolloutLog:
    """Read the log that trl's GRPOTrainer or RLOOTrainer leaves in a checkpoint.

    Args:
        path: `trainer_state.json`, or the folder of the checkpoint that has it.

    Raises:
        OSError: If there is no such file.
        ValueError: If it is not the state of a Trainer, if a number is out of range, or if no entry
            has `frac_reward_zero_std`. The message names the file.
    """
    path = Path(path)
    file = path / TRAINER_STATE if path.is_dir() else path
    if not file.is_file():
        raise FileNotFoundError(
            f"{file} does not exist: expected the {TRAINER_STATE} of a checkpoint, or its folder."
        )
    try:
        state = check.fields({"log_history": check.list_of(_ENTRY)})("state", load_json(file))
    except ValueError as error:
        raise ValueError(
            f"{file} is not the {TRAINER_STATE} of a Trainer, or it is damaged ({error})."
        ) from error
    entries = [entry for entry in state["log_history"] if ZERO_STD in entry]
    if not entries:
        raise ValueError(
            f"{file} has no entry with {ZERO_STD!r}: expected a run of trl's GRPOTrainer or "
            f"RLOOTrainer, and {len(state['log_history'])} entries of another run are there."
        )
    return _rollout_log(entries)


def _rollout_log(entries: Sequence[dict[str, Any]]) -> RolloutLog:
    # Each entry is the mean since the one before.
    ends = [entry.get("step", i) for i, entry in enumerate(entries, 1)]
    if ends[-1] == 0 or ends != sorted(ends):
        ends = list(range(1, len(entries) + 1))
    shares = [min(max(1 - entry[ZERO_STD], 0.0), 1.0) for entry in entries]
    parts = list(zip([0, *ends], ends, shares, strict=False))

    def mean(low: float, high: float) -> float:
        """Over the steps from `low` to `high`."""
        inside = [(max(min(end, high) - max(begin, low), 0), x) for begin, end, x in parts]
        return sum(steps * x for steps, x in inside) / (high - low)

    steps = ends[-1]
    chosen = any("pruning/effective_prompts" in entry for entry in entries)
    return RolloutLog(
        effective_share=mean(0, steps),
        first=mean(0, steps / 4),
        last=mean(0.75 * steps, steps),
        steps=steps,
        entries=len(entries),
        visits=None if chosen else entries[-1].get("epoch"),
    )
