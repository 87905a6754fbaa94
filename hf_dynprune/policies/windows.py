"""SeTa: a window that slides over the samples, sorted from easy to hard."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..checks import check_count, check_number, check_share
from ..selection import floor_share, permutation
from .base import Choice, EpochPlan
from .by_loss import LastLoss
from .reweighted import check_prune_ratio

# The 1-D k-means is exact up to this many different losses. More are first put into as many cells
# of neighbours.
_CELLS = 1024


@dataclass(frozen=True)
class SeTa(LastLoss):
    """SeTa: a window over the samples, sorted from easy to hard in groups, that slides on.

        at the t-th choice (t = 0, 1, ...), with r = prune_ratio, k = groups, w = round(window * k)
            B = floor((1 - r) N) samples, uniform without replacement
            the last losses of B are divided by 1-D k-means into k groups, from easy to hard
            S = the groups s, ..., s + w - 1,    s = t mod (k - w + 1)
        in the last `annealing` share of the run    S = B    ("partial annealing")

    A run trains on the easier part of the data first, then on ever harder parts, then from the
    start again. The groups differ in size, so the number of samples depends on the data: if most
    losses are near 0, nearly all samples are in the first group, and epochs on the other groups are
    tiny. There are no weights. Never observed samples of B are kept, so the first epoch trains on
    all of B. Samples that gave no finite loss are left out.

    Paper: Zhou, Gao, Wang, CVPR 2025, arXiv 2503.13385 (code mrazhou/SeTa). The defaults are those
    of its class. Its CIFAR script has r 0.1, k 5, window 0.9 (`paper_like`), its ImageNet script
    r 0, k 5, window 0.6. Differences to the code:
    - k-means: the code uses scikit-learn's, from one random start. Here it is the optimum; for more
      than 1,024 different losses that of as many cells of neighbours (within 0.1 % of the best of
      ten of scikit-learn's in trials). It is always the same.
    - Fewer than k different losses: groups of equal size, ties at random. The code does so only if
      all are equal, and fails otherwise.
    - Never observed samples count as a loss of 3 in the code.
    - If epochs * annealing is not whole, annealing begins up to an epoch later here.

    Cost: (1 - r) * (the share in the window) on average, 0.45 to 0.75 on ImageNet in the paper.
    Training losses are free; one float per sample; O(N log N) per choice.

    Args:
        prune_ratio: r, share of the samples left out at random, in [0, 0.9].
        groups: k, from 1 to 512.
        window: Share of the groups in the window, in (0, 1]; 1 is random pruning.
        annealing: Share of the run, at its end, that trains on a uniform draw; in [0, 1].
    """

    prune_ratio: float = 0.0
    groups: int = 10
    window: float = 0.5
    annealing: float = 0.125

    name = "seta"
    paper_settings = {"prune_ratio": 0.1, "groups": 5, "window": 0.9}  # noqa: RUF012  # read only

    def __post_init__(self) -> None:
        super().__post_init__()
        check_prune_ratio(self.prune_ratio)
        check_count("groups", self.groups, 1)
        most = _CELLS // 2
        check_number("groups", self.groups, f"at most {most} groups", lambda groups: groups <= most)
        expected = "a share of the groups in (0, 1]"
        check_number("window", self.window, expected, lambda share: 0 < share <= 1)
        check_share("annealing", self.annealing)
        if round(self.window * self.groups) == 0:
            raise ValueError(
                f"window={self.window} of groups={self.groups} rounds to 0 groups: expected "
                "window * groups > 0.5; raise one of them."
            )

    def _size(self, n: int) -> int:
        return max(1, floor_share(1 - self.prune_ratio, n))

    def _anneals(self, progress: float) -> bool:
        return self.annealing > 0 and progress >= 1 - self.annealing - 1e-9

    def planned_size(self, n: int, epoch: int, progress: float) -> int | None:
        return self._size(n) if self._anneals(progress) else None

    def expected_share(self, n: int) -> tuple[float, float]:
        """0.45 to 0.75 of what is drawn, as the paper found on ImageNet."""
        return 0.45 * (1 - self.prune_ratio), 0.75 * (1 - self.prune_ratio)

    def plan(self, choice: Choice) -> EpochPlan:
        drawn = permutation(choice.n, choice.generator)[: self._size(choice.n)].long()
        if self._anneals(choice.progress):
            return EpochPlan(drawn)
        score = choice.score[drawn]
        known = score.isfinite()
        group = easy_to_hard(score[known], self.groups)
        width = round(self.window * self.groups)
        # Counted by choices, so that no window is left out whatever the period is.
        choices = (choice.epoch - self.first) // self.period
        start = choices % (self.groups - width + 1)
        inside = drawn[known][(group >= start) & (group < start + width)]
        kept = torch.cat([drawn[score == math.inf], inside])
        return EpochPlan(kept if len(kept) else drawn)


def easy_to_hard(losses: Tensor, k: int) -> Tensor:
    """Divide M losses into k groups of neighbours with the least squared distances to their means.

    Args:
        losses: (M,) finite. If fewer than k of them differ, the groups have equal size; of ties the
            first come first.
        k: At least 1.

    Returns:
        (M,) int64, the group of each, 0 for the lowest losses. Cost: O(M log M + 1024^2 k).
    """
    values, counts = torch.unique(losses.double(), return_counts=True)
    if len(values) < k:
        group = torch.empty(len(losses), dtype=torch.int64)
        in_order = torch.arange(len(losses)) * k // max(1, len(losses))
        group[torch.argsort(losses, stable=True)] = in_order
        return group
    edges = _cells(values)
    # Sums over values[a:b] of 1, x and x^2 are differences of running sums. x is centred, so that
    # the squares keep their digits.
    x = values - (values * counts).sum() / counts.sum()
    terms = (counts.double(), counts * x, counts * x * x)
    running = [torch.cat([term.new_zeros(1), term.cumsum(0)])[edges] for term in terms]
    # cost[i, j]: squared distances of the values in the cells i, ..., j - 1 to their mean
    c, s, q = (sums[None, :] - sums[:, None] for sums in running)
    cost = (q - s * s / c).where(c > 0, math.inf)
    # Dynamic programming: after r rounds best[j] is the cost of the cells before j in r + 1 groups.
    best, cuts = cost[0], []
    for _ in range(k - 1):
        best, cut = (best[:, None] + cost).min(0)
        cuts.append(cut)
    ends = [len(edges) - 1]
    for cut in reversed(cuts):
        ends.insert(0, int(cut[ends[0]]))
    return torch.bucketize(losses.double(), values[edges[ends[:-1]]], right=True)


def _cells(values: Tensor) -> Tensor:
    """The ascending positions at which cells of the sorted values begin and end."""
    if len(values) <= _CELLS:
        return torch.arange(len(values) + 1)
    # Cells of equal number for the many easy samples, of equal width for the few very hard ones.
    half = _CELLS // 2
    width = torch.linspace(float(values[0]), float(values[-1]), half + 1, dtype=torch.float64)
    number = torch.arange(half + 1) * len(values) // half
    return torch.cat([number, torch.searchsorted(values, width)]).unique()
