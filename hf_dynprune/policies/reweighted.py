"""InfoBatch: samples of low loss are left out at random, and the others of low loss weigh more."""

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from ..checks import check_number
from ..selection import draw, floor_share, indices_of, keep_count, kth_highest, top_k
from .base import Choice, EpochPlan, check_keep_ratio, usable
from .by_loss import LastLoss


def check_prune_ratio(value: Any) -> None:
    """Raise TypeError or ValueError unless `prune_ratio` is a number in [0, 0.9]."""
    # The released codes of InfoBatch and SeTa accept more, and act as for 0.9.
    expected = "a share in [0, 0.9], as in the released code"
    check_number("prune_ratio", value, expected, lambda ratio: 0 <= ratio <= 0.9)


@dataclass(frozen=True)
class InfoBatch(LastLoss):
    """InfoBatch: drops random samples of low loss and gives the other low ones more weight.

    With mu the mean of the last losses of the observed samples and r = prune_ratio, the published
    form is:

        low = the samples with a last loss < mu
        S = floor((1 - r) |low|) of low, uniform without replacement, each with weight 1 / (1 - r)
            ∪  all others, with weight 1
        the last 0.125 of the run trains on all data (the field `last`)

    How many samples that keeps depends on the data: with 70 % of the losses below the mean, r = 0.5
    keeps 65 %. With keep_ratio instead, the number is exact, K = round(keep_ratio * N), by our
    form:

        h = min(number of samples with a loss >= mu, floor((K w - N) / (w - 1))),  w = max_rescale
        S = the h samples of highest loss, with weight 1
            ∪  K - h of the other N - h, uniform without replacement,
               each with weight (N - h) / (K - h) <= w

    (up to the rounding of K if keep_ratio = 1 / w). If chance would have to decide which of several
    equal losses are among the h highest, none of them is: they are drawn, with the same weight.

    In both forms the expected sum of the weighted losses is the sum over all samples (in the
    published form except for the floor). A step's gradient is therefore on average N/K times that
    of the full run, and there are K/N times as many steps. Do not raise the learning rate as well.
    Weights of 1 / keep_ratio and more are why the second form has a cap: without one, trials with
    30 % kept collapsed.

    Never observed samples count as above the mean. The published form keeps them all, so its first
    epoch prunes nothing. The exact form cannot while they are many: it then draws from all alike,
    each with weight N / K. Samples that gave no finite loss, or that a guard bars, are left out as
    long as there are others, and N counts without them.

    Paper: Qin et al., ICLR 2024, arXiv 2303.04947 (code NUS-HPC-AI-Lab/InfoBatch). r = 0.5 and
    0.125 are its defaults. Differences to the code: there, losses start at 3, and those count in
    its mean; its score holds label smoothing; its draw depends on the epoch alone, not on the seed;
    after a fraction of epochs that is not whole its weights are never reset. The paper's second,
    higher rate for the lowest losses is neither in the code nor here.

    Cost outside the last part: 1 - r |low| / N (whole runs that others measured: 0.6 to 0.9, so r
    is not what is saved); or keep_ratio. Training losses are free; one float per sample; O(N) per
    choice.

    Args:
        prune_ratio: r, share of the samples below the mean that is left out, in [0, 0.9].
            *Optional*, defaults to 0.5 if keep_ratio is not given.
        keep_ratio: Share of all samples trained in an epoch, in [1 / max_rescale, 1]; instead of
            prune_ratio.
        max_rescale: w, the largest weight with keep_ratio, above 1.
    """

    prune_ratio: float | None = field(default=None, kw_only=True)
    keep_ratio: float | None = field(default=None, kw_only=True)
    max_rescale: float = field(default=4.0, kw_only=True)
    last: float = field(default=0.125, kw_only=True)

    name = "infobatch"
    weighs: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        expected = "a number above 1, the largest weight"
        check_number("max_rescale", self.max_rescale, expected, lambda weight: weight > 1)
        if self.keep_ratio is None:
            if self.prune_ratio is None:
                object.__setattr__(self, "prune_ratio", 0.5)
            check_prune_ratio(self.prune_ratio)
            return
        check_keep_ratio(self.keep_ratio)
        if self.prune_ratio is not None:
            raise ValueError(
                f"prune_ratio={self.prune_ratio} and keep_ratio={self.keep_ratio} are two forms of "
                "InfoBatch: give one. prune_ratio=0.5 is the published form, keep_ratio sets the "
                "number of samples exactly."
            )
        if self.keep_ratio * self.max_rescale < 1 - 1e-9:
            raise ValueError(
                f"keep_ratio={self.keep_ratio} is out of range for max_rescale={self.max_rescale}: "
                f"the samples drawn would weigh 1 / keep_ratio = {1 / self.keep_ratio:.3g} or "
                f"more. Expected keep_ratio >= 1 / max_rescale = {1 / self.max_rescale:.3g}: raise "
                "keep_ratio or max_rescale, or use RandomPruning."
            )

    def planned_size(self, n: int, epoch: int, progress: float) -> int | None:
        return None if self.keep_ratio is None else keep_count(self.keep_ratio, n)

    def expected_share(self, n: int) -> tuple[float, float]:
        """Assumes that 20 to 80 % of the losses are below their mean.

        At prune_ratio 0.5 that is a cost of 0.6 to 0.9, as others measured.
        """
        r = self.prune_ratio or 0.0
        return 1 - 0.8 * r, 1 - 0.2 * r

    def plan(self, choice: Choice) -> EpochPlan:
        candidates = usable(choice.score)
        if self.keep_ratio is None:
            return self._published(choice, candidates)
        return self._exact(choice, candidates)

    def _published(self, choice: Choice, candidates: Tensor) -> EpochPlan:
        assert self.prune_ratio is not None  # set at construction
        if not candidates.any():
            return EpochPlan(torch.arange(choice.n))
        above = choice.score >= _mean(choice.score, candidates)
        pool = candidates & ~above
        k = floor_share(1 - self.prune_ratio, int(torch.count_nonzero(pool)))
        return _reweighted(above, draw(pool, k, choice.generator), 1 / (1 - self.prune_ratio))

    def _exact(self, choice: Choice, candidates: Tensor) -> EpochPlan:
        k, w, n = choice.size, self.max_rescale, int(torch.count_nonzero(candidates))
        if k >= n:
            return EpochPlan(top_k(choice.score, k, choice.generator))
        high = int(torch.count_nonzero(choice.score >= _mean(choice.score, candidates)))
        above = _highest(choice.score, max(0, min(high, math.floor((k * w - n) / (w - 1)))))
        pool = candidates & ~above
        k -= int(torch.count_nonzero(above))
        weight = int(torch.count_nonzero(pool)) / k
        return _reweighted(above, draw(pool, k, choice.generator), weight)


