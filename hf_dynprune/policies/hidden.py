"""Rules that hide learned samples: KAKURENBO and instance-dependent early stopping."""

import math
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from ..checks import check_flag, check_number, check_share
from ..selection import floor_share, indices_of, top_k
from ..table import History, Last, Memory, SampleTable
from .base import Choice, EpochPlan, ScoredPolicy, usable
from .by_loss import LastLoss

_LOSSES = 6  # that instance-dependent early stopping looks back on


@dataclass(frozen=True)
class KAKURENBO(LastLoss):
    """KAKURENBO: hides samples of lowest loss that are classified correctly and confidently.

        F_e = max_hidden * the factor of `schedule` that is in force
        candidates = the floor(F_e N) samples of lowest last loss, ties broken at random
        hidden = the candidates that were classified correctly with a confidence >= min_confidence
        S = all but the hidden;    learning rate * N / |S|, that is, 1 / (1 - the share hidden)
        before the next choice, forward passes over the hidden renew their loss, correctness and
        confidence

    An epoch trains on at least 1 - F_e of the data. Never observed samples are not hidden, so the
    first epoch trains on everything. Samples that gave no finite loss are hidden first.

    Paper: Nguyen et al., NeurIPS 2023, arXiv 2310.10102 (code TruongThaoNguyen/kakurenbo).
    max_hidden 0.3, min_confidence 0.7 and the schedule (1, 0.8, 0.6, 0.4 from epoch 0, 60, 120, 160
    of 200) are those of its CIFAR-100 script; its ImageNet script has ((0, 1), (1/3, 0.8),
    (2/3, 0.6)). Differences to the code:
    - The learning rate: it uses 1 / (1 - F_e), though fewer samples are hidden, and leaves the LR
      warm-up unscaled.
    - The confidence: it takes the highest of a softmax over the batch instead of the classes. Here
      it is the probability of the label, which for a correctly classified sample is the highest of
      the classes.

    Cost: 1 - (2/3) * the share hidden with scoring="dropped" (the default: hidden samples go
    forward once per epoch); three floats per sample; O(N) per choice. With scoring="trained" a
    hidden sample only comes back when others have a lower loss, or by `max_age`. For single-label
    classification.

    Args:
        max_hidden: F, the largest share that is hidden, in [0, 1).
        schedule: Pairs (share of the run, factor on F from there on), the first at 0.
        min_confidence: A candidate below it is trained, in [0, 1].
        scale_lr: Whether the learning rate is raised for the steps that are saved.
    """

    max_hidden: float = 0.3
    schedule: tuple[tuple[float, float], ...] = ((0.0, 1.0), (0.3, 0.8), (0.6, 0.6), (0.8, 0.4))
    min_confidence: float = 0.7
    scale_lr: bool = True
    scoring: Literal["trained", "all", "dropped"] = field(default="dropped", kw_only=True)

    name = "kakurenbo"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number(
            "max_hidden", self.max_hidden, "a share in [0, 1)", lambda share: 0 <= share < 1
        )
        check_share("min_confidence", self.min_confidence)
        check_flag("scale_lr", self.scale_lr)
        object.__setattr__(self, "schedule", _schedule(self.schedule))  # JSON has lists

    @property
    def memory(self) -> Memory:
        return Last("loss", "correct", "confidence")

    def expected_share(self, n: int) -> tuple[float, float]:
        """From all but `max_hidden` to everything."""
        return 1 - self.max_hidden, 1.0

    def plan(self, choice: Choice) -> EpochPlan:
        n, table = choice.n, choice.table
        passed = [factor for start, factor in self.schedule if choice.progress >= start - 1e-9]
        hidden = floor_share(self.max_hidden * passed[-1], n)
        candidates = top_k(-choice.score, hidden, choice.generator)
        low = choice.score[candidates]
        confident = table["confidence"][candidates] >= self.min_confidence
        learned = (table["correct"][candidates] > 0.5) & confident & (low < math.inf)
        kept = torch.ones(n, dtype=torch.bool)
        kept[candidates[learned | ~usable(low)]] = False
        indices = indices_of(kept)
        return EpochPlan(indices, lr_scale=n / len(indices) if self.scale_lr else 1.0)


