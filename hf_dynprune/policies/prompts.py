"""Rules for prompts of reinforcement learning: which ones can still teach, before any rollout.

A prompt gets a group of G completions, each with a reward. If all rewards of a group are equal, its
advantages are 0, and the rollouts taught nothing. The signals are those of one group:

    reward_mean, reward_std    over its completions that have a reward
    solved                     share of these completions with full marks, in [0, 1]
    completions                number of these completions

`hf_dynprune.grpo` observes them. `UCB`, `EpsilonGreedy` and `LossProportional` choose prompts too,
with `signal="reward_std"`. The score of a prompt whose rewards were equal at its first visit is 0.
`UCB` and `LossProportional` return to it only if `max_age` is set, or if too few prompts have more.
"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from ..checks import check_number, check_share
from ..selection import draw, indices_of, top_k
from ..table import Column, Memory, Rows, SampleTable
from .base import Choice, EpochPlan, KeepsShare, PruningPolicy, ScoredPolicy

# Draws are made in blocks of this size, so that their float64 copies stay small.
_BLOCK = 1 << 20


@dataclass(frozen=True)
class BetaPosterior(Memory):
    """The columns `alpha` and `beta` of a Beta posterior of the share of completions solved.

    alpha <- (1 - d) alpha + d + k
    beta  <- (1 - d) beta  + d + G - k     with k = solved * completions, G = completions

    Both start at 1, the uniform prior, to which forgetting (d = decay) leads back.
    """

    decay: float

    @property
    def columns(self) -> tuple[Column, ...]:
        return (Column("alpha"), Column("beta"))

    @property
    def signals(self) -> tuple[str, ...]:
        return ("solved", "completions")

    def observe(self, rows: Rows, signals: Rows) -> Rows:
        drawn = signals["completions"].clamp(min=0)
        solved = signals["solved"].clamp(0, 1) * drawn

        def moved(column: str, count: Tensor) -> Tensor:
            known = rows[column]
            return torch.lerp(known.where(~known.isnan(), 1.0), torch.ones(()), self.decay) + count

        return {"alpha": moved("alpha", solved), "beta": moved("beta", drawn - solved)}


@dataclass(frozen=True)
class ZeroVarianceStreak(Memory):
    """The columns `streak` and `solved`.

    streak <- streak + 1 if reward_std = 0, else 0;    solved <- the last share solved
    """

    @property
    def columns(self) -> tuple[Column, ...]:
        return (Column("streak", torch.int32, 0), Column("solved"))

    @property
    def signals(self) -> tuple[str, ...]:
        return ("reward_std", "solved")

    def observe(self, rows: Rows, signals: Rows) -> Rows:
        streak = rows["streak"]
        longer = torch.where(signals["reward_std"] == 0, streak + 1, torch.zeros_like(streak))
        return {"streak": longer, "solved": signals["solved"]}


@dataclass(frozen=True)
class ThompsonPrompts(KeepsShare, ScoredPolicy):
    """Thompson sampling of prompts: those whose drawn success rate lies nearest to a target.

        on each observation, k of G completions solved
            alpha <- (1 - d) alpha + d + k,    beta <- (1 - d) beta + d + G - k,    d = decay
        at each choice, K = round(keep_ratio * N)
            r_i ~ Beta(alpha_i, beta_i)
            S = the K prompts of smallest |r_i - target|
        never observed = +inf: such prompts come first, ties broken at random

    A prompt teaches with probability 1 - p^G - (1 - p)^G, which is highest at p = 1/2.

    The rule is MoPPS. Update and defaults follow notes of the authors' code; the file itself could
    not be read again. Its lambda is 1 - decay, and both are 0.5. Two things differ. There the B
    prompts of a step are the nearest of 8 B random candidates. Here they are the nearest of all
    prompts, once an epoch. There a prompt never observed draws from the uniform prior. Here it
    comes first.

    Cost: keep_ratio (the rewards are free); two floats per prompt; O(N) per choice.

    Args:
        keep_ratio: Share of the prompts rolled out in an epoch, in (0, 1].
        target: The success rate that is sought, in [0, 1].
        decay: d, the share of what was known that an observation forgets, in [0, 1]. At 0 all
            completions count alike, at 1 only the last group counts.

    Paper: Qu et al. 2025, arXiv 2507.04632 (code thu-rllab/MoPPS).
    """

    target: float = 0.5
    decay: float = 0.5

    name = "thompson-prompts"
    paper_settings = {"keep_ratio": 0.125}  # noqa: RUF012  # read only

    def __post_init__(self) -> None:
        super().__post_init__()
        check_share("target", self.target)
        check_share("decay", self.decay)

    @property
    def memory(self) -> Memory:
        return BetaPosterior(self.decay)

    def score(self, table: SampleTable) -> Tensor:
        """(N,) minus the distance of the posterior's mean from the target."""
        mean = table["alpha"] / (table["alpha"] + table["beta"])
        return -(mean - self.target).abs()

    def plan(self, choice: Choice) -> EpochPlan:
        distance = _beta_draws(choice.table, choice.generator).sub_(self.target).abs_()
        # Prompts that a guard brings back stay first, those that it bars stay last.
        key = torch.where(choice.score.isfinite(), -distance, choice.score)
        return EpochPlan(top_k(key, choice.size, choice.generator))


