"""Rules that know more than the losses of the run: the classes, or a better judge's losses."""

import math
import os
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from ..checks import check_decay, check_number
from ..scores import Scores
from ..selection import filled, indices_of, top_k
from ..table import Last, Memory, MovingMean, SampleTable
from .base import Choice, EpochPlan, KeepsShare, ScoredPolicy
from .by_loss import default_draw_ratio, gumbel, top_of_a_draw
from .static import HoldsScores


@dataclass(frozen=True)
class ClassBudget(KeepsShare, ScoredPolicy):
    """RCAP: each class gets a budget by its loss and its size; within a class high losses lead.

        u_i     last loss of sample i, at most ln C, with C the number of classes seen
        L_c     mean of u_i over the samples of class c;  pi_c the share of the class
        n_c     K sqrt(L_c pi_c) / sum sqrt(L pi), at most the size of the class: see `class_budget`
        S       n_c samples of each class, drawn one after the other, with probabilities
                proportional to exp(u_i / beta)
        never observed = +inf: such samples come first, ties broken at random

    The square root lies between equal budgets and budgets by size: at equal losses a class with
    1 % of the data gets a tenth of the samples of a class with all the rest. A rare class that is
    not learned yet gets more. The loss of a uniform prediction is ln C; clipping keeps few very
    high losses, such as those of wrong labels, from taking a whole budget.

    For single-label classification. The label of a sample is known from its first observation on.
    The budget divides what is left after samples never observed, or due by `max_age`. Samples that
    a guard bars, and those without a finite loss, count in no class and fill up last. There are no
    weights.

    In our study with a long tail it is ahead of the short run, and behind a short run that samples
    the classes evenly; see docs/results.md.

    Paper: RCAP, UAI 2025, arXiv 2606.11761 (code atif-hassan/RCAP-dynamic-dataset-pruning).
    Differences to the code:
    - L_c and pi_c are those of all samples whose loss is known; in the code those of the samples
      that the last choice kept.
    - What a class cannot take is divided among the others in the same proportion, so that exactly K
      samples are kept.
    - C is counted from the labels seen; in the code it is given.

    The code has beta from 1/3 to 3, by dataset; the default here is 1.

    Cost: keep_ratio (training losses are free); two floats per sample; O(N log N) per choice.

    Args:
        keep_ratio: Share of the samples trained in an epoch, in (0, 1].
        beta: Temperature of the draw within a class, > 0. The limit 0 is the highest losses, the
            limit infinity a uniform draw.
    """

    beta: float = 1.0

    name = "class-budget"

    def __post_init__(self) -> None:
        super().__post_init__()
        expected = "a number above 0, such as 1 (infinity would be a uniform draw)"
        check_number("beta", self.beta, expected, lambda beta: beta > 0)

    @property
    def memory(self) -> Memory:
        return Last("loss", "label")

    def score(self, table: SampleTable) -> Tensor:
        return table["loss"]

    def plan(self, choice: Choice) -> EpochPlan:
        score, generator = choice.score, choice.generator
        mask = score == math.inf
        left = choice.size - int(torch.count_nonzero(mask))
        if left <= 0:
            return EpochPlan(top_k(score, choice.size, generator))
        known = indices_of(score.isfinite())
        labels = choice.table["label"].index_select(0, known)
        classes, which = torch.unique(labels, return_inverse=True)
        loss = score.index_select(0, known).double().clamp(max=math.log(max(1, len(classes))))
        size = torch.bincount(which, minlength=len(classes))
        mean = torch.bincount(which, loss.clamp(min=0), minlength=len(classes)) / size
        budget = class_budget(mean, size, left)
        key = loss / self.beta + gumbel(len(known), generator)
        # By class, and within a class the highest keys first.
        order = torch.argsort(key, descending=True)
        order = order.index_select(0, _by_class(which.index_select(0, order), len(classes)))
        begins = torch.cumsum(size, 0) - size
        place = torch.arange(len(order)) - begins.repeat_interleave(size)
        chosen = order[place < budget.repeat_interleave(size)]
        mask.index_fill_(0, known.index_select(0, chosen), True)
        return EpochPlan(indices_of(filled(mask, choice.size, generator)))


def _by_class(which: Tensor, classes: int) -> Tensor:
    """(M,) int64, by which (M,) class numbers in [0, classes) ascend; equal ones stay in order."""
    # NumPy sorts integers of 16 bits by their digits.
    numbers = which.numpy().astype(np.uint16) if classes <= 1 << 16 else which.numpy()
    return torch.from_numpy(np.argsort(numbers, kind="stable"))


