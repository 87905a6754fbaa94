"""The full run and random pruning: the two baselines that every rule is measured against."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..checks import check_flag
from ..schedule import RunShape
from ..selection import draw, filled, indices_of, mask_of, permutation, top_k
from ..table import Last, Memories, Memory, SampleTable
from .base import Choice, EpochPlan, KeepsShare, PruningPolicy, ScoredPolicy, usable

# Raju et al. seem to have chosen every 10 epochs; reconstructed.
EVERY_10_EPOCHS = {"period": 10}


@dataclass(frozen=True)
class FullData(PruningPolicy):
    """Keeps everything: the full run, counted and reported as pruned runs are.

    Trains the samples of the stock Trainer in its order, except with
    `accelerator_config={"use_seedable_sampler": False}`, whose order cannot be repeated. Cost 1.
    """

    name = "full"

    def planned_size(self, n: int, epoch: int, progress: float) -> int:
        return n

    def plan(self, choice: Choice) -> EpochPlan:
        return EpochPlan(torch.arange(choice.n))


@dataclass(frozen=True)
class RandomPruning(KeepsShare, ScoredPolicy):
    """Uniform random dynamic pruning: K = round(keep_ratio * N) samples, drawn at each choice.

        replacement=True    S = K of N, uniform without replacement within a choice, independent
                            between choices
        replacement=False   S = the K samples kept least often so far, ties at random (RS2): all
                            samples are kept once before any is kept twice

    With `exclude_hardest` > 0 it also remembers the last loss of each sample, and draws the highest
    ones last of all: the small-loss draw. With `exclude_ramp=(0, T)` the excluded share rises as in
    co-teaching, R(t) = 1 - tau min(t / T, 1), without its second network. Never observed samples
    are drawn like the others. `max_age` brings an excluded sample back into the draw.

    Cost: keep_ratio. Without `exclude_hardest` it keeps no scores, only counts. Score-based rules
    must beat this baseline.

    Args:
        keep_ratio: Share of the samples trained in an epoch, in (0, 1].
        replacement: Whether a sample may come back before all others had their turn.

    Papers: Raju, Daruwalla, Lipasti 2021, arXiv 2111.12621 (dynamic random); Okanovic et al., ICLR
    2024, arXiv 2305.18424 (RS2; code PatrikOkanovic/RS2); Han et al., NeurIPS 2018, arXiv
    1804.06872 (co-teaching).
    """

    replacement: bool = True

    name = "random"
    paper_settings = EVERY_10_EPOCHS

    def __post_init__(self) -> None:
        super().__post_init__()
        check_flag("replacement", self.replacement)

    @property
    def has_scores(self) -> bool:
        """Whether it remembers losses: only to exclude the hardest samples."""
        return self.exclude_hardest > 0

    @property
    def memory(self) -> Memory:
        return Last("loss") if self.has_scores else Memories()

    def score(self, table: SampleTable) -> Tensor:
        return table["loss"]

    def looks_once(self, shape: RunShape, num_epochs: int) -> bool:
        """False: a draw is what it is meant to be."""
        return False

    def plan(self, choice: Choice) -> EpochPlan:
        k, generator = choice.size, choice.generator
        if not self.replacement:
            due = -choice.table["times_kept"]
            if self.has_scores:
                due = due.double().where(usable(choice.score), -math.inf)
            return EpochPlan(top_k(due, k, generator))
        if self.has_scores:
            drawn = draw(usable(choice.score), k, generator)
            return EpochPlan(indices_of(filled(drawn, k, generator)))
        return EpochPlan(indices_of(mask_of(permutation(choice.n, generator)[:k], choice.n)))