@dataclass(frozen=True)
class GRESO(PruningPolicy):
    """Skips prompts whose last groups had equal rewards, the longer the streak the likelier.

        c_i = number of last visits in a row with reward_std = 0
        at each choice, prompt i is kept with probability
            1                    if c_i = 0, as for prompts never observed
            max(p_easy^c_i, floor)    if c_i > 0 and the last group was solved
            max(p_hard^c_i, floor)    if c_i > 0 and it was not
        p_easy and p_hard, in [0.05, 0.95], such that of the prompts kept
            target * easy_share        are expected to be of the second kind
            target * (1 - easy_share)  of the third

    So the rule keeps every prompt that taught at its last visit. With `drop_last`, as in
    `hf_dynprune.grpo`, it keeps at least one batch.

    Skipping, limits and defaults follow notes of the authors' code, of which the training loop was
    read again. One thing differs. The code moves both rates by 0.01 after each step, towards the
    target share among the rollouts of the step. Here a choice is made once an epoch, for which such
    steps are too small. The rates are solved for instead, from the table: a prompt with c_i > 0 is
    expected to teach nothing again. The code also filters after rollout and fits the size of its
    rollout batches. That is not part of the choice.

    Cost: the prompts kept, which depends on the data; an int and a float per prompt; O(N) per
    choice.

    Args:
        target: Share of the kept prompts that are expected to have equal rewards, in [0, 1).
        easy_share: Share of these that were solved, in [0, 1].
        floor: The least probability to keep a prompt, in [0, 1]; 1 keeps all.

    Paper: Zheng et al. 2025, arXiv 2506.02177 (code Infini-AI-Lab/GRESO).
    """

    target: float = 0.25
    easy_share: float = 1 / 3
    floor: float = 0.01

    name = "greso"
    # The authors' limits of p_easy and p_hard.
    rates: ClassVar[tuple[float, float]] = (0.05, 0.95)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("target", self.target, "a share in [0, 1)", lambda share: 0 <= share < 1)
        check_share("easy_share", self.easy_share)
        check_share("floor", self.floor)

    @property
    def memory(self) -> Memory:
        return ZeroVarianceStreak()

    def plan(self, choice: Choice) -> EpochPlan:
        keep = self.chances(choice.table)
        kept = torch.rand(choice.n, dtype=torch.float64, generator=choice.generator) < keep
        # With drop_last, fewer prompts than fill a batch would not be rolled out at all.
        least = choice.shape.global_batch if choice.shape.drop_last else 1
        missing = min(choice.n, least) - int(torch.count_nonzero(kept))
        if missing > 0:
            kept |= draw(~kept, missing, choice.generator)
        return EpochPlan(indices_of(kept))

    def chances(self, table: SampleTable) -> Tensor:
        """(N,) float64: the probability to keep each prompt."""
        streak = table["streak"]
        failing = streak > 0
        easy = failing & (table["solved"] >= 0.5)
        useful = len(table) - int(torch.count_nonzero(failing))
        chances = torch.ones(len(table), dtype=torch.float64)
        shares = ((easy, self.easy_share), (failing & ~easy, 1 - self.easy_share))
        for kind, share in shares:
            sought = useful * self.target * share / (1 - self.target)
            chances[kind] = self._chances_of(streak[kind], sought)
        return chances

    def _chances_of(self, streak: Tensor, sought: float) -> Tensor:
        """(M,) float64 max(p^c, floor), with the rate p at which their sum is `sought`."""
        lengths, counts = torch.unique(streak, return_counts=True)
        low, high = self.rates
        for _ in range(50):  # halves the interval to rounding
            rate = (low + high) / 2
            expected = (counts * (rate ** lengths.double()).clamp(min=self.floor)).sum()
            low, high = (rate, high) if expected < sought else (low, rate)
        return (high ** streak.double()).clamp(min=self.floor)


def _beta_draws(table: SampleTable, generator: torch.Generator) -> Tensor:
    """(N,) float32: a draw from the posterior of each prompt; from the prior if there is none."""
    # torch's own Beta draws from the global generator.
    seed = int(torch.randint(1 << 62, (), generator=generator))
    source = np.random.default_rng(seed)
    drawn = torch.empty(len(table))
    for begin in range(0, len(table), _BLOCK):
        block = slice(begin, begin + _BLOCK)
        alpha, beta = (table[name][block].nan_to_num(1.0).double() for name in ("alpha", "beta"))
        drawn[block] = torch.from_numpy(source.beta(alpha.numpy(), beta.numpy()))
    return drawn