def class_budget(loss: Tensor, size: Tensor, k: int) -> Tensor:
    """Divide k samples among C classes in proportion to sqrt(loss * size), none above its size.

    A class that would get more than its size gets its size, and what is over is divided among the
    others in the same proportion. If all of these have the loss 0, it is divided by their sizes.
    Fractions are rounded by largest remainder; of equal remainders the first class comes first.

    Args:
        loss: (C,) floating point, the mean loss of each class, finite and at least 0.
        size: (C,) int64, how many samples each class has, at least 0.
        k: At least 0.

    Returns:
        (C,) int64 in [0, size], of sum min(k, sum of the sizes). Cost: O(C^2) at worst.
    """
    weight = (loss.double() * size.double()).sqrt()
    budget, is_open = torch.zeros_like(size), size > 0
    left = min(k, int(size.sum()))
    while left > 0:
        part = weight.where(is_open, 0.0)
        if not bool(part.any()):
            part = size.double().where(is_open, 0.0)
        # At most `left`, so that rounding cannot push a class that gets all above it.
        quota = (left * (part / part.sum())).clamp(max=left)
        full = is_open & (quota > size)
        if not bool(full.any()):
            return _rounded(quota, size, left).where(is_open, budget)
        budget = size.where(full, budget)
        left -= int(size[full].sum())
        is_open &= ~full
    return budget


def _rounded(quota: Tensor, size: Tensor, k: int) -> Tensor:
    """(C,) int64 of sum k by largest remainder, from (C,) quotas of sum k, none above its size."""
    down = quota.floor().long()
    remainder = (quota - down).where(down < size, -1.0)
    order = torch.argsort(remainder, descending=True, stable=True)
    down[order[: k - int(down.sum())]] += 1
    return down


@dataclass(frozen=True)
class ReferenceLoss(HoldsScores, ScoredPolicy):
    """RHO-LOSS: of a uniform draw, the samples whose loss is highest above their reference loss.

        on each observation u_i of a sample     m_i <- (1 - a) m_i + a u_i;
                                                the first sets m_i = u_i
        at each choice, K = round(keep_ratio * N)
            B = floor(draw_ratio * N) samples, uniform without replacement (never fewer than K)
            S = the K of B with the highest m_i - r_i,    r_i the reference loss of the sample
        never observed = +inf: such samples come first within B, ties broken at random

    The reference loss is the loss of the sample under another model that knows better: one trained
    on a holdout, on clean labels or on a target set, or a pretrained one. A sample that it finds
    hard, such as one with a wrong label, is not worth training. `score_dataset("reference")` makes
    reference losses and notes what they cost; the report charges them to the run. A fair opponent
    gets the same information: a short run that also trains on the holdout.

    With `scores=None` every reference loss counts as 0. That is the same rule without a reference,
    the control that says what the reference is worth.

    In our studies with wrong labels and with a target it did not beat the short run, even with its
    scores for free. Training on the samples that the reference was made from did. See
    docs/results.md.

    Papers: RHO-LOSS: Mindermann et al., ICML 2022, arXiv 2206.07137 (code OATML/RHO-Loss).
    CoLoR-Filter: Brandfonbrener et al. 2024, arXiv 2406.10670 (chosen once, by the loss under a
    prior minus that under a model tuned on the target). Differences to RHO-LOSS: the code draws a
    large batch in each step, passes all of it forward and trains a tenth. Here a choice holds for
    an epoch, and the losses are those of training, so that nothing is passed forward twice. In
    the code both losses are without augmentation, here only the reference loss is.

    Cost: keep_ratio, and what the reference losses cost; one float per sample; O(N) per choice.

    Args:
        scores: The reference losses: the path of a file of `Scores.save`, or the `Scores` that were
            saved or loaded. In the unit of the training loss (nats). The file is read once, here.
            None for the control.
        keep_ratio: Share of the samples trained in an epoch, in (0, 1].
        draw_ratio: Share of the samples that is drawn first, in [keep_ratio, 1]. *Optional*,
            defaults to 0.75, or to keep_ratio if that is more.
        decay: a, the weight of a new observation in the moving mean, in (0, 1]; 1 means the last
            loss alone.
        charge: Whether the report counts what the reference losses cost as passes of this run; see
            [`StaticPruning`].
        digest: Of the content of the file, read from it. A file with another content is refused.

    Raises:
        TypeError, ValueError, FileNotFoundError: As [`StaticPruning`].
    """

    # No default: a rule that misses its reference must not run as the control by mistake. Two
    # policies are equal if the content of their scores is, which `digest` says.
    scores: str | os.PathLike[str] | Scores | None = field(compare=False)
    keep_ratio: float = 0.5
    draw_ratio: float | None = None
    decay: float = 0.8
    charge: bool = True
    digest: str | None = None

    name = "reference-loss"

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "draw_ratio", default_draw_ratio(self.draw_ratio, self.keep_ratio))
        check_decay(self.decay)
        self._hold()

    @property
    def memory(self) -> Memory:
        return MovingMean("loss", self.decay)

    def score(self, table: SampleTable) -> Tensor:
        return table["mean"] if self.scores is None else table["mean"] - self._held().values

    def plan(self, choice: Choice) -> EpochPlan:
        assert self.draw_ratio is not None  # set at construction
        return top_of_a_draw(choice, self.draw_ratio)
