"""The full run and random pruning: the two baselines that every rule is measured against."""

from dataclasses import dataclass

import torch

from ..checks import check_flag
from ..selection import indices_of, mask_of, permutation, top_k
from .base import Choice, EpochPlan, KeepsShare, PruningPolicy

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
class RandomPruning(KeepsShare):
    """Uniform random dynamic pruning: K = round(keep_ratio * N) samples, drawn at each choice.

        replacement=True    S = K of N, uniform without replacement within a choice, independent
                            between choices
        replacement=False   S = the K samples kept least often so far, ties at random (RS2): all
                            samples are kept once before any is kept twice

    Cost: keep_ratio. It keeps no scores, only counts. Score-based rules must beat this baseline.

    Args:
        keep_ratio: Share of the samples trained in an epoch, in (0, 1].
        replacement: Whether a sample may come back before all others had their turn.

    Papers: Raju, Daruwalla, Lipasti 2021, arXiv 2111.12621 (dynamic random); Okanovic et al., ICLR
    2024, arXiv 2305.18424 (RS2; code PatrikOkanovic/RS2).
    """

    replacement: bool = True

    name = "random"
    paper_settings = EVERY_10_EPOCHS

    def __post_init__(self) -> None:
        super().__post_init__()
        check_flag("replacement", self.replacement)

    def plan(self, choice: Choice) -> EpochPlan:
        if not self.replacement:
            return EpochPlan(top_k(-choice.table["times_kept"], choice.size, choice.generator))
        drawn = permutation(choice.n, choice.generator)[: choice.size]
        return EpochPlan(indices_of(mask_of(drawn, choice.n)))
