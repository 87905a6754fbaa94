"""Rules that choose K samples by their losses: the bandits of Raju et al., and two draws."""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..checks import check_choice, check_decay, check_number, check_share
from ..selection import draw, floor_share, indices_of, permutation, top_k, top_mask
from ..table import Last, Memory, MovingMean, MovingVariance, SampleTable
from .base import Choice, EpochPlan, KeepsShare, ScoredPolicy, usable
from .random import EVERY_10_EPOCHS


def gumbel(n: int, generator: torch.Generator) -> Tensor:
    """(n,) float64 standard Gumbel noise, finite.

    The K highest of  log p_i + g_i  are a draw of K without replacement in proportion to p_i.
    """
    uniform = torch.rand(n, dtype=torch.float64, generator=generator)
    return -(-uniform.clamp_(min=torch.finfo(torch.float64).tiny).log()).log()


def proportional_keys(score: Tensor, generator: torch.Generator, alpha: float = 1.0) -> Tensor:
    """(N,) float64 random keys: the K highest are a draw in proportion to score^alpha.

    Samples of score 0 or less have probability 0. They come after all that can be drawn, and
    samples that must not be drawn, of score -inf, come last. Those of score +inf come first.
    """
    key = alpha * score.double().log() + gumbel(len(score), generator)
    return key.where(score > 0, torch.finfo(torch.float64).min).where(usable(score), -math.inf)


def default_draw_ratio(draw_ratio: float | None, keep_ratio: float) -> float:
    """The share that is drawn before the highest scores are kept: 0.75, or keep_ratio if more.

    Raises TypeError or ValueError unless it is None or a number in [keep_ratio, 1].
    """
    if draw_ratio is None:
        return max(0.75, keep_ratio)
    expected = (
        f"a share in [keep_ratio, 1] = [{keep_ratio}, 1]: the kept samples are taken from "
        "those drawn"
    )
    check_number("draw_ratio", draw_ratio, expected, lambda r: keep_ratio <= r <= 1)
    return draw_ratio


def top_of_a_draw(choice: Choice, draw_ratio: float) -> EpochPlan:
    """Keep the K highest scores of floor(draw_ratio * N) samples, drawn uniformly."""
    score, k = choice.score, choice.size
    pool = indices_of(usable(score))
    drawn = max(k, floor_share(draw_ratio, choice.n))
    candidates = pool.index_select(0, permutation(len(pool), choice.generator)[:drawn])
    if len(candidates) < k:
        return EpochPlan(top_k(score, k, choice.generator))
    return EpochPlan(candidates[top_k(score[candidates], k, choice.generator)])


def _greedy_and_random(choice: Choice, epsilon: float) -> EpochPlan:
    """Keep the K - R highest scores, and R = round(epsilon * K) drawn uniformly from the rest."""
    r = round(epsilon * choice.size)
    mask = top_mask(choice.score, choice.size - r, choice.generator)
    return EpochPlan(indices_of(mask | draw(~mask, r, choice.generator) if r else mask))


class _ByMean(ScoredPolicy):
    """Scores by the moving mean of a signal. Abstract."""

    decay: float
    signal: str

    @property
    def memory(self) -> Memory:
        return MovingMean(self.signal, self.decay)

    def score(self, table: SampleTable) -> Tensor:
        return table["mean"]


class LastLoss(ScoredPolicy):
    """Scores by the last loss of each sample. Abstract."""

    @property
    def memory(self) -> Memory:
        return Last("loss")

    def score(self, table: SampleTable) -> Tensor:
        return table["loss"]


