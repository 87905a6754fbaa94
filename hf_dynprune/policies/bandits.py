"""The rules of Raju, Daruwalla, Lipasti 2021, and the two baselines that every rule is measured against."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..scores import Column, Rows, SampleTable
from .base import (
    EpochPlan,
    PruningPolicy,
    check_choice,
    check_decay,
    check_number,
    check_share,
    draw,
    indices_of,
    keep_count,
    mask_of,
    moving_mean,
    permutation,
    top_k,
    top_mask,
)

_EVERY_10_EPOCHS = {"period": 10}  # as Raju et al. seem to have run them; reconstructed


def _greedy_and_random(score: Tensor, k: int, epsilon: float, generator: torch.Generator) -> Tensor:
    """The k - r highest scores, and r = round(epsilon * k) drawn uniformly without replacement from all the rest."""
    r = round(epsilon * k)
    mask = top_mask(score, k - r, generator)
    return indices_of(mask | draw(~mask, r, generator) if r else mask)


@dataclass(frozen=True)
class FullData(PruningPolicy):
    """Keeps everything: the full run, counted and reported as the pruned runs are.

    Trains the samples of the stock Trainer in its order. Cost 1.
    """

    paper_settings = _EVERY_10_EPOCHS

    def planned_size(self, n: int, epoch: int, progress: float) -> int:
        return n

    def plan(
        self,
        table: SampleTable,
        *,
        score: Tensor | None,
        epoch: int,
        progress: float,
        generator: torch.Generator,
    ) -> EpochPlan:
        return EpochPlan(torch.arange(len(table)))


@dataclass(frozen=True)
class RandomPruning(PruningPolicy):
    """Uniform random dynamic pruning: K = round(keep_ratio * N) samples, drawn anew at each choice.

        replacement=True    S = K of N, uniform without replacement within a choice, independent between choices
        replacement=False   S = the K samples kept least often so far, ties at random (RS2): all samples are kept once
                            before any is kept twice

    Cost: keep_ratio; no scores, nothing to store but counts. The baseline that score-guided rules must beat.

    Args:
        keep_ratio: share of the samples trained in an epoch, in (0, 1].
        replacement: whether a sample may come back before all others had their turn.

    Papers: Raju, Daruwalla, Lipasti 2021, arXiv 2111.12621 (dynamic random); Okanovic et al., ICLR 2024, arXiv
    2305.18424 (RS2; code PatrikOkanovic/RS2).
    """

    keep_ratio: float = 0.5
    replacement: bool = True

    paper_settings = _EVERY_10_EPOCHS

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.replacement, bool):
            raise TypeError(f"replacement={self.replacement!r} must be True or False.")

    def plan(
        self,
        table: SampleTable,
        *,
        score: Tensor | None,
        epoch: int,
        progress: float,
        generator: torch.Generator,
    ) -> EpochPlan:
        n, k = len(table), keep_count(self.keep_ratio, len(table))
        if self.replacement:
            return EpochPlan(indices_of(mask_of(permutation(n, generator)[:k], n)))
        return EpochPlan(top_k(-table["times_kept"], k, generator))


@dataclass(frozen=True)
class EpsilonGreedy(PruningPolicy):
    """ε-greedy dynamic pruning: mostly the samples of highest loss, and a random share of the others.

        on each observation u_i of a sample     m_i <- (1 - a) m_i + a u_i;     the first sets m_i = u_i
        at each choice, K = round(keep_ratio * N), R = round(epsilon * K)
            S = the K - R samples of highest m_i  ∪  R drawn uniformly without replacement from the rest
        never observed = +inf: such samples come first, ties broken at random

    Reconstructed: the paper's full text was not at hand; the formula and the defaults of `epsilon` and `decay` follow a
    third party's code (sodabori/dataset_pruning, where they are never called), the optimistic start is ours.

    Cost: keep_ratio (training losses are free); one float a sample; O(N) a choice.

    Args:
        keep_ratio: share of the samples trained in an epoch, in (0, 1].
        epsilon: share of the kept samples that is drawn at random, in [0, 1].
        decay: a, the weight of a new observation in the moving mean, in (0, 1]; 1 is the last loss alone.
        signal: what is observed, `"loss"`, or another name of [`hf_dynprune.losses.SIGNALS`].

    Paper: Raju, Daruwalla, Lipasti 2021, arXiv 2111.12621.
    """

    keep_ratio: float = 0.5
    epsilon: float = 0.1
    decay: float = 0.8
    signal: str = "loss"

    columns = (Column("mean"),)
    paper_settings = _EVERY_10_EPOCHS

    def __post_init__(self) -> None:
        super().__post_init__()
        check_share("epsilon", self.epsilon)
        check_decay(self.decay)

    @property
    def signals(self) -> tuple[str, ...]:
        return (self.signal,)

    def observe(self, rows: Rows, signals: Rows) -> Mapping[str, Tensor]:
        return {"mean": moving_mean(rows["mean"], signals[self.signal], self.decay)}

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
        return EpochPlan(
            _greedy_and_random(
                score, keep_count(self.keep_ratio, len(table)), self.epsilon, generator
            )
        )


@dataclass(frozen=True)
class UCB(PruningPolicy):
    """Upper-confidence-bound dynamic pruning: the samples whose loss is high, or uncertain.

        on each observation u_i of a sample     v_i <- (1 - a) v_i + a (u_i - m_i)^2    with the old m_i, then
                                                m_i <- (1 - a) m_i + a u_i;     the first sets m_i = u_i, v_i = 0
        at each choice, K = round(keep_ratio * N)
            S = the K samples of highest m_i + c v_i      (with epsilon > 0, a share of S at random, as in ε-greedy)
        never observed = +inf: such samples come first, ties broken at random

    Reconstructed: the paper's full text was not at hand; the updates and the defaults of `decay` and `c` follow a third
    party's code (sodabori/dataset_pruning, where they are never called). That code also keeps epsilon = 0.1 at random
    under this name; the textbook rule, and our default, is the plain top K.

    Cost: keep_ratio (training losses are free); two floats a sample; O(N) a choice.

    Args:
        keep_ratio: share of the samples trained in an epoch, in (0, 1].
        c: weight of the uncertainty, >= 0.
        decay: a, the weight of a new observation, in (0, 1].
        bonus: `"variance"` for m + c v, `"std"` for m + c sqrt(v).
        epsilon: share of the kept samples that is drawn at random, in [0, 1].
        signal: what is observed, `"loss"`, or another name of [`hf_dynprune.losses.SIGNALS`].

    Paper: Raju, Daruwalla, Lipasti 2021, arXiv 2111.12621.
    """

    keep_ratio: float = 0.5
    c: float = 1.0
    decay: float = 0.8
    bonus: Literal["variance", "std"] = "variance"
    epsilon: float = 0.0
    signal: str = "loss"

    columns = (Column("mean"), Column("variance"))
    paper_settings = _EVERY_10_EPOCHS

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("c", self.c, "a number of at least 0", lambda c: c >= 0)
        check_decay(self.decay)
        check_choice("bonus", self.bonus, ("variance", "std"))
        check_share("epsilon", self.epsilon)

    @property
    def signals(self) -> tuple[str, ...]:
        return (self.signal,)

    def observe(self, rows: Rows, signals: Rows) -> Mapping[str, Tensor]:
        mean, value = rows["mean"], signals[self.signal]
        # A loss above 1e19 has a square beyond float32: without the limit the variance would be infinite, then NaN for good.
        surprise = ((value - mean) ** 2).clamp(max=torch.finfo(value.dtype).max)
        variance = torch.where(
            mean.isnan(), 0.0, torch.lerp(rows["variance"], surprise, self.decay)
        )
        return {"mean": moving_mean(mean, value, self.decay), "variance": variance}

    def score(self, table: SampleTable) -> Tensor:
        spread = table["variance"] if self.bonus == "variance" else table["variance"].sqrt()
        return torch.add(table["mean"], spread, alpha=self.c)

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
        return EpochPlan(
            _greedy_and_random(
                score, keep_count(self.keep_ratio, len(table)), self.epsilon, generator
            )
        )