def _schedule(value: Any) -> tuple[tuple[float, float], ...]:
    """Pairs (share of the run, factor) as tuples of floats, checked."""
    expected = (
        "pairs (share of the run, factor in [0, 1]), the first at 0, each later than the one "
        "before, such as ((0, 1), (0.6, 0.5))"
    )
    pairs: list[Any] = list(value) if isinstance(value, list | tuple) else [None]
    if not all(isinstance(pair, list | tuple) and len(pair) == 2 for pair in pairs):
        raise TypeError(f"schedule={value!r} is not a schedule: expected {expected}.")
    for start, factor in pairs:
        check_share("schedule: the share", start)
        check_share("schedule: the factor", factor)
    starts = [start for start, _ in pairs]
    if not starts or starts[0] != 0 or sorted(set(starts)) != starts:
        raise ValueError(f"schedule={value!r} is out of range: expected {expected}.")
    return tuple((float(start), float(factor)) for start, factor in pairs)


@dataclass(frozen=True)
class IES(ScoredPolicy):
    """Instance-dependent early stopping: leaves a sample out once its loss has stopped bending.

        d = L_t - 2 L_(t-1) + L_(t-2)    of the losses L observed of a sample, one per epoch
        score = the mean of |d| over the last three,    +inf until six losses are known
        S = the samples with score >= threshold;    the others are mastered
        before the next choice, forward passes over the mastered add their losses: a sample comes
        back when its loss moves

    An epoch trains on what is not mastered: everything in the first six epochs, ever less as the
    learning rate falls. If all are mastered, the sample of highest score is trained.

    Paper: Yuan et al., ICLR 2025, arXiv 2502.07547 (code tmllab/2025_ICLR_IES). The threshold 1e-3
    is that of its CIFAR-10 runs. For CIFAR-100 the code doubles it, and its README recommends 1e-1
    to 1e-5. The rule follows the code (a moving average of 3, k = 1, a sixth loss before the first
    verdict) except for a fault: once no sample is mastered any more, the code keeps leaving out
    those of the choice before. The accuracy that it reports is the best of all epochs on test data.

    Cost: 1 - (2/3) * the share mastered with scoring="dropped" (the default; the paper counts
    backward passes alone); six floats per sample; O(N) per choice. The history then mixes losses of
    training and of forward passes, as in the code. With scoring="trained" a mastered sample is not
    observed, and only `max_age` brings it back. The guard `exclude_hardest` excludes the samples
    whose loss changes most.

    Args:
        threshold: Below it a sample is mastered, at least 0; 0 keeps everything.
    """

    threshold: float = 1e-3
    scoring: Literal["trained", "all", "dropped"] = field(default="dropped", kw_only=True)

    name = "ies"

    def __post_init__(self) -> None:
        super().__post_init__()
        expected = "a number of at least 0, such as 0.001"
        check_number("threshold", self.threshold, expected, lambda threshold: threshold >= 0)

    @property
    def memory(self) -> Memory:
        return History("loss", _LOSSES)

    def score(self, table: SampleTable) -> Tensor:
        loss = torch.stack([table[column.name] for column in self.memory.columns])
        change = (loss[0:3] - 2 * loss[1:4] + loss[2:5]).abs().mean(0)
        return change.where(loss[-1].isfinite(), math.inf).where(loss[0].isfinite(), math.nan)

    def expected_share(self, n: int) -> tuple[float, float]:
        """0.54 to 0.88, as measured on CIFAR-10 and CIFAR-100."""
        return 0.54, 0.88

    def plan(self, choice: Choice) -> EpochPlan:
        kept = indices_of(choice.score >= self.threshold)
        return EpochPlan(kept if len(kept) else top_k(choice.score, 1, choice.generator))