def _reweighted(above: Tensor, drawn: Tensor, weight: float) -> EpochPlan:
    """Keep both (N,) masks; the drawn samples have that weight, the others 1."""
    indices = indices_of(above | drawn)
    if weight == 1 or not drawn.any():
        return EpochPlan(indices)
    weights = torch.ones(len(indices)).masked_fill_(drawn.index_select(0, indices), weight)
    return EpochPlan(indices, weights)


def _mean(score: Tensor, candidates: Tensor) -> Tensor | float:
    """The mean of the candidates' finite scores, in double; inf if there are none.

    It never exceeds the highest score: if all losses are equal, none is below their mean.
    """
    known = candidates & (score < math.inf)
    count = int(torch.count_nonzero(known))
    if count == 0:
        return math.inf
    # A known score in place of the unknown ones moves no maximum, and is subtracted again.
    some = score[int(known.numpy().argmax())]
    filled = score.where(known, some)
    total = filled.numpy().sum(dtype=np.float64)  # six times as fast as torch's sum
    total -= (len(score) - count) * some.item()
    return torch.minimum(torch.tensor(total / count, dtype=torch.float32), filled.max())


def _highest(score: Tensor, h: int) -> Tensor:
    """Which samples have the h highest scores, (N,) bool; none of those tied with the next one."""
    if h == 0:
        return torch.zeros(len(score), dtype=torch.bool)
    edge = kth_highest(score, h)
    mask = score >= edge
    return mask if int(torch.count_nonzero(mask)) == h else score > edge