@dataclass(frozen=True)
class EpsilonGreedy(_ByMean, KeepsShare):
    """ε-greedy dynamic pruning: mostly the samples of highest loss, and a random share of the rest.

        on each observation u_i of a sample     m_i <- (1 - a) m_i + a u_i;
                                                the first sets m_i = u_i
        at each choice, K = round(keep_ratio * N), R = round(epsilon * K)
            S = the K - R samples of highest m_i
                ∪  R drawn uniformly without replacement from the rest
        never observed = +inf: such samples come first, ties broken at random

    Reconstructed: the paper's full text was not at hand. The formula and the defaults of `epsilon`
    and `decay` follow a third party's code (sodabori/dataset_pruning, where they are never called).
    The optimistic start is ours.

    Cost: keep_ratio (training losses are free); one float per sample; O(N) per choice.

    Args:
        keep_ratio: Share of the samples trained in an epoch, in (0, 1].
        epsilon: Share of the kept samples that is drawn at random, in [0, 1].
        decay: a, the weight of a new observation in the moving mean, in (0, 1]; 1 means the last
            loss alone.
        signal: What is observed, `"loss"` or another signal.

    Paper: Raju, Daruwalla, Lipasti 2021, arXiv 2111.12621.
    """

    epsilon: float = 0.1
    decay: float = 0.8
    signal: str = "loss"

    name = "epsilon-greedy"
    paper_settings = EVERY_10_EPOCHS

    def __post_init__(self) -> None:
        super().__post_init__()
        check_share("epsilon", self.epsilon)
        check_decay(self.decay)

    def plan(self, choice: Choice) -> EpochPlan:
        return _greedy_and_random(choice, self.epsilon)


@dataclass(frozen=True)
class UCB(KeepsShare, ScoredPolicy):
    """Upper-confidence-bound dynamic pruning: the samples whose loss is high, or uncertain.

        on each observation u_i of a sample     v_i <- (1 - a) v_i + a (u_i - m_i)^2,  the old m_i;
                                                m_i <- (1 - a) m_i + a u_i;
                                                the first sets m_i = u_i, v_i = 0
        at each choice, K = round(keep_ratio * N)
            S = the K samples of highest m_i + c v_i
                (with epsilon > 0, a share of S at random, as in ε-greedy)
        never observed = +inf: such samples come first, ties broken at random

    Reconstructed: the paper's full text was not at hand. The updates and the defaults of `decay`
    and `c` follow a third party's code (sodabori/dataset_pruning, where they are never called).
    That code also keeps epsilon = 0.1 at random under this name. The textbook rule, and our
    default, is the plain top K.

    Cost: keep_ratio (training losses are free); two floats per sample; O(N) per choice.

    Args:
        keep_ratio: Share of the samples trained in an epoch, in (0, 1].
        c: Weight of the uncertainty, >= 0.
        decay: a, the weight of a new observation, in (0, 1].
        bonus: `"variance"` for m + c v, `"std"` for m + c sqrt(v).
        epsilon: Share of the kept samples that is drawn at random, in [0, 1].
        signal: What is observed, `"loss"` or another signal.

    Paper: Raju, Daruwalla, Lipasti 2021, arXiv 2111.12621.
    """

    c: float = 1.0
    decay: float = 0.8
    bonus: Literal["variance", "std"] = "variance"
    epsilon: float = 0.0
    signal: str = "loss"

    name = "ucb"
    paper_settings = EVERY_10_EPOCHS

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("c", self.c, "a number of at least 0", lambda c: c >= 0)
        check_decay(self.decay)
        check_choice("bonus", self.bonus, ("variance", "std"))
        check_share("epsilon", self.epsilon)

    @property
    def memory(self) -> Memory:
        return MovingVariance(self.signal, self.decay)

    def score(self, table: SampleTable) -> Tensor:
        spread = table["variance"] if self.bonus == "variance" else table["variance"].sqrt()
        return torch.add(table["mean"], spread, alpha=self.c)

    def plan(self, choice: Choice) -> EpochPlan:
        return _greedy_and_random(choice, self.epsilon)


