"""EffectiveShare: as many samples as still matter, drawn by how much they matter."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..checks import check_number
from ..potential import Kind, Magnitude, effective_share
from ..selection import keep_count, top_k
from ..table import Last, Memory, SampleTable
from .base import Choice, EpochPlan, ScoredPolicy, usable
from .by_loss import proportional_keys


@dataclass(frozen=True)
class EffectiveShare(ScoredPolicy):
    """Keeps the effective share of the data, drawn without replacement in proportion to s.

        s_i = 1 - exp(-u_i)    of the last observation u_i of a sample, for kind="likelihood"
        at each choice, over the M samples whose s is known
            share = (sum s)^2 / (M sum s^2)
            K = round(share * N), at least round(least * N), at most round(most * N)
            S = K samples drawn one after the other, with probabilities proportional to s_i
        never observed = +inf: such samples come first, ties broken at random

    There is no ratio to choose. While all samples matter alike, an epoch trains on `most` of the
    data; as samples are learned, on less. There are no weights. The draw is that of
    [`LossProportional`]. If no s is known, K is the most; if all are 0, the least. Otherwise
    samples that a guard bars, and those without a finite observation, are not counted in N. With
    `drop_last` at least one batch is kept.

    The share is Kish's effective sample size over M, see `hf_dynprune.potential`. The rule is
    ours; docs/pays.md says what it gave in each study.

    Cost: the effective share, which depends on the data (training losses are free); one float per
    sample; O(N) per choice.

    Args:
        least: Share of the samples that a choice keeps at least, in (0, 1].
        most: Share that it keeps at most, in [least, 1].
        signal: What is observed, `"loss"` or another signal.
        kind: How s follows from it, see [`Magnitude`]: `"likelihood"` for losses that are a
            negative log-likelihood, `"error"` for squared errors (regression), `"signal"` for s
            itself.

    Raises:
        ValueError: At a choice, if observations are negative and none is positive: then they are
            not what `kind` says.
    """

    least: float = 0.1
    most: float = 1.0
    signal: str = "loss"
    kind: Kind = "likelihood"

    name = "effective-share"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("least", self.least, "a share in (0, 1]", lambda share: 0 < share <= 1)
        expected = f"a share in [least, 1] = [{self.least}, 1]"
        check_number("most", self.most, expected, lambda share: self.least <= share <= 1)
        _ = self.magnitude  # raises if there is no such kind

    @property
    def magnitude(self) -> Magnitude:
        """How s follows from an observation."""
        return Magnitude(self.signal, self.kind)

    @property
    def memory(self) -> Memory:
        return Last(self.signal)

    def score(self, table: SampleTable) -> Tensor:
        """(N,) s of each sample; 0 for a negative observation."""
        values = table[self.signal]
        if bool((values < 0).any()) and not bool((values > 0).any()):
            raise ValueError(
                f"No observation of {self.signal!r} is positive, the lowest is "
                f"{float(values[values.isfinite()].min()):g}, so no sample would matter: expected "
                f"what kind={self.kind!r} reads. Take another kind or signal, or RandomPruning."
            )
        return self.magnitude.of(values.clamp(min=0))

    def expected_share(self, n: int) -> tuple[float, float]:
        """Its limits: the share falls as samples are learned, and how far is not known before.

        At the end of the loss-proportional runs of our studies it was 0.58 to 1.
        """
        return self.least, self.most

    def plan(self, choice: Choice) -> EpochPlan:
        key = proportional_keys(choice.score, choice.generator)
        return EpochPlan(top_k(key, self._size(choice), choice.generator))

    def _size(self, choice: Choice) -> int:
        score, n = choice.score, choice.n
        least, most = keep_count(self.least, n), keep_count(self.most, n)
        if choice.shape.drop_last:  # fewer would not be trained at all
            least = max(least, min(n, choice.shape.global_batch))
        known = score[score.isfinite()]
        if len(known) == 0:
            return max(least, most)
        share = effective_share(known) if bool((known > 0).any()) else 0.0
        return max(least, min(round(share * int(torch.count_nonzero(usable(score)))), most))
