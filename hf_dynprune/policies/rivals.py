"""The dynamic rules that later papers compare with, and one of ours. Each class says where it differs from released code."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from ..scores import Column, Rows, SampleTable
from .base import (
    EpochPlan,
    LastLoss,
    PruningPolicy,
    check_count,
    check_decay,
    check_number,
    check_share,
    draw,
    floor_share,
    indices_of,
    keep_count,
    kth_highest,
    moving_mean,
    permutation,
    top_k,
)

# The 1-D k-means is exact for so many different losses; more are put into so many cells of neighbours.
_CELLS = 1024
_LOSSES = 6  # that instance-dependent early stopping looks back on


def _check_prune_ratio(value: Any) -> None:
    # The released codes of InfoBatch and SeTa take more, and act as for 0.9.
    check_number(
        "prune_ratio",
        value,
        "a share in [0, 0.9], as in the released code",
        lambda r: 0 <= r <= 0.9,
    )


def _usable(score: Tensor) -> Tensor:
    """Which samples may be drawn at all: not those that gave no finite loss or are barred by a guard. (N,) bool."""
    return score > -math.inf


# ---- drawn by loss -------------------------------------------------------------------------------


@dataclass(frozen=True)
class LossProportional(PruningPolicy):
    """Loss-proportional sampling: K samples drawn without replacement, likelier the higher their mean loss.

        on each observation u_i of a sample     m_i <- (1 - a) m_i + a u_i;     the first sets m_i = u_i
        at each choice, K = round(keep_ratio * N)
            S = K samples drawn one after the other, each time with probabilities proportional to m_i^alpha
        never observed = +inf: such samples come first, ties broken at random

    An epoch trains on K samples: mostly hard ones, but every sample that still has a loss has its chance, so that wrong
    labels crowd the rest out less than under a top K. There are no weights: the sum of the losses is not unbiased.

    Drawn at once: the K highest keys  alpha log m_i + g_i,  g_i standard Gumbel noise, are such a draw (Efraimidis &
    Spirakis 2006, with the keys in logarithms; Kool, van Hoof, Welling 2019, arXiv 1903.06059). A mean of 0 has
    probability 0, and a negative one counts as 0: such samples fill up what is left, at random.

    The rule in this form is ours; alpha and decay are untuned.

    Cost: keep_ratio (training losses are free); one float a sample; O(N) a choice.

    Args:
        keep_ratio: share of the samples trained in an epoch, in (0, 1].
        alpha: sharpness, > 0: towards 0 a uniform draw, towards infinity the K highest means.
        decay: a, the weight of a new observation in the moving mean, in (0, 1]; 1 is the last loss alone.
    """

    keep_ratio: float = 0.5
    alpha: float = 1.0
    decay: float = 0.8

    columns = (Column("mean"),)

    def __post_init__(self) -> None:
        super().__post_init__()
        wanted = "a number above 0, such as 1 (RandomPruning is the limit 0)"
        check_number("alpha", self.alpha, wanted, lambda alpha: alpha > 0)
        check_decay(self.decay)

    @property
    def signals(self) -> tuple[str, ...]:
        return ("loss",)

    def observe(self, rows: Rows, signals: Rows) -> Mapping[str, Tensor]:
        return {"mean": moving_mean(rows["mean"], signals["loss"], self.decay)}

    def score(self, table: SampleTable) -> Tensor:
        return table["mean"]

    def plan(
        self,
        table: SampleTable,
        *,
        score: Tensor | None,
        epoch: int,
        progress: float,
        generator: torch.Generator,
    ) -> EpochPlan:
        assert score is not None
        double = torch.finfo(torch.float64)
        uniform = torch.rand(len(score), dtype=torch.float64, generator=generator).clamp_(
            min=double.tiny
        )
        key = self.alpha * score.double().log() - (-uniform.log()).log()
        # After all that can be drawn come the losses of 0, and after them what gave no finite loss.
        key = key.where(score > 0, double.min).where(_usable(score), -math.inf)
        return EpochPlan(top_k(key, keep_count(self.keep_ratio, len(score)), generator))


@dataclass(frozen=True)
class OrderDP(LastLoss):
    """Order-statistic pruning: of a uniform draw, the samples of highest loss.

        at each choice, K = round(keep_ratio * N)
            B = floor(draw_ratio * N) samples, uniform without replacement (never fewer than K)
            S = the K of B with the highest last loss
        never observed = +inf: such samples come first within B, ties broken at random

    An epoch trains on K samples. The random first stage is what rotates them; at draw_ratio = keep_ratio it is random
    pruning, at 1 the plain top K. There are no weights: the rule is unbiased for a loss in which a sample counts by its
    rank, not for the mean loss.

    Paper: Jin et al., ICLR 2026, arXiv 2606.08574 (code shengze-xu/OrderDP). As in the code, but: it starts all losses at 3,
    here a sample never observed has no loss and comes first. Its class keeps 0.75 * 0.85 of the data, its README for CIFAR
    0.8 * 0.375 = 0.3 (`paper_like`), its ImageNet script 0.75 * 0.8; the names of the fields are ours.

    Cost: keep_ratio (training losses are free); one float a sample; O(N) a choice.

    Args:
        keep_ratio: share of the samples trained in an epoch, in (0, 1].
        draw_ratio: share of the samples that is drawn first, in [keep_ratio, 1]; *optional*, defaults to 0.75, or
            keep_ratio where that is more.
    """

    keep_ratio: float = 0.5
    draw_ratio: float | None = None

    paper_settings = {"keep_ratio": 0.3, "draw_ratio": 0.8}  # noqa: RUF012  # read only

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.draw_ratio is None:
            object.__setattr__(self, "draw_ratio", max(0.75, self.keep_ratio))
        wanted = f"a share in [keep_ratio, 1] = [{self.keep_ratio}, 1]: the kept samples are taken from those drawn"
        check_number(
            "draw_ratio", self.draw_ratio, wanted, lambda ratio: self.keep_ratio <= ratio <= 1
        )

    def plan(
        self,
        table: SampleTable,
        *,
        score: Tensor | None,
        epoch: int,
        progress: float,
        generator: torch.Generator,
    ) -> EpochPlan:
        assert score is not None
        assert self.draw_ratio is not None
        n, k = len(score), keep_count(self.keep_ratio, len(score))
        pool = indices_of(_usable(score))
        drawn = pool.index_select(
            0, permutation(len(pool), generator)[: max(k, floor_share(self.draw_ratio, n))]
        )
        if len(drawn) < k:
            return EpochPlan(top_k(score, k, generator))
        return EpochPlan(drawn[top_k(score[drawn], k, generator)])


@dataclass(frozen=True)
class InfoBatch(LastLoss):
    """InfoBatch: a random part of the samples of low loss is left out, and the others of these weigh more instead.

    With mu the mean of the last losses of the observed samples and r = prune_ratio, the published form:

        low = the samples with a last loss < mu
        S = floor((1 - r) |low|) of low, uniform without replacement, each with weight 1 / (1 - r)
            ∪  all others, with weight 1
        the last 0.125 of the run trains on all data (the field `last`)

    How many samples that keeps depends on the data: of a dataset with 70 % below the mean, r = 0.5 keeps 65 %. With
    keep_ratio instead the number is exact, K = round(keep_ratio * N), by a form of ours:

        h = min(number of samples with a loss >= mu, floor((K w - N) / (w - 1))),    w = max_rescale
        S = the h samples of highest loss, with weight 1
            ∪  K - h of the other N - h, uniform without replacement, each with weight (N - h) / (K - h) <= w

    (up to the rounding of K, where keep_ratio = 1 / w). Where chance would have to say which of several equal losses are
    among the h highest, none of them is: they are drawn, with the same weight.

    Either way the expected sum of the weighted losses is the sum over all samples (the published form: but for the floor),
    so a step's gradient is in the mean N/K times that of the full run, and there are K/N times as many steps. Do not raise
    the learning rate on top of that. Weights of 1 / keep_ratio and more are why the second form has a cap: without one,
    trials with 30 % kept collapsed.

    Never observed samples count as above the mean: the published form keeps them all, so its first epoch prunes nothing.
    The exact form cannot, while they are many: it then draws from all alike, each with weight N / K. Samples that gave no
    finite loss, or that a guard bars, are left out as long as there are others, and N counts without them.

    Paper: Qin et al., ICLR 2024, arXiv 2303.04947 (code NUS-HPC-AI-Lab/InfoBatch). r = 0.5 and the 0.125 are its defaults.
    From the code differ: losses start at 3 there, and those count in its mean; the score there holds label smoothing; its
    draw depends on the epoch alone, not on the seed; after a fraction of epochs that is not whole its weights are never
    reset. The paper's second, higher rate for the lowest losses is not in the code and not here.

    Cost outside the last part: 1 - r |low| / N (whole runs that others measured: 0.6 to 0.9, so r is not what is saved); or
    keep_ratio. Training losses are free; one float a sample; O(N) a choice.

    Args:
        prune_ratio: r, share of the samples below the mean that is left out, in [0, 0.9]; *optional*, defaults to 0.5 where
            keep_ratio is not given.
        keep_ratio: share of all samples trained in an epoch, in [1 / max_rescale, 1]; instead of prune_ratio.
        max_rescale: w, the largest weight with keep_ratio, above 1.
    """

    prune_ratio: float | None = field(default=None, kw_only=True)
    keep_ratio: float | None = field(default=None, kw_only=True)
    max_rescale: float = field(default=4.0, kw_only=True)
    last: float = field(default=0.125, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number(
            "max_rescale",
            self.max_rescale,
            "a number above 1, the largest weight",
            lambda weight: weight > 1,
        )
        if self.keep_ratio is None:
            if self.prune_ratio is None:
                object.__setattr__(self, "prune_ratio", 0.5)
            _check_prune_ratio(self.prune_ratio)
            return
        if self.prune_ratio is not None:
            raise ValueError(
                f"prune_ratio={self.prune_ratio} and keep_ratio={self.keep_ratio} are two forms of InfoBatch: wanted is "
                "one. prune_ratio=0.5 is the published form, keep_ratio sets the number of samples exactly."
            )
        if self.keep_ratio * self.max_rescale < 1 - 1e-9:
            raise ValueError(
                f"keep_ratio={self.keep_ratio} is out of range for max_rescale={self.max_rescale}: the samples drawn would "
                f"weigh 1 / keep_ratio = {1 / self.keep_ratio:.3g} and more. Wanted is keep_ratio >= 1 / max_rescale = "
                f"{1 / self.max_rescale:.3g}: raise keep_ratio or max_rescale, or take RandomPruning."
            )

    def plan(
        self,
        table: SampleTable,
        *,
        score: Tensor | None,
        epoch: int,
        progress: float,
        generator: torch.Generator,
    ) -> EpochPlan:
        assert score is not None
        usable = _usable(score)
        known = usable & (score < math.inf)
        above, n = score >= _mean(score, known), int(torch.count_nonzero(usable))
        if self.keep_ratio is None:
            assert self.prune_ratio is not None
            if n == 0:
                return EpochPlan(torch.arange(len(score)))
            pool = usable & ~above
            k = floor_share(1 - self.prune_ratio, int(torch.count_nonzero(pool)))
            weight = 1 / (1 - self.prune_ratio)
        else:
            k, w = keep_count(self.keep_ratio, len(score)), self.max_rescale
            if k >= n:
                return EpochPlan(top_k(score, k, generator))
            above = _highest(
                score,
                max(0, min(int(torch.count_nonzero(above)), math.floor((k * w - n) / (w - 1)))),
            )
            pool = usable & ~above
            k -= int(torch.count_nonzero(above))
            weight = int(torch.count_nonzero(pool)) / k
        drawn = draw(pool, k, generator)
        indices = indices_of(above | drawn)
        if k == 0 or weight == 1:
            return EpochPlan(indices)
        return EpochPlan(
            indices, torch.ones(len(indices)).masked_fill_(drawn.index_select(0, indices), weight)
        )


def _mean(score: Tensor, known: Tensor) -> Tensor | float:
    """The mean of the known scores, inf where there are none. In double, and never above the highest: where all losses are
    equal none is below their mean."""
    count = int(torch.count_nonzero(known))
    if count == 0:
        return math.inf
    some = score[
        int(known.numpy().argmax())
    ]  # for the others: it moves no maximum, and is taken off the sum again
    filled = score.where(known, some)
    total = (
        filled.numpy().sum(dtype=np.float64) - (len(score) - count) * some.item()
    )  # six times as fast as torch's
    return torch.minimum(torch.tensor(total / count, dtype=torch.float32), filled.max())


def _highest(score: Tensor, h: int) -> Tensor:
    """Which samples have the h highest scores; of scores that are tied with the (h+1)-th none. (N,) bool."""
    if h == 0:
        return torch.zeros(len(score), dtype=torch.bool)
    edge = kth_highest(score, h)
    mask = score >= edge
    return mask if int(torch.count_nonzero(mask)) == h else score > edge


@dataclass(frozen=True)
class SeTa(LastLoss):
    """SeTa: a window over the samples, sorted from easy to hard in groups, that slides on with each choice.

        at the t-th choice (t = 0, 1, ...), with r = prune_ratio, k = groups, w = round(window * k)
            B = floor((1 - r) N) samples, uniform without replacement
            the last losses of B are divided by 1-D k-means into k groups, from easy to hard
            S = the groups s, ..., s + w - 1,    s = t mod (k - w + 1)
        in the last `annealing` share of the run    S = B    ("partial annealing")

    An epoch trains on the easier part of the data first, then on ever harder parts, then from the start again; the groups
    differ in size, so the number of samples depends on the data: where most losses are near 0, nearly all samples are in the
    first group, and epochs on the other groups are tiny. There are no weights. Never observed samples of B are kept, so the
    first epoch trains on all of B; samples that gave no finite loss are left out.

    Paper: Zhou, Gao, Wang, CVPR 2025, arXiv 2503.13385 (code mrazhou/SeTa). The defaults are those of its class; its CIFAR
    script has r 0.1, k 5, window 0.9 (`paper_like`), its ImageNet script r 0, k 5, window 0.6. From the code differ:
    - k-means: scikit-learn's there, from one random start; here the optimum, of more than 1,024 different losses that of as
      many cells of neighbours (within 0.1 % of the best of ten of scikit-learn's where tried); always the same.
    - Fewer than k different losses: groups of equal size, ties at random; there so if all are equal, else an error.
    - Never observed samples count there as a loss of 3.
    - Where epochs * annealing is not whole, annealing begins up to an epoch later here.

    Cost: (1 - r) * (the share in the window) in the mean, 0.45 to 0.75 on ImageNet in the paper; training losses are free;
    one float a sample; O(N log N) a choice.

    Args:
        prune_ratio: r, share of the samples left out at random, in [0, 0.9].
        groups: k, from 1 to 512.
        window: share of the groups in the window, in (0, 1]; 1 is random pruning.
        annealing: share of the run, at its end, that trains on a uniform draw; in [0, 1].
    """

    prune_ratio: float = 0.0
    groups: int = 10
    window: float = 0.5
    annealing: float = 0.125

    paper_settings = {"prune_ratio": 0.1, "groups": 5, "window": 0.9}  # noqa: RUF012  # read only

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_prune_ratio(self.prune_ratio)
        check_count("groups", self.groups, 1)
        check_number(
            "groups",
            self.groups,
            f"at most {_CELLS // 2} groups",
            lambda groups: groups <= _CELLS // 2,
        )
        check_number(
            "window", self.window, "a share of the groups in (0, 1]", lambda share: 0 < share <= 1
        )
        check_share("annealing", self.annealing)
        if round(self.window * self.groups) == 0:
            raise ValueError(
                f"window={self.window} of groups={self.groups} is no group at all: wanted is window * groups > 0.5; raise "
                "one of them."
            )

    def _size(self, n: int) -> int:
        return max(1, floor_share(1 - self.prune_ratio, n))

    def _anneals(self, progress: float) -> bool:
        return self.annealing > 0 and progress >= 1 - self.annealing - 1e-9

    def planned_size(self, n: int, epoch: int, progress: float) -> int | None:
        return self._size(n) if self._anneals(progress) else None

    def plan(
        self,
        table: SampleTable,
        *,
        score: Tensor | None,
        epoch: int,
        progress: float,
        generator: torch.Generator,
    ) -> EpochPlan:
        assert score is not None
        drawn = permutation(len(score), generator)[: self._size(len(score))].long()
        if self._anneals(progress):
            return EpochPlan(drawn)
        score = score[drawn]
        known = score.isfinite()
        group = easy_to_hard(score[known], self.groups)
        width = round(self.window * self.groups)
        start = ((epoch - self.first) // self.period) % (
            self.groups - width + 1
        )  # by choices: no window is left out
        inside = drawn[known][(group >= start) & (group < start + width)]
        kept = torch.cat([drawn[score == math.inf], inside])
        return EpochPlan(kept if len(kept) else drawn)


def easy_to_hard(losses: Tensor, k: int) -> Tensor:
    """Divides M losses into k groups of neighbours so that the squared distances to the groups' means are least.

    Args:
        losses: (M,) finite; where fewer than k of them differ, groups of equal size, of ties the first come first.
        k: at least 1.

    Returns:
        (M,) int64, the group of each, 0 for the lowest losses. Cost: O(M log M + 1024^2 k).
    """
    values, counts = torch.unique(losses.double(), return_counts=True)
    if len(values) < k:
        group = torch.empty(len(losses), dtype=torch.int64)
        group[torch.argsort(losses, stable=True)] = (
            torch.arange(len(losses)) * k // max(1, len(losses))
        )
        return group
    # Sums over values[a:b] of 1, x and x^2 are differences of these; x is centred, so that the squares keep their digits.
    x = values - (values * counts).sum() / counts.sum()
    count, first, second = (
        torch.cat([s.new_zeros(1), s.cumsum(0)])
        for s in (counts.double(), counts * x, counts * x * x)
    )
    edges = torch.arange(len(values) + 1)
    if (
        len(values) > _CELLS
    ):  # cells of equal number for the many easy samples, of equal width for the few very hard ones
        width = torch.linspace(
            float(values[0]), float(values[-1]), _CELLS // 2 + 1, dtype=torch.float64
        )
        number = torch.arange(_CELLS // 2 + 1) * len(values) // (_CELLS // 2)
        edges = torch.cat([number, torch.searchsorted(values, width)]).unique()
    # cost[i, j]: squared distances of the values in the cells i, ..., j - 1 to their mean
    c, s, q = (part[edges][None, :] - part[edges][:, None] for part in (count, first, second))
    cost = (q - s * s / c).where(c > 0, math.inf)
    best, cuts = (
        cost[0],
        [],
    )  # best[j]: of the cells before j, in as many groups as there are rounds
    for _ in range(k - 1):
        best, cut = (best[:, None] + cost).min(0)
        cuts.append(cut)
    ends = [len(edges) - 1]
    for cut in reversed(cuts):
        ends.insert(0, int(cut[ends[0]]))
    return torch.bucketize(losses.double(), values[edges[ends[:-1]]], right=True)


# ---- hidden while they are easy ------------------------------------------------------------------


@dataclass(frozen=True)
class KAKURENBO(LastLoss):
    """KAKURENBO: hides the samples of lowest loss that the model classifies rightly and with confidence.

        F_e = max_hidden * the factor of `schedule` that is in force
        candidates = the floor(F_e N) samples of lowest last loss, ties broken at random
        hidden = the candidates that were classified rightly with a confidence >= min_confidence
        S = all but the hidden;    learning rate * N / |S|, that is, 1 / (1 - the share hidden)
        before the next choice forward passes over the hidden renew their loss, correctness and confidence

    An epoch trains on at least 1 - F_e of the data. Never observed samples are not hidden, so the first epoch trains on
    everything; samples that gave no finite loss are hidden first.

    Paper: Nguyen et al., NeurIPS 2023, arXiv 2310.10102 (code TruongThaoNguyen/kakurenbo). max_hidden 0.3, min_confidence
    0.7 and the schedule (1, 0.8, 0.6, 0.4 from epoch 0, 60, 120, 160 of 200) are those of its CIFAR-100 script; its ImageNet
    script has ((0, 1), (1/3, 0.8), (2/3, 0.6)). From the code differ:
    - The learning rate: it takes 1 / (1 - F_e), though fewer samples are hidden, and leaves the LR warm-up unscaled.
    - The confidence: it takes the highest of a softmax over the batch instead of the classes; here it is the probability of
      the label, which for a sample classified rightly is the highest of the classes.

    Cost: 1 - (2/3) * the share hidden with scoring="dropped" (the default: what is hidden goes forward once an epoch); three
    floats a sample; O(N) a choice. With scoring="trained" nothing brings a hidden sample back but others of lower loss and
    `max_age`. For single-label classification.

    Args:
        max_hidden: F, the largest share that is hidden, in [0, 1).
        schedule: pairs (share of the run, factor on F from there on), the first at 0.
        min_confidence: a candidate below it is trained, in [0, 1].
        scale_lr: whether the learning rate is raised for the steps that are saved.
    """

    max_hidden: float = 0.3
    schedule: tuple[tuple[float, float], ...] = ((0.0, 1.0), (0.3, 0.8), (0.6, 0.6), (0.8, 0.4))
    min_confidence: float = 0.7
    scale_lr: bool = True
    scoring: Literal["trained", "all", "dropped"] = field(default="dropped", kw_only=True)

    columns = (Column("loss"), Column("correct"), Column("confidence"))

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number(
            "max_hidden", self.max_hidden, "a share in [0, 1)", lambda share: 0 <= share < 1
        )
        check_share("min_confidence", self.min_confidence)
        if not isinstance(self.scale_lr, bool):
            raise TypeError(f"scale_lr={self.scale_lr!r} must be True or False.")
        object.__setattr__(
            self, "schedule", _schedule(self.schedule)
        )  # from JSON it comes as lists

    @property
    def signals(self) -> tuple[str, ...]:
        return ("loss", "correct", "confidence")

    def plan(
        self,
        table: SampleTable,
        *,
        score: Tensor | None,
        epoch: int,
        progress: float,
        generator: torch.Generator,
    ) -> EpochPlan:
        assert score is not None
        n = len(score)
        factor = next(
            factor for start, factor in reversed(self.schedule) if progress >= start - 1e-9
        )
        candidates = top_k(-score, floor_share(self.max_hidden * factor, n), generator)
        low = score[candidates]
        mastered = (table["correct"][candidates] > 0.5) & (
            table["confidence"][candidates] >= self.min_confidence
        )
        kept = torch.ones(n, dtype=torch.bool)
        kept[candidates[(mastered & (low < math.inf)) | ~_usable(low)]] = False
        indices = indices_of(kept)
        return EpochPlan(indices, lr_scale=n / len(indices) if self.scale_lr else 1.0)


def _schedule(value: Any) -> tuple[tuple[float, float], ...]:
    """Pairs (share of the run, factor) as tuples of floats, checked."""
    wanted = (
        "pairs (share of the run, factor in [0, 1]), the first at 0, each later than the one before"
    )
    if not (
        isinstance(value, list | tuple)
        and all(isinstance(pair, list | tuple) and len(pair) == 2 for pair in value)
    ):
        raise TypeError(
            f"schedule={value!r} is no schedule: wanted is {wanted}, such as ((0, 1), (0.6, 0.5))."
        )
    for start, factor in value:
        check_share("schedule: the share", start)
        check_share("schedule: the factor", factor)
    starts = [start for start, _ in value]
    if not starts or starts[0] != 0 or sorted(set(starts)) != starts:
        raise ValueError(
            f"schedule={value!r} is out of range: wanted is {wanted}, such as ((0, 1), (0.6, 0.5))."
        )
    return tuple((float(start), float(factor)) for start, factor in value)


@dataclass(frozen=True)
class IES(PruningPolicy):
    """Instance-dependent early stopping: a sample is left out once its loss has stopped bending.

        d = L_t - 2 L_(t-1) + L_(t-2)    of the losses L observed of a sample, one an epoch
        score = the mean of |d| over the last three,    +inf until six losses are known
        S = the samples with score >= threshold;    the others are mastered
        before the next choice forward passes over the mastered add their losses: a sample comes back when its loss moves

    An epoch trains on what is not mastered: everything in the first six epochs, ever less as the learning rate falls. If all
    are mastered the one of highest score is trained.

    Paper: Yuan et al., ICLR 2025, arXiv 2502.07547 (code tmllab/2025_ICLR_IES). The threshold 1e-3 is that of its CIFAR-10
    runs; for CIFAR-100 the code doubles it, and its README recommends 1e-1 to 1e-5. The rule follows the code (a moving
    average of 3, k = 1, a sixth loss before the first verdict), but for a fault: where none is mastered any more, the code
    goes on leaving out those of the choice before. The accuracy that it reports is the best of all epochs on test data.

    Cost: 1 - (2/3) * the share mastered with scoring="dropped" (the default; the paper counts backward passes alone); six
    floats a sample; O(N) a choice. The history then mixes losses of training and of forward passes, as in the code. With
    scoring="trained" nothing is observed of a mastered sample, and only `max_age` brings it back. The guard
    `exclude_hardest` takes the samples whose loss changes most.

    Args:
        threshold: below it a sample is mastered, at least 0; 0 keeps everything.
    """

    threshold: float = 1e-3
    scoring: Literal["trained", "all", "dropped"] = field(default="dropped", kw_only=True)

    columns = tuple(Column(f"loss_{age}") for age in range(_LOSSES))  # loss_0 is the last one

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number(
            "threshold",
            self.threshold,
            "a number of at least 0, such as 0.001",
            lambda threshold: threshold >= 0,
        )

    @property
    def signals(self) -> tuple[str, ...]:
        return ("loss",)

    def observe(self, rows: Rows, signals: Rows) -> Mapping[str, Tensor]:
        return {
            "loss_0": signals["loss"],
            **{f"loss_{age + 1}": rows[f"loss_{age}"] for age in range(_LOSSES - 1)},
        }

    def score(self, table: SampleTable) -> Tensor:
        loss = torch.stack([table[column.name] for column in self.columns])
        change = (loss[0:3] - 2 * loss[1:4] + loss[2:5]).abs().mean(0)
        return change.where(loss[-1].isfinite(), math.inf).where(loss[0].isfinite(), math.nan)

    def plan(
        self,
        table: SampleTable,
        *,
        score: Tensor | None,
        epoch: int,
        progress: float,
        generator: torch.Generator,
    ) -> EpochPlan:
        assert score is not None
        kept = indices_of(score >= self.threshold)
        return EpochPlan(kept if len(kept) else top_k(score, 1, generator))