@dataclass(frozen=True)
class LossProportional(_ByMean, KeepsShare):
    """Loss-proportional sampling: K samples drawn without replacement in proportion to mean loss.

        on each observation u_i of a sample     m_i <- (1 - a) m_i + a u_i;
                                                the first sets m_i = u_i
        at each choice, K = round(keep_ratio * N)
            S = K samples drawn one after the other, with probabilities proportional to m_i^alpha
        never observed = +inf: such samples come first, ties broken at random

    An epoch trains mostly on hard samples, but every sample that still has a loss has a chance.
    Wrong labels therefore crowd the rest out less than under a top K. There are no weights: the sum
    of the losses is not unbiased.

    All are drawn at once: the K highest keys  alpha log m_i + g_i,  g_i standard Gumbel noise, are
    such a draw (Efraimidis & Spirakis 2006, with the keys in logarithms; Kool, van Hoof, Welling
    2019, arXiv 1903.06059). A mean of 0 has probability 0, and a negative one counts as 0: such
    samples fill up what is left, at random.

    The rule in this form is ours; alpha and decay are not tuned.

    Cost: keep_ratio (training losses are free); one float per sample; O(N) per choice.

    Args:
        keep_ratio: Share of the samples trained in an epoch, in (0, 1].
        alpha: Sharpness, > 0. The limit 0 is a uniform draw, the limit infinity the K highest
            means.
        decay: a, the weight of a new observation in the moving mean, in (0, 1]; 1 means the last
            loss alone.
        signal: What is observed, `"loss"` or another signal.
    """

    alpha: float = 1.0
    decay: float = 0.8
    signal: str = "loss"

    name = "loss-proportional"

    def __post_init__(self) -> None:
        super().__post_init__()
        expected = "a number above 0, such as 1 (RandomPruning is the limit 0)"
        check_number("alpha", self.alpha, expected, lambda alpha: alpha > 0)
        check_decay(self.decay)

    def plan(self, choice: Choice) -> EpochPlan:
        key = proportional_keys(choice.score, choice.generator, self.alpha)
        return EpochPlan(top_k(key, choice.size, choice.generator))


@dataclass(frozen=True)
class OrderDP(LastLoss, KeepsShare):
    """Order-statistic pruning: of a uniform draw, the samples of highest loss.

        at each choice, K = round(keep_ratio * N)
            B = floor(draw_ratio * N) samples, uniform without replacement (never fewer than K)
            S = the K of B with the highest last loss
        never observed = +inf: such samples come first within B, ties broken at random

    An epoch trains on K samples. The random first stage rotates them. At draw_ratio = keep_ratio
    the rule is random pruning, at 1 the plain top K. There are no weights: the rule is unbiased for
    a loss in which a sample counts by its rank, not for the mean loss.

    Paper: Jin et al., ICLR 2026, arXiv 2606.08574 (code shengze-xu/OrderDP). As in the code, with
    one difference: the code starts all losses at 3; here a sample never observed has no loss and
    comes first. The authors' class keeps 0.75 * 0.85 of the data, their README for CIFAR
    0.8 * 0.375 = 0.3 (`paper_like`), their ImageNet script 0.75 * 0.8. The names of the fields are
    ours.

    Cost: keep_ratio (training losses are free); one float per sample; O(N) per choice.

    Args:
        keep_ratio: Share of the samples trained in an epoch, in (0, 1].
        draw_ratio: Share of the samples that is drawn first, in [keep_ratio, 1]. *Optional*,
            defaults to 0.75, or to keep_ratio if that is more.
    """

    draw_ratio: float | None = None

    name = "orderdp"
    paper_settings = {"keep_ratio": 0.3, "draw_ratio": 0.8}  # noqa: RUF012  # read only

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "draw_ratio", default_draw_ratio(self.draw_ratio, self.keep_ratio))

    def plan(self, choice: Choice) -> EpochPlan:
        assert self.draw_ratio is not None  # set at construction
        return top_of_a_draw(choice, self.draw_ratio)
